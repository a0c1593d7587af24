"""What the processes of test_checkpoint do that are killed. A module of its own, which loads no test's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Callback, Interrupted, RoundInfo, Simulator
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


class StopAfter(Callback):
    """Asks a run to stop after a round."""

    def __init__(self, round: int) -> None:
        self._round = round

    def on_start(self, simulator: Simulator) -> None:
        self._simulator = simulator

    def on_round(self, info: RoundInfo) -> None:
        if info.round == self._round:
            self._simulator.stop()


def one_of_two(rank: int, folder: Path, runs: Mapping[str, Config], dataset: Dataset) -> None:
    """A process of two, which stop new runs after round 2 and finish those that one process stopped."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, settings in runs.items():
        place = folder / f"{name}, two then one"
        simulator = Simulator(settings, dataset, pretrained=prepared(), out=place, callbacks=[StopAfter(2)])
        try:
            simulator.run()
        except Interrupted:
            Simulator.resume(folder / f"{name}, one then two", dataset).run()
        else:
            raise AssertionError("not stopped")
    dist.destroy_process_group()
