"""A run in use: its model and clients' state from the folder, each user's best items, and the model of one
user's device.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpeft_ext.backbones import Backbone, ClientContext, FedMF
from fedpeft_ext.config import Config, EvaluationConfig, load_config
from fedpeft_ext.data import Dataset, popularity_scores
from fedpeft_ext.nn import FullEmbedding, Items
from fedpeft_ext.pretrain import ItemEncoder
from fedpeft_ext.simulation.checkpoint import RUN, check_no_runs_inside, has_checkpoint, load_checkpoint
from fedpeft_ext.simulation.client_batch import TRAINED, ClientStore, Interactions
from fedpeft_ext.simulation.communication import shared_state
from fedpeft_ext.simulation.evaluation import (
    Evaluator,
    evaluation_mode,
    refuse_nan,
    scoring_inputs,
    users_at_once,
)
from fedpeft_ext.simulation.numbering import ITEMS, USERS, read_encoder, read_ids
from fedpeft_ext.simulation.output import CONFIG, MODEL, SUMMARY, dataset_of_run
from fedpeft_ext.simulation.setup import build_model, warmup_rounds
from fedpeft_ext.simulation.state import below, copy_into


class RankedItems(NamedTuple):
    """The best items of n users, best first.

    Attributes:
        items: int64 [n, k], numbers of items; -1 at the end where a user has fewer than k left.
        scores: [n, k], -inf there.
    """

    items: Tensor
    scores: Tensor


class UserMetrics(NamedTuple):
    """Metrics of n users.

    Attributes:
        users: int64 [n], numbers of those who have a held-out item.
        values: float64 [n] by the metric's name, as in a `Summary`.
    """

    users: Tensor
    values: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """Over users: what a `Summary` has."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    def grouped(self, counts: Tensor, bounds: Sequence[int]) -> dict[str, UserMetrics]:
        """Users apart by a count of each, such as how often the own test item was trained on.

        Args:
            counts: [n], of each user.
            bounds: rising, from 0 on: the largest counts of all groups but the last, which has the rest.

        Returns:
            groups by name; bounds (0, 2) make "0", "1-2" and "3+". Those without users are left out.

        Raises:
            ValueError: bounds that do not rise from 0 on, or counts of other users.
        """
        if not bounds or any(low >= high for low, high in pairwise((-1, *bounds))):
            raise ValueError(
                f"bounds: expected rising counts such as 0,2,5, got {','.join(map(str, bounds))}"
            )
        if counts.shape != self.users.shape:
            raise ValueError(f"counts: expected [{len(self.users)}], got {list(counts.shape)}")
        group = torch.bucketize(counts, counts.new_tensor(bounds))
        names = [str(b) if a + 1 == b else f"{a + 1}-{b}" for a, b in pairwise((-1, *bounds))]
        found = {}
        for place, name in enumerate([*names, f"{bounds[-1] + 1}+"]):
            inside = group == place
            if inside.any():
                parts = {metric: values[inside] for metric, values in self.values.items()}
                found[name] = UserMetrics(self.users[inside], parts)
        return found


class ClientModel(nn.Module):
    """One user's model, as the user's device runs it: `forward(items)` gives scores [P] of `items` int64 [P].

    It holds the item embedding, what the backbone shares, the user's own state and training items, and
    nothing of other users.
    """

    def __init__(self, model: Backbone, client: Tensor, history: Tensor) -> None:
        super().__init__()
        self.model = model
        self.client: Tensor
        self.register_buffer("client", client)
        self.history: Tensor
        self.register_buffer("history", history)

    def forward(self, items: Tensor) -> Tensor:
        scores: Tensor = self.model(items, ClientContext(self.client, Items(self.history), 0, 0, 0))
        return scores


