"""The paper's figure 3: what is sent, and how much of it until a given accuracy."""

from __future__ import annotations

import polars as pl

from fedpeft_ext.experiments.plots import Place
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

EMBEDDINGS = ("full", "c-lora", "c-hash", "c-rq", "p-lora", "p-hash", "p-hash+senet", "p-rq")
MB = 1_000_000


def run(context: Context) -> Findings:
    """Bytes per client and round, and until shares of the accuracy that Full ends with."""
    embeddings = context.embeddings(EMBEDDINGS)
    if "full" not in embeddings:
        raise ValueError("embeddings: expected 'full' among them, whose accuracy sets the goals")
    metric = f"HR@{context.k}"
    variants = [Variant({"embedding": name}, (f"embedding.name={name}",)) for name in embeddings]
    trained = context.train(variants)
    goal = trained.last(variants[embeddings.index("full")], metric)
    sizes = trained.means([metric], ["bytes_down", "bytes_up", "bytes_setup", "saving"])
    reached = pl.DataFrame(
        [row for variant in variants for row in _reached(trained, variant, metric, goal)],
        infer_schema_length=None,
    )
    ends = "Every run of Full diverged" if goal is None else f"Full ends with {100 * goal:.2f}%"
    label = f"{metric}, {context.config.backbone.name} on {context.dataset.name}"
    lines = {str(variant.labels["embedding"]): _sent(trained, variant, metric) for variant in variants}
    large = max((place.x for places in lines.values() for place in places), default=0) >= 10_000 * MB
    unit, size = ("GB", 1_000 * MB) if large else ("MB", MB)
    pictures = line_picture(
        "communication",
        {name: [place._replace(x=place.x / size) for place in places] for name, places in lines.items()},
        caption=f"{label} against everything sent so far",
        title=label,
        xlabel=f"sent by all clients and the server so far ({unit}, log scale)",
        ylabel=metric,
        log_x=True,
    )
    return Findings(
        [
            Table(
                "communication-sizes",
                "What is sent",
                sizes,
                "down, up: for each client in each round after warm-up, counted from the tensors of the "
                "messages; setup: once for each client (frozen embeddings, codes).",
            ),
            Table(
                "communication-goals",
                f"Until a share of Full's final {metric}",
                reached,
                f"{ends}. rounds, MB: mean over the seeds that get there; MB both "
                "ways and for all clients together, warm-up included, set-up left out.",
            ),
        ],
        pictures,
    )


def _reached(trained: Trained, variant: Variant, metric: str, goal: float | None) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for share in GOALS:
        hits = [] if goal is None else trained.reaching(variant, metric, share * goal)
        rows.append(
            {
                **variant.labels,
                "goal": f"{share:.0%}",
                "seeds that reach it": len(hits),
                "rounds": sum(round for round, _ in hits) / len(hits) if hits else None,
                "MB": sum(sent for _, sent in hits) / len(hits) / MB if hits else None,
            }
        )
    return rows


def _sent(trained: Trained, variant: Variant, metric: str) -> list[Place]:
    """(bytes sent so far, metric) of every evaluation, means over seeds."""
    sent = [dict(result.bytes_until()) for result in trained.of(variant)]
    return [
        place._replace(x=sum(one[int(place.x)] for one in sent) / len(sent))
        for place in trained.curve(variant, metric)
        if place.x > 0
    ]


STUDY = Study(
    "communication",
    "Communication",
    "How much does each embedding send, in a round and until it is accurate? (the paper's figure 3)",
    run,
    options=frozenset({"embeddings"}),
)
