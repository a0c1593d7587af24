"""The users of a node, with the server's trained model and their own state, on the node itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fedpeft_ext.flower.files import read_node
from fedpeft_ext.flower.state import NodeFolder, client_store
from fedpeft_ext.simulation.numbering import ITEMS, read_ids
from fedpeft_ext.simulation.serving import TrainedRun, load_server


def load_node(
    folder: str | Path,
    data: str | Path,
    state: str | Path,
    *,
    item_text: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> TrainedRun:
    """The users of a node, to recommend to. Nothing is written, and nothing leaves the machine.

    Users and items have their numbers in the federation. A user who has not trained is scored with the state
    that such a client starts from; of others than the node's nothing is known.

    Args:
        folder: the server's, or a copy of it: config.yaml, summary.json, model.safetensors, and
            items.parquet, without which items are called by their numbers.
        data: the node's file, as in the SuperNode's configuration.
        state: the node's folder, as there.
        item_text: by external id.
        device: to put the model and the users' state on.

    Raises:
        FileNotFoundError: a file is missing, or the node has no state of this run. ValueError: a file is
            damaged, or files do not belong together.
    """
    dataset, users = read_node(data)
    names = [str(item) for item in range(dataset.num_items)]
    if (listed := Path(folder) / ITEMS).is_file():
        names = read_ids(listed).to_list()
        if len(names) != dataset.num_items:
            raise ValueError(f"{listed}: expected {dataset.num_items} items, as in {data}, got {len(names)}")
    text = None if item_text is None else [item_text.get(name, "") for name in names]
    dataset = replace(dataset, item_ids=names, item_text=text)
    server = load_server(folder, dataset, device=device)
    if not server.run:
        raise ValueError(f"run: expected the folder of a Flower server, but {folder} is of a simulation")
    kept = NodeFolder(state, {user: dataset.user_ids[user] for user in users.tolist()})
    if server.run not in (known := kept.runs()):
        raise FileNotFoundError(
            f"state: expected {server.run}.safetensors in {state}, the users' state of the run in {folder}, "
            f"found {', '.join(known) or 'none of any run'}"
        )
    mine = torch.from_numpy(users)
    own = kept.load(server.run)
    store = client_store(server.config, server.model, mine, dataset.num_users, server.starts, own)
    return TrainedRun(server.config, dataset, server.model, store, server.round, server.encoder)
