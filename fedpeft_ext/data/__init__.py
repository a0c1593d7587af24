"""Data: interactions and item text become a `Dataset`, split leave-one-out, with candidate lists for
evaluation.

`load_dataset` reads RecBole atomic files, MovieLens files and plain CSV/TSV, and makes seeded synthetic data
of any size.
"""

from __future__ import annotations

from .catalogue import DatasetInfo, check_dataset, convert_dataset, describe_datasets, load_dataset
from .dataset import Dataset, popularity_scores
from .load import read_dataset, read_items
from .mapped import MappedDataset, save_dataset
from .synthetic import Planted, SyntheticDataset, synthetic_dataset

__all__ = [
    "Dataset",
    "DatasetInfo",
    "MappedDataset",
    "Planted",
    "SyntheticDataset",
    "check_dataset",
    "convert_dataset",
    "describe_datasets",
    "load_dataset",
    "popularity_scores",
    "read_dataset",
    "read_items",
    "save_dataset",
    "synthetic_dataset",
]
