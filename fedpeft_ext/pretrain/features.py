"""Item features [I, F] from item text, or read from a file.

The default is TF-IDF over words and word pairs, reduced by a truncated singular value decomposition (latent
semantic analysis, Deerwester et al., 1990): seconds on one core, and no model to fetch. Sentence embeddings
are an extra.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .encoder import isolated

Features = npt.NDArray[np.float32]
FeatureMethod = Literal["tfidf", "sentence-transformers"]

# The paper's model; 768 wide.
DEFAULT_TEXT_MODEL = "sentence-transformers/sentence-t5-base"

# Keeps "Sci-Fi", "Children's" and the 2 of "Toy Story 2", which scikit-learn's own pattern splits or drops.
_TOKEN = r"(?u)\w+(?:['’-]\w+)*"
_MAX_TERMS = 1 << 16

_NO_TEXT = (
    "the data set has no item text to make features from; give a features file (.npy, .safetensors) or "
    "features='random' for a random base (in settings pretrain.features), or an embedding that needs no item "
    "features (c-lora, c-hash)"
)

_DAMAGED = (ValueError, EOFError, SyntaxError, TokenError, OverflowError, MemoryError)
"""What NumPy raises on a damaged header, which it parses as Python, or on one of an impossible size."""


@dataclass(frozen=True)
class TfidfEncoder:
    """TF-IDF and SVD fitted to a catalogue; `transform` gives items that arrive later the same features.

    Attributes:
        vocabulary: the V terms.
        idf: float64 [V], inverse document frequencies.
        components: float32 [F, V], right singular vectors.
        mean: float32 [F], the direction of the mean item (unit length, or zero), which items without any
            known term get.
    """

    vocabulary: tuple[str, ...]
    idf: npt.NDArray[np.float64]
    components: Features
    mean: Features

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 256, seed: int = 0) -> TfidfEncoder:
        """Fit to one text per item. F = min(dim, rank of the TF-IDF matrix).

        Raises:
            ValueError: no item has text, or `dim` is below 1.
            TypeError: an item's text is not a string.
        """
        from sklearn.utils.extmath import randomized_svd  # type: ignore[import-untyped]

        check_texts(texts)
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        vectorizer = _vectorizer(max_features=_MAX_TERMS)
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError as error:  # "empty vocabulary"
            raise ValueError(f"texts: expected words in at least one item, found none; {_NO_TEXT}") from error
        with isolated(seed):
            _, values, components = randomized_svd(matrix, min(dim, *matrix.shape), random_state=seed)
        rank = max(1, int((values > 1e-5 * values[0]).sum()))
        components = np.ascontiguousarray(components[:rank], dtype=np.float32)
        known = _unit_rows(matrix @ components.T)
        return cls(
            tuple(vectorizer.get_feature_names_out().tolist()),
            np.asarray(vectorizer.idf_, dtype=np.float64),
            components,
            _unit_rows(known.mean(axis=0, keepdims=True))[0],
        )

    def transform(self, texts: Sequence[str]) -> tuple[Features, int]:
        """Unit features float32 [I, F], and how many items had no known term and got the mean direction."""
        check_strings(texts)
        vectorizer = _vectorizer(vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        matrix = vectorizer.transform(texts)
        features = _unit_rows(matrix @ self.components.T)
        unknown = ~features.any(axis=1)
        features[unknown] = self.mean
        return features, int(unknown.sum())

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal encoder."""
        arrays = {"idf": self.idf, "components": self.components, "mean": self.mean}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors, {"vocabulary": list(self.vocabulary)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> TfidfEncoder:
        arrays = (tensors[name].numpy() for name in ("idf", "components", "mean"))
        return cls(tuple(meta["vocabulary"]), *arrays)


@dataclass(frozen=True)
class SentenceEncoder:
    """A sentence-transformers model on a catalogue; `transform` gives items that arrive later such features.

    Attributes:
        model: name or folder.
        mean: float32 [F], the direction of the mean item (unit length, or zero), which items without text
            get.
    """

    model: str
    mean: Features

    def transform(self, texts: Sequence[str]) -> tuple[Features, int]:
        """Unit features float32 [I, F], and how many items had no text and got the mean direction.

        Raises:
            ImportError: sentence-transformers is not installed.
        """
        check_strings(texts)
        features, blank = _sentences(texts, self.model, len(self.mean))
        features[blank] = self.mean
        return features, int(blank.sum())

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal encoder."""
        return {"mean": torch.from_numpy(self.mean)}, {"model": self.model}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> SentenceEncoder:
        return cls(meta["model"], tensors["mean"].numpy())


@dataclass(frozen=True)
class TextFeatures:
    """Features of a catalogue's texts, and what gives later texts theirs.

    Attributes:
        features: float32 [I, F].
        encoder: fitted to these texts.
    """

    features: Features
    encoder: TfidfEncoder | SentenceEncoder

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal object."""
        tensors, meta = self.encoder.to_tensors()
        return {"features": torch.from_numpy(self.features), **tensors}, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> TextFeatures:
        return cls(tensors["features"].numpy(), text_encoder(tensors, meta))


def text_encoder(
    tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> TfidfEncoder | SentenceEncoder:
    """The encoder that `to_tensors` of either kind gave."""
    kind = SentenceEncoder if "model" in meta else TfidfEncoder
    return kind.from_tensors(tensors, meta)


def text_features(
    texts: Sequence[str],
    method: FeatureMethod = "tfidf",
    dim: int = 256,
    seed: int = 0,
    model: str = DEFAULT_TEXT_MODEL,
) -> Features:
    """One unit-length feature vector per item, from its text.

    Items without text (or, for TF-IDF, without any word that the features keep) get the mean direction of
    the others; a warning says how many they are.

    Args:
        texts: one string per item, such as title, year and genres.
        method: "tfidf" (TF-IDF of 1- and 2-grams, truncated SVD), or "sentence-transformers" (needs that
            package).
        dim: features to keep at most, for TF-IDF; a small catalogue has fewer. A sentence model has its own
            width.
        seed: of the randomised SVD.
        model: name or folder of the sentence-transformers model.

    Returns:
        float32 [I, F].

    Raises:
        ValueError: no item has text, or an unknown method.
        ImportError: sentence-transformers is not installed.
    """
    return fit_text_features(texts, method, dim, seed, model).features


def fit_text_features(
    texts: Sequence[str],
    method: FeatureMethod = "tfidf",
    dim: int = 256,
    seed: int = 0,
    model: str = DEFAULT_TEXT_MODEL,
) -> TextFeatures:
    """`text_features` with what gives later items theirs; takes and raises the same."""
    check_texts(texts)
    encoder: TfidfEncoder | SentenceEncoder
    if method == "tfidf":
        encoder = TfidfEncoder.fit(texts, dim, seed)
        features, unknown = encoder.transform(texts)
    elif method == "sentence-transformers":
        features, blank = _sentences(texts, model)
        mean = _unit_rows(features[~blank].mean(axis=0, keepdims=True))[0]
        features[blank] = mean
        encoder, unknown = SentenceEncoder(model, mean), int(blank.sum())
    else:
        raise ValueError(f"method: expected 'tfidf' or 'sentence-transformers', got {method!r}")
    if unknown:
        warnings.warn(
            f"{unknown} of {len(texts)} items have no usable text; they get the mean feature vector",
            stacklevel=3,
        )
    return TextFeatures(features, encoder)


def load_features(path: str | Path, num_items: int | None = None) -> Features:
    """Read features float32 [I, F] from a .npy file, or from a .safetensors file that holds one tensor or
    "features".

    Row i belongs to item i of the data set.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, an unreadable file, a wrong shape, or NaN or infinity (naming the item's
            row).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features: expected a .npy or .safetensors file, found none at {path}")
    if path.suffix == ".npy":
        try:
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)  # np.load also opens zip files
        except _DAMAGED as error:
            raise ValueError(f"features: {path} is not a readable .npy file of numbers ({error})") from error
    elif path.suffix == ".safetensors":
        array = _load_safetensors(path)
    else:
        raise ValueError(f"features: expected a .npy or .safetensors file, got {path}")
    return check_features(array, f"features ({path})", num_items)


def check_features(
    features: npt.ArrayLike | torch.Tensor, name: str = "features", num_items: int | None = None
) -> Features:
    """`features` as contiguous float32 [I, F], or an error about `name`."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = (features.float() if features.is_floating_point() else features).numpy()
    try:
        array = np.asarray(features)
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"{name}: expected rows of one length, got others") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: expected shape [items, F], neither of them 0, got {list(array.shape)}")
    if num_items is not None and len(array) != num_items:
        raise ValueError(f"{name}: expected one row for each of the {num_items} items, got {len(array)} rows")
    with np.errstate(over="ignore"):  # a float64 too large for float32 is reported below
        array = np.ascontiguousarray(array, dtype=np.float32)
    wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if wrong.size:
        column = int(np.flatnonzero(~np.isfinite(array[wrong[0]]))[0])
        raise ValueError(
            f"{name}: expected finite numbers, got {array[wrong[0], column]} at item row {wrong[0]}, "
            f"column {column} ({wrong.size} of {len(array)} rows have NaN or infinity)"
        )
    return array


def check_texts(texts: Sequence[str] | None) -> None:
    """Raise unless `texts` holds strings and at least one of them is not blank."""
    if texts is None:
        raise ValueError(f"texts: {_NO_TEXT}")
    check_strings(texts)
    if not any(text.strip() for text in texts):
        raise ValueError(
            f"texts: expected text of at least one item, got {len(texts)} empty ones; {_NO_TEXT}"
        )


def check_strings(texts: Sequence[str]) -> None:
    """Raise TypeError unless `texts` holds strings."""
    if isinstance(texts, str):
        raise TypeError("texts: expected one string per item, got a single string")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts: expected a string for each item, got {type(text).__name__} at item row {row}"
            )


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    return TfidfVectorizer(token_pattern=_TOKEN, ngram_range=(1, 2), sublinear_tf=True, **options)


