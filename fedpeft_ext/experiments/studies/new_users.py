"""A fifth of the users come when the training is over: how well each embedding serves them once they have
trained their own state, a few times and alone, and how well had they taken part from the start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.experiments.studies.experiments import Outcome, run_experiments, trained
from fedpeft_ext.experiments.studies.pictures import line_picture
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, Table
from fedpeft_ext.simulation import TrainedRun
from fedpeft_ext.simulation.client_batch import ClientStore
from fedpeft_ext.simulation.setup import needs_pretrained, prepare_items

EMBEDDINGS = ("full", "c-hash", "c-rq", "p-lora", "p-hash", "p-rq")
SHARE = 0.2
"""Of the users, drawn at random by the seed, who come later."""
ROUNDS = (0, 1, 2, 5, 10, 20)
"""How often they have trained when they are looked at."""


def split_users(num_users: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of those who take part, and of the others, both ascending; at least one each of two or more."""
    if num_users < 2:
        raise ValueError(f"data set: expected at least 2 users, of whom some come later, got {num_users}")
    count = min(max(1, round(share * num_users)), num_users - 1)
    order = np.random.default_rng(seed).permutation(num_users)
    return np.sort(order[count:]), np.sort(order[:count])


def train_without_some(config: Config, dataset: Dataset, share: float = SHARE) -> dict[str, Any]:
    """Train a federation without some users, who come when it is done; and one with all.

    Returns:
        For JSON, metrics among sampled items: "curve", a list of {"rounds", "HR@10", ...} of those who came
        later, by how often they have trained; "others", of those who took part; "took part", of the first,
        had they.

    Raises:
        ValueError: no user has a test item in one of the groups. FloatingPointError: training diverged.
    """
    here, later = split_users(dataset.num_users, share, config.seed)
    members, newcomers = dataset.of_users(here), dataset.of_users(later)
    prepared = prepare_items(config, dataset) if needs_pretrained(config.embedding.name) else None
    ranking = config.evaluation.model_copy(update={"full_ranking": False})
    rounds = config.training.rounds
    run = trained(config, members, prepared, rounds).trained_run
    curve = [
        {"rounds": times, **run.with_new_users(newcomers, times).evaluate(ranking).means()}
        for times in ROUNDS
    ]
    whole = trained(config, dataset, prepared, rounds)
    state = whole.store.read(torch.from_numpy(later).to(next(whole.model.parameters()).device))
    had = TrainedRun(config, newcomers, whole.model, ClientStore(state), rounds)
    return {
        "curve": curve,
        "others": run.evaluate(ranking).means(),
        "took part": had.evaluate(ranking).means(),
    }


def _columns(outcome: Outcome, metric: str) -> dict[str, float]:
    return {
        f"others {metric}": outcome["others"][metric],
        **{f"new {metric} after {place['rounds']}": place[metric] for place in outcome["curve"]},
        f"new {metric} had they taken part": outcome["took part"][metric],
    }


def run(context: Context) -> Findings:
    """Each embedding by how often new users have trained, beside a federation of all."""
    metric = f"HR@{context.k}"
    outcomes = run_experiments(
        context,
        STUDY.name,
        context.embeddings(EMBEDDINGS),
        train_without_some,
        lambda outcome: _columns(outcome, metric),
    )
    title = f"New users, {context.config.backbone.name} on {context.dataset.name}"
    note = (
        f"A random {SHARE:.0%} of the users come after the last round. They train their own state with the "
        f"shared parameters as they are, and send nothing. {metric} among sampled items, after training so "
        "often; others: the users who took part."
    )
    return Findings(
        [Table("new-users", "New users", outcomes.means(), note)],
        line_picture(
            "new-users",
            outcomes.lines("rounds", metric),
            caption=f"{title}: {metric} of users who come after the training, by how often they have trained",
            title=title,
            xlabel="times that new users have trained",
            ylabel=f"{metric} of new users",
        ),
        runs=outcomes.runs,
    )


STUDY = Study(
    "new-users",
    "New users after the training",
    "How well are users served who come later, and train only their own state?",
    run,
    options=frozenset({"embeddings"}),
)
