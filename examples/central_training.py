"""Central training on plain PyTorch: one model, whose item embedding `plug` makes small.

Matrix factorisation with BPR on ML-100K, no federation anywhere. All start alike: `nn.Embedding` from item
text, trained for a few epochs. Then the table goes on (`nn.Embedding`), stays as it is (`frozen`), or is
frozen and gets a compressed part that alone is trained. Printed: HR@10 among 100 sampled items, and the
trained item parameters and seconds of what comes after the start.
Run it with: python examples/central_training.py
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft_ext.config import PretrainConfig
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.nn import plug
from fedpeft_ext.pretrain import pretrain

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "nn.Embedding": {},
    "frozen": {},
    "lora": {"rank": 8},
    "hash": {"table_size": 512},
    "rq": {"levels": 4, "codebook_size": 128},
    "rq+lora": {"levels": 3, "codebook_size": 64, "rank": 4},
}


class MatrixFactorisation(nn.Module):
    """score(u, i) = u . v_i, an ordinary model that knows nothing of strategies."""

    def __init__(self, users: int, items: int, dim: int) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(users, dim)
        self.item_embedding = nn.Embedding(items, dim)
        nn.init.normal_(self.user_embedding.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Scores of pairs, of the common shape of `user` and `item`."""
        return (self.user_embedding(user) * self.item_embedding(item)).sum(-1)


def train(model: nn.Module, dataset: Dataset, epochs: int, lr: float, l2: float) -> float:
    """Train by BPR with uniform negatives; returns seconds."""
    users = torch.from_numpy(np.repeat(np.arange(dataset.num_users), np.diff(dataset.indptr)))
    items = torch.from_numpy(dataset.indices)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=l2)
    began = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(items)).split(4096):
            negatives = torch.randint(dataset.num_items, (len(rows),))
            margin = model(users[rows], items[rows]) - model(users[rows], negatives)
            loss = -nn.functional.logsigmoid(margin).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return time.perf_counter() - began


@torch.no_grad()
def hit_rate(model: nn.Module, dataset: Dataset, k: int = 10) -> float:
    """HR@k of each user's last item among 100 sampled items that the user never met."""
    users = np.flatnonzero(dataset.test_items >= 0)
    candidates = torch.from_numpy(dataset.candidates(users, 100, seed=0))
    scores = model(torch.from_numpy(users)[:, None], candidates)
    return float(((scores[:, 1:] >= scores[:, :1]).sum(1) < k).double().mean())


def main(
    dataset: Dataset, start: int, epochs: int, lr: float, l2: float, dim: int = 32, seeds: int = 3
) -> list[dict[str, Any]]:
    """Train each strategy with each seed; prints a table and returns its rows."""
    text = pretrain(PretrainConfig(), dataset, dim).full
    starts = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = MatrixFactorisation(dataset.num_users, dataset.num_items, dim)
        model.item_embedding.weight.data.copy_(text)
        train(model, dataset, start, lr, l2)
        starts.append(model)
    rows = []
    print(f"{'item embedding':<15} {'HR@10':>7} {'sd':>6} {'trained':>9} {'share':>6} {'seconds':>8}")
    for name, options in STRATEGIES.items():
        rates, seconds = [], 0.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = copy.deepcopy(starts[seed])
            if name == "frozen":
                model.item_embedding.requires_grad_(False)
            elif name != "nn.Embedding":
                plug(model, "item_embedding", name, **options)
            seconds += train(model, dataset, epochs, lr, l2)
            rates.append(hit_rate(model, dataset))
        trained = sum(p.numel() for p in model.item_embedding.parameters() if p.requires_grad)
        rows.append(
            {
                "name": name,
                "hit_rate": float(np.mean(rates)),
                "deviation": float(np.std(rates, ddof=1)) if seeds > 1 else float("nan"),
                "trained": trained,
                "share": trained / (dataset.num_items * dim),
                "seconds": seconds / seeds,
            }
        )
        row = rows[-1]
        print(
            f"{name:<15} {row['hit_rate']:7.3f} {row['deviation']:6.3f} {trained:9,} {row['share']:6.0%} "
            f"{row['seconds']:8.2f}"
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--start", type=int, default=5, help="epochs before the table is frozen")
    parser.add_argument("--epochs", type=int, default=15, help="epochs after that")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--l2", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    main(load_dataset(given.dataset), given.start, given.epochs, given.lr, given.l2, seeds=given.seeds)
