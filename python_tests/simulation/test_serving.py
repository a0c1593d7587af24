"""A run in use: recommendations against the evaluator and brute force, folders, errors, exported models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_federation import make_dataset, small_config

from fedpeft_ext.config import Config, EvaluationConfig
from fedpeft_ext.data import Dataset, popularity_scores
from fedpeft_ext.export import plain_decompositions
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Interrupted, Simulator, TrainedRun, evaluation, load_run, popularity_run
from fedpeft_ext.simulation.evaluation import rank_counts, user_metrics
from fedpeft_ext.simulation.serving import UserMetrics, best_columns

ROUNDS = 4
CASES: dict[str, dict[str, Any]] = {
    "fedmf": {"embedding.name": "p-rq", "embedding.warm_start_codebooks": True},
    "fedncf": {"embedding.name": "p-hash+senet+lora", "training.warmup_rounds": 2, "backbone.hidden": [8, 4]},
    "pfedrec": {"embedding.name": "full", "backbone.hidden": [8]},
    "fedpergnn": {"embedding.name": "p-lora", "training.warmup_rounds": ROUNDS, "dtype": "float64"},
}


def config_of(backbone: str) -> Config:
    return small_config(**{"backbone.name": backbone, "training.rounds": ROUNDS, **CASES[backbone]})


@pytest.fixture(scope="module")
def held() -> Dataset:
    return make_dataset(validation=True)


@pytest.fixture(params=CASES, scope="module")
def folder(
    request: pytest.FixtureRequest,
    held: Dataset,
    pretrained: Pretrained,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of a finished run, not to be changed."""
    out = tmp_path_factory.mktemp("serving") / "run"
    config = config_of(request.param)
    Simulator(config, held, pretrained=pretrained, out=out).run()
    return out


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


@pytest.fixture
def trained(folder: Path, held: Dataset) -> TrainedRun:
    return load_run(folder, held)


def unfinished(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "model.safetensors").unlink()


