"""Checkpoints: all that a run needs to go on, in files that are whole or not there, and never hold code.

`checkpoints/round-00000120.safetensors` is the federation after round 120: tensors, and in the file's
metadata one JSON header with everything else, under one SHA-256. What does not change within a phase (frozen
tables, codes) is in `checkpoints/constants-<digest>.safetensors`, written once and named by the header.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedpeft_ext import __version__
from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import CheckpointConfig
from fedpeft_ext.simulation.communication import message, setup_message
from fedpeft_ext.simulation.files import remove_parts, replace_file, sync_folder
from fedpeft_ext.simulation.state import State, Stateful, below, copy_into, prefixed

if TYPE_CHECKING:
    from fedpeft_ext.simulation.distributed import Ranks

FORMAT = 1
"""Raised when the same content is written in another way."""

FOLDER = "checkpoints"
SHARE, SHORTEST = 0.01, 10.0
"""With `checkpoint.every` null: the share of time that checkpoints may take, and the least seconds between
two."""

RUN = "run"
"""In the header and the summary of a Flower server: the name of the run, under which nodes keep their users'
state."""

_HEADER, _DIGEST = "fedpeft_ext", "sha256"


@dataclass(frozen=True)
class Checkpoint:
    """A federation between two rounds.

    Attributes:
        round: rounds done.
        header: JSON values: `config`, `dataset` (a digest; "" of a Flower server), `progress`, `metrics` (how
            far metrics.jsonl had come), and the versions that wrote it.
        state: of the parts, by name: tensors and JSON values.
        constants: tensors that do not change within a phase.
        path: where it was read from, or None.
    """

    round: int
    header: Mapping[str, Any]
    state: State
    constants: Mapping[str, Tensor]
    path: Path | None = None

    def restore(self, model: Backbone, parts: Mapping[str, Stateful]) -> None:
        """Give a model and the parts beside it what `trained_state` and `setup_message` told of them.

        Raises:
            ValueError: it does not fit them; names the file.
        """
        try:
            copy_into(message(model), below("model", self.state))
            copy_into(setup_message(model), below("model", self.constants))
            for name, part in parts.items():
                part.load_state_dict(below(name, self.state))
        except (ValueError, KeyError) as error:
            raise ValueError(f"resume: {self.path} does not fit its settings: {error}") from error


def trained_state(model: Backbone, parts: Mapping[str, Stateful], ranks: Ranks | None = None) -> State:
    """Tensors and JSON values of a model's trained part and of the parts beside it; with several `ranks`, on
    each of them.
    """
    state = prefixed("model", message(model))
    for name, part in parts.items():
        state |= prefixed(name, part.state_dict(ranks))
    return state


class CheckpointFolder:
    """Writes the checkpoints of one run.

    Args:
        folder: of the run; `checkpoints` is made in it with the first one.
        settings: how often, and how many are kept.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig) -> None:
        self._folder = folder / FOLDER
        self._settings = settings
        self._cost = 0.0
        self._last = time.perf_counter()
        self._constants: tuple[Mapping[str, Tensor], dict[str, Any]] | None = None

    def due(self, round: int) -> bool:
        """Whether it is time for a checkpoint after `round`."""
        every = self._settings.every
        if every is not None:
            return every > 0 and round % every == 0
        return time.perf_counter() - self._last >= max(SHORTEST, self._cost / SHARE)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then delete those that it makes superfluous.

        `checkpoint.constants` is taken to hold the same values as in the last call if it is the same object.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """
        began = time.perf_counter()
        new = not self._folder.exists()
        self._folder.mkdir(exist_ok=True)
        if new:
            sync_folder(self._folder.parent)
        constants = self._save_constants(checkpoint.constants)
        tensors = {name: value for name, value in checkpoint.state.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in checkpoint.state.items() if name not in tensors}
        header = {
            "format": FORMAT,
            "fedpeft_ext": __version__,
            "torch": torch.__version__,
            "round": checkpoint.round,
            **checkpoint.header,
            "values": values,
            "constants": constants,
        }
        path = self._folder / f"round-{checkpoint.round:08d}.safetensors"
        write_checked(path, header, tensors)
        self._prune(path)
        self._last = time.perf_counter()
        self._cost = self._last - began

    def _save_constants(self, constants: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write them unless that was done, and tell {file, names: {name: its name in the file}}."""
        if self._constants is None or self._constants[0] is not constants:
            # The same values under two names (the base that a model holds) are written once.
            digests = {name: _digest("", {"": value}) for name, value in constants.items()}
            first = {digest: name for name, digest in reversed(digests.items())}
            names = {name: first[digest] for name, digest in digests.items()}
            tensors = {name: constants[name] for name in first.values()}
            header = {"format": FORMAT}
            file = f"constants-{_digest(json.dumps(header), tensors)[:16]}.safetensors"
            if not (self._folder / file).exists():
                write_checked(self._folder / file, header, tensors)
            self._constants = constants, {"file": file, "names": names}
        return self._constants[1]

    def _prune(self, newest: Path) -> None:
        kept = [path for path in _saved(self._folder) if path.name <= newest.name][-self._settings.keep :]
        stale = set(self._folder.glob("round-*.safetensors")) - set(kept)
        for path in stale:
            path.unlink()
        remove_parts(self._folder)  # left by a process that was killed
        used = {_read_header(path)["constants"]["file"] for path in kept}
        for path in self._folder.glob("constants-*.safetensors"):
            if path.name not in used:
                path.unlink()


