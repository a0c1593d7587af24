"""The two kinds of pictures that studies draw; nothing where every run diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from fedpeft_ext.experiments.plots import Place, Point, plot_lines, plot_points
from fedpeft_ext.experiments.results import KB
from fedpeft_ext.experiments.studies.study import Picture

_SPREAD = "; one standard deviation over seeds is shown"


def spread_of(row: Mapping[str, Any], metric: str) -> float:
    """The standard deviation of `metric` in a row of means; 0 with one seed."""
    return row.get(f"{metric} sd") or 0.0


def line_picture(
    name: str,
    lines: Mapping[str, Sequence[tuple[float, float] | Place]],
    *,
    caption: str,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> list[Picture]:
    """A picture of named lines of (x, y); lines without a place are left out. `caption` has no full stop."""
    drawn = {label: places for label, places in lines.items() if places}

    def draw(path: Path) -> object:
        return plot_lines(drawn, path, xlabel=xlabel, ylabel=ylabel, title=title, log_x=log_x)

    shows = any(Place(*place).spread for places in drawn.values() for place in places)
    return [Picture(name, f"{caption}{_SPREAD if shows else ''}.", draw)] if drawn else []


def bytes_picture(
    name: str, means: pl.DataFrame, metric: str, *, title: str, label: str = "embedding"
) -> list[Picture]:
    """`metric` against `bytes_up` of each row of `means`, named by its column `label`."""
    points = [
        Point(row[label], row["embedding"], row["bytes_up"] / KB, row[metric], spread_of(row, metric))
        for row in means.filter(pl.col(metric).is_not_null()).iter_rows(named=True)
    ]

    def draw(path: Path) -> object:
        return plot_points(
            points, path, xlabel="sent by a client in a round (KB, log scale)", ylabel=metric, title=title
        )

    shows = _SPREAD if any(point.spread for point in points) else ""
    caption = f"{title}: {metric} against what a client sends{shows}."
    return [Picture(name, caption, draw)] if points else []
