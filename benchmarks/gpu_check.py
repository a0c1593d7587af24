"""Everything to run on a machine with a GPU: `make gpu-check`. It needs no network, no data sets and no
installed fedpeft_ext: it builds the extension in place, for this GPU and the Python that runs it (3.10 or
newer, with a CUDA build of torch >= 2.11), and then goes through these steps:

    build      CMake with FEDPEFT_CUDA=ON, warnings as errors
    streams    many streams at a time give what one gives
    graphs     captured CUDA graphs give on new inputs what calls give
    large      tables and outputs past 2^31 elements
    memcheck   compute-sanitizer over every op in both directions, torch's caching allocator off
    tests      of ops and modules on the device; of federations where the simulator's packages are installed
    benchmark  time and bytes/s of every op beside a copy, its eager and compiled twins and PyTorch's own op
    simulator  clients a second that the engines train (with those packages too)
    racecheck  compute-sanitizer again, for races in shared memory
    synccheck  and for barriers that not all of their threads reach

The short ones come first. A step or case that fails does not stop the others; cases that no report has yet
come before the rest. Results go to benchmarks/results/gpu-<name>.json and a Markdown
table beside it; those of a run with --steps are added to what the same commit gave before.

With --dry-run all that needs no GPU runs, on tiny shapes with the emulated kernels; the commands of the other
steps are printed. Its numbers mean nothing and go to a temporary folder.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["build", "streams", "graphs", "large", "memcheck", "tests", "benchmark", "simulator"]
STEPS += ["racecheck", "synccheck"]
SANITIZERS = ["memcheck", "racecheck", "synccheck"]
NEEDS_GPU = ["build", *SANITIZERS]
KERNEL_STEPS = ["streams", "graphs", "large", "benchmark"]  # of benchmarks.gpu_kernels
# Synthetic data (users, items, interactions of a user), clients of a round, and the backbone.
FEDERATIONS = {
    "ML-100K's shape, 94 clients a round": (943, 1682, 106, "94", "fedmf"),
    "FedNCF, ML-100K's shape, 94 clients a round": (943, 1682, 106, "94", "fedncf"),
    "PFedRec, ML-100K's shape, 94 clients a round": (943, 1682, 106, "94", "pfedrec"),
    "ML-100K's shape, all 943": (943, 1682, 106, "1.0", "fedmf"),
    "FedNCF, ML-100K's shape, all 943": (943, 1682, 106, "1.0", "fedncf"),
    "20,000 users with 100 of 20,000 items, all": (20_000, 20_000, 100, "1.0", "fedmf"),
}
TRAINED = "full,p-lora,p-hash,p-hash+senet,p-rq"
MLP_TRAINED = "full,p-lora,p-hash,p-rq"  # `fused` knows no SENet beside an MLP
# What the simulator, data and command line import beyond the ops and modules.
SIMULATOR = [
    "polars",
    "sklearn",
    "vector_quantize_pytorch",
    "pydantic",
    "yaml",
    "typer",
    "rich",
    "safetensors",
]


class StepFailed(Exception):
    """One step did not pass; its message is for the report, beside what it `found` all the same."""

    def __init__(self, message: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


def find(tool: str) -> str | None:
    """A program beside this Python, on the PATH, or in a CUDA toolkit."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [
        Path(sys.executable).parent,
        *map(Path, os.environ.get("PATH", "").split(os.pathsep)),
        *([Path(nvcc).resolve().parent] if nvcc else []),
        *(Path(home) / "bin" for home in homes if home),
    ]
    return shutil.which(tool, path=os.pathsep.join(map(str, folders)))


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing(steps: list[str]) -> list[str]:
    """What this machine lacks for the steps, each with what to do."""
    if not installed("torch"):
        return [f"torch >= 2.11 with CUDA in this Python ({sys.executable})"]
    import torch

    lacking = []
    if not torch.version.cuda:
        lacking.append(f"a CUDA build of torch, this is {torch.__version__}")
    elif not torch.cuda.is_available():
        lacking.append("a GPU that torch sees; `make gpu-check DRY=1` runs what needs none")
    if "build" in steps:
        if find("cmake") is None:
            lacking.append("cmake >= 3.24 (pip install cmake)")
        if not installed("pybind11"):
            lacking.append("pybind11 (pip install pybind11)")
        if not Path(os.environ.get("CUDACXX", "")).is_file() and find("nvcc") is None:
            lacking.append("nvcc of torch's CUDA version (name it in CUDACXX)")
    if "tests" in steps:
        lacking += [f"{m} (pip install {m})" for m in ("numpy", "pytest", "hypothesis") if not installed(m)]
    if set(SANITIZERS) & set(steps) and find("compute-sanitizer") is None:
        lacking.append(
            "compute-sanitizer, which comes with the CUDA toolkit (or leave its steps out: --steps)"
        )
    return lacking


