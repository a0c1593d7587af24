"""Made-up results of runs for the tests of tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fedpeft_ext.experiments.results import RunResult
from fedpeft_ext.simulation import Summary

Maker = Callable[..., RunResult]


@pytest.fixture(scope="session")
def result() -> Maker:
    """Makes a run whose HR@10 rises from chance to `hr`; Full would send 200 KB each way."""

    def make(embedding: str, hr: float = 0.5, bytes_each_way: int = 50_000, rounds: int = 60) -> RunResult:
        evaluations = []
        for round in range(0, rounds + 1, 10):
            value = hr if round == rounds else 0.1 + (hr - 0.1) * (1 - math.exp(-round / 20))
            evaluations.append({"round": round, "HR@10": value, "NDCG@10": value / 2})
        summary = Summary(
            dataset="made-up",
            backbone="fedmf",
            embedding=embedding,
            engine="batched",
            seed=0,
            rounds=rounds,
            warmup_rounds=0,
            metrics={"HR@10": hr, "NDCG@10": hr / 2},
            best_round=rounds,
            best_by="HR@10",
            best={"HR@10": hr, "NDCG@10": hr / 2},
            evaluations=evaluations,
            bytes_down=bytes_each_way,
            bytes_up=bytes_each_way,
            bytes_setup=0,
            total_bytes=2 * bytes_each_way * 90 * rounds,
            trained_clients=90 * rounds,
            training_seconds=rounds / 100,
            seconds=3.0,
        )
        return RunResult(summary, full_bytes=400_000)

    return make


@pytest.fixture(scope="session")
def demo_results(result: Maker) -> list[RunResult]:
    """Five runs such as the demo's."""
    return [
        result("full", 0.55, 215_000),
        result("c-rq", 0.41, 49_000),
        result("p-lora", 0.585, 54_800),
        result("p-hash", 0.575, 65_500),
        result("p-rq", 0.58, 49_152),
    ]
