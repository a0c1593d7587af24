"""Features with known structure for the tests of pre-training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

CLUSTERS = 6


def clustered(
    items: int = 240, width: int = 24, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Features [items, width] around `CLUSTERS` far-apart centres, and the cluster of each item."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLUSTERS, size=items)
    centres = rng.normal(size=(CLUSTERS, width)) * 3
    # Within a cluster the items vary along 4 directions, so that finer levels have something to find.
    fine = rng.normal(size=(items, 4)) @ rng.normal(size=(4, width)) * 0.3
    return (centres[labels] + fine + 0.05 * rng.normal(size=(items, width))).astype(np.float32), labels


@pytest.fixture(scope="session")
def data() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    return clustered()
