"""Runs that survive: whatever kills one, `resume` ends with the bits of a run that was never interrupted."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from killed_run import StopAfter, go_on, one_of_two, prepared
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_federation import make_dataset, small_config

from fedpeft_ext.cli import _run_until_signal, _Stopped
from fedpeft_ext.config import CheckpointConfig, Config
from fedpeft_ext.data import Dataset, save_dataset
from fedpeft_ext.simulation import (
    Callback,
    Interrupted,
    RoundInfo,
    Simulator,
    checkpoint,
    files,
    load_run,
    output,
)
from fedpeft_ext.simulation.checkpoint import CheckpointFolder, has_checkpoint

TIMED = ("seconds", "training_seconds", "clients_per_second")
CASES: dict[str, dict[str, Any]] = {
    "p-rq": {},
    "full, FedAdam": {"embedding.name": "full", "training.server_optimizer": "adam"},
    "c-hash, sequential": {"embedding.name": "c-hash", "engine": "sequential"},
    "warm-up": {"training.warmup_rounds": 2, "embedding.warm_start_codebooks": True},
    "pfedrec": {"backbone.name": "pfedrec", "embedding.name": "p-lora", "dtype": "float64"},
    "fedncf": {"backbone.name": "fedncf", "embedding.name": "p-rq+lora", "backbone.hidden": "[12, 20]"},
    "top-k": {"compression.method": "top-k", "compression.top_k": 0.1},
    "schedules": {
        "training.schedule": "cosine",
        "training.server_schedule": "linear",
        "training.warmup_rounds": 1,
        "training.warmup_server_optimizer": "adam",
    },
    "scaffold": {
        "embedding.name": "p-rq+lora",
        "training.algorithm": "scaffold",
        "training.optimizer": "sgd",
    },
    "privacy": {
        "training.weighting": "uniform",
        "privacy.mode": "cdp",
        "privacy.clip": 0.5,
        "privacy.noise_multiplier": 0.3,
    },
    "faults": {
        "faults.dropout_rate": 0.3,
        "faults.corrupt_rate": 0.3,
        "faults.reject": True,
        "faults.max_norm": 100.0,
        "faults.min_clients": 4,
        "faults.too_few": "repeat",
    },
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written survives the end of a process without fsync, on which no test but one depends."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def config(**changes: Any) -> Config:
    return small_config(
        **{
            "training.rounds": 5,
            "training.clients_per_round": 7,
            "evaluation.every": 2,
            "checkpoint.every": 1,
            "log.csv": True,
            **changes,
        }
    )


def new_run(folder: Path, settings: Config, **options: Any) -> Simulator:
    return Simulator(settings, make_dataset(), pretrained=prepared(), out=folder, **options)


def resumed(folder: Path, **options: Any) -> Simulator:
    return Simulator.resume(folder, make_dataset(), **options)


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, times aside."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    table = (folder / "metrics.csv").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert len(table) == 1 + len(lines)
    for values in (*lines, summary):
        for name in TIMED:
            values.pop(name, None)
    return {
        "config": (folder / "config.yaml").read_text(),
        "lines": lines,
        "summary": summary,
        "model": (folder / "model.safetensors").read_bytes(),
        "names": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    settings = config(**CASES[name])
    new_run(tmp_path / "whole", settings).run()
    expected = result(tmp_path / "whole")
    for first, second in ((1, 2), (3, 4)):
        folder = tmp_path / f"after {first}"
        with pytest.raises(Interrupted, match=f"stopped after round {first} of 5"):
            new_run(folder, settings, callbacks=[StopAfter(first)]).run()
        assert not (folder / "summary.json").exists()
        with pytest.raises(Interrupted):
            resumed(folder, callbacks=[StopAfter(second)]).run()
        resumed(folder).run()
        assert result(folder) == expected


def test_a_run_that_was_stopped_goes_on_in_the_same_process(tmp_path: Path) -> None:
    new_run(tmp_path / "whole", config()).run()
    simulator = new_run(tmp_path / "run", config(), callbacks=[StopAfter(3)])
    with pytest.raises(Interrupted):
        simulator.run()
    simulator.run()
    assert result(tmp_path / "run") == result(tmp_path / "whole")


@pytest.mark.parametrize("name", ["schedule", "server_schedule"])
def test_rounds_that_would_change_past_rates_are_refused(tmp_path: Path, name: str) -> None:
    new_run(tmp_path, config(**{f"training.{name}": "linear"})).run()
    before = content(tmp_path)
    with pytest.raises(
        ValueError, match=rf"training\.rounds: expected 5, over which training\.{name} linear"
    ):
        resumed(tmp_path, rounds=8)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("rounds: 5", "rounds: 8", 1))
    with pytest.raises(ValueError, match=r"training\.rounds: expected 5, .* got 8"):
        resumed(tmp_path)
    file.write_bytes(before["config.yaml"])
    resumed(tmp_path, rounds=5).run()
    assert content(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("first", [4, 5])
def test_a_finished_run_can_be_trained_further(tmp_path: Path, first: int) -> None:
    """As if it had been one run of more rounds, the extra evaluation at its former end left out."""
    new_run(tmp_path / "whole", config(**{"training.rounds": 8})).run()
    new_run(tmp_path / "run", config(**{"training.rounds": first})).run()
    before = result(tmp_path / "run")
    resumed(tmp_path / "run").run()  # nothing is left to do
    assert result(tmp_path / "run") == before
    with pytest.raises(Interrupted):
        resumed(tmp_path / "run", rounds=8, callbacks=[StopAfter(6)]).run()
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed(tmp_path / "run").run()  # the folder's config.yaml says 8 by now
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_settings_that_change_no_result_may_change(tmp_path: Path) -> None:
    new_run(tmp_path / "whole", config()).run()
    with pytest.raises(Interrupted):
        new_run(tmp_path / "run", config(), callbacks=[StopAfter(2)]).run()
    path = tmp_path / "run" / "config.yaml"
    path.write_text(
        path.read_text()
        .replace("chunk_memory_mb: 64.0", "chunk_memory_mb: 0.01")
        .replace("every: 1\n", "every: 2\n")
    )
    resumed(tmp_path / "run").run()
    whole, run = result(tmp_path / "whole"), result(tmp_path / "run")
    assert {**run, "config": ""} == {**whole, "config": ""}
    assert run["config"] != whole["config"]


# ---- killed at any moment


class Killed(BaseException):
    """The process is gone: nothing that follows it reaches the disk."""


class Kills:
    """Ends the process, so to speak, at the n-th operation on files, some of them half done."""

    def __init__(self, at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._at = at
        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir")):
            monkeypatch.setattr(module, name, self._before(getattr(module, name)))
        monkeypatch.setattr(files, "_write", self._half(files._write))
        monkeypatch.setattr(output, "append", self._half(files.append))
        monkeypatch.setattr(output, "save_file", self._torn(save_file))
        monkeypatch.setattr(checkpoint, "save_file", self._torn(save_file))

    def _dies(self) -> bool:
        self.count += 1
        if self._at is not None and self.count > self._at:
            raise Killed
        return self.count == self._at

    def _before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if self._dies():
                raise Killed
            return real(*args, **options)

        return operation

    def _half(self, real: Callable[[Any, bytes], None]) -> Callable[[Any, bytes], None]:
        def operation(place: Any, data: bytes) -> None:
            dies = self._dies()
            real(place, data[: len(data) // 2] if dies else data)
            if dies:
                raise Killed

        return operation

    def _torn(self, real: Callable[..., None]) -> Callable[..., None]:
        def operation(tensors: Any, path: Path, metadata: Any) -> None:
            dies = self._dies()
            real(tensors, path, metadata)
            if dies:
                os.truncate(path, path.stat().st_size // 2)
                path.with_name(".tmpAbCdEf").touch()  # as the library's own temporary file
                raise Killed

        return operation


def test_a_crash_at_any_operation_on_files_loses_nothing(tmp_path: Path) -> None:
    settings = config(**{"training.rounds": 2, "evaluation.every": 1, "training.warmup_rounds": 1})
    new_run(tmp_path / "whole", settings).run()
    expected = result(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        operations = Kills(None, patch)
        new_run(tmp_path / "counted", settings).run()
    assert operations.count > 40
    for at in range(1, operations.count + 1):
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            Kills(at, patch)
            with pytest.raises(Killed):
                new_run(folder, settings).run()
        go_on(folder, settings, make_dataset())
        assert result(folder) == expected, at


def test_a_crash_while_training_further_loses_nothing(tmp_path: Path) -> None:
    short, settings = (config(**{"training.rounds": rounds}) for rounds in (1, 2))
    new_run(tmp_path / "whole", settings).run()
    expected = result(tmp_path / "whole")
    at, ended = 0, False
    while not ended:
        at += 1
        folder = tmp_path / str(at)
        new_run(folder, short).run()
        with pytest.MonkeyPatch.context() as patch:
            Kills(at, patch)
            try:
                resumed(folder, rounds=2).run()
                ended = True
            except Killed:
                pass
        resumed(folder, rounds=2).run()
        assert result(folder) == expected, at
    assert at > 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power asks for: content, then name, then the folder; metrics before the checkpoint."""
    told: list[str] = []

    def fsync(handle: int) -> None:
        told.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")

    def replace(source: Path, target: Path, real: Callable[..., None] = os.replace) -> None:
        told.append(f"rename {Path(target).name}")
        real(source, target)

    simulator = new_run(tmp_path / "run", config(**{"training.rounds": 1}))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    simulator.run()
    names = [line.removeprefix("rename ") for line in told if line.startswith("rename")]
    assert names[0] == "config.yaml"
    assert names[-3:] == ["round-00000001.safetensors", "model.safetensors", "summary.json"]
    for index, line in enumerate(told):
        kind, name = line.split()
        if kind == "rename":
            folder = "checkpoints" if name.startswith(("round", "constants")) else "run"
            assert told[index - 1] == f"fsync {name}"
            assert told[index + 1] == f"fsync {folder}"
    for index in (i for i, line in enumerate(told) if line.startswith("rename round")):
        assert "fsync metrics.jsonl" in told[index - 6 : index]


