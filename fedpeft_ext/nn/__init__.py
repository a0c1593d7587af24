"""Embedding modules, drop-ins for `nn.Embedding`; and `plug`, which puts one into any model."""

from fedpeft_ext.nn.embedding import ItemEmbedding
from fedpeft_ext.nn.full import FullEmbedding
from fedpeft_ext.nn.hash import HashEmbedding
from fedpeft_ext.nn.items import Items
from fedpeft_ext.nn.lora import LoRAEmbedding
from fedpeft_ext.nn.plug import plug
from fedpeft_ext.nn.rq import RQEmbedding, residual_kmeans
from fedpeft_ext.nn.spec import EmbeddingSpec, build_embedding, parse_spec, register_strategy
from fedpeft_ext.nn.sum import SumEmbedding

__all__ = [
    "EmbeddingSpec",
    "FullEmbedding",
    "HashEmbedding",
    "ItemEmbedding",
    "Items",
    "LoRAEmbedding",
    "RQEmbedding",
    "SumEmbedding",
    "build_embedding",
    "parse_spec",
    "plug",
    "register_strategy",
    "residual_kmeans",
]
