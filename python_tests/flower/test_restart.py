"""Nodes and servers that end and come back, and what a node keeps of its users."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip(
    "flwr", reason="flwr is not installed here; `make test-flower` makes an environment with it"
)

import typer
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from test_flower import (
    PRIVATE,
    ROUNDS,
    USERS,
    InProcess,
    _running_task,  # noqa: F401
    assert_equal,
    make_config,
    make_dataset,
    make_pretrained,
    simulated,
)

from fedpeft_ext.cli import serving_cli
from fedpeft_ext.flower import load_node, prepare, read_server, server
from fedpeft_ext.flower.files import node_file
from fedpeft_ext.flower.server import FlowerServer
from fedpeft_ext.flower.state import PRIVACY, NodeFolder, Own
from fedpeft_ext.simulation import Simulator, load_run, load_server
from fedpeft_ext.simulation.privacy import composed_epsilon, epsilon

NODES = 3
KINDS = [
    {"embedding.name": "p-lora+rq", "compression.method": "top-k", "compression.top_k": 0.2},
    {
        "embedding.name": "p-rq",
        "backbone.name": "pfedrec",
        "training.warmup_rounds": 1,
        "training.server_optimizer": "adam",
        "compression.method": "top-k",
    },
]


def named(changes: dict[str, Any]) -> str:
    return str(changes["embedding.name"])


class Killed(BaseException):
    """The server's process ends."""


class Keeping(InProcess):
    """Nodes that keep their users' state in a folder each.

    Args:
        killed: whether the server ends once the nodes have answered a message, by (kind, round).
    """

    def __init__(
        self, prepared: Path, killed: Callable[[str, str], bool] = lambda *_: False, **node_config: Any
    ) -> None:
        super().__init__(prepared, NODES)
        for node, context in self.contexts.items():
            context.node_config.update({"state": str(prepared / f"state-{node}"), **node_config})
        self.killed = killed

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        if messages and self.killed(messages[0].metadata.message_type, messages[0].metadata.group_id):
            raise Killed
        return replies

    @property
    def folders(self) -> list[NodeFolder]:
        return [
            NodeFolder(
                str(context.node_config["state"]), {user: f"u{user}" for user in range(node, USERS, NODES)}
            )
            for node, context in enumerate(self.contexts.values())
        ]

    def own(self, run: str) -> list[Own]:
        return [folder.load(run) for folder in self.folders]


def prepared(folder: Path, **changes: Any) -> Path:
    prepare(make_config(**changes), make_dataset(), folder, NODES, pretrained=make_pretrained())
    return folder


def main(grid: InProcess, prepared: Path, out: Path, **run_config: Any) -> None:
    """`flwr run`, with new processes everywhere."""
    grid.restart()
    given = {"prepared": str(prepared), "out": str(out), "min-nodes": NODES, "timeout": 5.0, **run_config}
    server.main(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=given))


def traffic(out: Path, name: str) -> list[int]:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


def lines(out: Path) -> list[dict[str, Any]]:
    """What was measured, but for times and traffic."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    aside = ("seconds", "clients_per_second", "bytes_down", "bytes_up", "sent_bytes", "received_bytes")
    return [{name: value for name, value in line.items() if name not in aside} for line in found]


def assert_same_run(grid: Keeping, out: Path, other: Keeping, expected: Path) -> None:
    """Bit for bit: lines, the server's model, and the users' own state on the nodes."""
    assert lines(out) == lines(expected)
    mine, theirs = load_server(out, make_dataset()), load_server(expected, make_dataset())
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(mine.model.state_dict()[name], value), name
    for own, another in zip(grid.own(mine.run), other.own(theirs.run), strict=True):
        found, wanted = (replace(kept, before=None).tensors() for kept in (own, another))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Keeping, Path]]:
    """By embedding: nodes, whose prepared files are in `a`, and the folder, with the server's `out`, of a run
    that nothing interrupted.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        for changes in KINDS:
            folder = tmp_path_factory.mktemp("whole")
            grid = Keeping(prepared(folder / "a", **changes))
            main(grid, folder / "a", folder / "out")
            found[named(changes)] = grid, folder
    return found


