"""From settings to the parts of a federation, for whoever runs one: `Simulator` in one process, or a server
and its clients on machines of their own (`fedpeft_ext.flower`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.backbones import Backbone, build_backbone
from fedpeft_ext.config import Config, ScheduleName
from fedpeft_ext.data import Dataset
from fedpeft_ext.nn import build_embedding, parse_spec
from fedpeft_ext.nn.spec import spec_options
from fedpeft_ext.pretrain import Pretrained, pretrain
from fedpeft_ext.simulation.batched import BatchedEngine
from fedpeft_ext.simulation.communication import Traffic, message, num_bytes, traffic
from fedpeft_ext.simulation.compression import encode
from fedpeft_ext.simulation.fused import FusedEngine, why_not
from fedpeft_ext.simulation.local_training import Engine, Federation, LocalSettings
from fedpeft_ext.simulation.schedule import CONSTANT, Schedule
from fedpeft_ext.simulation.sequential import SequentialEngine


def has_codes(embedding: str) -> bool:
    """Whether a strategy of an embedding reads the items' codes."""
    return "codes" in spec_options(parse_spec(embedding))


def needs_pretrained(embedding: str) -> bool:
    """Whether an embedding starts from what the server prepares: full embeddings or codes."""
    spec = parse_spec(embedding)
    return spec.plug or "full" in spec.parts or has_codes(embedding)


def warmup_rounds(config: Config) -> int:
    """First rounds that train the full embedding: none for a `c-X`, which holds no full one to warm up."""
    spec = parse_spec(config.embedding.name)
    return config.training.warmup_rounds if spec.plug or "full" in spec.parts else 0


def prepare_items(config: Config, dataset: Dataset) -> Pretrained:
    """Full embeddings and, where the embedding of `config` has them, codes; see `pretrain`."""
    coded = has_codes(config.embedding.name)
    return pretrain(
        config.pretrain,
        dataset,
        config.backbone.dim,
        levels=config.embedding.levels if coded else None,
        codebook_size=config.embedding.codebook_size,
        seed=config.seed,
    )


def build_model(
    config: Config,
    num_items: int,
    *,
    base: Tensor | None = None,
    codes: Tensor | None = None,
    codebooks: Tensor | None = None,
    warmup: bool = False,
) -> Backbone:
    """The backbone over its item embedding as every participant starts with it, in `config.dtype`.

    Args:
        config: its sections `backbone` and `embedding`, and `seed`.
        num_items: I.
        base: full embeddings [I, D], for embeddings that have them.
        codes, codebooks: [I, L] and [L, K, D], for embeddings with codes.
        warmup: build the model of warm-up rounds, whose embedding is the full one.
    """
    embedding, dtype = config.embedding, getattr(torch, config.dtype)
    coded = has_codes(embedding.name)
    table = build_embedding(
        "full" if warmup else embedding.name,
        num_items,
        config.backbone.dim,
        base=base,
        freeze_full=embedding.freeze_full,
        dtype=dtype,
        generator=torch.Generator().manual_seed(config.seed),
        rank=embedding.rank,
        table_size=embedding.table_size,
        num_hashes=embedding.num_hashes,
        senet_hidden=embedding.senet_hidden,
        reduce=embedding.reduce,
        codes=codes if coded else None,
        codebooks=codebooks if coded and embedding.warm_start_codebooks else None,
        codebook_size=embedding.codebook_size,
        warm_start=embedding.warm_start_codebooks,
        levels=embedding.levels,
        seed=config.seed,
        init_std=embedding.init_std,
        **embedding.options,
    )
    return build_backbone(
        config.backbone.name,
        table,
        config.backbone.dim,
        config.seed,
        hidden=config.backbone.hidden,
        dropout=config.backbone.dropout,
        **config.backbone.options,
    ).to(dtype)


def local_settings(config: Config, model: Backbone, *, warmup: bool = False, begun: int = 0) -> LocalSettings:
    """How clients train `model` in a run that began after round `begun`; warm-up rounds may have steps of
    their own.
    """
    training = config.training
    optimizer, lr = training.optimizer, training.lr
    if warmup:
        optimizer, lr = training.warmup_optimizer or optimizer, training.warmup_lr or lr
    return LocalSettings(
        epochs=training.local_epochs,
        batch_size=training.batch_size,
        loss=training.loss,
        optimizer=optimizer,
        lr=model.default_lr if lr is None else lr,
        l2=training.l2,
        weighting=training.weighting,
        seed=config.seed,
        prox_mu=training.prox_mu,
        momentum=training.momentum if optimizer == "sgd" else 0.0,
        schedule=CONSTANT if warmup else _schedule(config, training.schedule, begun),
    )


