"""client_mlp: the scores of each client's own MLP, all layers in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_device, check_draw, check_float, check_index, check_like, check_range, check_shape
from ._library import eager_op, is_plain, promoted, register_fake, register_not_differentiable
from .client_layer import client_layer, client_layer_reference
from .dot_scores import dot_scores, dot_scores_reference

_OP = eager_op("client_mlp")
_BACKWARD = eager_op("client_mlp_backward")

_Numbers = tuple[float, int, int, int]  # p, seed, round, epoch
_Functions = tuple[Callable[..., Tensor], Callable[..., Tensor]]  # of a layer, of the scores
_OPS: _Functions = (client_layer, dot_scores)
_REFERENCES: _Functions = (client_layer_reference, dot_scores_reference)


def _check_shapes(x: Tensor, weights: Sequence[Tensor], output: Tensor, items: Tensor, p: float) -> None:
    check_float(x, "x")
    check_index(items, "items")
    check_device(items, x, "items", "x")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected shape [P, I] or [C, P, I], got {list(x.shape)}")
    check_shape(items, tuple(x.shape[:-1]), "items", "x without I")
    if len(weights) == 0:
        raise ValueError("weights: expected at least one layer, got none")
    width = x.size(-1)
    for layer, weight in enumerate(weights):
        name = f"weights[{layer}]"
        check_like(weight, x, name, "x")
        if weight.dim() != x.dim():
            expected = "[C, O, I]" if x.dim() == 3 else "[O, I]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(weight.shape)}")
        check_shape(weight, (*x.shape[:-2], weight.size(-2), width), name, "(C,) O and the width before it")
        width = weight.size(-2)
    check_like(output, x, "output", "x")
    check_shape(output, (*x.shape[:-2], width), "output", "(C,) and the O of the last weight")
    if not 0 <= p < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output: Tensor,
    items: Tensor,
    clients: Tensor,
    p: float,
    seed: int,
    round: int,
    epoch: int,
) -> None:
    _check_shapes(x, weights, output, items, p)
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)}, one a layer, got {len(biases)}")
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_like(bias, x, f"biases[{layer}]", "x")
        check_shape(bias, tuple(weight.shape[:-1]), f"biases[{layer}]", "its weight without I")
    check_index(clients, "clients")
    check_device(clients, x, "clients", "x")
    check_shape(clients, tuple(x.shape[:-2]), "clients", "C, or none for one client")
    check_draw(seed, round)
    check_range(epoch, 0, 2**16, "epoch")


def client_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output: Tensor,
    items: Tensor,
    clients: Tensor,
    p: float = 0.0,
    seed: int = 0,
    round: int = 0,
    epoch: int = 0,
) -> Tensor:
    """Scores of each client's own MLP: `client_layer` for every hidden layer, then `dot_scores`.

    For stacked clients it is one op, which on the CPU takes a client through all layers while they are in the
    core's cache; for one client, for second derivatives, and under torch.func, tracing and compilation, it is
    the calls of the ops that it equals bit for bit.

    Args:
        x: [C, P, I], or [P, I] for one client; float32, float64, float16 or bfloat16.
        weights: of each hidden layer [C, O, I] or [O, I], the I of one the O of that before; at most 256.
        biases: of each hidden layer [C, O] or [O]. output: [C, O] or [O], O of the last layer.
        items: int32 or int64 [C, P] or [P]; positions of -1 are padding, as in `client_layer`.
        clients: int32 or int64 [C] or [], the user ids, in [0, 2^32).
        p: probability of dropping a hidden unit, in [0, 1).
        seed, round, epoch: as in `client_dropout`, whose layers are numbered from 0.

    Returns:
        [C, P] or [P], zero at padding. Gradients reach x, weights, biases and output.

    Raises:
        ValueError: a shape or number does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        IndexError: a client is not in [0, 2^32).

    Equivalent to::

        for layer, (weight, bias) in enumerate(zip(weights, biases)):
            x = client_layer(x, weight, bias, items, clients, p, seed, round, epoch, layer)
        dot_scores(x, output)

    Example:
        >>> import torch
        >>> x, weight = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[1., 1.], [-1., 0.]])
        >>> client_mlp(x, [weight], [torch.zeros(2)], torch.ones(2), torch.tensor([7, -1]), torch.tensor(0))
        tensor([3., 0.])
    """
    depth, numbers = len(weights), (p, seed, round, epoch)
    x, output, *layers = promoted(x, output, *weights, *biases)
    weights, biases = layers[:depth], layers[depth:]
    _check(x, weights, biases, output, items, clients, *numbers)
    inputs = (x, output, items, clients, *weights, *biases)
    if x.dim() == 3 and not x.is_meta and not torch.compiler.is_compiling() and is_plain(inputs):
        scores: Tensor = _MLP.apply(x, output, items, clients, numbers, *weights, *biases)  # type: ignore[no-untyped-call]
        return scores
    return _by_layers(_OPS, x, weights, biases, output, items, clients, numbers)


def _by_layers(
    functions: _Functions,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output: Tensor,
    items: Tensor,
    clients: Tensor,
    numbers: _Numbers,
) -> Tensor:
    of_layer, of_scores = functions
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = of_layer(x, weight, bias, items, clients, *numbers, layer)
    return of_scores(x, output)


def client_mlp_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output: Tensor,
    items: Tensor,
    clients: Tensor,
    p: float = 0.0,
    seed: int = 0,
    round: int = 0,
    epoch: int = 0,
) -> Tensor:
    """`client_mlp` in plain PyTorch."""
    numbers = (p, seed, round, epoch)
    _check(x, weights, biases, output, items, clients, *numbers)
    return _by_layers(_REFERENCES, x, weights, biases, output, items, clients, numbers)


class _MLP(torch.autograd.Function):
    """The fused op and its gradient: of the op itself, autograd would not see into the lists of layers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        output: Tensor,
        items: Tensor,
        clients: Tensor,
        numbers: _Numbers,
        *layers: Tensor,
    ) -> Tensor:
        depth = len(layers) // 2
        scores, hidden = _OP(x, layers[:depth], layers[depth:], output, items, clients, *numbers)
        ctx.numbers = numbers
        ctx.save_for_backward(hidden, items, clients, x, output, *layers)
        result: Tensor = scores
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, items, clients, x, output, *layers = ctx.saved_tensors
        depth = len(layers) // 2
        weights, biases = layers[:depth], layers[depth:]
        if torch.is_grad_enabled():  # this gradient is to be differentiated
            inputs = [x, output, *layers]
            wanted = [place for place, t in enumerate(inputs) if t.requires_grad]
            scores = _by_layers(_OPS, x, weights, biases, output, items, clients, ctx.numbers)
            found = torch.autograd.grad(scores, [inputs[place] for place in wanted], grad, create_graph=True)
            grads: list[Tensor | None] = [None] * len(inputs)
            for place, value in zip(wanted, found, strict=True):
                grads[place] = value
            return *grads[:2], None, None, None, *grads[2:]
        grad_x, grad_weights, grad_biases, grad_output = _BACKWARD(
            grad, x, weights, output, hidden, items, ctx.numbers[0]
        )
        return grad_x, grad_output, None, None, None, *grad_weights, *grad_biases


@register_fake("client_mlp")
def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output: Tensor,
    items: Tensor,
    clients: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    _check(x, weights, biases, output, items, clients, *numbers)
    hidden = x.size(1) * sum((weight.size(1) + 7) // 8 * 8 for weight in weights)
    return x.new_empty(x.shape[:2]), x.new_empty(x.size(0), hidden)


@register_fake("client_mlp_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    output: Tensor,
    hidden: Tensor,
    items: Tensor,
    p: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    _check_shapes(x, weights, output, items, p)
    for t, name in ((grad, "grad"), (hidden, "hidden")):
        check_like(t, x, name, "x")
    return (
        x.new_empty(x.shape),
        [weight.new_empty(weight.shape) for weight in weights],
        [weight.new_empty(weight.shape[:2]) for weight in weights],
        output.new_empty(output.shape),
    )


register_not_differentiable("client_mlp")
register_not_differentiable("client_mlp_backward")
