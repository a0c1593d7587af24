"""Data sets as a folder of arrays that are mapped into memory, for data larger than that.

The folder has dataset.json (sizes, report, digest) and one .npy file an array: indptr, indices, positives
(the training items of each user ascending, which sampling searches), test_items, valid_items; and for each
list of texts (user_ids, item_ids, item_text) its UTF-8 bytes and where each text ends. A `DatasetWriter`
takes users in pieces; what it writes gets its name when it is whole, so a folder of that name is complete.
Reading maps the files: pages come from disk when they are touched, are shared between processes, and can be
dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from .dataset import Dataset, IntArray

META = "dataset.json"
FORMAT = 1
ARRAYS = ("indptr", "indices", "positives", "test_items", "valid_items")
TEXTS = ("user_ids", "item_ids", "item_text")
_HEADER_BYTES = 128
_AT_A_TIME = 1 << 22  # interactions, or texts / 64


class Texts(Sequence[str]):
    """Texts in mapped files, decoded when asked for.

    Args:
        data: uint8, all texts in UTF-8.
        ends: int64 [N], where each ends in `data`.
    """

    def __init__(self, data: np.ndarray, ends: IntArray) -> None:
        self._data = data
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        start = int(self._ends[places - 1]) if places else 0
        return bytes(self._data[start : int(self._ends[places])]).decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_A_TIME // 64):
            last = min(first + _AT_A_TIME // 64, len(self))
            start = int(self._ends[first - 1]) if first else 0
            data = bytes(self._data[start : int(self._ends[last - 1])])
            ends = (self._ends[first:last] - start).tolist()
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                yield data[begin:end].decode()

    def count(self, value: str) -> int:
        """How many of the texts are `value`."""
        if value == "":
            return int(np.count_nonzero(np.diff(self._ends, prepend=0) == 0))
        return sum(text == value for text in self)


@dataclass(frozen=True, eq=False)
class MappedDataset(Dataset):
    """A `Dataset` whose arrays lie in files.

    Attributes:
        sorted_indices: int64 [nnz], training items ascending in each user.
        path: the folder.
        stored_digest: `Dataset.digest`, as it was when the folder was written.
    """

    sorted_indices: IntArray = field(kw_only=True)
    path: Path = field(kw_only=True)
    stored_digest: str = field(kw_only=True)

    @property
    def _positives(self) -> IntArray:
        return self.sorted_indices

    @property
    def digest(self) -> str:
        """As it was when the folder was written."""
        return self.stored_digest

    def verify(self) -> None:
        """Read everything and compare. Raises ValueError naming the folder where a file was changed."""
        if self.computed_digest() != self.stored_digest:
            raise ValueError(f"{self.path}: the arrays do not have the SHA-256 they were written with")
        for users in self.user_chunks(_AT_A_TIME):
            inside = slice(int(self.indptr[users.start]), int(self.indptr[users.stop]))
            counts = np.diff(self.indptr[users.start : users.stop + 1])
            if not np.array_equal(
                sorted_in_users(self.indices[inside], counts, self.num_items), self.sorted_indices[inside]
            ):
                raise ValueError(f"{self.path}: positives.npy does not belong to indices.npy")


class DatasetWriter:
    """Writes a folder, of which users come in pieces; use it as a context manager.

    Args:
        folder: of the data set; must not exist yet, or be empty.
        name: of the data set.
        num_items: I.
        num_users: U, all of which must come.

    Raises:
        FileExistsError: there is something. OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, name: str, num_users: int, num_items: int) -> None:
        self._target = Path(folder)
        if self._target.exists() and (not self._target.is_dir() or any(self._target.iterdir())):
            raise FileExistsError(f"out: expected a new or empty folder, but {self._target} is there")
        self._name, self._num_users, self._num_items = name, num_users, num_items
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._target.with_name(f".{self._target.name}.part-{os.getpid()}")
        self._part.mkdir()
        self._files: dict[str, IO[bytes]] = {}
        self._lengths: dict[str, int] = {}
        self._texts: list[str] = []
        self._append("indptr", np.zeros(1, np.int64))
        self._stop = 0

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as last:  # each is done although another fails, as closing does on a full disk
            last.callback(shutil.rmtree, self._part, ignore_errors=True)  # renamed where all went well
            for file in self._files.values():
                last.callback(file.close)

    def add_users(
        self, counts: IntArray, indices: IntArray, test_items: IntArray, valid_items: IntArray
    ) -> None:
        """The next users: `counts` [n] of training items, these joined in `indices`, held-out items [n]."""
        ends = self._stop + np.cumsum(counts)
        self._stop += len(indices)
        self._append("indptr", ends)
        self._append("indices", indices)
        self._append("positives", sorted_in_users(indices, counts, self._num_items))
        self._append("test_items", test_items)
        self._append("valid_items", valid_items)

    def add_texts(self, kind: str, texts: Iterable[str]) -> None:
        """All texts of one of TEXTS."""
        self._texts.append(kind)
        end, ends = 0, []
        with (self._part / f"{kind}.utf8").open("wb") as file:
            for text in texts:
                end += file.write(text.encode())
                ends.append(end)
            _sync(file)
        self._append(f"{kind}.ends", np.array(ends, np.int64))

    def finish(self, report: dict[str, Any]) -> MappedDataset:
        """Make the folder appear under its name, and read it.

        Raises:
            ValueError: the parts do not fit together.
        """
        for name, file in self._files.items():
            file.seek(0)
            file.write(_header(self._lengths[name]))
            _sync(file)
            file.close()
        meta = {
            "format": FORMAT,
            "name": self._name,
            "num_users": self._num_users,
            "num_items": self._num_items,
            "texts": self._texts,
            "report": report,
        }
        digest = _map(self._part, meta | {"digest": ""}).computed_digest()
        with (self._part / META).open("wb") as description:
            description.write(json.dumps(meta | {"digest": digest}, indent=2).encode() + b"\n")
            _sync(description)
        if self._target.is_dir():
            self._target.rmdir()
        self._part.rename(self._target)
        folder = os.open(self._target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return load_mapped(self._target)

    def _append(self, name: str, values: IntArray) -> None:
        if name not in self._files:
            self._files[name] = (self._part / f"{name}.npy").open("wb+")
            self._files[name].write(bytes(_HEADER_BYTES))
            self._lengths[name] = 0
        self._files[name].write(np.ascontiguousarray(values, "<i8").data)
        self._lengths[name] += len(values)


def save_dataset(dataset: Dataset, folder: str | Path) -> MappedDataset:
    """Write `dataset` into a new folder; see `DatasetWriter`."""
    with DatasetWriter(folder, dataset.name, dataset.num_users, dataset.num_items) as writer:
        for users in dataset.user_chunks(_AT_A_TIME):
            writer.add_users(
                np.diff(dataset.indptr[users.start : users.stop + 1]),
                dataset.indices[dataset.indptr[users.start] : dataset.indptr[users.stop]],
                dataset.test_items[users.start : users.stop],
                dataset.valid_items[users.start : users.stop],
            )
        writer.add_texts("user_ids", dataset.user_ids)
        writer.add_texts("item_ids", dataset.item_ids)
        if dataset.item_text is not None:
            writer.add_texts("item_text", dataset.item_text)
        return writer.finish(dataset.report)


def is_mapped(path: Path) -> bool:
    """Whether there is a folder that a `DatasetWriter` wrote."""
    return (path / META).is_file()


def load_mapped(path: str | Path, *, name: str | None = None) -> MappedDataset:
    """Map the data set in a folder; see `MappedDataset.verify` for a check of every byte.

    Args:
        path: the folder.
        name: the data set's name instead of the one it was written with.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: a file is damaged, of another format, or does not fit the others.
    """
    path = Path(path)
    if not is_mapped(path):
        raise FileNotFoundError(f"{path}: expected a folder with {META}")
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / META}: not the description of a data set ({error})") from error
    if found != FORMAT:
        raise ValueError(f"{path / META}: expected format {FORMAT}, got {found!r}")
    return _map(path, meta if name is None else meta | {"name": name})


