"""Words of sentences in several places."""

from __future__ import annotations

SMALLER_STEPS = (
    "smaller steps may help (training.lr and training.server_lr; in warm-up rounds training.warmup_lr and "
    "training.warmup_server_lr, where they are set)"
)
"""What to do where training diverged."""


def counted(count: int, noun: str) -> str:
    """`count` of a noun that takes an "s": "1 round", "1,200 rounds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
