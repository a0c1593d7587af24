"""Federations on 2 and 3 processes (gloo): the bits of one process, and the end of a run that loses one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from small_federation import make_dataset, small_config
from torch import Tensor

from fedpeft_ext.config import Config
from fedpeft_ext.ops.aggregate import exact_grid
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import RankError, Simulator, TrainedRun
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.client_batch import ClientStore
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.setup import build_model

PRIVACY = {
    "training.weighting": "uniform",
    "privacy.mode": "cdp",
    "privacy.clip": 0.5,
    "privacy.noise_multiplier": 0.3,
}
FAULTS = {
    "faults.dropout_rate": 0.2,
    "faults.corrupt_rate": 0.3,
    "faults.reject": True,
    "faults.max_norm": 100.0,
    "faults.min_clients": 4,
    "faults.too_few": "repeat",
}
CASES: dict[str, dict[str, Any]] = {
    "full": {"embedding.name": "full"},
    "p-lora": {"embedding.name": "p-lora", "training.server_optimizer": "adam", "training.batch_size": 4},
    "p-hash+senet": {"embedding.name": "p-hash+senet", "training.warmup_rounds": 1},
    "p-rq": {"embedding.name": "p-rq", "dtype": "float64"},
    "pfedrec": {"embedding.name": "p-rq", "backbone.name": "pfedrec"},
    "privacy": {"embedding.name": "p-lora", **PRIVACY},
    "faults": {"embedding.name": "p-lora", **FAULTS},
    "top-k": {"embedding.name": "p-rq", "compression.method": "top-k", "compression.top_k": 0.1},
    "few of many items": {"embedding.name": "full", "training.clients_per_round": 2},
    "schedules": {"training.schedule": "cosine", "training.server_schedule": "linear"},
    "scaffold": {
        "embedding.name": "p-lora",
        "training.algorithm": "scaffold",
        "training.optimizer": "sgd",
        "training.client_sampling": "poisson",
    },
    "grown": {"embedding.name": "p-rq", "backbone.name": "pfedrec", "pretrain.features": "random"},
}
ON_THREE = ("full", "p-lora", "pfedrec", "faults")
ONLY_CLOSE = {"scaffold"}
TIMED = ("seconds", "training_seconds", "clients_per_second")


def simulator(name: str, out: Path | None = None, *, begun: int = 2, **changes: Any) -> Simulator:
    case = CASES[name] | changes
    items = 5000 if name == "few of many items" else 60
    config = small_config(**{"training.rounds": 4, "evaluation.every": 2, **case})
    generator = torch.Generator().manual_seed(1)
    pretrained = Pretrained(
        full=0.3 * torch.randn(items, 8, generator=generator),
        codes=torch.randint(0, 16, (items, 3), generator=generator).to(torch.uint8),
        codebooks=torch.randn(3, 16, 8, generator=generator),
    )
    if name == "grown":
        return Simulator(
            config, make_dataset(), start_from=trained_before(config, pretrained, begun), out=out
        )
    return Simulator(config, make_dataset(items=items), pretrained=pretrained, out=out)


def trained_before(config: Config, pretrained: Pretrained, round: int) -> TrainedRun:
    """A run of 15 of the users and 50 of the items after a round, in every process the same."""
    dataset = make_dataset(15, 50)
    assert pretrained.codes is not None
    model = build_model(config, 50, base=pretrained.full[:50], codes=pretrained.codes[:50])
    generator = torch.Generator().manual_seed(2)
    starts = {name: model.get_parameter(name).detach() for name in model.averaged_start}
    rows = {name: torch.randn(15, *value.shape, generator=generator) for name, value in starts.items()}
    store = ClientStore.of_everyone(rows, starts, torch.arange(15) % 3 > 0)
    return TrainedRun(config, dataset, model, store, round)


def results(run: Simulator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    summary = run.run().as_dict()
    tensors = {name: tensor.contiguous().clone() for name, tensor in run.state_dict().items()}
    return tensors, {key: value for key, value in summary.items() if key not in TIMED}


def join(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)


def train_all(rank: int, size: int, folder: Path) -> None:
    join(rank, size, folder)
    for name in CASES if size == 2 else ON_THREE:
        out = folder / "run" if name == "p-lora" else None
        run = simulator(name, out)
        tensors, summary = results(run)
        save_file(tensors, folder / f"{name}-{rank}.safetensors")
        (folder / f"{name}-{rank}.json").write_text(json.dumps([summary, run.ranks.bytes_summed]))
        with pytest.raises(RuntimeError, match="each with the state of its own clients"):
            _ = run.trained_run
    with pytest.raises(ValueError, match="expected a run after the same round on all ranks, got 2, 3"):
        simulator("grown", begun=2 + min(rank, 1))
    if size == 3:
        lose_one(rank, folder)
    else:
        dist.destroy_process_group()


class Broken:
    """An engine that fails, or dies with its process, in round 2."""

    def __init__(self, engine: Any, die: bool) -> None:
        self._engine, self._die = engine, die

    def train(self, clients: np.ndarray, round: int, aggregator: Aggregator) -> np.ndarray:
        if round == 2 and self._die:
            os.kill(os.getpid(), signal.SIGKILL)
        if round == 2:
            raise ValueError("out of luck")
        losses: np.ndarray = self._engine.train(clients, round, aggregator)
        return losses


def lose_one(rank: int, folder: Path) -> None:
    """Twice a run of which rank 1 does not reach the end, each saved after every round."""
    for what in ("failed", "died"):
        run = simulator("p-lora", folder / f"run-{what}", **{"checkpoint.every": 1})
        if rank == 1:
            run._engine = Broken(run._engine, die=what == "died")
        try:
            run.run()
        except Exception as error:
            (folder / f"{what}-{rank}").write_text(f"{type(error).__name__}: {error}")


def spawn(size: int, folder: Path, deaths: int) -> None:
    context = mp.spawn(train_all, args=(size, folder), nprocs=size, join=False)
    for process in context.processes:
        process.join(300)
    codes = [process.exitcode for process in context.processes]
    assert sorted(codes) == [-signal.SIGKILL] * deaths + [0] * (size - deaths)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    return {name: results(simulator(name)) for name in CASES}


def check_same(names: Iterable[str], size: int, alone: Any, folder: Path) -> None:
    for name in names:
        tensors, summary = alone[name]
        moved = []
        for rank in range(size):
            others = load_file(folder / f"{name}-{rank}.safetensors")
            found, summed = json.loads((folder / f"{name}-{rank}.json").read_text())
            moved.append(summed)
            assert others.keys() == tensors.keys()
            if name in ONLY_CLOSE:
                for key, tensor in tensors.items():
                    torch.testing.assert_close(others[key], tensor, atol=1e-6, rtol=1e-6)
                continue
            different = [key for key, tensor in tensors.items() if not torch.equal(others[key], tensor)]
            assert not different, (name, rank, different)
            assert found == json.loads(json.dumps(summary)), (name, rank)
        assert len(set(moved)) == 1
        assert moved[0] > 0


def test_two_ranks_give_the_bits_of_one_process(alone: Any, tmp_path: Path) -> None:
    spawn(2, tmp_path, deaths=0)
    check_same(CASES, 2, alone, tmp_path)
    # A table of which a round touches few rows is not summed whole.
    few = json.loads((tmp_path / "few of many items-0.json").read_text())[1]
    assert few < 4 * 5000 * 8 * 8 / 10
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "model.safetensors"} <= written
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_three_ranks_and_the_loss_of_one(alone: Any, tmp_path: Path) -> None:
    """They give the bits of one process. One that fails or dies ends the others, and the run can go on."""
    spawn(3, tmp_path, deaths=1)
    check_same(ON_THREE, 3, alone, tmp_path)
    for rank in (0, 2):
        failed, died = (tmp_path / f"failed-{rank}").read_text(), (tmp_path / f"died-{rank}").read_text()
        assert failed == "RankError: rank 1 of 3 failed while training round 2: ValueError: out of luck"
        assert died == "RankError: rank 1 of 3 died or did not answer"
    assert (tmp_path / "failed-1").read_text() == "ValueError: out of luck"
    for what in ("failed", "died"):
        run = Simulator.resume(tmp_path / f"run-{what}", make_dataset())
        assert run.rounds_done == 1
        tensors, _ = results(run)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in alone["p-lora"][0].items())


def test_sums_do_not_depend_on_the_order_of_clients() -> None:
    generator = torch.Generator().manual_seed(3)
    updates = torch.randn(200, 6, 5, generator=generator)
    weights = torch.randint(1, 500, (200,), generator=generator).double()
    exact = torch.einsum("c,cij->ij", weights, updates.double()) / weights.sum()
    results = []
    for order in (torch.arange(200), torch.randperm(200, generator=generator)):
        parameter = torch.zeros(6, 5, dtype=torch.float64)
        aggregator = Aggregator({"p": parameter}, frozenset())
        aggregator.begin(1, weight=float(weights.sum()))
        aggregator.add({"p": updates[order]}, weights[order])
        aggregator.apply()
        results.append(parameter)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], exact, atol=1e-13, rtol=0)


@pytest.mark.parametrize("weight", [1.0, 3.0, 4096.0, 1e7])
def test_the_grid_is_exact_and_fine(weight: float) -> None:
    grid = exact_grid(weight)
    assert np.log2(grid) == round(np.log2(grid))
    assert 16 * weight / grid <= 2**52
    assert grid / 2 <= weight * 2.0**-48
    assert exact_grid(0.0) == 0.0


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_grid_of_a_round_is_that_of_its_weights(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"training.rounds": 1, "training.weighting": weighting, "pretrain.features": "random"}
    simulator = Simulator(small_config(**settings, engine="batched"), make_dataset())
    begun: list[float] = []
    begin = Aggregator.begin

    def record(self: Aggregator, round: int, attempt: int = 0, weight: float = 0.0) -> None:
        begun.append(weight)
        begin(self, round, attempt, weight)

    monkeypatch.setattr(Aggregator, "begin", record)
    clients = simulator._sample(1, 0)
    simulator.round()
    sizes = simulator.dataset.indptr[1:] - simulator.dataset.indptr[:-1]
    assert begun == [float(sizes[clients].sum()) if weighting == "samples" else len(clients)]


def test_ranges_of_users_share_the_work() -> None:
    sizes = np.random.default_rng(0).integers(1, 200, 10_000)
    parts = []
    for rank in range(7):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 7
        ranks.divide(sizes)
        parts.append(ranks.owned)
        assert ranks.owns(np.arange(10_000)).sum() == len(ranks.owned)
    assert [r.start for r in parts[1:]] == [r.stop for r in parts[:-1]]
    assert parts[0].start == 0
    assert parts[-1].stop == 10_000
    work = [sizes[r.start : r.stop].sum() for r in parts]
    assert max(work) < 1.05 * min(work)


def test_one_process_is_a_rank_alone() -> None:
    ranks = Ranks()
    assert ranks.first
    assert ranks.size == 1
    with pytest.raises(KeyError), ranks.together("anything"):
        raise KeyError("as it is")
    assert issubclass(RankError, RuntimeError)


@pytest.mark.slow
def test_torchrun_gives_the_files_of_one_process(tmp_path: Path) -> None:
    """The command line, with pre-training on the server, on one and on two processes."""
    command = ["-m", "fedpeft_ext", "run", "-d", "synthetic", "-s", "dataset.options.num_users=200"]
    command += ["-s", "dataset.options.num_items=200", "-s", "pretrain.cache=false", "--rounds", "3"]
    command += ["-s", "pretrain.epochs=3", "-s", "pretrain.code_epochs=3", "-s", "embedding.codebook_size=16"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    run = {"check": True, "timeout": 300, "capture_output": True, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *command, "--out", one], env=environment, **run)
    told = subprocess.run([sys.executable, *several, "--out", two], env=environment, **run).stdout
    assert told.count("HR@10") == 1  # one process talks
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