def has_checkpoint(folder: Path) -> int | None:
    """Round of the newest checkpoint of the run in `folder`; None if there is none."""
    saved = _saved(folder / FOLDER)
    return int(saved[-1].stem.removeprefix("round-")) if saved else None


def check_no_runs_inside(argument: str, folder: Path) -> None:
    """Raise FileNotFoundError, which names them, where a folder holds runs, as that of a comparison does."""
    names = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    if names:
        inside = f"several: {', '.join(names)}" if len(names) > 1 else f"one in {names[0]}"
        raise FileNotFoundError(f"{argument}: expected the folder of one run, but {folder} holds {inside}")


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of the run in `folder`, parts of unfinished ones included."""
    place = folder / FOLDER
    for pattern in ("round-*.safetensors", "constants-*.safetensors"):
        for path in place.glob(pattern):
            path.unlink()
        remove_parts(place, pattern)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint of the run in `folder`.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: a file is damaged, or of another format; names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"resume: expected the folder of a run, found none at {folder}")
    saved = _saved(folder / FOLDER)
    if not saved:
        check_no_runs_inside("resume", folder)
        raise FileNotFoundError(
            f"resume: expected a checkpoint in {folder / FOLDER}, found none; a run that ended before its "
            "first one has to be started again"
        )
    path = saved[-1]
    header, state = read_checked(path)
    constants_path = path.with_name(header["constants"]["file"])
    if not constants_path.is_file():
        raise FileNotFoundError(f"resume: {path} needs {constants_path}, which is not there")
    _, stored = read_checked(constants_path)
    names = header["constants"]["names"]
    if not set(names.values()) <= stored.keys():
        raise ValueError(f"resume: {constants_path} does not belong to {path}")
    return Checkpoint(
        header["round"],
        header,
        {**header["values"], **state},
        {name: stored[at] for name, at in names.items()},
        path,
    )


def _saved(place: Path) -> list[Path]:
    """Files of checkpoints, oldest first."""
    return sorted(path for path in place.glob("round-*.safetensors") if path.stem[6:].isdigit())


def write_checked(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a file of tensors and JSON values, with `format` among them, at `path`, whole, under one SHA-256.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    text = json.dumps(header, allow_nan=False)
    on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", _HEADER: text, _DIGEST: _digest(text, on_host)}
    replace_file(path, lambda part: save_file(on_host, part, metadata))


def read_checked(path: Path, argument: str = "resume") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `write_checked` wrote.

    Raises:
        ValueError: it is damaged, or of another format; names the file, after the `argument` that asked for
            it.
    """
    header = _read_header(path, argument)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, argument, str(error)) from error
    if _digest(metadata[_HEADER], tensors) != metadata.get(_DIGEST):
        raise _damaged(path, argument, "its content does not have the SHA-256 that it was written with")
    return header, tensors


def _read_header(path: Path, argument: str = "resume") -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, argument, str(error)) from error
    if text is None:
        raise ValueError(f"{argument}: {path} is not a file that fedpeft_ext wrote")
    try:
        header: dict[str, Any] = json.loads(text)
        version = header["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, argument, f"no header: {error}") from error
    if version != FORMAT:
        raise ValueError(
            f"{argument}: {path} has format {version}, written by fedpeft_ext "
            f"{header.get('fedpeft_ext', 'unknown')}; expected {FORMAT}, which version {__version__} reads"
        )
    return header


def _damaged(path: Path, argument: str, reason: str) -> ValueError:
    return ValueError(f"{argument}: {path} is damaged ({reason}); restore it, or delete it to go on without")


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
