"""The file formats that `read_dataset` knows: which files of a folder to read, and which columns mean what.

RecBole atomic files (`name.inter`, `name.item`, `name.user`; tab-separated, header `name:type`), the files of
MovieLens (`ratings.dat` and `movies.dat` of ml-1m, `u.data` and `u.item` of ml-100k, `ratings.csv` and
`movies.csv` of ml-latest), and any table with a user and an item column: CSV, TSV, Parquet, JSON lines. Of a
split into files (`x.train.csv`, `x.valid.csv`, `x.test.csv`) all parts are read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from .tables import (
    Table,
    first_line,
    joined,
    read_json_lines,
    read_parquet,
    read_table,
    without_gz,
)

# Usual names of each column, in lower case without '_', '-' and blanks, the preferred first.
_COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "clientid", "sessionid"),
    "item": (
        *(
            "itemid",
            "item",
            "iid",
            "movieid",
            "movie",
            "parentasin",
            "asin",
            "productid",
            "product",
            "trackid",
            "songid",
        ),
        *("artistid", "bookid", "isbn", "businessid", "newsid", "videoid", "gameid", "appid"),
    ),
    "rating": ("rating", "ratings", "score", "stars", "overall"),
    "timestamp": ("timestamp", "time", "ts", "unixtimestamp", "unixreviewtime", "unixtime"),
}
_ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
_ML100K_GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
# Tables that lie beside the interactions in a folder of CSV files and are none.
_SIDE_TABLES = ("movies", "items", "users", "tags", "links", "genome-scores", "genome-tags")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# How the file with the items of `x.jsonl` begins, in the Amazon data.
_META = "meta_"
_TABLE_SUFFIXES = (
    ".csv",
    ".tsv",
    ".csv.gz",
    ".tsv.gz",
    ".parquet",
    *_JSON_SUFFIXES,
    *(f"{suffix}.gz" for suffix in _JSON_SUFFIXES),
)
_FORMS = {".parquet": "Parquet table"} | dict.fromkeys(_JSON_SUFFIXES, "JSON lines")
# Names of the parts of a split, or how they end, after a dot.
_TRAIN, _VALID, _TEST = "train", ("valid", "validation", "val", "dev"), ("test",)
# Between columns, the usual first.
_SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}


@dataclass(frozen=True)
class ColumnOptions:
    """The user's word on a CSV/TSV file: columns by name or 0-based position, None: by its usual name."""

    user: str | int | None = None
    item: str | int | None = None
    rating: str | int | None = None
    timestamp: str | int | None = None
    separator: str | None = None
    header: bool = True
    encoding: str | None = None
    item_file: Path | None = None

    def encodings(self, *default: str) -> tuple[str, ...]:
        return default if self.encoding is None else (self.encoding,)


@dataclass(frozen=True)
class ItemTable:
    """What a file says of items: their ids (distinct) and the text of each."""

    path: Path
    ids: list[str]
    text: list[str]
    text_columns: list[str]
    duplicates: int


@dataclass(frozen=True)
class Source:
    """An interactions table with the columns found in it, and the tables beside it.

    Attributes:
        parts: files of a split, training, test and (if there is one) validation: by number in the table's
            column `PART`; empty where there is one file.
    """

    format: str
    table: Table
    user: str
    item: str
    rating: str | None
    timestamp: str | None
    items: ItemTable | None
    users_described: int | None = None
    parts: tuple[Path, ...] = ()


def open_source(path: Path, options: ColumnOptions, *, with_items: bool) -> Source:
    """Find and read the interactions at `path`, a file or a folder; `with_items`: and the items' text."""
    file = _interactions_file(path) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    source = _open_file(file, options, with_items)
    others = _other_parts(file)
    if not others:
        return source
    tables = [source.table, *(_open_file(other, options, with_items=False).table for other in others)]
    return replace(source, table=joined(tables), parts=(file, *others))


def open_items(file: Path, options: ColumnOptions) -> ItemTable:
    """Read items' ids and text from a RecBole .item file, or a CSV, TSV, Parquet or JSON lines table."""
    if without_gz(file).suffix == ".item":
        return _atomic_items(file, options)
    return _delimited_items(file, options.item, options)


