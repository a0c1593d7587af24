"""The hidden layers that FedNCF and PFedRec share, on one client or on stacked clients.

A layer's weights are those of an ordinary `torch.nn.Linear`; it is computed by `ops.client_mlp`, so that
results do not depend on padding or on how clients are grouped. The last layer, from the last hidden width to
the score, has no bias, as in He et al., "Neural Collaborative Filtering", WWW 2017, eq. 10: a constant added
to all scores changes no ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedpeft_ext import ops
from fedpeft_ext.backbones.base import ClientContext


class MLP(nn.Module):
    """Layers in_width -> hidden[0] -> ... -> hidden[-1] -> 1.

    Args:
        in_width: width of the input.
        hidden: widths of the hidden layers, at least one.
        dropout: probability of dropping a hidden unit in training, in [0, 1).

    Raises:
        ValueError: no hidden layer, a width below 1, or a dropout outside of [0, 1).
    """

    def __init__(self, in_width: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden: expected at least one width of at least 1, got {list(hidden)}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to below 1, got {dropout}")
        widths = [in_width, *hidden]
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Parameter(torch.empty(hidden[-1]).uniform_(-1, 1) / hidden[-1] ** 0.5)

    @property
    def width(self) -> int:
        """The widest hidden layer."""
        return max(len(weight) for weight in self.weights())

    def weights(self) -> list[Tensor]:
        """Weights of the hidden layers, first to last."""
        return [layer.weight for layer in self.layers if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Uniform draws from +-1/sqrt(inputs), as `nn.Linear` does."""

        def draw(shape: torch.Size, bound: float) -> Tensor:
            return torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)

        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                parameter.copy_(draw(parameter.shape, bound))
        bound = len(self.output) ** -0.5
        self.output.copy_(draw(self.output.shape, bound))

    def forward(
        self, x: Tensor, items: Tensor, context: ClientContext | None, user: Tensor | None = None
    ) -> Tensor:
        """Scores [(C,) P] of inputs x [(C,) P, I]; `items` [(C,) P] tells the padding.

        With `user` [(C,) U] the input is [user, x], U + I wide: the part of the first layer that reads the
        user is the same at every position and is computed once.
        """
        drop = self.dropout if self.training else 0.0
        if drop > 0.0 and context is None:
            raise ValueError("context: expected one in training with dropout, which is drawn from its keys")
        keys = (0, 0, 0) if context is None else (context.seed, context.round, context.epoch)
        clients = items.new_zeros(items.shape[:-1]) if context is None else context.client
        weights = self.weights()
        biases: list[Tensor] = [layer.bias for layer in self.layers if isinstance(layer, nn.Linear)]
        if user is not None:
            parts = torch.split(weights[0], [user.shape[-1], x.shape[-1]], -1)
            biases[0] = biases[0] + ops.dot_scores(parts[0], user)
            weights[0] = parts[1]
        return ops.client_mlp(x, weights, biases, self.output, items, clients, drop, *keys)
