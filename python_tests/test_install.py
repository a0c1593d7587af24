"""Installations that must fail, without torch or with a compiled part that does not fit, in one sentence that
says what to do; and what the compiled part asks of the torch that it meets."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

import fedpeft_ext
from fedpeft_ext.ops._compiled import require_current, why_not_loaded

ROOT = Path(__file__).parents[1]


def test_a_checkout_refuses_a_compiled_part_of_other_schemas(tmp_path: Path) -> None:
    library = tmp_path / "csrc" / "library.cpp"
    require_current({}, library)  # an installed wheel has no sources beside it
    library.parent.mkdir()
    library.write_bytes((ROOT / "csrc" / "library.cpp").read_bytes())
    require_current(fedpeft_ext._C.build_info(), library)
    library.write_text(library.read_text() + "// changed")
    for build_info in (fedpeft_ext._C.build_info(), {}):  # {}: built before it said so
        with pytest.raises(ImportError, match=r"built from another version of .*library\.cpp.*make build"):
            require_current(build_info, library)
    require_current({"library_sha256": hashlib.sha256(library.read_bytes()).hexdigest()}, library)


def unloadable(text: str) -> ImportError:
    return ImportError(text, path="_C.so")


@pytest.mark.parametrize(
    ("error", "torch_version", "torch_cuda", "said"),
    [
        (ModuleNotFoundError("No module"), "2.13.0", None, r"no compiled part for Python 3\.\d+\.\d+: build"),
        (ImportError("FEDPEFT_ISA: expected"), "2.13.0", None, r"^FEDPEFT_ISA: expected$"),
        (unloadable("undefined symbol: a"), "2.9.1+cpu", None, r"torch >= 2\.11, found 2\.9\.1\+cpu"),
        (
            unloadable("libtorch_cuda.so: cannot open"),
            "2.13.0+cpu",
            None,
            r"torch 2\.13\.0\+cpu is without CUDA",
        ),
        (unloadable("libcudart.so.13: cannot open"), "2.13.0+cu126", "12.6", r"\+cu126 is of CUDA 12\.6"),
        (unloadable("`GLIBC_2.34' not found"), "2.13.0", None, r": build it with .*`GLIBC_2\.34' not found"),
    ],
)
def test_a_compiled_part_that_does_not_load(
    error: ImportError, torch_version: str, torch_cuda: str | None, said: str
) -> None:
    assert re.search(said, why_not_loaded(error, torch_version, torch_cuda))


STABLE = re.compile(r"aoti_torch_|torch_|_?Py|__[atu]b?san")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_compiled_part_takes_only_the_stable_abi_from_torch() -> None:
    # torch's libraries export parts of a newer libstdc++, without a version. Bound to those, an extension
    # needs them of every other torch, and a wheel's tag does not know how new a libstdc++ it needs.
    listed = subprocess.check_output(["nm", "-D", "--undefined-only", fedpeft_ext._C.__file__], text=True)
    needed = {name for kind, name in (line.split()[-2:] for line in listed.splitlines()) if kind == "U"}
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert not {name for name in needed if "@" not in name and not STABLE.match(name)}


@pytest.mark.slow  # needs a package index
def test_without_torch_the_build_says_what_to_do(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def pip_install(*args: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    tools = pip_install("scikit-build-core>=0.10", "pybind11>=2.13", "cmake>=3.24", "ninja")
    assert tools.returncode == 0, tools.stderr
    build_dir = f"build-dir={tmp_path / 'build'}"
    result = pip_install("--no-build-isolation", "--no-deps", "-C", build_dir, str(ROOT))
    assert result.returncode != 0
    said = re.sub(r"\s+", " ", result.stdout + result.stderr)
    assert "fedpeft_ext needs torch >= 2.11 in the environment that builds it: install torch first" in said
