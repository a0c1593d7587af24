"""Installation where it must fail: without torch, one sentence says what to do. Needs a package index."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
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
