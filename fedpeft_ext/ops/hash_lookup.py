"""hash_lookup: embeddings as means, sums or SENet-weighted sums of a few hashed rows of one small table."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import philox
from ._checks import (
    check_base,
    check_client_items,
    check_device,
    check_dim,
    check_float,
    check_grad,
    check_hashes,
    check_index,
    check_like,
    check_parameter_dim,
    check_range,
    check_rows,
    check_shape,
    check_size,
    check_tensor,
)
from ._library import (
    Dims,
    LookupBatch,
    add_batched_base,
    eager_op,
    loop_over,
    or_zeros,
    promoted,
    register_autograd,
    register_fake,
    register_vmap,
    to_front,
    total,
)
from ._plain import check_index_values, embedding, gather_rows, pad_to_zero, values_available

HASH_PRIME = 2**61 - 1
_FORWARD_AD: Any = forward_ad  # untyped in torch

_OP = eager_op("hash_lookup")
_BACKWARD = eager_op("hash_lookup_backward")
_BUCKETS = eager_op("hash_buckets")
_ROWS = eager_op("client_embedding")
_ROWS_BACKWARD = eager_op("client_embedding_backward")


class SENetWeights(NamedTuple):
    """Squeeze-and-excitation weights over H hashed rows, hidden width S (Hu et al., 2018).

    Attributes:
        w1: [S, H] or [C, S, H], the layer before the ReLU.
        b1: [S] or [C, S].
        w2: [H, S] or [C, H, S], the layer before the sigmoid.
        b2: [H] or [C, H].
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def make_hashes(num_hashes: int, seed: int) -> Tensor:
    """Draws hash functions x -> ((a x + b) mod p) mod M of a universal family (Carter and Wegman, 1979).

    Args:
        num_hashes: H, at least 1.
        seed: 0 to 2^63 - 1; the same seed gives the same functions, and more of them start with the same
            ones.

    Returns:
        int64 [H, 2] on the CPU: a in [1, p) and b in [0, p), p = 2^61 - 1.

    Example:
        >>> make_hashes(2, seed=0).shape
        torch.Size([2, 2])
    """
    check_range(num_hashes, 1, 2**31, "num_hashes")
    check_range(seed, 0, 2**63, "seed")
    position = np.arange(2 * num_hashes)
    a = philox.integers(HASH_PRIME - 1, seed, 0, 0, position[0::2], philox.Purpose.INITIALISATION) + 1
    b = philox.integers(HASH_PRIME, seed, 0, 0, position[1::2], philox.Purpose.INITIALISATION)
    return torch.tensor(np.stack([a, b], axis=1), device="cpu")


def _check_buckets(items: Tensor, hashes: Tensor, table_size: int) -> None:
    check_index(items, "items")
    check_hashes(hashes, items, "items")
    check_range(table_size, 1, 2**63, "table_size")


def _check_table(items: Tensor, table: Tensor, hashes: Tensor, senet: tuple[Tensor | None, ...]) -> bool:
    check_index(items, "items")
    check_float(table, "table")
    per_client = check_parameter_dim(table, 2, "table", "M, D")
    if per_client:
        check_client_items(items, table, "items", "table")
    check_rows(table, "table")
    check_device(items, table, "items", "table")
    check_hashes(hashes, table, "table")
    w1, b1, w2, b2 = senet
    if w1 is None and b1 is None and w2 is None and b2 is None:
        return per_client
    if w1 is None or b1 is None or w2 is None or b2 is None:
        raise ValueError("senet: expected all of w1, b1, w2, b2 or none")
    for name, w in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        check_like(w, table, name, "table")
    check_dim(w1, table.dim(), "w1", "[C, S, H] as table is per client" if per_client else "[S, H]")
    clients = tuple(table.shape[:1]) if per_client else ()
    hidden, count = w1.size(-2), hashes.size(0)
    check_shape(w1, (*clients, hidden, count), "w1", "S, H; per client where table is")
    check_shape(b1, (*clients, hidden), "b1", "S, the hidden width of w1")
    check_shape(w2, (*clients, count, hidden), "w2", "H, S")
    check_shape(b2, (*clients, count), "b2", "H, the number of hashes")
    return per_client


