"""The command line `fedpeft`; `serving_cli` has `recommend` and `evaluate`, `study_cli` `study` and `report`.

Settings come from four places, later ones win: defaults, the YAML file of `--config`, named options such as
`--rounds`, and `--set section.key=value`. Whatever a user can get wrong ends in one sentence on stderr and
exit code 2 (docs/cli.md). Slow imports are left to the commands that need them.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from fedpeft_ext.presets import preset_names
from fedpeft_ext.words import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedpeft_ext.config import Config
    from fedpeft_ext.data import Dataset
    from fedpeft_ext.simulation import Callback, Simulator, Summary

USER_ERROR, TRAINING_FAILED, SIGNALLED = 2, 3, 128
"""Exit codes besides 0 (done) and 1 (a defect of the program, with its traceback). SIGNALLED plus the number
of the signal: 130 after Ctrl-C, 143 after SIGTERM."""

SEVERAL_PROCESSES = ("run", "resume")
"""Commands that torchrun can start in several processes."""

DEFAULT_EMBEDDINGS = "full,c-rq,p-lora,p-hash,p-rq"

app = typer.Typer(
    name="fedpeft",
    help="Parameter-efficient embeddings for federated recommendation: train, compare, look at data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes as long as all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `fedpeft` and of `python -m fedpeft_ext`; ends the process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _one_of_many(sys.argv[1:] if args is None else args)
    try:
        sys.exit(app(args, prog_name="fedpeft"))
    finally:
        # From here on Python cleans up, and would complain of Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _one_of_many(args: Sequence[str]) -> NoReturn:
    """`main` in each of the processes that torchrun started. The first one does the talking; the others tell
    errors that are not everybody's.
    """
    from fedpeft_ext.simulation import RankError
    from fedpeft_ext.simulation.distributed import process_group

    if not set(args) & {*SEVERAL_PROCESSES, "-h", "--help"}:
        typer.echo(f"fedpeft: error: torchrun serves fedpeft {' and '.join(SEVERAL_PROCESSES)}", err=True)
        sys.exit(USER_ERROR)
    with process_group() as first, open(os.devnull, "w", encoding="utf-8") as nowhere:
        if first:
            sys.exit(app(args, prog_name="fedpeft"))
        try:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                app([*args, "--debug"], prog_name="fedpeft", standalone_mode=False)
        except RankError as error:
            _complain(str(error))
            sys.exit(TRAINING_FAILED)
        except (ValueError, OSError, ImportError, FloatingPointError):
            sys.exit(USER_ERROR)  # the first process, which met it too, has told
        sys.exit(0)


# Options that several commands share.
_ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE|NAME",
        help=f"YAML file of settings, or tuned ones: {', '.join(preset_names())}.",
        show_default="the paper's",
    ),
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Any setting: training.lr=0.01; repeatable."),
]
_DatasetName = Annotated[
    str | None,
    typer.Option("--dataset", "-d", help="Name, file or folder: see fedpeft data.", show_default="ml-100k"),
]
_Backbone = Annotated[
    str | None,
    typer.Option("--backbone", help="fedmf, fedncf, pfedrec or fedpergnn.", show_default="fedmf"),
]
_Rounds = Annotated[int | None, typer.Option("--rounds", "-r", help="Federated rounds.", show_default="100")]
_Seed = Annotated[int | None, typer.Option("--seed", help="Of every random draw.", show_default="0")]
_Engine = Annotated[
    str | None, typer.Option("--engine", help="auto, fused, batched or sequential.", show_default="auto")
]
_Device = Annotated[str | None, typer.Option("--device", help="torch device.", show_default="cpu")]
_Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads.", show_default="torch's choice")
]
_Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results.", show_default=False)]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are in the folder.")]
_Pdf = Annotated[bool, typer.Option("--pdf", help="Draw the pictures as PDF, too.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the results.")]
_Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, and nothing else there.")]
_Debug = Annotated[
    bool, typer.Option("--debug", envvar="FEDPEFT_DEBUG", help="Show the traceback of an error.")
]


def _print_version(asked: bool) -> None:
    if asked:
        from fedpeft_ext import __version__

        typer.echo(f"fedpeft_ext {__version__}")
        raise typer.Exit()


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(short_help="Train one embedding in the federation and evaluate it.")
def run(
    dataset: _DatasetName = None,
    backbone: _Backbone = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding",
            "-e",
            help="full, c-X (compressed alone), p-X (with frozen full); X: lora, hash, hash+senet, rq.",
            show_default="p-rq",
        ),
    ] = None,
    rounds: _Rounds = None,
    out: _Out = None,
    config: _ConfigFile = None,
    set_: _Set = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--start-from",
            metavar="RUN",
            help="Go on from a run, whose data may have grown: its settings, --rounds more.",
        ),
    ] = None,
    seed: _Seed = None,
    engine: _Engine = None,
    device: _Device = None,
    threads: _Threads = None,
    overwrite: _Overwrite = False,
    quiet: _Quiet = False,
    json_: _Json = False,
    debug: _Debug = False,
) -> None:
    """Train one embedding in the federation and evaluate it.

    The folder (default: runs/DATASET-BACKBONE-EMBEDDING) gets config.yaml,
    metrics.jsonl, summary.json and model.safetensors, and checkpoints. Ctrl-C
    ends the run after its round, saved; again: at once.
    """
    named = _named(dataset, backbone, rounds, seed, engine, device, threads)
    with _reported_errors(debug, can_overwrite=True) as started:
        if start_from is not None:
            from fedpeft_ext.simulation.serving import check_run

            check_run(start_from, "--start-from")
            named |= {"start_from": str(start_from), "training.rounds": None}
        file = config or (None if start_from is None else start_from / "config.yaml")
        settings = _settings(file, {**named, "embedding.name": embedding}, set_)
        folder = out or _default_folder(settings, settings.embedding.name)
        started(folder)
        tuned = None if file else _tuned(settings)
        start = None if start_from is None else (start_from, rounds)
        _run(settings, folder, tuned, start, overwrite=overwrite, quiet=quiet, as_json=json_)


@app.command(short_help="Go on with a run that was interrupted, or train it further.")
def resume(
    folder: Annotated[Path, typer.Argument(help="Of the run to go on with.", show_default=False)],
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", "-r", help="Train up to this round.", show_default="as the run was to"),
    ] = None,
    quiet: _Quiet = False,
    json_: _Json = False,
    debug: _Debug = False,
) -> None:
    """Go on with a run that was killed or interrupted, or train a finished one further.

    The result is that of a run that was never interrupted, bit for bit.
    """
    with _reported_errors(debug) as started:
        started(folder)
        _resume(folder, rounds, quiet=quiet, as_json=json_)


@app.command(short_help="Train several embeddings alike; one table, two pictures.")
def compare(
    embeddings: Annotated[
        str, typer.Option("--embeddings", "-e", help="Names as in run --embedding, separated by commas.")
    ] = DEFAULT_EMBEDDINGS,
    dataset: _DatasetName = None,
    backbone: _Backbone = None,
    rounds: _Rounds = None,
    out: _Out = None,
    config: _ConfigFile = None,
    set_: _Set = None,
    seed: _Seed = None,
    engine: _Engine = None,
    device: _Device = None,
    threads: _Threads = None,
    overwrite: _Overwrite = False,
    pdf: _Pdf = False,
    quiet: _Quiet = False,
    json_: _Json = False,
    debug: _Debug = False,
) -> None:
    """Train several embeddings alike; print and draw accuracy against bytes sent.

    The folder (default: runs/DATASET-BACKBONE-compare) gets compare.md,
    compare.tex, compare.csv, compare.json, accuracy_bytes.png, curves.png and a
    folder for each run. Full embeddings and codes are prepared once for all runs.
    Start it again after an interruption, or with more embeddings: finished runs
    are not repeated.
    """
    named = _named(dataset, backbone, rounds, seed, engine, device, threads)
    again = "; started again, the comparison goes on from there"
    with _reported_errors(debug, can_overwrite=True, goes_on=again) as started:
        settings = _settings(config, named, set_)
        folder = out or _default_folder(settings, "compare")
        started(folder)
        names = [name for name in embeddings.split(",") if name.strip()]
        tuned = None if config else _tuned(settings)
        _compare(settings, names, folder, tuned, overwrite=overwrite, pdf=pdf, quiet=quiet, as_json=json_)


@app.command(short_help="List known data sets, or tell what is in one.")
def data(
    name: Annotated[
        str | None, typer.Argument(help="Data set to check: name, file or folder.", show_default=False)
    ] = None,
    config: _ConfigFile = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Option such as user_column=uid; repeatable."),
    ] = None,
    debug: _Debug = False,
) -> None:
    """List the data sets known by name, or load one and tell what is in it.

    With --config the data set and the options of these settings, unless others are named.
    """
    with _reported_errors(debug):
        if name is None and config is None:
            if set_:
                raise ValueError("--set: expected a data set besides, by name or --config, got none")
            _list_datasets()
            return
        options = _dataset_options(set_ or [])
        if config is not None:
            given = _settings(config, {"dataset.name": name}, None).dataset
            name, options = given.name, {**given.options, **options}
        _describe_dataset(str(name), options)


@app.command(short_help="Write a data set as arrays that are mapped into memory.")
def convert(
    source: Annotated[str, typer.Argument(help="Data set: name, file or folder.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder to write.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Option such as user_column=uid; repeatable."),
    ] = None,
    debug: _Debug = False,
) -> None:
    """Write a data set as arrays that are mapped into memory, for data larger than that.

    The folder is then a data set like any other: fedpeft run --dataset FOLDER.
    """
    with _reported_errors(debug) as started:
        from fedpeft_ext.data import convert_dataset

        started(folder)
        options = _dataset_options(set_ or [])
        try:
            dataset = convert_dataset(source, folder, **options)
        except TypeError as error:  # an option's name or type
            raise ValueError(str(error)) from error
        typer.echo(f"{folder}/: {_size(dataset)}")


@app.command(short_help="Print versions and what the kernels were built for.")
def info(debug: _Debug = False) -> None:
    """Print versions and what the kernels were built for: put this into a bug report."""
    with _reported_errors(debug):
        import torch

        import fedpeft_ext

        build = fedpeft_ext._C.build_info()
        _print_facts(
            {
                "fedpeft_ext": fedpeft_ext.__version__,
                "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
                "torch": f"{torch.__version__} (built with {build['torch_built']})",
                "CPU kernels": f"{build['isa_in_use']} in use, of {_joined(build['isa_compiled'])}",
                "CUDA kernels": f"for {_joined(build['cuda_archs'])}" if build["cuda"] else "not built",
                "GPU": torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else "none that torch can use",
                "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
                "compiler": build["compiler"],
            }
        )


def _console(stderr: bool = False) -> Console:
    """For tables and progress."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for `_reported_errors`; rich would end the process with code 1

    return Output(stderr=stderr)


