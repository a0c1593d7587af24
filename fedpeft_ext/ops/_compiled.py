"""Loads the compiled part, which registers the ops with torch."""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path

import torch  # noqa: F401  (its libraries must be loaded before _C)

_LIBRARY = Path(__file__).parents[2] / "csrc" / "library.cpp"
"""The ops' schemas, in a checkout; an installed wheel has no such file."""


def require_current(build_info: Mapping[str, object], library: Path) -> None:
    """Raise ImportError where `_C` was built from another `library.cpp` than the one beside the package.

    Its ops may then take other arguments than the package gives them.
    """
    if not library.is_file():
        return
    if build_info.get("library_sha256") != hashlib.sha256(library.read_bytes()).hexdigest():
        raise ImportError(f"fedpeft_ext._C was built from another version of {library}: make build")


try:
    _C = importlib.import_module("fedpeft_ext._C")
except ImportError as error:  # pragma: no cover - an installation without the compiled part
    raise ImportError(
        "fedpeft_ext._C is missing or does not load: build it with `pip install --no-build-isolation .` "
        f"in the environment that has torch >= 2.11 ({error})"
    ) from error
require_current(_C.build_info(), _LIBRARY)
