"""How much of NDCG@10 on ML-1M is the protocol of the paper's public code, and how much is its training.

    export FEDPEFT_DATA=...
    python docs/measure_ml_1m_protocol.py counts              # test items, negatives, popularity
    python docs/measure_ml_1m_protocol.py steps fedmf full    # our training under the code's protocol
    python docs/measure_ml_1m_protocol.py code fedmf p-lora   # training as in the code, too
    python docs/measure_ml_1m_protocol.py autoencoder         # what its pre-training leaves

A row has HR@10, NDCG@10 and their ratio, of all users and of those whose test item has an id below 3,706; the
share of the other users' test items that are ranked first; and the share of test items tied with another.

In the code, item ids run to 3,952, but negatives, of training and of test, have ids below 3,706, which is the
count of rated items; a positive has one negative, drawn once; where a user's pool would take all items left
it is not drawn, and the test negatives are those of the highest ids. The test item is the last in the order
of the file. RecBole's file is sorted by time, so a random item stands for it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft_ext import ops
from fedpeft_ext.backbones import ClientContext
from fedpeft_ext.config import Config, load_config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.nn.items import Items
from fedpeft_ext.pretrain.features import text_features
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.evaluation import rank_counts, ranking_metrics
from fedpeft_ext.simulation.setup import prepare_items

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = {"fedmf": "ml-1m.yaml", "fedncf": "ml-1m-fedncf.yaml", "pfedrec": "ml-1m-pfedrec.yaml"}
IDS, NEGATIVES_BELOW = 3952, 3706
LOW_IDS = np.arange(NEGATIVES_BELOW)


# The data ---------------------------------------------------------------------------------------------------


def random_held_out(dataset: Dataset, seed: int) -> Dataset:
    """The same interactions with a random item of each user held out instead of the last one."""
    rng = np.random.default_rng(seed)
    indices, test = dataset.indices.copy(), dataset.test_items.copy()
    for user, last in enumerate(dataset.test_items):
        at = rng.integers(dataset.indptr[user], dataset.indptr[user + 1] + 1)
        if at < dataset.indptr[user + 1]:
            test[user], indices[at] = indices[at], last
    return dataclasses.replace(dataset, indices=indices, test_items=test)


def by_movie_id(dataset: Dataset) -> Dataset:
    """Items numbered by their id in the file, less 1, also those that nobody rated."""
    number = np.array([int(item) - 1 for item in dataset.item_ids])
    text = [""] * IDS
    for item, words in zip(number, dataset.item_text or (), strict=True):
        text[item] = words
    return dataclasses.replace(
        dataset,
        num_items=IDS,
        indices=number[dataset.indices],
        test_items=number[dataset.test_items],
        item_ids=[str(item + 1) for item in range(IDS)],
        item_text=text,
    )


def pools(dataset: Dataset, seed: int, among: np.ndarray) -> Iterator[np.ndarray]:
    """Each user's negatives as the code draws them: the last 100 for the test, the others for training."""
    rng = np.random.default_rng(seed)
    for user in range(dataset.num_users):
        unmet = np.setdiff1d(among, dataset.met(user))
        wanted = 4 * (dataset.indptr[user + 1] - dataset.indptr[user]) + 100
        yield unmet if wanted > len(unmet) else rng.permutation(unmet)[:wanted]


def code_negatives(dataset: Dataset, seed: int, among: np.ndarray = LOW_IDS) -> tuple[Tensor, Tensor]:
    """A negative for each training item, int64 [nnz], and candidates [U, 101], the test item first."""
    rng = np.random.default_rng(seed + 1)
    training, test = [], []
    for user, pool in enumerate(pools(dataset, seed, among)):
        training.append(rng.choice(pool[:-100], dataset.indptr[user + 1] - dataset.indptr[user]))
        test.append(np.append(dataset.test_items[user], pool[-100:]))
    return torch.from_numpy(np.concatenate(training)), torch.from_numpy(np.stack(test))


