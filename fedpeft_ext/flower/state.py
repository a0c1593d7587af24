"""What a node keeps of its users: their own state in a run, and what all their uploads have given away.

With `state` in its configuration a node keeps both in a folder, over restarts and over runs:

    <run>.safetensors   the users' own state in a run, and as it was before the last round
    privacy.json        how many uploads of each user have left, by the noise on them

Users are known there by name, as in the node's data, since their numbers may differ from run to run. Without,
in Flower's memory, as long as the SuperNode runs. Flower is not needed to read the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft_ext import __version__
from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import Config
from fedpeft_ext.simulation.checkpoint import FORMAT, read_checked, write_checked
from fedpeft_ext.simulation.client_batch import ClientStore, initial_states
from fedpeft_ext.simulation.files import replace_text
from fedpeft_ext.simulation.privacy import Mechanism
from fedpeft_ext.simulation.state import below, prefixed

PRIVACY = "privacy.json"
RUN_ID = re.compile(r"[0-9a-f]{32}")

Spent = dict[str, Counter[tuple[Mechanism, float]]]
"""Of each user, by name, how many, by (mechanism, noise multiplier); a multiplier of 0 where nothing covered
them."""


@dataclass(frozen=True)
class Own:
    """What a node's users have of their own in a run.

    Attributes:
        round: the last in which this node trained; 0: none.
        users: int64 [n], those who have trained.
        state: {parameter name: [n, ...]}.
        residuals: {user: [elements of an upload]}, what top-k has not sent yet.
        before: the same before that round; None where it is not kept.
    """

    round: int = 0
    users: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))
    state: Mapping[str, Tensor] = field(default_factory=dict)
    residuals: Mapping[int, Tensor] = field(default_factory=dict)
    before: Own | None = None

    def after(self, round: int) -> Own:
        """As it was after a round that a server goes on from, which may have lost the one that followed."""
        return self if self.round <= round or self.before is None else self.before

    def following(
        self, round: int, users: Tensor, store: ClientStore, residuals: Mapping[int, Tensor]
    ) -> Own:
        """What it is after a round that trained these users (int64), whose state is in `store`."""
        ids = torch.unique(torch.cat([self.users, users]))
        state = {name: values[ids] for name, values in store.state.items()}
        # Copies, since a file of tensors refuses two names for one.
        kept = {user: value.clone() for user, value in self.residuals.items()}
        return Own(round, ids, state, residuals, replace(self, residuals=kept, before=None))

    def in_run(self, numbers: Mapping[int, int]) -> Own:
        """To start with in a run that goes on from this one, of users who are there, by `numbers` here: what
        was not sent yet is left out.
        """
        places = torch.tensor([numbers.get(user, -1) for user in self.users.tolist()], device="cpu").long()
        here = places >= 0
        return Own(self.round, places[here], {name: values[here] for name, values in self.state.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        found: dict[str, Tensor] = {
            "round": torch.tensor([self.round], device="cpu"),
            "users": self.users,
            **prefixed("state", self.state),
            **{f"residual.{user}": value for user, value in self.residuals.items()},
        }
        return found | ({} if self.before is None else prefixed("before", self.before.tensors()))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Own:
        """What `tensors` gave; of none, that of a node that has not trained."""
        if not tensors:
            return cls()
        before = below("before", tensors)
        return cls(
            int(tensors["round"]),
            tensors["users"],
            below("state", tensors),
            {int(user): value for user, value in below("residual", tensors).items()},
            cls.from_tensors(before) if before else None,
        )


def client_store(
    config: Config, model: Backbone, users: Tensor, num_users: int, starts: Mapping[str, Tensor], own: Own
) -> ClientStore:
    """State of the node's `users` (int64): their own, or what a new client starts with.

    Raises:
        ValueError: their own does not fit the model.
    """
    store = ClientStore(
        initial_states(model, users, num_users, config.seed, config.backbone.init_std), starts, num_users
    )
    if own.round:
        expected = {name: (len(own.users), *values.shape[1:]) for name, values in store.state.items()}
        found = {name: tuple(values.shape) for name, values in own.state.items()}
        if found != expected:
            raise ValueError(f"state: expected the users' own of the shapes {expected}, got {found}")
    for name, values in own.state.items():
        store.state[name][own.users] = values.to(store.state[name])
    if store.trained is not None:
        store.trained[own.users] = True
    return store


class NodeFolder:
    """The folder of one node.

    Args:
        path: made, by `locked`, if it is not there.
        names: of the node's users, by their numbers in the run.
    """

    def __init__(self, path: str | Path, names: Mapping[int, str]) -> None:
        self._path, self._names = Path(path), names

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process is in here: a node may take part in several runs at once.

        Raises:
            OSError: the folder cannot be made.
        """
        try:
            self._path.mkdir(exist_ok=True)
        except OSError as error:
            raise type(error)(f"state: cannot make the folder {self._path} ({error.strerror})") from error
        handle = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def load(self, run: str) -> Own:
        """The users' own state in a run; that of a node that has not trained, if the run is not known here.

        Raises:
            ValueError: the file is damaged, or holds other users.
        """
        if not (path := self._file(run)).exists():
            return Own()
        names, own = self._read(path)
        for user in own.users.tolist():
            if self._names.get(user) != names[user]:
                raise ValueError(f"state: {path} holds user {names[user]!r}, who is not of this node")
        return own

    def load_from(self, run: str, round: int) -> Own:
        """To start with in a run that goes on from the round of an earlier one: of the users who are still
        here. Raises ValueError where the file is damaged.
        """
        if not (path := self._file(run)).exists():
            return Own()
        names, own = self._read(path)
        mine = {name: user for user, name in self._names.items()}
        return own.after(round).in_run({user: mine[name] for user, name in names.items() if name in mine})

    def save(self, run: str, own: Own) -> None:
        """Replace the users' own state in a run. Raises OSError, and leaves what was there."""
        names = {user: self._names[user] for user in own.users.tolist()}
        header = {"format": FORMAT, "fedpeft_ext": __version__, "names": names}
        write_checked(self._file(run), header, own.tensors())

    def _read(self, path: Path) -> tuple[dict[int, str], Own]:
        header, tensors = read_checked(path, "state")
        return {int(user): name for user, name in header["names"].items()}, Own.from_tensors(tensors)

    def runs(self) -> list[str]:
        """Those that are known here."""
        return sorted(path.stem for path in self._path.glob("*.safetensors") if RUN_ID.fullmatch(path.stem))

    def uploads(self) -> Spent:
        """What has left so far. Raises ValueError where the file is damaged."""
        path = self._path / PRIVACY
        if not path.exists():
            return {}
        try:
            return parse_spent(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"state: {path} does not tell what users' uploads gave away ({error}); restore it"
            ) from error

    def save_spent(self, uploads: Spent) -> None:
        """Replace the count. Raises OSError, and leaves what was there."""
        replace_text(self._path / PRIVACY, format_spent(uploads))

    def _file(self, run: str) -> Path:
        if not RUN_ID.fullmatch(run):  # a server's word, which becomes the name of a file
            raise ValueError(f"run: expected 32 hexadecimal digits, got {run!r}")
        return self._path / f"{run}.safetensors"


def format_spent(uploads: Spent) -> str:
    """As JSON."""
    users = {
        user: [
            {"mechanism": mechanism, "noise_multiplier": multiplier, "uploads": count}
            for (mechanism, multiplier), count in sorted(kinds.items())
        ]
        for user, kinds in sorted(uploads.items())
    }
    return json.dumps({"format": FORMAT, "users": users}, indent=1) + "\n"


def parse_spent(text: str) -> Spent:
    """What `format_spent` wrote. Raises ValueError, KeyError, TypeError or AttributeError for other text."""
    kept: dict[str, Any] = json.loads(text)
    if kept["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {kept['format']!r}")
    uploads: Spent = {}
    for user, kinds in kept["users"].items():
        counts = uploads[user] = Counter()
        for kind in kinds:
            mechanism, multiplier, count = kind["mechanism"], kind["noise_multiplier"], kind["uploads"]
            if mechanism not in ("gaussian", "laplace") or not multiplier >= 0.0 or int(count) < 0:
                raise ValueError(f"user {user}: expected mechanism, noise and a count, got {kind}")
            counts[mechanism, float(multiplier)] += int(count)
    return uploads
