"""`app`: Flower's ClientApp for a node and its users.

A message is a whole visit: the node puts the model together from the settings and frozen tensors of its state
and the averaged parameters of the message, trains the chosen users with the engine that the settings name,
keeps their own state and answers with their uploads. The users' data are a file of the node: `data` in the
SuperNode's --node-config, or in Flower's simulation the file that `prepare` wrote for its partition. With
`state`, a folder, their own state outlives the process (`flower.state`).

A node whose configuration has `epsilon` (and `delta`, 1e-5 unless given) takes part in runs with
`privacy.mode=ldp` alone, and trains a user as long as its uploads stay within that: those of all runs that
`state` knows of, or without it those of the run. With `ldp` it answers `evaluate` with metrics only where its
configuration has `evaluate=true`; so it does with secure aggregation. A node whose configuration has
`secure-nodes` takes part only in runs with secure aggregation, and in sums over so many nodes or more.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
    SECURE,
    SETTINGS,
    SETUP,
    STARTS,
    UPDATES,
    encoded,
    to_record,
    to_tensors,
)
from fedpeft_ext.flower.secure import OFFER, REVEAL, SHARE, Member, Vector, to_vector_record, vector_format
from fedpeft_ext.flower.state import NodeFolder, Own, Spent, client_store, format_spent, parse_spent
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.client_batch import Interactions
from fedpeft_ext.simulation.communication import message as averaged
from fedpeft_ext.simulation.communication import setup_message
from fedpeft_ext.simulation.compression import decode, encode, split
from fedpeft_ext.simulation.faults import make_faults
from fedpeft_ext.simulation.local_training import Federation, ParameterRoles
from fedpeft_ext.simulation.privacy import Mechanism, composed_epsilon, make_clipping, noisy_upload
from fedpeft_ext.simulation.setup import (
    build_model,
    can_train,
    local_settings,
    make_engine,
    needs_pretrained,
    warmup_rounds,
)
from fedpeft_ext.simulation.simulator import evaluators
from fedpeft_ext.simulation.state import prefixed
from fedpeft_ext.simulation.uploads import Uploads, UploadStage

log = logging.getLogger("fedpeft_ext.flower")
app = ClientApp()

RELEASES = "releases"
"""In a node's state: what `flower.state.format_spent` wrote."""