def report(name: str, scores: Tensor, high: np.ndarray) -> None:
    """Prints a row for scores [U, 101], the test item's first; `high` tells whose test item has an id of
    3,706 or more."""
    greater, equal = rank_counts(scores, scores[:, 0])
    low = torch.from_numpy(~high)
    cells = []
    for users in (torch.ones_like(low), low):
        metrics = ranking_metrics(greater[users], equal[users], [10])
        hr, ndcg = metrics["HR@10"], metrics["NDCG@10"]
        cells += [f"{100 * hr:.2f}", f"{100 * ndcg:.2f}", f"{ndcg / hr:.3f}"]
    for found in (greater[~low] == 0, equal > 0):
        cells.append(f"{100 * found.double().mean():.1f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def high_ids(dataset: Dataset) -> np.ndarray:
    """Whose test item has an id, counted from 0, of 3,706 or more."""
    return np.array([int(dataset.item_ids[item]) - 1 >= NEGATIVES_BELOW for item in dataset.test_items])


def counts(seed: int) -> None:
    """Counts of the data, and how popularity does."""
    last = load_dataset("ml-1m")
    for name, dataset in (("last", last), ("random", random_held_out(last, seed))):
        high, numbered = high_ids(dataset), by_movie_id(dataset)
        print(f"{name}: {100 * high.mean():.1f}% of test items have an id of {NEGATIVES_BELOW} or more")
        for what, data, items in (
            ("ours", dataset, torch.from_numpy(dataset.candidates(np.arange(dataset.num_users), seed=seed))),
            ("code", numbered, code_negatives(numbered, seed)[1]),
        ):
            times = torch.from_numpy(np.bincount(data.indices, minlength=data.num_items))
            report(f"popularity, {name} item, {what}", times[items], high)
    known = len(np.intersect1d(numbered.indices, LOW_IDS))
    print(f"{100 * (1 - known / NEGATIVES_BELOW):.1f}% of the ids below are of movies without interactions")
    sizes = [np.count_nonzero(numbered.met(user) < NEGATIVES_BELOW) for user in range(numbered.num_users)]
    whole = 4 * np.diff(numbered.indptr) + 100 > NEGATIVES_BELOW - np.array(sizes)
    print(f"{100 * whole.mean():.1f}% of users have a pool of all items left")


# Our training -----------------------------------------------------------------------------------------------


def scored(simulator: Simulator, items: Tensor) -> Tensor:
    """Scores of candidates [U, P]."""
    model, parts = simulator.model.eval(), []
    for users in torch.split(torch.arange(len(items)), 512):
        none = Items(items.new_empty(len(users), 0), None)
        context = ClientContext(users, none, seed=0, round=0, epoch=0)
        with torch.no_grad():
            parts.append(model.client_scores(items[users], simulator.store.read(users), context))
    return torch.cat(parts)


def steps(backbone: str, embedding: str, settings: Sequence[str], seed: int) -> None:
    """Our training, under our protocol and under the code's, step by step."""
    quiet = ["evaluation.every=1000000", "evaluation.full_ranking=false", "threads=1", f"seed={seed}"]
    overrides = [f"embedding.name={embedding}", *quiet, *settings]
    config: Config = load_config(EXAMPLES / FILES[backbone], overrides)
    last = load_dataset("ml-1m")
    random = random_held_out(last, seed)
    for name, data in (("ours", last), ("random test item", random)):
        simulator = Simulator(config, data)
        simulator.run()
        items = torch.from_numpy(data.candidates(np.arange(data.num_users), seed=seed))
        report(f"{backbone} {embedding}, {name}", scored(simulator, items), high_ids(data))
    data = by_movie_id(random)
    fixed, items = code_negatives(data, seed)

    def drawn_once(positives: Tensor, clients: Tensor, indptr: Tensor, *rest: Any) -> Tensor:
        epochs = rest[2]
        at = indptr[clients][:, None] + torch.arange(positives.shape[1])
        negatives = torch.where(positives < 0, -1, fixed[at.clamp(max=len(fixed) - 1)])
        return negatives[:, None].expand(-1, epochs, -1).contiguous()

    simulator = Simulator(config.updated(["engine=batched"]), data)
    with mock.patch.object(ops, "sample_negatives", drawn_once):
        simulator.run()
    report(
        f"{backbone} {embedding}, negatives below {NEGATIVES_BELOW}", scored(simulator, items), high_ids(data)
    )


# Its training -----------------------------------------------------------------------------------------------


class Passed(nn.Module):
    """The model that the code hands from client to client, all users' vectors included."""

    def __init__(self, backbone: str, embedding: str, users: int, codes: Tensor, zeros: bool) -> None:
        super().__init__()
        self.embedding, width = embedding, 32
        draw = nn.init.xavier_uniform_ if backbone == "fedmf" else lambda w: nn.init.normal_(w, std=0.1)
        self.user = None if backbone == "pfedrec" else nn.Parameter(draw(torch.empty(users, width)))
        self.table = nn.Parameter(torch.zeros(IDS, width))
        if embedding == "full" and not zeros:
            draw(self.table.data)
        elif embedding == "p-lora":
            self.A = nn.Parameter(draw(torch.empty(IDS, 4)))
            self.B = nn.Parameter(nn.init.xavier_normal_(torch.empty(width, 4)))
        elif embedding == "p-rq":
            self.codes = codes
            self.codebooks = nn.Parameter(torch.stack([draw(torch.empty(128, width)) for _ in range(3)]))
        sizes = {"fedmf": (), "fedncf": (64, 64, 128, 64), "pfedrec": (32, 64, 32)}[backbone]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5)]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 1)) if sizes else None
        for layer in self.mlp or ():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, users: Tensor, items: Tensor, warmup: bool = False) -> Tensor:
        vectors = F.embedding(items, self.table)
        if not warmup and self.embedding == "p-lora":
            vectors = vectors + F.embedding(items, self.A) @ self.B.T
        elif not warmup and self.embedding == "p-rq":
            vectors = vectors + sum(self.codebooks[level][self.codes[items, level]] for level in range(3))
        if self.user is None:
            assert self.mlp is not None
            return self.mlp(vectors)[..., 0]
        own = F.embedding(users, self.user).expand_as(vectors)
        return (
            (own * vectors).sum(-1) if self.mlp is None else self.mlp(torch.cat([own, vectors], -1))[..., 0]
        )


