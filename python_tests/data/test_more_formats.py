"""Parquet files and JSON lines against the same data as CSV, and data that come split into files."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_load import split, write

from fedpeft_ext.data import check_dataset, load_dataset

UTC = datetime.UTC if hasattr(datetime, "UTC") else datetime.timezone.utc
FRAME = pl.DataFrame(
    {
        "user_id": ["a", "b", "a", "b", "a"],
        "parent_asin": ["x", "y", "z", "x", "y"],
        "rating": [5.0, 4.0, 3.5, 1.0, 2.0],
        "timestamp": [1_588_687_728_923, 20, 10, 30, 1_588_687_728_922],
        "verified": [True, False, True, True, True],
        "images": [[{"url": "u"}], [], [], [], []],
    }
)
ITEMS = [
    {"parent_asin": "x", "title": "First", "features": ["small", "red"], "details": {"Brand": "no text"}},
    {"parent_asin": "y", "title": None, "features": [], "price": 3.5, "images": [{"large": "u"}]},
    {"parent_asin": "z", "title": "Third, with 'quotes'", "features": ["blue"], "price": None},
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n\n".join(json.dumps(row) for row in rows).encode()


def as_parquet(frame: pl.DataFrame, path: Path) -> Path:
    frame.write_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_json(frame: pl.DataFrame, path: Path) -> Path:
    path.with_suffix(".jsonl").write_bytes(lines(frame.to_dicts()))
    return path.with_suffix(".jsonl")


def as_packed_json(frame: pl.DataFrame, path: Path) -> Path:
    plain = path.with_suffix(".json.gz")
    plain.write_bytes(gzip.compress(lines(frame.to_dicts())))
    return plain


WRITERS: list[Callable[[pl.DataFrame, Path], Path]] = [as_parquet, as_json, as_packed_json]


@pytest.mark.parametrize("writes", WRITERS)
def test_other_formats_give_what_csv_gives(tmp_path: Path, writes: Any) -> None:
    FRAME.drop("images").write_csv(tmp_path / "log.csv")
    expected = load_dataset(tmp_path / "log.csv", min_rating=1.5)
    file = writes(FRAME, tmp_path / "log")
    found = load_dataset(file, min_rating=1.5)
    assert (found.name, found.digest) == ("log", expected.digest)
    assert split(found) == split(expected) == {"a": (["z", "y"], None, "x"), "b": (["y"], None, None)}
    by_name = load_dataset(file, user_column="parent_asin", item_column=0)
    assert split(by_name)["z"] == (["a"], None, None)


@pytest.mark.parametrize("writes", WRITERS)
def test_items_of_the_amazon_data_are_found(tmp_path: Path, writes: Any) -> None:
    """Reviews `X.jsonl` and items `meta_X.jsonl` in one folder; nested values are no text."""
    writes(FRAME, tmp_path / "Industrial")
    (tmp_path / "meta_Industrial.jsonl").write_bytes(lines(ITEMS))
    found = load_dataset(tmp_path)
    assert found.report["text_columns"] == ["title", "features"]
    assert dict(zip(found.item_ids, found.item_text or [], strict=True)) == {
        "x": "First small red",
        "y": "",
        "z": "Third, with 'quotes' blue",
    }
    assert found.report["format"] == ("Parquet table" if writes is as_parquet else "JSON lines")
    assert load_dataset(tmp_path, min_rating=3).num_interactions == 3


def test_a_list_that_is_none_further_down(tmp_path: Path) -> None:
    rows = [{"user": "a", "item": "x"}, {"user": "a", "item": "y"}]
    (tmp_path / "log.jsonl").write_bytes(lines(rows))
    texts: list[dict[str, Any]] = [{"item": "x", "tags": ["big", "red"]}, {"item": "y", "tags": "none"}]
    (tmp_path / "items.jsonl").write_bytes(lines(texts))
    assert load_dataset(tmp_path).item_text == ["big red", "none"]


def test_columns_of_parquet_that_pandas_made(tmp_path: Path) -> None:
    """Whole numbers as floats for the sake of gaps, times with a zone, categories, lists of texts."""
    noon = datetime.datetime(2024, 5, 31, 12)
    frame = pl.DataFrame(
        {
            "user_id": [1.0, 2.0, 1.0, None],
            "item_id": pl.Series(["x", "y", "y", "x"], dtype=pl.Categorical),
            "timestamp": pl.Series(
                [noon, noon, noon - datetime.timedelta(seconds=1), noon]
            ).dt.replace_time_zone("Europe/Berlin"),
        }
    )
    with pytest.raises(
        ValueError, match=r"log\.parquet, row 3, column 'user_id': expected an id, got nothing"
    ):
        load_dataset(as_parquet(frame, tmp_path / "log"))
    found = load_dataset(tmp_path, incomplete="drop")
    assert split(found) == {"1": (["y"], None, "x"), "2": (["y"], None, None)}
    texts = pl.DataFrame({"item_id": ["x", "y"], "tags": [["a", "b"], None], "vector": [[0.5], [1.0]]})
    as_parquet(texts, tmp_path / "items")
    assert load_dataset(tmp_path, incomplete="drop").item_text == ["a b", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "log.jsonl",
            b'{"user": "a", "item": "x"}\n{"user": \n',
            "log.jsonl, line 2: expected a JSON object",
        ),
        ("log.jsonl", b'{"user": "a", "item": "x"}\n\n[1]\n', r"line 3: .* in each line, got '\[1\]'"),
        ("log.json", b'[{"user": "a"}]', "line 1: expected a JSON object in each line"),
        ("log.jsonl", b"\n", "the file has no JSON object"),
        ("log.jsonl", b'{"user": {"id": 1}}\n', "the file has no JSON object with simple values"),
        (
            "log.jsonl",
            b'{"user": "a", "item": "x"}\n\n{"item": "y"}\n',
            "line 3, column 'user': expected an id",
        ),
        ("log.jsonl", b'{"item": "x"}\n', "no user column among 'item'"),
        ("log.jsonl", b'{"user": "\xe9"}\n', "not utf-8"),
        ("log.parquet", b"user,item\na,x\n", "expected a Parquet file"),
        ("log.csv", b"PAR1\0", "expected a text file, got a Parquet file; name it .parquet"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("late", [b'{"user": "a", "item": "x"}\n' * 2000 + b'{"user": }\n'])
def test_a_line_behind_those_looked_at_is_named_too(tmp_path: Path, late: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(late)
    with pytest.raises(ValueError, match="line 2001: expected a JSON object, got"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("option", [{"separator": ";"}, {"header": False}, {"encoding": "latin-1"}])
def test_options_of_text_files_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    file = as_parquet(FRAME, tmp_path / "log")
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected a CSV or TSV file"):
        load_dataset(file, **option)


# ---- splits that are files

TRAIN = "user_id,parent_asin,rating,timestamp\na,x,5,1\nb,y,4,2\na,w,1,7\nc,x,2,3\n"
VALID = "user_id,parent_asin,rating,timestamp\na,y,5,3\nb,x,4,4\n"
TEST = "user_id,parent_asin,rating,timestamp\na,z,5,2\nb,w,4,9\nd,x,1,1\n"


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("X.train", "X.val", "X.test")])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_stay_what_they_are(tmp_path: Path, names: tuple[str, str, str], packed: bool) -> None:
    for name, text in zip(names, (TRAIN, VALID, TEST), strict=True):
        file = tmp_path / f"{name}.csv{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        if name == names[0]:
            training = file
    (tmp_path / "items.csv").write_text("parent_asin,title\nx,First\n")
    held = load_dataset(tmp_path, validation=True)
    assert split(held) == {"a": (["x", "w"], "y", "z"), "b": (["y"], "x", "w"), "c": (["x"], None, None)}
    assert split(load_dataset(training, validation=True)) == split(held)
    assert (held.item_text or [])[0] == "First"
    assert load_dataset(training).name == ("X" if names[0].startswith("X") else tmp_path.name)
    # By default there is no validation, and one more item to train on, by time.
    assert split(load_dataset(tmp_path)) == {
        "a": (["x", "y", "w"], None, "z"),
        "b": (["y", "x"], None, "w"),
        "c": (["x"], None, None),
    }
    report = check_dataset(tmp_path, validation=True)
    assert report["users_without_training_item"] == 1
    assert any("split as the files are" in note and "d" not in report["name"] for note in report["notes"])
    assert any("users without a training item: 1, left out" in note for note in report["notes"])
    assert any("users without a test item: 1" in note for note in report["notes"])
    # A row that is rated too low is no test item either.
    assert split(load_dataset(tmp_path, min_rating=4.5)) == {"a": (["x", "y"], None, "z")}


def test_parts_of_recbole(tmp_path: Path) -> None:
    head = "user_id:token\titem_id:token\n"
    write(
        tmp_path,
        x__train__inter=head + "a\t1\na\t2\nb\t1\n",
        x__test__inter=head + "b\t2\na\t3\n",
        x__item="item_id:token\ttitle:token_seq\n1\tOne\n",
    )
    found = load_dataset(tmp_path)
    assert split(found) == {"a": (["1", "2"], None, "3"), "b": (["1"], None, "2")}
    assert found.item_text == ["One", "", ""]
    assert not any("no timestamps" in note for note in check_dataset(tmp_path)["notes"])
    with pytest.raises(ValueError, match=r"validation: expected a validation part beside .*x.train.inter"):
        load_dataset(tmp_path, validation=True)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            "a,z\na,v\n",
            "test.csv, line 3, column 'user': expected one item of a user to hold out, got another",
        ),
        (
            "a,x\n",
            "test.csv, line 2, column 'item': expected an item that user 'a' has in no other part than",
        ),
        ("b,q\na,y\n", "valid.csv, line 2, .*no other part than valid.csv, got 'y'"),
        ("a,\n", "test.csv, line 2, column 'item': expected an id, got nothing"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path: Path, test: str, message: str) -> None:
    write(tmp_path, train__csv="user,item\na,x\nb,x\n", valid__csv="user,item\na,y\n")
    write(tmp_path, test__csv="user,item\n" + test)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path, validation=True)
    write(tmp_path, test__csv="user,thing\na,z\n")
    with pytest.raises(ValueError, match=r"test.csv: no item column"):
        load_dataset(tmp_path)


def test_a_training_file_alone_is_split_by_time(tmp_path: Path) -> None:
    write(tmp_path, train__csv="user,item\na,x\na,y\n")
    assert split(load_dataset(tmp_path)) == {"a": (["x"], None, "y")}
    write(tmp_path, x__csv="user,item\n")
    with pytest.raises(ValueError, match="several tables"):
        load_dataset(tmp_path)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 8), st.integers(0, 5)),
        unique_by=lambda row: row[:2],
        min_size=2,
        max_size=25,
    ),
    st.booleans(),
)
def test_a_split_by_files_is_that_of_one_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]], validation: bool
) -> None:
    """Leave-one-out of one file, written as three, gives the same data set."""
    folder = tmp_path_factory.mktemp("split")
    head = "user,item,time\n"
    write(folder, log__csv=head + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    one = load_dataset(folder / "log.csv", validation=validation)
    held = {
        part: {(u, i) for u, i in enumerate(items) if i >= 0}
        for part, items in (("test", one.test_items), ("valid", one.valid_items))
    }
    texts = dict.fromkeys(("train", "valid", "test"), head)
    for u, i, t in rows:
        place = (one.user_ids.index(f"u{u}"), one.item_ids.index(f"i{i}"))
        part = next((part for part in held if place in held[part]), "train")
        texts[part] += f"u{u},i{i},{t}\n"
    (folder / "parts").mkdir()
    write(folder / "parts", **{f"{part}__csv": text for part, text in texts.items()})
    parts = load_dataset(folder / "parts", validation=validation)
    assert split(parts) == split(one)
    assert np.array_equal(np.sort(parts.test_items >= 0), np.sort(one.test_items >= 0))
