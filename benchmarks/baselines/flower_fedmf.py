"""FedMF with P-LoRA in Flower's simulation, written the way Flower's own tutorials write a client.

A SuperNode is a user. Its ClientApp keeps the user vector in the node's `Context`, trains the model with
torch.optim.Adam and answers with its A and B; Flower's FedAvg strategy averages them by numbers of examples.
To be fair to Flower, workers load data and frozen embeddings once rather than for every message, replies
carry only what is averaged, nothing is evaluated, and the first rounds, in which workers start and import
torch, do not count.

Needs flwr[simulation], whose pins keep it out of the project's environment: `make test-flower` makes one with
it, `.venv-flower`.
"""

from __future__ import annotations

import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from benchmarks.baselines.problem import Problem
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained


class FedMF(nn.Module):
    """score(i) = user . (base_i + B A_i), with a frozen base."""

    def __init__(self, base: Tensor, rank: int) -> None:
        super().__init__()
        self.base = nn.Embedding.from_pretrained(base)
        self.A = nn.Embedding(len(base), rank)
        self.B = nn.Linear(rank, base.shape[1], bias=False)
        self.user = nn.Parameter(torch.zeros(base.shape[1]))

    def forward(self, items: Tensor) -> Tensor:
        """Scores of `items`, of their shape."""
        scores: Tensor = (self.base(items) + self.B(self.A(items))) @ self.user
        return scores


def train(model: FedMF, positives: Tensor, *, epochs: int, lr: float, l2: float) -> float:
    """Full-batch BPR steps with new negatives each, and L2 on the parameters that a step reads: last loss."""
    trained = [model.user, model.A.weight, model.B.weight]
    optimizer = torch.optim.Adam(trained, lr=lr)
    unmet = torch.ones(model.base.num_embeddings, dtype=torch.bool)
    unmet[positives] = False
    candidates = unmet.nonzero().squeeze(1)
    value = 0.0
    for _ in range(epochs):
        negatives = candidates[torch.randint(len(candidates), positives.shape)]
        pairs = torch.stack([positives, negatives], 1)
        scores = model(pairs)
        loss = -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
        rows = model.A(pairs.flatten().unique())
        penalty = model.user.square().sum() + rows.square().sum() + model.B.weight.square().sum()
        optimizer.zero_grad()
        (loss + l2 / 2 * penalty).backward()
        optimizer.step()
        value = float(loss.detach())
    return value


class _Shared:
    """What a worker loads once: arrays of the problem's file, as tensors."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            self.indptr, self.items = arrays["indptr"], torch.from_numpy(arrays["items"])
            self.eligible = arrays["eligible"]
            self.users = torch.from_numpy(arrays["users"])
            self.model = FedMF(torch.from_numpy(arrays["base"]), int(arrays["rank"]))

    def positives(self, user: int) -> Tensor:
        """Training items of a user."""
        return self.items[self.indptr[user] : self.indptr[user + 1]]


@lru_cache(maxsize=1)
def _shared(path: str) -> _Shared:
    torch.set_num_threads(1)  # workers are as many as cores
    return _Shared(path)


def client_app() -> ClientApp:
    """The ClientApp."""
    app = ClientApp()

    @app.train()
    def train_user(message: Message, context: Context) -> Message:
        settings = message.content["config"]
        shared = _shared(str(settings["path"]))
        user = int(shared.eligible[int(context.node_config["partition-id"])])
        model, positives = shared.model, shared.positives(user)
        state = {**message.content["arrays"].to_torch_state_dict()}
        if "local" in context.state:
            state |= context.state["local"].to_torch_state_dict()
        else:
            state["user"] = shared.users[user]
        model.load_state_dict(state, strict=False)
        loss = train(
            model,
            positives,
            epochs=int(settings["epochs"]),
            lr=float(settings["lr"]),
            l2=float(settings["l2"]),
        )
        context.state["local"] = ArrayRecord({"user": model.user.detach()})
        averaged = {"A.weight": model.A.weight.detach(), "B.weight": model.B.weight.detach()}
        metrics = MetricRecord({"loss": loss, "num-examples": len(positives)})
        content = RecordDict({"arrays": ArrayRecord(averaged), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


def run(
    dataset: Dataset,
    config: Config,
    rounds: int,
    clients_per_round: int,
    pretrained: Pretrained | None = None,
    *,
    untimed: int = 2,
    workers: int = 2,
) -> float:
    """Clients that Flower trains in a second.

    Args:
        dataset, config, pretrained: what to train, with embedding p-lora (see `Problem.of`).
        rounds: timed rounds; `untimed` rounds come before.
        clients_per_round: SuperNodes asked in each round.
        workers: Ray actors, of one core each.
    """
    problem = Problem.of(config, dataset, pretrained)
    if problem.A is None or problem.B is None:
        raise ValueError(f"embedding.name: expected p-lora, got {config.embedding.name!r}")
    start = ArrayRecord({"A.weight": problem.A, "B.weight": problem.B})
    ends: list[float] = []
    server = ServerApp()

    def note_time(_: int, __: ArrayRecord) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(
            path,
            indptr=dataset.indptr,
            items=dataset.indices,
            eligible=problem.eligible,
            users=problem.users.numpy(),
            base=problem.base.numpy(),
            rank=problem.A.shape[1],
        )
        settings = ConfigRecord(
            {
                "path": str(path),
                "epochs": config.training.local_epochs,
                "lr": problem.lr,
                "l2": config.training.l2,
            }
        )

        @server.main()
        def main(grid: Grid, _: Context) -> None:
            strategy = FedAvg(
                fraction_train=1e-9,  # so that the least number of nodes is the number
                fraction_evaluate=0.0,
                min_train_nodes=clients_per_round,
                min_available_nodes=len(problem.eligible),
            )
            strategy.start(
                grid=grid,
                initial_arrays=start,
                num_rounds=untimed + rounds,
                train_config=settings,
                evaluate_fn=note_time,  # is called before the first round and after each
            )

        resources: BackendConfig = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": workers, "include_dashboard": False},
        }
        run_simulation(server, client_app(), len(problem.eligible), backend_config=resources)
    return rounds * clients_per_round / (ends[untimed + rounds] - ends[untimed])
