"""Pictures as PNG, or PDF by the file's name: accuracy against bytes, learning curves, and the points and
lines of studies.

Drawn on figures of their own (no pyplot): this needs no display and leaves a caller's figures alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D, Bbox, ScaledTranslation

from fedpeft_ext.experiments.results import KB, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

# Okabe and Ito, "Color Universal Design" (2008), for any colour vision; their yellow is too faint for lines.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_FULL = "#000000"
_Style = Literal["-", "--", ":"]
_STYLES: tuple[_Style, ...] = ("-", "--", ":")
_FAMILIES = {
    "full": ("Full: trained and sent whole", "s", _FULL),
    "c": ("C-X: compressed alone", "^", "#D55E00"),
    "p": ("P-X: frozen full + compressed", "o", "#0072B2"),
}
_GREY = "#666666"
# Where a label may stand around its point, best first: offset in points, horizontal and vertical alignment.
_SPOTS = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (8, 8, "left", "bottom"),
    (8, -8, "left", "top"),
    (-8, 8, "right", "bottom"),
    (-8, -8, "right", "top"),
    (0, 24, "center", "bottom"),
    (0, -24, "center", "top"),
    (14, 24, "left", "bottom"),
    (14, -24, "left", "top"),
    (-14, 24, "right", "bottom"),
    (-14, -24, "right", "top"),
    (0, 40, "center", "bottom"),
    (0, -40, "center", "top"),
)


@dataclass(frozen=True)
class Point:
    """A named place in a scatter plot: the embedding decides colour and marker, a bar shows y ± spread."""

    label: str
    embedding: str
    x: float
    y: float
    spread: float = 0.0


class Place(NamedTuple):
    """A place on a line; a band around it shows y ± spread."""

    x: float
    y: float
    spread: float = 0.0


class _End(NamedTuple):
    """Where a line ends, and how it is drawn."""

    y: float
    color: str
    style: _Style


def plot_accuracy_against_bytes(
    results: Sequence[RunResult], path: str | Path, *, metric: str = "HR@10", title: str = ""
) -> Path:
    """Draw `metric` of each run against its bytes per client and round, and write it to `path`.

    The x axis is logarithmic, in KB (1,000 bytes), down and up together; each point is named.

    Raises:
        ValueError: no results, or `metric` is not among their metrics.
    """
    _check(results, metric)
    points = [Point(r.embedding, r.embedding, r.bytes_per_round / KB, r.metrics[metric]) for r in results]
    return plot_points(
        points,
        path,
        xlabel="sent per client and round, down + up (KB, log scale)",
        ylabel=_metric_label(metric),
        title=title or "Accuracy against bytes",
    )


def plot_points(points: Sequence[Point], path: str | Path, *, xlabel: str, ylabel: str, title: str) -> Path:
    """Draw named points over a logarithmic x axis and write them to `path`.

    A dashed line marks the height of `full`.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points: expected at least one to draw, got none")
    figure, axes = _figure()
    for family, (label, marker, color) in _FAMILIES.items():
        members = [point for point in points if _family(point.embedding) == family]
        if members:
            x, y = [point.x for point in members], [point.y for point in members]
            axes.scatter(x, y, s=64, marker=marker, color=color, label=label, zorder=3)
            if any(point.spread for point in members):
                spreads = [point.spread for point in members]
                axes.errorbar(x, y, yerr=spreads, fmt="none", ecolor=color, elinewidth=1.2, zorder=2)
    for point in points:
        if point.embedding == "full":
            axes.axhline(point.y, color=_GREY, linewidth=1, linestyle=(0, (4, 4)), zorder=1)

    axes.set_xscale("log")
    low, high = min(point.x for point in points), max(point.x for point in points)
    axes.set_xlim(low / 1.6, high * 1.6)
    _plain_log_ticks(axes, high / low)
    axes.margins(y=0.15)
    _not_below_zero(axes, [point.y for point in points])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)
    _label_points(axes, points)
    return _save(figure, path)


