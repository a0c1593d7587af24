"""More clients than a GPU runs at a time: then a block copies a client's table, or the gradient of its
positions, into shared memory, which small cases leave to other kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import Case, assert_equals_twin, padded_items


def case_of(name: str, clients: int, width: int) -> Case:
    g = torch.Generator().manual_seed(14)
    items = padded_items((clients, 130), 50, g)
    items[:, ::3] = 7  # a row that most positions read

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    calls: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "rq_lookup": (
            lambda o, *t: o.rq_lookup(*t),
            (
                items,
                torch.randint(5, (50, 3), generator=g, dtype=torch.uint8),
                draw(clients, 3, 5, width),
                draw(50, width),
            ),
        ),
        "hash_lookup": (
            lambda o, i, t, h, b: o.hash_lookup(i, t, h, None, "mean", b),
            (
                items,
                draw(clients, 30, width),
                torch.randint(1, 2**61 - 1, (2, 2), generator=g),
                draw(50, width),
            ),
        ),
        "lora_lookup": (
            lambda o, *t: o.lora_lookup(*t),
            (items, draw(clients, 50, 4), draw(clients, width, 4), draw(50, width)),
        ),
        "client_embedding": (lambda o, *t: o.client_embedding(*t), (items, draw(clients, 50, width))),
    }
    run, tensors = calls[name]
    return Case(name, run, tensors)


# Rows of whole vectors, and of single elements.
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 72), (torch.float64, 37), (torch.float16, 72), (torch.bfloat16, 37)],
    ids=str,
)
@pytest.mark.parametrize("name", ["rq_lookup", "hash_lookup", "lora_lookup", "client_embedding"])
def test_equals_its_twin(name: str, dtype: torch.dtype, width: int, target: Any) -> None:
    multiprocessors = 4  # of the emulator
    if target.device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(target.device).multi_processor_count
    case = case_of(name, 8 * multiprocessors, width)
    assert_equals_twin(case.to(target.device), target.ops, dtype)
