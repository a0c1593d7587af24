"""Delimited text files, JSON lines and Parquet files as polars tables of strings, refused with file and line
where they are malformed.

polars reads the file; only when something looks wrong does a slow line-by-line pass find the first bad line
and name it. Every column is a string here: whoever uses a column says what it must hold (`Table.ids`,
`Table.numbers`).
"""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import polars as pl

# Stands for a separator of several characters ("::"), which polars does not take.
_UNIT_SEPARATOR = "\x1f"
_ROW = "\x1frow"

# ISO 8601: date, and where they are given hours and minutes, seconds, offset from UTC.
_ISO_TIME = r"^(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2})(:\d{2}(?:\.\d{1,9})?)?\s?(Z|[+-]\d{2}:?\d{2})?)?$"

# Files that are often taken for text, by how they begin.
_GZIP = b"\x1f\x8b"
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV, first",
    b"PAR1": "a Parquet file; name it .parquet",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
}


# Lines of a file of JSON lines that tell which columns there are.
_LINES_LOOKED_AT = 1000


@dataclass(frozen=True)
class Table:
    """The rows of a file; the column `_ROW` of `frame` is each row's place in it, for error messages.

    Attributes:
        place: of such a row, in words: "ratings.csv, line 7".
        header: whether the file names its columns.
    """

    path: Path
    frame: pl.DataFrame
    place: Callable[[int], str]
    header: bool = True

    @property
    def columns(self) -> list[str]:
        return [name for name in self.frame.columns if name not in (_ROW, PART)]

    def __len__(self) -> int:
        return len(self.frame)

    def rename(self, names: Mapping[str, str]) -> Table:
        return replace(self, frame=self.frame.rename(dict(names)))

    def with_columns(self, *columns: pl.Expr) -> Table:
        return replace(self, frame=self.frame.with_columns(*columns))

    def fail(self, row: int, column: str, problem: str) -> NoReturn:
        """Raise ValueError for `column` in the `row`-th row of the frame."""
        raise ValueError(f"{self.place(int(self.frame[_ROW][row]))}, column {column!r}: {problem}")

    def ids(self, column: str) -> pl.Series:
        """The column as ids: strings without surrounding blanks, none empty."""
        values = self.frame[column].str.strip_chars()
        bad = (values.fill_null("") == "").arg_true()
        if len(bad):
            self.fail(bad[0], column, "expected an id, got nothing")
        return values

    def numbers(self, column: str) -> pl.Series:
        """The column as finite numbers: Int64 where all are whole (nanoseconds stay exact), else Float64."""
        text = self.frame[column].str.strip_chars()
        whole = text.cast(pl.Int64, strict=False)
        if whole.null_count() == 0:
            return whole
        values = text.cast(pl.Float64, strict=False)
        bad = (~values.is_finite()).fill_null(True).arg_true()
        if len(bad):
            got = text[bad[0]]
            self.fail(bad[0], column, f"expected a number, got {'nothing' if not got else repr(got)}")
        return values

    def times(self, column: str) -> pl.Series:
        """The column as numbers that rise with time: `numbers` of at least 0, or, where the first is no
        number, the microseconds since 1970 of dates and times of ISO 8601, in UTC unless they name an offset.
        """
        text = self.frame[column].str.strip_chars()
        if text.head(1).cast(pl.Float64, strict=False).null_count() == 0:
            numbers = self.numbers(column)
            negative = (numbers < 0).arg_true()
            if len(negative):
                self.fail(negative[0], column, f"expected a time of at least 0, got {numbers[negative[0]]}")
            return numbers
        date, clock, seconds, offset = text.str.extract_groups(_ISO_TIME).struct.unnest().get_columns()
        complete = (
            date
            + "T"
            + clock.fill_null("00:00")
            + seconds.fill_null(":00")
            + offset.fill_null("Z").str.replace("Z", "+00:00", literal=True)
        )
        times = complete.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", strict=False)
        bad = times.is_null().arg_true()
        if len(bad):
            got = text[bad[0]]
            self.fail(
                bad[0],
                column,
                "expected a number, or a time such as 2024-05-31 or 2024-05-31T18:00:00Z, "
                f"got {'nothing' if not got else repr(got)}",
            )
        return times.dt.epoch("us")


