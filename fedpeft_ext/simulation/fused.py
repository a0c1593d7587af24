"""The fused engine: each client's whole local training is one task of one op, `ops.local_train`.

It trains models whose score is the dot product of a user vector with a sum of the strategies of
`fedpeft_ext.nn`: FedMF, and FedPerGNN, whose user vector takes in the client's items. There every
gradient of an item's row is a number times a vector that the client's rows share (with FedPerGNN the sum of
two such), so that a client's training fits in a core's cache, and nothing of the size of a table is copied.

It also trains FedNCF and PFedRec, whose score is an MLP: a client's weights, their gradients and moments stay
in its core's cache, or in its block's part of a GPU's, from the first step to the last.

Where nothing looks at single uploads they are added up where they are made (`ops.local_train_sum_`), and
where nothing comes between the parts of a round it is one op, `ops.train_round_`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft_ext import ops
from fedpeft_ext.backbones import Backbone
from fedpeft_ext.backbones.fedmf import FedMF
from fedpeft_ext.backbones.fedncf import FedNCF
from fedpeft_ext.backbones.fedpergnn import FedPerGNN
from fedpeft_ext.backbones.mlp import MLP
from fedpeft_ext.backbones.pfedrec import PFedRec
from fedpeft_ext.nn import FullEmbedding, HashEmbedding, LoRAEmbedding, RQEmbedding, SumEmbedding
from fedpeft_ext.ops import ItemParts, ItemSums, SENetWeights
from fedpeft_ext.ops.local_train import SumTraining
from fedpeft_ext.ops.train_round import RoundTraining
from fedpeft_ext.simulation.aggregation import Aggregator, raise_diverged
from fedpeft_ext.simulation.client_batch import plan_chunks
from fedpeft_ext.simulation.local_training import (
    ADAM_BETAS,
    ADAM_EPS,
    ClientError,
    Federation,
    ParameterRoles,
    first_not_finite,
    train_in_chunks,
)

CHUNK_OVERHEAD = 40_000
"""Fixed cost of a chunk in touched rows: every client of a chunk takes the room of its largest."""

_SENET = SENetWeights._fields


class FusedEngine:
    """Trains chunks of clients by `ops.local_train`.

    Args:
        federation: what to train; `why_not` says whether this engine can.
        chunk_bytes: memory that the uploads of a chunk may take (a single client may exceed it).
    """

    def __init__(self, federation: Federation, chunk_bytes: float) -> None:
        reason = why_not(federation)
        if reason is not None:
            raise ValueError(f"engine: 'fused' cannot train this model, since {reason}; use 'batched'")
        self._federation = federation
        self._roles = ParameterRoles.of(federation.model)
        self._names = _part_names(federation.model)
        self._chunk_bytes = chunk_bytes
        parameters = dict(federation.model.named_parameters())
        element = federation.model.item_dtype.itemsize
        self._mlp_names = _mlp_names(federation.model)
        self._own_mlp = bool(set(self._mlp_names) & set(self._roles.local))
        own = self._mlp_names if self._own_mlp else ()
        self._client_bytes = element * sum(parameters[name].numel() for name in (*self._roles.small, *own))
        self._sum_training: tuple[Aggregator, SumTraining] | None = None
        # A touched row of every table, and its number.
        self._row_bytes = 8 + element * sum(parameters[name].shape[1] for name in self._roles.rows)

    def train(self, clients: np.ndarray, round: int, aggregator: Aggregator) -> np.ndarray:
        """See `local_training.Engine`."""
        interactions, settings = self._federation.interactions, self._federation.settings
        sizes = interactions.sizes[clients]
        weights = settings.weights(sizes)
        sums = aggregator.sums() if _adds_up(interactions.device) else None
        if sums is not None:
            return train_in_chunks(
                clients,
                weights,
                self._calls(len(clients)),
                round,
                lambda ids, w: self._train_into(sums, ids, w, round, aggregator),
            )
        touched = np.minimum(sizes * (1 + settings.epochs), interactions.num_items) * bool(self._roles.rows)
        chunks = plan_chunks(
            touched,
            overhead=CHUNK_OVERHEAD,
            position_bytes=self._row_bytes,
            client_bytes=self._client_bytes,
            max_bytes=self._chunk_bytes,
        )
        return train_in_chunks(
            clients, weights, chunks, round, lambda ids, w: self._train_chunk(ids, w, round, aggregator)
        )

    def _calls(self, clients: int) -> list[slice]:
        """The clients of each call that adds up: all at once, but for what a call returns of each."""
        most = max(1, int(self._chunk_bytes // self._client_bytes)) if self._own_mlp else max(1, clients)
        return [slice(at, at + most) for at in range(0, clients, most)]

    def _own(self, clients: Tensor) -> dict[str, Any]:
        """The argument that differs between calls: the MLPs that stay with clients."""
        if not self._own_mlp:
            return {}
        state = self._federation.store.read(clients)
        return {"mlp": [state[name] for name in self._mlp_names]}

    def _state(self, result: ops.LocalUpdates | ops.SumResult) -> dict[str, Tensor]:
        """What stays with the clients of a call."""
        state = {"user": result.user} if "user" in self._roles.local else {}
        return state | (dict(zip(self._mlp_names, result.mlp, strict=True)) if self._own_mlp else {})

    def _lr(self, round: int) -> float:
        return self._federation.settings.of_round(round).lr

    def _arguments(self) -> dict[str, Any]:
        """The arguments that are the same in every round."""
        interactions, settings = self._federation.interactions, self._federation.settings
        model = self._federation.model
        user = self._federation.store.state.get("user")
        if user is None:
            user = torch.empty(interactions.num_users, 0, dtype=model.item_dtype, device=interactions.device)
        mlp: dict[str, Any] = {}
        if self._mlp_names:
            assert isinstance(model.mlp, MLP)
            mlp["dropout"] = model.mlp.dropout
            if not self._own_mlp:
                mlp["mlp"] = [model.get_parameter(name).detach() for name in self._mlp_names]
        return {
            "indptr": interactions.indptr,
            "items": interactions.items,
            "positives": interactions.positives[1],
            "num_items": interactions.num_items,
            "user": user,
            "parts": _item_parts(model),
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "loss": settings.loss,
            "optimizer": settings.optimizer,
            "lr": settings.lr,  # of calls that say nothing else
            "betas": ADAM_BETAS,
            "eps": ADAM_EPS,
            "l2_user": settings.l2 if "user" in self._roles.l2 else 0.0,
            "l2_items": settings.l2,
            "prox": settings.prox_mu,
            "graph": type(model) is FedPerGNN,
            "seed": settings.seed,
            **mlp,
        }

    def _train_into(
        self,
        sums: Mapping[str, Tensor],
        clients: np.ndarray,
        weights: np.ndarray,
        round: int,
        aggregator: Aggregator,
    ) -> np.ndarray:
        """Train clients whose uploads nobody looks at: they are added up where they are made."""
        if self._sum_training is None or self._sum_training[0] is not aggregator:
            self._sum_training = aggregator, self._training_into(sums, aggregator.marks)
        ids, weight = torch.from_numpy(clients), float(np.add.reduce(weights))
        result = self._sum_training[1](
            ids,
            torch.from_numpy(weights),
            round=round,
            grid=aggregator.grid,
            lr=self._lr(round),
            **self._own(ids),
        )
        aggregator.added(weight, len(clients), result.rows, self._first_broken(result.broken))
        self._federation.store.write(ids, self._state(result))
        return result.losses.numpy()

    def _first_broken(self, flags: Tensor) -> str | None:
        """Name of the first parameter whose updates are NaN or infinite."""
        bad = flags.tolist()
        if True not in bad:
            return None
        names = self._names | {"mlp": "mlp"}
        return names[(*ItemSums._fields[:-1], *_SENET, "mlp")[bad.index(True)]]

    def _sums(self, sums: Mapping[str, Tensor]) -> dict[str, Any]:
        """An aggregator's sums as arguments."""
        names = self._names
        parts = {name: sums[names[name]] for name in ItemSums._fields[:-1] if name in names}
        senet = SENetWeights(*(sums[names[name]] for name in _SENET)) if "w1" in names else None
        mlp = () if self._own_mlp else [sums[name] for name in self._mlp_names]
        return {"sums": ItemSums(**parts, senet=senet), "mlp_sums": mlp}

    def _training_into(self, sums: Mapping[str, Tensor], marks: Tensor | None) -> SumTraining:
        return SumTraining(
            **self._arguments()
            | self._own(torch.empty(0, dtype=torch.int64, device="cpu"))
            | self._sums(sums),
            touched=marks if self._roles.rows else None,
        )

    def whole_rounds(
        self, aggregator: Aggregator, eligible: np.ndarray, count: int
    ) -> Callable[[int], np.ndarray] | None:
        """A function that does a round of so many of the `eligible` clients, given its number, in one call,
        and returns their losses (as `train` would, with all that comes before and after it); None where
        something has to be done between its parts.
        """
        sums, device = aggregator.sums(), self._federation.interactions.device
        if not aggregator.plain or sums is None or self._own_mlp or not _adds_up(device):
            return None
        training = RoundTraining(
            torch.from_numpy(eligible),
            count,
            **self._arguments() | self._sums(sums),
            weighting=self._federation.settings.weighting,
        )

        def run(round: int) -> np.ndarray:
            try:
                result = training(round, lr=self._lr(round), server_lr=aggregator.server.lr(round))
            except Exception as error:
                raise ClientError(
                    f"round {round}, one of {count} clients: {error} (engine: sequential names the client "
                    "and the stage)"
                ) from error
            losses: np.ndarray = result.losses.numpy()
            first_not_finite(losses, result.clients.numpy(), round)
            raise_diverged(self._first_broken(result.broken), round)
            return losses

        return run

    def _train_chunk(
        self, clients: np.ndarray, weights: np.ndarray, round: int, aggregator: Aggregator
    ) -> np.ndarray:
        store, names = self._federation.store, self._names
        ids = torch.from_numpy(clients).to(self._federation.interactions.device)
        arguments = self._arguments() | self._own(ids) | {"lr": self._lr(round)}
        updates = ops.local_train(ids, **arguments, round=round)
        uploads = {names[part]: value for part, value in _flat(updates).items()}
        if not self._own_mlp:
            uploads |= dict(zip(self._mlp_names, updates.mlp, strict=True))
        rows = updates.rows if self._roles.rows else None
        accepted = aggregator.add(uploads, torch.from_numpy(weights).to(ids.device), rows, ids)
        store.write(ids, self._state(updates), accepted)
        return updates.losses.cpu().numpy()


