"""rq_lookup: embeddings as sums of codebook rows that an item's residual-quantization codes select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_base,
    check_client_items,
    check_codes,
    check_device,
    check_dim,
    check_float,
    check_grad,
    check_index,
    check_not_negative,
    check_parameter_dim,
    check_size,
)
from ._library import (
    Dims,
    LookupBatch,
    add_batched_base,
    eager_op,
    linear_tangent,
    loop_over,
    promoted,
    register_autograd,
    register_fake,
    register_vmap,
)
from ._plain import check_index_values, embedding, gather_rows, nonempty, pad_to_zero, values_available

_OP = eager_op("rq_lookup")
_BACKWARD = eager_op("rq_lookup_backward")
_ROWS = eager_op("client_embedding")
_ROWS_BACKWARD = eager_op("client_embedding_backward")


def _check(items: Tensor, codes: Tensor, codebooks: Tensor, base: Tensor | None) -> None:
    check_index(items, "items")
    check_codes(codes, "codes")
    check_float(codebooks, "codebooks")
    check_dim(codes, 2, "codes", "[I, L]")
    if check_parameter_dim(codebooks, 3, "codebooks", "L, K, D"):
        check_client_items(items, codebooks, "items", "codebooks")
    check_size(codes, 1, codebooks.size(-3), "codes", "L, the levels of codebooks")
    check_device(items, codebooks, "items", "codebooks")
    check_device(codes, codebooks, "codes", "codebooks")
    check_base(base, codes.size(0), codebooks.size(-1), codebooks, "codebooks")


def rq_lookup(items: Tensor, codes: Tensor, codebooks: Tensor, base: Tensor | None = None) -> Tensor:
    """Sums, for each item, the row of every codebook that its codes select, and adds the item's base vector.

    Args:
        items: int32 or int64. [C, P] with per-client codebooks, any shape with shared ones; -1 is padding.
        codes: [I, L] codes of all items, uint8, int16, int32 or int64, each in [0, K).
        codebooks: [C, L, K, D] or [L, K, D]; float32, float64, float16 or bfloat16.
        base: [I, D] vectors that all clients share, of the dtype of codebooks, or None.

    Returns:
        items.shape + [D], the dtype of codebooks (16-bit types are summed in float32); zero at padding, where
        no gradient flows either. Gradients reach codebooks and, where it requires one, base; the backward
        sums in the order
        of positions: the same bits for any number of threads. Differentiable twice. Under torch.vmap, batched
        codebooks become per-client codebooks of one call; batched codes cost a call a sample.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).
        IndexError: an item is neither -1 nor in [0, I), or a code that is read is not in [0, K)
            (on CUDA a device-side assertion).

    Equivalent to::

        rows = [codebooks[l, codes[items, l].long()] for l in range(L)]      # zero at items == -1
        sum(rows) + base[items]

    As in RQ-VAE: Zeghidour et al., SoundStream (2021), section III-C; Rajput et al., TIGER (2023), section
    3.1.

    Example:
        >>> import torch
        >>> codes = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)        # 2 items, 2 levels
        >>> codebooks = torch.tensor([[[1., 1.], [2., 2.]], [[10., 0.], [0., 10.]]])
        >>> rq_lookup(torch.tensor([0, 1, -1]), codes, codebooks)
        tensor([[ 1., 11.],
                [ 2., 12.],
                [ 0.,  0.]])
    """
    codebooks, base = promoted(codebooks, base)
    _check(items, codes, codebooks, base)
    out: Tensor = _OP(items, codes, codebooks, base)
    return out


def rq_lookup_reference(
    items: Tensor, codes: Tensor, codebooks: Tensor, base: Tensor | None = None
) -> Tensor:
    """`rq_lookup` in plain PyTorch."""
    codebooks, base = promoted(codebooks, base)
    _check(items, codes, codebooks, base)
    check_index_values(items, codes.size(0), "items")
    picked = nonempty(codes)[items.clamp(min=0).long()].long()  # [*items.shape, L]
    if values_available(items):
        check_index_values(picked[items >= 0], codebooks.size(-2), "codes", padding=False)
    codebooks = nonempty(codebooks)
    *clients, levels, size, _ = codebooks.shape
    index = picked + size * torch.arange(levels, device=items.device)
    if clients:
        index = index + levels * size * torch.arange(clients[0], device=items.device).view(-1, 1, 1)
    rows = embedding(index, codebooks.flatten(0, -2))
    out = pad_to_zero(rows.sum(-2), items)
    return out if base is None else out + gather_rows(base, items)


@register_fake("rq_lookup")
def _fake(items: Tensor, codes: Tensor, codebooks: Tensor, base: Tensor | None) -> Tensor:
    _check(items, codes, codebooks, base)
    return codebooks.new_empty((*items.shape, codebooks.size(-1)))


@register_fake("rq_lookup_backward")
def _fake_backward(
    grad: Tensor, items: Tensor, codes: Tensor, codebook_size: int, per_client: bool
) -> Tensor:
    check_grad(grad, items, per_client)
    check_codes(codes, "codes")
    check_dim(codes, 2, "codes", "[I, L]")
    check_not_negative(codebook_size, "codebook_size")
    shape = (codes.size(1), codebook_size, grad.size(-1))
    return grad.new_empty((items.size(0), *shape) if per_client else shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    items, codes, codebooks, _ = inputs
    ctx.save_for_backward(items, codes)
    ctx.codebook_size, ctx.per_client = codebooks.size(-2), codebooks.dim() == 4
    ctx.num_items = codes.size(0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    items, codes = ctx.saved_tensors
    grad_codebooks = grad_base = None
    if ctx.needs_input_grad[2]:
        grad_codebooks = _BACKWARD(grad, items, codes, ctx.codebook_size, ctx.per_client)
    if ctx.needs_input_grad[3]:
        grad_base = _ROWS_BACKWARD(grad, items, ctx.num_items, False)
    return None, None, grad_codebooks, grad_base


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _double_backward(ctx: Any, grad_codebooks: Tensor) -> tuple[Tensor | None, ...]:
    items, codes = ctx.saved_tensors
    return _OP(items, codes, grad_codebooks, None), None, None, None, None


def _tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
    items, codes, *_ = args
    _, _, codebooks, base = tangents
    moved: Tensor = _ROWS(items, base) if codebooks is None else _OP(items, codes, codebooks, base)
    return moved


register_autograd("rq_lookup", _setup, _backward, _tangent)
register_autograd("rq_lookup_backward", _setup_backward, _double_backward, linear_tangent(_BACKWARD))


@register_vmap("rq_lookup")
def _vmap(
    size: int, in_dims: Dims, items: Tensor, codes: Tensor, codebooks: Tensor, base: Tensor | None
) -> Any:
    items_dim, codes_dim, books_dim, base_dim = in_dims
    if codes_dim is not None:
        return loop_over(_OP, size, in_dims, (items, codes, codebooks, base))
    per_client = codebooks.dim() - (books_dim is not None) == 4
    batch = LookupBatch(size, per_client, batched=books_dim is not None)
    own_base = base if base_dim is None else None
    out = batch.output(
        _OP(batch.positions(items, items_dim), codes, batch.parameter(codebooks, books_dim), own_base)
    )
    if base is None or base_dim is None:
        return out
    return add_batched_base(out, size, items, items_dim, base, base_dim)


@register_vmap("rq_lookup_backward")
def _vmap_backward(
    size: int, in_dims: Dims, grad: Tensor, items: Tensor, codes: Tensor, codebook_size: int, per_client: bool
) -> Any:
    if in_dims[2] is not None:
        return loop_over(_BACKWARD, size, in_dims, (grad, items, codes, codebook_size, per_client))
    batch = LookupBatch(size, per_client, batched=True)
    items = batch.positions(items, in_dims[1])
    grad = batch.positions(grad, in_dims[0], trailing=1)
    return batch.parameter_output(_BACKWARD(grad, items, codes, codebook_size, True))
