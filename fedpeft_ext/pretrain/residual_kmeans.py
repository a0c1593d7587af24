"""Semantic codes without a network: k-means on the items' vectors, then on what it leaves, and so on."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedpeft_ext.nn.rq import residual_kmeans

from .codes import (
    PretrainedCodes,
    check_quantizer,
    describe,
    partial_sums,
    unexplained_share,
    usable_rows,
)
from .encoder import FrozenEncoder, isolated
from .features import check_features


def residual_kmeans_codes(
    vectors: npt.ArrayLike | Tensor,
    levels: int = 3,
    codebook_size: int = 128,
    seed: int = 0,
    threads: int = 1,
    encoder: FrozenEncoder | None = None,
) -> PretrainedCodes:
    """Codes of item features or of full embeddings by residual k-means.

    With fewer different items than `codebook_size` only as many rows are used, and a warning says so.

    Args:
        vectors: finite numbers [I, D]; the codebooks have the same width and approximate these vectors
            themselves.
        levels: L, codes per item.
        codebook_size: K, rows per codebook.
        seed: of the k-means starts.
        threads: CPU threads; another number may change the result.
        encoder: what made `vectors` from item features, if anything did: `encode_new` then takes such
            features.

    Raises:
        ValueError: vectors of a wrong shape or with NaN or infinity, or an option out of range.
    """
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]

    array = check_features(vectors, "vectors")
    check_quantizer(levels, codebook_size)
    rows = usable_rows(len(np.unique(array, axis=0)), codebook_size)
    x = torch.from_numpy(array)
    with isolated(seed, threads), warnings.catch_warnings():
        # Residuals may have fewer distinct values than codes; unused codes are counted in `usage`.
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes, codebooks = residual_kmeans(x, levels, rows, seed=seed)
    error = unexplained_share(x, partial_sums(codes, codebooks))
    width = array.shape[1] if encoder is None else encoder.sizes[0]
    return describe(codes, codebooks, codebook_size, error, error, encoder, width)
