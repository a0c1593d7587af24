"""One HTML page of all that a folder holds: studies, comparisons and single runs, with their pictures inside.

Nothing on the page is loaded from anywhere else: styles are in it, pictures as base64.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedpeft_ext.experiments.compare import CURVES, SCATTER
from fedpeft_ext.experiments.compare import JSON as COMPARE
from fedpeft_ext.experiments.plots import plot_learning_curves
from fedpeft_ext.experiments.results import KB, RunResult, headline_k
from fedpeft_ext.experiments.studies.output import STUDY
from fedpeft_ext.experiments.tables import SCOPES, metric_heading
from fedpeft_ext.simulation.files import replace_text
from fedpeft_ext.simulation.output import SUMMARY
from fedpeft_ext.words import counted


@dataclass(frozen=True)
class _Table:
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[bool]
    note: str = ""


@dataclass(frozen=True)
class _Picture:
    caption: str
    data: str


@dataclass
class _Section:
    """What the page says about one study, comparison or run."""

    anchor: str
    title: str
    where: str
    question: str = ""
    setting: str = ""
    answers: Sequence[str] = ()
    tables: list[_Table] = field(default_factory=list)
    pictures: list[_Picture] = field(default_factory=list)


def write_report(
    folder: str | Path, out: str | Path | None = None, *, title: str | None = None
) -> tuple[Path, int]:
    """Write the page.

    Args:
        folder: searched at any depth; the runs of a study or comparison are not listed again.
        out: the page; None: report.html in `folder`.
        title: of the page.

    Returns:
        The page, and the number of its sections.

    Raises:
        FileNotFoundError: no such folder, or nothing in it to report. ValueError: a file that is damaged.
        OSError: the page cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected one with results, found none at {folder}")
    sections = list(_sections(folder))
    if not sections:
        raise FileNotFoundError(
            f"folder: expected finished runs, comparisons or studies, found none below {folder}"
        )
    for number, section in enumerate(sections):
        section.anchor = f"s{number}"
    source = files("fedpeft_ext.experiments").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    page = folder / "report.html" if out is None else Path(out)
    name = folder.name or folder.resolve().name
    replace_text(page, template.render(title=title or f"Results in {name}", sections=sections))
    return page, len(sections)


def _sections(folder: Path) -> Iterator[_Section]:
    """Studies, then comparisons, then single runs, each by path."""
    taken: list[Path] = []
    readers = ((STUDY, _study), (COMPARE, _comparison), (SUMMARY, _run))
    for name, read in readers:
        for file in sorted(folder.rglob(name)):
            if any(file.parent.is_relative_to(other) for other in taken):
                continue
            try:
                section = read(file)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} cannot be reported ({type(error).__name__}: {error})") from error
            if section is not None:
                section.where = str(file.parent.relative_to(folder))
                yield section
        taken += [file.parent for file in folder.rglob(name)] if name != SUMMARY else []


def _study(file: Path) -> _Section:
    values = json.loads(file.read_text(encoding="utf-8"))
    tables = [
        _Table(table["title"], table["headings"], table["rows"], table["text_columns"], table["note"])
        for table in values["tables"]
    ]
    pictures = [_picture(file.parent / entry["file"], entry["caption"]) for entry in values["pictures"]]
    return _Section(
        "", values["title"], "", values["question"], values["setting"], values["answers"], tables, pictures
    )


def _comparison(file: Path) -> _Section | None:
    values = json.loads(file.read_text(encoding="utf-8"))
    results = values["results"]
    if not results:  # none is finished
        return None
    k = headline_k(values["config"]["evaluation"]["ks"])
    names = [f"HR@{k}", f"NDCG@{k}", *(name for name in (f"full/HR@{k}",) if name in results[0]["metrics"])]
    rows = [
        [
            result["embedding"],
            *(f"{100 * result['metrics'][name]:.2f}" for name in names),
            f"{result['bytes_down'] / KB:,.1f}",
            f"{result['bytes_up'] / KB:,.1f}",
            f"{result['saving']:.1%}",
        ]
        for result in results
    ]
    headings = ["embedding", *map(metric_heading, names), "KB down", "KB up", "saved against Full"]
    first = results[0]
    title = f"{first['backbone']} on {first['dataset']}, {counted(first['rounds'], 'round')}"
    pictures = [
        _picture(file.parent / name, caption)
        for name, caption in ((SCATTER, "Accuracy against bytes"), (CURVES, "Learning curves"))
        if (file.parent / name).is_file()
    ]
    table = _Table("Comparison", headings, rows, [True] + [False] * (len(headings) - 1))
    notes = [f"{embedding}: {reason}" for embedding, reason in values.get("diverged", {}).items()]
    return _Section("", title, "", answers=notes, tables=[table], pictures=pictures)


def _run(file: Path) -> _Section | None:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "evaluations" not in values:  # of a study's own kind of run
        return None
    result = RunResult.load(file.parent, full_bytes=1)
    summary = result.summary
    scopes = {
        prefix: text for prefix, text in SCOPES.items() if any(n.startswith(prefix) for n in summary.metrics)
    }
    rows = [
        [name, *(f"{100 * summary.metrics[prefix + name]:.2f}" for prefix in scopes)]
        for name in summary.metrics
        if "/" not in name
    ]
    title = f"{summary.backbone} with {summary.embedding} on {summary.dataset}, seed {summary.seed}"
    setting = (
        f"{counted(summary.rounds, 'round')}, engine {summary.engine}; "
        f"{summary.bytes_down / KB:,.1f} KB down and {summary.bytes_up / KB:,.1f} KB up "
        f"per client and round; {summary.clients_per_second:,.0f} clients/s."
    )
    ks = [int(name.partition("@")[2]) for name in summary.metrics if name.startswith("HR@")]
    metric = f"HR@{headline_k(ks)}"
    with tempfile.TemporaryDirectory() as scratch:
        picture = _picture(
            plot_learning_curves([result], Path(scratch) / "curve.png", metric=metric, title=title),
            f"{metric} over the rounds.",
        )
    headings = ["metric, %", *scopes.values()]
    table = _Table("Last evaluation", headings, rows, [True] + [False] * len(scopes))
    return _Section("", title, "", setting=setting, tables=[table], pictures=[picture])


def _picture(file: Path, caption: str) -> _Picture:
    return _Picture(caption, base64.b64encode(file.read_bytes()).decode("ascii"))
