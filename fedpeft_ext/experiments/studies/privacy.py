"""What privacy costs: sweeps of central and local noise, compressed against full embeddings."""

from __future__ import annotations

import polars as pl

from fedpeft_ext.experiments.plots import Place
from fedpeft_ext.experiments.studies.pictures import line_picture, spread_of
from fedpeft_ext.experiments.studies.study import Context, Findings, Picture, Study, Table, Variant

EMBEDDINGS = ("full", "p-lora", "p-hash", "p-rq")
CLIP = 0.5
MULTIPLIERS = {"cdp": (0.25, 0.5, 1.0, 2.0, 4.0), "ldp": (0.01, 0.03, 0.1, 0.3)}


def run(context: Context) -> Findings:
    """Without privacy, with clipping alone, and with growing noise of both kinds."""
    clip = context.config.privacy.clip or CLIP
    given = ("privacy.mode=cdp", f"privacy.clip={clip}", "training.client_sampling=poisson")
    variants = []
    for embedding in context.embeddings(EMBEDDINGS):
        name = f"embedding.name={embedding}"
        labels = {"embedding": embedding}
        uniform = (name, "training.weighting=uniform")
        bare = ("privacy.mode=none", "privacy.clip=null", "privacy.noise_multiplier=null")
        variants.append(Variant({**labels, "privacy": "none", "noise": 0.0}, (*uniform, *bare)))
        variants.append(
            Variant(
                {**labels, "privacy": "clipping", "noise": 0.0},
                (*uniform, *given, "privacy.noise_multiplier=0"),
            )
        )
        for mode, multipliers in MULTIPLIERS.items():
            for multiplier in multipliers:
                settings = (
                    *uniform,
                    *given,
                    f"privacy.mode={mode}",
                    f"privacy.noise_multiplier={multiplier}",
                )
                variants.append(Variant({**labels, "privacy": mode, "noise": multiplier}, settings))
    trained = context.train(variants)
    metric = f"HR@{context.k}"
    means = trained.means([metric, f"NDCG@{context.k}"], ["epsilon"])
    table = Table(
        "privacy",
        "Accuracy under noise",
        means,
        f"noise: standard deviation in clips; uploads are clipped to an L2 norm of {clip}. epsilon at delta "
        f"{context.config.privacy.delta:g} after all rounds, the largest of the seeds; – is no guarantee, or "
        "a run that diverged.",
    )
    return Findings(
        [table], [picture for mode in MULTIPLIERS for picture in _picture(context, means, mode, metric)]
    )


def _picture(context: Context, means: pl.DataFrame, mode: str, metric: str) -> list[Picture]:
    rows = means.filter((pl.col("privacy") == mode) & pl.col(metric).is_not_null())
    lines: dict[str, list[Place]] = {}
    for row in rows.iter_rows(named=True):
        lines.setdefault(row["embedding"], []).append(
            Place(row["noise"], row[metric], spread_of(row, metric))
        )
    title = f"{'Central' if mode == 'cdp' else 'Local'} noise on {context.dataset.name}"

    return line_picture(
        f"privacy-{mode}",
        lines,
        caption=f"{title}: {metric} by noise multiplier",
        title=title,
        xlabel="noise multiplier (noise in clips, log scale)",
        ylabel=metric,
        log_x=True,
    )


STUDY = Study(
    "privacy",
    "Privacy",
    "What do central (CDP) and local (LDP) noise cost, for full and for compressed embeddings?",
    run,
    options=frozenset({"embeddings"}),
)
