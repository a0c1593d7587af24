"""The paper's table 2: every backbone with every embedding."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from fedpeft_ext.experiments.plots import Point, plot_points
from fedpeft_ext.experiments.results import KB
from fedpeft_ext.experiments.studies.paper import ML_1M
from fedpeft_ext.experiments.studies.study import Context, Findings, Picture, Study, Table, Variant

BACKBONES = ("fedmf", "fedncf", "pfedrec", "fedpergnn")
EMBEDDINGS = (
    "full", "c-lora", "c-hash", "c-hash+senet", "c-rq", "p-lora", "p-hash", "p-hash+senet", "p-rq",
)  # fmt: skip


def run(context: Context) -> Findings:
    """Train every pair; one table, and accuracy against bytes for each backbone."""
    backbones, k = context.backbones(BACKBONES), context.k
    variants = [
        Variant(
            {"backbone": backbone, "embedding": embedding},
            (f"backbone.name={backbone}", f"embedding.name={embedding}"),
        )
        for backbone in backbones
        for embedding in context.embeddings(EMBEDDINGS)
    ]
    trained = context.train(variants)
    sampled = [f"HR@{k}", f"NDCG@{k}"]
    means = trained.means([*sampled, *(f"full/{name}" for name in sampled)], ["bytes_up", "saving"])
    tables = [Table("table2", "Accuracy and bytes", means)]
    beside = _beside_paper(means, context)
    if beside is not None:
        tables.append(Table("table2-paper", "Beside the paper's figures", beside, "paper: its table 2."))
    pictures = [_picture(means, backbone, context) for backbone in backbones]
    return Findings(tables, [picture for picture in pictures if picture is not None])


def _beside_paper(means: pl.DataFrame, context: Context) -> pl.DataFrame | None:
    """Rows that the paper has too; None where it has none, or measured something else."""
    if context.dataset.name != "ml-1m" or context.k != 10:
        return None
    rows = [
        {
            "backbone": row["backbone"],
            "embedding": row["embedding"],
            "NDCG@10": row["NDCG@10"],
            "NDCG@10 paper": paper[0],
            "HR@10": row["HR@10"],
            "HR@10 paper": paper[1],
        }
        for row in means.iter_rows(named=True)
        if (paper := ML_1M.get((row["backbone"], row["embedding"]))) is not None
    ]
    return pl.DataFrame(rows) if rows else None


def _picture(means: pl.DataFrame, backbone: str, context: Context) -> Picture | None:
    metric = f"HR@{context.k}"
    rows = means.filter((pl.col("backbone") == backbone) & pl.col(metric).is_not_null())
    points = [
        Point(row["embedding"], row["embedding"], row["bytes_up"] / KB, row[metric])
        for row in rows.iter_rows(named=True)
    ]
    if not points:
        return None
    title = f"{backbone} on {context.dataset.name}, {context.config.training.rounds} rounds"

    def draw(path: Path) -> object:
        return plot_points(
            points,
            path,
            xlabel="sent by a client in a round (KB, log scale)",
            ylabel=metric,
            title=title,
        )

    return Picture(f"table2-{backbone}", f"{title}: {metric} against what a client sends.", draw)


STUDY = Study(
    "table2",
    "Backbones and embeddings",
    "How accurate is each embedding with each backbone, and what does a client send? (the paper's table 2)",
    run,
    options=frozenset({"backbones", "embeddings"}),
)
