"""Everything to run on a machine with a GPU: `make gpu-check`.

Tests on the device, compute-sanitizer on a subset, streams, graph capture, a table past 2^31 elements, and
each kernel's achieved bytes/s beside a device-to-device copy and beside the same computation in plain PyTorch
(eager and compiled) and F.embedding_bag. Writes benchmarks/results/gpu-<name>.json and a Markdown table
beside it.

With --dry-run every step that needs no GPU runs here, on tiny shapes and the emulated kernels, so that the
script itself is known to work; its numbers mean nothing and go to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedpeft_ext import ops, reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests"))


def step(name: str, command: list[str]) -> None:
    print(f"==> {name}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def cases(
    device: torch.device, scale: int
) -> dict[str, tuple[Callable[[Any], Any], tuple[torch.Tensor, ...], int]]:
    """By name: the call on a namespace of ops, the leaves that need a gradient, and the bytes that a forward
    must move: the indices, a row for each read, and the output."""
    g = torch.Generator().manual_seed(0)
    C, P, num_items, D, L, K, M, H, r = 16 * scale, 128, 1000 * scale, 64, 4, 256, 512, 4, 8

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device).requires_grad_()

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g).to(device)

    items, base = integers(num_items, C, P), randn(num_items, D).detach()
    codes = integers(K, num_items, L).to(torch.uint8)
    codebooks, table, weight = randn(C, L, K, D), randn(C, M, D), randn(C, P, D)
    A, B, hashes = randn(C, P, r), randn(C, D, r), integers(2**61 - 1, H, 2)
    rows = integers(P, C, P)
    out = C * P * D * 4
    return {
        "rq_lookup": (
            lambda o: o.rq_lookup(items, codes, codebooks, base),
            (codebooks,),
            size(items) + C * P * (L + (L + 1) * D * 4) + out,
        ),
        "hash_lookup": (
            lambda o: o.hash_lookup(items, table, hashes, base=base),
            (table,),
            size(items) + C * P * (H + 1) * D * 4 + out,
        ),
        "lora_lookup": (
            lambda o: o.lora_lookup(items, A, B, base, rows),
            (A, B),
            size(items, rows, B) + C * P * (r + D) * 4 + out,
        ),
        "client_embedding": (
            lambda o: o.client_embedding(rows, weight),
            (weight,),
            size(rows) + C * P * D * 4 + out,
        ),
    }


def benchmark(device: torch.device, scale: int, repeats: int, compiled: bool) -> dict[str, Any]:
    source = torch.empty(max(1 << 12, scale << 16), device=device)
    target = torch.empty_like(source)
    copy = 2 * size(source) / seconds(lambda: target.copy_(source), device, repeats)
    results: dict[str, Any] = {"copy_bytes_per_s": copy, "ops": {}}
    for name, (call, leaves, moved) in cases(device, scale).items():
        out = call(ops)
        grad = torch.ones_like(out)
        backward_bytes = size(grad) + 2 * size(*leaves)

        def backward(
            output: torch.Tensor, leaves: tuple[torch.Tensor, ...] = leaves, grad: Any = grad
        ) -> Any:
            return torch.autograd.grad(output, leaves, grad, retain_graph=True)

        row: dict[str, float] = {}
        with torch.no_grad():
            row["forward_s"] = seconds(lambda c=call: c(ops), device, repeats)  # type: ignore[misc]
            row["forward_eager_s"] = seconds(lambda c=call: c(reference), device, repeats)  # type: ignore[misc]
            if compiled:
                fast = torch.compile(lambda c=call: c(reference))  # type: ignore[misc]
                row["forward_compiled_s"] = seconds(fast, device, repeats)
        expected = call(reference)
        row["backward_s"] = seconds(lambda o=out: backward(o), device, repeats)  # type: ignore[misc]
        row["backward_eager_s"] = seconds(lambda o=expected: backward(o), device, repeats)  # type: ignore[misc]
        row["forward_of_copy"] = moved / row["forward_s"] / copy
        row["backward_of_copy"] = backward_bytes / row["backward_s"] / copy
        results["ops"][name] = row
    bag, index = (
        torch.randn(1000 * scale, 64, device=device),
        torch.randint(1000, (2048 * scale, 4), device=device),
    )
    with torch.no_grad():
        results["embedding_bag_s"] = seconds(lambda: F.embedding_bag(index, bag, mode="sum"), device, repeats)
    return results


def markdown(name: str, results: dict[str, Any]) -> str:
    lines = [
        f"Kernels on {name}; device-to-device copy {results['copy_bytes_per_s'] / 1e9:.0f} GB/s.",
        "",
        "| op | forward, of copy | times eager | backward, of copy | times eager |",
        "|---|---|---|---|---|",
    ]
    for op, row in results["ops"].items():
        forward, backward = (
            row["forward_eager_s"] / row["forward_s"],
            row["backward_eager_s"] / row["backward_s"],
        )
        lines.append(
            f"| `{op}` | {row['forward_of_copy']:.0%} | {forward:.1f} "
            f"| {row['backward_of_copy']:.0%} | {backward:.1f} |"
        )
    return "\n".join(lines) + "\n"


def check_streams_and_graphs(device: torch.device) -> None:
    """Two streams at a time, and a captured graph replayed on new inputs, give what one stream gives."""
    calls = cases(device, 4)
    expected = {name: call(ops).detach() for name, (call, _, _) in calls.items()}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    got = {}
    for stream, (name, (call, _, _)) in zip(streams, calls.items(), strict=True):
        with torch.cuda.stream(stream):
            got[name] = [call(ops).detach() for _ in range(20)]
    torch.cuda.synchronize()
    for name, outs in got.items():
        assert all(torch.equal(out, expected[name]) for out in outs), f"{name} differs on streams"
    rows, weight = torch.randint(32, (8, 64), device=device), torch.randn(8, 32, 64, device=device)
    ops.client_embedding(rows, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.client_embedding(rows, weight)
    weight.copy_(torch.randn_like(weight))
    graph.replay()
    assert torch.equal(out, ops.client_embedding(rows, weight)), "a replayed graph differs"


def check_large_table(device: torch.device) -> None:
    """Rows past element 2^31 are read where they are."""
    rows = (1 << 25) + 16
    table = torch.zeros(rows, 64, dtype=torch.float16, device=device)
    last = torch.arange(rows - 16, rows, device=device)
    table[last] = torch.randn(16, 64, device=device).half()
    assert torch.equal(ops.client_embedding(last, table), table[last]), "a table past 2^31 elements"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tests and benchmarks on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="run what needs no GPU, on tiny shapes")
    dry = parser.parse_args().dry_run
    if not dry and not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no GPU here; `make gpu-check DRY=1` runs what needs none")
    pytest = [sys.executable, "-m", "pytest", "-q"]
    if dry:
        from emulated import emulated_kernels

        step("Tests on the emulated device", [*pytest, "python_tests/test_emulator.py"])
        with emulated_kernels():
            results = benchmark(torch.device("cpu"), 1, 2, compiled=False)
        name, folder = "emulator", Path(tempfile.mkdtemp())
    else:
        device = torch.device("cuda")
        step("The whole suite", pytest)
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            sys.exit("gpu-check: compute-sanitizer was not found; it comes with the CUDA toolkit")
        for tool in ("memcheck", "racecheck"):
            subset = [*pytest, "python_tests/ops", "-k", "cuda and every_width"]
            step(f"compute-sanitizer {tool}", [sanitizer, "--tool", tool, "--error-exitcode", "1", *subset])
        check_streams_and_graphs(device)
        check_large_table(device)
        results = benchmark(device, 256, 30, compiled=True)
        name = torch.cuda.get_device_name()
        folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (folder / f"{stem}.json").write_text(
        json.dumps({"device": name, "torch": torch.__version__, **results}, indent=2)
    )
    (folder / f"{stem}.md").write_text(markdown(name, results))
    print(markdown(name, results) + f"\nWritten to {folder}/{stem}.json and .md")


if __name__ == "__main__":
    main()
