"""FedMF with P-LoRA in pfl-research (Granqvist et al., "pfl-research: simulation framework for accelerating
research in Private Federated Learning", NeurIPS 2024): its FederatedAveraging, simulated backend and PyTorch
model.

    pip install --no-deps pfl==0.6.0 multiprocess==0.70.19 dill==0.4.1

(`--no-deps`, since pfl asks for older releases of dp-accounting and packaging than the tests of this project
do.) A client is what pfl's own benchmarks do: a module with `loss`, Adam over its parameters, and a user
vector that the algorithm loads before local training and keeps after it. The L2 of touched rows (1e-8) is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pfl.algorithm
import pfl.hyperparam
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.baselines.problem import Problem, item_vectors


class ClientModel(nn.Module):
    """FedMF with base + B a_i; draws its negatives anew in every epoch."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        if problem.A is None or problem.B is None:
            raise ValueError("problem: expected one of p-lora for pfl, got one of p-rq")
        self.base = problem.base
        self.A, self.B = nn.Parameter(problem.A.clone()), nn.Parameter(problem.B.clone())
        self.user = nn.Parameter(torch.zeros(problem.base.shape[1]))

    def loss(self, positives: Tensor, gaps: Tensor) -> Tensor:
        """Mean BPR loss of a client's `positives` [P], of which `gaps` [P] counts the smaller items not
        met."""
        free = len(self.base) - len(positives)
        k = torch.randint(free, positives.shape)
        items = torch.cat([positives, k + torch.searchsorted(gaps, k, right=True)])
        vectors = self.base[items] + F.embedding(items, self.A) @ self.B.T
        positive, negative = (vectors @ self.user).chunk(2)
        return -F.logsigmoid(positive - negative).mean()

    def metrics(self, positives: Tensor, gaps: Tensor) -> dict[str, Any]:
        """None: the benchmark evaluates for all contenders alike."""
        return {}


class WithUserVectors(pfl.algorithm.FederatedAveraging):
    """Federated averaging in which each client has a user vector of its own."""

    def __init__(self, users: Tensor) -> None:
        super().__init__()
        self.users = users

    def train_one_user(
        self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any
    ) -> tuple[Any, Metrics]:
        """pfl's, between loading and keeping the client's vector."""
        user, number = model.pytorch_model.user, int(user_dataset.user_id)
        user.data.copy_(self.users[number])
        result = super().train_one_user(initial_model_state, model, user_dataset, central_context)
        self.users[number] = user.data
        return result  # type: ignore[no-any-return]


class Pfl:
    """Trains a `Problem`; see the module."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        training, dataset = problem.config.training, problem.dataset
        indptr, positives = (torch.from_numpy(values) for values in dataset.positives())
        self._net = ClientModel(problem)
        self._model = PyTorchModel(
            self._net,
            partial(torch.optim.Adam, fused=True),  # faster here than the default
            torch.optim.SGD([self._net.A, self._net.B], lr=problem.server_lr),
        )
        del self._model.variable_map["user"]  # neither sent nor averaged
        self._algorithm = WithUserVectors(problem.users.clone())
        chosen = self._chosen()
        clients = {
            client: positives[indptr[client] : indptr[client + 1]] for client in problem.eligible.tolist()
        }
        data = {
            client: PyTorchTensorDataset((items, items - torch.arange(len(items))), user_id=str(client))
            for client, items in clients.items()
        }
        federated = FederatedDataset(data.__getitem__, lambda: next(chosen))
        self._backend = SimulatedBackend(federated, federated, [WeightByDatapoints()])
        self._parameters = pfl.hyperparam.NNTrainHyperParams(
            local_num_epochs=training.local_epochs, local_learning_rate=problem.lr, local_batch_size=None
        )
        self._round = 0

    def _chosen(self) -> Iterator[int]:
        round = 1
        while True:
            yield from self.problem.clients(round).tolist()
            round += 1

    def round(self) -> None:
        """See `Contender`."""
        self._round += 1
        self._algorithm.run(
            pfl.algorithm.NNAlgorithmParams(
                central_num_iterations=self._round,
                evaluation_frequency=2**62,  # never again after the first round, which is no sample
                train_cohort_size=self.problem.per_round,
                val_cohort_size=None,
            ),
            self._backend,
            self._model,
            self._parameters,
            send_metrics_to_platform=False,
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """See `Contender`."""
        A, B = self._net.A.detach(), self._net.B.detach()
        return self._algorithm.users, item_vectors(self.problem.base, A, B, None, None)
