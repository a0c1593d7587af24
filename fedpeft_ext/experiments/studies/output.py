"""The folder of a study: study.json for `fedpeft report`, a Markdown page, CSV files and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from fedpeft_ext.experiments.plots import files_of
from fedpeft_ext.experiments.results import KB
from fedpeft_ext.experiments.studies.study import Context, Findings, Study
from fedpeft_ext.experiments.tables import latex_table, metric_heading
from fedpeft_ext.words import counted

STUDY, RUNS = "study.json", "runs.csv"
_METRICS = ("HR@", "NDCG@", "MRR")
_NO_VALUE = "–"


def shown(frame: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table as people read them.

    Metrics are in percent, as the paper prints them, with ± one standard deviation where there are several
    seeds; columns named ``... bytes`` or ``bytes_...`` in KB of 1,000 bytes; nothing is "–".
    """
    columns = [
        name
        for name in frame.columns
        if not name.endswith((" sd", " ci95")) and not (name == "diverged" and not frame[name].sum())
    ]
    rows = []
    for row in frame.iter_rows(named=True):
        cells = []
        for name in columns:
            deviation = row.get(f"{name} sd")
            text = _cell(name, row[name])
            if deviation is not None and text != _NO_VALUE:
                text += f" ± {_cell(name, deviation)}"
            cells.append(text)
        rows.append(cells)
    return [_heading(name) for name in columns], rows


def _is_metric(name: str) -> bool:
    return any(part.startswith(_METRICS) for part in name.replace("/", " ").split())


def _is_bytes(name: str) -> bool:
    return name.startswith("bytes_") or name.endswith(" bytes")


def _heading(name: str) -> str:
    if _is_bytes(name):
        return "KB " + name.removeprefix("bytes_").removesuffix(" bytes")
    if name == "saving":
        return "saved against Full"
    return metric_heading(name) if _is_metric(name) else name


def _cell(name: str, value: Any) -> str:
    if value is None:
        return _NO_VALUE
    if isinstance(value, bool | str):
        return str(value)
    if _is_metric(name):
        return f"{100 * value:.2f}"
    if _is_bytes(name):
        return f"{value / KB:,.1f}"
    if name == "saving":
        return f"{value:.1%}"
    # Four digits, but never an exponent for large numbers.
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    )


def markdown(frame: pl.DataFrame) -> str:
    """`shown` as a GitHub Markdown table, numbers aligned right."""
    headings, rows = shown(frame)
    kinds = [
        "---" if kind == pl.String else "---:"
        for name, kind in frame.schema.items()
        if _heading(name) in headings
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, kinds, *rows))


def write(
    study: Study, context: Context, findings: Findings, folder: Path, *, pdf: bool = False
) -> list[Path]:
    """Write the files of a finished study into its folder, over those of an earlier one; `pdf`: the pictures
    as PDF, too.

    Returns:
        The files, the Markdown page first.
    """
    page = [f"# {study.title}", study.question, _setting(context)]
    written: list[Path] = []
    tables: list[dict[str, Any]] = []
    for table in findings.tables:
        file = folder / f"{table.name}.csv"
        file.write_text(table.frame.write_csv(), encoding="utf-8")
        written.append(file)
        headings, rows = shown(table.frame)
        text_columns = [kind == pl.String for kind in _kinds(table.frame, headings)]
        file = folder / f"{table.name}.tex"
        file.write_text(latex_table(headings, rows, text_columns), encoding="utf-8")
        written.append(file)
        tables.append(
            {
                "title": table.title,
                "note": table.note,
                "file": f"{table.name}.csv",
                "headings": headings,
                "rows": rows,
                "text_columns": text_columns,
            }
        )
        page += [
            f"## {table.title}",
            markdown(table.frame).rstrip("\n"),
            *([table.note] if table.note else []),
        ]
    pictures = []
    for picture in findings.pictures:
        file = folder / f"{picture.name}.png"
        for form in files_of(file, pdf):
            picture.draw(form)
            written.append(form)
        pictures.append({"caption": picture.caption, "file": file.name})
        page.append(f"![{picture.caption}]({file.name})\n\n{picture.caption}")
    if findings.answers:
        page += ["## Findings", "\n".join(f"- {answer}" for answer in findings.answers)]
    frames = [trained.frame() for trained in context.all_runs]
    if findings.runs is not None:
        frames.append(findings.runs)
    if frames:
        runs = pl.concat(frames, how="diagonal_relaxed").unique(maintain_order=True)
        file = folder / RUNS
        file.write_text(runs.write_csv(), encoding="utf-8")
        written.append(file)
    markdown_page = folder / f"{study.name}.md"
    markdown_page.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    values = {
        "study": study.name,
        "title": study.title,
        "question": study.question,
        "setting": _setting(context),
        "tables": tables,
        "pictures": pictures,
        "answers": list(findings.answers),
        "config": context.config.model_dump(mode="json"),
    }
    (folder / STUDY).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return [markdown_page, *written]


def _kinds(frame: pl.DataFrame, headings: Sequence[str]) -> list[pl.DataType]:
    return [kind for name, kind in frame.schema.items() if _heading(name) in headings]


def _setting(context: Context) -> str:
    config, dataset = context.config, context.dataset
    training = config.training
    seeds = context.seeds
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    share = training.clients_per_round
    clients = f"{share:.0%}" if isinstance(share, float) else f"{share:,}"
    warmup = f", {training.warmup_rounds} of them warm-up" if training.warmup_rounds else ""
    return (
        f"{dataset.name}: {counted(dataset.num_users, 'user')}, {counted(dataset.num_items, 'item')}, "
        f"{counted(dataset.num_interactions, 'interaction')}. {counted(training.rounds, 'round')}{warmup}, "
        f"{clients} of the "
        f"clients a round, {training.optimizer}, {which}. Metrics in percent: HR and NDCG among "
        f"{config.evaluation.num_negatives} sampled items, or all that the user never met; ± one standard "
        "deviation over seeds. KB are 1,000 bytes, per client and round unless said otherwise."
    )
