"""What a study is: variants of settings, all trained by one runner, and the tables and pictures made of them.

A study's module only says which settings vary and what is read off the runs. `Context.train` trains each
variant with each seed in a folder of its own, named by a digest of its settings: a study that is started
again goes on where it stopped, and studies that share the folder share their runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.experiments.intervals import half_width
from fedpeft_ext.experiments.plots import Place
from fedpeft_ext.experiments.results import RunResult, headline_k
from fedpeft_ext.experiments.runner import fingerprint, is_done, run_all, run_name
from fedpeft_ext.simulation import Callback
from fedpeft_ext.words import counted

Label = str | int | float


@dataclass(frozen=True)
class Variant:
    """One row of a study: how it is called, and the settings that make it.

    Attributes:
        labels: columns that name it.
        settings: ``section.key=value`` over the study's common settings.
    """

    labels: Mapping[str, Label]
    settings: tuple[str, ...]


GOALS = (0.9, 0.95, 1.0)
"""Shares of an accuracy until which rounds and bytes are counted."""


@dataclass(frozen=True)
class Table:
    """A table of a study.

    Attributes:
        name: of its CSV file.
        title: what it shows.
        frame: the numbers, in full precision; see `shown` for how they are printed.
        note: what a reader has to know of the columns.
    """

    name: str
    title: str
    frame: pl.DataFrame
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of a study: `draw` writes it to a path, as PNG or PDF by its end."""

    name: str
    caption: str
    draw: Callable[[Path], object]


@dataclass(frozen=True)
class Findings:
    """What a study found: `answers` are sentences with figures in them; `runs` has a row for each run that
    `Context.train` did not train.
    """

    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()
    answers: Sequence[str] = ()
    runs: pl.DataFrame | None = None


@dataclass(frozen=True)
class Study:
    """A study by name.

    Attributes:
        name: as the command line takes it.
        title, question: for people; `question` is what it answers, and where it comes from.
        settings: that it needs, under the user's own.
        options: those of `StudyOptions` that it has.
        run: trains what it needs through the context, and reads off the findings.
    """

    name: str
    title: str
    question: str
    run: Callable[[Context], Findings]
    settings: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StudyOptions:
    """What a user may vary; None takes the study's own.

    Attributes:
        backbones, embeddings: names.
        vary: ``section.key=value,value``, settings of `grid` with the values that they take.
        budget_kb: KB that a client may send in a round.
        check: whether `select` trains the whole grid to check its choice.
    """

    backbones: tuple[str, ...] | None = None
    embeddings: tuple[str, ...] | None = None
    vary: tuple[str, ...] | None = None
    budget_kb: float | None = None
    check: bool = True


@dataclass(frozen=True)
class Trained:
    """The runs of variants, `seeds` of each in order; None stands for one that diverged. With `at_best` their
    metrics are those of their best round by validation items, else of the last.
    """

    variants: Sequence[Variant]
    seeds: Sequence[int]
    results: Sequence[RunResult | None]
    names: Sequence[str]
    at_best: bool = False

    def metrics(self, result: RunResult) -> Mapping[str, float]:
        """Of a run, by name."""
        return result.summary.best if self.at_best else result.metrics

    @property
    def labels(self) -> list[str]:
        """Names of the columns that name a variant."""
        return list(self.variants[0].labels)

    def of(self, variant: Variant) -> list[RunResult]:
        """The runs of a variant that did not diverge."""
        place = list(self.variants).index(variant) * len(self.seeds)
        return [result for result in self.results[place : place + len(self.seeds)] if result is not None]

    def frame(self) -> pl.DataFrame:
        """A row a run: labels, seed, metrics, bytes, times, and the folder's name."""
        rows: list[dict[str, object]] = []
        runs = zip(
            ((variant, seed) for variant in self.variants for seed in self.seeds),
            self.results,
            self.names,
            strict=True,
        )
        for (variant, seed), result, name in runs:
            row: dict[str, object] = {**variant.labels, "seed": seed}
            if result is not None:
                summary = result.summary
                row |= {
                    **({"best_round": summary.best_round} if self.at_best else {}),
                    **self.metrics(result),
                    "bytes_down": summary.bytes_down,
                    "bytes_up": summary.bytes_up,
                    "bytes_setup": summary.bytes_setup,
                    "saving": result.saving,
                    "total_bytes": summary.total_bytes,
                    "clients_per_second": summary.clients_per_second,
                    "seconds": summary.seconds,
                }
                if summary.privacy is not None:
                    row["epsilon"] = summary.privacy.get("epsilon")  # absent where nothing is guaranteed
            rows.append({**row, "diverged": result is None, "run": name})
        return pl.DataFrame(rows, infer_schema_length=None)

    def means(self, metrics: Sequence[str], others: Sequence[str] = ()) -> pl.DataFrame:
        """A row a variant: labels; mean, standard deviation (`<metric> sd`) and half of the 95% confidence
        interval (`<metric> ci95`) of `metrics` over seeds; the largest value of `others`, which but for
        epsilon is that of every seed; the number of `seeds`, and how many of their runs `diverged`.
        """
        widths = {count: half_width(count) if count > 1 else None for count in range(len(self.seeds) + 1)}
        frame = self.frame()
        absent = [name for name in (*metrics, *others) if name not in frame.columns]  # all runs diverged
        frame = frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in absent)
        return frame.group_by(self.labels, maintain_order=True).agg(
            *(
                expression
                for name in metrics
                for expression in (
                    pl.col(name).mean(),
                    pl.col(name).std().alias(f"{name} sd"),
                    (
                        pl.col(name).std()
                        * pl.col(name).count().replace_strict(widths, return_dtype=pl.Float64)
                    ).alias(f"{name} ci95"),
                )
            ),
            *(pl.col(name).max() for name in others),
            pl.len().alias("seeds"),
            pl.col("diverged").sum(),
        )

    def last(self, variant: Variant, metric: str) -> float | None:
        """Mean over seeds of the last evaluations; None where all runs diverged."""
        values = [result.metrics[metric] for result in self.of(variant)]
        return sum(values) / len(values) if values else None

    def reaching(self, variant: Variant, metric: str, level: float) -> list[tuple[int, int]]:
        """`first_reaching` of the runs that get there."""
        hits = [first_reaching(result, metric, level) for result in self.of(variant)]
        return [hit for hit in hits if hit is not None]

    def curve(self, variant: Variant, metric: str) -> list[Place]:
        """(round, mean over seeds, their standard deviation) of every evaluation."""
        curves = [result.curve(metric) for result in self.of(variant)]
        return [
            mean_place(places[0][0], [value for _, value in places]) for places in zip(*curves, strict=True)
        ]


