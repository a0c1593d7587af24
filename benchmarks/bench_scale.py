"""What a client costs as catalogues, rounds and processes grow, and the memory of a large data set.

    python -m benchmarks.bench_scale items            # 1,000 to 1,000,000 items, 1,000 clients a round
    python -m benchmarks.bench_scale clients          # 100 to 100,000 clients a round, 20,000 items
    fedpeft convert synthetic BIG -s num_users=1000000 -s num_items=1000000 -s interactions_per_user=100 \
        -s item_text=false
    python -m benchmarks.bench_scale memory BIG       # rounds of 10,000 clients, with the peak of memory
    torchrun --nproc-per-node N -m benchmarks.bench_scale ranks       # N processes, one thread each

FedMF with random full embeddings and codes: an RQ-VAE of a million items would take long and change neither
time nor memory of a round. Each row is the median of its rounds. `CPU` is the processor time of a client,
which other programs on the machine disturb less than the wall clock: the one to compare on a busy machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from fedpeft_ext import ops
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset, load_dataset, synthetic_dataset
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.communication import message, num_bytes

EMBEDDINGS = "p-lora,p-rq"


class Cost(NamedTuple):
    """Of a round: seconds of wall and processor time, both for one client, and clients."""

    wall: float
    cpu: float
    clients: int


def federation(dataset: Dataset, embedding: str, clients: int, dim: int) -> Simulator:
    """With embeddings and codes drawn at random, and evaluation of few candidates, which is not measured."""
    config = Config().updated(
        [
            f"embedding.name={embedding}",
            f"backbone.dim={dim}",
            f"training.clients_per_round={clients}",
            "pretrain.features=random",
            "evaluation.full_ranking=false",
            "evaluation.num_negatives=10",
        ]
    )
    return Simulator(config, dataset)


def measure(simulator: Simulator, rounds: int, warmup: int) -> Cost:
    costs = []
    for number in range(warmup + rounds):
        began, used = time.perf_counter(), time.process_time()
        clients = simulator.round().clients
        if number >= warmup:
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            costs.append(Cost(wall / clients, cpu / clients, clients))
    return Cost(
        statistics.median(cost.wall for cost in costs),
        statistics.median(cost.cpu for cost in costs),
        costs[0].clients,
    )


def print_costs(title: str, rows: list[tuple[str, str, Cost]]) -> None:
    print(
        f"\n| embedding | {title} | clients a round | us a client, CPU | to the least | us a client, wall |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for embedding, label, cost in rows:
        least = min(other.cpu for name, _, other in rows if name == embedding)
        print(
            f"| {embedding} | {label} | {cost.clients:,} | {1e6 * cost.cpu:.1f} | {cost.cpu / least:.2f} | "
            f"{1e6 * cost.wall:.1f} |"
        )


def row_costs(items: int, dim: int, rank: int = 4, count: int = 150_000) -> list[float]:
    """ns that each access of P-LoRA to a row takes by itself, with nothing to compute meanwhile: a row of the
    base and one of A read, one of the sums added to, and the server's step along it. Rows are random, and
    asked for ahead of their use, as in training.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(items, (1, count), generator=generator)
    touched = rows.flatten().unique()
    touched = touched[torch.randperm(len(touched), generator=generator)]
    base, A = torch.randn(items, dim), torch.randn(items, rank)
    sums, updates = torch.zeros(items, rank, dtype=torch.float64), torch.randn(1, count, rank)
    weights = torch.ones(1, dtype=torch.float64)
    calls: list[tuple[int, Callable[[], object]]] = [
        (count, lambda: ops.client_embedding(rows, base)),
        (count, lambda: ops.client_embedding(rows, A)),
        (count, lambda: ops.accumulate_updates_(sums, updates, weights, rows)),
        (len(touched), lambda: ops.apply_updates_(A, sums, touched, scale=1e-3)),
    ]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(15):
        for number, (accesses, call) in enumerate(calls):
            began = time.process_time()
            call()
            times[number].append(1e9 * (time.process_time() - began) / accesses)
    return [statistics.median(t) for t in times]


