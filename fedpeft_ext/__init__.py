"""fedpeft_ext: parameter-efficient embeddings for federated recommendation.

Importing the package loads the compiled ops (`fedpeft_ext.ops`, also here by name), their plain-PyTorch
twins (`fedpeft_ext.reference`) and the modules (`fedpeft_ext.nn`). Data, pre-training and the simulator load
on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (its libraries must be loaded before _C)

try:
    from . import _C
except ImportError as error:  # pragma: no cover - an installation without the compiled part
    raise ImportError(
        "fedpeft_ext._C is missing or does not load: build it with `pip install --no-build-isolation .` "
        f"in the environment that has torch >= 2.11 ({error})"
    ) from error

from . import nn, ops, reference
from .nn import plug
from .ops import *  # noqa: F403

if TYPE_CHECKING:
    from .config import Config as Config
    from .config import load_config as load_config
    from .data import Dataset as Dataset
    from .data import load_dataset as load_dataset
    from .simulation import Simulator as Simulator

__version__ = "0.1.0"

# Loaded on first use: the simulator's dependencies are not needed for the ops and modules.
_LAZY = {
    "Config": ".config",
    "load_config": ".config",
    "Dataset": ".data",
    "load_dataset": ".data",
    "Simulator": ".simulation",
}

__all__ = ["__version__", "nn", "ops", "plug", "reference", "_C", *_LAZY, *ops.__all__]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
