"""Whole runs: reproducible, evaluated, written to disk, and refused early where they cannot work."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_federation import DIM, make_dataset, small_config

from fedpeft_ext import _C
from fedpeft_ext.config import Config, load_config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Callback, Metrics, RoundInfo, Simulator, Summary
from fedpeft_ext.simulation.randomness import sample_clients


def config(**changes: Any) -> Config:
    return small_config(
        **{"training.rounds": 5, "training.clients_per_round": 0.3, "evaluation.every": 2, **changes}
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_a_function_of_its_settings(dataset: Dataset, pretrained: Pretrained) -> None:
    first, second = (Simulator(config(), dataset, pretrained=pretrained) for _ in range(2))
    assert first.run().metrics == second.run().metrics
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    other = Simulator(config(seed=1), dataset, pretrained=pretrained)
    assert other.run().metrics != first.evaluate().values


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone.name": "fedncf", "embedding.name": "p-rq+hash+senet"},
        {  # torch's Adam before 2.13 counts its steps on the default device
            "backbone.name": "pfedrec",
            "compression.method": "top-k",
            "engine": "sequential",
            "training.optimizer": "sgd",
        },
        {"training.algorithm": "scaffold", "training.optimizer": "sgd", "engine": "batched"},
        {"pretrain.features": "random", "compression.method": "int8"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_the_default_device_does_not_matter(dataset: Dataset, changes: dict[str, str]) -> None:
    settings = config(**{"pretrain.features": "random", "pretrain.cache": False, **changes})
    expected = Simulator(settings, dataset).run().metrics
    with torch.device("meta"):
        assert Simulator(settings, dataset).run().metrics == expected


def test_validation_items_choose_the_best_round(pretrained: Pretrained) -> None:
    settings = config(**{"evaluation.every": 1, "training.lr": 0.05, "training.rounds": 8})
    with_valid = Simulator(settings, make_dataset(validation=True), pretrained=pretrained).run()
    valid = [values["valid/HR@10"] for values in with_valid.evaluations]
    assert len(set(valid)) > 1
    assert (with_valid.best_by, with_valid.best_round) == ("valid/HR@10", int(np.argmax(valid)))
    assert with_valid.best == {
        k: v for k, v in with_valid.evaluations[with_valid.best_round].items() if k != "round"
    }
    assert not any(name.startswith("valid/full") for name in with_valid.metrics)
    without = Simulator(settings, make_dataset(), pretrained=pretrained).run()
    assert without.best_by == "HR@10"
    assert without.best_round == int(np.argmax([values["HR@10"] for values in without.evaluations]))


@pytest.mark.parametrize("metric", ["NDCG@20", "full/MRR"])
def test_another_metric_chooses_the_best_round(pretrained: Pretrained, metric: str) -> None:
    """One among all items is evaluated on validation items, too, and trains alike."""
    changes = {"evaluation.every": 1, "training.lr": 0.05, "training.rounds": 8}
    dataset = make_dataset(validation=True)
    usual, run = (
        Simulator(config(**changes, **own), dataset, pretrained=pretrained).run()
        for own in ({}, {"evaluation.select_by": metric})
    )
    values = [evaluation[f"valid/{metric}"] for evaluation in run.evaluations]
    assert len(set(values)) > 1
    assert (run.best_by, run.best_round) == (f"valid/{metric}", int(np.argmax(values)))
    more = run.metrics.keys() - usual.metrics.keys()
    assert all(name.startswith("valid/full/") for name in more)
    assert bool(more) == metric.startswith("full/")
    assert {name: value for name, value in run.metrics.items() if name not in more} == usual.metrics
    without = Simulator(
        config(**changes, **{"evaluation.select_by": metric}), make_dataset(), pretrained=pretrained
    ).run()
    assert without.best_by == metric


def test_step_by_step_equals_run(dataset: Dataset, pretrained: Pretrained) -> None:
    whole, steps = (Simulator(config(), dataset, pretrained=pretrained) for _ in range(2))
    summary = whole.run()
    infos = [steps.round() for _ in range(5)]
    assert [info.round for info in infos] == [1, 2, 3, 4, 5]
    assert steps.evaluate().values == summary.metrics


def test_files_of_a_run(dataset: Dataset, pretrained: Pretrained, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    simulator = Simulator(config(), dataset, pretrained=pretrained, out=out)
    summary = simulator.run()
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "items.parquet",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "users.parquet",
    ]
    assert load_config(out / "config.yaml") == simulator.config
    assert [line["round"] for line in lines(out)] == [0, 2, 4, 5]
    last = lines(out)[-1]
    assert {name: last[name] for name in summary.metrics} == summary.metrics
    assert last["total_bytes"] == summary.total_bytes == 5 * 7 * 2 * 3 * 16 * DIM * 4
    assert {
        "loss",
        "clients",
        "clients_per_second",
        "bytes_up",
        "bytes_down",
        "HR@10",
        "full/NDCG@10",
    } <= last.keys()
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary.as_dict()))
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == simulator.state_dict().keys()
    assert tensors["clients.user"].shape == (dataset.num_users, DIM)


def test_callbacks_hear_everything_in_order(dataset: Dataset, pretrained: Pretrained) -> None:
    heard: list[Any] = []

    class Listener(Callback):
        def on_start(self, simulator: Simulator) -> None:
            heard.append("start")

        def on_round(self, info: RoundInfo) -> None:
            assert info.rounds == 5
            assert info.clients == 7
            assert info.clients_per_second > 0
            heard.append(info.round)

        def on_evaluate(self, metrics: Metrics) -> None:
            assert 0.0 <= metrics["HR@10"] <= 1.0
            heard.append(f"evaluated {metrics.round}")

        def on_end(self, summary: Summary) -> None:
            heard.append("end")

    Simulator(config(), dataset, pretrained=pretrained, callbacks=[Listener()]).run()
    assert heard == [
        "start",
        "evaluated 0",
        1,
        2,
        "evaluated 2",
        3,
        4,
        "evaluated 4",
        5,
        "evaluated 5",
        "end",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_what_it_had(
    dataset: Dataset, pretrained: Pretrained, tmp_path: Path, error: type[BaseException]
) -> None:
    class Stop(Callback):
        def on_round(self, info: RoundInfo) -> None:
            if info.round == 3:
                raise error

    with pytest.raises(error):
        Simulator(config(), dataset, pretrained=pretrained, callbacks=[Stop()], out=tmp_path / "r").run()
    assert [line["round"] for line in lines(tmp_path / "r")] == [0, 2]
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["training"]["rounds"] == 5
    assert not (tmp_path / "r" / "summary.json").exists()


def test_output_folder_is_checked_before_any_work(
    dataset: Dataset, pretrained: Pretrained, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out: expected a new or empty folder"):
        Simulator(config(), dataset, pretrained=pretrained, out=tmp_path)
    with pytest.raises(NotADirectoryError, match=r"out: expected a folder"):
        Simulator(config(), dataset, pretrained=pretrained, out=tmp_path / "notes.txt")
    with pytest.raises(NotADirectoryError, match=r"out: expected a folder, but .*notes.txt is a file"):
        Simulator(config(), dataset, pretrained=pretrained, out=tmp_path / "notes.txt" / "below")
    Simulator(
        config(**{"training.rounds": 1}), dataset, pretrained=pretrained, out=tmp_path, overwrite=True
    ).run()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [line["round"] for line in lines(tmp_path)] == [0, 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(dataset: Dataset, pretrained: Pretrained, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"out: cannot write to"):
        Simulator(config(), dataset, pretrained=pretrained, out=tmp_path / "run")


def test_warmup_trains_the_full_embedding_then_freezes_it(dataset: Dataset, pretrained: Pretrained) -> None:
    settings = config(**{"training.warmup_rounds": 2})
    warm = Simulator(settings, dataset, pretrained=pretrained)
    full = Simulator(config(**{"embedding.name": "full"}), dataset, pretrained=pretrained)
    infos = [warm.round() for _ in range(2)]
    assert [info.phase for info in infos] == ["warm-up", "warm-up"]
    expected = [full.round() for _ in range(2)]
    assert [info.bytes_up for info in infos] == [info.bytes_up for info in expected] == [60 * DIM * 4] * 2
    warmed = full.model.item_embedding.full_embedding()
    assert torch.equal(warm.model.item_embedding.base, warmed)
    assert not torch.equal(warmed, pretrained.full)
    assert torch.equal(warm.store.state["user"], full.store.state["user"])

    info = warm.round()
    assert info.phase == "training"
    assert info.bytes_up == 3 * 16 * DIM * 4
    assert torch.equal(warm.model.item_embedding.base, warmed)
    summary = warm.run()
    assert summary.warmup_rounds == 2
    assert summary.total_bytes == 7 * 2 * (2 * 60 * DIM * 4 + 3 * 3 * 16 * DIM * 4)


def test_warmup_may_have_its_own_optimizer(dataset: Dataset, pretrained: Pretrained) -> None:
    own = {"optimizer": "sgd", "lr": 2.0, "server_lr": 3.0}
    changes = {f"training.warmup_{name}": value for name, value in own.items()}
    warm = Simulator(config(**changes, **{"training.warmup_rounds": 2}), dataset, pretrained=pretrained)
    changes = {f"training.{name}": value for name, value in own.items()}
    full = Simulator(config(**changes, **{"embedding.name": "full"}), dataset, pretrained=pretrained)
    for _ in range(2):
        warm.round()
        full.round()
    assert torch.equal(warm.model.item_embedding.base, full.model.item_embedding.full_embedding())
    # From here on the settings of training hold: the same as a federation that starts from this state.
    after = Simulator(
        config(),
        dataset,
        pretrained=dataclasses.replace(pretrained, full=full.model.item_embedding.weight.detach()),
    )
    after.store.state["user"].copy_(full.store.state["user"])
    after.rounds_done = 2
    warm.round()
    after.round()
    assert torch.equal(warm.model.item_embedding.codebooks, after.model.item_embedding.codebooks)


@pytest.mark.parametrize(("embedding", "warmup_rounds"), [("full", 2), ("c-rq", 0)])
def test_warmup_changes_nothing_where_nothing_is_frozen(
    dataset: Dataset, pretrained: Pretrained, embedding: str, warmup_rounds: int
) -> None:
    changes = {"embedding.name": embedding}
    plain = Simulator(config(**changes), dataset, pretrained=pretrained).run()
    warm = Simulator(config(**changes, **{"training.warmup_rounds": 2}), dataset, pretrained=pretrained).run()
    assert warm.warmup_rounds == warmup_rounds
    assert (warm.metrics, warm.total_bytes) == (plain.metrics, plain.total_bytes)


def test_training_learns(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {"training.rounds": 80, "training.clients_per_round": 1.0, "embedding.name": "full"}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    losses = [simulator.round().loss for _ in range(80)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.clients_per_round": 24}, r"training\.clients_per_round: expected at most 23.*got 24"),
        ({"evaluation.num_negatives": 60}, r"num_negatives"),
        ({"embedding.levels": 4}, r"levels"),
    ],
)
def test_settings_that_do_not_fit(
    dataset: Dataset, pretrained: Pretrained, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Simulator(config(**changes), dataset, pretrained=pretrained)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named(dataset: Dataset, pretrained: Pretrained) -> None:
    with pytest.raises(ValueError, match=r"device: expected one that this machine has, got 'cuda'"):
        Simulator(config(device="cuda"), dataset, pretrained=pretrained)


def test_a_gpu_that_cannot_be_used_is_named(
    dataset: Dataset, pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"device: expected .* got 'cuda:2' and torch finds cuda:0 to cuda:1"
    ):
        Simulator(config(device="cuda:2"), dataset, pretrained=pretrained)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": False})
    with pytest.raises(ValueError, match=r"device: got 'cuda:1', .* built without CUDA kernels: build it"):
        Simulator(config(device="cuda:1"), dataset, pretrained=pretrained)


def test_users_that_cannot_train_are_left_out(pretrained: Pretrained) -> None:
    dataset = make_dataset(users=6)
    sizes = np.diff(dataset.indptr)
    keep = np.repeat(np.arange(6) != 2, sizes)
    sizes[2] = 0
    dataset = Dataset(
        **{
            **{name: getattr(dataset, name) for name in dataset.__dataclass_fields__},
            "indptr": np.concatenate([[0], np.cumsum(sizes)]),
            "indices": dataset.indices[keep],
        }
    )
    simulator = Simulator(config(**{"training.clients_per_round": 1.0}), dataset, pretrained=pretrained)
    before = simulator.store.state["user"].clone()
    assert simulator.round().clients == 5
    assert torch.equal(simulator.store.state["user"][2], before[2])


@pytest.mark.parametrize("count", [30, 6])
def test_sampled_clients_are_distinct_and_change_with_the_round(count: int) -> None:
    eligible = np.arange(100, 200)
    rounds = [sample_clients(eligible, count, seed=3, round=r) for r in range(1, 6000 // count + 1)]
    assert all(
        len(set(chosen.tolist())) == count and set(chosen.tolist()) <= set(eligible.tolist())
        for chosen in rounds
    )
    assert np.array_equal(rounds[6], sample_clients(eligible, count, seed=3, round=7))
    counts = np.bincount(np.concatenate(rounds) - 100, minlength=100)
    # Mean 60, standard deviation 6.5 of a share of 0.3, 7.5 of 0.06.
    assert 30 < counts.min() <= counts.max() < 90
    assert not np.array_equal(rounds[0], sample_clients(eligible, count, seed=4, round=1))
