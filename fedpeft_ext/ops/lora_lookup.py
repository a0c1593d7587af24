"""lora_lookup: low-rank embeddings B a_i, with A whole or held only at the rows that a client touches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import (
    check_base,
    check_client_items,
    check_device,
    check_dim,
    check_float,
    check_grad,
    check_index,
    check_like,
    check_parameter_dim,
    check_rank,
    check_shape,
    check_size,
)
from ._library import (
    Dims,
    LookupBatch,
    add_batched_base,
    eager_op,
    product_tangent,
    promoted,
    register_autograd,
    register_fake,
    register_vmap,
    total,
)
from ._plain import check_index_values, gather_rows, values_available

_OP = eager_op("lora_lookup")
_BACKWARD = eager_op("lora_lookup_backward")
_ROWS = eager_op("client_embedding")
_ROWS_BACKWARD = eager_op("client_embedding_backward")


def _check_factors(A: Tensor, B: Tensor) -> bool:
    check_float(A, "A")
    check_like(B, A, "B", "A")
    per_client = check_parameter_dim(A, 2, "A", "N, r")
    check_rank(A)
    check_dim(B, A.dim(), "B", "[C, D, r] as A is per client" if per_client else "[D, r] as A is shared")
    check_size(B, B.dim() - 1, A.size(-1), "B", "r, the rank of A")
    if per_client:
        check_size(B, 0, A.size(0), "B", "C, the clients of A")
    return per_client


def _check(items: Tensor, A: Tensor, B: Tensor, base: Tensor | None, rows: Tensor | None) -> None:
    check_index(items, "items")
    if _check_factors(A, B):
        check_client_items(items, A, "items", "A")
    check_device(items, A, "items", "A")
    if rows is not None:
        check_index(rows, "rows")
        check_shape(rows, tuple(items.shape), "rows", "the shape of items")
        check_device(rows, A, "rows", "A")
    check_base(base, A.size(-2) if rows is None else None, B.size(-2), A, "A")


def lora_lookup(
    items: Tensor, A: Tensor, B: Tensor, base: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Low-rank embeddings: B a_i for each item, plus the item's base vector. No alpha / r scaling.

    Args:
        items: int32 or int64. [C, P] with per-client factors, any shape with shared ones; -1 is padding.
        A: [C, N, r] or [N, r]; float32, float64, float16 or bfloat16. N is I, the number of items, or, with
            rows, the number of rows that a client holds.
        B: [C, D, r] or [D, r], per client exactly where A is, of the dtype of A.
        base: [I, D] vectors that all clients share, of the dtype of A, or None; read at items.
        rows: int32 or int64, the shape of items: which row of A each position reads (see `touched_rows`), -1
            where the item is. None: row items[p].

    Returns:
        items.shape + [D], the dtype of A (16-bit types are summed in float32); zero at padding, where no
        gradient flows either. Gradients reach A, B and, where it requires one, base; the backward sums in the
        order of positions: the same bits for any number of threads. Differentiable twice. Under torch.vmap,
        batched factors become per-client factors of one call.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).
        IndexError: an item or a row is neither -1 nor in range (on CUDA a device-side assertion).

    Equivalent to::

        A[items if rows is None else rows] @ B.T + base[items]               # zero at items == -1

    Hu et al., LoRA (2022), applied to an embedding matrix.

    Example:
        >>> import torch
        >>> A, B = torch.tensor([[1., 0.], [0., 2.], [3., 3.]]), torch.tensor([[1., 0.], [0., 1.], [1., 1.]])
        >>> lora_lookup(torch.tensor([1, -1, 2]), A, B)
        tensor([[0., 2., 2.],
                [0., 0., 0.],
                [3., 3., 6.]])
    """
    A, B, base = promoted(A, B, base)
    _check(items, A, B, base, rows)
    out: Tensor = _OP(items, A, B, base, rows)
    return out


