"""Names the machine: a figure without it is worth nothing."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import torch

from fedpeft_ext import _C


def processor() -> str:
    """Model name and cores, as "AMD EPYC x 2"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if models:
            return f"{' '.join(models[0].split())} x {len(models)}"
    return platform.processor() or platform.machine()


def machine() -> str:
    """Processor, GPU if there is one, instruction set in use and torch's version."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}{gpu}, kernels {_C.build_info()['isa_in_use']}, torch {torch.__version__}"


def slug() -> str:
    """`processor()` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed rather than give it back to the kernel, whatever is measured.

    Else a result of some megabytes costs a page fault for every 4 KB in some orders of calls and none in
    others: 4 ms for 4 MB on a virtual machine, where filling it takes 0.5.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, which has other habits
        return
    trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
    mallopt(trim_threshold, never)
    mallopt(mmap_threshold, 2**30)
