"""A small data set and settings that fit it, for the simulator's tests and the processes that they start.

A module of its own, since a process that is started anew may find another `conftest` first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset

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
