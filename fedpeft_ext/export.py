"""Exported programs without this package's ops, to run where there is nothing but PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedpeft_ext import reference
from fedpeft_ext.ops._library import raw_op

_SAME_ARGUMENTS = ("client_embedding", "client_layer", "dot_scores", "lora_lookup", "rq_lookup")


def plain_decompositions() -> dict[Any, Callable[..., Tensor]]:
    """The ops that models score with, each with its plain-PyTorch twin: the table that
    `torch.export.ExportedProgram.run_decompositions` takes.

    Scores then agree to rounding, and nothing checks that items are in range.
    """
    twins: dict[Any, Callable[..., Tensor]] = {
        raw_op(name): getattr(reference, name) for name in _SAME_ARGUMENTS
    }
    twins[raw_op("hash_lookup")] = _hash_lookup
    return twins


def _hash_lookup(
    items: Tensor,
    table: Tensor,
    hashes: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    mean: bool,
    base: Tensor | None,
) -> Tensor:
    senet = None
    if w1 is not None and b1 is not None and w2 is not None and b2 is not None:
        senet = reference.SENetWeights(w1, b1, w2, b2)
    return reference.hash_lookup(items, table, hashes, senet, "mean" if mean else "sum", base)
