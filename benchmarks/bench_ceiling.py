"""How near the lookups come to the speed of memory, and to FBGEMM's dense table-batched embedding on the CPU.

    python -m benchmarks.bench_ceiling      # prints Markdown; --results writes benchmarks/results/ceiling-*

For every lookup: the bytes that must move (each row of a table that is read, once; indices; the output), the
time at this machine's own rates, measured in the same run, and the share of that reached. Two rates bound a
lookup: the streaming copy of its output's size, and a gather of the same number of rows of the same width,
`torch.index_select` of single rows out of the same table into a fresh output. A second table shows how the
gather rate depends on the width of rows alone. FBGEMM needs the extra `bench` (fbgemm-gpu-cpu); without it
its column says why it is empty. It takes rows' numbers where the lookups take items, so it is timed with
making them from items, codes and hashes, which is the same work as ours, and with those numbers given.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import keep_freed_memory, machine, slug
from fedpeft_ext import ops

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = [  # C, P, L, K, D, I
    (256, 64, 4, 64, 64, 5000),
    (1000, 20, 3, 64, 32, 100_000),
    (16, 1000, 4, 256, 128, 100_000),
    (1, 20_000, 4, 256, 64, 100_000),
]


def race(runs: dict[str, Callable[[], Any]], seconds: float = 1.0) -> dict[str, float]:
    """Median seconds of each; they take turns, so that what else the machine does hits all alike. Of one
    thread it is the processor's time, which leaves out when other programs had the core.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[next(iter(runs))]) < 7:
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: float(np.median(t)) for name, t in times.items()}


def fbgemm_module() -> Any:
    """FBGEMM's split table-batched embeddings, or the reason why not."""
    try:
        importlib.import_module("fbgemm_gpu")
        return importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    except (ImportError, OSError, AttributeError) as error:
        return f"not installed or not loadable: {str(error).splitlines()[0]}"


def fbgemm(weight: Tensor, flat: Tensor) -> Callable[[Tensor | None, Tensor], Tensor] | str:
    """Sums over bags [N, L] (as `flat`) of rows of `weight` by FBGEMM's dense TBE on the CPU."""
    module = fbgemm_module()
    if isinstance(module, str):
        return module
    table = module.DenseTableBatchedEmbeddingBagsCodegen(
        [tuple(weight.shape)], pooling_mode=module.PoolingMode.SUM, use_cpu=True
    )
    with torch.no_grad():
        table.weights.copy_(weight.reshape(-1))
    offsets = torch.arange(0, flat.numel() + 1, flat.shape[1])

    def run(out_grad: Tensor | None, bags: Tensor) -> Tensor:
        out: Tensor = table(bags.reshape(-1), offsets)
        if out_grad is not None:
            table.weights.grad = None
            out.backward(out_grad)
        return out

    return run


