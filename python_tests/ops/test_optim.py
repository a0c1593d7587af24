"""client_adam_ and client_sgd_ against torch.optim, client by client, and their twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, assert_near
from torch import Tensor

from fedpeft_ext import reference

SHAPES = ((3,), (3, 7), (2, 5, 4), (2, 3, 4, 33), (1, 1000, 32), (0, 4), (3, 0), (4, 300, 3))


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A parameter, and a gradient some of whose rows are zero."""
    g = torch.Generator().manual_seed(seed)
    param, grad = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    rows = torch.rand((*shape[:-1], 1) if len(shape) > 1 else shape, generator=g) < 0.3
    return param.to(device, dtype), grad.masked_fill(rows, 0).to(device, dtype)


def state_of(param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)


def with_l2(param: Tensor, grad: Tensor, l2: float) -> Tensor:
    touched = grad != 0 if grad.dim() == 1 else (grad != 0).any(-1, keepdim=True)
    return grad + l2 * param * touched


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_adam_equals_torch(shape: tuple[int, ...], l2: float, target: Any) -> None:
    """Three steps in which the clients start at different steps."""
    param, _ = draw(shape, torch.float64, 0, target.device)
    exp_avg, exp_avg_sq = state_of(param), state_of(param)
    steps = -(torch.arange(shape[0], device=target.device) % 3)  # below 1: not started
    clients = [p.clone().requires_grad_() for p in param]
    optimizers = [torch.optim.Adam([p], lr=0.03, betas=(0.8, 0.95), eps=1e-6) for p in clients]
    for round in range(3):
        steps = steps + 1
        grad = draw(shape, torch.float64, round + 1, target.device)[1]
        effective = with_l2(param, grad, l2)
        for c, (p, optimizer) in enumerate(zip(clients, optimizers, strict=True)):
            if int(steps[c]) >= 1:
                p.grad = effective[c].clone()
                optimizer.step()
        target.ops.client_adam_(param, grad, exp_avg, exp_avg_sq, steps, 0.03, 0.8, 0.95, 1e-6, l2)
        expected = torch.stack([p.detach() for p in clients]) if clients else param
        torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("momentum", "l2"), [(0.0, 0.0), (0.0, 0.1), (0.9, 0.0), (0.9, 0.1)])
