"""What the processes of test_checkpoint do that are killed. A module of its own, which loads no test's."""

from __future__ import annotations

from pathlib import Path

import torch

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.checkpoint import has_checkpoint


def prepared(items: int = 60, dim: int = 8) -> Pretrained:
    """Full embeddings, and codes of 3 levels of 16."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (items, 3), generator=generator).to(torch.uint8)
    full, books = (torch.randn(*shape, generator=generator) for shape in ((items, dim), (3, 16, dim)))
    return Pretrained(0.3 * full, codes, books)


def go_on(folder: Path, settings: Config, dataset: Dataset) -> None:
    """What a user does after a crash: resume, or start again where nothing was saved."""
    if has_checkpoint(folder) is not None:
        Simulator.resume(folder, dataset).run()
    else:
        Simulator(settings, dataset, pretrained=prepared(), out=folder, overwrite=True).run()
