"""`read_dataset`: files of interactions to a `Dataset`: filtered, without duplicates, split by time or as the
files are."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from .dataset import Dataset, IntArray
from .formats import ColumnOptions, ItemTable, Source, open_items, open_source
from .tables import PART, without_gz

BoolArray = npt.NDArray[np.bool_]
Parts = npt.NDArray[np.uint8]

_TRAINING, _TESTING, _VALIDATION = range(3)
"""Numbers of the parts of a split, as in `Source.parts`."""


def read_dataset(
    path: str | Path,
    *,
    name: str | None = None,
    validation: bool = False,
    min_interactions: int = 1,
    duplicates: Literal["first", "last", "error"] = "first",
    incomplete: Literal["error", "drop"] = "error",
    min_rating: float | None = None,
    user_core: int = 1,
    item_core: int = 1,
    items: Literal["met", "all"] = "met",
    item_text: bool = True,
    user_column: str | int | None = None,
    item_column: str | int | None = None,
    rating_column: str | int | None = None,
    timestamp_column: str | int | None = None,
    item_file: str | Path | None = None,
    separator: str | None = None,
    header: bool = True,
    encoding: str | None = None,
) -> Dataset:
    """Read interactions from a file or folder, and split them leave-one-out by time where they are not split.

    The format follows from the files (see `fedpeft_ext.data.formats`). In order: rows rated below
    `min_rating` go; of the rows with one user and item only one stays (so that a test item is never trained
    on); users and items with too few interactions go; each user's interactions are sorted by time, ties and
    data without timestamps in the order of the file. The last is the user's test item, the second-last with
    `validation` the validation item. A user keeps at least one training item: with one interaction there is
    no test item, with two no validation item (-1). Users and items are numbered by first appearance in the
    file.

    Where the file is the training part of a split (`x.train.csv` beside `x.test.csv` and maybe
    `x.valid.csv`, and so for all formats), the parts are kept: each user's row of the test part is the test
    item, that of the validation part with `validation` the validation item and otherwise one more to train
    on. Users without a row to train on go.

    Args:
        path: a file, or a folder that has the usual files.
        name: the data set's name; by default that of the folder or file.
        validation: hold out each user's second-last item for validation, or the one of the validation part.
        min_interactions: drop users with fewer, once.
        duplicates: which of a user's interactions with one item stays: the "first" or "last" in time; "error"
            refuses them.
        incomplete: rows without a user, an item, a time, or (with `min_rating`) a rating: an "error", or they
            are left out ("drop").
        min_rating: keep interactions rated at least this (implicit feedback); None keeps all.
        user_core, item_core: k-core: drop users and items with fewer interactions until all have them.
        items: "met": the catalogue is the items with interactions; "all": and those of the item file without
            any.
        item_text: read the items' text, every text-like column of the item file joined by blanks.
        user_column, item_column, rating_column, timestamp_column: names or 0-based positions where they are
            not the usual.
        item_file: a table with the items' text, where it is not beside the interactions under its usual name.
        separator, header, encoding: of CSV/TSV files: by default ',' for .csv and tab otherwise, or where the
            first line has none the one of ',', ';', tab and '|' that it has; with header,
            UTF-8.

    Raises:
        FileNotFoundError: no such file, or a folder without interactions.
        TypeError: an option of the wrong type.
        ValueError: an option out of range; a malformed file, with line and column; no interactions (left);
            a part with two items of a user to hold out, or with an item that another part has too.
    """
    for option, flag in (
        ("validation", validation),
        ("item_text", item_text),
        ("header", header),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{option}: expected true or false, got {flag!r}")
    check_count("min_interactions", min_interactions, 1)
    check_count("user_core", user_core, 1)
    check_count("item_core", item_core, 1)
    check_choice("duplicates", duplicates, ("first", "last", "error"))
    check_choice("incomplete", incomplete, ("error", "drop"))
    check_choice("items", items, ("met", "all"))
    if min_rating is not None:
        check_number("min_rating", min_rating, -math.inf, math.inf)
    if separator is not None and (not isinstance(separator, str) or not separator or not separator.isascii()):
        raise ValueError(f"separator: expected ASCII characters, got {separator!r}")
    if encoding is not None and not isinstance(encoding, str):
        raise TypeError(f"encoding: expected a name such as 'latin-1', got {encoding!r}")
    path = Path(path)
    options = ColumnOptions(
        user=_column("user_column", user_column),
        item=_column("item_column", item_column),
        rating=_column("rating_column", rating_column),
        timestamp=_column("timestamp_column", timestamp_column),
        separator=separator,
        header=header,
        encoding=encoding,
        item_file=None if item_file is None else Path(item_file),
    )
    source = open_source(path, options, with_items=item_text or items == "all")
    report: dict[str, Any] = {
        "path": str(source.table.path),
        "format": source.format,
        "rows": len(source.table),
    }
    if len(source.table) == 0:
        raise ValueError(f"{source.table.path}: no interactions, the table has no rows")
    source = _complete(source, min_rating is not None, incomplete, report)
    users, user_names = _number(source.table.ids(source.user))
    chosen, item_names = _number(source.table.ids(source.item))
    order = _time_order(source, users, report)
    if min_rating is not None:
        if source.rating is None:
            raise ValueError(
                f"min_rating: {source.table.path} has no rating column; give it as rating_column"
            )
        kept = source.table.numbers(source.rating).to_numpy() >= min_rating
        order = order[kept[order]]
        report["below_min_rating"] = len(kept) - len(order)
    parts = None
    if source.parts:
        report["parts"] = [str(part) for part in source.parts]
        parts = _parts(source, validation, users, chosen, order)
    before = len(order)
    order = _without_duplicates(source, order, users, chosen, len(item_names), duplicates)
    report["duplicates_dropped"] = before - len(order)
    order = _core(order, users, chosen, min_interactions, user_core, item_core)
    report["too_few_dropped"] = before - report["duplicates_dropped"] - len(order)
    if parts is not None:
        trained = np.bincount(users[order[parts[order] == _TRAINING]], minlength=len(user_names)) > 0
        report["users_without_training_item"] = len(np.unique(users[order])) - int(trained.sum())
        order = order[trained[users[order]]]
    if len(order) == 0:
        raise ValueError(
            f"{source.table.path}: no interactions left of {len(source.table)} (min_rating={min_rating}, "
            f"min_interactions={min_interactions}, user_core={user_core}, item_core={item_core})"
        )

    split = None if parts is None else parts[order]
    users, kept_users = _renumber(users[order])
    chosen, kept_items = _renumber(chosen[order])
    report["users_dropped"] = len(user_names) - len(kept_users)
    report["items_dropped"] = len(item_names) - len(kept_items)
    user_ids = [user_names[i] for i in kept_users.tolist()]
    item_ids = [item_names[i] for i in kept_items.tolist()]
    texts = None
    if source.items is not None:
        texts = _describe_items(source.items, item_ids, items == "all", item_text, report)
    if source.users_described is not None:
        report["users_in_user_file"] = source.users_described
    if split is None:
        split = last_held_out(users, len(user_ids), validation)
    indptr, indices, test_items, valid_items = by_parts(users, chosen, len(user_ids), split)
    report["users_without_test_item"] = int(np.count_nonzero(test_items < 0))
    if validation:
        report["users_without_validation_item"] = int(np.count_nonzero(valid_items < 0))
    return Dataset(
        name=name if name is not None else _default_name(path),
        num_users=len(user_ids),
        num_items=len(item_ids),
        indptr=indptr,
        indices=indices,
        test_items=test_items,
        valid_items=valid_items,
        user_ids=user_ids,
        item_ids=item_ids,
        item_text=texts,
        report=report,
    )


def read_items(
    path: str | Path,
    *,
    item_column: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
) -> dict[str, str]:
    """Text of items by external id, from a table as `read_dataset` finds beside interactions: a RecBole .item
    file, CSV, TSV, Parquet or JSON lines.

    Args:
        path: the file.
        item_column: name of the column of ids, where the table has it; else it goes by its usual name.
        separator, encoding: of CSV/TSV files, as in `read_dataset`.

    Raises:
        FileNotFoundError: no such file. ValueError: a malformed one, or without a column of ids.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    table = open_items(file, ColumnOptions(item=item_column, separator=separator, encoding=encoding))
    return dict(zip(table.ids, table.text, strict=True))


