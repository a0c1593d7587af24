"""Studies on tiny synthetic data: grids, resuming, arrivals, choice by pilots, and the page of `report`."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from fedpeft_ext.config import Config, load_config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.experiments import runner
from fedpeft_ext.experiments.intervals import half_width, paired_differences
from fedpeft_ext.experiments.report import write_report
from fedpeft_ext.experiments.results import RunResult
from fedpeft_ext.experiments.runner import DIVERGED, fingerprint, run_name
from fedpeft_ext.experiments.studies import (
    STUDIES,
    Context,
    StudyOptions,
    new_items,
    new_users,
    run_study,
    study_by_name,
)
from fedpeft_ext.experiments.studies.new_items import split_arrivals, train_with_arrivals
from fedpeft_ext.experiments.studies.new_users import split_users, train_without_some
from fedpeft_ext.experiments.studies.output import shown
from fedpeft_ext.experiments.studies.select import bytes_up, rungs
from fedpeft_ext.experiments.studies.study import Variant, first_reaching
from fedpeft_ext.simulation import Simulator, UserMetrics, rank_counts, ranking_metrics

DATA = {"num_users": 50, "num_items": 210, "interactions_per_user": 10, "validation": True}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("synthetic", **DATA)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    cache = tmp_path_factory.mktemp("cache")
    return Config().updated(
        [
            "dataset.name=synthetic",
            "backbone.dim=8",
            "embedding.codebook_size=16",
            "embedding.table_size=24",
            "pretrain.epochs=2",
            "pretrain.code_epochs=2",
            f"pretrain.cache_dir={cache}",
            "training.rounds=4",
            "evaluation.every=2",
        ]
    )


def context(config: Config, dataset: Dataset, runs: Path, seeds: int = 2, **options: object) -> Context:
    return Context(config, dataset, runs, seeds, StudyOptions(**options))  # type: ignore[arg-type]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_table2_tabulates_every_pair_and_goes_on_where_it_stopped(
    config: Config, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"backbones": ("fedmf",), "embeddings": ("full", "p-rq")}
    first = context(config, dataset, tmp_path / "runs", **options)
    findings, files = run_study(STUDIES["table2"], first, tmp_path / "out")
    assert files[0].name == "table2.md"
    runs = rows_of(tmp_path / "out" / "runs.csv")
    assert len(runs) == 2 * 2
    table = rows_of(tmp_path / "out" / "table2.csv")
    assert [(row["backbone"], row["embedding"]) for row in table] == [
        (backbone, embedding) for backbone in options["backbones"] for embedding in options["embeddings"]
    ]
    for row in table:
        values = [
            float(run["HR@10"])
            for run in runs
            if (run["backbone"], run["embedding"]) == (row["backbone"], row["embedding"])
        ]
        assert float(row["HR@10"]) == pytest.approx(np.mean(values))
        assert float(row["HR@10 sd"]) == pytest.approx(np.std(values, ddof=1))
        assert float(row["HR@10 ci95"]) == pytest.approx(12.7062 / 2**0.5 * np.std(values, ddof=1))
    assert {picture.name for picture in findings.pictures} == {"table2-fedmf"}

    # One run is lost; the others are not trained again.
    folder = tmp_path / "runs" / runs[0]["run"]
    before = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    trained: list[str] = []
    simulate = Simulator.run
    monkeypatch.setattr(
        runner.Simulator, "run", lambda self: (trained.append(self.config.embedding.name), simulate(self))[1]
    )
    run_study(STUDIES["table2"], context(config, dataset, tmp_path / "runs", **options), tmp_path / "again")
    assert trained == ["full"]
    assert json.loads((folder / "summary.json").read_text())["metrics"] == before["metrics"]
    assert (tmp_path / "again" / "table2.csv").read_text() == (tmp_path / "out" / "table2.csv").read_text()


def test_runs_are_named_by_all_that_their_result_depends_on(
    config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    data = fingerprint(dataset)
    name = run_name(config, data)
    assert name.startswith("fedmf-p-rq-seed0-")
    for neutral in ("threads=1", "chunk_memory_mb=8", "pretrain.cache=false", "dataset.name=elsewhere"):
        assert run_name(config.updated([neutral]), data) == name
    for setting in ("seed=1", "training.lr=0.5", "embedding.levels=2", "training.rounds=5"):
        assert run_name(config.updated([setting]), data) != name
    other = load_dataset("synthetic", **DATA | {"seed": 1})
    assert run_name(config, fingerprint(other)) != name
    features = tmp_path / "features.npy"
    given = config.updated([f"pretrain.features={features}"])
    names = []
    for value in (0.0, 1.0):
        np.save(features, np.full((210, 4), value, np.float32))
        names.append(run_name(given, data))
    assert names[0] != names[1]


def test_a_run_that_diverges_is_a_row_without_values(
    config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    settings = ("embedding.name=full", "training.optimizer=sgd", "training.lr=1e30")
    made = context(config, dataset, tmp_path / "runs", seeds=1)
    variants = [Variant({"lr": "huge"}, settings), Variant({"lr": "usual"}, ("embedding.name=full",))]
    trained = made.train(variants)
    assert [result is None for result in trained.results] == [True, False]
    means = trained.means(["HR@10"])
    assert means["HR@10"][0] is None
    assert means["diverged"].to_list() == [1, 0]
    headings, rows = shown(means)
    assert rows[0][headings.index("HR@10 %")] == "–"
    assert (tmp_path / "runs" / trained.names[0] / DIVERGED).is_file()
    assert made.train(variants).results[0] is None  # from its file


def test_columns_are_shown_with_their_units() -> None:
    frame = pl.DataFrame(
        {"embedding": ["p-rq"], "full/HR@10": [0.1234], "bytes_up": [49_152], "saving": [0.7717]}
    )
    headings, rows = shown(frame)
    assert headings == ["embedding", "HR@10 %, all items", "KB up", "saved against Full"]
    assert rows == [["p-rq", "12.34", "49.2", "77.2%"]]


def test_large_numbers_are_shown_without_exponents() -> None:
    frame = pl.DataFrame({"rounds": [66.666, 0.00012345], "MB": [35210.4, 999.96]})
    assert shown(frame)[1] == [["66.67", "35,210"], ["0.0001234", "1000"]]


def test_communication_counts_bytes_to_an_accuracy(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    made = context(config, dataset, tmp_path / "runs", embeddings=("full", "c-hash"))
    run_study(STUDIES["communication"], made, tmp_path)
    goals = rows_of(tmp_path / "communication-goals.csv")
    assert [row["goal"] for row in goals] == ["90%", "95%", "100%"] * 2
    full = made.all_runs[0].results[0]
    assert full is not None
    # 10% of 50 clients send and get the table each round.
    assert dict(full.bytes_until())[4] == 4 * 5 * 2 * 210 * 8 * 4
    means = {row["embedding"]: float(row["HR@10"]) for row in rows_of(tmp_path / "communication-sizes.csv")}
    other = context(config, dataset, tmp_path / "runs", embeddings=("c-hash", "full"))  # in any order
    findings, _ = run_study(STUDIES["communication"], other, tmp_path)
    assert f"Full ends with {100 * means['full']:.2f}%" in findings.tables[1].note
    assert first_reaching(full, "HR@10", 0.0) == (2, 2 * 5 * 2 * 210 * 8 * 4)
    assert first_reaching(full, "HR@10", 1.1) is None
    with pytest.raises(ValueError, match="expected 'full' among them"):
        run_study(
            STUDIES["communication"],
            context(config, dataset, tmp_path / "r", embeddings=("p-rq",)),
            tmp_path / "o",
        )
    assert not (tmp_path / "r").exists()


def test_arrivals_renumber_items_and_keep_interactions(dataset: Dataset) -> None:
    before, after = split_arrivals(dataset, 0.1, seed=3)
    assert (before.num_items, after.num_items) == (189, 210)
    assert before.item_ids == after.item_ids[:189]
    assert sorted(after.item_ids) == sorted(dataset.item_ids)
    for user in range(dataset.num_users):

        def ids(data: Dataset, user: int = user) -> list[str]:
            rows = data.indices[data.indptr[user] : data.indptr[user + 1]]
            return [data.item_ids[item] for item in rows]

        assert ids(after) == ids(dataset)
        assert ids(before) == [item for item in ids(dataset) if item in set(before.item_ids)]
        test = dataset.item_ids[dataset.test_items[user]]
        assert after.item_ids[after.test_items[user]] == test
        expected = before.item_ids.index(test) if test in before.item_ids else -1
        assert before.test_items[user] == expected
    assert after.item_text is not None
    assert dataset.item_text is not None
    place = dataset.item_ids.index(after.item_ids[-1])
    assert after.item_text[-1] == dataset.item_text[place]


@pytest.mark.parametrize("embedding", ["full", "p-rq+lora"])
def test_arrivals_train_on_with_old_and_new_items(config: Config, dataset: Dataset, embedding: str) -> None:
    settings = config.updated([f"embedding.name={embedding}", "backbone.name=pfedrec"])
    result = train_with_arrivals(settings, dataset)
    assert [place["round"] for place in result["curve"]] == [2, 4]
    assert result["known"] == 189
    for values in (*result["curve"], result["start"]):
        assert 0 <= values["old HR@10"] <= 1
        assert 0 <= values["new HR@10"] <= 1
    assert result == train_with_arrivals(settings, dataset)


@pytest.mark.parametrize("embedding", ["c-hash", "p-rq"])
def test_users_come_when_the_training_is_over(config: Config, dataset: Dataset, embedding: str) -> None:
    settings = config.updated([f"embedding.name={embedding}", "backbone.name=pfedrec"])
    result = train_without_some(settings, dataset)
    here, later = split_users(50, 0.2, 0)
    assert sorted([*here, *later]) == list(range(50))
    assert len(later) == 10
    # Those who took part, as a run of them alone says; the others with its model, after each number of times.
    members, newcomers = Simulator(settings, dataset.of_users(here)), dataset.of_users(later)
    assert result["others"]["HR@10"] == members.run().metrics["HR@10"]
    for place in result["curve"]:
        came = members.trained_run.with_new_users(newcomers, place["rounds"]).evaluate().means()
        assert {name: came[name] for name in result["others"]} == {
            name: value for name, value in place.items() if name != "rounds"
        }
    # A run of all, one user after the other, among the candidates of the newcomers.
    whole = Simulator(settings, dataset)
    whole.run()
    scores = []
    for number, user in enumerate(later.tolist()):
        candidates = newcomers.candidates([number], settings.evaluation.num_negatives, settings.seed)[0]
        scores.append(whole.trained_run.client_model(user)(torch.from_numpy(candidates)))
    ranked = torch.stack(scores)
    expected = ranking_metrics(*rank_counts(ranked, ranked[:, 0]), [10])
    assert {name: result["took part"][name] for name in expected} == pytest.approx(expected)
    assert [place["rounds"] for place in result["curve"]] == list(new_users.ROUNDS)
    assert result == train_without_some(settings, dataset)
    assert {*result["took part"]} == {*result["others"]} == {*result["curve"][0]} - {"rounds"}


def test_new_users_tells_of_every_embedding(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    made = context(config, dataset, tmp_path / "runs", embeddings=("full", "p-lora"))
    findings, files = run_study(STUDIES["new-users"], made, tmp_path / "out")
    (table,) = findings.tables
    assert table.frame["embedding"].to_list() == ["full", "p-lora"]
    runs = rows_of(tmp_path / "out" / "runs.csv")
    for column in ("others HR@10", "new HR@10 after 5", "new HR@10 had they taken part"):
        values = [float(row[column]) for row in runs[:2]]
        assert table.frame[column][0] == pytest.approx(np.mean(values))
        assert table.frame[f"{column} sd"][0] == pytest.approx(np.std(values, ddof=1))
    assert "new-users.png" in {file.name for file in files}
    with pytest.raises(ValueError, match="at least 2 users"):
        split_users(1, 0.2, 0)


def test_new_items_writes_every_run_and_passes_over_one_that_diverges(
    config: Config, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context(config, dataset, tmp_path / "runs", embeddings=("full", "p-lora"))
    train = new_items.train_with_arrivals

    def fails(settings: Config, data: Dataset) -> dict[str, Any]:
        if settings.embedding.name == "full" and settings.seed == 0:
            raise FloatingPointError("training diverged")
        return train(settings, data)

    monkeypatch.setattr(new_items, "train_with_arrivals", fails)
    findings, _ = run_study(STUDIES["new-items"], made, tmp_path / "out")
    full, lora = findings.tables[0].frame.rows(named=True)
    assert (full["seeds"], full["diverged"], lora["diverged"]) == (2, 1, 0)
    runs = rows_of(tmp_path / "out" / "runs.csv")
    assert [row["diverged"] for row in runs] == ["true", "false", "false", "false"]
    column = "new HR@10 at the end"
    assert full[column] == pytest.approx(float(runs[1][column]))
    assert full[f"{column} sd"] is None
    assert lora[column] == pytest.approx(np.mean([float(row[column]) for row in runs[2:]]))

    monkeypatch.setattr(new_items, "train_with_arrivals", None)  # started again it trains nothing
    again, _ = run_study(STUDIES["new-items"], made, tmp_path / "out")
    assert again.tables[0].frame.equals(findings.tables[0].frame)


def test_a_study_keeps_out_of_folders_with_other_results(
    config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    made = context(config, dataset, tmp_path / "runs", seeds=1, embeddings=("c-hash",))
    for _ in range(2):
        run_study(STUDIES["hybrid"], made, tmp_path / "hybrid")
    before = {file: file.read_bytes() for file in (tmp_path / "hybrid").iterdir()}
    with pytest.raises(FileExistsError, match=r"of a study sensitivity, but .* holds the study hybrid"):
        run_study(STUDIES["sensitivity"], made, tmp_path / "hybrid")
    assert {file: file.read_bytes() for file in (tmp_path / "hybrid").iterdir()} == before
    (run,) = (tmp_path / "runs").iterdir()
    with pytest.raises(FileExistsError, match="holds a run"):
        run_study(STUDIES["hybrid"], made, run)
    (tmp_path / "compare.json").touch()
    with pytest.raises(FileExistsError, match="holds a comparison"):
        run_study(STUDIES["hybrid"], made, tmp_path)


def test_communication_without_a_goal_still_tells_what_is_sent(
    config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    settings = config.updated(["training.optimizer=sgd", "training.lr=1e30"])
    made = context(settings, dataset, tmp_path / "runs", seeds=1, embeddings=("full",))
    findings, _ = run_study(STUDIES["communication"], made, tmp_path / "out")
    sizes, goals = findings.tables
    assert sizes.frame["diverged"].to_list() == [1]
    assert goals.frame["seeds that reach it"].to_list() == [0, 0, 0]
    assert "diverged" in goals.note


def test_new_items_need_text_and_rounds_after_the_arrival(config: Config, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="expected tfidf or sentence-transformers"):
        train_with_arrivals(config.updated(["pretrain.features=random"]), dataset)
    with pytest.raises(ValueError, match="twice the 3 warm-up rounds, got 4"):
        train_with_arrivals(config.updated(["training.warmup_rounds=3"]), dataset)


@pytest.mark.parametrize("metric", ["HR@10", "full/NDCG@5"])
def test_select_keeps_to_the_budget_and_explains_its_choice(
    config: Config, dataset: Dataset, tmp_path: Path, metric: str
) -> None:
    config = config.updated([f"evaluation.select_by={metric}", "evaluation.every=1"])
    made = context(config, dataset, tmp_path / "runs", seeds=1, budget_kb=4.2)
    findings, _ = run_study(STUDIES["select"], made, tmp_path)
    grid = rows_of(tmp_path / "select-grid.csv")
    assert all(int(row["bytes_up"]) <= 4200 for row in grid)
    pilots = rows_of(tmp_path / "select-pilots.csv")
    for rung in {row["rung"] for row in pilots}:
        own = [row for row in pilots if row["rung"] == rung]
        values = [float(row[f"valid/{metric}"]) for row in own]
        assert values == sorted(values, reverse=True)
        assert sum(row["goes on"] == "yes" for row in own) == -(-len(own) // 3)
    for trained in made.all_runs[:-1]:
        for result in (result for result in trained.results if result is not None):
            best = max(values[f"valid/{metric}"] for values in result.summary.evaluations)
            assert str(best) in {row[f"valid/{metric}"] for row in pilots}
    chosen = next(row for row in pilots if row["rung"] == pilots[-1]["rung"])
    assert f"Chosen: {chosen['embedding']} with {chosen['size']}" in findings.answers[0]
    assert re.search(r"Check: .* number \d+ of 5 ", findings.answers[-1])
    run = next(r for r in made.all_runs[-1].results if r is not None)
    assert bytes_up(config.updated(made.all_runs[-1].variants[0].settings), dataset) == run.summary.bytes_up
    with pytest.raises(ValueError, match=r"at least 0\.9 KB.*p-lora, rank 1.*got 0\.5"):
        STUDIES["select"].run(context(config, dataset, tmp_path / "runs", budget_kb=0.5))


def test_rungs_end_with_one() -> None:
    assert rungs(12, 270) == [(12, 10), (4, 30), (2, 90)]
    assert rungs(1, 90) == []
    assert all(rounds >= 1 for _, rounds in rungs(100, 3))


@pytest.mark.parametrize("name", ["hybrid", "warm-start", "pretraining"])
def test_other_grids_fill_their_tables(config: Config, dataset: Dataset, tmp_path: Path, name: str) -> None:
    embeddings = ("c-rq",) if name == "warm-start" else ("p-rq",)
    made = context(config, dataset, tmp_path / "runs", seeds=1, embeddings=embeddings)
    findings, files = run_study(STUDIES[name], made, tmp_path)
    assert all(file.is_file() and file.stat().st_size for file in files)
    assert all(table.frame.height for table in findings.tables)


def test_privacy_tells_epsilon_where_there_is_one(
    config: Config, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"cdp": (4.0, 8.0), "ldp": (4.0,)}  # accounting for weak noise takes long
    monkeypatch.setattr("fedpeft_ext.experiments.studies.privacy.MULTIPLIERS", few)
    made = context(config, dataset, tmp_path / "runs", seeds=3, embeddings=("p-rq",))
    findings, files = run_study(STUDIES["privacy"], made, tmp_path)
    assert all(file.is_file() and file.stat().st_size for file in files)
    rows = findings.tables[0].frame.select("privacy", "noise", "epsilon").rows()
    assert [privacy for privacy, _, epsilon in rows if epsilon is None] == ["none", "clipping"]
    weaker, stronger, local = (epsilon for *_, epsilon in rows if epsilon is not None)
    assert local > weaker > stronger > 0
    each = made.all_runs[0].frame().filter(pl.col("privacy") == "ldp")["epsilon"]
    assert each.min() < each.max() == local  # of the seed whose busiest client was chosen most often


@pytest.mark.parametrize("name", ["sensitivity", "privacy"])
def test_sweeps_validate_every_run_before_the_first(
    config: Config, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[Config] = []

    def note(configs: list[Config], *rest: object, **more: object) -> list[None]:
        asked.extend(configs)
        return [None] * len(configs)

    monkeypatch.setattr("fedpeft_ext.experiments.studies.study.run_all", note)
    embeddings = ("p-rq", "p-lora", "c-hash+senet")
    made = context(config, dataset, tmp_path / "runs", seeds=1, embeddings=embeddings)
    findings, _ = run_study(STUDIES[name], made, tmp_path)
    assert not findings.pictures  # since nothing was trained
    expected = 25 + 8 + 12 if name == "sensitivity" else 3 * (2 + 5 + 4)
    assert len(asked) == len({run_name(settings, "") for settings in asked}) == expected


def test_grid_trains_every_combination(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    vary = ("training.lr=1e-2,0.5", "training.batch_size=null,3")
    made = context(config, dataset, tmp_path / "runs", 1, embeddings=("c-hash", "c-lora"), vary=vary)
    findings, files = run_study(STUDIES["grid"], made, tmp_path, pdf=True)
    table = findings.tables[0].frame
    assert table.select("embedding", "lr", "batch_size").rows() == list(
        product(("c-hash", "c-lora"), (0.01, 0.5), ("null", "3"))
    )
    for run in rows_of(tmp_path / "runs.csv"):
        settings = load_config(tmp_path / "runs" / run["run"] / "config.yaml")
        size = settings.training.batch_size
        assert (settings.embedding.name, settings.training.lr) == (run["embedding"], float(run["lr"]))
        assert str(size or "null") == run["batch_size"]
    best = table.row(table["valid/HR@10"].arg_max() or 0, named=True)
    chosen = f"embedding {best['embedding']}, lr {best['lr']}, batch_size {best['batch_size']}"
    assert findings.answers[0].startswith(f"Best by valid/HR@10: {chosen} (")
    assert [file.name for file in files[-3:]] == ["grid.png", "grid.pdf", "runs.csv"]
    drawn = (tmp_path / "grid.pdf").read_bytes()
    assert drawn.startswith(b"%PDF")
    assert b"Type3" not in drawn


@pytest.mark.parametrize("metric", ["HR@10", "full/NDCG@5"])
def test_grid_takes_the_best_round(config: Config, dataset: Dataset, tmp_path: Path, metric: str) -> None:
    """Of each run by validation items, with the test items' metrics of that round; without them the last."""
    changes = ["training.lr=0.5", "training.rounds=8", "evaluation.every=1", f"evaluation.select_by={metric}"]
    settings, vary = config.updated(changes), ("training.local_epochs=1,5",)
    made = context(settings, dataset, tmp_path / "runs", 1, embeddings=("c-hash",), vary=vary)
    findings, _ = run_study(STUDIES["grid"], made, tmp_path)
    judge = f"valid/{metric}"
    bests = []
    for row, run in zip(
        findings.tables[0].frame.rows(named=True), rows_of(tmp_path / "runs.csv"), strict=True
    ):
        folder = tmp_path / "runs" / run["run"]
        rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        best = max(rounds, key=lambda line: line[judge])
        assert int(run["best_round"]) == best["round"] < 8
        assert {name: row[name] for name in (judge, metric, "HR@10")} == {
            name: best[name] for name in (judge, metric, "HR@10")
        }
        bests.append(best[judge])
    assert f"({100 * max(bests):.2f}%)" in findings.answers[0]
    assert f"best round by {judge}" in findings.tables[0].note

    plain = load_dataset("synthetic", **DATA | {"validation": False})
    made = context(settings, plain, tmp_path / "plain", 1, embeddings=("c-hash",), vary=vary)
    findings = STUDIES["grid"].run(made)
    assert not findings.answers
    assert "those of the last round" in findings.tables[0].note
    last = [result.metrics[metric] for result in made.all_runs[0].results if result is not None]
    assert findings.tables[0].frame[metric].to_list() == last


