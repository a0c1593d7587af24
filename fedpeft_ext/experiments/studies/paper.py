"""Figures that the paper reports, to stand beside ours.

Yuan et al., "Plug-and-Play Parameter-Efficient Tuning of Embeddings for Federated Recommendation", AAAI 2026,
arXiv 2512.13734: MovieLens-1M, NDCG@10 and HR@10 among 100 sampled items.
"""

from __future__ import annotations

from collections.abc import Mapping

ML_1M: Mapping[tuple[str, str], tuple[float, float]] = {
    ("fedmf", "full"): (0.3398, 0.5844),
    ("fedmf", "p-lora"): (0.3798, 0.5979),
    ("fedmf", "p-rq"): (0.3359, 0.5896),
    ("fedncf", "full"): (0.3880, 0.6129),
    ("fedncf", "p-rq"): (0.3975, 0.6091),
    ("pfedrec", "full"): (0.3863, 0.6048),
    ("pfedrec", "p-lora"): (0.3948, 0.6135),
}
"""(NDCG@10, HR@10) by (backbone, embedding)."""
