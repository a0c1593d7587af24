"""With secure aggregation the server trains what it would have trained, from sums alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip(
    "flwr", reason="flwr is not installed here; `make test-flower` makes an environment with it"
)

from cryptography.fernet import InvalidToken
from flwr.app import ConfigRecord, Message, RecordDict
from test_flower import (
    PRIVATE,
    ROUNDS,
    USERS,
    InProcess,
    _running_task,  # noqa: F401
    answers_to,
    assert_equal,
    make_config,
    make_dataset,
    make_pretrained,
    simulated,
)

from fedpeft_ext.config import Config, SecureAggregationConfig
from fedpeft_ext.flower import prepare, read_server, secure
from fedpeft_ext.flower.protocol import SECURE, payload_bytes, to_tensors
from fedpeft_ext.flower.server import FlowerServer
from fedpeft_ext.simulation import Simulator

SECURELY = {"secure_aggregation.min_nodes": 2}
NODES = 5
Answers = Callable[[int, str, str], bool]


def federation(
    folder: Path,
    num_nodes: int = NODES,
    answers: Answers = lambda *_: True,
    node_config: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[FlowerServer, InProcess]:
    """Twelve users, with everybody in every round but for what `changes` say."""
    config = make_config(
        **{"embedding.name": "p-lora", "training.clients_per_round": USERS, "dtype": "float64", **changes}
    )
    prepare(config, make_dataset(), folder, num_nodes, pretrained=make_pretrained())
    grid = InProcess(folder, num_nodes, answers)
    for context in grid.contexts.values():
        context.node_config.update({"evaluate": True, **(node_config or {})})
    server = FlowerServer(grid, *read_server(folder)[:2], pretrained=make_pretrained())
    server.join()
    return server, grid


def assert_same_rounds(secured: FlowerServer, plain: FlowerServer, bound: float) -> None:
    """From the same parameters each of two rounds ends at the same ones but for `bound`."""
    for _ in range(2):
        info, expected = secured.round(), plain.round()
        assert info.clients == expected.clients
        assert info.loss == pytest.approx(expected.loss, abs=2**-16)
        got = secured.state_dict()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=bound, msg=name)
        for name, value in plain._starts.starts.items():
            torch.testing.assert_close(secured._starts.starts[name], value, rtol=1e-12, atol=bound, msg=name)
        plain.model.load_state_dict(secured.model.state_dict())
        plain._starts.starts = {name: value.clone() for name, value in secured._starts.starts.items()}
    assert secured.lost == 0


@pytest.mark.parametrize(
    ("num_nodes", "changes"),
    [
        (USERS, {"embedding.name": "p-lora", "secure_aggregation.neighbours": 4}),
        (USERS, {"embedding.name": "c-hash", "training.clients_per_round": 5}),
        (2, {"embedding.name": "full", "backbone.name": "fedncf", "training.weighting": "uniform"}),
        (NODES, {"embedding.name": "p-rq", "backbone.name": "pfedrec", "training.warmup_rounds": 1}),
        (
            NODES,
            {
                "embedding.name": "p-lora+rq",
                "backbone.name": "fedpergnn",
                "secure_aggregation.bits": 32,
                "secure_aggregation.max_sum": 4096,
            },
        ),
    ],
    ids=str,
)
def test_rounds_are_the_plain_ones_but_for_rounding(
    num_nodes: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """A user's weighted update is rounded by less than a step and weighs 1 or more, so the mean is off by
    less than a step, and so are parameters, which the server moves by the mean."""
    secured, _ = federation(tmp_path / "a", num_nodes, **SECURELY, **changes)
    plain, _ = federation(tmp_path / "b", num_nodes, **changes)
    settings = secured.config.secure_aggregation
    assert_same_rounds(secured, plain, 2 * settings.max_sum / 2**settings.bits)


@pytest.mark.parametrize("neighbours", [2, 20])
@pytest.mark.parametrize("step", ["query.offer", "query.share", "train", "query.reveal"])
def test_a_node_that_drops_out_is_left_out(step: str, neighbours: int, tmp_path: Path) -> None:
    """Whenever it does; once its vector arrived, it is in the sum. It takes part in the next round again."""

    def answers(node: int, kind: str, round: str) -> bool:
        return not (node == 2 and kind == step and round == "1")

    def without(node: int, kind: str, round: str) -> bool:
        return step == "query.reveal" or not (node == 2 and kind == "train" and round == "1")

    changes = {"secure_aggregation.neighbours": neighbours}
    secured, _ = federation(tmp_path / "a", NODES, answers, **SECURELY, **changes)
    plain, _ = federation(tmp_path / "b", NODES, without, **changes)
    assert_same_rounds(secured, plain, 2.0**-32)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("query.offer", {}),
        ("query.share", {"backbone.name": "pfedrec"}),
        ("train", {**PRIVATE, "privacy.mode": "cdp", "training.client_sampling": "fixed"}),
        ("query.reveal", {"backbone.name": "pfedrec"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_round_that_too_few_stay_in_is_lost(step: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of 5 nodes 3 have to stay. Not even noise is added then."""

    def answers(node: int, kind: str, round: str) -> bool:
        return not (node <= 3 and kind == step and round == "2")

    server, _ = federation(tmp_path, NODES, answers, **{**changes, "secure_aggregation.min_nodes": 3})
    lines, before, starts = [], {}, {}
    for line in server.run():
        lines.append(line)
        if len(lines) == 2:
            before = {name: value.clone() for name, value in server.state_dict().items()}
            starts = {name: value.clone() for name, value in server._starts.starts.items()}
        if len(lines) == 3:
            assert all(torch.equal(value, before[name]) for name, value in server.state_dict().items())
            assert all(torch.equal(value, starts[name]) for name, value in server._starts.starts.items())
    assert [line["lost_rounds"] for line in lines[1:]] == [0, 1, 1]
    assert [line["clients"] for line in lines[1:]] == [USERS, 0, USERS]
    assert lines[2]["loss"] is None
    assert not any(torch.equal(value, before[n]) for n, value in server.state_dict().items() if "lora" in n)


