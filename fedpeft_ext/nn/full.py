"""`FullEmbedding`: one trained vector an item, the strategy that all the others are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fedpeft_ext.nn.embedding import (
    BaseOptions,
    ItemEmbedding,
    draw_normal,
    new_parameter,
    read_rows,
    require_std,
    require_table,
)
from fedpeft_ext.nn.items import Items


class FullEmbedding(ItemEmbedding):
    """A plain embedding table: the same values, gradients and initial draws as `nn.Embedding`.

    Without a base the parameter is `weight` [I, D], under the name that `nn.Embedding` gives it. With one it
    is `delta` [I, D], a change of full size that starts at zero, and `weight` reads the sum. I D numbers are
    sent either way.

    Args:
        num_embeddings, embedding_dim, padding_idx, base, freeze_base, device, dtype: see `ItemEmbedding`.
        init_std: standard deviation of a new `weight`.
        generator: source of the initial draws; None: torch's global one.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        init_std: float = 1.0,
        base: Tensor | None = None,
        freeze_base: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            base=base,
            freeze_base=freeze_base,
            device=device,
            dtype=dtype,
        )
        self.init_std = require_std(init_std)
        self._parameter_name = "weight" if self.base is None else "delta"
        self._row_parameters = (self._parameter_name,)
        options: BaseOptions = {"device": device, "dtype": dtype}
        table = new_parameter(num_embeddings, embedding_dim, base=self.base, options=options)
        self.register_parameter(self._parameter_name, table)
        self.reset_parameters(generator)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **options: Any
    ) -> Self:
        """Start from pre-trained vectors [I, D]: `weight` itself starts there where `freeze` is False (as in
        `nn.Embedding`); else they stay frozen as the base of a `delta` that starts at zero."""
        require_table("embeddings", embeddings)
        if freeze:
            return super().from_pretrained(embeddings, True, padding_idx, **options)
        options = {"device": embeddings.device, "dtype": embeddings.dtype, **options}
        num_embeddings, embedding_dim = embeddings.shape
        module = cls(num_embeddings, embedding_dim, padding_idx, **options)
        with torch.no_grad():
            module._trained().copy_(embeddings)
        return module

    def _trained(self) -> Tensor:
        table: Tensor = getattr(self, self._parameter_name)
        return table

    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        vectors = read_rows(self._trained(), items)
        return vectors if base is None else vectors + read_rows(base, Items(items.ids))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        table = self._trained()
        if self._parameter_name == "delta":
            nn.init.zeros_(table)
            return
        draw_normal(table, self.init_std, generator)
        if self.padding_idx is not None:
            table[self.padding_idx].zero_()

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "delta" in self.__dict__.get("_parameters", ()):
            return self._table()
        return super().__getattr__(name)