@dataclass(frozen=True, eq=False)
class TrainedServer:
    """A federation without its users: what a server has when the training is over.

    Attributes:
        config: the settings.
        catalogue: a data set with the items; users and interactions are not used, but for the default of
            `with_new_users`.
        model: the backbone with the trained parameters.
        starts: {parameter name: value} of those that new clients start from the same value of.
        round: rounds trained.
        encoder: of new items; None where none was kept.
        run: the name under which nodes keep their users' state; "" but for a Flower server.
    """

    config: Config
    catalogue: Dataset
    model: Backbone
    starts: Mapping[str, Tensor]
    round: int
    encoder: ItemEncoder | None = None
    run: str = ""

    def with_new_items(self, items: Dataset | Mapping[str, str | npt.ArrayLike]) -> TrainedServer:
        """The same with items that it does not know yet, which nothing is trained for.

        Their full embeddings and codes come from their text by the encoder of pre-training; full embeddings
        are moved as training moved those before. Rows of the compressed part start as
        `ItemEmbedding.new_rows` has it, and hash functions cover any item. They come after the items before,
        which stay as they are, also where they are named here.

        Args:
            items: a data set, for its items and their text; or text by the items' external ids, or features
                [F] where those of the run came from a file.

        Raises:
            ValueError: the run has no encoder that its embedding needs, or other than what it takes.
        """
        from fedpeft_ext.simulation.growth import with_new_items

        return with_new_items(self, items)

    def with_new_users(
        self, users: Dataset | Mapping[str, Iterable[int | str]], rounds: int | None = None
    ) -> TrainedRun:
        """The model with users who never took part: each trains its own state (user vector, personal
        network) on its own items, and sends nothing. What is shared stays as it is.

        A user trains as in rounds of the run, always from the same shared parameters. Draws are those of the
        user's number here and of the rounds that follow the run's.

        Args:
            users: their interactions, whose items the run knows, matched by external id; or the items of each
                by the user's id, oldest first: numbers (int) or external ids (str).
            rounds: times that each trains, `training.local_epochs` passes each. None: as often as a user of
                the run did on average, at least once.

        Raises:
            ValueError: an item that the run does not know; no users; rounds out of range; a run from whose
                files an older version left out what new users start from. IndexError: an item number out of
                range.
            FloatingPointError: training diverged. ClientError: it failed.
        """
        from fedpeft_ext.simulation.new_users import train_new_users

        return train_new_users(self, users, rounds)


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A federation to ask for recommendations. `load_run` reads one from a folder, `Simulator.trained_run` is
    that of a run at hand.

    Attributes:
        config: the run's settings.
        dataset: the data that it was trained on.
        model: the backbone with the trained parameters.
        store: the clients' own state.
        round: rounds trained.
        encoder: of new items; None where none was kept.
    """

    config: Config
    dataset: Dataset
    model: Backbone
    store: ClientStore
    round: int
    encoder: ItemEncoder | None = None

    @cached_property
    def _interactions(self) -> Interactions:
        return Interactions(self.dataset, next(self.model.parameters()).device)

    @torch.no_grad()
    def recommend(
        self,
        users: int | str | Iterable[int | str] | np.ndarray | Tensor,
        k: int = 10,
        *,
        exclude_met: bool = True,
    ) -> RankedItems:
        """The best k items of the whole catalogue for each of n users.

        Scores are those of the evaluator's full ranking. Of equal scores the item of the lower number comes
        first, where the evaluator takes the mean over all orders. A user who was never trained is scored with
        the state that such a client starts from.

        Args:
            users: numbers (int) or external ids (str), or one of them.
            k: items for each user.
            exclude_met: leave out the user's training and validation items. Test items stay: to the model
                they are new.

        Raises:
            ValueError: an id that the data set does not have, or k out of range.
            IndexError: a number out of range. FloatingPointError: a score is NaN.
        """
        if isinstance(k, bool) or not 1 <= operator.index(k) <= self.dataset.num_items:
            raise ValueError(f"k: expected 1 to {self.dataset.num_items}, the number of items, got {k}")
        interactions = self._interactions
        numbers = torch.tensor(self.user_numbers(users), dtype=torch.int64, device=interactions.device)
        vectors = self.model.item_embedding(torch.arange(self.dataset.num_items, device=numbers.device))
        items = numbers.new_full((len(numbers), k), -1)
        best = vectors.new_full((len(numbers), k), -torch.inf)
        block = users_at_once(self.model, self.dataset.num_items)
        for start in range(0, len(numbers), block):
            part = numbers[start : start + block]
            state, context = scoring_inputs(self.model, self.store, interactions, part)
            with evaluation_mode(self.model):
                scores = self.model.catalogue_scores(vectors, state, context)
            refuse_nan(scores, part, "recommend")
            if exclude_met:
                self._leave_out_met(scores, part)
            at = slice(start, start + len(part))
            items[at], best[at] = best_columns(scores, k)
        return RankedItems(items.masked_fill_(best == -torch.inf, -1), best)

    def evaluate(
        self, settings: EvaluationConfig | None = None, *, target: Literal["test", "valid"] = "test"
    ) -> UserMetrics:
        """Rank each user's held-out item, for metrics of each user, or other ones than those of the run.

        Args:
            settings: None: those of the run, whose means are the metrics of its summary.
            target: which item; "valid" needs `dataset.options.validation`.

        Raises:
            ValueError: no user has such an item, or one has too few items never met.
            FloatingPointError: a score is NaN.
        """
        settings = self.config.evaluation if settings is None else settings
        evaluator = Evaluator(
            self.dataset,
            self._interactions,
            num_negatives=settings.num_negatives,
            full_ranking=settings.full_ranking,
            ks=settings.ks,
            seed=settings.candidate_seed(self.config.seed),
            target=target,
        )
        return UserMetrics(*evaluator.by_user(self.model, self.store, self.round))

    @property
    def server(self) -> TrainedServer:
        """What the server has of it, to be given new users."""
        return TrainedServer(
            self.config, self.dataset, self.model, self.store.starts, self.round, self.encoder
        )

    def with_new_items(self, items: Dataset | Mapping[str, str | npt.ArrayLike]) -> TrainedRun:
        """See `TrainedServer.with_new_items`."""
        grown = self.server.with_new_items(items)
        return dataclasses.replace(self, dataset=grown.catalogue, model=grown.model)

    def with_new_users(
        self, users: Dataset | Mapping[str, Iterable[int | str]], rounds: int | None = None
    ) -> TrainedRun:
        """See `TrainedServer.with_new_users`."""
        return self.server.with_new_users(users, rounds)

    def _leave_out_met(self, scores: Tensor, users: Tensor) -> None:
        held = torch.from_numpy(self.dataset.valid_items[users.cpu().numpy()]).to(users.device)
        met = torch.cat([self._interactions.padded(users), held[:, None]], 1)
        row, place = (met >= 0).nonzero(as_tuple=True)
        scores[row, met[row, place]] = -torch.inf

    def user_numbers(self, users: int | str | Iterable[int | str] | np.ndarray | Tensor) -> list[int]:
        """Numbers of users given by number or external id; raises as `recommend` does."""
        if isinstance(users, int | str):
            users = [users]
        given = users.tolist() if isinstance(users, Tensor | np.ndarray) else list(users)
        wanted = {user for user in given if isinstance(user, str)}
        ids, count = self.dataset.user_ids, self.dataset.num_users
        known = {name: number for number, name in enumerate(ids) if name in wanted} if wanted else {}
        for user in given:
            if isinstance(user, str) and user not in known:
                some = islice(filter(None, ids), 3)  # a node's data name its own users alone
                raise ValueError(
                    f"users: data set {self.dataset.name!r} has no user with the id {user!r}; ids are such "
                    f"as {', '.join(map(repr, some))}"
                )
            if not isinstance(user, str) and not 0 <= operator.index(user) < count:
                raise IndexError(f"users: expected 0 to {count - 1}, or an external id (str), got {user}")
        return [known[user] if isinstance(user, str) else operator.index(user) for user in given]

    @torch.no_grad()
    def client_model(self, user: int | str, *, merge: bool = True) -> ClientModel:
        """What the device of one user holds to score items by itself: copies, on the device of `model`.

        Args:
            user: number or external id.
            merge: put one table of the final vectors in place of the item embedding; False keeps its parts.

        Raises ValueError or IndexError for an unknown user.
        """
        client = torch.tensor(self.user_numbers(user), device=self._interactions.device)
        state, context = scoring_inputs(self.model, self.store, self._interactions, client)
        model = copy.deepcopy(self.model).requires_grad_(False)
        copy_into(
            {name: model.get_parameter(name) for name in state},
            {name: rows[0] for name, rows in state.items()},
        )
        if merge:
            table = self.model.item_embedding.full_embedding()
            model.item_embedding = FullEmbedding.from_pretrained(table, freeze=False).requires_grad_(False)
        return ClientModel(model, client[0], context.history.ids[0]).eval()


def popularity_run(run: TrainedRun, trained_on: Dataset | None = None) -> TrainedRun:
    """A baseline to evaluate beside `run`: for every user, an item scores its interactions in `trained_on`
    (None: the data of `run`), on the same items.
    """
    device = next(run.model.parameters()).device
    table = torch.from_numpy(popularity_scores(trained_on or run.dataset)).float()[:, None]
    model = FedMF(FullEmbedding.from_pretrained(table, freeze=False), 1).to(device)
    store = ClientStore({"user": torch.ones(run.dataset.num_users, 1, device=device)})
    return TrainedRun(run.config, run.dataset, model, store, 0)


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [n, k] of the k highest scores of each row of [n, I], best first, and these scores; of equal
    ones the lower column first, which `torch.topk` does not promise.
    """
    rows = torch.arange(len(scores), device=scores.device)
    row, column = (scores >= scores.topk(k).values[:, -1:]).nonzero(as_tuple=True)  # by row, then column
    order = scores[row, column].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then score, then column
    first = torch.searchsorted(row, rows)
    columns = column[order[first[:, None] + torch.arange(k, device=scores.device)]]
    return columns, scores.gather(1, columns)