def vectors_of(grid: InProcess) -> dict[int, secure.Vector]:
    return {
        answer.metadata.src_node_id: to_tensors(answer.content, SECURE)["masked"].numpy().view("<u8")
        for answer in answers_to(grid, "train")
    }


def test_a_round_without_clients_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = federation(tmp_path, 2, **SECURELY)
    monkeypatch.setattr("fedpeft_ext.flower.server.choose_clients", lambda *_: np.empty(0, np.int64))
    info = server.round()
    assert (info.clients, info.bytes_up, server.lost) == (0, 0, 1)


@pytest.mark.parametrize("kind", ["query.offer", "query.share", "train", "query.reveal"])
def test_a_malformed_answer_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, grid = federation(tmp_path, 2, **SECURELY)
    original = grid.send_and_receive

    def spoiled(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for reply in original(messages, timeout=timeout):
            if (reply.metadata.message_type, reply.metadata.src_node_id) == (kind, 2):
                reply.content[SECURE] = ConfigRecord({})
            yield reply

    monkeypatch.setattr(grid, "send_and_receive", spoiled)
    with pytest.raises(ValueError, match=r"node 2, (secure|masked): expected .*, got "):
        server.round()


def far_from_uniform(vector: secure.Vector) -> float:
    """Chi squared of the bytes, and of the lowest ones, in standard deviations from that of uniform ones."""
    found = []
    for values in (vector.view(np.uint8), vector.view(np.uint8)[::8]):
        expected = len(values) / 256
        chi = float(((np.bincount(values, minlength=256) - expected) ** 2 / expected).sum())
        found.append(abs(chi - 255) / 510**0.5)
    return max(found)


def spied(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[Any]:
    """What the results of a function were."""
    original, found = getattr(where, name), []

    def spy(*arguments: Any) -> Any:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(where, name, spy)
    return found


def test_what_arrives_of_a_node_is_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is even without the node's own mask, whose seed the server restores."""
    server, grid = federation(tmp_path, 3, **SECURELY, **{"backbone.name": "pfedrec"})
    sent = spied(monkeypatch, secure.FixedPoint, "encode")
    seeds = spied(monkeypatch, secure, "combine_shares")
    server.round()
    answers = [answer.content for answer in answers_to(grid, "train")]
    assert [list(answer) for answer in answers] == 3 * [[SECURE]]
    vectors = [to_tensors(answer, SECURE)["masked"].numpy().view("<u8") for answer in answers]
    assert len(vectors) == len(sent) == len(seeds) == 3
    for vector, plain in zip(vectors, sent, strict=True):
        assert far_from_uniform(plain) > 1000
        assert not (vector == plain).any()
        assert far_from_uniform(vector) < 6
        assert all(far_from_uniform(vector - secure.expand(seed, vector)) < 6 for seed in seeds)
    assert (sum(vectors) - sum(secure.expand(seed, sent[0]) for seed in seeds) == sum(sent)).all()


def test_a_vector_that_comes_too_late_stays_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has restored the key of the node's masks for others by then, and its own mask is left."""
    server, grid = federation(tmp_path, 3, **SECURELY, **{"backbone.name": "pfedrec"})
    sent = spied(monkeypatch, secure.FixedPoint, "encode")
    restored = spied(monkeypatch, secure, "combine_shares")
    original, late = grid.send_and_receive, []

    def slow(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for reply in original(messages, timeout=timeout):
            if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 1:
                late.append(to_tensors(reply.content, SECURE)["masked"].numpy().view("<u8"))
            else:
                yield reply

    monkeypatch.setattr(grid, "send_and_receive", slow)
    assert server.round().clients == 8
    offers = {
        m.metadata.src_node_id: m.content.config_records[SECURE]["keys"]
        for m in answers_to(grid, "query.offer")
    }
    key = next(secret for secret in restored if secret.startswith(b"-----BEGIN PRIVATE KEY"))
    rest = late[0] - sum(secure.pairwise_mask(key, offers[node][0], 1, node, late[0]) for node in (2, 3))
    assert not (rest == sent[0]).any()
    assert far_from_uniform(rest) < 6
    assert len(restored) == 3


def members(count: int, least: int = 0) -> dict[int, tuple[secure.Member, RecordDict]]:
    settings = SecureAggregationConfig(min_nodes=2)
    states = {node: RecordDict() for node in range(1, count + 1)}
    return {node: (secure.Member(state, node, settings, least), state) for node, state in states.items()}


def test_a_node_helps_with_one_sum_a_round_and_in_one_way() -> None:
    nodes = {node: member for node, (member, _) in members(3).items()}
    keys = {str(node): member.offer()["keys"] for node, member in nodes.items()}
    with pytest.raises(ValueError, match="keys: expected this node's own among them"):
        nodes[3].share({**keys, "3": keys["1"]})
    with pytest.raises(RuntimeError, match="expected a node that has offered, got None"):
        nodes[3].share(keys)
    keys["3"] = nodes[3].offer()["keys"]
    shares = {node: member.share(keys) for node, member in nodes.items()}
    vector = np.zeros(4, "<u8")
    with pytest.raises(InvalidToken):  # of what node 1 sealed for node 3
        nodes[2].mask({"1": shares[1]["3"], "3": shares[3]["2"]}, vector)
    nodes[1].mask({str(node): shares[node]["1"] for node in (2, 3)}, vector)
    with pytest.raises(RuntimeError, match="expected a node that has shared, got masked"):
        nodes[1].mask({str(node): shares[node]["1"] for node in (2, 3)}, vector)


@pytest.mark.parametrize(
    ("alive", "dropped", "message"),
    [
        ([1, 2, 3], [3], "each in one of them"),
        ([2, 3], [1], "node 1 alive"),
        ([1, 2], [], "expected \\[1, 2, 3\\]"),
        ([1], [2, 3], "expected 2 nodes or more, got 1"),
    ],
)
def test_a_node_reveals_one_secret_of_each(alive: list[int], dropped: list[int], message: str) -> None:
    nodes = {node: member for node, (member, _) in members(3).items()}
    keys = {str(node): member.offer()["keys"] for node, member in nodes.items()}
    shares = {node: member.share(keys) for node, member in nodes.items()}
    nodes[1].mask({str(node): shares[node]["1"] for node in (2, 3)}, np.zeros(4, "<u8"))
    with pytest.raises(ValueError, match=message):
        nodes[1].reveal(alive, dropped)
    with pytest.raises(RuntimeError, match="expected a node that has masked, got None"):
        nodes[1].reveal([1, 2], [3])


def test_neighbours_are_mutual() -> None:
    for count, neighbours in ((2, 20), (7, 3), (8, 20), (30, 5)):
        near = secure.neighbourhoods(list(range(count)), neighbours)
        assert all(node in near[other] for node in near for other in near[node])
        assert {len(others) for others in near.values()} == {min(count, neighbours + neighbours % 2 + 1)}
        # More than half: two groups of holders that are told different things have one in common.
        assert 2 * secure.shares_needed(len(near[0]), SecureAggregationConfig(threshold=0.51)) > len(near[0])


def test_users_are_rounded_each_towards_zero() -> None:
    """So clipping still holds; negative sums and the whole range come back."""
    fixed = secure.FixedPoint(32, {"a": torch.Size([2, 3]), "b": torch.Size([])}, {"a": 0.25, "b": 1.0})
    a = torch.tensor([[[0.3, -0.3, 1.9], [0, -2.26, 5]], [[0.24, -0.24, -1.9], [0, 2.0, -1e6]]])
    total = fixed.encode({"a": a}, 2) + fixed.encode({"b": torch.tensor([7.0, -9.0])}, 2)
    assert total.dtype == np.uint32
    decoded = fixed.decode(total)
    assert decoded["a"].tolist() == [[0.25, -0.25, 0.0], [0.0, -0.25, 5 - 1e6]]
    assert decoded["b"].item() == -2.0
    most = 2.0**31 * 0.25 / 4
    fixed.encode({"a": torch.full((1, 2, 3), most - 0.25, dtype=torch.float64)}, 4)
    for bad in (most, -most, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"a: expected magnitudes below 1\.34218e\+08, which secure_aggre"
        ):
            fixed.encode({"a": torch.tensor([[[0, 0, bad], [0, 0, 0]]])}, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression.method": "top-k"}, r"compression\.method: expected 'none' with secure_aggregation"),
        ({"faults.reject": True}, r"faults\.reject: expected false with secure_aggregation"),
        (
            {"training.algorithm": "scaffold", "training.optimizer": "sgd"},
            r"training\.algorithm: expected 'fedavg' with secure_aggregation",
        ),
        ({"secure_aggregation.min_nodes": 1}, r"secure_aggregation\.min_nodes: expected 0, or 2 and more"),
        ({"secure_aggregation.threshold": 0.5}, r"secure_aggregation\.threshold: expected greater than 0\.5"),
    ],
    ids=str,
)
def test_refuses_what_needs_single_updates(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{**SECURELY, **changes})


def test_refuses_where_nothing_could_be_hidden(tmp_path: Path) -> None:
    config = make_config(**{"secure_aggregation.min_nodes": 4})
    with pytest.raises(
        ValueError, match=r"num_nodes: expected at least 4, secure_aggregation\.min_nodes, got 3"
    ):
        prepare(config, make_dataset(), tmp_path / "prepared", 3, pretrained=make_pretrained())
    assert not (tmp_path / "prepared").exists()
    with pytest.raises(ValueError, match=r"secure_aggregation\.min_nodes: expected 0 in a simulation"):
        Simulator(config, make_dataset())


def test_a_node_refuses_less_than_it_wants(tmp_path: Path) -> None:
    federation(tmp_path / "a", 3, node_config={"secure-nodes": 2}, **SECURELY)
    for number, changes in enumerate(({}, SECURELY)):
        with pytest.raises(ValueError, match=r"min_nodes: this node takes part with 3 or more, got [02]"):
            federation(tmp_path / str(number), 3, node_config={"secure-nodes": 3}, **changes)
    (member, _), *_ = members(2, least=3).values()
    with pytest.raises(ValueError, match="expected 3 nodes or more, got 2"):
        member.share({"1": member.offer()["keys"], "2": [b"key", b"another"]})


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.mode": "cdp", "privacy.clip": 0.005, "training.clients_per_round": 3},
        {"privacy.mode": "ldp", "privacy.noise_multiplier": 0, "training.clients_per_round": 5},
    ],
    ids=str,
)
def test_privacy_is_the_simulators(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes clip; with central noise all of them answer, whoever was chosen."""
    changes = {"backbone.name": "pfedrec", "dtype": "float64", **PRIVATE, **changes}
    monkeypatch.setattr("fedpeft_ext.flower.server.secret_seed", lambda: Config().seed)
    server, grid = federation(tmp_path, 6, **changes, **SECURELY)
    simulator = simulated(make_config(**changes), make_dataset(), make_pretrained())
    lines = list(server.run())
    assert_equal(server, lines, simulator)
    assert server.privacy == simulator.privacy
    chosen = [
        m.content.config_records["settings"]["users"]
        for m in grid.seen[::2]
        if m.metadata.message_type == "train"
    ]
    if changes["privacy.mode"] == "cdp":
        assert len(chosen) == 6 * ROUNDS
        assert [] in chosen
    else:
        assert [] not in chosen
        assert [line["loss"] for line in lines[1:]] == [None] * ROUNDS


def test_metrics_stay_on_a_node_that_is_not_told_otherwise(tmp_path: Path) -> None:
    server, _ = federation(tmp_path, 2, node_config={"evaluate": False}, **SECURELY)
    assert server.evaluate().values == {}


@pytest.mark.parametrize(("bits", "max_sum"), [(64, 2**31), (32, 4096)])
def test_counts_keys_and_shares(bits: int, max_sum: int, tmp_path: Path) -> None:
    changes = {"secure_aggregation.bits": bits, "secure_aggregation.max_sum": max_sum}
    server, grid = federation(tmp_path, NODES, **SECURELY, **changes)
    grid.seen.clear()
    info = server.round()
    numbers = sum(value.numel() for value in server._aggregator._totals.values()) + 3
    header, key, sealed, share = 128, 215, 612, 52
    up = 2 * key + (NODES - 1) * sealed + numbers * bits // 8 + header + NODES * share
    assert info.bytes_up == up
    down = 2 * key * NODES + (NODES - 1) * sealed + server.traffic.down + 2 * header
    assert info.bytes_down == down
    assert sum(payload_bytes(m.content) for m in grid.seen[1::2]) == NODES * up


def test_masks_are_the_cipher() -> None:
    """The first block is that of a known answer: AES-256 of zeros under a key of zeros."""
    mask = secure.expand(bytes(32), np.zeros(4, "<u8"))
    assert mask.tobytes()[:16].hex() == "dc95c078a2408989ad48a21492842087"
