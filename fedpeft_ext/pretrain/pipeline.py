"""`pretrain`: all that the server prepares from item features before a federation starts, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .autoencoder import PretrainedFull, pretrain_full
from .cache import cached, default_cache_dir
from .codes import PretrainedCodes, check_quantizer, smallest_dtype
from .features import (
    Features,
    SentenceEncoder,
    TextFeatures,
    TfidfEncoder,
    check_texts,
    fit_text_features,
    load_features,
)
from .item_encoder import ItemEncoder
from .residual_kmeans import residual_kmeans_codes
from .rqvae import pretrain_codes

if TYPE_CHECKING:
    from fedpeft_ext.config import PretrainConfig
    from fedpeft_ext.data import Dataset

# How new embeddings are drawn where no scale is given.
_INIT_STD = 0.1


@dataclass(frozen=True)
class Pretrained:
    """What the server starts a federation with.

    Attributes:
        full: float32 [I, D], full embeddings.
        codes: [I, L], smallest integer dtype; None if not asked for.
        codebooks: float32 [L, K, D], as trained with the codes; None without codes.
        autoencoder, quantizer: how they came about; None for a random base.
        report: figures for a summary (JSON-ready).
        encoder: the way to encode items that arrive later; None for a random base.
    """

    full: Tensor
    codes: Tensor | None = None
    codebooks: Tensor | None = None
    autoencoder: PretrainedFull | None = None
    quantizer: PretrainedCodes | None = None
    report: dict[str, Any] = field(default_factory=dict)
    encoder: ItemEncoder | None = None

    def tensors(self) -> dict[str, Tensor]:
        """`full`, `codes` and `codebooks`, as far as they are there: what a federation needs of it."""
        given = {"full": self.full, "codes": self.codes, "codebooks": self.codebooks}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Pretrained:
        """From what `tensors` gave; how it came about is not known any more."""
        return cls(tensors["full"], tensors.get("codes"), tensors.get("codebooks"))


def pretrain(
    config: PretrainConfig,
    dataset: Dataset,
    dim: int = 32,
    *,
    levels: int | None = None,
    codebook_size: int = 128,
    seed: int = 0,
) -> Pretrained:
    """Full embeddings and, where `levels` is given, codes of all items, as `config` says.

    Args:
        config: `config.features` is "tfidf" or "sentence-transformers" (of the items' text), the path of a
            features file (see `load_features`), or "random" (no pre-training: a base to compare with).
        dataset: gives the number of items and their text.
        dim: width D.
        levels: L, codes per item; None makes no codes.
        codebook_size: K, rows per codebook.
        seed: of everything drawn.

    Raises:
        ValueError: no item text and no other features, features that do not fit the items, or an option out
            of range.
        FileNotFoundError: there is no such features file.
        ImportError: the sentence-transformers package is asked for and missing.
    """
    if levels is not None:
        check_quantizer(levels, codebook_size)
    if config.features == "random":
        return _random(config, dataset.num_items, dim, levels, codebook_size, seed)
    folder = None
    if config.cache:
        folder = default_cache_dir() if config.cache_dir is None else Path(config.cache_dir)
    features, text, without_text = _item_features(config, dataset, seed, folder)
    training = {"batch_size": config.batch_size, "scale": config.scale, "dim": dim, "seed": seed}
    options: dict[str, Any] = {**training, "epochs": config.epochs, "lr": config.lr}
    full = cached(folder, PretrainedFull, features, options, lambda: pretrain_full(features, **options))
    report = {
        "items": dataset.num_items,
        "features": features.shape[1],
        "items_without_text": without_text,
        "explained_variance": full.explained_variance,
    }
    if levels is None:
        encoder = ItemEncoder.of(text, full, None)
        return Pretrained(full.embedding, autoencoder=full, report=report, encoder=encoder)

    shape: dict[str, Any] = {"levels": levels, "codebook_size": codebook_size, "seed": seed}
    if config.codes == "rq-kmeans":
        # Of the full embeddings, so that the codebooks have their width and a warm start approximates them.
        codes = cached(
            folder,
            PretrainedCodes,
            full.embedding.numpy(),
            {**shape, "method": "rq-kmeans"},
            lambda: residual_kmeans_codes(full.embedding, **shape, encoder=full.encoder),
        )
    else:
        options = {**training, **shape, "epochs": config.code_epochs, "lr": config.code_lr}
        codes = cached(
            folder, PretrainedCodes, features, options, lambda: pretrain_codes(features, **options)
        )
    report |= {
        "code_reconstruction_error": list(codes.reconstruction_error),
        "code_usage": list(codes.usage),
        "code_perplexity": list(codes.perplexity),
        "code_collision_rate": codes.collision_rate,
    }
    encoder = ItemEncoder.of(text, full, codes)
    return Pretrained(full.embedding, codes.codes, codes.codebooks, full, codes, report, encoder)


def _item_features(
    config: PretrainConfig, dataset: Dataset, seed: int, folder: Path | None
) -> tuple[Features, TfidfEncoder | SentenceEncoder | None, int]:
    """Features [I, F], what gives texts theirs, and how many items have no text to make them from."""
    if config.features not in ("tfidf", "sentence-transformers"):
        return load_features(config.features, dataset.num_items), None, 0
    texts = dataset.item_text
    check_texts(texts)
    assert texts is not None
    options: dict[str, Any] = (
        {"method": "tfidf", "dim": config.feature_dim, "seed": seed}
        if config.features == "tfidf"
        else {"method": "sentence-transformers", "model": config.text_model}
    )
    made = cached(folder, TextFeatures, texts, options, lambda: fit_text_features(texts, **options))
    return made.features, made.encoder, sum(not text.strip() for text in texts)


def _random(
    config: PretrainConfig, num_items: int, dim: int, levels: int | None, codebook_size: int, seed: int
) -> Pretrained:
    """Embeddings and codes that know nothing of the items."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
    std = _INIT_STD if config.scale is None else config.scale
    full = std * torch.randn(num_items, dim, **drawn, dtype=torch.float32)
    report = {"items": num_items, "features": 0}
    if levels is None:
        return Pretrained(full, report=report)
    codes = torch.randint(codebook_size, (num_items, levels), **drawn)
    codebooks = std * torch.randn(levels, codebook_size, dim, **drawn, dtype=torch.float32)
    return Pretrained(full, codes.to(smallest_dtype(codebook_size)), codebooks, report=report)
