"""Several embeddings trained alike on one data set: one table, two pictures, and the files of every run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedpeft_ext.config import Config, load_config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.experiments.plots import files_of, plot_accuracy_against_bytes, plot_learning_curves
from fedpeft_ext.experiments.results import RunResult, headline_k
from fedpeft_ext.experiments.runner import (
    DIVERGED,
    fingerprint,
    is_done,
    refuse_start,
    result_settings,
    run_all,
    run_name,
)
from fedpeft_ext.experiments.tables import csv_table, latex_comparison, markdown_table
from fedpeft_ext.nn import parse_spec
from fedpeft_ext.simulation import Callback, Simulator
from fedpeft_ext.simulation.files import replace_text
from fedpeft_ext.simulation.output import CONFIG, check_folder, clear_folder, flat, prepare_folder
from fedpeft_ext.simulation.setup import needs_pretrained
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
        results: one a run that did not diverge.
        folder: where the files are, or None.
        diverged: how training ended in NaN or infinity, by the embedding's name.
    """

    config: Config
    results: Sequence[RunResult]
    folder: Path | None
    diverged: Mapping[str, str] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """The cut-off of tables and pictures."""
        return headline_k(self.config.evaluation.ks)

    @property
    def title(self) -> str:
        """What was compared, in a few words; needs a result."""
        summary = self.results[0].summary
        return f"{summary.backbone} on {summary.dataset}, {counted(summary.rounds, 'round')}"


