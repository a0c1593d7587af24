"""sample_negatives, samples of clients and client_dropout: random draws that depend on (seed, round, client,
position) alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import philox
from ._checks import check_device, check_dim, check_draw, check_float, check_index, check_range, check_shape
from ._library import (
    Dims,
    eager_op,
    linear_tangent,
    loop_over,
    register_autograd,
    register_fake,
    register_not_differentiable,
    register_vmap,
    to_front,
)
from ._plain import check_index_values, check_offsets, philox_words

_NEGATIVES = eager_op("sample_negatives")
_DROPOUT = eager_op("client_dropout")
_CLIENTS = eager_op("sample_clients")
_INDEPENDENT = eager_op("sample_clients_independently")


def _check_negatives(
    items: Tensor,
    clients: Tensor,
    indptr: Tensor,
    indices: Tensor,
    num_items: int,
    epochs: int,
    seed: int,
    round: int,
) -> None:
    check_index(items, "items")
    check_dim(items, 2, "items", "[C, P]")
    for t, name in ((clients, "clients"), (indptr, "indptr"), (indices, "indices")):
        check_index(t, name)
        check_device(t, items, name, "items")
    check_dim(clients, 1, "clients", "[C]")
    check_shape(clients, tuple(items.shape[:1]), "clients", "C, the rows of items")
    if indptr.dim() != 1 or indptr.size(0) == 0:
        raise ValueError(f"indptr: expected shape [U + 1], got {list(indptr.shape)}")
    check_dim(indices, 1, "indices", "[nnz]")
    check_range(num_items, 0, 2**63, "num_items")
    check_range(epochs, 0, 2**16 + 1, "epochs")
    check_draw(seed, round)


def sample_negatives(
    items: Tensor,
    clients: Tensor,
    indptr: Tensor,
    indices: Tensor,
    num_items: int,
    epochs: int,
    seed: int,
    round: int,
) -> Tensor:
    """Draws a negative for each position of each epoch: uniform over the items that the client has not met.

    Args:
        items: int32 or int64 [C, P], the items met; -1 is padding.
        clients: int32 or int64 [C], the user ids of the rows, in [0, U).
        indptr, indices: int32 or int64 [U + 1] and [nnz]: items that each user has met as a CSR matrix,
            distinct and ascending within a user.
        num_items: I.
        epochs: 0 to 2^16.
        seed: 0 to 2^63 - 1. round: 0 to 2^32 - 1. Each draw is a function of (seed, round, client, position,
            epoch).

    Returns:
        [C, epochs, P], the dtype of items; -1 at padding. One draw a position, without rejection.

    Raises:
        ValueError: a shape or number does not fit, `indices` is not ascending within a client, a client has
            met every item, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        IndexError: an item, client or index is out of range.

    Equivalent to::

        met = indices[indptr[u]:indptr[u + 1]]                               # for each client u
        others = [i for i in range(num_items) if i not in met]
        others[floor(random * len(others))]                                  # random in [0, 1), 64 bits

    Example:
        >>> import torch
        >>> indptr, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])  # user 0 met 0 and 2
        >>> items, clients = torch.tensor([[0, 2], [1, -1]]), torch.tensor([0, 1])
        >>> sample_negatives(items, clients, indptr, indices, num_items=4, epochs=1, seed=0, round=0).shape
        torch.Size([2, 1, 2])
    """
    _check_negatives(items, clients, indptr, indices, num_items, epochs, seed, round)
    out: Tensor = _NEGATIVES(items, clients, indptr, indices, num_items, epochs, seed, round)
    return out


def _check_keys(clients: Tensor, seed: int, round: int, attempt: int) -> None:
    check_index(clients, "clients")
    check_dim(clients, 1, "clients", "[n]")
    check_draw(seed, round)
    check_range(attempt, 0, 2**32, "attempt")


def _check_clients(clients: Tensor, count: int, seed: int, round: int, attempt: int) -> None:
    _check_keys(clients, seed, round, attempt)
    check_range(count, 0, clients.size(0) + 1, "count")


def sample_clients(clients: Tensor, count: int, *, seed: int, round: int, attempt: int = 0) -> Tensor:
    """Draws `count` of the clients, a uniform sample without replacement.

    Each client has a 64-bit key, a function of (seed, round, attempt, client); the smallest take part. Of
    fewer than a sixteenth, places in `clients` are drawn instead, with replacement, until `count` differ:
    then time goes with `count` alone.

    Args:
        clients: int32 or int64 [n], distinct ids, 0 to 2^32 - 1; on a GPU at most 2^31 - 1 of them.
        count: 0 to n.
        seed: 0 to 2^63 - 1. round, attempt: 0 to 2^32 - 1.

    Returns:
        int64 [count], ascending.

    Raises:
        ValueError: a shape or number does not fit. TypeError: an argument has the wrong type or dtype.
        IndexError: a client is out of range, among those looked at: of fewer than a sixteenth, the chosen.

    Example:
        >>> import torch
        >>> sample_clients(torch.arange(4), 2, seed=0, round=1).shape
        torch.Size([2])
    """
    _check_clients(clients, count, seed, round, attempt)
    out: Tensor = _CLIENTS(clients, count, seed, round, attempt)
    return out


def sample_clients_reference(
    clients: Tensor, count: int, *, seed: int, round: int, attempt: int = 0
) -> Tensor:
    """`sample_clients` in NumPy."""
    _check_clients(clients, count, seed, round, attempt)
    ids = clients.cpu().numpy().astype(np.int64)
    if 0 < count <= len(ids) // 16:
        draws, distinct = count, np.empty(0, np.int64)
        while len(distinct) < count:
            places = philox.integers(
                len(ids), seed, round, attempt, np.arange(draws), philox.Purpose.CLIENT_SAMPLING, layer=1
            )
            distinct, first = np.unique(places, return_index=True)
            draws *= 2
        chosen = torch.from_numpy(np.sort(ids[distinct[np.argsort(first)[:count]]]))
        check_index_values(chosen, 2**32, "clients", padding=False)
        return chosen.to(clients.device)
    check_index_values(clients.long(), 2**32, "clients", padding=False)
    keys = philox.low64(philox.words(seed, round, ids, attempt, philox.Purpose.CLIENT_SAMPLING))
    return torch.from_numpy(np.sort(ids[np.argsort(keys, kind="stable")[:count]])).to(clients.device)


@register_fake("sample_clients")
def _fake_clients(clients: Tensor, count: int, seed: int, round: int, attempt: int) -> Tensor:
    _check_clients(clients, count, seed, round, attempt)
    return clients.new_empty(count, dtype=torch.int64)


register_not_differentiable("sample_clients")


def _check_independent(clients: Tensor, probability: float, seed: int, round: int, attempt: int) -> None:
    _check_keys(clients, seed, round, attempt)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected 0 to 1, got {probability}")


def sample_clients_independently(
    clients: Tensor, probability: float, *, seed: int, round: int, attempt: int = 0
) -> Tensor:
    """Draws each of the clients with this probability, whatever becomes of the others ("Poisson sampling").

    A client takes part where its key, that of `sample_clients` as a number in [0, 1) of 53 bits, is below
    `probability`.

    Args:
        clients: int32 or int64 [n], ids from 0 to 2^32 - 1; on a GPU at most 2^31 - 1 of them.
        probability: 0 to 1.
        seed: 0 to 2^63 - 1. round, attempt: 0 to 2^32 - 1.

    Returns:
        int64 [count], ascending, possibly none. `count` depends on values, so torch.compile sees it as an
        unbacked size.

    Raises:
        ValueError: a shape or number does not fit. TypeError: an argument has the wrong type or dtype.
        IndexError: a client is out of range.

    Example:
        >>> import torch
        >>> sample_clients_independently(torch.arange(4), 1.0, seed=0, round=1)
        tensor([0, 1, 2, 3])
    """
    _check_independent(clients, probability, seed, round, attempt)
    out: Tensor = _INDEPENDENT(clients, probability, seed, round, attempt)
    return out


def sample_clients_independently_reference(
    clients: Tensor, probability: float, *, seed: int, round: int, attempt: int = 0
) -> Tensor:
    """`sample_clients_independently` in NumPy."""
    _check_independent(clients, probability, seed, round, attempt)
    check_index_values(clients.long(), 2**32, "clients", padding=False)
    ids = clients.cpu().numpy().astype(np.int64)
    drawn = philox.uniform(seed, round, ids, attempt, philox.Purpose.CLIENT_SAMPLING)
    return torch.from_numpy(np.sort(ids[drawn < probability])).to(clients.device)


@register_fake("sample_clients_independently")
def _fake_independent(clients: Tensor, probability: float, seed: int, round: int, attempt: int) -> Tensor:
    _check_independent(clients, probability, seed, round, attempt)
    return clients.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


register_not_differentiable("sample_clients_independently")


def sample_negatives_reference(
    items: Tensor,
    clients: Tensor,
    indptr: Tensor,
    indices: Tensor,
    num_items: int,
    epochs: int,
    seed: int,
    round: int,
) -> Tensor:
    """`sample_negatives` in NumPy, client by client."""
    _check_negatives(items, clients, indptr, indices, num_items, epochs, seed, round)
    check_index_values(items, num_items, "items")
    check_index_values(clients, indptr.size(0) - 1, "clients", padding=False)
    check_index_values(indices, num_items, "indices", padding=False)
    check_offsets(indptr, clients, len(indices))
    shape = (items.size(0), epochs, items.size(1))
    out = np.full(shape, -1, dtype=np.int64)
    offsets, met = indptr.cpu().numpy().astype(np.int64), indices.cpu().numpy().astype(np.int64)
    epoch, position = np.arange(epochs)[:, None], np.arange(items.size(1))
    for c, user in enumerate(clients.tolist()):
        positives = met[offsets[user] : offsets[user + 1]]
        if (np.diff(positives) <= 0).any():
            raise ValueError(f"indices: expected distinct items in ascending order within client {user}")
        if len(positives) >= num_items:
            raise ValueError(
                f"clients: client {user} has met all {num_items} items: there is no negative to draw"
            )
        k = philox.integers(
            num_items - len(positives), seed, round, user, position, philox.Purpose.NEGATIVES, epoch=epoch
        )
        # positives[j] - j items below positives[j] are not positives.
        out[c] = k + np.searchsorted(positives - np.arange(len(positives)), k, side="right")
    negatives = torch.from_numpy(out).to(items)
    return negatives.masked_fill(items.unsqueeze(1) == -1, -1)


@register_fake("sample_negatives")
def _fake_negatives(
    items: Tensor,
    clients: Tensor,
    indptr: Tensor,
    indices: Tensor,
    num_items: int,
    epochs: int,
    seed: int,
    round: int,
) -> Tensor:
    _check_negatives(items, clients, indptr, indices, num_items, epochs, seed, round)
    return items.new_empty((items.size(0), epochs, items.size(1)))


@register_vmap("sample_negatives")
def _vmap_negatives(size: int, in_dims: Dims, *args: Any) -> Any:
    if in_dims[2] is not None or in_dims[3] is not None:
        return loop_over(_NEGATIVES, size, in_dims, args)
    items, clients = to_front(args[0], in_dims[0], size), to_front(args[1], in_dims[1], size)
    out = _NEGATIVES(items.flatten(0, 1), clients.flatten(0, 1), *args[2:])
    return out.reshape(*items.shape[:2], *out.shape[1:]), 0


def _check_dropout(
    x: Tensor, clients: Tensor, p: float, seed: int, round: int, epoch: int, layer: int
) -> None:
    check_float(x, "x")
    check_index(clients, "clients")
    if x.dim() == 0:
        raise ValueError("x: expected shape [C, ...], got []")
    check_dim(clients, 1, "clients", "[C]")
    check_shape(clients, tuple(x.shape[:1]), "clients", "C, the first dimension of x")
    check_device(clients, x, "clients", "x")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    check_draw(seed, round)
    check_range(epoch, 0, 2**16, "epoch")
    check_range(layer, 0, 2**8, "layer")


def client_dropout(
    x: Tensor, clients: Tensor, p: float, seed: int, round: int, epoch: int = 0, layer: int = 0
) -> Tensor:
    """Dropout whose mask is a function of (seed, round, client, epoch, layer) and the element's place in its
    client.

    Args:
        x: [C, ...]; float32, float64, float16 or bfloat16, at most 2^34 elements a client.
        clients: int32 or int64 [C], the user ids of the rows, in [0, 2^32).
        p: probability of zeroing an element, 0 to 1.
        seed: 0 to 2^63 - 1. round: 0 to 2^32 - 1. epoch: 0 to 2^16 - 1. layer: 0 to 255, one for each dropout
            of a model.

    Returns:
        The shape and dtype of x: elements kept are scaled by 1 / (1 - p), the others are 0. The gradient is
        the same op on the gradient. Under torch.vmap the mask of a sample depends on its clients alone.

    Raises:
        ValueError: a shape or number does not fit, or the devices differ.
        TypeError: an argument has the wrong type or dtype.
        IndexError: a client is not in [0, 2^32).

    Equivalent to::

        kept = philox_words(seed, round, clients, element) >= floor(p * 2**32)
        x * kept / (1 - p)

    Example:
        >>> import torch
        >>> out = client_dropout(torch.ones(2, 1000), torch.tensor([7, 9]), 0.5, seed=1, round=0)
        >>> sorted(set(out.flatten().tolist()))
        [0.0, 2.0]
    """
    _check_dropout(x, clients, p, seed, round, epoch, layer)
    out: Tensor = _DROPOUT(x, clients, p, seed, round, epoch, layer)
    return out


def client_dropout_reference(
    x: Tensor, clients: Tensor, p: float, seed: int, round: int, epoch: int = 0, layer: int = 0
) -> Tensor:
    """`client_dropout` in plain PyTorch."""
    _check_dropout(x, clients, p, seed, round, epoch, layer)
    check_index_values(clients.long(), 2**32, "clients", padding=False)
    size = math.prod(x.shape[1:])
    block = torch.arange(-(-size // 4), device=x.device)
    stream = philox.Purpose.DROPOUT << 24 | layer << 16 | epoch
    words = philox_words(seed, round, clients.unsqueeze(1), block, stream).flatten(1)[:, :size]
    kept = (words >= math.floor(p * 2**32)).reshape(x.shape)
    return torch.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0)


@register_fake("client_dropout")
def _fake_dropout(
    x: Tensor, clients: Tensor, p: float, seed: int, round: int, epoch: int, layer: int
) -> Tensor:
    _check_dropout(x, clients, p, seed, round, epoch, layer)
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, clients, *ctx.numbers = inputs
    ctx.save_for_backward(clients)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (clients,) = ctx.saved_tensors
    return _DROPOUT(grad, clients, *ctx.numbers), *(None,) * 6


register_autograd("client_dropout", _setup, _backward, linear_tangent(_DROPOUT))


@register_vmap("client_dropout")
def _vmap_dropout(size: int, in_dims: Dims, x: Tensor, clients: Tensor, *numbers: Any) -> Any:
    x, clients = to_front(x, in_dims[0], size), to_front(clients, in_dims[1], size)
    return _DROPOUT(x.flatten(0, 1), clients.flatten(0, 1), *numbers).reshape(x.shape), 0
