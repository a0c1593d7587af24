"""Dataset: its invariants, CSR forms, candidate lists and the popularity baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.data import Dataset, load_dataset, popularity_scores, save_dataset


def make(
    train: list[list[int]], test: list[int], num_items: int, valid: list[int] | None = None, **changes: Any
) -> Dataset:
    num_users = len(train)
    fields: dict[str, Any] = {
        "name": "small",
        "num_users": num_users,
        "num_items": num_items,
        "indptr": np.cumsum([0] + [len(items) for items in train]).astype(np.int64),
        "indices": np.array([i for items in train for i in items], np.int64),
        "test_items": np.array(test, np.int64),
        "valid_items": np.array(valid or [-1] * num_users, np.int64),
        "user_ids": [f"u{u}" for u in range(num_users)],
        "item_ids": [f"i{i}" for i in range(num_items)],
    }
    return Dataset(**fields | changes)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    num_items = draw(st.integers(3, 40))
    train, test, valid = [], [], []
    for _ in range(draw(st.integers(1, 6))):
        items = draw(st.lists(st.integers(0, num_items - 1), unique=True, min_size=1, max_size=num_items))
        test.append(items.pop() if len(items) > 1 and draw(st.booleans()) else -1)
        valid.append(items.pop() if len(items) > 1 and draw(st.booleans()) else -1)
        train.append(items)
    return make(train, test, num_items, valid)


def test_csr_forms() -> None:
    data = make([[5, 1, 3], [2], [], [4, 0]], [0, 5, 1, -1], 6, [2, -1, -1, 3])
    indptr, indices = data.positives()
    np.testing.assert_array_equal(indptr, [0, 3, 4, 4, 6])
    np.testing.assert_array_equal(indices, [1, 3, 5, 2, 0, 4])
    indptr, indices = data.met_csr()
    np.testing.assert_array_equal(indptr, [0, 5, 7, 8, 11])
    np.testing.assert_array_equal(indices, [0, 1, 2, 3, 5, 2, 5, 1, 0, 3, 4])
    np.testing.assert_array_equal(data.met(3), [0, 3, 4])
    np.testing.assert_array_equal(data.indices[:3], [5, 1, 3])  # the data set keeps its order in time
    assert data.num_interactions == 11
    np.testing.assert_array_equal(popularity_scores(data), [1, 1, 1, 1, 1, 1])
    with pytest.raises(IndexError, match="user: expected 0 to 3, got 4"):
        data.met(4)


@settings(deadline=None, max_examples=60)
@given(datasets(), st.integers(0, 2**64 - 1), st.data())
def test_candidates_are_distinct_and_unmet(data: Dataset, seed: int, choice: st.DataObject) -> None:
    users = np.flatnonzero(data.test_items >= 0)
    most = min((data.num_items - len(data.met(u)) for u in users), default=5)
    count = choice.draw(st.integers(0, most))
    rows = data.candidates(users, count, seed)
    assert rows.shape == (len(users), 1 + count)
    assert rows.dtype == np.int64
    for user, row in zip(users.tolist(), rows.tolist(), strict=True):
        assert row[0] == data.test_items[user]
        unmet = set(range(data.num_items)) - set(data.met(user).tolist())
        assert len(set(row[1:])) == count
        assert set(row[1:]) <= unmet
    # A row depends on its user alone: not on who else is asked, nor on the order.
    again = choice.draw(st.permutations(range(len(users))))
    np.testing.assert_array_equal(data.candidates(users[again], count, seed), rows[again])


def test_candidates_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make([[u % 7] for u in range(50)], [7 + u % 3 for u in range(50)], 30)
    whole = data.candidates(np.arange(50), 12, 3)
    monkeypatch.setattr("fedpeft_ext.data.dataset._CHUNK_DRAWS", 25)
    np.testing.assert_array_equal(data.candidates(np.arange(50), 12, 3), whole)
    assert (data.candidates(np.arange(50), 12, 4) != whole).any()


def test_candidates_are_uniform() -> None:
    # 5 of the 10 unmet items for each of 4,000 users: every item is drawn 2,000 times give or take, every
    # pair 889 times.
    num_users = 4000
    data = make([[0, 4, 11]] * num_users, [7] * num_users, 14)
    drawn = np.zeros((num_users, 14), np.int64)
    np.put_along_axis(drawn, data.candidates(np.arange(num_users), 5, 0)[:, 1:], 1, axis=1)
    pairs = drawn.T @ drawn
    unmet = np.setdiff1d(np.arange(14), [0, 4, 7, 11])
    assert (pairs[[0, 4, 7, 11]] == 0).all()
    counts = np.diag(pairs)[unmet]
    assert np.abs(counts - 2000).max() < 4.5 * np.sqrt(num_users * 0.25)
    above = pairs[np.ix_(unmet, unmet)][np.triu_indices(10, 1)]
    share = 5 * 4 / (10 * 9)
    assert np.abs(above - num_users * share).max() < 4.5 * np.sqrt(num_users * share * (1 - share))


def test_candidates_of_validation() -> None:
    data = make([[0], [1]], [2, 3], 8, [4, 5])
    rows = data.candidates([1, 0], 5, 9, target="valid")
    np.testing.assert_array_equal(rows[:, 0], [5, 4])
    assert set(rows[0, 1:].tolist()) == {0, 2, 4, 6, 7}
    # the same negatives for both targets: the metrics differ by the held-out item alone
    np.testing.assert_array_equal(data.candidates([1, 0], 5, 9)[:, 1:], rows[:, 1:])


@pytest.mark.parametrize(
    ("users", "count", "seed", "error", "message"),
    [
        ([0, 2], 1, 0, IndexError, "users: expected 0 to 1, got 2"),
        ([-1], 1, 0, IndexError, "users: expected 0 to 1, got -1"),
        ([1], 1, 0, ValueError, r"user 1 \('u1'\) has no test item"),
        ([0], 4, 0, ValueError, r"user 0 \('u0'\) has 3 items never met, fewer than num_negatives=4"),
        ([0], -1, 0, ValueError, "num_negatives: expected an integer of at least 0, got -1"),
        ([0], 1, -1, ValueError, "seed: expected"),
        ([0.0], 1, 0, TypeError, "users: expected integers, got float64"),
        ([[0]], 1, 0, ValueError, r"users: expected shape \[N\], got \[1, 1\]"),
    ],
)
def test_candidates_refuse(users: Any, count: int, seed: int, error: type[Exception], message: str) -> None:
    data = make([[0], [1]], [2, -1], 5)
    with pytest.raises(error, match=message):
        data.candidates(users, count, seed)


def test_no_users_give_no_rows() -> None:
    assert make([[0]], [1], 9).candidates([], 4).shape == (0, 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": np.array([0, 1], np.int32)}, TypeError, "indices: expected int64, got int32"),
        ({"indptr": np.array([0, 3], np.int64)}, ValueError, "indptr: expected offsets rising from 0 to 2"),
        ({"indices": np.array([0, 4], np.int64)}, IndexError, r"indices: expected items in \[0, 4\)"),
        ({"test_items": np.array([-2], np.int64)}, IndexError, r"test_items: expected items in \[-1, 4\)"),
        ({"test_items": np.array([1], np.int64)}, ValueError, "test_items: item 1 of user 0 is also one"),
        ({"valid_items": np.array([2], np.int64)}, ValueError, "valid_items: user 0 has the test item"),
        ({"user_ids": []}, ValueError, "user_ids: expected 1 entries, got 0"),
        ({"item_text": ["a"]}, ValueError, "item_text: expected 4 entries, got 1"),
        ({"num_users": 0}, ValueError, "at least one user"),
    ],
)
def test_parts_must_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make([[0, 1]], [2], 4, **changes)


def test_an_item_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="user 1 has item 2 twice"):
        make([[2], [2, 0, 2]], [3, 3], 4).positives()


def rows_by_id(data: Dataset) -> dict[str, list[str]]:
    """Each user's items, then validation and test item."""
    held = np.stack([data.valid_items, data.test_items], 1).tolist()
    rows = (
        data.indices[data.indptr[user] : data.indptr[user + 1]].tolist() for user in range(data.num_users)
    )
    names = [*data.item_ids, "none"]
    return {
        user: [names[item] for item in (*row, *kept)]
        for user, row, kept in zip(data.user_ids, rows, held, strict=True)
    }


