"""Codebooks: drawn at random, as the paper does, or those that the server trained with the codes."""

from __future__ import annotations

import polars as pl

from fedpeft_ext.experiments.studies.pictures import line_picture
from fedpeft_ext.experiments.studies.study import (
    GOALS,
    Context,
    Findings,
    Study,
    Table,
    Trained,
    Variant,
)

EMBEDDINGS = ("c-rq", "p-rq")


def run(context: Context) -> Findings:
    """Both starts with codes of both kinds: the final accuracy, and rounds to that of the random start."""
    metric = f"HR@{context.k}"
    variants = [
        Variant(
            {"embedding": embedding, "codes": codes, "codebooks": "warm" if warm else "random"},
            (
                f"embedding.name={embedding}",
                f"pretrain.codes={codes}",
                f"embedding.warm_start_codebooks={str(warm).lower()}",
            ),
        )
        for embedding in context.embeddings(EMBEDDINGS)
        for codes in ("rq-vae", "rq-kmeans")
        for warm in (False, True)
    ]
    trained = context.train(variants)
    means = trained.means([metric, f"NDCG@{context.k}"])
    rows = []
    for random, warm in zip(variants[::2], variants[1::2], strict=True):
        goal = trained.last(random, metric)
        for variant in (random, warm):
            rows.append({**variant.labels, **_rounds(trained, variant, metric, goal)})
    reached = pl.DataFrame(rows, infer_schema_length=None)
    title = f"Start of the codebooks, {context.config.backbone.name} on {context.dataset.name}"
    pictures = line_picture(
        "warm-start",
        {
            " ".join(str(label) for label in variant.labels.values()): trained.curve(variant, metric)
            for variant in variants
        },
        caption=f"{title}: {metric} over the rounds",
        title=title,
        xlabel="round",
        ylabel=metric,
    )
    return Findings(
        [
            Table("warm-start", "Final accuracy", means),
            Table(
                "warm-start-rounds",
                f"Rounds until a share of the random start's final {metric}",
                reached,
                "Mean over the seeds that get there; – where none does.",
            ),
        ],
        pictures,
    )


def _rounds(trained: Trained, variant: Variant, metric: str, goal: float | None) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for share in GOALS:
        hits = [] if goal is None else trained.reaching(variant, metric, share * goal)
        result[f"to {share:.0%}"] = sum(round for round, _ in hits) / len(hits) if hits else None
    return result


STUDY = Study(
    "warm-start",
    "Warm start of codebooks",
    "Do codebooks from pre-training save rounds over random ones? (open question 2 of the paper)",
    run,
    options=frozenset({"embeddings"}),
)
