"""A build with sanitizers (.ci/sanitize) ends the process for each planted mistake, and only for those."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

try:
    from fedpeft_ext import _faults  # type: ignore[attr-defined]

    SANITIZERS: str = _faults.sanitizers
except ImportError:
    SANITIZERS = ""

# The mistake, the same call without it, and what the report says.
ADDRESS = {
    "read past a tensor": ("sum(x.data_ptr(), 101)", "sum(x.data_ptr(), 100)", "heap-buffer-overflow"),
    "read before a tensor": ("sum(x.data_ptr() - 4, 2)", "sum(x.data_ptr(), 2)", "heap-buffer-overflow"),
    "write past a tensor": ("fill(x.data_ptr(), 101)", "fill(x.data_ptr(), 100)", "heap-buffer-overflow"),
    "read what was freed": ("sum(freed(x), 100)", "sum(x.data_ptr(), 100)", "heap-use-after-free"),
    "read past an array": ("local_array(8)", "local_array(7)", "buffer-overflow|out of bounds"),
    "read past a vector": ("vector(8)", "vector(7)", "__n < this->size"),
    "overflow": ("product(1 << 30, 2)", "product(1 << 29, 2)", "signed integer overflow"),
    "shift too far": ("shifted(1, 64)", "shifted(1, 62)", "shift exponent 64 is too large"),
    "misaligned read": ("sum(x.data_ptr() + 2, 2)", "sum(x.data_ptr() + 4, 2)", "misaligned address"),
}
THREAD = {"data race": ("count(1000, True)", "count(1000, False)", "data race")}
MISTAKES = {"address,undefined": ADDRESS, "thread": THREAD}.get(SANITIZERS, {})

pytestmark = pytest.mark.skipif(
    not MISTAKES, reason="not a build with sanitizers: `make asan` and `make tsan` make them"
)

PROGRAM = """
import torch
import fedpeft_ext.ops
from fedpeft_ext._faults import *

def freed(x):
    y = x.clone()
    return y.data_ptr()

x = torch.ones(100)
{}
print("survived")
"""


def run(statement: str) -> subprocess.CompletedProcess[str]:
    # -S as in .ci/sanitize.
    return subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM.format(statement)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_seen(name: str) -> None:
    mistake, _, report = MISTAKES[name]
    done = run(mistake)
    assert done.returncode != 0
    assert "survived" not in done.stdout
    assert any(text in done.stderr for text in report.split("|")), done.stderr


def test_nothing_is_seen_without_mistakes() -> None:
    done = run("\n".join(correct for _, correct, _ in MISTAKES.values()))
    assert done.returncode == 0, done.stderr
    assert "survived" in done.stdout