def plot_learning_curves(
    results: Sequence[RunResult], path: str | Path, *, metric: str = "HR@10", title: str = ""
) -> Path:
    """Draw `metric` over rounds, one named line a run, and write it to `path`.

    Raises:
        ValueError: no results, or `metric` is not among their metrics.
    """
    _check(results, metric)
    lines = {result.embedding: result.curve(metric) for result in results}
    return plot_lines(
        lines, path, xlabel="round", ylabel=_metric_label(metric), title=title or "Learning curves"
    )


def plot_lines(
    lines: Mapping[str, Sequence[tuple[float, float] | Place]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
) -> Path:
    """Draw named lines of (x, y) and write them to `path`; the line `full` is black.

    Args:
        lines: places in order; a `Place` may have a spread, drawn as a band.
        log_x: logarithmic x axis; places at 0 or below are then left out.

    Raises:
        ValueError: no line, or one without a place to draw.
    """
    if not lines:
        raise ValueError("lines: expected at least one to draw, got none")
    figure, axes = _figure()
    ends: dict[str, _End] = {}
    drawn: list[Place] = []
    for index, (name, places) in enumerate(lines.items()):
        shown = [place for place in (Place(*each) for each in places) if place.x > 0 or not log_x]
        if not shown:
            raise ValueError(f"lines: expected places to draw, got none for {name!r}")
        x, y, spreads = zip(*shown, strict=True)
        color = _FULL if name == "full" else _PALETTE[index % len(_PALETTE)]
        style = _STYLES[index // len(_PALETTE) % len(_STYLES)]
        marker = "o" if len(x) <= 30 else None
        axes.plot(x, y, color=color, linestyle=style, linewidth=2, marker=marker, markersize=4, clip_on=False)
        if any(spreads):
            below = [place.y - place.spread for place in shown]
            above = [place.y + place.spread for place in shown]
            axes.fill_between(x, below, above, color=color, alpha=0.15, linewidth=0)
        ends[name] = _End(y[-1], color, style)
        drawn += shown
    sizes = sorted({place.x for place in drawn})
    low, high = sizes[0], sizes[-1]
    if log_x:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.1, high * 1.1)
        _plain_log_ticks(axes, high / low)
        few = 3 <= len(sizes) <= 8 and all(right > 1.2 * left for left, right in pairwise(sizes))
        if few and all(float(f"{x:.2g}") == x or float(x).is_integer() for x in sizes):
            axes.xaxis.set_major_locator(FixedLocator(sizes))
    else:
        counts = all(float(x).is_integer() for x in sizes)  # rounds, ranks
        axes.set_xlim(low if low > high / 4 else min(low, 0), max(high, 1) if counts else 1.05 * high)
        axes.xaxis.set_major_locator(MaxNLocator(integer=counts, steps=[1, 2, 5, 10]))
    axes.margins(y=0.08)
    _not_below_zero(axes, [place.y for place in drawn])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left")
    _label_ends(axes, ends)
    return _save(figure, path)


def _plain_log_ticks(axes: Axes, ratio: float) -> None:
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if ratio < 200 else (1,)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if float(value).is_integer() else f"{value:g}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _not_below_zero(axes: Axes, values: Sequence[float]) -> None:
    """Where no value is negative, let neither a margin nor a spread take the y axis below zero."""
    if min(values) >= 0 > axes.get_ylim()[0]:
        axes.set_ylim(bottom=0)


def _check(results: Sequence[RunResult], metric: str) -> None:
    if not results:
        raise ValueError("results: expected at least one run to draw, got none")
    for result in results:
        if metric not in result.metrics:
            raise ValueError(f"metric: expected one of {', '.join(result.metrics)}, got {metric!r}")


def _family(embedding: str) -> str:
    if embedding == "full":
        return "full"
    return "c" if embedding.startswith("c-") else "p"


def _metric_label(metric: str) -> str:
    return f"{metric.removeprefix('full/')} (whole catalogue)" if metric.startswith("full/") else metric


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Name each point in the first spot around it that touches no point, bar, line, label or edge."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the layout, so that places in pixels are final
    frame = axes.get_window_extent()
    radius = 6 * figure.dpi / 72
    taken, bars = [], []
    for point in points:
        (x, y), (_, top) = axes.transData.transform([(point.x, point.y), (point.x, point.y + point.spread)])
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
        if point.spread:
            taken.append(Bbox.from_extents(x - radius, 2 * y - top, x + radius, top))
        bars.append((top - y) * 72 / figure.dpi)
    taken += [line.get_window_extent().padded(1) for line in axes.lines]
    for point, bar in zip(points, bars, strict=True):
        ends = ((0, bar + 4, "center", "bottom"), (0, -bar - 4, "center", "top"))
        spots = (*_SPOTS, *(ends if bar else ()))
        candidates = [_annotate(axes, (point.x, point.y), point.label, spot, bar) for spot in spots]
        boxes = [candidate.get_window_extent().padded(6, 2) for candidate in candidates]
        # Where every spot is taken, the one that hides least.
        costs = [
            sum(_overlap(box, other) for other in taken) + 2 * (box.width * box.height - _overlap(box, frame))
            for box in boxes
        ]
        best = min(range(len(candidates)), key=costs.__getitem__)
        taken.append(boxes[best])
        for index, candidate in enumerate(candidates):
            if index != best:
                candidate.remove()


def _annotate(
    axes: Axes, point: tuple[float, float], label: str, spot: tuple[float, float, str, str], bar: float
) -> Annotation:
    dx, dy, horizontal, vertical = spot
    far = max(abs(dx), abs(dy)) > 20 and not (dx == 0 and abs(dy) <= bar + 4)  # not beside its point or bar
    return axes.annotate(
        label,
        point,
        xytext=(dx, dy),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=10,
        arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.7} if far else None,
    )


