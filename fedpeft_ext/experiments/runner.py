"""Runs one after the other: `compare` and the studies. What was trained before is read, not trained again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.experiments.results import RunResult
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Callback, Simulator, traffic
from fedpeft_ext.simulation.checkpoint import has_checkpoint
from fedpeft_ext.simulation.files import replace_text
from fedpeft_ext.simulation.output import CONFIG, SUMMARY
from fedpeft_ext.simulation.setup import build_model, has_codes, needs_pretrained, prepare_items

DIVERGED = "diverged.json"
"""Beside config.yaml in the folder of a run whose training ended in NaN or infinity."""

# Settings that change no result.
_NEUTRAL = ("threads", "chunk_memory_mb", "dataset", "checkpoint", "log")
_NEUTRAL_OF_PRETRAIN = ("cache", "cache_dir")


@dataclass
class Server:
    """Full embeddings and codes of one data set, prepared once for all runs that share them.

    Args:
        dataset: the items.
        configs: all runs that are to come: what some of them need is then prepared together.
    """

    dataset: Dataset
    configs: Sequence[Config] = ()
    _prepared: dict[str, Pretrained] = field(default_factory=dict)

    def pretrained(self, config: Config) -> Pretrained | None:
        """What the embedding of `config` needs, or None where that is nothing."""
        if not needs_pretrained(config.embedding.name):
            return None
        embedding = config.embedding
        coded = has_codes(embedding.name)
        if not coded:  # codes change no full embedding: let those be prepared that a run with codes needs
            others = (other for other in self.configs if has_codes(other.embedding.name))
            shared = next((other for other in others if _same_items(other, config)), None)
            if shared is not None:
                return self.pretrained(shared)
        shape = [embedding.levels, embedding.codebook_size] if coded else None
        key = json.dumps([_items_of(config), shape])
        if key not in self._prepared:
            self._prepared[key] = prepare_items(config, self.dataset)
        return self._prepared[key]


def _items_of(config: Config) -> list[Any]:
    return [config.pretrain.model_dump(mode="json"), config.backbone.dim, config.seed]


def _same_items(one: Config, other: Config) -> bool:
    return _items_of(one) == _items_of(other)


def run_all(
    configs: Sequence[Config],
    dataset: Dataset,
    place: Callable[[Config], Path | None],
    *,
    reuse: bool,
    for_later: bool = True,
    callbacks_for: Callable[[Config], Sequence[Callback]] = lambda config: (),
) -> Iterator[RunResult | FloatingPointError]:
    """Train each configuration; yields its result as soon as it is there, or the error of training that
    ended in NaN or infinity.

    Args:
        configs: of the runs.
        dataset: of all of them.
        place: the folder of a run, or None for none.
        reuse: whether a run that is in its folder is read instead of trained if it has been to its end, and
            gone on with if it was interrupted. Otherwise it is replaced.
        for_later: keep the encoder of new items in each folder, some megabytes.
        callbacks_for: observers of a run that is trained.
    """
    server = Server(dataset, configs)
    full_bytes: dict[str, int] = {}
    for config in configs:
        folder = place(config)
        if reuse and folder is not None and (folder / DIVERGED).is_file():
            yield FloatingPointError(json.loads((folder / DIVERGED).read_text(encoding="utf-8"))["reason"])
            continue
        key = json.dumps([config.backbone.model_dump(mode="json"), config.dtype])
        if key not in full_bytes:
            full_bytes[key] = bytes_of_full(config, dataset)
        if reuse and folder is not None and (folder / SUMMARY).is_file():
            yield RunResult.load(folder, full_bytes[key])
            continue
        if reuse and folder is not None and has_checkpoint(folder) is not None:
            simulator = Simulator.resume(folder, dataset, callbacks=callbacks_for(config))
        else:
            pretrained = server.pretrained(config)
            if pretrained is not None and not for_later:
                pretrained = replace(pretrained, encoder=None)
            simulator = Simulator(
                config,
                dataset,
                pretrained=pretrained,
                callbacks=callbacks_for(config),
                out=folder,
                overwrite=True,
            )
            if folder is not None:
                (folder / DIVERGED).unlink(missing_ok=True)
        try:
            summary = simulator.run()
        except FloatingPointError as error:
            if folder is not None:
                mark_diverged(folder, error)
            yield error
        else:
            yield RunResult(summary, full_bytes[key], folder)


def bytes_of_full(config: Config, dataset: Dataset) -> int:
    """Down and up together of one client and round that trains and sends the full embedding."""
    each_way = traffic(build_model(config.updated(["embedding.name=full"]), dataset.num_items))
    return each_way.down + each_way.up


def run_name(config: Config, data: str) -> str:
    """A folder's name for a run: what it is, for people, and a digest of all that its result depends on.

    Args:
        data: the `fingerprint` of the data set.
    """
    from fedpeft_ext import __version__

    values = [__version__, data, result_settings(config)]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{config.backbone.name}-{config.embedding.name}-seed{config.seed}-{digest[:12]}"


def refuse_start(config: Config) -> None:
    """Raise ValueError where runs that are to begin alike would go on from another."""
    if config.start_from is not None:
        raise ValueError(
            "start_from: expected none here, where runs of several settings begin alike, got "
            f"{config.start_from!r}; fedpeft run goes on from a run"
        )


def result_settings(config: Config) -> dict[str, Any]:
    """Settings that change results, as JSON values; a file of features is told by its SHA-256."""
    values = config.model_dump(mode="json")
    for name in _NEUTRAL:
        del values[name]
    for name in _NEUTRAL_OF_PRETRAIN:
        del values["pretrain"][name]
    features = Path(config.pretrain.features)
    if features.suffix and features.is_file():
        values["pretrain"]["features"] = hashlib.sha256(features.read_bytes()).hexdigest()
    return values


def fingerprint(dataset: Dataset) -> str:
    """A digest of interactions, held-out items and texts."""
    texts = None if dataset.item_text is None else list(dataset.item_text)
    return hashlib.sha256(json.dumps([dataset.digest, texts]).encode()).hexdigest()


def mark_diverged(folder: Path, error: FloatingPointError) -> None:
    """Tell in a run's folder that its training ended in NaN or infinity."""
    replace_text(folder / DIVERGED, json.dumps({"reason": str(error)}) + "\n")


def is_done(folder: Path) -> bool:
    """Whether a run has been to its end in `folder`, in a result or in NaN."""
    return (folder / CONFIG).is_file() and ((folder / SUMMARY).is_file() or (folder / DIVERGED).is_file())
