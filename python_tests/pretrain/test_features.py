"""Item features from text and from files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedpeft_ext.pretrain import TfidfEncoder, load_features, text_features
from fedpeft_ext.pretrain.features import TextFeatures, check_features, fit_text_features

TEXTS = [
    "Toy Story 1995 Animation Children's Comedy",
    "Toy Story 2 1999 Animation Children's Comedy",
    "Alien 1979 Sci-Fi Horror",
    "Aliens 1986 Sci-Fi Action",
    "Heat 1995 Crime Thriller",
]


def test_rows_are_unit_vectors_and_similar_items_are_near() -> None:
    features = text_features(TEXTS)
    assert features.dtype == np.float32
    assert len(features) == len(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    similarity = features @ features.T
    assert similarity[0, 1] > similarity[0, 4] > -0.1
    assert similarity[2, 3] > similarity[2, 0]


def test_genres_years_and_single_digits_stay_whole() -> None:
    vocabulary = TfidfEncoder.fit(TEXTS).vocabulary
    assert {"sci-fi", "children's", "1995", "2", "toy story"} <= set(vocabulary)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.lists(st.text(alphabet="ab c1é-'", max_size=12), min_size=1, max_size=12),
    st.integers(min_value=1, max_value=20),
)
@settings(deadline=None, max_examples=40)
def test_any_catalogue(texts: list[str], dim: int) -> None:
    if not any(character.isalnum() for text in texts for character in text):
        with pytest.raises(ValueError, match="texts"):
            text_features(texts, dim=dim)
        return
    features = text_features(texts, dim=dim)
    assert features.shape[0] == len(texts)
    assert 1 <= features.shape[1] <= min(dim, len(texts))
    assert np.isfinite(features).all()


def test_same_seed_same_bits_whatever_the_global_state() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([f"w{i}" for i in range(60)], 6)) for _ in range(80)]
    first = text_features(texts, dim=10, seed=3)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    np.testing.assert_array_equal(text_features(texts, dim=10, seed=3), first)


def test_items_without_text_get_the_mean_direction_and_are_counted() -> None:
    with pytest.warns(UserWarning, match="2 of 7 items have no usable text"):
        features = text_features([*TEXTS, "", "  "])
    mean = features[: len(TEXTS)].mean(axis=0)
    np.testing.assert_allclose(features[-1], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_array_equal(features[-1], features[-2])


def test_later_items_get_the_features_of_the_fitted_catalogue() -> None:
    encoder = TfidfEncoder.fit(TEXTS)
    known, unknown = encoder.transform(TEXTS)
    np.testing.assert_allclose(known, text_features(TEXTS), atol=1e-6)
    assert unknown == 0
    later, unknown = encoder.transform(["Toy Story 3 2010 Animation", "zzz"])
    assert unknown == 1
    assert (later[0] @ known.T).argmax() in (0, 1)
    np.testing.assert_array_equal(later[1], encoder.mean)


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        (None, ValueError, r"no item text.*features file.*random"),
        (["", " "], ValueError, r"expected text of at least one item, got 2 empty.*features file"),
        (["--", "!"], ValueError, "expected words in at least one item"),
        ("one string", TypeError, "got a single string"),
        (["a", None], TypeError, "got NoneType at item row 1"),
    ],
)
def test_no_text(texts: list[str], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        text_features(texts)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="method: expected 'tfidf' or 'sentence-transformers', got 'bert'"):
        text_features(TEXTS, method="bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        text_features(TEXTS, dim=0)


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="sentence-transformers is installed"
)
def test_missing_sentence_transformers_names_the_command() -> None:
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        text_features(TEXTS, method="sentence-transformers")


def test_sentence_vectors_are_normalised_and_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            assert name == "a-model"

        def encode(self, texts: list[str], **options: object) -> np.ndarray:
            return np.array([[len(text), 1.0, 0.0] for text in texts], dtype=np.float64)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with pytest.warns(UserWarning, match="1 of 3"):
        features = text_features(["a", "", "bbb"], method="sentence-transformers", model="a-model")
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(features[0], np.array([1, 1, 0]) / np.sqrt(2), rtol=1e-6)
    # Later ones the same, by what is kept of it, also where none has text.
    with pytest.warns(UserWarning, match="1 of 3"):
        fitted = fit_text_features(["a", "", "bbb"], method="sentence-transformers", model="a-model")
    kept = TextFeatures.from_tensors(*fitted.to_tensors()).encoder
    np.testing.assert_array_equal(kept.transform(["bbb", " "])[0], features[[2, 1]])
    assert kept.transform([""])[1] == 1
    np.testing.assert_array_equal(kept.transform([""])[0], features[[1]])


def test_load_npy_and_safetensors(tmp_path: Path) -> None:
    expected = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "f.npy", expected)
    save_file({"features": torch.from_numpy(expected), "other": torch.zeros(1)}, tmp_path / "f.safetensors")
    save_file({"x": torch.from_numpy(expected).to(torch.bfloat16)}, tmp_path / "g.safetensors")
    for name in ("f.npy", "f.safetensors", "g.safetensors"):
        features = load_features(tmp_path / name, num_items=3)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, expected)


def test_load_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found none at"):
        load_features(tmp_path / "no.npy")
    (tmp_path / "f.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"expected a \.npy or \.safetensors file"):
        load_features(tmp_path / "f.csv")
    for name in ("bad.npy", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"\x00" * 64)
        with pytest.raises(ValueError, match="not a readable"):
            load_features(tmp_path / name)
    np.savez(tmp_path / "several.npz", a=np.zeros((2, 2)))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04" + b"\x00" * 60)
    for name in ("several.npy", "zip.npy"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable \.npy file"):
            load_features(tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{}, {}]))
    with pytest.raises(ValueError, match="not a readable"):
        load_features(tmp_path / "objects.npy")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"named 'features'.*\['a', 'b'\]"):
        load_features(tmp_path / "two.safetensors")
    np.save(tmp_path / "rows.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match="each of the 4 items, got 3 rows"):
        load_features(tmp_path / "rows.npy", num_items=4)


@given(st.integers(0, 4), st.integers(0, 2), st.sampled_from([np.nan, np.inf, -np.inf, 1e300]))
@settings(deadline=None, max_examples=20)
def test_values_that_are_not_finite_name_the_row(row: int, column: int, value: float) -> None:
    array = np.zeros((5, 3))
    array[row, column] = value
    with pytest.raises(
        ValueError, match=rf"features: expected finite.*item row {row}, column {column} \(1 of 5"
    ):
        check_features(array)


@pytest.mark.parametrize(
    ("array", "error", "match"),
    [
        (np.zeros(3), ValueError, r"expected shape \[items, F\].*got \[3\]"),
        (np.zeros((0, 3)), ValueError, r"got \[0, 3\]"),
        (np.zeros((3, 0)), ValueError, r"got \[3, 0\]"),
        (np.array([["a"]]), TypeError, "expected numbers"),
        (np.zeros((2, 2), dtype=complex), TypeError, "expected numbers"),
    ],
)
def test_shapes_and_dtypes(array: np.ndarray, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_features(array)
