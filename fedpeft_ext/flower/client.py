"""`app`: Flower's ClientApp for a node and its users.

A message is a whole visit: the node puts the model together from the settings and frozen tensors of its state
and the averaged parameters of the message, trains the chosen users with the engine that the settings name,
keeps their own state and answers with their uploads. The users' data are a file of the node: `data` in the
SuperNode's --node-config, or in Flower's simulation the file that `prepare` wrote for its partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.flower.files import node_file, read_node
from fedpeft_ext.flower.protocol import (
    CLIENTS,
    METRICS,
    PARAMETERS,
    SETTINGS,
    SETUP,
    STARTS,
    UPDATES,
    encoded,
    to_record,
    to_tensors,
)
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.client_batch import ClientStore, Interactions, initial_states
from fedpeft_ext.simulation.communication import message as averaged
from fedpeft_ext.simulation.communication import setup_message
from fedpeft_ext.simulation.compression import decode, encode, split
from fedpeft_ext.simulation.faults import make_faults
from fedpeft_ext.simulation.local_training import Federation, ParameterRoles
from fedpeft_ext.simulation.setup import (
    build_model,
    can_train,
    local_settings,
    make_engine,
    needs_pretrained,
)
from fedpeft_ext.simulation.simulator import evaluators
from fedpeft_ext.simulation.uploads import Uploads, UploadStage

app = ClientApp()

RESIDUAL = "residual"
"""In a user's state: what top-k has not sent yet."""


@app.query()
def join(message: Message, context: Context) -> Message:
    """Keep settings and frozen tensors, and tell which users can train."""
    context.state[SETTINGS] = message.content[SETTINGS]
    context.state[SETUP] = message.content[SETUP]
    dataset, users = _data(context)
    settings = message.content.config_records[SETTINGS]
    if dataset.num_items != settings["num_items"]:
        raise ValueError(
            f"the node's file has {dataset.num_items} items, the server's catalogue {settings['num_items']}"
        )
    able = users[can_train(np.diff(dataset.indptr)[users], dataset.num_items)]
    return _reply(message, {CLIENTS: to_record({"users": torch.from_numpy(able)})})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the chosen users; their updates travel, their state stays."""
    node = _Node(message, context)
    settings = message.content.config_records[SETTINGS]
    number = int(settings["round"])
    clients = np.array(settings["users"], dtype=np.int64)
    strangers = np.setdiff1d(clients, node.users)
    if len(strangers):
        raise ValueError(f"users: expected users of this node, got {strangers.tolist()}")
    sent, losses = node.train(node.interactions.by_size(clients), number)
    return _reply(
        message,
        {
            UPDATES: to_record(sent.arrays),
            STARTS: to_record(sent.starts),
            METRICS: MetricRecord(
                {
                    "users": sent.clients,
                    "num-examples": sent.weights,
                    "loss": [losses[client] for client in sent.clients],
                }
            ),
        },
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank the test items of the node's users: means over them, and how many there are."""
    node = _Node(message, context)
    values: dict[str, Any] = {}
    if (node.dataset.test_items >= 0).any():
        for prefix, evaluator in evaluators(node.config, node.dataset, node.interactions).items():
            measured = evaluator(node.federation.model, node.federation.store)
            values |= {prefix + name: value for name, value in measured.items()}
            values[prefix + "num-examples"] = evaluator.num_users
    return _reply(message, {METRICS: MetricRecord(values)})