def read_table(
    path: Path,
    separator: str,
    *,
    quoted: bool = False,
    header: bool = True,
    names: Sequence[str] | None = None,
    encodings: Sequence[str] = ("utf-8",),
) -> Table:
    """Read a delimited text file; blank lines are skipped.

    Args:
        path: the file.
        separator: what lies between fields; may have several characters if `quoted` is false.
        quoted: fields may stand in double quotes (RFC 4180).
        header: the first line names the columns. Without it they are `names`, or "0", "1", ...
        names: the columns' names, where the file does not give them.
        encodings: tried in order; the first one's error is reported.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not in the encoding, empty, rows of differing width, two columns of one name.
    """
    text = _decode(path, encodings)
    if "\n" not in text:  # lines that end as on old Macs, which polars does not know
        text = text.replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    delimiter = separator
    content = text
    if len(separator) > 1:
        if _UNIT_SEPARATOR in text:
            raise ValueError(
                f"{path}: contains the control character U+001F, which cannot be in a text table"
            )
        content, delimiter = text.replace(separator, _UNIT_SEPARATOR), _UNIT_SEPARATOR
    first = next(_records(path, text, separator, quoted))[1]
    if not first:
        raise ValueError(
            f"{path}, line 1: expected {'the names of the columns' if header else 'a row'}, got a blank line"
        )
    columns = list(names) if names is not None else first if header else [str(i) for i in range(len(first))]
    columns = [name.strip() for name in columns]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two columns are named {twice[0]!r}")
    try:
        frame = pl.read_csv(
            content.encode(),
            has_header=False,
            skip_rows=0,
            separator=delimiter,
            quote_char='"' if quoted else None,
            schema=dict.fromkeys(columns, pl.String),
        )
    except pl.exceptions.PolarsError as error:
        _check_widths(path, text, separator, quoted, len(columns))
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a table separated by {separator!r}: {reason}") from error
    frame = frame.with_row_index(_ROW)
    if header:
        frame = frame.slice(1).with_columns(pl.col(_ROW) - 1)
    # A row with too few fields comes back with nulls at its end, a blank line as nulls alone.
    if frame[columns[-1]].null_count():
        _check_widths(path, text, separator, quoted, len(columns))
        frame = frame.filter(~pl.all_horizontal(pl.col(name).is_null() for name in columns))

    def place(row: int) -> str:
        line, _ = next(itertools.islice(_records(path, text, separator, quoted), row + header, None))
        return f"{path}, line {line}"

    return Table(path, frame, place, header)


def read_json_lines(path: Path) -> Table:
    """Read a file with a JSON object in each line; blank lines are skipped.

    Columns are the keys of the first thousand objects whose values are texts, numbers or lists of such, which
    become one text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, no object, a line that is none.
    """
    text = _decode(path, ("utf-8",))
    columns: dict[str, pl.DataType] = {}
    for _, value in itertools.islice(_objects(path, text), _LINES_LOOKED_AT):
        for key, inner in value.items():
            if isinstance(inner, list):
                if inner and not isinstance(inner[0], dict | list):
                    columns.setdefault(key, pl.List(pl.String()))
            elif inner is not None and not isinstance(inner, dict):
                columns[key] = pl.String()
    if not columns:
        raise ValueError(f"{path}: the file has no JSON object with simple values")
    lists = [name for name, kind in columns.items() if isinstance(kind, pl.List)]
    content = text.encode()
    try:
        frame = pl.read_ndjson(io.BytesIO(content), schema=columns)
        frame = frame.with_columns(pl.col(lists).list.join(" "))
    except pl.exceptions.PolarsError:
        for _ in _objects(path, text):  # all lines are objects,
            pass
        try:  # so that some list is none further down
            frame = pl.read_ndjson(io.BytesIO(content), schema=dict.fromkeys(columns, pl.String))
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: cannot be read as JSON lines: {reason}") from error

    def place(row: int) -> str:
        number, _ = next(itertools.islice(_objects(path, text), row, None))
        return f"{path}, line {number}"

    return Table(path, frame.with_row_index(_ROW), place)


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {error}") from None
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object in each line, got {line.strip()[:20]!r}"
            )
        yield number, value


