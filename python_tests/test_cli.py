"""The command line: files, precedence of settings, one-sentence errors and exit codes."""

from __future__ import annotations

import builtins
import csv
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner, Result

from fedpeft_ext import __version__
from fedpeft_ext.backbones import backbone_names
from fedpeft_ext.cli import _import_slowly, _tuned, app
from fedpeft_ext.config import Config, load_config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.experiments.progress import progress_display
from fedpeft_ext.experiments.studies import STUDIES
from fedpeft_ext.simulation import Simulator, TrainedRun, load_run, popularity_run, serving

SMALL = [
    "--dataset=synthetic",
    "--set=dataset.options={num_users: 40, num_items: 140, interactions_per_user: 8}",
    "--set=pretrain.features=random",
    "--set=training.clients_per_round=8",
    "--set=backbone.dim=8",
    "--set=embedding.codebook_size=8",
    "--set=evaluation.every=2",
    "--threads=1",
]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDPEFT_DEBUG", raising=False)
    monkeypatch.delenv("FEDPEFT_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def fedpeft(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args: str | Path) -> str:
    """The message of a command that must end with exit code 2, without a traceback."""
    result = fedpeft(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


def test_tuned_settings_are_pointed_out() -> None:
    for overrides, name in (
        ([], "ml-100k"),
        (["training.rounds=7"], "ml-100k"),
        (["dataset.name=ml-1m", "backbone.name=pfedrec"], "ml-1m-pfedrec"),
        (["dataset.name=ml-1m"], "ml-1m-tuned"),
        (["dataset.name=industrial"], "industrial"),
    ):
        assert f"--config {name} has" in str(_tuned(Config().updated(overrides)))
    for override in ("training.lr=0.1", "dataset.name=synthetic"):
        assert _tuned(Config().updated([override])) is None


def test_run_writes_a_readable_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = fedpeft("run", *SMALL, "--embedding", "p-lora", "--rounds", "4", "--seed", "3", "--out", out)
    assert result.exit_code == 0, result.output
    assert "HR@10" in result.stdout
    assert str(out) in result.stdout
    assert "round 4/4" in result.stderr
    config = load_config(out / "config.yaml")
    assert (config.embedding.name, config.training.rounds, config.seed) == ("p-lora", 4, 3)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 2, 4]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"]["HR@10"] == lines[-1]["HR@10"]
    with safe_open(out / "model.safetensors", "pt") as tensors:
        assert tensors.keys()


def test_a_run_repeats_from_its_own_config(tmp_path: Path) -> None:
    assert fedpeft("run", *SMALL, "-r", "2", "-q", "-o", tmp_path / "a").exit_code == 0
    assert fedpeft("run", "-c", tmp_path / "a" / "config.yaml", "-q", "-o", tmp_path / "b").exit_code == 0
    a, b = (json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in "ab")
    assert a == b


def test_quiet_prints_results_alone(tmp_path: Path) -> None:
    result = fedpeft("run", *SMALL, "-r", "1", "--quiet", "-o", tmp_path / "run")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "HR@10" in result.stdout


def test_later_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"training": {"rounds": 5, "lr": 0.5, "l2": 0.25}, "seed": 9}))
    out = tmp_path / "run"
    args = [
        "run",
        *SMALL,
        "-q",
        "-c",
        file,
        "--rounds",
        "3",
        "--set",
        "training.rounds=1",
        "--set",
        "training.lr=0.125",
    ]
    assert fedpeft(*args, "-o", out).exit_code == 0
    config = load_config(out / "config.yaml")
    assert config.training.rounds == 1  # --set over --rounds over the file
    assert config.training.lr == 0.125  # --set over the file
    assert config.training.l2 == 0.25  # the file over the default
    assert config.seed == 9
    assert config.training.local_epochs == 2  # the default


def test_compare_tabulates_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "compare"
    names = "full,c-rq,p-lora,p-hash+senet"
    result = fedpeft("compare", *SMALL, "-r", "4", "-e", names, "-o", out)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "compare.json").read_text())["results"]
    assert [run["embedding"] for run in results] == names.split(",")
    full, _, lora, _ = results
    assert full["bytes_down"] == full["bytes_up"] == 140 * 8 * 4
    assert full["saving"] == 0.0
    assert lora["bytes_up"] == 4 * (140 + 8) * 4
    assert lora["saving"] == 1 - lora["bytes_up"] / full["bytes_up"]
    for run in results:
        assert f"{run['metrics']['HR@10']:.4f}" in result.stdout
        summary = json.loads((out / run["embedding"] / "summary.json").read_text())
        assert summary["metrics"] == run["metrics"]
    assert (out / "compare.md").read_text().count("\n| ") == 1 + 1 + len(results)
    assert len((out / "compare.csv").read_text().splitlines()) == 1 + len(results)
    for picture in ("accuracy_bytes.png", "curves.png"):
        with Image.open(out / picture) as image:
            assert image.format == "PNG"


def test_compare_equals_single_runs(tmp_path: Path) -> None:
    assert (
        fedpeft("compare", *SMALL, "-q", "-r", "2", "-e", "c-hash,p-rq", "-o", tmp_path / "c").exit_code == 0
    )
    assert fedpeft("run", *SMALL, "-q", "-r", "2", "-e", "p-rq", "-o", tmp_path / "r").exit_code == 0
    folders = (tmp_path / "c" / "p-rq", tmp_path / "r")
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert a["evaluations"] == b["evaluations"]


