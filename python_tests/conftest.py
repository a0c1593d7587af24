"""Where the ops under test run.

A test takes the ops from its target and puts its tensors on the target's device, so that it runs on every
device that there is: the CPU, the CUDA kernels on the CPU (csrc/emulator), and CUDA. Another implementation
of the ops joins by becoming a target.

Hypothesis draws the same examples in every run, so that a run repeats; HYPOTHESIS_PROFILE=explore draws new
ones, and HYPOTHESIS_PROFILE=patient is for processors that are emulated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulated import EMULATED, emulated_kernels
from hypothesis import HealthCheck, settings

from fedpeft_ext import ops
from fedpeft_ext.backbones import base
from fedpeft_ext.nn import spec

settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.register_profile("patient", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@dataclass(frozen=True)
class Target:
    """The ops (a namespace of the public functions) and the device of their tensors."""

    name: str
    device: torch.device
    ops: Any


@pytest.fixture(autouse=True)
def registered_names_end_with_their_test() -> Iterator[None]:
    """Else what a test lists depends on the tests that ran before it in the same process."""
    registries: list[dict[str, Any]] = [base._BACKBONES, spec._REGISTERED, spec.STRATEGIES]
    before = [registry.copy() for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        registry.clear()
        registry.update(names)


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
