"""Full embeddings by AutoEncoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.pretrain import AutoEncoder, PretrainedFull, load, pretrain_full, save
from fedpeft_ext.pretrain.encoder import Plateau, Standardize, isolated, layer_sizes

Data = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@pytest.mark.parametrize(
    ("features", "dim", "expected"),
    [
        (768, 32, [768, 512, 256, 128, 32]),  # the paper's
        (256, 32, [256, 256, 128, 32]),
        (20, 32, [20, 32, 32]),
        (20, 8, [20, 20, 8]),
        (1, 1, [1, 1, 1]),
    ],
)
def test_layer_sizes(features: int, dim: int, expected: list[int]) -> None:
    assert layer_sizes(features, dim, (512, 256, 128)) == expected
    model = AutoEncoder(features, dim)
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert [layer.in_features for layer in linear] == expected[:-1] + expected[:0:-1]
    assert model(torch.zeros(3, features)).shape == (3, features)


def test_learns_scales_and_separates(data: Data) -> None:
    features, labels = data
    result = pretrain_full(features, dim=8, epochs=60, batch_size=64)
    embedding = result.embedding
    assert embedding.dtype == torch.float32
    assert embedding.shape == (len(features), 8)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert result.explained_variance > 0.85
    torch.testing.assert_close(embedding.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert abs(float(embedding.square().mean().sqrt()) - 0.1) < 1e-4
    distances = torch.cdist(embedding, embedding).fill_diagonal_(torch.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 0.95


def test_scale_none_and_other_scales_differ_by_shift_and_factor(data: Data) -> None:
    features, _ = data
    options = {"dim": 4, "epochs": 3, "seed": 5}
    raw = pretrain_full(features, scale=None, **options).embedding  # type: ignore[arg-type]
    scaled = pretrain_full(features, scale=2.0, **options).embedding  # type: ignore[arg-type]
    centred = raw - raw.mean(0)
    torch.testing.assert_close(scaled, 2.0 * centred / centred.square().mean().sqrt(), rtol=1e-4, atol=1e-4)


def test_a_function_of_its_arguments_alone(data: Data) -> None:
    features, _ = data
    options = {"dim": 4, "epochs": 2, "batch_size": 50}
    first = pretrain_full(features, **options).embedding  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    try:
        torch.set_num_threads(threads % 2 + 1)
        torch.set_default_dtype(torch.float64)
        with torch.no_grad():
            second = pretrain_full(torch.from_numpy(features), **options).embedding  # type: ignore[arg-type]
        with torch.inference_mode():
            third = pretrain_full(features.astype(np.float64), **options).embedding  # type: ignore[arg-type]
        assert torch.get_num_threads() == threads % 2 + 1
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, pretrain_full(features, seed=1, **options).embedding)  # type: ignore[arg-type]


def test_stops_on_a_plateau(data: Data) -> None:
    features, _ = data
    result = pretrain_full(features, dim=4, epochs=50, lr=1e-9, patience=3)
    assert len(result.losses) == 4


def test_later_items_and_round_trip(data: Data, tmp_path: Path) -> None:
    features, _ = data
    result = pretrain_full(features, dim=4, epochs=3)
    state = torch.get_rng_state()
    torch.testing.assert_close(result.encode_new(features[:7]), result.embedding[:7], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    save(tmp_path / "full.safetensors", result)
    again = load(tmp_path / "full.safetensors", PretrainedFull)
    assert torch.equal(again.embedding, result.embedding)
    assert again.losses == result.losses
    assert again.explained_variance == result.explained_variance
    assert torch.equal(again.encode_new(features), result.encode_new(features))
    with pytest.raises(ValueError, match=r"features: expected shape \[N, 24\], got \[2, 3\]"):
        result.encode_new(np.zeros((2, 3)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None, max_examples=15)
def test_small_shapes(items: int, width: int, dim: int) -> None:
    features = np.random.default_rng(items).normal(size=(items, width))
    result = pretrain_full(features, dim=dim, epochs=2, batch_size=4)
    assert result.embedding.shape == (items, dim)
    assert torch.isfinite(result.embedding).all()


def test_items_that_are_all_the_same_warn() -> None:
    with pytest.warns(UserWarning, match="all items have the same features"):
        result = pretrain_full(np.full((5, 3), 0.1), dim=2, epochs=1)
    assert torch.equal(result.embedding, torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"lr": float("nan")}, "lr: expected a positive number, got nan"),
        ({"scale": 0.0}, "scale: expected a positive number or None"),
        ({"hidden": (0,)}, "hidden"),
        ({"threads": 0}, "threads"),
        ({"lr": 1e30}, "diverged"),
    ],
)
def test_wrong_options(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pretrain_full(np.random.default_rng(0).normal(size=(40, 3)), **{"epochs": 3, **options})  # type: ignore[arg-type]


def test_standardize() -> None:
    array = np.random.default_rng(0).normal(5, 3, size=(50, 4)).astype(np.float32)
    values = Standardize.fit(array)(torch.from_numpy(array))
    torch.testing.assert_close(values.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    assert abs(float(values.square().mean()) - 1) < 1e-5


def test_plateau() -> None:
    plateau = Plateau(patience=2, tolerance=0.1)
    assert [plateau.reached(loss) for loss in (1.0, 0.95, 0.8, 0.79, 0.78)] == [
        False,
        False,
        False,
        False,
        True,
    ]


def test_isolated_gives_the_state_back_after_an_error() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()

    def fail() -> None:
        with isolated(3, threads=1):
            torch.rand(5)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
