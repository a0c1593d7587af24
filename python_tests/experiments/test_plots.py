"""Pictures: they are PNGs of sensible size, and labels never touch each other, a point, or the edge."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from fedpeft_ext.experiments import plots
from fedpeft_ext.experiments.plots import Place, Point, plot_accuracy_against_bytes, plot_learning_curves
from fedpeft_ext.experiments.results import RunResult

Maker = Callable[..., RunResult]
Results = list[RunResult]
Draw = Callable[..., Path]
BOTH = pytest.mark.parametrize("draw", [plot_accuracy_against_bytes, plot_learning_curves])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures drawn during the test, by order, caught as they are saved."""
    drawn: list[Figure] = []
    save = plots._save

    def catch(figure: Figure, path: str | Path) -> Path:
        drawn.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", catch)
    return drawn


@BOTH
def test_writes_a_png(draw: Draw, demo_results: Results, tmp_path: Path) -> None:
    path = draw(demo_results, tmp_path / "x.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] >= 1000
        colors = image.convert("RGB").getcolors(1 << 20)
        assert colors is not None
        assert len(colors) > 10, "an empty picture"


@BOTH
def test_labels_name_every_run_and_do_not_overlap(
    draw: Draw, demo_results: Results, result: Maker, tmp_path: Path, figures: list[Figure]
) -> None:
    crowd = [
        result("c-lora", 0.576, 54_800),
        result("p-hash+senet", 0.577, 65_900),
        result("p-rq+lora", 0.582, 104_000),
    ]
    runs = [*demo_results, *crowd]
    draw(runs, tmp_path / "x.png")
    labels = [child for child in figures[0].axes[0].get_children() if isinstance(child, Annotation)]
    assert sorted(label.get_text() for label in labels) == sorted(run.embedding for run in runs)
    boxes = [label.get_window_extent() for label in labels]
    page = figures[0].bbox
    for index, box in enumerate(boxes):
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        for other in boxes[:index]:
            assert plots._overlap(box, other) < 1.0


def test_axes_state_what_and_in_which_unit(
    demo_results: Results, tmp_path: Path, figures: list[Figure]
) -> None:
    plot_accuracy_against_bytes(demo_results, tmp_path / "a.png", title="FedMF")
    plot_learning_curves(demo_results, tmp_path / "b.png")
    scatter, curves = (figure.axes[0] for figure in figures)
    assert scatter.get_xscale() == "log"
    assert "KB" in scatter.get_xlabel()
    assert scatter.get_ylabel() == curves.get_ylabel() == "HR@10"
    assert scatter.get_title(loc="left") == "FedMF"
    assert curves.get_xlabel() == "round"
    low, high = scatter.get_xlim()
    places = zip(scatter.get_xticklabels(), scatter.get_xticks(), strict=True)
    ticks = [tick for tick, place in places if low < place < high]
    assert len(ticks) >= 2
    assert all(tick.get_text().replace(",", "").replace(".", "").isdigit() for tick in ticks)


def test_wide_ranges_and_single_points(result: Maker, tmp_path: Path) -> None:
    far = [result("full", 0.5, 10_000_000), result("p-rq", 0.5, 50)]
    plot_accuracy_against_bytes(far, tmp_path / "wide.png")
    plot_accuracy_against_bytes([result("p-rq")], tmp_path / "one.png")
    plot_learning_curves([result("p-rq", rounds=0)], tmp_path / "untrained.png")


def test_refuses_nothing_to_draw_and_unknown_metrics(demo_results: Results, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        plot_learning_curves([], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"expected one of HR@10, NDCG@10, got 'HR@7'"):
        plot_accuracy_against_bytes(demo_results, tmp_path / "x.png", metric="HR@7")


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12).map(sorted), st.floats(0.5, 20))
def test_spread_keeps_order_and_distance_and_moves_only_what_touches(places: list[float], gap: float) -> None:
    spread = plots._spread(places, gap)
    assert all(b - a >= gap - 1e-6 for a, b in pairwise(spread))
    if all(b - a >= gap for a, b in pairwise(places)):
        assert spread == pytest.approx(places)
    assert sum(spread) == pytest.approx(sum(places), abs=1e-6)


