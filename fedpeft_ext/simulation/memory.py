"""Memory on the host for tables that are used a few scattered rows at a time.

From a few megabytes on, a row at random costs a walk of the page tables besides its cache lines. Huge pages
save that, where Linux lets programs ask for them (/sys/kernel/mm/transparent_hugepage/enabled is `madvise`,
as most distributions have it, or `always`). A huge page takes all of its memory when one byte of it is
written, so that they are for tables that fill up.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which a table is worth memory of its own."""


def table_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, huge: bool) -> Tensor:
    """Zeros, whose memory on the host the system gives when it is written, page by page.

    Args:
        shape, dtype, device: as for `torch.zeros`.
        huge: ask for huge pages.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    # Straight from the system: NumPy asks for huge pages always, torch's zeros are written at once.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def on_huge_pages(table: Tensor) -> Tensor:
    """The same values in huge pages; the tensor itself where it is small or not on the host."""
    if table.device.type != "cpu" or table.numel() * table.element_size() < LARGE:
        return table
    return table_zeros(table.shape, table.dtype, table.device, huge=True).copy_(table.detach())