def architecture() -> str:
    import torch

    if not torch.cuda.is_available():
        return "90-real"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def build_commands() -> list[list[str]]:
    import torch

    version = re.sub(r"[^\w.]+", "-", torch.__version__)
    folder = ROOT / "build" / f"gpu-check-{sys.implementation.cache_tag}-torch-{version}"
    cmake, ninja = find("cmake") or "cmake", find("ninja")
    return [
        [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            *(f"-DPython_EXECUTABLE={sys.executable}", "-DFEDPEFT_CUDA=ON", "-DFEDPEFT_WERROR=ON"),
            f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}",
        ],
        [cmake, "--build", str(folder), "--target", "_C", "--parallel", str(os.cpu_count() or 1)],
        [cmake, "-E", "copy", f"{folder}/{_library()}", str(ROOT / "fedpeft_ext")],
    ]


def _library() -> str:
    import sysconfig

    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_command(dry: bool) -> tuple[list[str], str]:
    """And what is left out, if anything."""
    # By name, so that a run which is stopped tells what failed.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if installed("xdist"):  # processes share the GPU
        command += ["-n", str(min(os.cpu_count() or 1, 12)), "--dist", "worksteal"]
    if dry:
        return [*command, "python_tests/test_emulator.py"], ""
    command += ["-k", "not cpu", "python_tests/ops", "python_tests/nn"]  # targets that are no GPU
    absent = [module for module in SIMULATOR if not installed(module)]
    if absent:
        return command, f"ops and modules alone: {', '.join(absent)} not installed"
    return [*command, "python_tests/simulation/test_on_gpu.py"], ""


def kernel_command(step: str, dry: bool, out: Path) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", step, "--json", str(out)]
    return [*command, "--emulated"] if dry else command


def engines_command(shape: tuple[int, int, int, str, str], dry: bool, out: Path) -> list[str]:
    users, items, each, clients = (60, 300, 10, "9") if dry else shape[:4]
    backbone = shape[4]
    options = {"num_users": users, "num_items": items, "interactions_per_user": each, "item_text": "false"}
    settings = {
        "device": "cpu" if dry else "cuda",
        "training.clients_per_round": clients,
        "chunk_memory_mb": 4096,
        "backbone.name": backbone,
    }
    return [
        *(
            sys.executable,
            "-m",
            "benchmarks.bench_engines",
            "--dataset",
            "synthetic",
            "--embeddings",
            TRAINED if backbone == "fedmf" else MLP_TRAINED,
        ),
        *("--engines", "fused,batched", "--rounds", "2" if dry else "10", "--json", str(out)),
        *(word for key, value in options.items() for word in ("--option", f"{key}={value}")),
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]


def simulator(dry: bool, folder: Path) -> dict[str, Any]:
    """Clients a second by federation, engine and embedding."""
    absent = [module for module in SIMULATOR if not installed(module)]
    if absent:
        return {"note": f"skipped: {', '.join(absent)} not installed"}
    rates: dict[str, Any] = {}
    for name, shape in list(FEDERATIONS.items())[: 2 if dry else None]:
        call(engines_command(shape, dry, folder / "engines.json"))
        rates[name] = {}
        for row in json.loads((folder / "engines.json").read_text())["results"]:
            rates[name].setdefault(row["engine"], {})[row["embedding"]] = row["clients_per_second"]
    return rates


def sanitizer_command(tool: str) -> list[str]:
    sanitizer = find("compute-sanitizer") or "compute-sanitizer"
    return [
        *(sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"),
        *(sys.executable, "-m", "benchmarks.gpu_kernels", "touch"),
        # Barriers are the same for all types, and watching for races is slow.
        *([] if tool == "memcheck" else ["--dtypes", "float32"]),
    ]


def call(command: list[str], dry: bool = False, **environment: str) -> None:
    """Runs a command in the repository, or prints it where it needs a GPU that is not there."""
    print("    " + shlex.join([*(f"{k}={v}" for k, v in environment.items()), *command]), flush=True)
    if dry:
        return
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment})
    if done.returncode != 0:
        raise StepFailed(f"exit status {done.returncode} of {shlex.join(command)}")


