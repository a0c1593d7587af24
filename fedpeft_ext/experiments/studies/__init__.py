"""The paper's studies by name: `fedpeft study NAME`.

Each module describes one: which settings vary, and what is read off the runs.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from fedpeft_ext.experiments.compare import JSON as COMPARISON
from fedpeft_ext.experiments.runner import refuse_start
from fedpeft_ext.experiments.studies import (
    communication,
    grid,
    hybrid,
    new_items,
    new_users,
    pretraining,
    privacy,
    select,
    sensitivity,
    table2,
    warm_start,
)
from fedpeft_ext.experiments.studies.output import write
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, StudyOptions
from fedpeft_ext.simulation.output import CONFIG

__all__ = ["STUDIES", "Context", "Findings", "Study", "StudyOptions", "run_study", "study_by_name"]

STUDIES = {
    study.name: study
    for study in (
        table2.STUDY,
        communication.STUDY,
        sensitivity.STUDY,
        privacy.STUDY,
        hybrid.STUDY,
        warm_start.STUDY,
        pretraining.STUDY,
        new_items.STUDY,
        new_users.STUDY,
        select.STUDY,
        grid.STUDY,
    )
}


def study_by_name(name: str) -> Study:
    """The study of a name. Raises ValueError with the nearest name where there is none."""
    if name not in STUDIES:
        near = difflib.get_close_matches(name, list(STUDIES), 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(STUDIES)}"
        raise ValueError(f"unknown study {name!r}; {hint}")
    return STUDIES[name]


def run_study(
    study: Study, context: Context, folder: str | Path, *, pdf: bool = False
) -> tuple[Findings, list[Path]]:
    """Run a study and write its tables and pictures into `folder`; runs that are finished are not repeated.
    `pdf`: draw the pictures as PDF, too.

    Returns:
        The findings, and the files, the Markdown page first.

    Raises:
        ValueError: settings or options that do not fit. FileExistsError: `folder` holds a run, a comparison
        or another study. OSError: it cannot be written.
    """
    refuse_start(context.config)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out: expected a folder, but {folder} is a file")
    other = _other_results(study, folder)
    if other:
        raise FileExistsError(
            f"out: expected a new folder or that of a study {study.name}, but {folder} holds {other}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    findings = study.run(context)
    return findings, write(study, context, findings, folder, pdf=pdf)


def _other_results(study: Study, folder: Path) -> str:
    """What else the folder of a study holds, which the study's files would mix with or replace."""
    if (folder / COMPARISON).is_file():
        return "a comparison"
    if (folder / CONFIG).is_file():
        return "a run"
    pages = [other.name for other in STUDIES.values() if (folder / f"{other.name}.md").is_file()]
    return "" if not pages or study.name in pages else f"the study {pages[0]}"