def _adds_up(device: torch.device) -> bool:
    """Whether updates can be added up where they are made, by `ops.local_train_sum_`."""
    return device.type == "cpu"


def why_not(federation: Federation) -> str | None:
    """What keeps the fused engine from training a federation, or None."""
    if federation.variates is not None:
        return "it knows no control variates (training.algorithm)"
    if federation.settings.momentum > 0.0:
        return "it has no momentum"
    model = federation.model
    if type(model) not in (FedMF, FedPerGNN, FedNCF, PFedRec):
        return f"it does not know backbone {model.name!r}"
    embedding = model.item_embedding
    senet = any(isinstance(part, HashEmbedding) and part.senet for _, part in _strategies(embedding))
    if senet and type(model) is not FedMF:
        return f"it does not know SENet under backbone {model.name!r}"
    if embedding.padding_idx is not None:
        return "the item embedding has a padding_idx"
    for _, part in _strategies(embedding):
        if type(part) not in (FullEmbedding, LoRAEmbedding, HashEmbedding, RQEmbedding):
            return f"it does not know the strategy {type(part).__name__}"
    tables = [name for name in embedding.row_parameters if not name.endswith("A")]
    if len(tables) > 1:
        return f"there are {len(tables)} trained tables of full width: {', '.join(tables)}"
    return None


