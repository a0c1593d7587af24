"""The Philox generator: known answers, in NumPy and in PyTorch, and the distributions drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.ops import philox
from fedpeft_ext.ops._plain import philox_words
from fedpeft_ext.ops.philox import Purpose

# Random123, kat_vectors: philox4x32-10.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox.philox4x32(counter, key).tolist() == expected
    assert philox.philox4x32(counter, key).dtype == np.uint32
    position, client, round, stream = counter
    words = philox_words(key[1] << 32 | key[0], round, torch.tensor(client), torch.tensor(position), stream)
    assert words.tolist() == expected


def test_counters_broadcast() -> None:
    together = philox.philox4x32([k[0] for k in KNOWN], [k[1] for k in KNOWN])
    assert together.tolist() == [k[2] for k in KNOWN]


def test_words_place_their_arguments_in_the_counter() -> None:
    seed = 0x299F31D0A4093822
    got = philox.words(seed, 7, 8, 9, Purpose.DROPOUT, layer=3, epoch=5)
    expected = philox.philox4x32([9, 8, 7, 2 << 24 | 3 << 16 | 5], [0xA4093822, 0x299F31D0])
    assert got.tolist() == expected.tolist()


def test_draws_depend_on_their_own_arguments_alone() -> None:
    all_at_once = philox.uniform(1, 2, np.arange(50)[:, None], np.arange(20), Purpose.NOISE)
    alone = philox.uniform(1, 2, 17, 5, Purpose.NOISE)
    assert all_at_once.shape == (50, 20)
    assert float(all_at_once[17, 5]) == float(alone)
    for changed in (
        philox.uniform(2, 2, 17, 5, Purpose.NOISE),
        philox.uniform(1, 3, 17, 5, Purpose.NOISE),
        philox.uniform(1, 2, 17, 5, Purpose.DROPOUT),
        philox.uniform(1, 2, 17, 5, Purpose.NOISE, layer=1),
        philox.uniform(1, 2, 17, 5, Purpose.NOISE, epoch=1),
        philox.uniform(1 + 2**32, 2, 17, 5, Purpose.NOISE),
    ):
        assert float(changed) != float(alone)


def test_distributions() -> None:
    """Means and variances of 10^5 draws within five standard errors."""
    n = 100_000
    position = np.arange(n)
    uniform = philox.uniform(3, 0, 0, position, Purpose.NOISE)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 5 / np.sqrt(12 * n)
    for normal in (
        philox.normal(3, 0, 0, position, Purpose.NOISE),
        philox.normals(n, 3, 0, 0, Purpose.NOISE),
    ):
        assert normal.dtype == np.float64
        assert abs(normal.mean()) < 5 / np.sqrt(n)
        assert abs(normal.var() - 1) < 5 * np.sqrt(2 / n)
        assert abs((normal**3).mean()) < 5 * np.sqrt(15 / n)
        assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 5 / np.sqrt(n)
    counts = np.bincount(philox.integers(10, 3, 0, 0, position, Purpose.NOISE), minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - n / 10).max() < 5 * np.sqrt(n * 0.09)


def test_many_normals_start_with_the_same_ones() -> None:
    assert np.array_equal(
        philox.normals(7, 1, 0, 0, Purpose.NOISE), philox.normals(100, 1, 0, 0, Purpose.NOISE)[:7]
    )
    assert philox.normals(0, 1, 0, 0, Purpose.NOISE).shape == (0,)


@settings(deadline=None, max_examples=100)
@given(a=st.integers(0, 2**64 - 1), b=st.integers(0, 2**64 - 1))
def test_multiply_high_equals_python_integers(a: int, b: int) -> None:
    assert (
        int(philox.multiply_high(np.array(a, dtype=np.uint64), np.array(b, dtype=np.uint64))) == a * b >> 64
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2**64, 0, 0, 0), ValueError, "seed: expected 0 to 2.64 - 1"),
        ((-1, 0, 0, 0), ValueError, "seed: expected"),
        ((0, 2**32, 0, 0), ValueError, "round: expected 0 to 2.32 - 1"),
        ((0, 0, -1, 0), ValueError, "client: expected"),
        ((0, 0, 0, np.array([0, 2**32])), ValueError, "position: expected"),
        ((0, 0, 0, np.array([0.5])), TypeError, "position: expected integers, got float64"),
    ],
)
def test_bad_counters(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        philox.words(*arguments, Purpose.NOISE)  # type: ignore[arg-type]


def test_bad_streams() -> None:
    with pytest.raises(ValueError, match="layer: expected"):
        philox.words(0, 0, 0, 0, Purpose.NOISE, layer=256)
    with pytest.raises(ValueError, match="epoch: expected"):
        philox.words(0, 0, 0, 0, Purpose.NOISE, epoch=2**16)
    with pytest.raises(ValueError, match="high: expected"):
        philox.integers(0, 0, 0, 0, 0, Purpose.NOISE)
    with pytest.raises(ValueError, match="count: expected"):
        philox.normals(-1, 0, 0, 0, Purpose.NOISE)
