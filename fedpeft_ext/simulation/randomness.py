"""The simulator's random draws: pure functions of (seed, round, client, position), so no state and no order
of drawing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext import ops
from fedpeft_ext.ops import philox

UPLOAD_ROUNDING, FAULTS = 8, 9
"""Philox purposes of stochastic rounding of uploads, and of simulated faults."""


def sample_clients(eligible: np.ndarray, count: int, seed: int, round: int, attempt: int = 0) -> np.ndarray:
    """`count` of the `eligible` clients (int64, distinct), a uniform sample without replacement, ascending.

    A repeated round has another `attempt`. See `ops.sample_clients`.
    """
    chosen: np.ndarray = ops.sample_clients(
        torch.from_numpy(eligible), count, seed=seed, round=round, attempt=attempt
    ).numpy()
    return chosen


def sample_clients_independently(
    eligible: np.ndarray, probability: float, seed: int, round: int, attempt: int = 0
) -> np.ndarray:
    """Each of the `eligible` clients (int64, distinct) with this probability, independently of the others
    ("Poisson sampling"); ascending, possibly none. See `ops.sample_clients_independently`.
    """
    chosen: np.ndarray = ops.sample_clients_independently(
        torch.from_numpy(eligible), probability, seed=seed, round=round, attempt=attempt
    ).numpy()
    return chosen


def choose_clients(
    eligible: np.ndarray, count: int, sampling: str, seed: int, round: int, attempt: int = 0
) -> np.ndarray:
    """Clients of a round, as `training.client_sampling` says: `count` of the `eligible` ones, or as many on
    average ("poisson"); ascending.
    """
    if sampling == "poisson":
        return sample_clients_independently(eligible, count / len(eligible), seed, round, attempt)
    return sample_clients(eligible, count, seed, round, attempt)


def shuffled_positions(inside: Tensor, clients: Tensor, seed: int, round: int, epoch: int) -> Tensor:
    """A random order of each client's positions, padding last.

    Args:
        inside: bool [C, P], which positions are no padding.
        clients: int64 [C].

    Returns:
        int64 [C, P], a permutation of 0 ... P - 1 in each row; the part that is no padding does not depend on
        P.
    """
    ids, positions = clients.cpu().numpy()[:, None], np.arange(inside.shape[1])
    # 63 bits, so that padding can have a key above all others.
    words = philox.words(seed, round, ids, positions, philox.Purpose.BATCH_ORDER, epoch=epoch)
    keys = philox.low64(words) >> np.uint64(1)
    keys = np.where(inside.cpu().numpy(), keys, np.uint64(2**63))
    return torch.from_numpy(np.argsort(keys, axis=1, kind="stable")).to(inside.device)
