"""Several embeddings trained alike on one data set: one table, two pictures, and the files of every run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.experiments.plots import plot_accuracy_against_bytes, plot_learning_curves
from fedpeft_ext.experiments.results import RunResult, headline_k
from fedpeft_ext.experiments.runner import run_all
from fedpeft_ext.experiments.tables import csv_table, latex_comparison, markdown_table
from fedpeft_ext.nn import parse_spec
from fedpeft_ext.simulation import Callback, Simulator
from fedpeft_ext.simulation.output import clear_folder, prepare_folder
from fedpeft_ext.words import counted

JSON, CSV, MARKDOWN, LATEX, SCATTER, CURVES = (
    "compare.json",
    "compare.csv",
    "compare.md",
    "compare.tex",
    "accuracy_bytes.png",
    "curves.png",
)


@dataclass(frozen=True)
class Comparison:
    """Finished runs, in the order asked for.

    Attributes:
        config: what they share; each run differs in `embedding.name`.
        results: one a run.
        folder: where the files are, or None.
    """

    config: Config
    results: Sequence[RunResult]
    folder: Path | None

    @property
    def k(self) -> int:
        """The cut-off of tables and pictures."""
        return headline_k(self.config.evaluation.ks)

    @property
    def title(self) -> str:
        """What was compared, in a few words."""
        summary = self.results[0].summary
        return f"{summary.backbone} on {summary.dataset}, {counted(summary.rounds, 'round')}"


def compare(
    config: Config,
    embeddings: Sequence[str],
    dataset: Dataset | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    callbacks_for: Callable[[str], Sequence[Callback]] = lambda embedding: (),
    notify: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Train each embedding with the same settings, seed and pre-training, one after the other.

    The tables are rewritten after each run, so that an interrupted comparison leaves what was finished.

    Args:
        config: settings of every run; `embedding.name` is replaced.
        embeddings: names such as 'full', 'c-rq', 'p-lora'; each once.
        dataset: the interactions; None loads `config.dataset`.
        out: folder for compare.json, compare.csv, compare.md, compare.tex, accuracy_bytes.png, curves.png and
            a folder for each run; None writes nothing.
        overwrite: whether `out` may hold earlier results, which are replaced.
        callbacks_for: observers of the run of an embedding.
        notify: told in a sentence what is being done between runs.

    Raises:
        ValueError: no embedding, one named twice or unknown, or settings that do not fit the data set.
        FileExistsError, OSError: `out` is not empty, or cannot be written.
    """
    configs = check_embeddings(config, embeddings)
    folder = None if out is None else prepare_folder(out, overwrite, clear=False)
    first = [] if folder is None else [_Replaces(folder)]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if dataset is None:
        notify(f"Loading {config.dataset.name}")
        dataset = load_dataset(config.dataset.name, **config.dataset.options)
    notify("Preparing full embeddings and codes on the server")
    results: list[RunResult] = []
    for result in run_all(
        list(configs.values()),
        dataset,
        lambda settings: None if folder is None else folder / settings.embedding.name,
        reuse=False,
        callbacks_for=lambda settings: [
            *([] if results else first),
            *callbacks_for(settings.embedding.name),
        ],
    ):
        assert result is not None  # only with reuse
        results.append(result)
        if folder is not None:
            _write_tables(Comparison(config, results, folder), folder)
    comparison = Comparison(config, results, folder)
    if folder is not None:
        metric = f"HR@{comparison.k}"
        plot_accuracy_against_bytes(results, folder / SCATTER, metric=metric, title=comparison.title)
        plot_learning_curves(results, folder / CURVES, metric=metric, title=comparison.title)
    return comparison


def check_embeddings(config: Config, embeddings: Sequence[str]) -> dict[str, Config]:
    """The settings of each run, by the embedding's name in its normal spelling.

    Raises:
        ValueError: no embedding, or one unknown or named twice.
    """
    if not embeddings:
        raise ValueError("embeddings: expected at least one name, got none")
    configs: dict[str, Config] = {}
    for text in embeddings:
        name = str(parse_spec(text))
        if name in configs:
            raise ValueError(f"embeddings: expected each name once, got {name!r} twice")
        configs[name] = config.updated([f"embedding.name={name}"])
    return configs


class _Replaces(Callback):
    """Deletes the files of what was there before when the first run starts: nothing is refused any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_start(self, simulator: Simulator) -> None:
        clear_folder(self._folder)
        for name in (JSON, CSV, MARKDOWN, LATEX, SCATTER, CURVES):
            (self._folder / name).unlink(missing_ok=True)


def _write_tables(comparison: Comparison, folder: Path) -> None:
    values = {
        "config": comparison.config.model_dump(mode="json"),
        "results": [result.as_dict() for result in comparison.results],
    }
    (folder / JSON).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / CSV).write_text(csv_table(comparison.results, comparison.k), encoding="utf-8")
    (folder / LATEX).write_text(latex_comparison(comparison.results, comparison.k), encoding="utf-8")
    table = markdown_table(comparison.results, comparison.k)
    (folder / MARKDOWN).write_text(
        f"# {comparison.title}\n\n{table}\nKB: 1,000 bytes, per client and round.\n", encoding="utf-8"
    )
