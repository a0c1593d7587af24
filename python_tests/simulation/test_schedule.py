"""Learning rates by round: their shapes, what they scale, where they do not apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_federation import make_dataset, small_config
from torch import Tensor

from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.schedule import CONSTANT, Schedule
from fedpeft_ext.simulation.setup import local_settings, server_settings

BOTH = {"training.schedule": "cosine", "training.server_schedule": "linear"}


@pytest.mark.parametrize("end", [0.2, 1.0])
@pytest.mark.parametrize("warmup", [0, 3])
def test_factors_are_those_of_torch(warmup: int, end: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedulers = {
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, 7),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, end),
    }
    for name, scheduler in schedulers.items():
        schedule = Schedule(name, end, warmup + 1, warmup + 8)
        optimizer.param_groups[0]["lr"] = 1.0
        factors = [schedule.factor(round) for round in range(1, warmup + 11)]
        assert factors[:warmup] == [1.0] * warmup
        assert factors[-3:] == [end] * 3  # the last round, and rounds beyond
        for factor in factors[warmup : warmup + 8]:
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            scheduler.step()
    assert Schedule("cosine", 0.5, 4, 4).factor(4) == 1.0  # the only round
    assert {CONSTANT.factor(round) for round in (1, 2, 100)} == {1.0}


def after_rounds(
    dataset: Dataset, pretrained: Pretrained, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after the second of two rounds, of one step a client."""
    settings = {
        "training.rounds": 2,
        "training.local_epochs": 1,
        "training.optimizer": "sgd",
        "training.lr": 2.0,
        "training.l2": 0.0,
        "training.clients_per_round": 15,
        "training.schedule_end": 0.25,
        "dtype": "float64",
    }
    simulator = Simulator(small_config(**settings | changes), dataset, pretrained=pretrained)
    states = []
    for _ in range(2):
        simulator.round()
        states.append({name: tensor.clone() for name, tensor in simulator.state_dict().items()})
    return states[0], states[1]


@pytest.mark.parametrize("engine", ["fused", "batched", "sequential"])
@pytest.mark.parametrize("server", ["avg", "adam"])
def test_steps_shrink_by_the_factors(
    dataset: Dataset, pretrained: Pretrained, engine: str, server: str
) -> None:
    """In the last round a quarter is left: of a client's one SGD step, of the server's, or of both."""
    changes = {"engine": engine, "training.server_optimizer": server, "embedding.name": "c-rq"}
    start, plain = after_rounds(dataset, pretrained, **changes)
    for names, shared, own in (
        (("schedule",), 0.25, 0.25),
        (("server_schedule",), 0.25, 1.0),
        (("schedule", "server_schedule"), 0.0625, 0.25),
    ):
        if server == "adam" and "schedule" in names:
            continue  # its step is no multiple of the clients'
        before, after = after_rounds(
            dataset, pretrained, **changes, **{f"training.{name}": "linear" for name in names}
        )
        for name, value in after.items():
            assert torch.equal(before[name], start[name])  # the first round is whole
            if not value.is_floating_point():  # codes
                continue
            factor = own if name.startswith("clients.") else shared
            expected = factor * (plain[name] - start[name])
            torch.testing.assert_close(value - before[name], expected, rtol=0.0, atol=1e-12)
    for name in ("item_embedding.codebooks", "clients.user"):
        assert float((plain[name] - start[name]).abs().max()) > 1e-3


@pytest.mark.parametrize("engine", ["fused", "batched", "sequential"])
def test_constant_factors_are_the_bits_of_none(dataset: Dataset, pretrained: Pretrained, engine: str) -> None:
    changes: dict[str, Any] = {"engine": engine, "training.optimizer": "adam", "training.local_epochs": 2}
    _, plain = after_rounds(dataset, pretrained, **changes)
    _, ones = after_rounds(dataset, pretrained, **changes, **BOTH, **{"training.schedule_end": 1.0})
    assert all(torch.equal(value, ones[name]) for name, value in plain.items())


