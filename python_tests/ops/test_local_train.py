"""local_train against its plain twin: a client at a time, whole tables, dense optimizers, autograd."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft_ext import ops, reference
from fedpeft_ext.ops import ItemParts, ItemSums, LocalUpdates, SENetWeights

PARTS = ["table", "lora", "rq", "hash", "hash-sum", "senet"]


def federation(
    sizes: list[int], num_items: int, seed: int, index: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, items in random order, items ascending."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(num_items)[:size] for size in sizes]
    items = np.concatenate([*rows, []]).astype(np.int64)
    ascending = np.concatenate([*map(np.sort, rows), []]).astype(np.int64)
    indptr = torch.tensor([0, *np.cumsum(sizes)])
    return indptr.to(index), torch.from_numpy(items).to(index), torch.from_numpy(ascending).to(index)


def make_parts(
    kinds: list[str], num_items: int, dim: int, seed: int, dtype: torch.dtype, base: bool = True
) -> ItemParts:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    values: dict[str, Any] = {"base": normal(num_items, dim)} if base else {}
    for kind in kinds:
        if kind == "table":
            values["table"] = normal(num_items, dim)
        elif kind == "lora":
            values |= {"A": normal(num_items, 3), "B": normal(dim, 3)}
        elif kind == "rq":
            codes = torch.randint(0, 7, (num_items, 2), generator=g, dtype=torch.uint8)
            values |= {"codes": codes, "codebooks": normal(2, 7, dim)}
        else:
            values |= {"buckets": normal(11, dim), "hashes": ops.make_hashes(3, seed=seed)}
            values["reduce"] = "sum" if kind == "hash-sum" else "mean"
            if kind == "senet":
                values["senet"] = SENetWeights(normal(5, 3), normal(5), normal(3, 5), normal(3))
    return ItemParts(**values)


def named(updates: LocalUpdates, num_items: int) -> dict[str, Tensor]:
    """Every result by name; row updates spread over the whole table, since their order is free."""
    values = {"user": updates.user, "losses": updates.losses}
    for name in ("B", "codebooks", "buckets"):
        if getattr(updates, name) is not None:
            values[name] = getattr(updates, name)
    if updates.senet is not None:
        values |= updates.senet._asdict()
    values |= {f"mlp.{i}": t for i, t in enumerate(updates.mlp)}
    for name in ("table", "A"):
        change = getattr(updates, name)
        if change is not None:
            whole = change.new_zeros(len(change), num_items + 1, change.size(2))
            whole.scatter_(
                1, updates.rows.where(updates.rows >= 0, num_items)[..., None].expand_as(change), change
            )
            values[name] = whole[:, :num_items]
    return values


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, also those in tuples and lists, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        parts = [moved(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def train(device: torch.device, *args: Any, **options: Any) -> LocalUpdates:
    values: dict[str, Any] = {name: moved(value, device) for name, value in options.items()}
    updates = ops.local_train(*(moved(a, device) for a in args), **values)
    result: LocalUpdates = moved(updates, torch.device("cpu"))
    return result


def compare(
    device: torch.device, tolerance: float, num_items: int, *args: Any, **options: Any
) -> LocalUpdates:
    mine = train(device, *args, **options)
    theirs = reference.local_train(*args, **options)
    ours, plain = named(mine, num_items), named(theirs, num_items)
    assert ours.keys() == plain.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, plain[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return mine


def options_of(loss: str, optimizer: str) -> dict[str, Any]:
    """Settings of a short training."""
    return {
        "loss": loss,
        "optimizer": optimizer,
        "lr": 0.01 if optimizer == "adam" else 0.5,
        "l2_user": 1e-2,
        "l2_items": 1e-2,
        "epochs": 3,
        "seed": 4,
        "round": 5,
    }


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("loss", ["bpr", "bce"])
@pytest.mark.parametrize(
    "kinds",
    [[], *([kind] for kind in PARTS), ["rq", "lora"], ["table", "senet"], ["lora", "hash", "rq", "table"]],
    ids=str,
)
def test_equals_the_reference(device: torch.device, kinds: list[str], loss: str, optimizer: str) -> None:
    indptr, items, positives = federation([5, 0, 1, 12], 30, seed=1)
    dim = 16 if loss == "bpr" else 9  # rows that fill vectors stay in the table until the first step
    user = torch.randn(4, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = make_parts(kinds, 30, dim, 3, torch.float64)
    options = options_of(loss, optimizer)
    clients = torch.tensor([3, 0, 1])
    updates = compare(device, 1e-9, 30, clients, indptr, items, positives, 30, user, parts, **options)
    assert float(updates.losses[2]) == 0.0  # a client without items
    assert torch.equal(updates.user[2], user[1])
    single = parts._replace(
        **{
            name: t.float()
            for name, t in parts._asdict().items()
            if isinstance(t, Tensor) and t.is_floating_point()
        }
    )
    if parts.senet is not None:
        single = single._replace(senet=SENetWeights(*(w.float() for w in parts.senet)))
    compare(device, 1e-4, 30, clients, indptr, items, positives, 30, user.float(), single, **options)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("loss", ["bpr", "bce"])
@pytest.mark.parametrize(
    "kinds",
    [
        [],
        ["table"],
        ["lora"],
        ["rq"],
        ["hash"],
        ["hash-sum"],
        ["rq", "lora"],
        ["lora", "hash", "rq", "table"],
    ],
    ids=str,
)
def test_the_graph_layer_equals_the_reference(
    device: torch.device, kinds: list[str], loss: str, optimizer: str
) -> None:
    indptr, items, positives = federation([5, 0, 1, 12], 30, seed=1)
    clients = torch.tensor([3, 0, 1])
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        for dim, changes in ((16, {}), (9, {"batch_size": 4, "prox": 0.2})):
            user = torch.randn(4, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            options = {**options_of(loss, optimizer), "graph": True, **changes}
            parts = make_parts(kinds, 30, dim, 3, dtype)
            data = (clients, indptr, items, positives, 30, user.to(dtype))
            updates = compare(device, tolerance, 30, *data, parts, **options)
            plain = train(device, *data, parts, **{**options, "graph": False})
            assert not torch.equal(updates.user[0], plain.user[0])


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(["table", "lora", "rq", "hash", "senet"]), unique=True, max_size=3),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32])),
    sizes=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    epochs=st.integers(0, 3),
    batch_size=st.one_of(st.none(), st.integers(1, 6)),
    prox=st.sampled_from([0.0, 0.3]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape(
    device: torch.device,
    data: st.DataObject,
    kinds: list[str],
    dim: int,
    sizes: list[int],
    epochs: int,
    batch_size: int | None,
    prox: float,
    index: torch.dtype,
) -> None:
    if "hash" in kinds and "senet" in kinds:
        kinds = [kind for kind in kinds if kind != "hash"]
    num_items = data.draw(st.sampled_from([17, 40, 5000]))  # the last: rows are found by hashing
    indptr, items, positives = federation(sizes, num_items, 7, index)
    user = torch.randn(len(sizes), dim, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    parts = make_parts(kinds, num_items, dim, 9, torch.float64, base=data.draw(st.booleans()) or not kinds)
    # A shared row that a positive and its negative both use can have a gradient of zero, or of rounding,
    # and L2 asks which of the two it is.
    shared = not {"rq", "hash", "senet"}.isdisjoint(kinds)
    compare(
        device,
        1e-9,
        num_items,
        torch.arange(len(sizes), dtype=index),
        *(indptr, items, positives, num_items, user, parts),
        epochs=epochs,
        batch_size=batch_size,
        prox=prox,
        l2_items=0.0 if shared else 1e-2,
        eps=1e-4,  # Adam multiplies the rounding of a gradient near zero by lr / eps
        seed=1,
        round=2,
    )


def arguments() -> dict[str, Any]:
    indptr, items, positives = federation([3, 2], 9, seed=0)
    return {
        "clients": torch.tensor([0, 1]),
        "indptr": indptr,
        "items": items,
        "positives": positives,
        "num_items": 9,
        "user": torch.ones(2, 4),
        "parts": make_parts(["rq", "lora", "senet"], 9, 4, 0, torch.float32),
        "seed": 0,
        "round": 0,
    }


def change_parts(**changes: Any) -> dict[str, Any]:
    return {"parts": arguments()["parts"]._replace(**changes)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"clients": torch.tensor([0, 2])}, IndexError, "clients: id 2 at position 1"),
        ({"clients": torch.tensor([0.0])}, TypeError, "clients: expected int32 or int64"),
        ({"user": torch.ones(3, 4)}, ValueError, "indptr: expected size 4"),
        ({"user": torch.ones(2, 4, dtype=torch.float16)}, TypeError, "user: expected float32 or float64"),
        ({"items": torch.tensor([0, 1, 9, 2, 3])}, IndexError, "items: item 9 at position 2"),
        ({"positives": torch.tensor([1, 0, 2, 2, 3])}, ValueError, "positives: expected .* ascending"),
        ({"indptr": torch.tensor([0, 3, 9])}, ValueError, "indptr: expected ascending offsets"),
        (change_parts(B=None), ValueError, "A: expected together with B"),
        (change_parts(B=torch.ones(4, 2)), ValueError, "B: expected shape"),
        (
            change_parts(A=torch.ones(9, 0), B=torch.ones(4, 0)),
            ValueError,
            "A: expected a rank of at least 1",
        ),
        (change_parts(base=torch.ones(9, 5)), ValueError, "base: expected shape"),
        (change_parts(base=torch.ones(9, 4).double()), TypeError, "base: expected the dtype of user"),
        (change_parts(codes=torch.full((9, 2), 7)), IndexError, "codes: code 7 of item"),
        (change_parts(buckets=None, hashes=None), ValueError, "senet: expected together with buckets"),
        ({"epochs": -1}, ValueError, "epochs: expected 0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"loss": "hinge"}, ValueError, "loss: expected 'bpr' or 'bce'"),
        ({"optimizer": "lion"}, ValueError, "optimizer: expected 'adam' or 'sgd'"),
        ({"lr": -1.0}, ValueError, "lr: expected at least 0"),
        ({"graph": True}, ValueError, "graph: expected False with senet"),
    ],
)
def test_bad_arguments(
    device: torch.device, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(device, **{**arguments(), **changes})


@pytest.mark.parametrize("value", [-1, 2**61 - 1])
def test_hash_coefficients_out_of_range(target: Any, value: int) -> None:
    """As by the lookups; a GPU does not wait for them."""
    parts = arguments()["parts"]
    hashes = parts.hashes.clone()
    hashes[1, 0] = value
    for call in [reference.local_train, *([ops.local_train] if target.name == "cpu" else [])]:
        with pytest.raises(ValueError, match=r"hashes: expected values from 0 to 2\^61 - 2"):
            call(**{**arguments(), "parts": parts._replace(hashes=hashes)})


def test_a_client_that_met_every_item_has_no_negative(device: torch.device) -> None:
    indptr, items, positives = federation([4], 4, seed=0)
    clients, user = torch.tensor([0]), torch.ones(1, 2)
    with pytest.raises(ValueError, match="client 0 has met all 4 items"):
        train(device, clients, indptr, items, positives, 4, user, ItemParts(), seed=0, round=0)


@pytest.mark.parametrize("kind", ["hash", "senet"])
def test_a_row_that_both_items_of_every_pair_read_stays(device: torch.device, kind: str) -> None:
    """Its gradient is zero with BPR; a residue of rounding would be a full step of Adam."""
    g = torch.Generator().manual_seed(2)
    parts = make_parts([kind], 30, 9, 1, torch.float32)._replace(
        buckets=torch.randn(1, 9, generator=g), hashes=ops.make_hashes(1, seed=1)
    )
    if parts.senet:
        w1, b1, w2, b2 = parts.senet
        parts = parts._replace(senet=SENetWeights(w1[:, :1].contiguous(), b1, w2[:1], b2[:1]))
    user = torch.randn(2, 9, generator=g)
    updates = train(
        device, torch.arange(2), *federation([9, 4], 30, 1), 30, user, parts, **options_of("bpr", "adam")
    )
    assert updates.buckets is not None
    assert not updates.buckets.any()


def test_gradients_through_training_are_refused() -> None:
    with pytest.raises(RuntimeError, match="local_train is not differentiable"):
        ops.local_train(**{**arguments(), "user": torch.ones(2, 4, requires_grad=True)})
    with torch.no_grad():
        ops.local_train(**{**arguments(), "user": torch.ones(2, 4, requires_grad=True)})


@pytest.mark.parametrize("kind", PARTS)
def test_vectors_without_columns(device: torch.device, kind: str) -> None:
    """SENet's squeeze is then a mean of nothing, 0."""
    indptr, items, positives = federation([3, 2], 9, 1)
    parts = make_parts([kind], 9, 0, 2, torch.float64)
    data = torch.arange(2), indptr, items, positives, 9, torch.empty(2, 0, dtype=torch.float64)
    updates = compare(device, 1e-12, 9, *data, parts, **options_of("bpr", "adam"))
    theirs = reference.local_train(*data, parts, **options_of("bpr", "adam"))
    assert torch.equal(updates.rows.sort().values, theirs.rows.sort().values)


