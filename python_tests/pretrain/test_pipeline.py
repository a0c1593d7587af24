"""`pretrain` and its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft_ext.config import PretrainConfig
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import PretrainedFull, default_cache_dir, load, pretrain, save
from fedpeft_ext.pretrain import pipeline as pipeline_module

WORDS = ["drama", "comedy", "horror", "sci-fi", "war", "1995", "1996", "1980"]


def dataset(texts: bool = True, items: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(
        name="tiny",
        num_users=1,
        num_items=items,
        indptr=np.array([0, 1]),
        indices=np.array([0]),
        test_items=np.array([1]),
        valid_items=np.array([-1]),
        user_ids=["u"],
        item_ids=[f"i{i}" for i in range(items)],
        item_text=[f"film {i} " + " ".join(rng.choice(WORDS, 3)) for i in range(items)] if texts else None,
    )


def config(folder: Path, **changes: Any) -> PretrainConfig:
    values = {"epochs": 2, "code_epochs": 2, "cache_dir": str(folder)}
    return PretrainConfig.model_validate({**values, **changes})


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("computed although it is in the cache")

    for name in ("fit_text_features", "pretrain_full", "pretrain_codes", "residual_kmeans_codes"):
        monkeypatch.setattr(pipeline_module, name, fail)


@pytest.mark.parametrize("codes", ["rq-vae", "rq-kmeans"])
def test_everything_and_again_from_the_cache(
    codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain(config(tmp_path, codes=codes), dataset(), 6, levels=2, codebook_size=8)
    assert first.full.shape == (40, 6)
    assert first.codes is not None
    assert first.codebooks is not None
    assert first.codes.shape == (40, 2)
    assert first.codebooks.shape == (2, 8, 6)
    json.dumps(first.report)
    assert first.report["items_without_text"] == 0
    assert len(list(tmp_path.iterdir())) == 3
    forbid_training(monkeypatch)
    second = pretrain(config(tmp_path, codes=codes), dataset(), 6, levels=2, codebook_size=8)
    assert second.codes is not None
    assert torch.equal(first.full, second.full)
    assert torch.equal(first.codes, second.codes)
    assert first.report == second.report
    with pytest.raises(AssertionError, match="although"):
        pretrain(config(tmp_path, codes=codes), dataset(), 6, levels=2, codebook_size=8, seed=1)


def test_later_items_go_through_the_whole_chain(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.random.default_rng(0).normal(size=(40, 9)))
    for codes in ("rq-vae", "rq-kmeans"):
        settings = config(tmp_path / "cache", codes=codes, features=str(tmp_path / "f.npy"))
        result = pretrain(settings, dataset(texts=False), 6, levels=2, codebook_size=8)
        assert result.autoencoder is not None
        assert result.quantizer is not None
        features = np.load(tmp_path / "f.npy")
        torch.testing.assert_close(result.autoencoder.encode_new(features), result.full, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.quantizer.encode_new(features), result.quantizer.codes)


def test_cached_and_uncached_results_agree(tmp_path: Path) -> None:
    cached = pretrain(config(tmp_path / "a"), dataset(), 4)
    plain = pretrain(config(tmp_path / "b", cache=False), dataset(), 4)
    assert torch.equal(cached.full, plain.full)
    assert plain.codes is None
    assert not (tmp_path / "b").exists()


def test_damaged_entries_are_computed_anew(tmp_path: Path) -> None:
    first = pretrain(config(tmp_path), dataset(), 4)
    for number, entry in enumerate(sorted(tmp_path.iterdir())):
        entry.write_bytes(b"not safetensors" if number else entry.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="cache: computing anew") as seen:
        second = pretrain(config(tmp_path), dataset(), 4)
    assert len(seen) == 2
    assert torch.equal(first.full, second.full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(config(tmp_path), dataset(), 4)


def test_a_folder_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cache: could not keep"):
        result = pretrain(config(tmp_path / "file" / "cache"), dataset(), 4)
    assert result.full.shape == (40, 4)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fedpeft_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "fedpeft_ext"


def test_save_is_whole_or_not_at_all(tmp_path: Path) -> None:
    result = PretrainedFull(torch.zeros(2, 2), (), 0.0, None)
    with pytest.raises(OSError):
        save(tmp_path / "missing" / "x.safetensors", result)
    save(tmp_path / "x.safetensors", result)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert torch.equal(load(tmp_path / "x.safetensors", PretrainedFull).embedding, result.embedding)
    with pytest.raises(FileNotFoundError, match="expected a saved PretrainedFull"):
        load(tmp_path / "y.safetensors", PretrainedFull)
    with pytest.raises(ValueError, match="does not come from item features"):
        result.encode_new(np.zeros((1, 2)))


def test_random_base_knows_nothing_of_the_items(tmp_path: Path) -> None:
    settings = config(tmp_path, features="random", scale=0.2)
    result = pretrain(settings, dataset(texts=False, items=4000), 8, levels=3, codebook_size=300, seed=5)
    assert abs(float(result.full.std()) - 0.2) < 0.005
    assert result.codes is not None
    assert result.codebooks is not None
    assert result.codes.dtype == torch.int16
    assert len(result.codes.unique()) == 300
    assert result.codebooks.shape == (3, 300, 8)
    again = pretrain(settings, dataset(texts=False, items=4000), 8, levels=3, codebook_size=300, seed=5)
    assert torch.equal(again.full, result.full)
    assert not list(tmp_path.iterdir())


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no item text.*features file.*features='random'"):
        pretrain(config(tmp_path), dataset(texts=False), 4)
    with pytest.raises(ValueError, match="levels: expected at least 1"):
        pretrain(config(tmp_path), dataset(), 4, levels=0)
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        pretrain(config(tmp_path, features="no-such-file.npy"), dataset(), 4)
    np.save(tmp_path / "f.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match="each of the 40 items, got 3 rows"):
        pretrain(config(tmp_path, features=str(tmp_path / "f.npy")), dataset(), 4)


def test_import_is_light() -> None:
    code = (
        "import sys, fedpeft_ext.pretrain\n"
        "heavy = {'sklearn', 'scipy', 'vector_quantize_pytorch', 'sentence_transformers'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
