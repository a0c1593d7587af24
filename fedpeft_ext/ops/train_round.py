"""train_round_: a round of federated averaging in one call, from the choice of its clients to the server's
step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, check_draw, check_not_negative, check_range
from ._library import eager_op, register_fake, register_in_place
from .aggregate import apply_updates_, apply_updates_reference_, exact_grid
from .local_train import (
    ItemParts,
    ItemSums,
    SumResult,
    SumTraining,
    _flat_sums,
    _in_one_op,
    _trained,
    local_train_sum_reference_,
)
from .sampling import _check_clients, sample_clients, sample_clients_reference

_TRAIN_ROUND = eager_op("train_round_")
Weighting = Literal["samples", "uniform"]


class RoundResult(NamedTuple):
    """What a round tells besides what it changed.

    Attributes:
        clients: int64 [C], who took part, ascending by (number of items, id).
        losses: float64 [C], mean over a client's steps; 0 for a client without items.
        broken: bool [10], whether an update was NaN or infinite, as in `SumResult`.
    """

    clients: Tensor
    losses: Tensor
    broken: Tensor


def train_round_(
    clients: Tensor,
    count: int,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    sums: ItemSums,
    *,
    weighting: Weighting = "samples",
    server_lr: float = 1.0,
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
    attempt: int = 0,
) -> RoundResult:
    """A round of federated averaging (McMahan et al., AISTATS 2017): `sample_clients`, `local_train_sum_`
    and, for each trained part, `apply_updates_`; then the clients' new vectors are put into `user`. On the
    CPU one op, on a GPU those.

    Where an update or a loss is NaN or infinite, nothing is changed but for the sums, which are zero after
    any call.

    Args:
        clients: int32 or int64 [n], those who may take part: distinct, in [0, U).
        count: C of them do.
        user: [U, V], contiguous. Updated in place.
        parts: the trained ones contiguous, and updated in place.
        sums: float64, contiguous and zero: the room that updates are summed in.
        weighting: a client's update weighs as much as it has items, or all weigh the same.
        server_lr: parameter += server_lr * (weighted mean of updates).
        mlp: of all clients, contiguous, and updated in place; not one a client.
        mlp_sums: as `sums`, of `mlp`.
        seed, round, attempt: as in `sample_clients` and `local_train`.

    The other arguments are those of `local_train`. Updates are rounded to `exact_grid`, so that their sums
    do not depend on threads.

    Raises:
        ValueError, TypeError, IndexError: as the ops that it stands for; nothing is changed.
        RuntimeError: a tensor requires a gradient and gradients are being recorded.

    Example:
        >>> import torch
        >>> indptr, items = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
        >>> user, table, total = torch.ones(2, 4), torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.float64)
        >>> model = (5, user, ItemParts(table=table), ItemSums(table=total))
        >>> result = train_round_(torch.arange(2), 2, indptr, items, items, *model, seed=0, round=1)
        >>> result.clients.tolist(), bool(table.any()), bool(total.any())
        ([1, 0], True, False)
    """
    training = RoundTraining(
        clients,
        count,
        indptr,
        items,
        positives,
        num_items,
        user,
        parts,
        sums,
        weighting=weighting,
        server_lr=server_lr,
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
    return training(round, attempt)


class RoundTraining:
    """`train_round_` for round after round: what stays the same is checked once and held.

    Args:
        As in `train_round_`. The tensors are read, and written to, at each call.
    """

    def __init__(
        self,
        clients: Tensor,
        count: int,
        indptr: Tensor,
        items: Tensor,
        positives: Tensor,
        num_items: int,
        user: Tensor,
        parts: ItemParts,
        sums: ItemSums,
        *,
        weighting: Weighting = "samples",
        server_lr: float = 1.0,
        seed: int,
        **settings: Any,
    ) -> None:
        _check_round(clients, count, user, parts, settings.get("mlp", ()), weighting, server_lr, seed)
        self._training = SumTraining(
            indptr, items, positives, num_items, user, parts, sums, seed=seed, **settings
        )
        self._clients, self._count, self._seed = clients, count, seed
        self._by_items, self._server_lr = weighting == "samples", server_lr
        self._indptr, self._user = indptr, user
        self._written = _written(parts, sums, settings.get("mlp", ()), settings.get("mlp_sums", ()))
        self._one_op = _in_one_op(user)

    def __call__(
        self, round: int, attempt: int = 0, *, lr: float | None = None, server_lr: float | None = None
    ) -> RoundResult:
        """See `train_round_`; `lr` and `server_lr` stand for those given before."""
        check_draw(0, round)
        check_range(attempt, 0, 2**32, "attempt")
        server_lr = self._server_lr if server_lr is None else server_lr
        check_not_negative(server_lr, "server_lr")
        if not self._one_op:
            return self._in_pieces(round, attempt, lr, server_lr)
        head = self._clients, self._count, self._by_items, server_lr
        return RoundResult(*_TRAIN_ROUND(*head, *self._training.round_arguments(lr), round, attempt))

    def _in_pieces(self, round: int, attempt: int, lr: float | None, server_lr: float) -> RoundResult:
        ids = sample_clients(self._clients, self._count, seed=self._seed, round=round, attempt=attempt)
        ids, weights, weight = _weighted(ids, self._indptr, self._user, self._by_items)
        try:
            result = self._training(ids, weights, round=round, grid=exact_grid(weight), lr=lr)
        except BaseException:
            for _, total in self._written:
                total.zero_()
            raise
        return _taken_over(ids, result, self._written, weight, server_lr, self._user, apply_updates_)


def _check_round(
    clients: Tensor,
    count: int,
    user: Tensor,
    parts: ItemParts,
    mlp: Sequence[Tensor],
    weighting: str,
    server_lr: float,
    seed: int,
) -> None:
    _check_clients(clients, count, seed, 0, 0)
    check_device(clients, user, "clients", "user")
    if weighting not in ("samples", "uniform"):
        raise ValueError(f"weighting: expected 'samples' or 'uniform', got {weighting!r}")
    check_not_negative(server_lr, "server_lr")
    if mlp and mlp[0].dim() == 3:
        raise ValueError("mlp: expected one that all clients share, got one a client")
    named = {"user": user, **_trained(parts)}
    for name, t in (*named.items(), *(("mlp", t) for t in mlp)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")


def _written(
    parts: ItemParts, sums: ItemSums, mlp: Sequence[Tensor], mlp_sums: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Trained parameters, each with its sum."""
    totals = _flat_sums(sums)
    pairs = [(parameter, totals[name]) for name, parameter in _trained(parts).items()]
    shared = zip(mlp, mlp_sums, strict=True)
    return [(p, t) for p, t in (*pairs, *shared) if p is not None and t is not None]


