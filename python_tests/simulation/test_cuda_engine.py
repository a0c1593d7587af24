"""The fused engine as on a GPU, its kernels emulated, equals the sequential one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import EMULATED, emulated_kernels, kernel_launches
from small_federation import small_config
from torch import Tensor

from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation import fused as fused_module

pytestmark = pytest.mark.skipif(not EMULATED, reason="fedpeft_ext._emulator is not built")


@pytest.fixture(autouse=True)
def uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_module, "_adds_up", lambda device: False)
    return


def trained(
    dataset: Dataset, pretrained: Pretrained, backbone: str, strategy: str, engine: str
) -> dict[str, Tensor]:
    config = small_config(
        **{
            "backbone.name": backbone,
            "embedding.name": strategy,
            "embedding.rank": 3,
            "training.rounds": 2,
            "training.l2": 1e-3,
            "engine": engine,
            "dtype": "float64",
        }
    )
    simulator = Simulator(config, dataset, pretrained=pretrained)
    assert simulator.engine == engine
    for _ in range(config.training.rounds):
        simulator.round()
    return {name: tensor.clone() for name, tensor in simulator.state_dict().items()}


@pytest.mark.parametrize(
    ("backbone", "strategy"),
    [("fedmf", "full"), ("fedmf", "p-lora"), ("fedmf", "c-hash+senet+rq"), ("fedpergnn", "p-rq+lora")],
)
def test_equals_sequential(dataset: Dataset, pretrained: Pretrained, backbone: str, strategy: str) -> None:
    with emulated_kernels(), kernel_launches() as launched:
        mine = trained(dataset, pretrained, backbone, strategy, "fused")
    assert launched.count > 0
    theirs = trained(dataset, pretrained, backbone, strategy, "sequential")
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.0, atol=1e-9)
