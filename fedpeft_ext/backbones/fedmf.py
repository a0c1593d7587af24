"""FedMF: federated matrix factorisation, a score is the dot product of a user vector and an item vector.

Chai et al., "Secure Federated Matrix Factorization", IEEE Intelligent Systems 36(5), 2021. The user vector
stays on the client; the item embedding is averaged by the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedpeft_ext import ops
from fedpeft_ext.backbones.base import Backbone, ClientContext, register_backbone
from fedpeft_ext.backbones.initialisation import client_normal
from fedpeft_ext.nn import ItemEmbedding, Items


@register_backbone
class FedMF(Backbone):
    """score(item) = user . item_embedding(item), with `user` [D] local to the client."""

    name: ClassVar[str] = "fedmf"
    local_parameters = ("user",)
    l2_parameters: ClassVar[tuple[str, ...]] = ("user",)
    default_lr: ClassVar[float] = 1e-2
    takes_stacked: ClassVar[bool] = True

    def __init__(self, item_embedding: ItemEmbedding, dim: int) -> None:
        super().__init__(item_embedding, dim)
        self.user = nn.Parameter(torch.zeros(dim))

    def forward(self, items: Tensor | Items, context: ClientContext | None = None) -> Tensor:
        """Scores [P] of `items` [P], or [C, P] of [C, P] where the parameters are stacked."""
        return ops.dot_scores(self.item_embedding(items), self.user)

    def initial_state(self, clients: Tensor, seed: int, init_std: float) -> dict[str, Tensor]:
        """User vectors [C, D], normal with standard deviation `init_std`."""
        return {"user": client_normal(clients, self.dim, seed, init_std).to(self.user)}

    @property
    def scoring_width(self) -> int:
        """Numbers held for a client and an item while scoring the catalogue: the score."""
        return 1

    def catalogue_scores(
        self, vectors: Tensor, state: Mapping[str, Tensor], context: ClientContext
    ) -> Tensor:
        """Scores [C, I] as one matrix product."""
        return state["user"] @ vectors.T
