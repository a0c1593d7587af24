"""Backbones: ONE client's recommendation model in ordinary PyTorch; `register_backbone` adds yours."""

from fedpeft_ext.backbones.base import (
    Backbone,
    ClientContext,
    backbone_class,
    backbone_names,
    build_backbone,
    register_backbone,
    stacked_dims,
)
from fedpeft_ext.backbones.fedmf import FedMF
from fedpeft_ext.backbones.fedncf import FedNCF
from fedpeft_ext.backbones.fedpergnn import FedPerGNN
from fedpeft_ext.backbones.pfedrec import PFedRec

__all__ = [
    "Backbone",
    "ClientContext",
    "FedMF",
    "FedNCF",
    "FedPerGNN",
    "PFedRec",
    "backbone_class",
    "backbone_names",
    "build_backbone",
    "register_backbone",
    "stacked_dims",
]
