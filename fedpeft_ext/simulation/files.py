"""Files that are there whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Put the file that `write(place)` makes at `path`; until that is complete and on disk, what was there
    stays.

    `place` is in a folder of its own beside `path`: libraries write through temporary files of any name
    (safetensors does), which a killed process leaves. `remove_parts` finds them all.

    Raises:
        OSError: it cannot be written; names the file, and leaves what was there.
    """
    scratch = _scratch(path)
    part = scratch / path.name
    try:
        remove_part(path)
        scratch.mkdir()
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        remove_part(path)


def remove_part(path: Path) -> None:
    """Remove what a `replace_file` of `path` left that was killed."""
    if _scratch(path).exists():
        shutil.rmtree(_scratch(path))


def remove_parts(folder: Path, names: str = "*") -> None:
    """`remove_part` of every file in `folder` whose name matches."""
    for scratch in folder.glob(f".{names}.part"):
        shutil.rmtree(scratch)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` by UTF-8 text."""
    replace_file(path, lambda part: _write(part, text.encode()))


def replace_bytes(path: Path, data: bytes) -> None:
    """`replace_file` by these bytes."""
    replace_file(path, lambda part: _write(part, data))


def append(file: io.FileIO, data: bytes) -> None:
    """Write at the end of an unbuffered file. Raises OSError naming it."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) or 0 :]
    except OSError as error:
        raise OSError(f"cannot write {file.name!s}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Bring renamed, new and deleted entries of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
