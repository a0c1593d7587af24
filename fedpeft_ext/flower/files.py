"""The files that server and nodes start from: settings and pre-trained tensors for the server, and for each
node the interactions of its own users alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor

from fedpeft_ext.config import Config, FaultsConfig, load_config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import TrainedRun, TrainedServer
from fedpeft_ext.simulation.communication import shared_state
from fedpeft_ext.simulation.files import replace_bytes
from fedpeft_ext.simulation.growth import grown_dataset, grown_items, take_over
from fedpeft_ext.simulation.numbering import ENCODER, ITEMS, read_ids, write_items
from fedpeft_ext.simulation.serving import load_start
from fedpeft_ext.simulation.setup import build_model, needs_pretrained, prepare_items
from fedpeft_ext.simulation.state import below, prefixed

CONFIG, SERVER = "config.yaml", "server.safetensors"
_USER_IDS, _RUN = "user_ids", "run"

_Folder = str | Path


def node_file(folder: _Folder, node: int) -> Path:
    """Where `prepare` puts the users of a node."""
    return Path(folder) / f"node-{node:05d}.safetensors"


def prepare(
    config: Config, dataset: Dataset, folder: _Folder, num_nodes: int, *, pretrained: Pretrained | None = None
) -> None:
    """Write config.yaml and server.safetensors for the server, and node-00000.safetensors, ... for the nodes;
    and the items' ids and encoder, which the server hands on to its folder.

    User u goes to node u mod `num_nodes`. The server's files hold no interactions.

    Args:
        config: settings of the federation.
        dataset: interactions of all users, as they are known in an experiment. On real devices each writes
            its own file (see `write_node`).
        folder: made if it is not there; files in it are replaced.
        num_nodes: 1 to the number of users.
        pretrained: what `pretrain` gives; None prepares what the embedding needs.

    With `config.start_from` the server goes on from that run, as a simulation would, but for the users' own
    state: nodes have it, if they trained in that run, else it begins anew.

    Raises:
        ValueError: the settings are for a simulation alone (`check_supported`), or do not go with the run to
            start from.
    """
    check_supported(config)
    if not 1 <= num_nodes <= dataset.num_users:
        raise ValueError(
            f"num_nodes: expected 1 to {dataset.num_users}, the number of users, got {num_nodes}"
        )
    if num_nodes < (least := config.secure_aggregation.min_nodes):
        raise ValueError(
            f"num_nodes: expected at least {least}, secure_aggregation.min_nodes, got {num_nodes}"
        )
    folder = Path(folder)
    needed, start = pretrained is None and needs_pretrained(config.embedding.name), None
    if config.start_from is not None:
        if pretrained is not None:
            raise ValueError("pretrained: expected None with start_from, which has it, got some")
        if folder.resolve() == Path(config.start_from).resolve():
            raise ValueError(f"folder: expected another one than that of start_from, got {folder}")
        found = load_start(config.start_from)
        start = found.server if isinstance(found, TrainedRun) else found
        original, dataset = dataset, grown_dataset(config, start, dataset)
        pretrained = grown_items(config, start, original, dataset) if needed else None
    elif needed:
        pretrained = prepare_items(config, dataset)
    tensors: dict[str, Tensor] = {"num_items": torch.tensor([dataset.num_items], device="cpu")}
    if start is not None:
        tensors |= _going_on(config, start, pretrained, dataset.num_items)
    if pretrained is not None:
        tensors |= pretrained.tensors()
    folder.mkdir(parents=True, exist_ok=True)
    told = {_RUN: "" if start is None else start.run}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / SERVER, told)
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    for name in (ITEMS, ENCODER):
        (folder / name).unlink(missing_ok=True)
    write_items(folder, dataset, None if pretrained is None else pretrained.encoder)
    for node in range(num_nodes):
        write_node(dataset, np.arange(node, dataset.num_users, num_nodes), node_file(folder, node))


class Start(NamedTuple):
    """What a server goes on from: rounds done, the run's name to nodes ("": none trained in it), the server's
    tensors, and what clients start from, by name.
    """

    round: int
    run: str
    server: dict[str, Tensor]
    clients: dict[str, Tensor]


def _going_on(
    config: Config, start: TrainedServer, pretrained: Pretrained | None, num_items: int
) -> dict[str, Tensor]:
    """A `Start` as tensors of the server's file."""
    prepared = {} if pretrained is None else pretrained.tensors()
    model = build_model(
        config,
        num_items,
        base=prepared.get("full"),
        codes=prepared.get("codes"),
        codebooks=prepared.get("codebooks"),
    )
    take_over(start.model, model)
    return {
        "round": torch.tensor([start.round], device="cpu"),
        **prefixed("start", shared_state(model)),
        **prefixed("starts", start.starts),
    }