@dataclass
class Context:
    """What a study trains with.

    Attributes:
        config: common settings of all runs.
        dataset: the interactions.
        runs: folder of the runs, a folder each.
        num_seeds: how many; the first is `config.seed`.
        options: what the user asked for.
        callbacks_for: observers of a run that is trained.
        notify: told in a sentence what is being done.
        all_runs: every run that was asked for so far.
    """

    config: Config
    dataset: Dataset
    runs: Path
    num_seeds: int = 3
    options: StudyOptions = field(default_factory=StudyOptions)
    callbacks_for: Callable[[Config], Sequence[Callback]] = lambda config: ()
    notify: Callable[[str], None] = lambda message: None
    all_runs: list[Trained] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = fingerprint(self.dataset)

    @property
    def k(self) -> int:
        """The cut-off of tables and pictures."""
        return headline_k(self.config.evaluation.ks)

    @property
    def seeds(self) -> list[int]:
        """Of the runs of a variant."""
        return [self.config.seed + offset for offset in range(self.num_seeds)]

    def backbones(self, default: Sequence[str]) -> tuple[str, ...]:
        """Those that the user chose, or `default`."""
        return tuple(default) if self.options.backbones is None else self.options.backbones

    def embeddings(self, default: Sequence[str]) -> tuple[str, ...]:
        """Those that the user chose, or `default`."""
        return tuple(default) if self.options.embeddings is None else self.options.embeddings

    @property
    def validated(self) -> bool:
        """Whether validation items are held out."""
        return bool((self.dataset.valid_items >= 0).any())

    def train(
        self, variants: Sequence[Variant], seeds: Sequence[int] | None = None, *, at_best: bool = False
    ) -> Trained:
        """Train every variant with every seed, or read what was trained before; `at_best`: see `Trained`.

        All settings are validated before the first run.
        """
        seeds = self.seeds if seeds is None else list(seeds)
        configs = [
            self.config.updated([*variant.settings, f"seed={seed}"]) for variant in variants for seed in seeds
        ]
        places = [self.runs / run_name(config, self.data) for config in configs]
        done = sum(is_done(place) for place in places)
        self.notify(counted(len(configs), "run") + (f", {done} of them finished before" if done else ""))
        position = 0

        def observers(config: Config) -> Sequence[Callback]:
            labels = ", ".join(f"{value}" for value in variants[position // len(seeds)].labels.values())
            self.notify(f"Run {position + 1} of {len(configs)}: {labels}, seed {config.seed}")
            return self.callbacks_for(config)

        results = []
        for result in run_all(
            configs,
            self.dataset,
            lambda config: self.runs / run_name(config, self.data),
            reuse=True,
            for_later=False,
            callbacks_for=observers,
        ):
            if isinstance(result, FloatingPointError):
                self.notify(f"Run {position + 1} of {len(configs)} diverged")
            results.append(None if isinstance(result, FloatingPointError) else result)
            position += 1
        trained = Trained(variants, seeds, results, [place.name for place in places], at_best)
        self.all_runs.append(trained)
        return trained


def mean_place(x: float, values: Sequence[float]) -> Place:
    """The mean of one or more values at `x`, and their standard deviation."""
    return Place(x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def first_reaching(result: RunResult, metric: str, level: float) -> tuple[int, int] | None:
    """(round, bytes sent by all clients until then) of the first evaluation with `metric` at `level` or
    above, untrained models left out; None where there is none."""
    sent = dict(result.bytes_until())
    for round, value in result.curve(metric):
        if round > 0 and value >= level:
            return round, sent[round]
    return None