@app.query()
def join(message: Message, context: Context) -> Message:
    """Keep settings and frozen tensors, and tell which users can train."""
    settings = message.content.config_records[SETTINGS]
    config = _parsed(settings)
    _Budget(context).check(config)
    if config.secure_aggregation.min_nodes < (least := _least(context)):
        raise ValueError(
            f"secure_aggregation.min_nodes: this node takes part with {least} or more, got "
            f"{config.secure_aggregation.min_nodes}"
        )
    dataset, users = _data(context)
    if dataset.num_items != settings["num_items"]:
        raise ValueError(
            f"the node's file has {dataset.num_items} items, the server's catalogue {settings['num_items']}"
        )
    context.state[SETTINGS] = settings
    context.state[SETUP] = message.content[SETUP]
    with _locked(context):
        _start_own(context)
        own, done = _own(context), int(settings["round"])
        if (restored := own.after(done)) is not own:  # a round that the server lost
            _keep(context, restored)
        if restored.round > done:
            log.warning("users' state is of round %d, the server goes on from %d", restored.round, done)
    able = users[can_train(np.diff(dataset.indptr)[users], dataset.num_items)]
    return _reply(message, {CLIENTS: to_record({"users": torch.from_numpy(able)})})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the chosen users; their updates travel, their state stays."""
    with _locked(context):
        return _train(message, context)


def _train(message: Message, context: Context) -> Message:
    settings = message.content.config_records[SETTINGS]
    number = int(settings["round"])
    node = _Node(message, context)
    clients = np.array(settings["users"], dtype=np.int64)
    strangers = np.setdiff1d(clients, node.users)
    if len(strangers):
        raise ValueError(f"users: expected users of this node, got {strangers.tolist()}")
    if len(np.unique(clients)) < len(clients):  # several uploads in one round would go past a budget
        raise ValueError(f"users: expected each once, got {clients.tolist()}")
    sent, losses = node.train(node.interactions.by_size(clients), number)
    if node.secure:
        vector = node.vector(sent, losses, int(settings["nodes"]))
        masked = _member(context).mask(message.content.config_records[SECURE], vector)
        return _reply(message, {SECURE: to_vector_record(masked)})
    return _reply(
        message,
        {
            UPDATES: to_record(sent.arrays),
            STARTS: to_record(sent.starts),
            METRICS: MetricRecord(
                {
                    "users": sent.clients,
                    "num-examples": sent.weights,
                    "loss": [] if node.local_noise else [losses[client] for client in sent.clients],
                }
            ),
        },
    )


@app.query(OFFER.partition(".")[2])
def offer(message: Message, context: Context) -> Message:
    """Begin a round of secure aggregation."""
    return _reply(message, {SECURE: _member(context).offer()})


@app.query(SHARE.partition(".")[2])
def share(message: Message, context: Context) -> Message:
    """Give neighbours, sealed, shares of what the sum needs if this node drops out."""
    return _reply(message, {SECURE: _member(context).share(message.content.config_records[SECURE])})


@app.query(REVEAL.partition(".")[2])
def reveal(message: Message, context: Context) -> Message:
    """Reveal what takes the masks off the sum."""
    groups = message.content.config_records[SECURE]
    return _reply(message, {SECURE: _member(context).reveal(groups["alive"], groups["dropped"])})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank the test items of the node's users: means over them, and how many there are."""
    node = _Node(message, context)
    values: dict[str, Any] = {}
    if (node.local_noise or node.secure) and not context.node_config.get("evaluate", False):
        return _reply(message, {METRICS: MetricRecord(values)})
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
        privacy = self._config.privacy
        for c, client in enumerate(uploads.clients.tolist()):
            update = {name: uploads.whole(name, c, p.shape) for name, p in self._model.items()}
            weight = float(uploads.weights[c])
            if privacy.mode == "ldp":  # clipping is in the weight
                update, weight = noisy_upload(update, weight, privacy), 1.0
            self._add(client, update, uploads.round)
            self.clients.append(client)
            self.weights.append(weight)
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
        self._context, self._own = context, _own(context)
        self.config = _config(context)
        self.local_noise = self.config.privacy.mode == "ldp"
        self.secure = self.config.secure_aggregation.min_nodes > 0
        device = torch.device(self.config.device)
        self.dataset, self.users = _data(context)
        self.interactions = _interactions(_path(context), str(device))
        warmup, begun = _settings(context)["phase"] == "warm-up", int(_settings(context)["begun"])
        frozen = to_tensors(context.state, SETUP)
        model = _model(self.config, self.dataset.num_items, frozen, warmup).to(device)
        model.load_state_dict(to_tensors(message.content, PARAMETERS), strict=False)
        users, starts = torch.from_numpy(self.users), to_tensors(message.content, STARTS)
        store = client_store(self.config, model, users, self.dataset.num_users, starts, self._own)
        settings = local_settings(self.config, model, warmup=warmup, begun=begun)
        self.federation = Federation(model, store, self.interactions, settings)

    def train(self, clients: np.ndarray, number: int) -> tuple[_Uplink, dict[int, float]]:
        """Train `clients`, sorted by (size, id), and keep the state of those whose update is accepted."""
        model, store = self.federation.model, self.federation.store
        rows = frozenset(ParameterRoles.of(model).rows)
        own, last = self._own, warmup_rounds(self.config)
        same_phase = (own.round <= last) == (number <= last)  # the other one's are of other parameters
        residuals = dict(own.residuals) if same_phase else {}
        uplink = _Uplink(self.config, model, residuals)
        clients = _Budget(self._context).take(self.config, clients)
        clips = self.local_noise or self.secure
        stages = [*(make_clipping(self.config.privacy) if clips else []), uplink]
        aggregator = Aggregator(averaged(model), rows, stages=stages, faults=make_faults(self.config))
        aggregator.begin(number)
        losses = make_engine(self.config, self.federation)[1].train(clients, number, aggregator)
        store.commit(average=False)
        sent = torch.tensor(uplink.clients, dtype=torch.int64, device="cpu")
        if self.config.privacy.mode == "none":  # no noise covers these
            uplink.starts = {name: store.state[name][sent] for name in model.averaged_start}
        _keep(self._context, own.following(number, sent, store, residuals))
        return uplink, dict(zip(clients.tolist(), losses.tolist(), strict=True))

    def vector(self, sent: _Uplink, losses: Mapping[int, float], nodes: int) -> Vector:
        """What is sent under masks, one of `nodes` vectors to be summed."""
        weights = torch.tensor(sent.weights, dtype=torch.float64, device="cpu")
        ones = torch.ones_like(weights)
        private = self.config.privacy.mode != "none"  # then clients count alike, and clipping is in weights
        told = [0.0 if self.local_noise else losses[client] for client in sent.clients]
        counts = torch.stack([ones if private else weights, ones], 1)
        updates = {n: v * weights.view(-1, *[1] * (v.dim() - 1)) for n, v in sent.arrays.items()}
        tensors = {**prefixed("updates", updates), **prefixed("starts", sent.starts)}
        loss = torch.tensor(told, dtype=torch.float64, device="cpu")
        tensors |= {"counts": counts, "loss": loss.view(-1, 1)}
        return vector_format(self.config, self.federation.model).encode(tensors, nodes)


