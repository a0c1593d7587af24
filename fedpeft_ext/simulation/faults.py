"""Clients that fail: they drop out of a round, or their update is not fit to be averaged.

Simulated faults are functions of (seed, round, attempt, client). Whether an update is rejected depends on it
alone, so neither depends on the engine or on how a round is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.config import Config, FaultsConfig
from fedpeft_ext.ops import philox
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.randomness import FAULTS
from fedpeft_ext.simulation.state import State
from fedpeft_ext.simulation.uploads import Uploads

EXPLODED = 1e6
"""Factor of a simulated exploding update."""

REASONS = ("empty", "not_finite", "exploding")


def make_faults(config: Config) -> Faults | None:
    """The faults that the settings ask for; None where no fault is simulated or rejected."""
    if config.faults == FaultsConfig():
        return None
    return Faults(config.faults, config.seed, keep_as_zero=config.privacy.mode != "none")


class Faults:
    """Simulates and finds faulty clients of a federation, and counts them.

    Args:
        config: the settings.
        seed: of simulated faults.
        keep_as_zero: a rejected client stays in the sum with an update of zero: what privacy needs, whose
            divisor and noise may not depend on data.

    Attributes:
        counts: {what: how often so far}: clients `dropped`, updates `empty`, `not_finite` and `exploding`,
            and rounds `repeated` and `skipped`.
    """

    def __init__(self, config: FaultsConfig, seed: int, *, keep_as_zero: bool = False) -> None:
        self._config = config
        self._seed = seed
        self._keep_as_zero = keep_as_zero
        self.counts = dict.fromkeys(("dropped", *REASONS, "repeated", "skipped"), 0)
        self._rejected: list[tuple[int, np.ndarray]] = []  # (number of the reason, clients)

    def present(self, clients: np.ndarray, round: int, attempt: int) -> np.ndarray:
        """Those of the chosen `clients` that do not drop out."""
        self._rejected = []
        if self._config.dropout_rate == 0.0:
            return clients
        drawn = philox.uniform(self._seed, round, clients, 0, FAULTS, epoch=attempt)
        left = drawn < self._config.dropout_rate
        self.counts["dropped"] += int(left.sum())
        return clients[~left]

    def __call__(self, uploads: Uploads) -> tuple[Uploads, Tensor | None]:
        """Damage the updates that the settings ask for, and reject unfit ones.

        Returns:
            What is left, and which clients' updates were accepted, bool [C]; None for all.
        """
        if self._config.corrupt_rate > 0.0:
            uploads = self._corrupted(uploads)
        if not self._config.reject:
            return uploads, None
        norms = uploads.norms(2)
        empty = uploads.weights <= 0.0
        not_finite = ~empty & ~(torch.isfinite(norms) & torch.isfinite(uploads.weights))
        limit = torch.inf if self._config.max_norm is None else self._config.max_norm
        exploding = ~empty & ~not_finite & (norms > limit)
        rejected = empty | not_finite | exploding
        if not bool(rejected.any()):
            return uploads, None
        for reason, found in zip(REASONS, (empty, not_finite, exploding), strict=True):
            if bool(found.any()):
                self.counts[reason] += int(found.sum())
                self._rejected.append((REASONS.index(reason), uploads.clients[found].cpu().numpy()))
        kept = uploads.zeroed(rejected) if self._keep_as_zero else uploads.selected(~rejected)
        return kept, ~rejected

    def accepted(self, clients: np.ndarray) -> np.ndarray:
        """Which of a round's `clients` were not rejected: bool [n]."""
        rejected = [found for _, found in self._rejected]
        return ~np.isin(clients, np.concatenate([*rejected, np.empty(0, dtype=np.int64)]))

    def exchange(self, ranks: Ranks, clients: np.ndarray) -> None:
        """Make what was rejected that of all ranks, of which each trained a part of a round's `clients`."""
        if ranks.size == 1:
            return
        reasons = np.zeros(len(clients))  # 0: accepted
        for number, found in self._rejected:
            reasons[np.isin(clients, found)] = number + 1
        everywhere = ranks.sum_numbers(reasons)
        self._rejected = []
        for number, reason in enumerate(REASONS):
            found = clients[everywhere == number + 1]
            self.counts[reason] += len(found) - int((reasons == number + 1).sum())
            self._rejected.append((number, found))

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        self.counts = {what: int(state[what]) for what in self.counts}

    def _corrupted(self, uploads: Uploads) -> Uploads:
        clients = uploads.clients.cpu().numpy()
        at, epoch = uploads.round, uploads.attempt
        chosen = philox.uniform(self._seed, at, clients, 1, FAULTS, epoch=epoch) < self._config.corrupt_rate
        kind = philox.integers(3, self._seed, at, clients, 2, FAULTS, epoch=epoch)
        factor = np.where(chosen, np.array([np.nan, np.inf, EXPLODED])[kind], 1.0)
        factors = torch.from_numpy(factor).to(uploads.weights)
        updates = {
            name: update * factors.to(update.dtype).view(-1, *[1] * (update.dim() - 1))
            for name, update in uploads.updates.items()
        }
        return uploads.replaced(updates)
