"""The functional API: one file an op family, each op with its checks, fake, autograd, vmap rule and
plain-PyTorch twin.

The compiled ops are `torch.ops.fedpeft_ext.<name>`; the functions here check their arguments before they call
them. Every op works under autograd (twice), torch.func (vmap, grad, vjp, at any nesting), torch.compile and
autocast.
"""

from . import _compiled  # noqa: F401  (before all others)
from .aggregate import accumulate_updates_, apply_updates_, touched_rows
from .client_embedding import client_embedding
from .client_layer import client_layer
from .client_mlp import client_mlp
from .dot_scores import dot_scores
from .hash_lookup import SENetWeights, hash_buckets, hash_lookup, make_hashes
from .local_train import ItemParts, ItemSums, LocalUpdates, SumResult, local_train, local_train_sum_
from .lora_lookup import lora_lookup
from .losses import bce_loss, bpr_loss
from .optim import client_adam_, client_sgd_
from .rq_encode import rq_encode
from .rq_lookup import rq_lookup
from .sampling import client_dropout, sample_clients, sample_clients_independently, sample_negatives
from .train_round import RoundResult, train_round_

__all__ = [
    "ItemParts",
    "ItemSums",
    "LocalUpdates",
    "RoundResult",
    "SENetWeights",
    "SumResult",
    "accumulate_updates_",
    "apply_updates_",
    "bce_loss",
    "bpr_loss",
    "client_adam_",
    "client_dropout",
    "client_embedding",
    "client_layer",
    "client_mlp",
    "client_sgd_",
    "dot_scores",
    "hash_buckets",
    "hash_lookup",
    "local_train",
    "local_train_sum_",
    "lora_lookup",
    "make_hashes",
    "rq_encode",
    "rq_lookup",
    "sample_clients",
    "sample_clients_independently",
    "sample_negatives",
    "touched_rows",
    "train_round_",
]
