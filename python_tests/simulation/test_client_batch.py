"""Padding of clients, their own state, and how a round is cut into chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.data import Dataset
from fedpeft_ext.simulation.client_batch import ClientStore, Interactions, plan_chunks
from fedpeft_ext.simulation.randomness import shuffled_positions


def test_padded_items_are_the_users_rows_in_order(dataset: Dataset) -> None:
    interactions = Interactions(dataset, torch.device("cpu"))
    users = torch.tensor([5, 0, 22, 5])
    items = interactions.padded(users)
    assert items.dtype == torch.int64
    assert items.shape == (4, int(interactions.sizes[users.numpy()].max()))
    for row, user in zip(items, users.tolist(), strict=True):
        expected = dataset.indices[dataset.indptr[user] : dataset.indptr[user + 1]]
        assert row[: len(expected)].tolist() == expected.tolist()
        assert (row[len(expected) :] == -1).all()


def test_no_users_and_users_without_items(dataset: Dataset) -> None:
    interactions = Interactions(dataset, torch.device("cpu"))
    assert interactions.padded(torch.empty(0, dtype=torch.int64)).shape == (0, 0)
    empty = Dataset(
        name="empty",
        num_users=2,
        num_items=3,
        indptr=np.zeros(3, np.int64),
        indices=np.zeros(0, np.int64),
        test_items=np.array([0, 1]),
        valid_items=np.array([-1, -1]),
        user_ids=["a", "b"],
        item_ids=["x", "y", "z"],
        item_text=None,
        report={},
    )
    assert Interactions(empty, torch.device("cpu")).padded(torch.tensor([0, 1])).shape == (2, 0)


def test_store_reads_copies_and_writes_rows() -> None:
    store = ClientStore({"user": torch.arange(12.0).view(4, 3)})
    clients = torch.tensor([3, 1])
    state = store.read(clients)
    state["user"] += 100.0
    assert store.state["user"].max() == 11.0
    store.write(clients, state)
    assert store.state["user"].max() == 11.0
    store.discard()
    store.commit()
    assert store.state["user"].max() == 11.0
    store.write(clients, state, torch.tensor([True, False]))
    store.write(torch.tensor([2]), {"user": torch.full((1, 3), -1.0)})
    store.commit()
    assert store.state["user"][:, 0].tolist() == [0.0, 3.0, -1.0, 109.0]


def test_newcomers_start_from_the_mean_of_the_committed_states_alone() -> None:
    store = ClientStore({}, {"w": torch.zeros(2)}, num_clients=4)
    store.write(torch.tensor([0, 3]), {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    store.discard()
    store.write(torch.tensor([1]), {"w": torch.tensor([[5.0, 6.0]])})
    store.write(torch.tensor([2]), {"w": torch.tensor([[7.0, 6.0]])})
    store.commit()
    assert store.rows(range(4))["w"].tolist() == [[6.0, 6.0], [5.0, 6.0], [7.0, 6.0], [6.0, 6.0]]
    other = ClientStore({}, {"w": torch.zeros(2)}, num_clients=4)
    other.load_state_dict(store.state_dict())
    assert torch.equal(other.rows(range(4))["w"], store.rows(range(4))["w"])
    with pytest.raises(ValueError, match=r"w: expected \[4, 2\] of torch.float32, got nothing"):
        other.load_state_dict({})


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 500), max_size=60),
    overhead=st.integers(0, 5000),
    memory=st.floats(1.0, 1e7),
)
def test_chunks_cover_all_clients_in_order_within_memory(
    sizes: list[int], overhead: int, memory: float
) -> None:
    ordered = np.array(sorted(sizes), dtype=np.int64)
    chunks = plan_chunks(ordered, overhead=overhead, position_bytes=100, client_bytes=1000, max_bytes=memory)
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(len(sizes)))
    for chunk in chunks:
        count = chunk.stop - chunk.start
        assert count == 1 or count * (ordered[chunk.stop - 1] * 100 + 1000) <= memory


def test_chunks_are_cut_only_where_it_pays() -> None:
    sizes = np.array([10] * 50 + [500] * 2)
    options = {"position_bytes": 1, "client_bytes": 0, "max_bytes": 1e12}
    assert len(plan_chunks(sizes, overhead=50 * 490, **options)) == 1
    assert plan_chunks(sizes, overhead=50 * 490 - 1, **options) == [slice(0, 50), slice(50, 52)]
    assert plan_chunks(np.array([7] * 9), overhead=0, **options) == [slice(0, 9)]


def test_shuffled_positions_are_each_clients_own_permutation() -> None:
    inside = torch.arange(9)[None] < torch.tensor([9, 4, 0])[:, None]
    clients = torch.tensor([3, 8, 1])
    order = shuffled_positions(inside, clients, seed=1, round=2, epoch=0)
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(3, -1))
    assert sorted(order[1, :4].tolist()) == [0, 1, 2, 3]
    alone = shuffled_positions(inside[1:2, :4], clients[1:2], seed=1, round=2, epoch=0)
    assert torch.equal(alone[0], order[1, :4])
    assert not torch.equal(order, shuffled_positions(inside, clients, seed=1, round=2, epoch=1))
