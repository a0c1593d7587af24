"""Synthetic data: reproducible, of the asked size, with preferences that popularity cannot tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.data import Dataset, SyntheticDataset, load_dataset, popularity_scores, synthetic_dataset


def hit_rate(scores: np.ndarray[Any, Any], k: int = 10) -> float:
    """HR@k with the test item in column 0, half of the ties ahead of it."""
    ahead = (scores[:, 1:] > scores[:, :1]).sum(axis=1) + 0.5 * (scores[:, 1:] == scores[:, :1]).sum(axis=1)
    return float((ahead < k).mean())


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 40),
    st.integers(4, 60),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 3),
    st.integers(1, 5),
    st.integers(0, 2**40),
    st.booleans(),
)
def test_every_shape_is_well_formed(
    users: int,
    items: int,
    fill: float,
    noise: float,
    popularity: float,
    liked: int,
    seed: int,
    validation: bool,
) -> None:
    mean = 2 + fill * (items / 2 - 2)
    options: dict[str, Any] = {
        "noise": noise,
        "popularity": popularity,
        "clusters_per_user": liked,
        "seed": seed,
    }
    data = synthetic_dataset(users, items, mean, validation=validation, **options)
    # Dataset checks ranges and leaks; positives() refuses an item that a user has twice.
    indptr, _ = data.positives()
    assert (np.diff(indptr) >= 1).all()
    assert (data.test_items >= 0).all()
    per_user = np.diff(data.met_csr()[0])
    assert (per_user >= 2).all()
    assert per_user.max() <= items // 2
    assert ((data.valid_items >= 0) == (validation & (per_user > 2))).all()
    again = synthetic_dataset(users, items, mean, validation=validation, **options)
    np.testing.assert_array_equal(again.indices, data.indices)
    assert again.item_text == data.item_text


def test_planted_preferences_beat_popularity() -> None:
    data = synthetic_dataset(800, 600, 25, seed=3)
    users = np.arange(data.num_users)
    rows = data.candidates(users, 99, seed=1)
    popular = hit_rate(popularity_scores(data)[rows])
    best = hit_rate(data.planted.preferences(users, rows))
    factors = np.einsum("ud,upd->up", data.planted.user_factors, data.planted.item_factors[rows])
    assert popular < 0.25
    assert best > 0.8
    assert hit_rate(factors) > 0.5


def test_preferences_are_what_is_drawn() -> None:
    data = synthetic_dataset(3000, 60, 4, seed=1, noise=0.3, popularity=1.0, num_clusters=6)
    users = np.arange(data.num_users)
    everything = np.tile(np.arange(data.num_items), (data.num_users, 1))
    rates = data.planted.preferences(users, everything)
    np.testing.assert_allclose(rates.sum(axis=1), 1)
    drawn = np.zeros((data.num_users, data.num_items))
    indptr, items = data.met_csr()
    drawn[np.repeat(users, np.diff(indptr)), items] = 1
    # Expected draws of each item over all users against those drawn; distinctness flattens the most popular a
    # little.
    expected = (rates * np.diff(indptr)[:, None]).sum(axis=0)
    assert np.corrcoef(expected, drawn.sum(axis=0))[0, 1] > 0.95
    inside = (data.planted.item_clusters[None, :, None] == data.planted.user_clusters[:, None, :]).any(axis=2)
    assert (drawn * ~inside).sum() / drawn.sum() == pytest.approx(0.3, abs=0.05)


def test_text_tells_the_cluster() -> None:
    data = synthetic_dataset(20, 300, 8)
    assert data.item_text is not None
    for text, cluster in zip(data.item_text, data.planted.item_clusters.tolist(), strict=True):
        words = text.split()
        assert len(words) == 10
        assert sum(word.startswith(f"topic{cluster}word") for word in words) == 5
    assert synthetic_dataset(20, 300, 8, item_text=False).item_text is None


def test_activity_varies_around_the_mean() -> None:
    per_user = np.diff(synthetic_dataset(4000, 2000, 20, item_text=False).met_csr()[0])
    assert per_user.mean() == pytest.approx(20, rel=0.03)
    assert per_user.std() > 8
    assert per_user.min() == 2


def test_load_by_name() -> None:
    data = load_dataset("synthetic", num_users=30, num_items=50, interactions_per_user=5, seed=2)
    assert isinstance(data, SyntheticDataset)
    assert isinstance(data, Dataset)
    assert (data.num_users, data.num_items, data.name) == (30, 50, "synthetic")
    other = load_dataset("synthetic", num_users=30, num_items=50, interactions_per_user=5, seed=3)
    assert other.indices.tolist() != data.indices.tolist()


def test_a_large_catalogue_takes_no_user_times_item_memory() -> None:
    # users x items would be 2 * 10^10 cells
    data = synthetic_dataset(20_000, 1_000_000, 5, item_text=False)
    assert data.num_interactions == pytest.approx(100_000, rel=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_users": 0}, ValueError, "num_users: expected at least 1, got 0"),
        ({"num_items": 3}, ValueError, "num_items: expected at least 4, got 3"),
        ({"num_items": 1.5}, TypeError, "num_items: expected an integer, got 1.5"),
        ({"interactions_per_user": 1}, ValueError, "interactions_per_user: expected 2 to 500.0, got 1"),
        (
            {"interactions_per_user": "many"},
            TypeError,
            "interactions_per_user: expected a number, got 'many'",
        ),
        ({"noise": 1.5}, ValueError, "noise: expected 0 to 1, got 1.5"),
        ({"noise": float("nan")}, ValueError, "noise: expected 0 to 1, got nan"),
        ({"popularity": -1}, ValueError, "popularity: expected 0 to 100, got -1"),
        ({"num_clusters": 501}, ValueError, "num_clusters: expected at most num_items / 2 = 500, got 501"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"item_text": 1}, TypeError, "item_text: expected true or false, got 1"),
        ({"noises": 0.1}, TypeError, "no option 'noises'; did you mean 'noise'"),
        ({"num_user": 5}, TypeError, "no option 'num_user'; did you mean 'num_users'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset("synthetic", **options)