def _print_table(table: Table) -> None:
    """A table on stdout, where the terminal is too narrow beyond its edge: half a number is none."""
    from rich.measure import Measurement

    console = _console()
    anything = console.options.update(width=10_000)
    for column in table.columns:  # or rich would cut words where the columns' smallest widths would do
        texts = [column.header, *column.cells]
        column.min_width = max(Measurement.get(console, anything, text).minimum for text in texts)
    console.width = max(console.width, Measurement.get(console, anything, table).minimum)
    console.print(table, crop=False)


def _print_facts(facts: Mapping[str, object]) -> None:
    width = max(map(len, facts)) + 2
    for fact, value in facts.items():
        typer.echo(f"{fact:<{width}}{value}")


def _joined(value: object) -> str:
    names = value.split(",") if isinstance(value, str) else value
    return ", ".join(map(str, names)) if isinstance(names, list | tuple) else str(names)


@contextmanager
def _reported_errors(
    debug: bool, can_overwrite: bool = False, goes_on: str = ""
) -> Iterator[Callable[[Path], None]]:
    """Turn what a user can get wrong into a sentence and an exit code.

    Args:
        debug: raise instead, with the traceback.
        can_overwrite: the command has an option for a folder that has files in it.
        goes_on: what starting the command again does after an interruption.

    Yields a function to call with the folder that is being written, which interruptions and errors without a
    file's name then name.
    """
    folders: list[Path] = []
    _import_slowly()
    try:
        with _warnings_told():
            yield folders.append
    except KeyboardInterrupt:
        kept = f"; what was finished is in {folders[0]}/" if folders and folders[0].is_dir() else ""
        typer.echo(f"\nfedpeft: interrupted{kept}{goes_on if kept else ''}", err=True)
        raise typer.Exit(SIGNALLED + signal.SIGINT) from None
    except _Stopped as stopped:
        typer.echo(f"\nfedpeft: {stopped}", err=True)
        raise typer.Exit(SIGNALLED + stopped.signal) from None
    except BrokenPipeError:  # who read the output has closed it, as head does: nobody is left to tell
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # or Python complains at its end, since 3.14 of both
            os.dup2(nowhere, stream.fileno())
        raise typer.Exit(SIGNALLED + signal.SIGPIPE) from None
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        hint = " (--overwrite)" if can_overwrite and isinstance(error, FileExistsError) else ""
        _complain(_named_file(error, folders), hint)
        raise typer.Exit(USER_ERROR) from None
    except (FloatingPointError, RuntimeError) as error:
        from fedpeft_ext.simulation import ClientError, RankError

        if debug or not isinstance(error, FloatingPointError | ClientError | RankError):
            raise
        _complain(str(error) or type(error).__name__)
        raise typer.Exit(TRAINING_FAILED) from None


