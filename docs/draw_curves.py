"""Draws docs/pictures/curves.png: HR@10 of FedMF on ML-100K over the rounds, with and without warm-up.

python docs/draw_curves.py    # trains for some minutes, seeds 0 to 2; prints the table of docs/results.md
"""

from __future__ import annotations

from pathlib import Path

from fedpeft_ext.config import load_config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.experiments.plots import Place, plot_lines
from fedpeft_ext.experiments.studies.study import mean_place
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
    lines: dict[str, list[Place]] = {}
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
            config = load_config("ml-100k", [f"{k}={v}" for k, v in values.items()])
            evaluations = Simulator(config, dataset).run().evaluations
            curves.append([evaluation["HR@10"] for evaluation in evaluations])
        rounds = [int(evaluation["round"]) for evaluation in evaluations]
        lines[label] = [
            mean_place(place, values) for place, values in zip(rounds, zip(*curves, strict=True), strict=True)
        ]
        at = [f"{lines[label][rounds.index(place)].y:.3f}" for place in (20, 60, 120, 200, ROUNDS)]
        ends = [curve[-1] for curve in curves]
        print(f"| {label} | {' | '.join(at)} | {min(ends):.3f} to {max(ends):.3f} |", flush=True)
    picture = ROOT / "docs/pictures/curves.png"
    plot_lines(lines, picture, xlabel="round", ylabel="HR@10", title="fedmf on ml-100k")


if __name__ == "__main__":
    main()