def _check(
    items: Tensor, table: Tensor, hashes: Tensor, senet: tuple[Tensor | None, ...], base: Tensor | None
) -> None:
    _check_table(items, table, hashes, senet)
    check_base(base, None, table.size(-1), table, "table")


def _arguments(
    table: Tensor, senet: SENetWeights | None, reduce: str, base: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...], bool, Tensor | None]:
    """Table, the four SENet tensors, whether to average, and base, in one dtype under autocast."""
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected 'mean' or 'sum', got {reduce!r}")
    check_tensor(table, "table")
    if senet is not None and len(senet) != 4:
        raise ValueError(f"senet: expected the four tensors w1, b1, w2, b2, got {len(senet)}")
    table, base, *weights = promoted(table, base, *(senet or (None,) * 4))
    return table, tuple(weights), reduce == "mean" and senet is None, base


def hash_buckets(items: Tensor, hashes: Tensor, table_size: int) -> Tensor:
    """The table rows that each item hashes to: ((a x + b) mod p) mod M with p = 2^61 - 1.

    Args:
        items: int32 or int64 of any shape; -1 is padding.
        hashes: int64 [H, 2] of (a, b) in [0, p), see `make_hashes`.
        table_size: M, at least 1.

    Returns:
        int64, items.shape + [H], in [0, M); -1 at padding.

    Raises:
        ValueError: a shape does not fit, the devices differ, or a hash coefficient is not in [0, p).
        TypeError: an argument has the wrong type or dtype.
        IndexError: an item is below -1.

    Equivalent to::

        [[((a * x + b) % (2**61 - 1)) % M for a, b in hashes] for x in items]    # in Python's integers

    Example:
        >>> import torch
        >>> hash_buckets(torch.tensor([0, 5, -1]), torch.tensor([[3, 1], [1, 0]]), 4)
        tensor([[ 1,  0],
                [ 0,  1],
                [-1, -1]])
    """
    _check_buckets(items, hashes, table_size)
    out: Tensor = _BUCKETS(items, hashes, table_size)
    return out


def _modular_product(a: Tensor, x: Tensor) -> Tensor:
    """a x mod 2^61 - 1 in int64, for a and x below 2^61 - 1: halves of 31 and 30 bits, 2^61 = 1 and 2^62 =
    2."""
    p = HASH_PRIME
    a_high, a_low, x_high, x_low = a >> 31, a & (2**31 - 1), x >> 31, x & (2**31 - 1)
    middle = a_high * x_low + a_low * x_high
    return (
        2 * a_high * x_high % p + (middle >> 30) + ((middle & (2**30 - 1)) << 31) % p + a_low * x_low % p
    ) % p


def hash_buckets_reference(items: Tensor, hashes: Tensor, table_size: int) -> Tensor:
    """`hash_buckets` in plain PyTorch."""
    _check_buckets(items, hashes, table_size)
    check_index_values(items, None, "items")
    if values_available(hashes) and bool(((hashes < 0) | (hashes >= HASH_PRIME)).any()):
        raise ValueError("hashes: expected values from 0 to 2^61 - 2")
    x = items.clamp(min=0).long().unsqueeze(-1) % HASH_PRIME
    buckets = (_modular_product(hashes[:, 0], x) + hashes[:, 1]) % HASH_PRIME % table_size
    return buckets.masked_fill((items < 0).unsqueeze(-1), -1)