@pytest.mark.parametrize("mapped", [False, True])
def test_some_users_alone_and_another_catalogue(tmp_path: Path, mapped: bool) -> None:
    whole: Dataset = load_dataset("synthetic", num_users=30, num_items=90, interactions_per_user=6)
    if mapped:
        save_dataset(whole, tmp_path / "mapped")
        whole = load_dataset(tmp_path / "mapped")
    users = [7, 3, 29]
    part = whole.of_users(users)
    assert type(part) is Dataset
    assert (part.num_users, part.num_items, part.user_ids) == (3, 90, ["u7", "u3", "u29"])
    assert rows_by_id(part) == {user: rows_by_id(whole)[user] for user in part.user_ids}
    assert part.item_text is not None
    assert list(part.item_text) == list(whole.item_text or [])

    order = np.random.default_rng(0).permutation(90)
    names = [*(whole.item_ids[item] for item in order), "unmet"]
    catalogue = make([[]], [-1], 91, name="other", item_ids=names)
    moved = whole.with_catalogue(catalogue)
    assert (moved.num_items, moved.item_ids, moved.item_text) == (91, catalogue.item_ids, None)
    assert rows_by_id(moved) == rows_by_id(whole)
    with pytest.raises(ValueError, match="items: 1 item of data set 'other' not in the catalogue of 'syn"):
        catalogue.with_catalogue(whole)


@pytest.mark.parametrize(
    ("users", "error", "message"),
    [
        ([], ValueError, "shape"),
        ([[0]], ValueError, "shape"),
        ([0.5], TypeError, "integers"),
        ([0, 30], IndexError, "expected 0 to 29, got 0 to 30"),
        ([-1], IndexError, "got -1"),
        ([4, 4], ValueError, "distinct"),
    ],
)
def test_users_who_are_not_there(users: Any, error: type[Exception], message: str) -> None:
    data = load_dataset("synthetic", num_users=30, num_items=90, interactions_per_user=6)
    with pytest.raises(error, match=message):
        data.of_users(users)