def measure(C: int, P: int, L: int, K: int, D: int, I: int) -> list[list[str]]:
    """A row of the table for each lookup."""
    items = torch.randint(I, (C, P))
    lines = []

    def line(
        name: str, table: Tensor, bags: Callable[[], Tensor], extra: int, ours: Callable[[Tensor], Tensor]
    ) -> None:
        flat = bags()
        rows, width = table.reshape(-1, table.shape[-1]), table.shape[-1]
        leaf = table.clone().requires_grad_()
        out = ours(table)
        out_grad = torch.randn_like(out)
        touched = int(flat.unique().numel())
        moved = 4 * (touched * width + out.numel()) + items.numel() * 8 + extra
        one = flat.reshape(-1)[:: flat.shape[1]]
        buffer = torch.empty_like(out)
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(table),
            "both": lambda: torch.autograd.grad(ours(leaf), leaf, out_grad),
            # Reads and writes the output's size once each: its bytes are 2 * out.
            "copy": lambda: buffer.copy_(out_grad),
            "gather": lambda: torch.index_select(rows, 0, one),
        }
        rival = fbgemm(rows, flat) if out.shape[-1] == width else "not a sum of rows"
        if not isinstance(rival, str):
            tbe = rival
            runs["fbgemm"] = lambda: tbe(None, flat)
            runs["fbgemm both"] = lambda: tbe(out_grad.reshape(-1, width), flat)
            runs["fbgemm from items"] = lambda: tbe(None, bags())
            runs["fbgemm both from items"] = lambda: tbe(out_grad.reshape(-1, width), bags())
        seconds = race(runs)
        copy = 8 * out.numel() / seconds["copy"]
        gather = 4 * (one.unique().numel() + one.numel()) * width / seconds["gather"]
        rate = moved / seconds["ours"]
        rival_text = (
            rival
            if isinstance(rival, str)
            else f"{1e3 * seconds['fbgemm from items']:.2f} / {1e3 * seconds['fbgemm both from items']:.2f}"
        )
        given = (
            ""
            if isinstance(rival, str)
            else f"{1e3 * seconds['fbgemm']:.2f} / {1e3 * seconds['fbgemm both']:.2f}"
        )
        lines.append(
            [
                name,
                f"{C} x {P}, D = {D}",
                f"{moved / 1e6:.1f}",
                f"{1e3 * seconds['ours']:.2f} / {1e3 * seconds['both']:.2f}",
                f"{rate / 1e9:.1f}",
                f"{copy / 1e9:.1f}",
                f"{gather / 1e9:.1f}",
                f"{100 * rate / copy:.0f}%",
                f"{100 * rate / gather:.0f}%",
                rival_text,
                given,
            ]
        )

    client = torch.arange(C)[:, None, None]
    codes = torch.randint(K, (I, L)).to(torch.uint8)
    steps = torch.arange(L) * K + client * (L * K)
    line(
        "rq_lookup",
        torch.randn(C, L, K, D),
        lambda: (codes[items].long() + steps).reshape(-1, L),
        items.numel() * L,
        lambda books: ops.rq_lookup(items, codes, books),
    )
    hashes, M = ops.make_hashes(2, 0), L * K
    line(
        "hash_lookup",
        torch.randn(C, M, D),
        lambda: (ops.hash_buckets(items, hashes, M) + client * M).reshape(-1, 2),
        0,
        lambda table: ops.hash_lookup(items, table, hashes, reduce="sum"),
    )
    rows = torch.randint(P, (C, P))
    first = client[:, :, 0] * P
    line(
        "client_embedding",
        torch.randn(C, P, D),
        lambda: (rows + first).reshape(-1, 1),
        0,
        lambda w: ops.client_embedding(rows, w),
    )
    B = torch.randn(C, D, 4)
    line(
        "lora_lookup",
        torch.randn(C, P, 4),
        lambda: (rows + first).reshape(-1, 1),
        4 * B.numel(),
        lambda A: ops.lora_lookup(rows, A, B),
    )
    return lines


HEADER = [
    "lookup",
    "shape",
    "MB forward",
    "ms forward / with backward",
    "GB/s",
    "copy GB/s",
    "gather GB/s",
    "of copy",
    "of gather",
    "FBGEMM ms forward / with backward",
    "FBGEMM with rows' numbers given",
]


def gather_rates(megabytes: int = 256) -> list[str]:
    """Rates of `torch.index_select` of rows of several widths out of one table, beside its copy: Markdown."""
    memory = torch.randn(megabytes * 2**18)
    out = torch.empty(2**22)  # 16 MB
    widths = (16, 32, 64, 128, 256, 1024, 4096)
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: out.copy_(memory[: len(out)])}
    for width in widths:
        table, chosen = memory.view(-1, width), torch.randint(len(memory) // width, (len(out) // width,))
        runs[str(width)] = lambda t=table, i=chosen, w=width: torch.index_select(t, 0, i, out=out.view(-1, w))
    seconds = race(runs)
    cells = [f"{8 * len(out) / seconds[name] / 1e9:.1f}" for name in runs]
    return [
        f"Random rows out of {megabytes} MB, read and written, by the width of a row in floats: what "
        "a gather can reach at all. GB/s:",
        "",
        "| " + " | ".join(runs) + " |",
        "|" + "---|" * len(runs),
        "| " + " | ".join(cells) + " |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", action="store_true", help=f"also write to {RESULTS}")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = [line for shape in SHAPES for line in measure(*shape)]
    table = [
        f"# Lookups and memory on {machine()}, {options.threads} thread(s)",
        "",
        "Medians of calls in turn; with one thread, of processor time. FBGEMM is its dense table-batched "
        "embedding on the CPU, which takes numbers of rows: made from the items, codes and hashes that the "
        "lookups take, then given.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        *gather_rates(),
    ]
    print("\n".join(table))
    if options.results:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"ceiling-{slug()}.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
