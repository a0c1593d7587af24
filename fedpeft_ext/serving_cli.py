"""The commands `fedpeft recommend` and `fedpeft evaluate`: a run in use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedpeft_ext import cli
from fedpeft_ext.words import counted

if TYPE_CHECKING:
    from fedpeft_ext.config import Config
    from fedpeft_ext.data import Dataset
    from fedpeft_ext.simulation import RankedItems, TrainedRun

_NewUsers = Annotated[
    str | None,
    typer.Option(
        "--new-users",
        metavar="DATA",
        help="Data set of users who never took part, and train their own state.",
    ),
]
_NewItems = Annotated[
    Path | None,
    typer.Option(
        "--new-items",
        metavar="FILE",
        help="Table of items with their text; those that the run does not know are ranked, too.",
    ),
]
_Node = Annotated[
    Path | None,
    typer.Option(
        "--node", metavar="FILE", help="On a Flower node: its data, to serve its own users; with --state."
    ),
]
_State = Annotated[
    Path | None, typer.Option("--state", metavar="DIR", help="The node's folder, of its users' own state.")
]


class _Served(NamedTuple):
    """Options that say which users and items a run is asked for."""

    new_users: str | None
    new_items: Path | None
    rounds: int | None
    node: tuple[Path, Path] | None
    items: Path | None


_OwnRounds = Annotated[
    int | None,
    typer.Option("--rounds", "-r", help="Times that a new user trains.", show_default="as others on average"),
]


def recommend(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run to ask.", show_default=False)
    ],
    user: Annotated[
        list[str] | None, typer.Option("--user", "-u", metavar="ID", help="As in the data set; repeatable.")
    ] = None,
    item: Annotated[
        list[str] | None,
        typer.Option("--item", "-i", metavar="ID", help="An item of somebody new, oldest first; repeatable."),
    ] = None,
    new_users: _NewUsers = None,
    new_items: _NewItems = None,
    rounds: _OwnRounds = None,
    node: _Node = None,
    state: _State = None,
    items: Annotated[
        Path | None,
        typer.Option("--items", metavar="FILE", help="With --node: table of items, for their text."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Items for each user.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="CSV or Parquet file to write to, for all users if none is named.",
        ),
    ] = None,
    json_: cli._Json = False,
    debug: cli._Debug = False,
) -> None:
    """List the best items for users of a run, without those that they met in training.

    With --item, for somebody who never took part: trains this user's own state on
    these items, and nothing else; with --new-users for the users of another data
    set. With --new-items new items are ranked as well. With --node, on a Flower node,
    for its own users; RUN is then the server's folder. A run that is not finished
    answers as its newest checkpoint has it.
    """
    with cli._reported_errors(debug) as started:
        mine = _node(node, state, new_users)
        if items is not None and node is None:
            raise ValueError("--items: expected --node, whose items it names, with it")
        if not user and not item and out is None and node is None:
            raise ValueError("--user, --item, --out: expected a user, items of a new one, or a file for all")
        if item and (user or new_users or node or out is not None):
            raise ValueError("--item: expected alone, with --new-items, --rounds and -k at most")
        if rounds is not None and not item and new_users is None:
            raise ValueError("--rounds: expected --item or --new-users, which train, with it")
        if out is not None and out.suffix not in (".csv", ".parquet"):
            raise ValueError(f"--out: expected a file name that ends in .csv or .parquet, got {out}")
        if out is not None:
            started(out)
        served = _Served(new_users, new_items, rounds, mine, items)
        _recommend(folder, user or [], item or [], served, k, out, as_json=json_)


def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run to evaluate.", show_default=False)
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Setting such as evaluation.ks=[1,10]; repeatable."
        ),
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option("--users", metavar="FILE", help="CSV file to write each user's metrics to."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="RUN",
            help="Another run on the same data, or 'popularity', to tell differences to.",
        ),
    ] = None,
    by_popularity: Annotated[
        str | None,
        typer.Option(
            "--by-popularity",
            metavar="N,N",
            help="Also by how often the test item was trained on: 0,2,5 tells of 0, 1-2, 3-5 and more times.",
        ),
    ] = None,
    new_users: _NewUsers = None,
    rounds: _OwnRounds = None,
    node: _Node = None,
    state: _State = None,
    json_: cli._Json = False,
    debug: cli._Debug = False,
) -> None:
    """Rank the test items of a run again, by other settings of evaluation, for metrics of each user, to
    compare it with another run, for new users, or on a Flower node for its own.

    A run that is not finished is taken as its newest checkpoint has it.
    """
    with cli._reported_errors(debug) as started:
        if users is not None:
            started(users)
        if rounds is not None and new_users is None:
            raise ValueError("--rounds: expected --new-users, a data set of new users, with it")
        mine = _node(node, state, new_users)
        if mine is not None and (against or by_popularity or users):
            raise ValueError("--node: expected without --against, --by-popularity and --users")
        _evaluate(folder, set_ or [], users, against, by_popularity, new_users, rounds, mine, as_json=json_)


def _node(node: Path | None, state: Path | None, new_users: str | None) -> tuple[Path, Path] | None:
    """A node's data and its folder, if both are given."""
    if node is None and state is None:
        return None
    if node is None or state is None:
        raise ValueError("--node, --state: expected both, a node's data and its users' own state, or neither")
    if new_users is not None:
        raise ValueError("--node: expected without --new-users, since a node serves its own users")
    return node, state