def _import_slowly() -> None:
    """What takes seconds to import. Ctrl-C then ends the process as it ends programs in C: raised within an
    import, it would leave modules half-loaded, and become an error of theirs.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import fedpeft_ext.simulation  # noqa: F401
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Warnings of this package as a sentence each; those of others as Python shows them."""
    package = str(Path(__file__).parent)
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, UserWarning) and filename.startswith(package):
                typer.echo(f"fedpeft: note: {message}", err=True)
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _named_file(error: Exception, folders: Sequence[Path]) -> str:
    """The text of an error; of one of the system, such as a full disk, with the file or folder concerned."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or (folders[0] if folders else None)
        text = f"{place}: {error.strerror}" if place is not None else error.strerror
    return text or type(error).__name__


def _complain(text: str, hint: str = "") -> None:
    label = typer.style("error:", fg="red", bold=True)
    for line in text.splitlines():
        typer.echo(f"fedpeft: {label} {line}{hint}", err=True)


def _named(
    dataset: str | None,
    backbone: str | None,
    rounds: int | None,
    seed: int | None,
    engine: str | None,
    device: str | None,
    threads: int | None,
) -> dict[str, str | int | None]:
    return {
        "dataset.name": dataset,
        "backbone.name": backbone,
        "training.rounds": rounds,
        "seed": seed,
        "engine": engine,
        "device": device,
        "threads": threads,
    }


def _settings(
    path: Path | None, named: Mapping[str, str | int | None], overrides: list[str] | None
) -> Config:
    from fedpeft_ext.config import load_config

    # As JSON, which YAML reads back as it is: a name that looks like a number stays a name.
    given = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    return load_config(path, [*given, *(overrides or [])])


def _going_on(config: Config, run: Path, done: int, rounds: int | None) -> Config:
    """Settings that train so many rounds more than the run to start from did.

    Raises ValueError where nothing would be trained, and nobody asked for that.
    """
    further = config.training.rounds - done if rounds is None else rounds
    if further < (1 if rounds is None else 0):
        raise ValueError(
            f"--rounds: expected how many rounds to train after the {done} of {run}, with --start-from, got "
            f"{'none' if rounds is None else rounds}"
        )
    return config.updated([f"training.rounds={done + further}"])


def _tuned(config: Config) -> str | None:
    """What tells of tuned settings, where there are such and these train as the defaults do."""
    from fedpeft_ext.config import TrainingConfig

    backbone = config.backbone.name
    plain = config.dataset.name + (f"-{backbone}" if backbone != "fedmf" else "")
    name = next((name for name in (f"{plain}-tuned", plain) if name in preset_names()), None)
    if name is None or config.training != TrainingConfig(rounds=config.training.rounds):
        return None
    return f"Training as in the paper, which learns slowly; --config {name} has tuned settings"


def _default_folder(config: Config, last: str) -> Path:
    return Path("runs") / f"{Path(config.dataset.name).name}-{config.backbone.name}-{last}"


def _load(config: Config) -> Dataset:
    from fedpeft_ext.data import load_dataset

    try:
        return load_dataset(config.dataset.name, **config.dataset.options)
    except TypeError as error:  # an option's name or type
        raise ValueError(f"dataset.options: {error}") from error


@contextmanager
def _progress(
    console: Console, config: Config, *, quiet: bool, evaluations: bool
) -> Iterator[tuple[Callable[[str], list[Callback]], Callable[[str], None]]]:
    """Observers of an embedding's run, and a function that tells a step: bars on a terminal, else lines."""
    from fedpeft_ext.experiments.progress import ProgressBar, ProgressLines, progress_display
    from fedpeft_ext.experiments.results import headline_k

    metric = f"HR@{headline_k(config.evaluation.ks)}"
    if quiet:
        yield lambda embedding: [], lambda message: None
    elif console.is_terminal:
        with progress_display(console) as display:
            yield (
                lambda embedding: [ProgressBar(display, metric)],
                lambda message: console.print(message, highlight=False, markup=False),
            )
    else:
        yield (
            lambda embedding: [ProgressLines(console, metric, evaluations=evaluations)],
            lambda message: console.print(message, highlight=False, markup=False, soft_wrap=True),
        )


