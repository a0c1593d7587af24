"""The paper's figure 4: how the sizes of the compressed embeddings matter."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from fedpeft_ext.experiments.plots import Place
from fedpeft_ext.experiments.studies.pictures import line_picture, spread_of
from fedpeft_ext.experiments.studies.study import Context, Findings, Picture, Study, Table, Variant
from fedpeft_ext.nn import parse_spec

EMBEDDINGS = ("p-rq", "p-lora", "p-hash")
CODEBOOK_SIZES, LEVELS = (32, 64, 128, 256, 512), (2, 3, 4, 5, 6)
RANKS = (1, 2, 3, 4, 5, 6, 7, 8)
TABLE_SIZES, NUM_HASHES = (128, 256, 512, 1024), (1, 2, 4)
_AXES = {
    "rq": ("codebook_size", CODEBOOK_SIZES, "levels", LEVELS),
    "lora": ("rank", RANKS, None, ()),
    "hash": ("table_size", TABLE_SIZES, "num_hashes", NUM_HASHES),
}
"""Strategy: the size along the x axis with its values, and the one that each line has a value of."""


def _variants(embedding: str) -> Iterator[Variant]:
    kind = parse_spec(embedding).parts[0].partition("+")[0]
    size, sizes, other, others = _AXES[kind]
    for second in others or (None,):
        for first in sizes:
            labels: dict[str, str | int] = {"embedding": embedding}
            settings = [f"embedding.name={embedding}", f"embedding.{size}={first}"]
            if other is not None and second is not None:
                labels[other] = second
                settings.append(f"embedding.{other}={second}")
            yield Variant({**labels, size: first}, tuple(settings))


def run(context: Context) -> Findings:
    """A grid of sizes for each strategy: a table and a picture each."""
    metric = f"HR@{context.k}"
    names = context.embeddings(EMBEDDINGS)
    for name in names:
        spec = parse_spec(name)
        if len(spec.parts) != 1 or spec.parts[0].partition("+")[0] not in _AXES:
            raise ValueError(f"embeddings: expected one strategy out of {', '.join(_AXES)}, got {name!r}")
    tables: list[Table] = []
    pictures: list[Picture] = []
    for name in names:
        variants = list(_variants(name))
        trained = context.train(variants)
        means = trained.means([metric, f"NDCG@{context.k}", f"full/{metric}"], ["bytes_up", "saving"])
        tables.append(Table(f"sensitivity-{name}", f"Sizes of {name}", means))
        pictures += _picture(context, name, means.filter(pl.col(metric).is_not_null()), metric)
    return Findings(tables, pictures)


def _picture(context: Context, name: str, means: pl.DataFrame, metric: str) -> list[Picture]:
    size, _, other, _ = _AXES[parse_spec(name).parts[0].partition("+")[0]]
    lines: dict[str, list[Place]] = {}
    for row in means.iter_rows(named=True):
        line = name if other is None else f"{other.replace('num_', '')} {row[other]}"
        lines.setdefault(line, []).append(Place(row[size], row[metric], spread_of(row, metric)))
    title = f"{name} with {context.config.backbone.name} on {context.dataset.name}"

    axis = size.replace("_", " ")
    return line_picture(
        f"sensitivity-{name}",
        lines,
        caption=f"{title}: {metric} by size",
        title=title,
        xlabel=axis if other is None else f"{axis} (rows, log scale)",
        ylabel=metric,
        log_x=other is not None,
    )


STUDY = Study(
    "sensitivity",
    "Sizes",
    "How large do codebooks, ranks and hash tables have to be? (the paper's figure 4)",
    run,
    options=frozenset({"embeddings"}),
)
