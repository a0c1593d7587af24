"""`ItemEncoder`: how items that arrive later get full embeddings and codes, with nothing trained anew."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from .autoencoder import PretrainedFull
from .codes import PretrainedCodes
from .encoder import FrozenEncoder
from .features import SentenceEncoder, TfidfEncoder, text_encoder

_ANCHORS = 1 << 14
"""Items that tell how training has moved the full embeddings: many times their width."""


@dataclass(frozen=True)
class ItemEncoder:
    """From an item's text, or its features, to its full embedding and codes, as pre-training left it.

    Attributes:
        text: gives texts their features; None where a file gave them.
        full: from features to full embeddings.
        quantizer: from features to codes, without the catalogue's own (`codes` [0, L]); None without codes.
        anchors: int64 [n], numbers of items of the catalogue, ascending.
        anchor_rows: float32 [n, D], their full embeddings as they were prepared.
    """

    text: TfidfEncoder | SentenceEncoder | None
    full: FrozenEncoder
    quantizer: PretrainedCodes | None
    anchors: Tensor
    anchor_rows: Tensor

    @classmethod
    def of(
        cls,
        text: TfidfEncoder | SentenceEncoder | None,
        full: PretrainedFull,
        quantizer: PretrainedCodes | None,
    ) -> ItemEncoder:
        """What `pretrain` made of features, without what it made of the catalogue."""
        if full.encoder is None:
            raise ValueError("full: expected embeddings that come from item features, got others")
        items = len(full.embedding)
        anchors = torch.linspace(0, items - 1, min(items, _ANCHORS), dtype=torch.float64, device="cpu").long()
        if quantizer is not None:
            quantizer = dataclasses.replace(quantizer, codes=quantizer.codes[:0].clone())
        return cls(text, full.encoder, quantizer, anchors, full.embedding[anchors])

    def encode(self, items: Sequence[str] | npt.ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Full embeddings float32 [N, D] and codes [N, L] of later items.

        Args:
            items: their texts; or where a file gave the features of the first items, features [N, F].

        Raises:
            ValueError, TypeError: neither of them, or the wrong one.
            ImportError: the sentence-transformers package made the features, and is missing.
        """
        texts = isinstance(items, Sequence) and all(isinstance(item, str) for item in items)
        if texts != (self.text is not None):
            got = "texts" if texts else "others"
            told = "texts" if self.text is not None else f"features [N, {self.full.sizes[0]}]"
            raise ValueError(f"items: expected {told}, of which those before were encoded, got {got}")
        features: npt.ArrayLike = items
        if self.text is not None:
            features, unknown = self.text.transform([str(item) for item in items])  # type: ignore[union-attr]
            if unknown:
                warnings.warn(
                    f"{unknown} of {len(features)} new items have no usable text; they get the mean feature "
                    "vector",
                    stacklevel=2,
                )
        full = self.full(features)
        return full, None if self.quantizer is None else self.quantizer.encode_new(features)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal encoder."""
        tensors = {"anchors": self.anchors, "anchor_rows": self.anchor_rows}
        meta: dict[str, Any] = {}
        for name in ("text", "full", "quantizer"):
            part = getattr(self, name)
            own, meta[name] = ({}, None) if part is None else part.to_tensors()
            # Residual k-means quantises the full embeddings, by the same layers.
            own = {key: value.clone() for key, value in own.items()} if name == "quantizer" else own
            tensors |= {f"{name}/{key}": value for key, value in own.items()}
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ItemEncoder:
        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}/"
            return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}

        quantizer = meta["quantizer"]
        return cls(
            None if meta["text"] is None else text_encoder(part("text"), meta["text"]),
            FrozenEncoder.from_tensors(part("full"), meta["full"]),
            None if quantizer is None else PretrainedCodes.from_tensors(part("quantizer"), quantizer),
            tensors["anchors"],
            tensors["anchor_rows"],
        )
