"""`Dataset`: the interactions of every user, split leave-one-out, and what evaluation draws from them.

Users and items are numbered 0 .. num_users - 1 and 0 .. num_items - 1; their external ids are kept beside.
Interactions lie in CSR form: the training items of user u are `indices[indptr[u]:indptr[u + 1]]`, oldest
first.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from fedpeft_ext.ops import philox
from fedpeft_ext.words import counted

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# Interactions looked at, and numbers hashed, at a time, where they may be more than fit into memory.
_CHUNK_INTERACTIONS = 1 << 22
_CHUNK_HASHED = 1 << 20
_CHUNK_IDS = 1 << 16

# Draws held at a time by `candidates`: about 8 MB an array, so that the ten rounds of Philox stay in cache.
_CHUNK_DRAWS = 1 << 18


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions split leave-one-out: training items, at most one validation and one test item a user.

    Attributes:
        name: what to call it in logs and tables.
        num_users, num_items: U and I.
        indptr: int64 [U + 1], CSR row offsets into `indices`.
        indices: int64 [nnz], each user's training items, distinct, oldest first.
        test_items: int64 [U], the item held out for testing; -1: the user has none.
        valid_items: int64 [U], the item held out for validation; -1: none.
        user_ids, item_ids: external ids, by index.
        item_text: text of each item ("" where there is none), or None if the data set has no text.
        report: what loading counted (rows read, duplicates dropped, users without a test item, ...).

    Raises ValueError or TypeError if the parts do not fit together, or if a held-out item is also a training
    item.
    """

    name: str
    num_users: int
    num_items: int
    indptr: IntArray
    indices: IntArray
    test_items: IntArray
    valid_items: IntArray
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    item_text: Sequence[str] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_users < 1 or self.num_items < 1:
            raise ValueError(
                f"a data set needs at least one user and one item, got num_users={self.num_users}, "
                f"num_items={self.num_items}"
            )
        if len(self.indices.shape) != 1:
            raise ValueError(f"indices: expected one dimension, got shape {self.indices.shape}")
        shapes = {"indptr": self.num_users + 1, "test_items": self.num_users, "valid_items": self.num_users}
        for name in ("indptr", "indices", "test_items", "valid_items"):
            array = getattr(self, name)
            if array.dtype != np.int64:
                raise TypeError(f"{name}: expected int64, got {array.dtype}")
            if name in shapes and array.shape != (shapes[name],):
                raise ValueError(f"{name}: expected shape ({shapes[name]},), got {array.shape}")
        for name, ids, count in (
            ("user_ids", self.user_ids, self.num_users),
            ("item_ids", self.item_ids, self.num_items),
            ("item_text", self.item_text, self.num_items),
        ):
            if ids is not None and len(ids) != count:
                raise ValueError(f"{name}: expected {count} entries, got {len(ids)}")
        counts = np.diff(self.indptr)
        if self.indptr[0] != 0 or self.indptr[-1] != len(self.indices) or (counts < 0).any():
            raise ValueError(
                f"indptr: expected offsets rising from 0 to {len(self.indices)} (the length of indices)"
            )
        self._check_items(counts)

    def _check_items(self, counts: IntArray) -> None:
        for name, array, low in (
            ("indices", self.indices, 0),
            ("test_items", self.test_items, -1),
            ("valid_items", self.valid_items, -1),
        ):
            if len(array) and (array.min() < low or array.max() >= self.num_items):
                raise IndexError(
                    f"{name}: expected items in [{low}, {self.num_items}), got {array.min()} to {array.max()}"
                )
        for name, held in (("test_items", self.test_items), ("valid_items", self.valid_items)):
            for users in self.user_chunks(_CHUNK_INTERACTIONS):
                part = slice(users.start, users.stop)
                first, last = self.indptr[users.start], self.indptr[users.stop]
                leaks = np.flatnonzero(self.indices[first:last] == np.repeat(held[part], counts[part]))
                if len(leaks):
                    user = int(np.searchsorted(self.indptr, first + leaks[0], side="right")) - 1
                    raise ValueError(
                        f"{name}: item {held[user]} of user {user} is also one of the user's training items"
                    )
        same = np.flatnonzero((self.test_items >= 0) & (self.test_items == self.valid_items))
        if len(same):
            raise ValueError(f"valid_items: user {same[0]} has the test item as validation item")

    @property
    def num_interactions(self) -> int:
        """All interactions: training, validation and test."""
        held = np.count_nonzero(self.test_items >= 0) + np.count_nonzero(self.valid_items >= 0)
        return len(self.indices) + int(held)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what training and evaluation read: sizes, interactions in order, held-out items."""
        return self.computed_digest()

    def computed_digest(self) -> str:
        """`digest`, from the arrays as they are now."""
        digest = hashlib.sha256(f"{self.num_users} {self.num_items}".encode())
        for name in ("indptr", "indices", "test_items", "valid_items"):
            array = getattr(self, name)
            digest.update(f" {name} {len(array)} ".encode())
            for start in range(0, len(array), _CHUNK_HASHED):
                digest.update(np.ascontiguousarray(array[start : start + _CHUNK_HASHED], "<i8").data)
        return digest.hexdigest()

    def user_chunks(self, interactions: int) -> Iterator[range]:
        """All users in order, in pieces of about so many training interactions, at least one user each."""
        bounds = np.searchsorted(self.indptr, np.arange(0, len(self.indices), interactions))
        steps = np.unique(np.concatenate([bounds, [0, self.num_users]])).tolist()
        return map(range, steps[:-1], steps[1:])

    def positives(self) -> tuple[IntArray, IntArray]:
        """Training interactions as CSR with each user's items ascending: (indptr int64 [U + 1], indices int64
        [nnz]).

        This is the form that `sample_negatives` takes. Computed once. Raises ValueError if a user has an item
        twice.
        """
        return self.indptr, self._positives

    def met_csr(self) -> tuple[IntArray, IntArray]:
        """Everything that each user met (training, validation, test): (indptr, indices), as `positives`."""
        return self._met

    def met_rows(self, users: IntArray) -> tuple[IntArray, IntArray]:
        """`met_csr` of some `users` int64 [n], in this order: (indptr [n + 1], items)."""
        indptr, places = _rows(self.indptr, users)
        counts = np.diff(indptr)
        owner = np.repeat(np.arange(len(users)), counts)
        keys = [owner * self.num_items + self._positives[places]]
        for items in (self.valid_items, self.test_items):
            held = items[users]
            having = np.flatnonzero(held >= 0)
            keys.append(having * self.num_items + held[having])
            counts[having] += 1
        met = np.concatenate(keys)
        met.sort()
        met -= np.repeat(np.arange(len(users)) * self.num_items, counts)
        return np.concatenate([[0], np.cumsum(counts)]), met

    def met(self, user: int) -> IntArray:
        """The items that `user` met (training, validation, test), ascending, int64."""
        user = operator.index(user)
        if not 0 <= user < self.num_users:
            raise IndexError(f"user: expected 0 to {self.num_users - 1}, got {user}")
        indptr, indices = self._met
        return indices[indptr[user] : indptr[user + 1]]

    def of_users(self, users: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Dataset:
        """The data set of some users alone, numbered in this order, with the whole catalogue.

        Args:
            users: distinct integers [n], n >= 1.

        Raises:
            IndexError: a user out of range. TypeError, ValueError: not such numbers.
        """
        given = np.asarray(users)
        if given.ndim != 1 or len(given) == 0:
            raise ValueError(f"users: expected shape [n], n >= 1, got {list(given.shape)}")
        if given.dtype.kind not in "iu":
            raise TypeError(f"users: expected integers, got {given.dtype}")
        numbers = given.astype(np.int64)
        if numbers.min() < 0 or numbers.max() >= self.num_users:
            raise IndexError(
                f"users: expected 0 to {self.num_users - 1}, got {numbers.min()} to {numbers.max()}"
            )
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError("users: expected distinct numbers")
        indptr, places = _rows(self.indptr, numbers)
        return self.changed(
            num_users=len(numbers),
            indptr=indptr,
            indices=self.indices[places],
            test_items=self.test_items[numbers],
            valid_items=self.valid_items[numbers],
            user_ids=[self.user_ids[user] for user in numbers.tolist()],
        )

    def with_catalogue(self, other: Dataset) -> Dataset:
        """The same interactions with the catalogue of another data set: items numbered as there, by their
        external ids, and those that nobody met here.

        Raises:
            ValueError: an item that the other data set does not have.
        """
        numbers = numbers_of(self.item_ids, other.item_ids)
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            raise ValueError(
                f"items: {counted(len(unknown), 'item')} of data set {self.name!r} not in the catalogue of "
                f"{other.name!r}, such as {self.item_ids[unknown[0]]!r}"
            )
        return self._renumbered(numbers, other.item_ids, other.item_text)

    def after_catalogue(self, item_ids: Sequence[str] | pl.Series) -> Dataset:
        """The same interactions, with items numbered as in `item_ids`, by external ids; the others come
        after them, in their own order. Items that are missing here have no interactions, and "" as text.

        Where that changes no number it is this data set itself.
        """
        known = len(item_ids)
        numbers = numbers_of(self.item_ids, item_ids)
        new = np.flatnonzero(numbers < 0)
        numbers[new] = known + np.arange(len(new))
        if known + len(new) == self.num_items and (numbers == np.arange(self.num_items)).all():
            return self
        text = None
        if self.item_text is not None:
            text = [""] * (known + len(new))
            for number, words in zip(numbers.tolist(), self.item_text, strict=True):
                text[number] = words
        return self._renumbered(numbers, [*item_ids, *(self.item_ids[item] for item in new.tolist())], text)

    def _renumbered(self, numbers: IntArray, ids: Sequence[str], text: Sequence[str] | None) -> Dataset:
        """Item i as item `numbers[i]` of a catalogue."""
        numbers = np.append(numbers, -1)  # of no item
        return self.changed(
            num_items=len(ids),
            indices=numbers[self.indices],
            test_items=numbers[self.test_items],
            valid_items=numbers[self.valid_items],
            item_ids=ids,
            item_text=text,
        )

    def changed(self, **fields: Any) -> Dataset:
        """A plain `Dataset` with other `fields`, and nothing counted by loading."""
        own = {name: getattr(self, name) for name in Dataset.__dataclass_fields__}
        return Dataset(**own | {"report": {}} | fields)

    def candidates(
        self,
        users: Sequence[int] | npt.NDArray[np.integer[Any]],
        num_negatives: int = 100,
        seed: int = 0,
        *,
        target: Literal["test", "valid"] = "test",
    ) -> IntArray:
        """The held-out item of each user beside items that the user never met, for sampled ranking metrics.

        Column 0 is the test (or validation) item. The other columns are a uniformly drawn set of
        `num_negatives` distinct items among those that the user met neither in training nor as validation or
        test item. A row is a pure function of the data set, seed and user, whichever users are asked
        together. Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987) on the ranks of the unmet items,
        with one Philox block a draw: any subset is equally likely, the order is not.

        Args:
            users: integers [N], users that have a held-out item.
            num_negatives: items beside the held-out one, at least 0.
            seed: any integer in [0, 2^64).
            target: "test" or "valid": which held-out item is column 0.

        Returns:
            int64 [N, 1 + num_negatives].

        Raises:
            IndexError: a user out of range.
            ValueError: a user without held-out item, or with fewer than `num_negatives` unmet items.
        """
        given = np.asarray(users)
        if given.ndim != 1:
            raise ValueError(f"users: expected shape [N], got {list(given.shape)}")
        if given.dtype.kind not in "iu" and given.size:
            raise TypeError(f"users: expected integers, got {given.dtype}")
        if isinstance(num_negatives, bool) or operator.index(num_negatives) < 0:
            raise ValueError(f"num_negatives: expected an integer of at least 0, got {num_negatives!r}")
        if not 0 <= operator.index(seed) < 1 << 64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, got {seed}")
        if target not in ("test", "valid"):
            raise ValueError(f"target: expected 'test' or 'valid', got {target!r}")
        outside = np.flatnonzero((given < 0) | (given >= self.num_users))
        if len(outside):
            raise IndexError(f"users: expected 0 to {self.num_users - 1}, got {given[outside[0]]}")
        return self._candidates(given.astype(np.int64), num_negatives, seed, target)

    def check_candidates(
        self, users: IntArray, num_negatives: int, *, target: Literal["test", "valid"] = "test"
    ) -> None:
        """Raise the ValueError of `candidates` where it would, without drawing any."""
        missing = np.flatnonzero((self.test_items if target == "test" else self.valid_items)[users] < 0)
        if len(missing):
            user = users[missing[0]]
            raise ValueError(f"users: user {user} ({self.user_ids[user]!r}) has no {target} item")
        unmet = self._unmet(users)
        few = np.flatnonzero(unmet < num_negatives)
        if len(few):
            user = users[few[0]]
            advice = (
                f"expected at most {unmet.min()}, which every user has (in settings evaluation.num_negatives)"
            )
            if unmet.min() == 0:
                advice = "leave out who met every item, or take more items (items='all': the whole item file)"
            raise ValueError(
                f"num_negatives: user {user} ({self.user_ids[user]!r}) has {counted(unmet[few[0]], 'item')} "
                f"never met, fewer than num_negatives={num_negatives}; {advice}"
            )

    def _unmet(self, users: IntArray) -> IntArray:
        """How many items each of `users` [n] never met."""
        held = (self.valid_items[users] >= 0).astype(np.int64) + (self.test_items[users] >= 0)
        unmet: IntArray = self.num_items - (self.indptr[users + 1] - self.indptr[users]) - held
        return unmet

    def _candidates(
        self, users: IntArray, num_negatives: int, seed: int, target: Literal["test", "valid"]
    ) -> IntArray:
        self.check_candidates(users, num_negatives, target=target)
        out = np.empty((len(users), 1 + num_negatives), np.int64)
        out[:, 0] = (self.test_items if target == "test" else self.valid_items)[users]
        if num_negatives == 0:
            return out
        step = max(1, _CHUNK_DRAWS // num_negatives)
        for start in range(0, len(users), step):
            part = users[start : start + step]
            ranks = _distinct_ranks(part, self._unmet(part), num_negatives, seed)
            out[start : start + step, 1:] = self._unmet_items(part, ranks)
        return out

    def _unmet_items(self, users: IntArray, ranks: IntArray) -> IntArray:
        """The items at `ranks` [N, n] among the ascending items that each user never met: int64 [N, n]."""
        # In a user's ascending met items m_0 < m_1 < ..., the item of rank k lies behind every m_j with m_j -
        # j <= k. These keys never fall within a user; shifted by user they ascend over all users, and one
        # binary search serves all.
        indptr, met = self.met_rows(users)
        shift = np.arange(len(users)) * (self.num_items + 1)
        keys = met - np.arange(len(met)) + np.repeat(indptr[:-1] + shift, np.diff(indptr))
        below = np.searchsorted(keys, shift[:, None] + ranks, side="right")
        return ranks + (below - indptr[:-1, None])

    @cached_property
    def _positives(self) -> IntArray:
        keys = np.repeat(np.arange(self.num_users) * self.num_items, np.diff(self.indptr))
        base = keys.copy()
        keys += self.indices
        keys.sort()
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if len(twice):
            user, item = divmod(int(keys[twice[0]]), self.num_items)
            raise ValueError(f"indices: user {user} has item {item} twice")
        keys -= base
        return keys

    @cached_property
    def _met(self) -> tuple[IntArray, IntArray]:
        return self.met_rows(np.arange(self.num_users))


def as_series(ids: Sequence[str] | pl.Series) -> pl.Series:
    """External ids as a column, some at a time: as Python's strings they would take several times as much."""
    if isinstance(ids, pl.Series):
        return ids.rename("id")
    source = iter(ids)
    parts = iter(lambda: list(itertools.islice(source, _CHUNK_IDS)), [])
    return pl.concat([pl.Series("id", [], pl.String), *(pl.Series("id", part, pl.String) for part in parts)])


