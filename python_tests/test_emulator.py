"""The CUDA emulator catches what it is there to catch: each planted fault, and only with the fault."""

from __future__ import annotations

from typing import Any

import pytest
from emulated import _emulator, backwards, shared_limit

pytestmark = pytest.mark.skipif(_emulator is None, reason="fedpeft_ext._emulator is not built")

# Faults that end a launch, and those that show only as a result that depends on the order of threads.
REPORTED = {
    "write_past_shared": "past the end of static shared memory",
    "write_past_dynamic_shared": "past the end of dynamic shared memory",
    "divergent_barrier": "divergent barrier: 32 threads ended while others wait",
    "two_barriers": "divergent barrier: threads of a block wait at",
    "exited_lane_in_shuffle": "lane 5, which has exited",
    "divergent_shuffle": "divergent warp operation",
    "misaligned_vector": "misaligned vector access",
    "shared_as_global": "shared memory used as global memory",
}
DIFFERING = {"missing_barrier", "uninitialised_shared_read", "copy_not_waited_for"}
# Those that only a build that looks for races shows (.ci/sanitize race), with what it says.
RACES = {
    "missing_barrier": r"race: .* of 4 bytes of shared memory",
    "copy_not_waited_for": r"race: .* of 8 bytes of shared memory",
    "passing_value": r"race: (read|write) of 4 bytes of shared memory",
    "passing_value_in_warp": r"race: (read|write) of 4 bytes of shared memory",
    "shuffle_for_barrier": r"race: read of 4 bytes of shared memory",
    "blocks_write_the_same": r"race: write of 8 bytes of global memory by thread \d+ of block 1 "
    r".*faults\.cu:\d+.*write by thread \d+ of block 0",
}
SEES_RACES = _emulator is not None and _emulator.sees_races


def run(name: str, *, planted: bool) -> tuple[Any, Any]:
    results = []
    for last_first in (False, True):
        with backwards(last_first):
            results.append(_emulator.run_fault(name, planted))
    return results[0], results[1]


def test_every_fault_is_tested() -> None:
    assert set(_emulator.fault_names()) == REPORTED.keys() | DIFFERING | RACES.keys()


@pytest.mark.parametrize("name", sorted(REPORTED.keys() | DIFFERING | RACES.keys()))
def test_correct_twin_passes(name: str) -> None:
    first, second = run(name, planted=False)
    assert first == second
    assert -1 not in first


FAULTS_WITH_MESSAGES = [
    *REPORTED.items(),
    *(
        pytest.param(
            *race,
            marks=pytest.mark.skipif(
                not SEES_RACES, reason="not a build that looks for races: `make race-check` makes it"
            ),
        )
        for race in RACES.items()
    ),
]


@pytest.mark.parametrize(("name", "message"), FAULTS_WITH_MESSAGES)
@pytest.mark.parametrize("last_first", [False, True])
def test_fault_is_reported(name: str, message: str, last_first: bool) -> None:
    with backwards(last_first), pytest.raises(RuntimeError, match=message):
        _emulator.run_fault(name, True)
    # The emulator is fit for use after a failure.
    assert _emulator.run_fault(name, False) == run(name, planted=False)[0]


@pytest.mark.skipif(SEES_RACES, reason="this build reports them at once")
@pytest.mark.parametrize("name", sorted(DIFFERING))
def test_fault_shows_in_the_other_order(name: str) -> None:
    first, second = run(name, planted=True)
    assert first != second


def test_static_shared_memory_counts() -> None:
    with (
        shared_limit(511),
        pytest.raises(RuntimeError, match="dynamic and static shared memory take 512 bytes"),
    ):
        _emulator.run_fault("write_past_shared", False)  # 64 numbers each