def compare(
    config: Config,
    embeddings: Sequence[str],
    dataset: Dataset | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    pdf: bool = False,
    callbacks_for: Callable[[str], Sequence[Callback]] = lambda embedding: (),
    notify: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Train each embedding with the same settings, seed and pre-training, one after the other.

    A comparison in `out` goes on: finished runs are read, interrupted ones go on from their checkpoints, and
    the others are trained, to the same bits as if it had not been interrupted. The tables are rewritten after
    each run. A run that ends in NaN or infinity does not stop the others.

    Args:
        config: settings of every run; `embedding.name` is replaced.
        embeddings: names such as 'full', 'c-rq', 'p-lora'; each once.
        dataset: the interactions; None loads `config.dataset`.
        out: folder for compare.json, compare.csv, compare.md, compare.tex, accuracy_bytes.png, curves.png and
            a folder for each run; None writes nothing.
        overwrite: whether `out` may hold earlier results, which are replaced.
        pdf: draw the pictures as PDF, too.
        callbacks_for: observers of the run of an embedding.
        notify: told in a sentence what is being done between runs.

    Raises:
        ValueError: no embedding, one named twice or unknown, or settings that do not fit the data set.
        FileExistsError: `out` holds something else, or runs of other settings or data, which are named.
        OSError: `out` cannot be written.
    """
    configs = check_embeddings(config, embeddings)
    folder = None if out is None else Path(out)
    going_on = folder is not None and goes_on(folder, overwrite)
    if folder is not None:
        prepare_folder(folder, overwrite or going_on, clear=False)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if dataset is None:
        notify(f"Loading {config.dataset.name}")
        dataset = load_dataset(config.dataset.name, **config.dataset.options)
    results: list[RunResult] = []
    diverged: dict[str, str] = {}
    comparison = Comparison(config, results, folder, diverged)
    observers: list[Callback] = []
    runs: dict[str, str] = {}  # by embedding: what was trained, or is to be
    done: list[str] = []
    if folder is not None:
        data = fingerprint(dataset)
        names = {embedding: run_name(settings, data) for embedding, settings in configs.items()}
        if going_on:
            runs = _check_runs(folder, configs, names)
            done = [embedding for embedding in names if is_done(folder / embedding)]
        runs |= names
        replaced = () if going_on else tuple(names)
        observers = [_Begins(folder, replaced, partial(_write_json, comparison, runs, folder))]
    notify(counted(len(configs), "run") + (f", {len(done)} of them finished before" if done else ""))
    if any(needs_pretrained(embedding) for embedding in configs.keys() - done):
        notify("Preparing full embeddings and codes on the server")
    made = run_all(
        list(configs.values()),
        dataset,
        lambda settings: None if folder is None else folder / settings.embedding.name,
        reuse=going_on,
        callbacks_for=lambda settings: [*observers, *callbacks_for(settings.embedding.name)],
    )
    for embedding, result in zip(configs, made, strict=True):
        if isinstance(result, FloatingPointError):
            notify(f"{embedding} diverged")
            diverged[embedding] = str(result)
        else:
            results.append(result)
        if folder is not None:
            _write_tables(comparison, runs, folder)
    if folder is not None and results:
        metric = f"HR@{comparison.k}"
        for plot, name in ((plot_accuracy_against_bytes, SCATTER), (plot_learning_curves, CURVES)):
            for file in files_of(folder / name, pdf):
                plot(results, file, metric=metric, title=comparison.title)
    return comparison


def check_embeddings(config: Config, embeddings: Sequence[str]) -> dict[str, Config]:
    """The settings of each run, by the embedding's name in its normal spelling.

    Raises:
        ValueError: no embedding, or one unknown or named twice.
    """
    refuse_start(config)
    if not embeddings:
        raise ValueError("embeddings: expected at least one name, got none")
    configs: dict[str, Config] = {}
    for text in embeddings:
        name = str(parse_spec(text))
        if name in configs:
            raise ValueError(f"embeddings: expected each name once, got {name!r} twice")
        configs[name] = config.updated([f"embedding.name={name}"])
    return configs


def goes_on(folder: Path, overwrite: bool) -> bool:
    """Whether a comparison in `folder` goes on. Raises FileExistsError where something else is in the way."""
    if not overwrite and (folder / JSON).is_file():
        return True
    check_folder(folder, overwrite)
    return False


def _check_runs(folder: Path, configs: Mapping[str, Config], names: Mapping[str, str]) -> dict[str, str]:
    """The `run_name` of every run of the comparison in `folder`, by embedding.

    Raises:
        FileExistsError: one of `configs` is there by another name than in `names`; tells what differs.
        ValueError: a file is damaged.
    """
    file = folder / JSON
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8"))["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not that of a comparison ({type(error).__name__}: {error})") from error
    for embedding, now in configs.items():
        place = folder / embedding
        if not (place / CONFIG).is_file():
            continue
        then = load_config(place / CONFIG)
        why = _differences(result_settings(then), result_settings(now))
        if not why and known.get(embedding) != names[embedding]:
            why = _differences(
                *({"dataset": config.dataset.model_dump(mode="json")} for config in (then, now))
            )
            why = why or ["other data, texts or features, or by another version of fedpeft_ext"]
        if why:
            raise FileExistsError(
                f"out: {place} was trained with {'; '.join(why)}; choose another folder, or overwrite"
            )
    return known


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that are not the same, with both values."""
    old, new = flat(then), flat(now)
    return [
        f"{key} {json.dumps(old.get(key))}, not {json.dumps(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


class _Begins(Callback):
    """Makes the folder that of a comparison when the first run starts: nothing is refused any more.

    Args:
        folder: of the comparison.
        replaced: embeddings whose earlier runs are deleted, along with files of the folder itself; none goes
            on with what is there.
        write: writes compare.json.
    """

    def __init__(self, folder: Path, replaced: Sequence[str], write: Callable[[], None]) -> None:
        self._folder = folder
        self._replaced = replaced
        self._write = write

    def on_start(self, simulator: Simulator) -> None:
        folder = self._folder
        if self._replaced:
            clear_folder(folder)
            for name in (JSON, CSV, MARKDOWN, LATEX):
                (folder / name).unlink(missing_ok=True)
            for name in (SCATTER, CURVES):
                for file in files_of(folder / name, pdf=True):
                    file.unlink(missing_ok=True)
        for embedding in self._replaced:
            if embedding != simulator.config.embedding.name and (folder / embedding).is_dir():
                clear_folder(folder / embedding)
                (folder / embedding / DIVERGED).unlink(missing_ok=True)
        self._replaced = ()
        self._write()


def _write_json(comparison: Comparison, runs: Mapping[str, str], folder: Path) -> None:
    values = {
        "config": comparison.config.model_dump(mode="json"),
        "runs": runs,
        "results": [result.as_dict() for result in comparison.results],
        "diverged": comparison.diverged,
    }
    replace_text(folder / JSON, json.dumps(values, indent=2, allow_nan=False) + "\n")


def _write_tables(comparison: Comparison, runs: Mapping[str, str], folder: Path) -> None:
    _write_json(comparison, runs, folder)
    if not comparison.results:
        return
    (folder / CSV).write_text(csv_table(comparison.results, comparison.k), encoding="utf-8")
    (folder / LATEX).write_text(latex_comparison(comparison.results, comparison.k), encoding="utf-8")
    table = markdown_table(comparison.results, comparison.k)
    page = [f"# {comparison.title}\n", table, "KB: 1,000 bytes, per client and round.\n"]
    page += [f"{embedding}: {reason}.\n" for embedding, reason in comparison.diverged.items()]
    (folder / MARKDOWN).write_text("\n".join(page), encoding="utf-8")
