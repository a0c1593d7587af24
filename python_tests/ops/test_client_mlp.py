"""client_mlp: the same bits as the calls of client_layer and dot_scores that it stands for; its errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, padded_items
from torch import Tensor

from fedpeft_ext import ops, reference

KEYS = (0.4, 3, 1, 2)


def inputs(
    clients: int,
    positions: int,
    widths: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(positions)

    def draw(*shape: int) -> Tensor:
        return torch.randn(clients, *shape, generator=g).to(device, dtype).requires_grad_()

    weights = [draw(o, i) for i, o in pairwise(widths)]
    return (
        *(draw(positions, widths[0]), weights, [draw(o) for o in widths[1:]], draw(widths[-1])),
        padded_items((clients, positions), 9, g).to(device),
        torch.randint(2**31, (clients,), generator=g).to(device),
    )


def layer_by_layer(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], output: Tensor, items: Tensor, ids: Tensor
) -> Tensor:
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = ops.client_layer(x, weight, bias, items, ids, *KEYS, layer)
    return ops.dot_scores(x, output)


def with_gradients(function: Any, *args: Any) -> list[Tensor]:
    x, weights, biases, output, *_ = args
    scores = function(*args)
    return [scores.detach(), *torch.autograd.grad(scores.sin().sum(), [x, *weights, *biases, output])]


@settings(deadline=None, max_examples=40)
@given(
    clients=st.integers(0, 3),
    positions=st.sampled_from([0, 1, 7, 70, 1100]),
    widths=st.sampled_from([(5, 3), (32, 64, 128, 64), (33, 1, 20), (8, 9, 10, 11, 12)]),
    dtype=st.sampled_from(FLOATS),
)
def test_same_bits_as_layer_by_layer(
    target: Any, clients: int, positions: int, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    if target.name == "emulated":  # which is slow
        positions = min(positions, 12)
    args = inputs(clients, positions, widths, dtype, target.device)
    for mine, expected in zip(
        with_gradients(lambda *a: ops.client_mlp(*a, *KEYS), *args),
        with_gradients(layer_by_layer, *args),
        strict=True,
    ):
        assert torch.equal(mine, expected)


def test_under_transforms() -> None:
    x, weights, biases, output, items, ids = inputs(2, 6, (4, 3), torch.float64)

    def of_one(*a: Any) -> Tensor:
        return ops.client_mlp(a[0], [a[1]], [a[2]], a[3], a[4], a[5], *KEYS)

    each = torch.func.vmap(of_one)(x, weights[0], biases[0], output, items, ids)
    assert torch.equal(each, ops.client_mlp(x, weights, biases, output, items, ids, *KEYS))

    def of_first_layer(w: Tensor) -> Tensor:
        return of_one(x[0], w, biases[0][0], output[0], items[0], ids[0]).sum()

    start = weights[0][0].detach()
    twice = torch.func.grad(lambda w: torch.func.grad(of_first_layer)(w).square().sum())(start)
    assert torch.equal(twice, torch.zeros_like(twice))  # linear in one layer, but for its kinks


def test_second_derivatives() -> None:
    x, weights, biases, output, items, ids = inputs(2, 6, (4, 3), torch.float64)
    found = []
    for function in (ops.client_mlp, reference.client_mlp):
        scores = function(x, weights, biases, output, items, ids, *KEYS)
        (grad,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *weights, *biases, output]))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


def test_bad_arguments() -> None:
    x, weights, biases, output, items, ids = inputs(2, 6, (4, 3, 5))
    for space in (ops, reference):
        mlp = space.client_mlp  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="weights: expected at least one layer"):
            mlp(x, [], [], output, items, ids)
        with pytest.raises(ValueError, match=r"weights\[1\]: expected"):
            mlp(x, [weights[0], weights[0]], biases, output, items, ids)
        with pytest.raises(ValueError, match="biases: expected 2, one a layer, got 1"):
            mlp(x, weights, biases[:1], output, items, ids)
        with pytest.raises(ValueError, match="output: expected"):
            mlp(x, weights, biases, output[:, 1:], items, ids)
        with pytest.raises(TypeError, match=r"biases\[1\]: expected the dtype of x"):
            mlp(x, weights, [biases[0], biases[1].double()], output, items, ids)
        with pytest.raises(IndexError, match="clients: "):
            mlp(x, weights, biases, output, items, ids - 2**31, 0.5)
        with pytest.raises(ValueError, match="p: expected a probability"):
            mlp(x, weights, biases, output, items, ids, 1.0)
