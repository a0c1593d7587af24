"""The data sets known by name: where each is looked for, how to get it, and what is reported about it."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Dataset
from .load import check_options, read_dataset
from .mapped import MappedDataset, is_mapped, load_mapped, save_dataset
from .synthetic import synthetic_dataset, write_synthetic_dataset

# A folder with one folder a data set.
DATA_VARIABLE = "FEDPEFT_DATA"
_SHARED = Path("..") / "shared" / "data"


@dataclass(frozen=True)
class DatasetInfo:
    """A data set known by name.

    Attributes:
        name: what `load_dataset` takes.
        description: one line.
        path: where it was found, None if it was not, or if it is drawn rather than read.
        available: whether `load_dataset(name)` can load it now.
        how_to_get: what to do where it was not found.
    """

    name: str
    description: str
    path: Path | None
    available: bool
    how_to_get: str


@dataclass(frozen=True)
class _Known:
    description: str
    how_to_get: str
    places: Callable[[], list[Path]]


def _recbole_example() -> list[Path]:
    # find_spec does not run recbole, whose dependencies need not be installed.
    spec = importlib.util.find_spec("recbole")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [Path(folder) / "dataset_example" / "ml-100k" for folder in folders]


_KNOWN = {
    "ml-100k": _Known(
        "MovieLens-100K: 943 users, 1,682 movies, 100,000 ratings with times; titles, years, genres",
        "pip install --no-deps recbole==1.2.1",
        _recbole_example,
    ),
    "ml-1m": _Known(
        "MovieLens-1M: 6,040 users, 1,000,209 ratings; titles, years, genres",
        "unzip https://files.grouplens.org/datasets/movielens/ml-1m.zip into the folder that "
        f"{DATA_VARIABLE} names",
        lambda: [_SHARED / "ml-1m"],
    ),
    "industrial": _Known(
        "Amazon Industrial and Scientific (a sample): titles, brands, descriptions",
        "put industrial.inter and industrial.item (RecBole atomic files) into the folder "
        f"${DATA_VARIABLE}/industrial",
        lambda: [_SHARED / "industrial"],
    ),
}
_SYNTHETIC = DatasetInfo(
    "synthetic",
    "seeded, any size, planted preferences: options num_users, num_items, interactions_per_user, seed, ...",
    None,
    True,
    "nothing to get: it is drawn",
)


def load_dataset(name_or_path: str | Path, **options: Any) -> Dataset:
    """Load a data set by name or path.

    Args:
        name_or_path: "ml-100k", "ml-1m", "industrial", the name of a folder in `$FEDPEFT_DATA`, "synthetic",
            or the path of a file or folder. A known name goes before a path: write "./ml-1m" for the folder.
        options: those of `read_dataset`, or of `synthetic_dataset` for "synthetic"; of a folder that
            `convert_dataset` wrote `name` alone.

    Raises:
        FileNotFoundError: a known data set that is not there (the message says how to get it), or no such
            path.
        ValueError: an unknown name (the message has the nearest), or what `read_dataset` refuses.
        TypeError: an unknown option (the message has the nearest).
    """
    if name_or_path == "synthetic":
        check_options(synthetic_dataset, options, "synthetic data")
        return synthetic_dataset(**options)
    named = isinstance(name_or_path, str) and _named_folder(name_or_path) is not None
    path = locate(name_or_path)
    read = load_mapped if is_mapped(path) else read_dataset
    check_options(read, options, "load_dataset")
    return read(path, **({"name": str(name_or_path)} if named else {}) | options)


def convert_dataset(name_or_path: str | Path, folder: str | Path, **options: Any) -> Dataset:
    """Write a data set into a new folder whose arrays are then mapped into memory (`data.mapped`).

    Synthetic data are written while they are drawn. Arguments and errors are those of `load_dataset`;
    FileExistsError where `folder` is not new or empty.
    """
    if name_or_path == "synthetic":
        return write_synthetic_dataset(folder, **options)
    return save_dataset(load_dataset(name_or_path, **options), folder)


def locate(name_or_path: str | Path) -> Path:
    """The file or folder of a data set; see `load_dataset` for names and errors."""
    if isinstance(name_or_path, str):
        folder = _named_folder(name_or_path)
        if folder is not None:
            return folder
        if name_or_path in _KNOWN:
            raise FileNotFoundError(
                f"data set {name_or_path!r} was not found; to get it: {_KNOWN[name_or_path].how_to_get}"
            )
    path = Path(name_or_path)
    if str(name_or_path) and path.exists():
        return path
    if len(path.parts) > 1 or path.suffix:
        raise FileNotFoundError(f"{path}: no such file or folder")
    names = [info.name for info in describe_datasets()]
    near = difflib.get_close_matches(str(name_or_path), names, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(names)}"
    raise ValueError(f"unknown data set {str(name_or_path)!r} (and no such file or folder); {hint}")


def describe_datasets() -> list[DatasetInfo]:
    """Every data set known by name, and every folder in `$FEDPEFT_DATA`: where it is, or how to get it."""
    infos = []
    for name, known in _KNOWN.items():
        path = _named_folder(name)
        infos.append(DatasetInfo(name, known.description, path, path is not None, known.how_to_get))
    infos.append(_SYNTHETIC)
    root = _data_folder()
    if root is not None:
        own = sorted(folder for folder in root.iterdir() if folder.is_dir() and folder.name not in _KNOWN)
        infos += [
            DatasetInfo(folder.name, f"folder in {DATA_VARIABLE}", folder, True, "")
            for folder in own
            if not folder.name.startswith(".")
        ]
    return infos


def check_dataset(name_or_path: str | Path, **options: Any) -> dict[str, Any]:
    """Load a data set and report on it: plain numbers and strings, as for JSON.

    Beside everything in `Dataset.report` (rows, duplicates_dropped, users_without_test_item, ...): name,
    users, items, interactions (training, validation and test), density (interactions over users x items),
    interactions_per_user and interactions_per_item (min, quartiles, max, mean), items_without_text (all, if
    the data set has no text), most_popular_share (of all training interactions, the share of the 1 % most
    popular items), and notes: sentences on what deserves attention. Raises what `load_dataset` raises.
    """
    dataset = load_dataset(name_or_path, **options)
    if isinstance(dataset, MappedDataset):
        dataset.verify()
    met_indptr, met_items = dataset.met_csr()
    per_user = np.diff(met_indptr)
    per_item = np.bincount(met_items, minlength=dataset.num_items)
    trained = np.sort(np.bincount(dataset.indices, minlength=dataset.num_items))[::-1]
    top = max(1, dataset.num_items // 100)
    without_test = int(np.count_nonzero(dataset.test_items < 0))
    without_text = dataset.num_items if dataset.item_text is None else dataset.item_text.count("")
    report = {
        **dataset.report,
        "name": dataset.name,
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": dataset.num_interactions,
        "density": dataset.num_interactions / (dataset.num_users * dataset.num_items),
        "interactions_per_user": _quantiles(per_user),
        "interactions_per_item": _quantiles(per_item),
        "users_without_test_item": without_test,
        "items_without_text": without_text,
        "most_popular_share": float(trained[:top].sum() / max(1, trained.sum())),
    }
    notes = order_notes(report)
    if isinstance(dataset, MappedDataset):
        notes.append(f"mapped from {dataset.path}, where every byte is as it was written")
    if report.get("incomplete_dropped"):
        notes.append(f"rows without a user, an item or a time: {report['incomplete_dropped']:,}, left out")
    if report.get("duplicates_dropped"):
        notes.append(
            f"interactions that repeat a user and item: {report['duplicates_dropped']:,}, which were dropped"
        )
    if report.get("parts"):
        notes.append(f"split as the files are: {', '.join(Path(part).name for part in report['parts'])}")
        if report["users_without_training_item"]:
            notes.append(
                f"users without a training item: {report['users_without_training_item']:,}, left out"
            )
    if without_test:
        what = "users without a test item" if report.get("parts") else "users with one interaction"
        notes.append(f"{what}: {without_test:,}, who are trained and not evaluated")
    if dataset.item_text is None:
        notes.append(
            "no item text (item_file): full, p-X and c-rq need other item features (pretrain.features: a "
            "file, or random)"
        )
    elif without_text:
        notes.append(f"items without text: {without_text:,}; their features are the mean of the others'")
    few = int(np.count_nonzero(dataset.num_items - per_user < 100))
    if few:
        most = int((dataset.num_items - per_user).min())
        notes.append(
            f"users with fewer than 100 items that they never met: {few:,}; "
            + (
                f"evaluation.num_negatives can be at most {most}"
                if most > 0
                else "the test item of those who met all has nothing to be ranked against: leave them out"
            )
        )
    report["notes"] = notes
    return report


def order_notes(report: Mapping[str, Any]) -> list[str]:
    """From the report of a data set: that held-out items are the last of the file, where that is so."""
    if report.get("order") != "file" or report.get("parts"):
        return []
    others = ", ".join(map(repr, report.get("other_columns", ())))
    which = f"; if a time is in {others}, name the column as timestamp_column" if others else ""
    return [f"no timestamps: the order of the file is taken for the order in time{which}"]


def _quantiles(counts: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float]:
    low, quarter, median, three_quarters, high = np.quantile(counts, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return {
        "min": low,
        "25%": quarter,
        "median": median,
        "75%": three_quarters,
        "max": high,
        "mean": float(counts.mean()),
    }


def _data_folder() -> Path | None:
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise NotADirectoryError(f"{DATA_VARIABLE}: expected a folder with data sets, got {value!r}")
    return folder


def _named_folder(name: str) -> Path | None:
    """The folder of a data set by name, None if there is none (or `name` is a path)."""
    if not name or Path(name).name != name or name.startswith("."):
        return None
    root = _data_folder()
    places = [] if root is None else [root / name]
    if name in _KNOWN:
        places += _KNOWN[name].places()
    return next((place for place in places if place.is_dir()), None)