def hash_lookup(
    items: Tensor,
    table: Tensor,
    hashes: Tensor,
    senet: SENetWeights | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    base: Tensor | None = None,
) -> Tensor:
    """Combines the H table rows that an item hashes to, and adds the item's base vector.

    Args:
        items: int32 or int64. [C, P] with per-client tables, any shape with shared ones; -1 is padding.
        table: [C, M, D] or [M, D]; float32, float64, float16 or bfloat16.
        hashes: int64 [H, 2], the same for all clients, see `make_hashes`. Buckets are computed on the fly
            (`hash_buckets` shows them).
        senet: None, or weights (per client exactly where table is, of the dtype of table) that gate each
            item's rows.
        reduce: "mean" or "sum" over the H rows. With senet the gated rows are always summed.
        base: [I, D] vectors that all clients share, of the dtype of table, or None.

    Returns:
        items.shape + [D], the dtype of table (16-bit types are summed in float32); zero at padding, where no
        gradient flows either. Gradients reach table, senet and, where it requires one, base; the backward
        sums in the order of
        positions: the same bits for any number of threads. Differentiable twice. Under torch.vmap, batched
        tables become per-client tables of one call; batched hashes cost a call a sample.

    Raises:
        ValueError: a shape does not fit, the devices differ, or a hash coefficient is not in [0, 2^61 - 1).
        TypeError: an argument has the wrong type or dtype (autocast promotes mixed float dtypes to the
            widest).
        IndexError: an item is below -1, or not below I where there is a base (on CUDA a device-side
            assertion).

    Equivalent to::

        rows = table[hash_buckets(items, hashes, M)]                         # [*, H, D]; zero at items == -1
        if senet is None:
            out = rows.mean(-2)                                              # or rows.sum(-2)
        else:
            hidden = F.relu(F.linear(rows.mean(-1), senet.w1, senet.b1))     # squeeze, [*, S]
            gates = torch.sigmoid(F.linear(hidden, senet.w2, senet.b2))      # excitation, [*, H]
            out = (gates.unsqueeze(-1) * rows).sum(-2)
        out + base[items]

    Svenstrup et al., Hash Embeddings (2017); Hu et al., Squeeze-and-Excitation Networks (2018).

    Example:
        >>> import torch
        >>> table = torch.tensor([[1., 0.], [0., 2.], [4., 4.]])
        >>> hashes = torch.tensor([[1, 0], [1, 1]])  # x mod 3, (x + 1) mod 3
        >>> hash_lookup(torch.tensor([0, 1, -1]), table, hashes, reduce="sum")
        tensor([[1., 2.],
                [4., 6.],
                [0., 0.]])
    """
    table, weights, mean, base = _arguments(table, senet, reduce, base)
    _check(items, table, hashes, weights, base)
    out: Tensor = _OP(items, table, hashes, *weights, mean, base)
    return out


def _combine(
    items: Tensor, table: Tensor, hashes: Tensor, weights: tuple[Tensor | None, ...], mean: bool
) -> Tensor:
    """The lookup without base."""
    buckets = hash_buckets_reference(items, hashes, table.size(-2)).clamp(min=0)
    if table.dim() == 3:
        clients, size, width = table.shape
        buckets = buckets + size * torch.arange(clients, device=items.device).view(-1, 1, 1)
        table = table.reshape(clients * size, width)
    rows = embedding(buckets, table)
    w1, b1, w2, b2 = weights
    if w1 is None or b1 is None or w2 is None or b2 is None:
        return pad_to_zero(rows.mean(-2) if mean else rows.sum(-2), items)
    if w1.dim() == 3:
        b1, b2 = b1.unsqueeze(1), b2.unsqueeze(1)
    squeezed = rows.sum(-1) / max(rows.size(-1), 1)  # the mean, also of no elements
    hidden = F.relu(squeezed @ w1.mT + b1)
    gates = torch.sigmoid(hidden @ w2.mT + b2)
    return pad_to_zero((gates.unsqueeze(-1) * rows).sum(-2), items)


def hash_lookup_reference(
    items: Tensor,
    table: Tensor,
    hashes: Tensor,
    senet: SENetWeights | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    base: Tensor | None = None,
) -> Tensor:
    """`hash_lookup` in plain PyTorch."""
    table, weights, mean, base = _arguments(table, senet, reduce, base)
    _check(items, table, hashes, weights, base)
    check_index_values(items, None if base is None else base.size(0), "items")
    out = _combine(items, table, hashes, weights, mean)
    return out if base is None else out + gather_rows(base, items)


@register_fake("hash_buckets")
def _fake_buckets(items: Tensor, hashes: Tensor, table_size: int) -> Tensor:
    _check_buckets(items, hashes, table_size)
    return items.new_empty((*items.shape, hashes.size(0)), dtype=torch.int64)


