"""How good the server's full embeddings are, against what the federation makes of them."""

from __future__ import annotations

import polars as pl

from fedpeft_ext.experiments.plots import Place
from fedpeft_ext.experiments.studies.pictures import line_picture, spread_of
from fedpeft_ext.experiments.studies.study import Context, Findings, Study, Table, Variant
from fedpeft_ext.pretrain import pretrain

EMBEDDINGS = ("p-lora", "p-rq")
QUALITIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("random", ("pretrain.features=random",)),
    ("text, 1 epoch", ("pretrain.epochs=1",)),
    ("text, 3 epochs", ("pretrain.epochs=3",)),
    ("text, 10 epochs", ("pretrain.epochs=10",)),
    ("text, 100 epochs", ("pretrain.epochs=100",)),
)


def run(context: Context) -> Findings:
    """From a random base to a well-trained AutoEncoder; without warm-up, and with it where there is one."""
    metric = f"HR@{context.k}"
    warmups = sorted({0, context.config.training.warmup_rounds})
    explained = {name: _explained(context, settings) for name, settings in QUALITIES}
    variants = [
        Variant(
            {"embedding": embedding, "warm-up": warmup, "full embeddings": name},
            (f"embedding.name={embedding}", f"training.warmup_rounds={warmup}", *settings),
        )
        for embedding in context.embeddings(EMBEDDINGS)
        for warmup in warmups
        for name, settings in QUALITIES
    ]
    trained = context.train(variants)
    quality = pl.DataFrame(
        {"full embeddings": list(explained), "explained variance": list(explained.values())}
    )
    means = trained.means([metric, f"NDCG@{context.k}", f"full/{metric}"]).join(
        quality, on="full embeddings", how="left", maintain_order="left"
    )
    lines: dict[str, list[Place]] = {}
    for row in means.filter(pl.col(metric).is_not_null()).iter_rows(named=True):
        if row["explained variance"] is not None:
            place = Place(row["explained variance"], row[metric], spread_of(row, metric))
            lines.setdefault(f"{row['embedding']}, warm-up {row['warm-up']}", []).append(place)
    title = f"Pre-training, {context.config.backbone.name} on {context.dataset.name}"

    note = "explained variance: share of the item features' variance that the AutoEncoder reconstructs."
    pictures = line_picture(
        "pretraining",
        lines,
        caption=f"{title}: {metric} by quality",
        title=title,
        xlabel="variance of item features that the AutoEncoder explains",
        ylabel=metric,
    )
    return Findings([Table("pretraining", "Quality of full embeddings", means, note)], pictures)


def _explained(context: Context, settings: tuple[str, ...]) -> float | None:
    config = context.config.updated(settings)
    made = pretrain(config.pretrain, context.dataset, config.backbone.dim, seed=config.seed)
    return made.report.get("explained_variance")


STUDY = Study(
    "pretraining",
    "Quality of pre-training",
    "How much does the quality of full embeddings matter? (open question 4 of the paper)",
    run,
    options=frozenset({"embeddings"}),
)