def numbers_of(ids: Sequence[str] | pl.Series, known: Sequence[str] | pl.Series) -> IntArray:
    """Places of external ids in `known`, int64 [n], -1 where they are not there.

    Raises ValueError where `known` has one twice.
    """
    table = as_series(known).to_frame().with_row_index("number")
    twice = table.filter(pl.col("id").is_duplicated())["id"]
    if len(twice):
        raise ValueError(f"ids: expected each once, got {twice[0]!r} twice")
    found = as_series(ids).to_frame().join(table, on="id", how="left", maintain_order="left")
    return found["number"].cast(pl.Int64).fill_null(-1).to_numpy().copy()


def popularity_scores(dataset: Dataset) -> FloatArray:
    """Training interactions of each item, float64 [I]: the popularity baseline, for any user."""
    return np.bincount(dataset.indices, minlength=dataset.num_items).astype(np.float64)


def _rows(indptr: IntArray, users: IntArray) -> tuple[IntArray, IntArray]:
    """Rows of a CSR: (their own indptr [n + 1], the places of their entries)."""
    start = indptr[users]
    counts = indptr[users + 1] - start
    own = np.concatenate([[0], np.cumsum(counts)])
    return own, np.arange(own[-1]) + np.repeat(start - own[:-1], counts)


def _distinct_ranks(users: IntArray, population: IntArray, count: int, seed: int) -> IntArray:
    """`count` distinct ranks in [0, population[n]) for each user, int64 [N, count]: Floyd's algorithm."""
    position = np.arange(count, dtype=np.int64)
    # draw i is uniform over the first population - count + i + 1 ranks
    last = (population - count) + position[:, None]
    draws = philox.integers(last + 1, seed, 0, users, position[:, None], philox.Purpose.EVALUATION_CANDIDATES)
    ranks = np.empty((count, len(users)), np.int64)
    for i in range(count):
        taken = (ranks[:i] == draws[i]).any(axis=0)
        ranks[i] = np.where(taken, last[i], draws[i])
    return ranks.T
