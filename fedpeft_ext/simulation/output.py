"""The folder of a run: config.yaml, metrics.jsonl, summary.json, model.safetensors, what a later
run needs to start from it (`numbering`), and what `log` asks for.

The folder is made and tried before any work. config.yaml is there from the start and metrics.jsonl is flushed
line by line, so a run that fails or is interrupted leaves both readable; summary.json and model.safetensors
mark a finished one. A resumed run cuts metrics.jsonl back to what its checkpoint knew.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.simulation.checkpoint import delete_checkpoints, has_checkpoint
from fedpeft_ext.simulation.files import append, remove_part, replace_bytes, replace_file, replace_text
from fedpeft_ext.simulation.numbering import ENCODER, ITEMS, USERS

CONFIG, METRICS, SUMMARY, MODEL = "config.yaml", "metrics.jsonl", "summary.json", "model.safetensors"
CSV, TENSORBOARD = "metrics.csv", "tensorboard"
FILES = (CONFIG, METRICS, SUMMARY, MODEL, CSV, ITEMS, USERS, ENCODER)
"""Beside TensorBoard's events and the checkpoints."""


def dataset_of_run(config: Config, folder: Path) -> Dataset:
    """The data set of the settings of the run in `folder`; raises what `load_dataset` raises."""
    try:
        return load_dataset(config.dataset.name, **config.dataset.options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"dataset: {error} (seen from {Path.cwd()}); {folder / CONFIG} names the data and may be edited"
        ) from error


def prepare_folder(folder: str | Path, overwrite: bool = False, *, clear: bool = True) -> Path:
    """Make the folder of a run, or take over an empty one.

    Args:
        overwrite: whether files of an earlier run there are deleted; anything else in the folder is left
            alone.
        clear: False leaves deleting them to `clear_folder`, once nothing else can be refused.

    Raises:
        FileExistsError: not empty and `overwrite` is false.
        NotADirectoryError: there is a file of this name.
        BlockingIOError: another process is writing to it; nothing is deleted.
        PermissionError, OSError: cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".fedpeft-probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise type(error)(f"out: cannot write to {folder} ({error.strerror or error})") from error
    if clear:
        clear_folder(folder)
    else:
        os.close(_locked(folder))
    return folder


def clear_folder(folder: Path) -> None:
    """Delete the files of an earlier run. Raises BlockingIOError where another process is writing to it."""
    lock = _locked(folder)
    try:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
            remove_part(folder / name)
        for events in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
            events.unlink()
        delete_checkpoints(folder)
    finally:
        os.close(lock)


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Raise what `prepare_folder` would of what is there, without making or deleting anything."""
    above = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if above.exists() and not above.is_dir():
        raise NotADirectoryError(f"out: expected a folder, but {above} is a file")
    try:
        if above == folder and not overwrite and _has_files(folder):
            raise FileExistsError(f"out: {_why_not_empty(folder)}; choose another, or overwrite")
    except FileExistsError:
        raise
    except OSError as error:
        raise type(error)(f"out: cannot read {folder} ({error.strerror or error})") from error


def _has_files(folder: Path) -> bool:
    """Whether anything but empty folders is in it, which runs leave that were refused."""
    return any(path.is_symlink() or not path.is_dir() or _has_files(path) for path in folder.iterdir())


def _why_not_empty(folder: Path) -> str:
    round = has_checkpoint(folder)
    if round is None:
        return f"expected a new or empty folder, but {folder} has files"
    if (folder / SUMMARY).exists():
        return f"expected a new or empty folder, but {folder} holds a finished run"
    return (
        f"{folder} holds an interrupted run, saved after round {round}, which "
        f"`fedpeft resume {shlex.quote(str(folder))}` goes on with"
    )


