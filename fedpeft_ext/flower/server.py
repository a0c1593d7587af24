"""`app`: Flower's ServerApp, and `FlowerServer`, which it runs.

The server knows the settings, the catalogue's size and what was pre-trained. It learns which users a node
has, samples clients as the simulator does, and feeds the same `Aggregator` with the updates that come back.
A node that fails, or answers too late, loses its clients for the round and no more. With privacy, what the
server draws comes from secret seeds: noise, and with `cdp` the samples of clients, which epsilon counts on.

With a folder to write to, the server saves itself after every round, before the new parameters are sent.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import Config
from fedpeft_ext.flower.files import Start, check_items, check_supported, copy_items, read_server
from fedpeft_ext.flower.protocol import (
    CLIENTS,
    METRICS,
    PARAMETERS,
    SETTINGS,
    SETUP,
    STARTS,
    UPDATES,
    payload_bytes,
    to_record,
    to_tensors,
)
from fedpeft_ext.flower.secure import Vector, masked_sum, vector_format
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.callbacks import Metrics, RoundInfo
from fedpeft_ext.simulation.checkpoint import (
    RUN,
    Checkpoint,
    CheckpointFolder,
    has_checkpoint,
    load_checkpoint,
    trained_state,
)
from fedpeft_ext.simulation.client_batch import ClientStore
from fedpeft_ext.simulation.communication import message as averaged
from fedpeft_ext.simulation.communication import setup_message, shared_state
from fedpeft_ext.simulation.compression import decode
from fedpeft_ext.simulation.faults import make_faults
from fedpeft_ext.simulation.local_training import ParameterRoles
from fedpeft_ext.simulation.output import SUMMARY, RunFolder, prepare_folder
from fedpeft_ext.simulation.privacy import (
    Ledger,
    PrivacyReport,
    check_accountant,
    make_clipping,
    make_noise,
    secret_seed,
)
from fedpeft_ext.simulation.randomness import choose_clients
from fedpeft_ext.simulation.setup import (
    after_warmup,
    build_model,
    carry_over,
    clients_per_round,
    counted_traffic,
    needs_pretrained,
    server_settings,
    warmup_rounds,
)
from fedpeft_ext.simulation.simulator import VALID, check_resumable, check_schedule
from fedpeft_ext.simulation.state import Stateful, below, copy_into, prefixed

log = logging.getLogger("fedpeft_ext.flower")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train as the run's settings say.

    Keys of the run's configuration: `prepared`, the folder that `prepare` wrote; `out`, a folder for
    metrics.jsonl, summary.json, model.safetensors and checkpoints ("": none); `overwrite`, whether a run in
    it is replaced, instead of going on; `min-nodes` to wait for; `timeout`, seconds that nodes have to
    answer; `rounds`, instead of those of the settings (0: as set).
    """
    run = context.run_config
    config, num_items, pretrained, start = read_server(str(run["prepared"]))
    if rounds := int(run.get("rounds", 0)):
        config = config.updated([f"training.rounds={rounds}"])
    out = Path(str(run["out"])) if run.get("out") else None
    overwrite = bool(run.get("overwrite", False))
    saved = None if out is None or overwrite else saved_run(out, config)
    if saved is not None and out is not None:
        check_items(str(run["prepared"]), out)
    server = FlowerServer(
        grid,
        config,
        num_items,
        pretrained=pretrained,
        start=start,
        min_nodes=int(run.get("min-nodes", 1)),
        timeout=float(run.get("timeout", 3600.0)),
    )
    if saved is not None and out is not None:
        server.restore(saved, ended=(out / SUMMARY).exists())
    folder = saves = None
    if out is not None:
        prepare_folder(out, overwrite or saved is not None, clear=saved is None)
        folder = RunFolder(out, config, None if saved is None else saved.header["metrics"])
        saves = CheckpointFolder(out, config.checkpoint)

    def save() -> None:
        if folder is not None and saves is not None and config.checkpoint.every != 0:
            saves.save(server.checkpoint(folder.mark()))

    try:
        if folder is not None:
            copy_items(str(run["prepared"]), folder.path)
        if saved is None:
            save()  # what to go on from, should nodes not come
        server.join()
        for line in server.run(save):
            print(json.dumps(line), flush=True)
            if folder is not None:
                folder.add_metrics(line)
        if folder is not None:
            privacy = None if server.privacy is None else server.privacy.as_dict()
            summary = {
                "rounds": server.rounds_done,
                **server.last,
                "privacy": privacy,
                RUN: server.run_id,
                "started_from": server.started_from,
            }
            folder.finish(summary, server.state_dict())
    finally:
        if folder is not None:
            folder.close()


