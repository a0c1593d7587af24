"""client_embedding: a batched embedding, one weight for each client."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import (
    check_client_items,
    check_device,
    check_float,
    check_grad,
    check_index,
    check_not_negative,
    check_parameter_dim,
)
from ._library import (
    Dims,
    LookupBatch,
    eager_op,
    linear_tangent,
    register_autograd,
    register_fake,
    register_vmap,
)
from ._plain import check_index_values, gather_rows

_OP = eager_op("client_embedding")
_BACKWARD = eager_op("client_embedding_backward")


def _check(rows: Tensor, weight: Tensor) -> None:
    check_index(rows, "rows")
    check_float(weight, "weight")
    if check_parameter_dim(weight, 2, "weight", "R, D"):
        check_client_items(rows, weight, "rows", "weight")
    check_device(rows, weight, "rows", "weight")


def client_embedding(rows: Tensor, weight: Tensor) -> Tensor:
    """Reads rows of an embedding, of each client's own or of one that all share.

    Args:
        rows: int32 or int64. [C, P] with per-client weights, any shape with shared ones; -1 is padding.
        weight: [C, R, D] (row rows[c, p] of weight[c]) or [R, D]; float32, float64, float16 or bfloat16.

    Returns:
        rows.shape + [D], the dtype of weight; zero at padding, where no gradient flows either. The backward
        sums each row's gradient in the order of positions: the same bits for any number of threads.
        Differentiable twice.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        IndexError: a row is neither -1 nor in [0, R) (on CUDA a device-side assertion).

    Equivalent to::

        torch.stack([F.embedding(r, w) for r, w in zip(rows, weight)])       # zero at rows == -1

    Example:
        >>> import torch
        >>> weight = torch.arange(12.).reshape(2, 3, 2)                       # 2 clients, 3 rows, width 2
        >>> client_embedding(torch.tensor([[2, -1], [0, 1]]), weight)
        tensor([[[4., 5.],
                 [0., 0.]],
        <BLANKLINE>
                [[6., 7.],
                 [8., 9.]]])
    """
    _check(rows, weight)
    out: Tensor = _OP(rows, weight)
    return out


def client_embedding_reference(rows: Tensor, weight: Tensor) -> Tensor:
    """`client_embedding` in plain PyTorch."""
    _check(rows, weight)
    check_index_values(rows, weight.size(-2), "rows")
    return gather_rows(weight, rows)


@register_fake("client_embedding")
def _fake(rows: Tensor, weight: Tensor) -> Tensor:
    _check(rows, weight)
    return weight.new_empty((*rows.shape, weight.size(-1)))


@register_fake("client_embedding_backward")
def _fake_backward(grad: Tensor, rows: Tensor, num_rows: int, per_client: bool) -> Tensor:
    check_grad(grad, rows, per_client, "rows")
    check_not_negative(num_rows, "num_rows")
    shape = (num_rows, grad.size(-1))
    return grad.new_empty((rows.size(0), *shape) if per_client else shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight = inputs
    ctx.save_for_backward(rows)
    ctx.num_rows, ctx.per_client = weight.size(-2), weight.dim() == 3


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return None, _BACKWARD(grad, rows, ctx.num_rows, ctx.per_client)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _double_backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return _OP(rows, grad_weight), None, None, None


def _tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
    moved: Tensor = _OP(args[0], tangents[1])
    return moved


register_autograd("client_embedding", _setup, _backward, _tangent)
register_autograd("client_embedding_backward", _setup_backward, _double_backward, linear_tangent(_BACKWARD))


@register_vmap("client_embedding")
def _vmap(size: int, in_dims: Dims, rows: Tensor, weight: Tensor) -> Any:
    per_client = weight.dim() - (in_dims[1] is not None) == 3
    batch = LookupBatch(size, per_client, in_dims[1] is not None)
    return batch.output(_OP(batch.positions(rows, in_dims[0]), batch.parameter(weight, in_dims[1])))


@register_vmap("client_embedding_backward")
def _vmap_backward(
    size: int, in_dims: Dims, grad: Tensor, rows: Tensor, num_rows: int, per_client: bool
) -> Any:
    batch = LookupBatch(size, per_client, batched=True)
    rows = batch.positions(rows, in_dims[1])
    return batch.parameter_output(_BACKWARD(batch.positions(grad, in_dims[0], 1), rows, num_rows, True))
