"""The server's weighted mean, its optimizers, and independence of how uploads come in."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft_ext.simulation.aggregation import BETA1, BETA2, TAU, Aggregator


def uploads(clients: int, items: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Updates of a small parameter and of rows of a table, with weights; padded rows carry garbage."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(items, generator=generator)[:3].sort().values for _ in range(clients)])
    rows[0, 2] = -1
    updates = {
        "small": torch.randn(clients, 2, 3, generator=generator),
        "table": torch.randn(clients, 3, 4, generator=generator),
    }
    return updates, torch.rand(clients, generator=generator, dtype=torch.float64) + 0.5, rows


def expected_mean(
    updates: dict[str, Tensor], weights: Tensor, rows: Tensor, items: int
) -> dict[str, np.ndarray]:
    table = np.zeros((items, 4))
    for update, weight, at in zip(updates["table"], weights, rows, strict=True):
        for value, row in zip(update, at.tolist(), strict=True):
            if row >= 0:
                table[row] += float(weight) * value.double().numpy()
    small = np.einsum("c,cij->ij", weights.numpy(), updates["small"].double().numpy())
    total = float(weights.sum())
    return {"small": small / total, "table": table / total}


# 12 rows are fewer than the touched positions (dense step), 1000 are more (touched rows only).
@pytest.mark.parametrize("items", [12, 1000])
def test_weighted_mean(items: int) -> None:
    updates, weights, rows = uploads(5, items)
    parameters = {"small": torch.ones(2, 3), "table": torch.ones(items, 4)}
    aggregator = Aggregator(parameters, frozenset({"table"}))
    for round in range(2):  # the second round starts from clean sums
        before = {name: p.clone() for name, p in parameters.items()}
        aggregator.add({k: v[:2] for k, v in updates.items()}, weights[:2], rows[:2])
        aggregator.add({k: v[2:] for k, v in updates.items()}, weights[2:], rows[2:])
        aggregator.apply()
        for name, mean in expected_mean(updates, weights, rows, items).items():
            np.testing.assert_allclose(
                (parameters[name] - before[name]).numpy(), mean, atol=1e-6, err_msg=f"{name} {round}"
            )


def test_same_bits_however_uploads_come_in() -> None:
    updates, weights, rows = uploads(7, 50, seed=1)
    results = []
    for cuts in ([0, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 7]):
        parameters = {"small": torch.zeros(2, 3), "table": torch.zeros(50, 4)}
        aggregator = Aggregator(parameters, frozenset({"table"}))
        for a, b in pairwise(cuts):
            aggregator.add({k: v[a:b] for k, v in updates.items()}, weights[a:b], rows[a:b])
        aggregator.apply()
        results.append(parameters)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_server_adam_is_fedadam() -> None:
    parameter = torch.zeros(3, dtype=torch.float64)
    aggregator = Aggregator({"p": parameter}, frozenset(), "adam", lr=0.1)
    first = second = np.zeros(3)
    value = np.zeros(3)
    for round in range(3):
        delta = np.array([1.0, -2.0, 0.0]) * (round + 1)
        aggregator.add({"p": torch.from_numpy(delta)[None]}, torch.ones(1, dtype=torch.float64))
        aggregator.apply()
        first = BETA1 * first + (1 - BETA1) * delta
        second = BETA2 * second + (1 - BETA2) * delta**2
        value = value + 0.1 * first / (np.sqrt(second) + TAU)
        np.testing.assert_allclose(parameter.numpy(), value, atol=1e-12)


def test_a_round_without_uploads_changes_nothing() -> None:
    parameter = torch.ones(3)
    aggregator = Aggregator({"p": parameter}, frozenset())
    aggregator.apply()
    assert torch.equal(parameter, torch.ones(3))


def test_a_parameter_of_one_number() -> None:
    parameter = torch.tensor(1.0)
    aggregator = Aggregator({"p": parameter}, frozenset())
    aggregator.add({"p": torch.tensor([1.0, 3.0])}, torch.ones(2, dtype=torch.float64))
    aggregator.apply()
    assert float(parameter) == 3.0


def test_a_transposed_parameter() -> None:
    parameter = torch.zeros(3, 2).t()
    aggregator = Aggregator({"p": parameter}, frozenset())
    updates = torch.arange(12.0).view(2, 2, 3)
    aggregator.add({"p": updates}, torch.ones(2, dtype=torch.float64))
    aggregator.apply()
    assert torch.equal(parameter, updates.mean(0))