def _weighted(clients: Tensor, indptr: Tensor, user: Tensor, by_items: bool) -> tuple[Tensor, Tensor, float]:
    """The clients by (items, id), their weights, and the sum of these."""
    for c in clients.tolist():
        if c >= len(user):
            raise IndexError(f"clients: id {c} is out of range: expected 0 to {len(user) - 1}")
    sizes = (indptr[clients + 1] - indptr[clients]).long()
    order = sizes.argsort(stable=True)
    weights = sizes[order].double() if by_items else torch.ones_like(sizes, dtype=torch.float64)
    return clients[order], weights, float(weights.sum())


def _taken_over(
    clients: Tensor,
    result: SumResult,
    written: list[tuple[Tensor, Tensor]],
    weight: float,
    server_lr: float,
    user: Tensor,
    apply: Callable[..., None],
) -> RoundResult:
    """Takes the server's step and the clients' new vectors, unless something is not finite."""
    good = not bool(result.broken.any()) and bool(result.losses.isfinite().all())
    for parameter, total in written:
        if good and weight > 0:
            apply(parameter, total, scale=server_lr / weight)
        else:
            total.zero_()
    if good:
        user.index_copy_(0, clients, result.user)
    return RoundResult(clients, result.losses, result.broken)


@register_fake("train_round_")
def _fake_round(
    clients: Tensor, count: int, by_items: bool, server_lr: float, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        clients.new_empty(count, dtype=torch.int64),
        clients.new_empty(count, dtype=torch.float64),
        clients.new_empty(10, dtype=torch.bool),
    )


# User, the trained parts, the MLP; then the sums.
register_in_place("train_round_", 8, 10, 11, 12, 14, 15, *range(17, 22), *range(23, 33))


def train_round_reference_(
    clients: Tensor,
    count: int,
    indptr: Tensor,
    items: Tensor,
    positives: Tensor,
    num_items: int,
    user: Tensor,
    parts: ItemParts,
    sums: ItemSums,
    *,
    weighting: Weighting = "samples",
    server_lr: float = 1.0,
    mlp: Sequence[Tensor] = (),
    mlp_sums: Sequence[Tensor] = (),
    seed: int,
    round: int,
    attempt: int = 0,
    **settings: Any,
) -> RoundResult:
    """`train_round_` by the twins of the ops that it stands for."""
    _check_round(clients, count, user, parts, mlp, weighting, server_lr, seed)
    ids = sample_clients_reference(clients, count, seed=seed, round=round, attempt=attempt)
    ids, weights, weight = _weighted(ids, indptr, user, weighting == "samples")
    data = (indptr, items, positives, num_items, user, parts, sums)
    result = local_train_sum_reference_(
        *(ids, weights, *data),
        **settings,
        mlp=mlp,
        mlp_sums=mlp_sums,
        seed=seed,
        round=round,
        grid=exact_grid(weight),
    )
    written = _written(parts, sums, mlp, mlp_sums)
    return _taken_over(ids, result, written, weight, server_lr, user, apply_updates_reference_)
