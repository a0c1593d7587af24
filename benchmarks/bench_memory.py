"""Memory over many rounds: resident set and Python heap of a run with an output folder, every so many rounds.

    python -m benchmarks.bench_memory [--rounds 10000] [--every 1000] [--engine fused] [--embedding p-lora]

A federation that trains, evaluates, logs and saves checkpoints must hold as much after 10,000 rounds as after
1,000. What may grow is the list of evaluations, of which this makes one every `--every` rounds.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

from benchmarks.machine import machine
from fedpeft_ext import Config, Simulator, load_dataset
from fedpeft_ext.simulation import Callback, RoundInfo


def resident_bytes() -> int:
    """Bytes of this process that are in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Memory(Callback):
    """Prints a line of the table after every `every` rounds, and keeps the numbers.

    Attributes:
        rows: (round, resident bytes, bytes of Python objects, seconds since the start).
    """

    def __init__(self, every: int) -> None:
        self.rows: list[tuple[int, int, int, float]] = []
        self._every = every
        self._began = time.perf_counter()

    def on_round(self, info: RoundInfo) -> None:
        if info.round % self._every == 0:
            gc.collect()
            python = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
            row = (info.round, resident_bytes(), python, time.perf_counter() - self._began)
            self.rows.append(row)
            print(f"| {row[0]:,} | {row[1] / 1e6:.1f} | {row[2] / 1e6:.2f} | {row[3]:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--engine", default="fused")
    parser.add_argument("--embedding", default="p-lora")
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=50, help="in a round")
    arguments = parser.parse_args()
    settings = [
        f"training.rounds={arguments.rounds}",
        f"training.clients_per_round={arguments.clients}",
        f"evaluation.every={arguments.every}",
        f"checkpoint.every={max(1, arguments.every // 10)}",
        f"engine={arguments.engine}",
        f"embedding.name={arguments.embedding}",
        "pretrain.features=random",
        "threads=1",
        "log.csv=true",
    ]
    dataset = load_dataset("synthetic", num_users=arguments.users, num_items=2_000, interactions_per_user=20)
    print(
        f"{machine()}\n\n{arguments.engine}, {arguments.embedding}: {arguments.users:,} users, "
        f"{arguments.clients} a round\n"
    )
    print("| round | resident MB | Python objects MB | seconds |\n|---:|---:|---:|---:|")
    tracemalloc.start()
    memory = Memory(arguments.every)
    with tempfile.TemporaryDirectory() as folder:
        Simulator(Config().updated(settings), dataset, callbacks=[memory], out=folder).run()
    first, last = memory.rows[min(1, len(memory.rows) - 1)], memory.rows[-1]
    growth = (last[1] - first[1]) / 1e6
    print(
        f"\nFrom round {first[0]:,} to {last[0]:,}: {growth:+.1f} MB resident, "
        f"{(last[2] - first[2]) / 1e6:+.2f} MB of Python objects."
    )


if __name__ == "__main__":
    main()
