"""The server's side of a round: weighted sums of uploads, and the step that it takes along their mean.

Federated averaging (McMahan et al., AISTATS 2017): global += server_lr * sum_c w_c delta_c / sum_c w_c. With
`server_optimizer=adam` the mean is the pseudo-gradient of FedAdam (Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, algorithm 2: no bias correction). Sums are float64 and in the order of the clients,
however they come in chunks; with `begin` told the weight of a round, they are exact, and the same bits
in whatever order and from however many processes uploads come (`ops.aggregate.exact_grid`).

`Aggregator` alone sees uploads; `Server` is given their weighted sum, which is all that there is with secure
aggregation (`flower.secure`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext import ops
from fedpeft_ext.ops.aggregate import exact_grid
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.memory import table_zeros
from fedpeft_ext.simulation.schedule import CONSTANT, Schedule
from fedpeft_ext.simulation.state import State, below, copy_into, prefixed
from fedpeft_ext.simulation.uploads import Uploads, UploadStage
from fedpeft_ext.words import SMALLER_STEPS

if TYPE_CHECKING:
    from fedpeft_ext.simulation.faults import Faults
    from fedpeft_ext.simulation.privacy import Noise
    from fedpeft_ext.simulation.scaffold import ControlVariates

SERVER_LR: Mapping[str, float] = {"avg": 1.0, "adam": 1e-2}
BETA1, BETA2, TAU = 0.9, 0.99, 1e-3  # of FedAdam, as in its paper
ROW_COST = 3
"""Cost of a step at a row that was picked out, in rows of a whole table."""


class Server:
    """Moves the global parameters along the mean of uploads, of which it gets the weighted sum and no more.

    Args:
        parameters: {name: global parameter}, changed in place by `step`. They are the model's and not part of
            `state_dict`.
        optimizer: `avg` or `adam`.
        lr: server learning rate; None is 1 for `avg`, 0.01 for `adam`.
        schedule: of `lr`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Literal["avg", "adam"] = "avg",
        lr: float | None = None,
        schedule: Schedule = CONSTANT,
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizer = optimizer
        self._lr = SERVER_LR[optimizer] if lr is None else lr
        self._schedule = schedule
        self._moments = (
            {name: (zeros_for(p), zeros_for(p)) for name, p in self._parameters.items()}
            if (optimizer == "adam")
            else {}
        )

    @property
    def plain(self) -> bool:
        """Whether a step is `lr` times the mean."""
        whole = all(p.dim() > 0 and p.is_contiguous() for p in self._parameters.values())
        return self._optimizer == "avg" and whole

    def lr(self, round: int) -> float:
        """Learning rate of the 1-based `round`."""
        return self._lr * self._schedule.factor(round)

    @torch.no_grad()
    def step(
        self,
        totals: Mapping[str, Tensor],
        weight: float,
        round: int,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take a step along totals / weight, and make the totals zero.

        Args:
            totals: {name: float64, shape of the parameter}, the weighted sum of uploads.
            weight: the sum of weights, above 0.
            round: its 1-based number.
            rows: {name: distinct rows outside which that total is known to be zero}: saves time and changes
                no result.
        """
        lr = self.lr(round)
        for name, parameter in self._parameters.items():
            total = totals[name]
            at = None if rows is None else rows.get(name)
            if self._optimizer == "adam":
                mean = total / weight
                first, second = self._moments[name]
                first.lerp_(mean, 1.0 - BETA1)
                second.lerp_(mean.square(), 1.0 - BETA2)
                parameter.add_((lr * first / (second.sqrt() + TAU)).to(parameter.dtype))
                total.zero_()
            else:
                # Itself, or a copy where a backbone of the user's own holds a transposed parameter.
                values = parameter.contiguous()
                if values.dim() == 0:
                    values, total = values.view(1), total.view(1)
                ops.apply_updates_(values, total, at, scale=lr / weight)
                if not parameter.is_contiguous():
                    parameter.copy_(values)

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`: the optimizer's moments."""
        return {f"{name}.{index}": m for name, both in self._moments.items() for index, m in enumerate(both)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        copy_into(self.state_dict(), state)


class Aggregator:
    """Streams clients' updates into float64 sums and has the server take its step along them.

    Args:
        parameters: {name: global parameter}, changed in place by `apply`.
        row_parameters: names whose updates come as [C, R, W] at given rows of [I, W].
        optimizer, lr, schedule: of the `Server`.
        faults: rejects updates before anything else.
        stages: what uploads go through, in this order, before they are summed.
        noise: added to the sums.
        variates: SCAFFOLD's control variates, which go with the sums.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        row_parameters: frozenset[str],
        optimizer: Literal["avg", "adam"] = "avg",
        lr: float | None = None,
        stages: Sequence[UploadStage] = (),
        noise: Noise | None = None,
        faults: Faults | None = None,
        variates: ControlVariates | None = None,
        schedule: Schedule = CONSTANT,
    ) -> None:
        self.server = Server(parameters, optimizer, lr, schedule)
        self._heights = [len(parameters[name]) for name in row_parameters]
        self._row_parameters = row_parameters
        self._stages = tuple(stages)
        self._noise = noise
        self._faults = faults
        self._variates = variates
        self._totals = {name: zeros_for(p) for name, p in parameters.items()}
        self._device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self._weight = 0.0
        self._uploads = 0
        self._rows: list[Tensor] = []  # of uploads so far,
        self._whole = False  # unless one came whole
        self._distinct = True  # whether no row is there twice
        # Of sums that an engine adds to itself: marks of rows, which are marked, and what diverged.
        self._marks: Tensor | None = None
        self._marked: list[Tensor] = []
        self._broken: str | None = None
        self._watched = True  # whether `_broken` tells of all that was added
        self._round = self._attempt = 0
        self._grid = 0.0

    def begin(self, round: int, attempt: int = 0, weight: float = 0.0) -> None:
        """Start a round.

        Args:
            round, attempt: its 1-based number, and how often it was repeated before; stages and noise draw by
                them.
            weight: at least the sum of the round's weights, which makes sums exact; 0 rounds nothing.
        """
        self._round, self._attempt = round, attempt
        self._grid = exact_grid(weight)

    @property
    def uploads(self) -> int:
        """Clients in the sums."""
        return self._uploads

    @property
    def grid(self) -> float:
        """What additions to the sums are rounded to, as `ops.accumulate_updates_` does; 0: nothing."""
        return self._grid

    def sums(self) -> Mapping[str, Tensor] | None:
        """Sums {name: float64, shape of the parameter}, for an engine that adds to them itself, on `grid`,
        and tells `added`; None where uploads are looked at one by one.
        """
        if self._stages or self._faults is not None or self._variates is not None:
            return None
        return self._totals

    @property
    def plain(self) -> bool:
        """Whether a round is no more than the sum of uploads and a step along their mean: nothing else looks
        at them or has a part in the step.
        """
        return self.server.plain and self.sums() is not None and self._noise is None

    @property
    def marks(self) -> Tensor | None:
        """Bool as uint8 [I]: the rows of row parameters that `added` was told of; None without such."""
        if self._marks is None and self._heights:
            self._marks = torch.zeros(max(self._heights), dtype=torch.uint8, device=self._device)
        return self._marks

    def added(self, weight: float, uploads: int, rows: Tensor, broken: str | None) -> None:
        """Account for what an engine added to `sums` itself.

        Args:
            weight: sum of the clients' weights.
            uploads: number of clients.
            rows: int64 [N], the rows that it marked in `marks`, which were not marked before.
            broken: name of the first parameter with an update that is NaN or infinite.
        """
        self._weight += weight
        self._uploads += uploads
        self._rows.append(rows)
        self._marked.append(rows)
        self._broken = self._broken or broken

    def add(
        self,
        updates: Mapping[str, Tensor],
        weights: Tensor,
        rows: Tensor | None = None,
        clients: Tensor | None = None,
    ) -> Tensor | None:
        """Add the uploads of C clients.

        Args:
            updates: {name: [C, ...]} local minus global value; [C, R, W] for row parameters when `rows` is
                given.
            weights: float64 [C].
            rows: [C, R] rows of the row parameters' updates, distinct in each client, -1 at padding; None
                where they are whole.
            clients: int64 [C], user ids, which stages ask for.

        Returns:
            Which clients' updates were accepted, bool [C], None for all: the others keep their former state.

        Raises:
            ValueError: there are stages and `clients` is None.
        """
        if not self._stages and self._faults is None:
            self._sum(updates, weights, rows)
            return None
        if clients is None:
            raise ValueError("clients: expected int64 [C], the user ids that upload stages need, got None")
        tables = self._row_parameters if rows is not None else frozenset[str]()
        uploads = Uploads(updates, weights, rows, tables, clients, self._round, self._attempt)
        accepted = None
        if self._faults is not None:
            uploads, accepted = self._faults(uploads)
        parts: Iterable[Uploads] = [uploads]
        for stage in self._stages:
            parts = itertools.chain.from_iterable(map(stage, parts))
        for part in parts:
            self._sum(part.updates, part.weights, part.rows)
        return accepted

    def _sum(self, updates: Mapping[str, Tensor], weights: Tensor, rows: Tensor | None) -> None:
        for name, update in updates.items():
            at = rows if name in self._row_parameters else None
            ops.accumulate_updates_(self._totals[name], update, weights, at, self._grid)
        self._weight += float(weights.sum())
        self._uploads += len(weights)
        if rows is None:
            self._whole = True
        else:
            self._rows.append(rows)
        self._distinct = self._watched = False

    @torch.no_grad()
    def exchange(self, ranks: Ranks) -> None:
        """Make the sums those over the uploads of all ranks. Every rank calls it once before `apply`."""
        if ranks.size == 1:
            return
        weight, uploads = ranks.sum_numbers(np.array([self._weight, float(self._uploads)]))
        self._weight, self._uploads = float(weight), int(uploads)
        if self._variates is not None:
            self._variates.exchange(ranks)
        union = ranks.union(None if self._whole else self._rows, max(self._heights, default=0))
        self._whole, self._rows = union is None, [] if union is None else [union.to(self._device)]
        self._distinct, self._watched = True, False  # other ranks' sums were not watched
        tables = frozenset[str]() if union is None else self._row_parameters
        ranks.sum_([total for name, total in self._totals.items() if name not in tables])
        for name in sorted(tables):
            values = self._totals[name][union]
            ranks.sum_([values])
            self._totals[name][union] = values

    def first_not_finite(self) -> str | None:
        """Name of the first parameter whose sum has NaN or infinite values."""
        if self._watched:
            return self._broken
        touched = self._touched()
        finite = []  # all of them before the first is asked for: a GPU is waited for once
        for name, total in self._totals.items():
            at = touched if name in self._row_parameters else None
            finite.append(torch.isfinite(total if at is None else total[at]).all())
        if not finite:
            return None
        broken = (~torch.stack(finite)).tolist()
        return next((name for name, bad in zip(self._totals, broken, strict=True) if bad), None)

    def check_finite(self) -> None:
        """Raise FloatingPointError where a sum has NaN or infinite values."""
        raise_diverged(self.first_not_finite(), self._round)

    @torch.no_grad()
    def apply(self) -> None:
        """Have the server take its step, and forget the round's sums."""
        if self._noise is not None:
            weight = self._noise.add_(self._totals, self._uploads, self._round)
            touched = None  # noise is everywhere
        else:
            weight, touched = self._weight, self._touched()
            if self._variates is not None and self._variates.settle(self._totals):
                touched = None
        if weight > 0.0:
            rows = None if touched is None else dict.fromkeys(self._row_parameters, touched)
            self.server.step(self._totals, weight, self._round, rows)
        if self._variates is not None:
            self._variates.commit()
        for stage in self._stages:
            stage.commit()
        self._clear(used=weight > 0.0)

    def discard(self) -> None:
        """Forget the round's sums without a step."""
        if self._variates is not None:
            self._variates.discard()
        for stage in self._stages:
            stage.discard()
        self._clear(used=False)

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`: that of the server's optimizer, control variates and stages."""
        state = prefixed("server", self.server.state_dict(ranks))
        if self._variates is not None:
            state |= prefixed("variates", self._variates.state_dict(ranks))
        for index, stage in enumerate(self._stages):
            state |= prefixed(f"stages.{index}", stage.state_dict(ranks))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        self.server.load_state_dict(below("server", state))
        if self._variates is not None:
            self._variates.load_state_dict(below("variates", state))
        for index, stage in enumerate(self._stages):
            stage.load_state_dict(below(f"stages.{index}", state))

    def _clear(self, used: bool) -> None:
        """Forget the sums; `used`: the server's step made them zero."""
        if not used:
            for total in self._totals.values():
                total.zero_()
        if self._marks is not None:
            if used and 16 * sum(rows.numel() for rows in self._marked) < self._marks.numel():
                for rows in self._marked:
                    self._marks.index_fill_(0, rows, 0)
            else:  # cheaper, and an engine may have failed before it told what it marked
                self._marks.zero_()
        self._weight = 0.0
        self._uploads = 0
        self._rows, self._marked = [], []
        self._whole, self._distinct = False, True
        self._broken, self._watched = None, True

    def _touched(self) -> Tensor | None:
        """Distinct rows with an update, or None where going through the whole table is cheaper than finding
        them.
        """
        if not self._heights or self._whole:
            return None
        if ROW_COST * sum(rows.numel() for rows in self._rows) >= max(self._heights):
            return None
        if not self._rows:  # no upload
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        if self._distinct:
            return self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)
        rows: Tensor = torch.unique(torch.cat([rows.flatten() for rows in self._rows]))
        touched: Tensor = rows[rows >= 0]
        return touched


def raise_diverged(broken: str | None, round: int) -> None:
    """Raise FloatingPointError where a parameter is named whose sum of updates is NaN or infinite."""
    if broken is not None:
        raise FloatingPointError(
            f"training diverged in round {round}: the sum of updates of {broken} is NaN or "
            f"infinite; {SMALLER_STEPS}, and faults.reject=true leaves such clients out"
        )


def zeros_for(parameter: Tensor) -> Tensor:
    """Float64 zeros of the parameter's shape, where it is."""
    return table_zeros(parameter.shape, torch.float64, parameter.device, huge=True)
