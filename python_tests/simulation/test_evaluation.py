"""Ranking metrics: against scikit-learn and brute force, ties, exclusions and NaN."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score
from small_federation import make_dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpeft_ext.backbones import Backbone, FedMF
from fedpeft_ext.data import Dataset, synthetic_dataset
from fedpeft_ext.nn import FullEmbedding
from fedpeft_ext.simulation import evaluation
from fedpeft_ext.simulation.client_batch import ClientStore, Interactions
from fedpeft_ext.simulation.evaluation import Evaluator, rank_counts, ranking_metrics

KS = (1, 3, 10)


def metrics_of(scores: torch.Tensor, column: int = 0) -> dict[str, float]:
    return ranking_metrics(*rank_counts(scores, scores[:, column]), KS)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000), users=st.integers(1, 6), items=st.integers(2, 40), levels=st.integers(1, 50)
)
def test_ndcg_agrees_with_scikit_learn_ties_included(seed: int, users: int, items: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(users, items)).astype(np.float64)
    relevance = np.zeros_like(scores)
    relevance[:, 0] = 1.0
    ours = metrics_of(torch.from_numpy(scores))
    for k in KS:
        assert ours[f"NDCG@{k}"] == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)


def test_mrr_agrees_with_scikit_learn_without_ties() -> None:
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30.0), (8, 1)), axis=1)
    relevance = np.zeros_like(scores)
    relevance[:, 0] = 1.0
    # With one relevant item its average precision is the reciprocal of its rank.
    expected = label_ranking_average_precision_score(relevance, scores)
    assert metrics_of(torch.from_numpy(scores))["MRR"] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(greater=st.integers(0, 30), equal=st.integers(0, 30))
def test_metrics_are_means_over_the_tied_ranks(greater: int, equal: int) -> None:
    ours = ranking_metrics(torch.tensor([greater]), torch.tensor([equal]), KS)
    ranks = range(greater + 1, greater + equal + 2)
    for k in KS:
        hits = [rank <= k for rank in ranks]
        assert ours[f"HR@{k}"] == pytest.approx(np.mean(hits))
        gains = [hit / math.log2(rank + 1) for hit, rank in zip(hits, ranks, strict=True)]
        assert ours[f"NDCG@{k}"] == pytest.approx(np.mean(gains))
    assert ours["MRR"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_constant_scores_favour_nobody() -> None:
    metrics = ranking_metrics(*rank_counts(torch.zeros(7, 101), torch.zeros(7)), (10,))
    assert metrics["HR@10"] == pytest.approx(10 / 101)
    assert metrics["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 102)) / 101)


def fedmf(dataset: Dataset, seed: int = 0) -> tuple[FedMF, ClientStore]:
    generator = torch.Generator().manual_seed(seed)
    model = FedMF(FullEmbedding(dataset.num_items, 4, generator=generator), 4)
    return model, ClientStore({"user": torch.randn(dataset.num_users, 4, generator=generator)})


def evaluator(dataset: Dataset, full_ranking: bool = True) -> Evaluator:
    interactions = Interactions(dataset, torch.device("cpu"))
    return Evaluator(dataset, interactions, num_negatives=20, full_ranking=full_ranking, ks=KS, seed=5)


def test_evaluation_agrees_with_brute_force(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = fedmf(dataset)
    scores = (store.state["user"] @ model.item_embedding.full_embedding().T).numpy()
    users = np.flatnonzero(dataset.test_items >= 0)
    candidates = dataset.candidates(users, 20, 5)
    ranks: dict[str, list[int]] = {"": [], "full/": []}
    for user, row in zip(users, candidates, strict=True):
        test = dataset.test_items[user]
        others = np.setdiff1d(np.arange(dataset.num_items), dataset.met(user))
        ranks["full/"].append(1 + int((scores[user, others] > scores[user, test]).sum()))
        ranks[""].append(1 + int((scores[user, row[1:]] > scores[user, test]).sum()))

    results = [evaluator(dataset)(model, store)]
    monkeypatch.setattr(evaluation, "BLOCK_BYTES", 1)  # one user a block
    results.append(evaluator(dataset)(model, store))
    for result in results:
        for prefix, expected in ranks.items():
            values = np.array(expected)
            assert result[f"{prefix}HR@3"] == pytest.approx(np.mean(values <= 3))
            assert result[f"{prefix}NDCG@10"] == pytest.approx(np.mean((values <= 10) / np.log2(values + 1)))
            assert result[f"{prefix}MRR"] == pytest.approx(np.mean(1 / values))
    sampled = evaluator(dataset, full_ranking=False)(model, store)
    assert sampled == pytest.approx({k: v for k, v in results[0].items() if not k.startswith("full/")})


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError as error:
        pytest.skip(f"no way to tell this process's memory: {error}")


def test_memory_does_not_grow_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = synthetic_dataset(3_000, 30_000, 20, item_text=False)
    model, store = fedmf(data)
    evaluate = evaluator(data)
    monkeypatch.setattr(evaluation, "BLOCK_BYTES", 2**22)  # 86 blocks
    before = resident_bytes()
    evaluate(model, store)
    assert resident_bytes() - before < 20 * 2**22


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        sizes = [each.nbytes for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return made


class Plain(Backbone):
    """Somebody's own, which overrides nothing that it need not."""

    local_parameters = ("user",)

    def __init__(self, item_embedding: FullEmbedding, dim: int) -> None:
        super().__init__(item_embedding, dim)
        self.user = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, items, context=None):  # type: ignore[no-untyped-def]
        return (self.user * self.item_embedding(items)).sum(-1)


