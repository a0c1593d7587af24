"""Damaged files: every reader answers with what it read or with one clear error that names the file.

Valid files are mutated (cut, spliced, bytes and lines replaced by what readers stumble over) and read. A
short run is part of the default tests; `-m slow` reads thousands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as to_safetensors

from fedpeft_ext.config import Config, ConfigError, load_config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.pretrain import PretrainedCodes, load, load_features, save

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)


def _npy(array: np.ndarray) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "a.npy", array)
        return (Path(folder) / "a.npy").read_bytes()


def _codes() -> bytes:
    codes = PretrainedCodes(
        codes=torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8),
        codebooks=torch.zeros(2, 2, 3),
        usable_rows=2,
        quantization_error=(0.1, 0.2),
        reconstruction_error=(0.1,),
        usage=(1.0, 1.0),
        perplexity=(2.0, 2.0),
        collision_rate=0.0,
        encoder=None,
        num_features=3,
    )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "codes.safetensors", codes)
        return (Path(folder) / "codes.safetensors").read_bytes()


def _settings(path: Path) -> Config:
    return load_config(path)


def _features(path: Path) -> Any:
    return load_features(path)


def _pretrained_codes(path: Path) -> Any:
    return load(path, PretrainedCodes)


READERS: dict[str, tuple[Callable[[Path], Any], dict[str, bytes]]] = {
    "recbole": (
        load_dataset,
        {
            "t.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            b"1\t10\t4.0\t100\n1\t11\t3.5\t101\n2\t10\t1\t99\n2\t12\t5\t1e3\n",
            "t.item": b"item_id:token\ttitle:token_seq\n10\tToy Story\n11\tHeat\n12\tJumanji\n",
        },
    ),
    "movielens-1m": (
        load_dataset,
        {
            "ratings.dat": b"1::10::4::100\n1::11::3::101\n2::10::1::99\n2::12::5::1000\n",
            "movies.dat": b"10::Toy Story (1995)::Animation|Comedy\n11::Heat::Crime\n12::Jumanji::Game\n",
        },
    ),
    "movielens-100k": (
        load_dataset,
        {
            "u.data": b"1\t10\t4\t100\n1\t11\t3\t101\n2\t10\t1\t99\n2\t12\t5\t1000\n",
            "u.item": b"10|Toy Story|01-Jan-1995||http://x|0|1\n11|Caf\xe9|01-Jan-1995||http://x|1|0\n",
        },
    ),
    "csv": (
        load_dataset,
        {"ratings.csv": b'user,item,rating,timestamp\na,"x, y",4,100\na,z,3,101\nb,z,1,99\nb,w,5,1000\n'},
    ),
    "settings": (_settings, {"config.yaml": Config().to_yaml().encode()}),
    "features-npy": (_features, {"features.npy": _npy(FEATURES)}),
    "features": (_features, {"features.safetensors": to_safetensors({"features": FEATURES})}),
    "codes": (_pretrained_codes, {"codes.safetensors": _codes()}),
}

STUMBLING_BLOCKS = [
    *(b"", b"\x00", b"\n", b"\r", b"\r\n", b"\t", b"::", b",", b'"', b"|", b":", b" ", b"'", b"#", b"-"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"\xf0\x9f\x8d\x95", b"\xed\xa0\x80", b"\xc2\x85", b"\\"),
    *(b"nan", b"inf", b"-1", b"1e999", b"9" * 30, b"0x10", b"1_000", b"\xd9\xa1", b"null", b"true", b"1e5"),
    *(b"&a [*a]", b"*a", b"!!python/object:os.system", b"{{{{", b"[" * 3000, b"? ", b"- ", b"2001-99-99"),
    *(b"x" * 5000, b'{"__metadata__":{}}', (2**62).to_bytes(8, "little"), b"\xe2\x80\xa8", b"<<: 1"),
]


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file's bytes."""
    kind = draw(st.sampled_from(["insert", "replace", "cut", "drop line", "repeat line", "swap"]))
    first, second = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    piece = draw(st.sampled_from(STUMBLING_BLOCKS) | st.binary(max_size=6))

    def mutate(data: bytes) -> bytes:
        a, b = sorted((round(first * len(data)), round(second * len(data))))
        lines = data.split(b"\n")
        at, other = int(first * (len(lines) - 1)), int(second * (len(lines) - 1))
        if kind == "insert":
            return data[:a] + piece + data[a:]
        if kind == "replace":
            return data[:a] + piece + data[min(b, a + 8) :]
        if kind == "cut":
            return data[:a] + data[b:]
        if kind == "drop line":
            del lines[at]
        elif kind == "repeat line":
            lines.insert(at, lines[other])
        else:
            lines[at], lines[other] = lines[other], lines[at]
        return b"\n".join(lines)

    return mutate


def check(reader: str, changes: list[tuple[int, Callable[[bytes], bytes]]]) -> None:
    """Read the mutated files of a format."""
    read, files = READERS[reader]
    names = sorted(files)
    contents = dict(files)
    for which, mutate in changes:
        name = names[which % len(names)]
        contents[name] = mutate(contents[name])
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(content)
        path = Path(folder) if read is load_dataset else Path(folder) / names[0]
        result: Any = None
        error: Exception | None = None
        try:
            result = read(path)
        except (ValueError, FileNotFoundError) as refusal:
            error = refusal
    if error is not None:
        assert type(error) in (ValueError, FileNotFoundError, ConfigError), repr(error)
        message = str(error)
        assert len(message) < 20_000, f"{len(message)} characters: {message[:200]}"
        if read is not _settings:  # which names the setting, and the file only where it is not YAML
            assert any(name in message for name in names) or folder in message, message
        return
    if read is load_dataset:
        assert isinstance(result, Dataset)
        result.positives()
        result.met_csr()


CHANGES = st.lists(st.tuples(st.integers(0, 1), mutations()), min_size=1, max_size=4)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=30, deadline=None, suppress_health_check=QUIET)
@given(changes=CHANGES)
def test_damaged_files_are_read_or_refused(
    reader: str, changes: list[tuple[int, Callable[[bytes], bytes]]]
) -> None:
    check(reader, changes)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=2000, deadline=None, suppress_health_check=QUIET)
@given(changes=CHANGES)
def test_thousands_of_damaged_files(reader: str, changes: list[tuple[int, Callable[[bytes], bytes]]]) -> None:
    check(reader, changes)


def _growing() -> str:
    """A small file of 3^40 values."""
    lines = [f"x{n}: &x{n} {{a: *x{n - 1}, b: *x{n - 1}, c: *x{n - 1}}}" for n in range(1, 41)]
    return "x0: &x0 1\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        _growing(),
        "training: &t {rounds: *t}\n",
        "[" * 5_000,
        "training: {rounds: 2001-99-99}\n",
        "? [1, 2]\n: 3\n",
    ],
    ids=["grows", "loops", "deep", "date", "key"],
)
def test_settings_that_do_not_end_are_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "config.yaml")
    assert len(str(error.value)) < 2000