def test_grid_names_the_backbone_that_was_trained(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    vary = ("training.lr=1e-2,0.5",)
    options = {"backbones": ("fedpergnn",), "embeddings": ("c-hash",), "vary": vary}
    findings, _ = run_study(
        STUDIES["grid"], context(config, dataset, tmp_path / "runs", 1, **options), tmp_path
    )
    assert findings.pictures[0].caption.startswith("fedpergnn on ")
    assert findings.tables[0].note.startswith("Of the settings above training.lr vary.")


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ((), "at least one"),
        (("embedding.rank",), "KEY=VALUE,VALUE"),
        (("embedding.rank=",), "KEY=VALUE,VALUE"),
        (("embedding.rank=[1",), "expected a YAML value"),
        (("embedding.rank=1,1",), "each value once"),
        (("embedding.rank=1", "embedding.rank=2"), "each setting once"),
        (("seed=1,2",), "seeds are those of --seeds"),
        (("dataset.name=a,b",), "all runs share the data"),
        (("embedding.rnk=1,2",), "embedding.rnk: unknown key"),
    ],
)
def test_grid_refuses_what_it_cannot_vary(
    config: Config, dataset: Dataset, tmp_path: Path, vary: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_study(STUDIES["grid"], context(config, dataset, tmp_path / "runs", 1, vary=vary), tmp_path)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.70620), (2, 4.30265), (3, 3.18245), (4, 2.77645), (30, 2.04227)]
)
def test_intervals_of_student(freedom: int, quantile: float) -> None:
    assert half_width(freedom + 1) * (freedom + 1) ** 0.5 == pytest.approx(quantile, abs=5e-6)


