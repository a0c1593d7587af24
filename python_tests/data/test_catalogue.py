"""Data sets by name: where they are found, what is said if they are not, and the report on real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedpeft_ext.data import check_dataset, describe_datasets, load_dataset, popularity_scores
from fedpeft_ext.data.catalogue import locate

SHARED = Path(__file__).parents[3] / "shared" / "data"


def available(name: str) -> str | Path:
    """What to load `name` from; skips the test where it is not."""
    if (SHARED / name).is_dir():
        return SHARED / name
    info = next(info for info in describe_datasets() if info.name == name)
    if not info.available:
        pytest.skip(f"{name} is not here; {info.how_to_get}")
    return name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $FEDPEFT_DATA, with no other place to find data sets in."""
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def test_movielens_100k() -> None:
    report = check_dataset(available("ml-100k"))
    assert (report["users"], report["items"], report["interactions"]) == (943, 1682, 100_000)
    assert (
        report["duplicates_dropped"],
        report["items_without_text"],
        report["users_without_test_item"],
    ) == (0, 0, 0)
    assert report["density"] == pytest.approx(0.06305, abs=1e-5)
    assert report["interactions_per_user"]["min"] == 20
    assert report["interactions_per_user"]["max"] == 737
    assert report["order"] == "timestamp"
    json.dumps(report)
    data = load_dataset("ml-100k")
    assert data.item_text is not None
    assert data.item_text[data.item_ids.index("1")] == "Toy Story 1995 Animation Children's Comedy"
    rows = data.candidates(np.arange(943), 100, seed=0)
    assert rows.shape == (943, 101)
    # the popularity baseline lies between chance (0.1) and what models reach
    scores = popularity_scores(data)[rows]
    assert 0.35 < ((scores[:, 1:] >= scores[:, :1]).sum(axis=1) < 10).mean() < 0.5


def test_movielens_1m() -> None:
    report = check_dataset(available("ml-1m"))
    assert report["users"] == 6040
    if report["format"] == "RecBole atomic files":
        assert (report["items"], report["interactions"]) == (3416, 999_611)
        assert report["items_without_text"] == 0


def test_industrial() -> None:
    source = available("industrial")
    report = check_dataset(source)
    assert (report["rows"], report["users"], report["items"]) == (19_897, 3058, 3469)
    assert report["interactions"] + report["duplicates_dropped"] == report["rows"]
    assert report["users_without_test_item"] == 2
    assert any("users with one interaction: 2" in note for note in report["notes"])
    whole = load_dataset(source, items="all")
    assert whole.num_items == 3686
    assert whole.report["items_without_interactions"] == 217


def test_synthetic_report() -> None:
    report = check_dataset("synthetic", num_users=20, num_items=90, interactions_per_user=4)
    assert report["users"] == 20
    assert any("fewer than 100 items that they never met: 20" in note for note in report["notes"])
    json.dumps(report)


def test_names_are_found_in_the_data_folder(folder: Path) -> None:
    for name in ("ml-100k", "mine"):
        (folder / name).mkdir()
        (folder / name / "log.csv").write_text("user,item\na,x\na,y\nb,x\n")
    assert locate("ml-100k") == folder / "ml-100k"
    data = load_dataset("mine")
    assert (data.name, data.num_users) == ("mine", 2)
    assert load_dataset("mine", name="other").name == "other"
    infos = {info.name: info for info in describe_datasets()}
    assert list(infos) == ["ml-100k", "ml-1m", "industrial", "synthetic", "mine"]
    assert [info.available for info in infos.values()] == [True, False, False, True, True]
    assert infos["mine"].path == folder / "mine"
    notes = check_dataset("mine")["notes"]
    assert any("no timestamps" in note and "timestamp_column" not in note for note in notes)
    assert any("no item text" in note for note in notes)
    (folder / "mine" / "log.csv").write_text("user,item,date\na,x,2024-01-02\na,y,2024-01-01\n")
    assert any("'date', name the column as timestamp_column" in n for n in check_dataset("mine")["notes"])


def test_a_missing_data_set_says_how_to_get_it(folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'ml-100k' was not found; to get it: pip install --no-deps recbole==1\.2\.1"
    ):
        load_dataset("ml-100k")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ml-10k", ValueError, "unknown data set 'ml-10k' .*did you mean 'ml-100k'"),
        ("sinthetic", ValueError, "did you mean 'synthetic'"),
        ("qqqq", ValueError, "known names: ml-100k, ml-1m, industrial, synthetic"),
        ("", ValueError, "unknown data set ''"),
        ("./nothing/here", FileNotFoundError, "no such file or folder"),
        ("nothing.csv", FileNotFoundError, "nothing.csv: no such file or folder"),
    ],
)
def test_unknown_names(folder: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset(name)


def test_a_folder_without_interactions(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no interactions found"):
        load_dataset("empty")


def test_a_wrong_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_DATA", "/nowhere/at/all")
    with pytest.raises(
        NotADirectoryError, match="FEDPEFT_DATA: expected a folder with data sets, got '/nowhere/at/all'"
    ):
        load_dataset("ml-100k")
