"""hash_lookup, hash_buckets and make_hashes against their twins and Python's integers, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, WIDTHS, Case, assert_equals_twin, padded_items

from fedpeft_ext import reference

P = 2**61 - 1


def make_case(
    clients: int,
    positions: int,
    num_items: int,
    size: int,
    hashes: int,
    width: int,
    *,
    hidden: int | None = None,
    reduce: str = "mean",
    per_client: bool = True,
    base: bool = True,
    index: torch.dtype = torch.int64,
    seed: int = 0,
) -> Case:
    """`hidden` is the SENet's width; None: no SENet."""
    g = torch.Generator().manual_seed(seed)
    lead = (clients,) * per_client
    items = padded_items((clients, positions), num_items, g, index)
    floats = [torch.randn((*lead, size, width), generator=g)]
    if hidden is not None:
        for shape in ((hidden, hashes), (hidden,), (hashes, hidden), (hashes,)):
            floats.append(torch.randn((*lead, *shape), generator=g))
    floats += [torch.randn(num_items, width, generator=g)] * base
    coefficients = reference.make_hashes(hashes, seed)

    def run(ops: Any, items: torch.Tensor, table: torch.Tensor, *rest: torch.Tensor) -> Any:
        senet = ops.SENetWeights(*rest[:4]) if hidden is not None else None
        tail = rest[4:] if hidden is not None else rest
        return ops.hash_lookup(items, table, coefficients.to(items.device), senet, reduce, *tail)

    return Case("hash", run, (items, *floats))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_client", [False, True])
@pytest.mark.parametrize("hidden", [None, 8])
def test_every_width(
    width: int, dtype: torch.dtype, per_client: bool, hidden: int | None, target: Any
) -> None:
    case = make_case(3, 11, 20, 10, 2, width, hidden=hidden, per_client=per_client)
    assert_equals_twin(case.to(target.device), target.ops, dtype, terms=64)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_reductions_and_index_types(reduce: str, index: torch.dtype, target: Any) -> None:
    case = make_case(2, 9, 12, 7, 3, 8, reduce=reduce, index=index)
    assert_equals_twin(case.to(target.device), target.ops, torch.float32)


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(0, 4),
    positions=st.integers(0, 17),
    num_items=st.integers(1, 9),
    size=st.integers(1, 9),
    hashes=st.integers(1, 6),
    width=st.integers(1, 70),
    hidden=st.none() | st.integers(1, 20),
    reduce=st.sampled_from(["mean", "sum"]),
    per_client=st.booleans(),
    base=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_shape(target: Any, **shape: Any) -> None:
    # One bucket may take every position: gradients of the SENet are sums of 68 products of rows 70 wide.
    assert_equals_twin(make_case(**shape).to(target.device), target.ops, torch.float64, terms=512)


def test_large_shared_backward_is_the_same_for_any_threads(target: Any) -> None:
    before = torch.get_num_threads()
    for hidden in (None, 8):
        case = make_case(1, 20_000, 3000, 64, 2, 32, hidden=hidden, per_client=False).to(target.device)
        results = []
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


# Hashing ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    a=st.integers(0, P - 1) | st.sampled_from([1, P - 1]),
    b=st.integers(0, P - 1) | st.sampled_from([0, P - 1]),
    x=st.integers(0, 2**63 - 1) | st.sampled_from([0, P - 1, P, P + 1, 2**63 - 1, 2**31 - 1]),
    m=st.integers(1, 2**40),
)
def test_buckets_equal_python_integers(target: Any, a: int, b: int, x: int, m: int) -> None:
    items = torch.tensor([x, -1], device=target.device)
    hashes = torch.tensor([[a, b]], device=target.device)
    expected = [[(a * x + b) % P % m], [-1]]
    assert target.ops.hash_buckets(items, hashes, m).tolist() == expected
    assert reference.hash_buckets(items, hashes, m).tolist() == expected


def test_buckets_of_any_shape(target: Any) -> None:
    hashes = target.ops.make_hashes(3, seed=4).to(target.device)
    for shape in ((), (0,), (2, 3, 4)):
        for dtype in (torch.int32, torch.int64):
            items = torch.randint(1000, shape, device=target.device).to(dtype)
            out = target.ops.hash_buckets(items, hashes, 17)
            assert out.shape == (*shape, 3)
            assert out.dtype == torch.int64
            assert torch.equal(out, reference.hash_buckets(items, hashes, 17))


def test_hash_functions_are_reproducible_and_spread(target: Any) -> None:
    few, many = target.ops.make_hashes(2, seed=11), target.ops.make_hashes(64, seed=11)
    assert torch.equal(few, many[:2])
    assert not torch.equal(few, target.ops.make_hashes(2, seed=12))
    assert few.dtype == torch.int64
    assert bool((many[:, 0] >= 1).all())
    assert bool(((many >= 0) & (many < P)).all())
    buckets = target.ops.hash_buckets(torch.arange(50_000), many[:4], 100)
    for h in range(4):
        counts = torch.bincount(buckets[:, h], minlength=100)
        # 500 expected a bucket, standard deviation 22.
        assert 500 - 6 * 23 < int(counts.min()) <= int(counts.max()) < 500 + 6 * 23
    # Two functions of a universal family collide together on about 1 / M^2 of the pairs.
    pairs = {tuple(p) for p in buckets[:, :2].tolist()}
    assert len(pairs) > 9000


