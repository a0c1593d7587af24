"""Going on with grown data against training anew: the tables of docs/growth.md.

    python docs/measure_growth.py ml-100k FOLDER             # further rounds with the steps of the preset
    python docs/measure_growth.py ml-100k FOLDER --lr 0.3    # with others

A run is trained on the first 90% of the interactions in time, with the users and items met by then (FOLDER
gets them as a data set), and goes on with all; another trains on all from the beginning. HR@10 of the test
items of all data among 100 sampled items, in percent: means and standard deviations of the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from fedpeft_ext.config import Config, load_config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.simulation import Simulator

SHARE = 0.9
FURTHER, ANEW = (0, 5, 10, 20, 40), (20, 40, 120)
"""Rounds after which HR@10 is told: after the data have grown, and from the beginning."""


def first_in_time(name: str, folder: Path) -> Dataset:
    """The data set of the first interactions of one of RecBole atomic files."""
    source, part = Path(load_dataset(name).report["path"]), folder / "early" / "early.inter"
    part.parent.mkdir(parents=True, exist_ok=True)
    rows = pl.read_csv(source, separator="\t", infer_schema=False)
    order = rows["timestamp:float"].cast(pl.Float64).arg_sort()
    rows[order[: round(SHARE * len(rows))].sort()].write_csv(part, separator="\t")
    part.with_suffix(".item").write_bytes(source.with_suffix(".item").read_bytes())
    return load_dataset(str(part.parent))


def curves(config: Config, before: Dataset, whole: Dataset, lr: float | None) -> list[float] | None:
    """HR@10 after FURTHER and ANEW; None where training diverges."""
    rounds = config.training.rounds
    old = Simulator(config.updated([f"evaluation.every={rounds}"]), before)
    old.run()
    steps = [] if lr is None else [f"training.lr={lr}"]
    on = Simulator(
        config.updated([f"training.rounds={rounds + FURTHER[-1]}", *steps]), whole, start_from=old.trained_run
    )
    anew = Simulator(config, on.dataset)
    try:
        found = [{line["round"]: line["HR@10"] for line in run.run().evaluations} for run in (on, anew)]
    except FloatingPointError:
        return None
    return [100 * found[0][rounds + r] for r in FURTHER] + [100 * found[1][r] for r in ANEW]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="RecBole atomic files with tuned settings")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lr", type=float, help="of the clients in further rounds")
    parser.add_argument("--embeddings", default="full,p-rq,p-lora,p-hash")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    before, whole = first_in_time(options.dataset, options.folder), load_dataset(options.dataset)
    for dataset in (before, whole):
        print(
            f"{dataset.num_users} users, {dataset.num_items} items, {dataset.num_interactions} interactions"
        )
    heads = [*(f"{r} further" for r in FURTHER), *(f"{r} anew" for r in ANEW), "diverged"]
    print(f"| embedding | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    for embedding in options.embeddings.split(","):
        found = []
        for seed in range(options.seeds):
            settings = [f"embedding.name={embedding}", f"seed={seed}", "evaluation.every=5", "threads=1"]
            found.append(curves(load_config(options.dataset, settings), before, whole, options.lr))
        values = np.array([each for each in found if each is not None]).reshape(-1, len(heads) - 1)
        cells = [f"{np.mean(v):.2f} ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "" for v in values.T]
        print(f"| {embedding} | {' | '.join(cells)} | {len(found) - len(values)} |", flush=True)


if __name__ == "__main__":
    main()
