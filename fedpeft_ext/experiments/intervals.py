"""Confidence intervals of means over seeds."""

from __future__ import annotations

import math


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t.

    Raises:
        ValueError: freedom below 1.
    """
    if freedom < 1:
        raise ValueError(f"freedom: expected at least 1, got {freedom}")
    low, high = 1.9, 12.8  # of freedom infinity and 1
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for n in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (n - 1) / n
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def half_width(count: int) -> float:
    """Half of the 95% interval of a mean of `count` >= 2 normal values, in their standard deviations."""
    return t_quantile(count - 1) / math.sqrt(count)