def sorted_in_users(indices: IntArray, counts: IntArray, num_items: int) -> IntArray:
    """Items of users with `counts` [n] items each, ascending within each user.

    Raises ValueError where a user has one twice.
    """
    base = np.repeat(np.arange(len(counts)) * num_items, counts)
    keys: IntArray = base + indices
    keys.sort()
    if (keys[1:] == keys[:-1]).any():
        raise ValueError("indices: a user has an item twice")
    keys -= base
    return keys


def _map(path: Path, meta: dict[str, Any]) -> MappedDataset:
    try:
        texts: dict[str, Any] = {kind: _texts(path, kind) for kind in meta["texts"]}
        arrays = {name: _array(path / f"{name}.npy") for name in ARRAYS}
        if len(arrays["positives"]) != len(arrays["indices"]):
            raise ValueError(f"{path / 'positives.npy'}: expected the length of indices.npy")
        return MappedDataset(
            name=meta["name"],
            num_users=meta["num_users"],
            num_items=meta["num_items"],
            sorted_indices=arrays.pop("positives"),
            **arrays,
            user_ids=texts["user_ids"],
            item_ids=texts["item_ids"],
            item_text=texts.get("item_text"),
            report=meta["report"],
            path=path,
            stored_digest=meta["digest"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / META}: not the description of a data set ({error})") from error


def _array(path: Path) -> IntArray:
    """A read-only map of int64 values [n]."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, which belongs to the data set")
    size = path.stat().st_size - _HEADER_BYTES
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if size < 0 or size % 8 or header != _header(size // 8):
        raise ValueError(f"{path}: damaged; expected a header of its length and that many int64 values")
    if size == 0:
        return np.zeros(0, np.int64)
    return np.asarray(np.memmap(path, "<i8", "r", _HEADER_BYTES, (size // 8,)))


def _texts(path: Path, kind: str) -> Texts:
    ends, file = _array(path / f"{kind}.ends.npy"), path / f"{kind}.utf8"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, which belongs to the data set")
    size = file.stat().st_size
    if size != (int(ends[-1]) if len(ends) else 0):
        raise ValueError(f"{file}: damaged; expected {int(ends[-1]) if len(ends) else 0} bytes, got {size}")
    return Texts(np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8), ends)


def _header(length: int) -> bytes:
    """The start of an .npy file (version 1.0) of int64 [length]."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00v\x00" + text.ljust(_HEADER_BYTES - 11).encode() + b"\n"


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
