"""A small data set and prepared embeddings for the simulator's tests (see small_federation)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_federation import DIM, make_dataset

from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained


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
