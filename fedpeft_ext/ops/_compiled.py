"""Loads the compiled part, which registers the ops with torch."""

import hashlib
import importlib
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch  # its libraries must be loaded before _C

_LIBRARY = Path(__file__).parents[2] / "csrc" / "library.cpp"
"""The ops' schemas, in a checkout; an installed wheel has no such file."""

_BUILD = "build it with `pip install --no-build-isolation .` in the environment that has torch >= 2.11"


def require_current(build_info: Mapping[str, object], library: Path) -> None:
    """Raise ImportError where `_C` was built from another `library.cpp` than the one beside the package.

    Its ops may then take other arguments than the package gives them.
    """
    if not library.is_file():
        return
    if build_info.get("library_sha256") != hashlib.sha256(library.read_bytes()).hexdigest():
        raise ImportError(f"fedpeft_ext._C was built from another version of {library}: make build")


def why_not_loaded(error: ImportError, torch_version: str, torch_cuda: str | None) -> str:
    """A sentence that says what an environment lacks in which importing `_C` raised `error`.

    Args:
        torch_version: torch.__version__.
        torch_cuda: torch.version.cuda, None of a build for CPUs.
    """
    if isinstance(error, ModuleNotFoundError):
        return f"fedpeft_ext has no compiled part for Python {platform.python_version()}: {_BUILD}"
    if error.path is None:  # it was loaded, and refused to start
        return str(error)
    if tuple(map(int, re.findall(r"\d+", torch_version)[:2])) < (2, 11):
        return f"fedpeft_ext needs torch >= 2.11, found {torch_version} ({error})"
    # As the dynamic linker names them.
    if re.search(r"lib(torch_cuda|cudart)\.so", str(error)):
        has = f"of CUDA {torch_cuda}" if torch_cuda else "without CUDA"
        return (
            f"fedpeft_ext was built for another CUDA than torch's: torch {torch_version} is {has}. Install a "
            f"torch that fits, or this package anew: {_BUILD} ({error})"
        )
    return f"fedpeft_ext._C does not load with torch {torch_version}: {_BUILD} ({error})"


try:
    _C = importlib.import_module("fedpeft_ext._C")
except ImportError as error:
    raise ImportError(why_not_loaded(error, torch.__version__, torch.version.cuda)) from error
require_current(_C.build_info(), _LIBRARY)
