"""Seeded synthetic data of any size, with planted preferences that a model can learn and popularity cannot
tell.

Items lie in clusters; each user has a few clusters of interest and draws from them, popular items more often,
and now and then from the rest of the catalogue. The item matrix behind it has rank `dim`: every cluster is a
direction in that space. Time and memory are proportional to the number of interactions: no step looks at user
x item.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .dataset import Dataset, FloatArray, IntArray
from .load import check_count, check_number, check_options, leave_one_out
from .mapped import DatasetWriter, MappedDataset

# Interactions and users drawn at a time. Part of the definition of a data set: another chunk gives other
# draws.
_CHUNK_INTERACTIONS = 1 << 22
_CHUNK_USERS = 1 << 17
_WORDS_PER_CLUSTER = 12
_COMMON_WORDS = 200


@dataclass(frozen=True, eq=False)
class Planted:
    """What a synthetic data set was drawn from.

    Attributes:
        centres: float64 [G, dim], unit vectors: the direction of each cluster.
        item_clusters: int64 [I], the cluster of each item.
        item_popularity: float64 [I], how often an item is drawn relative to a uniform draw within its
            cluster; mean 1 within each cluster.
        user_clusters: int64 [U, S], the clusters that each user likes.
        user_weights: float64 [U, S], their shares, summing to 1.
        noise: the share of interactions from outside of the user's clusters.
    """

    centres: FloatArray
    item_clusters: IntArray
    item_popularity: FloatArray
    user_clusters: IntArray
    user_weights: FloatArray
    noise: float

    @property
    def item_factors(self) -> FloatArray:
        """float64 [I, dim]: the direction of each item."""
        return self.centres[self.item_clusters]

    @property
    def user_factors(self) -> FloatArray:
        """float64 [U, dim]: the user's clusters averaged by share; their inner product with `item_factors` is
        the preference."""
        factors: FloatArray = np.einsum("us,usd->ud", self.user_weights, self.centres[self.user_clusters])
        return factors

    def preferences(self, users: IntArray, items: IntArray) -> FloatArray:
        """How often a user draws an item, relative to other items: the best scores that any model can give.

        `users` [N] and `items` [N, P] give float64 [N, P].
        """
        clusters = self.item_clusters[items]
        sizes = np.bincount(self.item_clusters, minlength=len(self.centres))
        liked = np.zeros(items.shape)
        inside = np.zeros(items.shape, bool)
        for s in range(self.user_clusters.shape[1]):
            hit = clusters == self.user_clusters[users, s, None]
            liked += hit * self.user_weights[users, s, None]
            inside |= hit
        outside = len(self.item_clusters) - sizes[self.user_clusters[users]].sum(axis=1)
        rates: FloatArray = (1 - self.noise) * liked * self.item_popularity[items] / sizes[clusters]
        rates += ~inside * (self.noise / outside[:, None])
        return rates


@dataclass(frozen=True, eq=False)
class SyntheticDataset(Dataset):
    """A `Dataset` beside what it was drawn from."""

    planted: Planted = field(kw_only=True)


def synthetic_dataset(
    num_users: int = 1000,
    num_items: int = 1000,
    interactions_per_user: float = 30,
    *,
    dim: int = 8,
    seed: int = 0,
    noise: float = 0.1,
    popularity: float = 0.5,
    num_clusters: int | None = None,
    clusters_per_user: int = 3,
    item_text: bool = True,
    validation: bool = False,
    name: str = "synthetic",
) -> SyntheticDataset:
    """Draw a data set with planted preferences; the same arguments give the same data.

    A user's number of interactions is 2 plus a Poisson-gamma count (at most half of the catalogue). A share
    `noise` of them is uniform over the items outside of the user's clusters, the others lie in clusters of
    the user's own mix (a flat Dirichlet draw). Within a cluster of n items the rank drawn is n t^(1 +
    popularity), t uniform: popularity 0 is flat, 1 a density like rank^-1/2. Items are distinct within a user
    and in random order of time; the last is the test item.

    Args:
        num_users, num_items: U >= 1 and I in [4, 2^31).
        interactions_per_user: mean, in [2, num_items / 2].
        dim: width of the planted vectors.
        seed: at least 0.
        noise: in [0, 1].
        popularity: at least 0.
        num_clusters: G, at least 2 and at most num_items / 2; by default clusters about as large as a user's
            interactions.
        clusters_per_user: S; at most half of the clusters are used.
        item_text: write a text for each item: words of its cluster, of its cluster's main directions, and
            common ones.
        validation: hold out each user's second-last item (users with at least 3).
        name: the data set's name.

    Raises TypeError or ValueError naming the argument.
    """
    options = dict(locals())
    plan = _plan(**options)
    drawn = list(plan.users())
    indptr = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.concatenate([part.counts for part in drawn]), out=indptr[1:])
    return SyntheticDataset(
        name=name,
        num_users=num_users,
        num_items=num_items,
        indptr=indptr,
        indices=np.concatenate([part.indices for part in drawn]),
        test_items=np.concatenate([part.test_items for part in drawn]),
        valid_items=np.concatenate([part.valid_items for part in drawn]),
        user_ids=list(plan.user_ids()),
        item_ids=list(plan.item_ids()),
        item_text=plan.item_text(),
        report=plan.report(),
        planted=plan.planted,
    )


def write_synthetic_dataset(folder: str | Path, **options: Any) -> MappedDataset:
    """Draw the data set of `synthetic_dataset(**options)` into a new folder (`data.mapped`), holding a few
    million interactions at a time."""
    check_options(synthetic_dataset, options, "synthetic data")
    given = inspect.signature(synthetic_dataset).bind(**options)
    given.apply_defaults()
    plan = _plan(**given.arguments)
    with DatasetWriter(folder, plan.name, plan.num_users, plan.num_items) as writer:
        for part in plan.users():
            writer.add_users(*part)
        writer.add_texts("user_ids", plan.user_ids())
        writer.add_texts("item_ids", plan.item_ids())
        text = plan.item_text()
        if text is not None:
            writer.add_texts("item_text", text)
        return writer.finish(plan.report())


class _Users(NamedTuple):
    """Consecutive users: training items of each [n], joined, and held-out items [n]."""

    counts: IntArray
    indices: IntArray
    test_items: IntArray
    valid_items: IntArray


@dataclass(frozen=True)
class _Plan:
    """What is drawn before any interaction, and the drawing of these."""

    name: str
    num_users: int
    num_items: int
    seed: int
    popularity: float
    validation: bool
    with_text: bool
    step: int  # users drawn at a time
    counts: IntArray  # [U] interactions
    starts: IntArray  # [G + 1] places of clusters
    item_at: IntArray  # [I] item at each place
    planted: Planted

    def users(self) -> Iterator[_Users]:
        """All users in order. Fills `planted.user_clusters` on the way."""
        planted = self.planted
        liked = planted.user_clusters.shape[1]
        for begin in range(0, self.num_users, self.step):
            part = slice(begin, min(begin + self.step, self.num_users))
            rng = np.random.default_rng([self.seed, 1, begin])
            clusters = _distinct_clusters(rng, part.stop - begin, liked, len(planted.centres))
            planted.user_clusters[part] = clusters
            noise = np.full((part.stop - begin, 1), planted.noise)
            shares = np.hstack([planted.user_weights[part] * (1 - planted.noise), noise])
            users, places = _draw(rng, self.counts[part], clusters, shares, self.starts, self.popularity)
            items = _shuffle(rng, users, self.item_at[places], self.num_items)
            local, train, test, valid = leave_one_out(users, items, part.stop - begin, self.validation)
            yield _Users(np.diff(local), train, test, valid)

    def user_ids(self) -> Iterator[str]:
        return (f"u{u}" for u in range(self.num_users))

    def item_ids(self) -> Iterator[str]:
        return (f"i{i}" for i in range(self.num_items))

    def item_text(self) -> list[str] | None:
        if not self.with_text:
            return None
        rng = np.random.default_rng([self.seed, 2])
        return _item_text(rng, self.planted.centres, self.planted.item_clusters)

    def report(self) -> dict[str, Any]:
        return {
            "format": "synthetic",
            "order": "drawn",
            "rows": int(self.counts.sum()),
            "duplicates_dropped": 0,
            "users_without_test_item": 0,
            "clusters": len(self.planted.centres),
            "clusters_per_user": self.planted.user_clusters.shape[1],
        }


def _plan(
    *,
    num_users: int,
    num_items: int,
    interactions_per_user: float,
    dim: int,
    seed: int,
    noise: float,
    popularity: float,
    num_clusters: int | None,
    clusters_per_user: int,
    item_text: bool,
    validation: bool,
    name: str,
) -> _Plan:
    """Check the options of `synthetic_dataset`, and draw what comes before the interactions."""
    check_count("num_users", num_users, 1)
    check_count("num_items", num_items, 4)
    if num_items >= 1 << 31:
        raise ValueError(f"num_items: expected fewer than 2^31, got {num_items}")
    check_number("interactions_per_user", interactions_per_user, 2, num_items / 2)
    check_count("dim", dim, 1)
    check_count("seed", seed, 0)
    check_number("noise", noise, 0, 1)
    check_number("popularity", popularity, 0, 100)
    check_count("clusters_per_user", clusters_per_user, 1)
    for option, flag in (("item_text", item_text), ("validation", validation)):
        if not isinstance(flag, bool):
            raise TypeError(f"{option}: expected true or false, got {flag!r}")
    if num_clusters is None:
        num_clusters = int(np.clip(num_items // max(8, interactions_per_user), 2, 256))
    elif check_count("num_clusters", num_clusters, 2) > num_items // 2:
        raise ValueError(
            f"num_clusters: expected at most num_items / 2 = {num_items // 2}, got {num_clusters}"
        )
    num_users, num_items, num_clusters = map(operator.index, (num_users, num_items, num_clusters))
    # At least half of the catalogue lies outside of a user's clusters, so that what does not fit inside
    # always fits there.
    liked = min(clusters_per_user, num_clusters // 2)
    liked = max(1, min(liked, num_items // 2 // -(-num_items // num_clusters)))

    rng = np.random.default_rng([seed, 0])
    centres = rng.standard_normal((num_clusters, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    # Items at places [starts[g], starts[g + 1]) are cluster g, the most popular first; a permutation gives
    # places their item.
    starts = np.arange(num_clusters + 1, dtype=np.int64) * num_items // num_clusters
    sizes = np.diff(starts)
    item_at = rng.permutation(num_items)
    item_clusters = np.empty(num_items, np.int64)
    item_clusters[item_at] = np.repeat(np.arange(num_clusters), sizes)
    rank, size = np.arange(num_items) - np.repeat(starts[:-1], sizes), np.repeat(sizes, sizes)
    curve = 1 / (1 + popularity)
    item_popularity = np.empty(num_items)
    item_popularity[item_at] = (((rank + 1) / size) ** curve - (rank / size) ** curve) * size
    counts = 2 + rng.poisson(rng.gamma(2.0, (interactions_per_user - 2) / 2, num_users))
    counts = np.minimum(counts, num_items // 2).astype(np.int64)

    return _Plan(
        name=name,
        num_users=num_users,
        num_items=num_items,
        seed=seed,
        popularity=popularity,
        validation=validation,
        with_text=item_text,
        step=int(np.clip(_CHUNK_INTERACTIONS // interactions_per_user, 1, _CHUNK_USERS)),
        counts=counts,
        starts=starts,
        item_at=item_at,
        planted=Planted(
            centres,
            item_clusters,
            item_popularity,
            np.zeros((num_users, liked), np.int64),
            rng.dirichlet(np.ones(liked), num_users),
            float(noise),
        ),
    )


def _distinct_clusters(rng: np.random.Generator, num_users: int, liked: int, num_clusters: int) -> IntArray:
    """`liked` distinct clusters for each user, ascending, int64 [U, S]: Floyd's algorithm."""
    chosen = np.full((num_users, liked), -1, np.int64)
    for s in range(liked):
        last = num_clusters - liked + s
        draw = rng.integers(0, last + 1, num_users)
        chosen[:, s] = np.where((chosen == draw[:, None]).any(axis=1), last, draw)
    chosen.sort(axis=1)
    return chosen