def test_memory_stays_flat(tmp_path: Path) -> None:
    """100 rounds that train and save keep nothing. The first time for anything (an import, a cache) may take
    memory once; a number kept for each client and round would take 9.6 kB in every 100."""
    traced: list[int] = []

    class Watch(Callback):
        def on_round(self, info: RoundInfo) -> None:
            if info.round % 100 == 0:
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])

    settings = {
        "training.rounds": 500,
        "training.clients_per_round": 3,
        "checkpoint.every": 25,
        "evaluation.every": 500,
        "compression.method": "top-k",
        "faults.dropout_rate": 0.1,
    }
    simulator = new_run(tmp_path / "run", config(**settings), callbacks=[Watch()])
    tracemalloc.start()
    try:
        simulator.run()
    finally:
        tracemalloc.stop()
    assert min(after - before for before, after in pairwise(traced)) < 4_000, traced


def killed_at_random(tmp_path: Path, kills: int, rounds: int) -> None:
    settings = config(**{"training.rounds": rounds, "evaluation.every": 3, "embedding.name": "full"})
    new_run(tmp_path / "whole", settings).run()
    expected = result(tmp_path / "whole")
    dataset = make_dataset()
    context = get_context("forkserver")
    context.set_forkserver_preload(["fedpeft_ext.simulation", "killed_run"])
    moments = random.Random(0)

    def start(folder: Path) -> Any:
        process = context.Process(target=go_on, args=(folder, settings, dataset))
        process.start()
        return process

    for name in ("starts the server", "timed"):
        began = time.perf_counter()
        process = start(tmp_path / name)
        process.join()
    took = time.perf_counter() - began
    assert process.exitcode == 0
    run = done = 0
    saved = set()
    while done < kills:
        process = start(tmp_path / str(run))
        process.join(moments.uniform(0.0, took))
        process.kill()  # unless it has ended
        process.join()
        if process.exitcode == 0:
            assert result(tmp_path / str(run)) == expected
            run += 1
        else:
            assert process.exitcode == -signal.SIGKILL
            saved.add(has_checkpoint(tmp_path / str(run)))
            done += 1
    process = start(tmp_path / str(run))
    process.join()
    assert process.exitcode == 0
    assert result(tmp_path / str(run)) == expected
    assert len(saved) > kills // 4  # they were moments of all kinds


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(tmp_path: Path, kills: int) -> None:
    killed_at_random(tmp_path, kills, rounds=12)


