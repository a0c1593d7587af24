"""Puts the emulated CUDA kernels behind the ops of fedpeft_ext.

Each call runs twice, with the threads of a block from first to last and from last to first; results that are
not bitwise equal would show a missing barrier, a read of shared memory that nothing wrote, or a sum whose
order is not fixed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fedpeft_ext.ops  # noqa: F401  (registers the ops whose names are asked for below)

try:
    from fedpeft_ext import _emulator  # type: ignore[attr-defined]
except ImportError:
    _emulator = None

NAMES = [
    name.removeprefix("fedpeft_ext::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fedpeft_ext::")
]
EMULATED = [
    name
    for name in NAMES
    if _emulator is not None
    and torch._C._dispatch_has_kernel_for_dispatch_key(f"fedpeft_ext_emulated::{name}", "CPU")
]


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of the elements, in order."""
    # A clone, since a dimension of size 1 may have any stride in what counts as contiguous.
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is None and b is None


@contextlib.contextmanager
def backwards(on: bool) -> Iterator[None]:
    """Threads of a block run from last to first where `on`."""
    _emulator.set_backwards(on)
    try:
        yield
    finally:
        _emulator.set_backwards(False)


def in_both_orders(name: str) -> Callable[..., Any]:
    """The emulated op `name`, which checks itself against the other order of threads."""
    op = getattr(torch.ops.fedpeft_ext_emulated, name).default
    written = [
        i
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def call(*args: Any) -> Any:
        copies = [a.clone() if i in written and a is not None else a for i, a in enumerate(args)]
        with backwards(True):
            other = op(*copies)
        result = op(*args)
        if not _same(result, other) or not all(_same(args[i], copies[i]) for i in written):
            raise AssertionError(f"{name}: the result depends on the order of threads")
        return result

    return call


@contextlib.contextmanager
def emulated_kernels() -> Iterator[None]:
    """While active, the ops of fedpeft_ext run the emulated CUDA kernels on CPU tensors."""
    library = torch.library.Library("fedpeft_ext", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an override that is meant here
            for name in EMULATED:
                library.impl(name, in_both_orders(name), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


class Launches:
    """Kernels launched in a block; a call's, which runs in two orders, count once."""

    count: float = 0


@contextlib.contextmanager
def kernel_launches() -> Iterator[Launches]:
    launched, before = Launches(), _emulator.launches()
    yield launched
    launched.count = (_emulator.launches() - before) / 2


@contextlib.contextmanager
def _limited(limit: str, value: int) -> Iterator[None]:
    before = getattr(_emulator, limit)()
    getattr(_emulator, f"set_{limit}")(value)
    try:
        yield
    finally:
        getattr(_emulator, f"set_{limit}")(before)


def grid_limit(blocks: int) -> contextlib.AbstractContextManager[None]:
    """Launches may have `blocks` blocks, which loop where there is more work."""
    return _limited("grid_limit", blocks)


def multiprocessors(count: int) -> contextlib.AbstractContextManager[None]:
    """Kernels choose how they run as on a device with `count` multiprocessors, by default 4."""
    return _limited("multiprocessors", count)


def shared_limit(size: int) -> contextlib.AbstractContextManager[None]:
    """Blocks may have `size` bytes of shared memory."""
    return _limited("shared_limit", size)
