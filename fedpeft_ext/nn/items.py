"""How items are handed to an embedding module: by id alone, or by id and by row of a smaller table."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Items(NamedTuple):
    """Items to look up, for a caller that holds only some rows of the item-indexed parameters.

    A client's copy of a catalogue-sized table holds only the R rows that it touches, so such parameters
    (`ItemEmbedding.row_parameters`) are read at `rows`, and everything else (codes, hashes, the base) at
    `ids`. Modules accept a plain tensor of ids too.

    Attributes:
        ids: int32 or int64, any shape: item ids, -1 at padding.
        rows: the shape and meaning of `ids`, but counting the rows that the caller holds; None where it holds
            all.
    """

    ids: Tensor
    rows: Tensor | None = None
