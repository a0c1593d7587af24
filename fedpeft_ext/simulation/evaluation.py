"""Ranking metrics of the held-out items: HR@k, NDCG@k and MRR, with ties counted fairly.

Every metric is the expectation over a uniformly random order among equal scores (McSherry and Najork,
"Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008):
a model that scores everything alike gets HR@10 = 10/101 among 100 negatives, neither 0 nor 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.backbones import Backbone, ClientContext
from fedpeft_ext.nn.items import Items
from fedpeft_ext.simulation.client_batch import ClientStore, Interactions
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.words import SMALLER_STEPS

if TYPE_CHECKING:
    from fedpeft_ext.data import Dataset

BLOCK_BYTES = 64 * 2**20
"""Size of the score matrix of one block of users: large enough for a fast matrix product, small beside the
data.
"""

KEPT_BYTES = 512 * 2**20
"""Candidates and met items that are kept from one evaluation to the next."""

USERS_AT_ONCE = 16_384
"""Users whose candidates are made at a time, which takes several times the room of what is kept."""


class _Ranked(NamedTuple):
    """What n users are ranked among: candidates [n, 1 + negatives]; and with full ranking the items that they
    met, those of user u at indptr[u] to indptr[u + 1].
    """

    candidates: Tensor
    indptr: np.ndarray
    met: Tensor

    def part(self, at: slice) -> _Ranked:
        """Of some of the users."""
        indptr = self.indptr[at.start : at.stop + 1]
        return _Ranked(self.candidates[at], indptr - indptr[0], self.met[indptr[0] : indptr[-1]])


def rank_counts(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How many candidates beat the target, and how many others equal it.

    Args:
        scores: [B, N] of the candidates, the target among them; -inf takes a candidate out.
        target: [B] score of the target.

    Returns:
        int64 [B] counts of strictly greater scores and of equal ones without the target itself.
    """
    column = target[:, None]
    return (scores > column).sum(1), (scores == column).sum(1) - 1