class _Stopped(Exception):
    """A run ended because of a signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def _run_until_signal(simulator: Simulator, folder: Path) -> Summary:
    """`simulator.run()`, which SIGINT and SIGTERM end after the current round, and the second one at once.

    Raises:
        _Stopped: one of them came.
    """
    from fedpeft_ext.simulation import Interrupted
    from fedpeft_ext.simulation.checkpoint import has_checkpoint

    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            simulator.stop()
            if simulator.ranks.first:
                # Not through Python's files, which may be in the middle of a write.
                os.write(2, b"\nfedpeft: ending after this round; once more to end now\n")
        elif simulator.ranks.size == 1:  # torchrun hands every signal on, and kills after a while by itself
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return simulator.run()
    except (Interrupted, KeyboardInterrupt) as reason:
        if not received:
            raise
        told = str(reason) or "ended at once"
        saved = (
            f"; fedpeft resume {shlex.quote(str(folder))} goes on"
            if has_checkpoint(folder) is not None
            else ""
        )
        raise _Stopped(f"{told}{saved}", received[-1]) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(summary: Summary, folder: Path, as_json: bool) -> None:
    """The result on stdout."""
    from fedpeft_ext.experiments.tables import summary_table

    if as_json:
        typer.echo(json.dumps({**summary.as_dict(), "folder": str(folder)}, allow_nan=False))
        return
    _print_table(summary_table(summary))
    typer.echo(f"Files: {folder}/ config.yaml, metrics.jsonl, summary.json, model.safetensors")


def _resume(folder: Path, rounds: int | None, *, quiet: bool, as_json: bool) -> None:
    from fedpeft_ext.simulation import Simulator

    simulator = Simulator.resume(folder, rounds=rounds)
    config = simulator.config
    with _progress(_console(stderr=True), config, quiet=quiet, evaluations=True) as (callbacks_for, notify):
        notify(f"Going on in {folder} after round {simulator.rounds_done} of {config.training.rounds}")
        simulator.add_callbacks(*callbacks_for(config.embedding.name))
        summary = _run_until_signal(simulator, folder)
    _report(summary, folder, as_json)


def _loaded(config: Config, tuned: str | None, notify: Callable[[str], None]) -> Dataset:
    """The data set, told of before and after."""
    from fedpeft_ext.data.catalogue import order_notes

    if tuned is not None:
        notify(tuned)
    notify(f"Loading {config.dataset.name}")
    dataset = _load(config)
    notify(_size(dataset))
    for note in order_notes(dataset.report):
        notify(f"note: {note}")
    return dataset


def _run(
    config: Config,
    folder: Path,
    tuned: str | None,
    start: tuple[Path, int | None] | None,
    *,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """`start`: the run to start from, and how many rounds more."""
    from fedpeft_ext.nn import parse_spec
    from fedpeft_ext.simulation import Simulator
    from fedpeft_ext.simulation.output import check_folder
    from fedpeft_ext.simulation.serving import load_start
    from fedpeft_ext.simulation.simulator import check_device

    parse_spec(config.embedding.name)  # before loading anything
    check_folder(folder, overwrite)
    check_device(config.device)
    run = None
    if start is not None:  # read once: it may be training
        run = load_start(start[0])
        config = _going_on(config, start[0], run.round, start[1])
    with _progress(_console(stderr=True), config, quiet=quiet, evaluations=True) as (callbacks_for, notify):
        dataset = _loaded(config, tuned, notify)
        notify(f"Preparing {config.embedding.name} on the server")
        callbacks = callbacks_for(config.embedding.name)
        simulator = Simulator(
            config, dataset, callbacks=callbacks, out=folder, overwrite=overwrite, start_from=run
        )
        del run  # which would take memory
        summary = _run_until_signal(simulator, folder)
    _report(summary, folder, as_json)


def _compare(
    config: Config,
    names: Sequence[str],
    folder: Path,
    tuned: str | None,
    *,
    overwrite: bool,
    pdf: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from fedpeft_ext.experiments import compare, terminal_table
    from fedpeft_ext.experiments.compare import (
        CSV,
        CURVES,
        JSON,
        LATEX,
        MARKDOWN,
        SCATTER,
        check_embeddings,
        goes_on,
    )
    from fedpeft_ext.simulation.simulator import check_device

    check_embeddings(config, names)  # before loading anything
    goes_on(folder, overwrite)
    check_device(config.device)
    with _progress(_console(stderr=True), config, quiet=quiet, evaluations=False) as (callbacks_for, notify):
        comparison = compare(
            config,
            names,
            _loaded(config, tuned, notify),
            out=folder,
            overwrite=overwrite,
            pdf=pdf,
            callbacks_for=callbacks_for,
            notify=notify,
        )
    if as_json:
        typer.echo(json.dumps([result.as_dict() for result in comparison.results], allow_nan=False))
    elif comparison.results:
        _print_table(terminal_table(comparison.results, comparison.k, title=comparison.title))
        typer.echo(f"Table:    {folder}/ {MARKDOWN}, {LATEX}, {CSV}, {JSON}")
        typer.echo(f"Pictures: {folder}/ {SCATTER}, {CURVES}")
    for embedding, reason in comparison.diverged.items():
        _complain(f"{embedding}: {reason}")
    if comparison.diverged:
        raise typer.Exit(TRAINING_FAILED)


def _size(dataset: Dataset) -> str:
    return (
        f"{dataset.name}: {counted(dataset.num_users, 'user')}, {counted(dataset.num_items, 'item')}, "
        f"{counted(dataset.num_interactions, 'interaction')}"
    )


def _list_datasets() -> None:
    from fedpeft_ext.data import describe_datasets

    infos = describe_datasets()
    width = max(len(info.name) for info in infos) + 2
    for info in infos:
        where = str(info.path) if info.path else "made on demand" if info.available else "not found"
        typer.echo(f"{info.name:<{width}}{info.description}")
        typer.echo(f"{'':<{width}}{where}" + ("" if info.available else f"; to get it: {info.how_to_get}"))
    typer.echo(
        "\nA file or folder works as well; its formats are in docs/data.md. Check one: fedpeft data NAME"
    )


def _dataset_options(options: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, values in YAML."""
    from fedpeft_ext.config import parse_value

    chosen: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--set: expected KEY=VALUE, got {option!r}")
        chosen[key.strip()] = parse_value(f"--set {key.strip()}", text)
    return chosen


def _describe_dataset(name: str, options: Mapping[str, Any]) -> None:
    from fedpeft_ext.data import check_dataset

    try:
        report = check_dataset(name, **options)
    except TypeError as error:  # an option's name or type
        raise ValueError(str(error)) from error
    notes = report.pop("notes")
    _print_facts({key.replace("_", " "): _readable(value) for key, value in report.items()})
    for note in notes:
        typer.echo(f"note: {note}")


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value == round(value) and abs(value) >= 1 else f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


from fedpeft_ext import serving_cli, study_cli  # noqa: E402 - they take the common options from here

serving_cli.add_commands(app)
study_cli.add_commands(app)
_ORDER = "run, resume, recommend, evaluate, compare, study, report, data, convert, info"  # of --help
app.registered_commands.sort(key=lambda command: _ORDER.index(getattr(command.callback, "__name__", "")))
