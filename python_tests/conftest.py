"""Where the ops under test run.

A test takes the ops from its target and puts its tensors on the target's device, so that it runs on every
device that there is, and another implementation of the ops joins by becoming a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedpeft_ext import ops


@dataclass(frozen=True)
class Target:
    """The ops (a namespace of the public functions) and the device of their tensors."""

    name: str
    device: torch.device
    ops: Any


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES, scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    return Target(request.param, torch.device(request.param), ops)


@pytest.fixture(scope="session")
def device(target: Target) -> torch.device:
    return target.device
