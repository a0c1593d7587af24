"""local_train with an MLP (FedNCF, PFedRec) against its plain twin."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_local_train import arguments as dot_product_arguments
from test_local_train import compare, empty_sums, federation, flat, make_parts, moved, options_of
from torch import Tensor

from fedpeft_ext import ops, reference

KINDS = [["table"], ["lora"], ["rq"], ["hash"], ["hash-sum"], ["rq", "lora"], ["lora", "hash", "rq", "table"]]


def make_mlp(
    widths: list[int], dtype: torch.dtype, clients: int | None = None, seed: int = 6
) -> list[Tensor]:
    """Weights and biases of layers between `widths`, and the output; with `clients` one MLP each."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        whole = shape if clients is None else (clients, *shape)
        return ((torch.rand(whole, generator=generator, dtype=torch.float64) - 0.4) / shape[-1] ** 0.5).to(
            dtype
        )

    layers = [uniform(*shape) for i, o in pairwise(widths) for shape in ((o, i), (o,))]
    return [*layers, uniform(widths[-1])]


def user_vectors(count: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, width, dtype=torch.float64, generator=generator).to(dtype)


FAST = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]  # not emulated


@pytest.mark.parametrize("target", FAST, indirect=True)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("loss", ["bpr", "bce"])
@pytest.mark.parametrize(("own", "kinds"), [*((False, kinds) for kinds in KINDS), (True, KINDS[-1])], ids=str)
def test_equals_the_reference(
    device: torch.device, own: bool, kinds: list[str], loss: str, optimizer: str
) -> None:
    indptr, items, positives = federation([5, 0, 1, 40], 60, seed=1)
    clients = torch.tensor([3, 0, 1])
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        for dim, hidden, changes in (
            (16, [12, 33], {"dropout": 0.3}),  # more scores than a block has
            (9, [7], {"batch_size": 11, "prox": 0.2}),
        ):
            width = 0 if own else dim
            mlp = make_mlp([width + dim, *hidden], dtype, len(clients) if own else None)
            # Adam makes a step of the rounding of a gradient near zero, and L2 on touched rows asks whether
            # there is one: with BPR the user's cancels where the same units let a pair through.
            options = {**options_of(loss, optimizer), "eps": 1e-3, **changes, "mlp": mlp}
            options["l2_user"] = 1e-2 if loss == "bce" else 0.0
            parts = make_parts(kinds, 60, dim, 3, dtype)
            user = user_vectors(4, width, dtype)
            updates = compare(
                device, tolerance, 60, clients, indptr, items, positives, 60, user, parts, **options
            )
            assert float(updates.losses[2]) == 0.0  # a client without items
            for before, after in zip(mlp, updates.mlp, strict=True):
                assert torch.equal(after[2], before[2] if own else torch.zeros_like(before))
                assert not torch.equal(after[0], before[0] if own else torch.zeros_like(before))


# A few of many: blocks of scores, layers wider than a tile of products, with more inputs than that.
@pytest.mark.parametrize(
    ("own", "kinds", "loss", "optimizer", "dtype", "user_width", "hidden", "changes"),
    [
        (False, KINDS[-1], "bpr", "adam", torch.float64, 16, [12, 130, 5], {"dropout": 0.3}),
        (True, ["lora"], "bce", "sgd", torch.float32, 0, [7], {"batch_size": 40, "dropout": 0.4}),
        (False, ["hash-sum", "rq"], "bpr", "sgd", torch.float32, 5, [70], {"prox": 0.2}),
        (False, ["table", "lora"], "bce", "adam", torch.float64, 3, [5, 9], {"batch_size": 3, "prox": 0.2}),
    ],
    ids=str,
)
def test_blocks_of_scores(
    device: torch.device,
    own: bool,
    kinds: list[str],
    loss: str,
    optimizer: str,
    dtype: torch.dtype,
    user_width: int,
    hidden: list[int],
    changes: dict[str, Any],
) -> None:
    indptr, items, positives = federation([5, 0, 1, 70], 90, seed=1)
    clients = torch.tensor([3, 0, 1])
    mlp = make_mlp([user_width + 9, *hidden], dtype, 3 if own else None)
    options = {**options_of(loss, optimizer), "epochs": 2, "eps": 1e-4, "l2_user": 0.0, **changes, "mlp": mlp}
    updates = compare(
        *(device, 1e-9 if dtype == torch.float64 else 1e-4, 90),
        *(clients, indptr, items, positives, 90, user_vectors(4, user_width, dtype)),
        make_parts(kinds, 90, 9, 3, dtype),
        **options,
    )
    for before, after in zip(mlp, updates.mlp, strict=True):
        assert torch.equal(after[2], before[2] if own else torch.zeros_like(before))


