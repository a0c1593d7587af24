"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`count` of a noun that takes an "s": "1 round", "1,200 rounds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