def saved_run(folder: Path, config: Config) -> Checkpoint | None:
    """The run in `folder` to go on with; None where there is none.

    Raises:
        ValueError: it has its rounds, or other settings, or is not that of a Flower server, or a file is
            damaged.
    """
    if has_checkpoint(folder) is None:
        return None
    saved = load_checkpoint(folder)
    if RUN not in saved.header:
        raise ValueError(f"out: expected the folder of a Flower server, but {folder} is of a simulation")
    check_resumable(config, saved, "the prepared settings")
    check_schedule(config.training, saved.header["config"]["training"]["rounds"])
    ended = (folder / SUMMARY).exists()
    if config.training.rounds < saved.round + ended:
        raise ValueError(
            f"rounds: expected at least {saved.round + ended}, since {folder} holds a run of {saved.round}"
            f"{' that ended' if ended else ''}, got {config.training.rounds}; or choose another out, or "
            "overwrite=true"
        )
    return saved


class FlowerServer:
    """The server of a federation whose nodes are reached through Flower.

    Args:
        grid: Flower's way to the nodes.
        config: settings; what only a simulation can do is refused.
        num_items: items in the catalogue.
        pretrained: full embeddings and codes, where the embedding needs them.
        start: what to go on from, with settings that say so.
        min_nodes: nodes to wait for before the first round.
        timeout: seconds that nodes have to answer.

    Attributes:
        rounds_done: finished rounds.
        run_id: 32 hexadecimal digits, the same after `restore`: under it nodes keep their users' state.
        sent, received: bytes of arrays, keys and shares in messages so far, set-up included.
        lost: rounds without a step because too few nodes stayed in their secure aggregation.
        last: the newest line that `run` gave.
    """

    def __init__(
        self,
        grid: Grid,
        config: Config,
        num_items: int,
        *,
        pretrained: Pretrained | None = None,
        start: Start | None = None,
        min_nodes: int = 1,
        timeout: float = 3600.0,
    ) -> None:
        check_supported(config)
        if pretrained is None and needs_pretrained(config.embedding.name):
            raise ValueError(
                f"pretrained: expected embeddings, which {config.embedding.name} needs, got None"
            )
        if (start is None) != (config.start_from is None):
            raise ValueError(
                "start: expected it where start_from is set, as `prepare` writes it, and nowhere else, got "
                f"{'none' if start is None else 'one'} with start_from={config.start_from!r}"
            )
        self.config = config
        self._grid, self._num_items = grid, num_items
        self._secure = config.secure_aggregation if config.secure_aggregation.min_nodes else None
        self._min_nodes = max(min_nodes, config.secure_aggregation.min_nodes)
        self._timeout = timeout
        self._pretrained = pretrained
        self._warmup_rounds = warmup_rounds(config)
        self._faults = make_faults(config)
        self._central = config.privacy.mode == "cdp"
        self._seed = secret_seed() if self._central else config.seed
        self._noise = make_noise(config.privacy, 0.0, secret_seed()) if self._central else None
        check_accountant(config.privacy)
        self._ledger: Ledger | None = None  # from the first round on, whose clients it is about
        self._population = (0, 0)
        self.run_id = uuid.uuid4().hex
        self.sent = self.received = self.lost = 0
        self.rounds_done = self._begun = 0 if start is None else start.round
        self._run_before = "" if start is None else start.run
        self.last: dict[str, Any] = {"round": self.rounds_done}
        self.model = self._begin_phase(None)
        parameters = dict(self.model.named_parameters())
        # Of clients' state the server holds what newcomers start from, and nobody's own.
        self._starts = ClientStore({}, {name: parameters[name] for name in self.model.averaged_start}, 1)
        if start is not None:
            copy_into(shared_state(self.model), start.server)
            copy_into(self._starts.starts, start.clients)

    @property
    def started_from(self) -> dict[str, Any] | None:
        """The run that this one went on from, and after which round."""
        run = self.config.start_from
        return None if run is None else {"run": run, "round": self._begun}

    @property
    def phase(self) -> str:
        """ "warm-up" or "training", of the next round."""
        return "warm-up" if self.rounds_done < self._warmup_rounds else "training"

    def _begin_phase(self, before: Backbone | None) -> Backbone:
        """The model of the phase of the next round, with what the one before trained besides the item
        embedding; aggregation for it. Nodes are to be set up anew.
        """
        config, pretrained, warmup = self.config, self._pretrained, self.phase == "warm-up"
        dtype = getattr(torch, config.dtype)
        model = build_model(
            config,
            self._num_items,
            base=None if pretrained is None else pretrained.full.to(dtype),
            codes=None if pretrained is None else pretrained.codes,
            codebooks=None if pretrained is None else pretrained.codebooks,
            warmup=warmup,
        )
        if before is not None:
            carry_over(before, model)
        self._shapes = {name: tensor.shape for name, tensor in averaged(model).items()}
        self._aggregator = Aggregator(
            averaged(model),
            frozenset(ParameterRoles.of(model).rows),
            **server_settings(config, warmup=warmup, begun=self._begun),
            stages=make_clipping(config.privacy) if self._central and self._secure is None else (),
            noise=self._noise,
            faults=self._faults if self._secure is None else None,
        )
        self.traffic = counted_traffic(config, model)
        self._fixed = vector_format(config, model)
        self._users: dict[int, np.ndarray] = {}  # of each node
        self._constants: dict[str, Tensor] | None = None
        return model

    # ---- nodes

    def join(self, poll_seconds: float = 1.0) -> None:
        """Wait for the first nodes and set them up.

        Raises:
            TimeoutError: fewer than `min_nodes` could be set up within `timeout`.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            self._meet()
            if len(self._users) >= self._min_nodes:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"min_nodes: expected {self._min_nodes} nodes that can be set up within "
                    f"{self._timeout:g} s, got {len(self._users)}"
                )
            time.sleep(poll_seconds)

    def _meet(self) -> None:
        """Set up nodes that are new, and forget those that left.

        A node that comes back, as another one, may be here before its old self is known to have gone.
        """
        present = set(self._grid.get_node_ids())
        self._users = {node: users for node, users in self._users.items() if node in present}
        settings = ConfigRecord(
            {
                "config": self.config.to_yaml(),
                "num_items": self._num_items,
                "phase": self.phase,
                "begun": self._begun,
                "from": self._run_before,
                "run": self.run_id,
                "round": self.rounds_done,
            }
        )
        content = RecordDict({SETTINGS: settings, SETUP: to_record(setup_message(self.model))})
        new = dict.fromkeys(sorted(present - set(self._users)), content)
        for node, reply in self._ask(MessageType.QUERY, new).items():
            users = to_tensors(reply, CLIENTS)["users"].numpy()
            for other, theirs in self._users.items():
                if not len(both := np.intersect1d(users, theirs)):
                    continue
                if other in new:
                    raise ValueError(f"nodes {other} and {node} both say that user {both[0]} is theirs")
                log.warning("node %d takes over %d users of node %d", node, len(both), other)
                self._users[other] = np.setdiff1d(theirs, both)
            self._users[node] = users

    def _ask(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, RecordDict]:
        """Answers of the nodes that gave one in time, by node; those that failed are set up anew later."""
        if not contents:
            return {}
        messages = [
            Message(content=content, message_type=kind, dst_node_id=node, group_id=str(self.rounds_done + 1))
            for node, content in contents.items()
        ]
        self.sent += sum(payload_bytes(content) for content in contents.values())
        answers: dict[int, RecordDict] = {}
        for reply in self._grid.send_and_receive(messages, timeout=self._timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                log.warning("node %d failed to answer %s: %s", node, kind, reply.error.reason)
                self._users.pop(node, None)
                continue
            self.received += payload_bytes(reply.content)
            answers[node] = reply.content
        for node in set(contents) - set(answers):
            log.warning("node %d gave no answer to %s", node, kind)
        return {node: answers[node] for node in sorted(answers)}

    # ---- rounds

    def round(self) -> RoundInfo:
        """Train one round.

        Raises:
            RuntimeError: no node has a user who can train. FloatingPointError: the sum of updates is NaN or
                infinite (the parameters are those of the round before). ValueError: a malformed update.
        """
        began, number, phase, counted = time.perf_counter(), self.rounds_done + 1, self.phase, self.traffic
        self._meet()
        chosen, share = self._sample(number)
        if self._ledger is not None:  # with `ldp` what was asked for has left the clients, whatever follows
            self._ledger.add_round(chosen, share)
        parameters = to_record(averaged(self.model))
        starts = to_record(self._starts.starts)
        asked = {node: np.intersect1d(chosen, own).tolist() for node, own in self._users.items()}
        # With central noise the sample is a secret, which a round that is lost for its size would tell.
        if self._secure is None or not self._central:
            asked = {node: users for node, users in asked.items() if users}
        contents = {
            node: RecordDict(
                {
                    PARAMETERS: parameters,
                    STARTS: starts,
                    SETTINGS: ConfigRecord({"round": number, "users": users, "nodes": len(asked)}),
                }
            )
            for node, users in asked.items()
        }
        before = self.sent, self.received
        try:
            if self._secure is None:
                loss = self._add(self._ask(MessageType.TRAIN, contents), number)
                clients, lost = self._aggregator.uploads, False
            else:
                total = masked_sum(self._ask, contents, self._fixed, self._secure)
                clients, loss = (0, float("nan")) if total is None else self._add_sum(total, number)
                lost = total is None
            self._aggregator.check_finite()
        except BaseException:
            self._aggregator.discard()
            self._starts.discard()
            raise
        # Whether a round counts may not depend on the clients where that would tell about them.
        enough = not lost and (self._central or clients >= max(1, self.config.faults.min_clients))
        self.lost += lost
        if enough:
            self._aggregator.apply()
            self._starts.commit()
        else:
            self._aggregator.discard()
            self._starts.discard()
        if self._faults is not None:
            self._faults.counts["dropped"] += len(chosen) - clients
            self._faults.counts["skipped"] += not enough
        self.rounds_done = number
        if phase == "warm-up" and self.phase == "training":
            self._pretrained = after_warmup(self.model, self._pretrained)
            self.model = self._begin_phase(self.model)
        down, up = counted.down, counted.up
        if self._secure is not None:  # keys and shares differ from node to node, so what was sent is told
            nodes = max(1, len(asked))
            down, up = -(-(self.sent - before[0]) // nodes), -(-(self.received - before[1]) // nodes)
        return RoundInfo(
            round=number,
            rounds=self.config.training.rounds,
            phase=phase,
            loss=loss,
            clients=clients,
            seconds=time.perf_counter() - began,
            bytes_down=down,
            bytes_up=up,
            faults=None if self._faults is None else dict(self._faults.counts),
        )

    def _sample(self, number: int) -> tuple[np.ndarray, float]:
        """The clients of a round, and which share of all they are on average."""
        training = self.config.training
        eligible = np.sort(np.concatenate([np.empty(0, np.int64), *self._users.values()]))
        if len(eligible) == 0:
            raise RuntimeError("no node has a user who can train")
        count = clients_per_round(training.clients_per_round, len(eligible))
        privacy = self.config.privacy
        if self._ledger is None and privacy.mode != "none":
            self._population = len(eligible), count
            self._ledger = Ledger(privacy, training.client_sampling, *self._population, 0)
        if self._noise is not None:
            self._noise.expected_clients = count
        chosen = choose_clients(eligible, count, training.client_sampling, self._seed, number)
        return chosen, count / len(eligible)

    @property
    def privacy(self) -> PrivacyReport | None:
        """What the rounds so far guarantee; None without privacy, and before the first."""
        return None if self._ledger is None else self._ledger.report()

    def _add_sum(self, total: Vector, number: int) -> tuple[int, float]:
        """Put the sum of all uploads into the sums; how many clients' they are, and their mean loss."""
        values = self._fixed.decode(total)
        weight, clients = values["counts"].tolist()
        if clients == 0.0:
            return 0, float("nan")
        self._aggregator.begin(number)
        self._aggregator.add(
            {name: value[None] / weight for name, value in below("updates", values).items()},
            torch.tensor([weight], dtype=torch.float64, device="cpu"),
        )
        starts = {
            name: (value[None] / clients).to(self._starts.starts[name].dtype)
            for name, value in below("starts", values).items()
        }
        if starts:
            self._starts.write(torch.zeros(1, dtype=torch.int64, device="cpu"), starts)
        told = self.config.privacy.mode != "ldp"
        return int(clients), float(values["loss"]) / clients if told else float("nan")

    def _add(self, answers: Mapping[int, RecordDict], number: int) -> float:
        """Put uploads into the sums; the mean loss of their clients, which `ldp` keeps from the server."""
        weights = {node: _floats(answer, "num-examples") for node, answer in answers.items()}
        self._aggregator.begin(number, weight=sum(map(sum, weights.values())))
        losses: list[float] = []
        for node, answer in answers.items():
            clients = torch.tensor(
                [int(user) for user in _floats(answer, "users")], dtype=torch.int64, device="cpu"
            )
            if len(clients) == 0:
                continue
            updates = self._decoded(to_tensors(answer, UPDATES), clients, node)
            accepted = self._aggregator.add(
                updates, torch.tensor(weights[node], dtype=torch.float64, device="cpu"), None, clients
            )
            starts = to_tensors(answer, STARTS)
            if starts and self.config.privacy.mode == "none":
                kept = starts if accepted is None else {name: v[accepted] for name, v in starts.items()}
                self._starts.write(
                    torch.zeros(len(next(iter(kept.values()))), dtype=torch.int64, device="cpu"), kept
                )
            losses += _floats(answer, "loss")
        return float(np.mean(losses)) if losses else float("nan")

    def _decoded(self, updates: Mapping[str, Tensor], clients: Tensor, node: int) -> dict[str, Tensor]:
        """Updates {name: [C, ...]} of a node's answer, checked."""
        method, dtype = self.config.compression.method, getattr(torch, self.config.dtype)
        if method != "none":
            each = [
                decode(updates[str(client)].numpy().tobytes(), self._shapes, method, dtype)
                for client in clients.tolist()
            ]
            return {name: torch.stack([update[name] for update in each]) for name in self._shapes}
        for name, shape in self._shapes.items():
            expected = (len(clients), *shape)
            value = updates.get(name)
            if value is None or tuple(value.shape) != expected or value.dtype != dtype:
                got = "none" if value is None else f"{value.dtype} {tuple(value.shape)}"
                raise ValueError(f"node {node}, {name}: expected {dtype} {expected}, got {got}")
        return {name: updates[name] for name in self._shapes}

    def evaluate(self) -> Metrics:
        """Metrics over the test items of all connected nodes' users; with `ldp` or secure aggregation of
        those that tell them.
        """
        began = time.perf_counter()
        self._meet()
        content = RecordDict(
            {PARAMETERS: to_record(averaged(self.model)), STARTS: to_record(self._starts.starts)}
        )
        answers = self._ask(MessageType.EVALUATE, dict.fromkeys(sorted(self._users), content))
        told = [dict(answer.metric_records[METRICS]) for answer in answers.values()]
        optional = self._secure is not None or self.config.privacy.mode == "ldp"
        values = mean_metrics(told) if any(told) or not optional else {}
        return Metrics(self.rounds_done, values, time.perf_counter() - began)

    def run(self, save: Callable[[], None] = lambda: None) -> Iterable[dict[str, Any]]:
        """Train all rounds that are left: one line for every evaluation, the first before any training.

        Args:
            save: called before the first and after every round, before its parameters are sent.
        """
        every, rounds = self.config.evaluation.every, self.config.training.rounds
        save()
        while True:
            if self.rounds_done % every == 0 or self.rounds_done == rounds:
                self.last = {**self.last, **self.evaluate().values, **self._bytes()}
                yield self.last
            if self.rounds_done >= rounds:
                return
            info = self.round()
            self.last = {
                "round": info.round,
                **info.as_dict(),
                **({} if self._ledger is None else {"epsilon": self._ledger.report().metric()}),
                **({} if self._secure is None else {"lost_rounds": self.lost}),
            }
            save()

    def _bytes(self) -> dict[str, int]:
        return {"sent_bytes": self.sent, "received_bytes": self.received}

    # ---- checkpoints

    def checkpoint(self, metrics: Mapping[str, Any]) -> Checkpoint:
        """All that `restore` goes on from, with metrics.jsonl as `RunFolder.mark` says. It holds no seed that
        is secret."""
        if self._constants is None:
            self._constants = prefixed("model", setup_message(self.model))
        progress = {
            "last": self.last,
            "sent": self.sent,
            "received": self.received,
            "lost": self.lost,
            "population": self._population,
        }
        header = {
            "config": self.config.model_dump(mode="json"),
            "dataset": "",
            "started_from": self.started_from,
            "progress": progress,
            "metrics": metrics,
            RUN: self.run_id,
        }
        state = trained_state(self.model, self._parts())
        return Checkpoint(self.rounds_done, header, state, self._constants)

    def restore(self, saved: Checkpoint, *, ended: bool = False) -> None:
        """Become the server that was saved.

        Args:
            ended: nothing was sent after it was saved that a further round gives away. Otherwise the round
                that followed may have begun, and counts with all clients as given away.

        Raises:
            ValueError: it does not fit the settings.
        """
        progress = saved.header["progress"]
        self.rounds_done, self.run_id, self.last = saved.round, saved.header[RUN], progress["last"]
        self.sent, self.received, self.lost = (progress[name] for name in ("sent", "received", "lost"))
        self.model = self._begin_phase(None)
        counts = saved.state.get("privacy.participations")
        if counts is not None:
            self._population = progress["population"]
            sampling = self.config.training.client_sampling
            self._ledger = Ledger(self.config.privacy, sampling, *self._population, len(counts))
        saved.restore(self.model, self._parts())
        if self._ledger is not None and not ended:
            self._ledger.add_round(np.arange(len(self._ledger.participations)))

    def _parts(self) -> dict[str, Stateful]:
        """All that lives from round to round besides the model and `progress`."""
        parts: dict[str, Stateful] = {"clients": self._starts, "aggregation": self._aggregator}
        if self._faults is not None:
            parts["faults"] = self._faults
        if self._ledger is not None:
            parts["privacy"] = self._ledger
        return parts

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of the server's model by name."""
        return shared_state(self.model) | prefixed("starts", self._starts.starts)


def mean_metrics(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over users of metrics that are means over each node's users (`num-examples` of them; metrics of
    validation items have `valid/num-examples`).

    Raises:
        ValueError: no answer has a user.
    """
    count = "num-examples"
    sums: dict[str, float] = {}
    users: dict[str, int] = {}
    for answer in answers:
        for name, value in answer.items():
            prefix = VALID if name.startswith(VALID) else ""
            if name != prefix + count:
                sums[name] = sums.get(name, 0.0) + float(value) * int(answer[prefix + count])
                users[name] = users.get(name, 0) + int(answer[prefix + count])
    if not sums:
        raise ValueError("evaluation: expected at least one user with a held-out item, got none")
    return {name: total / users[name] for name, total in sums.items()}


def _floats(answer: RecordDict, name: str) -> list[float]:
    values = answer.metric_records[METRICS].get(name, [])
    return [float(value) for value in values] if isinstance(values, list) else [float(values)]