def run_step(step: str, dry: bool, folder: Path) -> dict[str, Any]:
    if step == "build":
        for command in build_commands():
            call(command, dry)
        return {}
    if step == "tests":
        command, note = test_command(dry)
        call(command, OMP_NUM_THREADS="1")  # else each of the processes starts a thread a core
        return {"note": note} if note else {}
    if step in SANITIZERS:
        # torch's allocator hands out parts of large blocks, past whose end a kernel could write unseen.
        call(sanitizer_command(step), dry, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if dry and step == "memcheck":
            call(kernel_command("touch", dry, folder / "touch.json"))
        return {}
    if step == "simulator":
        return simulator(dry, folder)
    out = folder / f"{step}.json"
    try:
        call(kernel_command(step, dry, out))
    except StepFailed as error:
        found = json.loads(out.read_text()) if out.exists() else {}
        raise StepFailed(str(error), found.get(step)) from error
    result: dict[str, Any] = json.loads(out.read_text())[step]
    return result


def commit() -> str:
    """Of the sources; FEDPEFT_COMMIT names it where they were copied out of their repository."""
    if named := os.environ.get("FEDPEFT_COMMIT"):
        return named
    git = shutil.which("git")
    if git is None:
        return "unknown"
    done = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine(dry: bool) -> dict[str, str]:
    import torch

    name = "emulator" if dry else torch.cuda.get_device_name()
    cuda = torch.version.cuda or "none"
    python = platform.python_version()
    return {"device": name, "torch": torch.__version__, "cuda": cuda, "python": python, "commit": commit()}


def _times(row: dict[str, Any], direction: str, rival: str) -> str:
    """How many times as fast as the rival ours is."""
    theirs = row.get(f"{direction}_{rival}_s")
    if theirs is None:
        return "fails" if f"{rival}_failed" in row else ""
    return f"{theirs / row[f'{direction}_ours_s']:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def rates_of_arithmetic(measured: dict[str, Any]) -> str:
    """Of the ops that are bound by it."""
    return ", ".join(
        f"`{op}` {row['forward_tflops']:.1f} TFLOP/s"
        for op, row in measured.get("large", {}).items()
        if "forward_tflops" in row
    )


def markdown(results: dict[str, Any]) -> str:
    """The report: steps, kernels, federated training."""
    lines = [
        f"# CUDA kernels on {results['device']}",
        "",
        f"torch {results['torch']}, CUDA {results['cuda']}, Python {results['python']}, "
        f"commit {results['commit']}.",
        "",
        *_table(
            ["step", "result", "seconds"],
            [
                [step, s["result"] + (f" ({s['note']})" if s.get("note") else ""), f"{s['seconds']:.0f}"]
                for step, s in results["steps"].items()
            ],
        ),
        "",
    ]
    for name, reason in results.get("graphs", {}).get("not_capturable", {}).items():
        lines += [f"A CUDA graph cannot hold `{name}`: {reason}.", ""]
    lines += kernel_tables(results["benchmark"]) if "benchmark" in results else []
    lines += simulator_table(results["simulator"]) if "simulator" in results else []
    return "\n".join([*lines, ""])


def simulator_table(rates: dict[str, Any]) -> list[str]:
    names = TRAINED.split(",")
    return [
        "",
        "Federated training (FedMF or what is named, width 32, Adam, 2 local epochs), clients/s of the "
        "median round.",
        "",
        *_table(
            ["federation", "engine", *names],
            [
                [name, f"`{engine}`", *(f"{row[e]:,.0f}" if e in row else "" for e in names)]
                for name, engines in rates.items()
                for engine, row in engines.items()
            ],
        ),
    ]


def kernel_tables(measured: dict[str, Any]) -> list[str]:
    """Large shapes by bytes/s, then small ones by time and launches."""
    lines: list[str] = []
    lines += [
        f"A device-to-device copy moves {measured['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and written). "
        "Shapes larger than L2; *of copy*: the least bytes that the op must move, over its time, beside the "
        "copy. Other columns: how many times as fast as the plain-PyTorch twin (eager, compiled) and as "
        f"PyTorch's own op. Bound by arithmetic: {rates_of_arithmetic(measured)}.",
        "",
    ]
    rows = []
    for op, row in measured.get("large", {}).items():
        cells = [f"`{op}`"]
        for direction in ("forward", "backward"):
            if f"{direction}_ours_s" not in row:
                cells += [""] * 5
                continue
            cells += [
                f"{row[f'{direction}_bytes'] / 1e6:.0f}",
                f"{row[f'{direction}_of_copy']:.0%}",
                *(_times(row, direction, rival) for rival in ("eager", "compiled")),
                _times(row, direction, "native") + (f" ({row['native_op']})" if "native_op" in row else ""),
            ]
        rows.append(cells)
    columns = ["MB", "of copy", "× eager", "× compiled", "× own op"]
    lines += _table(["op", *columns, *(f"backward: {c}" for c in columns)], rows)
    if small := measured.get("small"):
        lines += ["", "Small shapes, bound by launches: µs a call from Python, and launches.", ""]
        rows = [
            [
                f"`{op}`",
                *(
                    cell
                    for d in ("forward", "backward")
                    for cell in (
                        f"{row[f'{d}_ours_s'] * 1e6:.0f}" if f"{d}_ours_s" in row else "",
                        str(row.get(f"{d}_launches", "")),
                        f"{row[f'{d}_eager_s'] * 1e6:.0f}" if f"{d}_eager_s" in row else "",
                    )
                ),
            ]
            for op, row in small.items()
        ]
        lines += _table(["op", "µs", "launches", "eager µs", "backward: µs", "launches", "eager µs"], rows)
    return lines


def add_step(
    report: Path, identity: dict[str, str], step: str, outcome: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """The report with one more step; what another commit or machine gave before is dropped. Runs of several
    steps at a time may share a report."""
    with (Path(tempfile.gettempdir()) / f"{report.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results: dict[str, Any] = {**identity, "steps": {}}
        if report.exists():
            former = json.loads(report.read_text())
            if all(former[key] == value for key, value in identity.items()):
                results = former
        results["steps"][step] = outcome
        if found:
            results[step] = found
        results["steps"] = {s: results["steps"][s] for s in STEPS if s in results["steps"]}
        report.write_text(json.dumps(results, indent=1) + "\n")
        report.with_suffix(".md").write_text(markdown(results))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests and benchmarks on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="run what needs no GPU, on tiny shapes")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {','.join(STEPS)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args()
    steps, dry = [s.strip() for s in options.steps.split(",")], options.dry_run
    if unknown := [s for s in steps if s not in STEPS]:
        parser.error(f"--steps: expected some of {','.join(STEPS)}, got {','.join(unknown)}")
    if not dry and (lacking := missing(steps)):
        sys.exit("gpu-check: this machine lacks\n  " + "\n  ".join(lacking))

    identity = machine(dry)
    folder = options.out or (Path(tempfile.mkdtemp()) if dry else ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', identity['device'].lower()).strip('-')}.json"
    results: dict[str, Any] = {**identity, "steps": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for step in steps:
            print(f"==> {step}", flush=True)
            start = time.perf_counter()
            outcome: dict[str, Any] = {"result": "passed"}
            found: dict[str, Any] = {}
            if dry and step in NEEDS_GPU:
                outcome["result"] = "needs a GPU: commands printed"
            try:
                found = run_step(step, dry, Path(scratch))
            except StepFailed as error:
                outcome, found = {"result": "FAILED", "note": str(error)}, error.found
                print(f"    FAILED: {error}", file=sys.stderr, flush=True)
            if note := found.pop("note", ""):
                outcome["note"] = note
            outcome["seconds"] = time.perf_counter() - start
            # After every step, so that what was measured outlasts a machine that is taken away.
            results = add_step(report, identity, step, outcome, found)
            if step == "build" and outcome["result"] == "FAILED":
                break
    print("\n" + markdown(results) + f"\nWritten to {report} and {report.with_suffix('.md')}")
    failed = [step for step in steps if results["steps"].get(step, {}).get("result") == "FAILED"]
    if failed:
        print(f"gpu-check: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
