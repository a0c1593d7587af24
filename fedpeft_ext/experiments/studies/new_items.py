"""A tenth of the catalogue arrives in the middle of training: what each embedding makes of new items.

Until then the federation knows nothing of them: neither their text nor any interaction. When they arrive, the
server encodes their text by the frozen encoders of pre-training: full embeddings for P-X and Full, codes for
RQ. Hash functions cover any item from the start. New rows of LoRA's A start at the mean of the trained ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.experiments.studies.experiments import run_experiments, trained
from fedpeft_ext.experiments.studies.pictures import line_picture
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, Table
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.client_batch import Interactions
from fedpeft_ext.simulation.evaluation import Evaluator
from fedpeft_ext.simulation.setup import prepare_items

EMBEDDINGS = ("full", "c-hash", "c-rq", "p-lora", "p-hash", "p-rq")
SHARE = 0.1
"""Of the items, drawn at random by the seed, that arrive."""
GROUPS = ("old", "new")
MOMENTS = ("at arrival", "at the end", "had from the start")


def split_arrivals(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """The data set before and after `share` of the items arrive, items renumbered: those that arrive last.

    Before, their interactions are missing, and users whose test item is among them have none.
    """
    count = max(1, round(share * dataset.num_items))
    new = np.zeros(dataset.num_items, dtype=bool)
    new[np.random.default_rng(seed).permutation(dataset.num_items)[:count]] = True
    order = np.argsort(new, kind="stable")
    number = np.empty(dataset.num_items + 1, dtype=np.int64)
    number[order] = np.arange(dataset.num_items)
    number[-1] = -1  # where there is no item

    def made(size: int) -> Dataset:
        items = number[dataset.indices]
        kept = np.concatenate([[0], np.cumsum(items < size)])
        test, valid = number[dataset.test_items], number[dataset.valid_items]
        text = dataset.item_text
        return dataset.changed(
            num_items=size,
            indptr=kept[dataset.indptr].astype(np.int64),
            indices=items[items < size],
            test_items=np.where(test < size, test, -1),
            valid_items=np.where(valid < size, valid, -1),
            item_ids=[dataset.item_ids[item] for item in order[:size]],
            item_text=None if text is None else [text[item] for item in order[:size]],
        )

    return made(dataset.num_items - count), made(dataset.num_items)


def _prepared(config: Config, before: Dataset, after: Dataset) -> tuple[Pretrained, Pretrained]:
    """What the server prepares before, and the same with the new items, by the encoder that it has then."""
    features, texts = config.pretrain.features, after.item_text
    if features not in ("tfidf", "sentence-transformers") or texts is None:
        raise ValueError(
            "pretrain.features: expected tfidf or sentence-transformers and a data set with item text, since "
            f"new items are encoded from theirs, got {features!r}{' and no text' if texts is None else ''}"
        )
    prepared = prepare_items(config, before)
    assert prepared.encoder is not None
    full, codes = prepared.encoder.encode(texts[before.num_items :])
    return prepared, Pretrained(
        torch.cat([prepared.full, full]),
        None if codes is None or prepared.codes is None else torch.cat([prepared.codes, codes]),
        prepared.codebooks,
    )


class _Groups:
    """Metrics of the users whose test item is old, and of those whose test item is new."""

    def __init__(self, config: Config, after: Dataset, known: int) -> None:
        interactions = Interactions(after, torch.device(config.device))
        test, settings = after.test_items, config.evaluation
        masks = dict(zip(GROUPS, ((test >= 0) & (test < known), test >= known), strict=True))
        missing = [name for name, mask in masks.items() if not mask.any()]
        if missing:
            raise ValueError(f"data set {after.name!r} has no user whose test item is {missing[0]}")
        self._evaluators = {
            name: Evaluator(
                after.changed(test_items=np.where(mask, test, -1)),
                interactions,
                num_negatives=settings.num_negatives,
                full_ranking=False,
                ks=settings.ks,
                seed=settings.candidate_seed(config.seed),
            )
            for name, mask in masks.items()
        }

    def __call__(self, simulator: Simulator) -> dict[str, float]:
        return {
            f"{group} {name}": value
            for group, evaluator in self._evaluators.items()
            for name, value in evaluator(simulator.model, simulator.store, simulator.rounds_done).items()
        }


def train_with_arrivals(config: Config, dataset: Dataset, share: float = SHARE) -> dict[str, Any]:
    """Train half of the rounds without the new items and half with them; and all rounds with them.

    Returns:
        For JSON: "known" items; "curve", a list of {"round", "old HR@10", "new HR@10", ...} from the arrival
        on; "start", the last of these in a federation that had all items from the start.

    Raises:
        ValueError: warm-up would not be over at the arrival, or `pretrain.features` is neither
            "tfidf" nor "sentence-transformers", or there is no item text.
        FloatingPointError: training diverged.
    """
    rounds, every = config.training.rounds, config.evaluation.every
    arrival = rounds // 2
    if not config.training.warmup_rounds <= arrival < rounds:
        raise ValueError(
            f"training.rounds: expected at least 2, and twice the {config.training.warmup_rounds} warm-up "
            f"rounds, got {rounds}"
        )
    before, after = split_arrivals(dataset, share, config.seed)
    prepared, arrived = _prepared(config, before, after)
    groups = _Groups(config, after, before.num_items)
    old = trained(config, before, prepared, arrival)
    simulator = Simulator(config, after, start_from=old.trained_run)
    curve = [{"round": arrival, **groups(simulator)}]
    while simulator.rounds_done < rounds:
        simulator.round()
        if simulator.rounds_done % every == 0 or simulator.rounds_done == rounds:
            curve.append({"round": simulator.rounds_done, **groups(simulator)})
    whole = trained(config, after, arrived, rounds)
    return {"known": before.num_items, "curve": curve, "start": groups(whole)}


def run(context: Context) -> Findings:
    """Each embedding at the arrival, at the end, and in a federation that had all items from the start."""
    metric = f"HR@{context.k}"
    outcomes = run_experiments(
        context,
        STUDY.name,
        context.embeddings(EMBEDDINGS),
        train_with_arrivals,
        lambda outcome: _moments(outcome, metric),
    )
    title = f"New items, {context.config.backbone.name} on {context.dataset.name}"
    note = (
        f"A random {SHARE:.0%} of the items arrives after half of the rounds. old, new: users whose test "
        "item is old or new, among sampled items of the whole catalogue; had from the start: a federation "
        "that knew all items all the time."
    )
    return Findings(
        [Table("new-items", "Old and new items", outcomes.means(), note)],
        line_picture(
            "new-items",
            outcomes.lines("round", f"new {metric}"),
            caption=f"{title}: {metric} of new items from their arrival on",
            title=title,
            xlabel="round",
            ylabel=f"{metric} of new items",
        ),
        runs=outcomes.runs,
    )


def _moments(result: Mapping[str, Any], metric: str) -> dict[str, float]:
    """`metric` of both groups at each of `MOMENTS`, by the name of its column."""
    places = (result["curve"][0], result["curve"][-1], result["start"])
    return {
        f"{group} {metric} {when}": place[f"{group} {metric}"]
        for group in GROUPS
        for when, place in zip(MOMENTS, places, strict=True)
    }


STUDY = Study(
    "new-items",
    "New items in the middle of training",
    "How well are items recommended that arrive later? (open question 5 of the paper)",
    run,
    options=frozenset({"embeddings"}),
)
