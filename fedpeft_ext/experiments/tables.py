"""A comparison as one table: for the terminal, as Markdown, LaTeX and CSV.

All have the same columns in the same order; bytes are per client and round, in KB of 1,000 bytes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft_ext.experiments.results import KB, RunResult
from fedpeft_ext.words import counted

if TYPE_CHECKING:
    from rich.table import Table

    from fedpeft_ext.simulation import Summary

_HEADINGS = ("embedding", "HR@{k}", "NDCG@{k}", "KB down", "KB up", "saved against Full", "clients/s")
SCOPES = {
    "": "sampled items",
    "full/": "all items",
    "valid/": "validation item",
    "valid/full/": "validation item, all items",
}
"""What an item is ranked among, and which where it is not the test item, by the prefix of metrics' names."""


def metric_heading(name: str) -> str:
    """The heading of a metric in percent: "HR@10 %"; "HR@10 %, all items" for 'full/HR@10'."""
    return f"{name.removeprefix('full/')} %{', all items' if name.startswith('full/') else ''}"


def markdown_table(results: Sequence[RunResult], k: int = 10) -> str:
    """A GitHub Markdown table, numbers aligned right, ending with a newline."""
    rows = [
        _headings(k),
        ["---", *["---:"] * (len(_HEADINGS) - 1)],
        *(_cells(result, k) for result in results),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def latex_comparison(results: Sequence[RunResult], k: int = 10) -> str:
    """`latex_table` of what `markdown_table` shows."""
    rows = [_cells(result, k) for result in results]
    return latex_table(_headings(k), rows, [True] + [False] * (len(_HEADINGS) - 1))


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[bool]) -> str:
    """A `tabular` in the style of the package booktabs, ending with a newline.

    Args:
        headings, rows: cells as Markdown has them; they are escaped.
        text_columns: which columns are aligned left; the others are numbers, aligned right.
    """
    lines = [
        f"\\begin{{tabular}}{{{''.join('l' if text else 'r' for text in text_columns)}}}",
        "\\toprule",
        _latex_row(headings),
        "\\midrule",
        *map(_latex_row, rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(["% needs \\usepackage{booktabs}", *lines]) + "\n"


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "×": r"$\times$", "–": "--", "ε": r"$\varepsilon$"}
)


def _latex_row(cells: Sequence[str]) -> str:
    # A hyphen before a number would not be printed as a minus; a bracket that begins a row would be read as
    # the length of the line break before it.
    row = " & ".join(re.sub(r"^-(?=\d)", "$-$", cell.translate(_LATEX)) for cell in cells)
    return f"{'{}' if row.startswith('[') else ''}{row} \\\\"


def csv_table(results: Sequence[RunResult], k: int = 10) -> str:
    """CSV with one header line; bytes and shares in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "embedding",
            f"HR@{k}",
            f"NDCG@{k}",
            "bytes_down",
            "bytes_up",
            "saving",
            "clients_per_second",
            "seconds",
        ]
    )
    for result in results:
        summary = result.summary
        accuracy = [result.metrics[f"HR@{k}"], result.metrics[f"NDCG@{k}"]]
        cost = [summary.bytes_down, summary.bytes_up, result.saving]
        writer.writerow([result.embedding, *accuracy, *cost, summary.clients_per_second, summary.seconds])
    return text.getvalue()


def terminal_table(results: Sequence[RunResult], k: int = 10, title: str | None = None) -> Table:
    """A rich table; the best HR and NDCG are bold."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=None if title is None else escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption="KB: 1,000 bytes, per client and round",
        caption_justify="left",
    )
    for index, heading in enumerate(_headings(k)):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    best = {name: max((r.metrics[name] for r in results), default=0.0) for name in (f"HR@{k}", f"NDCG@{k}")}
    for result in results:
        cells = _cells(result, k)
        for column, (name, value) in enumerate(best.items(), start=1):
            if result.metrics[name] == value:
                cells[column] = f"[bold]{cells[column]}[/bold]"
        table.add_row(*cells)
    return table


