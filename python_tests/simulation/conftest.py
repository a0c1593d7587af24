"""A small data set and prepared embeddings for the simulator's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained

DIM = 8


def small_config(**changes: Any) -> Config:
    """Settings that fit the data set, with dotted ones changed; None is YAML's null."""
    values: dict[str, Any] = {
        "backbone.dim": DIM,
        "embedding.codebook_size": 16,
        "embedding.table_size": 24,
        "training.clients_per_round": 9,
        "evaluation.num_negatives": 20,
        **changes,
    }
    return Config().updated(f"{key}={'null' if value is None else value}" for key, value in values.items())


def make_dataset(
    users: int = 23, items: int = 60, seed: int = 0, longest: int = 20, validation: bool = False
) -> Dataset:
    """Users with 1 to `longest` training items (very different sizes) and a test item each, but the last has
    none. With `validation` users with several training items have the last of them as validation item.
    """
    rng = np.random.default_rng(seed)
    rows, test, valid = [], [], []
    for user in range(users):
        size = 1 + int(rng.integers(longest) * rng.random())
        met = rng.permutation(items)[: size + 1]
        held = validation and size > 1
        rows.append(met[: size - held])
        valid.append(met[size - 1] if held else -1)
        test.append(met[-1] if user < users - 1 else -1)
    return Dataset(
        name="tiny",
        num_users=users,
        num_items=items,
        indptr=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        indices=np.concatenate(rows).astype(np.int64),
        test_items=np.array(test, dtype=np.int64),
        valid_items=np.array(valid, dtype=np.int64),
        user_ids=[f"u{u}" for u in range(users)],
        item_ids=[f"i{i}" for i in range(items)],
        item_text=None,
        report={},
    )


@pytest.fixture
def threads() -> Iterator[None]:
    """Torch's number of threads is afterwards what it was before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return make_dataset()


@pytest.fixture(scope="session")
def pretrained() -> Pretrained:
    """Random full embeddings and codes for the 60 items, width 8, 3 levels of 16."""
    generator = torch.Generator().manual_seed(1)
    full = 0.3 * torch.randn(60, DIM, generator=generator)
    codes = torch.randint(0, 16, (60, 3), generator=generator, dtype=torch.int64).to(torch.uint8)
    return Pretrained(full=full, codes=codes, codebooks=torch.randn(3, 16, DIM, generator=generator))
