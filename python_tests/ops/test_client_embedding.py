"""client_embedding against torch.nn.functional.embedding and its twin, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, WIDTHS, Case, assert_equals_twin, padded_items

from fedpeft_ext import reference


def make_case(
    clients: int,
    positions: int,
    size: int,
    width: int,
    *,
    per_client: bool = True,
    index: torch.dtype = torch.int64,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    rows = padded_items((clients, positions), max(size, 1), g, index)
    weight = torch.randn((*(clients,) * per_client, size, width), generator=g)
    return Case("embedding", lambda o, *a: o.client_embedding(*a), (rows if size else rows * 0 - 1, weight))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_client", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_every_type(
    width: int, dtype: torch.dtype, per_client: bool, index: torch.dtype, target: Any
) -> None:
    case = make_case(3, 40, 20, width, per_client=per_client, index=index)
    assert_equals_twin(case.to(target.device), target.ops, dtype)


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(0, 4),
    positions=st.integers(0, 17),
    size=st.integers(0, 9),
    width=st.integers(0, 70),
    per_client=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_shape(target: Any, **shape: Any) -> None:
    assert_equals_twin(make_case(**shape).to(target.device), target.ops, torch.float64)


def test_equals_torch_embedding_to_the_bit(target: Any) -> None:
    weight = torch.randn(30, 16, device=target.device, requires_grad=True)
    rows = torch.randint(30, (4, 50), device=target.device)
    ours, theirs = target.ops.client_embedding(rows, weight), F.embedding(rows, weight)
    assert torch.equal(ours, theirs)
    cotangent = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, weight, cotangent), torch.autograd.grad(theirs, weight, cotangent)
    )


def test_nan_in_an_unread_row_does_not_leak(target: Any) -> None:
    weight = torch.tensor([[float("nan")], [1.0]], device=target.device)
    rows = torch.tensor([-1, 1], device=target.device)
    for space in (target.ops, reference):
        assert space.client_embedding(rows, weight).flatten().tolist() == [0.0, 1.0]


def test_large_shared_backward_is_the_same_for_any_threads(target: Any) -> None:
    case = make_case(1, 40_000, 3000, 32, per_client=False).to(target.device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = case.floats(torch.float32, requires_grad=True)
            out = case.function(target.ops)(*inputs)
            results.append(torch.autograd.grad(out, inputs, out.detach()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


GOOD = {"rows": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.zeros(2, 4, 3)}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("float rows", {"rows": torch.zeros(2, 3)}, TypeError, "rows: expected int32 or int64"),
    ("integer weight", {"weight": torch.zeros(2, 4, 3).int()}, TypeError, "weight: expected float32"),
    ("flat weight", {"weight": torch.zeros(3)}, ValueError, "weight: expected shape .R, D. or .C, R, D."),
    ("clients", {"rows": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "rows: expected shape .C, P."),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    for device in (target.device, "meta"):
        arguments = {k: v.to(device) for k, v in (GOOD | change).items()}
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                space.client_embedding(**arguments)


@pytest.mark.parametrize("bad", [-2, 4])
def test_rows_out_of_range(bad: int, target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    for space in (target.ops, reference):
        with pytest.raises(IndexError, match=f"rows: index {bad} at position 1 is out of range"):
            space.client_embedding(torch.tensor([0, bad]), torch.zeros(4, 3))
