"""touched_rows and accumulate_updates_: from a catalogue to the rows that a client touches, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_device, check_dim, check_dtype, check_float, check_grid, check_index, check_shape
from ._library import Dims, eager_op, register_fake, register_in_place, register_vmap, to_front
from ._plain import check_index_values

_TOUCHED = eager_op("touched_rows")
_ACCUMULATE = eager_op("accumulate_updates_")
_APPLY = eager_op("apply_updates_")


def _check_touched(items: Tensor) -> None:
    check_index(items, "items")
    check_dim(items, 2, "items", "[C, N]")


def touched_rows(items: Tensor) -> tuple[Tensor, Tensor]:
    """Each client's sorted distinct items, and where each of its positions finds its item among them.

    Args:
        items: int32 or int64 [C, N]; -1 is padding.

    Returns:
        rows: [C, R], ascending, with -1 behind; R is the largest count of any client. The dtype of items.
        index: [C, N] with rows[c, index[c, n]] == items[c, n], -1 at padding. The dtype of items.
        R depends on values, so torch.compile sees it as an unbacked size. Under torch.vmap, R is the largest
        count over all samples.

    Raises:
        ValueError: items is not [C, N].
        TypeError: items has the wrong type or dtype.
        IndexError: an item is below -1.

    Equivalent to, for each client::

        rows, index = items[items >= 0].unique(return_inverse=True)

    Example:
        >>> import torch
        >>> rows, index = touched_rows(torch.tensor([[7, 3, 7, -1], [5, -1, -1, -1]]))
        >>> rows
        tensor([[ 3,  7],
                [ 5, -1]])
        >>> index
        tensor([[ 1,  0,  1, -1],
                [ 0, -1, -1, -1]])
    """
    _check_touched(items)
    rows, index = _TOUCHED(items)
    return rows, index


def touched_rows_reference(items: Tensor) -> tuple[Tensor, Tensor]:
    """`touched_rows` in plain PyTorch."""
    _check_touched(items)
    check_index_values(items, None, "items")
    ordered, order = items.sort(dim=1)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first &= ordered >= 0
    rank = first.cumsum(1) - 1
    index = torch.empty_like(items).scatter_(1, order, torch.where(ordered >= 0, rank, -1).to(items.dtype))
    width = int(first.sum(1).max()) if items.numel() else 0
    # Repeats and padding write their own value again, or into the spare last column.
    rows = items.new_full((items.size(0), width + 1), -1)
    rows.scatter_(1, torch.where(ordered >= 0, rank, width), ordered)
    return rows[:, :width].contiguous(), index


@register_fake("touched_rows")
def _fake_touched(items: Tensor) -> tuple[Tensor, Tensor]:
    _check_touched(items)
    width = torch.library.get_ctx().new_dynamic_size()
    return items.new_empty((items.size(0), width)), items.new_empty(items.shape)


@register_vmap("touched_rows")
def _vmap_touched(size: int, in_dims: Dims, items: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    items = to_front(items, in_dims[0], size)
    rows, index = _TOUCHED(items.flatten(0, 1))
    return (rows.reshape(*items.shape[:2], rows.size(1)), index.reshape(items.shape)), (0, 0)


def _check_accumulate(
    total: Tensor, updates: Tensor, weights: Tensor, rows: Tensor | None, grid: float
) -> None:
    check_grid(grid)
    check_float(updates, "updates")
    check_float(total, "total")
    if total.dtype != torch.float64 and total.dtype != updates.dtype:
        raise TypeError(
            f"total: expected float64 or the dtype of updates ({updates.dtype}), got {total.dtype}"
        )
    if grid != 0.0 and total.dtype != torch.float64:
        raise ValueError(f"grid: expected 0 unless total is float64, got {grid} with a {total.dtype} total")
    check_dtype(weights, torch.float64, "weights")
    if rows is None:
        if updates.dim() == 0:
            raise ValueError("updates: expected shape [C, ...], got []")
        check_shape(total, tuple(updates.shape[1:]), "total", "updates without C")
    else:
        check_index(rows, "rows")
        check_dim(total, 2, "total", "[I, W]")
        check_dim(rows, 2, "rows", "[C, R]")
        check_shape(updates, (*rows.shape, total.size(1)), "updates", "[C, R, W] of rows and total")
        check_device(rows, total, "rows", "total")
    check_shape(weights, tuple(updates.shape[:1]), "weights", "C, the clients of updates")
    check_device(updates, total, "updates", "total")
    check_device(weights, total, "weights", "total")


LARGEST_MEAN = 16.0
"""Sums are exact while no mean of updates is larger."""


def exact_grid(weight: float) -> float:
    """The power of two to round weighted updates to, whose weights sum to at most `weight`.

    Sums of its multiples are exact in float64 as long as they stay within LARGEST_MEAN * weight. One
    client's rounding moves the mean by at most 2^-48.
    """
    return 0.0 if weight <= 0.0 else 2.0 ** (math.ceil(math.log2(weight * LARGEST_MEAN)) - 52)


def accumulate_updates_(
    total: Tensor, updates: Tensor, weights: Tensor, rows: Tensor | None = None, grid: float = 0.0
) -> None:
    """Adds the weighted updates of clients to a total, in place, in the order of clients. Run it under
    torch.no_grad().

    Args:
        total: [...] or, with rows, [I, W]; float64 or the dtype of updates. Updated in place.
        updates: [C, ...] or, with rows, [C, R, W]; float32, float64, float16 or bfloat16.
        weights: float64 [C]; each product and sum is taken in the dtype of total, or in float32 where that
            has 16 bits. The latter are rounded once or more a call, so a sum over several calls wants a
            float32 or float64 total.
        rows: None, or int32 or int64 [C, R]: the row of total that each update lands on; -1 is skipped.
        grid: 0, or a power of two: every weights[c] * updates[c] is rounded to a multiple of it. The float64
            total that holds multiples of it and stays below 2^53 grid is then exact, so that it is the same
            bits in whatever order clients are added, in one process or in several whose totals are summed.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        IndexError: a row is neither -1 nor in [0, I).
        RuntimeError: a tensor requires a gradient and gradients are being recorded.

    Equivalent to::

        for c in range(C):
            total += weights[c] * updates[c]                                 # without rows
            total[rows[c]] += weights[c] * updates[c]                        # with rows, where rows[c] != -1

    Example:
        >>> import torch
        >>> total = torch.zeros(3, 1, dtype=torch.float64)
        >>> updates = torch.tensor([[[1.], [2.]], [[10.], [99.]]])
        >>> weights = torch.tensor([0.5, 1.], dtype=torch.float64)
        >>> accumulate_updates_(total, updates, weights, rows=torch.tensor([[0, 2], [2, -1]]))
        >>> total.flatten()
        tensor([ 0.5000,  0.0000, 11.0000], dtype=torch.float64)
    """
    _check_accumulate(total, updates, weights, rows, grid)
    _ACCUMULATE(total, updates, weights, rows, grid)


def _check_apply(parameter: Tensor, total: Tensor, rows: Tensor | None) -> None:
    check_float(parameter, "parameter")
    if parameter.dim() == 0:
        raise ValueError("parameter: expected shape [I, ...], got []")
    check_dtype(total, torch.float64, "total")
    check_shape(total, tuple(parameter.shape), "total", "as parameter")
    check_device(total, parameter, "total", "parameter")
    if not (parameter.is_contiguous() and total.is_contiguous()):
        raise ValueError("parameter, total: expected contiguous tensors")
    if rows is not None:
        check_index(rows, "rows")
        check_dim(rows, 1, "rows", "[n]")
        check_device(rows, parameter, "rows", "parameter")


def apply_updates_(parameter: Tensor, total: Tensor, rows: Tensor | None = None, *, scale: float) -> None:
    """The server's step: adds scale * total to a parameter and makes the total zero, in one pass.

    Args:
        parameter: float32, float64, float16 or bfloat16 [I, ...], contiguous. Updated in place.
        total: float64, the same shape, contiguous. Zero afterwards (at `rows`).
        rows: None for all, or int32 or int64 [n], distinct: the rows that are worked on.

    Raises:
        ValueError: a shape does not fit, a tensor is not contiguous, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        IndexError: a row is not in [0, I).

    Equivalent to::

        parameter += (total * scale).to(parameter.dtype)
        total.zero_()

    Example:
        >>> import torch
        >>> parameter, total = torch.zeros(2, 1), torch.tensor([[2.], [4.]], dtype=torch.float64)
        >>> apply_updates_(parameter, total, torch.tensor([1]), scale=0.5)
        >>> parameter.flatten(), total.flatten()
        (tensor([0., 2.]), tensor([2., 0.], dtype=torch.float64))
    """
    _check_apply(parameter, total, rows)
    _APPLY(parameter, total, rows, scale)


def apply_updates_reference_(
    parameter: Tensor, total: Tensor, rows: Tensor | None = None, *, scale: float
) -> None:
    """`apply_updates_` in plain PyTorch, on any device."""
    _check_apply(parameter, total, rows)
    if rows is None:
        parameter.add_((total * scale).to(parameter.dtype))
        total.zero_()
        return
    check_index_values(rows, parameter.size(0), "rows", padding=False)
    parameter[rows.long()] += (total[rows.long()] * scale).to(parameter.dtype)
    total[rows.long()] = 0.0


@register_fake("apply_updates_")
def _fake_apply(parameter: Tensor, total: Tensor, rows: Tensor | None, scale: float) -> None:
    _check_apply(parameter, total, rows)


register_in_place("apply_updates_", 0, 1)


def accumulate_updates_reference_(
    total: Tensor, updates: Tensor, weights: Tensor, rows: Tensor | None = None, grid: float = 0.0
) -> None:
    """`accumulate_updates_` in plain PyTorch."""
    _check_accumulate(total, updates, weights, rows, grid)
    if rows is not None:
        check_index_values(rows, total.size(0), "rows")
    for c in range(updates.size(0)):
        update = updates[c].double() * weights[c]
        if grid > 0.0:
            update = (update / grid).round() * grid
        update = update.to(total.dtype)
        if rows is None:
            total.add_(update)
        else:
            held = rows[c] >= 0
            total.index_add_(0, rows[c][held].long(), update[held])


@register_fake("accumulate_updates_")
def _fake_accumulate(
    total: Tensor, updates: Tensor, weights: Tensor, rows: Tensor | None, grid: float = 0.0
) -> None:
    _check_accumulate(total, updates, weights, rows, grid)


register_in_place("accumulate_updates_", 0)