def test_paired_differences_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 50))
    ours, theirs = (UserMetrics(torch.arange(50), {"MRR": torch.from_numpy(v)}) for v in (first, second))
    mean, half = paired_differences(ours, theirs)["MRR"]
    low, high = stats.ttest_rel(first, second).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="theirs: expected metrics of the same users"):
        paired_differences(ours, theirs._replace(users=torch.arange(1, 51)))
    with pytest.raises(ValueError, match="ours: expected at least 2 users, got 1"):
        paired_differences(*[UserMetrics(torch.arange(1), {"MRR": torch.ones(1)})] * 2)


def test_unknown_studies_are_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'warm-start'"):
        study_by_name("warmstart")


class _Page(HTMLParser):
    """Tags that stay open, and addresses that are not on the page."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.anchors: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(f"#{value}")
            if name == "href" and value:
                self.links.add(value)
            if name == "src" and value and not value.startswith("data:image/png;base64,"):
                self.outside.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_page_that_loads_nothing(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    run_study(
        STUDIES["hybrid"],
        context(config, dataset, tmp_path / "study" / "runs", seeds=1, embeddings=("c-hash", "full")),
        tmp_path / "study",
    )
    Simulator(config.updated(["embedding.name=c-lora"]), dataset, out=tmp_path / "a <run>").run()
    page, sections = write_report(tmp_path, title="R & D")
    assert sections == 2  # the study's own runs are in its tables
    text = page.read_text(encoding="utf-8")
    parser = _Page()
    parser.feed(text)
    assert parser.open == []
    assert parser.outside == []
    assert parser.links == parser.anchors
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert text.count("data:image/png;base64,") == 2
    assert "a &lt;run&gt;" in text
    assert "R &amp; D" in text
    assert STUDIES["hybrid"].title in text


def test_report_refuses_what_it_cannot_show(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected one with results"):
        write_report(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="found none below"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"evaluations": []}')
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(tmp_path)


def test_results_are_read_back(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    summary = Simulator(config.updated(["embedding.name=c-hash"]), dataset, out=tmp_path / "run").run()
    result = RunResult.load(tmp_path / "run", full_bytes=100)
    assert json.loads(json.dumps(summary.as_dict())) == json.loads(json.dumps(result.summary.as_dict()))
    with pytest.raises(FileNotFoundError, match=r"no summary\.json"):
        RunResult.load(tmp_path, full_bytes=100)
    with pytest.raises(ValueError, match="expected that of the run's files"):
        RunResult(summary, 100).bytes_until()
