"""Sums of strategies: accuracy, bytes and what a client has to store."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from fedpeft_ext.experiments.plots import Point, plot_points
from fedpeft_ext.experiments.results import KB
from fedpeft_ext.experiments.studies.study import Context, Findings, Picture, Study, Table, Variant

EMBEDDINGS = (
    "full", "p-lora", "p-hash", "p-rq", "p-hash+lora", "p-rq+lora", "p-rq+hash", "p-rq+hash+lora",
)  # fmt: skip


def run(context: Context) -> Findings:
    """Single strategies and their sums, side by side."""
    metric = f"HR@{context.k}"
    names = context.embeddings(EMBEDDINGS)
    trained = context.train([Variant({"embedding": name}, (f"embedding.name={name}",)) for name in names])
    means = trained.means(
        [metric, f"NDCG@{context.k}", f"full/{metric}"], ["bytes_up", "bytes_setup", "bytes_down"]
    ).with_columns((pl.col("bytes_setup") + pl.col("bytes_down")).alias("stored bytes"))
    means = means.drop("bytes_setup", "bytes_down")
    rows = means.filter(pl.col(metric).is_not_null())
    points = [
        Point(row["embedding"], row["embedding"], row["bytes_up"] / KB, row[metric])
        for row in rows.iter_rows(named=True)
    ]
    title = f"Sums of strategies, {context.config.backbone.name} on {context.dataset.name}"

    def draw(path: Path) -> object:
        return plot_points(
            points, path, xlabel="sent by a client in a round (KB, log scale)", ylabel=metric, title=title
        )

    note = "stored: item embeddings on a client: what is received once (frozen table, codes) and every round."
    pictures = [Picture("hybrid", f"{title}: {metric} against what a client sends.", draw)] if points else []
    return Findings([Table("hybrid", "Strategies and their sums", means, note)], pictures)


STUDY = Study(
    "hybrid",
    "Sums of strategies",
    "Is the sum of two strategies better than a larger one? (open question 1 of the paper)",
    run,
    options=frozenset({"embeddings"}),
)