def ranking_metrics(greater: Tensor, equal: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Mean HR@k, NDCG@k (one relevant item) and MRR over users, from `rank_counts`; see `user_metrics`."""
    return {name: float(values.mean()) for name, values in user_metrics(greater, equal, ks).items()}


def user_metrics(greater: Tensor, equal: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """HR@k, NDCG@k (one relevant item) and MRR of each user, float64 [U], from `rank_counts`.

    The target's rank is uniform over greater + 1 ... greater + equal + 1; each metric is its mean over those
    ranks.
    """
    if len(greater) == 0:
        raise ValueError("evaluation: expected at least one user with a held-out item, got none")
    first, last = greater.cpu().double(), (greater + equal + 1).cpu().double()  # ranks in (first, last]
    ties = last - first
    ranks = torch.arange(1, int(last.max()) + 1, dtype=torch.float64, device="cpu")
    gains = torch.cat([ranks.new_zeros(1), torch.cumsum(1.0 / torch.log2(ranks + 1.0), 0)])
    reciprocals = torch.cat([ranks.new_zeros(1), torch.cumsum(1.0 / ranks, 0)])

    metrics = {}
    for k in ks:
        # Only ranks up to k count; where first >= k none does.
        low, high = first.clamp(max=k), last.clamp(max=k)
        metrics[f"HR@{k}"] = (high - low) / ties
        metrics[f"NDCG@{k}"] = (gains[high.long()] - gains[low.long()]) / ties
    metrics["MRR"] = (reciprocals[last.long()] - reciprocals[first.long()]) / ties
    return metrics


@contextmanager
def evaluation_mode(model: Backbone) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in, on which training relies."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def users_at_once(model: Backbone, width: int) -> int:
    """Users of a block whose scores of `width` items each take `BLOCK_BYTES`, at least one."""
    return max(1, BLOCK_BYTES // (width * model.item_dtype.itemsize * model.scoring_width))


def scoring_inputs(
    model: Backbone, store: ClientStore, interactions: Interactions, users: Tensor
) -> tuple[dict[str, Tensor], ClientContext]:
    """What `Backbone.catalogue_scores` and `client_scores` take of `users` [C]: their state and context."""
    history = interactions.padded(users) if model.uses_history else users.new_empty(len(users), 0)
    return store.read(users), ClientContext(users, Items(history, None), seed=0, round=0, epoch=0)


def refuse_nan(scores: Tensor, users: Tensor, when: str) -> None:
    """Raise FloatingPointError where one of the scores [C, P] of `users` [C] is NaN."""
    bad = scores.isnan().any(1)
    if bool(bad.any()):
        raise FloatingPointError(
            f"{when}: NaN scores for {int(bad.sum())} users, the first is user "
            f"{int(users[bad][0])}; training has diverged: {SMALLER_STEPS}"
        )


class Evaluator:
    """Ranks each user's held-out item among sampled candidates and among all items.

    Full ranking leaves out the items that the user met (training, validation, test) other than the target.
    Users without a target are left out.

    Args:
        dataset: interactions and held-out items.
        interactions: the training part, on the device of the model.
        num_negatives: sampled candidates besides the test item, drawn from items the user never met.
        full_ranking: also rank among the whole catalogue.
        ks: cut-offs k.
        seed: of the sampled candidates.
        target: which held-out item is ranked, "test" or "valid".
        ranks: each evaluates its own users, and all get the metrics of all.

    Raises:
        ValueError: no user has such an item, or one has too few items never met.
    """

    def __init__(
        self,
        dataset: Dataset,
        interactions: Interactions,
        *,
        num_negatives: int,
        full_ranking: bool,
        ks: Sequence[int],
        seed: int,
        target: Literal["test", "valid"] = "test",
        ranks: Ranks | None = None,
    ) -> None:
        users = np.flatnonzero((dataset.test_items if target == "test" else dataset.valid_items) >= 0)
        if len(users) == 0:
            raise ValueError(f"evaluation: data set {dataset.name!r} has no user with a {target} item")
        self._ranks = ranks
        if ranks is not None:
            users = users[ranks.owns(users)]
        self.full_ranking = full_ranking
        self.ks = tuple(ks)
        self._interactions = interactions
        self._users = torch.from_numpy(users).to(interactions.device)
        self._dataset = dataset
        self._draw: dict[str, Any] = {"num_negatives": num_negatives, "seed": seed, "target": target}
        self._width = 1 + num_negatives
        # What users are ranked among is made once, unless it is too much to keep.
        numbers = len(users) * self._width + full_ranking * int(interactions.sizes[users].sum())
        self._keeps = 8 * numbers <= KEPT_BYTES
        self._kept: _Ranked | None = None
        dataset.check_candidates(users, num_negatives, target=target)

    @property
    def num_users(self) -> int:
        """Users that are evaluated on this rank."""
        return len(self._users)

    @torch.no_grad()
    def __call__(self, model: Backbone, store: ClientStore, round: int = 0) -> dict[str, float]:
        """Metrics by name: `HR@10`, `NDCG@10`, `MRR`, ... and with full ranking `full/HR@10`, ...

        Raises:
            FloatingPointError: a score is NaN.
        """
        metrics: dict[str, float] = {}
        with evaluation_mode(model):
            for prefix, counts in self._counts(model, store, round).items():
                means = ranking_metrics(*self._joined(counts), self.ks)
                metrics |= {f"{prefix}{name}": value for name, value in means.items()}
        return metrics

    @torch.no_grad()
    def by_user(
        self, model: Backbone, store: ClientStore, round: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The users of this rank, int64 [n], and what `__call__` takes the means of, float64 [n] by name."""
        metrics: dict[str, Tensor] = {}
        with evaluation_mode(model):
            for prefix, counts in self._counts(model, store, round).items():
                each = user_metrics(counts[0], counts[1], self.ks)
                metrics |= {f"{prefix}{name}": values for name, values in each.items()}
        return self._users, metrics

    def _counts(self, model: Backbone, store: ClientStore, round: int) -> dict[str, Tensor]:
        """`rank_counts` [2, n] of this rank's users, by prefix of the metrics' names."""
        catalogue = torch.arange(self._interactions.num_items, device=self._interactions.device)
        vectors = model.item_embedding(catalogue) if self.full_ranking else None
        width = len(catalogue) if self.full_ranking else self._width
        block = users_at_once(model, width)
        when = f"evaluation after round {round}"
        if self._keeps and self._kept is None:
            self._kept = self._all_ranked()
        # Room for all users' counts: what is made between large blocks and kept would cut up the memory that
        # they leave, so that the next ones take new.
        sampled, full = (self._users.new_empty(2, self.num_users) for _ in range(2))
        for start in range(0, self.num_users, block):
            at = slice(start, min(start + block, self.num_users))
            users = self._users[at]
            ranked = self._ranked(at) if self._kept is None else self._kept.part(at)
            state, context = scoring_inputs(model, store, self._interactions, users)
            if vectors is None:
                scores = model.client_scores(ranked.candidates, state, context)
                refuse_nan(scores, users, when)
                sampled[0, at], sampled[1, at] = rank_counts(scores, scores[:, 0])
                continue
            scores = model.catalogue_scores(vectors, state, context)
            refuse_nan(scores, users, when)
            chosen = scores.gather(1, ranked.candidates)
            target = chosen[:, 0]
            sampled[0, at], sampled[1, at] = rank_counts(chosen, target)
            owner = torch.from_numpy(np.repeat(np.arange(len(users)), np.diff(ranked.indptr)))
            scores[owner.to(scores.device), ranked.met] = -torch.inf
            scores.scatter_(1, ranked.candidates[:, :1], target[:, None])
            full[0, at], full[1, at] = rank_counts(scores, target)

        return {"": sampled, "full/": full} if self.full_ranking else {"": sampled}

    def _ranked(self, at: slice) -> _Ranked:
        users, device = self._users[at].cpu().numpy(), self._users.device
        candidates = torch.from_numpy(self._dataset.candidates(users, **self._draw)).to(device)
        if not self.full_ranking:
            return _Ranked(candidates, np.zeros(len(users) + 1, np.int64), candidates.new_empty(0))
        indptr, met = self._dataset.met_rows(users)
        return _Ranked(candidates, indptr, torch.from_numpy(met).to(device))

    def _all_ranked(self) -> _Ranked:
        parts = [
            self._ranked(slice(start, min(start + USERS_AT_ONCE, self.num_users)))
            for start in range(0, max(self.num_users, 1), USERS_AT_ONCE)
        ]
        if len(parts) == 1:
            return parts[0]
        counts = np.concatenate([[0], *(np.diff(part.indptr) for part in parts)])
        return _Ranked(
            torch.cat([part.candidates for part in parts]),
            np.cumsum(counts),
            torch.cat([part.met for part in parts]),
        )

    def _joined(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The counts [2, U] of all users, of all ranks."""
        if self._ranks is not None:
            counts = self._ranks.gather_rows(counts.T).T
        return counts[0], counts[1]