@register_fake("hash_lookup")
def _fake(
    items: Tensor,
    table: Tensor,
    hashes: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    mean: bool,
    base: Tensor | None,
) -> Tensor:
    _check(items, table, hashes, (w1, b1, w2, b2), base)
    return table.new_empty((*items.shape, table.size(-1)))


@register_fake("hash_lookup_backward")
def _fake_backward(
    grad: Tensor,
    items: Tensor,
    table: Tensor,
    hashes: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    mean: bool,
) -> tuple[Tensor, ...]:
    check_grad(grad, items, _check_table(items, table, hashes, (w1, b1, w2, b2)))
    check_like(grad, table, "grad", "table")
    check_size(grad, grad.dim() - 1, table.size(-1), "grad", "D, the width of table")
    weights = tuple(table.new_empty((0,) if w is None else w.shape) for w in (w1, b1, w2, b2))
    return table.new_empty(table.shape), *weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    items, table, hashes, w1, b1, w2, b2, mean, base = inputs
    ctx.save_for_backward(items, table, hashes, w1, b1, w2, b2)
    ctx.mean = mean
    ctx.num_items = None if base is None else base.size(0)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    items, table, hashes, *weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_table: Tensor | None = None
    grad_weights: list[Tensor | None] = [None] * 4
    if needs[1] or any(needs[3:7]):
        grad_table, *grad_weights = _BACKWARD(grad, items, table, hashes, *weights, ctx.mean)
    if weights[0] is None:
        grad_weights = [None] * 4
    grad_base = _ROWS_BACKWARD(grad, items, ctx.num_items, False) if needs[8] else None
    return None, grad_table, None, *grad_weights, None, grad_base


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, mean = inputs
    ctx.save_for_backward(*tensors)
    ctx.mean = mean


def _senet_gradients(
    items: Tensor, hashes: Tensor, grad: Tensor, table: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, ...]:
    """What `hash_lookup_backward` computes with SENet, differentiable further: by backward ops and plain
    PyTorch."""
    clients = items.size(0) if table.dim() == 3 else 1
    width, count = table.size(-1), hashes.size(0)
    buckets = _BUCKETS(items, hashes, table.size(-2)).reshape(clients, -1)
    stacked = [t if table.dim() == 3 else t.unsqueeze(0) for t in (table, w1, b1, w2, b2)]
    tables, w1, b1, w2, b2 = stacked
    grad = pad_to_zero(grad, items).reshape(clients, -1, 1, width)
    rows = _ROWS(buckets, tables).unflatten(1, (-1, count))
    squeezed = rows.sum(-1) / max(width, 1)
    inner = squeezed @ w1.mT + b1.unsqueeze(1)
    hidden = torch.relu(inner)
    gates = torch.sigmoid(hidden @ w2.mT + b2.unsqueeze(1))
    by_gates = (grad * rows).sum(-1) * gates * (1 - gates)
    by_hidden = (by_gates @ w2) * (inner > 0)
    by_rows = gates.unsqueeze(-1) * grad + (by_hidden @ w1).unsqueeze(-1) / max(width, 1)
    gradients = (
        _ROWS_BACKWARD(by_rows.flatten(1, 2), buckets, tables.size(1), True),
        by_hidden.mT @ squeezed,
        by_hidden.sum(1),
        by_gates.mT @ hidden,
        by_gates.sum(1),
    )
    return gradients if table.dim() == 3 else tuple(g.squeeze(0) for g in gradients)


