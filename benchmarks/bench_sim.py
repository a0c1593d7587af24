"""`make bench-sim`: the simulator's engines against plain PyTorch, Flower and pfl-research, in one run.

    python -m benchmarks.bench_sim                              # everything: some minutes on two cores
    python -m benchmarks.bench_sim --quick                      # few rounds
    python -m benchmarks.bench_sim --sections ml-100k --engines fused,hand-written --threads 1
    python -m benchmarks.bench_sim --results                    # also write benchmarks/results/sim.{md,png}

All contenders train the same FedMF clients of the same rounds from the same start (see `baselines.problem`),
and differ in the negatives drawn. They take turns of a few rounds in one process pinned to `--threads` cores,
so that what else the machine does hits all alike; Flower runs its rounds after theirs, in an interpreter of
its own. Times are whole rounds (choosing clients, training, averaging) by median. The first `--warmup` rounds
are no samples, nor is the first of a turn, which finds the caches full of what others left: in a run, rounds
follow each other. HR@10 is that of the model after the same number of rounds, evaluated alike for all.

Sections: `ml-100k` and `ml-1m` (10% of the clients a round), and `scaling`: synthetic data, one size varied
at a time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.hand_written import HandWritten
from benchmarks.baselines.problem import Contender, Problem
from benchmarks.baselines.vmap_grad import VmapGrad
from benchmarks.bench_engines import random_pretrained
from benchmarks.machine import machine
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.pretrain import Pretrained, pretrain
from fedpeft_ext.simulation import Simulator

RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = ("ml-100k", "ml-1m", "scaling")
OURS, HAND = "fused", "hand-written"
BARS = {HAND: 5.0, "flower": 60.0, "pfl": 40.0}
"""How many times as fast as these the fused engine is meant to be."""


FLOWER = Path(__file__).resolve().parents[1] / ".venv-flower" / "bin" / "python"
"""An interpreter with Flower, whose pins keep it out of the project's environment."""


TURN = 5
"""Rounds that a contender trains before the next one takes its turn."""


class Unavailable(RuntimeError):
    """A contender cannot run here; the message says why."""


class Ours:
    """The simulator with one of its engines."""

    def __init__(self, problem: Problem, pretrained: Pretrained, engine: str) -> None:
        config = problem.config.updated([f"engine={engine}"])
        self._simulator = Simulator(config, problem.dataset, pretrained=pretrained)

    def round(self) -> None:
        """See `Contender`."""
        self._simulator.round()

    def result(self) -> tuple[Tensor, Tensor]:
        """See `Contender`."""
        state = self._simulator.store.read(torch.arange(self._simulator.dataset.num_users))
        items = torch.arange(self._simulator.dataset.num_items)
        return state["user"], self._simulator.model.item_embedding(items).detach()


def rival(module: str, name: str, why: str) -> Callable[[Problem, Pretrained], Contender]:
    """A contender of `benchmarks.baselines` that needs a package: `why` says how to get it."""

    def build(problem: Problem, pretrained: Pretrained) -> Contender:
        if problem.A is None:
            raise Unavailable("its client has P-LoRA alone")
        try:
            contender: type[Any] = getattr(importlib.import_module(f"benchmarks.baselines.{module}"), name)
        except ImportError as error:
            raise Unavailable(f"{error}; {why}") from error
        return contender(problem)  # type: ignore[no-any-return]

    return build


CONTENDERS: dict[str, tuple[str, Callable[[Problem, Pretrained], Contender]]] = {
    "fused": ("engine fused", lambda problem, start: Ours(problem, start, "fused")),
    "batched": ("engine batched", lambda problem, start: Ours(problem, start, "batched")),
    "sequential": ("engine sequential", lambda problem, start: Ours(problem, start, "sequential")),
    "hand-written": ("PyTorch, by hand", lambda problem, _: HandWritten(problem)),
    "vmap": ("PyTorch, vmap(grad)", lambda problem, _: VmapGrad(problem)),
    "pfl": ("pfl-research 0.6", rival("pfl_fedmf", "Pfl", "see that module for how to install it")),
}


LABELS = {name: label for name, (label, _) in CONTENDERS.items()} | {"flower": "Flower"}


