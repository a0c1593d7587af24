"""The work that every system of `benchmarks.bench_sim` does: the same clients, rounds and start, and one way
to score what came out.

FedMF: a client has a user vector u [D] and scores item i by u . v_i, with v_i = base_i + B A_i (P-LoRA) or
base_i plus the sum of the rows that the item's codes name (P-RQ). It trains `epochs` full-batch steps of BPR
with newly drawn negatives, Adam from fresh moments, and L2 on touched rows; the server averages by numbers
of interactions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.evaluation import rank_counts, ranking_metrics
from fedpeft_ext.simulation.randomness import sample_clients

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@dataclass(frozen=True)
class Problem:
    """Data, settings and starting values of a federation. Contenders copy what they change.

    Attributes:
        dataset: the interactions.
        config: the settings; `describe` says which of them matter.
        eligible: int64, the clients that may be chosen.
        per_round: clients a round.
        users: [U, D] user vectors at the start.
        base: [I, D] the frozen full embedding.
        A, B: [I, r] and [D, r] of P-LoRA, else None.
        codes, codebooks: int64 [I, L] and [L, K, D] of P-RQ, else None.
    """

    dataset: Dataset
    config: Config
    eligible: np.ndarray
    per_round: int
    users: Tensor
    base: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    codes: Tensor | None = None
    codebooks: Tensor | None = None

    @staticmethod
    def of(config: Config, dataset: Dataset, pretrained: Pretrained | None = None) -> Problem:
        """The problem that `Simulator(config, dataset)` solves.

        Raises:
            ValueError: settings that the baselines do not have.
        """
        training = config.training
        fixed = {
            "backbone.name": (config.backbone.name, "fedmf"),
            "training.loss": (training.loss, "bpr"),
            "training.optimizer": (training.optimizer, "adam"),
            "training.batch_size": (training.batch_size, None),
            "training.warmup_rounds": (training.warmup_rounds, 0),
            "training.server_optimizer": (training.server_optimizer, "avg"),
            "training.weighting": (training.weighting, "samples"),
        }
        for name, (value, expected) in fixed.items():
            if value != expected:
                raise ValueError(f"{name}: the baselines have {expected!r} alone, got {value!r}")
        if config.embedding.name not in ("p-lora", "p-rq"):
            raise ValueError(f"embedding.name: expected p-lora or p-rq, got {config.embedding.name!r}")
        simulator = Simulator(config, dataset, pretrained=pretrained)
        embedding = simulator.model.item_embedding
        tensors = {
            name: getattr(embedding, name).detach().clone()
            for name in ("A", "B", "codes", "codebooks")
            if getattr(embedding, name, None) is not None
        }
        if "codes" in tensors:
            tensors["codes"] = tensors["codes"].long()
        assert embedding.base is not None
        sizes = np.diff(dataset.indptr)
        eligible = np.flatnonzero((sizes > 0) & (sizes < dataset.num_items)).astype(np.int64)
        share = training.clients_per_round
        per_round = share if isinstance(share, int) else max(1, round(share * len(eligible)))
        return Problem(
            dataset,
            config,
            eligible,
            per_round,
            simulator.store.state["user"].clone(),
            embedding.base.detach().clone(),
            **tensors,
        )

    @property
    def lr(self) -> float:
        """Of the clients' Adam."""
        return 1e-2 if self.config.training.lr is None else self.config.training.lr

    @property
    def server_lr(self) -> float:
        """Factor of the averaged update."""
        return 1.0 if self.config.training.server_lr is None else self.config.training.server_lr

    def clients(self, round: int) -> np.ndarray:
        """The clients of a round: those that the simulator takes."""
        return sample_clients(self.eligible, self.per_round, self.config.seed, round)

    @torch.no_grad()
    def hit_rate(self, users: Tensor, vectors: Tensor, k: int = 10) -> float:
        """HR@k of user vectors [U, D] and item vectors [I, D] among 100 sampled negatives."""
        tested = np.flatnonzero(self.dataset.test_items >= 0)
        candidates = torch.from_numpy(
            self.dataset.candidates(tested, self.config.evaluation.num_negatives, self.config.seed)
        )
        scores = torch.linalg.vecdot(vectors[candidates], users[torch.from_numpy(tested)][:, None])
        return ranking_metrics(*rank_counts(scores, scores[:, 0]), (k,))[f"HR@{k}"]


class Contender(Protocol):
    """A system that trains a problem round by round."""

    def round(self) -> None:
        """Train the next round."""
        ...

    def result(self) -> tuple[Tensor, Tensor]:
        """User vectors [U, D] and item vectors [I, D]."""
        ...


def item_vectors(
    base: Tensor, A: Tensor | None, B: Tensor | None, codes: Tensor | None, codebooks: Tensor | None
) -> Tensor:
    """[I, D] of a global model."""
    if A is not None and B is not None:
        return base + A @ B.T
    assert codes is not None
    assert codebooks is not None
    return base + codebooks[torch.arange(codes.shape[1]), codes].sum(1)
