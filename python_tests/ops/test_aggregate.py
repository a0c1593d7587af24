"""touched_rows, accumulate_updates_ and apply_updates_ against torch.unique, loops and their twins, and their
errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, padded_items
from torch import Tensor

from fedpeft_ext import reference


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(0, 5),
    positions=st.integers(0, 40),
    num_items=st.integers(1, 60),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 20),
)
def test_touched_rows(
    target: Any, clients: int, positions: int, num_items: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    items = padded_items((clients, positions), num_items, g, dtype).to(target.device)
    rows, index = target.ops.touched_rows(items)
    for a, b in zip((rows, index), reference.touched_rows(items), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype == dtype
    counts = []
    for c in range(clients):
        distinct = items[c][items[c] >= 0].unique()
        counts.append(len(distinct))
        assert torch.equal(rows[c, : len(distinct)], distinct)
        assert bool((rows[c, len(distinct) :] == -1).all())
        held = items[c] >= 0
        assert torch.equal(rows[c][index[c][held].long()], items[c][held])
        assert bool((index[c][~held] == -1).all())
    assert rows.size(1) == max(counts, default=0)


def test_touched_rows_of_huge_items(target: Any) -> None:
    items = torch.tensor([[2**62, 3, 2**62, 2**40]], device=target.device)
    rows, index = target.ops.touched_rows(items)
    assert rows.tolist() == [[3, 2**40, 2**62]]
    assert index.tolist() == [[2, 0, 2, 1]]


def test_touched_rows_under_vmap(target: Any) -> None:
    items = torch.tensor([[[5, 5, 1]], [[2, -1, 2]]], device=target.device)
    rows, index = torch.func.vmap(target.ops.touched_rows)(items)
    assert rows.tolist() == [[[1, 5]], [[2, -1]]]
    assert index.tolist() == [[[1, 1, 0]], [[0, -1, 0]]]


def test_touched_rows_compile_with_an_unbacked_size(target: Any) -> None:
    def count(items: Tensor) -> Tensor:
        rows, index = target.ops.touched_rows(items)
        return rows.sum() + index.sum()

    torch.compiler.reset()
    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    for items in ([[4, 4, 1]], [[7, 8, 9]]):
        t = torch.tensor(items, device=target.device)
        assert int(compiled(t)) == int(count(t))


def test_bad_touched_rows(target: Any) -> None:
    for space in (target.ops, reference):
        with pytest.raises(ValueError, match=r"items: expected shape .C, N., got .3."):
            space.touched_rows(torch.zeros(3, dtype=torch.int64, device=target.device))
        with pytest.raises(TypeError, match="items: expected int32 or int64"):
            space.touched_rows(torch.zeros(1, 3, device=target.device))
        if target.device.type == "cpu":
            with pytest.raises(IndexError, match="items: index -2 at position 1"):
                space.touched_rows(torch.tensor([[0, -2]]))


# Accumulation -----------------------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, clients: int) -> None:
    """Each addition may round to the dtype of the total."""
    eps = torch.finfo(actual.dtype).eps
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=(clients + 1) * eps * scale * 4
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(deadline=None, max_examples=15)
@given(
    clients=st.integers(0, 5),
    shape=st.lists(st.integers(0, 9), max_size=3),
    in_double=st.booleans(),
    seed=st.integers(0, 9),
)
def test_dense_updates(
    target: Any, dtype: torch.dtype, clients: int, shape: list[int], in_double: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    updates = torch.randn((clients, *shape), generator=g).to(target.device, dtype)
    weights = torch.rand(clients, generator=g, dtype=torch.float64).to(target.device)
    total = torch.randn(shape, generator=g).to(target.device, torch.float64 if in_double else dtype)
    twin, expected = total.clone(), total.double().clone()
    for c in range(clients):
        expected = expected + updates[c].double() * weights[c]
    target.ops.accumulate_updates_(total, updates, weights)
    reference.accumulate_updates_(twin, updates, weights)
    close(total, expected, clients)
    close(twin, expected, clients)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(deadline=None, max_examples=15)
@given(
    clients=st.integers(0, 5),
    num_items=st.integers(1, 12),
    width=st.integers(0, 40),
    rows=st.integers(0, 8),
    index=st.sampled_from([torch.int32, torch.int64]),
    in_double=st.booleans(),
    seed=st.integers(0, 9),
)
def test_updates_of_rows(
    target: Any,
    dtype: torch.dtype,
    clients: int,
    num_items: int,
    width: int,
    rows: int,
    index: torch.dtype,
    in_double: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    at = padded_items((clients, rows), num_items, g, index).to(target.device)
    updates = torch.randn((clients, rows, width), generator=g).to(target.device, dtype)
    weights = torch.rand(clients, generator=g, dtype=torch.float64).to(target.device)
    total = torch.randn((num_items, width), generator=g).to(
        target.device, torch.float64 if in_double else dtype
    )
    twin, expected = total.clone(), total.double().clone()
    for c in range(clients):
        for r in range(rows):
            if int(at[c, r]) >= 0:
                expected[int(at[c, r])] += updates[c, r].double() * weights[c]
    target.ops.accumulate_updates_(total, updates, weights, at)
    reference.accumulate_updates_(twin, updates, weights, at)
    close(total, expected, clients * rows)
    close(twin, expected, clients * rows)


def test_chunks_of_clients_and_threads_change_no_bit(target: Any) -> None:
    g = torch.Generator().manual_seed(0)
    updates, weights = torch.randn(30, 50, 33, generator=g), torch.rand(30, generator=g, dtype=torch.float64)
    rows = torch.stack([torch.randperm(500, generator=g)[:50] for _ in range(30)])
    updates, weights, rows = (t.to(target.device) for t in (updates, weights, rows))
    results, before = [], torch.get_num_threads()
    try:
        for threads, cuts in ((1, [30]), (2, [30]), (2, [7, 23]), (1, [1] * 30)):
            torch.set_num_threads(threads)
            sparse = torch.zeros(500, 33, dtype=torch.float64, device=target.device)
            dense = torch.zeros(50, 33, dtype=torch.float64, device=target.device)
            for u, w, r in zip(updates.split(cuts), weights.split(cuts), rows.split(cuts), strict=True):
                target.ops.accumulate_updates_(sparse, u, w, r)
                target.ops.accumulate_updates_(dense, u, w)
            results.append((sparse, dense))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_total(target: Any) -> None:
    total = torch.zeros(4, 6, 2, dtype=torch.float64, device=target.device)
    updates = torch.ones(2, 6, 4, device=target.device).transpose(1, 2)
    target.ops.accumulate_updates_(
        total[..., 0], updates, torch.ones(2, dtype=torch.float64, device=target.device)
    )
    assert bool((total[..., 0] == 2).all())
    assert bool((total[..., 1] == 0).all())


def test_accumulation_is_seen_by_autograd_and_refused_by_vmap(target: Any) -> None:
    total = torch.zeros(3, device=target.device, requires_grad=True)
    updates = torch.ones(2, 3, device=target.device)
    weights = torch.ones(2, dtype=torch.float64, device=target.device)
    with pytest.raises(RuntimeError, match="not differentiable"):
        target.ops.accumulate_updates_(total, updates, weights)
    with pytest.raises(NotImplementedError, match="accumulate_updates_ writes in place"):
        torch.func.vmap(lambda t, u: target.ops.accumulate_updates_(t, u, weights))(
            torch.zeros(4, 3, device=target.device), updates.expand(4, 2, 3)
        )


GOOD = {
    "total": torch.zeros(4, 3),
    "updates": torch.zeros(2, 5, 3),
    "weights": torch.zeros(2, dtype=torch.float64),
    "rows": torch.zeros(2, 5, dtype=torch.int64),
}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("integer", {"updates": torch.zeros(2, 5, 3).int()}, TypeError, "updates: expected float32"),
    (
        "total dtype",
        {"total": torch.zeros(4, 3).half()},
        TypeError,
        "total: expected float64 or the dtype of updates",
    ),
    ("weights dtype", {"weights": torch.zeros(2)}, TypeError, "weights: expected torch.float64"),
    ("weights shape", {"weights": torch.zeros(3).double()}, ValueError, "weights: expected shape .2."),
    ("width", {"total": torch.zeros(4, 2)}, ValueError, "updates: expected shape .2, 5, 2."),
    ("flat total", {"total": torch.zeros(3)}, ValueError, "total: expected shape .I, W."),
    ("rows", {"rows": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "updates: expected shape .2, 4, 3."),
    ("float rows", {"rows": torch.zeros(2, 5)}, TypeError, "rows: expected int32 or int64"),
    ("dense shape", {"rows": None}, ValueError, "total: expected shape .5, 3."),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_accumulation(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    for device in (target.device, "meta"):
        for space in (target.ops, reference):
            arguments = {k: None if v is None else v.to(device) for k, v in (GOOD | change).items()}
            with pytest.raises(error, match=message):
                space.accumulate_updates_(**arguments)


def test_a_bad_row_leaves_the_total_alone(target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    for space in (target.ops, reference):
        total, rows = torch.zeros(4, 3), torch.tensor([[0, 1, 2, 3, 0], [0, 4, 0, 0, 0]])
        with pytest.raises(IndexError, match="rows: index 4 at position 6"):
            space.accumulate_updates_(total, torch.ones(2, 5, 3), torch.ones(2).double(), rows)
        assert bool((total == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_rows", [False, True])
def test_on_a_grid_sums_have_no_order(target: Any, dtype: torch.dtype, with_rows: bool) -> None:
    """Sums of multiples of the grid are the same bits in any order, and within the grid of unrounded ones."""
    grid, clients = 2.0**-30, 40
    g = torch.Generator().manual_seed(0)
    updates = torch.randn(clients, 4, 3, generator=g).to(target.device, dtype)
    weights = torch.randint(1, 100, (clients,), generator=g).double().to(target.device)
    rows = torch.stack([torch.randperm(6, generator=g)[:4] for _ in range(clients)]).to(target.device)
    totals = []
    for order in (torch.arange(clients), torch.arange(clients).flip(0)):
        total = torch.zeros(6 if with_rows else 4, 3, dtype=torch.float64, device=target.device)
        at = rows[order] if with_rows else None
        target.ops.accumulate_updates_(total, updates[order], weights[order], at, grid)
        totals.append(total)
    twin, plain = torch.zeros_like(totals[0]), torch.zeros_like(totals[0])
    reference.accumulate_updates_(twin, updates, weights, rows if with_rows else None, grid)
    target.ops.accumulate_updates_(plain, updates, weights, rows if with_rows else None)
    assert torch.equal(*totals)
    assert torch.equal(totals[0] / grid, (totals[0] / grid).round())
    torch.testing.assert_close(totals[0], plain, rtol=0, atol=grid * clients / 2)
    torch.testing.assert_close(totals[0], twin, rtol=0, atol=0 if dtype == torch.float32 else grid * clients)
    with pytest.raises(ValueError, match="grid: expected 0 or a power of two"):
        target.ops.accumulate_updates_(totals[0], updates, weights, rows if with_rows else None, 0.3)
    single = totals[0].float()
    with pytest.raises(ValueError, match="grid: expected 0 unless total is float64"):
        target.ops.accumulate_updates_(single, updates.float(), weights, rows if with_rows else None, grid)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_updates(target: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((50, 7), (30, 8), (3, 4, 5), (6,), (0, 3), (4, 0)):
        parameter = torch.randn(shape, generator=g).to(target.device, dtype)
        total = torch.randn(shape, generator=g, dtype=torch.float64).to(target.device)
        every_other = torch.arange(0, shape[0], 2, device=target.device)
        for rows in (None, every_other, every_other.int().flip(0)):
            ours, plain = (parameter.clone(), total.clone()), (parameter.clone(), total.clone())
            target.ops.apply_updates_(*ours, rows, scale=0.3)
            reference.apply_updates_(*plain, rows, scale=0.3)
            assert torch.equal(ours[1], plain[1])
            # In float64 a processor may round the product and the sum at once.
            torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-15 if dtype == torch.float64 else 0)


def test_bad_rows_to_apply_leave_everything_alone(target: Any) -> None:
    for space in (target.ops, reference):
        parameter = torch.zeros(4, 3, device=target.device)
        total = torch.ones(4, 3, dtype=torch.float64, device=target.device)
        with pytest.raises(TypeError, match=r"total: expected torch.float64"):
            space.apply_updates_(parameter, total.float(), scale=1.0)
        with pytest.raises(ValueError, match="contiguous"):
            space.apply_updates_(parameter.view(3, 4).T, total, scale=1.0)
        if target.device.type == "cuda":  # a device-side assertion ends the process
            continue
        with pytest.raises(IndexError, match="rows: index 4 at position 1"):
            space.apply_updates_(parameter, total, torch.tensor([0, 4]), scale=1.0)
        assert target.name == "emulated" or not parameter.any()