def _draw(
    rng: np.random.Generator,
    counts: IntArray,
    clusters: IntArray,
    shares: FloatArray,
    starts: IntArray,
    popularity: float,
) -> tuple[IntArray, IntArray]:
    """Distinct places for each user: (users [n], places [n]), users ascending.

    A user's draws fall into cells: one a liked cluster, one for all the rest. Within a cell of n places, k
    draws are one in each of k equal strata of the popularity curve, pushed apart where they coincide:
    distinct without a second draw.
    """
    liked = clusters.shape[1]
    num_items = int(starts[-1])
    sizes = (starts[clusters + 1] - starts[clusters]).astype(np.int64)
    per_cell = rng.multinomial(counts, shares).astype(np.int64)
    excess = np.maximum(per_cell[:, :liked] - sizes, 0)
    per_cell[:, :liked] -= excess
    per_cell[:, liked] += excess.sum(axis=1)
    capacity = np.hstack([sizes, num_items - sizes.sum(axis=1, keepdims=True)]).ravel()
    flat = per_cell.ravel()
    cell = np.repeat(np.arange(len(flat)), flat)
    position = np.arange(len(cell)) - np.repeat(np.cumsum(flat) - flat, flat)
    room, drawn = capacity[cell], flat[cell]
    rest = cell % (liked + 1) == liked
    quantile = (position + rng.random(len(cell))) / drawn
    if popularity > 0:
        quantile = np.where(rest, quantile, quantile ** (1 + popularity))
    ranks = np.minimum((quantile * room).astype(np.int64), room - 1)
    # Push up what is not above its predecessor (a running maximum of rank - position, kept apart by cell),
    # then push down what went beyond the end.
    apart = cell * (2 * num_items)
    ranks = np.maximum.accumulate(ranks - position + apart) - apart + position
    ranks = np.minimum(ranks, room - drawn + position)
    users = cell // (liked + 1)
    which = np.minimum(cell % (liked + 1), liked - 1)
    places = np.where(rest, ranks, ranks + starts[clusters[users, which]])
    # The rest of the catalogue: step over the user's clusters, which ascend.
    if rest.any():
        others, owner = ranks[rest], users[rest]
        for s in range(liked):
            others += np.where(others >= starts[clusters[owner, s]], sizes[owner, s], 0)
        places[rest] = others
    return users, places


