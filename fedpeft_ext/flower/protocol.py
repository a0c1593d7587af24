"""What server and nodes tell each other.

    query     settings, phase, number of items, frozen tensors,  ->  the node's users that can train
              the run's name, rounds done
    train     averaged parameters, round, chosen users           ->  their updates, losses and weights
    evaluate  averaged parameters                                ->  metrics, and of how many users

Nodes are queried when they join, and all of them when warm-up ends. Updates are what
`simulation.communication` counts: the change of every averaged parameter, whole, or its encoding where
`compression.method` asks for one; and beside it the state whose mean newcomers start from
(`Backbone.averaged_start`), without privacy.

With `privacy.mode=cdp` the server clips updates and adds noise to their sum. With `ldp` a node does both to
each user's update, and sends neither losses nor, unless it is told to, metrics.

With `secure_aggregation.min_nodes` the answer to `train` is one vector, masked (`flower.secure`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

PARAMETERS, STARTS, SETUP, UPDATES, CLIENTS, SETTINGS, METRICS, SECURE = (
    "parameters",
    "starts",
    "setup",
    "updates",
    "clients",
    "settings",
    "metrics",
    "secure",
)
"""Names of records in messages and in a node's state."""


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as Flower sends them."""
    return ArrayRecord({name: tensor.detach().cpu() for name, tensor in tensors.items()})


def to_tensors(content: RecordDict, name: str) -> dict[str, Tensor]:
    """The tensors of a record; none where there is no such record."""
    return dict(content.array_records[name].to_torch_state_dict()) if name in content.array_records else {}


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message, with the header that NumPy's format gives each (128 bytes), and of
    keys, sealed and revealed shares.
    """
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    values = content.config_records[SECURE].values() if SECURE in content.config_records else ()
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return arrays + sum(len(part) for part in parts if isinstance(part, bytes))


def encoded(data: bytes) -> Tensor:
    """Bytes as uint8 [n]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
