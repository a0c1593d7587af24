"""Sums of strategies: accuracy, bytes and what a client has to store."""

from __future__ import annotations

import polars as pl

from fedpeft_ext.experiments.studies.pictures import bytes_picture
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, Table, Variant

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
    title = f"Sums of strategies, {context.config.backbone.name} on {context.dataset.name}"
    note = "stored: item embeddings on a client: what is received once (frozen table, codes) and every round."
    return Findings(
        [Table("hybrid", "Strategies and their sums", means, note)],
        bytes_picture("hybrid", means, metric, title=title),
    )


STUDY = Study(
    "hybrid",
    "Sums of strategies",
    "Is the sum of two strategies better than a larger one? (open question 1 of the paper)",
    run,
    options=frozenset({"embeddings"}),
)