def _recommend(
    folder: Path,
    users: Sequence[str],
    own: Sequence[str],
    served: _Served,
    k: int,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    run = _run_of(folder, own, served)
    everyone = [*range(run.dataset.num_users)]
    if served.node is not None:  # of other users it knows nothing, not even the names
        everyone = [number for number in everyone if run.dataset.user_ids[number]]
    names: list[str | None] = [None] if own else [*users]
    names = names or [run.dataset.user_ids[number] for number in everyone]
    item_ids, text = run.dataset.item_ids, run.dataset.item_text
    ranked = run.recommend(users or everyone, k)
    if out is not None:
        rows = _write_recommendations(names, ranked, item_ids, out)
        if as_json:
            typer.echo(json.dumps({"file": str(out), "users": len(names), "rows": rows}))
        else:
            typer.echo(f"File: {out}, {counted(len(names), 'user')}, {counted(rows, 'row')}")
        return
    found: list[list[dict[str, Any]]] = [
        [
            {"item": item_ids[i], "text": text[i] if text else None, "score": score}
            for i, score in zip(best, of_best, strict=True)
            if i >= 0
        ]
        for best, of_best in zip(ranked.items.tolist(), ranked.scores.tolist(), strict=True)
    ]
    if as_json:
        told = [{"user": user, "items": items} for user, items in zip(names, found, strict=True)]
        typer.echo(json.dumps(told, allow_nan=False))
        return
    width = max((len(item["item"]) for items in found for item in items), default=0)
    for user, items in zip(names, found, strict=True):
        typer.echo("new user" if user is None else f"user {user}")
        for place, item in enumerate(items, start=1):
            words = " ".join((item["text"] or "").split())
            typer.echo(f"{place:>4}  {item['item']:<{width}}  {item['score']:>8.4f}  {words}".rstrip())


def _run_of(folder: Path, own: Sequence[str], served: _Served) -> TrainedRun:
    """The run in a folder with the users and items that it is asked for."""
    from fedpeft_ext.simulation import load_run, load_server

    new_users, new_items, rounds, node, items = served
    if own or new_users is not None:
        server = load_server(folder)
        if new_items is not None:
            server = server.with_new_items(_read_items(new_items, server.config))
        newcomers = {"": own} if new_users is None else _data_of_new_users(new_users, server.config)
        return server.with_new_users(newcomers, rounds)
    if node is None:
        run = load_run(folder)
    else:
        from fedpeft_ext.config import load_config
        from fedpeft_ext.flower import load_node

        text = None if items is None else _read_items(items, load_config(folder / "config.yaml"))
        run = load_node(folder, *node, item_text=text)
    return run if new_items is None else run.with_new_items(_read_items(new_items, run.config))


def _write_recommendations(
    users: Sequence[str | None], ranked: RankedItems, item_ids: Sequence[str], file: Path
) -> int:
    """A row for each user and item: user, rank from 1 on, item, score. Returns how many."""
    import polars as pl

    from fedpeft_ext.simulation.files import replace_file

    items, scores = ranked.items.numpy(force=True), ranked.scores.numpy(force=True)
    owner, place = (items >= 0).nonzero()
    frame = pl.DataFrame(
        {
            "user": pl.Series(users, dtype=pl.String)[owner],
            "rank": place + 1,
            "item": pl.Series(item_ids, dtype=pl.String)[items[owner, place]],
            "score": scores[owner, place],
        }
    )
    replace_file(file, frame.write_csv if file.suffix == ".csv" else frame.write_parquet)
    return len(frame)


def _read_items(file: Path, config: Config) -> dict[str, str]:
    from fedpeft_ext.data import read_items

    options = config.dataset.options
    own = {name: options[name] for name in ("item_column", "separator", "encoding") if name in options}
    return read_items(file, **own)


def _data_of_new_users(name: str, config: Config) -> Dataset:
    from fedpeft_ext.data import load_dataset

    drawn = config.dataset.name == "synthetic"  # by options that are none of a file
    return load_dataset(name, **({} if drawn else config.dataset.options))


def _evaluate(
    folder: Path,
    overrides: Sequence[str],
    file: Path | None,
    against: Path | None,
    by_popularity: str | None,
    new_users: str | None,
    rounds: int | None,
    node: tuple[Path, Path] | None,
    *,
    as_json: bool,
) -> None:
    import numpy as np
    import polars as pl
    import torch

    from fedpeft_ext.data import popularity_scores
    from fedpeft_ext.experiments.intervals import paired_differences
    from fedpeft_ext.experiments.results import headline_k
    from fedpeft_ext.experiments.tables import groups_table, metrics_table
    from fedpeft_ext.simulation.files import replace_text

    for override in overrides:
        if not override.strip().startswith("evaluation."):
            raise ValueError(f"--set: expected evaluation.ks or another of evaluation, got {override!r}")
    bounds = [] if by_popularity is None else _bounds(by_popularity)
    run, other, trained_on = _runs(folder, against, new_users, rounds, node)
    config = run.config
    dataset = run.dataset
    # Nothing is selected here, and other settings may leave out what selected.
    settings = config.updated(["evaluation.select_by=null", *overrides]).evaluation
    found = run.evaluate(settings)
    differences, others = {}, {}
    times = popularity_scores(trained_on)[dataset.test_items[found.users.numpy(force=True)]].astype(np.int64)
    groups = found.grouped(torch.from_numpy(times), bounds) if bounds else {}
    if other is not None:  # with the same candidates, whatever the other run's seed
        alike = settings.model_copy(update={"seed": settings.candidate_seed(config.seed)})
        theirs = other.evaluate(alike)
        differences = paired_differences(found, theirs)
        others = theirs.grouped(torch.from_numpy(times), bounds) if bounds else {}
    apart = [
        {
            "trained": name,
            "users": len(group.users),
            "metrics": group.means(),
            # an interval takes two users
            "differences": paired_differences(group, others[name]) if others and len(group.users) > 1 else {},
        }
        for name, group in groups.items()
    ]
    if file is not None:
        users, tests = found.users.numpy(force=True), dataset.test_items[found.users.numpy(force=True)]
        # What metrics are often broken down by; of the data that the run was trained on.
        told_of = {
            "user": [dataset.user_ids[user] for user in users.tolist()],
            "training_items": np.diff(dataset.indptr)[users],
            "test_item": [dataset.item_ids[item] for item in tests.tolist()],
            "test_item_trained": times,
        }
        columns = {name: values.tolist() for name, values in found.values.items()}
        replace_text(file, pl.DataFrame({**told_of, **columns}).write_csv())
    if as_json:
        told = {
            "folder": str(folder),
            "round": run.round,
            "users": len(found.users),
            "metrics": found.means(),
        }
        if against is not None:
            told["differences"] = {"to": str(against), **differences}
        if bounds:
            told["by_popularity"] = apart
        typer.echo(json.dumps(told, allow_nan=False))
        return
    kind = "" if new_users is None else "new "
    title = (
        f"{config.backbone.name} with {config.embedding.name} on {dataset.name}, "
        f"{counted(run.round, 'round')}, {counted(len(found.users), f'{kind}user')}"
    )
    cli._print_table(metrics_table(found.means(), title))
    if against is not None:
        title = f"More than {against} (± half of the 95% confidence interval, paired over users)"
        cli._print_table(metrics_table(differences, title))
    if bounds:
        cli._print_table(groups_table(apart, headline_k(settings.ks)))
    if file is not None:
        typer.echo(f"File: {file}")


def _runs(
    folder: Path,
    against: Path | None,
    new_users: str | None,
    rounds: int | None,
    node: tuple[Path, Path] | None,
) -> tuple[TrainedRun, TrainedRun | None, Dataset]:
    """The run in a folder and the one to compare with, both with the new users if there are some; and the
    data that the first was trained on.
    """
    from fedpeft_ext.simulation import load_run, load_server, popularity_run

    popularity = against == Path("popularity") and not against.exists()
    other, others_data = None, None
    if node is not None:
        from fedpeft_ext.flower import load_node

        run = load_node(folder, *node)
        trained_on = run.dataset
    elif new_users is None:
        run = load_run(folder)
        trained_on = run.dataset
        if against is not None and not popularity:
            other = load_run(against, trained_on)
            others_data = other.dataset
    else:
        server = load_server(folder)
        trained_on = server.catalogue
        newcomers = _data_of_new_users(new_users, server.config)
        run = server.with_new_users(newcomers, rounds)
        if against is not None and not popularity:
            others = load_server(against, trained_on)
            other, others_data = others.with_new_users(newcomers, rounds), others.catalogue
    if others_data is not None and others_data.digest != trained_on.digest:  # nor are candidates then
        raise ValueError(
            f"--against: expected a run whose items have the numbers of those of {folder}, got {against}, "
            "which started from another run"
        )
    return run, popularity_run(run, trained_on) if popularity else other, trained_on


def _bounds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--by-popularity: expected counts such as 0,2,5, got {text!r}") from None


def add_commands(app: typer.Typer) -> None:
    """Make `recommend` and `evaluate` commands of `app`."""
    app.command(short_help="List the best items for users of a run, or for new ones.")(recommend)
    app.command(short_help="Evaluate a run again: by user, against another, for new users.")(evaluate)