def test_any_number_of_processes_goes_on_with_the_run_of_another(tmp_path: Path) -> None:
    runs = {name: config(**CASES[name]) for name in ("top-k", "pfedrec", "faults")}
    for name, settings in runs.items():
        new_run(tmp_path / name, settings).run()
        with pytest.raises(Interrupted):
            new_run(tmp_path / f"{name}, one then two", settings, callbacks=[StopAfter(2)]).run()
    mp.start_processes(one_of_two, (tmp_path, runs, make_dataset()), nprocs=2, start_method="spawn")
    for name in runs:
        resumed(tmp_path / f"{name}, two then one").run()
        for way in ("one then two", "two then one"):
            assert result(tmp_path / f"{name}, {way}") == result(tmp_path / name)


# ---- signals


class Signal(Callback):
    """Sends this process a signal after each of these rounds."""

    def __init__(self, number: int, *rounds: int) -> None:
        self._number, self._rounds = number, rounds

    def on_round(self, info: RoundInfo) -> None:
        for _ in range(self._rounds.count(info.round)):
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_saved_after_its_round(tmp_path: Path, number: int) -> None:
    settings = config(**{"checkpoint.every": None})
    new_run(tmp_path / "whole", settings).run()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    simulator = new_run(tmp_path / "run", settings, callbacks=[Signal(number, 3)])
    with pytest.raises(_Stopped, match=r"stopped after round 3 of 5; fedpeft resume .* goes on") as stopped:
        _run_until_signal(simulator, tmp_path / "run")
    assert stopped.value.signal == number
    assert has_checkpoint(tmp_path / "run") == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed(tmp_path / "run").run()
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_the_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    settings = config(**{"checkpoint.every": None})
    simulator = new_run(tmp_path / "run", settings, callbacks=[Signal(signal.SIGINT, 2, 2)])
    with pytest.raises(_Stopped, match="ended at once"):
        _run_until_signal(simulator, tmp_path / "run")
    assert has_checkpoint(tmp_path / "run") == 0


