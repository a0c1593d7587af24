"""What CMake decides and says: FEDPEFT_CUDA=AUTO, ON or OFF with and without a CUDA torch and nvcc, and
options of builds for tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)
NINJA = shutil.which(
    "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)

pytestmark = pytest.mark.skipif(
    CMAKE is None or NINJA is None or not (ROOT / "CMakeLists.txt").exists(),
    reason="needs cmake and the sources",
)


def fake_torch(folder: Path, cuda: str | None) -> Path:
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = '2.12.0'\ncuda: Optional[str] = {cuda!r}\n"
    )
    return folder


def fake_nvcc(folder: Path, version: str) -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def configure(tmp_path: Path, option: str, cuda: str | None, nvcc: Path, *arguments: str) -> tuple[int, str]:
    paths = [str(fake_torch(tmp_path / "site", cuda)), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            str(CMAKE),
            "-S",
            str(ROOT),
            "-B",
            str(tmp_path / "build"),
            "-G",
            "Ninja",
            f"-DFEDPEFT_CUDA={option}",
            f"-DCMAKE_MAKE_PROGRAM={NINJA}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDACXX": str(nvcc)},
        capture_output=True,
        text=True,
    )
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


NO_CUDA = "the installed torch 2.12.0 has no CUDA: install a CUDA build of torch"
NO_NVCC = (
    "torch 2.12.0 has CUDA 12.8, but nvcc was not found: "
    "install the CUDA toolkit 12.x or name its nvcc in CUDACXX"
)


@pytest.mark.parametrize(("cuda", "missing"), [(None, NO_CUDA), ("12.8", NO_NVCC)])
def test_without_what_cuda_needs(tmp_path: Path, cuda: str | None, missing: str) -> None:
    code, text = configure(tmp_path / "auto", "AUTO", cuda, tmp_path / "absent")
    assert code == 0
    assert f"FEDPEFT_CUDA=AUTO: building without CUDA kernels: {missing}" in text
    code, text = configure(tmp_path / "on", "ON", cuda, tmp_path / "absent")
    assert code != 0
    assert f"FEDPEFT_CUDA=ON: {missing}" in text


def test_toolkit_of_another_major_version(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "ON", "12.8", fake_nvcc(tmp_path, "13.0"))
    assert code != 0
    assert "torch 2.12.0 has CUDA 12.8, but" in text
    assert "is of CUDA 13.0: install the CUDA toolkit 12.x" in text


def test_off(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "OFF", "13.0", fake_nvcc(tmp_path, "13.0"))
    assert code == 0
    assert "FEDPEFT_CUDA=OFF: building without CUDA kernels" in text


def test_unknown_value(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "MAYBE", None, tmp_path / "absent")
    assert code != 0
    assert "FEDPEFT_CUDA: expected AUTO, ON or OFF, got MAYBE" in text


def configure_with_nvcc(tmp_path: Path, option: str) -> tuple[int, str]:
    """With the nvcc of this machine, for a torch of its release of CUDA."""
    nvcc = Path(str(shutil.which("nvcc")))
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output([str(nvcc), "--version"], text=True))
    assert version is not None
    return configure(tmp_path, option, version[1], nvcc)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_with_cuda(tmp_path: Path) -> None:
    code, text = configure_with_nvcc(tmp_path, "ON")
    assert "FEDPEFT_CUDA=ON: building CUDA kernels for sm_75,sm_80,sm_90" in text
    assert code == 0, text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("listed", "found"), [("8.0;9.0+PTX", "sm_80,sm_90 with"), ("Hopper", None)])
def test_architectures_as_torch_is_told(
    tmp_path: Path, listed: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    code, text = configure_with_nvcc(tmp_path, "AUTO")
    if found is None:
        assert code != 0
        assert "TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0 or 9.0+PTX, got Hopper" in text
    else:
        assert code == 0, text
        assert f"FEDPEFT_CUDA=AUTO: building CUDA kernels for {found}" in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("FEDPEFT_SANITIZE=memory", "expected nothing, address,undefined, thread or race, got memory"),
        ("FEDPEFT_ONLY_ISA=v5", "expected nothing, baseline, v3 or v4, got v5"),
    ],
)
def test_unknown_values_of_builds_for_tests(tmp_path: Path, argument: str, message: str) -> None:
    code, text = configure(tmp_path, "OFF", None, tmp_path / "absent", f"-D{argument}")
    assert code != 0
    assert f"{argument.split('=')[0]}: {message}" in text


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_are_in_every_command(tmp_path: Path, sanitizers: str) -> None:
    arguments = (f"-DFEDPEFT_SANITIZE={sanitizers}", "-DFEDPEFT_ONLY_ISA=baseline", "-DFEDPEFT_EMULATOR=ON")
    code, text = configure(tmp_path, "OFF", None, tmp_path / "absent", *arguments)
    assert code == 0, text
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    assert all(f"-fsanitize={sanitizers} " in command["command"] for command in commands)
    files = {Path(command["file"]).name for command in commands}
    assert "faults.cpp" in files
    assert ("threads.cpp" in files) == (sanitizers == "thread")
    assert not any("kernels_v" in command["command"] for command in commands)


def test_sanitizers_are_no_part_of_the_normal_build(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "OFF", None, tmp_path / "absent")
    assert code == 0, text
    commands = (tmp_path / "build" / "compile_commands.json").read_text()
    assert "-fsanitize" not in commands
    assert "/sanitize/" not in commands


@pytest.mark.parametrize(
    ("compiler", "present", "absent"),
    [("GNU", "-Wno-maybe-uninitialized", "-ffp-contract"), ("Clang", "-ffp-contract=fast", "uninitialized")],
)
def test_options_of_each_compiler(tmp_path: Path, compiler: str, present: str, absent: str) -> None:
    # CMake is told what compiler there is, and what it would else find out of it.
    features = ("cxx_std_20", "cxx_inheriting_constructors", "cxx_user_literals", "cxx_right_angle_brackets")
    told = {
        "COMPILER_ID": compiler,
        "COMPILER_VERSION": "16",
        "COMPILER_FORCED": "ON",
        "STANDARD_COMPUTED_DEFAULT": "17",
        "COMPILE_FEATURES": ";".join(features),
        "20_STANDARD_COMPILE_OPTION": "-std=c++20",
    }
    said = [f"-DCMAKE_CXX{'' if name[0] == '2' else '_'}{name}={value}" for name, value in told.items()]
    code, text = configure(tmp_path, "OFF", None, tmp_path / "absent", *said)
    assert code == 0, text
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    kernels = [command["command"] for command in commands if "kernels_" in command["output"]]
    assert any(present in command for command in kernels)
    assert not any(absent in command for command in kernels)
    assert all("-ffast-math" not in command and "-Ofast" not in command for command in kernels)
