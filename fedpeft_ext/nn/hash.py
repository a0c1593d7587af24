"""`HashEmbedding`: every item reads a few rows of one small shared table, chosen by universal hash functions.

The rows are averaged, summed, or weighted by a squeeze-and-excitation network (Hu et al.,
"Squeeze-and-Excitation Networks", CVPR 2018), as in Yuan et al. (AAAI 2026). Hashes: Carter and Wegman,
"Universal Classes of Hash Functions", 1979.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fedpeft_ext import ops
from fedpeft_ext.nn.embedding import (
    BaseOptions,
    ItemEmbedding,
    draw_normal,
    draw_uniform,
    new_parameter,
    require_positive,
    require_std,
)
from fedpeft_ext.nn.items import Items


class HashEmbedding(ItemEmbedding):
    """c_i = the mean, sum or SENet-weighted sum of rows h_1(i), ..., h_H(i) of `table` [M, D].

    M D numbers are trained and sent, and with SENet 2 S H + S + H more, whatever the number of items. Without
    a base any id of at least 0 has a vector, so that items may be added later; with one, ids end at
    `num_embeddings`.

    SENet squeezes each row to its mean over D, gives the H means to H -> S -> H (ReLU, then sigmoid;
    `w1` [S, H], `b1` [S], `w2` [H, S], `b2` [H], initialised as `nn.Linear`), and sums the rows weighted by
    the result.

    Args:
        table_size: M.
        num_hashes: H.
        reduce: "mean" or "sum" of the rows; SENet, where on, takes its place.
        senet: weight the rows by SENet.
        senet_hidden: S; None: 16 H.
        seed: of the hash functions, the buffer `hashes` [H, 2], which server and clients must agree on;
            `reset_parameters` makes them anew.
        init_std: standard deviation of a new table; 0 with a base starts exactly at the base.
        generator: source of the initial draws; None: torch's global one.
        num_embeddings, embedding_dim: I and D.
        **options: padding_idx, base, freeze_base, device and dtype, see `ItemEmbedding`.
    """

    hashes: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        table_size: int = 512,
        num_hashes: int = 2,
        reduce: Literal["mean", "sum"] = "mean",
        senet: bool = False,
        senet_hidden: int | None = None,
        seed: int = 0,
        init_std: float = 0.1,
        generator: torch.Generator | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        require_positive(table_size=table_size, num_hashes=num_hashes)
        if reduce not in ("mean", "sum"):
            raise ValueError(f"reduce: expected 'mean' or 'sum', got {reduce!r}")
        if senet_hidden is not None:
            require_positive(senet_hidden=senet_hidden)
        self.table_size = int(table_size)
        self.num_hashes = int(num_hashes)
        self.reduce: Literal["mean", "sum"] = reduce
        self.senet = senet
        self.seed = seed
        self.init_std = require_std(init_std)

        def parameter(*shape: int) -> nn.Parameter:
            return new_parameter(*shape, base=self.base, options=options)

        self.table = parameter(table_size, embedding_dim)
        self.register_buffer(
            "hashes", torch.empty(num_hashes, 2, dtype=torch.int64, device=self.table.device)
        )
        if senet:
            hidden = 16 * num_hashes if senet_hidden is None else senet_hidden
            self.w1, self.b1 = parameter(hidden, num_hashes), parameter(hidden)
            self.w2, self.b2 = parameter(num_hashes, hidden), parameter(num_hashes)
        self.reset_parameters(generator)

    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        senet = ops.SENetWeights(self.w1, self.b1, self.w2, self.b2) if self.senet else None
        return ops.hash_lookup(items.ids, self.table, self.hashes, senet=senet, reduce=self.reduce, base=base)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        # Of a module from device "meta", `to_empty` leaves whatever was in memory, and zeros would be hash
        # functions, too: those that send all items to one row.
        self.hashes.copy_(ops.make_hashes(self.num_hashes, self.seed))
        draw_normal(self.table, self.init_std, generator)
        if self.senet:
            for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
                bound = 1.0 / math.sqrt(weight.shape[1])
                draw_uniform(weight, bound, generator)
                draw_uniform(bias, bound, generator)

    @property
    def weight(self) -> Tensor:
        """The final table [I, D], with gradients, for models that multiply by their embedding's `weight`."""
        return self._table()

    def _options(self) -> str:
        how = f"senet_hidden={len(self.b1)}" if self.senet else f"reduce={self.reduce!r}"
        return f", table_size={self.table_size}, num_hashes={self.num_hashes}, {how}"