# ---- what is refused


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """The folder of a run of 5 rounds that was stopped after 3."""
    with pytest.raises(Interrupted):
        new_run(tmp_path / "run", config(), callbacks=[StopAfter(3)]).run()
    return tmp_path / "run"


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "round-00000003.safetensors"


def refused(folder: Path, error: type[Exception], message: str, **options: Any) -> None:
    """`resume` fails with one sentence and leaves every file as it is."""
    before = content(folder) if folder.is_dir() else {}
    with pytest.raises(error, match=message) as raised:
        Simulator.resume(folder, **{"dataset": make_dataset()} | options)
    assert "\n" not in str(raised.value)
    if before:
        assert content(folder) == before


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    refused(tmp_path / "none", FileNotFoundError, r"expected the folder of a run, found none at .*none")
    (tmp_path / "file").write_text("")
    refused(tmp_path, FileNotFoundError, r"expected a checkpoint in .*checkpoints, found none")


@pytest.mark.parametrize("kind", ["round", "constants"])
def test_any_damage_is_found(interrupted: Path, kind: str) -> None:
    (path,) = (interrupted / "checkpoints").glob(f"{kind}-*")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [0, 7, 8, *rng.integers(8, header, 30), *rng.integers(header, len(whole), 20), len(whole) - 1]
    for place in map(int, places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"resume: .*{path.name}"):
            Simulator.resume(interrupted, make_dataset())
    for length in (0, 7, 8, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(interrupted, ValueError, rf"resume: .*{path.name} is damaged")
    path.write_bytes(whole + b"\0")
    refused(interrupted, ValueError, rf"resume: .*{path.name} is damaged")
    path.unlink()
    refused(interrupted, FileNotFoundError, r"resume: ")


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a checkpoint, leaving the digest that no longer fits."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["fedpeft_ext"])
    change(header)
    save_file(load_file(path), path, {**metadata, "fedpeft_ext": json.dumps(header)})


def test_another_format_version(interrupted: Path) -> None:
    rewritten(newest(interrupted), lambda header: header.update(format=99, fedpeft_ext="7.0"))
    refused(interrupted, ValueError, r"round-00000003.* has format 99, written by fedpeft_ext 7\.0")


def test_a_header_that_was_edited(interrupted: Path) -> None:
    rewritten(newest(interrupted), lambda header: header["progress"].update(total_bytes=0))
    refused(interrupted, ValueError, r"round-00000003.* is damaged \(its content does not have the SHA-256")


def test_a_file_of_somebody_else(interrupted: Path) -> None:
    save_file({"a": torch.zeros(1)}, newest(interrupted))
    refused(interrupted, ValueError, r"round-00000003.* is not a file that fedpeft_ext wrote")


def test_other_settings_or_data(interrupted: Path) -> None:
    path = interrupted / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("local_epochs: 2", "local_epochs: 3"))
    refused(interrupted, ValueError, r"config\.yaml: training\.local_epochs: expected 2, .* got 3")
    path.write_text(text.replace("local_epochs: 2", "local_epochs: many"))
    refused(interrupted, ValueError, r"training\.local_epochs")
    path.write_text(text)
    refused(interrupted, ValueError, r"dataset: .*on other data than 'tiny'", dataset=make_dataset(seed=1))
    refused(interrupted, ValueError, r"training\.rounds: expected at least 3, .* got 2", rounds=2)
    refused(interrupted, ValueError, r"training\.rounds", rounds=-1)


