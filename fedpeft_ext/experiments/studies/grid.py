"""A grid over settings that the user names, with error bars: for tuning, and for strategies of one's own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from fedpeft_ext.config import parse_value
from fedpeft_ext.experiments.plots import Place
from fedpeft_ext.experiments.studies.pictures import line_picture, spread_of
from fedpeft_ext.experiments.studies.study import Context, Findings, Label, Picture, Study, Table, Variant
from fedpeft_ext.simulation.simulator import VALID

_FIXED = {
    "dataset": "all runs share the data",
    "evaluation": "all runs are evaluated alike",
    "seed": "seeds are those of --seeds",
}
_MOST_LINES = 12


@dataclass(frozen=True)
class _Axis:
    """A setting with the values that it takes, as the table shows them and as settings have them."""

    key: str
    labels: tuple[Label, ...]
    settings: tuple[str, ...]

    @property
    def is_number(self) -> bool:
        return all(isinstance(label, int | float) for label in self.labels)


def run(context: Context) -> Findings:
    """Every combination of the values; a table, and where a setting is a number a picture along it."""
    named = {"backbone.name": context.backbones(()), "embedding.name": context.embeddings(())}
    axes = _axes(
        [f"{key}={','.join(names)}" for key, names in named.items() if names]
        + list(context.options.vary or ())
    )
    names = _names([axis.key for axis in axes])
    choices = [list(zip(axis.labels, axis.settings, strict=True)) for axis in axes]
    trained = context.train(
        [
            Variant(
                dict(zip(names, (label for label, _ in chosen), strict=True)), tuple(s for _, s in chosen)
            )
            for chosen in itertools.product(*choices)
        ],
        at_best=context.validated,
    )
    metric = context.config.evaluation.selection_metric
    judge = VALID * context.validated + metric
    usual = f"HR@{context.k}"
    metrics = list(dict.fromkeys([judge, metric, usual, f"NDCG@{context.k}", f"full/{usual}"]))
    others = ["bytes_up", "saving", *(["epsilon"] if "epsilon" in trained.frame().columns else [])]
    means = trained.means(metrics, others)
    varied = [axis.key for axis in axes if len(axis.labels) > 1]
    note = f"Of the settings above {', '.join(varied) or 'none'} vary."
    if context.validated:
        note += f" Metrics are those of each run's best round by {judge}, which runs.csv names."
    else:
        note += (
            " They are those of the last round. Without dataset.options.validation, a choice by them is by "
            "test items."
        )
    answers = []
    ranked = means.filter(pl.col(judge).is_not_null()).sort(judge, descending=True, maintain_order=True)
    if context.validated and ranked.height:
        best = ranked.row(0, named=True)
        chosen = ", ".join(f"{name} {best[name]}" for name in names)
        answers.append(f"Best by {judge}: {chosen} ({100 * best[judge]:.2f}%).")
    pictures = _picture(context, axes, names, means.filter(pl.col(judge).is_not_null()), judge)
    return Findings([Table("grid", "Settings", means, note)], pictures, answers)


def _axes(vary: Sequence[str]) -> list[_Axis]:
    if not vary:
        raise ValueError("vary: expected at least one KEY=VALUE,VALUE of study grid, got none")
    axes = [_axis(text) for text in vary]
    keys = [axis.key for axis in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"vary: expected each setting once, got {twice!r} twice")
    return axes


def _axis(text: str) -> _Axis:
    key, equals, listed = text.partition("=")
    key = key.strip()
    values = parse_value(f"vary: {key}", f"[{listed}]") if equals else None
    if not key or not values:
        raise ValueError(f"vary: expected KEY=VALUE,VALUE, got {text!r}")
    section = key.partition(".")[0]
    if section in _FIXED:
        raise ValueError(f"vary: expected another setting, since {_FIXED[section]}, got {key!r}")
    values = [_number(value) for value in values]
    settings = tuple(f"{key}={json.dumps(value)}" for value in values)
    if len(set(settings)) != len(settings):
        raise ValueError(f"vary: expected each value once, got {text!r}")
    kinds = {type(value) for value in values}
    labels: list[Label]
    if kinds <= {int, float}:
        labels = values if kinds == {int} else [float(value) for value in values]
    else:  # a column of one kind
        labels = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return _Axis(key, tuple(labels), settings)


def _number(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _names(keys: Sequence[str]) -> list[str]:
    """Short names of settings: the last part, or all where two would have the same."""
    short = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]


def _picture(
    context: Context, axes: Sequence[_Axis], names: Sequence[str], means: pl.DataFrame, metric: str
) -> list[Picture]:
    """`metric` along the first setting that is a number, a line for each choice of the others."""
    along = next((i for i, axis in enumerate(axes) if axis.is_number and len(axis.labels) > 1), None)
    if along is None:
        return []
    x = names[along]
    lines: dict[str, list[Place]] = {}
    for row in means.sort(x, maintain_order=True).iter_rows(named=True):
        others = ", ".join(
            str(row[name]) if axis.key.endswith(".name") else f"{name.replace('_', ' ')} {row[name]}"
            for axis, name in zip(axes, names, strict=True)
            if name != x and (len(axis.labels) > 1 or name == "embedding")
        )
        place = Place(row[x], row[metric], spread_of(row, metric))
        lines.setdefault(others or context.config.embedding.name, []).append(place)
    values = means[x].to_list()
    log = bool(values) and min(values) > 0 and max(values) >= 10 * min(values)
    if len(lines) > _MOST_LINES:
        return []
    backbones = next((axis.labels for axis in axes if axis.key == "backbone.name"), None)
    title = f"{', '.join(map(str, backbones or [context.config.backbone.name]))} on {context.dataset.name}"
    return line_picture(
        "grid",
        lines,
        caption=f"{title}: {metric} by {x}",
        title=title,
        xlabel=f"{x.replace('_', ' ')}{' (log scale)' if log else ''}",
        ylabel=metric,
        log_x=log,
    )


STUDY = Study(
    "grid",
    "Settings",
    "How accurate is every combination of the settings of --vary?",
    run,
    options=frozenset({"backbones", "embeddings", "vary"}),
)
