"""Tables of a comparison: the same numbers, in the same order, in every format."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from rich.console import Console

from fedpeft_ext.experiments.results import RunResult
from fedpeft_ext.experiments.tables import (
    csv_table,
    latex_comparison,
    latex_table,
    markdown_table,
    terminal_table,
)

Maker = Callable[..., RunResult]


def test_markdown_states_bytes_of_each_direction_and_saving(result: Maker) -> None:
    rq = result("p-rq", hr=0.5838, bytes_each_way=50_000)
    lines = markdown_table([result("full", bytes_each_way=200_000), rq]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][3:5] == ["KB down", "KB up"]
    assert cells[2][3:6] == ["200.0", "200.0", "0.0%"]
    assert cells[3] == ["p-rq", "0.5838", "0.2919", "50.0", "50.0", "75.0%", "9,000"]


def test_csv_keeps_full_precision(result: Maker) -> None:
    (row,) = csv.DictReader(io.StringIO(csv_table([result("p-lora", hr=1 / 3, bytes_each_way=12_345)])))
    assert float(row["HR@10"]) == 1 / 3
    assert int(row["bytes_down"]) == int(row["bytes_up"]) == 12_345


def test_latex_escapes_and_has_what_markdown_has(result: Maker) -> None:
    results = [result("full", bytes_each_way=100_000), result("p-lora", hr=0.4, bytes_each_way=300_000)]
    text = latex_comparison(results)
    assert text.count(" \\\\\n") == 3
    assert r"p-lora & 0.4000" in text
    assert "& $-$" in text
    assert latex_table(["a_b %"], [["8.99 ± 1.33"], ["–"], ["[8]"]], [False]).splitlines()[1:] == [
        r"\begin{tabular}{r}",
        r"\toprule",
        r"a\_b \% \\",
        r"\midrule",
        r"8.99 $\pm$ 1.33 \\",
        r"-- \\",
        r"{}[8] \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_terminal_table_marks_the_best_and_fits_80_columns(result: Maker) -> None:
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    console.print(terminal_table([result("full", hr=0.55), result("p-hash+senet", hr=0.58)]))
    styled = console.export_text(styles=True, clear=False)
    assert "\x1b[1m0.5800\x1b[0m" in styled
    assert "\x1b[1m0.5500\x1b[0m" not in styled
    plain = console.export_text()
    assert "p-hash+senet" in plain
    assert all(len(line) <= 80 for line in plain.splitlines())


def test_a_run_that_sends_more_than_full_has_a_negative_saving(result: Maker) -> None:
    run = result("p-full", bytes_each_way=400_000)
    assert run.saving == -1.0
    assert "-100.0%" in markdown_table([run])
