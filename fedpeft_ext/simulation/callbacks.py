"""What a simulation tells while it runs, and to whom: `Callback`, and the record of a round and of an
evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft_ext.simulation.simulator import Simulator, Summary


@dataclass(frozen=True)
class RoundInfo:
    """One finished round.

    Attributes:
        round: 1-based number; `rounds` is how many there are in all.
        phase: "warm-up" while the full embedding is trained first, else "training".
        loss: mean over the round's clients of their local loss, averaged over local steps; NaN if there were
            none.
        clients: how many trained.
        seconds: wall time of the round: choosing clients, local training and aggregation.
        bytes_down, bytes_up: received and sent by each of the clients.
        faults: `Faults.counts` up to this round; None where no fault is simulated or rejected.
    """

    round: int
    rounds: int
    phase: str
    loss: float
    clients: int
    seconds: float
    bytes_down: int
    bytes_up: int
    faults: Mapping[str, int] | None = None

    @property
    def clients_per_second(self) -> float:
        """Training throughput of the round."""
        return self.clients / self.seconds if self.seconds > 0.0 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "phase": self.phase,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "clients": self.clients,
            "clients_per_second": self.clients_per_second,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            **({} if self.faults is None else {"faults": dict(self.faults)}),
        }


@dataclass(frozen=True)
class Metrics:
    """One evaluation.

    Attributes:
        round: how many rounds were finished.
        values: by name: `HR@10`, `NDCG@10`, `MRR`, ... among sampled candidates, `full/HR@10`, ... in the
            full ranking; `valid/HR@10`, ... of the validation items, if there are any.
        seconds: wall time of the evaluation.
    """

    round: int
    values: Mapping[str, float]
    seconds: float

    def __getitem__(self, name: str) -> float:
        return self.values[name]


class Callback:
    """Base of observers of a run; override what you need. An exception from a callback stops the run."""

    def on_start(self, simulator: Simulator) -> None:
        """Before the first round."""

    def on_round(self, info: RoundInfo) -> None:
        """After every round."""

    def on_evaluate(self, metrics: Metrics) -> None:
        """After every evaluation; the first is before any training (round 0)."""

    def on_save(self) -> None:
        """Before a checkpoint is written. A resumed run does not repeat what was told before it."""

    def on_end(self, summary: Summary) -> None:
        """After the last round."""
