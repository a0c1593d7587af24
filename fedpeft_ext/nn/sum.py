"""`SumEmbedding`: the sum of several strategies over one shared base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fedpeft_ext.nn.embedding import ItemEmbedding, require_table
from fedpeft_ext.nn.items import Items


class SumEmbedding(ItemEmbedding):
    """c_i = the sum of the parts' c_i. Parameters are named after their part: `parts.0.A`,
    `parts.1.codebooks`, ...

    Args:
        parts: at least one `ItemEmbedding`, of one size, one `padding_idx` and one dtype, and without a base.
        base, freeze_base: see `ItemEmbedding`; brought to the device and dtype of the parts.
    """

    def __init__(
        self, parts: Iterable[ItemEmbedding], *, base: Tensor | None = None, freeze_base: bool = True
    ) -> None:
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one embedding, got none")
        for number, part in enumerate(parts):
            if not isinstance(part, ItemEmbedding):
                raise TypeError(f"parts[{number}]: expected an ItemEmbedding, got {type(part).__name__}")
            if part.base is not None:
                raise ValueError(f"parts[{number}]: expected no base (give it to the sum), got one")
        first = parts[0]
        parameter = next(first.parameters())
        expected = (first.num_embeddings, first.embedding_dim, first.padding_idx, parameter.dtype)
        for number, part in enumerate(parts):
            got = (part.num_embeddings, part.embedding_dim, part.padding_idx, next(part.parameters()).dtype)
            if got != expected:
                raise ValueError(
                    f"parts[{number}]: expected the (num_embeddings, embedding_dim, padding_idx, dtype) "
                    f"of parts[0], {expected}, got {got}"
                )
        super().__init__(
            first.num_embeddings,
            first.embedding_dim,
            first.padding_idx,
            base=base,
            freeze_base=freeze_base,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        self.parts = nn.ModuleList(parts)
        self.takes_stacked = all(part.takes_stacked for part in parts)
        self._row_parameters = tuple(
            f"parts.{number}.{name}" for number, part in enumerate(parts) for name in part.row_parameters
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        *,
        parts: Iterable[ItemEmbedding] = (),
        **options: Any,
    ) -> Self:
        """Plug `parts` into pre-trained full embeddings [I, D]; their `padding_idx` must be the one
        given, if any is."""
        require_table("embeddings", embeddings)
        module = cls(parts, base=embeddings, freeze_base=freeze, **options)
        if padding_idx is not None and padding_idx % module.num_embeddings != module.padding_idx:
            raise ValueError(
                f"padding_idx: expected that of the parts, {module.padding_idx}, got {padding_idx}"
            )
        return module

    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        # The first part's kernel adds the base.
        total: Tensor | None = None
        for part in self.parts:
            assert isinstance(part, ItemEmbedding)
            total = part._vectors(items, base) if total is None else total + part._vectors(items, None)
        assert total is not None
        return total

    def _dtype(self) -> torch.dtype | None:
        first = self.parts[0]
        assert isinstance(first, ItemEmbedding)
        return first._dtype()

    def new_rows(self, name: str, rows: Tensor, count: int) -> Tensor:
        _, number, own = name.split(".", 2)
        part = self.parts[int(number)]
        assert isinstance(part, ItemEmbedding)
        return part.new_rows(own, rows, count)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for part in self.parts:
            assert isinstance(part, ItemEmbedding)
            part.reset_parameters(generator)

    @property
    def weight(self) -> Tensor:
        """The final table [I, D], with gradients, for models that multiply by their embedding's `weight`."""
        return self._table()
