"""local_train: a client's whole local training in one call, from its first draw to its upload, or to its
place in the sum over clients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from ._checks import (
    check_codes,
    check_device,
    check_dim,
    check_draw,
    check_dtype,
    check_grid,
    check_hashes,
    check_index,
    check_like,
    check_not_negative,
    check_range,
    check_rank,
    check_rows,
    check_shape,
    check_size,
    check_tensor,
)
from ._library import eager_op, register_fake, register_in_place, register_not_differentiable
from ._plain import check_index_values, check_offsets
from .aggregate import accumulate_updates_reference_
from .client_embedding import client_embedding_reference
from .client_mlp import client_mlp_reference
from .hash_lookup import SENetWeights, hash_lookup_reference
from .lora_lookup import lora_lookup_reference
from .rq_lookup import rq_lookup_reference
from .sampling import sample_negatives_reference

_LOCAL_TRAIN = eager_op("local_train")
_LOCAL_TRAIN_SUM = eager_op("local_train_sum_")
_ACCUMULATE = eager_op("accumulate_updates_")

UPLOAD_BYTES = 1 << 28
"""Uploads that `local_train_sum_` holds at a time on a GPU; one client may exceed it."""


class ItemParts(NamedTuple):
    """What an item's vector is the sum of; None for what a model lacks. All float32 or all float64.

    Attributes:
        base: [I, D], frozen.
        table: [I, D], trained: the Full strategy.
        A, B: [I, r] and [D, r], together: LoRA.
        codes, codebooks: integer [I, L] and [L, K, D], together: RQ; the codes are frozen.
        buckets, hashes: [M, D] and int64 [H, 2], together: hashing; the hashes are frozen.
        senet: weights of the hashed rows; else their mean or sum, as `reduce` says.
    """

    base: Tensor | None = None
    table: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    codes: Tensor | None = None
    codebooks: Tensor | None = None
    buckets: Tensor | None = None
    hashes: Tensor | None = None
    senet: SENetWeights | None = None
    reduce: Literal["mean", "sum"] = "mean"


class LocalUpdates(NamedTuple):
    """What training changed: local minus global values of C clients; None for what the model lacks.

    Attributes:
        user: [C, D] ([C, V] with an MLP), new values, not differences.
        losses: float64 [C], mean over a client's steps; 0 for a client without items.
        rows: int64 [C, R], the items whose rows of `table` and A changed, -1 behind; in any order.
        table, A: [C, R, D] and [C, R, r], differences at `rows`; zero behind them.
        B, codebooks, buckets, senet: differences, [C, ...].
        mlp: differences [C, ...] in the order of the argument, or the new values of clients' own; empty
            without an MLP.
    """

    user: Tensor
    losses: Tensor
    rows: Tensor
    table: Tensor | None
    A: Tensor | None
    B: Tensor | None
    codebooks: Tensor | None
    buckets: Tensor | None
    senet: SENetWeights | None
    mlp: tuple[Tensor, ...] = ()


class ItemSums(NamedTuple):
    """Weighted sums of updates over clients, float64 in the shapes of `ItemParts`; None for what a model
    lacks."""

    table: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    codebooks: Tensor | None = None
    buckets: Tensor | None = None
    senet: SENetWeights | None = None


class SumResult(NamedTuple):
    """What training into sums leaves besides them.

    Attributes:
        user: [C, D] ([C, V] with an MLP), new values.
        losses: float64 [C], mean over a client's steps; 0 for a client without items.
        rows: int64 [N], distinct, in any order: the items that this call marked in `touched`; empty without
            it.
        broken: bool [10], whether an update was NaN or infinite, of table, A, B, codebooks, buckets, w1, b1,
            w2, b2 and the MLP that all share.
        mlp: new values [C, ...] of clients' own MLPs; else empty.
    """

    user: Tensor
    losses: Tensor
    rows: Tensor
    broken: Tensor
    mlp: tuple[Tensor, ...] = ()


def _check_clients(clients: Tensor, user: Tensor) -> None:
    check_index(clients, "clients")
    check_dim(clients, 1, "clients", "[C]")
    check_device(clients, user, "clients", "user")


def _check(
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    mlp: Sequence[Tensor],
    dropout: float,
    graph: bool,
) -> None:
    check_tensor(user, "user")
    if user.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"user: expected float32 or float64, got {user.dtype}")
    check_dim(user, 2, "user", "[U, V]" if mlp else "[U, D]")
    for t, name, shape in (
        (indptr, "indptr", "[U + 1]"),
        (items, "items", "[nnz]"),
        (positives, "positives", "[nnz]"),
    ):
        check_index(t, name)
        check_dim(t, 1, name, shape)
        check_device(t, user, name, "user")
    check_size(indptr, 0, user.size(0) + 1, "indptr", "U + 1, one more than the rows of user")
    check_shape(positives, tuple(items.shape), "positives", "nnz, as items")
    check_range(num_items, 0, 2**62, "num_items")
    _check_mlp(mlp, dropout, user)
    width = _item_width(user, mlp)
    _check_pairs(parts)
    if graph and parts.senet is not None:
        raise ValueError("graph: expected False with senet, which it does not know")
    if mlp and (graph or parts.senet is not None):
        raise ValueError(f"mlp: expected none with {'graph' if graph else 'senet'}, which it does not know")
    for table, name in ((parts.base, "base"), (parts.table, "table")):
        if table is not None:
            check_like(table, user, name, "user")
            check_shape(table, (num_items, width), name, "I items of width D")
    if parts.A is not None and parts.B is not None:
        check_like(parts.A, user, "A", "user")
        check_dim(parts.A, 2, "A", "[I, r]")
        check_size(parts.A, 0, num_items, "A", "I, the number of items")
        check_rank(parts.A)
        check_like(parts.B, user, "B", "user")
        check_shape(parts.B, (width, parts.A.size(1)), "B", "width D and rank r")
    if parts.codes is not None and parts.codebooks is not None:
        check_like(parts.codebooks, user, "codebooks", "user")
        check_dim(parts.codebooks, 3, "codebooks", "[L, K, D]")
        check_rows(parts.codebooks, "codebooks")
        check_size(parts.codebooks, 2, width, "codebooks", "D, the width")
        check_codes(parts.codes, "codes")
        check_device(parts.codes, user, "codes", "user")
        check_shape(parts.codes, (num_items, parts.codebooks.size(0)), "codes", "I items, L levels")
    if parts.buckets is not None and parts.hashes is not None:
        check_like(parts.buckets, user, "buckets", "user")
        check_dim(parts.buckets, 2, "buckets", "[M, D]")
        check_size(parts.buckets, 1, width, "buckets", "D, the width")
        check_rows(parts.buckets, "buckets")
        check_hashes(parts.hashes, user, "user")
        if parts.senet is not None:
            hidden, count = parts.senet.w1.size(0), parts.hashes.size(0)
            shapes = {"w1": (hidden, count), "b1": (hidden,), "w2": (count, hidden), "b2": (count,)}
            for name, weight in parts.senet._asdict().items():
                check_like(weight, user, name, "user")
                check_shape(weight, shapes[name], name, "H hashes, hidden width S")


def _check_pairs(parts: ItemParts) -> None:
    for one, other in (("A", "B"), ("codes", "codebooks"), ("buckets", "hashes")):
        if (getattr(parts, one) is None) != (getattr(parts, other) is None):
            raise ValueError(f"{one}: expected together with {other}, got only one of them")
    if parts.senet is not None and parts.buckets is None:
        raise ValueError("senet: expected together with buckets, got no buckets")
    if parts.reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected 'mean' or 'sum', got {parts.reduce!r}")


def _item_width(user: Tensor, mlp: Sequence[Tensor]) -> int:
    """D: of the user vector, or what the first layer takes beside it."""
    return mlp[0].size(-1) - user.size(1) if mlp else user.size(1)


def _check_mlp(mlp: Sequence[Tensor], dropout: float, user: Tensor) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability from 0 to below 1, got {dropout}")
    if not mlp:
        return
    if len(mlp) % 2 == 0 or not 3 <= len(mlp) < 2**9:
        raise ValueError(
            f"mlp: expected weight and bias of 1 to 255 layers and the output, got {len(mlp)} tensors"
        )
    for t in mlp:
        check_like(t, user, "mlp", "user")
    if mlp[0].dim() not in (2, 3):
        raise ValueError(f"mlp: expected a first weight [O, I] or [C, O, I], got {list(mlp[0].shape)}")
    clients = tuple(mlp[0].shape[:-2])
    width = mlp[0].size(-1)
    if width < user.size(1):
        raise ValueError(f"mlp: expected a first layer at least as wide as user, {user.size(1)}, got {width}")
    for weight, bias in zip(mlp[:-1:2], mlp[1::2], strict=True):
        out = weight.size(-2) if weight.dim() == mlp[0].dim() else -1
        check_shape(weight, (*clients, out, width), "mlp", "a weight for what the layer before gives")
        check_shape(bias, (*clients, out), "mlp", "a bias for its weight")
        if out == 0:
            raise ValueError(f"mlp: expected layers of at least one unit, got {list(weight.shape)}")
        width = out
    check_shape(mlp[-1], (*clients, width), "mlp", "an output for the last layer")


def _check_own_mlp(mlp: Sequence[Tensor], clients: Tensor) -> None:
    if mlp and mlp[0].dim() == 3:
        check_size(mlp[0], 0, clients.size(0), "mlp", "C, as clients")


def _settings(
    epochs: int,
    batch_size: int | None,
    loss: str,
    optimizer: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    l2_user: float,
    l2_items: float,
    prox: float,
) -> tuple[float, ...]:
    """Check the settings of a training, and put them as the ops take them."""
    check_range(epochs, 0, 2**16, "epochs")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, or None for all positives, got {batch_size}")
    if loss not in ("bpr", "bce"):
        raise ValueError(f"loss: expected 'bpr' or 'bce', got {loss!r}")
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer: expected 'adam' or 'sgd', got {optimizer!r}")
    numbers = {"lr": lr, "eps": eps, "l2_user": l2_user, "l2_items": l2_items, "prox": prox}
    for name, value in numbers.items():
        check_not_negative(value, name)
    choices = (epochs, batch_size or 0, loss == "bpr", optimizer == "adam")
    return (*choices, lr, *betas, eps, l2_user, l2_items, prox)


def _tensors(parts: ItemParts) -> tuple[Tensor | None, ...]:
    """The tensors of the parts, as the ops take them."""
    return (*parts[:8], *(parts.senet or (None,) * 4))


def local_train(
    clients: Tensor,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    *,
    epochs: int = 2,
    batch_size: int | None = None,
    loss: Literal["bpr", "bce"] = "bpr",
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l2_user: float = 0.0,
    l2_items: float = 0.0,
    prox: float = 0.0,
    graph: bool = False,
    mlp: Sequence[Tensor] = (),
    dropout: float = 0.0,
    seed: int,
    round: int,
) -> LocalUpdates:
    """Trains each client from the global parameters and its own vector, with a fresh optimizer.

    A client scores an item by the dot product of its vector and the item's, or by an MLP of the two. In each
    epoch every positive gets one negative (as `sample_negatives` draws it) and all positives pass once, in
    batches of `batch_size`, shuffled anew each epoch, or at once. Nothing of the size of a table is copied or
    stepped through: a row without a gradient stays as it is under Adam and SGD that start fresh, so only the
    touched rows are held.

    Args:
        clients: int32 or int64 [C], the users to train, in [0, U).
        indptr, items: int32 or int64 [U + 1] and [nnz], each user's items in the order of training.
        positives: int32 or int64 [nnz], the same items ascending within each user, distinct.
        num_items: I.
        user: float32 or float64 [U, D], the vectors of all users.
        parts: what item vectors are the sum of.
        epochs: local epochs, to 2^16 - 1.
        batch_size: positives of a step; None: all.
        loss: mean over the batch of -log sigmoid(s+ - s-), or of the binary cross-entropy of both scores.
        optimizer: Adam (Kingma and Ba, 2015) or SGD, with `lr` and, for Adam, `betas` and `eps`.
        l2_user, l2_items: l2 * parameter is added to the gradient of each row whose gradient is not zero.
            (Where a row serves a positive and its negative alike, rounding may decide whether it is.)
        prox: FedProx (Li et al., MLSys 2020): prox * (parameter - global) is added to the gradient of what
            travels.
        graph: score by (user + sum of the client's items' vectors / sqrt(n)) / 2 in place of the user's
            vector: the layer of FedPerGNN (`backbones.fedpergnn`). Without SENet.
        mlp: weight and bias of each layer, first to last, then the output's weights: an item's score is
            `client_mlp` of [user vector, item vector], with `user` [U, V] of any width, also 0, and weights
            [O, V + D]. Tensors without C are shared and travel; [C, O, V + D] and so on are the clients' own
            and stay with them. Without SENet and graph.
        dropout: of hidden units, as `client_mlp` draws it.
        seed: 0 to 2^63 - 1. round: 0 to 2^32 - 1. Draws are functions of (seed, round, client, position,
            epoch).

    Returns:
        `LocalUpdates`; a client's part of it does not depend on the other clients or on the threads.

    Raises:
        ValueError: a shape or number does not fit, `positives` is not ascending, or a client has met every
            item.
        TypeError: an argument has the wrong type or dtype.
        IndexError: a client, item or code is out of range.
        RuntimeError: a tensor requires a gradient and gradients are being recorded.

    Example:
        >>> import torch
        >>> indptr, items = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])  # user 0 met 0 and 2
        >>> user, table = torch.ones(2, 4), torch.zeros(5, 4)
        >>> parts = ItemParts(table=table)
        >>> updates = local_train(torch.tensor([1]), indptr, items, items, 5, user, parts, seed=0, round=0)
        >>> updates.user.shape, updates.rows.shape
        (torch.Size([1, 4]), torch.Size([1, 3]))
    """
    _check(indptr, items, positives, num_items, user, parts, mlp, dropout, graph)
    _check_clients(clients, user)
    _check_own_mlp(mlp, clients)
    settings = _settings(epochs, batch_size, loss, optimizer, lr, betas, eps, l2_user, l2_items, prox)
    check_draw(seed, round)
    data = (clients, indptr, items, positives, num_items, user, *_tensors(parts), list(mlp), dropout)
    out = _LOCAL_TRAIN(*data, parts.reduce == "mean", graph, *settings, seed, round)
    new_user, losses, rows, d_table, d_a, d_b, d_codebooks, d_buckets, *d_senet, d_mlp = out
    return LocalUpdates(
        user=new_user,
        losses=losses,
        rows=rows,
        table=None if parts.table is None else d_table,
        A=None if parts.A is None else d_a,
        B=None if parts.B is None else d_b,
        codebooks=None if parts.codebooks is None else d_codebooks,
        buckets=None if parts.buckets is None else d_buckets,
        senet=None if parts.senet is None else SENetWeights(*d_senet),
        mlp=tuple(d_mlp),
    )


def local_train_sum_(
    clients: Tensor,
    weights: Tensor,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    sums: ItemSums,
    touched: Tensor | None = None,
    *,
    epochs: int = 2,
    batch_size: int | None = None,
    loss: Literal["bpr", "bce"] = "bpr",
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l2_user: float = 0.0,
    l2_items: float = 0.0,
    prox: float = 0.0,
    graph: bool = False,
    mlp: Sequence[Tensor] = (),
    dropout: float = 0.0,
    mlp_sums: Sequence[Tensor] = (),
    seed: int,
    round: int,
    grid: float = 0.0,
) -> SumResult:
    """`local_train`, then `accumulate_updates_` of each part: for a server that needs no upload for itself,
    which on the CPU then is never written. On a GPU it is these two ops, for clients of `UPLOAD_BYTES` at a
    time.

    Args:
        weights: float64 [C].
        sums: float64, contiguous: weights[c] times client c's update is added.
        touched: uint8 [I], contiguous: set to 1 at the rows of `sums.table` and `sums.A` that are added to.
        mlp_sums: as `sums`, of an MLP that all share; empty without one.
        grid: as in `accumulate_updates_`. With 0 sums have an order, that of the clients, and one thread
            makes them.

    The other arguments are those of `local_train`.

    Raises:
        ValueError, TypeError, IndexError: as `local_train`; the sums may then hold some of the clients.

    Example:
        >>> import torch
        >>> indptr, items = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
        >>> user, table, total = torch.ones(2, 4), torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.float64)
        >>> clients, weights = torch.tensor([0, 1]), torch.tensor([2., 1.], dtype=torch.float64)
        >>> model = (5, user, ItemParts(table=table), ItemSums(table=total))
        >>> result = local_train_sum_(clients, weights, indptr, items, items, *model, seed=0, round=0)
        >>> result.losses.shape, bool(total.any()), bool(result.broken.any())
        (torch.Size([2]), True, False)
    """
    training = SumTraining(
        indptr,
        items,
        positives,
        num_items,
        user,
        parts,
        sums,
        touched,
        epochs=epochs,
        batch_size=batch_size,
        loss=loss,
        optimizer=optimizer,
        lr=lr,
        betas=betas,
        eps=eps,
        l2_user=l2_user,
        l2_items=l2_items,
        prox=prox,
        graph=graph,
        mlp=mlp,
        dropout=dropout,
        mlp_sums=mlp_sums,
        seed=seed,
    )
    return training(clients, weights, round=round, grid=grid)


_LR = 6
"""Place of the learning rate in `SumTraining._settings`."""


class SumTraining:
    """`local_train_sum_` for round after round: what stays the same is checked once and held.

    Args:
        As in `local_train_sum_`. The tensors are read, and the sums added to, at each call. Clients' own
        MLPs are of one call alone: `mlp` then has those of some clients, and calls have their own.
    """

    def __init__(
        self,
        indptr: Tensor,
        items: Tensor,
        positives: Tensor,
        num_items: int,
        user: Tensor,
        parts: ItemParts,
        sums: ItemSums,
        touched: Tensor | None = None,
        *,
        epochs: int = 2,
        batch_size: int | None = None,
        loss: Literal["bpr", "bce"] = "bpr",
        optimizer: Literal["adam", "sgd"] = "adam",
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        l2_user: float = 0.0,
        l2_items: float = 0.0,
        prox: float = 0.0,
        graph: bool = False,
        mlp: Sequence[Tensor] = (),
        dropout: float = 0.0,
        mlp_sums: Sequence[Tensor] = (),
        seed: int,
    ) -> None:
        _check(indptr, items, positives, num_items, user, parts, mlp, dropout, graph)
        settings = _settings(epochs, batch_size, loss, optimizer, lr, betas, eps, l2_user, l2_items, prox)
        check_draw(seed, 0)
        _check_sums(num_items, user, parts, sums, touched, mlp, mlp_sums)
        self._user, self._mlp, self._dropout, self._epochs = user, list(mlp), dropout, epochs
        self._indptr, self._num_items = indptr, num_items
        self._data = (indptr, items, positives, num_items, user, *_tensors(parts))
        self._totals = (*sums[:5], *(sums.senet or (None,) * 4), list(mlp_sums), touched)
        self._settings = (parts.reduce == "mean", graph, *settings, seed)

    def __call__(
        self,
        clients: Tensor,
        weights: Tensor,
        *,
        round: int,
        grid: float = 0.0,
        mlp: Sequence[Tensor] | None = None,
        lr: float | None = None,
    ) -> SumResult:
        """See `local_train_sum_`; `mlp` and `lr` stand for those given before, `mlp` of its shapes but C."""
        settings = self._with_lr(lr)
        _check_clients(clients, self._user)
        _check_weights(weights, clients, grid)
        check_draw(0, round)
        if mlp is not None:
            _check_mlp(mlp, self._dropout, self._user)
        mlp = self._mlp if mlp is None else list(mlp)
        _check_own_mlp(mlp, clients)
        if not _in_one_op(self._user):
            return self._in_two_ops(clients, weights, settings, round, grid, mlp)
        user, losses, rows, broken, own = _LOCAL_TRAIN_SUM(
            clients, weights, *self._data, mlp, self._dropout, *self._totals, *settings, round, grid
        )
        if not mlp or mlp[0].dim() == 2:
            return SumResult(user, losses, rows, broken)
        tensors = own.split([t.numel() for t in mlp])
        return SumResult(
            user, losses, rows, broken, tuple(t.view(m.shape) for t, m in zip(tensors, mlp, strict=True))
        )

    def _with_lr(self, lr: float | None) -> tuple[Any, ...]:
        """The settings, with another learning rate if there is one."""
        if lr is None:
            return self._settings
        check_not_negative(lr, "lr")
        return (*self._settings[:_LR], lr, *self._settings[_LR + 1 :])

    def round_arguments(self, lr: float | None = None) -> tuple[Any, ...]:
        """Data, parts and sums, and settings, as `train_round_` takes them."""
        return (*self._data, self._mlp, self._dropout, *self._totals[:-1], *self._with_lr(lr))

    def _in_two_ops(
        self,
        clients: Tensor,
        weights: Tensor,
        settings: tuple[Any, ...],
        round: int,
        grid: float,
        mlp: list[Tensor],
    ) -> SumResult:
        totals, mlp_totals, touched = self._totals[:9], self._totals[9], self._totals[-1]
        own = bool(mlp) and mlp[0].dim() == 3
        users, losses, fresh = [], [], [clients.new_empty(0, dtype=torch.int64)]
        trained: list[list[Tensor]] = []
        broken = torch.zeros(10, dtype=torch.bool, device=self._user.device)
        left = sum(t.shape[1:].numel() for t in mlp) if own else sum(t.numel() for t in mlp_totals)
        for chunk in self._chunks(clients, left):
            layers = [t[chunk] for t in mlp] if own else mlp
            user, loss, rows, *changes, d_mlp = _LOCAL_TRAIN(
                clients[chunk], *self._data, layers, self._dropout, *settings, round
            )
            users.append(user)
            losses.append(loss)
            for part, (total, change) in enumerate(zip(totals, changes, strict=True)):
                if total is not None:
                    broken[part] |= ~change.isfinite().all()
                    _ACCUMULATE(total, change, weights[chunk], rows if part < 2 else None, grid)
            if own:
                trained.append(d_mlp)
            for total, change in zip(mlp_totals, d_mlp, strict=not own):
                broken[-1] |= ~change.isfinite().all()
                _ACCUMULATE(total, change, weights[chunk], None, grid)
            if touched is not None:
                fresh.append(_mark(touched, rows))
        values = tuple(map(torch.cat, zip(*trained, strict=True)))
        return SumResult(torch.cat(users), torch.cat(losses), torch.cat(fresh), broken, values)

    def _chunks(self, clients: Tensor, left: int) -> list[slice]:
        """Clients whose uploads may be there together, in their order. All of a chunk take the rows of the
        largest. `left`: elements that a client leaves of an MLP.
        """
        element = self._user.element_size()
        widths = [0 if total is None else total.size(1) * element for total in self._totals[:2]]
        whole = element * (left + sum(total.numel() for total in self._totals[2:9] if total is not None))
        ids = clients.long().clamp(0, max(0, len(self._user) - 1))  # bad ones are reported by the training
        draws = (self._indptr[ids + 1] - self._indptr[ids]) * (1 + self._epochs)
        rows = draws.clamp(0, self._num_items if any(widths) else 0).tolist()
        chunks, first, most = [], 0, 0
        for at, count in enumerate(rows):
            most = max(most, count)
            if at > first and (at + 1 - first) * (whole + most * (8 + sum(widths))) > UPLOAD_BYTES:
                chunks.append(slice(first, at))
                first, most = at, count
        return [*chunks, slice(first, len(rows))]


def _mark(touched: Tensor, rows: Tensor) -> Tensor:
    """Sets `touched` at rows (-1: none) and returns those at which it was not set."""
    distinct = torch.unique(rows)
    distinct = distinct[distinct >= 0]
    fresh: Tensor = distinct[touched[distinct] == 0]
    touched[fresh] = 1
    return fresh


def _in_one_op(user: Tensor) -> bool:
    """Whether `local_train_sum_` has a kernel for the device."""
    return user.device.type != "cuda"


def _check_weights(weights: Tensor, clients: Tensor, grid: float) -> None:
    check_grid(grid)
    check_dtype(weights, torch.float64, "weights")
    check_shape(weights, tuple(clients.shape), "weights", "C, as clients")


def _check_sums(
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    sums: ItemSums,
    touched: Tensor | None,
    mlp: Sequence[Tensor],
    mlp_sums: Sequence[Tensor],
) -> None:
    shared = mlp if mlp and mlp[0].dim() == 2 else ()
    if len(mlp_sums) != len(shared):
        raise ValueError(
            f"mlp_sums: expected one for each of the {len(shared)} shared tensors of mlp, got {len(mlp_sums)}"
        )
    for mlp_sum, tensor in zip(mlp_sums, shared, strict=True):
        check_dtype(mlp_sum, torch.float64, "mlp_sums")
        check_shape(mlp_sum, tuple(tensor.shape), "mlp_sums", "as mlp")
        check_device(mlp_sum, user, "mlp_sums", "user")
    of = _trained(parts)
    given = _flat_sums(sums)
    for name, parameter in of.items():
        total = given.get(name)
        if (total is None) != (parameter is None):
            raise ValueError(f"sums: expected {name} where the parts have it, and only there")
        if total is not None and parameter is not None:
            check_dtype(total, torch.float64, f"sums.{name}")
            check_shape(total, tuple(parameter.shape), f"sums.{name}", f"as parts.{name}")
            check_device(total, user, f"sums.{name}", "user")
    if touched is not None:
        if parts.table is None and parts.A is None:
            raise ValueError("touched: expected together with table or A, got only touched")
        check_dtype(touched, torch.uint8, "touched")
        check_shape(touched, (num_items,), "touched", "I, the number of items")
    for name, t in (("touched", touched), *given.items(), *(("mlp_sums", t) for t in mlp_sums)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")


def _flat_sums(sums: ItemSums) -> dict[str, Tensor | None]:
    senet = sums.senet._asdict() if sums.senet is not None else dict.fromkeys(SENetWeights._fields)
    return {**{name: getattr(sums, name) for name in ItemSums._fields[:5]}, **senet}


@register_fake("local_train_sum_")
def _fake_sum(
    clients: Tensor,
    weights: Tensor,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    mlp, touched = arguments[12], arguments[24]
    own = mlp if mlp and mlp[0].dim() == 3 else ()
    rows = torch.library.get_ctx().new_dynamic_size() if touched is not None else 0
    return (
        user.new_empty((clients.size(0), user.size(1))),
        weights.new_empty(clients.size(0)),
        clients.new_empty(rows, dtype=torch.int64),
        clients.new_empty(10, dtype=torch.bool),
        user.new_empty(sum(t.numel() for t in own)),
    )


@register_fake("local_train")
def _fake(
    clients: Tensor,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    base: Tensor | None,
    table: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    codes: Tensor | None,
    codebooks: Tensor | None,
    buckets: Tensor | None,
    hashes: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    mlp: Sequence[Tensor],
    *settings: float,
) -> tuple[Tensor | list[Tensor], ...]:
    count = clients.size(0)
    by_row = table is not None or A is not None
    width = torch.library.get_ctx().new_dynamic_size() if by_row else 0

    def whole(t: Tensor | None) -> Tensor:
        return user.new_empty(0) if t is None else user.new_empty((count, *t.shape))

    def touched(t: Tensor | None) -> Tensor:
        return user.new_empty(0) if t is None else user.new_empty((count, width, t.size(1)))

    return (
        user.new_empty((count, user.size(1))),
        user.new_empty(count, dtype=torch.float64),
        user.new_empty((count, width), dtype=torch.int64),
        touched(table),
        touched(A),
        *(whole(t) for t in (B, codebooks, buckets, w1, b1, w2, b2)),
        [user.new_empty(t.shape if mlp[0].dim() == 3 else (count, *t.shape)) for t in mlp],
    )


register_not_differentiable("local_train")
register_in_place("local_train_sum_", *range(21, 32))  # the sums and the marks

# Plain twin -------------------------------------------------------------------------------------------------


# Above its usual threshold of 20 torch's leaves out up to 2e-9.
_softplus = partial(F.softplus, threshold=40)


def local_train_reference(
    clients: Tensor,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    *,
    epochs: int = 2,
    batch_size: int | None = None,
    loss: Literal["bpr", "bce"] = "bpr",
    optimizer: Literal["adam", "sgd"] = "adam",
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    l2_user: float = 0.0,
    l2_items: float = 0.0,
    prox: float = 0.0,
    graph: bool = False,
    mlp: Sequence[Tensor] = (),
    dropout: float = 0.0,
    seed: int,
    round: int,
) -> LocalUpdates:
    """`local_train` in plain PyTorch, a client at a time: whole tables, dense optimizers, autograd."""
    _check(indptr, items, positives, num_items, user, parts, mlp, dropout, graph)
    _check_clients(clients, user)
    _check_own_mlp(mlp, clients)
    _settings(epochs, batch_size, loss, optimizer, lr, betas, eps, l2_user, l2_items, prox)
    check_draw(seed, round)
    check_index_values(clients, user.size(0), "clients", padding=False)
    check_index_values(items, num_items, "items", padding=False)
    check_offsets(indptr, clients, len(items))
    trained = {name: t for name, t in _trained(parts).items() if t is not None}
    shared = {name: t.detach() for name, t in trained.items()}
    sizes = (indptr[clients.long() + 1] - indptr[clients.long()]).tolist()
    width = max((min(num_items, n * (1 + epochs)) for n in sizes), default=0)
    if not {"table", "A"} & trained.keys():
        width = 0
    rows = torch.full((len(sizes), width), -1, dtype=torch.int64, device=user.device)
    new_user, losses, changed, own, depth = [], [], [], bool(mlp) and mlp[0].dim() == 3, len(mlp) // 2
    names = [f"mlp.{i}" for i in range(len(mlp))]
    mlp_results: list[list[Tensor]] = []
    for c, client in enumerate(clients.tolist()):
        mine = items[indptr[client] : indptr[client + 1]].long()
        negatives = mine.new_empty(epochs, 0)
        if len(mine) > 0:
            negatives = sample_negatives_reference(
                mine[None], clients[c : c + 1], indptr, positives, num_items, epochs, seed, round
            )[0]
        layers = {name: (t[c] if own else t).detach() for name, t in zip(names, mlp, strict=True)}
        start = {"user": user[client].detach(), **shared, **layers}
        stays = {"user", *(names if own else ())}
        local = {name: t.clone().requires_grad_() for name, t in start.items()}
        optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(local.values(), lr, betas, eps)
            if optimizer == "adam"
            else torch.optim.SGD(local.values(), lr)
        )
        each = []
        for epoch in range(epochs):
            for batch in _batches(len(mine), client, epoch, batch_size, seed, round):
                optimiser.zero_grad(set_to_none=True)
                ids = torch.stack([mine[batch], negatives[epoch][batch]], 1).flatten()
                vector = local["user"]
                if graph:
                    near = _vectors(mine, parts, local, len(vector)).sum(0)
                    vector = (vector + near / len(mine) ** 0.5) / 2
                vectors = _vectors(ids, parts, local, _item_width(user, mlp))
                if mlp:
                    x = torch.cat([vector.expand(len(ids), -1), vectors], 1)[None]
                    tensors = [local[name][None] for name in names]
                    scores = client_mlp_reference(
                        *(x, tensors[: 2 * depth : 2], tensors[1::2], tensors[-1], ids[None]),
                        *(clients[c : c + 1], dropout, seed, round, epoch),
                    )[0]
                else:
                    scores = vectors @ vector
                value = (
                    -F.logsigmoid(scores[::2] - scores[1::2]).mean()
                    if loss == "bpr"
                    else (_softplus(-scores[::2]) + _softplus(scores[1::2])).mean() / 2
                )
                value.backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for name, t in local.items():
                        assert t.grad is not None
                        if name not in stays and prox > 0:
                            t.grad += prox * (t - start[name])
                        if name not in names:
                            pulled = (t.grad != 0).any(-1, keepdim=True)
                            t.grad += (l2_user if name == "user" else l2_items) * t * pulled
                optimiser.step()
                each.append(value.item())
        losses.append(sum(each) / max(len(each), 1))
        new_user.append(local["user"].detach())
        changed.append({name: local[name].detach() - t for name, t in shared.items()})
        mlp_results.append([local[name].detach() - (0 if own else layers[name]) for name in names])
        if width:
            touched = torch.unique(torch.cat([mine, negatives.flatten()]))
            rows[c, : len(touched)] = touched

    def stacked(name: str) -> Tensor | None:
        if name not in trained:
            return None
        if not changed:
            shape = trained[name].shape
            return user.new_empty((0, width, *shape[1:]) if name in ("table", "A") else (0, *shape))
        if name in ("table", "A"):
            at = [rows[c].where(rows[c] >= 0, num_items) for c in range(len(changed))]
            return torch.stack([F.pad(d[name], (0, 0, 0, 1))[i] for i, d in zip(at, changed, strict=True)])
        return torch.stack([d[name] for d in changed])

    weights = [stacked(name) for name in SENetWeights._fields]
    return LocalUpdates(
        user=torch.stack(new_user) if new_user else user.new_empty((0, user.size(1))),
        losses=torch.tensor(losses, dtype=torch.float64, device=user.device),
        rows=rows,
        table=stacked("table"),
        A=stacked("A"),
        B=stacked("B"),
        codebooks=stacked("codebooks"),
        buckets=stacked("buckets"),
        senet=None if parts.senet is None else SENetWeights(*(w for w in weights if w is not None)),
        mlp=tuple(
            torch.stack([result[i] for result in mlp_results])
            if mlp_results
            else user.new_empty((0, *t.shape[own:]))
            for i, t in enumerate(mlp)
        ),
    )


def local_train_sum_reference_(
    clients: Tensor,
    weights: Tensor,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    sums: ItemSums,
    touched: Tensor | None = None,
    *,
    grid: float = 0.0,
    mlp_sums: Sequence[Tensor] = (),
    **settings: Any,
) -> SumResult:
    """`local_train_sum_` by `local_train_reference` and `accumulate_updates_reference_`."""
    mlp = settings.get("mlp", ())
    given = (mlp, settings.get("dropout", 0.0), settings.get("graph", False))
    _check(indptr, items, positives, num_items, user, parts, *given)
    _check_clients(clients, user)
    _check_weights(weights, clients, grid)
    _check_sums(num_items, user, parts, sums, touched, mlp, mlp_sums)
    updates = local_train_reference(clients, indptr, items, positives, num_items, user, parts, **settings)
    rows = updates.rows.new_empty(0) if touched is None else _mark(touched, updates.rows)
    changed = updates.senet._asdict() if updates.senet is not None else {}
    broken = torch.zeros(10, dtype=torch.bool, device=user.device)
    for i, (name, total) in enumerate(_flat_sums(sums).items()):
        if total is not None:
            update = changed[name] if name in changed else getattr(updates, name)
            broken[i] = not bool(update.isfinite().all())
            at = updates.rows if name in ("table", "A") else None
            accumulate_updates_reference_(total, update, weights, at, grid)
    for total, update in zip(mlp_sums, updates.mlp, strict=False):
        broken[-1] |= not bool(update.isfinite().all())
        accumulate_updates_reference_(total, update, weights, None, grid)
    return SumResult(updates.user, updates.losses, rows, broken, () if mlp_sums else updates.mlp)


def _trained(parts: ItemParts) -> dict[str, Tensor | None]:
    senet = parts.senet._asdict() if parts.senet is not None else {}
    return {
        "table": parts.table,
        "A": parts.A,
        "B": parts.B,
        "codebooks": parts.codebooks,
        "buckets": parts.buckets,
        **senet,
    }


def _vectors(ids: Tensor, parts: ItemParts, local: dict[str, Tensor], width: int) -> Tensor:
    total = local["user"].new_zeros(len(ids), width)
    if parts.base is not None:
        total = total + parts.base[ids]
    if parts.table is not None:
        total = total + client_embedding_reference(ids, local["table"])
    if parts.A is not None:
        total = total + lora_lookup_reference(ids, local["A"], local["B"])
    if parts.codes is not None:
        total = total + rq_lookup_reference(ids, parts.codes, local["codebooks"])
    if parts.hashes is not None:
        senet = None if parts.senet is None else SENetWeights(*(local[name] for name in SENetWeights._fields))
        total = total + hash_lookup_reference(ids, local["buckets"], parts.hashes, senet, parts.reduce)
    return total


def _batches(
    size: int, client: int, epoch: int, batch_size: int | None, seed: int, round: int
) -> list[Tensor]:
    if size == 0:
        return []
    if batch_size is None:
        return [torch.arange(size, device="cpu")]
    positions = np.arange(size)
    words = philox.words(seed, round, client, positions, philox.Purpose.BATCH_ORDER, epoch=epoch)
    order = torch.from_numpy((philox.low64(words) >> 1).argsort(kind="stable"))
    return list(torch.split(order, batch_size))
