"""rq_encode: the nearest rows, equality with the twin, round trips with rq_lookup, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, WIDTHS
from torch import Tensor

from fedpeft_ext import reference


def assert_nearest(x: Tensor, codebooks: Tensor, codes: Tensor) -> None:
    """Each code is the nearest row to what is left, up to rounding in the accumulator."""
    eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    residual, width = x.double(), x.size(1)
    for level in range(codebooks.size(0)):
        book = codebooks[level].double()
        distances = (residual.unsqueeze(1) - book).square().sum(-1)
        chosen = distances.gather(1, codes[:, level : level + 1].long()).squeeze(1)
        size = residual.square().sum(1) + book.square().sum(1).max()
        assert bool((chosen <= distances.min(1).values + 16 * (width + 8) * eps * size).all())
        residual = residual - book[codes[:, level].long()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 5, 64, 300])
def test_codes_are_the_nearest(width: int, dtype: torch.dtype, size: int, target: Any) -> None:
    g = torch.Generator().manual_seed(width + size)
    x = torch.randn(20, width, generator=g).to(target.device, dtype)
    codebooks = torch.randn(3, size, width, generator=g).to(target.device, dtype)
    for space in (target.ops, reference):
        codes = space.rq_encode(x, codebooks)
        assert codes.shape == (20, 3)
        assert codes.dtype == (torch.uint8 if size <= 256 else torch.int16)
        assert_nearest(x, codebooks, codes)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 40),
    levels=st.integers(0, 4),
    size=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_any_shape_equals_the_twin(
    target: Any, count: int, levels: int, size: int, width: int, seed: int
) -> None:
    """In float64 random vectors have no near ties."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g, dtype=torch.float64).to(target.device)
    codebooks = torch.randn(levels, size, width, generator=g, dtype=torch.float64).to(target.device)
    assert torch.equal(target.ops.rq_encode(x, codebooks), reference.rq_encode(x, codebooks))


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)]
)
def test_code_dtype_holds_every_code(size: int, dtype: torch.dtype, target: Any) -> None:
    book = torch.arange(size, dtype=torch.float64, device=target.device).view(1, size, 1)
    x = torch.tensor([[0.0], [size - 1.0]], dtype=torch.float64, device=target.device)
    for space in (target.ops, reference):
        codes = space.rq_encode(x, book)
        assert codes.dtype == dtype
        assert codes.flatten().tolist() == [0, size - 1]
    assert target.ops.rq_encode(x.to("meta"), book.to("meta")).dtype == dtype


def test_ties_take_the_lowest_code(target: Any) -> None:
    codebooks = torch.tensor(
        [[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]], device=target.device
    ).repeat(1, 9, 1)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], device=target.device)
    for space in (target.ops, reference):
        assert space.rq_encode(x, codebooks).flatten().tolist() == [0, 1, 3, 0]


def test_round_trip(target: Any) -> None:
    """Vectors that are sums of well separated rows get back their codes."""
    g = torch.Generator().manual_seed(0)
    codebooks = torch.stack([torch.randn(16, 12, generator=g) * s for s in (100.0, 1.0, 0.01)]).to(
        target.device
    )
    codes = torch.randint(16, (200, 3), generator=g, dtype=torch.uint8).to(target.device)
    x = target.ops.rq_lookup(torch.arange(200, device=target.device), codes, codebooks.double())
    assert torch.equal(target.ops.rq_encode(x, codebooks.double()), codes)


def test_threads_and_cuts_change_no_code(target: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, codebooks = torch.randn(3000, 33, generator=g), torch.randn(3, 100, 33, generator=g)
    x, codebooks = x.to(target.device), codebooks.to(target.device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        codes = target.ops.rq_encode(x, codebooks)
        torch.set_num_threads(2)
        assert torch.equal(target.ops.rq_encode(x, codebooks), codes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([target.ops.rq_encode(part, codebooks) for part in x.split(701)]), codes)


def test_strides_vmap_and_autocast(target: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, codebooks = (
        torch.randn(2, 20, 8, generator=g).to(target.device),
        torch.randn(2, 2, 10, 8, generator=g).to(target.device),
    )
    plain = torch.stack([target.ops.rq_encode(v, codebooks[0]) for v in x])
    assert torch.equal(torch.func.vmap(target.ops.rq_encode, in_dims=(0, None))(x, codebooks[0]), plain)
    both = torch.stack([target.ops.rq_encode(v, c) for v, c in zip(x, codebooks, strict=True)])
    assert torch.equal(torch.func.vmap(target.ops.rq_encode)(x, codebooks), both)
    assert torch.equal(target.ops.rq_encode(x[0].T.contiguous().T, codebooks[0].mT.contiguous().mT), plain[0])
    with torch.autocast(target.device.type, dtype=torch.bfloat16):
        assert torch.equal(target.ops.rq_encode(x[0].double(), codebooks[0]), plain[0])


def test_codes_carry_no_gradient(target: Any) -> None:
    x = torch.randn(3, 2, device=target.device, requires_grad=True)
    assert not target.ops.rq_encode(
        x, torch.randn(1, 4, 2, device=target.device, requires_grad=True)
    ).requires_grad


GOOD = {"x": torch.zeros(3, 4), "codebooks": torch.zeros(2, 5, 4)}
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("flat x", {"x": torch.zeros(4)}, ValueError, "x: expected shape .N, D."),
    ("integer x", {"x": torch.zeros(3, 4).int()}, TypeError, "x: expected float32"),
    (
        "width",
        {"codebooks": torch.zeros(2, 5, 3)},
        ValueError,
        "codebooks: expected size 4 .D, the width of x",
    ),
    ("dtype", {"codebooks": torch.zeros(2, 5, 4).double()}, TypeError, "codebooks: expected the dtype of x"),
    ("no codes", {"codebooks": torch.zeros(2, 0, 4)}, ValueError, "codebooks: expected 1 to"),
    ("flat codebooks", {"codebooks": torch.zeros(5, 4)}, ValueError, "codebooks: expected shape .L, K, D."),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    for device in (target.device, "meta"):
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                space.rq_encode(**{k: v.to(device) for k, v in (GOOD | change).items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "codebooks"])
def test_values_that_are_not_finite(value: float, name: str, target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    bad = {k: v.clone() for k, v in GOOD.items()}
    bad[name][..., 1] = value
    for space in (target.ops, reference):
        with pytest.raises(ValueError, match=f"{name}: expected finite values, got NaN or infinity"):
            space.rq_encode(**bad)
