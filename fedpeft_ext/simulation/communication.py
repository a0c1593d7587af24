"""Bytes that the protocol sends, counted from the tensors of its messages.

Every round the server sends the averaged parameters to each chosen client and gets the client's version of
the same tensors back. Frozen tensors (full embeddings, codes, hash functions) are sent to a client once, and
counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fedpeft_ext.backbones import Backbone


@dataclass(frozen=True)
class Traffic:
    """Bytes for one client: `down` and `up` in each round it takes part in, `setup` once."""

    down: int
    up: int
    setup: int


def message(model: Backbone) -> dict[str, Tensor]:
    """What travels both ways in a round: every trainable parameter that is not local to the client."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in model.local_parameters
    }


def setup_message(model: Backbone) -> dict[str, Tensor]:
    """What a client needs once: frozen parameters and buffers."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return frozen | dict(model.named_buffers())


def shared_state(model: Backbone) -> dict[str, Tensor]:
    """What a server has of a model: all parameters and buffers but those that are local to the client."""
    return {name: value for name, value in model.state_dict().items() if name not in model.local_parameters}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements in the dtype that they are sent in."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def traffic(model: Backbone, starts_averaged: bool = True, control_variates: bool = False) -> Traffic:
    """Bytes per client of the protocol for this model.

    `starts_averaged`: whether clients send the state whose mean newcomers start from (`averaged_start`).
    Newcomers receive it once.
    `control_variates`: whether SCAFFOLD's are sent both ways beside the parameters, as long as these.
    """
    each_way = num_bytes(message(model).values()) * (1 + control_variates)
    parameters = dict(model.named_parameters())
    start = num_bytes(parameters[name] for name in model.averaged_start)
    return Traffic(
        down=each_way,
        up=each_way + start * starts_averaged,
        setup=num_bytes(setup_message(model).values()) + start,
    )