def test_bad_hash_requests(target: Any) -> None:
    with pytest.raises(ValueError, match="num_hashes: expected 1 to"):
        target.ops.make_hashes(0, seed=1)
    with pytest.raises(TypeError, match="num_hashes: expected an integer, got float"):
        target.ops.make_hashes(2.5, seed=1)
    with pytest.raises(ValueError, match="seed: expected 0"):
        target.ops.make_hashes(1, seed=-1)
    items, hashes = torch.tensor([1]), torch.tensor([[1, 0]])
    for space in (target.ops, reference):
        with pytest.raises(ValueError, match="table_size: expected 1"):
            space.hash_buckets(items, hashes, 0)
        for value in (-1, P):
            with pytest.raises(ValueError, match="hashes: expected values from 0"):
                space.hash_buckets(items, torch.tensor([[value, 0]]), 3)
        with pytest.raises(IndexError, match="items: index -2"):
            space.hash_buckets(torch.tensor([-2]), hashes, 3)


GOOD = {
    "items": torch.zeros(2, 3, dtype=torch.int64),
    "table": torch.zeros(2, 4, 5),
    "hashes": torch.ones(2, 2, dtype=torch.int64),
    "w1": torch.zeros(2, 3, 2),
    "b1": torch.zeros(2, 3),
    "w2": torch.zeros(2, 2, 3),
    "b2": torch.zeros(2, 2),
    "base": torch.zeros(4, 5),
}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("float items", {"items": torch.zeros(2, 3)}, TypeError, "items: expected int32 or int64"),
    (
        "int32 hashes",
        {"hashes": torch.ones(2, 2, dtype=torch.int32)},
        TypeError,
        "hashes: expected torch.int64",
    ),
    (
        "flat hashes",
        {"hashes": torch.ones(2, dtype=torch.int64)},
        ValueError,
        "hashes: expected shape .H, 2.",
    ),
    (
        "no hashes",
        {"hashes": torch.ones(0, 2, dtype=torch.int64)},
        ValueError,
        "hashes: expected shape .H, 2.",
    ),
    ("empty table", {"table": torch.zeros(2, 0, 5)}, ValueError, "table: expected at least one row"),
    ("flat table", {"table": torch.zeros(5)}, ValueError, "table: expected shape"),
    ("integer table", {"table": torch.zeros(2, 4, 5).int()}, TypeError, "table: expected float32"),
    ("clients", {"items": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, "items: expected shape .C, P."),
    ("shared w1", {"w1": torch.zeros(3, 2)}, ValueError, "w1: expected shape"),
    ("w1 hashes", {"w1": torch.zeros(2, 3, 3)}, ValueError, "w1: expected shape"),
    ("b1", {"b1": torch.zeros(2, 4)}, ValueError, "b1: expected shape"),
    ("w2", {"w2": torch.zeros(2, 3, 2)}, ValueError, "w2: expected shape"),
    ("b2", {"b2": torch.zeros(2, 3)}, ValueError, "b2: expected shape"),
    ("b2 dtype", {"b2": torch.zeros(2, 2).double()}, TypeError, "b2: expected the dtype of table"),
    ("w2 missing", {"w2": None}, TypeError, "w2: expected a Tensor|senet: expected all"),
    ("base width", {"base": torch.zeros(4, 6)}, ValueError, "base: expected size 5"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    def call(
        space: Any, items: Any, table: Any, hashes: Any, w1: Any, b1: Any, w2: Any, b2: Any, base: Any
    ) -> Any:
        return space.hash_lookup(items, table, hashes, space.SENetWeights(w1, b1, w2, b2), "mean", base)

    call(target.ops, **GOOD)
    for device in ("cpu", "meta"):
        arguments = {k: None if v is None else v.to(device) for k, v in (GOOD | change).items()}
        for space in (target.ops, reference):
            with pytest.raises((error, ValueError) if change.get("w2", 0) is None else error, match=message):
                call(space, **arguments)


def test_bad_reduce(target: Any) -> None:
    with pytest.raises(ValueError, match="reduce: expected 'mean' or 'sum', got 'max'"):
        target.ops.hash_lookup(GOOD["items"], GOOD["table"], GOOD["hashes"], reduce="max")


@pytest.mark.parametrize(("bad", "base"), [(-2, None), (4, torch.zeros(4, 5))])
def test_items_out_of_range(bad: int, base: torch.Tensor | None, target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    items = torch.tensor([0, -1, bad])
    for space in (target.ops, reference):
        with pytest.raises(IndexError, match=f"items: index {bad} at position 2 is out of range"):
            space.hash_lookup(items, torch.zeros(4, 5), GOOD["hashes"], base=base)


@pytest.mark.parametrize("per_client", [True, False])
@pytest.mark.parametrize("positions", [6, 5000])
@pytest.mark.parametrize("width", [3, 32])
def test_gradients_of_a_mean_that_cancel_cancel_to_zero(
    width: int, positions: int, per_client: bool, target: Any
) -> None:
    """A rounded 1 / 3 a term would leave a residue of 1e-8, which Adam turns into a full step."""
    g = torch.Generator().manual_seed(width)
    half = torch.randint(40, (1, positions // 2), generator=g)
    items = torch.cat([half, half], dim=1).to(target.device)
    grad = torch.randn(1, positions // 2, width, generator=g)
    grad = torch.stack([grad, -grad], dim=2) if positions == 6 else torch.cat([grad, -grad], dim=1)
    if positions == 6:  # each term beside its opposite
        items = half.repeat_interleave(2, dim=1).to(target.device)
        grad = grad.reshape(1, positions, width)
    else:  # integers: their sums are exact in any order
        grad = (8 * grad).round()
    table = torch.zeros((1, 50, width) if per_client else (50, width), device=target.device)
    table.requires_grad_()
    hashes = reference.make_hashes(3, 0).to(target.device)
    out = target.ops.hash_lookup(items if per_client else items[0], table, hashes)
    out.backward((grad if per_client else grad[0]).to(target.device))
    assert not table.grad.any()