def write_node(dataset: Dataset, users: np.ndarray, path: str | Path) -> None:
    """Write the interactions of `users` (int64, ascending), their external ids, and the numbers of all users
    and items.
    """
    counts = np.diff(dataset.indptr)[users]
    rows = [dataset.indices[dataset.indptr[u] : dataset.indptr[u + 1]] for u in users]
    arrays = {
        "users": users.astype(np.int64),
        "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "items": np.concatenate(rows).astype(np.int64) if rows else np.empty(0, np.int64),
        "test_items": dataset.test_items[users],
        "valid_items": dataset.valid_items[users],
        "sizes": np.array([dataset.num_users, dataset.num_items], dtype=np.int64),
    }
    ids = json.dumps([dataset.user_ids[user] for user in users.tolist()])
    save_numpy({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {_USER_IDS: ids})


def read_node(path: str | Path) -> tuple[Dataset, np.ndarray]:
    """The data of a node: a data set of all users in which all but the node's own have no interactions and no
    name, so that users keep their numbers, and the node's users, int64 ascending. They are called by their
    external ids, or by their numbers if the file does not tell.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file that `write_node` wrote.
    """
    tensors, told = _read(path)
    arrays, text = {name: tensor.numpy() for name, tensor in tensors.items()}, told.get(_USER_IDS)
    try:
        (num_users, num_items), users = (int(n) for n in arrays["sizes"]), arrays["users"]
        if users.ndim != 1 or (len(users) and not 0 <= users.min() <= users.max() < num_users):
            raise ValueError(f"users: expected numbers below {num_users}")
        if (np.diff(users) <= 0).any():
            raise ValueError("users: expected them ascending, each once")
        ids: list[str] = [str(user) for user in users.tolist()] if text is None else json.loads(text)
        if len(set(ids)) != len(users):
            raise ValueError(f"users: expected an id of each of {len(users)}, got {len(set(ids))}")
        names = [""] * num_users
        for user, name in zip(users.tolist(), ids, strict=True):
            names[user] = name
        counts, test, valid = (np.full(num_users, fill, dtype=np.int64) for fill in (0, -1, -1))
        counts[users] = np.diff(arrays["indptr"])
        test[users], valid[users] = arrays["test_items"], arrays["valid_items"]
        dataset = Dataset(
            name=Path(path).stem,
            num_users=num_users,
            num_items=num_items,
            indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            indices=arrays["items"],
            test_items=test,
            valid_items=valid,
            user_ids=names,
            item_ids=[""] * num_items,
        )
    except KeyError as error:
        raise ValueError(f"{path}: expected a node's file, but it has no {error.args[0]!r}") from None
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return dataset, users


def read_server(folder: _Folder) -> tuple[Config, int, Pretrained | None, Start | None]:
    """Settings, number of items, pre-trained tensors, and what to go on from, that `prepare` wrote.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it is not what `prepare` writes.
    """
    folder = Path(folder)
    config, (tensors, told) = load_config(folder / CONFIG), _read(folder / SERVER)
    if "num_items" not in tensors or tensors["num_items"].shape != (1,):
        raise ValueError(f"{folder / SERVER}: expected a server's file, but it has no 'num_items'")
    pretrained = Pretrained.from_tensors(tensors) if "full" in tensors else None
    start = None
    if "round" in tensors:
        start = Start(int(tensors["round"]), told[_RUN], below("start", tensors), below("starts", tensors))
    return config, int(tensors["num_items"]), pretrained, start


def check_items(prepared: _Folder, out: Path) -> None:
    """Raise ValueError where items that `prepare` wrote have other numbers than those of the run in `out`: a
    table of hashed items would not tell.
    """
    now, then = Path(prepared) / ITEMS, out / ITEMS
    if now.is_file() and then.is_file() and not read_ids(now).equals(read_ids(then)):
        raise ValueError(
            f"prepared: expected the items of the run in {out}, in their order, to go on with, got others in "
            f"{prepared}; settings with start_from={out} take on data that have grown"
        )


def copy_items(prepared: _Folder, out: Path) -> None:
    """Put the items' ids and encoder that `prepare` wrote into the folder of a run."""
    for name in (ITEMS, ENCODER):
        if (Path(prepared) / name).is_file():
            replace_bytes(out / name, (Path(prepared) / name).read_bytes())


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a file that fedpeft_ext.flower.prepare wrote, found none at {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from None


def check_supported(config: Config) -> None:
    """Raise ValueError naming the first setting that only a simulation has."""
    faults = config.faults
    simulated = FaultsConfig()
    for name, value, expected in (
        ("training.algorithm", config.training.algorithm, "fedavg"),
        ("faults.dropout_rate", faults.dropout_rate, simulated.dropout_rate),
        ("faults.corrupt_rate", faults.corrupt_rate, simulated.corrupt_rate),
        ("faults.too_few", faults.too_few, simulated.too_few),
    ):
        if value != expected:
            raise ValueError(f"{name}: expected {expected!r} with Flower, got {value!r}")