@pytest.mark.parametrize("changes", KINDS, ids=named)
def test_nodes_that_restart_after_every_round_change_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    grid = Keeping(prepared(tmp_path, **changes))
    stored, num_items, given, _ = read_server(tmp_path)
    federation = FlowerServer(grid, stored, num_items, pretrained=given)
    federation.join()
    found = []
    for line in federation.run():
        found.append(line)
        grid.restart()
    simulator = simulated(make_config(**changes), make_dataset(), make_pretrained())
    assert_equal(federation, found, simulator)
    state = simulator.store.rows(range(USERS))
    kept = grid.own(federation.run_id)
    assert max(own.round for own in kept) == ROUNDS
    for own in kept:
        for name, values in own.state.items():
            torch.testing.assert_close(values, state[name][own.users], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "killed",
    [("query", "1"), ("evaluate", "1"), ("train", "1"), ("train", "2"), ("evaluate", "3"), ("train", "3")],
    ids="-".join,
)
@pytest.mark.parametrize("changes", KINDS, ids=named)
def test_a_server_that_was_killed_goes_on(
    changes: dict[str, Any],
    killed: tuple[str, str],
    whole: dict[str, tuple[Keeping, Path]],
    tmp_path: Path,
) -> None:
    folder = prepared(tmp_path / "a", **changes)
    grid = Keeping(folder, lambda *message: message == killed)
    with pytest.raises(Killed):
        main(grid, folder, tmp_path / "out")
    grid.killed = lambda *_: False
    main(grid, folder, tmp_path / "out")
    other, expected = whole[named(changes)]
    assert_same_run(grid, tmp_path / "out", other, expected / "out")
    for name in ("sent_bytes", "received_bytes"):  # what the first server had sent counts, too
        (*_, total), (*_, least) = (traffic(folder / "out", name) for folder in (tmp_path, expected))
        assert total >= least, name


def test_secure_aggregation_goes_on(tmp_path: Path) -> None:
    changes = {
        **KINDS[1],
        "compression.method": "none",
        "training.clients_per_round": USERS,
        "secure_aggregation.min_nodes": NODES,
    }
    runs = []
    for name, killed in (("a", ("train", "2")), ("b", None)):
        folder = prepared(tmp_path / name, **changes)
        grid = Keeping(folder, lambda *message, killed=killed: message == killed, evaluate=True)
        grid._answers = lambda node, kind, round: (kind, round) != ("query.share", "1")  # a round is lost
        if killed is not None:
            with pytest.raises(Killed):
                main(grid, folder, folder / "out")
            grid.killed = lambda *_: False
        main(grid, folder, folder / "out")
        runs += [grid, folder / "out"]
    assert [line.get("lost_rounds") for line in lines(tmp_path / "a" / "out")] == [None, 1, 1, 1]
    assert_same_run(*runs)


def test_a_run_that_ended_gets_more_rounds(tmp_path: Path) -> None:
    changes = {**KINDS[0], "evaluation.every": 2}
    grid = Keeping(prepared(tmp_path / "a", **changes))
    main(grid, tmp_path / "a", tmp_path / "out", rounds=1)  # whose last evaluation is out of turn
    with pytest.raises(ValueError, match=r"rounds: expected at least 2, since .* of 1 that ended, got 1"):
        main(grid, tmp_path / "a", tmp_path / "out", rounds=1)
    main(grid, tmp_path / "a", tmp_path / "out", rounds=ROUNDS)
    other = Keeping(prepared(tmp_path / "b", **changes))
    main(other, tmp_path / "b", tmp_path / "whole")
    assert_same_run(grid, tmp_path / "out", other, tmp_path / "whole")


def test_another_run_starts_from_new_users_and_leaves_those_of_the_first(tmp_path: Path) -> None:
    grid = Keeping(prepared(tmp_path / "a", **KINDS[0]))
    for out in ("one", "two"):
        main(grid, tmp_path / "a", tmp_path / out)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    runs = {load_server(tmp_path / out, make_dataset()).run for out in ("one", "two")}
    assert [set(folder.runs()) for folder in grid.folders] == [runs] * NODES
    first, before = load_server(tmp_path / "one", make_dataset()), lines(tmp_path / "one")
    own = [kept.tensors() for kept in grid.own(first.run)]
    main(grid, tmp_path / "a", tmp_path / "one", overwrite=True)
    assert lines(tmp_path / "one") == before
    assert load_server(tmp_path / "one", make_dataset()).run not in runs
    for then, kept in zip(own, grid.own(first.run), strict=True):
        assert all(torch.equal(value, then[name]) for name, value in kept.tensors().items())


