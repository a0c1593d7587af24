"""`make gpu-check` on a machine without a GPU: its dry run, its refusals and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import EMULATED

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the benchmarks are not part of an installation"
)
emulated = pytest.mark.skipif(not EMULATED, reason="fedpeft_ext._emulator is not built")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)


@emulated
def test_dry_run(tmp_path: Path) -> None:
    done = python(
        "benchmarks.gpu_check",
        "--dry-run",
        "--steps",
        "build,racecheck,benchmark,simulator",
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "-DFEDPEFT_CUDA=ON" in done.stdout
    assert "--tool racecheck" in done.stdout
    results = json.loads((tmp_path / "gpu-emulator.json").read_text())
    assert {s: outcome["result"] for s, outcome in results["steps"].items()} == {
        "build": "needs a GPU: commands printed",
        "racecheck": "needs a GPU: commands printed",
        "benchmark": "passed",
        "simulator": "passed",
    }
    report = (tmp_path / "gpu-emulator.md").read_text()
    for op, row in results["benchmark"]["large"].items():
        assert f"| `{op}` |" in report
        assert row["forward_bytes"] > 0
        assert not [key for key in row if key.endswith("_failed")]
    for name, engines in results["simulator"].items():
        assert f"| {name} | `fused` |" in report
        assert all(rate > 0 for rates in engines.values() for rate in rates.values())


@emulated
def test_kernel_steps(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = python(
        "benchmarks.gpu_kernels", "touch", "streams", "graphs", "large", "--emulated", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["touch"]["calls"] == results["streams"]["streams"] == len(results["graphs"]["captured"])


@emulated
def test_a_wrong_kernel_fails_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_kernels
    from benchmarks.gpu_cases import CASES, CHECKS, Draw
    from fedpeft_ext import ops

    case = CASES["rq_lookup"](CHECKS[0], Draw(torch.device("cpu")))
    gpu_kernels.compare("rq_lookup", case)
    right = ops.rq_lookup
    monkeypatch.setattr(ops, "rq_lookup", lambda *a: right(*a) * 1.01)
    with pytest.raises(AssertionError, match=r"rq_lookup: output 0 is .* off its twin"):
        gpu_kernels.compare("rq_lookup", case)


def test_only_few_elements_may_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_kernels
    from benchmarks.gpu_cases import CASES, CHECKS, Draw
    from fedpeft_ext import ops

    case = dataclasses.replace(CASES["dot_scores"](CHECKS[0], Draw(torch.device("cpu"))), agreement=0.98)
    right = ops.dot_scores
    for count, value, good in ((3, 9.0, True), (4, 9.0, False), (1, torch.nan, False)):
        spoil = torch.zeros(160).index_fill(0, torch.arange(count), value).view(4, 40)
        monkeypatch.setattr(ops, "dot_scores", lambda *a, spoil=spoil: right(*a) + spoil)
        with contextlib.nullcontext() if good else pytest.raises(AssertionError, match=r"output 0 is .* off"):
            gpu_kernels.compare("dot_scores", case)


def test_a_case_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_kernels
    from fedpeft_ext import ops

    right, kept = ops.rq_lookup, {}
    monkeypatch.setattr(ops, "rq_lookup", lambda *a: right(*a) * 1.01)
    with pytest.raises(
        AssertionError, match=r"^rq_lookup \(large\): output 0 is .*\nrq_lookup \(small\): .*$"
    ):
        gpu_kernels.benchmark(
            torch.device("cpu"), ["rq_lookup", "client_embedding"], True, (), lambda rows: kept.update(rows)
        )
    assert list(kept["large"]) == list(kept["small"]) == ["client_embedding"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    done = python("benchmarks.gpu_check")
    assert done.returncode != 0
    assert "gpu-check: this machine lacks" in done.stderr
    assert "torch" in done.stderr


def test_unknown_steps_are_refused() -> None:
    done = python("benchmarks.gpu_check", "--steps", "bild")
    assert done.returncode != 0
    assert "--steps: expected some of build,streams" in done.stderr


def test_every_op_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_cases import CASES
    from fedpeft_ext import ops

    cpu_only = {"make_hashes", "local_train_sum_", "train_round_"}
    functions = {name for name in ops.__all__ if name[0].islower()} - cpu_only
    assert not functions - {case.partition(",")[0] for case in CASES}