def test_warm_up_has_rates_of_its_own(dataset: Dataset, pretrained: Pretrained) -> None:
    config = small_config(
        **BOTH, **{"training.rounds": 6, "training.warmup_rounds": 2, "training.warmup_lr": 0.3}
    )
    model = Simulator(config, dataset, pretrained=pretrained).model
    warm, then = local_settings(config, model, warmup=True), local_settings(config, model)
    assert [warm.of_round(round).lr for round in (1, 2)] == [0.3, 0.3]
    assert [then.of_round(round).lr for round in (3, 6)] == pytest.approx([0.01, 0.0001])
    assert server_settings(config, warmup=True)["schedule"] == CONSTANT
    assert server_settings(config)["schedule"] == Schedule("linear", 0.01, 3, 6)
    # A run that goes on from another has schedules of its own.
    assert server_settings(config, begun=4)["schedule"] == Schedule("linear", 0.01, 5, 6)
    assert local_settings(config, model, begun=4).of_round(5).lr == 0.01
    # An embedding without warm-up has all rounds for it.
    without = config.updated(["embedding.name=c-rq"])
    assert server_settings(without)["schedule"] == Schedule("linear", 0.01, 1, 6)


@pytest.mark.parametrize(
    ("changes", "warmup", "then"),
    [
        ({}, ("avg", None), ("avg", None)),
        ({"server_lr": 3}, ("avg", 3.0), ("avg", 3.0)),
        ({"server_lr": 3, "warmup_server_lr": 5}, ("avg", 5.0), ("avg", 3.0)),
        # A rate of another optimizer says nothing.
        ({"server_lr": 3, "warmup_server_optimizer": "adam"}, ("adam", None), ("avg", 3.0)),
        (
            {"server_lr": 3, "warmup_server_optimizer": "adam", "warmup_server_lr": 0.1},
            ("adam", 0.1),
            ("avg", 3.0),
        ),
        (
            {"server_optimizer": "adam", "server_lr": 0.02, "warmup_server_optimizer": "adam"},
            ("adam", 0.02),
            ("adam", 0.02),
        ),
    ],
    ids=str,
)
def test_the_servers_optimizer_in_warm_up(changes: dict[str, Any], warmup: Any, then: Any) -> None:
    config = small_config(**{f"training.{name}": value for name, value in changes.items()})
    for expected, found in (
        (warmup, server_settings(config, warmup=True)),
        (then, server_settings(config)),
    ):
        assert (found["optimizer"], found["lr"]) == expected


def test_warm_up_with_adam_on_the_server(dataset: Dataset, pretrained: Pretrained) -> None:
    """Its rounds are those of a run with Adam throughout, and the ones after it are not."""
    changes = {"training.warmup_rounds": 2, "training.rounds": 4, "training.warmup_server_lr": 0.05}
    runs = [
        Simulator(small_config(**changes, **own), dataset, pretrained=pretrained)
        for own in ({"training.warmup_server_optimizer": "adam"}, {"training.server_optimizer": "adam"})
    ]
    for round in range(1, 4):
        for run in runs:
            run.round()
        one, other = (run.state_dict() for run in runs)
        same = [torch.equal(value, other[name]) for name, value in one.items()]
        assert all(same) if round <= 2 else not all(same)


def test_new_users_train_with_the_whole_rate(pretrained: Pretrained) -> None:
    changes = {"training.rounds": 3, "training.lr": 0.05, "embedding.name": "p-rq"}
    run, plain = (
        Simulator(small_config(**changes, **own), make_dataset().of_users(range(15)), pretrained=pretrained)
        for own in (BOTH, {})
    )
    for _ in range(3):
        run.round()
    for name, value in run.state_dict().items():
        if not name.startswith("clients."):
            plain.model.state_dict()[name].copy_(value)
    later = make_dataset().of_users(range(15, 23))
    plain.rounds_done = 3
    came, expected = (each.trained_run.with_new_users(later, 2) for each in (run, plain))
    assert torch.equal(came.store.state["user"], expected.store.state["user"])