class _Saved(NamedTuple):
    """What a folder holds of a federation; tensors by their name in the model, no `clients` of a Flower
    server. `trained` tells the clients with a state of their own; None: all. `renumbered`: whether items
    have other numbers than in the data.
    """

    config: Config
    round: int
    digest: str
    server: dict[str, Tensor]
    clients: dict[str, Tensor] | None
    starts: dict[str, Tensor]
    trained: Tensor | None
    renumbered: bool
    run: str


def load_run(
    folder: str | Path, dataset: Dataset | None = None, *, device: torch.device | str = "cpu"
) -> TrainedRun:
    """The run in `folder`, to use: as it ended, or while it is unfinished as its newest checkpoint has it.

    Args:
        folder: of `fedpeft run --out` or `Simulator(out=...)`.
        dataset: that of the run; None loads `config.dataset`.
        device: to put the model and the clients' state on.

    Raises:
        FileNotFoundError: no such folder, or neither a finished run nor a checkpoint in it.
        ValueError: a file is damaged; the folder has no clients' state, as that of a Flower server; data or
            settings are not those of the run.
    """
    folder = Path(folder)
    saved = _saved(folder)
    if saved.clients is None:
        raise ValueError(
            f"run: {folder} has no clients' state: it is that of a Flower server, whose users' vectors and "
            "networks stay on their devices, where `load_node` (--node, --state) finds them; it can serve "
            "new users (`load_server`, --item, --new-users)"
        )
    server = _server(folder, saved, _data_of(folder, saved, dataset), device)
    return _with_clients(folder, saved, server)


