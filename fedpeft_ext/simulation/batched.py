"""The batched engine: many clients at once, each with its own parameters stacked along a leading dimension.

The clients of a round are cut into chunks of near-equal length. For a chunk, the negatives of all epochs are
drawn first, so that the rows of item tables that each client will touch are known: it gets a copy of those
alone, and of the small parameters. This is exact for a fresh per-client optimizer, for which an untouched row
has no gradient and does not move. The model runs under `torch.func.vmap`; everything whose order of summation
could depend on padding goes through ops that do not, so results are the same bits however the round is cut
and however many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext import ops
from fedpeft_ext.backbones import Backbone, ClientContext, stacked_dims
from fedpeft_ext.nn.items import Items
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.client_batch import plan_chunks
from fedpeft_ext.simulation.local_training import (
    ADAM_BETAS,
    ADAM_EPS,
    Federation,
    LocalSettings,
    ParameterRoles,
    local_steps,
    train_in_chunks,
)
from fedpeft_ext.simulation.scaffold import ControlVariates

CHUNK_OVERHEAD = 6_000
"""Fixed cost of a chunk in padded positions: kernels skip padding, so a position costs little beside a
dispatch.
"""

_Parameters = dict[str, Tensor]
_Forward = Callable[[_Parameters, Items, ClientContext], Tensor]


class BatchedEngine:
    """Trains chunks of clients together.

    Args:
        federation: what to train.
        chunk_bytes: working memory that a chunk may take (a single client may exceed it).
    """

    def __init__(self, federation: Federation, chunk_bytes: float) -> None:
        self._federation = federation
        self._roles = ParameterRoles.of(federation.model)
        self._global = {name: p.detach() for name, p in federation.model.named_parameters()}
        self._forward = _stacked_forward(federation.model, bool(self._roles.rows))
        self._loss = {"bpr": ops.bpr_loss, "bce": ops.bce_loss}[federation.settings.loss]
        self._chunk_bytes = chunk_bytes
        self._position_bytes, self._client_bytes = self._memory()

    def train(self, clients: np.ndarray, round: int, aggregator: Aggregator) -> np.ndarray:
        """See `local_training.Engine`."""
        sizes = self._federation.interactions.sizes[clients]
        chunks = plan_chunks(
            sizes,
            overhead=CHUNK_OVERHEAD,
            position_bytes=self._position_bytes,
            client_bytes=self._client_bytes,
            max_bytes=self._chunk_bytes,
        )
        weights = self._federation.settings.weights(sizes)
        return train_in_chunks(
            clients, weights, chunks, round, lambda ids, w: self._train_chunk(ids, w, round, aggregator)
        )

    def _memory(self) -> tuple[int, int]:
        """Bytes of a padded position and of a client that training takes."""
        draws = 1 + self._federation.settings.epochs
        element = self._federation.model.item_dtype.itemsize
        copies = 5 * element  # value, start, gradient and two moments of each parameter
        widths = sum(self._global[name].shape[1:].numel() for name in self._roles.rows)
        # Vectors of a positive and a negative, their gradients and temporaries.
        model = self._federation.model
        vectors = (8 * model.dim + 6 * model.scoring_width) * element
        position = draws * (widths * copies + 3 * 8) + vectors
        own = (*self._roles.small, *self._roles.local)
        return position, copies * sum(self._global[name].numel() for name in own)

    def _train_chunk(
        self, clients: np.ndarray, weights: np.ndarray, round: int, aggregator: Aggregator
    ) -> np.ndarray:
        interactions, settings = self._federation.interactions, self._federation.settings.of_round(round)
        variates = self._federation.variates
        ids = torch.from_numpy(clients).to(interactions.device)
        positives = interactions.padded(ids)
        negatives = ops.sample_negatives(
            positives,
            ids,
            *interactions.positives,
            interactions.num_items,
            settings.epochs,
            settings.seed,
            round,
        )
        rows = positions = None
        if self._roles.rows:
            every = torch.cat([positives[:, None], negatives], 1)  # [C, 1 + epochs, P]
            moving = every.flatten(1)
            if variates is not None:
                moving = torch.cat([moving, variates.rows(ids)], 1)
            rows, positions = ops.touched_rows(moving)
            positions = positions[:, : every[0].numel()].reshape(every.shape)

        start = self._start(ids, rows)
        drift = None if variates is None else _DriftCorrection(variates, ids, rows, settings.l2, self._roles)
        local = {name: value.clone(memory_format=torch.contiguous_format) for name, value in start.items()}
        # Leaves share the storage that the optimizer writes to.
        leaves = {name: value.detach().requires_grad_() for name, value in local.items()}
        penalised = self._roles.l2 if drift is None else self._roles.l2 - drift.names
        optimizer = _StackedOptimizer(local, penalised, settings)
        losses, numbers = [], []
        history = Items(positives, None if positions is None else positions[:, 0])
        for step in local_steps(positives, ids, settings, round):
            batch = Items(positives, None if positions is None else positions[:, 0])
            drawn = Items(
                negatives[:, step.epoch], None if positions is None else positions[:, 1 + step.epoch]
            )
            if step.positions is not None:
                batch, drawn = _gather(batch, step.positions), _gather(drawn, step.positions)
            context = ClientContext(ids, history, settings.seed, round, step.epoch)
            scores = self._forward(leaves, _interleaved(batch, drawn), context)
            loss = self._loss(scores[:, ::2], scores[:, 1::2], batch.ids)
            gradients = torch.autograd.grad(  # zero for a parameter that the scores do not depend on
                loss, list(leaves.values()), torch.ones_like(loss), materialize_grads=True
            )
            moved = dict(zip(leaves, gradients, strict=True))
            if settings.prox_mu > 0.0:
                # Clients that sit the step out stay as they are.
                active = step.numbers > 0
                for name in (*self._roles.rows, *self._roles.small):
                    distance = local[name] - start[name]
                    moved[name] = moved[name] + settings.prox_mu * _like(active, distance) * distance
            if drift is not None:
                moved |= drift.corrected(moved, local, step.numbers)
            optimizer.step(moved, step.numbers)
            losses.append(loss.detach())
            numbers.append(step.numbers)

        uploads = {name: local[name] - start[name] for name in (*self._roles.rows, *self._roles.small)}
        # Steps that a client sat out have loss 0 and do not count.
        taken = (torch.stack(numbers) > 0).sum(0).clamp(min=1)
        weight = torch.from_numpy(weights).to(ids.device)
        if drift is not None:
            uploads |= drift.finish(uploads, weight, taken, settings.lr)
        accepted = aggregator.add(uploads, weight, rows, ids)
        state = {name: local[name] for name in self._roles.local}
        self._federation.store.write(ids, state, accepted)
        return (torch.stack(losses).double().sum(0) / taken).cpu().numpy()

    def _start(self, clients: Tensor, rows: Tensor | None) -> _Parameters:
        """Each client's parameters at the start, [C, ...] or [C, R, W]; small ones are views of the global
        ones.
        """
        start = self._federation.store.read(clients)
        for name in self._roles.small:
            start[name] = self._global[name].expand(len(clients), *self._global[name].shape)
        for name in self._roles.rows:
            assert rows is not None
            start[name] = ops.client_embedding(rows, self._global[name])
        return start


def _stacked_forward(model: Backbone, with_rows: bool) -> _Forward:
    """The backbone for C clients: parameters [C, ...], items [C, P] -> scores [C, P]."""

    def run(parameters: _Parameters, items: Items, context: ClientContext) -> Tensor:
        scores: Tensor = torch.func.functional_call(model, parameters, (items, context))
        return scores

    if model.takes_stacked and model.item_embedding.takes_stacked:
        return run
    stacked: _Forward = torch.func.vmap(run, in_dims=(0, *stacked_dims(with_rows)))
    return stacked


class _DriftCorrection:
    """SCAFFOLD in the local training of C clients.

    It adds L2 itself, which acts on rows with a gradient, before the correction gives every row one.
    """

    def __init__(
        self,
        variates: ControlVariates,
        clients: Tensor,
        rows: Tensor | None,
        l2: float,
        roles: ParameterRoles,
    ) -> None:
        self.names = frozenset((*roles.rows, *roles.small))
        self._variates, self._clients, self._rows, self._roles = variates, clients, rows, roles
        self._l2 = {name: l2 if name in roles.l2 else 0.0 for name in self.names}
        self._own = variates.own(clients, rows)
        self._common = variates.common(clients, rows)
        self._correction = {name: self._common[name] - self._own[name] for name in self.names}
        self._sums = {name: torch.zeros_like(value) for name, value in self._own.items()}

    def corrected(self, gradients: _Parameters, parameters: _Parameters, numbers: Tensor) -> _Parameters:
        """g + l2 w + c - c_i of the averaged parameters; zero for clients that sit the step out."""
        result = {}
        for name in self.names:
            gradient = gradients[name]
            if self._l2[name] > 0.0:
                touched = (gradient != 0).any(-1, keepdim=True)
                gradient = gradient + self._l2[name] * parameters[name] * touched
            self._sums[name] += gradient
            active = (numbers > 0).view(-1, *[1] * (gradient.dim() - 1))
            result[name] = torch.where(active, gradient + self._correction[name], 0.0)
        return result

    def finish(self, uploads: _Parameters, weights: Tensor, taken: Tensor, lr: float) -> _Parameters:
        """Keep the clients' new c_i, the mean of their `taken` [C] gradients; the tables' uploads without the
        part that all rows have in common."""
        lengths = lr * taken.double()
        after = {name: total / _like(taken, total) for name, total in self._sums.items()}
        left_out = lengths if self._roles.rows else None
        self._variates.write(self._clients, self._rows, self._own, after, weights, left_out)
        return {
            name: uploads[name] + _like(lengths, uploads[name]) * self._common[name]
            for name in self._roles.rows
        }


def _like(values: Tensor, other: Tensor) -> Tensor:
    """[C] in the dtype of `other` [C, ...] and with as many dimensions."""
    return values.to(other.dtype).view(-1, *[1] * (other.dim() - 1))


class _StackedOptimizer:
    """A fresh Adam or SGD for each of C clients, over stacked parameters that it changes in place."""

    def __init__(
        self, parameters: _Parameters, l2_parameters: frozenset[str], settings: LocalSettings
    ) -> None:
        self._parameters = parameters
        self._settings = settings
        self._l2 = {name: settings.l2 if name in l2_parameters else 0.0 for name in parameters}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._momentum = {}
        if settings.momentum > 0.0:
            self._momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
        if settings.optimizer == "adam":
            self._moments = {
                name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()
            }

    def step(self, gradients: _Parameters, numbers: Tensor) -> None:
        """One step with gradients [C, ...]; `numbers` [C] is each client's 1-based step, 0 for none."""
        lr = self._settings.lr
        for name, parameter in self._parameters.items():
            if self._settings.optimizer == "adam":
                first, second = self._moments[name]
                ops.client_adam_(
                    parameter,
                    gradients[name],
                    first,
                    second,
                    numbers,
                    lr,
                    *ADAM_BETAS,
                    ADAM_EPS,
                    self._l2[name],
                )
            elif not self._momentum:  # a client that sits a step out has no gradient and stays as it is
                ops.client_sgd_(parameter, gradients[name], None, lr, 0.0, self._l2[name])
            else:  # but momentum would carry it on
                self._step_of(numbers > 0, parameter, gradients[name], self._momentum[name], self._l2[name])

    def _step_of(
        self, active: Tensor, parameter: Tensor, gradient: Tensor, buffer: Tensor, l2: float
    ) -> None:
        lr, momentum = self._settings.lr, self._settings.momentum
        if bool(active.all()):
            ops.client_sgd_(parameter, gradient, buffer, lr, momentum, l2)
            return
        part, velocity = parameter[active], buffer[active]
        ops.client_sgd_(part, gradient[active], velocity, lr, momentum, l2)
        parameter[active], buffer[active] = part, velocity


def _gather(items: Items, positions: Tensor) -> Items:
    rows = None if items.rows is None else items.rows.gather(1, positions)
    return Items(items.ids.gather(1, positions), rows)


def _interleaved(positives: Items, negatives: Items) -> Items:
    """positive 0, negative 0, positive 1, ...: [C, 2 B]. See `local_training` for why this order."""
    rows = None
    if positives.rows is not None and negatives.rows is not None:
        rows = torch.stack([positives.rows, negatives.rows], 2).flatten(1)
    return Items(torch.stack([positives.ids, negatives.ids], 2).flatten(1), rows)
