"""rq_encode: greedy residual quantization, the codes that rq_lookup reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_dim, check_float, check_like, check_size
from ._library import Dims, eager_op, loop_over, promoted, register_fake, register_vmap
from ._plain import values_available

_OP = eager_op("rq_encode")


def _check(x: Tensor, codebooks: Tensor) -> None:
    check_float(x, "x")
    check_like(codebooks, x, "codebooks", "x")
    check_dim(x, 2, "x", "[N, D]")
    check_dim(codebooks, 3, "codebooks", "[L, K, D]")
    check_size(codebooks, 2, x.size(1), "codebooks", "D, the width of x")
    if not 1 <= codebooks.size(1) < 2**31:
        raise ValueError(f"codebooks: expected 1 to 2^31 - 1 codes a level, got {list(codebooks.shape)}")


def _code_dtype(size: int) -> torch.dtype:
    if size <= 2**8:
        return torch.uint8
    return torch.int16 if size <= 2**15 else torch.int32


def rq_encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """Codes of vectors: at each level the nearest row of the codebook to what the levels before left over.

    Args:
        x: [N, D], finite; float32, float64, float16 or bfloat16.
        codebooks: [L, K, D], finite, of the dtype of x.

    Returns:
        [N, L] in [0, K): uint8 for K <= 256, int16 for K <= 32768, else int32. Of rows equally near, the
        lowest. Memory is
        bounded: no [N, K] matrix of distances is held. Not differentiable.

    Raises:
        ValueError: a shape does not fit, a value is NaN or infinite, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).

    Equivalent to::

        for codebook in codebooks:
            code = torch.cdist(x, codebook).argmin(1)
            x = x - codebook[code]  # codes: all levels stacked

    Example:
        >>> import torch
        >>> codebooks = torch.tensor([[[0., 0.], [10., 0.]], [[0., 1.], [0., -1.]]])
        >>> rq_encode(torch.tensor([[9., 2.], [1., -3.]]), codebooks)
        tensor([[1, 0],
                [0, 1]], dtype=torch.uint8)
    """
    x, codebooks = promoted(x, codebooks)
    _check(x, codebooks)
    out: Tensor = _OP(x, codebooks)
    return out


def rq_encode_reference(x: Tensor, codebooks: Tensor) -> Tensor:
    """`rq_encode` in plain PyTorch; holds the [N, K] distances of a level."""
    x, codebooks = promoted(x, codebooks)
    _check(x, codebooks)
    for t, name in ((x, "x"), (codebooks, "codebooks")):
        if values_available(t) and not bool(t.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual, codes = x.to(dtype), []
    for codebook in codebooks.to(dtype):
        code = (codebook.square().sum(1) / 2 - residual @ codebook.T).argmin(1)
        residual = residual - codebook[code]
        codes.append(code)
    result = torch.stack(codes, dim=1) if codes else x.new_zeros((x.size(0), 0))
    return result.to(_code_dtype(codebooks.size(1)))


@register_fake("rq_encode")
def _fake(x: Tensor, codebooks: Tensor) -> Tensor:
    _check(x, codebooks)
    return x.new_empty((x.size(0), codebooks.size(0)), dtype=_code_dtype(codebooks.size(1)))


@register_vmap("rq_encode")
def _vmap(size: int, in_dims: Dims, x: Tensor, codebooks: Tensor) -> Any:
    if in_dims[1] is not None or in_dims[0] is None:
        return loop_over(_OP, size, in_dims, (x, codebooks))
    x = x.movedim(in_dims[0], 0)
    return _OP(x.flatten(0, 1), codebooks).reshape(*x.shape[:2], codebooks.size(0)), 0
