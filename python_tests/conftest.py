"""Where the ops under test run.

A test takes the ops from its target and puts its tensors on the target's device, so that it runs on every
device that there is: the CPU, the CUDA kernels on the CPU (csrc/emulator), and CUDA. Another implementation
of the ops joins by becoming a target.

Hypothesis draws the same examples in every run, so that a run repeats; HYPOTHESIS_PROFILE=explore draws new
ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulated import EMULATED, emulated_kernels
from hypothesis import settings

from fedpeft_ext import ops

settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@dataclass(frozen=True)
class Target:
    """The ops (a namespace of the public functions) and the device of their tensors."""

    name: str
    device: torch.device
    ops: Any


TARGETS = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]


# A module at a time: the emulated kernels must not stay behind the ops when tests without a target come.
@pytest.fixture(params=TARGETS, scope="module")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if request.param != "emulated":
        yield Target(request.param, torch.device(request.param), ops)
        return
    if not EMULATED:
        pytest.skip("fedpeft_ext._emulator is not built (CMake option FEDPEFT_EMULATOR)")
    with emulated_kernels():
        yield Target("emulated", torch.device("cpu"), ops)


@pytest.fixture(scope="module")
def device(target: Target) -> torch.device:
    return target.device
