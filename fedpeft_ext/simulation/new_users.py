"""Users who come after the training: each trains its own state with the shared parameters as they are.

It is the client's part of a round, whose upload stays where it was made. So it costs no privacy and no
traffic, and what users get does not depend on who else comes, but for the draws of their numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from fedpeft_ext.data import Dataset
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.client_batch import ClientStore, Interactions, initial_states
from fedpeft_ext.simulation.communication import message
from fedpeft_ext.simulation.local_training import Federation, ParameterRoles, first_not_finite
from fedpeft_ext.simulation.schedule import CONSTANT
from fedpeft_ext.simulation.serving import TrainedRun, TrainedServer
from fedpeft_ext.simulation.setup import (
    can_train,
    clients_per_round,
    eligible_clients,
    local_settings,
    make_engine,
    warmup_rounds,
)


def train_new_users(
    server: TrainedServer, users: Dataset | Mapping[str, Iterable[int | str]], rounds: int | None
) -> TrainedRun:
    """See `TrainedServer.with_new_users`."""
    if rounds is None:
        rounds = _usual_rounds(server)
    elif isinstance(rounds, bool) or operator.index(rounds) < 0:
        raise ValueError(f"rounds: expected at least 0, got {rounds}")
    dataset = (
        users.with_catalogue(server.catalogue) if isinstance(users, Dataset) else _dataset(server, users)
    )
    config, model = server.config, server.model
    missing = set(model.averaged_start) - server.starts.keys()
    if missing:
        raise ValueError(
            f"run: its files do not hold what new users start from ({min(missing)}), which an older version "
            "left out; train the run again"
        )
    device = next(model.parameters()).device
    interactions = Interactions(dataset, device)
    count = dataset.num_users
    everyone = torch.arange(count, device=device)
    store = ClientStore(
        initial_states(model, everyone, count, config.seed, config.backbone.init_std),
        server.starts,
        count,
    )
    settings = local_settings(config, model, warmup=server.round < warmup_rounds(config))
    # They start where the run's users did in its first rounds, and no shared parameter is left to settle.
    settings = dataclasses.replace(settings, schedule=CONSTANT)
    _, engine = make_engine(config, Federation(model, store, interactions, settings))
    able = np.flatnonzero(can_train(interactions.sizes, dataset.num_items)).astype(np.int64)
    clients = interactions.by_size(able)
    weight = float(settings.weights(interactions.sizes[clients]).sum())
    uploads = Aggregator(message(model), frozenset(ParameterRoles.of(model).rows))
    for number in range(server.round + 1, server.round + 1 + (rounds if len(clients) else 0)):
        uploads.begin(number, weight=weight)
        first_not_finite(engine.train(clients, number, uploads), clients, number)
        uploads.discard()
        store.commit(average=False)
    return TrainedRun(config, dataset, model, store, server.round, server.encoder)


def _usual_rounds(run: TrainedServer) -> int:
    """How often a user of the run trained on average, at least once."""
    eligible = len(eligible_clients(run.catalogue))
    share = clients_per_round(run.config.training.clients_per_round, eligible) / eligible
    return max(1, round(run.round * share))


def _dataset(run: TrainedServer, users: Mapping[str, Iterable[int | str]]) -> Dataset:
    """A data set of users with these items to train on, each once, over the run's catalogue."""
    if not users:
        raise ValueError("users: expected at least one, got none")
    known = run.catalogue
    number = {item: place for place, item in enumerate(known.item_ids)}

    def found(item: int | str) -> int:
        if not isinstance(item, str):
            place = operator.index(item)
            if not 0 <= place < known.num_items:
                raise IndexError(f"users: expected items 0 to {known.num_items - 1}, got {place}")
            return place
        if item not in number:
            near = difflib.get_close_matches(item, number, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; ids are such as {known.item_ids[0]!r}"
            raise ValueError(f"users: data set {known.name!r} has no item with the id {item!r}{hint}")
        return number[item]

    rows = [list(dict.fromkeys(map(found, items))) for items in users.values()]
    return Dataset(
        name=f"new users of {known.name}",
        num_users=len(rows),
        num_items=known.num_items,
        indptr=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        indices=np.array([item for row in rows for item in row], dtype=np.int64),
        test_items=np.full(len(rows), -1, np.int64),
        valid_items=np.full(len(rows), -1, np.int64),
        user_ids=list(users),
        item_ids=known.item_ids,
        item_text=known.item_text,
    )