@pytest.mark.parametrize("target", FAST, indirect=True)
@settings(deadline=None, max_examples=20)
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(["table", "lora", "rq", "hash"]), unique=True, max_size=2),
    dim=st.one_of(st.integers(1, 20), st.sampled_from([8, 32])),
    user_width=st.integers(0, 9),
    hidden=st.lists(st.one_of(st.integers(1, 9), st.sampled_from([16, 64])), min_size=1, max_size=3),
    sizes=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    epochs=st.integers(0, 3),
    batch_size=st.one_of(st.none(), st.integers(1, 6)),
    dropout=st.sampled_from([0.0, 0.5]),
    own=st.booleans(),
)
def test_any_shape(
    device: torch.device,
    data: st.DataObject,
    kinds: list[str],
    dim: int,
    user_width: int,
    hidden: list[int],
    sizes: list[int],
    epochs: int,
    batch_size: int | None,
    dropout: float,
    own: bool,
) -> None:
    num_items = data.draw(st.sampled_from([17, 5000]))
    indptr, items, positives = federation(sizes, num_items, 7, torch.int32)
    parts = make_parts(kinds, num_items, dim, 9, torch.float64, base=data.draw(st.booleans()) or not kinds)
    mlp = make_mlp([user_width + dim, *hidden], torch.float64, len(sizes) if own else None)
    compare(
        device,
        1e-9,
        num_items,
        torch.arange(len(sizes)),
        *(indptr, items, positives, num_items, user_vectors(len(sizes), user_width, torch.float64), parts),
        epochs=epochs,
        batch_size=batch_size,
        dropout=dropout,
        mlp=mlp,
        eps=1e-4,
        seed=1,
        round=2,
    )


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("target", ["cpu"], indirect=True)  # sums are made on the CPU alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kinds", [["table"], ["lora", "hash", "rq"]], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("num_items", [60, 5000])
def test_sums_are_those_of_the_uploads(
    kinds: list[str], dtype: torch.dtype, own: bool, num_items: int
) -> None:
    """Bit for bit, for any number of threads, whose sums are exact on a grid."""
    indptr, items, positives = federation([5, 0, 1, 40, 3, 7, 7], num_items, seed=1)
    clients, weights = torch.tensor([3, 0, 1, 6, 4]), torch.tensor([2.0, 0.5, 1.0, 3.0, 0.0]).double()
    mlp = make_mlp([20 if own else 25, 12, 33], dtype, 5 if own else None)
    model = (indptr, items, positives, num_items, user_vectors(7, 0 if own else 5, dtype))
    parts = make_parts(kinds, num_items, 20, 3, dtype)
    options: dict[str, Any] = {"l2_items": 1e-2, "prox": 0.1, "dropout": 0.4, "mlp": mlp}
    options |= {"seed": 4, "round": 5}
    updates = ops.local_train(clients, *model, parts, **options)
    shared = [] if own else mlp
    before = torch.get_num_threads()
    try:
        for count, grid in ((1, 2.0**-40), (3, 2.0**-40), (3, 0.0)):
            torch.set_num_threads(count)
            expected, sums = empty_sums(parts), empty_sums(parts)
            for name, total in flat(expected).items():
                rows = updates.rows if name in ("table", "A") else None
                ops.accumulate_updates_(total, flat(updates)[name], weights, rows, grid)
            mlp_sums = [torch.zeros_like(t, dtype=torch.float64) for t in shared]
            result = ops.local_train_sum_(
                *(clients, weights, *model, parts, sums), **options, mlp_sums=mlp_sums, grid=grid
            )
            assert torch.equal(result.losses, updates.losses)
            assert torch.equal(result.user, updates.user)
            assert not result.broken.any()
            for name, total in flat(expected).items():
                assert torch.equal(flat(sums)[name], total), name
            for mine, update in zip(mlp_sums, updates.mlp, strict=not own):
                total = torch.zeros_like(mine)
                ops.accumulate_updates_(total, update, weights, None, grid)
                assert torch.equal(mine, total)
            assert len(result.mlp) == (len(mlp) if own else 0)
            for mine, update in zip(result.mlp, updates.mlp, strict=own):
                assert torch.equal(mine, update)
    finally:
        torch.set_num_threads(before)

    sums, mlp_sums = empty_sums(parts), [torch.zeros_like(t, dtype=torch.float64) for t in shared]
    reference.local_train_sum_(clients, weights, *model, parts, sums, **options, mlp_sums=mlp_sums)
    for name, total in flat(expected).items():
        torch.testing.assert_close(flat(sums)[name], total, rtol=0, atol=1e-3)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("upload_bytes", [1, 1 << 28])
