"""Full embeddings from item features: the latents of an AutoEncoder trained on the server.

Layers and loss as in "Plug-and-Play Parameter-Efficient Tuning of Embeddings for Federated Recommendation"
(Yuan et al., AAAI 2026, arXiv 2512.13734): [F, 512, 256, 128, dim] and the mirror, squared error of the
reconstruction.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from .encoder import (
    DEFAULT_HIDDEN,
    FrozenEncoder,
    Plateau,
    Standardize,
    check_finite,
    check_training,
    isolated,
    layer_sizes,
    mlp,
    shuffled_batches,
)
from .features import check_features


class AutoEncoder(nn.Module):
    """Encoder [F, hidden..., dim] and decoder [dim, ...hidden reversed, F], ReLU between the layers.

    Hidden layers wider than F shrink to F, so that a small feature set gets a small network.
    """

    def __init__(self, num_features: int, dim: int = 32, hidden: Sequence[int] = DEFAULT_HIDDEN) -> None:
        super().__init__()
        self.sizes = layer_sizes(num_features, dim, hidden)
        self.encoder = mlp(self.sizes)
        self.decoder = mlp(self.sizes[::-1])

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, F] to their reconstruction [N, F]."""
        reconstruction: Tensor = self.decoder(self.encoder(features))
        return reconstruction


@dataclass(frozen=True)
class PretrainedFull:
    """Full embeddings of a catalogue.

    Attributes:
        embedding: float32 [I, dim].
        losses: mean squared error of each epoch, as a share of the features' variance.
        explained_variance: share of the features' variance that the trained AutoEncoder reconstructs.
        encoder: maps features of later items to embeddings; None where the embedding does not come from
            features.
    """

    embedding: Tensor
    losses: tuple[float, ...]
    explained_variance: float
    encoder: FrozenEncoder | None

    def encode_new(self, features: npt.ArrayLike | Tensor) -> Tensor:
        """Embeddings float32 [N, dim] of items that were not in training, from features [N, F]."""
        if self.encoder is None:
            raise ValueError(
                "this embedding does not come from item features, so features of new items cannot be encoded"
            )
        return self.encoder(features)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal object."""
        tensors, encoder = self.encoder.to_tensors() if self.encoder else ({}, None)
        meta = {
            "losses": list(self.losses),
            "explained_variance": self.explained_variance,
            "encoder": encoder,
        }
        return {"embedding": self.embedding, **tensors}, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> PretrainedFull:
        encoder = FrozenEncoder.from_tensors(tensors, meta["encoder"]) if meta["encoder"] else None
        return cls(tensors["embedding"], tuple(meta["losses"]), meta["explained_variance"], encoder)


def pretrain_full(
    features: npt.ArrayLike | Tensor,
    dim: int = 32,
    hidden: Sequence[int] = DEFAULT_HIDDEN,
    epochs: int = 100,
    batch_size: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
    scale: float | None = 0.1,
    patience: int = 10,
    threads: int = 1,
) -> PretrainedFull:
    """Train an AutoEncoder on item features with Adam and return the latents as full embeddings.

    The result depends on the arguments alone (on one kind of machine), not on the caller's random state or
    thread count.

    Args:
        features: finite numbers [I, F]; centred and scaled here.
        dim: width of the embedding.
        hidden: widths of the encoder's hidden layers.
        epochs: passes over the items at most; training stops where `patience` of them bring no improvement.
        batch_size: items per step.
        lr: learning rate.
        seed: of initialisation and batches.
        scale: centre the latents and scale them to this standard deviation (0.1 is how new embeddings are
            drawn); None leaves them as trained.
        patience: epochs without improvement by 0.1% before training stops.
        threads: CPU threads; another number may change the last bits.

    Raises:
        ValueError: features of a wrong shape or with NaN or infinity, an option out of range, or training
            that diverged.
    """
    array = check_features(features)
    check_training(
        dim=dim, hidden=hidden, epochs=epochs, batch_size=batch_size, lr=lr, scale=scale, threads=threads
    )
    inputs = Standardize.fit(array)
    if inputs.factor == 0.0:
        warnings.warn(
            "all items have the same features; their full embeddings will be the same too", stacklevel=2
        )
    with isolated(seed, threads):
        x = inputs(torch.from_numpy(array))
        model = AutoEncoder(array.shape[1], dim, hidden)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        plateau = Plateau(patience)
        losses: list[float] = []
        for _ in range(epochs):
            total = 0.0
            for rows in shuffled_batches(len(x), batch_size):
                batch = x[rows]
                loss = nn.functional.mse_loss(model(batch), batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.item() * len(rows)
            losses.append(total / len(x))
            if plateau.reached(losses[-1]):
                break
        with torch.no_grad():
            latents = model.encoder(x)
            check_finite(latents)
            unexplained = float(nn.functional.mse_loss(model.decoder(latents), x))
        outputs = Standardize.of_latents(latents, scale)
    state = {name: value.detach().clone() for name, value in model.encoder.state_dict().items()}
    encoder = FrozenEncoder(tuple(model.sizes), False, state, inputs, outputs)
    return PretrainedFull(outputs(latents), tuple(losses), 1.0 - unexplained, encoder)