class RunFolder:
    """Writes the files of one run. No two may write to the same folder at a time.

    Args:
        folder: prepared by `prepare_folder`, or that of the run to go on with.
        config: written at once.
        resumed: what `mark` told when the run to go on with was saved; None begins anew.

    Raises:
        BlockingIOError: another process writes to the folder.
        OSError: a file cannot be written.
        ValueError: metrics.jsonl is not as it was when the run was saved.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder
        self._lock = _locked(folder)
        try:
            kept = b"" if resumed is None else saved_metrics(folder, resumed)
            for name in (SUMMARY, MODEL):  # of the run before it was given more rounds
                (folder / name).unlink(missing_ok=True)
            for name in FILES:
                remove_part(folder / name)
            replace_text(folder / CONFIG, config.to_yaml())
            self._log_csv = config.log.csv
            self._begin(kept)
        except BaseException:
            os.close(self._lock)
            raise

    def _begin(self, kept: bytes) -> None:
        """Write to the files after these lines."""
        replace_bytes(self.path / METRICS, kept)
        self._metrics = (self.path / METRICS).open("ab", buffering=0)
        self._length, self._digest = len(kept), hashlib.sha256(kept)
        self._csv = None
        if self._log_csv:
            self._csv = CsvLog(self.path / CSV, [json.loads(line) for line in kept.splitlines()])

    def close(self) -> None:
        """Close the files."""
        self._close_files()
        os.close(self._lock)

    def _close_files(self) -> None:
        if self._csv is not None:
            self._csv.close()
        self._metrics.close()

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, with the operating system before this returns."""
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        append(self._metrics, data)
        self._length += len(data)
        self._digest.update(data)
        if self._csv is not None:
            self._csv.add(line)

    def mark(self) -> dict[str, Any]:
        """How far metrics.jsonl has come, once that is on disk."""
        os.fsync(self._metrics.fileno())
        return {"bytes": self._length, "sha256": self._digest.hexdigest()}

    def mark_before_last(self) -> dict[str, Any]:
        """The `mark` of the file without its last line."""
        data = (self.path / METRICS).read_bytes()[: self._length]
        data = data[: data[:-1].rfind(b"\n") + 1]
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def cut(self, mark: Mapping[str, Any]) -> None:
        """Drop the lines after those that `mark` covers."""
        kept = saved_metrics(self.path, mark)
        self._close_files()
        self._begin(kept)

    def finish(self, summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write model.safetensors, then summary.json: a summary means that all is there."""
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        replace_file(self.path / MODEL, lambda part: save_file(on_host, part, {"format": "pt"}))
        replace_text(self.path / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def saved_metrics(folder: Path, mark: Mapping[str, Any]) -> bytes:
    """The lines of metrics.jsonl that `mark` covers.

    Raises:
        FileNotFoundError, ValueError: it does not begin with them.
    """
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"resume: expected the metrics of the run, found none at {path}")
    data = path.read_bytes()[: mark["bytes"]]
    if len(data) != mark["bytes"] or hashlib.sha256(data).hexdigest() != mark["sha256"]:
        raise ValueError(f"resume: {path} was changed since the run was saved; restore it to go on")
    return data


def _locked(folder: Path) -> int:
    """A handle of the folder that keeps others from locking it; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(f"out: another process is writing to {folder}") from None
    return handle


class CsvLog:
    """metrics.csv: the lines of metrics.jsonl as a table, nested values as `outer.inner`.

    Args:
        path: written anew.
        lines: that are there already.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        self._path = path
        self._rows = [flat(line) for line in lines]
        self._columns: list[str] = []
        self._file: io.FileIO | None = None
        self._rewrite()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, as a new table where it has other columns than those before."""
        row = flat(line)
        self._rows.append(row)
        if not row.keys() <= set(self._columns) or self._file is None:
            self._rewrite()
            return
        append(self._file, self._table([row]))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _rewrite(self) -> None:
        self.close()
        self._columns = list(dict.fromkeys(name for row in reversed(self._rows) for name in row))
        replace_bytes(self._path, self._table(self._rows, header=True))
        self._file = self._path.open("ab", buffering=0)

    def _table(self, rows: list[dict[str, Any]], header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by names such as `outer.inner`."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        row |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return row
