"""95% confidence intervals by Student's t: of means over seeds, and of paired differences over users."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpeft_ext.simulation import UserMetrics


def half_width(count: int) -> float:
    """Half of the interval of a mean of `count` >= 2 normal values, in their standard deviations."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 0.975)) / math.sqrt(count)


def paired_differences(ours: UserMetrics, theirs: UserMetrics) -> dict[str, tuple[float, float]]:
    """How much larger the metrics are in `ours`: by name, the mean over users and half of its interval.

    Each user is compared with itself, so that what makes users easy or hard cancels. The interval is about
    other users like these and these two models; models of other seeds vary besides.

    Raises:
        ValueError: the two are not of the same users and metrics, or of fewer than two users.
    """
    if ours.users.tolist() != theirs.users.tolist() or ours.values.keys() != theirs.values.keys():
        raise ValueError("theirs: expected metrics of the same users by the same names, got others")
    count = len(ours.users)
    if count < 2:
        raise ValueError(f"ours: expected at least 2 users, got {count}")
    differences = {name: values - theirs.values[name] for name, values in ours.values.items()}
    return {name: (float(d.mean()), float(d.std()) * half_width(count)) for name, d in differences.items()}
