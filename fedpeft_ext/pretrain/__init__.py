"""Pre-training on the server from item features: full embeddings (AutoEncoder), semantic codes (RQ-VAE).

`pretrain` does all of it as an experiment's settings say; the parts stand alone:

    features = text_features(texts)                       # float32 [I, F]
    full = pretrain_full(features, dim=32)                # full.embedding float32 [I, 32]
    codes = pretrain_codes(features, dim=32, levels=3)    # codes.codes uint8 [I, 3]
    codes.encode_new(features_of_new_items)               # later items, nothing retrained
"""

from .autoencoder import AutoEncoder, PretrainedFull, pretrain_full
from .cache import default_cache_dir, load, save
from .codes import PretrainedCodes
from .encoder import FrozenEncoder
from .features import SentenceEncoder, TfidfEncoder, load_features, text_features
from .item_encoder import ItemEncoder
from .pipeline import Pretrained, pretrain
from .residual_kmeans import residual_kmeans_codes
from .rqvae import RQVAE, pretrain_codes

__all__ = [
    "RQVAE",
    "AutoEncoder",
    "FrozenEncoder",
    "ItemEncoder",
    "Pretrained",
    "PretrainedCodes",
    "PretrainedFull",
    "SentenceEncoder",
    "TfidfEncoder",
    "default_cache_dir",
    "load",
    "load_features",
    "pretrain",
    "pretrain_codes",
    "pretrain_full",
    "residual_kmeans_codes",
    "save",
    "text_features",
]
