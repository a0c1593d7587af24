"""lora_lookup against its twin over shapes and dtypes, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, WIDTHS, Case, assert_equals_twin, padded_items

from fedpeft_ext import reference


def make_case(
    clients: int,
    positions: int,
    num_items: int,
    rank: int,
    width: int,
    *,
    per_client: bool = True,
    base: bool = True,
    rows: int | None = None,
    index: torch.dtype = torch.int64,
    seed: int = 0,
) -> Case:
    """`rows` is the number of rows that A holds; None: one for each item."""
    g = torch.Generator().manual_seed(seed)
    lead = (clients,) * per_client
    items = padded_items((clients, positions), num_items, g, index)
    A = torch.randn((*lead, num_items if rows is None else rows, rank), generator=g)
    floats = [A, torch.randn((*lead, width, rank), generator=g)]
    floats += [torch.randn(num_items, width, generator=g)] * base
    at = () if rows is None else (torch.where(items < 0, -1, items % max(rows, 1)),)

    def run(ops: Any, items: torch.Tensor, *rest: torch.Tensor) -> Any:
        where = rest[-1] if at else None
        factors = rest[:-1] if at else rest
        return ops.lora_lookup(items, *factors[:2], factors[2] if base else None, where)

    return Case("lora", run, (items, *floats, *at))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_client", [False, True])
def test_every_width(width: int, dtype: torch.dtype, per_client: bool, target: Any) -> None:
    case = make_case(3, 11, 20, 4, width, per_client=per_client)
    assert_equals_twin(case.to(target.device), target.ops, dtype)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 16, 33])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_every_rank(rank: int, index: torch.dtype, target: Any) -> None:
    case = make_case(2, 9, 12, rank, 16, rows=5, index=index)
    assert_equals_twin(case.to(target.device), target.ops, torch.float32)


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(0, 4),
    positions=st.integers(0, 17),
    num_items=st.integers(1, 9),
    rank=st.integers(1, 6),
    width=st.integers(1, 70),
    per_client=st.booleans(),
    base=st.booleans(),
    rows=st.none() | st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_any_shape(target: Any, **shape: Any) -> None:
    # Gradients of one row are sums over all positions and columns.
    assert_equals_twin(make_case(**shape).to(target.device), target.ops, torch.float64, terms=256)


def test_items_and_rows_may_differ_in_integer_type(target: Any) -> None:
    case = make_case(2, 5, 9, 2, 4, rows=3, index=torch.int32).to(target.device)
    *rest, rows = case.tensors
    assert torch.equal(case.run(target.ops, *rest, rows.long()), case.run(target.ops, *rest, rows))


def test_large_shared_backward_is_the_same_for_any_threads(target: Any) -> None:
    case = make_case(1, 20_000, 3000, 4, 32, per_client=False).to(target.device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = case.floats(torch.float32, requires_grad=True)
            out = case.function(target.ops)(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs, out.detach())))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


GOOD = {
    "items": torch.zeros(2, 3, dtype=torch.int64),
    "A": torch.zeros(2, 4, 3),
    "B": torch.zeros(2, 5, 3),
    "base": torch.zeros(9, 5),
    "rows": torch.zeros(2, 3, dtype=torch.int64),
}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("float items", {"items": torch.zeros(2, 3)}, TypeError, "items: expected int32 or int64"),
    ("float rows", {"rows": torch.zeros(2, 3)}, TypeError, "rows: expected int32 or int64"),
    ("rows shape", {"rows": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "rows: expected shape .2, 3."),
    ("integer A", {"A": torch.zeros(2, 4, 3).int()}, TypeError, "A: expected float32"),
    ("flat A", {"A": torch.zeros(3)}, ValueError, "A: expected shape"),
    ("shared B", {"B": torch.zeros(5, 3)}, ValueError, "B: expected shape .C, D, r."),
    (
        "rank 0",
        {"A": torch.zeros(2, 4, 0), "B": torch.zeros(2, 5, 0)},
        ValueError,
        "A: expected a rank of at least 1",
    ),
    ("rank", {"B": torch.zeros(2, 5, 4)}, ValueError, "B: expected size 3 .r, the rank of A"),
    ("clients of B", {"B": torch.zeros(3, 5, 3)}, ValueError, "B: expected size 2 .C"),
    ("dtype of B", {"B": torch.zeros(2, 5, 3).double()}, TypeError, "B: expected the dtype of A"),
    ("clients", {"items": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "items: expected shape .C, P."),
    ("base width", {"base": torch.zeros(9, 6)}, ValueError, "base: expected size 5"),
    ("base items", {"base": torch.zeros(9, 5), "rows": None}, ValueError, "base: expected size 4"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    target.ops.lora_lookup(**{k: v.to(target.device) for k, v in GOOD.items()})
    for device in (target.device, "meta"):
        arguments = {k: None if v is None else v.to(device) for k, v in (GOOD | change).items()}
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                space.lora_lookup(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": torch.tensor([[0, 9, 1]] * 2)}, "items: index 9"),
        ({"items": torch.tensor([[0, -2, 1]] * 2)}, "items: index -2"),
        ({"rows": torch.tensor([[0, 4, 1]] * 2)}, "rows: index 4"),
        ({"rows": torch.tensor([[0, -1, 1]] * 2)}, "rows: "),
        ({"items": torch.tensor([[0, -1, 1]] * 2)}, "rows: "),
    ],
)
def test_indices_out_of_range(change: dict[str, Any], message: str, target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    for space in (target.ops, reference):
        with pytest.raises(IndexError, match=message):
            space.lora_lookup(**(GOOD | change))


def test_the_raw_op_refuses_rank_0(target: Any) -> None:
    items, A, B = GOOD["items"].to(target.device), torch.zeros(2, 4, 0), torch.zeros(2, 5, 0)
    A, B = A.to(target.device), B.to(target.device)
    raw = torch.ops.fedpeft_ext
    with pytest.raises(ValueError, match=r"A: expected a rank of at least 1, got shape .2, 4, 0"):
        raw.lora_lookup(items, A, B, None, None)
    with pytest.raises(ValueError, match="A: expected a rank of at least 1"):
        raw.lora_lookup_backward(torch.zeros(2, 3, 5, device=items.device), items, A, B)