class ServerSettings(TypedDict):
    """Arguments of `aggregation.Server`."""

    optimizer: Literal["avg", "adam"]
    lr: float | None
    schedule: Schedule


def server_settings(config: Config, *, warmup: bool = False, begun: int = 0) -> ServerSettings:
    """How the server steps in a run that began after round `begun`; warm-up rounds, which train other
    parameters, may have steps of their own.
    """
    training = config.training
    if not warmup:
        schedule = _schedule(config, training.server_schedule, begun)
        return {"optimizer": training.server_optimizer, "lr": training.server_lr, "schedule": schedule}
    optimizer = training.warmup_server_optimizer or training.server_optimizer
    # The rate of another optimizer says nothing about this one.
    other = training.server_lr if optimizer == training.server_optimizer else None
    return {"optimizer": optimizer, "lr": training.warmup_server_lr or other, "schedule": CONSTANT}


def _schedule(config: Config, name: ScheduleName, begun: int) -> Schedule:
    """Over the rounds of a run after warm-up."""
    training = config.training
    first = max(warmup_rounds(config), begun) + 1
    return Schedule(name, training.schedule_end, first, training.rounds)


def after_warmup(model: Backbone, pretrained: Pretrained | None) -> Pretrained:
    """What was prepared, with the full embeddings as warm-up left them in `model`."""
    full = model.item_embedding.full_embedding().detach()
    return dataclasses.replace(pretrained or Pretrained(full), full=full)


@torch.no_grad()
def carry_over(before: Backbone, model: Backbone) -> None:
    """Give `model` what warm-up trained in `before`, less the item embedding and what is a client's own."""
    trained = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("item_embedding.") and name not in model.local_parameters:
            parameter.copy_(trained[name])


def make_engine(config: Config, federation: Federation) -> tuple[str, Engine]:
    """The engine that the settings ask for, under its own name."""
    name, chunk_bytes = config.engine, config.chunk_memory_mb * 2**20
    if name == "auto":
        name = "fused" if why_not(federation) is None else "batched"
    if name == "fused":
        return name, FusedEngine(federation, chunk_bytes)
    if name == "batched":
        return name, BatchedEngine(federation, chunk_bytes)
    return name, SequentialEngine(federation)


def can_train(sizes: np.ndarray, num_items: int) -> np.ndarray:
    """Which clients of `sizes` training items have at least one, and one left to draw as a negative."""
    able: np.ndarray = (sizes > 0) & (sizes < num_items)
    return able


def eligible_clients(dataset: Dataset) -> np.ndarray:
    """Clients of a data set that `can_train`, int64 ascending. Raises ValueError where there is none."""
    clients = np.flatnonzero(can_train(np.diff(dataset.indptr), dataset.num_items)).astype(np.int64)
    if len(clients) == 0:
        raise ValueError(
            f"data set {dataset.name!r} has no user with a training item and an item not yet met"
        )
    return clients


def clients_per_round(setting: float, eligible: int) -> int:
    """How many of the `eligible` clients a round takes, for a share (float) or a count (int)."""
    if isinstance(setting, int):
        if setting > eligible:
            raise ValueError(
                f"training.clients_per_round: expected at most {eligible}, the number of users with "
                f"training items, got {setting}"
            )
        return setting
    return max(1, round(setting * eligible))


def counted_traffic(config: Config, model: Backbone) -> Traffic:
    """Bytes of a client with these settings: encoded uploads, and what goes beside the parameters."""
    counted = traffic(
        model,
        starts_averaged=config.privacy.mode == "none",
        control_variates=config.training.algorithm == "scaffold",
    )
    method = config.compression.method
    if method == "none":
        return counted
    # An encoding's length is the same whatever the values are.
    saved = num_bytes(message(model).values()) - len(
        encode(message(model), method, share=config.compression.top_k)
    )
    return dataclasses.replace(counted, up=counted.up - saved)
