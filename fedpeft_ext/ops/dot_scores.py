"""dot_scores: each client's scores, the products of its vectors with its user vector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import check_float, check_like, check_parameter_dim, check_shape
from ._library import (
    Dims,
    eager_op,
    product_tangent,
    promoted,
    register_autograd,
    register_fake,
    register_vmap,
    to_front,
    total,
)

_OP = eager_op("dot_scores")
_BACKWARD = eager_op("dot_scores_backward")


def _check(vectors: Tensor, user: Tensor) -> None:
    check_float(vectors, "vectors")
    check_like(user, vectors, "user", "vectors")
    check_parameter_dim(vectors, 2, "vectors", "P, D")
    check_shape(user, (*vectors.shape[:-2], vectors.size(-1)), "user", "vectors without P")


def dot_scores(vectors: Tensor, user: Tensor) -> Tensor:
    """Scores of positions: the dot product of each vector with the client's user vector.

    Args:
        vectors: [C, P, D] or [P, D]; float32, float64, float16 or bfloat16.
        user: [C, D] or [D], of the dtype of vectors.

    Returns:
        [C, P] or [P], the dtype of vectors (16-bit types are summed in float32). Gradients reach both; the
        backward sums in the order of positions. Differentiable twice.

    Raises:
        ValueError: a shape does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).

    Equivalent to::

        (vectors * user.unsqueeze(-2)).sum(-1)

    Example:
        >>> import torch
        >>> dot_scores(torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([10., 1.]))
        tensor([12., 34.])
    """
    vectors, user = promoted(vectors, user)
    _check(vectors, user)
    out: Tensor = _OP(vectors, user)
    return out


def dot_scores_reference(vectors: Tensor, user: Tensor) -> Tensor:
    """`dot_scores` in plain PyTorch."""
    vectors, user = promoted(vectors, user)
    _check(vectors, user)
    return (vectors @ user.unsqueeze(-1)).squeeze(-1)


@register_fake("dot_scores")
def _fake(vectors: Tensor, user: Tensor) -> Tensor:
    _check(vectors, user)
    return vectors.new_empty(vectors.shape[:-1])


@register_fake("dot_scores_backward")
def _fake_backward(grad: Tensor, vectors: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
    _check(vectors, user)
    check_like(grad, vectors, "grad", "vectors")
    check_shape(grad, tuple(vectors.shape[:-1]), "grad", "vectors without D")
    return vectors.new_empty(vectors.shape), user.new_empty(user.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    vectors, user = ctx.saved_tensors
    grad_vectors, grad_user = _BACKWARD(grad, vectors, user)
    return grad_vectors, grad_user


def _double_backward(ctx: Any, grad_vectors: Tensor, grad_user: Tensor) -> tuple[Tensor | None, ...]:
    # d vectors_p = g_p user and d user = sum_p g_p vectors_p are linear in g, vectors and user each.
    grad, vectors, user = ctx.saved_tensors
    out_grad = None
    if ctx.needs_input_grad[0]:
        out_grad = _OP(grad_vectors, user) + _OP(vectors, grad_user)
    out_vectors, out_user = _BACKWARD(grad, grad_vectors, grad_user)
    return out_grad, out_vectors, out_user


def _tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
    vectors, user = args
    moved_vectors, moved_user = tangents
    return total(
        None if moved_vectors is None else _OP(moved_vectors, user),
        None if moved_user is None else _OP(vectors, moved_user),
    )


register_autograd("dot_scores", _setup, _backward, _tangent)
register_autograd("dot_scores_backward", _setup, _double_backward, product_tangent(_BACKWARD, 1, 2))


@register_vmap("dot_scores")
def _vmap(size: int, in_dims: Dims, vectors: Tensor, user: Tensor) -> Any:
    vectors_dim, user_dim = in_dims
    if vectors.dim() - (vectors_dim is not None) == 2:
        if user_dim is None:  # one user for all: more positions
            vectors = to_front(vectors, vectors_dim, size)
            return _OP(vectors.flatten(0, 1), user).reshape(vectors.shape[:2]), 0
        if vectors_dim is None:  # the same vectors for all users: one matrix product instead of copies
            return user.movedim(user_dim, 0) @ vectors.mT, 0
        return _OP(vectors.movedim(vectors_dim, 0), user.movedim(user_dim, 0)), 0
    vectors, user = to_front(vectors, vectors_dim, size), to_front(user, user_dim, size)
    return _OP(vectors.flatten(0, 1), user.flatten(0, 1)).reshape(vectors.shape[:-1]), 0


@register_vmap("dot_scores_backward")
def _vmap_backward(size: int, in_dims: Dims, *args: Tensor) -> Any:
    grad, vectors, user = (to_front(x, d, size) for x, d in zip(args, in_dims, strict=True))
    if user.dim() == 2:
        return _BACKWARD(grad, vectors, user), (0, 0)
    grad_vectors, grad_user = _BACKWARD(grad.flatten(0, 1), vectors.flatten(0, 1), user.flatten(0, 1))
    return (grad_vectors.reshape(vectors.shape), grad_user.reshape(user.shape)), (0, 0)
