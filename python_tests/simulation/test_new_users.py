"""Users who come after the training: as clients of a round, alone as in company, from folders, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_federation import make_dataset, small_config

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Interrupted, Simulator, TrainedRun, load_run, load_server
from fedpeft_ext.simulation.setup import eligible_clients

CASES: dict[str, dict[str, Any]] = {
    "fedmf": {"embedding.name": "p-rq", "training.optimizer": "sgd", "training.lr": 1},
    "fedncf": {
        "embedding.name": "p-hash+senet",
        "backbone.hidden": [8, 4],
        "training.server_optimizer": "adam",
    },
    "pfedrec": {"embedding.name": "full", "backbone.hidden": [8], "training.warmup_rounds": 3},
    "fedpergnn": {"embedding.name": "p-lora", "training.batch_size": 4},
}
ENGINES = ("auto", "batched", "sequential")


def config_of(backbone: str, **changes: Any) -> Config:
    return small_config(
        **{"backbone.name": backbone, "dtype": "float64", "training.rounds": 3} | CASES[backbone] | changes
    )


def state_of(run: TrainedRun, *users: int) -> dict[str, torch.Tensor]:
    return run.store.read(torch.tensor(users or range(run.dataset.num_users)))


@pytest.fixture(params=CASES)
def simulator(request: pytest.FixtureRequest, pretrained: Pretrained) -> Simulator:
    """Of the first 15 users, in the middle of its run."""
    made = Simulator(config_of(request.param), make_dataset().of_users(range(15)), pretrained=pretrained)
    made.round()
    made.round()
    return made


@pytest.fixture
def later() -> Dataset:
    return make_dataset().of_users(range(15, 23))


@pytest.mark.parametrize("backbone", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_they_train_as_the_clients_of_a_round_do(
    dataset: Dataset, pretrained: Pretrained, backbone: str, engine: str
) -> None:
    config = config_of(
        backbone, engine=engine, **{"training.clients_per_round": len(eligible_clients(dataset))}
    )
    simulator = Simulator(config, dataset, pretrained=pretrained)
    came = simulator.trained_run.with_new_users(dataset, rounds=1)
    simulator.round()
    for name, values in state_of(simulator.trained_run).items():
        torch.testing.assert_close(state_of(came)[name], values, rtol=0.0, atol=1e-12)


def test_what_is_shared_stays_and_engines_agree(simulator: Simulator, later: Dataset) -> None:
    run = simulator.trained_run
    before = {name: value.clone() for name, value in simulator.state_dict().items()}
    came = run.with_new_users(later, rounds=3)
    for name, value in simulator.state_dict().items():
        assert torch.equal(value, before[name])
    assert (came.round, came.config, came.model) == (run.round, run.config, run.model)
    for engine in ENGINES:
        other = TrainedRun(run.config.updated([f"engine={engine}"]), run.dataset, run.model, run.store, 2)
        for name, values in state_of(other.with_new_users(later, 3)).items():
            torch.testing.assert_close(values, state_of(came)[name], rtol=1e-9, atol=1e-9)


def test_company_changes_nothing(simulator: Simulator, later: Dataset) -> None:
    run = simulator.trained_run
    together, alone = run.with_new_users(later, 2), run.with_new_users(later.of_users([0]), 2)
    for name, values in state_of(alone).items():
        assert torch.equal(values, state_of(together, 0)[name])
    items = [f"i{item}" for item in later.indices[: later.indptr[1]]]
    named = run.with_new_users({"new": [*items, items[0]]}, 2)  # an item twice counts once
    assert torch.equal(named.recommend("new", 5).scores, alone.recommend(0, 5).scores)
    numbers = run.with_new_users({"new": later.indices[: later.indptr[1]].tolist()}, 2)
    assert torch.equal(numbers.recommend("new", 5).scores, alone.recommend(0, 5).scores)
    assert not {*named.recommend("new", 5).items[0].tolist()} & {*later.indices[: later.indptr[1]].tolist()}


def test_without_training_they_start_as_any_client(simulator: Simulator, later: Dataset) -> None:
    came = simulator.trained_run.with_new_users(later, 0)
    for name, start in simulator.store.starts.items():
        assert torch.equal(state_of(came)[name], start.expand(8, *start.shape))
    if "user" in simulator.store.state:
        fresh = Simulator(simulator.config, simulator.dataset, pretrained=simulator._pretrained)
        assert torch.equal(state_of(came)["user"], fresh.store.state["user"][:8])
    nothing = simulator.trained_run.with_new_users({"no items": []}, 5)
    for name, values in state_of(nothing).items():
        assert torch.equal(values, state_of(came, 0)[name])


def test_by_default_they_train_as_often_as_others_did(simulator: Simulator, later: Dataset) -> None:
    """Two rounds of 9 of 15 clients: 1.2 times."""
    run = simulator.trained_run
    for name, values in state_of(run.with_new_users(later)).items():
        assert torch.equal(values, state_of(run.with_new_users(later, 1))[name])


@pytest.mark.parametrize("backbone", CASES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_serves_new_users_as_the_run_at_hand(
    pretrained: Pretrained, later: Dataset, tmp_path: Path, backbone: str, finished: bool
) -> None:
    members = make_dataset().of_users(range(15))
    simulator = Simulator(config_of(backbone), members, pretrained=pretrained, out=tmp_path)
    if finished:
        simulator.run()
    else:
        simulator.stop()
        with pytest.raises(Interrupted):
            simulator.run()
    kept, live = (
        load_run(tmp_path, members).with_new_users(later),
        simulator.trained_run.with_new_users(later),
    )
    for name, values in state_of(live).items():
        assert torch.equal(state_of(kept)[name], values)
    assert kept.evaluate().means() == live.evaluate().means()


def test_the_folder_of_a_flower_server_serves_new_users(
    pretrained: Pretrained, later: Dataset, tmp_path: Path
) -> None:
    """It has no clients' state, and does not know the data."""
    members = make_dataset().of_users(range(15))
    simulator = Simulator(config_of("pfedrec"), members, pretrained=pretrained, out=tmp_path)
    simulator.run()
    model, summary = tmp_path / "model.safetensors", tmp_path / "summary.json"
    tensors = {name: value for name, value in load_file(model).items() if not name.startswith("clients.")}
    save_file(tensors, model)
    summary.write_text(json.dumps({"rounds": 3, "HR@10": 0.5}))
    with pytest.raises(ValueError, match=r"Flower server, .*it can serve new users"):
        load_run(tmp_path, members)
    server = load_server(tmp_path, members)
    for name, values in state_of(simulator.trained_run.with_new_users(later, 2)).items():
        assert torch.equal(state_of(server.with_new_users(later, 2))[name], values)
    with pytest.raises(ValueError, match=r"do not fit config\.yaml and the data"):
        load_server(tmp_path, make_dataset(items=61))


