"""What holds for every differentiable op: values and gradients equal the twin's, at any order, under any
transform."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import CASES, FLOATS, IDS, Case, assert_equals_twin, gradients
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fedpeft_ext import ops, reference

each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


@each_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients_equal_the_twin(case: Case, dtype: torch.dtype, target: Any) -> None:
    assert_equals_twin(case.to(target.device), target.ops, dtype)


@each_case
def test_gradients_are_right_to_second_order(case: Case, target: Any) -> None:
    case = case.to(target.device)
    inputs = case.floats(requires_grad=True)
    assert torch.autograd.gradcheck(case.function(target.ops), inputs)
    assert torch.autograd.gradgradcheck(case.function(target.ops), inputs)


@each_case
def test_gradients_of_the_twin_are_right(case: Case) -> None:
    inputs = case.floats(requires_grad=True)
    assert torch.autograd.gradcheck(case.function(reference), inputs)


@each_case
def test_third_order_equals_the_twin(case: Case, target: Any) -> None:
    """Differentiating once more than gradgradcheck: nothing is dropped at any order."""
    case = case.to(target.device)

    def third(ops: Any) -> list[Tensor | None]:
        inputs = case.floats(requires_grad=True)
        value = (case.function(ops)(*inputs) ** 3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((g**2).sum() * (k + 1) for k, g in enumerate(grads))
        return list(torch.autograd.grad(value, inputs))

    for a, b in zip(third(target.ops), third(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@each_case
def test_strided_and_expanded_gradients(case: Case, target: Any) -> None:
    case = case.to(target.device)
    function = case.function(target.ops)
    inputs = case.floats(requires_grad=True)
    out = function(*inputs)
    strided = torch.randn(*out.shape, 2, dtype=out.dtype, device=out.device)[..., 0]
    expanded = torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)
    for cotangent in (strided, expanded):
        for a, b in zip(
            gradients(function, inputs, cotangent),
            gradients(function, inputs, cotangent.contiguous()),
            strict=True,
        ):
            assert torch.equal(a, b)


@each_case
def test_strided_inputs(case: Case, target: Any) -> None:
    case = case.to(target.device)
    expected = case.run(target.ops, *case.tensors)
    every_other = tuple(torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0] for t in case.tensors)
    transposed = tuple(t.mT.contiguous().mT if t.dim() > 1 else t for t in case.tensors)
    for tensors in (every_other, transposed):
        assert torch.equal(case.run(target.ops, *tensors), expected)


@each_case
def test_bits_do_not_depend_on_threads(case: Case, target: Any) -> None:
    case = case.to(target.device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            inputs = case.floats(torch.float32, requires_grad=True)
            results.append(
                (case.function(target.ops)(*inputs), *gradients(case.function(target.ops), inputs))
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# torch.func -------------------------------------------------------------------------------------------------


def samples(case: Case, size: int) -> list[tuple[Tensor, ...]]:
    """Variations of the case: rolled indices, other values."""

    def vary(t: Tensor, i: int) -> Tensor:
        return t * (1 + 0.3 * i) + 0.1 * i if t.is_floating_point() else t.roll(i, 0 if t.dim() == 1 else -1)

    return [tuple(vary(t, i) for t in case.tensors) for i in range(size)]


def layouts(case: Case) -> list[tuple[int | None, ...]]:
    """Which tensors are batched, and along which dimension: every subset, the front and the back in turn."""
    found = []
    for chosen in itertools.product((False, True), repeat=len(case.tensors)):
        if any(chosen) and len({chosen[i] for i in case.tied}) < 2:
            found.append(tuple((0 if sum(chosen) % 2 else -1) if c else None for c in chosen))
    return found if len(found) <= 40 else found[:: len(found) // 31]


@each_case
def test_vmap_equals_a_loop_whatever_is_batched(case: Case, target: Any) -> None:
    case = case.to(target.device)
    many = samples(case, 3)
    for dims in layouts(case):
        used = [tuple(s[j] if d is not None else many[0][j] for j, d in enumerate(dims)) for s in many]
        stacked = [
            many[0][j] if d is None else torch.stack([s[j] for s in many], dim=d) for j, d in enumerate(dims)
        ]
        out = torch.func.vmap(lambda *t: case.run(target.ops, *t), in_dims=dims)(*stacked)
        expected = torch.stack([case.run(target.ops, *t) for t in used])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, msg=f"in_dims {dims}")


@each_case
def test_gradients_per_sample(case: Case, target: Any) -> None:
    """vmap(grad(f)), with everything batched and with the floating tensors shared, equals a loop of
    grad(f)."""
    case = case.to(target.device)
    places = tuple(case.floating())

    def loss(*t: Tensor) -> Tensor:
        out: Tensor = case.run(target.ops, *t)
        return (out**2).sum()

    grad = torch.func.grad(loss, argnums=places)
    many = samples(case, 3)
    shared = tuple(None if t.is_floating_point() else 0 for t in case.tensors)
    for dims in ((0,) * len(case.tensors), shared):
        if all(d is None for d in dims):
            continue
        used = [tuple(s[j] if d is not None else many[0][j] for j, d in enumerate(dims)) for s in many]
        stacked = [many[0][j] if d is None else torch.stack([s[j] for s in many]) for j, d in enumerate(dims)]
        batched = torch.func.vmap(grad, in_dims=dims)(*stacked)
        looped = [grad(*t) for t in used]
        for k, g in enumerate(batched):
            torch.testing.assert_close(g, torch.stack([one[k] for one in looped]), rtol=1e-12, atol=1e-12)


@each_case
def test_backward_through_vmap(case: Case, target: Any) -> None:
    case = case.to(target.device)
    stacked = [torch.stack(ts).detach() for ts in zip(*samples(case, 3), strict=True)]
    results = []
    for batched in (True, False):
        tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in stacked]
        if batched:
            out = torch.func.vmap(lambda *t: case.run(target.ops, *t))(*tensors)
        else:
            out = torch.stack([case.run(target.ops, *(t[i] for t in tensors)) for i in range(3)])
        results.append(torch.autograd.grad((out**2).sum(), [t for t in tensors if t.requires_grad]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_case
def test_nested_vmap(case: Case, target: Any) -> None:
    case = case.to(target.device)
    many = samples(case, 4)
    stacked = [torch.stack(ts).unflatten(0, (2, 2)) for ts in zip(*many, strict=True)]
    out = torch.func.vmap(torch.func.vmap(lambda *t: case.run(target.ops, *t)))(*stacked)
    expected = torch.stack([case.run(target.ops, *t) for t in many]).unflatten(0, (2, 2))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@each_case
def test_hessian_products(case: Case, target: Any) -> None:
    """grad of grad inside torch.func equals the twin's."""
    case = case.to(target.device)
    places = tuple(case.floating())

    def second(ops: Any) -> Any:
        def loss(*t: Tensor) -> Tensor:
            out: Tensor = case.run(ops, *t)
            return (out**3).sum()

        def size(*t: Tensor) -> Tensor:
            return torch.stack([(g**2).sum() for g in torch.func.grad(loss, argnums=places)(*t)]).sum()

        return torch.func.grad(size, argnums=places)(*case.tensors)

    for a, b in zip(second(target.ops), second(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@each_case
def test_autograd_outside_of_func_grad(case: Case, target: Any) -> None:
    """Ordinary autograd differentiates what torch.func.grad returned."""
    case = case.to(target.device)

    def outer(ops: Any) -> tuple[Tensor, ...]:
        inputs = case.floats(requires_grad=True)
        inner = torch.func.grad(
            lambda *x: (case.function(ops)(*x) ** 3).sum(), argnums=tuple(range(len(inputs)))
        )
        return torch.autograd.grad(sum((g**2).sum() for g in inner(*inputs)), inputs)

    for a, b in zip(outer(target.ops), outer(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@each_case
def test_forward_mode(case: Case) -> None:
    function, inputs = case.function(ops), case.floats(requires_grad=True)
    fast = {"fast_mode": True, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
        **fast,
    )
    assert torch.autograd.gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=False, **fast
    )


@each_case
def test_forward_mode_nests_with_both(case: Case) -> None:
    inputs = tuple(case.floats())
    moves = tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in inputs)

    def products(ops: Any) -> list[Tensor]:
        function, places = case.function(ops), tuple(range(len(inputs)))

        def moved(*x: Tensor) -> Tensor:
            return torch.func.jvp(function, x, moves)[1]

        def loss(*x: Tensor) -> Tensor:
            return (moved(*x) ** 2 + function(*x) ** 3).sum()

        return [
            torch.func.jvp(moved, inputs, moves)[1],
            *torch.func.grad(loss, places)(*inputs),
            *torch.func.jvp(torch.func.grad(loss, places), inputs, moves)[1],
        ]

    for a, b in zip(products(ops), products(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_tangents_are_not_lost_where_there_is_no_rule() -> None:
    with forward_ad.dual_level():
        parameter = forward_ad.make_dual(torch.zeros(2, 3), torch.ones(2, 3))
        with pytest.raises(RuntimeError, match=r"client_sgd_ is not differentiable: .* without tangents"):
            ops.client_sgd_(parameter, torch.ones(2, 3), None, 0.1, 0.0, 0.0)


# Tracing ----------------------------------------------------------------------------------------------------


@each_case
def test_meta_and_fake_tensors(case: Case, target: Any) -> None:
    expected = case.run(target.ops, *case.to(target.device).tensors)
    out = case.run(target.ops, *(t.to("meta") for t in case.tensors))
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = case.run(target.ops, *(mode.from_tensor(t.to(target.device)) for t in case.tensors))
    assert (fake.shape, fake.dtype, fake.device) == (expected.shape, expected.dtype, expected.device)


@each_case
def test_compiled_without_graph_breaks(case: Case, target: Any) -> None:
    case = case.to(target.device)
    torch.compiler.reset()
    compiled = torch.compile(case.function(target.ops), fullgraph=True, backend="aot_eager")
    inputs = case.floats(requires_grad=True)
    assert torch.equal(compiled(*inputs), case.function(target.ops)(*inputs))
    for a, b in zip(gradients(compiled, inputs), gradients(case.function(target.ops), inputs), strict=True):
        assert torch.equal(a, b)


@each_case
def test_autocast_promotes_and_keeps_precision(case: Case, target: Any) -> None:
    case = case.to(target.device)
    places = case.floating()
    mixed = [torch.float32] * len(places)
    if len(places) > 1:
        mixed[1] = torch.bfloat16
    inputs = [case.tensors[i].to(d).requires_grad_() for i, d in zip(places, mixed, strict=True)]
    function = case.function(target.ops)
    with torch.autocast(target.device.type, dtype=torch.bfloat16):
        out = function(*inputs)
    assert out.dtype == torch.float32
    for x, g in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert g.dtype == x.dtype
    if len(places) > 1:
        with pytest.raises(TypeError, match="expected the dtype of"):
            function(*inputs)


@pytest.mark.parametrize("width", [1, 3, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_over_weighted_rows_are_one_chain_whatever_the_count(
    width: int, dtype: torch.dtype, target: Any
) -> None:
    """A row whose weight is zero changes no bit, also in the last columns, which fill no register."""
    g = torch.Generator().manual_seed(width)
    A, B = torch.randn(40, 19, generator=g, dtype=dtype), torch.randn(width, 19, generator=g, dtype=dtype)
    items = torch.arange(40, device=target.device)
    for rank in range(1, 19):
        short = target.ops.lora_lookup(items, A[:, :rank].to(target.device), B[:, :rank].to(target.device))
        masked = A.clone()
        masked[:, rank:] = 0
        full = target.ops.lora_lookup(items, masked.to(target.device), B.to(target.device))
        assert torch.equal(short, full), rank