def _open_file(file: Path, options: ColumnOptions, with_items: bool) -> Source:
    kind = without_gz(file)
    if kind.suffix == ".inter":
        return _atomic(file, options, with_items)
    if kind.suffix == ".dat":
        return _movielens_dat(file, options, with_items)
    if kind.name == "u.data":
        return _movielens_100k(file, options, with_items)
    return _delimited(file, options, with_items)


def _whole(file: Path) -> Path:
    """The name that a file of training items would have without being split: `x.csv` for `x.train.csv.gz`."""
    plain = without_gz(file)
    return plain.with_name(plain.stem.removesuffix(f".{_TRAIN}") + plain.suffix)


def _other_parts(file: Path) -> list[Path]:
    """The files with test and validation items that belong to a file with training items; none where it is
    all there is."""
    plain = without_gz(file)
    if plain.stem != _TRAIN and not plain.stem.endswith(f".{_TRAIN}"):
        return []
    begin, end = plain.stem.removesuffix(_TRAIN), file.name[len(plain.stem) :]
    found = []
    for names in (_TEST, _VALID):
        others = (file.with_name(f"{begin}{name}{end}") for name in names)
        found.append(next((other for other in others if other.is_file()), None))
    return [other for other in found if other is not None] if found[0] is not None else []


def _training_part(files: Sequence[Path]) -> Path | None:
    """The one of `files` to which all others belong as parts of a split, None where there is none."""
    for file in files:
        parts = _other_parts(file)
        if parts and {file, *parts} == set(files):
            return file
    return None


def _interactions_file(folder: Path) -> Path:
    atomic = sorted(folder.glob("*.inter"))
    named = [file for file in atomic if file.stem == folder.name]
    if named or len(atomic) == 1:
        return (named or atomic)[0]
    if atomic:
        training = _training_part(atomic)
        if training is not None:
            return training
        raise ValueError(f"{folder}: several .inter files ({_names(atomic)}); give the path of one")
    stems = [f"{stem}{suffix}" for stem in ("ratings", "interactions") for suffix in _TABLE_SUFFIXES]
    for name in ("ratings.dat", "u.data", *stems):
        if (folder / name).is_file():
            return folder / name
    tables = [
        file
        for suffix in _TABLE_SUFFIXES
        for file in sorted(folder.glob(f"*{suffix}"))
        if without_gz(file).stem not in _SIDE_TABLES and not file.name.startswith(_META)
    ]
    if len(tables) == 1:
        return tables[0]
    training = _training_part(tables)
    if training is not None:
        return training
    if tables:
        raise ValueError(f"{folder}: several tables ({_names(tables)}); give the path of one")
    raise FileNotFoundError(
        f"{folder}: no interactions found (expected NAME.inter, ratings.dat, u.data, "
        "ratings.csv, or one .csv, .tsv, .parquet or .jsonl file)"
    )


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files)


# ---------------------------------------------------------------------------------------------- RecBole
# atomic files


def _atomic(file: Path, options: ColumnOptions, with_items: bool) -> Source:
    table, _ = _atomic_table(file, options)
    item_file = options.item_file or _whole(file).with_suffix(".item")
    items = None
    if with_items and (options.item_file is not None or item_file.is_file()):
        items = _atomic_items(item_file, options)
    users = _whole(file).with_suffix(".user")
    described = None
    if users.is_file():
        side, _ = _atomic_table(users, options)
        described = side.ids(_find(side, "user", None)).n_unique()
    return _source("RecBole atomic files", table, options, items, described)


def _atomic_items(file: Path, options: ColumnOptions) -> ItemTable:
    table, types = _atomic_table(file, options)
    wanted = [name for name, kind in types.items() if kind in ("token", "token_seq") and _may_be_text(name)]
    return _item_table(table, _find(table, "item", None), wanted)


