"""client_adam_ and client_sgd_: one optimizer step over stacked per-client parameters, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import (
    check_device,
    check_dim,
    check_dtype,
    check_float,
    check_index,
    check_like,
    check_not_negative,
    check_shape,
)
from ._library import eager_op, register_fake, register_in_place

_ADAM = eager_op("client_adam_")
_SGD = eager_op("client_sgd_")


def _check_param(param: Tensor, grad: Tensor, lr: float, l2: float) -> None:
    check_float(param, "param")
    if param.dim() == 0:
        raise ValueError("param: expected shape [C, ...], got []")
    check_like(grad, param, "grad", "param")
    check_shape(grad, tuple(param.shape), "grad", "the shape of param")
    check_not_negative(lr, "lr")
    check_not_negative(l2, "l2")


def _check_state(state: Tensor, param: Tensor, name: str) -> None:
    """Optimizer state of 16-bit parameters is float32."""
    check_dtype(state, torch.float64 if param.dtype == torch.float64 else torch.float32, name)
    check_device(state, param, name, "param")
    check_shape(state, tuple(param.shape), name, "the shape of param")


def _check_adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float,
) -> None:
    _check_param(param, grad, lr, l2)
    _check_state(exp_avg, param, "exp_avg")
    _check_state(exp_avg_sq, param, "exp_avg_sq")
    check_index(steps, "steps")
    check_dim(steps, 1, "steps", "[C]")
    check_shape(steps, tuple(param.shape[:1]), "steps", "C, the clients of param")
    check_device(steps, param, "steps", "param")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected at least 0 and below 1, got {beta}")
    check_not_negative(eps, "eps")


def _check_sgd(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, lr: float, momentum: float, l2: float
) -> None:
    _check_param(param, grad, lr, l2)
    check_not_negative(momentum, "momentum")
    if momentum_buffer is not None:
        _check_state(momentum_buffer, param, "momentum_buffer")
    elif momentum != 0:
        raise ValueError(f"momentum_buffer: expected a tensor with momentum {momentum}, got None")


def client_adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    l2: float = 0.0,
) -> None:
    """One Adam step for every client, each with its own step count, in place. Run it under torch.no_grad().

    Args:
        param: [C, ...], updated in place; float32, float64, float16 or bfloat16.
        grad: the shape and dtype of param.
        exp_avg, exp_avg_sq: first and second moments, the shape of param, updated in place; float64 for
            float64 parameters, otherwise float32. Zero before a client's first step.
        steps: int32 or int64 [C], the 1-based number of the step that each client takes; a client below 1 is
            left as it is. The caller increments.
        lr, beta1, beta2, eps: as torch.optim.Adam.
        l2: adds l2 * param to the gradient of each row (last dimension) whose gradient is not all zero, so
            that it acts on the rows that a client touched. A one-dimensional param has rows of one element.

    Raises:
        ValueError: a shape or a coefficient does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: a tensor requires a gradient and gradients are being recorded.

    Equivalent to, for each client c::

        optimizer = torch.optim.Adam([param[c]], lr=lr, betas=(beta1, beta2), eps=eps)
        param[c].grad = grad[c] + l2 * param[c] * (grad[c] != 0).any(-1, keepdim=True)
        optimizer.step()

    Kingma and Ba, Adam (2015).

    Example:
        >>> import torch
        >>> param, grad = torch.zeros(2, 3), torch.ones(2, 3)
        >>> moments = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> client_adam_(param, grad, *moments, torch.tensor([1, 0]), lr=0.5)  # the second does not step
        >>> param
        tensor([[-0.5000, -0.5000, -0.5000],
                [ 0.0000,  0.0000,  0.0000]])
    """
    _check_adam(param, grad, exp_avg, exp_avg_sq, steps, lr, beta1, beta2, eps, l2)
    _ADAM(param, grad, exp_avg, exp_avg_sq, steps, lr, beta1, beta2, eps, l2)


def client_sgd_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    lr: float = 1e-2,
    momentum: float = 0.0,
    l2: float = 0.0,
) -> None:
    """One SGD step for every client, in place. Run it under torch.no_grad().

    Args:
        param: [C, ...], updated in place; float32, float64, float16 or bfloat16.
        grad: the shape and dtype of param.
        momentum_buffer: the shape of param, updated in place; float64 for float64 parameters, otherwise
            float32. Zero before the first step. Required with momentum.
        lr, momentum: as torch.optim.SGD.
        l2: adds l2 * param to the gradient of each row (last dimension) whose gradient is not all zero, so
            that it acts on the rows that a client touched. A one-dimensional param has rows of one element.

    Raises:
        ValueError: a shape or a coefficient does not fit, momentum comes without its buffer, or the devices
            differ.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: a tensor requires a gradient and gradients are being recorded.

    Equivalent to::

        grad = grad + l2 * param * (grad != 0).any(-1, keepdim=True)
        momentum_buffer.mul_(momentum).add_(grad)                            # with momentum, then the step
        param.sub_(lr * (momentum_buffer if momentum else grad))

    Example:
        >>> import torch
        >>> param = torch.tensor([[1., 1.], [2., 2.]])
        >>> client_sgd_(param, torch.ones(2, 2), lr=0.5)
        >>> param
        tensor([[0.5000, 0.5000],
                [1.5000, 1.5000]])
    """
    _check_sgd(param, grad, momentum_buffer, lr, momentum, l2)
    _SGD(param, grad, momentum_buffer, lr, momentum, l2)


def _with_l2(param: Tensor, grad: Tensor, dtype: torch.dtype, l2: float) -> Tensor:
    touched = grad != 0 if grad.dim() == 1 else (grad != 0).any(-1, keepdim=True)
    return grad.to(dtype) + l2 * param.to(dtype) * touched


def client_adam_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    l2: float = 0.0,
) -> None:
    """`client_adam_` in plain PyTorch."""
    _check_adam(param, grad, exp_avg, exp_avg_sq, steps, lr, beta1, beta2, eps, l2)
    dtype = exp_avg.dtype
    shape = (-1,) + (1,) * (param.dim() - 1)
    step = steps.clamp(min=1).to(torch.float64)
    step_size = (lr / (1 - beta1**step)).to(dtype).view(shape)
    root = (1 - beta2**step).sqrt().to(dtype).view(shape)
    grad = _with_l2(param, grad, dtype, l2)
    first = torch.lerp(exp_avg, grad, 1 - beta1)
    second = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    stepped = param.to(dtype) - step_size * first / (second.sqrt() / root + eps)
    active = (steps >= 1).view(shape)
    param.copy_(torch.where(active, stepped.to(param.dtype), param))
    exp_avg.copy_(torch.where(active, first, exp_avg))
    exp_avg_sq.copy_(torch.where(active, second, exp_avg_sq))


def client_sgd_reference_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    lr: float = 1e-2,
    momentum: float = 0.0,
    l2: float = 0.0,
) -> None:
    """`client_sgd_` in plain PyTorch."""
    _check_sgd(param, grad, momentum_buffer, lr, momentum, l2)
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    step = _with_l2(param, grad, dtype, l2)
    if momentum_buffer is not None:
        step = momentum_buffer.mul_(momentum).add_(step)
    param.copy_(param.to(dtype) - lr * step)


@register_fake("client_adam_")
def _fake_adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float,
) -> None:
    _check_adam(param, grad, exp_avg, exp_avg_sq, steps, lr, beta1, beta2, eps, l2)


@register_fake("client_sgd_")
def _fake_sgd(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, lr: float, momentum: float, l2: float
) -> None:
    _check_sgd(param, grad, momentum_buffer, lr, momentum, l2)


register_in_place("client_adam_", 0, 2, 3)
register_in_place("client_sgd_", 0, 2)
