"""client_layer: a hidden layer of each client's own MLP, with ReLU and dropout, that skips padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_device,
    check_draw,
    check_float,
    check_index,
    check_like,
    check_parameter_dim,
    check_range,
    check_shape,
)
from ._library import (
    Dims,
    eager_op,
    or_zeros,
    promoted,
    register_autograd,
    register_fake,
    register_vmap,
    to_front,
    total,
)
from .sampling import client_dropout_reference

_OP = eager_op("client_layer")
_BACKWARD = eager_op("client_layer_backward")


def _check_shapes(x: Tensor, weight: Tensor, items: Tensor, p: float) -> None:
    check_float(x, "x")
    check_like(weight, x, "weight", "x")
    check_index(items, "items")
    check_device(items, x, "items", "x")
    per_client = check_parameter_dim(x, 2, "x", "P, I")
    if weight.dim() != x.dim():
        expected = "[C, O, I]" if per_client else "[O, I]"
        raise ValueError(f"weight: expected shape {expected}, got {list(weight.shape)}")
    lead = tuple(x.shape[:-2])
    check_shape(weight, (*lead, weight.size(-2), x.size(-1)), "weight", "(C,) O and the I of x")
    check_shape(items, tuple(x.shape[:-1]), "items", "x without I")
    if not 0 <= p < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    clients: Tensor,
    p: float,
    seed: int,
    round: int,
    epoch: int,
    layer: int,
) -> None:
    _check_shapes(x, weight, items, p)
    check_like(bias, x, "bias", "x")
    check_shape(bias, tuple(weight.shape[:-1]), "bias", "weight without I")
    check_index(clients, "clients")
    check_device(clients, x, "clients", "x")
    check_shape(clients, tuple(x.shape[:-2]), "clients", "C, or none for one client")
    check_draw(seed, round)
    check_range(epoch, 0, 2**16, "epoch")
    check_range(layer, 0, 2**8, "layer")


def client_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    clients: Tensor,
    p: float = 0.0,
    seed: int = 0,
    round: int = 0,
    epoch: int = 0,
    layer: int = 0,
) -> Tensor:
    """dropout(relu(x weight^T + bias)) for each client's own weights, zero at padding.

    Args:
        x: [C, P, I], or [P, I] for one client; float32, float64, float16 or bfloat16.
        weight: [C, O, I] or [O, I], as in `torch.nn.Linear`; bias: [C, O] or [O]. Of the dtype of x.
        items: int32 or int64 [C, P] or [P]; positions of -1 are padding: their output is zero, they have and
            give no gradient, and cost nothing.
        clients: int32 or int64 [C] or [], the user ids, in [0, 2^32).
        p: probability of dropping an element of the output, in [0, 1); `client_dropout` with the same keys
            drops the same ones.
        seed, round, epoch, layer: as in `client_dropout`.

    Returns:
        [C, P, O] or [P, O], the dtype of x (16-bit types are summed in float32). Gradients reach x, weight
        and bias. Every element is summed in one fixed order, so the bits of a client's results depend
        neither on padding nor on other clients nor on threads (on the CPU). Differentiable twice.

    Raises:
        ValueError: a shape or number does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).
        IndexError: a client is not in [0, 2^32).

    Equivalent to::

        client_dropout(relu(x @ weight.mT + bias.unsqueeze(-2)), clients, p, seed, round, epoch, layer)

    Example:
        >>> import torch
        >>> x, weight = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[1., 1.], [-1., 0.]])
        >>> client_layer(x, weight, torch.zeros(2), torch.tensor([7, -1]), torch.tensor(0))
        tensor([[3., 0.],
                [0., 0.]])
    """
    x, weight, bias = promoted(x, weight, bias)
    _check(x, weight, bias, items, clients, p, seed, round, epoch, layer)
    out: Tensor = _OP(x, weight, bias, items, clients, p, seed, round, epoch, layer)
    return out


def client_layer_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: Tensor,
    clients: Tensor,
    p: float = 0.0,
    seed: int = 0,
    round: int = 0,
    epoch: int = 0,
    layer: int = 0,
) -> Tensor:
    """`client_layer` in plain PyTorch."""
    x, weight, bias = promoted(x, weight, bias)
    _check(x, weight, bias, items, clients, p, seed, round, epoch, layer)
    out = torch.relu(x @ weight.mT + bias.unsqueeze(-2)).masked_fill((items < 0).unsqueeze(-1), 0)
    if p == 0:
        return out
    stacked, ids = (out, clients) if out.dim() == 3 else (out[None], clients[None])
    return client_dropout_reference(stacked, ids, p, seed, round, epoch, layer).reshape(out.shape)


@register_fake("client_layer")
def _fake(x: Tensor, weight: Tensor, bias: Tensor, items: Tensor, clients: Tensor, *numbers: Any) -> Tensor:
    _check(x, weight, bias, items, clients, *numbers)
    return x.new_empty((*x.shape[:-1], weight.size(-2)))


@register_fake("client_layer_backward")
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: Tensor, items: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(x, weight, items, p)
    for t, name in ((grad, "grad"), (out, "out")):
        check_like(t, x, name, "x")
        check_shape(t, (*x.shape[:-1], weight.size(-2)), name, "x with O in place of I")
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, items, _, ctx.p, *_ = inputs
    # The backward asks of the output only which elements are above zero.
    ctx.save_for_backward(x, weight, output.detach(), items)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _BACKWARD(grad, *ctx.saved_tensors, ctx.p)
    return grad_x, grad_weight, grad_bias, *(None,) * 7


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(
    ctx: Any, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor | None, ...]:
    # With g the gradient before the activation: d x = g W, d W = g^T x, d b = sum_p g, each bilinear.
    grad, x, weight, out, items = ctx.saved_tensors
    factor = (out > 0).to(out.dtype) / (1 - ctx.p)
    out_grad = factor * (grad_x @ weight.mT + x @ grad_weight.mT + grad_bias.unsqueeze(-2))
    out_x, out_weight, _ = _BACKWARD(grad, grad_x, grad_weight, out, items, ctx.p)
    return out_grad, out_x, out_weight, None, None, None


def _tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
    x, weight, _, _, _, p, *_ = args
    moved_x, moved_weight, moved_bias, *_ = tangents
    moved = total(
        None if moved_x is None else moved_x @ weight.mT,
        None if moved_weight is None else x @ moved_weight.mT,
        None if moved_bias is None else moved_bias.unsqueeze(-2),
    )
    factor: Tensor = (output.detach() > 0).to(output.dtype) / (1 - p)
    return factor * moved


def _tangent_backward(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
    grad, x, weight, out, items, p = args
    moved_x, moved_weight = or_zeros(tangents[1], x), or_zeros(tangents[2], weight)
    by_x, by_weight, _ = _BACKWARD(grad, moved_x, moved_weight, out, items, p)
    if tangents[0] is None:
        return by_x, by_weight, torch.zeros_like(output[2])
    grad_x, grad_weight, grad_bias = _BACKWARD(tangents[0], x, weight, out, items, p)
    return grad_x + by_x, grad_weight + by_weight, grad_bias


register_autograd("client_layer", _setup, _backward, _tangent)
register_autograd("client_layer_backward", _setup_backward, _double_backward, _tangent_backward)


def _flat(tensors: list[Tensor], per_client: bool) -> list[Tensor]:
    return [t.flatten(0, 1) if per_client else t for t in tensors]


@register_vmap("client_layer")
def _vmap(size: int, in_dims: Dims, *args: Any) -> Any:
    tensors = [to_front(t, d, size) for t, d in zip(args[:5], in_dims[:5], strict=True)]
    per_client = tensors[0].dim() == 4
    out = _OP(*_flat(tensors, per_client), *args[5:])
    return (out.unflatten(0, (size, -1)) if per_client else out), 0


@register_vmap("client_layer_backward")
def _vmap_backward(size: int, in_dims: Dims, *args: Any) -> Any:
    tensors = [to_front(t, d, size) for t, d in zip(args[:5], in_dims[:5], strict=True)]
    per_client = tensors[1].dim() == 4
    outs = _BACKWARD(*_flat(tensors, per_client), args[5])
    return tuple(o.unflatten(0, (size, -1)) if per_client else o for o in outs), (0, 0, 0)
