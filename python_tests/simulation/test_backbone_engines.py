"""Every backbone with every strategy: the engines agree, and chunks and threads change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_engines import STRATEGIES, assert_equal, trained

from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import batched as batched_module

BACKBONES = ["fedncf", "pfedrec", "fedpergnn"]


def of(backbone: str, strategy: str, **changes: Any) -> dict[str, Any]:
    """Settings of a short run: the sequential engine is slow."""
    small: dict[str, Any] = {"training.rounds": 2, "training.clients_per_round": 5}
    if backbone != "fedpergnn":
        small["backbone.hidden"] = "[12, 20]"
    return {"backbone.name": backbone, "embedding.name": strategy, **small, **changes}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("loss", ["bpr", "bce"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_batched_equals_sequential(
    dataset: Dataset,
    pretrained: Pretrained,
    backbone: str,
    strategy: str,
    loss: str,
    dtype: str,
    tolerance: float,
) -> None:
    # Adam divides by the size of a gradient and so turns the rounding of one near zero into a step: in
    # float32 it agrees as far as its gradients do not vanish.
    optimizer = {"training.optimizer": "sgd", "training.lr": 0.5} if dtype == "float32" else {}
    changes = of(backbone, strategy, dtype=dtype, **{"training.loss": loss}, **optimizer)
    start = trained(dataset, pretrained, **{**changes, "training.rounds": 0})
    batched = trained(dataset, pretrained, **changes)
    assert_equal(batched, trained(dataset, pretrained, **changes, engine="sequential"), tolerance)
    moved = [name for name, value in batched[0].items() if not torch.equal(value, start[0][name])]
    frozen = ("base", "codes", "hashes")
    for name in batched[0]:
        # While all vectors are (near) zero, as LoRA's are, the pairs of BPR cancel in an MLP's biases.
        if strategy != "c-lora" or "mlp" not in name:
            assert (name in moved) != name.endswith(frozen), name


@pytest.mark.parametrize(
    "changes",
    [
        {"training.batch_size": 3},
        {"training.warmup_rounds": 1},
        {"training.server_optimizer": "adam"},
        {"training.clients_per_round": 1.0, "training.weighting": "uniform"},
        {"embedding.freeze_full": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_settings_agree_between_engines(
    dataset: Dataset, pretrained: Pretrained, backbone: str, changes: dict[str, Any]
) -> None:
    changes = of(backbone, "p-rq", dtype="float64", **changes)
    if backbone == "pfedrec":
        changes["backbone.dropout"] = 0.3
    assert_equal(
        trained(dataset, pretrained, **changes),
        trained(dataset, pretrained, **changes, engine="sequential"),
        1e-9,
    )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("strategy", "batch_size"), [("full", None), ("p-hash+senet", 4), ("p-rq+lora", None)]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_same_bits_for_any_chunks_and_threads(
    dataset: Dataset,
    pretrained: Pretrained,
    backbone: str,
    strategy: str,
    batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = of(backbone, strategy, **{"training.batch_size": batch_size, "training.clients_per_round": 1.0})
    results = []
    for chunk_memory, overhead, count in ((1e6, 10**9, 1), (1e-6, 10**9, 3), (1e6, 0, 2), (0.5, 4, 3)):
        monkeypatch.setattr(batched_module, "CHUNK_OVERHEAD", overhead)
        results.append(trained(dataset, pretrained, **changes, chunk_memory_mb=chunk_memory, threads=count))
    for state, losses in results[1:]:
        assert losses == results[0][1]
        for name, value in state.items():
            assert torch.equal(value, results[0][0][name]), name
