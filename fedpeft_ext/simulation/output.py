"""The folder of a run: config.yaml, metrics.jsonl, summary.json and model.safetensors.

The folder is made and tried before any work. config.yaml is there from the start and metrics.jsonl is flushed
line by line, so a run that fails or is interrupted leaves both readable; summary.json and model.safetensors
mark a finished one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from fedpeft_ext.config import Config

CONFIG, METRICS, SUMMARY, MODEL = "config.yaml", "metrics.jsonl", "summary.json", "model.safetensors"


def prepare_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """Make the folder of a run, or take over an empty one.

    Args:
        overwrite: whether files of an earlier run there are deleted; anything else in the folder is left
            alone.

    Raises:
        FileExistsError: not empty and `overwrite` is false.
        NotADirectoryError: there is a file of this name.
        PermissionError, OSError: cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out: expected a folder, but {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not overwrite:
            raise FileExistsError(
                f"out: expected a new or empty folder, but {folder} has files; choose another, or overwrite"
            )
        probe = folder / ".fedpeft-probe"
        probe.write_text("")
        probe.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise type(error)(f"out: cannot write to {folder} ({error.strerror or error})") from error
    for name in (CONFIG, METRICS, SUMMARY, MODEL):
        (folder / name).unlink(missing_ok=True)
    return folder


class RunFolder:
    """Writes the files of one run.

    Args:
        folder: prepared by `prepare_folder`.
        config: written at once.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.path = folder
        (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        self._metrics: IO[str] = (folder / METRICS).open("w", encoding="utf-8")

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._metrics.close()

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, on disk before this returns."""
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()

    def finish(self, summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write model.safetensors, then summary.json: a summary means that all is there."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            self.path / MODEL,
            metadata={"format": "pt"},
        )
        (self.path / SUMMARY).write_text(
            json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
