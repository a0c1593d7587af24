"""CPU time and bytes of a round of secure aggregation without training (docs/flower.md).

.venv-flower/bin/python benchmarks/bench_secure_aggregation.py
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import RecordDict

from fedpeft_ext.config import SecureAggregationConfig
from fedpeft_ext.flower import secure
from fedpeft_ext.flower.protocol import SECURE, payload_bytes

SIZE = 100_000
SETTINGS = SecureAggregationConfig(min_nodes=2)


def measure(count: int, dropped: int) -> str:
    """A line of the table, for so many nodes of which some drop out before their vector arrives."""
    fixed = secure.FixedPoint(SETTINGS.bits, {"update": torch.Size([SIZE])}, {"update": 2.0**-32})
    members = {node: secure.Member(RecordDict(), node, SETTINGS, 0) for node in range(count)}
    vector = np.ones(SIZE, fixed.dtype)
    up = down = 0
    nodes = 0.0

    def ask(kind: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict]:
        nonlocal up, down, nodes
        began, answers = time.process_time(), {}
        for node, content in contents.items():
            down += payload_bytes(content)
            if kind == "train" and node < dropped:
                continue
            given = content.config_records.get(SECURE, {})
            if kind == secure.OFFER:
                answer = members[node].offer()
            elif kind == secure.SHARE:
                answer = members[node].share(given)
            elif kind == secure.REVEAL:
                answer = members[node].reveal(given["alive"], given["dropped"])
            else:
                answer = secure.to_vector_record(members[node].mask(given, vector))
            answers[node] = RecordDict({SECURE: answer})
            up += payload_bytes(answers[node])
        nodes += time.process_time() - began
        return answers

    began = time.process_time()
    total = secure.masked_sum(ask, dict.fromkeys(members, RecordDict()), fixed, SETTINGS)
    server = time.process_time() - began - nodes
    assert total is not None
    assert (total == count - dropped).all()
    return (
        f"{count} | {dropped} | {up // count:,} | {down // count:,} | {nodes / count:.2f} s | {server:.2f} s"
    )


if __name__ == "__main__":
    print("nodes | dropped | bytes up | bytes down | a node | the server")
    for case in ((5, 0), (12, 0), (21, 0), (100, 0), (100, 10)):
        print(measure(*case), flush=True)
