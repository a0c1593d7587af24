"""The batched and fused engines equal the sequential one, and their results are the same bits whatever the
chunks and threads.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import small_config
from torch import Tensor

from fedpeft_ext.config import Config, ConfigError
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import ClientError, Simulator
from fedpeft_ext.simulation import batched as batched_module

STRATEGIES = [
    "full",
    "c-lora",
    "p-lora",
    "c-hash",
    "p-hash",
    "c-hash+senet",
    "p-hash+senet",
    "c-rq",
    "p-rq",
    "p-rq+lora",
    "c-hash+senet+rq",
    "p-full",
]


def config(**changes: Any) -> Config:
    return small_config(
        **{
            "embedding.rank": 3,
            "training.rounds": 3,
            "training.l2": 1e-3,  # large enough for a mistake in it to show
            **changes,
        }
    )


def trained(
    dataset: Dataset, pretrained: Pretrained, **changes: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """Parameters and client state after all rounds, and the rounds' losses."""
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    losses = [simulator.round().loss for _ in range(simulator.config.training.rounds)]
    return {name: tensor.clone() for name, tensor in simulator.state_dict().items()}, losses


def assert_equal(
    mine: tuple[dict[str, Tensor], list[float]],
    theirs: tuple[dict[str, Tensor], list[float]],
    tolerance: float,
) -> None:
    assert mine[0].keys() == theirs[0].keys()
    for name, value in mine[0].items():
        torch.testing.assert_close(
            value, theirs[0][name], rtol=0.0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    np.testing.assert_allclose(mine[1], theirs[1], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("loss", ["bpr", "bce"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_engines_equal_sequential(
    dataset: Dataset,
    pretrained: Pretrained,
    strategy: str,
    loss: str,
    optimizer: str,
    dtype: str,
    tolerance: float,
) -> None:
    changes = {
        "embedding.name": strategy,
        "training.loss": loss,
        "training.optimizer": optimizer,
        "training.lr": 0.01 if optimizer == "adam" else 0.5,
        "dtype": dtype,
    }
    start = trained(dataset, pretrained, **changes, **{"training.rounds": 0})
    batched = trained(dataset, pretrained, **changes, engine="batched")
    sequential = trained(dataset, pretrained, **changes, engine="sequential")
    assert_equal(batched, sequential, tolerance)
    assert_equal(trained(dataset, pretrained, **changes, engine="fused"), sequential, tolerance)
    moved = [name for name, value in batched[0].items() if not torch.equal(value, start[0][name])]
    frozen = ("base", "codes", "hashes")
    assert all((name in moved) != name.endswith(frozen) for name in batched[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"training.batch_size": 3},
        {"training.batch_size": 3, "training.optimizer": "sgd", "training.lr": 0.5},
        {"training.batch_size": 1000},
        {"training.local_epochs": 1},
        {"training.local_epochs": 4},
        {"training.weighting": "uniform"},
        {"training.server_optimizer": "adam"},
        {"training.server_lr": 2.0},
        {"training.l2": 0.0},
        {"training.prox_mu": 0.5},
        {"training.prox_mu": 0.5, "embedding.name": "p-lora", "training.batch_size": 4},
        {"training.prox_mu": 0.5, "embedding.name": "c-hash+senet"},
        {"training.warmup_rounds": 2, "training.rounds": 3},
        {"training.schedule": "cosine", "training.server_schedule": "linear", "training.rounds": 4},
        {"training.schedule": "linear", "faults.reject": True, "embedding.name": "p-lora"},
        {"embedding.freeze_full": False},
        {"embedding.freeze_full": False, "embedding.name": "p-lora"},
        {"embedding.freeze_full": False, "embedding.name": "p-rq+lora"},
        {"embedding.reduce": "sum", "embedding.name": "p-hash"},
        {"embedding.num_hashes": 3, "embedding.name": "p-hash"},
        {"embedding.num_hashes": 3, "embedding.name": "c-hash+senet"},
        {"embedding.warm_start_codebooks": True},
        {"training.clients_per_round": 1.0},
        {"training.clients_per_round": 1},
    ],
    ids=str,
)
def test_settings_agree_between_engines(
    dataset: Dataset, pretrained: Pretrained, changes: dict[str, Any]
) -> None:
    changes = {"dtype": "float64", "training.lr": 0.01, "training.rounds": 2, **changes}
    sequential = trained(dataset, pretrained, **changes, engine="sequential")
    assert_equal(trained(dataset, pretrained, **changes, engine="batched"), sequential, 1e-9)
    assert_equal(trained(dataset, pretrained, **changes, engine="fused"), sequential, 1e-9)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("engine", ["batched", "fused"])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_for_any_chunks_and_threads(
    dataset: Dataset,
    pretrained: Pretrained,
    strategy: str,
    batch_size: int | None,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {
        "embedding.name": strategy,
        "training.batch_size": batch_size,
        "training.clients_per_round": 1.0,
        "training.rounds": 2,
        "engine": engine,
    }
    results = []
    # One chunk; one client a chunk (no memory); cut wherever padding is saved; both.
    for chunk_memory, overhead, count in ((1e6, 10**9, 1), (1e-6, 10**9, 3), (1e6, 0, 2), (0.05, 4, 1)):
        monkeypatch.setattr(batched_module, "CHUNK_OVERHEAD", overhead)
        results.append(trained(dataset, pretrained, **changes, chunk_memory_mb=chunk_memory, threads=count))
    for state, losses in results[1:]:
        assert losses == results[0][1]
        for name, value in state.items():
            assert torch.equal(value, results[0][0][name]), name


@pytest.mark.parametrize("engine", ["batched", "fused"])
def test_a_client_trains_alike_whoever_is_with_it(
    dataset: Dataset, pretrained: Pretrained, engine: str
) -> None:
    """State of a client after one round depends on the global model and itself alone."""
    everyone = Simulator(
        config(engine=engine, **{"training.clients_per_round": 1.0}), dataset, pretrained=pretrained
    )
    everyone.round()
    few = Simulator(
        config(engine=engine, **{"training.clients_per_round": 5}), dataset, pretrained=pretrained
    )
    before = few.store.state["user"].clone()
    few.round()
    chosen = (few.store.state["user"] != before).any(1)
    assert int(chosen.sum()) == 5
    assert torch.equal(few.store.state["user"][chosen], everyone.store.state["user"][chosen])


def test_sequential_names_the_failing_client_and_its_stage(
    dataset: Dataset, pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator = Simulator(config(engine="sequential"), dataset, pretrained=pretrained)
    real = type(simulator.model).forward

    def forward(self: Any, items: Any, context: Any = None) -> Tensor:
        if int(context.client) == chosen and context.epoch == 1:
            raise RuntimeError("the battery is empty")
        return real(self, items, context)

    from fedpeft_ext.simulation.randomness import sample_clients

    chosen = int(sample_clients(np.arange(dataset.num_users), 9, simulator.config.seed, 1)[0])
    monkeypatch.setattr(type(simulator.model), "forward", forward)
    with pytest.raises(
        ClientError,
        match=rf"client {chosen} \(user 'u{chosen}', \d+ training items\), round 1, "
        r"forward \(step 2, epoch 1\): the battery is empty",
    ):
        simulator.round()


@pytest.mark.parametrize("engine", ["fused", "batched", "sequential"])
def test_divergence_is_reported_and_leaves_the_global_parameters(
    dataset: Dataset, pretrained: Pretrained, engine: str
) -> None:
    simulator = Simulator(config(engine=engine), dataset, pretrained=pretrained)
    simulator.store.state["user"][:, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in simulator.model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"round 1: client \d+ has a loss of nan"):
        simulator.round()
    for name, value in simulator.model.named_parameters():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("strategy", ["full", "p-rq+lora"])
def test_momentum(dataset: Dataset, pretrained: Pretrained, strategy: str) -> None:
    changes = {
        "training.optimizer": "sgd",
        "training.lr": 0.3,
        "training.local_epochs": 3,
        "dtype": "float64",
    }
    changes |= {"embedding.name": strategy, "training.momentum": 0.9, "training.batch_size": 4}
    batched = trained(dataset, pretrained, **changes)
    assert_equal(batched, trained(dataset, pretrained, **changes, engine="sequential"), 1e-9)
    plain = trained(dataset, pretrained, **{**changes, "training.momentum": 0.0})
    assert not torch.equal(batched[0]["clients.user"], plain[0]["clients.user"])
    # Adam's warm-up has none, and needs none.
    changes |= {"training.warmup_optimizer": "adam", "training.warmup_rounds": 1}
    assert Simulator(config(**changes), dataset, pretrained=pretrained).engine == "fused"
    with pytest.raises(ConfigError, match=r"training\.momentum: expected 0 without optimizer sgd"):
        config(**{"training.momentum": 0.9})


def test_auto_takes_the_fused_engine_where_it_applies(dataset: Dataset, pretrained: Pretrained) -> None:
    fused = Simulator(config(), dataset, pretrained=pretrained)
    assert fused.engine == "fused"
    # Two trained tables of full width are beyond it.
    changes = {"embedding.name": "p-full", "embedding.freeze_full": False}
    mixed = config(**{**changes, "embedding.name": "p-full+lora"})
    assert Simulator(mixed, dataset, pretrained=pretrained).engine == "batched"
    with pytest.raises(
        ValueError, match="engine: 'fused' cannot train this model, since there are 2 trained tables"
    ):
        Simulator(mixed.updated(["engine=fused"]), dataset, pretrained=pretrained)


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding.name": "full", "training.weighting": "uniform"},
        {"embedding.name": "p-rq+lora", "training.server_lr": 0.5, "training.warmup_rounds": 2},
        {"embedding.name": "c-hash+senet", "training.clients_per_round": 1.0},
        {"embedding.name": "p-lora", "backbone.name": "fedpergnn"},
        {"embedding.name": "p-rq", "backbone.name": "fedncf"},
        {"training.schedule": "cosine", "training.server_schedule": "cosine", "training.warmup_rounds": 1},
    ],
    ids=str,
)
def test_a_round_in_one_call_has_the_bits_of_its_parts(
    dataset: Dataset, pretrained: Pretrained, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training.rounds": 4, **changes}
    whole = Simulator(config(**changes), dataset, pretrained=pretrained)
    with monkeypatch.context() as patch:
        patch.setattr(Simulator, "_rounds_in_one_call", lambda self: None)
        parts = Simulator(config(**changes), dataset, pretrained=pretrained)
        apart = [parts.round() for _ in range(4)]
    monkeypatch.setattr(type(whole._engine), "train", None)  # is not called
    for one, other in zip([whole.round() for _ in range(4)], apart, strict=True):
        assert (one.loss, one.clients, one.bytes_up) == (other.loss, other.clients, other.bytes_up)
    mine, theirs = whole.state_dict(), parts.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "batched"},
        {"backbone.name": "pfedrec"},
        {"training.client_sampling": "poisson"},
        {"training.server_optimizer": "adam"},
        {"faults.dropout_rate": 0.1},
        {"faults.reject": True},
        {"compression.method": "int8"},
        {
            "privacy.mode": "cdp",
            "privacy.clip": 1.0,
            "privacy.noise_multiplier": 0.1,
            "training.weighting": "uniform",
        },
    ],
    ids=str,
)
def test_a_round_of_which_parts_are_wanted_is_not_one_call(
    dataset: Dataset, pretrained: Pretrained, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fedpeft_ext.ops.train_round")
    monkeypatch.setattr(module.RoundTraining, "__call__", None)
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    assert simulator.round().clients > 0
