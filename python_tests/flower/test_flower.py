"""The Flower app trains what the simulator trains, in Flower's own simulation and in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

pytest.importorskip(
    "flwr", reason="flwr is not installed here; `make test-flower` makes an environment with it"
)

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.flower import client, prepare, read_node, read_server
from fedpeft_ext.flower.__main__ import main
from fedpeft_ext.flower.files import node_file, write_node
from fedpeft_ext.flower.protocol import PARAMETERS, SETTINGS, STARTS
from fedpeft_ext.flower.server import FlowerServer
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator, load_server
from fedpeft_ext.simulation.privacy import epsilon

DIM, USERS, ITEMS, ROUNDS = 8, 12, 40, 3


def make_dataset(seed: int = 0) -> Dataset:
    """12 users with 1 to 12 training items out of 40, and a test item each but for the last."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(ITEMS)[: 2 + int(rng.integers(12))] for _ in range(USERS)]
    return Dataset(
        name="tiny",
        num_users=USERS,
        num_items=ITEMS,
        indptr=np.concatenate([[0], np.cumsum([len(row) - 1 for row in rows])]).astype(np.int64),
        indices=np.concatenate([row[1:] for row in rows]).astype(np.int64),
        test_items=np.array([row[0] for row in rows[:-1]] + [-1], dtype=np.int64),
        valid_items=np.full(USERS, -1, dtype=np.int64),
        user_ids=[f"u{u}" for u in range(USERS)],
        item_ids=[f"i{i}" for i in range(ITEMS)],
    )


def make_pretrained() -> Pretrained:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (ITEMS, 3), generator=generator).to(torch.uint8)
    return Pretrained(0.3 * torch.randn(ITEMS, DIM, generator=generator), codes)


def make_config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "backbone.dim": DIM,
        "embedding.codebook_size": 16,
        "embedding.table_size": 24,
        "training.clients_per_round": 5,
        "training.rounds": ROUNDS,
        "evaluation.num_negatives": 20,
        "evaluation.every": 1,
        **changes,
    }
    return Config().updated(f"{key}={'null' if value is None else value}" for key, value in values.items())


@pytest.fixture(autouse=True)
def _running_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made in the name of a task, which Flower's processes are."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class InProcess(Grid):
    """A grid whose nodes live in this process: one context each, as a SuperNode keeps it.

    Args:
        folder: of the nodes' files.
        num_nodes: how many.
        answers: whether a node answers a message, by (node, kind, round).
    """

    def __init__(
        self, folder: Path, num_nodes: int, answers: Callable[[int, str, str], bool] = lambda *_: True
    ) -> None:
        self.contexts = {
            node + 1: Context(
                run_id=1,
                node_id=node + 1,
                node_config={"data": str(node_file(folder, node))},
                state=RecordDict(),
                run_config={},
            )
            for node in range(num_nodes)
        }
        self._answers = answers
        self.seen: list[Message] = []

    def restart(self, *, run: int = 1) -> None:
        """End all SuperNodes and start them again: what they had in memory is gone, and so are their ids."""
        first = max(self.contexts) + 1
        self.contexts = {
            node: Context(
                run_id=run, node_id=node, node_config=old.node_config, state=RecordDict(), run_config={}
            )
            for node, old in enumerate(self.contexts.values(), first)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            if self._answers(node, message.metadata.message_type, message.metadata.group_id):
                replies.append(client.app(message, self.contexts[node]))
                self.seen += [message, replies[-1]]
        return replies[::-1]  # in no particular order

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def assert_equal(server: FlowerServer, lines: list[dict[str, Any]], simulator: Simulator) -> None:
    """The server's tensors are the simulator's, and so are the metrics of every round."""
    expected = {k: v for k, v in simulator.state_dict().items() if not k.startswith("clients")}
    got = server.state_dict()
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)
    evaluations = simulator.run_evaluations  # type: ignore[attr-defined]
    assert len(lines) == len(evaluations) == ROUNDS + 1
    for line, metrics in zip(lines, evaluations, strict=True):
        assert {name: line[name] for name in metrics} == pytest.approx(dict(metrics), abs=1e-9)


def simulated(config: Config, dataset: Dataset, pretrained: Pretrained) -> Simulator:
    simulator = Simulator(config, dataset, pretrained=pretrained)
    evaluations = [simulator.evaluate().values]
    for _ in range(ROUNDS):
        simulator.round()
        evaluations.append(simulator.evaluate().values)
    simulator.run_evaluations = evaluations  # type: ignore[attr-defined]
    return simulator


