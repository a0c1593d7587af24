"""What a comparison keeps of each run: its summary, and what the embedding 'full' would have sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedpeft_ext.simulation import Summary
from fedpeft_ext.simulation.output import METRICS, SUMMARY

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

    def bytes_until(self) -> list[tuple[int, int]]:
        """(round, bytes sent both ways by all clients so far) of every evaluation, from the run's files.

        Raises:
            ValueError: the run wrote no files.
        """
        if self.folder is None:
            raise ValueError("folder: expected that of the run's files, got None")
        lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines()
        return [(record["round"], record["total_bytes"]) for record in map(json.loads, lines)]

    @classmethod
    def load(cls, folder: str | Path, full_bytes: int) -> RunResult:
        """Read a finished run from its folder.

        Raises:
            FileNotFoundError: there is no summary.json. ValueError: it is not one of a run.
        """
        folder = Path(folder)
        file = folder / SUMMARY
        if not file.is_file():
            raise FileNotFoundError(f"folder: expected a finished run, found no {SUMMARY} in {folder}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            known = {name.name for name in fields(Summary)}
            summary = Summary(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not the summary of a run ({error})") from error
        return cls(summary, full_bytes, folder)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the summary with the derived numbers."""
        return {
            **self.summary.as_dict(),
            "full_bytes": self.full_bytes,
            "saving": self.saving,
            "folder": None if self.folder is None else str(self.folder),
        }