def summary_table(summary: Summary) -> Table:
    """A rich table of one run: metrics among sampled and among all items, bytes, speed."""
    from rich.markup import escape

    traffic = (
        f"{summary.bytes_down / KB:,.1f} KB down and {summary.bytes_up / KB:,.1f} KB up per client and round"
        f", {summary.bytes_setup / KB:,.1f} KB once"
    )
    start = summary.started_from
    told = ""
    if start is not None:
        kinds = ", ".join(
            f"{start[f'known_{kind}']:,} known and {start[f'new_{kind}']:,} new {kind}"
            for kind in ("items", "users")
        )
        told = f"\nStarted from {escape(start['run'] or 'a run')} after round {start['round']:,}: {kinds}"
    if summary.privacy is not None:
        alone = "" if start is None else f" (of the rounds after {start['round']:,} alone)"
        told += f"\nPrivacy{alone}: {summary.privacy['guarantee']}"
    faults = {name: count for name, count in (summary.faults or {}).items() if count}
    if faults:
        told += "\nFaults: " + ", ".join(
            f"{count:,} {name.replace('_', ' ')}" for name, count in faults.items()
        )
    rounds = counted(summary.rounds, "round")
    title = f"{summary.backbone} with {summary.embedding} on {summary.dataset}, {rounds}"
    caption = f"{traffic}; {summary.clients_per_second:,.0f} clients/s; {summary.seconds:.1f} s{told}"
    return metrics_table(summary.metrics, title, caption)


def metrics_table(
    metrics: Mapping[str, float | tuple[float, float]], title: str, caption: str | None = None
) -> Table:
    """A rich table of metrics by name: a row each, and a column for each of what items are ranked among.
    Pairs are differences and half of their intervals.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=caption,
        caption_justify="left",
    )
    columns = {p: c for p, c in SCOPES.items() if any(name.startswith(p) for name in metrics)}
    table.add_column("test item among")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for name in (name for name in metrics if "/" not in name):
        found = [metrics[prefix + name] for prefix in columns]
        table.add_row(
            name, *(f"{v[0]:+.4f} ± {v[1]:.4f}" if isinstance(v, tuple) else f"{v:.4f}" for v in found)
        )
    return table


def groups_table(groups: Sequence[Mapping[str, Any]], k: int) -> Table:
    """A rich table of `groups` of users by how often their test item was "trained" on: how many "users", and
    HR@k of their "metrics" and, where there are some, "differences" with half of their intervals.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title="By how often the test item was trained on", title_justify="left", box=box.SIMPLE_HEAD
    )
    headings = {f"HR@{k}": f"HR@{k}", f"full/HR@{k}": f"HR@{k}, all items"}
    names = [name for name in headings if all(name in group["metrics"] for group in groups)]
    table.add_column("times")
    for heading in ("users", *(headings[name] for name in names)):
        table.add_column(heading, justify="right")
    for group in groups:
        cells = []
        for name in names:
            difference = group["differences"].get(name)
            told = f" ({difference[0]:+.4f} ± {difference[1]:.4f})" if difference else ""
            cells.append(f"{group['metrics'][name]:.4f}{told}")
        table.add_row(group["trained"], f"{group['users']:,}", *cells)
    return table


def _headings(k: int) -> list[str]:
    return [heading.format(k=k) for heading in _HEADINGS]


def _cells(result: RunResult, k: int) -> list[str]:
    return [
        result.embedding,
        f"{result.metrics[f'HR@{k}']:.4f}",
        f"{result.metrics[f'NDCG@{k}']:.4f}",
        f"{result.summary.bytes_down / KB:,.1f}",
        f"{result.summary.bytes_up / KB:,.1f}",
        f"{result.saving:.1%}",
        f"{result.summary.clients_per_second:,.0f}",
    ]
