"""FedMF with P-LoRA or P-RQ by torch.func: what most people would write for many clients at once.

Clients' positions are padded to [C, P]; every client gets a copy of the averaged parameters, whole;
gradients are vmap(grad(loss)), and Adam is written over the stacked parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.baselines.negatives import Negatives, UniformNegatives
from benchmarks.baselines.problem import ADAM, Problem, item_vectors


class VmapGrad:
    """Trains a `Problem`; see the module.

    Args:
        problem: what to train.
        negatives: how negatives are drawn; None draws them by `UniformNegatives`.
        chunk_floats: elements of the copies of a chunk's largest parameter.
    """

    def __init__(
        self, problem: Problem, negatives: Negatives | None = None, *, chunk_floats: int = 4_000_000
    ) -> None:
        self.problem = problem
        dataset = problem.dataset
        self._epochs, self._l2 = problem.config.training.local_epochs, problem.config.training.l2
        self._draw = negatives or UniformNegatives(dataset, self._epochs)
        self._indptr, self._items = torch.from_numpy(dataset.indptr), torch.from_numpy(dataset.indices)
        self._sizes = self._indptr.diff()
        self._users = problem.users.clone()
        self._parameters = {
            name: value.clone()
            for name, value in (("A", problem.A), ("B", problem.B), ("codebooks", problem.codebooks))
            if value is not None
        }
        self._chunk = max(1, chunk_floats // max(value.numel() for value in self._parameters.values()))
        self._round = 0

    def result(self) -> tuple[Tensor, Tensor]:
        """See `Contender`."""
        get = self._parameters.get
        return self._users, item_vectors(
            self.problem.base, get("A"), get("B"), self.problem.codes, get("codebooks")
        )

    def round(self) -> None:
        """See `Contender`."""
        self._round += 1
        clients = torch.from_numpy(self.problem.clients(self._round))
        totals = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        for part in clients.split(self._chunk):
            self._train(part, totals)
        share = self.problem.server_lr / float(self._sizes[clients].sum())
        for name, value in self._parameters.items():
            value.add_(totals[name], alpha=share)

    def _vectors(self, parameters: dict[str, Tensor], items: Tensor) -> Tensor:
        """Vectors [P, D] of a client's items [P]."""
        vectors = self.problem.base[items]
        if self.problem.codes is None:
            return vectors + parameters["A"][items] @ parameters["B"].T
        codes = self.problem.codes[items]
        return vectors + parameters["codebooks"][torch.arange(codes.shape[1]), codes].sum(1)

    def _loss(
        self, parameters: dict[str, Tensor], positives: Tensor, negatives: Tensor, inside: Tensor
    ) -> Tensor:
        """Mean BPR loss of one client over its positions that are no padding."""
        # Each positive before its negative, so that gradients of a row that both read cancel exactly.
        pairs = torch.stack([positives, negatives], 1).flatten()
        scores = (self._vectors(parameters, pairs) @ parameters["user"]).view(-1, 2)
        losses = -F.logsigmoid(scores[:, 0] - scores[:, 1])
        return torch.where(inside, losses, 0.0).sum() / inside.sum()

    def _train(self, clients: Tensor, totals: dict[str, Tensor]) -> None:
        """Train some clients and add their weighted changes to `totals`."""
        sizes = self._sizes[clients]
        inside = torch.arange(int(sizes.max())) < sizes[:, None]
        source = (self._indptr[clients][:, None] + torch.arange(inside.shape[1])).where(inside, 0)
        positives = self._items[source]
        negatives = positives.new_zeros(self._epochs, *inside.shape)
        negatives[:, inside] = self._draw(clients, self._round)

        parameters = {
            name: value.expand(len(clients), *value.shape).clone() for name, value in self._parameters.items()
        }
        parameters["user"] = self._users[clients]
        first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        second = {name: torch.zeros_like(value) for name, value in parameters.items()}
        gradient = vmap(grad(self._loss))
        for epoch in range(self._epochs):
            gradients = gradient(parameters, positives, negatives[epoch], inside)
            for name, value in parameters.items():
                g = gradients[name]
                g = g + self._l2 * value * (g != 0).any(-1, keepdim=True)
                first[name].lerp_(g, 1 - ADAM["beta1"])
                second[name].mul_(ADAM["beta2"]).addcmul_(g, g, value=1 - ADAM["beta2"])
                mean = first[name] / (1 - ADAM["beta1"] ** (epoch + 1))
                spread = (second[name] / (1 - ADAM["beta2"] ** (epoch + 1))).sqrt_().add_(ADAM["eps"])
                value.addcdiv_(mean, spread, value=-self.problem.lr)
        self._users[clients] = parameters["user"]
        weights = sizes.to(self._users.dtype)
        for name, total in totals.items():
            total.add_(torch.tensordot(weights, parameters[name] - self._parameters[name], 1))
