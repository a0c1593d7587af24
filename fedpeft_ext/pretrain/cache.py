"""Results on disk, named by a hash of everything they depend on.

Entries are safetensors files in `default_cache_dir()` or a folder of the caller's. Writing is atomic, so
that runs side by side can share a folder. An entry that cannot be read is computed anew; a folder that
cannot be written costs only time.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor
from typing_extensions import Self

# Part of every key: raise it when what is computed from the same options, or how it is kept, changes.
_FORMAT = 1
_META = "fedpeft_ext"


class Storable(Protocol):
    """An object that is a dictionary of tensors and JSON-ready settings."""

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self: ...


Result = TypeVar("Result", bound=Storable)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/fedpeft_ext, or ~/.cache/fedpeft_ext."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fedpeft_ext"


def save(path: str | Path, result: Storable) -> None:
    """Write `result` to a safetensors file, whole or not at all. Raises OSError where that is impossible."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(part, result)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, result: Storable) -> None:
    """As `save`, but part by part."""
    from safetensors.torch import save as to_bytes

    tensors, meta = result.to_tensors()
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    path.write_bytes(to_bytes(tensors, {_META: json.dumps(meta)}))


def load(path: str | Path, kind: type[Result]) -> Result:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a saved {kind.__name__}, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()[_META])
            names = file.keys()  # the file itself is not iterable
            return kind.from_tensors({name: file.get_tensor(name) for name in names}, meta)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a saved {kind.__name__} ({type(error).__name__}: {error})"
        ) from error


def cached(
    folder: Path | None,
    kind: type[Result],
    source: npt.NDArray[Any] | Sequence[str],
    options: Mapping[str, Any],
    compute: Callable[[], Result],
) -> Result:
    """`compute()`, or what an earlier call with the same `source` and `options` computed.

    Args:
        folder: of the entries, made where missing; None computes without a cache.
        kind: what `compute` returns.
        source: the data that it works on.
        options: the JSON-ready settings of the computation.
        compute: called where there is no usable entry.
    """
    if folder is None:
        return compute()
    path = folder / f"{kind.__name__}-{_key(kind, source, options)}.safetensors"
    if path.is_file():
        try:
            return load(path, kind)
        except (ValueError, OSError) as error:
            warnings.warn(f"cache: computing anew, since {error}", stacklevel=2)
    result = compute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(path, result)
    except OSError as error:
        warnings.warn(f"cache: could not keep a result in {folder} ({error})", stacklevel=2)
    return result


def _key(kind: type[Any], source: npt.NDArray[Any] | Sequence[str], options: Mapping[str, Any]) -> str:
    # Other versions of these may compute other numbers from the same inputs.
    versions = [version(name) for name in ("torch", "scikit-learn", "vector-quantize-pytorch")]
    digest = hashlib.sha256(
        json.dumps([_FORMAT, kind.__name__, versions, dict(options)], sort_keys=True).encode()
    )
    if isinstance(source, np.ndarray):
        digest.update(f"{source.dtype} {source.shape}".encode())
        digest.update(np.ascontiguousarray(source).data)
    else:
        digest.update(json.dumps(list(source)).encode())
    return digest.hexdigest()[:32]
