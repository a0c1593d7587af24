"""Collects the kernels' contests, prints them as one table, and writes them with --results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import machine, slug

RESULTS = Path(__file__).resolve().parent / "results"
CONTESTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", action="store_true", help=f"write the kernels' figures to {RESULTS}")


@pytest.fixture(scope="session")
def contests(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    return pytestconfig.stash.setdefault(CONTESTS, [])


def rows_of(contests: list[dict[str, Any]]) -> list[list[str]]:
    """A row a case: times by median, and the ratio to the fastest rival by median and by minimum."""
    rows = []
    for contest in contests:
        ours, rivals = contest["ours"], contest["rivals"]
        best = min(rivals, key=lambda name: rivals[name]["median"])
        others = (f"{name} {t['median']:.3f}" for name, t in rivals.items() if name != best)
        bound = contest["bound"]
        rows.append(
            [
                contest["op"],
                contest["way"],
                contest["shape"],
                str(contest["threads"]),
                f"{ours['median']:.3f} ({ours['min']:.3f}-{ours['p90']:.3f})",
                f"{best} {rivals[best]['median']:.3f}",
                f"{rivals[best]['median'] / ours['median']:.2f}",
                f"{min(t['min'] for t in rivals.values()) / ours['min']:.2f}",
                f"{bound['median'] / ours['median']:.2f}" if bound else "",
                ", ".join((*others, *(f"{name}: unsupported" for name in contest["missing"]))),
            ]
        )
    return rows


HEADER = [
    "op",
    "way",
    "shape",
    "threads",
    "ms (min-p90)",
    "fastest rival, ms",
    "ratio",
    "by min",
    "bound",
    "other rivals, ms",
]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    contests = config.stash.get(CONTESTS, [])
    if not contests:
        return
    rows = rows_of(contests)
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER) - 1)]
    terminalreporter.section(f"kernels on {machine()}: time of the fastest rival / ours, by median")
    for row in [HEADER, *rows]:
        terminalreporter.write_line("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)))
    behind = [row for row in rows if min(float(row[6]), float(row[7])) < 1]
    terminalreporter.write_line(f"{len(rows) - len(behind)} of {len(rows)} cases ahead by both measures")
    if config.getoption("--results"):
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"cpu-{slug()}.json"
        path.write_text(json.dumps({"machine": machine(), "contests": contests}, indent=1) + "\n")
        lines = [f"# Kernels on {machine()}", "", *markdown(rows)]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")
        terminalreporter.write_line(f"written: {path} and .md")


def markdown(rows: list[list[str]]) -> list[str]:
    return [
        "Times in ms by median; ratios are the fastest rival's time over ours, by median and by minimum.",
        "Rivals start from the same inputs; bound is the ratio to PyTorch's lookup given ready flat indices.",
        "`python -m pytest benchmarks/bench_kernels.py -o python_files='bench_*.py' --results` makes this.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
