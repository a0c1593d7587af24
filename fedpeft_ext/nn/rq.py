"""`RQEmbedding`: an item's vector is a sum of codewords, chosen by its frozen residual-quantisation code.

Codes come from an RQ-VAE on item features (Yuan et al., AAAI 2026; `fedpeft_ext.pretrain`), or here, where
there are only vectors, from residual k-means (Chen et al., "Approximate Nearest Neighbor Search by Residual
Vector Quantization", Sensors 10(12), 2010).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from fedpeft_ext import ops
from fedpeft_ext.nn.embedding import (
    BaseOptions,
    ItemEmbedding,
    draw_normal,
    has_values,
    new_parameter,
    require_positive,
    require_std,
    require_table,
)
from fedpeft_ext.nn.items import Items
from fedpeft_ext.ops._checks import check_codes, check_dense


class RQEmbedding(ItemEmbedding):
    """c_i = sum over l of codebooks[l, codes[i, l]]; L K D numbers are trained and sent, whatever the number
    of items.

    Args:
        codes: integer [I, L], values in [0, K): the buffer `codes`, kept in the smallest dtype that fits.
        codebook_size: K; may be left out where `codebooks` are given.
        codebooks: [L, K, D] to start from (a warm start); None draws them normal, as the paper does.
        init_std: standard deviation of new codebooks; 0 with a base starts exactly at the base.
        generator: source of the initial draws; None: torch's global one.
        num_embeddings, embedding_dim: I and D.
        **options: padding_idx, base, freeze_base, device and dtype, see `ItemEmbedding`.
    """

    codes: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codes: Tensor,
        *,
        codebook_size: int | None = None,
        codebooks: Tensor | None = None,
        init_std: float = 0.1,
        generator: torch.Generator | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        if codebook_size is None:
            if codebooks is None:
                raise ValueError(
                    "codebook_size: expected the number of rows K of a codebook, got neither it nor codebooks"
                )
            codebook_size = codebooks.shape[1] if codebooks.dim() == 3 else 0
        else:
            require_positive(codebook_size=codebook_size)
        _require_codes(codes, num_embeddings)
        levels = codes.shape[1]
        if codebooks is not None and tuple(codebooks.shape) != (levels, codebook_size, embedding_dim):
            raise ValueError(
                f"codebooks: expected shape [L, K, D] = [{levels}, {codebook_size or 'K'}, {embedding_dim}], "
                f"got {list(codebooks.shape)}"
            )
        _require_codes_below(codes, codebook_size)
        self.levels = levels
        self.codebook_size = int(codebook_size)
        self.init_std = require_std(init_std)
        self.codebooks = new_parameter(levels, codebook_size, embedding_dim, base=self.base, options=options)
        smallest = (
            torch.uint8 if codebook_size <= 256 else torch.int16 if codebook_size <= 32768 else torch.int32
        )
        self.register_buffer(
            "codes", codes.detach().to(device=self.codebooks.device, dtype=smallest, copy=True)
        )
        if codebooks is None:
            self.reset_parameters(generator)
        else:
            with torch.no_grad():
                self.codebooks.copy_(codebooks)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        *,
        levels: int = 3,
        codebook_size: int = 128,
        codes: Tensor | None = None,
        warm_start: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Plug codebooks into pre-trained full embeddings [I, D], which become the `base`.

        Args:
            embeddings, freeze, padding_idx: see `ItemEmbedding.from_pretrained`.
            levels: L, where codes are fitted; given codes bring their own.
            codebook_size: K.
            codes: [I, L]; None fits them to `embeddings` by `residual_kmeans`.
            warm_start: start from the fitted codebooks. They approximate `embeddings` themselves, so that the
                sum with the base starts near twice those; the default keeps only the codes.
            seed: of the fit.
            **options: of the constructor.
        """
        require_table("embeddings", embeddings)
        if codes is None:
            codes, codebooks = residual_kmeans(embeddings, levels, codebook_size, seed=seed)
            if warm_start:
                options = {"codebooks": codebooks, **options}
        elif warm_start and options.get("codebooks") is None:
            raise ValueError("warm_start: expected codebooks beside the given codes, got none")
        return super().from_pretrained(
            embeddings, freeze, padding_idx, codes=codes, codebook_size=codebook_size, **options
        )

    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        return ops.rq_lookup(items.ids, self.codes, self.codebooks, base=base)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the codebooks anew, also where they had a warm start."""
        draw_normal(self.codebooks, self.init_std, generator)

    @property
    def weight(self) -> Tensor:
        """The final table [I, D], with gradients, for models that multiply by their embedding's `weight`."""
        return self._table()

    def _options(self) -> str:
        return f", levels={self.levels}, codebook_size={self.codebook_size}"


def residual_kmeans(
    vectors: Tensor, levels: int = 3, codebook_size: int = 128, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Fit residual-quantisation codes to vectors: k-means, then k-means on what it leaves, and so on.

    Args:
        vectors: floating [I, D], finite.
        levels: L.
        codebook_size: K, at most I.
        seed: of the k-means starts.

    Returns:
        codes [I, L] (the dtype of `ops.rq_encode`) and codebooks [L, K, D], on the device of
        `vectors`; codebooks have their dtype.

    Raises:
        ValueError: too few vectors, or values that are not finite.
    """
    from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]

    require_table("vectors", vectors)
    require_positive(levels=levels, codebook_size=codebook_size)
    if codebook_size > len(vectors):
        raise ValueError(
            f"codebook_size: expected at most the number of items, {len(vectors)}, got {codebook_size}"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError("vectors: expected finite values, got NaN or infinity")
    residual = vectors.detach().to("cpu", torch.float32).numpy().copy()
    books = []
    for level in range(levels):
        kmeans = MiniBatchKMeans(codebook_size, random_state=seed + level, n_init=3, batch_size=4096)
        labels = kmeans.fit_predict(residual)
        books.append(torch.from_numpy(kmeans.cluster_centers_).float())
        residual -= kmeans.cluster_centers_[labels]
    codebooks = torch.stack(books)
    codes = ops.rq_encode(vectors.detach().to("cpu", torch.float32), codebooks)
    return codes.to(vectors.device), codebooks.to(vectors)


def _require_codes(codes: Tensor, num_embeddings: int) -> None:
    check_codes(codes, "codes")
    check_dense(codes, "codes")
    if codes.dim() != 2 or len(codes) != num_embeddings or codes.shape[1] == 0:
        raise ValueError(f"codes: expected shape [I, L] with I = {num_embeddings}, got {list(codes.shape)}")


def _require_codes_below(codes: Tensor, codebook_size: int) -> None:
    if not has_values(codes):
        return
    lowest, highest = (int(bound) for bound in codes.aminmax())
    if lowest < 0 or highest >= codebook_size:
        wrong = lowest if lowest < 0 else highest
        raise IndexError(f"codes: expected values in [0, codebook_size = {codebook_size}), got {wrong}")
