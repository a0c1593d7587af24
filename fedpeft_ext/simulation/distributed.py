"""One federation on several processes ("ranks"), by torch.distributed: gloo on CPUs, NCCL on GPUs.

Every user belongs to one rank, which keeps the user's state, trains it whenever it is chosen, and evaluates
it. Users are cut into contiguous ranges of equal expected work, so that a rank reads one piece of the data
and nothing but sums crosses between ranks: the weighted updates, the means that new clients start from,
losses, rejected clients, and the ranks of test items. Server parameters live on every rank, which takes the
same step along the same sum and draws the same noise.

Weighted updates are rounded to a grid fine enough not to matter, on which float64 sums are exact
(`ops.aggregate.exact_grid`). An exact sum has no order, so any number of ranks gives the bits of one process.

A rank that fails or dies ends the others: `Ranks.together` shares failures, and a broken connection makes
every rank that is left report, which names those that did not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedpeft_ext.pretrain import Pretrained

if TYPE_CHECKING:
    from fedpeft_ext.simulation.aggregation import Aggregator
    from fedpeft_ext.simulation.local_training import Engine

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another: longer than pre-training on the server and any round may take."""
ROLL_CALL_SECONDS = 5.0
"""How long ranks that are left wait for each other's report."""
_BUCKET = 1 << 20  # elements; smaller tensors travel together


class RankError(RuntimeError):
    """Another process of the run failed, died or does not answer; the message names it."""