def _atomic_table(file: Path, options: ColumnOptions) -> tuple[Table, dict[str, str]]:
    table = read_table(file, "\t", encodings=options.encodings("utf-8"))
    types = {}
    for column in table.columns:
        name, colon, kind = column.rpartition(":")
        if not colon or not name or kind not in _ATOMIC_TYPES:
            raise ValueError(
                f"{file}, line 1: expected tab-separated `name:type` with a type of "
                f"{', '.join(_ATOMIC_TYPES)}, got {column!r}"
            )
        types[name] = kind
    if len(types) < len(table.columns):
        raise ValueError(f"{file}, line 1: two columns have the same name")
    return table.rename({column: column.rpartition(":")[0] for column in table.columns}), types


# -------------------------------------------------------------------------------------------------------
# MovieLens


def _movielens_dat(file: Path, options: ColumnOptions, with_items: bool) -> Source:
    table = read_table(
        file,
        "::",
        header=False,
        names=["user", "item", "rating", "timestamp"],
        encodings=options.encodings("utf-8"),
    )
    item_file = options.item_file or file.with_name("movies.dat")
    items = None
    if with_items and (options.item_file is not None or item_file.is_file()):
        # GroupLens wrote its older titles in Latin-1.
        names = ["item", "title", "genres"]
        encodings = options.encodings("utf-8", "latin-1")
        items = _item_table(
            read_table(item_file, "::", header=False, names=names, encodings=encodings), "item", names[1:]
        )
    return _source("MovieLens .dat", table, options, items)


def _movielens_100k(file: Path, options: ColumnOptions, with_items: bool) -> Source:
    table = read_table(
        file,
        "\t",
        header=False,
        names=["user", "item", "rating", "timestamp"],
        encodings=options.encodings("utf-8"),
    )
    item_file = options.item_file or file.with_name("u.item")
    items = None
    if with_items and (options.item_file is not None or item_file.is_file()):
        names = ["item", "title", "release_date", "video_release_date", "imdb_url", *_ML100K_GENRES]
        encodings = options.encodings("utf-8", "latin-1")
        side = read_table(item_file, "|", header=False, names=names, encodings=encodings)
        # The genres are flags: their names are the text.
        flags = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in _ML100K_GENRES[1:]]
        genres = pl.concat_str(flags, separator=" ", ignore_nulls=True).alias("genres")
        items = _item_table(side.with_columns(genres), "item", ["title", "genres"])
    return _source("MovieLens u.data", table, options, items)


# --------------------------------------------------------------------------------------------------------
# CSV, TSV


def _delimited(file: Path, options: ColumnOptions, with_items: bool) -> Source:
    form = _FORMS.get(without_gz(file).suffix, "delimited table")
    text_options = {
        "separator": options.separator,
        "header": not options.header,
        "encoding": options.encoding,
    }
    given = [name for name, value in text_options.items() if value]
    if given and form != "delimited table":
        raise ValueError(f"{given[0]}: expected a CSV or TSV file to read with it, got {file}")
    table = _delimited_table(file, options.separator, options.header, options)
    item_file = options.item_file
    if item_file is None:
        stems = ("movies", "items", f"{_META}{_whole(file).stem}")
        beside = [file.with_name(f"{stem}{suffix}") for stem in stems for suffix in _TABLE_SUFFIXES]
        item_file = next((other for other in beside if other.is_file() and other != file), None)
    items = None
    if with_items and item_file is not None:
        items = _delimited_items(item_file, _find(table, "item", options.item), options)
    return _source(form, table, options, items)


def _delimited_items(file: Path, item: str | int | None, options: ColumnOptions) -> ItemTable:
    """`item`: the column of ids, where the table has it."""
    table = _delimited_table(file, _item_separator(file, options), True, options)
    key = _find(table, "item", item if item in table.columns else None)
    return _item_table(
        table, key, [c for c in table.columns if c != key and _may_be_text(c) and _has_words(table, c)]
    )


def _delimited_table(file: Path, separator: str | None, header: bool, options: ColumnOptions) -> Table:
    if file.suffix == ".parquet":
        return read_parquet(file)
    if without_gz(file).suffix in _JSON_SUFFIXES:
        return read_json_lines(file)
    if separator is None:
        usual = _SEPARATORS.get(without_gz(file).suffix, _SEPARATORS[".tsv"])
        line = first_line(file, options.encoding)
        separator = next((character for character in usual if character in line), usual[0])
    return read_table(
        file, separator, quoted=len(separator) == 1, header=header, encodings=options.encodings("utf-8")
    )