def test_what_does_not_fit_is_refused(
    simulator: Simulator, later: Dataset, pretrained: Pretrained, tmp_path: Path
) -> None:
    run = simulator.trained_run
    with pytest.raises(ValueError, match=r"no item with the id 'i600'; did you mean 'i60?0?'"):
        run.with_new_users({"new": ["i1", "i600"]})
    with pytest.raises(IndexError, match="expected items 0 to 59, got 60"):
        run.with_new_users({"new": [60]})
    with pytest.raises(ValueError, match="at least one, got none"):
        run.with_new_users({})
    for rounds in (-1, True):
        with pytest.raises(ValueError, match=f"rounds: expected at least 0, got {rounds}"):
            run.with_new_users(later, rounds)
    with pytest.raises(
        ValueError, match=r"20 items of data set 'tiny' not in the catalogue .* such as 'i60'"
    ):
        run.with_new_users(make_dataset(items=80))


def test_diverging_is_an_error(pretrained: Pretrained, later: Dataset) -> None:
    config = config_of("fedmf", **{"training.lr": 1e200})
    simulator = Simulator(config, make_dataset().of_users(range(15)), pretrained=pretrained)
    with pytest.raises(FloatingPointError, match="diverged in round"):
        simulator.trained_run.with_new_users(later, 5)


def test_files_of_a_version_without_the_start_are_refused(
    pretrained: Pretrained, later: Dataset, tmp_path: Path
) -> None:
    members = make_dataset().of_users(range(15))
    Simulator(config_of("pfedrec"), members, pretrained=pretrained, out=tmp_path).run()
    model = tmp_path / "model.safetensors"
    tensors = {name: value for name, value in load_file(model).items() if not name.startswith("starts.")}
    save_file(tensors, model)
    run = load_run(tmp_path, members)
    run.recommend(np.arange(15))
    with pytest.raises(ValueError, match=r"what new users start from \(mlp.*train the run again"):
        run.with_new_users(later)