def _double_backward(ctx: Any, grad_table: Tensor, *grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    grad, items, table, hashes, *weights = ctx.saved_tensors
    if weights[0] is None:  # linear in grad, and table itself does not matter
        return _OP(items, grad_table, hashes, *weights, ctx.mean, None), *(None,) * 8

    pull: Any = torch.func.vjp(partial(_senet_gradients, items, hashes), grad, table, *weights)[1]
    out_grad, out_table, *out_weights = pull((grad_table, *grad_weights))
    return out_grad, None, out_table, None, *out_weights, None


def _with_tangents(args: tuple[Any, ...], tangents: tuple[Any, ...]) -> list[Any]:
    return [x if t is None else _FORWARD_AD.make_dual(x, t) for x, t in zip(args, tangents, strict=True)]


def _tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
    items, table, hashes, *weights, mean, _ = args
    moved_table, moved_base = tangents[1], tangents[8]
    moved: Tensor | None = None
    if weights[0] is not None and any(t is not None for t in (moved_table, *tangents[3:7])):
        dual_table, *dual_weights = _with_tangents((table, *weights), (moved_table, *tangents[3:7]))
        dual = _combine(items, dual_table, hashes, tuple(dual_weights), mean)
        moved = _FORWARD_AD.unpack_dual(dual).tangent
    elif moved_table is not None:
        moved = _OP(items, moved_table, hashes, *weights, mean, None)
    return total(moved, None if moved_base is None else _ROWS(items, moved_base))


def _tangent_backward(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
    grad, items, table, hashes, *weights, _ = args
    if weights[0] is None:  # linear in grad, and table itself does not matter
        moved = torch.zeros_like(output[0]) if tangents[0] is None else _BACKWARD(tangents[0], *args[1:])[0]
        return moved, *(torch.zeros_like(empty) for empty in output[1:])
    duals = _with_tangents((grad, table, *weights), (tangents[0], tangents[2], *tangents[4:8]))
    gradients = _senet_gradients(items, hashes, *duals)
    return tuple(or_zeros(_FORWARD_AD.unpack_dual(g).tangent, g) for g in gradients)


register_autograd("hash_lookup", _setup, _backward, _tangent)
register_autograd("hash_lookup_backward", _setup_backward, _double_backward, _tangent_backward)


@register_vmap("hash_buckets")
def _vmap_buckets(size: int, in_dims: Dims, items: Tensor, hashes: Tensor, table_size: int) -> Any:
    if in_dims[1] is not None:
        return loop_over(_BUCKETS, size, in_dims, (items, hashes, table_size))
    return _BUCKETS(to_front(items, in_dims[0], size), hashes, table_size), 0


@register_vmap("hash_lookup")
def _vmap(size: int, in_dims: Dims, *args: Any) -> Any:
    if in_dims[2] is not None:
        return loop_over(_OP, size, in_dims, args)
    items, table, hashes, *weights, mean, base = args
    dims = (in_dims[1], *in_dims[3:7])
    batch = LookupBatch(
        size, table.dim() - (dims[0] is not None) == 3, batched=any(d is not None for d in dims)
    )
    table, *weights = (
        None if t is None else batch.parameter(t, d) for t, d in zip((table, *weights), dims, strict=True)
    )
    own_base = base if in_dims[8] is None else None
    out = batch.output(_OP(batch.positions(items, in_dims[0]), table, hashes, *weights, mean, own_base))
    if base is None or in_dims[8] is None:
        return out
    return add_batched_base(out, size, items, in_dims[0], base, in_dims[8])


@register_vmap("hash_lookup_backward")
def _vmap_backward(size: int, in_dims: Dims, *args: Any) -> Any:
    if in_dims[3] is not None:
        return loop_over(_BACKWARD, size, in_dims, args)
    grad, items, table, hashes, *weights, mean = args
    dims = (in_dims[2], *in_dims[4:8])
    batch = LookupBatch(size, table.dim() - (dims[0] is not None) == 3, batched=True)
    parameters = [
        None if t is None else batch.parameter(t, d) for t, d in zip((table, *weights), dims, strict=True)
    ]
    items = batch.positions(items, in_dims[1])
    grad = batch.positions(grad, in_dims[0], trailing=1)
    table, *weights = parameters
    gradients = _BACKWARD(grad, items, table, hashes, *weights, mean)
    if weights[0] is None:  # the gradients of absent weights are empty, for each sample as for all
        return (batch.parameter_output(gradients[0])[0], *gradients[1:]), (0, None, None, None, None)
    return tuple(batch.parameter_output(g)[0] for g in gradients), (0,) * 5
