"""sample_negatives, sample_clients and client_dropout: equal to their twins, uniform, and independent of how
they are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, padded_items
from torch import Tensor

from fedpeft_ext import reference
from fedpeft_ext.ops import philox


def interactions(users: int, num_items: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random CSR matrix in which every user leaves at least one item unmet."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(num_items, rng.integers(0, num_items), replace=False)) for _ in range(users)]
    indptr = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return torch.from_numpy(indptr), torch.from_numpy(np.concatenate([*rows, []]).astype(np.int64))


@settings(deadline=None, max_examples=60)
@given(
    users=st.integers(1, 6),
    clients=st.integers(0, 5),
    positions=st.integers(0, 40),
    num_items=st.integers(1, 30),
    epochs=st.integers(0, 3),
    item_dtype=st.sampled_from([torch.int32, torch.int64]),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**63 - 1),
    round=st.integers(0, 2**32 - 1),
)
def test_negatives_equal_the_twin_and_are_unmet(
    target: Any,
    users: int,
    clients: int,
    positions: int,
    num_items: int,
    epochs: int,
    item_dtype: torch.dtype,
    id_dtype: torch.dtype,
    seed: int,
    round: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    indptr, indices = (t.to(target.device, id_dtype) for t in interactions(users, num_items, seed % 1000))
    ids = torch.randint(users, (clients,), generator=g).to(target.device, id_dtype)
    items = padded_items((clients, positions), num_items, g, item_dtype).to(target.device)
    arguments = (items, ids, indptr, indices, num_items, epochs, seed, round)
    out = target.ops.sample_negatives(*arguments)
    assert torch.equal(out, reference.sample_negatives(*arguments))
    assert out.shape == (clients, epochs, positions)
    assert out.dtype == item_dtype
    assert torch.equal(out == -1, (items == -1).unsqueeze(1).expand_as(out))
    for c, user in enumerate(ids.tolist()):
        met = set(indices[int(indptr[user]) : int(indptr[user + 1])].tolist())
        drawn = set(out[c].flatten().tolist()) - {-1}
        assert not drawn & met
        assert all(0 <= i < num_items for i in drawn)


def test_negatives_are_uniform_over_the_unmet_items(target: Any) -> None:
    indptr, indices = torch.tensor([0, 5]), torch.tensor([0, 1, 4, 8, 9])
    items = torch.zeros(1, 50_000, dtype=torch.int64)
    out = target.ops.sample_negatives(
        *(t.to(target.device) for t in (items, torch.zeros(1, dtype=torch.int64), indptr, indices)),
        10,
        1,
        3,
        0,
    )
    counts = torch.bincount(out.flatten().cpu(), minlength=10)
    assert counts[indices].sum() == 0
    others = counts[counts > 0]
    assert len(others) == 5
    # 10,000 expected each, standard deviation 89.
    assert int((others - 10_000).abs().max()) < 5 * 90


def test_negatives_do_not_depend_on_chunks_padding_or_threads(target: Any) -> None:
    g = torch.Generator().manual_seed(0)
    indptr, indices = (t.to(target.device) for t in interactions(50, 200, 0))
    ids = torch.randperm(50, generator=g).to(target.device)
    items = padded_items((50, 300), 200, g).to(target.device)

    def draw(rows: slice, columns: slice = slice(None)) -> Tensor:
        chunk = items[rows, columns]
        out: Tensor = target.ops.sample_negatives(chunk, ids[rows], indptr, indices, 200, 2, 7, 3)
        return out

    whole = draw(slice(None))
    assert torch.equal(torch.cat([draw(slice(0, 13)), draw(slice(13, 50))]), whole)
    assert torch.equal(draw(slice(None), slice(0, 77)), whole[..., :77])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(draw(slice(None)), whole)
    finally:
        torch.set_num_threads(before)


def test_negatives_under_vmap(target: Any) -> None:
    g = torch.Generator().manual_seed(0)
    indptr, indices = (t.to(target.device) for t in interactions(6, 20, 0))
    items, ids = (
        padded_items((3, 2, 8), 20, g).to(target.device),
        torch.arange(6, device=target.device).view(3, 2),
    )

    def draw(i: Tensor, c: Tensor) -> Tensor:
        out: Tensor = target.ops.sample_negatives(i, c, indptr, indices, 20, 2, 7, 3)
        return out

    expected = torch.stack([draw(i, c) for i, c in zip(items, ids, strict=True)])
    assert torch.equal(torch.func.vmap(draw)(items, ids), expected)
    shared = torch.stack([draw(items[0], c) for c in ids])
    assert torch.equal(torch.func.vmap(draw, in_dims=(None, 0))(items[0], ids), shared)


NEGATIVES = {
    "items": torch.zeros(1, 3, dtype=torch.int64),
    "clients": torch.zeros(1, dtype=torch.int64),
    "indptr": torch.tensor([0, 2]),
    "indices": torch.tensor([0, 2]),
    "num_items": 4,
    "epochs": 1,
    "seed": 0,
    "round": 0,
}
BAD_NEGATIVES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("flat items", {"items": torch.zeros(3, dtype=torch.int64)}, ValueError, "items: expected shape .C, P."),
    ("float items", {"items": torch.zeros(1, 3)}, TypeError, "items: expected int32 or int64"),
    ("clients", {"clients": torch.zeros(2, dtype=torch.int64)}, ValueError, "clients: expected shape .1."),
    ("float clients", {"clients": torch.zeros(1)}, TypeError, "clients: expected int32 or int64"),
    ("indptr", {"indptr": torch.zeros(0, dtype=torch.int64)}, ValueError, "indptr: expected shape .U . 1."),
    (
        "indices",
        {"indices": torch.zeros(1, 1, dtype=torch.int64)},
        ValueError,
        "indices: expected shape .nnz.",
    ),
    ("num_items", {"num_items": -1}, ValueError, "num_items: expected 0"),
    ("epochs", {"epochs": -1}, ValueError, "epochs: expected 0"),
    ("seed", {"seed": -1}, ValueError, "seed: expected 0"),
    ("round", {"round": 2**32}, ValueError, "round: expected 0"),
]
BAD_NEGATIVE_VALUES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("client out of range", {"clients": torch.tensor([1])}, IndexError, "clients: "),
    ("item out of range", {"items": torch.tensor([[0, 4, 1]])}, IndexError, "items: index 4 at position 1"),
    ("negative item", {"items": torch.tensor([[0, -3, 1]])}, IndexError, "items: index -3 at position 1"),
    ("index out of range", {"indices": torch.tensor([0, 4])}, IndexError, "indices: "),
    (
        "unsorted",
        {"indices": torch.tensor([2, 0])},
        ValueError,
        "indices: expected distinct items in ascending order",
    ),
    (
        "repeated",
        {"indices": torch.tensor([2, 2])},
        ValueError,
        "indices: expected distinct items in ascending order",
    ),
    (
        "met everything",
        {"indptr": torch.tensor([0, 4]), "indices": torch.arange(4)},
        ValueError,
        "clients: client 0 has met all 4 items",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD_NEGATIVES], ids=[b[0] for b in BAD_NEGATIVES]
)
def test_bad_negatives(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    for device in (target.device, "meta"):
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (NEGATIVES | change).items()}
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                space.sample_negatives(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [b[1:] for b in BAD_NEGATIVE_VALUES],
    ids=[b[0] for b in BAD_NEGATIVE_VALUES],
)
def test_bad_values(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    if target.device.type == "cuda":
        pytest.skip("a device-side assertion ends the process")
    for space in (target.ops, reference):
        with pytest.raises(error, match=message):
            space.sample_negatives(**(NEGATIVES | change))


# Dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    round=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**16 - 1),
    layer=st.integers(0, 255),
)
def test_dropout_equals_the_twin(
    target: Any, dtype: torch.dtype, shape: list[int], p: float, seed: int, round: int, epoch: int, layer: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).to(target.device, dtype)
    clients = torch.randint(2**32, (shape[0],), generator=g).to(target.device)
    out = target.ops.client_dropout(x, clients, p, seed, round, epoch, layer)
    expected = reference.client_dropout(x.double(), clients, p, seed, round, epoch, layer)
    assert out.dtype == dtype
    assert torch.equal(out == 0, expected == 0)
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_dropout_rate_and_scale(target: Any) -> None:
    clients = torch.arange(100, device=target.device)
    out = target.ops.client_dropout(torch.ones(100, 1000, device=target.device), clients, 0.3, 1, 0)
    kept = (out != 0).double()
    # 10^5 Bernoulli draws: standard error 0.0014.
    assert abs(float(kept.mean()) - 0.7) < 5 * 0.0015
    assert out.unique().numel() == 2
    torch.testing.assert_close(float(out.max()), 1 / 0.7, rtol=1e-6, atol=0)


def test_dropout_of_a_client_does_not_depend_on_its_batch(target: Any) -> None:
    x, clients = (
        torch.randn(6, 3, 7, device=target.device),
        torch.tensor([4, 8, 15, 16, 23, 42], device=target.device),
    )
    whole = target.ops.client_dropout(x, clients, 0.5, 1, 2, 3, 4)
    assert torch.equal(
        torch.cat(
            [target.ops.client_dropout(x[c : c + 1], clients[c : c + 1], 0.5, 1, 2, 3, 4) for c in range(6)]
        ),
        whole,
    )
    under_vmap = torch.func.vmap(lambda a, c: target.ops.client_dropout(a[None], c[None], 0.5, 1, 2, 3, 4)[0])
    assert torch.equal(under_vmap(x, clients), whole)


BAD_DROPOUT: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("scalar", {"x": torch.zeros(())}, ValueError, "x: expected shape .C, ...."),
    ("integer", {"x": torch.zeros(2, 3).int()}, TypeError, "x: expected float32"),
    ("clients", {"clients": torch.zeros(3, dtype=torch.int64)}, ValueError, "clients: expected shape .2."),
    ("float clients", {"clients": torch.zeros(2)}, TypeError, "clients: expected int32 or int64"),
    ("p", {"p": 1.5}, ValueError, "p: expected a probability from 0 to 1, got 1.5"),
    ("nan", {"p": float("nan")}, ValueError, "p: expected a probability"),
    ("seed", {"seed": -1}, ValueError, "seed: expected 0"),
    ("round", {"round": -1}, ValueError, "round: expected 0"),
    ("epoch", {"epoch": 2**16}, ValueError, "epoch: expected 0"),
    ("layer", {"layer": 256}, ValueError, "layer: expected 0"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD_DROPOUT], ids=[b[0] for b in BAD_DROPOUT]
)
def test_bad_dropout(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    good = {
        "x": torch.zeros(2, 3),
        "clients": torch.zeros(2, dtype=torch.int64),
        "p": 0.5,
        "seed": 0,
        "round": 0,
    }
    for device in (target.device, "meta"):
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in (good | change).items()}
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                space.client_dropout(**arguments)


@settings(deadline=None, max_examples=60)
@given(
    n=st.sampled_from([0, 1, 2, 15, 16, 17, 400, 3000]),
    share=st.one_of(st.floats(0, 1), st.floats(0, 0.07)),
    seed=st.integers(0, 2**63 - 1),
    round=st.integers(0, 2**32 - 1),
    attempt=st.integers(0, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@example(n=3000, share=0.06, seed=1, round=2, attempt=0, dtype=torch.int64)  # places are drawn again
def test_sampled_clients(
    target: Any, n: int, share: float, seed: int, round: int, attempt: int, dtype: torch.dtype
) -> None:
    clients = (3 * torch.randperm(n, generator=torch.Generator().manual_seed(n))).to(target.device, dtype)
    options: dict[str, Any] = {"seed": seed, "round": round, "attempt": attempt}
    chosen = target.ops.sample_clients(clients, int(share * n), **options)
    assert torch.equal(chosen, reference.sample_clients(clients, int(share * n), **options))
    # Probabilities that are keys themselves: the client with that key is left out.
    keys = philox.uniform(seed, round, clients.cpu().numpy(), attempt, philox.Purpose.CLIENT_SAMPLING)
    for p in (share, *keys[:2].tolist(), 1.0):
        chosen = target.ops.sample_clients_independently(clients, p, **options)
        assert torch.equal(chosen, reference.sample_clients_independently(clients, p, **options))


def test_bad_client_samples(target: Any) -> None:
    clients = torch.arange(5, device=target.device)
    for space in (target.ops, reference):
        for count in (-1, 6):
            with pytest.raises(ValueError, match="count: expected 0 to 5"):
                space.sample_clients(clients, count, seed=0, round=0)
        for p in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="probability: expected 0 to 1"):
                space.sample_clients_independently(clients, p, seed=0, round=0)
        with pytest.raises(TypeError, match="clients: expected int32 or int64"):
            space.sample_clients(clients.float(), 1, seed=0, round=0)
        if target.device.type == "cuda":  # a device-side assertion ends the process
            continue
        with pytest.raises(IndexError, match="clients: "):
            space.sample_clients(clients - 2, 1, seed=0, round=0)
        for last in (-1, 2**32):  # behind whole vectors of good ones
            many = torch.cat([torch.arange(5000), torch.tensor([last])])
            with pytest.raises(IndexError, match="clients: "):
                space.sample_clients(many, 400, seed=0, round=0)
            with pytest.raises(IndexError, match="clients: "):
                space.sample_clients_independently(many, 0.01, seed=0, round=0)
            with pytest.raises(IndexError, match="clients: "):  # of few the chosen alone are looked at
                space.sample_clients(torch.full((5000,), last), 2, seed=0, round=0)
