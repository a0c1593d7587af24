"""The plain-PyTorch twin of every op under the op's own name: readable, slow, on any device; the yardstick of
the tests."""

from .ops.aggregate import accumulate_updates_reference_ as accumulate_updates_
from .ops.aggregate import apply_updates_reference_ as apply_updates_
from .ops.aggregate import touched_rows_reference as touched_rows
from .ops.client_embedding import client_embedding_reference as client_embedding
from .ops.client_layer import client_layer_reference as client_layer
from .ops.client_mlp import client_mlp_reference as client_mlp
from .ops.dot_scores import dot_scores_reference as dot_scores
from .ops.hash_lookup import SENetWeights, make_hashes
from .ops.hash_lookup import hash_buckets_reference as hash_buckets
from .ops.hash_lookup import hash_lookup_reference as hash_lookup
from .ops.local_train import ItemParts, ItemSums, LocalUpdates, SumResult
from .ops.local_train import local_train_reference as local_train
from .ops.local_train import local_train_sum_reference_ as local_train_sum_
from .ops.lora_lookup import lora_lookup_reference as lora_lookup
from .ops.losses import bce_loss_reference as bce_loss
from .ops.losses import bpr_loss_reference as bpr_loss
from .ops.optim import client_adam_reference_ as client_adam_
from .ops.optim import client_sgd_reference_ as client_sgd_
from .ops.rq_encode import rq_encode_reference as rq_encode
from .ops.rq_lookup import rq_lookup_reference as rq_lookup
from .ops.sampling import client_dropout_reference as client_dropout
from .ops.sampling import sample_clients_independently_reference as sample_clients_independently
from .ops.sampling import sample_clients_reference as sample_clients
from .ops.sampling import sample_negatives_reference as sample_negatives
from .ops.train_round import RoundResult
from .ops.train_round import train_round_reference_ as train_round_

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
