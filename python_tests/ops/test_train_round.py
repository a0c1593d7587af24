"""train_round_ against the ops that it stands for, bit for bit, and against its plain twin."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from test_local_train import empty_sums, federation, flat, make_parts, moved
from test_local_train_mlp import make_mlp, user_vectors
from torch import Tensor

from fedpeft_ext import ops, reference
from fedpeft_ext.ops import ItemParts, ItemSums, RoundResult
from fedpeft_ext.ops.aggregate import exact_grid
from fedpeft_ext.ops.train_round import RoundTraining

SIZES = [5, 0, 1, 12, 3, 7, 7]
KINDS = [["table"], ["lora"], ["rq"], ["hash"], ["table", "senet"], ["lora", "hash", "rq"]]


class Model:
    """What a round works on, and sums of its own."""

    def __init__(self, kinds: list[str], dtype: torch.dtype, num_items: int = 30, mlp: bool = False) -> None:
        self.data = (*federation(SIZES, num_items, seed=1), num_items)
        width = 5 if mlp else 16
        self.user = user_vectors(len(SIZES), width, dtype)
        self.parts = make_parts(kinds, num_items, 16, 3, dtype)
        self.mlp = make_mlp([21, 12], dtype, None) if mlp else []
        self.sums = empty_sums(self.parts)
        self.mlp_sums = [torch.zeros_like(t, dtype=torch.float64) for t in self.mlp]

    def copy(self) -> Model:
        return copy.deepcopy(self)

    def to(self, device: torch.device) -> Model:
        for name, value in vars(self).items():
            setattr(self, name, moved(value, device))
        return self

    def round(self, space: Any, clients: Tensor, count: int, **options: Any) -> RoundResult:
        given = {"mlp": self.mlp, "mlp_sums": self.mlp_sums, "seed": 4, "round": 5, **options}
        result: RoundResult = space.train_round_(
            clients, count, *self.data, self.user, self.parts, self.sums, **given
        )
        return result

    def in_pieces(self, clients: Tensor, count: int, weighting: str, server_lr: float, **options: Any) -> Any:
        """The same by the ops that a round is made of."""
        draw = {"seed": 4, "round": 5}
        ids = ops.sample_clients(clients, count, **draw)
        sizes = torch.tensor(SIZES)[ids]
        ids = ids[sizes.argsort(stable=True)]
        weights = torch.tensor(SIZES)[ids].double() if weighting == "samples" else torch.ones(count).double()
        weight = float(weights.sum())
        result = ops.local_train_sum_(
            *(ids, weights, *self.data, self.user, self.parts, self.sums),
            **options,
            **draw,
            mlp=self.mlp,
            mlp_sums=self.mlp_sums,
            grid=exact_grid(weight),
        )
        for parameter, total in self.trained():
            ops.apply_updates_(parameter, total, scale=server_lr / weight)
        self.user[ids] = result.user
        return ids, result.losses

    def trained(self) -> list[tuple[Tensor, Tensor]]:
        parts, sums = flat(self.parts), flat(self.sums)
        pairs = [(parts[name], total) for name, total in sums.items()]
        return [*pairs, *zip(self.mlp, self.mlp_sums, strict=True)]

    def tensors(self) -> list[Tensor]:
        return [self.user, *(parameter for parameter, _ in self.trained())]

    def same(self, other: Model) -> bool:
        return all(torch.equal(x, y) for x, y in zip(self.tensors(), other.tensors(), strict=True))


def assert_sums_are_zero(model: Model) -> None:
    assert not any(bool(total.any()) for _, total in model.trained())


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("target", ["cpu"], indirect=True)  # one op on the CPU alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_items", [30, 5000])  # the step goes through whole tables, or to touched rows
@pytest.mark.parametrize(
    ("kinds", "mlp"), [*((kinds, False) for kinds in KINDS), (["lora", "rq"], True)], ids=str
)
def test_equals_its_pieces(kinds: list[str], mlp: bool, num_items: int, dtype: torch.dtype) -> None:
    start = Model(kinds, dtype, num_items, mlp)
    clients = torch.tensor([0, 1, 3, 4, 5, 6])
    threads = torch.get_num_threads()
    try:
        for weighting, count in (("samples", 5), ("uniform", 6)):
            options: dict[str, Any] = {"weighting": weighting, "server_lr": 0.7, "l2_items": 1e-2}
            pieces = start.copy()
            ids, losses = pieces.in_pieces(clients, count, **options)
            assert not pieces.same(start)
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                whole = start.copy()
                result = whole.round(ops, clients, count, **options)
                assert torch.equal(result.clients, ids)
                assert torch.equal(result.losses, losses)
                assert not result.broken.any()
                assert whole.same(pieces)
                assert_sums_are_zero(whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("kinds", "mlp"), [(["lora", "hash", "rq"], False), (["table"], True)], ids=str)
def test_equals_the_reference(
    target: Any, kinds: list[str], mlp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as on a GPU: by the ops that it stands for."""
    if target.name != "cpu":
        module = importlib.import_module("fedpeft_ext.ops.train_round")
        monkeypatch.setattr(module, "_in_one_op", lambda user: False)
        training = importlib.import_module("fedpeft_ext.ops.local_train")
        monkeypatch.setattr(training, "_in_one_op", lambda user: False)
    mine = Model(kinds, torch.float64, mlp=mlp)
    twin = mine.copy()
    mine.to(target.device)
    clients = torch.tensor([0, 1, 3, 4, 5, 6], dtype=torch.int32)
    result = mine.round(target.ops, clients.to(target.device), 5, attempt=2)
    expected = twin.round(reference, clients, 5, attempt=2)
    assert torch.equal(result.clients.cpu(), expected.clients)
    torch.testing.assert_close(result.losses.cpu(), expected.losses, rtol=0, atol=1e-8)
    for x, y in zip(mine.tensors(), twin.tensors(), strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=1e-8)
    assert_sums_are_zero(mine)
    assert_sums_are_zero(twin)


