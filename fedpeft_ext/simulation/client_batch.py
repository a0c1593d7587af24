"""Clients as tensors: their interactions, their local state, and the cutting of a round's clients into
chunks.

A round's clients are sorted by (number of items, id) and cut into chunks of near-equal length, whose items
become one padded matrix [C, P]. The order is that of the whole round, so sums over clients do not depend on
where it is cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext import ops
from fedpeft_ext.ops.aggregate import exact_grid
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.memory import table_zeros
from fedpeft_ext.simulation.state import State, below, copy_into, prefixed

if TYPE_CHECKING:
    from fedpeft_ext.backbones import Backbone
    from fedpeft_ext.data import Dataset

TRAINED = "clients_trained"
"""Name, among a finished run's tensors, of bool [U]: which clients have a state of their own."""

DRAWN_AT_A_TIME = 1 << 14
"""Clients whose initial state is drawn at once: more only takes memory."""


class Interactions:
    """Training interactions on a device: ragged rows of items, oldest first, and sorted for sampling.

    Attributes:
        num_users, num_items: sizes U and I.
        user_ids: external ids, by number.
        sizes: int64 [U] on the host, training items of each user.
        indptr, items: int64 [U + 1] and [nnz], each user's training items, oldest first.
        positives: (indptr [U + 1], indices [nnz] ascending in each user), int64, what `ops.sample_negatives`
            reads.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.num_users = dataset.num_users
        self.num_items = dataset.num_items
        self.user_ids = dataset.user_ids
        self.device = device
        self.sizes = np.diff(dataset.indptr)
        self.indptr = _readable(dataset.indptr).to(device)
        self.items = _readable(dataset.indices).to(device)
        self.positives = self.indptr, _readable(dataset.positives()[1]).to(device)

    def by_size(self, users: np.ndarray) -> np.ndarray:
        """`users` (int64) in the order in which engines take them: by (size, id)."""
        return users[np.lexsort((users, self.sizes[users]))]

    def padded(self, users: Tensor) -> Tensor:
        """Items int64 [C, P] of `users` [C], oldest first, padded with -1 to the longest."""
        start, stop = self.indptr[users], self.indptr[users + 1]
        sizes = (stop - start)[:, None]
        width = int(sizes.max()) if len(users) else 0
        position = torch.arange(width, device=self.device)[None]
        inside = position < sizes
        # Past a user's end the index is clipped to something readable and the value replaced.
        source = (start[:, None] + position).clamp_(max=max(len(self.items) - 1, 0))
        if len(self.items) == 0:
            return torch.full(inside.shape, -1, dtype=torch.int64, device=self.device)
        return torch.where(inside, self.items[source], -1)


def _readable(array: np.ndarray) -> Tensor:
    """A tensor to read over the memory of an array, which may be a read-only map of a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class ClientStore:
    """State that never leaves the clients (user vectors, personal networks): one row a client.

    A round is a transaction: what `write` is given is kept apart until `commit`, and forgotten by `discard`.

    Args:
        state: {parameter name: [U, ...]}.
        starts: {parameter name: [...]} of further parameters, which all clients start from the same value of.
            When a round is committed, its clients' mean becomes the value that clients who have not trained
            yet start from; their rows are not written, so a round costs nothing for them.
        num_clients: U, needed with `starts`.

    Attributes:
        trained: bool [U], the clients that have a state of their own; only kept with `starts`.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        starts: Mapping[str, Tensor] | None = None,
        num_clients: int = 0,
    ) -> None:
        self.state = dict(state)
        self.starts = {name: value.detach().clone() for name, value in (starts or {}).items()}
        self.state |= {
            name: lazy_zeros(value[None], num_clients, huge=False) for name, value in self.starts.items()
        }
        self._written: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        devices = [value.device for value in self.starts.values()]
        self.trained = torch.zeros(num_clients, dtype=torch.bool, device=devices[0]) if devices else None

    @classmethod
    def of_everyone(
        cls, rows: Mapping[str, Tensor], starts: Mapping[str, Tensor], trained: Tensor | None = None
    ) -> ClientStore:
        """Clients with the state `rows` {parameter name: [U, ...]}; of which `starts` are those that new ones
        start from. `trained`, bool [U]: who has a state of their own; None: all.
        """
        store = cls(rows)
        if starts:
            some = next(iter(rows.values()))
            store.starts = dict(starts)
            everyone = torch.ones(len(some), dtype=torch.bool, device=some.device)
            store.trained = everyone if trained is None else trained
        return store

    def read(self, clients: Tensor) -> dict[str, Tensor]:
        """Copies [C, ...] of the rows of `clients` [C]; the common start for those that have none."""
        rows = {name: values.index_select(0, clients) for name, values in self.state.items()}
        if self.trained is not None:
            own = self.trained[clients]
            for name, start in self.starts.items():
                rows[name] = torch.where(own.view(-1, *[1] * start.dim()), rows[name], start)
        return rows

    def rows(self, clients: range) -> dict[str, Tensor]:
        """The state of consecutive clients [C, ...]: views of it, copies where not every row is written."""
        if self.trained is None:
            return {name: values[clients.start : clients.stop] for name, values in self.state.items()}
        return self.read(torch.arange(clients.start, clients.stop, device=self.trained.device))

    def write(self, clients: Tensor, state: Mapping[str, Tensor], accepted: Tensor | None = None) -> None:
        """On `commit`, replace the rows of `clients` [C] by [C, ...]; of those in `accepted` (bool [C]) if
        given. A client is written at most once a round.
        """
        if accepted is not None:
            clients, state = clients[accepted], {name: values[accepted] for name, values in state.items()}
        self._written.append(
            (clients, {name: v.detach() if v.requires_grad else v for name, v in state.items()})
        )

    def commit(self, ranks: Ranks | None = None, average: bool = True) -> None:
        """Take over what was written since the last `commit` or `discard`.

        Args:
            ranks: processes whose clients are averaged together.
            average: make the mean of it the start of clients without a state.
        """
        for clients, state in self._written:
            for name, values in state.items():
                self.state[name].index_copy_(0, clients, values)
            if self.trained is not None:
                self.trained[clients] = True
        if self.starts and average:
            self._average_starts(ranks)
        self.discard()

    def _average_starts(self, ranks: Ranks | None) -> None:
        counts = np.array([float(sum(len(clients) for clients, _ in self._written))])
        count = float((counts if ranks is None else ranks.sum_numbers(counts))[0])
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.starts.items()}
        for clients, state in self._written:
            ones = torch.ones(len(clients), dtype=torch.float64, device=clients.device)
            for name, total in sums.items():
                ops.accumulate_updates_(total, state[name], ones, None, exact_grid(count))
        if ranks is not None:
            ranks.sum_(list(sums.values()))
        if count > 0.0:
            self.starts = {name: (sums[name] / count).to(start.dtype) for name, start in self.starts.items()}

    def discard(self) -> None:
        """Forget what was written since the last `commit`."""
        self._written = []

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`."""
        held = prefixed("state", self.state)
        if self.trained is not None:
            held["trained"] = self.trained
        if ranks is not None:
            own = slice(ranks.owned.start, ranks.owned.stop)
            held = {name: ranks.gather_rows(values[own]) for name, values in held.items()}
        return held | prefixed("starts", self.starts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        copy_into(self.state, below("state", state))
        copy_into(self.starts, below("starts", state))
        if self.trained is not None:
            copy_into({"trained": self.trained}, state)


def initial_states(
    model: Backbone, drawn: Tensor, num_clients: int, seed: int, init_std: float
) -> dict[str, Tensor]:
    """Local parameters [U, ...] as `Backbone.initial_state` gives them to clients `drawn` (int64 [n]); zero
    for others.

    On the host the rows of others take no memory.
    """
    state: dict[str, Tensor] = {}
    for clients in torch.split(drawn.to(_device(model)), DRAWN_AT_A_TIME):
        for name, values in model.initial_state(clients, seed, init_std).items():
            if name not in state:
                state[name] = lazy_zeros(values, num_clients, huge=True)
            state[name][clients] = values
    return state


def lazy_zeros(like: Tensor, count: int, *, huge: bool) -> Tensor:
    """Zeros [count, ...] for rows like those of `like`, which (on the host) take memory when written; `huge`:
    most of them will be, so that huge pages cost nothing."""
    return table_zeros((count, *like.shape[1:]), like.dtype, like.device, huge=huge)


def _device(model: Backbone) -> torch.device:
    return next(model.parameters()).device


def plan_chunks(
    sizes: np.ndarray, *, overhead: int, position_bytes: int, client_bytes: int, max_bytes: float
) -> list[slice]:
    """Cut clients, sorted by ascending size, where that saves more padding than a further chunk costs.

    A chunk of C clients whose longest has P positions costs C * P + overhead. The best cut of a range is
    taken as long as it pays; then chunks are cut evenly to fit in memory, always with at least one client
    each.

    Args:
        sizes: int64 [n], ascending.
        overhead: fixed cost of a chunk, in padded positions.
        position_bytes: memory of one padded position of one client.
        client_bytes: memory of a client apart from its positions.
        max_bytes: memory of a chunk.
    """
    pending = [(0, len(sizes))] if len(sizes) else []
    parts = []
    while pending:
        start, stop = pending.pop()
        ends = np.arange(start + 1, stop)
        saved = (ends - start) * (sizes[stop - 1] - sizes[ends - 1])
        if len(saved) and saved.max() > overhead:
            middle = int(ends[np.argmax(saved)])
            pending += [(middle, stop), (start, middle)]  # the first half is next: parts come out in order
        else:
            parts.append((start, stop))

    chunks = []
    for start, stop in parts:
        most = max(1, int(max_bytes // max(1, int(sizes[stop - 1]) * position_bytes + client_bytes)))
        pieces = -(-(stop - start) // most)
        bounds = np.linspace(start, stop, pieces + 1).round().astype(int)
        chunks += [slice(int(a), int(b)) for a, b in pairwise(bounds)]
    return chunks
