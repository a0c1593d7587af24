"""Compressed uploads: bytes as encoded, no bias, nothing lost with error feedback, alike in every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_federation import DIM, small_config
from torch import Tensor

from fedpeft_ext.config import Config, ConfigError
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.compression import TopK, decode, encode, largest, make_stage
from fedpeft_ext.simulation.uploads import Uploads

METHODS: list[Any] = ["fp16", "int8", "top-k"]
SHAPES = {"small": torch.Size([2, 3]), "table": torch.Size([9, 5])}


def config(**changes: Any) -> Config:
    return small_config(**{"training.rounds": 3, "training.optimizer": "sgd", "training.lr": 0.5, **changes})


def trained(dataset: Dataset, pretrained: Pretrained, **changes: Any) -> dict[str, Tensor]:
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    for _ in range(3):
        simulator.round()
    return {name: tensor.clone() for name, tensor in simulator.state_dict().items()}


def uploads(whole: bool, round: int = 4) -> Uploads:
    """Three clients; with `whole` the same tables in full. Padded rows carry garbage."""
    generator = torch.Generator().manual_seed(0)
    small, table = torch.randn(3, 2, 3, generator=generator), torch.randn(3, 4, 5, generator=generator)
    rows = torch.tensor([[0, 2, 5, 8], [1, -1, -1, -1], [3, 4, -1, -1]])
    if whole:
        full = torch.zeros(3, 9, 5)
        for c in range(3):
            full[c, rows[c][rows[c] >= 0]] = table[c][rows[c] >= 0]
        table = full
    return Uploads(
        {"small": small, "table": table},
        torch.ones(3, dtype=torch.float64),
        None if whole else rows,
        frozenset() if whole else frozenset({"table"}),
        torch.tensor([7, 3, 11]),
        round,
    )


def parameters() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_stage_yields_what_the_bytes_decode_to(method: Any, whole: bool) -> None:
    sent = uploads(whole)
    parts = list(make_stage(method, parameters(), share=0.2, seed=5)(sent))
    received = {name: torch.cat([part.updates[name] for part in parts]) for name in SHAPES}
    complete = uploads(whole=True)
    length = {"fp16": 2 * 51, "int8": 51 + 2 * 4, "top-k": 10 * 8}[method]
    for c, client in enumerate(complete.clients.tolist()):
        update = {name: u[c] for name, u in complete.updates.items()}
        data = encode(update, method, share=0.2, seed=5, round=4, client=client)
        assert len(data) == length
        decoded = decode(data, SHAPES, method, torch.float32)
        rows = sent.rows_of("table") if method != "top-k" else None
        for name in SHAPES:
            mine, theirs = received[name][c], decoded[name]
            if rows is not None and name == "table":
                held = rows[c] >= 0
                theirs, mine = theirs[rows[c][held]], mine[held]
            assert torch.equal(mine, theirs), name


def test_half_precision_saturates() -> None:
    data = encode({"p": torch.tensor([1e9, -1e9, 0.5])}, "fp16")
    decoded = decode(data, {"p": torch.Size([3])}, "fp16", torch.float32)["p"]
    assert decoded.tolist() == [65504.0, -65504.0, 0.5]


def test_stochastic_rounding_has_no_bias() -> None:
    value = {"p": torch.linspace(-1.0, 1.0, 41)}
    shapes = {"p": torch.Size([41])}
    rounds = 3000
    mean = torch.zeros(41, dtype=torch.float64)
    seen: list[Tensor] = []
    for round in range(rounds):
        data = encode(value, "int8", seed=1, round=round, client=2)
        decoded = decode(data, shapes, "int8", torch.float32)["p"].double()
        assert bool(((decoded - value["p"]).abs() <= 1.0001 / 127).all())
        mean += decoded / rounds
        seen.append(decoded)
    # A rounding's deviation is at most half a step.
    assert float((mean - value["p"].double()).abs().max()) < 4.5 * 0.5 / 127 / np.sqrt(rounds)
    assert not torch.equal(seen[0], seen[1])


def test_rounding_is_a_function_of_client_round_and_element() -> None:
    value = {"p": torch.full((100,), 0.3), "q": torch.full((100,), 0.3)}
    value["p"][0] = value["q"][0] = 1.0
    base = encode(value, "int8", seed=1, round=2, client=3)
    assert encode(value, "int8", seed=1, round=2, client=3) == base
    assert base[:104] != base[104:]
    for change in ({"seed": 2}, {"round": 3}, {"client": 4}, {"attempt": 1}):
        assert encode(value, "int8", **{"seed": 1, "round": 2, "client": 3, **change}) != base


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.data())
@settings(deadline=None, max_examples=60)
def test_largest_elements(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert largest(torch.tensor(values, dtype=torch.float32), count).tolist() == sorted(order[:count])


@pytest.mark.parametrize("whole", [True, False])
def test_error_feedback_loses_nothing(whole: bool) -> None:
    """All that was sent, and what is left, is all that was trained."""
    stage = TopK(parameters(), share=0.1)
    received = torch.zeros(3, 51, dtype=torch.float64)
    wanted = torch.zeros(3, 51, dtype=torch.float64)
    for round in range(1, 6):
        for c, part in enumerate(stage(uploads(whole, round))):
            flat = torch.cat([u[0].flatten() for u in part.updates.values()])
            assert int((flat != 0).sum()) <= 5
            received[c] += flat.double()
        stage.commit()
        list(stage(uploads(whole, round + 100)))
        stage.discard()
        full = uploads(whole=True, round=round)
        wanted += torch.cat([full.updates["small"].flatten(1), full.updates["table"].flatten(1)], 1).double()
    other = TopK(parameters(), share=0.1)
    other.load_state_dict(stage.state_dict())
    left = torch.stack([other.residuals[client] for client in (7, 3, 11)])
    torch.testing.assert_close(received + left, wanted, rtol=0.0, atol=1e-5)
    assert bool((received != 0).sum() > 15)


@pytest.mark.parametrize("strategy", ["full", "p-rq+lora", "p-hash"])
@pytest.mark.parametrize("method", METHODS)
def test_engines_agree(dataset: Dataset, pretrained: Pretrained, method: str, strategy: str) -> None:
    changes = {"dtype": "float64", "embedding.name": strategy, "compression.method": method}
    theirs = trained(dataset, pretrained, **changes, engine="sequential")
    # A value that two engines round to neighbours differs by a step of float16, and by none elsewhere.
    tolerance = 1e-9 if method != "fp16" else 1e-4
    for engine in ("fused", "batched"):
        for name, value in trained(dataset, pretrained, **changes, engine=engine).items():
            torch.testing.assert_close(value, theirs[name], rtol=0.0, atol=tolerance)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("engine", ["fused", "batched"])
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_for_any_chunks_and_threads(
    dataset: Dataset, pretrained: Pretrained, method: str, engine: str
) -> None:
    changes = {"embedding.name": "full", "compression.method": method, "engine": engine}
    results = [
        trained(dataset, pretrained, **changes, chunk_memory_mb=memory, threads=count)
        for memory, count in ((1e6, 1), (1e6, 3), (0.05, 2), (1e-6, 3))
    ]
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize(("method", "expected"), [("fp16", 2 * 384), ("int8", 388), ("top-k", 8 * 19)])
def test_reported_bytes_are_those_of_the_encoding(
    dataset: Dataset, pretrained: Pretrained, method: str, expected: int
) -> None:
    simulator = Simulator(config(**{"compression.method": method}), dataset, pretrained=pretrained)
    info = simulator.round()
    assert (info.bytes_up, info.bytes_down) == (expected, 4 * 384)
    summary = simulator.run()
    assert summary.bytes_up == expected
    assert summary.total_bytes == 3 * 9 * (expected + 4 * 384)


def test_bytes_of_warm_up_rounds(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {"compression.method": "int8", "training.warmup_rounds": 1}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    assert [simulator.round().bytes_up for _ in range(2)] == [60 * DIM + 4, 388]


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("fp16", b"\0" * 3),
        ("int8", b"\0" * 3),
        ("top-k", b"\0" * 9),
        ("top-k", b"\xff\xff\xff\xff\0\0\0\0"),
        ("top-k", b"\0" * 8 * 52),
    ],
)
def test_malformed_bytes_are_refused(method: Any, data: bytes) -> None:
    with pytest.raises(ValueError, match="data: expected"):
        decode(data, SHAPES, method, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression.method": "zip"}, r"compression\.method"),
        ({"compression.top_k": 0.0}, r"compression\.top_k"),
        (
            {
                "compression.method": "fp16",
                "privacy.mode": "ldp",
                "privacy.scale": 1.0,
                "training.weighting": "uniform",
            },
            r"compression\.method: expected 'none' with privacy\.mode ldp",
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_clipping_bounds_what_is_decoded(dataset: Dataset, pretrained: Pretrained) -> None:
    """With top-k a client may send a lot at once; the average of clipped uploads stays within the bound."""
    changes = {
        "compression.method": "top-k",
        "embedding.name": "full",
        "training.weighting": "uniform",
        "privacy.mode": "cdp",
        "privacy.clip": 0.01,
        "privacy.noise_multiplier": 0.0,
        "dtype": "float64",
    }
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    for _ in range(4):
        before = simulator.model.item_embedding.weight.detach().clone()
        simulator.round()
        moved = float((simulator.model.item_embedding.weight.detach() - before).norm())
        assert 0.0 < moved <= 0.01 * (1 + 1e-9)
