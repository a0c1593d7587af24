"""FedPerGNN: a light graph layer on the client's own subgraph, then a dot product.

Wu et al., "A federated graph neural network framework for privacy-preserving personalization", Nature
Communications 13, 3091, 2022, with the layer of LightGCN (He et al., SIGIR 2020). A client knows the edges to
its own items and no others, so its graph is a star: the user's degree is the number n of its items, each
item's is 1, and LightGCN's symmetric normalisation gives sum_i v_i / sqrt(n * 1). As there, the vectors of
all layers are averaged, which takes the place of a self-connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft_ext import ops
from fedpeft_ext.backbones.base import Backbone, ClientContext, register_backbone
from fedpeft_ext.backbones.initialisation import client_normal
from fedpeft_ext.nn import ItemEmbedding, Items


@register_backbone
class FedPerGNN(Backbone):
    """score(item) = user' . item_embedding(item), user' = (user + sum of own items' vectors / sqrt(n)) / 2.

    `user` [D] is local to the client; its training items are `context.history`. No edge of another client is
    ever read.
    """

    name: ClassVar[str] = "fedpergnn"
    local_parameters = ("user",)
    l2_parameters: ClassVar[tuple[str, ...]] = ("user",)
    takes_stacked: ClassVar[bool] = True
    uses_history: ClassVar[bool] = True

    def __init__(self, item_embedding: ItemEmbedding, dim: int) -> None:
        super().__init__(item_embedding, dim)
        self.user = nn.Parameter(torch.zeros(dim))

    def forward(self, items: Tensor | Items, context: ClientContext | None = None) -> Tensor:
        """Scores [P] of `items` [P], or [C, P] of [C, P] where the parameters are stacked."""
        if context is None:
            raise ValueError("context: expected one, whose history are the client's items, got None")
        neighbours = self.item_embedding(context.history)
        user = graph_layer(self.user, neighbours, context.history.ids)
        return ops.dot_scores(self.item_embedding(items), user)

    def initial_state(self, clients: Tensor, seed: int, init_std: float) -> dict[str, Tensor]:
        """User vectors [C, D], normal with standard deviation `init_std`."""
        return {"user": client_normal(clients, self.dim, seed, init_std).to(self.user)}

    @property
    def scoring_width(self) -> int:
        """Numbers held for a client and an item while scoring: the vectors of its own items."""
        return 3 * self.dim

    def catalogue_scores(
        self, vectors: Tensor, state: Mapping[str, Tensor], context: ClientContext
    ) -> Tensor:
        """Scores [C, I]: the graph layer, then one matrix product."""
        ids = context.history.ids
        neighbours = F.embedding(ids.clamp(min=0), vectors).masked_fill((ids < 0).unsqueeze(-1), 0)
        return graph_layer(state["user"], neighbours, ids) @ vectors.T


def graph_layer(user: Tensor, neighbours: Tensor, items: Tensor) -> Tensor:
    """The user's vector [(C,) D] after one LightGCN layer over its `items` [(C,) P].

    Args:
        user: [(C,) D].
        neighbours: [(C,) P, D] vectors of the items, zero at padding.
        items: [(C,) P], -1 at padding.
    """
    if items.shape[-1] == 0:
        return user / 2
    # A running sum adds in the order of positions and zeros at the end, so that padding changes no bit;
    # `sum` regroups its terms by length.
    total = neighbours.cumsum(-2)[..., -1, :]
    degree = (items >= 0).sum(-1, keepdim=True).clamp(min=1).to(user.dtype)
    return (user + total * degree.rsqrt()) / 2