def test_blocks_hold_a_backbone_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    data = synthetic_dataset(300, 200, 8, item_text=False)
    _, store = fedmf(data)
    model = Plain(FullEmbedding(data.num_items, 4), 4)
    monkeypatch.setattr(evaluation, "BLOCK_BYTES", 2**16)
    with Largest() as largest:
        evaluator(data)(model, store)
    assert 0 < largest.bytes <= 2**16


def test_ranked_in_pieces(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = fedmf(dataset)
    whole = evaluator(dataset)(model, store)
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 3)
    assert evaluator(dataset)(model, store) == whole
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 0)
    assert evaluator(dataset)(model, store) == whole


def test_validation_items_are_ranked_like_test_items() -> None:
    dataset = make_dataset(validation=True)
    model, store = fedmf(dataset)
    scores = (store.state["user"] @ model.item_embedding.full_embedding().T).numpy()
    users = np.flatnonzero(dataset.valid_items >= 0)
    assert 0 < len(users) < dataset.num_users
    sampled, full = [], []
    for user, row in zip(users, dataset.candidates(users, 20, 5, target="valid"), strict=True):
        own = scores[user, dataset.valid_items[user]]
        assert row[0] == dataset.valid_items[user]
        others = np.setdiff1d(np.arange(dataset.num_items), dataset.met(user))
        sampled.append(int((scores[user, row[1:]] > own).sum()) < 3)
        full.append(int((scores[user, others] > own).sum()) < 3)
    interactions = Interactions(dataset, torch.device("cpu"))
    valid = Evaluator(
        dataset, interactions, num_negatives=20, full_ranking=True, ks=KS, seed=5, target="valid"
    )
    result = valid(model, store)
    assert (result["HR@3"], result["full/HR@3"]) == (pytest.approx(np.mean(sampled)), np.mean(full))


@pytest.mark.parametrize("full_ranking", [True, False])
def test_nan_scores_are_refused(dataset: Dataset, full_ranking: bool) -> None:
    model, store = fedmf(dataset)
    store.state["user"][3] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN scores for 1 users, the first is user 3"):
        evaluator(dataset, full_ranking)(model, store, round=12)


def test_identical_items_tie(dataset: Dataset) -> None:
    """All items alike: the matrix product must score them alike to the bit."""
    model, store = fedmf(dataset)
    with torch.no_grad():
        model.item_embedding.weight[:] = model.item_embedding.weight[0].clone()
    result = evaluator(dataset)(model, store)
    assert result["HR@10"] == pytest.approx(10 / 21)
    users = np.flatnonzero(dataset.test_items >= 0)
    expected = np.mean([10 / (1 + dataset.num_items - len(dataset.met(user))) for user in users])
    assert result["full/HR@10"] == pytest.approx(expected)


def test_no_user_to_evaluate_is_an_error() -> None:
    tiny = make_dataset(users=1)
    with pytest.raises(ValueError, match="no user with a test item"):
        evaluator(tiny)
