"""Semantic codes by RQ-VAE and by residual k-means."""

from __future__ import annotations

import csv
import io
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.pretrain import (
    PretrainedCodes,
    load,
    pretrain_codes,
    residual_kmeans_codes,
    save,
    text_features,
)
from fedpeft_ext.pretrain.codes import encode, partial_sums, smallest_dtype

Data = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
OPTIONS: dict[str, Any] = {"dim": 8, "levels": 3, "codebook_size": 16, "epochs": 25, "batch_size": 64}


def same(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether two different items share a label [I, I]."""
    equal: npt.NDArray[np.bool_] = labels[:, None] == labels[None]
    np.fill_diagonal(equal, False)
    return equal


@pytest.fixture(scope="module")
def trained(data: Data) -> PretrainedCodes:
    return pretrain_codes(data[0], **OPTIONS)


@pytest.fixture(scope="module", params=["rq-vae", "rq-kmeans"])
def result(request: pytest.FixtureRequest, data: Data, trained: PretrainedCodes) -> PretrainedCodes:
    return trained if request.param == "rq-vae" else residual_kmeans_codes(data[0], 3, 16)


def test_shapes_dtypes_and_figures(data: Data, result: PretrainedCodes) -> None:
    assert result.codes.shape == (len(data[0]), 3)
    assert result.codes.dtype == torch.uint8
    assert result.codebooks.shape[:2] == (3, 16)
    assert result.codebooks.dtype == torch.float32
    counts = torch.bincount(result.codes[:, 1].long(), minlength=16).double()
    share = counts[counts > 0] / counts.sum()
    assert result.usage[1] == int((counts > 0).sum()) / 16
    assert result.perplexity[1] == pytest.approx(float((-(share * share.log()).sum()).exp()))
    rows = [tuple(row) for row in result.codes.tolist()]
    assert result.collision_rate == pytest.approx(sum(rows.count(row) > 1 for row in rows) / len(rows))


def test_error_falls_with_levels_and_codes_are_used(result: PretrainedCodes) -> None:
    assert all(later < earlier for earlier, later in pairwise(result.quantization_error))
    assert all(later < earlier for earlier, later in pairwise(result.reconstruction_error))
    assert result.quantization_error[-1] < 0.1
    assert result.reconstruction_error[-1] < 0.3
    assert min(result.usage) > 0.5
    assert result.collision_rate < 0.6


def test_first_codes_agree_with_clusters_far_more_than_chance(data: Data, result: PretrainedCodes) -> None:
    labels = data[1]
    clusters = len(np.unique(labels))
    shared = same(result.codes[:, 0].numpy())
    assert same(labels)[shared].mean() > 0.9  # chance: 1 / clusters
    shuffled = same(np.random.default_rng(0).permutation(result.codes[:, 0].numpy()))
    assert same(labels)[shuffled].mean() < 2 / clusters


def test_encoding_again_and_a_slice_gives_the_same_codes(data: Data, result: PretrainedCodes) -> None:
    assert torch.equal(result.encode_new(data[0]), result.codes)
    assert (
        result.encode_new(data[0][:50]) == result.codes[:50]
    ).float().mean() > 0.99  # another batch may break ties
    nearby = result.encode_new(data[0] + 1e-3)
    assert (nearby[:, 0] == result.codes[:, 0]).float().mean() > 0.95


def test_codes_are_greedy(data: Data, trained: PretrainedCodes) -> None:
    assert trained.encoder is not None
    residual = trained.encoder(data[0])
    assert abs(float(residual.square().mean().sqrt()) - 0.1) < 1e-4
    for codebook, level in zip(trained.codebooks, trained.codes.long().unbind(1), strict=True):
        distances = torch.cdist(residual.double(), codebook.double())
        chosen = distances.gather(1, level[:, None])[:, 0]
        torch.testing.assert_close(chosen, distances.amin(1), rtol=1e-4, atol=1e-6)
        residual = residual - codebook[level]
    left = float(residual.square().sum())
    total = float(trained.encoder(data[0]).square().sum())
    assert trained.quantization_error[-1] == pytest.approx(left / total, rel=1e-3)


def test_codes_do_not_depend_on_scale(data: Data, trained: PretrainedCodes) -> None:
    raw = pretrain_codes(data[0], scale=None, **OPTIONS)
    assert (raw.codes == trained.codes).float().mean() > 0.99  # rounding may break ties
    assert raw.quantization_error == pytest.approx(trained.quantization_error, rel=1e-3)


def test_a_function_of_its_arguments_alone(data: Data) -> None:
    options: dict[str, Any] = {**OPTIONS, "epochs": 2}
    threads = torch.get_num_threads()
    first = [pretrain_codes(data[0], **options), residual_kmeans_codes(data[0], 2, 16)]
    torch.manual_seed(99)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    try:
        torch.set_num_threads(threads % 2 + 1)
        with torch.no_grad():
            second = [pretrain_codes(data[0], **options), residual_kmeans_codes(data[0], 2, 16)]
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.codebooks, two.codebooks)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert not torch.equal(first[0].codes, pretrain_codes(data[0], seed=1, **options).codes)


def test_round_trip(data: Data, result: PretrainedCodes, tmp_path: Path) -> None:
    save(tmp_path / "codes.safetensors", result)
    again = load(tmp_path / "codes.safetensors", PretrainedCodes)
    assert torch.equal(again.codes, result.codes)
    assert again.codes.dtype == result.codes.dtype
    assert torch.equal(again.codebooks, result.codebooks)
    assert torch.equal(again.encode_new(data[0]), result.codes)
    for name in (
        "usage",
        "perplexity",
        "collision_rate",
        "quantization_error",
        "reconstruction_error",
        "usable_rows",
    ):
        assert getattr(again, name) == getattr(result, name)


@pytest.mark.parametrize("method", ["rq-vae", "rq-kmeans"])
def test_fewer_items_than_codes(method: Any) -> None:
    features = np.random.default_rng(0).normal(size=(10, 6))
    with pytest.warns(UserWarning, match="10 different items cannot train 300 codes a level"):
        result = pretrain_codes(features, dim=6, codebook_size=300, levels=2, method=method, epochs=3)
    assert result.codes.dtype == torch.int16
    assert result.codebooks.shape == (2, 300, 6)
    assert result.usable_rows == 10
    assert int(result.codes.max()) < 10
    assert not result.codebooks[:, 10:].any()
    assert torch.equal(result.encode_new(features), result.codes)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 14), st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=15)
def test_small_shapes(items: int, width: int, size: int, levels: int, repeated: bool) -> None:
    features = np.random.default_rng(items).normal(size=(items, width))
    if repeated:
        features[:] = features[0]
    for method in ("rq-vae", "rq-kmeans"):
        result = pretrain_codes(
            features, dim=width, levels=levels, codebook_size=size, method=method, epochs=2, batch_size=5
        )
        assert result.codes.shape == (items, levels)
        assert result.codebooks.shape == (levels, size, width)
        assert torch.isfinite(result.codebooks).all()
        assert int(result.codes.max()) < result.usable_rows <= size
        if repeated:
            assert result.collision_rate == 1.0


def test_smallest_dtype() -> None:
    expected = {256: torch.uint8, 257: torch.int16, 32768: torch.int16, 32769: torch.int32}
    assert {size: smallest_dtype(size) for size in expected} == expected


def test_partial_sums_of_exact_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    # Levels of falling size, so that the greedy choice is the planted one.
    codebooks = torch.randn(3, 5, 4, generator=generator) * torch.tensor([100.0, 1.0, 0.01])[:, None, None]
    codes = torch.randint(5, (20, 3), generator=generator)
    sums = partial_sums(codes, codebooks)
    expected = sum(codebooks[level][codes[:, level]] for level in range(3))
    torch.testing.assert_close(sums[-1], expected)
    assert torch.equal(encode(sums[-1], codebooks).long()[:, 0], codes[:, 0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": 0}, "levels: expected at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size: expected between 1 and"),
        ({"beta": -1.0}, "beta"),
        ({"method": "vq"}, "method: expected 'rq-vae' or 'rq-kmeans', got 'vq'"),
        ({"method": "rq-kmeans", "dim": 2}, "dim: expected the width of the features, 3"),
        ({"batch_size": 1}, "batch_size"),
        ({"lr": 1e30}, "diverged"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    features = np.random.default_rng(0).normal(size=(40, 3))
    with pytest.raises(ValueError, match=match):
        pretrain_codes(features, **{"codebook_size": 4, "epochs": 3, **options})


def test_wrong_features() -> None:
    features = np.zeros((4, 3))
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="item row 2"):
        pretrain_codes(features)
    with pytest.raises(ValueError, match=r"vectors: .*item row 2"):
        residual_kmeans_codes(features)
    with pytest.raises(ValueError, match="at least 2 items"):
        pretrain_codes(np.zeros((1, 3)))


def test_movielens_first_codes_carry_genres() -> None:
    wheels = sorted((Path(__file__).parents[2] / ".cache").glob("recbole-*.whl"))
    if not wheels:
        pytest.skip("the RecBole wheel with ML-100K is not in .cache (make demo fetches it)")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        text = wheel.read("recbole/dataset_example/ml-100k/ml-100k.item").decode()
    items = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))[:600]
    genres = np.array([item["class:token_seq"] for item in items])
    features = text_features([" ".join(list(item.values())[1:]) for item in items], dim=64)
    result = pretrain_codes(features, codebook_size=32, epochs=15)
    by_chance = same(genres).mean()
    shared = same(genres)[same(result.codes[:, 0].numpy())].mean()
    assert shared > 3 * by_chance
