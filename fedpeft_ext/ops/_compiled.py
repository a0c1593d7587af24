"""Loads the compiled part, which registers the ops with torch."""

import importlib

import torch  # noqa: F401  (its libraries must be loaded before _C)

try:
    importlib.import_module("fedpeft_ext._C")
except ImportError as error:  # pragma: no cover - an installation without the compiled part
    raise ImportError(
        "fedpeft_ext._C is missing or does not load: build it with `pip install --no-build-isolation .` "
        f"in the environment that has torch >= 2.11 ({error})"
    ) from error