def test_compare_leaves_out_warmup_where_there_is_nothing_to_warm_up(tmp_path: Path) -> None:
    out = tmp_path / "c"
    args = ["-e", "c-rq,p-rq", "-r", "2", "--set", "training.warmup_rounds=1", "-o", out]
    result = fedpeft("compare", *SMALL, "-q", *args)
    assert result.exit_code == 0, result.output
    warmup = [run["warmup_rounds"] for run in json.loads((out / "compare.json").read_text())["results"]]
    assert warmup == [0, 1]


KILLED = """
import os, signal, sys
from fedpeft_ext import cli
from fedpeft_ext.simulation import Simulator

def train(self, round=Simulator.round):
    if (self.config.embedding.name, self.rounds_done) == ("p-rq", 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return round(self)

Simulator.round = train
cli.main(sys.argv[1:])
"""


def test_a_killed_comparison_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    command = ["compare", *SMALL, "-r", "5", "-e", "c-hash,p-rq,c-lora", "--set", "checkpoint.every=1", "-o"]
    killed = [sys.executable, "-c", KILLED, *command, "killed"]
    assert subprocess.run(killed, env=_environment(), check=False).returncode == -signal.SIGKILL
    assert not Path("killed", "c-lora").exists()
    before = {path: path.stat().st_mtime_ns for path in Path("killed", "c-hash").rglob("*")}
    again = fedpeft(*command, "killed")
    assert again.exit_code == 0, again.output
    assert "3 runs, 1 of them finished before\n" in again.stderr
    assert "p-rq: going on after round 3 of 5\n" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in Path("killed", "c-hash").rglob("*")} == before
    assert fedpeft(*command, "whole").exit_code == 0

    def told(folder: Path) -> list[dict[str, Any]]:
        """The results, times and folders aside."""
        timed = ("seconds", "training_seconds", "clients_per_second", "folder")
        results = json.loads((folder / "compare.json").read_text())["results"]
        return [{name: value for name, value in run.items() if name not in timed} for run in results]

    assert told(Path("killed")) == told(Path("whole"))
    names = sorted(str(path.relative_to("whole")) for path in Path("whole").rglob("*"))
    assert sorted(str(path.relative_to("killed")) for path in Path("killed").rglob("*")) == names
    models = [f"{name}/model.safetensors" for name in ("c-hash", "p-rq", "c-lora")]
    for name in ("accuracy_bytes.png", "curves.png", *models):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name
    finished = fedpeft(*command, "killed")
    assert finished.stderr.splitlines()[-1] == "3 runs, 3 of them finished before"
    assert finished.stdout == again.stdout


def test_a_comparison_takes_more_embeddings_and_refuses_other_settings(tmp_path: Path) -> None:
    def trained(*options: str) -> list[str]:
        result = fedpeft("compare", *SMALL, *options, "-o", "c")
        assert result.exit_code == 0, result.output
        return [line.partition(":")[0] for line in result.stderr.splitlines() if "clients/s" in line]

    assert trained("-r2", "-ec-hash") == ["c-hash"]
    assert trained("-r2", "-ec-lora,c-hash", "--threads=2") == ["c-lora"]
    assert [run["embedding"] for run in json.loads(Path("c", "compare.json").read_text())["results"]] == [
        "c-lora",
        "c-hash",
    ]
    small = ["compare", *SMALL, "-o", "c", "-r2"]
    text = Path("c", "compare.md").read_text()
    for options, why in (
        (
            ["-ec-hash,full", "-r3", "--seed=1"],
            "c/c-hash was trained with training.rounds 2, not 3; seed 0, not 1;",
        ),
        (
            ["-ec-hash", "--set=dataset.options.seed=1"],
            "c/c-hash was trained with dataset.options.seed null, not 1;",
        ),
    ):
        assert f"{why} choose another folder, or overwrite (--overwrite)" in refused(*small, *options)
    assert fedpeft("resume", "c/c-hash", "--rounds=3", "-q").exit_code == 0
    assert "c/c-hash was trained with training.rounds 3, not 2" in refused(*small, "-ec-lora,c-hash")
    values = json.loads(Path("c", "compare.json").read_text())
    Path("c", "compare.json").write_text(json.dumps(values | {"runs": {}}))
    assert "c-lora was trained with other data, texts or features" in refused(*small, "-ec-lora")
    Path("c", "compare.json").write_text("{}")
    assert "c/compare.json is not" in refused(*small, "-ec-lora")
    assert Path("c", "compare.md").read_text() == text
    assert not Path("c", "full").exists()
    assert trained("-r3", "-ec-lora,c-hash", "--overwrite") == ["c-lora", "c-hash"]


def test_a_run_that_diverges_does_not_stop_a_comparison(tmp_path: Path) -> None:
    warmup = ("rounds=1", "optimizer=sgd", "lr=1e30")
    command = ["compare", *SMALL, "-r2", "-o", "c", *(f"--set=training.warmup_{each}" for each in warmup)]
    for names, done in (("p-lora,c-hash", ""), ("p-lora,c-hash", ", 2 of them finished before")):
        result = fedpeft(*command, "-e", names)
        assert result.exit_code == 3, result.output
        assert f"2 runs{done}\n" in result.stderr
        assert "fedpeft: error: p-lora: " in result.stderr
        assert "c-hash" in result.stdout
        text = Path("c", "compare.md").read_text()
        assert "p-lora: training diverged in round 1: client" in text
        assert "in warm-up rounds training.warmup_lr" in text
        assert [run["embedding"] for run in json.loads(Path("c", "compare.json").read_text())["results"]] == [
            "c-hash"
        ]
    assert "1 section" in fedpeft("report", "c").stdout
    assert "p-lora: training diverged in round 1: client" in Path("c", "report.html").read_text()
    alone = fedpeft(*command, "-e", "p-lora", "--overwrite", "--json")
    assert (alone.exit_code, json.loads(alone.stdout)) == (3, [])
    assert fedpeft("compare", *SMALL, "-r2", "-ep-lora", "-o", "c", "--overwrite", "-q").exit_code == 0
    assert not Path("c", "p-lora", "diverged.json").exists()