class Ranks:
    """The processes of a run: those of torch.distributed's default group, or this one alone.

    Attributes:
        rank, size: number of this process, and how many there are.
        bytes_summed: of the tensors that `sum_` was given so far, on this rank.
    """

    def __init__(self) -> None:
        on = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if on else 0
        self.size = dist.get_world_size() if on else 1
        self.bytes_summed = 0
        self._owned = range(0)
        if self.size > 1:
            # Numbers and texts go through the host; a dead peer closes its connection there at once.
            self._control = (
                dist.group.WORLD
                if dist.get_backend() in ("gloo", "undefined")
                else dist.new_group(backend="gloo")
            )
            self._store = dist.distributed_c10d._get_default_store()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and tells progress."""
        return self.rank == 0

    # ---- who owns whom

    def divide(self, sizes: np.ndarray) -> None:
        """Cut users into one range a rank. `sizes` int64 [U] are their training items.

        A user costs its items, and as much as the average of all: local training goes with items,
        evaluation and the server's work with users.
        """
        if self.size == 1:
            self._owned = range(len(sizes))
            return
        work = np.cumsum(sizes + max(1.0, float(sizes.mean())))
        targets = work[-1] * np.arange(1, self.size) / self.size
        bounds = [0, *np.searchsorted(work, targets).tolist(), len(sizes)]
        self._owned = range(bounds[self.rank], bounds[self.rank + 1])

    @property
    def owned(self) -> range:
        """Ids of this rank's users."""
        return self._owned

    def owns(self, users: np.ndarray) -> np.ndarray:
        """Which of these user ids are this rank's: bool like `users`."""
        owned: np.ndarray = (users >= self._owned.start) & (users < self._owned.stop)
        return owned

    # ---- exchange

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of these float64 tensors (contiguous, alike on all ranks) by its sum over ranks."""
        if self.size == 1:
            return
        self.bytes_summed += sum(t.numel() * t.element_size() for t in tensors)
        small = [t for t in tensors if t.numel() < _BUCKET]
        if small:
            flat = torch.cat([t.flatten() for t in small])
            self._collective(dist.all_reduce, flat)
            for tensor, part in zip(small, torch.split(flat, [t.numel() for t in small]), strict=True):
                tensor.copy_(part.view(tensor.shape))
        for tensor in tensors:
            if tensor.numel() >= _BUCKET:
                self._collective(dist.all_reduce, tensor)

    def sum_numbers(self, values: np.ndarray) -> np.ndarray:
        """The sum over ranks of float64 arrays of one shape. Exact where all but one rank have zeros."""
        if self.size == 1:
            return values
        total = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).clone()
        self._collective(dist.all_reduce, total, group=self._control)
        return total.numpy()

    def union(self, rows: Sequence[Tensor] | None, height: int) -> Tensor | None:
        """Distinct rows int64 [T], ascending, that some rank names in `rows` (-1 at padding).

        None where a rank has None, or where tables of `height` rows are summed with less traffic whole.
        """
        own = torch.zeros(0, dtype=torch.int64, device="cpu")
        if rows:
            own = torch.cat([r.flatten() for r in rows])
            own = torch.unique(own[own >= 0])
        count = float(height if rows is None else own.numel())
        if self.sum_numbers(np.array([count]))[0] >= height / 2:
            return None
        rows_of_all: Tensor = torch.unique(torch.cat(self.gather(own.long())))
        return rows_of_all.to(own.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors [n, ...] of all ranks, on the host; n may differ."""
        if self.size == 1:
            return [values]
        values = values.detach().cpu().contiguous()
        lengths = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        lengths[self.rank] = len(values)
        self._collective(dist.all_reduce, lengths, group=self._control)
        longest = int(lengths.max())
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        # As bytes, since gloo does not know every dtype.
        raw = padded.view(torch.uint8) if padded.dim() and padded.numel() else padded.to(torch.uint8)
        parts = [torch.empty_like(raw) for _ in range(self.size)]
        if raw.numel():
            self._collective(dist.all_gather, parts, raw, group=self._control)
        return [
            part.view(values.dtype)[:length] if raw.numel() else values.new_zeros(0, *values.shape[1:])
            for part, length in zip(parts, lengths.tolist(), strict=True)
        ]

    def gather_rows(self, values: Tensor) -> Tensor:
        """Rows [n, ...] of every rank's users, joined in the order of users."""
        return values if self.size == 1 else torch.cat(self.gather(values)).to(values.device)

    def gather_texts(self, text: str) -> list[str]:
        """One text of each rank."""
        parts = self.gather(torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8))
        return [bytes(part.tolist()).decode().rstrip("\0") for part in parts]

    def from_first(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors (on the host) that `make` gives on the first rank, on all."""
        made: dict[str, Tensor] = {}
        with self.together("preparing on the server"):
            if self.first:
                made = dict(make())
        if self.size == 1:
            return made
        head = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in made.items()}
        head = json.loads(self.gather_texts(json.dumps(head) if self.first else "")[0])
        result = {}
        for name, (dtype, shape) in head.items():
            value = (
                made[name].contiguous()
                if self.first
                else torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            )
            raw = value.view(-1).view(torch.uint8)
            self._collective(dist.broadcast, raw, 0, group=self._control)
            result[name] = value
        return result

    # ---- failures

    @contextmanager
    def together(self, stage: str) -> Iterator[None]:
        """A stage that may fail on one rank alone: then all ranks fail, the others with a RankError."""
        failure: Exception | None = None
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        if self.size == 1:
            return
        found = self.gather_texts("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(found):
            if text:
                raise RankError(f"rank {rank} of {self.size} failed while {stage}: {text}")

    def _collective(self, run: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            run(*args, **options)
        except RuntimeError as error:  # what torch.distributed raises where a peer is gone or late
            raise RankError(self._roll_call()) from error

    def _roll_call(self) -> str:
        """Which ranks do not report any more."""
        with suppress(RuntimeError):  # it is broken already
            # Closes this rank's connections, so that ranks waiting for it find out as well.
            dist.destroy_process_group()
        everyone = {rank: f"fedpeft/left/{rank}" for rank in range(self.size)}
        try:
            self._store.set(everyone[self.rank], "1")
            end = time.monotonic() + ROLL_CALL_SECONDS
            missing = [r for r, key in everyone.items() if not self._store.check([key])]
            while missing and time.monotonic() < end:
                time.sleep(0.05)
                missing = [r for r in missing if not self._store.check([everyone[r]])]
        except RuntimeError:
            return f"rank 0 of {self.size}, through which ranks find each other, died"
        if not missing:
            return f"the connection between the {self.size} ranks broke, and all of them are left"
        names = ", ".join(map(str, missing))
        return f"rank{'s' * (len(missing) > 1)} {names} of {self.size} died or did not answer"


def train_round(
    ranks: Ranks, engine: Engine, clients: np.ndarray, round: int, aggregator: Aggregator
) -> np.ndarray:
    """`Engine.train` on the ranks that own the clients; losses of all, and the sums of all, on every rank."""
    if ranks.size == 1:
        return engine.train(clients, round, aggregator)
    mine = ranks.owns(clients)
    losses = np.zeros(len(clients))
    with ranks.together(f"training round {round}"):
        losses[mine] = engine.train(clients[mine], round, aggregator)
    aggregator.exchange(ranks)
    return ranks.sum_numbers(losses)


def pretrained_everywhere(ranks: Ranks, make: Callable[[], Pretrained]) -> Pretrained:
    """What the first rank prepares, on all ranks; the others get the tensors without their makers."""
    if ranks.size == 1:
        return make()
    made: list[Pretrained] = []

    def tensors() -> dict[str, Tensor]:
        made.append(make())
        return made[0].tensors()

    shared = ranks.from_first(tensors)
    return made[0] if made else Pretrained.from_tensors(shared)


def rank_device(device: torch.device) -> torch.device:
    """This process' own GPU where `device` is "cuda" without a number and torchrun started the process."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


@contextmanager
def process_group() -> Iterator[bool]:
    """The default process group of a process that torchrun started, while within; yields whether this is the
    first process.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(rank_device(torch.device("cuda")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield dist.get_rank() == 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