def test_sgd_equals_torch(shape: tuple[int, ...], momentum: float, l2: float, target: Any) -> None:
    param, _ = draw(shape, torch.float64, 0, target.device)
    buffer = state_of(param) if momentum else None
    expected = param.clone().requires_grad_()
    optimizer = torch.optim.SGD([expected], lr=0.1, momentum=momentum)
    for round in range(3):
        grad = draw(shape, torch.float64, round + 1, target.device)[1]
        expected.grad = with_l2(param, grad, l2)
        optimizer.step()
        target.ops.client_sgd_(param, grad, buffer, 0.1, momentum, l2)
        torch.testing.assert_close(param, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    l2=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 9),
)
def test_steps_equal_the_twins(
    target: Any, dtype: torch.dtype, shape: list[int], l2: float, seed: int
) -> None:
    param, grad = draw(tuple(shape), dtype, seed, target.device)
    steps = torch.arange(shape[0], device=target.device, dtype=torch.int32)
    state = [torch.rand_like(state_of(param)) for _ in range(2)]
    for step in (
        lambda o, p, m, v: o.client_adam_(p, grad, m, v, steps, lr=0.1, l2=l2),
        lambda o, p, m, v: o.client_sgd_(p, grad, None, lr=0.1, l2=l2),
        lambda o, p, m, v: o.client_sgd_(p, grad, m, 0.1, 0.9, l2),
    ):
        results = []
        for space in (target.ops, reference):
            tensors = [t.clone() for t in (param, *state)]
            step(space, *tensors)
            results.append(tensors)
        assert_near(results[0][0], results[1][0].double(), dtype)
        for a, b in zip(results[0][1:], results[1][1:], strict=True):
            assert_near(a, b.double(), a.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_parameters_are_updated_in_place(dtype: torch.dtype, target: Any) -> None:
    param, grad = draw((3, 4, 5), dtype, 1, target.device)
    steps = torch.ones(3, dtype=torch.int64, device=target.device)
    views = [torch.stack([t, t], dim=-1)[..., 0] for t in (param, grad, state_of(param), state_of(param))]
    others = [v.clone() for v in views]
    target.ops.client_adam_(*views, steps)
    target.ops.client_adam_(param, grad, others[2], others[3], steps)
    for view, expected in zip(views, (param, grad, *others[2:]), strict=True):
        assert torch.equal(view, expected)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_state_that_is_aligned_to_16_bytes_alone(l2: float, target: Any) -> None:
    """Of a parameter of 16 bits, of whose state eight numbers are 32 bytes."""
    param, grad = draw((2, 3, 16), torch.float16, 1, target.device)
    steps = torch.ones(2, dtype=torch.int64, device=target.device)
    results = []
    for offset in (0, 4):
        parameter, state = param.clone(), torch.zeros(2, param.numel() + offset, device=target.device)
        state = state[:, offset:]
        first, second = (t.view(param.shape) for t in state)
        assert first.data_ptr() % 32 == (4 * offset) % 32
        target.ops.client_adam_(parameter, grad, first, second, steps, l2=l2)
        target.ops.client_sgd_(parameter, grad, first, 0.1, 0.9, l2)
        results.append((parameter, first, second))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bits_do_not_depend_on_threads(target: Any) -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            param, grad = draw((40, 300, 33), torch.float32, 3, target.device)
            first, second = state_of(param), state_of(param)
            steps = torch.arange(40, device=target.device)
            target.ops.client_adam_(param, grad, first, second, steps, l2=0.1)
            target.ops.client_sgd_(param, grad, first, 0.1, 0.9, 0.1)
            results.append((param, first, second))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autograd_sees_the_change(target: Any) -> None:
    param, grad = draw((2, 3), torch.float32, 0, target.device)
    leaf = param.requires_grad_()
    loss = (leaf**2).sum()
    with pytest.raises(RuntimeError, match=r"not differentiable: call it under torch.no_grad"):
        target.ops.client_sgd_(leaf, grad)
    with torch.no_grad():
        target.ops.client_sgd_(leaf, grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_vmap_is_refused(target: Any) -> None:
    param, grad = draw((2, 3, 4), torch.float32, 0, target.device)
    with pytest.raises(NotImplementedError, match="client_sgd_ writes in place and has no vmap rule"):
        torch.func.vmap(lambda p, g: target.ops.client_sgd_(p, g))(param, grad)


def test_compiled(target: Any) -> None:
    param, grad = draw((2, 3, 4), torch.float32, 0, target.device)
    steps = torch.ones(2, dtype=torch.int64, device=target.device)

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        target.ops.client_adam_(p, g, m, v, steps)
        return p * 2

    copies = [param.clone(), grad, state_of(param), state_of(param)]
    torch.compiler.reset()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*copies)
    expected = step(param, grad, state_of(param), state_of(param))
    assert torch.equal(out, expected)
    assert torch.equal(copies[0], param)


ADAM = {
    "param": torch.zeros(2, 3),
    "grad": torch.zeros(2, 3),
    "exp_avg": torch.zeros(2, 3),
    "exp_avg_sq": torch.zeros(2, 3),
    "steps": torch.zeros(2, dtype=torch.int64),
}
BAD_ADAM: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("scalar", {"param": torch.zeros(())}, ValueError, "param: expected shape .C, ...."),
    ("integer", {"param": torch.zeros(2, 3).int()}, TypeError, "param: expected float32"),
    ("grad shape", {"grad": torch.zeros(2, 4)}, ValueError, "grad: expected shape"),
    ("grad dtype", {"grad": torch.zeros(2, 3).half()}, TypeError, "grad: expected the dtype of param"),
    ("moment dtype", {"exp_avg": torch.zeros(2, 3).half()}, TypeError, "exp_avg: expected torch.float32"),
    ("moment shape", {"exp_avg_sq": torch.zeros(3)}, ValueError, "exp_avg_sq: expected shape"),
    ("steps shape", {"steps": torch.zeros(3, dtype=torch.int64)}, ValueError, "steps: expected shape .2."),
    ("steps dtype", {"steps": torch.zeros(2)}, TypeError, "steps: expected int32 or int64"),
    ("lr", {"lr": -1.0}, ValueError, "lr: expected at least 0, got -1.0"),
    ("beta", {"beta2": 1.0}, ValueError, "beta2: expected at least 0 and below 1"),
    ("eps", {"eps": -1.0}, ValueError, "eps: expected at least 0"),
    ("l2", {"l2": -1.0}, ValueError, "l2: expected at least 0"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD_ADAM], ids=[b[0] for b in BAD_ADAM]
)
def test_bad_adam(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    for device in (target.device, "meta"):
        for space in (target.ops, reference):
            arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (ADAM | change).items()}
            with pytest.raises(error, match=message):
                space.client_adam_(**arguments)


def test_bad_sgd(target: Any) -> None:
    param = torch.zeros(2, 3, dtype=torch.bfloat16, device=target.device)
    for space in (target.ops, reference):
        with pytest.raises(
            ValueError, match=r"momentum_buffer: expected a tensor with momentum 0.9, got None"
        ):
            space.client_sgd_(param, param, None, 0.1, 0.9)
        with pytest.raises(TypeError, match=r"momentum_buffer: expected torch.float32"):
            space.client_sgd_(param, param, param, 0.1, 0.9)
        with pytest.raises(ValueError, match="momentum: expected at least 0"):
            space.client_sgd_(param, param, None, 0.1, -0.9)
