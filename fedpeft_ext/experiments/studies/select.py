"""Choose an embedding and its size for a data set, a backbone and a budget of bytes, by cheap pilot runs.

Successive halving (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", AISTATS 2016): all candidates within the budget train for a few rounds, the best third goes on
with three times as many, until one is left. Pilots are judged by validation items; test items only check the
choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.experiments.results import KB
from fedpeft_ext.experiments.studies.pictures import bytes_picture
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, Table, Trained, Variant
from fedpeft_ext.nn import parse_spec
from fedpeft_ext.simulation import traffic
from fedpeft_ext.simulation.setup import build_model, has_codes
from fedpeft_ext.simulation.simulator import VALID
from fedpeft_ext.words import SMALLER_STEPS, counted

EMBEDDINGS = ("p-lora", "p-hash", "p-rq")
SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "lora": tuple({"rank": rank} for rank in (1, 2, 4, 8)),
    "hash": tuple({"table_size": size} for size in (128, 256, 512, 1024)),
    "rq": (
        {"levels": 2, "codebook_size": 64},
        {"levels": 3, "codebook_size": 64},
        {"levels": 3, "codebook_size": 128},
        {"levels": 4, "codebook_size": 256},
    ),
}
"""What is tried of each strategy; a sum takes every pair."""
KEEP = 3
"""One in so many candidates goes on to the next rung."""
BUDGET_KB = 100.0


def bytes_up(config: Config, dataset: Dataset) -> int:
    """What a client sends in a round after warm-up; nothing is trained or prepared for it."""
    spec, rows = parse_spec(config.embedding.name), dataset.num_items
    levels = config.embedding.levels
    model = build_model(
        config,
        rows,
        base=torch.zeros(rows, config.backbone.dim) if spec.plug else None,
        codes=torch.zeros(rows, levels, dtype=torch.int64) if has_codes(str(spec)) else None,
        codebooks=torch.zeros(levels, config.embedding.codebook_size, config.backbone.dim),
    )
    return traffic(model).up


@dataclass(frozen=True)
class Candidate(Variant):
    """A variant, and its embedding with its size in short, for a picture: "p-rq 3 × 128"."""

    short: str


def _candidate(name: str, option: Mapping[str, int]) -> Candidate:
    size = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in option.items())
    words = {"rank": "rank {rank}", "table_size": "{table_size} rows", "levels": "{levels} × {codebook_size}"}
    short = ", ".join(text.format(**option) for key, text in words.items() if key in option)
    settings = (f"embedding.name={name}", *(f"embedding.{key}={value}" for key, value in option.items()))
    return Candidate({"embedding": name, "size": size}, settings, f"{name} {short}".rstrip())


def candidates(context: Context, budget: float) -> list[Candidate]:
    """Embeddings and sizes that send at most `budget` bytes a round.

    Raises:
        ValueError: none does; the message names the smallest.
    """
    found: list[tuple[int, Candidate]] = []
    for name in context.embeddings(EMBEDDINGS):
        options: list[dict[str, int]] = [{}]
        for part in parse_spec(name).parts:
            sizes = SIZES.get(part.partition("+")[0], ({},))
            options = [{**left, **right} for left in options for right in sizes]
        for option in options:
            candidate = _candidate(name, option)
            sent = bytes_up(context.config.updated(candidate.settings), context.dataset)
            found.append((sent, candidate))
    fitting = [variant for sent, variant in found if sent <= budget]
    if not fitting:
        sent, smallest = min(found, key=lambda pair: pair[0])
        raise ValueError(
            f"budget: expected at least {sent / KB:,.1f} KB, which the smallest candidate sends "
            f"({smallest.labels['embedding']}, {smallest.labels['size']}), got {budget / KB:,.1f}"
        )
    return fitting


def rungs(count: int, rounds: int) -> list[tuple[int, int]]:
    """(candidates, rounds) of each rung: the last one trains a third of all `rounds`, those before less."""
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / KEEP))
    return [(size, max(1, rounds // KEEP ** (len(sizes) - 1 - step))) for step, size in enumerate(sizes[:-1])]


def run(context: Context) -> Findings:
    """Halve the candidates by their validation metric; then train all of them in full, to check."""
    metric = context.config.evaluation.selection_metric
    budget = (BUDGET_KB if context.options.budget_kb is None else context.options.budget_kb) * KB
    if not context.validated:
        raise ValueError(f"data set {context.dataset.name!r} has no validation items to choose by")
    everything = candidates(context, budget)
    chosen, rows, seconds = _halve(context, everything, VALID + metric)
    sent = bytes_up(context.config.updated(chosen.settings), context.dataset)
    answers = [
        f"Chosen: {_named(chosen)}, which sends {sent / KB:,.1f} of {budget / KB:,.1f} KB, out of "
        f"{len(everything)} candidates, after {seconds:,.0f} s of pilot runs."
    ]
    tables = []
    if rows:
        pilots = pl.DataFrame(rows, infer_schema_length=None)
        tables.append(Table("select-pilots", "Pilot runs", pilots))
        last = pilots.filter(pl.col("rung") == pilots["rung"].max()).head(2)
        first, second = last.rows(named=True)
        if second[VALID + metric] is not None:
            answers.append(
                f"Why: within {counted(first['rounds'], 'round')} its {metric} of validation items rose to "
                f"{100 * first[VALID + metric]:.2f}%, that of the next ({second['embedding']}, "
                f"{second['size']}) {100 * second[VALID + metric]:.2f}%."
            )
    if not context.options.check:
        return Findings(tables, (), answers)
    grid = context.train(everything, at_best=True)
    table, sentence = _check(context, grid, chosen, metric, seconds)
    short = {tuple(candidate.labels.values()): candidate.short for candidate in everything}
    labels = [
        f"{short[row['embedding'], row['size']]}{' (chosen)' * _is(row, chosen)}"
        for row in table.frame.rows(named=True)
    ]
    pictures = bytes_picture(
        "select",
        table.frame.with_columns(pl.Series("label", labels)),
        metric,
        title=f"Candidates, {context.config.backbone.name} on {context.dataset.name}",
        label="label",
    )
    return Findings([*tables, table], pictures, [*answers, sentence])


def _halve(
    context: Context, left: Sequence[Variant], metric: str
) -> tuple[Variant, list[dict[str, object]], float]:
    """The candidate that is left, a row for each pilot (best first in each rung), and the pilots' seconds."""
    training = context.config.training
    rows: list[dict[str, object]] = []
    seconds = 0.0
    for step, (_, rounds) in enumerate(rungs(len(left), training.rounds), start=1):
        short = (
            f"training.warmup_rounds={min(training.warmup_rounds, rounds // 2)}",
            f"training.rounds={rounds}",
            f"evaluation.full_ranking={'true' if 'full/' in metric else 'false'}",
        )
        pilots = [Variant(variant.labels, (*variant.settings, *short)) for variant in left]
        trained = context.train(pilots, context.seeds[:1], at_best=True)
        scores = [None if result is None else trained.metrics(result)[metric] for result in trained.results]
        if all(score is None for score in scores):
            raise ValueError(f"training: every pilot run diverged; {SMALLER_STEPS}")
        order = sorted(range(len(left)), key=lambda index: -(scores[index] or 0.0))
        kept = math.ceil(len(left) / KEEP)
        rows += [
            {
                "rung": step,
                "rounds": rounds,
                **left[index].labels,
                metric: scores[index],
                "goes on": "yes" if place < kept else "no",
            }
            for place, index in enumerate(order)
        ]
        seconds += _seconds(trained)
        left = [left[index] for index in order[:kept]]
    return left[0], rows, seconds


