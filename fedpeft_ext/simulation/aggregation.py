"""The server's side of a round: weighted sums of uploads, and the step that it takes along their mean.

Federated averaging (McMahan et al., AISTATS 2017): global += server_lr * sum_c w_c delta_c / sum_c w_c. With
`server_optimizer=adam` the mean is the pseudo-gradient of FedAdam (Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, algorithm 2: no bias correction). Sums are float64 and in the order of the clients,
however they come in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedpeft_ext import ops

SERVER_LR: Mapping[str, float] = {"avg": 1.0, "adam": 1e-2}
BETA1, BETA2, TAU = 0.9, 0.99, 1e-3  # of FedAdam, as in its paper


class Aggregator:
    """Streams clients' updates into float64 sums and applies their weighted mean to the global parameters.

    Args:
        parameters: {name: global parameter}, changed in place by `apply`.
        row_parameters: names whose updates come as [C, R, W] at given rows of [I, W].
        optimizer: `avg` or `adam`.
        lr: server learning rate; None is 1 for `avg`, 0.01 for `adam`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        row_parameters: frozenset[str],
        optimizer: Literal["avg", "adam"] = "avg",
        lr: float | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._row_parameters = row_parameters
        self._optimizer = optimizer
        self._lr = SERVER_LR[optimizer] if lr is None else lr
        self._totals = {name: self._zeros(p) for name, p in self._parameters.items()}
        self._moments = (
            {name: (self._zeros(p), self._zeros(p)) for name, p in self._parameters.items()}
            if (optimizer == "adam")
            else {}
        )
        self._weight = 0.0
        self._rows: list[Tensor] = []

    @staticmethod
    def _zeros(parameter: Tensor) -> Tensor:
        return torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)

    def add(self, updates: Mapping[str, Tensor], weights: Tensor, rows: Tensor | None = None) -> None:
        """Add the uploads of C clients.

        Args:
            updates: {name: [C, ...]} local minus global value; [C, R, W] for row parameters when `rows` is
                given.
            weights: float64 [C].
            rows: [C, R] rows of the row parameters' updates, -1 at padding; None where they are whole.
        """
        for name, update in updates.items():
            at = rows if name in self._row_parameters else None
            ops.accumulate_updates_(self._totals[name], update, weights, at)
        self._weight += float(weights.sum())
        if rows is not None:
            self._rows.append(rows)

    @torch.no_grad()
    def apply(self) -> None:
        """Take the server's step and forget the round's sums."""
        if self._weight > 0.0:
            touched = self._touched()
            for name, parameter in self._parameters.items():
                at = touched if name in self._row_parameters else None
                self._step(name, parameter, at)
        self._weight = 0.0
        self._rows = []

    def _step(self, name: str, parameter: Tensor, rows: Tensor | None) -> None:
        total = self._totals[name]
        if self._optimizer == "adam":
            mean = total / self._weight
            first, second = self._moments[name]
            first.lerp_(mean, 1.0 - BETA1)
            second.lerp_(mean.square(), 1.0 - BETA2)
            parameter.add_((self._lr * first / (second.sqrt() + TAU)).to(parameter.dtype))
            total.zero_()
        elif rows is None:
            parameter.add_((total * (self._lr / self._weight)).to(parameter.dtype))
            total.zero_()
        else:
            parameter[rows] += (total[rows] * (self._lr / self._weight)).to(parameter.dtype)
            total[rows] = 0.0

    def _touched(self) -> Tensor | None:
        """Distinct rows with an update, or None where going through the whole table is cheaper than finding
        them.
        """
        heights = [len(self._parameters[name]) for name in self._row_parameters]
        if not heights or not self._rows or sum(rows.numel() for rows in self._rows) >= max(heights):
            return None
        rows: Tensor = torch.unique(torch.cat([rows.flatten() for rows in self._rows]))
        touched: Tensor = rows[rows >= 0]
        return touched