class _Budget:
    """What a node lets its users give away, by its own configuration, whatever the server asks for."""

    def __init__(self, context: Context) -> None:
        self._state, self._folder = context.state, _folder(context)
        self._names = _names(context)
        given = context.node_config.get("epsilon")
        self._epsilon = None if given is None else float(given)
        self._delta = float(context.node_config.get("delta", 1e-5))

    def check(self, config: Config) -> None:
        """Raise ValueError where the settings do not protect a node that asks for it."""
        mode, reasons = config.privacy.mode, self._reasons(config)
        if self._epsilon is not None and (mode != "ldp" or reasons):
            raise ValueError(
                f"epsilon: this node takes part with privacy.mode 'ldp' and a guarantee alone, got "
                f"{mode!r}{': ' if reasons else ''}{'; '.join(reasons)}"
            )

    def take(self, config: Config, clients: np.ndarray) -> np.ndarray:
        """Those of `clients` who may send another upload, which is counted: before anything leaves, so that
        no crash makes the count too low.
        """
        if self._epsilon is None and self._folder is None:
            return clients
        uploads, kind = self._uploads(), self._kind(config)
        able = []
        for client in clients.tolist():
            name = self._names[client]
            counts = uploads.get(name, Counter()) + Counter({kind: 1})
            able.append(self._epsilon is None or composed_epsilon(counts, self._delta) <= self._epsilon)
            if able[-1]:
                uploads[name] = counts
        if self._folder is not None:
            self._folder.save_spent(uploads)
        else:
            self._state[RELEASES] = ConfigRecord({"uploads": format_spent(uploads)})
        if not all(able):
            log.warning("epsilon: %d of %d chosen users have too little left", able.count(False), len(able))
        allowed: np.ndarray = clients[np.array(able, dtype=bool)]
        return allowed

    def _reasons(self, config: Config) -> tuple[str, ...]:
        return config.privacy.model_copy(update={"delta": self._delta}).why_no_guarantee()

    def _kind(self, config: Config) -> tuple[Mechanism, float]:
        """Of the noise that leaves with an upload; 0 where none does, as with `cdp`."""
        privacy = config.privacy
        if privacy.mode != "ldp" or privacy.clip is None:
            return privacy.mechanism, 0.0
        return privacy.mechanism, privacy.noise_scale / privacy.clip

    def _uploads(self) -> Spent:
        if self._folder is not None:
            return self._folder.uploads()
        kept = self._state.config_records.get(RELEASES)
        return {} if kept is None else parse_spent(str(kept["uploads"]))


def _folder(context: Context) -> NodeFolder | None:
    path = context.node_config.get("state")
    return None if path is None else NodeFolder(str(path), _names(context))


def _names(context: Context) -> dict[int, str]:
    dataset, users = _data(context)
    return {user: dataset.user_ids[user] for user in users.tolist()}


@contextmanager
def _locked(context: Context) -> Iterator[None]:
    folder = _folder(context)
    if folder is None:
        yield
    else:
        with folder.locked():
            yield


def _own(context: Context) -> Own:
    """The users' own state in the run."""
    folder = _folder(context)
    if folder is None:
        return Own.from_tensors(to_tensors(context.state, CLIENTS))
    return folder.load(_run(context))


def _start_own(context: Context) -> None:
    """Let the users go on with their state of the run that this one started from, if it is here."""
    folder, before = _folder(context), str(_settings(context)["from"])
    if folder is None or not before or _run(context) in folder.runs():
        return
    own = folder.load_from(before, int(_settings(context)["begun"]))
    if len(own.users):
        folder.save(_run(context), own)


def _keep(context: Context, own: Own) -> None:
    folder = _folder(context)
    if folder is None:
        context.state[CLIENTS] = to_record(replace(own, before=None).tensors())
    else:
        folder.save(_run(context), own)


def _run(context: Context) -> str:
    return str(_settings(context)["run"])


def _least(context: Context) -> int:
    return int(context.node_config.get("secure-nodes", 0))


def _member(context: Context) -> Member:
    return Member(context.state, context.node_id, _config(context).secure_aggregation, _least(context))


def _parsed(settings: ConfigRecord) -> Config:
    return _from_yaml(str(settings["config"]))


@lru_cache(maxsize=16)
def _from_yaml(text: str) -> Config:
    return Config.from_dict(yaml.safe_load(text))


def _config(context: Context) -> Config:
    return _parsed(_settings(context))


def _settings(context: Context) -> ConfigRecord:
    if SETTINGS not in context.state.config_records:
        raise RuntimeError("this node was not set up (it may have been restarted)")
    return context.state.config_records[SETTINGS]


def _model(config: Config, num_items: int, frozen: Mapping[str, Tensor], warmup: bool) -> Backbone:
    """The model with the frozen tensors that the server sent."""
    dtype, dim = getattr(torch, config.dtype), config.backbone.dim
    # Placeholders of the right shapes; the values come with the frozen tensors, or with each message.
    base = (
        torch.zeros(num_items, dim, dtype=dtype, device="cpu")
        if needs_pretrained(config.embedding.name)
        else None
    )
    codes = next((value for name, value in frozen.items() if name.endswith("codes")), None)
    codebooks = torch.zeros(
        config.embedding.levels, config.embedding.codebook_size, dim, dtype=dtype, device="cpu"
    )
    model = build_model(config, num_items, base=base, codes=codes, codebooks=codebooks, warmup=warmup)
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