def _check(
    context: Context, grid: Trained, chosen: Variant, metric: str, seconds: float
) -> tuple[Table, str]:
    """The exhaustive grid, ranked, and a sentence on where the chosen one stands in it."""
    means = grid.means(list(dict.fromkeys([metric, f"NDCG@{context.k}"])), ["bytes_up"])
    ranked = means.sort(metric, descending=True, nulls_last=True).with_row_index("rank", offset=1)
    best, *_ = ranked.rows(named=True)
    own = next(row for row in ranked.rows(named=True) if _is(row, chosen))
    table = Table("select-grid", "All candidates trained in full", ranked)
    if own[metric] is None:
        return table, "Check: the chosen one diverged when it was trained in full."
    deviation = best[f"{metric} sd"]
    spread = "" if deviation is None else f" (standard deviation over seeds {100 * deviation:.2f})"
    one_seed = _seconds(grid) / len(grid.seeds)
    return table, (
        f"Check: trained in full it is number {own['rank']} of {len(ranked)} by {metric} of test items, "
        f"{100 * (best[metric] - own[metric]):.2f} points behind the best{spread}; the pilots took "
        f"{seconds / one_seed:.0%} of the time of the grid with one seed."
    )


def _seconds(trained: Trained) -> float:
    return sum(result.summary.seconds for result in trained.results if result is not None)


def _named(variant: Variant) -> str:
    return " with ".join(str(label) for label in variant.labels.values() if label)


def _is(row: dict[str, object], variant: Variant) -> bool:
    return all(row[name] == value for name, value in variant.labels.items())


STUDY = Study(
    "select",
    "Choice by pilot runs",
    "Which embedding and size for a data set, a backbone and a budget of bytes? (open question 3)",
    run,
    settings=("dataset.options.validation=true",),
    options=frozenset({"embeddings", "budget", "check"}),
)
