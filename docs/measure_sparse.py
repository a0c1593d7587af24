"""Rankings without training, as bars for a federation on sparse data: popularity, item text, and both.

    python docs/measure_sparse.py industrial            # test items
    python docs/measure_sparse.py industrial --valid    # validation items, by which the weight was chosen

A row has HR@10 and NDCG@10 among 100 sampled items and in the whole catalogue, in percent. Text scores an
item by the mean cosine of its features (TF-IDF of words and pairs, reduced to 256 by SVD) to those of the
user's items. Both: text and the logarithm of 1 + training interactions, each standardised, with a weight.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.data import Dataset, load_dataset, popularity_scores
from fedpeft_ext.pretrain.features import text_features
from fedpeft_ext.simulation.evaluation import rank_counts, ranking_metrics


def report(name: str, scores: Tensor, dataset: Dataset, users: np.ndarray, candidates: Tensor) -> None:
    """Prints a row for the `scores` [n, I] of `users` [n]."""
    target = scores.gather(1, candidates[:, :1])
    indptr, met = dataset.met_rows(users)
    unmet = scores.clone()
    unmet[np.repeat(np.arange(len(users)), np.diff(indptr)), met] = -torch.inf
    unmet.scatter_(1, candidates[:, :1], target)
    cells = []
    for ranked in (scores.gather(1, candidates), unmet):
        metrics = ranking_metrics(*rank_counts(ranked, target[:, 0]), [10])
        cells += [f"{100 * metrics[name]:.2f}" for name in ("HR@10", "NDCG@10")]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def standardised(scores: Tensor) -> Tensor:
    """Of mean 0 and standard deviation 1 over items."""
    return (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="name, file or folder; with item text")
    parser.add_argument("--valid", action="store_true", help="rank validation items")
    parser.add_argument("--weight", type=float, default=1.0, help="of popularity beside text")
    options = parser.parse_args()
    dataset = load_dataset(options.dataset, validation=options.valid)
    held = dataset.valid_items if options.valid else dataset.test_items
    users = np.flatnonzero(held >= 0)
    target = "valid" if options.valid else "test"
    candidates = torch.from_numpy(dataset.candidates(users, seed=0, target=target))
    times = torch.from_numpy(popularity_scores(dataset))
    features = torch.from_numpy(text_features(dataset.item_text or [])).double()
    owner = np.repeat(np.arange(dataset.num_users), np.diff(dataset.indptr))
    profiles = torch.zeros(dataset.num_users, features.shape[1], dtype=torch.float64)
    profiles.index_add_(0, torch.from_numpy(owner), features[dataset.indices])
    text = profiles[users] @ features.T
    both = standardised(text) + options.weight * standardised(times.log1p())
    for name, scores in (("popularity", times.expand(len(users), -1)), ("text", text), ("both", both)):
        report(name, scores, dataset, users, candidates)


if __name__ == "__main__":
    main()
