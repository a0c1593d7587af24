"""The files that server and nodes start from: settings and pre-trained tensors for the server, and for each
node the interactions of its own users alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from torch import Tensor

from fedpeft_ext.config import Config, FaultsConfig, load_config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation.setup import needs_pretrained, prepare_items

CONFIG, SERVER, ITEMS = "config.yaml", "server.safetensors", "items.csv"
_USER_IDS = "user_ids"

_Folder = str | Path


def node_file(folder: _Folder, node: int) -> Path:
    """Where `prepare` puts the users of a node."""
    return Path(folder) / f"node-{node:05d}.safetensors"


def prepare(
    config: Config, dataset: Dataset, folder: _Folder, num_nodes: int, *, pretrained: Pretrained | None = None
) -> None:
    """Write config.yaml and server.safetensors for the server, node-00000.safetensors, ... for the nodes, and
    items.csv, the list of items, for whoever shows them.

    User u goes to node u mod `num_nodes`. The server's files hold no interactions.

    Args:
        config: settings of the federation.
        dataset: interactions of all users, as they are known in an experiment. On real devices each writes
            its own file (see `write_node`).
        folder: made if it is not there; files in it are replaced.
        num_nodes: 1 to the number of users.
        pretrained: what `pretrain` gives; None prepares what the embedding needs.

    Raises:
        ValueError: the settings are for a simulation alone (`check_supported`).
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
    folder.mkdir(parents=True, exist_ok=True)
    if pretrained is None and needs_pretrained(config.embedding.name):
        pretrained = prepare_items(config, dataset)
    tensors: dict[str, Tensor] = {"num_items": torch.tensor([dataset.num_items], device="cpu")}
    if pretrained is not None:
        tensors |= {name: value.contiguous() for name, value in pretrained.tensors().items()}
    save_file(tensors, folder / SERVER)
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    write_items(dataset, folder / ITEMS)
    for node in range(num_nodes):
        write_node(dataset, np.arange(node, dataset.num_users, num_nodes), node_file(folder, node))


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


def write_items(dataset: Dataset, path: str | Path) -> None:
    """Write the external ids of all items, by number, and their text, if there is some, as CSV."""
    columns = {"item": [*dataset.item_ids]}
    if dataset.item_text is not None:
        columns["text"] = [*dataset.item_text]
    pl.DataFrame(columns).write_csv(path)


def read_items(path: str | Path, num_items: int) -> tuple[list[str], list[str] | None]:
    """External ids and text, or None, of all items, by number: columns `item` and `text` of a CSV file.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no such list, or of another number of items.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"items: expected a list of items, found none at {path}")
    try:
        frame = pl.read_csv(path, infer_schema=False).fill_null("")
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"items: {path}: expected CSV: {error}") from error
    if "item" not in frame.columns or len(frame) != num_items:
        raise ValueError(
            f"items: {path}: expected {num_items} rows with a column 'item', got {len(frame)} with "
            f"{', '.join(frame.columns)}"
        )
    return frame["item"].to_list(), frame["text"].to_list() if "text" in frame.columns else None


def read_user_ids(path: str | Path, users: np.ndarray) -> list[str]:
    """External ids of a node's `users`; their numbers, where its file does not tell.

    Raises:
        ValueError: as many are not in the file.
    """
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_USER_IDS)
    ids: list[str] = [str(user) for user in users.tolist()] if text is None else json.loads(text)
    if len(ids) != len(users):
        raise ValueError(f"{path}: expected the ids of {len(users)} users, got {len(ids)}")
    return ids


def read_node(path: str | Path) -> tuple[Dataset, np.ndarray]:
    """The data of a node: a data set of all users in which all but the node's own have no interactions, so
    that users keep their numbers, and the node's users, int64 ascending.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file that `write_node` wrote.
    """
    arrays = {name: tensor.numpy() for name, tensor in _read(path).items()}
    try:
        (num_users, num_items), users = (int(n) for n in arrays["sizes"]), arrays["users"]
        if users.ndim != 1 or (len(users) and not 0 <= users.min() <= users.max() < num_users):
            raise ValueError(f"users: expected numbers below {num_users}")
        if (np.diff(users) <= 0).any():
            raise ValueError("users: expected them ascending, each once")
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
            user_ids=[""] * num_users,
            item_ids=[""] * num_items,
        )
    except KeyError as error:
        raise ValueError(f"{path}: expected a node's file, but it has no {error.args[0]!r}") from None
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return dataset, users


def read_server(folder: _Folder) -> tuple[Config, int, Pretrained | None]:
    """Settings, number of items and pre-trained tensors that `prepare` wrote.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it is not what `prepare` writes.
    """
    folder = Path(folder)
    config, tensors = load_config(folder / CONFIG), _read(folder / SERVER)
    if "num_items" not in tensors or tensors["num_items"].shape != (1,):
        raise ValueError(f"{folder / SERVER}: expected a server's file, but it has no 'num_items'")
    pretrained = Pretrained.from_tensors(tensors) if "full" in tensors else None
    return config, int(tensors["num_items"]), pretrained


def _read(path: str | Path) -> dict[str, Tensor]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a file that fedpeft_ext.flower.prepare wrote, found none at {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
