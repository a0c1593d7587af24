"""For studies whose runs are experiments of their own instead of plain runs: one of each embedding and seed,
in a folder of its own, whose outcome is kept as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.experiments.intervals import half_width
from fedpeft_ext.experiments.plots import Place
from fedpeft_ext.experiments.runner import DIVERGED, mark_diverged, run_name
from fedpeft_ext.experiments.studies.study import Context, mean_place
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.files import replace_text
from fedpeft_ext.simulation.output import SUMMARY, prepare_folder

Outcome = Mapping[str, Any]
Experiment = Callable[[Config, Dataset], dict[str, Any]]


@dataclass(frozen=True)
class Outcomes:
    """What the experiments found.

    Attributes:
        found: outcomes of all seeds by embedding; None where training diverged.
        columns: numbers read off an outcome, by name.
        runs: a row an experiment, as `Findings.runs`.
    """

    found: Mapping[str, Sequence[Outcome | None]]
    columns: Callable[[Outcome], dict[str, float]]
    runs: pl.DataFrame

    def _of(self, name: str) -> list[Outcome]:
        return [outcome for outcome in self.found[name] if outcome is not None]

    def means(self) -> pl.DataFrame:
        """A row an embedding: mean, `sd` and `ci95` of each column over seeds, as `Trained.means`."""
        rows = []
        names = next((list(self.columns(o)) for name in self.found for o in self._of(name)), [])
        for name, all_seeds in self.found.items():
            numbers = [self.columns(outcome) for outcome in self._of(name)]
            row: dict[str, object] = {"embedding": name}
            for column in names:
                values = [of_seed[column] for of_seed in numbers]
                row[column] = float(np.mean(values)) if values else None
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row[f"{column} sd"] = deviation
                row[f"{column} ci95"] = None if deviation is None else deviation * half_width(len(values))
            rows.append({**row, "seeds": len(all_seeds), "diverged": len(all_seeds) - len(numbers)})
        return pl.DataFrame(rows, infer_schema_length=None)

    def lines(self, x: str, y: str) -> dict[str, list[Place]]:
        """Means over seeds of `y` by `x` in the outcomes' "curve", by embedding."""
        return {
            name: [
                mean_place(places[0][x], [place[y] for place in places])
                for places in zip(*(outcome["curve"] for outcome in self._of(name)), strict=True)
            ]
            for name in self.found
        }


def run_experiments(
    context: Context,
    study: str,
    names: Sequence[str],
    experiment: Experiment,
    columns: Callable[[Outcome], dict[str, float]],
) -> Outcomes:
    """Run `experiment` with each embedding and seed, but for those whose outcome was kept before.

    Args:
        context: of the study.
        study: its name.
        names: embeddings.
        experiment: gives an outcome for JSON; raises FloatingPointError where training diverges.
        columns: see `Outcomes`.
    """
    found: dict[str, list[Outcome | None]] = {name: [] for name in names}
    runs: list[dict[str, object]] = []
    jobs = [(name, seed) for name in names for seed in context.seeds]
    for position, (name, seed) in enumerate(jobs, start=1):
        config = context.config.updated([f"embedding.name={name}", f"seed={seed}"])
        folder = context.runs / f"{study}-{run_name(config, context.data)}"
        context.notify(f"Run {position} of {len(jobs)}: {name}, seed {seed}")
        outcome = _outcome(config, context.dataset, folder, experiment)
        if outcome is None:
            context.notify(f"Run {position} of {len(jobs)} diverged")
        found[name].append(outcome)
        numbers = {} if outcome is None else columns(outcome)
        seconds = None if outcome is None else outcome["seconds"]
        told = {"seconds": seconds, "diverged": outcome is None, "run": folder.name}
        runs.append({"embedding": name, "seed": seed, **numbers, **told})
    return Outcomes(found, columns, pl.DataFrame(runs, infer_schema_length=None))


def trained(config: Config, dataset: Dataset, prepared: Pretrained | None, rounds: int) -> Simulator:
    """A federation after so many rounds, without an evaluation on the way."""
    simulator = Simulator(config, dataset, pretrained=prepared)
    while simulator.rounds_done < rounds:
        simulator.round()
    return simulator


def _outcome(config: Config, dataset: Dataset, folder: Path, experiment: Experiment) -> Outcome | None:
    """What `experiment` finds, or found before; None where training diverges."""
    if (folder / DIVERGED).is_file():
        return None
    file = folder / SUMMARY
    if file.is_file():
        finished: Outcome = json.loads(file.read_text(encoding="utf-8"))
        return finished
    prepare_folder(folder, overwrite=True)
    began = time.perf_counter()
    try:
        result = {**experiment(config, dataset), "seconds": time.perf_counter() - began}
    except FloatingPointError as error:
        mark_diverged(folder, error)
        return None
    replace_text(file, json.dumps(result, allow_nan=False) + "\n")
    return result
