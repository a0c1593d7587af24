"""Reading interactions: every format, the leave-one-out split, filters, and what is refused and how."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_ext.data import Dataset, load_dataset, read_dataset
from fedpeft_ext.data.load import leave_one_out


def write(folder: Path, **files: str | bytes) -> Path:
    """Files named by keyword, '__' standing for '.'; returns the folder."""
    for name, content in files.items():
        raw = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(raw)
    return folder


def split(data: Dataset) -> dict[str, tuple[list[str], str | None, str | None]]:
    """External ids: user -> (training items, validation item, test item)."""
    names = [*data.item_ids, None]
    return {
        user: (
            [data.item_ids[i] for i in data.indices[data.indptr[u] : data.indptr[u + 1]]],
            names[data.valid_items[u]],
            names[data.test_items[u]],
        )
        for u, user in enumerate(data.user_ids)
    }


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ROWS = "b\tx\t5\t30\na\ty\t3\t20\na\tx\t1\t10\nb\tz\t4\t10\na\tz\t4\t30\nb\ty\t2\t20\nc\ty\t5\t1\n"


def test_atomic_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        small__inter=INTER + ROWS,
        small__item="item_id:token\tmovie_title:token_seq\tprice:float\timage_url:token\tclass:token_seq\n"
        "y\tToy Story\t3.5\thttp://y\tAnimation Comedy\nx\tHeat\t\t\tCrime\nw\tNever met\t1\t\t\n",
        small__user="user_id:token\tage:token\na\t3\nb\t4\nc\t5\n",
    )
    for path in (tmp_path, tmp_path / "small.inter"):
        data = load_dataset(path, validation=True)
        # numbered by first appearance
        assert data.user_ids == ["b", "a", "c"]
        assert data.item_ids == ["x", "y", "z"]
        assert split(data) == {"b": (["z"], "y", "x"), "a": (["x"], "y", "z"), "c": (["y"], None, None)}
        assert data.item_text == ["Heat Crime", "Toy Story Animation Comedy", ""]
        assert data.report["users_without_test_item"] == 1
        assert data.report["users_without_validation_item"] == 1
        assert data.report["items_without_text"] == 1
        assert data.report["users_in_user_file"] == 3
        assert data.report["order"] == "timestamp"
    assert load_dataset(tmp_path / "small.inter").name == "small"
    whole = load_dataset(str(tmp_path), items="all", item_text=False)
    assert whole.item_ids == ["x", "y", "z", "w"]
    assert whole.item_text is None
    assert whole.report["items_without_interactions"] == 1


def test_movielens_1m(tmp_path: Path) -> None:
    write(
        tmp_path,
        ratings__dat="1::10::5::978300760\n1::20::3::978300750\n2::10::4::3\n",
        movies__dat="10::Les Misérables (1995)::Drama|Musical\n20::Babe::Children's\n".encode("latin-1"),
    )
    data = load_dataset(tmp_path)
    assert split(data) == {"1": (["20"], None, "10"), "2": (["10"], None, None)}
    assert data.item_text == ["Les Misérables (1995) Drama Musical", "Babe Children's"]


def test_movielens_100k(tmp_path: Path) -> None:
    flags = "|".join("1" if genre in (3, 5) else "0" for genre in range(19))
    write(
        tmp_path,
        u__data="7\t1\t5\t20\n7\t2\t5\t10\n",
        u__item=f"1|Toy Story (1995)|01-Jan-1995||http://imdb|{flags}\n",
    )
    data = load_dataset(tmp_path / "u.data")
    assert split(data) == {"7": (["2"], None, "1")}
    assert data.item_text == ["Toy Story (1995) Animation Comedy", ""]
    assert data.name == tmp_path.name


def test_movielens_latest(tmp_path: Path) -> None:
    write(
        tmp_path,
        ratings__csv="userId,movieId,rating,timestamp\r\n1,5,4.5,2\r\n1,6,0.5,1\r\n\r\n1,7,3,3\r\n",
        movies__csv='movieId,title,genres\r\n5,"American President, The ""x"" (1995)",Comedy|Drama\r\n'
        "6,Odd,(no genres listed)\r\n",
        links__csv="movieId,imdbId\r\n",
    )
    data = load_dataset(tmp_path)
    assert split(data) == {"1": (["6", "5"], None, "7")}
    assert data.item_text == ['American President, The "x" (1995) Comedy Drama', "Odd", ""]
    liked = load_dataset(tmp_path, min_rating=3)
    assert split(liked) == {"1": (["5"], None, "7")}
    assert liked.report["below_min_rating"] == 1


def test_plain_tables(tmp_path: Path) -> None:
    write(
        tmp_path,
        shop__tsv="Customer-ID\tASIN\nu\tp\nu\tq\nu\tr\n",
        items__csv="asin,brand,year,weight,description\np,\"A, B\",1999,3,\"['Fine', 'steel']\"\nq,C,,4,\n",
    )
    data = load_dataset(tmp_path)
    assert data.report["order"] == "file"
    assert split(data) == {"u": (["p", "q"], None, "r")}
    assert data.item_text == ["A, B 1999 Fine steel", "C", ""]
    assert data.report["text_columns"] == ["brand", "year", "description"]


def test_given_columns(tmp_path: Path) -> None:
    write(tmp_path, log__txt="3;u;p\n2;u;q\n1;v;q\n", named__csv="who,what,when\nu,p,2\nu,q,1\n")
    data = read_dataset(
        tmp_path / "log.txt", separator=";", header=False, user_column=1, item_column=2, timestamp_column=0
    )
    assert split(data) == {"u": (["q"], None, "p"), "v": (["q"], None, None)}
    data = load_dataset(
        tmp_path / "named.csv", user_column="who", item_column="what", timestamp_column="when", name="mine"
    )
    assert (data.name, split(data)) == ("mine", {"u": (["q"], None, "p")})


def test_times_that_floats_cannot_tell_apart(tmp_path: Path) -> None:
    late = 1_700_000_000_000_000_001
    write(
        tmp_path,
        log__csv=f"user,item,timestamp\nu,a,{late}\nu,b,{late - 1}\nv,a,0.5\n".replace("v,a,0.5\n", ""),
    )
    assert split(load_dataset(tmp_path)) == {"u": (["b"], None, "a")}


def test_times_of_iso_8601(tmp_path: Path) -> None:
    times = {
        "a": "2024-05-31T00:00",
        "b": "2024-05-31",  # a tie, behind a in the file
        "c": "1969-12-31 23:59:59.5",
        "d": "2024-05-31T02:30:00+02:00",
        "e": "2024-05-30T20:31:00.25-0400",
        "f": "2024-05-31 00:32:00Z",
    }
    rows = "".join(f"u,{item},{time}\n" for item, time in reversed(times.items()) if item not in "ab")
    write(tmp_path, log__csv=f"user,item,time\n{rows}u,a,{times['a']}\nu,b,{times['b']}\n")
    assert split(load_dataset(tmp_path)) == {"u": (["c", "a", "b", "d", "e"], None, "f")}


def test_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, log__csv="user,item,time\nu,c,1\nu,a,1\nv,x,1\nu,b,1\nu,z,0\n")
    assert split(load_dataset(tmp_path))["u"] == (["z", "c", "a"], None, "b")


def test_duplicates(tmp_path: Path) -> None:
    rows = "user,item,time\nu,a,1\nu,b,2\nv,b,0\nu,a,3\nu,a,0.5\n"
    write(tmp_path, log__csv=rows)
    first = load_dataset(tmp_path)
    assert split(first)["u"] == (["a"], None, "b")
    assert first.report["duplicates_dropped"] == 2
    assert split(load_dataset(tmp_path, duplicates="last"))["u"] == (["b"], None, "a")
    with pytest.raises(
        ValueError, match=r"log.csv, line 2, column 'item': user 'u' has a second interaction with item 'a'"
    ):
        load_dataset(tmp_path, duplicates="error")


def test_filters(tmp_path: Path) -> None:
    # item z has one user; without it user c has one item; without c item y has two users, a and b
    write(tmp_path, log__csv="user,item\na,x\na,y\nb,x\nb,y\nc,z\nc,y\nd,x\n")
    core = load_dataset(tmp_path, user_core=2, item_core=2)
    assert (core.user_ids, core.item_ids) == (["a", "b"], ["x", "y"])
    assert core.report["too_few_dropped"] == 3
    assert (core.report["users_dropped"], core.report["items_dropped"]) == (2, 1)
    assert load_dataset(tmp_path, min_interactions=2).user_ids == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"no interactions left of 7 .*item_core=4"):
        load_dataset(tmp_path, item_core=4)


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path) -> None:
    write(tmp_path, log__csv=b"\xef\xbb\xbfuser,item,time\r\n\r\n u , a ,2\r\nu,b, 1 \r\n\r\n")
    assert split(load_dataset(tmp_path)) == {"u": (["b"], None, "a")}
    write(tmp_path, log__csv=b"user,item,time\ru,a,2\ru,b,1\r")
    assert split(load_dataset(tmp_path)) == {"u": (["b"], None, "a")}


@pytest.mark.parametrize("separator", [";", "|", "\t"])
@pytest.mark.parametrize("packed", [False, True])
def test_separators_and_compression_are_found(tmp_path: Path, separator: str, packed: bool) -> None:
    def file(text: str) -> bytes:
        raw = text.replace(",", separator).encode("utf-8-sig")
        return gzip.compress(raw, mtime=0) if packed else raw

    ending = ".csv.gz" if packed else ".csv"
    (tmp_path / f"log{ending}").write_bytes(file("user,item,time\r\nu,b,2\r\nu,a,1\r\n"))
    (tmp_path / f"items{ending}").write_bytes(file("item,title\r\na,Motörhead\r\n"))
    for options in ({}, {"separator": separator}):
        data = load_dataset(tmp_path, **options)
        assert split(data) == {"u": (["a"], None, "b")}
        assert data.item_text == ["", "Motörhead"]
    assert load_dataset(tmp_path / f"log{ending}").name == "log"


def test_an_item_file_may_have_another_separator(tmp_path: Path) -> None:
    write(tmp_path, log__csv="user;thing\nu;a\nu;b\n", items__csv="title,thing\nHeat,a\n")
    for column in (1, "thing"):
        assert load_dataset(tmp_path, separator=";", item_column=column).item_text == ["Heat", ""]


def test_incomplete_rows_are_left_out_where_asked(tmp_path: Path) -> None:
    write(tmp_path, log__csv="user,item,rating,time\nu,a,1,1\nu,b,5,\n ,a,5,1\nu,c,,3\nu,d,5,4\n")
    data = load_dataset(tmp_path, incomplete="drop")
    assert split(data) == {"u": (["a", "c"], None, "d")}
    assert data.report["incomplete_dropped"] == 2
    assert load_dataset(tmp_path, incomplete="drop", min_rating=1).report["incomplete_dropped"] == 3
    write(tmp_path, log__csv="user,item,time\nu,a,\n")
    with pytest.raises(ValueError, match="no interactions, all rows are incomplete"):
        load_dataset(tmp_path, incomplete="drop")


CSV_ERRORS: list[tuple[str | bytes, str]] = [
    ("", "log.csv: the file is empty"),
    ("\n", "the file is empty"),
    ("user,item\n", "no interactions, the table has no rows"),
    ("\nuser,item\na,b\n", "line 1: expected the names of the columns, got a blank line"),
    ("user,thing\na,b\n", r"no item column among 'user', 'thing' .*item_column"),
    ("a,b\nc,d\n", r"no user column .*header=False if the first line is a row"),
    ("user/item\n1/2\n", r"one column alone: give the character between columns as separator"),
    ("user,user,item\na,b,c\n", "two columns are named 'user'"),
    ("user,item\na,b\n\n,c\n", "line 4, column 'user': expected an id, got nothing"),
    ("user,item\na,b\na,\n", "line 3, column 'item': expected an id, got nothing"),
    ("user,item\na,b\na,  \n", "line 3, column 'item': expected an id, got nothing"),
    ("user,item,time\na,b,1\na,c,soon\n", "line 3, column 'time': expected a number, got 'soon'"),
    ("user,item,time\na,b,1\na,c,nan\n", "line 3, column 'time': expected a number, got 'nan'"),
    ("user,item,time\na,b,1\na,c,inf\n", "line 3, column 'time': expected a number, got 'inf'"),
    ("user,item,time\na,b,1\na,c,\n", "line 3, column 'time': expected a time, got nothing; 1 row does"),
    ("user,item,time\na,,1\n,c,\n", "line 2, column 'item': .* 2 rows lack .*incomplete='drop'"),
    ("user,item,time\na,b,1\na,c,-5\n", "line 3, column 'time': expected a time of at least 0, got -5"),
    ("user,item,time\na,b,1\na,c\n", "line 3: expected 3 fields separated by ',', got 2"),
    ("user,item,time\na,b,1\na,c,2,3\n", "line 3: expected 3 fields separated by ',', got 4"),
    ("user,item,time\na,b,1\n,,\n", "line 3: every field is empty"),
    ('user,item,time\n"a\n",b,1\na,c,x\n', "line 4, column 'time': expected a number, got 'x'"),
    ('user,item\na,b\na,"c\n', "line 3: wrong use of quotes"),
    (
        "user,item,time\na,b,2024-05-31\na,c,7\n",
        "line 3, column 'time': expected a number, or a time .* got '7'",
    ),
    ("user,item,time\na,b,2024-05-31\na,c,\n", "line 3, column 'time': expected .*, got nothing"),
    ("user,item,time\na,b,2024-02-30\n", "line 2, column 'time': expected .*, got '2024-02-30'"),
    ("user,item,time\na,b,31/05/2024\n", "such as 2024-05-31 or 2024-05-31T18:00:00Z, got '31/05/2024'"),
    (b"user,item\na,b\na,\xe9\n", "line 3: not utf-8 .*encoding='latin-1'"),
    ("user,item\na,b\n".encode("utf-16"), "not utf-8 .*encoding='utf-16'"),
    (gzip.compress(b"user,item\na,b\n", mtime=0)[:-9], "compressed with gzip, got a damaged one"),
    (b"PK\x03\x04\0", "expected a text file, got a zip archive or a spreadsheet"),
]


@pytest.mark.parametrize(("content", "message"), CSV_ERRORS)
def test_malformed_tables_are_refused_with_their_place(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    write(tmp_path, log__csv=content)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(tmp_path)
    assert "log.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a__inter": "user_id\titem_id\n1\t2\n"}, r"a.inter, line 1: expected tab-separated `name:type`"),
        ({"a__inter": "user_id:text\titem_id:token\n1\t2\n"}, "with a type of token, .*got 'user_id:text'"),
        ({"a__inter": INTER + "1\t2\t3\n"}, "line 2: expected 4 fields"),
        (
            {"a__inter": INTER + ROWS, "a__item": "item_id:token\tt:token\n\tx\n"},
            "a.item, line 2, column 'item_id'",
        ),
        ({"a__inter": INTER + ROWS, "a__user": "age:token\n3\n"}, "a.user: no user column"),
        ({"a__inter": INTER, "b__inter": INTER}, "several .inter files"),
        ({"a__csv": "user,item\n", "b__tsv": "user\titem\n"}, r"several tables \(a.csv, b.tsv\)"),
        ({"ratings__dat": "1::2::3\n"}, "ratings.dat, line 1: expected 4 fields separated by '::', got 3"),
        ({"u__data": "1\t2\t3\tx\n"}, "u.data, line 1, column 'timestamp': expected a number, .*, got 'x'"),
    ],
)
def test_malformed_folders_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_interactions": 0}, ValueError, "min_interactions: expected at least 1, got 0"),
        ({"user_core": 2.5}, TypeError, "user_core: expected an integer, got 2.5"),
        ({"item_core": True}, TypeError, "item_core: expected an integer, got True"),
        ({"validation": "yes"}, TypeError, "validation: expected true or false, got 'yes'"),
        ({"duplicates": "some"}, ValueError, "duplicates: expected 'first' or 'last' or 'error', got 'some'"),
        ({"items": "none"}, ValueError, "items: expected 'met' or 'all'"),
        ({"min_rating": "4"}, TypeError, "min_rating: expected a number, got '4'"),
        ({"min_rating": float("nan")}, ValueError, "min_rating: expected -inf to inf, got nan"),
        ({"min_rating": 3}, ValueError, "min_rating: .* has no rating column"),
        ({"user_column": "usr"}, ValueError, "user_column: .* has no column 'usr' .*did you mean 'user'"),
        ({"item_column": 7}, ValueError, "item_column: .* has columns 0 to 1, got 7"),
        ({"item_column": 0}, ValueError, "item_column: expected another column .* of the user, got 'user'"),
        ({"timestamp_column": "item"}, ValueError, "timestamp_column: expected another .* the item, got"),
        ({"encoding": 5}, TypeError, "encoding: expected a name such as 'latin-1', got 5"),
        ({"incomplete": "keep"}, ValueError, "incomplete: expected 'error' or 'drop', got 'keep'"),
        ({"item_file": "nowhere.csv"}, FileNotFoundError, "nowhere.csv: no such file"),
        ({"encoding": "utf-9"}, ValueError, "encoding: 'utf-9'"),
        ({"separator": ""}, ValueError, "separator: expected ASCII characters, got ''"),
        ({"min_interaction": 3}, TypeError, "no option 'min_interaction'; did you mean 'min_interactions'"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    write(tmp_path, log__csv="user,item\na,b\n")
    with pytest.raises(error, match=message):
        load_dataset(tmp_path, **options)


def test_a_user_with_one_interaction_keeps_it_for_training(tmp_path: Path) -> None:
    write(tmp_path, log__csv="user,item\nu,a\n")
    data = load_dataset(tmp_path, validation=True)
    assert split(data) == {"u": (["a"], None, None)}
    assert data.report["users_without_test_item"] == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.booleans())
def test_leave_one_out(counts: list[int], validation: bool) -> None:
    users = np.repeat(np.arange(len(counts)), counts)
    items = np.arange(len(users)) * 3
    indptr, indices, test, valid = leave_one_out(users, items, len(counts), validation)
    for u, count in enumerate(counts):
        held = [item for item in (valid[u], test[u]) if item >= 0]
        own = [*indices[indptr[u] : indptr[u + 1]], *held]
        np.testing.assert_array_equal(own, items[users == u])
        assert len(held) == min(count - 1, 2 if validation else 1)
        assert (test[u] >= 0) == (count > 1)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=25),
    st.sampled_from(["first", "last"]),
)
def test_against_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]], keep: Any
) -> None:
    folder = tmp_path_factory.mktemp("loop")
    write(folder, log__csv="user,item,time\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    expected: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        own = expected.setdefault(f"u{user}", [])
        if keep == "last" and f"i{item}" in own:
            own.remove(f"i{item}")
        if f"i{item}" not in own:
            own.append(f"i{item}")
    data = load_dataset(folder, duplicates=keep)
    for user, (train, _, test) in split(data).items():
        assert [*train, *([test] if test else [])] == expected.pop(user)
    assert not expected