def test_senet_without_hidden_units(device: torch.device) -> None:
    """Its gates are then the same for all items."""
    g = torch.Generator().manual_seed(2)
    indptr, items, positives = federation([5, 3], 20, 1)
    parts = make_parts(["senet"], 20, 8, 2, torch.float64)
    gates = torch.randn(3, generator=g, dtype=torch.float64)
    parts = parts._replace(senet=SENetWeights(*(gates.new_empty(*s) for s in ((0, 3), (0,), (3, 0))), gates))
    user = torch.randn(2, 8, generator=g, dtype=torch.float64)
    data = torch.arange(2), indptr, items, positives, 20, user
    compare(device, 1e-9, 20, *data, parts, **options_of("bpr", "sgd"))


def test_no_clients(device: torch.device) -> None:
    changed = train(device, **{**arguments(), "clients": torch.empty(0, dtype=torch.int64)})
    assert changed.user.shape == (0, 4)
    assert changed.codebooks is not None
    assert changed.codebooks.shape == (0, 2, 7, 4)


# Into sums ------------------------------------------------------------------------------------------------


def empty_sums(parts: ItemParts) -> ItemSums:
    def zeros(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.zeros_like(t, dtype=torch.float64)

    senet = None if parts.senet is None else SENetWeights(*(zeros(w) for w in parts.senet))  # type: ignore[arg-type]
    return ItemSums(*(zeros(getattr(parts, name)) for name in ItemSums._fields[:-1]), senet)  # type: ignore[arg-type]


def flat(values: Any) -> dict[str, Tensor]:
    senet = values.senet._asdict() if values.senet is not None else {}
    named = {name: getattr(values, name) for name in ItemSums._fields[:-1]} | senet
    return {name: t for name, t in named.items() if t is not None}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("target", ["cpu"], indirect=True)  # sums are made on the CPU alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kinds", [[], *([kind] for kind in PARTS), ["table", "senet"], ["lora", "hash", "rq", "table"]], ids=str
)
@pytest.mark.parametrize(("dim", "graph", "num_items"), [(9, False, 30), (16, False, 5000), (16, True, 30)])
def test_sums_are_those_of_the_uploads(
    kinds: list[str], dtype: torch.dtype, dim: int, graph: bool, num_items: int
) -> None:
    if graph and "senet" in kinds:
        pytest.skip("SENet goes without the graph layer")
    sizes = [5, 0, 1, 12, 3, 7, 7]
    indptr, items, positives = federation(sizes, num_items, seed=1)
    user = torch.randn(7, dim, dtype=dtype, generator=torch.Generator().manual_seed(2))
    parts = make_parts(kinds, num_items, dim, 3, dtype)
    clients, weights = torch.tensor([3, 0, 1, 6, 4]), torch.tensor([2.0, 0.5, 1.0, 3.0, 0.0]).double()
    data = (indptr, items, positives, num_items)
    options: dict[str, Any] = {"epochs": 2, "l2_items": 1e-2, "prox": 0.1, "seed": 4, "round": 5}
    options["graph"] = graph
    updates = ops.local_train(clients, *data, user, parts, **options)

    threads = torch.get_num_threads()
    try:
        # Exact sums have no order; the others are one thread's. Several threads add to the tables of 5000
        # items behind locks.
        for count, grid in ((1, 2.0**-40), (2, 2.0**-40), (3, 2.0**-40), (1, 0.0), (3, 0.0)):
            torch.set_num_threads(count)
            expected, sums = empty_sums(parts), empty_sums(parts)
            for name, total in flat(expected).items():
                rows = updates.rows if name in ("table", "A") else None
                ops.accumulate_updates_(total, flat(updates)[name], weights, rows, grid)
            by_row = parts.table is not None or parts.A is not None
            touched = torch.zeros(num_items, dtype=torch.uint8) if by_row else None
            if touched is not None:
                touched[0] = 1  # by an earlier call
            result = ops.local_train_sum_(
                clients, weights, *data, user, parts, sums, touched, **options, grid=grid
            )
            assert torch.equal(result.losses, updates.losses)
            assert torch.equal(result.user, updates.user)
            assert not result.broken.any()
            for name, total in flat(expected).items():
                assert torch.equal(flat(sums)[name], total), name
            if touched is not None:
                known = torch.unique(updates.rows[updates.rows > 0])
                assert torch.equal(result.rows.sort().values, known)
                assert torch.equal(touched.nonzero().flatten(), torch.cat([torch.tensor([0]), known]))
    finally:
        torch.set_num_threads(threads)

    sums = empty_sums(parts)
    other = reference.local_train_sum_(clients, weights, *data, user, parts, sums, **options)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(other.user, updates.user, rtol=0, atol=tolerance)
    torch.testing.assert_close(other.losses, updates.losses, rtol=0, atol=tolerance)
    for name, total in flat(expected).items():
        torch.testing.assert_close(flat(sums)[name], total, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kinds", [["table", "senet"], ["lora", "rq"]], ids=str)
@pytest.mark.parametrize("upload_bytes", [1, 5000, 1 << 28])
def test_sums_by_two_ops(
    target: Any, kinds: list[str], upload_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: clients of so many bytes at a time give what one training and one sum give."""
    module = importlib.import_module("fedpeft_ext.ops.local_train")
    monkeypatch.setattr(module, "_in_one_op", lambda user: False)
    monkeypatch.setattr(module, "UPLOAD_BYTES", upload_bytes)
    data = federation([5, 0, 1, 12, 3, 7], 30, seed=1)
    user = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    parts: ItemParts = moved(make_parts(kinds, 30, 8, 3, torch.float32), target.device)
    weights = torch.tensor([2.0, 0.5, 1.0, 3.0]).double()
    tensors = [torch.tensor([3, 0, 1, 4]), weights, *data, user]
    clients, weights, *arrays, user = (t.to(target.device) for t in tensors)
    model = (*arrays, 30, user)
    options: dict[str, Any] = {"epochs": 2, "seed": 4, "round": 5}
    updates = target.ops.local_train(clients, *model, parts, **options)
    expected, sums = empty_sums(parts), empty_sums(parts)
    for name, total in flat(expected).items():
        rows = updates.rows if name in ("table", "A") else None
        target.ops.accumulate_updates_(total, flat(updates)[name], weights, rows, 2.0**-40)
    touched = torch.zeros(30, dtype=torch.uint8, device=target.device)
    touched[0] = 1
    result = target.ops.local_train_sum_(
        clients, weights, *model, parts, sums, touched, **options, grid=2.0**-40
    )
    assert torch.equal(result.losses, updates.losses)
    assert torch.equal(result.user, updates.user)
    assert not result.broken.any()
    for name, total in flat(expected).items():
        assert torch.equal(flat(sums)[name], total), name
    known = torch.unique(updates.rows[updates.rows > 0])
    assert torch.equal(result.rows.sort().values, known)
    assert torch.equal(touched.nonzero().flatten(), torch.cat([known.new_zeros(1), known]))


def test_sums_tell_which_part_diverged() -> None:
    given = arguments()
    parts: ItemParts = given["parts"]
    assert parts.B is not None
    parts.B[2, 1] = float("inf")
    sums = empty_sums(parts)
    result = ops.local_train_sum_(**given, weights=torch.ones(2).double(), sums=sums)
    names = [*ItemSums._fields[:-1], *SENetWeights._fields, "mlp"]
    broken = {name for name, bad in zip(names, result.broken.tolist(), strict=True) if bad}
    assert {"A", "B"} <= broken
    assert broken == {name for name, total in flat(sums).items() if not total.isfinite().all()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": torch.ones(2)}, TypeError, "weights: expected torch.float64"),
        ({"weights": torch.ones(3).double()}, ValueError, "weights: expected shape"),
        ({"touched": torch.zeros(9)}, TypeError, "touched: expected torch.uint8"),
        ({"touched": torch.zeros(8, dtype=torch.uint8)}, ValueError, "touched: expected shape"),
        ({"grid": -1.0}, ValueError, "grid: expected 0 or a power of two"),
        ({"sums": ItemSums()}, ValueError, "sums: expected A where the parts have it"),
    ],
)
def test_bad_sums(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {**arguments(), "weights": torch.ones(2).double()}
    good["sums"] = empty_sums(good["parts"])
    for space in (ops, reference):
        with pytest.raises(error, match=message):
            space.local_train_sum_(**{**good, **changes})  # type: ignore[attr-defined]
