"""Argument checks shared by the public functions, their fakes and their plain twins.

A message names the argument, what was expected and what came. Wrong shapes and mixed devices are a
ValueError, wrong types and dtypes a TypeError. Index values are the kernels' business: only they look at
data.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int64, torch.int32)
CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def check_tensor(t: object, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")


def check_dense(t: Tensor, name: str) -> None:
    """Not at every call of an op: the dispatcher refuses other layouts by itself (see `EagerOp`)."""
    if t.is_nested or t.layout is not torch.strided:
        layout = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {layout}")


def check_index(t: Tensor, name: str) -> None:
    check_tensor(t, name)
    if t.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected int32 or int64, got {t.dtype}")


def check_codes(t: Tensor, name: str) -> None:
    check_tensor(t, name)
    if t.dtype not in CODE_DTYPES:
        raise TypeError(f"{name}: expected uint8, int16, int32 or int64, got {t.dtype}")


def check_float(t: Tensor, name: str) -> None:
    check_tensor(t, name)
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {t.dtype}")


def check_dtype(t: Tensor, dtype: torch.dtype, name: str) -> None:
    check_tensor(t, name)
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")


def check_like(t: Tensor, like: Tensor, name: str, like_name: str) -> None:
    """Same dtype and device."""
    check_tensor(t, name)
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name} ({like.dtype}), got {t.dtype}")
    check_device(t, like, name, like_name)


def check_device(t: Tensor, like: Tensor, name: str, like_name: str) -> None:
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name} ({like.device}), got {t.device}")


def check_dim(t: Tensor, dim: int, name: str, shape: str) -> None:
    if t.dim() != dim:
        raise ValueError(f"{name}: expected shape {shape}, got {list(t.shape)}")


def check_shape(t: Tensor, shape: tuple[int, ...], name: str, meaning: str) -> None:
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {list(t.shape)}")


def check_size(t: Tensor, dim: int, size: int, name: str, meaning: str) -> None:
    if t.size(dim) != size:
        raise ValueError(
            f"{name}: expected size {size} ({meaning}) in dimension {dim}, got shape {list(t.shape)}"
        )


def check_rows(t: Tensor, name: str) -> None:
    """Some, in a table [..., rows, D]."""
    if t.size(-2) == 0:
        raise ValueError(f"{name}: expected at least one row, got {list(t.shape)}")


def check_rank(A: Tensor) -> None:
    if A.size(-1) == 0:
        raise ValueError(f"A: expected a rank of at least 1, got shape {list(A.shape)}")


def check_hashes(hashes: Tensor, like: Tensor, like_name: str) -> None:
    check_dtype(hashes, torch.int64, "hashes")
    if hashes.dim() != 2 or hashes.size(1) != 2 or hashes.size(0) == 0:
        raise ValueError(f"hashes: expected shape [H, 2] with H > 0, got {list(hashes.shape)}")
    check_device(hashes, like, "hashes", like_name)


def check_parameter_dim(t: Tensor, dim: int, name: str, shape: str) -> bool:
    """A parameter of `dim` dimensions, or one more in front for the clients. Returns whether it is per
    client."""
    if t.dim() != dim and t.dim() != dim + 1:
        raise ValueError(f"{name}: expected shape [{shape}] or [C, {shape}], got {list(t.shape)}")
    return t.dim() == dim + 1


def check_client_items(items: Tensor, parameter: Tensor, name: str, parameter_name: str) -> None:
    """With per-client parameters the items are [C, P]."""
    if items.dim() != 2 or items.size(0) != parameter.size(0):
        raise ValueError(
            f"{name}: expected shape [C, P] with C = {parameter.size(0)} as in {parameter_name}, "
            f"got {list(items.shape)}"
        )


def check_base(
    base: Tensor | None, num_items: int | None, width: int, parameter: Tensor, parameter_name: str
) -> None:
    if base is None:
        return
    check_tensor(base, "base")
    check_dim(base, 2, "base", "[I, D]")
    if num_items is not None:
        check_size(base, 0, num_items, "base", "I, the number of items")
    check_size(base, 1, width, "base", "D, the width")
    check_like(base, parameter, "base", parameter_name)


def check_grad(grad: Tensor, items: Tensor, per_client: bool, items_name: str = "items") -> None:
    """The gradient of a lookup's output has the items' shape with D behind."""
    check_float(grad, "grad")
    check_index(items, items_name)
    if grad.dim() != items.dim() + 1 or grad.shape[:-1] != items.shape:
        raise ValueError(
            f"grad: expected the shape of {items_name} {list(items.shape)} with D behind, "
            f"got {list(grad.shape)}"
        )
    if per_client:
        check_dim(items, 2, items_name, "[C, P]")
    check_device(items, grad, items_name, "grad")


def check_not_negative(value: float, name: str) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def check_range(value: int, low: int, high: int, name: str) -> None:
    """An integer, low <= value < high."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name}: expected {low} to {high - 1}, got {value}")


def check_draw(seed: int, round: int) -> None:
    check_range(seed, 0, 2**63, "seed")
    check_range(round, 0, 2**32, "round")


def check_grid(grid: float) -> None:
    if grid != 0.0 and not (0.0 < grid < math.inf and math.frexp(grid)[0] == 0.5):
        raise ValueError(f"grid: expected 0 or a power of two, got {grid}")
