"""A federation on a GPU gives what it gives on the CPU, with every engine that runs there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killed_run import StopAfter
from small_federation import small_config
from torch import Tensor

from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Interrupted, RoundInfo, Simulator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

STRATEGIES = ["full", "p-lora", "p-hash", "c-hash+senet", "p-rq", "p-rq+lora", "c-rq+hash+lora"]


def trained(
    dataset: Dataset, pretrained: Pretrained, device: str, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, float], list[RoundInfo]]:
    config = small_config(
        **{"embedding.rank": 3, "training.rounds": 3, "dtype": "float64", "device": device, **changes}
    )
    simulator = Simulator(config, dataset, pretrained=pretrained)
    rounds = [simulator.round() for _ in range(config.training.rounds)]
    metrics = simulator.evaluate()
    return (
        {name: tensor.cpu() for name, tensor in simulator.state_dict().items()},
        dict(metrics.values),
        rounds,
    )


def assert_same(dataset: Dataset, pretrained: Pretrained, **changes: Any) -> None:
    gpu, gpu_metrics, gpu_rounds = trained(dataset, pretrained, "cuda", **changes)
    cpu, cpu_metrics, cpu_rounds = trained(dataset, pretrained, "cpu", **changes)
    assert gpu.keys() == cpu.keys()
    for name, value in gpu.items():
        torch.testing.assert_close(value, cpu[name], rtol=0.0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert gpu_metrics == pytest.approx(cpu_metrics, abs=1e-9)
    for mine, theirs in zip(gpu_rounds, cpu_rounds, strict=True):
        assert (mine.clients, mine.bytes_up) == (theirs.clients, theirs.bytes_up)
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-9)


@pytest.mark.parametrize("engine", ["fused", "batched"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fedmf(dataset: Dataset, pretrained: Pretrained, strategy: str, engine: str) -> None:
    assert_same(dataset, pretrained, **{"embedding.name": strategy, "engine": engine})


@pytest.mark.parametrize("strategy", ["full", "p-lora", "c-hash+senet", "p-rq"])
@pytest.mark.parametrize("backbone", ["fedncf", "pfedrec", "fedpergnn"])
def test_backbones(dataset: Dataset, pretrained: Pretrained, backbone: str, strategy: str) -> None:
    small = {} if backbone == "fedpergnn" else {"backbone.hidden": "[12, 20]", "backbone.dropout": 0.3}
    assert_same(dataset, pretrained, **{"backbone.name": backbone, "embedding.name": strategy, **small})


@pytest.mark.parametrize(
    "changes",
    [
        {"training.loss": "bce", "training.batch_size": 4, "training.l2": 1e-2},
        {"training.optimizer": "sgd", "training.lr": 0.3, "training.momentum": 0.9},
        {"training.warmup_rounds": 1},
        {"training.server_optimizer": "adam"},
        {"training.weighting": "uniform", "training.clients_per_round": 1.0},
        {"compression.method": "top-k"},
        {"compression.method": "int8"},
        {"faults.dropout_rate": 0.3},
    ],
    ids=str,
)
def test_settings(dataset: Dataset, pretrained: Pretrained, changes: dict[str, Any]) -> None:
    for strategy in ("p-lora", "p-rq"):
        assert_same(dataset, pretrained, **{"embedding.name": strategy, **changes})


@pytest.mark.parametrize("strategy", ["full", "p-lora", "p-rq", "c-hash+senet"])
def test_same_bits_when_repeated_or_in_chunks(
    dataset: Dataset, pretrained: Pretrained, strategy: str
) -> None:
    first, *_ = trained(dataset, pretrained, "cuda", **{"embedding.name": strategy, "dtype": "float32"})
    for chunk in (64.0, 0.01):
        again, *_ = trained(
            dataset,
            pretrained,
            "cuda",
            **{"embedding.name": strategy, "dtype": "float32", "chunk_memory_mb": chunk},
        )
        for name, value in first.items():
            assert torch.equal(value, again[name]), (name, chunk)


@pytest.mark.parametrize("engine", ["fused", "batched"])
def test_a_run_goes_on_with_the_same_bits(
    dataset: Dataset, pretrained: Pretrained, engine: str, tmp_path: Path
) -> None:
    config = small_config(
        **{"embedding.name": "p-lora", "training.rounds": 4, "device": "cuda", "engine": engine}
    )
    whole = Simulator(config, dataset, pretrained=pretrained)
    whole.run()
    with pytest.raises(Interrupted):
        Simulator(
            config, dataset, pretrained=pretrained, out=tmp_path / "run", callbacks=[StopAfter(2)]
        ).run()
    resumed = Simulator.resume(tmp_path / "run", dataset)
    resumed.run()
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