CATALOGUES = (1_000, 10_000, 100_000, 1_000_000)


def over_items(embeddings: list[str], dim: int, rounds: int, warmup: int) -> None:
    rows = []
    for items in CATALOGUES:
        data = synthetic_dataset(20_000, items, 50, item_text=False)
        for embedding in embeddings:
            cost = measure(federation(data, embedding, 1000, dim), rounds, warmup)
            rows.append((embedding, f"{items:,}", cost))
    print_costs("items", sorted(rows, key=lambda row: row[0]))
    print("\n| ns a row, of items | base read | A read | sums added to | server's step |")
    print("|---:|---:|---:|---:|---:|")
    for items in CATALOGUES:
        cells = " | ".join(f"{cost:.1f}" for cost in row_costs(items, dim))
        print(f"| {items:,} | {cells} |")


def over_clients(embeddings: list[str], dim: int, rounds: int, warmup: int) -> None:
    data = synthetic_dataset(200_000, 20_000, 50, item_text=False)
    rows = []
    for embedding in embeddings:
        for clients in (100, 1_000, 10_000, 100_000):
            few = max(3, min(rounds * 1000 // clients, 100))
            cost = measure(federation(data, embedding, clients, dim), few, min(warmup, few))
            rows.append((embedding, f"{data.num_users:,} users", cost))
    print_costs("of", rows)


def memory(folder: Path, embeddings: list[str], dim: int, rounds: int) -> None:
    """One process for all embeddings, so the peak is that of the largest so far; it counts file pages too."""
    data = load_dataset(folder)
    print(f"{data.num_users:,} users, {data.num_items:,} items, {data.num_interactions:,} interactions")
    print("\n| embedding | clients a round | s a round, wall | us a client, CPU | peak GiB | own GiB after |")
    print("|---|---:|---:|---:|---:|---:|")
    for embedding in embeddings:
        simulator = federation(data, embedding, 10_000, dim)
        cost = measure(simulator, rounds, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        status = Path("/proc/self/status").read_text()
        own = int(status.partition("RssAnon:")[2].split()[0]) / 2**20
        print(
            f"| {embedding} | {cost.clients:,} | {cost.wall * cost.clients:.2f} | {1e6 * cost.cpu:.1f} | "
            f"{peak:.2f} | {own:.2f} |",
            flush=True,
        )


def over_ranks(embeddings: list[str], dim: int, rounds: int, warmup: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = synthetic_dataset(20_000, 3_706, 100, item_text=False)
    first = dist.get_rank() == 0
    if first:
        print(
            "\n| embedding | ranks | clients a round | clients/s, wall | KB a message | KB summed a round |"
        )
        print("|---|---:|---:|---:|---:|---:|")
    for embedding in embeddings:
        simulator = federation(data, embedding, 4_000, dim)
        cost = measure(simulator, rounds, warmup)
        summed = simulator.ranks.bytes_summed / (rounds + warmup)
        if first:
            each = num_bytes(message(simulator.model).values())
            print(
                f"| {embedding} | {dist.get_world_size()} | {cost.clients:,} | {1 / cost.wall:,.0f} | "
                f"{each / 1000:.1f} | {summed / 1000:.1f} |",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["items", "clients", "memory", "ranks"])
    parser.add_argument("folder", nargs="?", type=Path, help="of the data set, for memory")
    parser.add_argument("--embeddings", default=EMBEDDINGS, help="names, separated by commas")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the clock starts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.embeddings.split(",")
    if args.what == "memory":
        if args.folder is None:
            parser.error("memory needs the folder of a data set")
        memory(args.folder, names, args.dim, args.rounds)
    else:
        run = {"items": over_items, "clients": over_clients, "ranks": over_ranks}[args.what]
        run(names, args.dim, args.rounds, args.warmup)


if __name__ == "__main__":
    main()