def lora_lookup_reference(
    items: Tensor, A: Tensor, B: Tensor, base: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """`lora_lookup` in plain PyTorch."""
    A, B, base = promoted(A, B, base)
    _check(items, A, B, base, rows)
    if rows is None:
        check_index_values(items, A.size(-2), "items")
    else:
        check_index_values(items, None if base is None else base.size(0), "items")
        check_index_values(rows, A.size(-2), "rows")
        if values_available(rows) and bool(((rows < 0) != (items < 0)).any()):
            raise IndexError("rows: expected -1 exactly where items is -1")
    out = gather_rows(A, items if rows is None else rows) @ B.mT
    return out if base is None else out + gather_rows(base, items)


@register_fake("lora_lookup")
def _fake(items: Tensor, A: Tensor, B: Tensor, base: Tensor | None, rows: Tensor | None) -> Tensor:
    _check(items, A, B, base, rows)
    return A.new_empty((*items.shape, B.size(-2)))


@register_fake("lora_lookup_backward")
def _fake_backward(grad: Tensor, rows: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    per_client = _check_factors(A, B)
    check_grad(grad, rows, per_client, "rows")
    check_like(grad, A, "grad", "A")
    if per_client:
        check_client_items(rows, A, "rows", "A")
    check_size(grad, grad.dim() - 1, B.size(-2), "grad", "D, the width of B")
    return A.new_empty(A.shape), B.new_empty(B.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    items, A, B, base, rows = inputs
    ctx.save_for_backward(items, A, B, rows)
    ctx.num_items = None if base is None else base.size(0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    items, A, B, rows = ctx.saved_tensors
    grad_A = grad_B = grad_base = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_A, grad_B = _BACKWARD(grad, items if rows is None else rows, A, B)
    if ctx.needs_input_grad[3]:
        grad_base = _ROWS_BACKWARD(grad, items, ctx.num_items, False)
    return None, grad_A, grad_B, grad_base, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, grad_A: Tensor, grad_B: Tensor) -> tuple[Tensor | None, ...]:
    # d A = sum_p e_rows[p] (B^T g_p)^T and d B = sum_p g_p a_p^T are linear in g, A and B each.
    grad, rows, A, B = ctx.saved_tensors
    out_grad = None
    if ctx.needs_input_grad[0]:
        out_grad = _OP(rows, grad_A, B, None, None) + _OP(rows, A, grad_B, None, None)
    out_A, out_B = _BACKWARD(grad, rows, grad_A, grad_B)
    return out_grad, None, out_A, out_B


def _tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
    items, A, B, _, rows = args
    _, moved_A, moved_B, moved_base, _ = tangents
    return total(
        None if moved_A is None else _OP(items, moved_A, B, None, rows),
        None if moved_B is None else _OP(items, A, moved_B, None, rows),
        None if moved_base is None else _ROWS(items, moved_base),
    )


register_autograd("lora_lookup", _setup, _backward, _tangent)
register_autograd("lora_lookup_backward", _setup_backward, _double_backward, product_tangent(_BACKWARD, 2, 3))


@register_vmap("lora_lookup")
def _vmap(
    size: int, in_dims: Dims, items: Tensor, A: Tensor, B: Tensor, base: Tensor | None, rows: Tensor | None
) -> Any:
    items_dim, A_dim, B_dim, base_dim, rows_dim = in_dims
    per_client = A.dim() - (A_dim is not None) == 3
    batch = LookupBatch(size, per_client, batched=A_dim is not None or B_dim is not None)
    out = batch.output(
        _OP(
            batch.positions(items, items_dim),
            batch.parameter(A, A_dim),
            batch.parameter(B, B_dim),
            base if base_dim is None else None,
            None if rows is None else batch.positions(rows, rows_dim),
        )
    )
    if base is None or base_dim is None:
        return out
    return add_batched_base(out, size, items, items_dim, base, base_dim)


@register_vmap("lora_lookup_backward")
def _vmap_backward(size: int, in_dims: Dims, grad: Tensor, rows: Tensor, A: Tensor, B: Tensor) -> Any:
    batch = LookupBatch(size, A.dim() - (in_dims[2] is not None) == 3, batched=True)
    rows = batch.positions(rows, in_dims[1])
    grad = batch.positions(grad, in_dims[0], trailing=1)
    grad_A, grad_B = _BACKWARD(grad, rows, batch.parameter(A, in_dims[2]), batch.parameter(B, in_dims[3]))
    (out_A, dim_A), (out_B, dim_B) = batch.parameter_output(grad_A), batch.parameter_output(grad_B)
    return (out_A, out_B), (dim_A, dim_B)
