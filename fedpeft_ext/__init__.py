"""fedpeft_ext: parameter-efficient embeddings for federated recommendation.

The compiled ops (`fedpeft_ext.ops`, also here by name), their plain-PyTorch twins (`fedpeft_ext.reference`),
the modules (`fedpeft_ext.nn`) and the simulator load on first use, so that `fedpeft --help` does not wait for
torch. `import fedpeft_ext.ops` registers the ops in `torch.ops.fedpeft_ext`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _C, nn, ops, reference
    from .config import Config, load_config
    from .data import Dataset, load_dataset
    from .nn.plug import plug
    from .ops import *  # noqa: F403
    from .simulation import Simulator

    __all__ = [
        "_C",
        "Config",
        "Dataset",
        "Simulator",
        "load_config",
        "load_dataset",
        "nn",
        "ops",
        "plug",
        "reference",
        *ops.__all__,
    ]

__version__ = "0.1.0"

_PLACES = {
    "Config": ".config",
    "load_config": ".config",
    "Dataset": ".data",
    "load_dataset": ".data",
    "Simulator": ".simulation",
    "plug": ".nn",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        from .ops import __all__ as op_names

        return ["_C", "__version__", "nn", "ops", "reference", *_PLACES, *op_names]
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name], __name__), name)
    if not name.startswith("__"):
        if name == "_C":
            from .ops import _compiled  # noqa: F401  (torch's libraries come first)
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f".{name}", __name__)
        ops = importlib.import_module(".ops", __name__)
        if name in ops.__all__:
            return getattr(ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
