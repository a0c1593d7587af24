"""Trains what the tables of docs/results.md, results-compression.md and privacy.md show, and prints them.

    python docs/measure_ml_100k.py backbones runs.jsonl             # 4 backbones x 6 embeddings x 3 seeds
    python docs/measure_ml_100k.py backbones runs.jsonl fedmf       # one of the backbones
    python docs/measure_ml_100k.py compression runs.jsonl           # upload compression, FedMF
    python docs/measure_ml_100k.py privacy runs.jsonl               # CDP and LDP, FedMF
    python docs/measure_ml_100k.py privacy runs.jsonl --picture docs/pictures/privacy.png
    python docs/measure_ml_100k.py algorithms runs.jsonl            # FedAvg, FedProx, SCAFFOLD, FedMF

Every finished run is a line of the file, and is not trained again. One CPU thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_ext.config import load_config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.experiments.plots import Place, plot_lines
from fedpeft_ext.experiments.studies.study import mean_place
from fedpeft_ext.simulation import Simulator

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BACKBONES = {
    "fedmf": "ml-100k.yaml",
    "fedncf": "ml-100k-fedncf.yaml",
    "pfedrec": "ml-100k-pfedrec.yaml",
    "fedpergnn": "ml-100k-fedpergnn.yaml",
}
EMBEDDINGS = ("full", "c-rq", "p-lora", "p-hash", "p-hash+senet", "p-rq")
METHODS = {
    "none": [],
    "fp16": ["compression.method=fp16"],
    "int8": ["compression.method=int8"],
    "top-k, 20%": ["compression.method=top-k", "compression.top_k=0.2"],
    "top-k, 5%": ["compression.method=top-k", "compression.top_k=0.05"],
}
ALGORITHMS = {
    "FedAvg": [],
    "FedProx, mu 0.01": ["training.prox_mu=0.01"],
    "SCAFFOLD": ["training.algorithm=scaffold"],
}
PRIVATE = ["training.weighting=uniform", "training.client_sampling=poisson"]
PRIVACY = {
    "none": [],
    "clipping alone": ["mode=cdp", "clip=0.5", "noise_multiplier=0"],
    "cdp, multiplier 0.5": ["mode=cdp", "clip=0.5", "noise_multiplier=0.5"],
    "cdp, multiplier 1": ["mode=cdp", "clip=0.5", "noise_multiplier=1"],
    "cdp, multiplier 2": ["mode=cdp", "clip=0.5", "noise_multiplier=2"],
    "ldp, multiplier 0.1": ["mode=ldp", "clip=0.5", "noise_multiplier=0.1"],
    "ldp, multiplier 0.5": ["mode=ldp", "clip=0.5", "noise_multiplier=0.5"],
}


def variants(
    table: str, only: str | None, embeddings: Sequence[str]
) -> Iterator[tuple[tuple[str, str], str, list[str]]]:
    """(labels of a row, file of settings, overrides) of a table."""
    if table == "backbones":
        for backbone, file in BACKBONES.items():
            if only in (None, backbone):
                for embedding in embeddings:
                    yield (backbone, embedding), file, [f"embedding.name={embedding}"]
    else:
        changes = {"compression": METHODS, "privacy": PRIVACY, "algorithms": ALGORITHMS}[table]
        prefix = "privacy." if table == "privacy" else ""
        common = ["training.rounds=60", *(PRIVATE if table == "privacy" else [])]
        for embedding in ("full", "p-rq", "p-lora"):
            for label, settings in changes.items():
                own = [prefix + setting for setting in settings]
                yield (embedding, label), "ml-100k.yaml", [f"embedding.name={embedding}", *common, *own]


def train(file: str, overrides: list[str], seed: int, dataset: Any) -> dict[str, Any]:
    """One run: its metrics, or where it diverged."""
    settings = ["evaluation.every=1000000", "threads=1", f"seed={seed}", *overrides]
    began = time.perf_counter()
    try:
        summary = Simulator(load_config(EXAMPLES / file, settings), dataset).run()
    except FloatingPointError as error:
        return {"diverged": str(error), "seconds": time.perf_counter() - began}
    return {
        **summary.metrics,
        "bytes_up": summary.bytes_up,
        "epsilon": (summary.privacy or {}).get("epsilon"),
        "rounds": summary.rounds,
        "seconds": summary.seconds,
        "training_seconds": summary.training_seconds,
    }


def cell(runs: list[dict[str, Any]], name: str) -> str:
    """Mean and standard deviation over the seeds that did not diverge."""
    values = [run[name] for run in runs if name in run]
    text = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "diverged"
    return text if len(values) in (0, len(runs)) else f"{text} ({len(values)} of {len(runs)} seeds)"


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """HR@10 by epsilon, means over seeds: a line for each embedding and kind of noise."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.get("epsilon") is not None:
            rows.setdefault(tuple(run["labels"]), []).append(run)
    lines: dict[str, list[Place]] = {}
    for (embedding, privacy), seeds in rows.items():
        epsilon = float(np.mean([run["epsilon"] for run in seeds]))
        name = f"{embedding}, {privacy.partition(',')[0].upper()}"
        lines.setdefault(name, []).append(mean_place(epsilon, [run["HR@10"] for run in seeds]))
    lines = {name: sorted(places) for name, places in lines.items()}
    title = "Privacy, fedmf on ml-100k"
    plot_lines(lines, path, xlabel="epsilon (log scale)", ylabel="HR@10", title=title, log_x=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["backbones", "compression", "privacy", "algorithms"])
    parser.add_argument("file", type=Path, help="finished runs, a line of JSON each")
    parser.add_argument("only", nargs="?", choices=sorted(BACKBONES), help="backbones: train this one alone")
    parser.add_argument("--embeddings", default=",".join(EMBEDDINGS), help="backbones: of these alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="privacy: draw HR@10 by epsilon as PNG")
    options = parser.parse_args()
    if options.picture is not None and options.table != "privacy":
        parser.error("--picture: expected the table 'privacy', which alone is drawn")
    shown = []
    lines = options.file.read_text().splitlines() if options.file.exists() else []
    done = {(record["table"], *record["labels"], record["seed"]): record for record in map(json.loads, lines)}
    dataset = load_dataset("ml-100k")
    for labels, file, overrides in variants(options.table, options.only, options.embeddings.split(",")):
        runs = []
        for seed in range(options.seeds):
            key = (options.table, *labels, seed)
            if key not in done:
                record = {"table": options.table, "labels": labels, "seed": seed}
                done[key] = record | train(file, overrides, seed, dataset)
                with options.file.open("a") as out:
                    out.write(json.dumps(done[key]) + "\n")
            runs.append(done[key])
        shown += runs
        columns = [*labels, cell(runs, "HR@10"), cell(runs, "NDCG@10"), cell(runs, "full/NDCG@10")]
        if options.table == "privacy":
            told = [run["epsilon"] for run in runs if run.get("epsilon") is not None]
            columns.insert(2, f"{max(told):.3g}" if told else "no guarantee")
        else:
            columns.insert(2, f"{runs[0].get('bytes_up', 0):,}")
        columns.append(f"{np.mean([run['seconds'] for run in runs]):.1f}")
        print(f"| {' | '.join(columns)} |", flush=True)
    if options.picture is not None:
        draw(shown, options.picture)


if __name__ == "__main__":
    main()
