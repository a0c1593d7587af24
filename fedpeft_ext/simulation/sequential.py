"""The sequential engine: one client at a time in plain PyTorch, the reference that the other engines must
equal.

Nothing is fused, batched or shared here: each client gets a copy of the whole model, whole tables included,
and a fresh torch optimizer, and its model runs on the plain twins of the ops (`fedpeft_ext.reference`). It is
the engine to read, and the one to find out which client fails and where.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedpeft_ext import reference
from fedpeft_ext.backbones import Backbone, ClientContext
from fedpeft_ext.nn.items import Items
from fedpeft_ext.ops import SENetWeights
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.local_training import (
    ADAM_BETAS,
    ADAM_EPS,
    ClientError,
    Federation,
    LocalSettings,
    ParameterRoles,
    local_steps,
)


class SequentialEngine:
    """Trains clients one after the other. Slow and exact."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._roles = ParameterRoles.of(federation.model)

    def train(self, clients: np.ndarray, round: int, aggregator: Aggregator) -> np.ndarray:
        """See `local_training.Engine`."""
        weights = self._federation.settings.weights(self._federation.interactions.sizes[clients])
        return np.array(
            [self._client(int(c), float(w), round, aggregator) for c, w in zip(clients, weights, strict=True)]
        )

    def _client(self, client: int, weight: float, round: int, aggregator: Aggregator) -> float:
        stage = "loading"
        try:
            federation = self._federation
            settings = federation.settings.of_round(round)
            ids = torch.tensor([client], device=federation.interactions.device)
            model = copy.deepcopy(federation.model)
            local = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in federation.store.read(ids).items():
                    local[name].copy_(value[0])
            positives = federation.interactions.padded(ids)

            stage = "sampling"
            negatives = reference.sample_negatives(
                positives,
                ids,
                *federation.interactions.positives,
                federation.interactions.num_items,
                settings.epochs,
                settings.seed,
                round,
            )
            optimizer = _optimizer(local, settings)
            drift = self._drift(ids)
            losses = []
            for step in local_steps(positives, ids, settings, round):
                at = f"step {int(step.numbers[0])}, epoch {step.epoch}"
                stage = f"forward ({at})"
                chosen = slice(None) if step.positions is None else step.positions[0]
                context = ClientContext(ids[0], Items(positives[0], None), settings.seed, round, step.epoch)
                with PlainOps():
                    loss = self._loss(model, positives[0, chosen], negatives[0, step.epoch, chosen], context)
                stage = f"backward ({at})"
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                stage = f"optimizer ({at})"
                self._pull_back(local)
                self._penalise(local)
                for name, (common, own) in drift.items():
                    gradient = local[name].grad
                    correction = (common - own)[0]
                    local[name].grad = correction if gradient is None else gradient + correction
                optimizer.step()
                losses.append(float(loss.detach()))

            stage = "upload"
            start = dict(federation.model.named_parameters())
            uploaded = (*self._roles.rows, *self._roles.small)
            updates = {name: (local[name] - start[name]).detach()[None] for name in uploaded}
            weights = torch.tensor([weight], dtype=torch.float64, device=ids.device)
            if federation.variates is not None:
                before = {name: own for name, (_, own) in drift.items()}
                length = len(losses) * settings.lr
                after = {name: own - common - updates[name] / length for name, (common, own) in drift.items()}
                federation.variates.write(ids, None, before, after, weights)
            accepted = aggregator.add(updates, weights, clients=ids)
            state = {name: local[name].detach()[None] for name in self._roles.local}
            federation.store.write(ids, state, accepted)
            return float(np.mean(losses))
        except Exception as error:
            interactions = self._federation.interactions
            who = f"client {client} (user {interactions.user_ids[client]!r}, "
            raise ClientError(
                f"{who}{int(interactions.sizes[client])} training items), round {round}, {stage}: {error}"
            ) from error

    def _drift(self, client: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """SCAFFOLD's c and c_i of a client [1], {name: both [1, ...]}, whole tables; empty without it."""
        variates = self._federation.variates
        if variates is None:
            return {}
        common, own = variates.common(client, None), variates.own(client, None)
        return {name: (common[name], own[name]) for name in common}

    def _loss(self, model: Backbone, positives: Tensor, negatives: Tensor, context: ClientContext) -> Tensor:
        scores = model(torch.stack([positives, negatives], 1).flatten(), context)
        positive, negative = scores[::2], scores[1::2]
        if self._federation.settings.loss == "bpr":
            return -F.logsigmoid(positive - negative).mean()
        return (F.softplus(-positive) + F.softplus(negative)).mean() / 2

    @torch.no_grad()
    def _pull_back(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Add FedProx's mu (w - w_global) to the gradients of the averaged parameters."""
        if self._federation.settings.prox_mu > 0.0:
            start = dict(self._federation.model.named_parameters())
            for name in (*self._roles.rows, *self._roles.small):
                distance = parameters[name] - start[name]
                gradient = parameters[name].grad
                if gradient is not None:
                    gradient.add_(self._federation.settings.prox_mu * distance)

    @torch.no_grad()
    def _penalise(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Add l2 * parameter to the gradient of every row that has one: L2 on touched embeddings alone."""
        for name in self._roles.l2:
            gradient = parameters[name].grad
            if gradient is not None:
                touched = (gradient != 0).any(-1, keepdim=True)
                gradient.add_(self._federation.settings.l2 * parameters[name] * touched)


def _optimizer(parameters: dict[str, torch.nn.Parameter], settings: LocalSettings) -> torch.optim.Optimizer:
    trained = [p for p in parameters.values() if p.requires_grad]
    if settings.optimizer == "adam":
        return torch.optim.Adam(trained, settings.lr, betas=ADAM_BETAS, eps=ADAM_EPS)
    return torch.optim.SGD(trained, settings.lr, momentum=settings.momentum)


class PlainOps(TorchFunctionMode):
    """Within it, a model's calls of the compiled ops are answered by their plain-PyTorch twins."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not (isinstance(func, torch._ops.OpOverload) and func.namespace == "fedpeft_ext"):
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "hash_lookup":  # the op takes the tensors of SENetWeights one by one
            items, table, hashes, *senet, mean, base = args
            weights = None if senet[0] is None else SENetWeights(*senet)
            return reference.hash_lookup(items, table, hashes, weights, "mean" if mean else "sum", base)
        return getattr(reference, name)(*args, **(kwargs or {}))