def test_names_with_brackets_and_blanks_are_told_as_they_are(tmp_path: Path) -> None:
    rows = "".join(f"u{i % 5},i{i * 7 % 130}\n" for i in range(200))
    Path("[red]mine.csv").write_text(f"user,item\n{rows}")
    options = ["-d", "[red]mine.csv", "-e", "c-hash", "-r", "1", "--set=evaluation.num_negatives=5"]
    result = fedpeft("run", *options, "-o", "my run")
    assert "Loading [red]mine.csv" in result.stderr
    assert "fedmf with c-hash on [red]mine, 1 round" in result.stdout
    Path("my run", "summary.json").unlink()
    assert "`fedpeft resume 'my run'` goes on" in refused("run", *options, "-q", "-o", "my run")
    both = fedpeft("compare", *options[:2], "-e", "c-hash", *options[4:], "-q", "-o", "both")
    assert "fedmf on [red]mine, 1 round" in both.stdout


def test_an_existing_folder_is_kept_unless_overwriting(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused("run", *SMALL, "-r", "1", "-o", out)
    assert str(out) in message
    assert "--overwrite" in message
    assert fedpeft("run", *SMALL, "-q", "-r", "1", "-o", out, "--overwrite").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert "--overwrite" in refused("compare", *SMALL, "-r", "1", "-o", out)


def test_a_folder_that_is_a_file_or_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "folder" in refused("run", *SMALL, "-r", "1", "-o", tmp_path / "file")
    assert f"{tmp_path}/file is a file" in refused(
        "run", *SMALL, "-r", "1", "-o", tmp_path / "file" / "below"
    )
    assert "cannot write" in refused("run", *SMALL, "-r", "1", "-o", "/proc/below")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--dataset", "ml-10k"], "ml-100k"),
        (["--dataset", "no/such/place"], "no/such/place"),
        (["--embedding", "p-lara"], "lora"),
        (["--backbone", "fedmv"], "fedmf"),
        (["--engine", "bached"], "batched"),
        (["--rounds", "-1"], "training.rounds"),
        (["--threads", "0"], "threads"),
        (["--device", "gpu"], "device"),
        (["--set", "training.roundz=3"], "rounds"),
        (["--set", "trainig.rounds=3"], "training"),
        (["--set", "training.lr"], "section.key=value"),
        (["--set", "training.lr=fast"], "training.lr"),
        (["--set", "training.lr=["], "training.lr: expected a YAML value, got '['"),
        (["--set", "training.lr=2024-13-45"], "training.lr: expected a YAML value"),
        (["--set", "user_column=uid"], "did you mean 'dataset.options.user_column'?"),
        (["--set", "dataset.user_colum=uid"], "did you mean 'dataset.options.user_column'?"),
        (["--set", "training.clients_per_round=50"], "training.clients_per_round"),
        (["--set", "dataset.options.num_userz=3"], "num_users"),
        (["--set", "evaluation.num_negatives=1000"], "num_negatives"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_user_errors_are_one_sentence(args: list[str], expected: str) -> None:
    small = [arg for arg in SMALL if not (arg.startswith("--dataset=") and "--dataset" in args)]
    if "--dataset" in args:
        small = [arg for arg in small if "dataset.options" not in arg]
    message = refused("run", *small, *args)
    assert expected in message.splitlines()[-1]
    errors = [line for line in message.splitlines() if line.startswith("fedpeft: error: ")]
    assert errors == message.splitlines()[-1:]
    assert not Path("runs").exists() or not any(Path("runs").rglob("summary.json"))


def test_overwriting_deletes_nothing_for_a_run_that_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fedpeft("compare", *SMALL, "-ec-lora", "-r1", "-q", "-o", out).exit_code == 0
    files = sorted(out.rglob("*"))
    wrong = ["--backbone=fedncf", "-ec-hash+senet", "--engine=fused", "--overwrite"]
    assert "one run, but" in refused("resume", out)
    assert "holds one in c-lora" in refused("recommend", out, "-u", "u1")
    assert "engine" in refused("compare", *SMALL, *wrong, "-o", out)
    assert "engine" in refused("run", *SMALL, *wrong, "-o", out / "c-lora")
    assert [file for file in sorted(out.rglob("*")) if "c-hash+senet" not in str(file)] == files


def test_a_comparison_overwrites_a_run(tmp_path: Path) -> None:
    out, small = tmp_path / "out", [*SMALL, "-ec-lora", "-r1", "-q"]
    assert fedpeft("run", *small, "-o", out).exit_code == 0
    assert (out / "summary.json").exists()
    assert fedpeft("compare", *small, "-o", out, "--overwrite").exit_code == 0
    assert (out / "compare.json").exists()
    assert not (out / "summary.json").exists()


def test_ctrl_c_within_slow_imports_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised there, KeyboardInterrupt would leave modules half-loaded."""
    seen, real = [], builtins.__import__

    def spy(name: str, *args: Any, **options: Any) -> Any:
        if name == "fedpeft_ext.simulation":
            seen.append(signal.getsignal(signal.SIGINT))
        return real(name, *args, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(builtins, "__import__", spy)
        _import_slowly()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_DFL]


def test_a_study_takes_a_converted_data_set(tmp_path: Path) -> None:
    data = tmp_path / "data"
    sizes = ("--set=num_users=30", "--set=num_items=140", "--set=interactions_per_user=8")
    assert fedpeft("convert", "synthetic", data, *sizes).exit_code == 0
    options = [*SMALL[2:], "-ec-lora", "-r1", "--seeds=1"]
    result = fedpeft("study", "hybrid", "-d", data, *options, "-o", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s" / "hybrid.tex").read_text().count(" \\\\\n") == 2


@pytest.mark.parametrize("columns", [20, 40])
def test_narrow_terminals_get_whole_numbers(
    tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    one = fedpeft("run", *SMALL, "-ec-lora", "-r1", "-o", tmp_path / "run")
    more = fedpeft("compare", *SMALL, "-ec-lora", "-r1", "-o", tmp_path / "compare")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for result in (one, more):
        assert result.exit_code == 0, result.output
        assert "…" not in result.stdout
        assert f"{summary['metrics']['HR@10']:.4f}" in result.stdout
    assert "1 round" in more.stdout
    assert "1 rounds" not in one.output + more.output


def test_bars_fit_narrow_terminals() -> None:
    for width in (30, 100):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, legacy_windows=False)
        display = progress_display(console)
        display.add_task("p-lora", total=200, completed=5, loss="0.684", metric="HR@10 0.099", speed="20,844")
        console.print(display.get_renderable())
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "p-lora" in text
        assert "5/200" in text
        assert "HR@10 0.099" in text


def test_warnings_of_the_package_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item\n" + "".join(f"u{n % 5},i{n}\n" for n in range(40)))
    texts = (f"i{n},word{n % 3} red\n" for n in range(39))
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(texts))
    small = [*SMALL[2:], "--set=evaluation.num_negatives=9", "--set=pretrain.features=tfidf"]
    small += ["--set=pretrain.epochs=1", "--set=pretrain.cache=false", "--set=training.clients_per_round=2"]
    result = fedpeft("run", "-d", tmp_path / "log.csv", *small, "-ep-lora", "-r1", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if "no usable text" in line]
    assert [note.partition("note: 1 of 40 items")[0] for note in notes] == ["fedpeft: "]
    assert "Warning" not in result.stderr


def test_the_folder_and_the_device_are_tried_before_the_data(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in (f"--out={tmp_path}/file/run", "--device=cuda:99"):
        message = refused("run", *SMALL, option)
        assert "Loading" not in message
        assert ("is a file" if "out" in option else "device: expected one") in message
    assert not (tmp_path / "runs").exists()


def test_compare_refuses_bad_names_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "c"
    assert "hash" in refused("compare", *SMALL, "-e", "full,p-hesh", "-o", out)
    assert "twice" in refused("compare", *SMALL, "-e", "p-rq,P-RQ", "-o", out)
    assert "at least one" in refused("compare", *SMALL, "-e", ",", "-o", out)
    assert not out.exists()


def test_unknown_options_and_commands_name_the_nearest() -> None:
    assert "--rounds" in refused("run", "--roundz", "3")
    assert "compare" in refused("compar")


def test_debug_shows_the_traceback() -> None:
    for result in (
        fedpeft("run", "--embedding", "p-lara", "--debug"),
        CliRunner().invoke(app, ["run", "--embedding", "p-lara"], env={"FEDPEFT_DEBUG": "1"}),
    ):
        assert result.exit_code == 1
        assert isinstance(result.exception, ValueError)


def test_divergence_has_its_own_exit_code(tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = [
        "-e",
        "full",
        "-r",
        "20",
        "--set",
        "training.optimizer=sgd",
        "--set",
        "training.lr=1e30",
        "-o",
        out,
    ]
    result = fedpeft("run", *SMALL, *args)
    assert result.exit_code == 3, result.output
    assert "fedpeft: error:" in result.stderr
    assert (out / "config.yaml").exists()
    assert not (out / "summary.json").exists()


def test_data_lists_and_checks(tmp_path: Path) -> None:
    listing = fedpeft("data").stdout
    assert "ml-100k" in listing
    assert "synthetic" in listing
    table = tmp_path / "mine.csv"
    table.write_text(
        "who,item_id,rating\n" + "".join(f"u{u},i{u * 3 + k},5\n" for u in range(5) for k in range(4))
    )
    report = fedpeft("data", table, "--set", "user_column=who")
    assert report.exit_code == 0, report.output
    assert "users" in report.stdout
    assert "note: no timestamps" in report.stdout
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"dataset: {{name: {table}, options: {{user_column: wo}}}}")
    assert fedpeft("data", "-c", settings, "--set", "user_column=who").stdout == report.stdout
    assert "'wo'" in refused("data", "-c", settings)
    assert "expected a data set" in refused("data", "--set", "user_column=who")
    small = ("--set=dataset.options.user_column=who", "--set=evaluation.num_negatives=5", "-ec-lora", "-r1")
    for command in (("run",), ("study", "hybrid", "--seeds=1")):
        trained = fedpeft(*command, "-d", table, *small, "-o", tmp_path / command[0])
        assert trained.exit_code == 0, trained.output
        assert "note: no timestamps" in trained.stderr
    assert "user_column" in refused("data", table, "--set", "user_colum=who")
    assert "KEY=VALUE" in refused("data", table, "--set", "user_column")
    assert "ml-100k" in refused("data", "ml-10k")


@pytest.mark.parametrize("command", [["data", "synthetic"], ["convert", "synthetic", "out"]])
def test_options_that_are_not_yaml_are_refused(command: list[str]) -> None:
    assert "--set name: expected a YAML value, got '\";'" in refused(*command, "--set", 'name=";')


def test_info_states_versions_and_kernels() -> None:
    import torch

    result = fedpeft("info")
    assert result.exit_code == 0
    for fact in (__version__, torch.__version__, "CPU kernels", "CUDA kernels", "threads"):
        assert fact in result.stdout
    assert fedpeft("--version").stdout == f"fedpeft_ext {__version__}\n"


def test_help_imports_no_slow_module() -> None:
    code = (
        "import sys\n"
        "from fedpeft_ext.cli import app\n"
        "app(['run', '--help'], standalone_mode=False)\n"
        "app(['--help'], standalone_mode=False)\n"
        "slow = {'torch', 'numpy', 'rich.console'}\n"
        "slow |= {'polars', 'sklearn', 'matplotlib', 'vector_quantize_pytorch', 'fedpeft_ext.simulation'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert result.returncode == 0, result.stderr
    assert "--embedding" in result.stdout


def test_interruption_leaves_a_readable_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fedpeft_ext", "run", *SMALL, "--rounds", "1000000", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no evaluation within two minutes"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "ending after this round; once more to end now" in errors
    assert f"of 1000000; fedpeft resume {out} goes on" in errors
    assert load_config(out / "config.yaml").training.rounds == 1_000_000
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["round"] for line in lines[:3]] == [0, 2, 4]
    message = refused("run", *SMALL, "-o", out)
    assert "holds an interrupted run" in message
    assert f"`fedpeft resume {out}`" in message
    saved = int(next((out / "checkpoints").glob("round-*")).stem.removeprefix("round-"))
    assert "training.rounds: expected at least" in refused("resume", out, "--rounds", "1")
    result = fedpeft("resume", out, "--rounds", saved + 2, "--quiet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"] == saved + 2


def test_resume_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert "found none at" in refused("resume", tmp_path / "none")
    assert "expected a checkpoint" in refused("resume", tmp_path)


def test_recommend_lists_the_best_items(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fedpeft("run", *SMALL, "-r", "2", "-q", "-o", out).exit_code == 0
    result = fedpeft("recommend", out, "--user", "u7", "--user", "u3", "-k", "3", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    run = load_run(out)
    told = json.loads(result.stdout)
    assert [each["user"] for each in told] == ["u7", "u3"]
    ranked = run.recommend([7, 3], 3)
    for each, items, scores in zip(told, ranked.items.tolist(), ranked.scores.tolist(), strict=True):
        assert each["items"] == [
            {"item": f"i{item}", "text": run.dataset.item_text[item], "score": score}
            for item, score in zip(items, scores, strict=True)
        ]
    first, *lines = fedpeft("recommend", out, "-u", "u7", "-k", "3").stdout.splitlines()
    assert first == "user u7"
    for place, (line, item) in enumerate(zip(lines, told[0]["items"], strict=True), start=1):
        expected = [str(place), item["item"], f"{item['score']:.4f}", *item["text"].split()]
        assert line.split() == expected
    assert "no user with the id 'u40'" in refused("recommend", out, "--user", "u40")
    assert "expected 1 to 140" in refused("recommend", out, "--user", "u1", "-k", "141")
    assert "--user" in refused("recommend", out)
    assert "expected a finished run" in refused("recommend", out / "checkpoints", "--user", "u1")
    all_items = json.loads(fedpeft("recommend", out, "-u", "u1", "-k", "140", "--json").stdout)[0]["items"]
    assert len(all_items) == 140 - (run.dataset.indptr[2] - run.dataset.indptr[1])


def test_evaluate_tells_other_metrics_of_a_run(tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "users.csv"
    selected = "--set=evaluation.select_by=full/HR@10"
    assert fedpeft("run", *SMALL, "-ec-lora", "-r1", selected, "-q", "-o", out).exit_code == 0
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    result = fedpeft("evaluate", out, "--users", file, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told == {"folder": str(out), "round": 1, "users": 40, "metrics": metrics}
    with file.open(encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    assert [row["user"] for row in rows] == [f"u{user}" for user in range(40)]
    data = load_run(out).dataset
    trained = data.indices.tolist()
    for user, row in enumerate(rows):
        assert int(row["training_items"]) == data.indptr[user + 1] - data.indptr[user]
        assert row["test_item"] == data.item_ids[data.test_items[user]]
        assert int(row["test_item_trained"]) == trained.count(data.test_items[user])
    for name, mean in metrics.items():
        assert math.fsum(float(row[name]) for row in rows) / 40 == pytest.approx(mean)
    table = fedpeft("evaluate", out, "--set", "evaluation.ks=[3]", "--set", "evaluation.full_ranking=false")
    assert [line.split()[0] for line in table.stdout.splitlines() if "@" in line] == ["HR@3", "NDCG@3"]
    assert "another of evaluation" in refused("evaluate", out, "--set", "training.lr=1")


def test_evaluate_tells_the_difference_to_another_run(tmp_path: Path) -> None:
    """On the candidates of the first run, which the other, of another seed, did not have."""
    out, other = tmp_path / "run", tmp_path / "other"
    for seed, folder in enumerate((out, other)):
        assert fedpeft("run", *SMALL, "-ec-lora", "-r1", "-q", "-o", folder, "--seed", seed).exit_code == 0
    told = json.loads(fedpeft("evaluate", out, "--against", other, "--json").stdout)
    same = json.loads(fedpeft("evaluate", other, "-s", "evaluation.seed=0", "--json").stdout)["metrics"]
    assert told["differences"].pop("to") == str(other)
    for name, (mean, half) in told["differences"].items():
        assert mean == pytest.approx(told["metrics"][name] - same[name])
        assert half > 0
    table = fedpeft("evaluate", out, "--against", out).stdout
    assert "+0.0000 ± 0.0000" in table
    assert "95% confidence interval" in " ".join(table.split())  # a long folder's name wraps the title
    popular = json.loads(fedpeft("evaluate", out, "--against", "popularity", "--json").stdout)["differences"]
    assert popular.pop("to") == "popularity"
    assert popular.keys() == told["metrics"].keys()


def test_evaluate_tells_popular_test_items_from_others(tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "users.csv"
    assert fedpeft("run", *SMALL, "-ec-lora", "-r1", "-q", "-o", out).exit_code == 0
    dataset = load_run(out).dataset
    times = np.bincount(dataset.indices, minlength=140)[dataset.test_items]
    few = times <= 1
    assert 2 <= few.sum() < 40
    result = fedpeft("evaluate", out, "--by-popularity", "1,90", "--users", file, "--against", out, "--json")
    told = json.loads(result.stdout)["by_popularity"]
    assert [(group["trained"], group["users"]) for group in told] == [
        ("0-1", few.sum()),
        ("2-90", (~few).sum()),
    ]
    with file.open(encoding="utf-8") as text:
        hits = np.array([float(row["full/NDCG@10"]) for row in csv.DictReader(text)])
    assert [group["metrics"]["full/NDCG@10"] for group in told] == [
        pytest.approx(hits[inside].mean()) for inside in (few, ~few)
    ]
    assert told[0]["differences"]["HR@10"] == [0.0, 0.0]
    table = fedpeft("evaluate", out, "--by-popularity", "1", "-s", "evaluation.full_ranking=false").stdout
    assert [line.split()[:2] for line in table.splitlines()[-3:-1]] == [
        ["0-1", str(few.sum())],
        ["2+", str((~few).sum())],
    ]
    assert "--by-popularity: expected counts" in refused("evaluate", out, "--by-popularity", "few")
    assert "expected rising counts" in refused("evaluate", out, "--by-popularity", "3,1")


def test_somebody_new_is_served(tmp_path: Path) -> None:
    """By recommend, with some items; by evaluate, as one of a data set."""
    out, other, data = tmp_path / "run", tmp_path / "other", tmp_path / "new.csv"
    for seed, folder in enumerate((out, other)):
        assert fedpeft("run", *SMALL, "-ec-lora", "-r2", "-q", "-o", folder, "--seed", seed).exit_code == 0
    run = load_run(out)
    (new,) = json.loads(fedpeft("recommend", out, "-i", "i5", "--item", "i9", "-r3", "-k4", "--json").stdout)
    assert new["user"] is None
    expected = run.with_new_users({"me": ["i5", "i9"]}, 3).recommend("me", 4).items[0].tolist()
    assert [each["item"] for each in new["items"]] == [f"i{item}" for item in expected]
    assert fedpeft("recommend", out, "-i", "i5", "-k", "1").stdout.startswith("new user\n   1  i")

    rows = ["x,i3", "x,i4", "y,i7", "y,i8", "y,i1", "z,i2"]  # the last of x and y is their test item
    data.write_text("\n".join(["user,item", *rows]) + "\n")
    told = json.loads(fedpeft("evaluate", out, "--new-users", data, "--against", other, "--json").stdout)
    came = run.with_new_users(load_dataset(data))
    assert (told["users"], told["metrics"]) == (2, came.evaluate().means())
    difference = (
        load_run(other)
        .with_new_users(load_dataset(data))
        .evaluate(run.config.evaluation.model_copy(update={"seed": 0}))
    )
    assert told["differences"]["MRR"][0] == pytest.approx(told["metrics"]["MRR"] - difference.means()["MRR"])
    assert "2 new users" in " ".join(fedpeft("evaluate", out, "--new-users", data).stdout.split())
    popular = ("--against", "popularity", "--by-popularity", "0,90")
    told = json.loads(fedpeft("evaluate", out, "--new-users", data, *popular, "--json").stdout)
    counted = popularity_run(came, run.dataset).evaluate().means()["MRR"]  # by what the run was trained on
    assert told["differences"]["MRR"][0] == pytest.approx(told["metrics"]["MRR"] - counted)
    assert [(group["trained"], group["users"]) for group in told["by_popularity"]] == [("1-90", 2)]

    assert "no item with the id 'i140'" in refused("recommend", out, "-i", "i140")
    assert "--item or --new-users, which train" in refused("recommend", out, "-u", "u1", "-r", "3")
    assert "--new-users" in refused("evaluate", out, "-r", "3")
    assert "none.csv" in refused("evaluate", out, "--new-users", tmp_path / "none.csv")
    data.write_text("user,item\nx,i3\nx,other\n")
    assert "such as 'other'" in refused("evaluate", out, "--new-users", data)


def test_rounds_are_counted_from_what_was_read_of_a_run_that_still_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fedpeft("run", *SMALL, "-ec-lora", "-r2", "-q", "-o", "one").exit_code == 0
    checked = serving.check_run

    def then_trained_further(folder: Path, argument: str = "run") -> None:
        checked(folder, argument)
        if argument == "--start-from":
            Simulator.resume(folder, rounds=4).run()

    monkeypatch.setattr(serving, "check_run", then_trained_further)
    result = fedpeft("run", "--start-from", "one", "-r3", "-q", "--json", "-o", "two")
    assert json.loads(result.stdout)["rounds"] == 7


def write_shop(folder: Path, items: int, users: int) -> Path:
    """Interactions and items with text, as CSV files."""
    folder.mkdir(exist_ok=True)
    rows = [
        f"u{u},i{(7 * u + 3 * n) % items if n else u % items},{n}" for u in range(users) for n in range(6)
    ]
    (folder / "interactions.csv").write_text("\n".join(["user,item,time", *dict.fromkeys(rows)]) + "\n")
    words = ["red", "green", "wool", "cotton", "shirt", "hat", "sock"]
    texts = [f"i{i},{words[i % 7]} {words[i % 5]} no {i}" for i in range(items)]
    (folder / "items.csv").write_text("\n".join(["item,title", *texts]) + "\n")
    return folder


def test_a_run_goes_on_with_grown_data(tmp_path: Path) -> None:
    """The file is overwritten, as it is where new rows arrive every day."""
    one, two, three = map(Path, ("one", "two", "three"))
    shop = write_shop(tmp_path / "shop", 30, 20)
    options = [
        *SMALL[3:],
        f"--dataset={shop}",
        "--set=dataset.options.items=all",
        "--set=pretrain.cache_dir=cache",
        "--set=pretrain.epochs=2",
        "--set=evaluation.num_negatives=10",
        "--set=training.warmup_rounds=1",
    ]
    assert fedpeft("run", *options, "-ep-lora", "-r2", "-q", "-o", one).exit_code == 0
    served = fedpeft("recommend", one, "-u", "u3", "-k", "30", "--json")
    known = [item["item"] for item in json.loads(served.stdout)[0]["items"]]
    file = tmp_path / "more.csv"
    file.write_text("item,title\ni30,red hat\ni31,green wool\ni3,known\n")
    for who in (["-u", "u3"], ["-i", "i4", "-i", "i30", "-r1"]):
        result = fedpeft("recommend", one, *who, "-k", "32", "--json", "--new-items", file)
        listed = [item["item"] for item in json.loads(result.stdout)[0]["items"]]
        assert {"i31"} <= {*listed}
        assert ("i30" in listed) == ("-u" in who)
    best = json.loads(fedpeft("recommend", one, "-u", "u3", "-k", "32", "--json", "--new-items", file).stdout)
    assert {item["item"]: item["text"] for item in best[0]["items"]}["i30"] == "red hat"
    old = [item["item"] for item in best[0]["items"] if item["item"] not in ("i30", "i31")]
    assert old == known

    write_shop(shop, 36, 25)
    result = fedpeft("run", "--start-from", one, "-r3", "-o", two)
    assert result.exit_code == 0, result.output
    told = [" ".join(line.split()[:2]) for line in result.stderr.splitlines() if "HR@10" in line]
    assert told == ["round 2/5", "round 4/5", "round 5/5"]
    assert (
        f"Started from {one} after round 2: 30 known and 6 new items, 20 known and 5 new users"
        in " ".join(result.stdout.split())
    )
    summary = json.loads((two / "summary.json").read_text())
    assert (summary["rounds"], summary["started_from"]["known_items"]) == (5, 30)
    config = load_config(two / "config.yaml")
    assert config == load_config(one / "config.yaml").updated(["training.rounds=5", f"start_from={one}"])
    assert "other data than" in refused("recommend", one, "-u", "u3")
    assert len(json.loads(fedpeft("recommend", two, "-u", "u24", "-k5", "--json").stdout)[0]["items"]) == 5
    again = fedpeft("run", "--start-from", two, "-r1", "-s", "training.lr=0.5", "--json", "-q", "-o", three)
    assert json.loads(again.stdout)["rounds"] == 6
    assert fedpeft("resume", two, "-r", "6", "-q").exit_code == 0
    assert fedpeft("run", "--start-from", two, "-r0", "-q", "-o", "four").exit_code == 0
    assert load_run(Path("four")).round == 6
    assert fedpeft("evaluate", two, "--against", "four").exit_code == 0
    assert fedpeft("run", *options, "-ep-lora", "-r1", "-q", "-o", "five").exit_code == 0

    refusals = {
        "train after the 6 of": ["run", "--start-from", three],
        "with --start-from, got -1": ["run", "--start-from", three, "-r-1"],
        "out: expected another folder": ["run", "--start-from", three, "-r1", "-o", three, "--overwrite"],
        "embedding.name: expected 'p-lora'": ["run", "--start-from", three, "-r1", "-e", "c-rq"],
        "--start-from: expected a finished run": ["run", "--start-from", tmp_path / "none", "-r1"],
        "start_from: expected none here": ["compare", "-s", f"start_from={three}"],
        "--against: expected a run whose items": ["evaluate", "five", "--against", two],
        "fedpeft run goes on": ["study", "hybrid", "-s", f"start_from={three}", "-o", tmp_path / "study"],
        "no such file": ["recommend", two, "-u", "u3", "--new-items", tmp_path / "none.csv"],
        "no item column": ["recommend", two, "-u", "u3", "--new-items", two / "config.yaml"],
    }
    for message, command in refusals.items():
        assert message in refused(*command)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_recommendations_of_all_users_as_a_file(tmp_path: Path, suffix: str) -> None:
    out, file, data = tmp_path / "run", tmp_path / f"best.{suffix}", tmp_path / "new.csv"
    assert fedpeft("run", *SMALL, "-ec-lora", "-r1", "-q", "-o", out).exit_code == 0
    run = load_run(out)

    def check(run: TrainedRun, k: int) -> None:
        frame = (pl.read_csv if suffix == "csv" else pl.read_parquet)(file)
        users = run.dataset.user_ids
        best = run.recommend(range(len(users)), k)
        expected = [
            (users[user], rank, run.dataset.item_ids[item], pytest.approx(score))
            for user in range(len(users))
            for rank, (item, score) in enumerate(
                zip(best.items[user].tolist(), best.scores[user].tolist(), strict=True), start=1
            )
            if item >= 0
        ]
        assert frame.columns == ["user", "rank", "item", "score"]
        assert frame.rows() == expected

    assert "40 users, 120 rows" in fedpeft("recommend", out, "--out", file, "-k", "3").stdout
    check(run, 3)
    told = json.loads(fedpeft("recommend", out, "--out", file, "-k", "140", "--json").stdout)
    check(run, 140)  # fewer than 140 that a user did not meet
    assert (told["users"], told["file"]) == (40, str(file))
    data.write_text("user,item\nx,i3\nx,i4\ny,i7\n")
    assert fedpeft("recommend", out, "--new-users", data, "--out", file).exit_code == 0
    check(run.with_new_users(load_dataset(data)), 10)
    one = json.loads(fedpeft("recommend", out, "--new-users", data, "-u", "y", "-k2", "--json").stdout)
    assert [each["user"] for each in one] == ["y"]

    assert "a user, items of a new one, or a file" in refused("recommend", out, "--new-users", data)
    assert "ends in .csv or .parquet" in refused("recommend", out, "--out", tmp_path / "best.txt")
    assert "--item: expected alone" in refused("recommend", out, "-i", "i1", "--out", file)
    assert "no" in refused("recommend", out, "--out", tmp_path / "none" / f"best.{suffix}")


def test_evaluate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fedpeft("run", *SMALL, "-ec-lora", "-r1", "-q", "-o", out).exit_code == 0
    assert "another of evaluation" in refused("evaluate", out, "--set", "training.lr=1")
    assert "evaluation.kz" in refused("evaluate", out, "--set", "evaluation.kz=1")
    assert "no" in refused("evaluate", out, "--users", tmp_path / "none" / "u.csv")


def test_json_is_all_of_stdout(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = fedpeft("run", *SMALL, "-r", "1", "--json", "-o", out)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary.pop("folder") == str(out)
    assert summary == json.loads((out / "summary.json").read_text())
    assert "round 1/1" in result.stderr
    both = fedpeft("compare", *SMALL, "-r", "1", "-q", "--json", "-e", "c-hash,p-rq", "-o", tmp_path / "c")
    assert [run["embedding"] for run in json.loads(both.stdout)] == ["c-hash", "p-rq"]
    assert both.stderr == ""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_went_away_is_no_error_of_the_folder(stream: str) -> None:
    """As in `fedpeft run | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    command = [sys.executable, "-m", "fedpeft_ext", "run", *SMALL, "-r", "0", "--set=embedding.name=c-hash"]
    out = Path("run").absolute()
    root = Path(__file__).parents[1]  # whose package the process then finds
    done = subprocess.run([*command, "-o", out], **output, env=_environment(), cwd=root, check=False)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b"error" not in (done.stdout or b"") + (done.stderr or b"")
    assert stream == "stderr" or (out / "summary.json").is_file()


def _environment() -> dict[str, str]:
    """The environment with this checkout importable from any folder, one thread."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def test_study_and_report(tmp_path: Path) -> None:
    out = tmp_path / "study"
    result = fedpeft("study", "hybrid", *SMALL, "-r", "2", "--seeds", "1", "-e", "c-hash,full", "-o", out)
    assert result.exit_code == 0, result.output
    assert "| c-hash |" in result.stdout
    assert "2 runs" in result.stderr
    assert (
        "2 of them finished before"
        in fedpeft(
            "study", "hybrid", *SMALL, "-r", "2", "--seeds", "1", "-e", "c-hash,full", "-o", out
        ).stderr
    )
    assert "1 section\n" in fedpeft("report", out).stdout
    assert "new-items" in fedpeft("study").stdout


def test_errors_of_the_system_name_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to a full disk fails without saying where."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fedpeft_ext.data.mapped.DatasetWriter._append", full)
    message = refused("convert", "synthetic", tmp_path / "new")
    assert message == f"fedpeft: error: {tmp_path / 'new'}: {os.strerror(errno.ENOSPC)}\n"


def test_only_commands_with_the_option_tell_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    assert "--overwrite" in refused("run", *SMALL, "--out", tmp_path / "full")
    assert "--overwrite" not in refused("convert", "synthetic", tmp_path / "full")


def test_help_is_whole_and_names_what_there_is() -> None:
    assert "..." not in fedpeft("--help").stdout.partition("Commands:")[2]
    told = " ".join(fedpeft("study", "--help").stdout.split())
    assert all(name in told for name in STUDIES)
    assert all(name in told for name in backbone_names())


def test_study_takes_the_options_of_compare(tmp_path: Path) -> None:
    options = ["--backbone", "fedpergnn", "--engine", "batched", "--seed", "4", "--seeds", "1", "-e", "full"]
    result = fedpeft("study", "hybrid", *SMALL, *options, "--rounds", "2", "--out", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.output
    (run,) = (tmp_path / "out" / "runs").iterdir()
    config = load_config(run / "config.yaml")
    assert (config.backbone.name, config.engine, config.seed) == ("fedpergnn", "batched", 4)
    assert "chosen by --backbones fedmf" in refused("study", "table2", *SMALL, "--backbone", "fedmf")


def test_study_refuses_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert "did you mean 'hybrid'" in refused("study", "hybird", *SMALL, "-o", out)
    assert "has no such option" in refused("study", "hybrid", *SMALL, "--budget", "5", "-o", out)
    assert "each once" in refused("study", "table2", *SMALL, "--backbones", "fedmf,fedmf", "-o", out)
    assert "p-hesh" in refused("study", "hybrid", *SMALL, "-e", "p-hesh", "-o", out)
    assert not out.exists()
    assert "none at" in refused("report", tmp_path / "nothing")