@pytest.mark.parametrize("num_nodes", [2, USERS])
@pytest.mark.parametrize(
    "changes",
    [
        {"embedding.name": "p-lora"},
        {"embedding.name": "p-rq", "compression.method": "int8"},
        {"embedding.name": "p-lora+rq", "compression.method": "top-k", "compression.top_k": 0.2},
        {"embedding.name": "c-hash", "compression.method": "fp16", "training.client_sampling": "poisson"},
        {"embedding.name": "p-rq", "backbone.name": "fedncf", "training.server_optimizer": "adam"},
        {"embedding.name": "p-lora", "backbone.name": "pfedrec", "training.weighting": "uniform"},
        {"embedding.name": "full", "faults.reject": True, "faults.max_norm": 0.9},
        {
            "embedding.name": "p-lora",
            "backbone.name": "fedncf",
            "training.warmup_rounds": 1,
            "training.warmup_server_lr": 0.7,
        },
        {
            "embedding.name": "p-rq",
            "training.schedule": "linear",
            "training.server_schedule": "cosine",
            "training.schedule_end": 0.1,
            "training.warmup_rounds": 1,
            "training.warmup_server_optimizer": "adam",
        },
        {
            "embedding.name": "p-rq",
            "backbone.name": "pfedrec",
            "training.warmup_rounds": 2,
            "training.warmup_lr": 0.02,
            "compression.method": "top-k",
        },
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_equals_the_simulator(changes: dict[str, Any], num_nodes: int, tmp_path: Path) -> None:
    config, dataset, pretrained = make_config(**changes), make_dataset(), make_pretrained()
    prepare(config, dataset, tmp_path, num_nodes, pretrained=pretrained)
    stored, num_items, given, _ = read_server(tmp_path)
    grid = InProcess(tmp_path, num_nodes)
    server = FlowerServer(grid, stored, num_items, pretrained=given)
    server.join()
    simulator = simulated(config, dataset, pretrained)
    assert_equal(server, list(server.run()), simulator)
    # What clients keep is on their node, and there alone.
    state = {f"state.{name}": value for name, value in simulator.store.rows(range(USERS)).items()}
    for context in grid.contexts.values():
        own = client.to_tensors(context.state, "clients")
        for name in state.keys() & own.keys():
            torch.testing.assert_close(own[name], state[name][own["users"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding.name": "p-rq", "backbone.name": "pfedrec", "training.warmup_rounds": 1},
        {"embedding.name": "c-hash", "backbone.name": "fedncf"},
    ],
)
def test_goes_on_as_the_simulator_does(changes: dict[str, Any], tmp_path: Path) -> None:
    """With items that arrived, and users who begin anew."""
    whole = make_dataset()
    met = np.flatnonzero(np.bincount(np.append(whole.indices, whole.test_items[:-1]), minlength=ITEMS))
    before = whole.of_users(range(5)).changed(num_items=int(met.max()), item_ids=whole.item_ids[: met.max()])
    config = make_config(**{"pretrain.features": "random", "training.rounds": 2, **changes})
    Simulator(config, before, out=tmp_path / "old").run()
    schedules = ["training.schedule=linear", "training.server_schedule=cosine"]  # of the further rounds
    more = config.updated([f"start_from={tmp_path / 'old'}", f"training.rounds={2 + ROUNDS}", *schedules])
    prepare(more, whole, tmp_path / "new", 2)
    stored, num_items, given, start = read_server(tmp_path / "new")
    server = FlowerServer(InProcess(tmp_path / "new", 2), stored, num_items, pretrained=given, start=start)
    server.join()
    old = load_server(tmp_path / "old", before)
    simulator = Simulator(more, whole, start_from=old)
    first = simulator.evaluate().values
    assert simulator.rounds_done == server.rounds_done == 2
    lines = list(server.run())
    assert {name: lines[0][name] for name in first} == pytest.approx(dict(first), abs=1e-9)
    simulator.run()
    for name, value in simulator.trained_run.server.model.state_dict().items():
        if name not in simulator.model.local_parameters:
            torch.testing.assert_close(server.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="start: expected it where start_from is set"):
        FlowerServer(InProcess(tmp_path / "new", 2), stored, num_items, pretrained=given)


@pytest.mark.parametrize("method", ["none", "int8"])
def test_sends_what_is_counted(method: str, tmp_path: Path) -> None:
    """With one user a node, the arrays of a round's messages are the bytes that the simulator counts, and
    the header of NumPy's format."""
    config = make_config(**{"embedding.name": "p-lora", "compression.method": method})
    prepare(config, make_dataset(), tmp_path, USERS, pretrained=make_pretrained())
    server = FlowerServer(
        InProcess(tmp_path, USERS), *read_server(tmp_path)[:2], pretrained=make_pretrained()
    )
    server.join()
    before = server.sent, server.received
    info = server.round()
    header = 128
    up_arrays = 2 if method == "none" else 1
    assert server.sent - before[0] == info.clients * (server.traffic.down + 2 * header)
    assert server.received - before[1] == info.clients * (info.bytes_up + up_arrays * header)


def test_a_node_that_does_not_answer_loses_its_clients_for_the_round(tmp_path: Path) -> None:
    config = make_config(**{"embedding.name": "p-lora", "training.clients_per_round": USERS})
    prepare(config, make_dataset(), tmp_path, 3, pretrained=make_pretrained())

    def answers(node: int, kind: str, round: str) -> bool:
        return not (node == 2 and kind == "train" and round == "1")

    grid = InProcess(tmp_path, 3, answers)
    server = FlowerServer(grid, *read_server(tmp_path)[:2], pretrained=make_pretrained())
    server.join()
    assert [server.round().clients for _ in range(2)] == [8, 12]
    # One that comes back without its state is set up anew; its users start again.
    grid.contexts[3].state = RecordDict()
    original = grid.send_and_receive

    def failing(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message in messages:
            try:
                yield from original([message])
            except RuntimeError as error:
                yield Message(Error(code=1, reason=str(error)), reply_to=message)

    grid.send_and_receive = failing  # type: ignore[method-assign]
    assert [server.round().clients for _ in range(2)] == [8, 12]


@pytest.mark.parametrize(
    "changes",
    [
        {"training.algorithm": "scaffold", "training.optimizer": "sgd"},
        {"faults.dropout_rate": 0.5},
        {"faults.too_few": "repeat"},
    ],
    ids=str,
)
def test_refuses_what_only_a_simulation_has(changes: dict[str, Any], tmp_path: Path) -> None:
    config, setting = make_config(**changes), next(iter(changes))
    with pytest.raises(ValueError, match=rf"{setting}: expected .* with Flower"):
        FlowerServer(InProcess(Path(), 0), config, ITEMS)
    with pytest.raises(ValueError, match=rf"{setting}: expected .* with Flower"):
        prepare(config, make_dataset(), tmp_path / "prepared", 2, pretrained=make_pretrained())
    assert not (tmp_path / "prepared").exists()


PRIVATE = {
    "embedding.name": "p-lora",
    "training.weighting": "uniform",
    "training.client_sampling": "poisson",
    "privacy.clip": 0.05,
    "privacy.noise_multiplier": 0.5,
}


def run_privately(
    folder: Path, num_nodes: int = 3, node_config: dict[str, Any] | None = None, **changes: Any
) -> tuple[FlowerServer, InProcess]:
    config = make_config(**{**PRIVATE, **changes})
    prepare(config, make_dataset(), folder, num_nodes, pretrained=make_pretrained())
    grid = InProcess(folder, num_nodes)
    for context in grid.contexts.values():
        context.node_config.update(node_config or {})
    server = FlowerServer(grid, *read_server(folder)[:2], pretrained=make_pretrained())
    server.join()
    return server, grid


def answers_to(grid: InProcess, kind: str) -> list[Message]:
    return [message for message in grid.seen[1::2] if message.metadata.message_type == kind]


@pytest.mark.parametrize("backbone", ["fedmf", "pfedrec"])
@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.mode": "cdp"},
        {"privacy.mode": "cdp", "privacy.mechanism": "laplace", "compression.method": "int8"},
        {"privacy.mode": "ldp", "privacy.noise_multiplier": 0, "faults.reject": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_privacy_is_the_simulators(
    changes: dict[str, Any], backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the simulator's seed in place of secret ones, and with `ldp` without noise, which the simulator
    draws for the sum."""
    changes = {**changes, "backbone.name": backbone}
    monkeypatch.setattr("fedpeft_ext.flower.server.secret_seed", lambda: Config().seed)
    server, _ = run_privately(tmp_path, node_config={"evaluate": True}, **changes)
    simulator = simulated(make_config(**{**PRIVATE, **changes}), make_dataset(), make_pretrained())
    assert_equal(server, list(server.run()), simulator)
    assert server.privacy == simulator.privacy


def test_central_noise_and_samples_are_secret(tmp_path: Path) -> None:
    changes = {"privacy.mode": "cdp", "training.clients_per_round": 6}
    servers = []
    for run in range(2):
        server, grid = run_privately(tmp_path / str(run), USERS, **changes)
        for _ in range(ROUNDS):
            server.round()
        servers.append((server.state_dict(), [m.metadata.src_node_id for m in answers_to(grid, "train")]))
    (first, chosen), (second, others) = servers
    assert chosen != others  # 3 samples of 12 users: equal once in 5e10 runs
    assert all(
        not torch.equal(first[name], second[name]) for name in first if name.startswith("item_embedding.lora")
    )


@pytest.mark.parametrize(("mechanism", "deviation"), [("gaussian", 1.0), ("laplace", 2**0.5)])
def test_local_noise_is_on_what_leaves_the_node(mechanism: str, deviation: float, tmp_path: Path) -> None:
    changes = {
        "backbone.name": "pfedrec",  # whose clients send what newcomers start from
        "privacy.mode": "ldp",
        "privacy.mechanism": mechanism,
        "privacy.noise_multiplier": 100.0,
        "training.client_sampling": "fixed",
        "training.clients_per_round": USERS,
    }
    server, grid = run_privately(tmp_path, **changes)
    lines = list(server.run())
    assert not any(name.startswith(("HR", "NDCG")) for line in lines for name in line)
    assert [line["loss"] for line in lines[1:]] == [None] * ROUNDS
    uploads = []
    for answer in answers_to(grid, "train"):
        assert answer.content.metric_records["metrics"]["loss"] == []
        assert not client.to_tensors(answer.content, "starts")
        tensors = client.to_tensors(answer.content, "updates")
        uploads += list(torch.cat([value.flatten(1) for value in tensors.values()], 1))
    noise = torch.stack(uploads).double() / (100.0 * 0.05)  # the clipped update is at most a hundredth of it
    assert len(noise) == ROUNDS * USERS
    assert noise.std(1).numpy() == pytest.approx(deviation, rel=0.35)  # of each upload, over 192 elements
    assert float(noise.std()) == pytest.approx(deviation, rel=0.05)
    assert float(noise.mean().abs()) < 0.1
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.5  # nobody's is another's
    assert server.privacy is not None
    assert server.privacy.releases == ROUNDS
    assert lines[-1]["epsilon"] == server.privacy.epsilon == simulated_epsilon(changes)


def simulated_epsilon(changes: dict[str, Any]) -> float | None:
    privacy = simulated(make_config(**{**PRIVATE, **changes}), make_dataset(), make_pretrained()).privacy
    assert privacy is not None
    return privacy.epsilon


def test_a_node_keeps_its_users_within_a_budget(tmp_path: Path) -> None:
    changes = {
        "privacy.mode": "ldp",
        "privacy.noise_multiplier": 4.0,
        "training.client_sampling": "fixed",
        "training.clients_per_round": USERS,
    }
    two = epsilon("gaussian", 4.0, 2, 1e-4, share=None)
    node_config = {"epsilon": 1.001 * two, "delta": 1e-4}
    server, _ = run_privately(tmp_path, node_config=node_config, **changes)
    assert [server.round().clients for _ in range(2)] == [USERS, USERS]
    before = {name: value.clone() for name, value in server.state_dict().items()}
    assert server.round().clients == 0
    assert all(torch.equal(value, before[name]) for name, value in server.state_dict().items())
    # What has left counts with the noise that it had, whatever a server offers from then on.
    for noise, trained in (("1", 0), ("1e3", USERS)):
        server.config = server.config.updated([f"privacy.noise_multiplier={noise}"])
        server._users.clear()
        assert server.round().clients == trained


def test_a_node_sends_no_two_uploads_of_a_user_at_once(tmp_path: Path) -> None:
    """Each of them would be within the budget."""
    _, grid = run_privately(tmp_path, node_config={"epsilon": 4.0}, **{"privacy.mode": "ldp"})
    settings = ConfigRecord({"round": 1, "users": [3, 3]})
    content = RecordDict({PARAMETERS: ArrayRecord(), STARTS: ArrayRecord(), SETTINGS: settings})
    message = Message(content=content, message_type="train", dst_node_id=1, group_id="1")
    with pytest.raises(ValueError, match=r"users: expected each once, got \[3, 3\]"):
        client.app(message, grid.contexts[1])


def test_uploads_count_though_their_round_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = run_privately(tmp_path, **{"privacy.mode": "ldp", "training.clients_per_round": USERS})

    def broken(*answer: object) -> None:
        raise ValueError("a malformed update")

    monkeypatch.setattr(server, "_decoded", broken)
    for attempt in (1, 2):
        with pytest.raises(ValueError, match="malformed"):
            server.round()
        assert server.privacy is not None
        assert server.privacy.releases == attempt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.mode": "cdp"}, "epsilon: this node takes part with privacy.mode 'ldp' .* got 'cdp'"),
        ({"privacy.mode": "ldp", "privacy.noise_multiplier": 0}, "got 'ldp': the noise is zero"),
    ],
)
def test_a_node_with_a_budget_refuses_what_does_not_protect_it(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_privately(tmp_path, node_config={"epsilon": 4.0}, **changes)


def test_writes_its_files_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = tmp_path / "prepared", ["dataset.name=synthetic", "embedding.name=c-lora"]
    main(folder, nodes=3, set_=settings)
    assert sorted(path.name for path in folder.iterdir())[1:] == [
        "items.parquet",
        "node-00000.safetensors",
        "node-00001.safetensors",
        "node-00002.safetensors",
        "server.safetensors",
    ]
    with pytest.raises(typer.Exit) as ended:
        main(folder, nodes=0, set_=settings)
    assert ended.value.exit_code == 2
    assert "error: num_nodes: expected 1 to" in capsys.readouterr().err


def test_node_files_hold_their_own_users_alone(tmp_path: Path) -> None:
    dataset = make_dataset()
    write_node(dataset, np.array([3, 7]), tmp_path / "node.safetensors")
    part, users = read_node(tmp_path / "node.safetensors")
    assert users.tolist() == [3, 7]
    assert part.num_users == USERS
    sizes = np.diff(part.indptr)
    assert np.flatnonzero(sizes).tolist() == [3, 7]
    for user in (3, 7):
        assert part.met(user).tolist() == dataset.met(user).tolist()
    with pytest.raises(FileNotFoundError, match="expected a file that"):
        read_node(tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match=r"bad\.safetensors: expected a safetensors file"):
        read_node(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(("num_nodes", "min_nodes"), [(USERS, 0), (3, 3)])
def test_in_flowers_own_simulation(num_nodes: int, min_nodes: int, tmp_path: Path) -> None:
    """Ray actors run the ClientApp, Flower carries the messages, with secure aggregation or without: the same
    numbers."""
    from flwr.simulation import run_simulation

    changes = {"embedding.name": "p-rq", "training.clients_per_round": 10}
    dataset, pretrained = make_dataset(), make_pretrained()
    config = make_config(**changes, **{"secure_aggregation.min_nodes": min_nodes})
    prepare(config, dataset, tmp_path, num_nodes, pretrained=pretrained)
    server_app, client_app = ServerApp(), ClientApp()
    folder = str(tmp_path)

    def at_home(handler: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
        # `flwr run` would put the folder into the run's configuration; run_simulation has none.
        def handle(message: Message, context: Context) -> Message:
            # Flower refuses a changed one, so the handler gets a context of its own over the same state.
            home = Context(
                run_id=context.run_id,
                node_id=context.node_id,
                node_config={**context.node_config, "evaluate": True},
                state=context.state,
                run_config={**context.run_config, "prepared": folder},
            )
            return handler(message, home)

        return handle

    client_app.query()(at_home(client.join))
    client_app.query("offer")(at_home(client.offer))
    client_app.query("share")(at_home(client.share))
    client_app.query("reveal")(at_home(client.reveal))
    client_app.train()(at_home(client.train))
    client_app.evaluate()(at_home(client.evaluate))
    found: list[tuple[FlowerServer, list[dict[str, Any]]]] = []

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        stored, num_items, given, _ = read_server(folder)
        server = FlowerServer(grid, stored, num_items, pretrained=given, min_nodes=num_nodes, timeout=600.0)
        server.join()
        found.append((server, list(server.run())))

    resources = {
        "client_resources": {"num_cpus": 1},
        "init_args": {"num_cpus": 2, "include_dashboard": False},
    }
    run_simulation(server_app, client_app, num_supernodes=num_nodes, backend_config=resources)
    assert len(found) == 1
    assert found[0][0].lost == 0
    assert_equal(*found[0], simulated(make_config(**changes), dataset, pretrained))
