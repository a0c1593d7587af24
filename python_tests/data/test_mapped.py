"""Data sets in files that are mapped into memory: equal to those in memory, whole or refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedpeft_ext.cli import app
from fedpeft_ext.data import (
    Dataset,
    MappedDataset,
    check_dataset,
    convert_dataset,
    load_dataset,
    mapped,
    save_dataset,
    synthetic,
    synthetic_dataset,
)
from fedpeft_ext.data.dataset import IntArray
from fedpeft_ext.simulation.client_batch import Interactions

ARRAYS = ("indptr", "indices", "test_items", "valid_items")
OPTIONS: dict[str, Any] = {"num_users": 90, "num_items": 50, "interactions_per_user": 6, "seed": 3}


def assert_same(one: Dataset, other: Dataset) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("user_ids", "item_ids", "item_text"):
        assert list(getattr(one, name)) == list(getattr(other, name)), name
    assert all(map(np.array_equal, one.positives(), other.positives()))
    assert all(map(np.array_equal, one.met_csr(), other.met_csr()))
    assert (one.name, one.report, one.digest) == (other.name, other.report, other.digest)
    users = np.flatnonzero(one.test_items >= 0)
    assert np.array_equal(one.candidates(users, 20, seed=1), other.candidates(users, 20, seed=1))


@pytest.fixture
def saved(tmp_path: Path) -> MappedDataset:
    return save_dataset(synthetic_dataset(**OPTIONS, validation=True), tmp_path / "set")


def test_what_is_saved_is_read_back(saved: MappedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(synthetic_dataset(**OPTIONS, validation=True), saved)
    saved.verify()
    assert not saved.indices.flags.writeable
    assert {path.name for path in saved.path.parent.iterdir()} == {"set"}
    monkeypatch.setattr(mapped, "_AT_A_TIME", 64)  # users and texts in many pieces
    again = save_dataset(saved, saved.path.with_name("again"))
    assert_same(saved, again)
    again.verify()
    assert load_dataset(again.path, name="other").name == "other"


def test_synthetic_data_are_written_as_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK_INTERACTIONS", 100)
    written = convert_dataset("synthetic", tmp_path / "set", **OPTIONS)
    assert isinstance(written, MappedDataset)
    assert_same(synthetic_dataset(**OPTIONS), written)


@settings(deadline=None, max_examples=8)
@given(texts=st.lists(st.text(max_size=5), max_size=12), seed=st.integers(0, 3))
def test_texts(tmp_path_factory: pytest.TempPathFactory, texts: list[str], seed: int) -> None:
    folder = tmp_path_factory.mktemp("texts") / "set"
    numbers = np.random.default_rng(seed).integers(0, 9, 3)
    data = Dataset(
        "x", 1, 9, np.array([0, 1]), numbers[:1], np.array([-1]), np.array([-1]), ["u"], list("abcdefghi")
    )
    with mapped.DatasetWriter(folder, "x", 1, 9) as writer:
        writer.add_users(np.array([1]), data.indices, data.test_items, data.valid_items)
        writer.add_texts("user_ids", data.user_ids)
        writer.add_texts("item_ids", data.item_ids)
        writer.add_texts("other", texts)
        writer.finish({})
    found = mapped._texts(folder, "other")
    assert list(found) == texts
    assert [found[i] for i in range(len(texts))] == texts
    assert found[1:4] == texts[1:4]
    assert found.count("") == texts.count("")
    assert found.count("a") == texts.count("a")
    if texts:
        assert found[-1] == texts[-1]
    with pytest.raises(IndexError):
        found[len(texts)]


def test_a_damaged_folder_is_refused(saved: MappedDataset) -> None:
    meta, path = saved.path / "dataset.json", saved.path / "indices.npy"
    whole, text = path.read_bytes(), meta.read_text()
    for content, reason in ((whole[:-3], "damaged"), (whole[:-8], "damaged"), (whole[:50], "damaged")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"indices.npy: {reason}"):
            load_dataset(saved.path)
    path.write_bytes(whole[:-8] + bytes(8))  # another item: only a full check finds it
    with pytest.raises(ValueError, match="SHA-256"):
        check_dataset(saved.path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file, which belongs to the data set"):
        load_dataset(saved.path)
    path.write_bytes(whole)
    for wrong, reason in (
        (text.replace('"format": 1', '"format": 9'), "expected format 1, got 9"),
        ("{", "not the description"),
        ("[]", "not the description"),
        (json.dumps({"format": 1}), "not the description"),
    ):
        meta.write_text(wrong)
        with pytest.raises(ValueError, match=reason):
            load_dataset(saved.path)
    meta.write_text(text)
    load_dataset(saved.path)
    with pytest.raises(TypeError, match="no option 'min_rating'"):
        load_dataset(saved.path, min_rating=3)


class _Full:
    """A file that cannot bring its last bytes to disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def close(self) -> None:
        self.file.close()
        raise OSError("the disk is full")


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    none = np.array([-1])

    def write(num_users: int, counts: IntArray, items: IntArray, finish: bool = True) -> None:
        with mapped.DatasetWriter(tmp_path / "set", "x", num_users, 9) as writer:
            writer.add_users(counts, items, none, none)
            writer.add_texts("user_ids", ["u"] * num_users)
            writer.add_texts("item_ids", list("abcdefghi"))
            if not finish:
                raise KeyboardInterrupt
            writer.finish({})

    with pytest.raises(KeyboardInterrupt):
        write(1, np.array([1]), np.array([2]), finish=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a user has an item twice"):
        write(1, np.array([2]), np.array([2, 2]))
    with pytest.raises(ValueError, match="indptr: expected shape"):
        write(2, np.array([1]), np.array([2]))

    writer = mapped.DatasetWriter(tmp_path / "set", "x", 1, 9)
    writer._files["indptr"] = _Full(writer._files["indptr"])  # type: ignore[assignment]
    with pytest.raises(OSError, match="disk is full"):
        writer.__exit__(None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="expected a new or empty folder"):
            mapped.DatasetWriter(taken, "x", 1, 9)


def test_convert_on_the_command_line(tmp_path: Path) -> None:
    runner, folder = CliRunner(), str(tmp_path / "set")
    options = [f"--set={key}={value}" for key, value in OPTIONS.items()]
    done = runner.invoke(app, ["convert", "synthetic", folder, *options])
    assert done.exit_code == 0, done.output
    assert "90 users, 50 items" in done.output
    assert "interactions" in runner.invoke(app, ["data", folder]).output
    assert runner.invoke(app, ["convert", "synthetic", folder]).exit_code == 2
    assert runner.invoke(app, ["convert", "synthetic", folder + "2", "-s", "nusers=1"]).exit_code == 2


def test_a_mapped_data_set_does_not_take_memory(tmp_path: Path) -> None:
    """Of 24 MB of interactions, and as many sorted ones, nothing is kept by the process itself."""
    options = OPTIONS | {"num_users": 50_000, "num_items": 2000, "interactions_per_user": 60}
    convert_dataset("synthetic", tmp_path / "set", **options, item_text=False)
    tracemalloc.start()
    try:
        dataset = load_dataset(tmp_path / "set")
        interactions = Interactions(dataset, torch.device("cpu"))
        dataset.candidates(np.arange(100), 50)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(interactions.items) * 8 > 20e6
    assert held < 2e6