def _mlp_names(model: Backbone) -> tuple[str, ...]:
    """Parameters of a model's MLP in the order of `ops.local_train`; empty without one."""
    if not isinstance(model, FedNCF | PFedRec):
        return ()
    layers = [f"mlp.layers.{i}.{name}" for i in range(len(model.mlp.layers)) for name in ("weight", "bias")]
    return (*layers, "mlp.output")


def _strategies(embedding: nn.Module) -> list[tuple[str, nn.Module]]:
    """The strategies of an item embedding with the prefixes of their parameters' names."""
    if isinstance(embedding, SumEmbedding):
        return [(f"parts.{number}.", part) for number, part in enumerate(embedding.parts)]
    return [("", embedding)]


def _fields(part: nn.Module) -> dict[str, str]:
    """Field of `ItemParts` -> attribute of a strategy."""
    if isinstance(part, FullEmbedding):
        return {"table": part.row_parameters[-1]}
    if isinstance(part, LoRAEmbedding):
        return {"A": "A", "B": "B"}
    if isinstance(part, RQEmbedding):
        return {"codes": "codes", "codebooks": "codebooks"}
    assert isinstance(part, HashEmbedding)
    return {"buckets": "table", "hashes": "hashes"} | ({name: name for name in _SENET} if part.senet else {})


def _item_parts(model: Backbone) -> ItemParts:
    """The current global tensors of a model."""
    embedding = model.item_embedding
    values: dict[str, Any] = {}
    for _, part in _strategies(embedding):
        values |= {field: getattr(part, name).detach() for field, name in _fields(part).items()}
        if isinstance(part, HashEmbedding):
            values["reduce"] = part.reduce
            if part.senet:
                values["senet"] = SENetWeights(*(values.pop(name) for name in _SENET))
    if embedding.base is not None:
        trained = isinstance(embedding.base, nn.Parameter)
        values["table" if trained else "base"] = embedding.base.detach()
    return ItemParts(**values)


def _part_names(model: Backbone) -> dict[str, str]:
    """Field of an update -> name of the parameter in the model."""
    embedding = model.item_embedding
    names = {
        field: f"item_embedding.{prefix}{name}"
        for prefix, part in _strategies(embedding)
        for field, name in _fields(part).items()
    }
    if isinstance(embedding.base, nn.Parameter):
        names["table"] = "item_embedding.base"
    return names


def _flat(updates: ops.LocalUpdates) -> dict[str, Tensor]:
    values = {
        field: getattr(updates, field)
        for field in ("table", "A", "B", "codebooks", "buckets")
        if getattr(updates, field) is not None
    }
    return values | (updates.senet._asdict() if updates.senet is not None else {})
