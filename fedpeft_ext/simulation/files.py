"""Files that are there whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Put the file that `write(place)` makes at `path`; until that is complete and on disk, what was there
    stays.

    Raises:
        OSError: it cannot be written; names the file, and leaves what was there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
