"""What a run's folder keeps for a run that starts from it, and that the data no longer tell by then: external
ids by number, and the encoder of new items.

Ids are Parquet files of one column; the encoder is safetensors, as in the cache of pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from fedpeft_ext.data.dataset import as_series
from fedpeft_ext.pretrain import ItemEncoder, load
from fedpeft_ext.pretrain.cache import write
from fedpeft_ext.simulation.files import replace_file

if TYPE_CHECKING:
    from fedpeft_ext.data import Dataset

ITEMS, USERS, ENCODER = "items.parquet", "users.parquet", "encoder.safetensors"


def write_numbering(folder: Path, dataset: Dataset, encoder: ItemEncoder | None) -> None:
    """Write what is not there yet. Raises OSError naming a file that cannot be written."""
    write_items(folder, dataset, encoder)
    _write_ids(folder / USERS, dataset.user_ids)


def write_items(folder: Path, dataset: Dataset, encoder: ItemEncoder | None) -> None:
    """`write_numbering`, of items alone."""
    _write_ids(folder / ITEMS, dataset.item_ids)
    if encoder is not None and not (folder / ENCODER).exists():
        replace_file(folder / ENCODER, lambda part: write(part, encoder))


def _write_ids(path: Path, ids: Sequence[str]) -> None:
    if not path.exists():
        replace_file(path, as_series(ids).to_frame().write_parquet)


def read_ids(path: Path) -> pl.Series:
    """External ids by number.

    Raises:
        FileNotFoundError: no such file. ValueError: not one of ids.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"run: expected {path.name}, the external ids of a run, in {path.parent}, found none; older "
            "versions wrote none, and with the run's data `fedpeft resume` writes them"
        )
    try:
        ids = pl.read_parquet(path)["id"]
        if ids.dtype != pl.String or ids.null_count():
            raise ValueError(f"expected texts, got {ids.dtype}")
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise ValueError(f"run: {path} does not hold the ids of a run ({error})") from error
    return ids


def read_encoder(folder: Path) -> ItemEncoder | None:
    """The encoder of new items; None where the run had none. Raises ValueError where it is damaged."""
    path = folder / ENCODER
    return load(path, ItemEncoder) if path.is_file() else None