def _overlap(a: Bbox, b: Bbox) -> float:
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else float(common.width * common.height)


def _label_ends(axes: Axes, ends: Mapping[str, _End]) -> None:
    """Name each line at its right end, behind a piece of it; names that would touch are moved apart."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    size, behind = 10, 30
    ordered = sorted(ends.items(), key=lambda item: item[1].y)
    texts = [
        axes.annotate(
            name, (1, end.y), xycoords=("axes fraction", "data"), xytext=(behind, 0),
            textcoords="offset points", va="center", fontsize=size, color=end.color,
        )
        for name, end in ordered
    ]  # fmt: skip
    figure.draw_without_rendering()
    points = Affine2D().scale(1 / 72) + figure.dpi_scale_trans
    wanted = [float(axes.transData.transform((0, end.y))[1]) * 72 / figure.dpi for _, end in ordered]
    for (_, end), text, want, place in zip(
        ordered, texts, wanted, _spread(wanted, gap=1.25 * size), strict=True
    ):
        height = place - want
        text.set_position((behind, height))
        # Affine as long as y is linear, which it is in all these pictures.
        there = ScaledTranslation(1, end.y, axes.get_yaxis_transform())  # type: ignore[arg-type]
        piece = Line2D(
            (8, behind - 4),
            (height, height),
            transform=points + there,
            color=end.color,
            linestyle=end.style,
            linewidth=2,
            clip_on=False,
        )
        piece.set_in_layout(False)
        axes.add_artist(piece)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending `places`, moved to stand at least `gap` apart; those that touch share the move equally."""
    clusters: list[list[float]] = []  # of wanted places; a cluster stands centred on their mean
    for place in places:
        clusters.append([place])
        while len(clusters) > 1 and _top(clusters[-2], gap) + gap > _bottom(clusters[-1], gap):
            last = clusters.pop()
            clusters[-1].extend(last)
    return [_bottom(cluster, gap) + gap * index for cluster in clusters for index in range(len(cluster))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) + gap * (len(cluster) - 1) / 2


def files_of(path: Path, pdf: bool) -> list[Path]:
    """Where a picture is to be drawn: at `path`, and as PDF beside it, also where one is there already."""
    vector = path.with_suffix(".pdf")
    return [path, vector] if pdf or vector.is_file() else [path]


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    # Fonts as TrueType, since publishers refuse matplotlib's Type 3; no date, for the same bytes every time.
    with rc_context({"pdf.fonttype": 42}):
        if path.suffix == ".pdf":
            figure.savefig(path, format="pdf", metadata={"CreationDate": None})
        else:
            figure.savefig(path, format="png")
    return path