def _with_clients(folder: Path, saved: _Saved, server: TrainedServer) -> TrainedRun:
    shapes = {
        name: (server.catalogue.num_users, *server.model.get_parameter(name).shape)
        for name in server.model.local_parameters
    }
    clients = saved.clients or {}
    found = {name: tuple(values.shape) for name, values in clients.items()}
    if found != shapes:
        raise ValueError(
            f"run: the files in {folder} do not fit {CONFIG} and the data: clients' state: expected the "
            f"shapes {shapes}, got {found}"
        )
    device = next(server.model.parameters()).device
    rows = {name: values.to(device) for name, values in clients.items()}
    trained = None if saved.trained is None else saved.trained.to(device)
    store = ClientStore.of_everyone(rows, server.starts, trained)
    return TrainedRun(server.config, server.catalogue, server.model, store, server.round, server.encoder)


def load_server(
    folder: str | Path, catalogue: Dataset | None = None, *, device: torch.device | str = "cpu"
) -> TrainedServer:
    """What the server has of the run in `folder`, for users who never took part. It may be the folder that a
    Flower server wrote.

    Args:
        folder: as of `load_run`.
        catalogue: a data set with the items as they were numbered for the training; None loads
            `config.dataset`.
        device: to put the model on.

    Raises what `load_run` raises, but that there is no clients' state.
    """
    folder = Path(folder)
    saved = _saved(folder)
    return _server(folder, saved, _data_of(folder, saved, catalogue), device)