@pytest.mark.parametrize("one_op", [True, False])
def test_a_round_that_diverges_changes_nothing(one_op: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fedpeft_ext.ops.train_round")
    monkeypatch.setattr(module, "_in_one_op", lambda user: one_op)
    model = Model(["table", "lora"], torch.float32)
    assert model.parts.B is not None
    model.parts.B[2, 1] = float("inf")
    for space in (ops, reference):
        now = model.copy()
        result = now.round(space, torch.arange(7), 7)
        names = ItemSums._fields[:3]
        assert {"A", "B"} <= {
            name for name, bad in zip(names, result.broken[:3].tolist(), strict=True) if bad
        }
        assert now.same(model)
        assert_sums_are_zero(now)


@pytest.mark.parametrize("one_op", [True, False])
def test_an_error_changes_nothing(one_op: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fedpeft_ext.ops.train_round")
    monkeypatch.setattr(module, "_in_one_op", lambda user: one_op)
    model = Model(["table", "lora"], torch.float32)
    before = model.copy()
    model.data[1][3] = 99
    with pytest.raises(IndexError, match="items: item 99 at position 3 is out of range: expected 0 to 29"):
        model.round(ops, torch.arange(7), 7)
    assert model.same(before)
    assert_sums_are_zero(model)
    with pytest.raises(IndexError, match="clients: id 7 is out of range: expected 0 to 6"):
        before.round(ops, torch.arange(8), 8)


@pytest.mark.parametrize("one_op", [True, False])
def test_rates_of_a_call_stand_for_those_given_before(one_op: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_round", "local_train"):
        module = importlib.import_module(f"fedpeft_ext.ops.{name}")
        monkeypatch.setattr(module, "_in_one_op", lambda user: one_op)
    model, clients = Model(["lora", "rq"], torch.float32), torch.arange(7)
    expected = model.copy()
    training = RoundTraining(
        *(clients, 5, *model.data, model.user, model.parts, model.sums), lr=0.3, server_lr=0.9, seed=4
    )
    for round, lr, server_lr in ((5, 0.2, 0.5), (6, None, None), (7, 0.1, 2.0)):
        training(round, lr=lr, server_lr=server_lr)
        rates = {"lr": 0.3 if lr is None else lr, "server_lr": 0.9 if server_lr is None else server_lr}
        expected.round(ops, clients, 5, round=round, **rates)
        assert model.same(expected)
    for name in ("lr", "server_lr"):
        with pytest.raises(ValueError, match=f"^{name}: expected at least 0, got -1"):
            training(8, **{name: -1.0})


def test_no_clients_and_clients_without_items() -> None:
    model = Model(["lora"], torch.float32)
    before = model.copy()
    assert model.round(ops, torch.arange(7), 0).losses.shape == (0,)
    result = model.round(ops, torch.tensor([1]), 1)
    assert result.clients.tolist() == [1]
    assert result.losses.tolist() == [0.0]
    assert model.same(before)


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"clients": torch.ones(3)}, TypeError, "clients: expected int32 or int64"),
        ({"count": 8}, ValueError, "count: expected 0 to 7"),
        ({"weighting": "size"}, ValueError, "weighting: expected 'samples' or 'uniform', got 'size'"),
        ({"server_lr": -1.0}, ValueError, "server_lr: expected"),
        ({"attempt": -1}, ValueError, "attempt: expected 0 to"),
        ({"sums": ItemSums()}, ValueError, "sums: expected table where the parts have it"),
        ({"user": transposed(torch.ones(7, 16))}, ValueError, "user: expected a contiguous tensor"),
        (
            {"parts": ItemParts(table=transposed(torch.ones(30, 16)))},
            ValueError,
            "table: expected a contiguous tensor",
        ),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Model(["table"], torch.float32)
    names = ("clients", "count", "indptr", "items", "positives", "num_items", "user", "parts", "sums")
    good = dict(
        zip(names, (torch.arange(7), 7, *model.data, model.user, model.parts, model.sums), strict=True)
    )
    for space in (ops, reference):
        with pytest.raises(error, match=message):
            space.train_round_(**{**good, "seed": 0, "round": 1, **changes})  # type: ignore[attr-defined]


def test_clients_own_mlps_are_refused() -> None:
    model = Model([], torch.float32, mlp=True)
    model.mlp = make_mlp([21, 12], torch.float32, 7)
    with pytest.raises(ValueError, match="mlp: expected one that all clients share"):
        model.round(ops, torch.arange(7), 7)