def code(backbone: str, embedding: str, rounds: int, tail: int, met: bool, zeros: bool, seed: int) -> None:
    """Training as in the code: uploads share memory, so that the average is the last client's model, with the
    vectors of the round's users as that model has them; one Adam serves all clients in turn; the full table
    goes on training. Adam's mean of gradients forgets all but the last few clients of a round, so only
    `tail` of the 604 are trained. With `met` negatives are of all items that somebody met; with `zeros` Full
    starts from those."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    data = by_movie_id(random_held_out(load_dataset("ml-1m"), seed))
    negatives, items = code_negatives(data, seed, np.unique(data.indices) if met else LOW_IDS)
    positives = torch.from_numpy(data.indices)
    codes = torch.empty(0)
    if embedding == "p-rq":
        found = prepare_items(Config().updated([f"embedding.name={embedding}", f"seed={seed}"]), data).codes
        assert found is not None
        codes = found.long()
    model = Passed(backbone, embedding, data.num_users, codes, zeros)
    server = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = torch.optim.Adam(model.parameters(), lr=0.01 if backbone == "fedmf" else 0.001, fused=True)
    everyone = torch.arange(data.num_users)[:, None]

    def evaluate(done: int) -> None:
        model.eval()
        with torch.no_grad():
            report(f"{backbone} {embedding}, code, {done} rounds", model(everyone, items), high_ids(data))
        model.train()

    model.train()
    for round in range(rounds):
        chosen = torch.from_numpy(rng.permutation(data.num_users)[:604])
        for user in chosen[-tail:].tolist():
            for name, p in model.named_parameters():
                p.data.copy_(server[name])
            own = slice(data.indptr[user], data.indptr[user + 1])
            pairs = torch.stack([positives[own], negatives[own]])
            for _ in range(2):
                adam.zero_grad()
                better, worse = model(torch.tensor([[user]]), pairs, embedding != "full" and round < 20)
                F.softplus(worse - better).mean().backward()
                adam.step()
        for name, p in model.named_parameters():
            server[name] = p.detach().clone() if name != "user" else server[name]
        if model.user is not None:
            server["user"][chosen] = model.user.data[chosen]
            model.user.data.copy_(server["user"])
        if (round + 1) % max(1, rounds // 5) == 0:
            evaluate(round + 1)


def autoencoder(seed: int) -> None:
    """The code's AutoEncoder, with its L2 on all weights, on 300 items: what is left of latents."""
    torch.manual_seed(seed)
    texts = load_dataset("ml-1m").item_text
    assert texts is not None
    x = F.normalize(torch.from_numpy(text_features(texts[:300])).float(), dim=1)
    sizes = [x.shape[1], 512, 256, 128, 32]

    def mlp(sizes: list[int]) -> nn.Sequential:
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
        for layer in layers[::2]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers)

    encoder, decoder = mlp(sizes), mlp(sizes[::-1])
    weights = [*encoder.parameters(), *decoder.parameters()]
    adam = torch.optim.Adam(weights, lr=1e-4)
    for epoch in range(1501):
        latents = encoder(x)
        error = ((decoder(latents) - x) ** 2).mean()
        if epoch % 500 == 0:
            explained = 1 - float(error.detach() / x.var(0, unbiased=False).mean())
            deviation = float(latents.detach().std(0).mean())
            print(f"{epoch} epochs: deviation of latents {deviation:.1e}, explained variance {explained:.2f}")
        adam.zero_grad()
        (error + sum(0.005 * w.square().sum() for w in weights)).backward()
        adam.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["counts", "steps", "code", "autoencoder"])
    parser.add_argument("backbone", nargs="?", choices=sorted(FILES), default="fedmf")
    parser.add_argument("embedding", nargs="?", choices=["full", "p-lora", "p-rq"], default="full")
    parser.add_argument("--set", nargs="*", default=[], help="steps: further settings of the run")
    parser.add_argument("--rounds", type=int, default=1000, help="code: rounds")
    parser.add_argument("--tail", type=int, default=25, help="code: clients of a round that are trained")
    parser.add_argument("--met", action="store_true", help="code: negatives of all items that somebody met")
    parser.add_argument("--zeros", action="store_true", help="code full: start from zeros")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "counts":
        counts(options.seed)
    elif options.what == "autoencoder":
        autoencoder(options.seed)
    elif options.what == "steps":
        steps(options.backbone, options.embedding, options.set, options.seed)
    else:
        code(
            options.backbone,
            options.embedding,
            options.rounds,
            options.tail,
            options.met,
            options.zeros,
            options.seed,
        )


if __name__ == "__main__":
    main()
