"""Bytes of the protocol, per strategy, against the paper's counts of parameters."""

from __future__ import annotations

import pytest
import torch

from fedpeft_ext.backbones import FedMF
from fedpeft_ext.nn import build_embedding
from fedpeft_ext.simulation.communication import message, setup_message, traffic

ITEMS, DIM, RANK, TABLE, HASHES, LEVELS, SIZE = 50, 8, 3, 24, 2, 4, 16
HIDDEN = 16 * HASHES
SENET = HIDDEN * HASHES * 2 + HIDDEN + HASHES
LORA, HASH, RQ, FULL = RANK * (ITEMS + DIM), TABLE * DIM, LEVELS * SIZE * DIM, ITEMS * DIM
CODES = ITEMS * LEVELS  # bytes: K <= 256 fits in uint8
SEEDS = HASHES * 2 * 8  # int64 multiplier and shift of each hash


def model(spec: str, dtype: torch.dtype = torch.float32, **options: bool) -> FedMF:
    embedding = build_embedding(
        spec,
        ITEMS,
        DIM,
        base=torch.zeros(ITEMS, DIM, dtype=dtype) if spec[0] != "c" else None,
        codes=torch.zeros(ITEMS, LEVELS, dtype=torch.int64),
        rank=RANK,
        table_size=TABLE,
        num_hashes=HASHES,
        codebook_size=SIZE,
        dtype=dtype,
        **options,
    )
    return FedMF(embedding, DIM).to(dtype)


@pytest.mark.parametrize(
    ("spec", "sent", "setup"),
    [
        ("full", FULL, 0),
        ("c-lora", LORA, 0),
        ("p-lora", LORA, 4 * FULL),
        ("c-hash", HASH, SEEDS),
        ("p-hash+senet", HASH + SENET, 4 * FULL + SEEDS),
        ("c-rq", RQ, CODES),
        ("p-rq", RQ, 4 * FULL + CODES),
        ("p-rq+lora", RQ + LORA, 4 * FULL + CODES),
    ],
)
def test_bytes_of_each_strategy(spec: str, sent: int, setup: int) -> None:
    bytes_ = traffic(model(spec))
    assert (bytes_.down, bytes_.up, bytes_.setup) == (4 * sent, 4 * sent, setup)


def test_a_trained_base_is_sent_every_round() -> None:
    bytes_ = traffic(model("p-rq", freeze_full=False))
    assert (bytes_.up, bytes_.setup) == (4 * (RQ + FULL), CODES)


def test_dtype_counts() -> None:
    assert traffic(model("c-lora", torch.float64)).up == 8 * LORA


def test_user_vectors_stay_at_home() -> None:
    fedmf = model("p-rq")
    sent = message(fedmf)
    assert sent.keys() == {"item_embedding.codebooks"}
    assert sum(t.numel() * t.element_size() for t in sent.values()) == fedmf.item_embedding.bytes_per_round()
    assert setup_message(fedmf).keys() == {"item_embedding.base", "item_embedding.codes"}
