"""FedNCF: federated neural collaborative filtering, a score is an MLP of the user and the item vector.

Perifanis and Efraimidis, "Federated Neural Collaborative Filtering", Knowledge-Based Systems 242, 2022, after
He et al., "Neural Collaborative Filtering", WWW 2017. The user vector stays on the client; the MLP is
averaged by the server like the item embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedpeft_ext.backbones.base import Backbone, ClientContext, register_backbone
from fedpeft_ext.backbones.initialisation import client_normal
from fedpeft_ext.backbones.mlp import MLP
from fedpeft_ext.nn import ItemEmbedding, Items


@register_backbone
class FedNCF(Backbone):
    """score(item) = MLP([user, item_embedding(item)]), by default [2 D -> 64 -> 128 -> 64 -> 1].

    Args:
        item_embedding, dim: see `Backbone`.
        hidden: widths of the hidden layers.
        dropout: probability of dropping a hidden unit in training.
    """

    name: ClassVar[str] = "fedncf"
    options: ClassVar[tuple[str, ...]] = ("hidden", "dropout")
    local_parameters = ("user",)
    l2_parameters: ClassVar[tuple[str, ...]] = ("user",)
    takes_stacked: ClassVar[bool] = True

    def __init__(
        self,
        item_embedding: ItemEmbedding,
        dim: int,
        hidden: Sequence[int] = (64, 128, 64),
        dropout: float = 0.5,
    ) -> None:
        super().__init__(item_embedding, dim)
        self.user = nn.Parameter(torch.zeros(dim))
        self.mlp = MLP(2 * dim, hidden, dropout)

    def forward(self, items: Tensor | Items, context: ClientContext | None = None) -> Tensor:
        """Scores [P] of `items` [P], or [C, P] of [C, P] where the parameters are stacked."""
        ids = items.ids if isinstance(items, Items) else items
        scores: Tensor = self.mlp(self.item_embedding(items), ids, context, self.user)
        return scores

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the MLP anew."""
        self.mlp.reset_parameters(generator)

    def initial_state(self, clients: Tensor, seed: int, init_std: float) -> dict[str, Tensor]:
        """User vectors [C, D], normal with standard deviation `init_std`."""
        return {"user": client_normal(clients, self.dim, seed, init_std).to(self.user)}

    @property
    def scoring_width(self) -> int:
        """Numbers held for a client and an item while scoring."""
        return 2 * self.mlp.width

    def catalogue_scores(
        self, vectors: Tensor, state: Mapping[str, Tensor], context: ClientContext
    ) -> Tensor:
        """Scores [C, I]: the first layer is a sum of a part of the client and one of the item."""
        return self._scores(vectors.expand(len(context.client), -1, -1), state["user"])

    def client_scores(self, items: Tensor, state: Mapping[str, Tensor], context: ClientContext) -> Tensor:
        """Scores [C, P] of each client's own `items` [C, P]."""
        return self._scores(self.item_embedding(items), state["user"])

    def _scores(self, vectors: Tensor, user: Tensor) -> Tensor:
        # All clients share the MLP, so their positions are those of one: its weights are not copied.
        clients, positions, _ = vectors.shape
        inputs = torch.cat([user[:, None].expand(-1, positions, -1), vectors], -1).flatten(0, 1)
        items = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        scores: Tensor = self.mlp(inputs, items, None)
        return scores.view(clients, positions)
