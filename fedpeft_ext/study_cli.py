"""The commands `fedpeft study` and `fedpeft report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft_ext import cli
from fedpeft_ext.words import counted

if TYPE_CHECKING:
    from fedpeft_ext.config import Config
    from fedpeft_ext.experiments.studies import Study, StudyOptions


def study(
    name: Annotated[
        str | None,
        typer.Argument(
            help="table2, communication, sensitivity, privacy, hybrid, warm-start, pretraining, new-items, "
            "new-users, select or grid; without it, what each of them asks.",
            show_default=False,
        ),
    ] = None,
    dataset: cli._DatasetName = None,
    backbone: cli._Backbone = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many runs of each, by seed.")] = 3,
    seed: Annotated[int | None, typer.Option("--seed", help="The first of them.", show_default="0")] = None,
    out: cli._Out = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs", help="Folder of the single runs, for studies to share.", show_default="OUT/runs"
        ),
    ] = None,
    rounds: cli._Rounds = None,
    backbones: Annotated[
        str | None, typer.Option("--backbones", help="table2, grid: names, by commas.", show_default="all")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option("--embeddings", "-e", help="Names, by commas.", show_default="the study's")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=V,V", help="grid: a setting and its values; repeatable."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", min=0, help="select: KB that a client may send a round.", show_default="100"
        ),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option("--check/--no-check", help="select: whether all are trained to check the choice."),
    ] = None,
    config: cli._ConfigFile = None,
    set_: cli._Set = None,
    engine: cli._Engine = None,
    device: cli._Device = None,
    threads: cli._Threads = None,
    pdf: cli._Pdf = False,
    quiet: cli._Quiet = False,
    debug: cli._Debug = False,
) -> None:
    """Train a grid of runs and answer a question with it.

    The folder (default: runs/study-NAME-DATASET) gets NAME.md, CSV and LaTeX files, pictures,
    study.json for fedpeft report, and a folder for each run. Start it again after an
    interruption: finished runs are not repeated.
    """
    again = "; started again, the study goes on from there"
    with cli._reported_errors(debug, goes_on=again) as started:
        if name is None:
            _list_studies()
            return
        from fedpeft_ext.experiments.studies import STUDIES, StudyOptions, study_by_name

        chosen = study_by_name(name)
        given = {
            "backbones": backbones,
            "embeddings": embeddings,
            "vary": vary,
            "budget": budget,
            "check": check,
        }
        for option, value in given.items():
            if value is not None and option not in chosen.options:
                having = [study.name for study in STUDIES.values() if option in study.options]
                raise ValueError(
                    f"--{option}: study {name} has no such option, which is for {', '.join(having)}"
                )
        if backbone is not None and "backbones" in chosen.options:
            raise ValueError(f"--backbone: study {name} trains several, chosen by --backbones {backbone}")
        options = StudyOptions(
            backbones=_names(backbones, "--backbones"),
            embeddings=_embeddings(embeddings),
            vary=None if vary is None else tuple(vary),
            budget_kb=budget,
            check=check is not False,
        )
        named = cli._named(dataset, backbone, rounds, seed, engine, device, threads)
        settings = cli._settings(config, named, [*chosen.settings, *(set_ or [])])
        folder = out or Path("runs") / f"study-{name}-{Path(settings.dataset.name).name}"
        started(folder)
        _study(chosen, settings, options, folder, runs or folder / "runs", seeds, pdf=pdf, quiet=quiet)


def report(
    folder: Annotated[Path, typer.Argument(help="Of runs, comparisons and studies, at any depth.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page.", show_default="FOLDER/report.html")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page.", show_default=False)] = None,
    debug: cli._Debug = False,
) -> None:
    """Write one HTML page with all tables and pictures of a folder, which loads nothing from elsewhere."""
    with cli._reported_errors(debug) as started:
        from fedpeft_ext.experiments.report import write_report

        started(out or folder / "report.html")
        page, sections = write_report(folder, out, title=title)
        typer.echo(f"{page}: {counted(sections, 'section')}")


def _names(text: str | None, option: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{option}: expected names by commas, each once, got {text!r}")
    return names


def _embeddings(text: str | None) -> tuple[str, ...] | None:
    from fedpeft_ext.nn import parse_spec

    names = _names(text, "--embeddings")
    return None if names is None else tuple(str(parse_spec(name)) for name in names)


def _list_studies() -> None:
    from fedpeft_ext.experiments.studies import STUDIES

    width = max(map(len, STUDIES)) + 2
    for entry in STUDIES.values():
        typer.echo(f"{entry.name:<{width}}{entry.question}")


def _study(
    chosen: Study,
    config: Config,
    options: StudyOptions,
    folder: Path,
    runs: Path,
    seeds: int,
    *,
    pdf: bool,
    quiet: bool,
) -> None:
    import torch

    from fedpeft_ext.experiments.studies import Context, run_study

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with cli._progress(cli._console(stderr=True), config, quiet=quiet, evaluations=False) as (
        callbacks_for,
        notify,
    ):
        context = Context(
            config,
            cli._loaded(config, None, notify),
            runs,
            seeds,
            options,
            callbacks_for=lambda settings: callbacks_for(settings.embedding.name),
            notify=notify,
        )
        _, files = run_study(chosen, context, folder, pdf=pdf)
    typer.echo(files[0].read_text(encoding="utf-8"))
    typer.echo(f"Files: {folder}/ {', '.join(file.name for file in files)}")


def add_commands(app: typer.Typer) -> None:
    """Make `study` and `report` commands of `app`."""
    app.command(short_help="Answer a question by a grid of runs.")(study)
    app.command(short_help="Write one HTML page of all results in a folder.")(report)
