"""The paper's table 2: every backbone with every embedding."""

from __future__ import annotations

import polars as pl

from fedpeft_ext.experiments.studies.paper import ML_1M
from fedpeft_ext.experiments.studies.pictures import bytes_picture
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, Table, Variant
from fedpeft_ext.words import counted

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
    metric, setting = (
        sampled[0],
        f"on {context.dataset.name}, {counted(context.config.training.rounds, 'round')}",
    )
    pictures = [
        picture
        for backbone in backbones
        for picture in bytes_picture(
            f"table2-{backbone}",
            means.filter(pl.col("backbone") == backbone),
            metric,
            title=f"{backbone} {setting}",
        )
    ]
    return Findings(tables, pictures)


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


STUDY = Study(
    "table2",
    "Backbones and embeddings",
    "How accurate is each embedding with each backbone, and what does a client send? (the paper's table 2)",
    run,
    options=frozenset({"backbones", "embeddings"}),
)
