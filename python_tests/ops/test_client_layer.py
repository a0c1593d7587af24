"""client_layer: every type and width against its twin, the same bits whatever the padding, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, Case, assert_equals_twin, padded_items
from torch import Tensor


def layer_case(
    clients: int | None, positions: int, inputs: int, outputs: int, p: float, seed: int = 0
) -> Case:
    g = torch.Generator().manual_seed(seed)
    lead = () if clients is None else (clients,)
    x, weight, bias = (
        torch.randn((*lead, *shape), generator=g)
        for shape in ((positions, inputs), (outputs, inputs), (outputs,))
    )
    items = padded_items((*lead, positions), 9, g)
    ids = torch.randint(2**31, lead, generator=g)
    return Case("layer", lambda o, *t: o.client_layer(*t, p, 3, 1, 2, 5), (x, weight, bias, items, ids))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(None, 70, 5, 3), (2, 70, 33, 65), (3, 9, 130, 17), (2, 130, 72, 64), (5, 150, 64, 33)],
    ids=str,
)
def test_every_type(dtype: torch.dtype, shape: tuple[int | None, int, int, int], target: Any) -> None:
    assert_equals_twin(layer_case(*shape, p=0.5).to(target.device), target.ops, dtype, terms=256)


@settings(deadline=None, max_examples=30)
@given(
    clients=st.none() | st.integers(0, 5),
    positions=st.integers(0, 70),
    inputs=st.integers(0, 20),
    outputs=st.integers(0, 40),
    p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 9),
)
def test_any_shape(target: Any, **shape: Any) -> None:
    assert_equals_twin(layer_case(**shape).to(target.device), target.ops, torch.float64)


def results(ops: Any, x: Tensor, weight: Tensor, bias: Tensor, items: Tensor, ids: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = ops.client_layer(*leaves, items, ids, 0.5, 3, 1, 2, 5)
    return [out.detach(), *torch.autograd.grad(out, leaves, (17 * out.detach()).frac())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(33, 70), (64, 40)], ids=str)
def test_same_bits_alone_and_among_others_with_padding(
    widths: tuple[int, int], dtype: torch.dtype, target: Any
) -> None:
    """A client alone against itself with more padding, also of NaNs, among other clients, on two threads."""
    g, (inputs, outputs) = torch.Generator().manual_seed(1), widths
    clients = 200 if target.name == "cuda" else 5  # more than a GPU has multiprocessors
    x, weight, bias = (
        torch.randn(clients, *shape, generator=g).to(target.device, dtype)
        for shape in ((150, inputs), (outputs, inputs), (outputs,))
    )
    items = torch.zeros(clients, 150, dtype=torch.int64, device=target.device)
    ids = torch.arange(4, 4 + clients)
    items[1, 131:] = -1
    x[1, 131:] = torch.nan
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = [t[1] for t in results(target.ops, x, weight, bias, items, ids.to(target.device))]
    finally:
        torch.set_num_threads(before)
    alone = results(target.ops, x[1, :131], weight[1], bias[1], items[1, :131], ids[1].to(target.device))
    for mine, theirs in zip(alone, together, strict=True):
        assert torch.equal(mine, theirs[: len(mine)])
        assert not theirs[len(mine) :].any()


def test_drops_what_client_dropout_drops(target: Any) -> None:
    x, ones = torch.ones(2, 50, 1, device=target.device), torch.ones(2, 8, 1, device=target.device)
    items, ids = torch.zeros(2, 50, dtype=torch.int64, device=target.device), torch.tensor([3, 8])
    ids = ids.to(target.device)
    out = target.ops.client_layer(x, ones, torch.zeros_like(ones[..., 0]), items, ids, 0.25, 9, 4, 2, 1)
    assert torch.equal(out, target.ops.client_dropout(torch.ones_like(out), ids, 0.25, 9, 4, 2, 1))
    assert 0.2 < float((out == 0).float().mean()) < 0.3


def test_a_nan_stays_one(target: Any) -> None:
    x = torch.tensor([[torch.nan], [1.0]], device=target.device)
    one, zero = torch.ones(1, 1, device=target.device), torch.zeros(1, device=target.device)
    out = target.ops.client_layer(
        x, one, zero, *(torch.zeros(s, dtype=torch.int64, device=target.device) for s in ((2,), ()))
    )
    assert out.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: torch.zeros(3)}, ValueError, r"x: expected shape \[P, I\] or \[C, P, I\], got \[3\]"),
        ({1: torch.zeros(2, 4, 9)}, ValueError, r"weight: expected shape \[2, 4, 5\]"),
        ({2: torch.zeros(2, 9)}, ValueError, r"bias: expected shape \[2, 4\]"),
        ({1: torch.zeros(2, 4, 5).double()}, TypeError, r"weight: expected the dtype of x"),
        ({3: torch.zeros(2, 9, dtype=torch.int64)}, ValueError, r"items: expected shape \[2, 3\]"),
        ({3: torch.zeros(2, 3)}, TypeError, r"items: expected int32 or int64"),
        ({4: torch.zeros(3, dtype=torch.int64)}, ValueError, r"clients: expected shape \[2\]"),
        ({5: 1.0}, ValueError, r"p: expected a probability from 0 to below 1, got 1\.0"),
        ({9: 256}, ValueError, r"layer: expected 0 to 255, got 256"),
    ],
)
def test_errors(changes: dict[int, Any], error: type[Exception], message: str, target: Any) -> None:
    index = torch.int64
    arguments = [
        torch.zeros(2, 3, 5),
        torch.zeros(2, 4, 5),
        torch.zeros(2, 4),
        torch.zeros(2, 3, dtype=index),
        torch.zeros(2, dtype=index),
        *(0.5, 1, 2, 3, 4),
    ]
    for place, value in changes.items():
        arguments[place] = value
    placed = [a.to(target.device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(error, match=message):
        target.ops.client_layer(*placed)