def _item_separator(file: Path, options: ColumnOptions) -> str | None:
    """The separator that was given for the interactions, where the item file has it too."""
    given = options.separator
    return given if given is not None and given in first_line(file, options.encoding) else None


def _has_words(table: Table, column: str) -> bool:
    """Whether a column without declared type is text: not all numbers, unless they are years."""
    if "year" in column.lower():
        return True
    values = table.frame[column].drop_nulls()
    return values.str.strip_chars().cast(pl.Float64, strict=False).null_count() > 0


# ---------------------------------------------------------------------------------------------------------
# columns


def _source(
    form: str,
    table: Table,
    options: ColumnOptions,
    items: ItemTable | None,
    users_described: int | None = None,
) -> Source:
    user, item = _find(table, "user", options.user), _find(table, "item", options.item)
    rating = _find_optional(table, "rating", options.rating)
    timestamp = _find_optional(table, "timestamp", options.timestamp)
    roles: dict[str, str] = {}
    for role, column in (("user", user), ("item", item), ("rating", rating), ("timestamp", timestamp)):
        if column is not None and roles.setdefault(column, role) != role:
            raise ValueError(
                f"{role}_column: expected another column of {table.path} than that of the "
                f"{roles[column]}, got {column!r}"
            )
    return Source(
        format=form,
        table=table,
        user=user,
        item=item,
        rating=rating,
        timestamp=timestamp,
        items=items,
        users_described=users_described,
    )


def _find(table: Table, role: str, given: str | int | None) -> str:
    """The column with the user's or item's id."""
    column = _find_optional(table, role, given)
    if column is None and not table.header:
        column = _find_optional(table, role, {"user": 0, "item": 1}[role])
    if column is None:
        among = ", ".join(map(repr, table.columns))
        how = (
            f"give it as {role}_column, or header=False if the first line is a row"
            if len(table.columns) > 1
            else "there is one column alone: give the character between columns as separator"
        )
        raise ValueError(
            f"{table.path}: no {role} column among {among} (expected {role}_id or another usual name); {how}"
        )
    return column


def _find_optional(table: Table, role: str, given: str | int | None) -> str | None:
    columns = table.columns
    if isinstance(given, int):
        if not 0 <= given < len(columns):
            raise ValueError(f"{role}_column: {table.path} has columns 0 to {len(columns) - 1}, got {given}")
        return columns[given]
    if given is not None:
        if given not in columns:
            near = difflib.get_close_matches(given, columns, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{role}_column: {table.path} has no column {given!r} "
                f"(it has {', '.join(map(repr, columns))}){hint}"
            )
        return given
    plain = {re.sub(r"[\s_-]", "", column.lower()): column for column in reversed(columns)}
    return next((plain[name] for name in _COLUMN_NAMES[role] if name in plain), None)


# ------------------------------------------------------------------------------------------------------- item
# text


def _may_be_text(column: str) -> bool:
    """Whether a column's name lets it be text: not an id and not an address."""
    name = column.lower()
    return not (name.endswith("id") or any(part in name for part in ("url", "image", "link")))


def _item_table(table: Table, key: str, columns: list[str]) -> ItemTable:
    parts = []
    for name in columns:
        text = pl.col(name).fill_null("").str.strip_chars()
        # Lists written as Python literals, and cut off, as in the Amazon data: ['a', 'b'
        listed = text.str.replace_all(r"""['"]+\s*,\s*['"]+""", " ").str.strip_chars("[]'\" ")
        text = pl.when(text.str.contains(r"""^\[['"]""")).then(listed).otherwise(text)
        parts.append(text.replace("(no genres listed)", "").str.replace_all("|", " ", literal=True))
    joined = pl.concat_str(parts, separator=" ") if parts else pl.lit("")
    rows = pl.DataFrame({"item": table.ids(key)}).hstack(
        table.frame.with_columns(text=joined.str.replace_all(r"\s+", " ").str.strip_chars()).select("text")
    )
    first = rows.unique("item", keep="first", maintain_order=True)
    return ItemTable(
        table.path, first["item"].to_list(), first["text"].to_list(), columns, len(rows) - len(first)
    )