def test_what_goes_on_is_the_same_run(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "a", **KINDS[0])
    grid = Keeping(folder, lambda *message: message == ("train", "3"))
    with pytest.raises(Killed):
        main(grid, folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"rounds: expected at least 2, since .* holds a run of 2, got 1"):
        main(grid, folder, tmp_path / "out", rounds=1)
    other = make_dataset().changed(item_ids=[f"other {item}" for item in make_dataset().item_ids])
    prepare(make_config(**KINDS[0]), other, folder, NODES, pretrained=make_pretrained())
    with pytest.raises(ValueError, match=r"prepared: expected the items of the run in .*, got others"):
        main(grid, folder, tmp_path / "out")
    prepared(folder, **KINDS[0], **{"training.lr": 0.5})
    with pytest.raises(ValueError, match=r"the prepared settings: training\.lr: expected None, with which"):
        main(grid, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is that of a Flower server, which `flwr run`"):
        Simulator.resume(tmp_path / "out", make_dataset())
    with pytest.raises(ValueError, match="has no clients' state: it is that of a Flower server"):
        load_run(tmp_path / "out", make_dataset())
    Simulator(
        make_config(**KINDS[0]), make_dataset(), out=tmp_path / "run", pretrained=make_pretrained()
    ).run()
    with pytest.raises(
        ValueError, match=r"expected the folder of a Flower server, but .* is of a simulation"
    ):
        main(grid, folder, tmp_path / "run")


def test_a_server_that_waits_in_vain_may_be_started_again(tmp_path: Path) -> None:
    grid = Keeping(prepared(tmp_path / "a", **KINDS[0]))
    with pytest.raises(TimeoutError, match="expected 4 nodes"):
        main(grid, tmp_path / "a", tmp_path / "out", timeout=0.0, **{"min-nodes": NODES + 1})
    main(grid, tmp_path / "a", tmp_path / "out")
    assert len(lines(tmp_path / "out")) == ROUNDS + 1


def test_a_killed_server_that_had_started_from_a_run(tmp_path: Path) -> None:
    config = make_config(**KINDS[1])
    Simulator(config, make_dataset(), pretrained=make_pretrained(), out=tmp_path / "old").run()
    settings = {
        "start_from": str(tmp_path / "old"),
        "training.rounds": 2 * ROUNDS,
        "training.schedule": "linear",
        "training.server_schedule": "cosine",
        "training.warmup_rounds": 0,
    }
    with pytest.raises(ValueError, match="folder: expected another one than that of start_from"):
        prepare(make_config(**KINDS[1] | settings), make_dataset(), tmp_path / "old", NODES)
    with pytest.raises(ValueError, match=r"backbone.name: expected 'pfedrec'"):
        prepare(make_config(start_from=tmp_path / "old"), make_dataset(), tmp_path / "none", NODES)
    assert not (tmp_path / "none").exists()
    grids = {}
    for name in ("a", "b"):
        prepare(make_config(**KINDS[1] | settings), make_dataset(), tmp_path / name, NODES)
        grids[name] = Keeping(tmp_path / name)
    main(grids["b"], tmp_path / "b", tmp_path / "straight")
    grids["a"].killed = lambda *message: message == ("train", str(ROUNDS + 2))
    with pytest.raises(Killed):
        main(grids["a"], tmp_path / "a", tmp_path / "out")
    assert load_server(tmp_path / "out", make_dataset()).round == ROUNDS + 1
    grids["a"].killed = lambda *_: False
    main(grids["a"], tmp_path / "a", tmp_path / "out")
    assert_same_run(grids["a"], tmp_path / "out", grids["b"], tmp_path / "straight")
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["started_from"] == {"run": settings["start_from"], "round": ROUNDS}
    with pytest.raises(ValueError, match=r"training.rounds: expected 6, over which training.schedule linear"):
        main(grids["a"], tmp_path / "a", tmp_path / "out", rounds=2 * ROUNDS + 1)


@pytest.mark.parametrize("changes", KINDS, ids=named)
def test_a_further_run_goes_on_with_the_users_own_whatever_their_numbers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        **changes,
        "training.clients_per_round": USERS,  # on a node, those who have not trained start anew
        "training.server_optimizer": "avg",
        "compression.method": "none",
    }
    dataset = make_dataset()
    Simulator(make_config(**changes), dataset, pretrained=make_pretrained(), out=tmp_path / "simulated").run()
    grid = Keeping(prepared(tmp_path / "a", **changes))
    main(grid, tmp_path / "a", tmp_path / "out")
    whole = dataset.of_users(np.roll(np.arange(USERS), NODES))  # each stays on the own node
    further = {**changes, "training.warmup_rounds": 0, "training.rounds": 2 * ROUNDS}
    prepare(make_config(**further, start_from=tmp_path / "out"), whole, tmp_path / "b", NODES)
    for node, context in enumerate(grid.contexts.values()):
        context.node_config["data"] = str(node_file(tmp_path / "b", node))
    main(grid, tmp_path / "b", tmp_path / "next")
    simulator = Simulator(make_config(**further, start_from=tmp_path / "simulated"), whole)
    simulator.run()
    expected = simulator.trained_run
    for node in range(NODES):
        own = node_file(tmp_path / "b", node), tmp_path / "a" / f"state-{node + 1}"
        run = load_node(tmp_path / "next", *own)
        users = [name for name in run.dataset.user_ids if name]
        assert users == [f"u{user}" for user in np.roll(np.arange(USERS), NODES)[node::NODES]]
        found, wanted = run.recommend(users, 5), expected.recommend(users, 5)
        assert torch.equal(found.items, wanted.items)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)


