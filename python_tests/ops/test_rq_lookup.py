"""rq_lookup against its twin over shapes and dtypes, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, WIDTHS, Case, assert_equals_twin, padded_items

from fedpeft_ext import reference

CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def make_case(
    clients: int,
    positions: int,
    num_items: int,
    levels: int,
    size: int,
    width: int,
    *,
    per_client: bool = True,
    base: bool = True,
    index: torch.dtype = torch.int64,
    code: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    items = padded_items((clients, positions), num_items, g, index)
    codes = torch.randint(size, (num_items, levels), generator=g).to(code)
    shape = (clients,) * per_client + (levels, size, width)
    floats = [torch.randn(shape, generator=g)] + [torch.randn(num_items, width, generator=g)] * base
    return Case("rq", lambda o, *a: o.rq_lookup(*a), (items, codes, *floats))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_client", [False, True])
def test_every_width(width: int, dtype: torch.dtype, per_client: bool, target: Any) -> None:
    case = make_case(3, 11, 20, 3, 5, width, per_client=per_client)
    assert_equals_twin(case.to(target.device), target.ops, dtype)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("code", CODE_DTYPES, ids=str)
@pytest.mark.parametrize("per_client", [False, True])
def test_every_integer_type(index: torch.dtype, code: torch.dtype, per_client: bool, target: Any) -> None:
    case = make_case(2, 9, 12, 2, 100, 8, per_client=per_client, index=index, code=code)
    assert_equals_twin(case.to(target.device), target.ops, torch.float32)


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(0, 4),
    positions=st.integers(0, 17),
    num_items=st.integers(1, 9),
    levels=st.integers(0, 4),
    size=st.integers(1, 6),
    width=st.integers(0, 70),
    per_client=st.booleans(),
    base=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_shape(target: Any, **shape: Any) -> None:
    case = make_case(**shape)
    assert_equals_twin(case.to(target.device), target.ops, torch.float64)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2), (0, 3)])
def test_shared_codebooks_take_items_of_any_shape(shape: tuple[int, ...], target: Any) -> None:
    case = make_case(1, 1, 6, 2, 3, 5, per_client=False)
    items = (
        torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape) % 7 - 1
    )
    case = Case(case.name, case.run, (items, *case.tensors[1:])).to(target.device)
    assert_equals_twin(case, target.ops, torch.float64)


@pytest.mark.parametrize(("items", "size"), [(0, 4), (3, 0)])
def test_padding_alone_and_an_empty_catalogue(items: int, size: int, target: Any) -> None:
    positions = torch.full((2, 3), -1, device=target.device)
    codes = torch.zeros(items, 2, dtype=torch.uint8, device=target.device)
    codebooks = torch.randn(2, 2, size, 5, device=target.device, requires_grad=True)
    base = torch.randn(items, 5, device=target.device)
    out = target.ops.rq_lookup(positions, codes, codebooks, base)
    assert torch.equal(out, torch.zeros(2, 3, 5, device=target.device))
    (grad,) = torch.autograd.grad(out.sum(), codebooks)
    assert torch.equal(grad, torch.zeros_like(codebooks))
    assert torch.equal(reference.rq_lookup(positions, codes, codebooks, base), out)


def test_large_shared_backward_is_the_same_for_any_threads(target: Any) -> None:
    """Large enough to be split among threads."""
    case = make_case(1, 20_000, 300, 3, 64, 32, per_client=False).to(target.device)
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


def test_vmap_over_codebooks_is_one_call(target: Any) -> None:
    """Forward and backward under vmap(grad) are one call of the per-client op each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[str, int]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace.startswith("fedpeft"):
                calls.append((func._opname, args[0].dim()))
            return func(*args, **(kwargs or {}))

    case = make_case(4, 6, 9, 2, 3, 5).to(target.device)
    items, codes, codebooks, base = case.tensors

    def loss(items: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = target.ops.rq_lookup(items, codes, codebooks, base)
        return (out**2).sum()

    with Record():
        torch.func.vmap(torch.func.grad(loss, argnums=1))(items, codebooks)
    assert calls == [("rq_lookup", 2), ("rq_lookup_backward", 3)]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "float items",
        {"items": torch.zeros(2, 3)},
        TypeError,
        "items: expected int32 or int64, got torch.float32",
    ),
    ("list of items", {"items": [[0]]}, TypeError, "items: expected a Tensor, got list"),
    ("int8 codes", {"codes": torch.zeros(4, 2, dtype=torch.int8)}, TypeError, "codes: expected uint8"),
    (
        "flat codes",
        {"codes": torch.zeros(4, dtype=torch.uint8)},
        ValueError,
        "codes: expected shape .I, L., got .4.",
    ),
    ("levels", {"codes": torch.zeros(4, 3, dtype=torch.uint8)}, ValueError, "codes: expected size 2 .L"),
    (
        "integer codebooks",
        {"codebooks": torch.zeros(2, 2, 3, 5, dtype=torch.int64)},
        TypeError,
        "codebooks: expected",
    ),
    ("flat codebooks", {"codebooks": torch.zeros(3, 5)}, ValueError, "codebooks: expected shape"),
    (
        "clients",
        {"items": torch.zeros(3, 3, dtype=torch.int64)},
        ValueError,
        "items: expected shape .C, P. with C = 2",
    ),
    ("flat items", {"items": torch.zeros(3, dtype=torch.int64)}, ValueError, "items: expected shape .C, P."),
    ("base items", {"base": torch.zeros(5, 5)}, ValueError, "base: expected size 4"),
    ("base width", {"base": torch.zeros(4, 6)}, ValueError, "base: expected size 5"),
    ("base dtype", {"base": torch.zeros(4, 5).double()}, TypeError, "base: expected the dtype of codebooks"),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    """Rejected alike by the op, its twin and its fake."""
    good = {
        "items": torch.zeros(2, 3, dtype=torch.int64),
        "codes": torch.zeros(4, 2, dtype=torch.uint8),
        "codebooks": torch.zeros(2, 2, 3, 5),
        "base": torch.zeros(4, 5),
    }
    target.ops.rq_lookup(**{k: v.to(target.device) for k, v in good.items()})
    bad = good | change
    for run in (target.ops.rq_lookup, reference.rq_lookup):
        with pytest.raises(error, match=message):
            run(**{k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in bad.items()})
    if all(isinstance(v, torch.Tensor) for v in bad.values()):
        with pytest.raises(error, match=message):
            torch.ops.fedpeft_ext.rq_lookup(*(v.to("meta") for v in bad.values()))


