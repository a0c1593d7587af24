"""What every engine shares: the settings of local training, the kinds of parameters, and the engines'
interface.

A client's local training starts from the global parameters and its own state, with a fresh optimizer:
`epochs` passes over its positives, each with newly drawn negatives, one step a batch. What it changes of the
global parameters is uploaded.

With `prox_mu` a client minimises loss + mu / 2 ||w - w_global||^2 over the averaged parameters (FedProx: Li
et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020). A row that a client does not touch
has w = w_global, so that the term leaves it where it is. With SCAFFOLD's control variates (`scaffold`) every
step on them is corrected by c - c_i, after L2.

Engines score a batch in one forward, each positive followed by its negative. The order matters where
parameters are shared between items: with BPR the gradients of a pair cancel in a row that both read, and in
this order exactly so, whatever else was summed before. A rest of rounding there would pass for a gradient,
which Adam scales up to a full step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.backbones import Backbone
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.client_batch import ClientStore, Interactions
from fedpeft_ext.simulation.randomness import shuffled_positions
from fedpeft_ext.simulation.scaffold import ControlVariates
from fedpeft_ext.simulation.schedule import CONSTANT, Schedule
from fedpeft_ext.words import SMALLER_STEPS, counted

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains; the meaning of each field is that of `config.TrainingConfig`."""

    epochs: int
    batch_size: int | None
    loss: Literal["bpr", "bce"]
    optimizer: Literal["adam", "sgd"]
    lr: float
    l2: float
    weighting: Literal["samples", "uniform"]
    seed: int
    prox_mu: float = 0.0
    momentum: float = 0.0
    schedule: Schedule = CONSTANT

    def of_round(self, round: int) -> LocalSettings:
        """The settings of the 1-based `round`: with its `lr`."""
        factor = self.schedule.factor(round)
        return dataclasses.replace(self, lr=self.lr * factor, schedule=CONSTANT)

    def weights(self, sizes: np.ndarray) -> np.ndarray:
        """Weight float64 [C] of each client's upload."""
        return sizes.astype(np.float64) if self.weighting == "samples" else np.ones(len(sizes))


@dataclass(frozen=True)
class ParameterRoles:
    """Trainable parameters of a backbone by what happens to them.

    Attributes:
        local: stay on the client.
        rows: item tables [I, W] of which a client only changes the rows that it touches; averaged.
        small: copied whole for each client; averaged.
        l2: those that the L2 penalty covers (item embedding, user vectors).
    """

    local: tuple[str, ...]
    rows: tuple[str, ...]
    small: tuple[str, ...]
    l2: frozenset[str]

    @staticmethod
    def of(model: Backbone) -> ParameterRoles:
        """Sort the parameters of `model`, whose item embedding names its item tables in `row_parameters`."""
        prefix = "item_embedding."
        tables = {prefix + name for name in model.item_embedding.row_parameters}
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        return ParameterRoles(
            local=tuple(name for name in trainable if name in model.local_parameters),
            rows=tuple(name for name in trainable if name in tables),
            small=tuple(
                name for name in trainable if name not in tables and name not in model.local_parameters
            ),
            l2=frozenset(
                name for name in trainable if name.startswith(prefix) or name in model.l2_parameters
            ),
        )


class Step(NamedTuple):
    """One local step: which positions of the clients' rows form the batch (None: all, in order) and its
    number.

    Attributes:
        epoch: 0-based.
        positions: int64 [C, B] into the padded positions, or None.
        numbers: int64 [C], 1-based step number of each client; 0 where its batch is empty and it does not
            step.
    """

    epoch: int
    positions: Tensor | None
    numbers: Tensor


def local_steps(items: Tensor, clients: Tensor, settings: LocalSettings, round: int) -> Iterator[Step]:
    """The steps of C clients with padded positives `items` [C, P].

    With a batch size each client's positions are shuffled in every epoch (counter-based, so each client's
    order is its own whoever it is grouped with) and cut into batches; clients with fewer of them sit out the
    last ones.
    """
    sizes = (items >= 0).sum(1)
    taken = torch.zeros_like(sizes)
    for epoch in range(settings.epochs):
        if settings.batch_size is None:
            yield Step(epoch, None, (sizes > 0) * (epoch + 1))
            continue
        order = shuffled_positions(items >= 0, clients, settings.seed, round, epoch)
        for start in range(0, items.shape[1], settings.batch_size):
            active = sizes > start
            taken = taken + active
            yield Step(epoch, order[:, start : start + settings.batch_size], torch.where(active, taken, 0))


class Engine(Protocol):
    """Trains the chosen clients of one round."""

    def train(self, clients: np.ndarray, round: int, aggregator: Aggregator) -> np.ndarray:
        """Train `clients` int64 [n], sorted by (size, id); write their state, add their uploads.

        Returns:
            float64 [n], each client's loss, averaged over its local steps.
        """
        ...


@dataclass(frozen=True)
class Federation:
    """What an engine works on.

    Attributes:
        model: holds the global parameters; engines read them and leave them alone.
        store: state of all clients, changed by training.
        interactions: training positives.
        settings: of local training.
        variates: with SCAFFOLD its control variates, changed by training.
    """

    model: Backbone
    store: ClientStore
    interactions: Interactions
    settings: LocalSettings
    variates: ControlVariates | None = None


class ClientError(RuntimeError):
    """Local training failed; the message names the client (or the group of them), the round and the stage."""


def train_in_chunks(
    clients: np.ndarray,
    weights: np.ndarray,
    chunks: Iterable[slice],
    round: int,
    train: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Losses of `clients` [n], from `train(ids, weights)` of one chunk after the other; a failure of one is a
    ClientError."""
    losses = []
    for chunk in chunks:
        ids = clients[chunk]
        try:
            losses.append(train(ids, weights[chunk]))
        except Exception as error:
            raise ClientError(
                f"round {round}, {len(ids)} clients from client {int(ids[0])} on: {error} "
                "(engine: sequential names the client and the stage)"
            ) from error
    if len(losses) == 1:
        return losses[0]
    return np.concatenate(losses) if losses else np.zeros(0)


def first_not_finite(losses: np.ndarray, clients: np.ndarray, round: int) -> None:
    """Raise FloatingPointError naming the first client whose loss is NaN or infinite."""
    if math.isfinite(np.add.reduce(losses)):
        return
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        more = f" (and {counted(len(bad) - 1, 'more client')})" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"training diverged in round {round}: client {int(clients[bad[0]])} has a loss of "
            f"{losses[bad[0]]}{more}; {SMALLER_STEPS}"
        )