def test_a_node_that_comes_back_before_it_is_known_to_have_gone(tmp_path: Path) -> None:
    changes = {**KINDS[0], "training.clients_per_round": USERS}
    grid = Keeping(prepared(tmp_path, **changes))
    stored, num_items, given, _ = read_server(tmp_path)
    federation = FlowerServer(grid, stored, num_items, pretrained=given)
    federation.join()
    assert federation.round().clients == USERS
    gone = dict(grid.contexts)
    grid.restart()
    present = [*gone, *grid.contexts]
    grid.get_node_ids = lambda: present  # type: ignore[method-assign]
    original = grid.send_and_receive

    def alive(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return original([m for m in messages if m.metadata.dst_node_id in grid.contexts], timeout=timeout)

    grid.send_and_receive = alive  # type: ignore[method-assign]
    assert federation.round().clients == USERS
    federation._users.clear()  # as of a server that has just started
    present = [*grid.contexts, 1000]
    grid.contexts[1000] = next(iter(grid.contexts.values()))
    with pytest.raises(ValueError, match="and 1000 both say that user 0 is theirs"):
        federation.round()


# ---- the budget
# ------------------------------------------------------------------------------------------------------------

LOCAL = {
    **PRIVATE,
    "privacy.mode": "ldp",
    "training.client_sampling": "fixed",
    "training.clients_per_round": USERS,
}


def counts(grid: Keeping) -> list[Counter[tuple[str, float]]]:
    found = {user: kinds for folder in grid.folders for user, kinds in folder.uploads().items()}
    return [found[user] for user in sorted(found, key=lambda name: int(name[1:]))]


def test_a_budget_lasts_over_restarts_and_runs(tmp_path: Path) -> None:
    noise = {"privacy.noise_multiplier": 4.0}
    limit = composed_epsilon({("gaussian", 4.0): 3, ("gaussian", 8.0): 2}, 1e-4)
    folder = prepared(tmp_path / "a", **{**LOCAL, **noise})
    grid = Keeping(folder, epsilon=1.0001 * limit, delta=1e-4)
    main(grid, folder, tmp_path / "one")
    assert [line["clients"] for line in lines(tmp_path / "one")[1:]] == [USERS] * 3
    assert counts(grid) == [Counter({("gaussian", 4.0): 3})] * USERS
    prepared(folder, **{**LOCAL, "privacy.noise_multiplier": 8.0})
    main(grid, folder, tmp_path / "two")
    assert [line["clients"] for line in lines(tmp_path / "two")[1:]] == [USERS, USERS, 0]
    assert counts(grid) == [Counter({("gaussian", 4.0): 3, ("gaussian", 8.0): 2})] * USERS


def test_a_budget_is_a_persons_whatever_the_number(tmp_path: Path) -> None:
    changes = {**LOCAL, "privacy.noise_multiplier": 4.0, "training.clients_per_round": USERS - 1}
    folder = prepared(tmp_path / "a", **changes)
    grid = Keeping(folder)
    main(grid, folder, tmp_path / "one", rounds=1)
    before = counts(grid)
    assert sum(kinds.total() for kinds in before) == USERS - 1
    whole = make_dataset().of_users(np.roll(np.arange(USERS), NODES))
    prepare(make_config(**changes), whole, tmp_path / "b", NODES, pretrained=make_pretrained())
    for node, context in enumerate(grid.contexts.values()):
        context.node_config["data"] = str(node_file(tmp_path / "b", node))
    main(grid, tmp_path / "b", tmp_path / "two", rounds=1)
    after = {name: kinds for keeper in grid.folders for name, kinds in keeper.uploads().items()}
    numbers = {f"u{user}": number for number, user in enumerate(np.roll(np.arange(USERS), NODES))}
    chosen = [line["clients"] for line in lines(tmp_path / "two")[1:]]
    assert chosen == [USERS - 1]
    assert set(after) == set(numbers)
    assert sorted(kinds.total() for kinds in after.values()) == [1, 1, *[2] * (USERS - 2)]


@pytest.mark.parametrize(
    "changes", [{"training.clients_per_round": USERS}, {**LOCAL, "privacy.mode": "cdp"}], ids=["none", "cdp"]
)
def test_what_left_without_noise_leaves_no_budget(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = prepared(tmp_path / "a", **changes)
    grid = Keeping(folder)
    main(grid, folder, tmp_path / "one", rounds=1)
    assert counts(grid) == [Counter({("gaussian", 0.0): 1})] * USERS
    for context in grid.contexts.values():
        context.node_config["epsilon"] = 1e6
    prepared(folder, **LOCAL)
    main(grid, folder, tmp_path / "two", rounds=1)
    assert lines(tmp_path / "two")[-1]["clients"] == 0


@pytest.mark.parametrize("where", ["train", "save"])
def test_an_upload_counts_though_the_node_fails(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between training and the answer leaves no count that is too low."""
    folder = prepared(tmp_path / "a", **LOCAL)
    grid = Keeping(folder, epsilon=1e6)

    def full(*_: object) -> None:
        raise OSError("cannot write")

    if where == "save":
        monkeypatch.setattr(NodeFolder, "save", full)
    else:
        monkeypatch.setattr("fedpeft_ext.flower.client.make_engine", full)
    with pytest.raises(OSError, match="cannot write"):
        main(grid, folder, tmp_path / "out")
    assert counts(grid)[0] == Counter({("gaussian", 0.5): 1})
    assert not [m for m in grid.seen[1::2] if m.metadata.message_type == "train"]


def test_nothing_leaves_that_cannot_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(tmp_path / "a", **LOCAL)
    grid = Keeping(folder, epsilon=1e6)
    (folder / "state-1").mkdir()
    (folder / "state-1" / PRIVACY).write_text('{"format": 1, "users": {"0": [{"uploads": 1}]}}')
    with pytest.raises(ValueError, match=r"privacy\.json does not tell what users' uploads gave away"):
        main(grid, folder, tmp_path / "out")
    assert not [m for m in grid.seen[1::2] if m.metadata.message_type == "train"]


@pytest.mark.parametrize(
    "changes", [{}, {"privacy.mode": "cdp", "training.client_sampling": "poisson"}], ids=["ldp", "cdp"]
)
def test_a_round_that_was_lost_counts_as_given_away(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = prepared(tmp_path / "a", **{**LOCAL, **changes})
    grid = Keeping(folder, lambda *message: message == ("train", "3"))
    with pytest.raises(Killed):
        main(grid, folder, tmp_path / "out")
    grid.killed = lambda *_: False
    main(grid, folder, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["privacy"]["releases"] == ROUNDS + 1
    main(grid, folder, tmp_path / "out", rounds=ROUNDS + 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["privacy"]["releases"] == ROUNDS + 2  # none was lost
    if not changes:
        assert counts(grid)[0] == Counter({("gaussian", 0.5): ROUNDS + 2})
        assert summary["privacy"]["epsilon"] == epsilon("gaussian", 0.5, ROUNDS + 2, 1e-5, None)


# ---- the node's folder
# ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_nodes(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "a", **KINDS[0])
    grid = Keeping(folder, state=str(tmp_path / "shared"))
    with pytest.raises(
        ValueError, match=r"state: .*\.safetensors holds user 'u\d+', who is not of this node"
    ):
        main(grid, folder, tmp_path / "out")


def test_a_folder_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "state", Path(__file__)):
        with (
            pytest.raises(OSError, match=f"state: cannot make the folder {path}"),
            NodeFolder(path, {}).locked(),
        ):
            pass
    folder, run = NodeFolder(tmp_path, {0: "a", 1: "b", 2: "c"}), "0" * 32
    assert folder.load(run).round == 0
    for name in ("../" + run, "A" * 32, ""):
        with pytest.raises(ValueError, match="run: expected 32 hexadecimal digits"):
            folder.load(name)
    own = Own(2, torch.tensor([1]), {"user": torch.ones(1, 4)}, {1: torch.ones(5)})
    folder.save(run, own)
    found = folder.load(run).tensors()
    assert all(torch.equal(found[name], value) for name, value in own.tensors().items())
    # In a further run, of whose users only some were here, under other numbers.
    later = NodeFolder(tmp_path, {0: "c", 4: "b", 5: "new"})
    own = Own(3, torch.tensor([0, 1]), {"user": torch.tensor([[0.0], [1.0]])}, {1: torch.ones(5)}, own)
    folder.save(run, own)
    start = later.load_from(run, 3)
    assert (start.round, start.users.tolist(), start.residuals, start.before) == (3, [4], {}, None)
    assert start.state["user"].tolist() == [[1.0]]
    assert later.load_from(run, 2).state["user"].tolist() == [[1.0] * 4]  # of which the server knows
    assert later.load_from("1" * 32, 3).round == 0
    path = tmp_path / f"{run}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"state: .*{path.name} is damaged"):
        folder.load(run)


# ---- on the device
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(whole: dict[str, tuple[Keeping, Path]]) -> Path:
    return whole[named(KINDS[1])][1]


def test_a_node_serves_its_own_users(trained: Path) -> None:
    simulator = simulated(make_config(**KINDS[1]), make_dataset(), make_pretrained())
    expected = simulator.trained_run
    metrics = expected.evaluate()
    for node in range(NODES):
        state = trained / "a" / f"state-{node + 1}"
        run = load_node(trained / "out", node_file(trained / "a", node), state)
        users = np.arange(node, USERS, NODES)
        assert [name for name in run.dataset.user_ids if name] == [f"u{user}" for user in users]
        assert run.dataset.item_ids == make_dataset().item_ids
        found, wanted = run.recommend(users, 5), expected.recommend(users, 5)
        assert torch.equal(found.items, wanted.items)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)
        mine = run.evaluate()
        at = torch.isin(metrics.users, mine.users)
        for name, values in mine.values.items():
            torch.testing.assert_close(values, metrics.values[name][at], rtol=1e-5, atol=1e-5)


def test_a_node_serves_from_the_command_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"node": node_file(trained / "a", 1), "state": trained / "a" / "state-2"}
    serving_cli.recommend(trained / "out", **own, k=2, json_=True)
    told = json.loads(capsys.readouterr().out)
    assert [entry["user"] for entry in told] == ["u1", "u4", "u7", "u10"]
    texts = trained / "texts.csv"
    texts.write_text("item,title\n" + "".join(f"i{item},film {item}\n" for item in range(39, -1, -1)))
    serving_cli.recommend(trained / "out", user=["u4"], items=texts, **own, k=2, json_=True)
    (named,) = json.loads(capsys.readouterr().out)
    assert [item["item"] for item in named["items"]] == [item["item"] for item in told[1]["items"]]
    assert all(item["text"] == f"film {item['item'][1:]}" for item in named["items"])
    serving_cli.evaluate(trained / "out", **own, json_=True)
    assert json.loads(capsys.readouterr().out)["users"] == 4
    for given, message in (
        ({"node": own["node"]}, "--node, --state: expected both"),
        ({**own, "new_users": "new.csv"}, "--node: expected without --new-users"),
        ({"user": ["u1"], "items": texts}, "--items: expected --node"),
        ({**own, "user": ["u2"]}, "no user with the id 'u2'; ids are such as 'u1', 'u4', 'u7'"),
        ({**own, "items": trained / "nowhere.csv"}, "nowhere.csv: no such file"),
        ({**own, "state": trained / "a" / "state-1"}, "holds user 'u0', who is not of this node"),
        ({**own, "state": trained}, "found none of any run"),
    ):
        with pytest.raises(typer.Exit) as ended:
            serving_cli.recommend(trained / "out", **given)
        assert ended.value.exit_code == 2
        assert message in " ".join(capsys.readouterr().err.split())
