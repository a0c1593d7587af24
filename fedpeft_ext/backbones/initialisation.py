"""Counter-based initial values of clients' own parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.ops import philox


def client_normal(clients: Tensor, dim: int, seed: int, std: float, layer: int = 1) -> Tensor:
    """Normal draws float64 [C, dim] with mean 0 and standard deviation `std`, row c a function of (seed,
    clients[c]).

    Args:
        clients: int64 [C].
        layer: tells apart several parameters of a client, 1 to 255 (layer 0 belongs to the hash functions).
    """
    ids = clients.cpu().numpy()[:, None]
    drawn = philox.normal(seed, 0, ids, np.arange(dim), philox.Purpose.INITIALISATION, layer)
    return torch.from_numpy(std * drawn)
