"""Draws docs/curves.png: HR@10 of FedMF on ML-100K over the rounds, seeds 0 to 2, with and without warm-up.

python docs/draw_curves.py    # trains for some minutes; also prints the table of docs/results.md
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedpeft_ext.config import load_config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.simulation import Simulator

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "full": {},
    "p-hash": {},
    "p-lora": {},
    "p-rq": {},
    "p-rq, no warm-up": {"training.warmup_rounds": 0},
    "c-rq": {},
}
SEEDS, ROUNDS, EVERY = (0, 1, 2), 400, 20


def main() -> None:
    dataset = load_dataset("ml-100k")
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for label, changes in RUNS.items():
        curves = []
        for seed in SEEDS:
            values = {
                "embedding.name": label.partition(",")[0],
                "seed": seed,
                "training.rounds": ROUNDS,
                "evaluation.every": EVERY,
                "evaluation.full_ranking": "false",
                **changes,
            }
            config = load_config(ROOT / "examples/ml-100k.yaml", [f"{k}={v}" for k, v in values.items()])
            evaluations = Simulator(config, dataset).run().evaluations
            curves.append([evaluation["HR@10"] for evaluation in evaluations])
        rounds = [int(evaluation["round"]) for evaluation in evaluations]
        hits = np.array(curves)
        (line,) = axes.plot(rounds, hits.mean(0), label=label)
        axes.fill_between(rounds, hits.min(0), hits.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        at = [f"{hits[:, rounds.index(r)].mean():.3f}" for r in (20, 60, 120, 200, ROUNDS)]
        print(
            f"| {label} | {' | '.join(at)} | {hits[:, -1].min():.3f} to {hits[:, -1].max():.3f} |", flush=True
        )
    axes.set(xlabel="rounds", ylabel="HR@10, 100 sampled items", xlim=(0, ROUNDS), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", ncols=2, fontsize="small")
    figure.savefig(ROOT / "docs/curves.png", dpi=130)


if __name__ == "__main__":
    main()