class _Uplink(UploadStage):
    """The end of a node's aggregator: takes accepted uploads to be sent, and lets nothing be summed.

    Attributes:
        arrays: {name: [C, ...]}, or {client: uint8 [n]} with compression.
        starts: {name: [C, ...]}, state whose mean newcomers start from.
        clients, weights: one each.
    """

    def __init__(self, config: Config, model: Backbone, residuals: dict[int, Tensor]) -> None:
        self._config = config
        self._model = averaged(model)
        self._updates: dict[str, list[Tensor]] = {name: [] for name in self._model}
        self._encoded: dict[str, Tensor] = {}
        self._residuals = residuals
        self.starts: dict[str, Tensor] = {}
        self.clients: list[int] = []
        self.weights: list[float] = []

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What is sent."""
        if self._encoded or not self.clients:
            return self._encoded
        return {name: torch.stack(parts) for name, parts in self._updates.items()}

    def __call__(self, uploads: Uploads) -> Iterable[Uploads]:
        for c, client in enumerate(uploads.clients.tolist()):
            self._add(
                client,
                {name: uploads.whole(name, c, p.shape) for name, p in self._model.items()},
                uploads.round,
            )
            self.clients.append(client)
            self.weights.append(float(uploads.weights[c]))
        return []

    def _add(self, client: int, update: Mapping[str, Tensor], round: int) -> None:
        method = self._config.compression.method
        if method == "none":
            for name, value in update.items():
                self._updates[name].append(value)
            return
        shapes = {name: value.shape for name, value in update.items()}
        if method == "top-k":
            flat = torch.cat([value.flatten() for value in update.values()])
            if client in self._residuals:
                flat = flat + self._residuals[client]
            update = split(flat, shapes)
        data = encode(
            update,
            method,
            share=self._config.compression.top_k,
            seed=self._config.seed,
            round=round,
            client=client,
        )
        if method == "top-k":
            arrived = decode(data, shapes, method, flat.dtype)
            self._residuals[client] = flat - torch.cat([value.flatten() for value in arrived.values()])
        self._encoded[str(client)] = encoded(data)


class _Node:
    """A node as it is while it answers a message."""

    def __init__(self, message: Message, context: Context) -> None:
        if SETTINGS not in context.state.config_records:
            raise RuntimeError("this node was not set up (it may have been restarted)")
        self._context = context
        self.config = Config.from_dict(yaml.safe_load(str(context.state.config_records[SETTINGS]["config"])))
        device = torch.device(self.config.device)
        self.dataset, self.users = _data(context)
        self.interactions = _interactions(_path(context), str(device))
        model = _model(self.config, self.dataset.num_items, to_tensors(context.state, SETUP)).to(device)
        model.load_state_dict(to_tensors(message.content, PARAMETERS), strict=False)
        store = self._store(model, to_tensors(message.content, STARTS))
        self.federation = Federation(model, store, self.interactions, local_settings(self.config, model))

    def train(self, clients: np.ndarray, number: int) -> tuple[_Uplink, dict[int, float]]:
        """Train `clients`, sorted by (size, id), and keep the state of those whose update is accepted."""
        model, store = self.federation.model, self.federation.store
        rows = frozenset(ParameterRoles.of(model).rows)
        residuals = {int(name): tensor for name, tensor in to_tensors(self._context.state, RESIDUAL).items()}
        uplink = _Uplink(self.config, model, residuals)
        aggregator = Aggregator(averaged(model), rows, stages=[uplink], faults=make_faults(self.config))
        aggregator.begin(number)
        losses = make_engine(self.config, self.federation)[1].train(clients, number, aggregator)
        store.commit(average=False)
        sent = torch.tensor(uplink.clients, dtype=torch.int64)
        uplink.starts = {name: store.state[name][sent] for name in model.averaged_start}
        own = self._context.state.array_records
        ids = torch.unique(torch.cat([self._own.get("users", sent), sent]))
        kept = {name: values[ids] for name, values in store.state.items()}
        own[CLIENTS] = to_record({"users": ids, **{f"state.{name}": v for name, v in kept.items()}})
        own[RESIDUAL] = to_record({str(client): tensor for client, tensor in residuals.items()})
        return uplink, dict(zip(clients.tolist(), losses.tolist(), strict=True))

    def _store(self, model: Backbone, starts: Mapping[str, Tensor]) -> ClientStore:
        """State of the node's users: kept, or what a new client starts with."""
        count, config = self.dataset.num_users, self.config
        self._own = to_tensors(self._context.state, CLIENTS)
        users = torch.from_numpy(self.users)
        state = initial_states(model, users, count, config.seed, config.backbone.init_std)
        store = ClientStore(state, starts, count)
        if self._own:
            ids = self._own["users"]
            for name, values in store.state.items():
                values[ids] = self._own[f"state.{name}"]
            if store.trained is not None:
                store.trained[ids] = True
        return store


def _model(config: Config, num_items: int, frozen: Mapping[str, Tensor]) -> Backbone:
    """The model with the frozen tensors that the server sent."""
    dtype, dim = getattr(torch, config.dtype), config.backbone.dim
    # Placeholders of the right shapes; the values come with the frozen tensors, or with each message.
    base = torch.zeros(num_items, dim, dtype=dtype) if needs_pretrained(config.embedding.name) else None
    codes = next((value for name, value in frozen.items() if name.endswith("codes")), None)
    codebooks = torch.zeros(config.embedding.levels, config.embedding.codebook_size, dim, dtype=dtype)
    model = build_model(config, num_items, base=base, codes=codes, codebooks=codebooks)
    expected = set(setup_message(model))
    if set(frozen) != expected:
        raise ValueError(f"setup: expected {sorted(expected)}, got {sorted(frozen)}")
    model.load_state_dict(dict(frozen), strict=False)
    return model


def _path(context: Context) -> str:
    config = context.node_config
    if "data" in config:
        return str(config["data"])
    prepared = context.run_config.get("prepared")
    if prepared is None or "partition-id" not in config:
        raise ValueError("data: expected the path of the node's file in --node-config, got none")
    return str(node_file(str(prepared), int(config["partition-id"])))


def _data(context: Context) -> tuple[Dataset, np.ndarray]:
    return _read(_path(context))


@lru_cache(maxsize=1024)
def _read(path: str) -> tuple[Dataset, np.ndarray]:
    return read_node(path)


@lru_cache(maxsize=1024)
def _interactions(path: str, device: str) -> Interactions:
    return Interactions(_read(path)[0], torch.device(device))


def _reply(message: Message, records: Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]) -> Message:
    return Message(content=RecordDict(dict(records)), reply_to=message)
