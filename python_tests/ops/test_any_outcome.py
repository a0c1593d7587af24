"""What ops do with sizes of zero and with indices of any value: the same as their twins and their fakes, or
an error, and nothing besides. Under AddressSanitizer (`make asan`) what they must not read is seen, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU_ALONE, assert_equals, mapped, tensors_in
from test_any_layout import CALLS, Call, Inputs, copied, in_double
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fedpeft_ext import reference

REFUSALS = (ValueError, TypeError, IndexError)
SIZES = re.compile(r"expected (shape|size|at least one row)")  # what a fake can tell


class AnySize(Inputs):
    """Sizes may be zero where the op wants at least one, too."""

    def size(self, low: int = 0, high: int = 5) -> int:
        return super().size(0 if low == 1 else low, high)


def outcome(function: Callable[..., Any], made: Call, args: Any) -> list[Tensor] | Exception:
    try:
        results = made.results(function(*args, **made.options))
    except REFUSALS as error:
        return error
    return [*results, *(t for i in made.written for t in tensors_in(args[i]))]


def kind(found: list[Tensor] | Exception) -> Any:
    return type(found) if isinstance(found, Exception) else [t.shape for t in found]


def assert_same(found: list[Tensor], expected: list[Tensor], made: Call, dtype: torch.dtype) -> None:
    for mine, exact in zip(found, expected, strict=True):
        assert_equals(mine, exact, dtype, made.terms)


def on_fakes(function: Callable[..., Any], made: Call) -> list[Tensor] | Exception:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args = mapped(copied(made.args), mode.from_tensor)
    with mode:
        return outcome(function, made, args)


@pytest.mark.parametrize("name", CALLS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_size(name: str, data: st.DataObject, target: Any) -> None:
    if target.device.type == "cuda" and name in CPU_ALONE:
        pytest.skip("serves the CPU alone")
    inputs = AnySize(data, target.device)
    made, op = CALLS[name](inputs), getattr(target.ops, name)
    expected = outcome(getattr(reference, name), made, in_double(copied(made.args)))
    if isinstance(expected, IndexError) and target.name != "cpu":
        return  # which stops the kernel
    found, fake = outcome(op, made, copied(made.args)), on_fakes(op, made)
    assert kind(found) == kind(expected)
    if isinstance(fake, Exception) or SIZES.search(str(found)):
        assert kind(fake) == kind(found)
    elif not isinstance(found, Exception):  # sizes that values decide are not known
        assert [t.dim() for t in fake] == [t.dim() for t in found]
        assert_same(found, expected, made, inputs.dtype)


@pytest.mark.parametrize("name", CALLS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_index(name: str, data: st.DataObject, target: Any) -> None:
    if target.name != "cpu":
        pytest.skip("a bad index stops the kernel")
    inputs = Inputs(data, target.device)
    made = CALLS[name](inputs)
    args = copied(made.args)
    read = [arg for i, arg in enumerate(args) if i not in made.written]
    whole = [t for t in tensors_in(tuple(read)) if not t.is_floating_point() and t.numel() > 0]
    if whole:
        broken = whole[data.draw(st.integers(0, len(whole) - 1), "tensor")].view(-1)
        limits = torch.iinfo(broken.dtype)
        value = data.draw(st.sampled_from([limits.min, limits.max, 7, max(limits.min, -2)]), "value")
        broken[data.draw(st.integers(0, len(broken) - 1), "place")] = value
    found = outcome(getattr(target.ops, name), made, copied(args))
    exact = outcome(getattr(reference, name), made, in_double(copied(args)))
    if isinstance(found, Exception) or isinstance(exact, Exception):
        return
    assert_same(found, exact, made, inputs.dtype)