def flower(dataset: str, rounds: int, options: argparse.Namespace) -> Track:
    """Flower's simulation of the same clients (`baselines.flower_fedmf`), in the interpreter that has it. Its
    user vectors stay in the nodes that it simulates, so that there is no HR@10 of it."""
    track = Track("flower")
    python = options.flower_python
    if not Path(python).exists():
        track.missing = f"there is no {python}, which make test-flower makes"
        return track
    command = [python, "-m", "benchmarks.bench_sim", "--in-flower", dataset, str(rounds)]
    done = subprocess.run(
        [*command, "--threads", str(options.threads)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"RAY_DEDUP_LOGS": "0", "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        track.missing = (done.stderr.strip() or "it failed without a word").splitlines()[-1]
        return track
    track.clients_per_second = track.slow = float(done.stdout.split()[-1])
    return track


def in_flower(dataset: str, rounds: int, threads: int) -> float:
    """What the process that `flower` starts does: clients a second."""
    from benchmarks.baselines.flower_fedmf import run

    config, data = Config().updated(["embedding.name=p-lora"]), load_dataset(dataset)
    start = random_pretrained(data, config)
    per_round = Problem.of(config, data, start).per_round
    return float(run(data, config, rounds, per_round, start, workers=threads))


@dataclass
class Track:
    """What one contender did in one contest.

    Attributes:
        name: of the contender.
        clients_per_second: by the median round; `slow` by its slowest decile.
        hit_rates: (rounds, training seconds so far, HR@10).
        missing: why it did not run.
    """

    name: str
    clients_per_second: float = 0.0
    slow: float = 0.0
    hit_rates: list[tuple[int, float, float]] = field(default_factory=list)
    missing: str | None = None


def contest(
    problem: Problem,
    pretrained: Pretrained,
    names: Sequence[str],
    rounds: int,
    warmup: int,
    turn: int = TURN,
    every: int | None = None,
    patience: float = float("inf"),
) -> list[Track]:
    """Have the contenders train `rounds` rounds each, in turns.

    Args:
        warmup: first rounds that are no samples.
        turn: rounds of a turn.
        every: evaluate after so many turns and after the last; None never does.
        patience: seconds after which a contender trains no more, once it has a sample.
    """
    tracks = [Track(name) for name in names]
    running: list[tuple[Track, Contender, list[float]]] = []
    for track in tracks:
        try:
            running.append((track, CONTENDERS[track.name][1](problem, pretrained), []))
        except Unavailable as error:
            track.missing = str(error)

    def samples(seconds: list[float]) -> list[float]:
        return [s for number, s in enumerate(seconds) if number >= warmup and number % turn > 0]

    for begin in range(0, rounds, turn):
        end = min(begin + turn, rounds)
        for track, contender, seconds in running:
            for _ in range(begin, end):
                if sum(seconds) > patience and samples(seconds):
                    break
                start = time.perf_counter()
                contender.round()
                seconds.append(time.perf_counter() - start)
            if every is not None and (end % (every * turn) == 0 or end == rounds):
                hit_rate = problem.hit_rate(*contender.result())
                track.hit_rates.append((end, sum(seconds), hit_rate))
    for track, _, seconds in running:
        track.clients_per_second = problem.per_round / float(np.median(samples(seconds)))
        track.slow = problem.per_round / float(np.quantile(samples(seconds), 0.9))
    return tracks


def real_data(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Contests on a data set with item text, for P-LoRA and P-RQ."""
    try:
        dataset = load_dataset(name)
    except FileNotFoundError as error:
        return {"skipped": str(error)}
    large = dataset.num_users > 2000
    turn = 3 if options.quick or large else TURN
    rounds = 3 if options.quick else 6 if large else 40
    contests = {}
    for embedding in ("p-lora", "p-rq"):
        config = Config().updated([f"embedding.name={embedding}"])
        levels = config.embedding.levels if embedding == "p-rq" else None
        start = pretrain(config.pretrain, dataset, config.backbone.dim, levels=levels)
        problem = Problem.of(config, dataset, start)
        tracks = contest(
            problem, start, options.engines, rounds, options.warmup, turn, every=1 if large else 2
        )
        if embedding == "p-lora" and options.flower_python != "none":
            tracks.append(flower(name, 3 if options.quick or large else 10, options))
        contests[embedding] = [asdict(track) for track in tracks]
        show(table(f"{dataset.name}, {embedding}", contests[embedding]))
    return {
        "users": dataset.num_users,
        "items": dataset.num_items,
        "per_round": problem.per_round,
        "mean_items": float(np.diff(dataset.indptr).mean()),
        "contests": contests,
    }


def ragged(clients: int, num_items: int, mean: int, seed: int = 0) -> Dataset:
    """`clients` users with `mean` items on average, geometrically distributed sizes, uniform items."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.geometric(1 / mean, clients), num_items // 2)
    rows = [rng.choice(num_items, size, replace=False, shuffle=False) for size in sizes]
    none = np.full(clients, -1, dtype=np.int64)
    return Dataset(
        name=f"{clients} x {num_items} x {mean}",
        num_users=clients,
        num_items=num_items,
        indptr=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        indices=np.concatenate(rows).astype(np.int64),
        test_items=np.where(np.arange(clients) == 0, np.setdiff1d(np.arange(num_items), rows[0])[0], none),
        valid_items=none,
        user_ids=[str(user) for user in range(clients)],
        item_ids=[str(item) for item in range(num_items)],
        item_text=None,
        report={},
    )


SWEEPS: dict[str, tuple[str, list[tuple[int, int, int]]]] = {
    "clients a round": ("clients", [(c, 2000, 100) for c in (10, 100, 1000, 10_000)]),
    "items in the catalogue": ("items", [(100, i, 100) for i in (1000, 10_000, 100_000, 1_000_000)]),
    "items a client": ("mean", [(100, 10_000, m) for m in (10, 30, 100, 300, 1000)]),
}


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Clients a second while one of clients a round, catalogue and items a client varies."""
    names = [name for name in options.engines if name in (OURS, "batched", HAND, "vmap")]
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for title, (_, points) in SWEEPS.items():
        sweeps[title] = []
        for clients, items, mean in points[:2] if options.quick else points:
            dataset = ragged(clients, items, mean)
            for embedding in ("p-lora", "p-rq"):
                config = Config().updated(
                    [
                        f"embedding.name={embedding}",
                        "training.clients_per_round=1.0",
                        "evaluation.full_ranking=false",
                    ]
                )
                start = random_pretrained(dataset, config)
                problem = Problem.of(config, dataset, start)
                # Copies of a whole LoRA table for each client do not fit.
                fit = [n for n in names if n != "vmap" or clients * items <= 20_000_000]
                tracks = contest(problem, start, fit, 5 if options.quick else 15, 1, patience=1.0)
                point = {"clients": clients, "items": items, "mean": mean, "embedding": embedding}
                point["clients_per_second"] = {t.name: t.clients_per_second for t in tracks}
                sweeps[title].append(point)
                speeds = ", ".join(f"{t.name} {t.clients_per_second:,.0f}" for t in tracks)
                show([f"{embedding}, {clients} clients, {items} items, {mean} a client: {speeds}"])
    return {"sweeps": sweeps}


def show(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


def table(title: str, tracks: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown of one contest."""
    speed = {track["name"]: track["clients_per_second"] for track in tracks}
    lines = [
        f"**{title}**",
        "",
        "| system | clients/s | slowest decile | engine fused is faster by | bar | HR@10 | after rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for track in tracks:
        label = LABELS[track["name"]]
        if track["missing"] is not None:
            lines.append(f"| {label} | | | | | | not run: {track['missing']} |")
            continue
        times = f"{speed[OURS] / track['clients_per_second']:.1f} x" if OURS in speed else ""
        bar = f"{BARS[track['name']]:.0f} x" if track["name"] in BARS else ""
        rounds, _, hit_rate = track["hit_rates"][-1] if track["hit_rates"] else ("", 0.0, None)
        reached = "" if hit_rate is None else f"{hit_rate:.3f}"
        lines.append(
            f"| {label} | {track['clients_per_second']:,.0f} | {track['slow']:,.0f} | {times} | {bar} "
            f"| {reached} | {rounds} |"
        )
    return [*lines, ""]


def report(record: dict[str, Any]) -> list[str]:
    """The whole of sim.md."""
    lines = [
        f"# Simulation speed on {record['machine']}, {record['threads']} threads",
        "",
        "`make bench-sim` makes this. FedMF, width 32, 2 local epochs, Adam, BPR; whole rounds by",
        "median, systems taking turns of a few rounds in one run. HR@10 is that of the model.",
        "P-LoRA has rank 4, P-RQ 3 codebooks of 128 rows.",
        "",
    ]
    for name in SECTIONS[:2]:
        section = record["sections"].get(name)
        if section is None:
            continue
        if "skipped" in section:
            lines += [f"## {name}", "", f"Skipped: {section['skipped']}", ""]
            continue
        lines += [
            f"## {name}: {section['users']:,} users, {section['items']:,} items, "
            f"{section['mean_items']:.0f} a user, {section['per_round']} clients a round",
            "",
        ]
        for embedding, tracks in section["contests"].items():
            lines += table(embedding, tracks)
    section = record["sections"].get("scaling")
    if section is not None:
        lines += ["## Clients a second while one size varies (uniform synthetic items)", ""]
        for title, points in section["sweeps"].items():
            names = list(dict.fromkeys(n for point in points for n in point["clients_per_second"]))
            lines += [
                f"**{title}**",
                "",
                f"| embedding | clients | catalogue | a client | {' | '.join(names)} |",
                "|---|---|---|---|" + "---|" * len(names),
            ]
            for point in sorted(points, key=lambda p: p["embedding"]):
                speeds = (point["clients_per_second"].get(name) for name in names)
                cells = " | ".join("" if speed is None else f"{speed:,.0f}" for speed in speeds)
                lines.append(
                    f"| {point['embedding']} | {point['clients']:,} | {point['items']:,} | {point['mean']:,} "
                    f"| {cells} |"
                )
            lines.append("")
    return [*lines, "![Simulation speed](sim.png)"]


def draw(record: dict[str, Any], path: Path) -> None:
    """Clients a second in each sweep, and HR@10 against training seconds on ML-100K."""
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    colors = {name: f"C{number}" for number, name in enumerate(CONTENDERS)}
    styles = {"p-lora": "-", "p-rq": "--"}
    sweeps = record["sections"].get("scaling", {}).get("sweeps", {})
    for axes, (title, (size, _)) in zip(grid.flat[:3], SWEEPS.items(), strict=True):
        for name, color in colors.items():
            for embedding, style in styles.items():
                points = [
                    (point[size], point["clients_per_second"][name])
                    for point in sweeps.get(title, [])
                    if point["embedding"] == embedding and name in point["clients_per_second"]
                ]
                if points:
                    label = f"{LABELS[name]}, {embedding}"
                    axes.loglog(*zip(*points, strict=True), style, marker="o", ms=3, color=color, label=label)
        axes.set(xlabel=title, ylabel="clients a second")
        axes.grid(alpha=0.3)
    axes = grid.flat[3]
    for embedding, tracks in record["sections"].get("ml-100k", {}).get("contests", {}).items():
        for track in tracks:
            if track["hit_rates"]:
                _, seconds, rates = zip(*track["hit_rates"], strict=True)
                axes.semilogx(
                    seconds,
                    rates,
                    styles[embedding],
                    marker="o",
                    ms=3,
                    color=colors[track["name"]],
                    label=f"{LABELS[track['name']]}, {embedding}",
                )
    axes.set(xlabel="seconds of training, ML-100K", ylabel="HR@10")
    axes.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [f"{LABELS[name]}, {embedding}" for name in CONTENDERS for embedding in styles]
    shown = {label: handles[label] for label in labels if label in handles}  # a column a contender
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=6, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pin(threads: int) -> None:
    """Keep this process on `threads` cores, and its libraries to as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def names_in(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {name!r}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", type=names_in(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--engines", type=names_in(tuple(CONTENDERS)), default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are no samples")
    parser.add_argument(
        "--flower-python", default=str(FLOWER), help="an interpreter that has Flower; none leaves it out"
    )
    parser.add_argument("--in-flower", nargs=2, metavar=("DATASET", "ROUNDS"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes")
    parser.add_argument(
        "--results", action="store_true", help=f"write to {RESULTS}; sections not run are kept as they were"
    )
    options = parser.parse_args()
    pin(options.threads)
    if options.in_flower is not None:
        print(in_flower(options.in_flower[0], int(options.in_flower[1]), options.threads))
        return
    torch.manual_seed(0)
    record: dict[str, Any] = {"machine": machine(), "threads": options.threads, "sections": {}}
    kept = RESULTS / "sim.json"
    if options.results and kept.exists():
        before = json.loads(kept.read_text())
        if all(before[key] == record[key] for key in ("machine", "threads")):
            record["sections"] = before["sections"]
    show([f"{record['machine']}, {options.threads} threads"])
    for name in options.sections:
        result = scaling(options) if name == "scaling" else real_data(name, options)
        record["sections"][name] = result
    if options.results:
        kept.write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "sim.md").write_text("\n".join(report(record)) + "\n")
        draw(record, RESULTS / "sim.png")
        show([f"written: {RESULTS}/sim.md, sim.json, sim.png"])


if __name__ == "__main__":
    main()
