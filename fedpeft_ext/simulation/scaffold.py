"""SCAFFOLD's control variates: what keeps local training from drifting to a client's own optimum.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1
with option II. The server holds c and each client c_i, of the shape of the averaged parameters and zero at
first. A local step goes along g - c_i + c. After K steps of size eta from x to y the client keeps

    c_i' = c_i - c + (x - y) / (K eta),

which is the mean of its K gradients g, and sends y - x and c_i' - c_i. The server adds the mean of the latter
over *all* clients to c, weighted like updates are.

Item tables. A row that a client touched neither in this round nor in its last has g = c_i = c_i' = 0, yet it
moves by -K eta c. This part is the same for every such row and for every client but for K, so clients leave
it out of what they compute: what they send is summed without it, and the server subtracts (sum of w K eta) c
from the sum once a round. The rest is zero outside of the rows of the two rounds, and c_i of the last. So a
client costs what it touches, as without control variates, and the result is exact. (What is *counted* as sent
are whole tensors, as everywhere.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpeft_ext import ops
from fedpeft_ext.simulation.aggregation import zeros_for
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.state import State, below, copy_into, prefixed


class _Variate(NamedTuple):
    """c_i of one client: `rows` [R] ascending with {table: [R, W]} there, zero elsewhere; {other: [...]}."""

    rows: Tensor
    values: dict[str, Tensor]


class ControlVariates:
    """c of the server and c_i of every client that has trained.

    A round is a transaction: what `write` is given is kept apart until `commit`, and forgotten by `discard`.

    Args:
        parameters: {name: global parameter} of all that is averaged.
        tables: names of those [I, W] of which a client touches a few rows.
        total_weight: sum of all clients' weights in the average.

    Attributes:
        server: {name: float64}, c.
        clients: {client: c_i}.
    """

    def __init__(self, parameters: Mapping[str, Tensor], tables: frozenset[str], total_weight: float) -> None:
        self._parameters = {name: p.detach() for name, p in parameters.items()}
        self._tables = tables
        self._total_weight = total_weight
        self.server = {name: zeros_for(p) for name, p in self._parameters.items()}
        self.clients: dict[int, _Variate] = {}
        self._written: dict[int, _Variate] = {}
        self._change = {name: zeros_for(p) for name, p in self._parameters.items()}
        self._left_out = 0.0

    def rows(self, clients: Tensor) -> Tensor:
        """Rows [C, R] of the tables where the c_i of `clients` [C] may not be zero, -1 behind."""
        none = clients.new_empty(0)
        rows = [self.clients[c].rows if c in self.clients else none for c in clients.tolist()]
        if not rows:
            return clients.new_empty(0, 0)
        padded: Tensor = pad_sequence(rows, batch_first=True, padding_value=-1)
        return padded

    def own(self, clients: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """c_i of `clients` [C]: {name: [C, ...]}; tables at `rows` [C, R], [C, R, W], or whole if None."""
        device = clients.device
        known = [self.clients.get(c) for c in clients.tolist()]
        result = {
            name: torch.stack([torch.zeros_like(p) if own is None else own.values[name] for own in known])
            for name, p in self._parameters.items()
            if name not in self._tables
        }
        if not self._tables:
            return result
        held = [own for own in known if own is not None]
        counts = torch.tensor([0 if own is None else len(own.rows) for own in known], device=device)
        stride = max(len(self._parameters[name]) for name in self._tables)
        at = torch.cat([clients.new_empty(0), *(own.rows for own in held)])
        keys = at + stride * torch.repeat_interleave(counts)  # ascending
        if rows is None:
            rows = torch.arange(stride, device=device).expand(len(clients), -1)
        places = torch.arange(len(clients), device=device)[:, None] * stride + rows
        index = torch.searchsorted(keys, places).clamp_(max=max(len(keys) - 1, 0))
        for name in self._tables:
            table = self._parameters[name]
            result[name] = table.new_zeros(*places.shape, table.shape[1])
            if len(keys):
                found = (rows >= 0) & (keys[index] == places)
                result[name][found] = torch.cat([own.values[name] for own in held])[index[found]]
        return result

    def common(self, clients: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """c for C clients, {name: [C, ...]}, in the dtype of the parameters; tables as in `own`."""
        result = {}
        for name, parameter in self._parameters.items():
            value = self.server[name]
            if name in self._tables and rows is not None:
                result[name] = ops.client_embedding(rows, value).to(parameter.dtype)
            else:
                result[name] = value.to(parameter.dtype).expand(len(clients), *value.shape)
        return result

    def write(
        self,
        clients: Tensor,
        rows: Tensor | None,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        weights: Tensor,
        left_out: Tensor | None = None,
    ) -> None:
        """What C clients end a round with.

        Args:
            clients: int64 [C].
            rows: [C, R] of the tables' values, ascending, -1 behind, with all of `rows(clients)`; None where
                they are whole.
            before: c_i, as `own` gave it.
            after: c_i', likewise.
            weights: float64 [C].
            left_out: float64 [C], K eta of each client whose tables' updates are without -K eta c; None where
                none are.
        """
        for name, value in after.items():
            at = rows if name in self._tables else None
            ops.accumulate_updates_(self._change[name], value - before[name], weights, at)
        if left_out is not None:
            # Client by client, so that chunks make no difference.
            for weight, length in zip(weights.tolist(), left_out.tolist(), strict=True):
                self._left_out += weight * length
        tables = sorted(self._tables)
        for c, client in enumerate(clients.tolist()):
            values = {name: after[name][c].clone() for name in after if name not in self._tables}
            kept = clients.new_empty(0)
            if tables:
                moved = torch.stack([(after[name][c] != 0).any(-1) for name in tables]).any(0)
                if rows is not None:
                    moved &= rows[c] >= 0
                places = moved.nonzero().squeeze(1)
                kept = places if rows is None else rows[c][places]
                values |= {name: after[name][c][places] for name in tables}
            self._written[client] = _Variate(kept, values)

    def exchange(self, ranks: Ranks) -> None:
        """Make what was written for the server that of all ranks; every c_i stays where its client is."""
        ranks.sum_(list(self._change.values()))
        self._left_out = float(ranks.sum_numbers(np.array([self._left_out]))[0])

    def settle(self, totals: Mapping[str, Tensor]) -> bool:
        """Bring what clients left out into the sums of uploads {name: float64}.

        Returns:
            Whether it changed rows beside those that clients sent.
        """
        if self._left_out == 0.0:
            return False
        for name in self._tables:
            totals[name].sub_(self.server[name], alpha=self._left_out)
        return True

    def commit(self) -> None:
        """The round is applied."""
        self.clients |= self._written
        for name, change in self._change.items():
            self.server[name].add_(change, alpha=1.0 / self._total_weight)
        self.discard()

    def discard(self) -> None:
        """Forget what was written since the last `commit`."""
        self._written = {}
        self._left_out = 0.0
        for change in self._change.values():
            change.zero_()

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`: c; and all c_i, joined, with the client and the number of rows of each."""
        held = {c: own for c, own in self.clients.items() if ranks is None or c in ranks.owned}
        device = next(iter(self.server.values())).device
        clients: State = {
            "clients": torch.tensor(list(held), dtype=torch.int64, device="cpu"),
            "sizes": torch.tensor([len(own.rows) for own in held.values()], dtype=torch.int64, device="cpu"),
            "rows": torch.cat(
                [torch.zeros(0, dtype=torch.int64, device=device), *(v.rows for v in held.values())]
            ),
        }
        for name, parameter in self._parameters.items():
            shape = parameter.shape[1:] if name in self._tables else parameter.shape
            parts = [
                own.values[name] if name in self._tables else own.values[name][None] for own in held.values()
            ]
            clients[f"values.{name}"] = torch.cat([parameter.new_zeros(0, *shape), *parts])
        if ranks is not None:
            clients = {name: ranks.gather_rows(values) for name, values in clients.items()}
        return prefixed("server", self.server) | clients

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        self.discard()
        copy_into(self.server, below("server", state))
        self.clients = {}
        sizes = state["sizes"].tolist()
        device = next(iter(self.server.values())).device
        rows = [part.to(device, copy=True) for part in torch.split(state["rows"], sizes)]
        parts = {}
        for name in self._parameters:
            joined: Tensor = state[f"values.{name}"]
            pieces: Sequence[Tensor] = torch.split(joined, sizes) if name in self._tables else joined.unbind()
            parts[name] = [piece.to(device, copy=True) for piece in pieces]
        for index, client in enumerate(state["clients"].tolist()):
            values = {name: pieces[index] for name, pieces in parts.items()}
            self.clients[client] = _Variate(rows[index], values)


def check_memory(parameters: Mapping[str, Tensor], tables: frozenset[str], touched: Sequence[int]) -> None:
    """Refuse control variates that this machine cannot hold.

    Args:
        parameters, tables: as of `ControlVariates`.
        touched: for each client, the most rows of a table that it touches in a round.

    Raises:
        ValueError: they would take more than the machine's memory; names both.
    """
    whole = sum(p.numel() * p.element_size() for name, p in parameters.items() if name not in tables)
    row = 8 + sum(parameters[name].shape[1] * parameters[name].element_size() for name in tables)
    needed = len(touched) * whole + (sum(touched) * row if tables else 0)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ValueError(
            f"training.algorithm: scaffold keeps a control variate for each of {len(touched):,} clients, "
            f"up to {needed / 1e9:,.1f} GB, more than this machine's memory of {available / 1e9:,.1f} GB; "
            "expected fedavg, or an embedding with fewer parameters"
        )
