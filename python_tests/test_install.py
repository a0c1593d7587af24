"""Installations that must fail, without torch or with an old compiled part: one sentence says what to do."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import venv
from pathlib import Path

import pytest

import fedpeft_ext
from fedpeft_ext.ops._compiled import require_current

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