def test_data_that_moved(interrupted: Path, tmp_path: Path) -> None:
    path, moved = interrupted / "config.yaml", tmp_path / "moved"
    save_dataset(make_dataset(), moved)
    text = path.read_text()

    def data_are_in(name: Path) -> None:
        path.write_text(yaml.safe_dump(yaml.safe_load(text) | {"dataset": {"name": str(name)}}))

    data_are_in(tmp_path / "gone.csv")
    error = r"gone\.csv: no such file .*config\.yaml names the data"
    refused(interrupted, FileNotFoundError, error, dataset=None)
    with pytest.raises(FileNotFoundError, match=error):
        load_run(interrupted)
    data_are_in(moved)
    assert load_run(interrupted).round == 3
    assert Simulator.resume(interrupted).run().rounds == 5


def test_metrics_that_were_changed(interrupted: Path) -> None:
    path = interrupted / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("round", "ground", 1))
    refused(interrupted, ValueError, r"metrics\.jsonl was changed since the run was saved")
    path.write_text(whole[:-1])
    refused(interrupted, ValueError, r"metrics\.jsonl was changed since the run was saved")
    path.unlink()
    refused(interrupted, FileNotFoundError, r"found none at .*metrics\.jsonl")
    path.write_text(whole + '{"half of a li')  # what a crash leaves
    resumed(interrupted).run()
    assert len(result(interrupted)["lines"]) == 4


