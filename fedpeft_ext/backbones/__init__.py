"""Backbones: ONE client's recommendation model in ordinary PyTorch; `register_backbone` adds yours."""

from fedpeft_ext.backbones.base import (
    Backbone,
    ClientContext,
    backbone_class,
    backbone_names,
    register_backbone,
    stacked_dims,
)
from fedpeft_ext.backbones.fedmf import FedMF

__all__ = [
    "Backbone",
    "ClientContext",
    "FedMF",
    "backbone_class",
    "backbone_names",
    "register_backbone",
    "stacked_dims",
]
