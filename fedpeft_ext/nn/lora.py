"""`LoRAEmbedding`: a low-rank item table, c_i = B a_i.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, on an embedding table and, as in
Yuan et al. (AAAI 2026), without the alpha / r scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fedpeft_ext import ops
from fedpeft_ext.nn.embedding import (
    BaseOptions,
    ItemEmbedding,
    draw_normal,
    new_parameter,
    require_positive,
    require_std,
)
from fedpeft_ext.nn.items import Items


class LoRAEmbedding(ItemEmbedding):
    """c_i = B a_i with A [I, r] (rows a_i) and B [D, r]; r (I + D) numbers are trained and sent.

    A starts normal and B at zero, so that with a base the vectors start exactly at the base. While B is zero
    the gradient of A is zero: the first step moves B alone. That holds without a base too (C-LoRA), where all
    vectors start at zero: whatever multiplies them must then not be zero itself, or nothing moves.

    Args:
        rank: r.
        init_std: standard deviation of a new A.
        generator: source of the initial draws; None: torch's global one.
        num_embeddings, embedding_dim: I and D.
        **options: padding_idx, base, freeze_base, device and dtype, see `ItemEmbedding`.
    """

    _row_parameters = ("A",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int = 4,
        init_std: float = 1.0,
        generator: torch.Generator | None = None,
        **options: Unpack[BaseOptions],
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        require_positive(rank=rank)
        self.rank = int(rank)
        self.init_std = require_std(init_std)
        self.A = new_parameter(num_embeddings, rank, base=self.base, options=options)
        self.B = new_parameter(embedding_dim, rank, base=self.base, options=options)
        self.reset_parameters(generator)

    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        return ops.lora_lookup(items.ids, self.A, self.B, base=base, rows=items.rows)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        draw_normal(self.A, self.init_std, generator)
        nn.init.zeros_(self.B)

    @property
    def weight(self) -> Tensor:
        """The final table [I, D], with gradients, for models that multiply by their embedding's `weight`."""
        return self._table()

    def _options(self) -> str:
        return f", rank={self.rank}"
