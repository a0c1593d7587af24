"""What clients send in a round, and the stages that it goes through between local training and the server's
sum.

Stages see the uploads of a few clients at a time, however an engine cuts a round, and must treat each client
alike whoever is with it: norms are summed in an order that depends neither on padding nor on the number of
clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.state import State


@dataclass(frozen=True)
class Uploads:
    """The uploads of C clients in one round.

    Attributes:
        updates: {name: [C, ...]} local minus global value; [C, R, W] for item tables where `rows` is given.
        weights: float64 [C], of each client in the sum.
        rows: [C, R] rows of the item tables' updates, distinct, -1 at padding; None where they are whole.
        tables: names of the updates that `rows` belongs to.
        clients: int64 [C], user ids.
        round, attempt: 1-based number of the round, and how often it was repeated before.
    """

    updates: Mapping[str, Tensor]
    weights: Tensor
    rows: Tensor | None
    tables: frozenset[str]
    clients: Tensor
    round: int
    attempt: int = 0

    def rows_of(self, name: str) -> Tensor | None:
        """Rows [C, R] that the update `name` lands on; None where it is whole."""
        return self.rows if name in self.tables else None

    def whole(self, name: str, client: int, shape: torch.Size) -> Tensor:
        """The update `name` of one client by its place here, in the parameter's shape: zero in rows that it
        did not touch."""
        update, rows = self.updates[name][client], self.rows_of(name)
        if rows is None:
            return update
        held = rows[client] >= 0
        return update.new_zeros(shape).index_copy_(0, rows[client][held], update[held])

    def norms(self, order: Literal[1, 2]) -> Tensor:
        """L1 or L2 norm of each client's whole upload: float64 [C], NaN or infinite where a value is."""
        total = torch.zeros_like(self.weights)
        for name, update in self.updates.items():
            values = update.detach().to(torch.float64)
            rows = self.rows_of(name)
            if rows is not None:
                values = values.masked_fill((rows < 0).unsqueeze(-1), 0.0)
            total = total + pairwise_sum((values.abs() if order == 1 else values.square()).flatten(1))
        return total if order == 1 else total.sqrt()

    def selected(self, keep: Tensor) -> Uploads:
        """The uploads of the clients where `keep` (bool [C]) is true."""
        return Uploads(
            {name: update[keep] for name, update in self.updates.items()},
            self.weights[keep],
            None if self.rows is None else self.rows[keep],
            self.tables,
            self.clients[keep],
            self.round,
            self.attempt,
        )

    def zeroed(self, clients: Tensor) -> Uploads:
        """The same with updates of exactly zero where `clients` (bool [C]) is true, whatever was there."""
        updates = {
            name: update.masked_fill(clients.view(-1, *[1] * (update.dim() - 1)), 0.0)
            for name, update in self.updates.items()
        }
        return self.replaced(updates=updates)

    def replaced(self, updates: Mapping[str, Tensor] | None = None, weights: Tensor | None = None) -> Uploads:
        """A copy with other updates or weights."""
        return Uploads(
            self.updates if updates is None else updates,
            self.weights if weights is None else weights,
            self.rows,
            self.tables,
            self.clients,
            self.round,
            self.attempt,
        )


class UploadStage:
    """A step between local training and the sum.

    A stage that keeps something about clients changes it on `commit` alone, so that a round that is not
    applied leaves it as it was, and hands it to checkpoints (`state.Stateful`).
    """

    def __call__(self, uploads: Uploads) -> Iterable[Uploads]:
        """The uploads that go on, in the same order of clients, in one or several parts."""
        raise NotImplementedError

    def commit(self) -> None:
        """The round is applied."""

    def discard(self) -> None:
        """The uploads since the last `commit` are not applied."""

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`. Default: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`. Default: nothing."""


def pairwise_sum(values: Tensor) -> Tensor:
    """Sum of each row of [C, n], neighbours first, then neighbouring sums.

    The tree over the first elements is the same whatever zeros follow, and additions are elementwise, so the
    result is the same bits for any padding, number of rows, threads or device.
    """
    if values.shape[1] == 0:
        return values.new_zeros(len(values))
    while values.shape[1] > 1:
        if values.shape[1] % 2:
            values = F.pad(values, (0, 1))
        values = values[:, 0::2] + values[:, 1::2]
    return values[:, 0]
