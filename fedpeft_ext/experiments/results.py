"""What a comparison keeps of each run: its summary, and what the embedding 'full' would have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft_ext.simulation import Summary

KB = 1000
"""Bytes in a KB here and in everything printed."""


def headline_k(ks: Sequence[int]) -> int:
    """The cut-off k of tables, pictures and progress: 10, or the smallest evaluated where 10 is not."""
    return 10 if 10 in ks else min(ks)


@dataclass(frozen=True)
class RunResult:
    """One finished run of a comparison.

    Attributes:
        summary: of the run.
        full_bytes: what a client would receive and send together, each round, with the embedding 'full'.
        folder: where the run's files are, if it wrote any.
    """

    summary: Summary
    full_bytes: int
    folder: Path | None = None

    @property
    def embedding(self) -> str:
        """Name such as 'full', 'c-rq' or 'p-lora'."""
        return self.summary.embedding

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last evaluation: 'HR@10', 'NDCG@10', 'MRR', ...; 'full/HR@10', ... over the whole catalogue."""
        return self.summary.metrics

    @property
    def bytes_per_round(self) -> int:
        """Bytes per client and round, down and up together."""
        return self.summary.bytes_down + self.summary.bytes_up

    @property
    def saving(self) -> float:
        """Share of Full's bytes that is not sent: 0.9 where a tenth is sent; negative where more is sent."""
        return 1.0 - self.bytes_per_round / self.full_bytes

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(round, value) of every evaluation."""
        return [(int(values["round"]), values[metric]) for values in self.summary.evaluations]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the summary with the derived numbers."""
        return {
            **self.summary.as_dict(),
            "full_bytes": self.full_bytes,
            "saving": self.saving,
            "folder": None if self.folder is None else str(self.folder),
        }
