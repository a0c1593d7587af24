"""Backbones: FedMF's scores, clients' initial state, and the registry."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from fedpeft_ext.backbones import (
    Backbone,
    ClientContext,
    FedMF,
    backbone_class,
    backbone_names,
    base,
    build_backbone,
    register_backbone,
)
from fedpeft_ext.nn import FullEmbedding, ItemEmbedding, Items


@pytest.fixture
def model() -> FedMF:
    return FedMF(FullEmbedding(30, 8, generator=torch.Generator().manual_seed(0)), 8)


def context(clients: int) -> ClientContext:
    return ClientContext(torch.arange(clients), Items(torch.empty(clients, 0, dtype=torch.int64)), 0, 0, 0)


def test_scores_are_dot_products(model: FedMF) -> None:
    with torch.no_grad():
        model.user.normal_(generator=torch.Generator().manual_seed(1))
    items = torch.tensor([3, 0, 29])
    expected = model.item_embedding.weight[items] @ model.user
    torch.testing.assert_close(model(items), expected)


def test_catalogue_scores_equal_the_model_run_for_each_client(model: FedMF) -> None:
    state = {"user": torch.randn(5, 8, generator=torch.Generator().manual_seed(2))}
    vectors = model.item_embedding.full_embedding()
    with torch.no_grad():
        fast = model.catalogue_scores(vectors, state, context(5))
        slow = Backbone.catalogue_scores(model, vectors, state, context(5))
    torch.testing.assert_close(fast, slow)
    assert torch.equal(model.user, torch.zeros(8))


def test_initial_state_is_a_function_of_seed_and_client(model: FedMF) -> None:
    everyone = model.initial_state(torch.arange(2000), seed=5, init_std=0.1)["user"]
    some = model.initial_state(torch.tensor([7, 1999, 3]), seed=5, init_std=0.1)["user"]
    assert torch.equal(some, everyone[[7, 1999, 3]])
    assert not torch.equal(everyone, model.initial_state(torch.arange(2000), seed=6, init_std=0.1)["user"])
    assert everyone.shape == (2000, 8)
    assert len(everyone.unique()) > 0.99 * everyone.numel()
    # 16,000 draws: the errors of mean, deviation and fourth moment are below 1%, 1% and 5% of sigma's powers.
    assert abs(float(everyone.mean())) < 0.003
    assert float(everyone.std()) == pytest.approx(0.1, rel=0.03)
    assert float((everyone / 0.1).pow(4).mean()) == pytest.approx(3.0, rel=0.1)


def test_registry() -> None:
    assert backbone_class("FedMF") is FedMF
    assert "fedmf" in backbone_names()
    with pytest.raises(ValueError, match=r"did you mean 'fedmf'"):
        backbone_class("fedfm")


def define(name: object = "mine", parent: type[nn.Module] = FedMF, **members: Any) -> type[Backbone]:
    """A class as a user's module defines it; each call defines it anew."""
    return cast(type[Backbone], type("Mine", (parent,), {"name": name, **members}))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_BACKBONES", dict(base._BACKBONES))


@pytest.mark.usefixtures("registry")
def test_a_backbone_of_ones_own() -> None:
    first, again = define(), define()
    assert register_backbone(first) is backbone_class("mine")
    assert register_backbone(again) is backbone_class("mine")
    with pytest.raises(ValueError, match="registered already, as FedMF"):
        register_backbone(define("fedmf"))
    for name in ("Mine", "a b", "", None):
        with pytest.raises(ValueError, match=r"Mine\.name: expected lower-case letters.*got"):
            register_backbone(define(name))
    with pytest.raises(TypeError, match="expected a subclass of Backbone"):
        register_backbone(define(parent=nn.Module))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"local_parameters": ("usr",)}, r"Mine\.local_parameters: expected names out of user, .*got 'usr'"),
        ({"averaged_start": ("usr",)}, r"Mine\.averaged_start: expected names out of user, got 'usr'"),
        ({"l2_parameters": ("usr",)}, r"Mine\.l2_parameters: .*got 'usr'"),
        (
            {"initial_state": lambda self, clients, seed, std: {}},
            r"Mine\.initial_state: expected .*'user': \[1, 8\].*got \{\}",
        ),
        (
            {"initial_state": lambda self, clients, seed, std: {"user": torch.zeros(8)}},
            r"Mine\.initial_state: .*got \{'user': \[8\]\}",
        ),
        (
            {"initial_state": lambda self, clients, seed, std: {"user": torch.zeros(1, 8).double()}},
            r"Mine\.initial_state: expected 'user' in the dtype .*float32, got torch.float64",
        ),
    ],
)
@pytest.mark.usefixtures("registry")
def test_lists_and_states_that_do_not_fit_the_parameters(members: dict[str, Any], message: str) -> None:
    register_backbone(define(**members))
    with pytest.raises(ValueError, match=message):
        build_backbone("mine", FullEmbedding(30, 8), 8)


@pytest.mark.usefixtures("registry")
def test_item_tables_and_scores_that_do_not_fit() -> None:
    table = FullEmbedding(30, 8)
    table._row_parameters = ("wieght",)
    with pytest.raises(ValueError, match=r"FullEmbedding\._row_parameters: .*got 'wieght'"):
        build_backbone("fedmf", table, 8)
    register_backbone(define(forward=lambda self, items, context=None: self.item_embedding(items)))
    model = build_backbone("mine", FullEmbedding(30, 8), 8)
    with pytest.raises(ValueError, match=r"Mine\.forward: expected scores \[P\] .*got shape \[5, 8\]"):
        model.client_scores(torch.zeros(2, 5, dtype=torch.int64), {"user": torch.zeros(2, 8)}, context(2))


@pytest.mark.usefixtures("registry")
def test_what_a_constructor_draws_depends_on_the_seed_alone() -> None:
    def initialise(self: FedMF, item_embedding: ItemEmbedding, dim: int) -> None:
        FedMF.__init__(self, item_embedding, dim)
        self.layer = nn.Linear(dim, dim)

    register_backbone(define(__init__=initialise))
    first, again, other = (build_backbone("mine", FullEmbedding(3, 8), 8, seed) for seed in (1, 1, 2))
    weights = [model.get_parameter("layer.weight") for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
