"""A catalogue that grows: a trained model with items that arrived later, and a run that goes on from one.

Items are known by external id and keep their numbers, by which hash functions go, whether the data still have
them or not; others follow. Rows of full embeddings and codes come from the frozen encoder of pre-training,
rows of the compressed part from `ItemEmbedding.new_rows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.data.dataset import numbers_of
from fedpeft_ext.nn import FullEmbedding, ItemEmbedding
from fedpeft_ext.pretrain import ItemEncoder, Pretrained, SentenceEncoder, load_features
from fedpeft_ext.simulation.client_batch import ClientStore
from fedpeft_ext.simulation.communication import shared_state
from fedpeft_ext.simulation.output import flat
from fedpeft_ext.simulation.serving import TrainedServer
from fedpeft_ext.simulation.setup import build_model, needs_pretrained, warmup_rounds

Encoded = tuple[Tensor, Tensor | None]
"""Full embeddings [N, D] of new items, and codes [N, L] where there are some."""

METHODS, FILE = ("tfidf", "sentence-transformers", "random"), "a features file"

FREE = ("backbone.init_std", "backbone.dropout", "embedding.init_std", "embedding.warm_start_codebooks")
"""Settings of the model that a run may have other values of than the one it starts from."""


def grown_dataset(config: Config, start: TrainedServer, dataset: Dataset) -> Dataset:
    """`dataset` with items numbered on from those of `start`, for a run with these settings.

    Raises:
        ValueError: a setting that does not go with the run to start from, a data set without any of its
            items, or new items and nothing to encode them by.
    """
    _check_settings(config, start)
    known = start.catalogue.item_ids
    new = numbers_of(dataset.item_ids, known) < 0
    if new.all():
        raise ValueError(
            f"dataset: expected items of the run to start from, such as {known[0]!r}, got {dataset.name!r}, "
            f"which has none of its {len(known):,}, but such as {dataset.item_ids[0]!r}"
        )
    if needs_pretrained(config.embedding.name) and new.any():
        _check_features(config, start, dataset)
    return dataset.after_catalogue(known)


def _check_features(config: Config, start: TrainedServer, dataset: Dataset) -> None:
    """Raise ValueError where new items of `dataset` cannot be encoded as those of `start` were."""
    given, had = config.pretrain.features, _features_of(start)
    if had != (given if given in METHODS else FILE):
        raise ValueError(f"pretrain.features: expected {had}, as the run to start from had, got {given!r}")
    if had in METHODS[:2] and dataset.item_text is None:
        raise ValueError(
            f"data set {dataset.name!r}: expected item text, of which new items are encoded, got none"
        )


def _features_of(start: TrainedServer) -> str:
    """What the items of a run were encoded from: one of METHODS, or FILE.

    Raises ValueError where it has nothing to encode new ones by.
    """
    if start.encoder is None:
        if start.config.pretrain.features != "random":
            raise ValueError(
                "run: its files have no encoder of new items, as those of studies and older versions have "
                "none; train it again"
            )
        return "random"
    if start.encoder.text is None:
        return FILE
    return METHODS[isinstance(start.encoder.text, SentenceEncoder)]


def _check_settings(config: Config, start: TrainedServer) -> None:
    if start.round < (warmup := warmup_rounds(start.config)):
        raise ValueError(
            f"start_from: expected a run whose {warmup} warm-up rounds are over, got one after round "
            f"{start.round}"
        )
    now, then = (
        flat(settings.model_dump(mode="json", include={"backbone", "embedding", "dtype"}))
        for settings in (config, start.config)
    )
    for name in dict.fromkeys([*then, *now]):
        if name not in FREE and now.get(name) != then.get(name):
            raise ValueError(
                f"{name}: expected {then.get(name)!r}, as in the run to start from, got {now.get(name)!r}"
            )
    if warmup_rounds(config) > start.round:
        raise ValueError(
            f"training.warmup_rounds: expected at most {start.round}, the rounds of the run to start from, "
            f"whose warm-up is over, got {config.training.warmup_rounds}"
        )
    if config.training.rounds < start.round:
        raise ValueError(
            f"training.rounds: expected at least {start.round}, after which the run to start from ended and "
            f"from which rounds are counted on, got {config.training.rounds}"
        )


def grown_items(config: Config, start: TrainedServer, dataset: Dataset, numbered: Dataset) -> Pretrained:
    """Full embeddings and codes of the items of `numbered`, which is the `grown_dataset`, as `config` says
    where features come from.

    Raises:
        ValueError: a features file that does not fit. ImportError: the package that encodes is missing.
    """
    known = start.catalogue.num_items
    new = np.flatnonzero(numbers_of(dataset.item_ids, start.catalogue.item_ids) < 0)

    def encode(encoder: ItemEncoder) -> Encoded:
        if encoder.text is None:
            return encoder.encode(load_features(config.pretrain.features, dataset.num_items)[new])
        assert dataset.item_text is not None
        return encoder.encode([dataset.item_text[item] for item in new.tolist()])

    return _items(start, numbered.num_items - known, encode, config.seed)


def with_new_items(
    server: TrainedServer, items: Dataset | Mapping[str, str | npt.ArrayLike]
) -> TrainedServer:
    """See `TrainedServer.with_new_items`."""
    catalogue = server.catalogue
    if isinstance(items, Dataset):
        if items.item_text is None:
            raise ValueError(f"items: expected text of the items of data set {items.name!r}, got none")
        items = dict(zip(items.item_ids, items.item_text, strict=True))
    ids = list(items)
    for name in ids:
        if not isinstance(name, str) or not name:
            raise ValueError(f"items: expected external ids (str, not empty), got {name!r}")
    places = np.flatnonzero(numbers_of(ids, catalogue.item_ids) < 0).tolist()
    if not places:
        return server
    new = [ids[place] for place in places]
    values: Any = [items[name] for name in new]
    worded = all(isinstance(value, str) for value in values)
    text = None
    if catalogue.item_text is not None:
        text = [*catalogue.item_text, *(values if worded else [""] * len(new))]
    grown = catalogue.changed(
        num_items=catalogue.num_items + len(new), item_ids=[*catalogue.item_ids, *new], item_text=text
    )
    prepared = None
    if needs_pretrained(server.config.embedding.name):
        prepared = _items(server, len(new), lambda encoder: encoder.encode(values), server.config.seed)
    device = next(server.model.parameters()).device
    model = build_model(
        server.config,
        grown.num_items,
        base=None if prepared is None else prepared.full.to(device),
        codes=None if prepared is None else prepared.codes,
        codebooks=None if prepared is None else prepared.codebooks,
        warmup=server.round < warmup_rounds(server.config),
    ).to(device)
    take_over(server.model, model)
    return dataclasses.replace(server, catalogue=grown, model=model)


def _items(
    start: TrainedServer, count: int, encode: Callable[[ItemEncoder], Encoded], seed: int
) -> Pretrained:
    """What the items of `start` have by now, and after it what `count` new ones start with."""
    embedding, config = start.model.item_embedding, start.config
    known = embedding.num_embeddings
    if embedding.base is not None:
        full = embedding.base.detach().cpu()
    elif isinstance(embedding, FullEmbedding):
        full = embedding.weight.detach().cpu()
    else:  # not part of the model
        full = torch.zeros(known, embedding.embedding_dim, dtype=torch.float32, device="cpu")
    codes, books = (_named(embedding, name) for name in ("codes", "codebooks"))
    if count == 0:
        return Pretrained(full, codes, books, encoder=start.encoder)
    if start.encoder is not None:
        rows, new_codes = encode(start.encoder)
        anchors = start.encoder.anchors
        rows = aligned(start.encoder.anchor_rows, full[anchors], rows)
    else:
        _features_of(start)  # raises unless they are random
        # As little as random ones, the mean tells of the items; and it is where training has moved them.
        rows = full.mean(0).expand(count, -1)
        size = config.embedding.codebook_size
        generator = torch.Generator().manual_seed((seed + known) % 2**63)  # other codes for each arrival
        drawn = (count, 0 if codes is None else codes.shape[1])
        new_codes = torch.randint(size, drawn, generator=generator, device="cpu")
    if codes is not None:
        if new_codes is None:
            raise ValueError("run: its encoder of new items makes no codes, which its embedding needs")
        codes = torch.cat([codes, new_codes.to(codes.dtype)])
    return Pretrained(torch.cat([full, rows.to(full.dtype)]), codes, books, encoder=start.encoder)


def _named(embedding: ItemEmbedding, name: str) -> Tensor | None:
    """A tensor of the embedding or of one of its parts, on the host."""
    found = (t for key, t in embedding.state_dict().items() if key.split(".")[-1] == name)
    return next((tensor.cpu() for tensor in found), None)


def aligned(before: Tensor, trained: Tensor, new: Tensor) -> Tensor:
    """`new` [N, D] moved as training moved the old rows `before` to `trained` [I, D], by least squares.

    The federation trains full embeddings in warm-up, so that they no longer lie where the encoder puts new
    items; an affine map that the server fits to the old items takes the new ones along.
    """
    solution: Tensor = torch.linalg.lstsq(_with_ones(before), trained.double()).solution
    return (_with_ones(new) @ solution).to(new.dtype)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows.double(), rows.new_ones(len(rows), 1, dtype=torch.float64)], 1)


@torch.no_grad()
def take_over(source: Backbone, model: Backbone) -> None:
    """Give `model`, built with what `grown_items` gave, what was trained in `source`, less what is a
    client's own.

    Raises ValueError, naming it, where nothing says what new items start with in a tensor.
    """
    known, total = source.item_embedding.num_embeddings, model.item_embedding.num_embeddings
    before = source.state_dict()
    prepared = {"item_embedding.base"}
    if isinstance(model.item_embedding, FullEmbedding):
        prepared.add("item_embedding.weight")
    for name, target in shared_state(model).items():
        trained = before[name]
        if target.shape == trained.shape:
            target.copy_(trained)
            continue
        if target.shape[:1] != (total,) or trained.shape != (known, *target.shape[1:]):
            raise ValueError(
                f"{name}: expected the same shape with more items, or a row for each, got "
                f"{list(trained.shape)} and {list(target.shape)}"
            )
        target[:known] = trained
        if name not in prepared and name.split(".")[-1] != "codes":
            target[known:] = model.new_rows(name, trained, total - known)


@torch.no_grad()
def take_over_users(before: ClientStore, places: np.ndarray, store: ClientStore, owned: range) -> None:
    """Give users in `store` the state of users `places` int64 [U] of `before`, -1 for none; of those `owned`
    alone.
    """
    users = owned.start + np.flatnonzero(places[owned.start : owned.stop] >= 0)
    old, new = torch.from_numpy(places[users]), torch.from_numpy(users)
    for name, values in before.state.items():
        target = store.state[name]
        target[new.to(target.device)] = values[old.to(values.device)].to(target.device)
    if store.trained is not None and before.trained is not None:
        trained = before.trained[old.to(before.trained.device)]
        store.trained[new.to(store.trained.device)] = trained.to(store.trained.device)