def _shuffle(rng: np.random.Generator, users: IntArray, items: IntArray, num_items: int) -> IntArray:
    """The items in random order within each user; `users` ascends.

    One sort of (user, random bits, item) packed in 63 bits.
    """
    item_bits = num_items.bit_length()
    random_bits = 63 - item_bits - int(users[-1] + 1).bit_length()
    packed = (users << (random_bits + item_bits)) | items
    packed |= rng.integers(0, 1 << random_bits, len(items)) << item_bits
    packed.sort()
    packed &= (1 << item_bits) - 1
    return packed


def _item_text(rng: np.random.Generator, centres: FloatArray, item_clusters: IntArray) -> list[str]:
    """Each item's words: five of its cluster's twelve, the cluster's two main directions, three common."""
    num_items = len(item_clusters)
    main = np.argsort(-np.abs(centres), axis=1)[:, :2]
    axes = [
        " ".join(f"axis{d}{'up' if centres[g, d] > 0 else 'down'}" for d in main[g])
        for g in range(len(centres))
    ]
    topic: list[str] = [f"topic{g}word{w}" for g in range(len(centres)) for w in range(_WORDS_PER_CLUSTER)]
    own = _WORDS_PER_CLUSTER * item_clusters[:, None] + rng.integers(0, _WORDS_PER_CLUSTER, (num_items, 5))
    common: npt.NDArray[np.int64] = rng.integers(0, _COMMON_WORDS, (num_items, 3))
    columns = [
        *([topic[w] for w in column] for column in own.T.tolist()),
        [axes[g] for g in item_clusters.tolist()],
        *([f"common{w}" for w in column] for column in common.T.tolist()),
    ]
    return list(map(" ".join, zip(*columns, strict=True)))