def _default_name(path: Path) -> str:
    path = path.resolve()
    if path.is_dir():
        return path.name
    stem = without_gz(path).stem.removesuffix(".train")
    return path.parent.name if stem in ("u", "ratings", "interactions", "train") else stem


def leave_one_out(
    users: IntArray, items: IntArray, num_users: int, validation: bool
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Split interactions sorted by user and then time; every user has at least one.

    Returns indptr [U + 1], indices [nnz], test_items [U] and valid_items [U], int64, -1 for none.
    """
    return by_parts(users, items, num_users, last_held_out(users, num_users, validation))


def last_held_out(users: IntArray, num_users: int, validation: bool) -> Parts:
    """The part of each interaction, sorted as for `leave_one_out`: a user's last is the test item, and the
    one before with `validation` the validation item, where at least one is left for training.
    """
    counts = np.bincount(users, minlength=num_users)
    ends = np.cumsum(counts)
    parts = np.full(len(users), _TRAINING, np.uint8)
    for part, behind, wanted in ((_TESTING, 1, True), (_VALIDATION, 2, validation)):
        if wanted:
            parts[ends[counts > behind] - behind] = part
    return parts


def by_parts(
    users: IntArray, items: IntArray, num_users: int, parts: Parts
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """As `leave_one_out`, by the parts that the interactions belong to."""
    held = []
    for part in (_TESTING, _VALIDATION):
        target = np.full(num_users, -1, np.int64)
        target[users[parts == part]] = items[parts == part]
        held.append(target)
    trained = parts == _TRAINING
    indptr = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(users[trained], minlength=num_users), out=indptr[1:])
    return indptr, items[trained].astype(np.int64, copy=False), held[0], held[1]


def _parts(source: Source, validation: bool, users: IntArray, items: IntArray, order: IntArray) -> Parts:
    """The part that each row of a split belongs to, checked for the rows in `order`."""
    parts = source.table.frame[PART].to_numpy()
    names = {number: path.name for number, path in enumerate(source.parts)}
    if not validation:
        parts = np.where(parts == _VALIDATION, _TRAINING, parts).astype(np.uint8)
    elif len(source.parts) == 2:
        raise ValueError(f"validation: expected a validation part beside {source.parts[0]}, found none")
    for part in (_TESTING, _VALIDATION):
        rows = np.sort(order[parts[order] == part])
        again = np.ones(len(rows), bool)
        again[np.unique(users[rows], return_index=True)[1]] = False
        if again.any():
            row = int(rows[again][0])
            user = source.table.ids(source.user)[row]
            source.table.fail(
                row, source.user, f"expected one item of a user to hold out, got another of user {user!r}"
            )
    # Held out and trained on, or held out twice.
    keys = users[order] * (int(items.max()) + 1) + items[order]
    ranked = np.lexsort((parts[order], keys))
    keys, rows = keys[ranked], order[ranked]
    again = (keys[1:] == keys[:-1]) & (parts[rows[1:]] != parts[rows[:-1]])
    if again.any():
        row = int(rows[1:][again].min())
        user, item = source.table.ids(source.user)[row], source.table.ids(source.item)[row]
        source.table.fail(
            row,
            source.item,
            f"expected an item that user {user!r} has in no other part than {names[int(parts[row])]}, got "
            f"{item!r}",
        )
    return parts


def _number(ids: pl.Series) -> tuple[IntArray, list[str]]:
    """Number ids by first appearance: (int64 [N], the distinct ids)."""
    names = ids.unique(maintain_order=True)
    return ids.cast(pl.Enum(names)).to_physical().to_numpy().astype(np.int64), names.to_list()


def _renumber(codes: IntArray) -> tuple[IntArray, IntArray]:
    """Close the gaps in `codes`, keeping their order: (new codes, the old code of each new one)."""
    present = np.bincount(codes) > 0
    return (np.cumsum(present) - 1)[codes], np.flatnonzero(present)


def _complete(source: Source, with_rating: bool, incomplete: str, report: dict[str, Any]) -> Source:
    """The source without the rows that lack something that is read, or ValueError where there are such."""
    table = source.table
    needed = {source.user: "an id", source.item: "an id"}
    if source.timestamp is not None:
        needed[source.timestamp] = "a time"
    if with_rating and source.rating is not None:
        needed[source.rating] = "a number"
    lacks = table.frame.select(pl.col(*needed).fill_null("").str.strip_chars() == "")
    bad = lacks.select(pl.any_horizontal(pl.all())).to_series()
    if incomplete == "error" and bad.any():
        row = int(bad.arg_true()[0])
        column = next(name for name in needed if lacks[name][row])
        which = "rows lack it or another value" if bad.sum() > 1 else "row does"
        table.fail(
            row,
            column,
            f"expected {needed[column]}, got nothing; {bad.sum():,} {which}, and incomplete='drop' "
            "leaves them out",
        )
    if incomplete == "error":
        return source
    kept = table.frame.filter(~bad)
    report["incomplete_dropped"] = int(bad.sum())
    if kept.is_empty():
        raise ValueError(f"{table.path}: no interactions, all rows are incomplete")
    return replace(source, table=replace(table, frame=kept))


def _time_order(source: Source, users: IntArray, report: dict[str, Any]) -> IntArray:
    """The rows sorted by user, then time, then place in the file."""
    if source.timestamp is None:
        report["order"] = "file"
        used = (source.user, source.item, source.rating)
        report["other_columns"] = [name for name in source.table.columns if name not in used]
        return np.argsort(users, kind="stable")
    report["order"] = "timestamp"
    return np.lexsort((source.table.times(source.timestamp).to_numpy(), users))


def _without_duplicates(
    source: Source, order: IntArray, users: IntArray, items: IntArray, num_items: int, duplicates: str
) -> IntArray:
    keys = (users * num_items + items)[order]
    if duplicates == "last":
        keys = keys[::-1]
    # np.unique gives the place of each key's first occurrence
    places = np.unique(keys, return_index=True)[1]
    if duplicates == "error" and len(places) < len(order):
        again = np.ones(len(order), bool)
        again[places] = False
        row = int(order[again].min())
        user, item = source.table.ids(source.user)[row], source.table.ids(source.item)[row]
        source.table.fail(row, source.item, f"user {user!r} has a second interaction with item {item!r}")
    if duplicates == "last":
        places = len(order) - 1 - places
    places.sort()
    return order[places]


def _core(
    order: IntArray, users: IntArray, items: IntArray, min_interactions: int, user_core: int, item_core: int
) -> IntArray:
    """Drop users with few interactions once, then users and items until the k-core is left."""
    if len(order) and min_interactions > 1:
        order = order[np.bincount(users[order])[users[order]] >= min_interactions]
    while len(order) and (user_core > 1 or item_core > 1):
        kept: BoolArray = np.bincount(users[order])[users[order]] >= user_core
        kept &= np.bincount(items[order])[items[order]] >= item_core
        if kept.all():
            break
        order = order[kept]
    return order


def _describe_items(
    table: ItemTable, item_ids: list[str], complete: bool, with_text: bool, report: dict[str, Any]
) -> list[str] | None:
    """The text of each item; with `complete`, first append to `item_ids` the items that nobody met."""
    report["item_file"] = str(table.path)
    report["item_file_duplicates"] = table.duplicates
    if complete:
        met = set(item_ids)
        unmet = [item for item in table.ids if item not in met]
        item_ids += unmet
        report["items_without_interactions"] = len(unmet)
    if not with_text:
        return None
    report["text_columns"] = table.text_columns
    by_id = dict(zip(table.ids, table.text, strict=True))
    texts = [by_id.get(item, "") for item in item_ids]
    report["items_without_text"] = texts.count("")
    return texts


# ---------------------------------------------------------------------------------------------------------
# options


def check_count(name: str, value: Any, low: int) -> int:
    """`value` as an int of at least `low`; TypeError or ValueError naming the option otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if operator.index(value) < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")
    return operator.index(value)


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a number in [low, high]; TypeError or ValueError naming the option otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError naming the option unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def check_options(function: Callable[..., Any], options: dict[str, Any], what: str) -> None:
    """TypeError with the nearest valid name if `function` has no keyword for one of `options`."""
    valid = [name for name in inspect.signature(function).parameters if name != "path"]
    for name in options:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(valid)}"
            raise TypeError(f"{what} has no option {name!r}; {hint}")


def _column(name: str, value: Any) -> str | int | None:
    if value is None or isinstance(value, str):
        return value
    return check_count(name, value, 0)
