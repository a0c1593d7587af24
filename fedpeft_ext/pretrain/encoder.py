"""Shared by AutoEncoder and RQ-VAE: layers, a frozen encoder for later items, repeatable training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

DEFAULT_HIDDEN = (512, 256, 128)


def layer_sizes(num_features: int, dim: int, hidden: Sequence[int]) -> list[int]:
    """[F, hidden..., dim]: no hidden layer wider than the input (or narrower than `dim`), none twice."""
    widest = max(num_features, dim)
    inner = [max(min(width, widest), dim) for width in hidden]
    inner = [width for i, width in enumerate(inner) if i == 0 or width != inner[i - 1]]
    return [num_features, *inner, dim]


def mlp(sizes: Sequence[int], batch_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them (after batch norm where asked) and none after the last."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(wide, narrow))
        if i < len(sizes) - 2:
            layers += [nn.BatchNorm1d(narrow), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Standardize:
    """Shift features to mean 0 and scale them, all columns alike, to variance 1.

    The loss is then the share of variance left unexplained, and one learning rate fits features of any size.
    """

    mean: Tensor
    factor: float

    @classmethod
    def fit(cls, features: npt.NDArray[np.float32], target: float = 1.0) -> Standardize:
        """Mean 0 per column, standard deviation `target` over all entries; all zeros if constant."""
        mean = features.mean(axis=0, dtype=np.float64)
        std = float(np.sqrt(np.mean((features - mean) ** 2)))
        # Features that differ only by rounding are constant.
        constant = std <= 1e-6 * max(float(np.abs(mean).max()), 1e-30)
        return cls(torch.from_numpy(mean.astype(np.float32)), 0.0 if constant else target / std)

    @classmethod
    def of_latents(cls, latents: Tensor, scale: float | None) -> Standardize:
        """What brings latents [N, dim] to standard deviation `scale`; nothing if that is None."""
        if scale is None:
            return cls(torch.zeros(latents.shape[1]), 1.0)
        return cls.fit(latents.numpy(), target=scale)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.factor


@dataclass(frozen=True)
class FrozenEncoder:
    """A trained encoder that maps features [N, F] to latents [N, dim], for items that arrive after training.

    Attributes:
        sizes: widths of the layers, from F to dim.
        batch_norm: whether hidden layers have batch norm.
        state: parameters and buffers of the layers.
        inputs, outputs: what is done to features before, and to latents after the layers.
    """

    sizes: tuple[int, ...]
    batch_norm: bool
    state: Mapping[str, Tensor]
    inputs: Standardize
    outputs: Standardize

    def __call__(self, features: npt.ArrayLike | Tensor) -> Tensor:
        """Latents float32 [N, dim]. Raises ValueError where `features` are not finite numbers [N, F]."""
        from .features import check_features

        array = check_features(features)
        if array.shape[1] != self.sizes[0]:
            raise ValueError(f"features: expected shape [N, {self.sizes[0]}], got {list(array.shape)}")
        with torch.device("meta"):  # no parameters are drawn, so the caller's random state is not touched
            layers = mlp(self.sizes, self.batch_norm)
        layers.load_state_dict(dict(self.state), assign=True)
        layers.eval()
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(array), 1 << 14)
            return torch.cat([self.outputs(layers(self.inputs(part))) for part in parts])

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-ready settings, from which `from_tensors` makes an equal encoder."""
        tensors = {f"encoder.{name}": value for name, value in self.state.items()}
        tensors |= {"encoder.inputs.mean": self.inputs.mean, "encoder.outputs.mean": self.outputs.mean}
        meta = {
            "sizes": list(self.sizes),
            "batch_norm": self.batch_norm,
            "inputs": self.inputs.factor,
            "outputs": self.outputs.factor,
        }
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> FrozenEncoder:
        mine = {
            key.removeprefix("encoder."): value
            for key, value in tensors.items()
            if key.startswith("encoder.")
        }
        inputs = Standardize(mine.pop("inputs.mean"), meta["inputs"])
        outputs = Standardize(mine.pop("outputs.mean"), meta["outputs"])
        return cls(tuple(meta["sizes"]), meta["batch_norm"], mine, inputs, outputs)


@contextmanager
def isolated(seed: int, threads: int = 1) -> Iterator[None]:
    """Compute from `seed` on `threads` CPU threads, whatever the caller's settings, which come back after.

    Sums are split by thread, so the number of threads is fixed here rather than taken from torch: the same
    seed gives the same bits on one kind of machine. The caller's random state, default dtype, default device
    and gradient mode are left alone.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before_threads, before_dtype = torch.get_num_threads(), torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        threadpool_limits(threads),
    ):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the caller's GPUs
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before_threads)
            torch.set_default_dtype(before_dtype)


def shuffled_batches(count: int, batch_size: int) -> tuple[Tensor, ...]:
    """A random order of range(count) in batches of near-equal size: none is too small for batch norm."""
    return torch.randperm(count).tensor_split(max(1, math.ceil(count / batch_size)))


class Plateau:
    """Says when `patience` epochs in a row have not improved on the best loss by a share `tolerance`."""

    def __init__(self, patience: int, tolerance: float = 1e-3) -> None:
        self.patience, self.tolerance = patience, tolerance
        self.best, self.since = math.inf, 0

    def reached(self, loss: float) -> bool:
        if loss < self.best * (1 - self.tolerance):
            self.best, self.since = loss, 0
        else:
            self.since += 1
        return self.since >= self.patience


def check_training(
    *,
    dim: int,
    hidden: Sequence[int],
    epochs: int,
    batch_size: int,
    lr: float,
    scale: float | None,
    threads: int,
) -> None:
    """Raise a ValueError naming the first training option that makes no sense."""
    for name, value in {"dim": dim, "epochs": epochs, "threads": threads}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, got {batch_size}")
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden: expected positive widths, got {tuple(hidden)}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: expected a positive number, got {lr}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive number or None, got {scale}")


def check_finite(*results: Tensor) -> None:
    """Raise where training ended in NaN or infinity."""
    if not all(bool(torch.isfinite(result).all()) for result in results):
        raise ValueError("training diverged to NaN or infinity: lower lr")
