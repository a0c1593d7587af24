"""bpr_loss and bce_loss: each client's mean loss over padded positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_device, check_float, check_index, check_like, check_shape
from ._library import (
    Dims,
    eager_op,
    or_zeros,
    promoted,
    register_autograd,
    register_fake,
    register_vmap,
    to_front,
)

_BPR, _BCE = eager_op("bpr_loss"), eager_op("bce_loss")


def _check(positive: Tensor, negative: Tensor, items: Tensor) -> None:
    check_float(positive, "positive")
    if positive.dim() not in (1, 2):
        raise ValueError(f"positive: expected shape [P] or [C, P], got {list(positive.shape)}")
    check_like(negative, positive, "negative", "positive")
    check_shape(negative, tuple(positive.shape), "negative", "the shape of positive")
    check_index(items, "items")
    check_shape(items, tuple(positive.shape), "items", "the shape of positive")
    check_device(items, positive, "items", "positive")


def _weights(items: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / n at each of a client's n positions that hold an item, 0 at padding."""
    valid = items != -1
    return valid.to(dtype) / valid.sum(-1, keepdim=True).clamp(min=1).to(dtype)


def bpr_loss(positive: Tensor, negative: Tensor, items: Tensor) -> Tensor:
    """Bayesian personalised ranking: the mean of -log sigmoid(positive - negative) over positions with an
    item.

    Args:
        positive: [C, P] or [P] scores of the items met; float32, float64, float16 or bfloat16.
        negative: scores of their negatives, of the shape and dtype of positive.
        items: int32 or int64, the shape of positive; only -1 (padding) matters.

    Returns:
        [C] or a scalar, the dtype of positive (16-bit types are summed in float32); 0 for a client without an
        item. Gradients reach positive and negative, 0 at padding. Differentiable twice.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).

    Equivalent to::

        valid = items != -1
        -F.logsigmoid(positive - negative)[valid].mean()                     # of each client

    Rendle et al., BPR (2009).

    Example:
        >>> import torch
        >>> bpr_loss(torch.tensor([[1., 0., 7.]]), torch.tensor([[1., 0., 0.]]), torch.tensor([[3, 8, -1]]))
        tensor([0.6931])
    """
    positive, negative = promoted(positive, negative)
    _check(positive, negative, items)
    out: Tensor = _BPR(positive, negative, items)
    return out


def bpr_loss_reference(positive: Tensor, negative: Tensor, items: Tensor) -> Tensor:
    """`bpr_loss` in plain PyTorch."""
    positive, negative = promoted(positive, negative)
    _check(positive, negative, items)
    # Padding is masked before the function, so that an infinity there reaches no gradient.
    difference = (positive - negative).masked_fill(items == -1, 0)
    return (-F.logsigmoid(difference) * _weights(items, positive.dtype)).sum(-1)


def bce_loss(positive: Tensor, negative: Tensor, items: Tensor) -> Tensor:
    """Binary cross-entropy with one negative for each positive: the mean over positions with an item and over
    the pair.

    Args:
        positive: [C, P] or [P] scores (logits) of the items met; float32, float64, float16 or bfloat16.
        negative: scores of their negatives, of the shape and dtype of positive.
        items: int32 or int64, the shape of positive; only -1 (padding) matters.

    Returns:
        [C] or a scalar, the dtype of positive (16-bit types are summed in float32); 0 for a client without an
        item. Gradients reach positive and negative, 0 at padding. Differentiable twice.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).

    Equivalent to::

        valid = items != -1
        logits = torch.cat([positive[valid], negative[valid]])               # of each client
        labels = torch.cat([torch.ones(n), torch.zeros(n)])
        F.binary_cross_entropy_with_logits(logits, labels)

    Example:
        >>> import torch
        >>> bce_loss(torch.tensor([[0., 9.]]), torch.tensor([[0., 9.]]), torch.tensor([[3, -1]]))
        tensor([0.6931])
    """
    positive, negative = promoted(positive, negative)
    _check(positive, negative, items)
    out: Tensor = _BCE(positive, negative, items)
    return out


