"""PFedRec: no user vector; each client has a score function of its own, an MLP on the item vector.

Zhang et al., "Dual Personalization on Federated Recommendation", IJCAI 2023. The item embedding is averaged
by the server, the MLP stays on the client from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft_ext.backbones.base import Backbone, ClientContext, register_backbone
from fedpeft_ext.backbones.mlp import MLP
from fedpeft_ext.nn import ItemEmbedding, Items


@register_backbone
class PFedRec(Backbone):
    """score(item) = MLP_client(item_embedding(item)), by default [D -> 64 -> 32 -> 1].

    A client that has not trained yet starts from the mean of the MLPs that the clients of the last round
    ended with, before the first round from the server's draw; evaluation takes the same rule. That mean is
    known to the server, and what it takes to send is counted. With privacy, whose noise does not cover it,
    no mean is taken and every client starts from the server's draw.

    Args:
        item_embedding, dim: see `Backbone`.
        hidden: widths of the hidden layers.
        dropout: probability of dropping a hidden unit in training.
    """

    name: ClassVar[str] = "pfedrec"
    options: ClassVar[tuple[str, ...]] = ("hidden", "dropout")
    takes_stacked: ClassVar[bool] = True

    def __init__(
        self,
        item_embedding: ItemEmbedding,
        dim: int,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(item_embedding, dim)
        self.mlp = MLP(dim, hidden, dropout)
        self.local_parameters = self.averaged_start = tuple(
            f"mlp.{name}" for name, _ in self.mlp.named_parameters()
        )

    def forward(self, items: Tensor | Items, context: ClientContext | None = None) -> Tensor:
        """Scores [P] of `items` [P], or [C, P] of [C, P] where the parameters are stacked."""
        ids = items.ids if isinstance(items, Items) else items
        scores: Tensor = self.mlp(self.item_embedding(items), ids, context)
        return scores

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the MLP that every client starts from."""
        self.mlp.reset_parameters(generator)

    def initial_state(self, clients: Tensor, seed: int, init_std: float) -> dict[str, Tensor]:
        """Nothing: what clients have of their own starts from a common value."""
        return {}

    @property
    def scoring_width(self) -> int:
        """Numbers held for a client and an item while scoring."""
        return 2 * self.mlp.width + self.dim

    def catalogue_scores(
        self, vectors: Tensor, state: Mapping[str, Tensor], context: ClientContext
    ) -> Tensor:
        """Scores [C, I], each client's MLP on all item vectors."""
        return self._scores(vectors.expand(len(context.client), -1, -1), state, context)

    def client_scores(self, items: Tensor, state: Mapping[str, Tensor], context: ClientContext) -> Tensor:
        """Scores [C, P] of each client's own `items` [C, P]."""
        return self._scores(self.item_embedding(items), state, context)

    def _scores(self, vectors: Tensor, state: Mapping[str, Tensor], context: ClientContext) -> Tensor:
        mlp = {name.removeprefix("mlp."): value for name, value in state.items()}
        items = torch.zeros(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
        scores: Tensor = torch.func.functional_call(self.mlp, mlp, (vectors, items, context))
        return scores