def read_parquet(path: Path) -> Table:
    """Read the columns of a Parquet file that hold texts, numbers, times, or lists of texts.

    Raises:
        FileNotFoundError: no such file. ValueError: no Parquet file, or none of such columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: expected a Parquet file ({str(error).splitlines()[0]})") from None
    columns = [text for name, kind in frame.schema.items() if (text := _as_text(name, kind)) is not None]
    if not columns:
        raise ValueError(f"{path}: no column with texts, numbers or times")
    # Ids and times that pandas keeps as floats, for the sake of gaps, are whole numbers again.
    whole = [
        name
        for name, kind in frame.schema.items()
        if kind.is_float() and bool((frame[name].drop_nulls().drop_nans() % 1 == 0).all())
    ]
    frame = frame.with_columns(pl.col(whole).fill_nan(None).cast(pl.Int64, strict=False))
    return Table(path, frame.select(columns).with_row_index(_ROW), lambda row: f"{path}, row {row}")


def _as_text(name: str, kind: pl.DataType) -> pl.Expr | None:
    """A Parquet column as strings, None of one that is not used."""
    column = pl.col(name)
    if isinstance(kind, pl.List):
        return column.list.join(" ") if kind.inner == pl.String else None
    if isinstance(kind, pl.Datetime):
        if kind.time_zone is not None:
            column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return column.cast(pl.String)
    simple = (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Date)
    return column.cast(pl.String) if kind.is_numeric() or isinstance(kind, simple) else None


PART = "\x1fpart"
"""Column of joined tables: the number of the one that a row is from."""


def joined(tables: Sequence[Table]) -> Table:
    """The rows of tables with the same columns, one table after the other.

    Raises:
        ValueError: one lacks a column of the first.
    """
    first, ends, frames = tables[0], [0], []
    for number, table in enumerate(tables):
        missing = [name for name in first.columns if name not in table.columns]
        if missing:
            raise ValueError(f"{table.path}: expected the columns of {first.path}, found no {missing[0]!r}")
        rows = table.frame.select(*first.columns, pl.col(_ROW).cast(pl.UInt32) + ends[-1])
        frames.append(rows.with_columns(pl.lit(number, pl.UInt8).alias(PART)))
        ends.append(ends[-1] + (int(table.frame[_ROW][-1]) + 1 if len(table) else 0))

    def place(row: int) -> str:
        number = bisect.bisect_right(ends, row) - 1
        return tables[number].place(row - ends[number])

    return replace(first, frame=pl.concat(frames), place=place)


def _decode(path: Path, encodings: Sequence[str]) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    raw = _bytes(path)
    for beginning, what in _NO_TEXT.items():
        if raw.startswith(beginning):
            raise ValueError(f"{path}: expected a text file, got {what}")
    first: UnicodeDecodeError | None = None
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            first = first or error
        except LookupError as error:
            raise ValueError(f"encoding: {encoding!r} is not known to Python") from error
    assert first is not None
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    line = raw.count(b"\n", 0, first.start) + 1
    raise ValueError(
        f"{path}, line {line}: not {first.encoding} (byte {raw[first.start]:#04x}); give the file's "
        f"encoding, such as encoding={'utf-16' if wide else 'latin-1'!r}"
    ) from first


def _bytes(path: Path, limit: int = -1) -> bytes:
    """The first `limit` bytes of a file, unpacked where it is compressed with gzip, without a UTF-8 mark."""
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path) if packed else path.open("rb") as file:
            return file.read(limit).removeprefix(codecs.BOM_UTF8)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a file compressed with gzip, got a damaged one ({error})"
        ) from None


def without_gz(path: Path) -> Path:
    """The path without `.gz`, whose suffix tells the format of what is compressed."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def first_line(path: Path, encoding: str | None = None) -> str:
    """The first line of a file, or its first 64 KB; "" where there is no such file."""
    if not path.is_file():
        return ""
    try:
        text = _bytes(path, 1 << 16).decode("utf-8" if encoding is None else encoding, errors="replace")
    except LookupError:  # `read_table` tells of it
        return ""
    return text.splitlines()[0] if text else ""


def _records(path: Path, text: str, separator: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each record, blank lines included (as no fields)."""
    if not quoted:
        for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
            line = line.rstrip("\r\n")
            yield number, line.split(separator) if line else []
        return
    # The limit is one of the csv module as a whole; descriptions of products exceed its default of 128 KB.
    limit = csv.field_size_limit(len(text) + 1)
    line_number = 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        for fields in reader:
            yield line_number, fields
            line_number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line_number}: wrong use of quotes ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _check_widths(path: Path, text: str, separator: str, quoted: bool, width: int) -> None:
    """Raise for the first record that does not have `width` fields, or has nothing in any of them."""
    for line, fields in _records(path, text, separator, quoted):
        if fields and len(fields) != width:
            raise ValueError(
                f"{path}, line {line}: expected {width} fields separated by {separator!r}, got {len(fields)}"
            )
        if fields and not any(fields):
            raise ValueError(f"{path}, line {line}: every field is empty")