def load_start(folder: str | Path) -> TrainedRun | TrainedServer:
    """The run in `folder` as another one starts from it: users and items without any interaction, since the
    data may have grown. Of a Flower server's folder without users.

    Raises:
        FileNotFoundError: no such folder, no run in it, or one of a version that kept no ids.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    saved = _saved(folder, "start_from")
    items = read_ids(folder / ITEMS)
    users = pl.Series("id", [""]) if saved.clients is None else read_ids(folder / USERS)
    nobody = np.full(len(users), -1, np.int64)
    catalogue = Dataset(
        name=folder.name,
        num_users=len(users),
        num_items=len(items),
        indptr=np.zeros(len(users) + 1, np.int64),
        indices=np.zeros(0, np.int64),
        test_items=nobody,
        valid_items=nobody,
        user_ids=cast("Any", users),
        item_ids=cast("Any", items),
    )
    server = _server(folder, saved, catalogue, "cpu")
    return server if saved.clients is None else _with_clients(folder, saved, server)


def check_run(folder: Path, argument: str = "run") -> None:
    """Raise FileNotFoundError, which names the argument, where there is no run in `folder`."""
    if (folder / SUMMARY).exists() or has_checkpoint(folder) is not None:
        return
    check_no_runs_inside(argument, folder)
    raise FileNotFoundError(f"{argument}: expected a finished run, or a checkpoint of one, in {folder}")


def _saved(folder: Path, argument: str = "run") -> _Saved:
    check_run(folder, argument)
    return _finished(folder) if (folder / SUMMARY).exists() else _unfinished(folder)


def _data_of(folder: Path, saved: _Saved, dataset: Dataset | None) -> Dataset:
    """The data set of a run, numbered as there."""
    if dataset is None:
        dataset = dataset_of_run(saved.config, folder)
    if saved.renumbered:
        dataset = dataset.after_catalogue(read_ids(folder / ITEMS))
    if saved.digest not in ("", dataset.digest):
        raise ValueError(
            f"dataset: the run in {folder} was trained on other data than {dataset.name!r} "
            f"({saved.digest[:12]} against {dataset.digest[:12]}); `fedpeft run --start-from "
            f"{shlex.quote(str(folder))} --rounds 0` takes on data that have grown"
        )
    return dataset


def _server(folder: Path, saved: _Saved, dataset: Dataset, device: torch.device | str) -> TrainedServer:
    try:
        model = _model(saved, dataset.num_items).to(device)
    except ValueError as error:
        raise ValueError(f"run: the files in {folder} do not fit {CONFIG} and the data: {error}") from error
    starts = {name: value.to(device) for name, value in saved.starts.items()}
    return TrainedServer(saved.config, dataset, model, starts, saved.round, read_encoder(folder), saved.run)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    except ValueError as error:
        raise _damaged(folder, error) from error
    return summary


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"run: a file in {folder} is damaged ({error})")


def _finished(folder: Path) -> _Saved:
    summary = _summary(folder)
    try:
        tensors = load_file(folder / MODEL)
    except (SafetensorError, ValueError) as error:
        raise _damaged(folder, error) from error
    return _Saved(
        load_config(folder / CONFIG),
        summary["rounds"],
        summary.get("dataset_digest", ""),
        {
            name: v
            for name, v in tensors.items()
            if not name.startswith(("clients.", "starts.")) and name != TRAINED
        },
        below("clients", tensors) if "dataset" in summary else None,  # which a Flower server does not know
        below("starts", tensors),
        tensors.get(TRAINED),
        bool(summary.get("started_from")),
        summary.get(RUN, ""),
    )


def _unfinished(folder: Path) -> _Saved:
    saved = load_checkpoint(folder)
    starts = below("clients.starts", saved.state)
    rows = {n: v for n, v in below("clients.state", saved.state).items() if n not in starts}
    store = ClientStore(rows, starts, len(saved.state.get("clients.trained", ())))
    store.load_state_dict(below("clients", saved.state))
    everyone = range(len(next(iter(store.state.values()), ())))
    server = below("model", saved.state) | below("model", saved.constants)
    config = Config.from_dict(saved.header["config"])
    if (folder / CONFIG).exists():  # where the data are now
        config = config.model_copy(update={"dataset": load_config(folder / CONFIG).dataset})
    return _Saved(
        config,
        saved.round,
        saved.header["dataset"],
        server,
        None if RUN in saved.header else store.rows(everyone),
        store.starts,
        store.trained,
        bool(saved.header.get("started_from")),
        saved.header.get(RUN, ""),
    )


def _model(saved: _Saved, num_items: int) -> Backbone:
    """The backbone with the server's tensors."""

    def part(name: str) -> Tensor | None:
        """A tensor of the item embedding, or of one of its parts."""
        found = (n for n in saved.server if n.startswith("item_embedding.") and n.endswith(f".{name}"))
        return next((saved.server[n] for n in found), None)

    base = part("base")
    model = build_model(
        saved.config,
        num_items,
        base=part("weight") if base is None else base,
        codes=part("codes"),
        codebooks=part("codebooks"),
        warmup=saved.round < warmup_rounds(saved.config),
    )
    expected = shared_state(model)
    if strange := saved.server.keys() - expected.keys():
        raise ValueError(f"expected no tensor {min(strange)!r}")
    copy_into(expected, saved.server)
    return model