def test_recommendations_hit_as_often_as_the_evaluator_says(
    copied: Path, held: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    users = np.flatnonzero(held.test_items >= 0)
    run = load_run(folder, held)
    assert (run.round, run.config.backbone.name) == (ROUNDS, run.model.name)
    ranked = run.recommend(users)
    hits = (ranked.items.numpy() == held.test_items[users, None]).any(1)
    assert hits.mean() == metrics["full/HR@10"]
    assert (ranked.scores.diff(dim=1) <= 0).all()

    # The same one by one, by external id, and from the checkpoint of a run that is not finished.
    monkeypatch.setattr(evaluation, "BLOCK_BYTES", 1)
    unfinished(folder)
    again = load_run(folder, held).recommend([held.user_ids[user] for user in users])
    torch.testing.assert_close(again.items, ranked.items)
    torch.testing.assert_close(again.scores, ranked.scores)


def test_a_run_is_evaluated_again(trained: TrainedRun, folder: Path, held: Dataset) -> None:
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    found, held_out = trained.evaluate(), trained.evaluate(target="valid").means()
    assert (
        found.means() | {f"valid/{name}": held_out[name] for name in held_out if "/" not in name} == metrics
    )
    users, values = found
    assert users.tolist() == np.flatnonzero(held.test_items >= 0).tolist()
    hits = (trained.recommend(users, 3).items == torch.from_numpy(held.test_items)[users, None]).any(1)
    other = trained.evaluate(EvaluationConfig(ks=(3,), num_negatives=5))
    assert other.values["full/HR@3"].tolist() == hits.double().tolist()
    assert (other.values["HR@3"] >= hits).all()  # fewer candidates
    assert len(values["MRR"]) == len(users)


def test_popularity_ranks_as_its_counts_do(trained: TrainedRun, held: Dataset) -> None:
    found = popularity_run(trained).evaluate()
    times = torch.from_numpy(popularity_scores(held))
    seed = trained.config.evaluation.candidate_seed(trained.config.seed)
    negatives = trained.config.evaluation.num_negatives
    scores = times[torch.from_numpy(held.candidates(found.users.numpy(), negatives, seed))]
    expected = user_metrics(*rank_counts(scores, scores[:, 0]), trained.config.evaluation.ks)
    for name, values in expected.items():
        torch.testing.assert_close(found.values[name], values)
    assert found.values.keys() == trained.evaluate().values.keys()


def test_users_are_grouped_by_counts() -> None:
    counts = torch.tensor([0, 7, 2, 1, 2, 3])
    found = UserMetrics(torch.arange(10, 16), {"HR@3": torch.tensor([1.0, 0, 0, 1, 1, 1])})
    groups = found.grouped(counts, [0, 2, 5])
    assert {name: group.users.tolist() for name, group in groups.items()} == {
        "0": [10], "1-2": [12, 13, 14], "3-5": [15], "6+": [11],
    }  # fmt: skip
    assert groups["1-2"].means() == {"HR@3": pytest.approx(2 / 3)}
    assert list(found.grouped(counts, [9, 10])) == ["0-9"]
    for bounds in ([], [-1], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match="bounds: expected rising counts"):
            found.grouped(counts, bounds)
    with pytest.raises(ValueError, match=r"counts: expected \[6\], got \[5\]"):
        found.grouped(counts[1:], [0])


def test_a_run_in_its_warm_up_can_be_used(held: Dataset, pretrained: Pretrained, tmp_path: Path) -> None:
    config = config_of("fedpergnn")
    simulator = Simulator(config, held, pretrained=pretrained, out=tmp_path)
    simulator.stop()
    with pytest.raises(Interrupted):
        simulator.run()
    users = np.flatnonzero(held.test_items >= 0)
    live = simulator.trained_run.recommend(users)
    assert simulator.model.training  # as its next round relies on
    run = load_run(tmp_path, held)
    assert torch.equal(run.recommend(users).items, live.items)
    hits = (live.items.numpy() == held.test_items[users, None]).any(1)
    assert (run.round, hits.mean()) == (0, simulator.evaluate()["full/HR@10"])


def test_what_a_user_met_is_left_out(trained: TrainedRun, held: Dataset) -> None:
    everything = trained.recommend(range(held.num_users), held.num_items, exclude_met=False)
    assert (everything.items.sort(1).values == torch.arange(held.num_items)).all()
    left = trained.recommend(range(held.num_users), held.num_items)
    for user in range(held.num_users):
        met = {*held.positives()[1][held.indptr[user] : held.indptr[user + 1]], held.valid_items[user]}
        best = [item for item in everything.items[user].tolist() if item not in met]
        rest = held.num_items - len(best)
        assert left.items[user].tolist() == best + [-1] * rest
        assert left.scores[user, len(best) :].tolist() == [-np.inf] * rest


def test_of_equal_scores_the_lower_number_comes_first() -> None:
    scores = torch.randint(3, (50, 40), generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 7, 40):
        columns, values = best_columns(scores, k)
        expected = torch.from_numpy(np.argsort(-scores.numpy(), 1, kind="stable")[:, :k])
        assert torch.equal(columns, expected)
        assert torch.equal(values, scores.gather(1, expected))


OPS = "fedpeft_ext"


def names_of_ops(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    ("folder", "merge"),
    [*((name, True) for name in CASES), ("fedmf", False), ("fedncf", False)],
    indirect=["folder"],
)
def test_the_model_of_a_device_scores_alike_and_exports(trained: TrainedRun, merge: bool) -> None:
    ranked = trained.recommend("u3", 60, exclude_met=False)
    model = trained.client_model("u3", merge=merge)
    items = ranked.items[0]
    torch.testing.assert_close(model(items), ranked.scores[0])
    if merge:
        assert type(model.model.item_embedding).__name__ == "FullEmbedding"
    several = {0: torch.export.Dim("items", min=2)}
    program = torch.export.export(model, (items[:5],), dynamic_shapes=(several,))
    assert any(name.startswith(OPS) for name in names_of_ops(program))
    plain = program.run_decompositions(plain_decompositions())
    assert {name.partition(".")[0] for name in names_of_ops(plain)} <= {"aten", "<built-in function getitem>"}
    for exported in (program, plain):
        torch.testing.assert_close(exported.module()(items), ranked.scores[0])


@pytest.mark.parametrize("folder", ["fedmf"], indirect=True)
def test_errors_say_what_is_wrong(copied: Path, held: Dataset) -> None:
    folder = copied
    run = load_run(folder, held)
    with pytest.raises(ValueError, match="no user with the id 'nobody'; ids are such as 'u0'"):
        run.recommend(["u1", "nobody"])
    with pytest.raises(IndexError, match=r"expected 0 to 22.*got 23"):
        run.recommend([3, 23])
    for k in (0, 61):
        with pytest.raises(ValueError, match=f"k: expected 1 to 60, the number of items, got {k}"):
            run.recommend(0, k)
    with pytest.raises(FileNotFoundError, match="finished run"):
        load_run(folder / "none", held)
    for finished in (True, False):
        if not finished:
            unfinished(folder)
        with pytest.raises(ValueError, match=r"on other data than 'tiny' .*--start-from .* --rounds 0"):
            load_run(folder, make_dataset(validation=True, seed=1))


@pytest.mark.parametrize("folder", ["pfedrec"], indirect=True)
def test_folders_that_cannot_serve_are_refused(copied: Path, held: Dataset) -> None:
    folder = copied
    config, model, summary = (folder / name for name in ("config.yaml", "model.safetensors", "summary.json"))
    tensors, text = load_file(model), summary.read_text()
    config.write_text(config.read_text().replace("hidden:\n  - 8", "hidden:\n  - 4"))
    with pytest.raises(ValueError, match=r"do not fit config.yaml.*clients.*\(23, 4, 8\)"):
        load_run(folder, held)
    config.write_text(config.read_text().replace("name: full", "name: p-lora"))
    with pytest.raises(ValueError, match=r"do not fit config.yaml.*item_embedding.weight"):
        load_run(folder, held)
    # As a Flower server leaves it.
    save_file({name: value for name, value in tensors.items() if not name.startswith("clients.")}, model)
    summary.write_text(json.dumps({"rounds": ROUNDS, "HR@10": 0.5}))
    with pytest.raises(ValueError, match="Flower server, whose users' vectors"):
        load_run(folder)
    summary.write_text(text)
    model.write_bytes(model.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_run(folder, held)
