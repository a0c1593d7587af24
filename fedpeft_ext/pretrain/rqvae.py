"""Semantic codes from item features by a residual-quantised AutoEncoder (RQ-VAE) trained on the server.

The model of "Autoregressive Image Generation using Residual Quantization" (Lee et al., CVPR 2022) on item
features, as FedPEFT uses it (Yuan et al., AAAI 2026, arXiv 2512.13734). The quantiser is
vector-quantize-pytorch's `ResidualVQ` with k-means initialisation. Its codebooks follow moving averages of
the residuals assigned to them ("Neural Discrete Representation Learning", van den Oord et al., 2017,
appendix A.1), which minimises the same codebook loss ||sg[r_j] - o_j||^2 without a learning rate of its
own; the encoder gets beta ||r_j - sg[o_j]||^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy.typing as npt
import torch
from torch import Tensor, nn

from .codes import (
    PretrainedCodes,
    check_quantizer,
    describe,
    encode,
    partial_sums,
    unexplained_share,
    usable_rows,
)
from .encoder import (
    DEFAULT_HIDDEN,
    FrozenEncoder,
    Standardize,
    check_finite,
    check_training,
    isolated,
    layer_sizes,
    mlp,
    shuffled_batches,
)
from .features import check_features
from .residual_kmeans import residual_kmeans_codes

# k-means sees this many latents per code at most.
_KMEANS_ITEMS_PER_CODE = 256


class RQVAE(nn.Module):
    """Encoder with batch norm, residual quantiser, decoder that mirrors the encoder."""

    def __init__(
        self,
        num_features: int,
        dim: int = 32,
        levels: int = 3,
        codebook_size: int = 128,
        hidden: Sequence[int] = DEFAULT_HIDDEN,
        beta: float = 0.25,
        decay: float = 0.9,
        dead_below: float = 0.5,
    ) -> None:
        """`decay` of the codebooks' moving averages; codes below `dead_below` items a batch are redrawn."""
        super().__init__()
        from vector_quantize_pytorch import ResidualVQ  # type: ignore[import-untyped]

        self.sizes = layer_sizes(num_features, dim, hidden)
        self.encoder = mlp(self.sizes, batch_norm=True)
        self.decoder = mlp(self.sizes[::-1])
        self.quantizer: nn.Module = ResidualVQ(
            dim=dim,
            num_quantizers=levels,
            codebook_size=codebook_size,
            kmeans_init=True,
            decay=decay,
            commitment_weight=beta,
            threshold_ema_dead_code=dead_below,
            sync_codebook=False,  # one process prepares for all of a distributed run
            rotation_trick=False,  # the plain straight-through gradient, as in the papers
        )

    @property
    def codebooks(self) -> Tensor:
        """float32 [L, K, dim]."""
        codebooks = self.quantizer.codebooks
        assert isinstance(codebooks, Tensor)
        return codebooks

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, F] to their reconstruction [N, F] and the commitment loss (a scalar, times beta)."""
        latents = self.encoder(features)
        quantized, _, commitment = self.quantizer(latents)
        return self.decoder(quantized), commitment.sum()


def pretrain_codes(
    features: npt.ArrayLike | Tensor,
    dim: int = 32,
    levels: int = 3,
    codebook_size: int = 128,
    method: Literal["rq-vae", "rq-kmeans"] = "rq-vae",
    hidden: Sequence[int] = DEFAULT_HIDDEN,
    epochs: int = 60,
    batch_size: int = 512,
    lr: float = 3e-3,
    beta: float = 0.25,
    seed: int = 0,
    scale: float | None = 0.1,
    threads: int = 1,
) -> PretrainedCodes:
    """Give every item `levels` codes, such that similar items share their first ones.

    The result depends on the arguments alone (on one kind of machine), not on the caller's random state or
    thread count. With fewer items than `codebook_size` only as many rows as items are used, and a warning
    says so.

    Args:
        features: finite numbers [I, F], at least 2 items; centred and scaled here.
        dim: width of the codebooks (rq-kmeans quantises the features as they are, so there it must be F).
        levels: L, codes per item.
        codebook_size: K, rows per codebook.
        method: "rq-vae", or "rq-kmeans" (`residual_kmeans_codes`, which has no training and ignores the
            options below).
        hidden: widths of the encoder's hidden layers.
        epochs, batch_size, lr: of the training with Adam.
        beta: weight of the commitment loss.
        seed: of initialisation, batches and k-means.
        scale: shift and scale latents and codebooks together, so that the latents have mean 0 and this
            standard deviation; codes stay the same, and a warm start begins at the size of a new embedding.
            None leaves them as trained.
        threads: CPU threads; another number may change the result.

    Raises:
        ValueError: features of a wrong shape or with NaN or infinity, an option out of range, or training
            that diverged.
    """
    array = check_features(features)
    if method not in ("rq-vae", "rq-kmeans"):
        raise ValueError(f"method: expected 'rq-vae' or 'rq-kmeans', got {method!r}")
    if method == "rq-kmeans":
        if dim != array.shape[1]:
            raise ValueError(
                f"dim: expected the width of the features, {array.shape[1]}, with rq-kmeans, got {dim}"
            )
        return residual_kmeans_codes(array, levels, codebook_size, seed, threads)
    check_training(
        dim=dim, hidden=hidden, epochs=epochs, batch_size=batch_size, lr=lr, scale=scale, threads=threads
    )
    check_quantizer(levels, codebook_size)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta: expected a number of at least 0, got {beta}")
    count, num_features = array.shape
    if count < 2:
        raise ValueError(f"features: expected at least 2 items to quantise, got {count}")
    rows = usable_rows(count, codebook_size)
    inputs = Standardize.fit(array)
    with isolated(seed, threads):
        x = inputs(torch.from_numpy(array))
        batch_size = min(batch_size, count)
        # A code is dead where it gets an eighth of its fair share of a batch.
        dead_below = min(0.5, batch_size / rows / 8)
        model = RQVAE(num_features, dim, levels, rows, hidden, beta, dead_below=dead_below)
        # The paper's losses are sums over columns, the library's are means.
        commitment_weight = dim / num_features
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        with torch.no_grad():  # k-means start of the codebooks, from many more items than a batch
            start = torch.randperm(count)[: _KMEANS_ITEMS_PER_CODE * rows]
            model.quantizer(model.encoder(x[start]))
        for _ in range(epochs):
            for batch_rows in shuffled_batches(count, batch_size):
                batch = x[batch_rows]
                reconstruction, commitment = model(batch)
                loss = nn.functional.mse_loss(reconstruction, batch) + commitment_weight * commitment
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            latents, codebooks = model.encoder(x), model.codebooks.detach().clone()
            check_finite(latents, codebooks)
            outputs = Standardize.of_latents(latents, scale)
            # The first level takes the shift of the latents, so that codes stay those of the trained model.
            scaled = outputs.factor * torch.cat([codebooks[:1] - outputs.mean, codebooks[1:]])
            codes = encode(outputs(latents), scaled)
            sums = partial_sums(codes, codebooks)
            quantization_error = unexplained_share(latents, sums)
            reconstruction_error = unexplained_share(x, (model.decoder(level) for level in sums))
    state = {name: value.detach().clone() for name, value in model.encoder.state_dict().items()}
    encoder = FrozenEncoder(tuple(model.sizes), True, state, inputs, outputs)
    return describe(
        codes, scaled, codebook_size, quantization_error, reconstruction_error, encoder, num_features
    )