def bce_loss_reference(positive: Tensor, negative: Tensor, items: Tensor) -> Tensor:
    """`bce_loss` in plain PyTorch."""
    positive, negative = promoted(positive, negative)
    _check(positive, negative, items)
    padding = items == -1
    positive, negative = positive.masked_fill(padding, 0), negative.masked_fill(padding, 0)
    pair = -F.logsigmoid(positive) - F.logsigmoid(-negative)
    return (pair * _weights(items, positive.dtype)).sum(-1) / 2


# Gradients of the backward, in plain PyTorch and so differentiable further. With s = sigmoid and the weight w
# of a position: bpr: d positive = -g w s(negative - positive) = -d negative; bce: d positive = -g w
# s(-positive) / 2, d negative = g w s(negative) / 2.


def _bpr_double_backward(
    grad: Tensor, positive: Tensor, negative: Tensor, items: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight = _weights(items, positive.dtype)
    s = torch.sigmoid((negative - positive).masked_fill(items == -1, 0))
    change = weight * (b - a)
    slope = grad.unsqueeze(-1) * change * s * (1 - s)
    return (change * s).sum(-1), -slope, slope


def _bce_double_backward(
    grad: Tensor, positive: Tensor, negative: Tensor, items: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight = _weights(items, positive.dtype) / 2
    padding = items == -1
    s, t = torch.sigmoid(-positive.masked_fill(padding, 0)), torch.sigmoid(negative.masked_fill(padding, 0))
    a, b, g = weight * a, weight * b, grad.unsqueeze(-1)
    return (b * t - a * s).sum(-1), g * a * s * (1 - s), g * b * t * (1 - t)


def _register(name: str, double_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    op, backward_op = eager_op(name), eager_op(f"{name}_backward")

    @register_fake(name)
    def fake(positive: Tensor, negative: Tensor, items: Tensor) -> Tensor:
        _check(positive, negative, items)
        return positive.new_empty(positive.shape[:-1])

    @register_fake(f"{name}_backward")
    def fake_backward(
        grad: Tensor, positive: Tensor, negative: Tensor, items: Tensor
    ) -> tuple[Tensor, Tensor]:
        _check(positive, negative, items)
        check_like(grad, positive, "grad", "positive")
        check_shape(grad, tuple(positive.shape[:-1]), "grad", "positive without P")
        return positive.new_empty(positive.shape), positive.new_empty(positive.shape)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_op(grad, *ctx.saved_tensors), None

    def backward_twice(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        return *double_backward(*ctx.saved_tensors, a, b), None

    def tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
        positive, negative, items = args
        a, b = or_zeros(tangents[0], positive), or_zeros(tangents[1], negative)
        return double_backward(torch.ones_like(output), positive, negative, items, a, b)[0]

    def tangent_backward(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
        grad, positive, negative, items = args
        a, b = or_zeros(tangents[1], positive), or_zeros(tangents[2], negative)
        # Second derivatives are symmetric.
        by_scores = double_backward(grad, positive, negative, items, a, b)[1:]
        if tangents[0] is None:
            return by_scores
        by_grad = backward_op(tangents[0], positive, negative, items)
        return by_grad[0] + by_scores[0], by_grad[1] + by_scores[1]

    register_autograd(name, setup, backward, tangent)
    register_autograd(f"{name}_backward", setup, backward_twice, tangent_backward)

    @register_vmap(name)
    def vmap(size: int, in_dims: Dims, *args: Tensor) -> Any:
        stacked = [to_front(x, d, size) for x, d in zip(args, in_dims, strict=True)]
        if stacked[0].dim() == 2:
            return op(*stacked), 0
        return op(*(x.flatten(0, 1) for x in stacked)).reshape(stacked[0].shape[:2]), 0

    @register_vmap(f"{name}_backward")
    def vmap_backward(size: int, in_dims: Dims, *args: Tensor) -> Any:
        stacked = [to_front(x, d, size) for x, d in zip(args, in_dims, strict=True)]
        if stacked[1].dim() == 2:
            return backward_op(*stacked), (0, 0)
        gradients = backward_op(*(x.flatten(0, 1) for x in stacked))
        return tuple(g.reshape(stacked[1].shape) for g in gradients), (0, 0)


_register("bpr_loss", _bpr_double_backward)
_register("bce_loss", _bce_double_backward)
