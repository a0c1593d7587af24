"""The rivals that `make bench-sim` measures train what the sequential engine trains, draw for draw."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.baselines.hand_written import HandWritten
from benchmarks.baselines.negatives import Negatives, UniformNegatives
from benchmarks.baselines.problem import Problem
from benchmarks.baselines.vmap_grad import VmapGrad
from benchmarks.bench_sim import contest, draw, report
from fedpeft_ext import ops
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator

ITEMS = 90


@cache
def synthetic() -> Dataset:
    return load_dataset("synthetic", num_users=40, num_items=ITEMS, interactions_per_user=12, seed=3)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return synthetic()


def pretrained() -> Pretrained:
    generator = torch.Generator().manual_seed(1)
    return Pretrained(
        full=0.3 * torch.randn(ITEMS, 8, generator=generator),
        codes=torch.randint(16, (ITEMS, 3), generator=generator),
        codebooks=None,
    )


def philox(dataset: Dataset, config: Config) -> Negatives:
    """The simulator's own draws."""
    indptr, items = (torch.from_numpy(values) for values in dataset.positives())

    def draw(clients: Tensor, round: int) -> Tensor:
        sizes = indptr.diff()[clients]
        inside = torch.arange(int(sizes.max())) < sizes[:, None]
        drawn = ops.sample_negatives(
            torch.where(inside, 0, -1),
            clients,
            indptr,
            items,
            dataset.num_items,
            config.training.local_epochs,
            config.seed,
            round,
        )
        return drawn.transpose(0, 1)[:, inside]

    return draw


@cache
def sequential(embedding: str, dtype: str) -> tuple[Config, Tensor, Tensor, float]:
    """Settings; item and user vectors after 3 rounds of the sequential engine, and their HR@10."""
    config = Config().updated(
        [
            f"embedding.name={embedding}",
            "embedding.codebook_size=16",
            "embedding.rank=3",
            "backbone.dim=8",
            "training.clients_per_round=13",
            "evaluation.num_negatives=20",
            "training.l2=1e-3",
            "engine=sequential",
            f"dtype={dtype}",
        ]
    )
    simulator = Simulator(config, synthetic(), pretrained=pretrained())
    for _ in range(3):
        simulator.round()
    vectors = simulator.model.item_embedding(torch.arange(ITEMS)).detach()
    return config, vectors, simulator.store.state["user"], simulator.evaluate().values["HR@10"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("embedding", ["p-lora", "p-rq"])
@pytest.mark.parametrize(
    ("rival", "options"),
    [
        (HandWritten, {}),
        (HandWritten, {"dense_cells": 0}),
        (HandWritten, {"chunk_floats": 1000}),
        (HandWritten, {"chunk_floats": 1000, "dense_cells": 0}),
        (VmapGrad, {}),
        (VmapGrad, {"chunk_floats": 1000}),
    ],
    ids=["hand", "hand-sparse", "hand-chunks", "hand-sparse-chunks", "vmap", "vmap-chunks"],
)
def test_equals_the_sequential_engine(
    dataset: Dataset,
    rival: Any,
    options: dict[str, int],
    embedding: str,
    dtype: str,
    tolerance: float,
) -> None:
    config, vectors_there, users_there, hit_rate = sequential(embedding, dtype)
    problem = Problem.of(config, dataset, pretrained())
    contender = rival(problem, philox(dataset, config), **options)
    start = contender.result()[1].clone()
    for _ in range(3):
        contender.round()
    users, vectors = contender.result()
    torch.testing.assert_close(vectors, vectors_there, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(users, users_there, rtol=0.0, atol=tolerance)
    assert float((vectors - start).abs().max()) > 1e-3
    # Ties may fall otherwise, no more.
    assert problem.hit_rate(users, vectors) == pytest.approx(hit_rate, abs=0.03)


@pytest.mark.parametrize("most_pairs", [0, 10**6])
def test_negatives_are_uniform_over_items_not_met(dataset: Dataset, most_pairs: int) -> None:
    torch.manual_seed(0)
    clients = torch.tensor([31, 4, 17])
    draw = UniformNegatives(dataset, epochs=3000, most_pairs=most_pairs)
    drawn = draw(clients, 1)
    at = 0
    for client in clients.tolist():
        met = dataset.indices[dataset.indptr[client] : dataset.indptr[client + 1]]
        counts = np.bincount(drawn[:, at : at + len(met)].flatten().numpy(), minlength=ITEMS)
        at += len(met)
        assert counts[met].sum() == 0
        others = np.delete(counts, met)
        expected = others.sum() / len(others)
        # Chi-squared with len(others) - 1 degrees of freedom, six standard deviations out.
        assert ((others - expected) ** 2 / expected).sum() < len(others) + 6 * np.sqrt(2 * len(others))
    assert at == drawn.shape[1]


def test_other_settings_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"training\.loss: the baselines have 'bpr' alone, got 'bce'"):
        Problem.of(Config().updated(["training.loss=bce"]), dataset)
    with pytest.raises(ValueError, match=r"embedding\.name: expected p-lora or p-rq, got 'full'"):
        Problem.of(Config().updated(["embedding.name=full"]), dataset)


def small_problem(embedding: str) -> tuple[Problem, Pretrained]:
    config = Config().updated(
        [
            f"embedding.name={embedding}",
            "embedding.codebook_size=16",
            "backbone.dim=8",
            "training.clients_per_round=5",
            "evaluation.num_negatives=20",
        ]
    )
    return Problem.of(config, synthetic(), pretrained()), pretrained()


def test_pfl_trains_the_chosen_clients() -> None:
    pytest.importorskip("pfl", reason="pfl-research is not installed")
    from benchmarks.baselines.pfl_fedmf import Pfl

    problem, _ = small_problem("p-lora")
    contender = Pfl(problem)
    for number in (1, 2):
        before = contender.result()[0].clone()
        contender.round()
        moved = (contender.result()[0] != before).any(1).nonzero().flatten()
        assert moved.tolist() == problem.clients(number).tolist()
    vectors = contender.result()[1]
    start = HandWritten(problem).result()[1]
    assert 1e-3 < float((vectors - start).abs().max()) < 1.0


def test_a_contest_is_told_in_a_table_and_a_figure(tmp_path: Path) -> None:
    problem, start = small_problem("p-rq")
    tracks = contest(problem, start, ["fused", "hand-written", "pfl"], rounds=4, warmup=1, turn=2, every=1)
    assert [[rounds for rounds, *_ in track.hit_rates] for track in tracks] == [[2, 4], [2, 4], []]
    assert all(track.clients_per_second >= track.slow > 0 for track in tracks[:2])
    assert tracks[2].missing == "its client has P-LoRA alone"
    section = {
        "users": 40,
        "items": ITEMS,
        "per_round": 5,
        "mean_items": 12.0,
        "contests": {"p-rq": [asdict(track) for track in tracks]},
    }
    record = {"machine": "m", "threads": 1, "sections": {"ml-100k": section, "ml-1m": {"skipped": "why"}}}
    lines = "\n".join(report(record))
    assert "| engine fused |" in lines
    assert "not run: its client has P-LoRA alone" in lines
    assert "Skipped: why" in lines
    draw(record, tmp_path / "sim.png")
    assert (tmp_path / "sim.png").stat().st_size > 10_000
