"""Semantic codes: what every way of making them returns, with the figures that tell good codes from bad."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from fedpeft_ext import ops

from .encoder import FrozenEncoder
from .features import check_features


@dataclass(frozen=True)
class PretrainedCodes:
    """Codes of a catalogue: item i is the sum over levels j of `codebooks[j, codes[i, j]]`.

    Attributes:
        codes: [I, L], the smallest of uint8, int16 and int32 that holds K codes.
        codebooks: float32 [L, K, dim]; rows from `usable_rows` on are zero and no code refers to them.
        usable_rows: rows of each codebook that were trained; below K only where there are fewer items than K.
        quantization_error: [L], share of the latents' variance left after 1, 2, ..., L levels.
        reconstruction_error: [L], share of the features' variance left after decoding that many levels; the
            same as `quantization_error` where there is no decoder.
        usage: [L], share of the K codes that some item has.
        perplexity: [L], exp of the entropy of the codes in use: K if all are used equally, 1 if all items
            share one.
        collision_rate: share of the items whose whole row of codes is also another item's.
        encoder: maps features of later items to what the codebooks quantise; None where that is the
            features themselves.
        num_features: width F of those features; 0 where the codes do not come from features.
    """

    codes: Tensor
    codebooks: Tensor
    usable_rows: int
    quantization_error: tuple[float, ...]
    reconstruction_error: tuple[float, ...]
    usage: tuple[float, ...]
    perplexity: tuple[float, ...]
    collision_rate: float
    encoder: FrozenEncoder | None
    num_features: int

    def encode_new(self, features: npt.ArrayLike | Tensor) -> Tensor:
        """Codes [N, L] of items that were not in training, from features [N, F]; nothing is retrained."""
        if self.num_features == 0:
            raise ValueError(
                "these codes do not come from item features, so features of new items cannot be encoded"
            )
        array = check_features(features)
        if array.shape[1] != self.num_features:
            raise ValueError(f"features: expected shape [N, {self.num_features}], got {list(array.shape)}")
        latents = torch.from_numpy(array) if self.encoder is None else self.encoder(array)
        return encode(latents, self.codebooks[:, : self.usable_rows]).to(self.codes.dtype)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal object."""
        tensors, encoder = self.encoder.to_tensors() if self.encoder else ({}, None)
        meta = {
            "usable_rows": self.usable_rows,
            "quantization_error": list(self.quantization_error),
            "reconstruction_error": list(self.reconstruction_error),
            "usage": list(self.usage),
            "perplexity": list(self.perplexity),
            "collision_rate": self.collision_rate,
            "encoder": encoder,
            "num_features": self.num_features,
        }
        return {"codes": self.codes, "codebooks": self.codebooks, **tensors}, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> PretrainedCodes:
        return cls(
            codes=tensors["codes"],
            codebooks=tensors["codebooks"],
            usable_rows=meta["usable_rows"],
            quantization_error=tuple(meta["quantization_error"]),
            reconstruction_error=tuple(meta["reconstruction_error"]),
            usage=tuple(meta["usage"]),
            perplexity=tuple(meta["perplexity"]),
            collision_rate=meta["collision_rate"],
            encoder=FrozenEncoder.from_tensors(tensors, meta["encoder"]) if meta["encoder"] else None,
            num_features=meta["num_features"],
        )


def smallest_dtype(codebook_size: int) -> torch.dtype:
    """The smallest dtype of `rq_lookup`'s codes that holds 0 .. codebook_size - 1."""
    if codebook_size <= 1 << 8:
        return torch.uint8
    return torch.int16 if codebook_size <= 1 << 15 else torch.int32


def encode(latents: Tensor, codebooks: Tensor) -> Tensor:
    """Greedy residual codes [N, L] of latents [N, D]: at each level the row nearest to what is left."""
    codes: Tensor = ops.rq_encode(latents.float().contiguous(), codebooks.contiguous())
    return codes


def check_quantizer(levels: int, codebook_size: int) -> None:
    """Raise a ValueError naming the option that makes no sense."""
    if levels < 1:
        raise ValueError(f"levels: expected at least 1, got {levels}")
    if not 1 <= codebook_size <= 1 << 31:
        raise ValueError(f"codebook_size: expected between 1 and 2^31, got {codebook_size}")


def usable_rows(num_points: int, codebook_size: int) -> int:
    """Rows of a codebook that `num_points` can train; warns where they are fewer than `codebook_size`."""
    if num_points < codebook_size:
        warnings.warn(
            f"{num_points} different items cannot train {codebook_size} codes a level: "
            f"only {num_points} of them are used",
            stacklevel=3,
        )
    return min(num_points, codebook_size)


def describe(
    codes: Tensor,
    codebooks: Tensor,
    codebook_size: int,
    quantization_error: tuple[float, ...],
    reconstruction_error: tuple[float, ...],
    encoder: FrozenEncoder | None,
    num_features: int,
) -> PretrainedCodes:
    """Pad trained codebooks [L, K', D] with zero rows to K, and count how their codes are used."""
    usable = codebooks.shape[1]
    usage, perplexity = [], []
    for level in codes.long().unbind(1):
        counts = torch.bincount(level).double()
        share = counts[counts > 0] / counts.sum()
        usage.append(len(share) / codebook_size)
        perplexity.append(float(torch.exp(-(share * share.log()).sum())))
    _, members = torch.unique(codes.long(), dim=0, return_counts=True)
    return PretrainedCodes(
        codes=codes.to(smallest_dtype(codebook_size)),
        codebooks=torch.nn.functional.pad(codebooks, (0, 0, 0, codebook_size - usable)).contiguous(),
        usable_rows=usable,
        quantization_error=quantization_error,
        reconstruction_error=reconstruction_error,
        usage=tuple(usage),
        perplexity=tuple(perplexity),
        collision_rate=float(members[members > 1].sum()) / len(codes),
        encoder=encoder,
        num_features=num_features,
    )


def partial_sums(codes: Tensor, codebooks: Tensor) -> Tensor:
    """float32 [L, I, D]: what each item sums to after 1, 2, ..., L levels."""
    rows = torch.stack(
        [codebook[level.long()] for codebook, level in zip(codebooks, codes.unbind(1), strict=True)]
    )
    return rows.cumsum(0)


def unexplained_share(values: Tensor, approximations: Iterable[Tensor]) -> tuple[float, ...]:
    """Share of the variance of `values` [I, W] that each of `approximations` leaves (0 of no variance)."""
    total = float((values - values.mean(0)).square().sum(dtype=torch.float64))
    left = [float((values - guess).square().sum(dtype=torch.float64)) for guess in approximations]
    return tuple(error / total if total > 0 else 0.0 for error in left)