def _sentences(texts: Sequence[str], model: str, width: int = 0) -> tuple[Features, npt.NDArray[np.bool_]]:
    """Features [I, F] of the model, zero where there is no text, and where that is; F = `width` if all."""
    blank = np.array([not text.strip() for text in texts], dtype=bool)
    if blank.all():
        return np.zeros((len(texts), width), dtype=np.float32), blank
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "method 'sentence-transformers' needs a missing package: pip install sentence-transformers"
        ) from error
    some = [text for text in texts if text.strip()]
    vectors = SentenceTransformer(model).encode(some, convert_to_numpy=True, show_progress_bar=False)
    known = _unit_rows(check_features(vectors, f"vectors of the model {model!r}", len(some)))
    features = np.zeros((len(texts), known.shape[1]), dtype=np.float32)
    features[~blank] = known
    return features, blank


def _unit_rows(array: npt.NDArray[Any]) -> Features:
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    # A row this short is rounding noise of the decomposition; scaled up it would pass for a direction.
    return np.where(norms > 1e-6, array / np.maximum(norms, 1e-6), 0.0).astype(np.float32)


def _load_safetensors(path: Path) -> npt.NDArray[Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"features: {path} is not a readable .safetensors file ({error})") from error
    if "features" in tensors:
        tensor = tensors["features"]
    elif len(tensors) == 1:
        (tensor,) = tensors.values()
    else:
        raise ValueError(
            f"features: expected one tensor or one named 'features' in {path}, got {sorted(tensors)}"
        )
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