def test_sums_by_two_ops(target: Any, own: bool, upload_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: clients of so many bytes at a time give what one training and one sum give."""
    module = importlib.import_module("fedpeft_ext.ops.local_train")
    monkeypatch.setattr(module, "_in_one_op", lambda user: False)
    monkeypatch.setattr(module, "UPLOAD_BYTES", upload_bytes)
    indptr, items, positives = federation([5, 0, 1, 12, 3, 7], 30, seed=1)
    tensors = [
        torch.tensor([3, 0, 1, 4]),
        torch.tensor([2.0, 0.5, 1.0, 3.0]).double(),
        indptr,
        items,
        positives,
    ]
    clients, weights, *data = (t.to(target.device) for t in tensors)
    user = user_vectors(6, 0 if own else 5, torch.float32).to(target.device)
    parts, mlp = moved(
        (
            make_parts(["table", "rq"], 30, 8, 3, torch.float32),
            make_mlp([8 if own else 13, 6], torch.float32, 4 if own else None),
        ),
        target.device,
    )
    options: dict[str, Any] = {"epochs": 2, "dropout": 0.4, "mlp": mlp, "seed": 4, "round": 5}
    updates = target.ops.local_train(clients, *data, 30, user, parts, **options)
    sums = empty_sums(parts)
    mlp_sums = [torch.zeros_like(t, dtype=torch.float64) for t in mlp if not own]
    result = target.ops.local_train_sum_(
        *(clients, weights, *data, 30, user, parts, sums), **options, mlp_sums=mlp_sums, grid=2.0**-40
    )
    assert torch.equal(result.user, updates.user)
    assert not result.broken.any()
    for mine, update in zip(mlp_sums, updates.mlp, strict=not own):
        total = torch.zeros_like(mine)
        target.ops.accumulate_updates_(total, update, weights, None, 2.0**-40)
        assert torch.equal(mine, total)
    assert len(result.mlp) == (3 if own else 0)
    for mine, update in zip(result.mlp, updates.mlp, strict=own):
        assert torch.equal(mine, update)


def test_sums_by_two_ops_tell_that_the_mlp_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fedpeft_ext.ops.local_train")
    monkeypatch.setattr(module, "_in_one_op", lambda user: False)
    test_sums_tell_that_the_mlp_diverged()


def test_sums_tell_that_the_mlp_diverged() -> None:
    given = arguments()
    given["mlp"][2][1, 0] = float("inf")
    sums = empty_sums(given["parts"])
    mlp_sums = [torch.zeros_like(t, dtype=torch.float64) for t in given["mlp"]]
    result = ops.local_train_sum_(**given, weights=torch.ones(2).double(), sums=sums, mlp_sums=mlp_sums)
    assert bool(result.broken[-1]) == any(not t.isfinite().all() for t in mlp_sums)
    assert bool(result.broken[-1])


def arguments() -> dict[str, Any]:
    parts, mlp = make_parts(["table"], 9, 5, 0, torch.float32), make_mlp([9, 6, 3], torch.float32)
    return {**dot_product_arguments(), "parts": parts, "mlp": mlp}


def changed_mlp(place: int, *shape: int) -> dict[str, Any]:
    return {"mlp": [torch.ones(shape) if i == place else t for i, t in enumerate(arguments()["mlp"])]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (changed_mlp(0, 6), ValueError, "mlp: expected a first weight"),
        (changed_mlp(0, 6, 3), ValueError, "mlp: expected a first layer at least as wide as user, 4, got 3"),
        (changed_mlp(0, 6, 8), ValueError, "base: expected shape"),
        (changed_mlp(1, 5), ValueError, "mlp: expected shape"),
        (changed_mlp(2, 3, 5), ValueError, "mlp: expected shape"),
        (changed_mlp(4, 2), ValueError, "mlp: expected shape"),
        ({"mlp": make_mlp([9, 6, 3], torch.float32, 3)}, ValueError, "mlp: expected size 2"),
        ({"mlp": make_mlp([9, 6], torch.float64)}, TypeError, "mlp: expected the dtype of user"),
        ({"mlp": arguments()["mlp"][:-1]}, ValueError, "mlp: expected weight and bias"),
        ({"dropout": 1.0}, ValueError, "dropout: expected a probability"),
        ({"graph": True}, ValueError, "mlp: expected none with graph"),
        ({"parts": make_parts(["senet"], 9, 5, 0, torch.float32)}, ValueError, "none with senet"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    for space in (ops, reference):
        with pytest.raises(error, match=message):
            space.local_train(**{**arguments(), **changes})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mlp_sums": []}, ValueError, "mlp_sums: expected one for each of the 5"),
        ({"mlp_sums": make_mlp([9, 6, 3], torch.float32)}, TypeError, "mlp_sums: expected torch.float64"),
        ({"mlp_sums": make_mlp([9, 7, 3], torch.float64)}, ValueError, "mlp_sums: expected shape"),
    ],
)
def test_bad_sums(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {**arguments(), "weights": torch.ones(2).double()}
    good["sums"] = empty_sums(good["parts"])
    for space in (ops, reference):
        with pytest.raises(error, match=message):
            space.local_train_sum_(**{**good, **changes})  # type: ignore[attr-defined]
