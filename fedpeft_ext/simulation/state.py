"""What a part of a running federation holds between two rounds, so that a checkpoint can keep it.

A part with state has `state_dict()`, flat, of tensors and JSON values by name, and `load_state_dict()`, which
takes back what `state_dict()` of a part made with the same settings gave. Names of nested parts are joined
with dots. Between rounds there is nothing else: every random draw is a function of (seed, round, client,
position).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedpeft_ext.simulation.distributed import Ranks

State = dict[str, Any]
"""{name: Tensor, or None, bool, int, float, str, or lists and dictionaries of these}."""


class Stateful(Protocol):
    """A part with state. `state_dict` may return the tensors that it works on; `load_state_dict` copies.

    With several `ranks`, all of them call `state_dict`, and all get what all hold together: clients' state
    is at one rank each. All load all of it, and hand on their own clients' alone.
    """

    def state_dict(self, ranks: Ranks | None = None) -> State: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def prefixed(prefix: str, state: Mapping[str, Any]) -> State:
    """The same values as `prefix.name`."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def below(prefix: str, state: Mapping[str, Any]) -> State:
    """The values called `prefix.name`, as `name`."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Copy values of the same names into `tensors`.

    Raises:
        ValueError: a value is missing, or of another shape or dtype; nothing is copied.
    """
    for name, tensor in tensors.items():
        value = state.get(name)
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            came = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else "nothing"
            raise ValueError(f"{name}: expected {list(tensor.shape)} of {tensor.dtype}, got {came}")
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