def test_a_new_run_does_not_touch_an_interrupted_one(interrupted: Path) -> None:
    before = content(interrupted)
    with pytest.raises(FileExistsError, match=r"holds an interrupted run, saved after round 3.*resume"):
        new_run(interrupted, config())
    assert content(interrupted) == before
    (interrupted / "checkpoints" / "mine.txt").write_text("")
    new_run(interrupted, config(**{"training.rounds": 1, "log.csv": False}), overwrite=True)
    assert sorted(content(interrupted)) == ["checkpoints/mine.txt"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    class Second(Callback):
        def on_round(self, info: RoundInfo) -> None:
            before = content(tmp_path / "run")
            with pytest.raises(BlockingIOError, match="another process is writing to"):
                resumed(tmp_path / "run").run()
            with pytest.raises(BlockingIOError, match="another process is writing to"):
                new_run(tmp_path / "run", config(), overwrite=True)
            assert content(tmp_path / "run") == before

    new_run(tmp_path / "run", config(), callbacks=[Second()]).run()


@pytest.mark.parametrize("kind", ["checkpoint", "model", "metrics"])
def test_a_full_disk_names_the_file_and_keeps_what_was_saved(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_run(tmp_path / "whole", config()).run()
    folder = tmp_path / "run"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real, module = save_file, checkpoint if kind == "checkpoint" else output

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if kind == "model" or "round-00000003" in path.name:
            path.write_bytes(b"half")
            raise full
        real(tensors, path, metadata)

    def write(file: Any, data: bytes) -> None:
        if b'"round": 4' in data:
            file.write(data[:10])

            class Full:
                name = file.name

                def write(self, data: bytes) -> int:
                    raise full

            files.append(Full(), data[10:])  # type: ignore[arg-type]
        else:
            files.append(file, data)

    if kind == "metrics":
        monkeypatch.setattr(output, "append", write)
    else:
        monkeypatch.setattr(module, "save_file", save)
    name = {"checkpoint": "round-00000003.safetensors", "model": "model.safetensors"}.get(
        kind, "metrics.jsonl"
    )
    with pytest.raises(OSError, match=rf"^cannot write .*{name}: No space left on device$"):
        new_run(folder, config()).run()
    assert not list(folder.rglob("*.part"))
    monkeypatch.undo()
    assert has_checkpoint(folder) == {"checkpoint": 2, "model": 5, "metrics": 3}[kind]
    resumed(folder).run()
    assert result(folder) == result(tmp_path / "whole")


def test_a_limit_on_file_size_is_like_a_full_disk(tmp_path: Path) -> None:
    """The operating system's own refusal, of a file that safetensors writes."""
    simulator = new_run(tmp_path / "run", config(**{"embedding.name": "full"}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=r"^cannot write .*safetensors: .*File too large"):
            simulator.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").rglob("*.part"))


# ---- what is kept, and when


def test_checkpoints_and_constants_that_are_kept(tmp_path: Path) -> None:
    settings = config(**{"checkpoint.keep": 2, "training.warmup_rounds": 2})
    seen: dict[int, tuple[list[str], set[int]]] = {}

    class Watch(Callback):
        def on_round(self, info: RoundInfo) -> None:
            place = tmp_path / "run" / "checkpoints"
            constants = list(place.glob("constants-*"))
            seen[info.round - 1] = (
                sorted(path.stem for path in place.glob("round-*")),
                {path.stat().st_ino for path in constants},
            )

    new_run(tmp_path / "run", settings, callbacks=[Watch()]).run()
    kept = {round: [int(stem[6:]) for stem in stems] for round, (stems, _) in seen.items()}
    assert kept == {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3], 4: [3, 4]}
    first, second = seen[0][1], seen[4][1]
    assert [inodes for _, inodes in seen.values()] == [first, first, first | second, second, second]
    assert len(first) == len(second) == 1
    # The newest is lost: the one before serves.
    (tmp_path / "run" / "checkpoints" / "round-00000005.safetensors").unlink()
    expected = result(tmp_path / "run") | {"names": []}
    resumed(tmp_path / "run").run()
    assert result(tmp_path / "run") | {"names": []} == expected


def test_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        new_run(tmp_path / "run", config(**{"checkpoint.every": 0}), callbacks=[StopAfter(2)]).run()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_by_time_they_take_one_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now)
    folder = CheckpointFolder(tmp_path, CheckpointConfig())
    assert not folder.due(1)
    now += 10.0
    assert folder.due(2)
    state = {"tensor": torch.zeros(3), "number": 1}

    def slow(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal now
        now += 0.5
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    constants: dict[str, torch.Tensor] = {}
    folder.save(checkpoint.Checkpoint(2, {}, state, constants))
    folder.save(checkpoint.Checkpoint(3, {}, state, constants))
    now += 49.0
    assert not folder.due(4)
    now += 1.5
    assert folder.due(5)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    from tensorboardX.proto.event_pb2 import Event

    settings = config(**{"log.tensorboard": True})
    with pytest.raises(Interrupted):
        new_run(tmp_path / "run", settings, callbacks=[StopAfter(3)]).run()
    resumed(tmp_path / "run").run()
    values: dict[str, dict[int, float]] = {}
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    assert sorted(values["train/loss"]) == [1, 2, 3, 4, 5]
    assert sorted(values["evaluation/HR@10"]) == [0, 2, 4, 5]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert values["evaluation/HR@10"][5] == pytest.approx(last["HR@10"])


def test_the_digest_of_data_covers_all_that_is_trained_on_and_evaluated(dataset: Dataset) -> None:
    same = make_dataset()
    assert same.digest == dataset.digest
    for name in ("indices", "test_items"):
        values = {field: getattr(same, field) for field in same.__dataclass_fields__}
        changed = values[name].copy()
        changed[[0, 1]] = changed[[1, 0]]
        try:
            other = Dataset(**{**values, name: changed})
        except ValueError:
            continue  # the swap made a test item a training item
        assert other.digest != same.digest
