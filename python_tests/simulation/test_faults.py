"""Faulty clients: simulated, found, rejected and counted, the same in every engine and for any chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import small_config
from torch import Tensor

from fedpeft_ext.config import Config, ConfigError, FaultsConfig
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import ClientError, Simulator
from fedpeft_ext.simulation.faults import Faults
from fedpeft_ext.simulation.uploads import Uploads


def config(**changes: Any) -> Config:
    return small_config(**{"training.rounds": 4, **changes})


def trained(
    dataset: Dataset, pretrained: Pretrained, **changes: Any
) -> tuple[dict[str, Tensor], Any, list[float]]:
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    infos = [simulator.round() for _ in range(4)]
    state = {name: tensor.clone() for name, tensor in simulator.state_dict().items()}
    return state, infos[-1].faults, [info.loss for info in infos]


FAULTY = {
    "faults.dropout_rate": 0.3,
    "faults.corrupt_rate": 0.4,
    "faults.reject": True,
    "faults.max_norm": 100.0,
    "dtype": "float64",
}


def uploads() -> Uploads:
    """Six clients: fine, NaN, infinite, large, empty, fine."""
    table = torch.ones(6, 2, 3)
    table[1, 0, 0] = float("nan")
    table[2, 1, 2] = float("-inf")
    table[3] = 1e6
    return Uploads(
        {"table": table},
        torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.float64),
        None,
        frozenset(),
        torch.arange(10, 16),
        1,
    )


@pytest.mark.parametrize("zero", [False, True])
def test_unfit_updates_are_left_out_and_counted(zero: bool) -> None:
    faults = Faults(FaultsConfig(reject=True, max_norm=10.0), seed=0, keep_as_zero=zero)
    kept, accepted = faults(uploads())
    assert accepted is not None
    assert accepted.tolist() == [True, False, False, False, False, True]
    assert faults.accepted(np.arange(10, 16)).tolist() == accepted.tolist()
    assert faults.counts == {
        "dropped": 0,
        "empty": 1,
        "not_finite": 2,
        "exploding": 1,
        "repeated": 0,
        "skipped": 0,
    }
    table = kept.updates["table"]
    if zero:
        assert torch.equal(table.flatten(1).sum(1), torch.tensor([6.0, 0, 0, 0, 0, 6]))
    else:
        assert kept.clients.tolist() == [10, 15]
        assert torch.equal(table, torch.ones(2, 2, 3))


@pytest.mark.parametrize("strategy", ["full", "p-rq+lora"])
def test_batched_equals_sequential(dataset: Dataset, pretrained: Pretrained, strategy: str) -> None:
    changes = {**FAULTY, "embedding.name": strategy, "faults.min_clients": 5, "faults.too_few": "repeat"}
    mine = trained(dataset, pretrained, **changes)
    theirs = trained(dataset, pretrained, **changes, engine="sequential")
    assert mine[1] == theirs[1]
    assert all(mine[1][what] > 0 for what in ("dropped", "not_finite", "exploding", "repeated"))
    for name, value in mine[0].items():
        torch.testing.assert_close(value, theirs[0][name], rtol=0.0, atol=1e-9)
    np.testing.assert_allclose(mine[2], theirs[2], rtol=0.0, atol=1e-9)


def test_same_bits_for_any_chunks(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {**FAULTY, "embedding.name": "full"}
    results = [
        trained(dataset, pretrained, **changes, chunk_memory_mb=memory) for memory in (1e6, 0.05, 1e-6)
    ]
    for state, faults, losses in results[1:]:
        assert (faults, losses) == results[0][1:]
        assert all(torch.equal(value, results[0][0][name]) for name, value in state.items())


@pytest.mark.parametrize("engine", ["batched", "sequential"])
def test_the_average_is_that_of_the_others(dataset: Dataset, pretrained: Pretrained, engine: str) -> None:
    """A client whose state is broken is left out, keeps its state, and the rest average as without it."""
    changes = {"engine": engine, "training.clients_per_round": 1.0, "dtype": "float64"}
    simulator = Simulator(config(**changes, **{"faults.reject": True}), dataset, pretrained=pretrained)
    simulator.store.state["user"][4] = float("nan")
    info = simulator.round()
    assert info.faults is not None
    assert info.faults["not_finite"] == 1
    assert np.isfinite(info.loss)
    assert bool(simulator.store.state["user"][4].isnan().all())
    others = np.delete(np.arange(dataset.num_users), 4)
    expected = Simulator(config(**changes), dataset, pretrained=pretrained)
    expected._eligible = others
    expected._per_round = len(others)
    expected.round()
    for name, value in simulator.model.named_parameters():
        if name not in simulator.model.local_parameters:
            assert torch.equal(value, dict(expected.model.named_parameters())[name])
    assert torch.equal(simulator.store.state["user"][others], expected.store.state["user"][others])


@pytest.mark.parametrize("engine", ["batched", "sequential"])
def test_broken_updates_are_never_averaged(dataset: Dataset, pretrained: Pretrained, engine: str) -> None:
    """Without rejection a run ends before the step, and may go on from there."""
    simulator = Simulator(
        config(**{"engine": engine, "faults.corrupt_rate": 1.0, "embedding.name": "full"}),
        dataset,
        pretrained=pretrained,
    )
    before = simulator.model.item_embedding.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"round 1: the sum of updates .* faults\.reject=true"):
        simulator.round()
    assert torch.equal(simulator.model.item_embedding.weight, before)
    assert simulator._aggregator.uploads == 0


@pytest.mark.parametrize(("too_few", "repeats"), [("skip", 0), ("repeat", 2)])
def test_a_round_with_too_few_survivors(
    dataset: Dataset, pretrained: Pretrained, tmp_path: Path, too_few: str, repeats: int
) -> None:
    changes = {
        "faults.corrupt_rate": 1.0,
        "faults.reject": True,
        "faults.max_norm": 100.0,
        "faults.min_clients": 1,
        "faults.too_few": too_few,
        "faults.max_repeats": 2,
        "evaluation.every": 1,
    }
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained, out=tmp_path / "run")
    before = {name: value.clone() for name, value in simulator.state_dict().items()}
    summary = simulator.run()
    for name, value in simulator.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert summary.faults is not None
    assert (summary.faults["repeated"], summary.faults["skipped"]) == (4 * repeats, 4)
    assert summary.trained_clients == 4 * 9 * (1 + repeats)
    assert summary.total_bytes == summary.trained_clients * (summary.bytes_down + summary.bytes_up)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["faults"] == dict(summary.faults)
    assert [line["faults"]["skipped"] for line in lines[1:]] == [1, 2, 3, 4]
    assert lines[-1]["excluded_clients"] == 0
    assert lines[-1]["loss"] is None


def bits(simulator: Simulator) -> dict[str, Any]:
    """All that a round may change."""
    parts = {"clients": simulator.store, "aggregator": simulator._aggregator, "faults": simulator._faults}
    states = {part: {} if held is None else held.state_dict() for part, held in parts.items()}
    values = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
    values |= dict(simulator.model.state_dict())
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name not in but:
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], (
                name
            )


@pytest.mark.parametrize("engine", ["fused", "batched", "sequential"])
@pytest.mark.parametrize("embedding", ["full", "p-rq"])
def test_a_repeated_round_leaves_no_trace_of_its_first_attempt(
    dataset: Dataset, pretrained: Pretrained, engine: str, embedding: str
) -> None:
    """Who was asked in a discarded attempt alone is as before, and who was asked again trains from there."""
    changes = {
        "engine": engine,
        "embedding.name": embedding,
        "compression.method": "top-k",
        "faults.dropout_rate": 0.5,
        "faults.min_clients": 6,
        "faults.too_few": "repeat",
        "faults.max_repeats": 30,
    }
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    before = simulator.store.state["user"].clone()
    info = simulator.round()
    assert info.faults is not None
    attempts = info.faults["repeated"]
    assert attempts > 0
    sampled = simulator._sample(1, attempts)
    last = Faults(FaultsConfig(dropout_rate=0.5), simulator.config.seed).present(sampled, 1, attempts)
    changed = (simulator.store.state["user"] != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(last.tolist())
    (stage,) = simulator._aggregator._stages
    assert sorted(stage.state_dict()["clients"].tolist()) == changed


@pytest.mark.parametrize("engine", ["fused", "batched", "sequential"])
@pytest.mark.parametrize("fault", [RuntimeError("no memory"), KeyboardInterrupt(), "nan"])
def test_after_a_failed_round_all_is_as_before(
    dataset: Dataset, pretrained: Pretrained, engine: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next try of it equals one that never failed, to the bit."""
    changes = {
        "engine": engine,
        "embedding.name": "full",
        "compression.method": "top-k",
        "faults.dropout_rate": 0.2,
        "training.server_optimizer": "adam",
        "chunk_memory_mb": 1e-3,  # several chunks, of which the first is summed before the second fails
    }
    simulator, untroubled = (Simulator(config(**changes), dataset, pretrained=pretrained) for _ in range(2))
    simulator.round()
    untroubled.round()
    before = bits(simulator)
    add, calls = simulator._aggregator.add, 0

    def failing(updates: Any, weights: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 and isinstance(fault, BaseException):
            raise fault
        broken = {name: update * float("nan") for name, update in updates.items()}
        return add(broken if fault == "nan" else updates, weights, *args, **options)

    monkeypatch.setattr(simulator._aggregator, "add", failing)
    expected = {RuntimeError: ClientError, KeyboardInterrupt: KeyboardInterrupt}.get(
        type(fault), FloatingPointError
    )
    with pytest.raises(expected):
        simulator.round()
    assert calls > 1
    assert_same(bits(simulator), before)
    monkeypatch.undo()
    assert simulator.rounds_done == 1
    simulator.round()
    untroubled.round()
    assert_same(bits(simulator), bits(untroubled))


def test_a_repeated_round_asks_other_clients(dataset: Dataset, pretrained: Pretrained) -> None:
    simulator = Simulator(config(), dataset, pretrained=pretrained)
    first, second = (set(simulator._sample(1, attempt).tolist()) for attempt in range(2))
    assert first != second


def test_dropped_clients_do_not_train_and_send_nothing(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {"faults.dropout_rate": 0.5, "training.clients_per_round": 1.0}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    before = simulator.store.state["user"].clone()
    info = simulator.round()
    assert info.faults is not None
    assert 0 < info.faults["dropped"] == 23 - info.clients < 23
    assert int((simulator.store.state["user"] != before).any(1).sum()) == info.clients
    assert simulator._total_bytes == 23 * info.bytes_down + info.clients * info.bytes_up


def test_dropout_rate() -> None:
    faults = Faults(FaultsConfig(dropout_rate=0.2), seed=3)
    left = [len(faults.present(np.arange(500), round, 0)) for round in range(1, 41)]
    # 20,000 clients: standard error 0.3%.
    assert 1 - np.mean(left) / 500 == pytest.approx(0.2, abs=0.012)
    assert faults.counts["dropped"] == 40 * 500 - sum(left)
    again = Faults(FaultsConfig(dropout_rate=0.2), seed=3)
    assert np.array_equal(again.present(np.arange(500), 7, 0), faults.present(np.arange(500), 7, 0))
    assert not np.array_equal(again.present(np.arange(500), 7, 1), again.present(np.arange(500), 7, 0))


def test_privacy_does_not_depend_on_faults(dataset: Dataset, pretrained: Pretrained) -> None:
    """A rejected update counts as zero: the noise and the divisor are those of a round where all is well."""
    changes = {
        **FAULTY,
        "faults.corrupt_rate": 1.0,
        "faults.dropout_rate": 0.0,
        "embedding.name": "full",
        "training.weighting": "uniform",
        "privacy.clip": 0.1,
        "privacy.noise_multiplier": 1.0,
    }
    for mode, divisor in (("cdp", 9.0), ("ldp", 9.0**0.5)):
        simulator = Simulator(config(**changes, **{"privacy.mode": mode}), dataset, pretrained=pretrained)
        before = simulator.model.item_embedding.weight.detach().clone()
        simulator.round()
        moved = (simulator.model.item_embedding.weight.detach() - before).std()
        assert float(moved) == pytest.approx(0.1 / divisor, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faults.dropout_rate": 1.0}, r"faults\.dropout_rate"),
        ({"faults.corrupt_rate": -0.1}, r"faults\.corrupt_rate"),
        ({"faults.max_norm": 1.0}, r"faults\.max_norm: expected None unless reject is true"),
        ({"faults.min_clients": -1}, r"faults\.min_clients"),
        ({"faults.too_few": "stop"}, r"faults\.too_few"),
        (
            {
                "faults.min_clients": 2,
                "privacy.mode": "cdp",
                "privacy.scale": 1.0,
                "training.weighting": "uniform",
            },
            r"faults\.min_clients: expected 0 with privacy",
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_more_survivors_than_clients(dataset: Dataset, pretrained: Pretrained) -> None:
    with pytest.raises(ValueError, match=r"faults\.min_clients: expected at most the 9 clients"):
        Simulator(config(**{"faults.min_clients": 10}), dataset, pretrained=pretrained)