@pytest.mark.parametrize(
    ("lines", "log_x", "limits", "ticks"),
    [
        ({"a": [(60, 0.1), (120, 0.2)]}, False, (60, 120), None),
        ({"a": [(5, 0.1), (120, 0.2)]}, False, (0, 120), None),
        ({"a": [(0.0, 0.1), (0.64, 0.2)]}, False, (0, 0.672), None),
        ({"a": [(4_000, 0.1), (210_000, 0.2)]}, True, None, {"5,000", "10,000", "200,000"}),
        ({"a": [(0.01, 0.1), (0.3, 0.2)]}, True, None, {"0.01", "0.2"}),
        ({"a": [(32, 0.1), (128, 0.2)], "b": [(512, 0.1)]}, True, None, {"32", "128", "512"}),
        ({"a": [(0.25, 0.1), (1.5, 0.2), (4, 0.3)]}, True, None, {"0.25", "1.5", "4"}),
        ({"a": [(60, 0.1), (80, 0.1), (120, 0.2)]}, False, (60, 120), {"60", "80", "120"}),
    ],
    ids=["late start", "rounds", "shares", "large", "small", "sizes", "multipliers", "round ticks"],
)
def test_x_axes_fit_what_is_drawn(
    lines: dict[str, list[tuple[float, float]]],
    log_x: bool,
    limits: tuple[float, float] | None,
    ticks: set[str] | None,
    tmp_path: Path,
    figures: list[Figure],
) -> None:
    plots.plot_lines(lines, tmp_path / "x.png", xlabel="x", ylabel="y", title="", log_x=log_x)
    axes = figures[0].axes[0]
    low, high = axes.get_xlim()
    if limits is not None:
        assert (low, high) == pytest.approx(limits)
    inside = [tick.get_text() for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
    assert len(inside) >= 3
    assert ticks is None or ticks <= set(inside)


def test_shares_are_not_drawn_below_zero(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_lines(
        {"a": [Place(0, 0.1, 0.3), (2, 0.1)]}, tmp_path / "x.png", xlabel="x", ylabel="y", title=""
    )
    points = [Point("a", "p-rq", 10, 0.1, 0.3)]
    plots.plot_points(points, tmp_path / "y.png", xlabel="x", ylabel="y", title="")
    plots.plot_lines({"a": [(0, -0.1), (2, 0.1)]}, tmp_path / "z.png", xlabel="x", ylabel="y", title="")
    bottoms = [figure.axes[0].get_ylim()[0] for figure in figures]
    assert bottoms[:2] == [0, 0]
    assert bottoms[2] < -0.1


def test_names_at_line_ends_show_how_the_line_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    """More lines than colours: the same colour comes again, dashed."""
    lines = {f"line {number}": [(0, 0.1), (1, number / 10)] for number in range(8)}
    plots.plot_lines(lines, tmp_path / "x.png", xlabel="x", ylabel="y", title="")
    axes = figures[0].axes[0]
    drawn, pieces = axes.lines[:8], axes.lines[8:]
    names = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert len(pieces) == len(names) == 8
    for line, name, piece in zip(drawn, names, pieces, strict=True):  # both by height
        assert (piece.get_color(), piece.get_linestyle()) == (line.get_color(), line.get_linestyle())
        place, box = piece.get_window_extent(), name.get_window_extent()
        assert name.get_color() == piece.get_color()
        assert axes.bbox.x1 < place.x0 < place.x1 < box.x0
        assert box.y0 < place.y0 < box.y1


def test_spreads_are_drawn_where_they_are_known(tmp_path: Path, figures: list[Figure]) -> None:
    known = {"a": [Place(1, 0.5, 0.1), Place(2, 0.6, 0.05)], "b": [(1, 0.2), (2, 0.3)]}
    plots.plot_lines(known, tmp_path / "x.png", xlabel="x", ylabel="y", title="")
    (band,) = figures[0].axes[0].collections
    _, low, _, high = band.get_datalim(figures[0].axes[0].transData).extents
    assert (low, high) == pytest.approx((0.4, 0.65))

    points = [Point("a", "p-rq", 10, 0.5, 0.1), Point("b", "full", 20, 0.6)]
    plots.plot_points(points, tmp_path / "y.png", xlabel="x", ylabel="y", title="")
    (bars,) = [lines for lines in figures[1].axes[0].collections if isinstance(lines, LineCollection)]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([0.4, 0.6])]


@pytest.mark.parametrize("bar", [0.0, 10.0, 75.0])
@pytest.mark.parametrize("dx", [-14, 14])
def test_a_label_away_from_its_point_has_a_line_to_it(dx: int, bar: float) -> None:
    axes = Figure().subplots()
    aside, beside = (
        plots._annotate(axes, (0.5, 0.5), "p-rq", (x, y, "center", "bottom"), bar)
        for x, y in ((dx, 24), (0, bar + 4))
    )
    assert aside.arrow_patch is not None
    assert beside.arrow_patch is None