def test_mixed_devices() -> None:
    with pytest.raises(ValueError, match="codes: expected the device of codebooks"):
        reference.rq_lookup(
            torch.zeros(2, dtype=torch.int64, device="meta"),
            torch.zeros(4, 2, dtype=torch.uint8),
            torch.zeros(2, 3, 5, device="meta"),
        )


@pytest.mark.parametrize("bad", [-2, 4, 2**40])
def test_items_out_of_range(bad: int, target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    codes, codebooks = torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(2, 3, 5, requires_grad=True)
    items = torch.tensor([0, -1, bad])
    for run in (target.ops.rq_lookup, reference.rq_lookup):
        with pytest.raises(IndexError, match=f"items: index {bad} at position 2 is out of range"):
            run(items, codes, codebooks)


def test_codes_out_of_range(target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    codes, codebooks = torch.tensor([[0, 1], [0, 3]]), torch.zeros(2, 3, 5)
    for run in (target.ops.rq_lookup, reference.rq_lookup):
        run(torch.tensor([0]), codes, codebooks)
        with pytest.raises(IndexError, match="codes: "):
            run(torch.tensor([1]), codes, codebooks)


def test_every_float16_is_read_and_rounded_to(target: Any) -> None:
    def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
        assert torch.equal(a.cpu().nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(-1, 32)
    items = torch.arange(len(every))
    given = [tensor.to(target.device) for tensor in (items, items[:, None], every[None])]
    read = target.ops.rq_lookup(*given)
    assert_equal(read, every)
    if target.name == "cpu":  # NaNs get quiet and keep what they carry
        bits = every.view(torch.int16)
        assert torch.equal(read.view(torch.int16), torch.where(every.isnan(), bits | 0x200, bits))
    # Sums with something smaller by a factor of about the precision, or in the range of subnormals.
    smaller = (every.float() * torch.tensor([0.75, 2.0**-12, 2.0**-13, 3.0 * 2.0**-14]).repeat(8)).half()
    summed = target.ops.rq_lookup(*given, smaller.to(target.device))
    assert_equal(summed, (every.float() + smaller.float()).half())
