"""Memory of large tables: zeros of any shape, aligned, given by the system only where it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fedpeft_ext.simulation.client_batch import lazy_zeros
from fedpeft_ext.simulation.memory import LARGE, on_huge_pages, table_zeros


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (), (5, 2), (LARGE // 8 - 1, 1), (LARGE // 64 + 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype, huge: bool) -> None:
    zeros = table_zeros(shape, dtype, torch.device("cpu"), huge=huge)
    assert (zeros.shape, zeros.dtype) == (shape, dtype)
    assert zeros.is_contiguous()
    assert zeros.numel() == 0 or zeros.data_ptr() % 64 == 0  # rows of whole cache lines stay so
    assert not zeros.any()
    zeros.fill_(2.0)
    assert zeros.double().sum() == 2 * zeros.numel()


def test_values_move_and_small_tables_stay() -> None:
    small, large = torch.randn(3, 4), torch.randn(LARGE // 16, 4)
    assert on_huge_pages(small) is small
    moved = on_huge_pages(large)
    assert moved.data_ptr() != large.data_ptr()
    assert torch.equal(moved, large)


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_clients_without_a_state_take_no_memory() -> None:
    state = lazy_zeros(torch.zeros(1, 256), 1 << 18, huge=False)  # 256 MiB
    before = resident_bytes()
    state[:: 1 << 11] = 1.0
    assert resident_bytes() - before < 32 << 20
