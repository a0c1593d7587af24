"""Backbones: FedMF's scores, clients' initial state, and the registry."""

from __future__ import annotations

import pytest
import torch

from fedpeft_ext.backbones import (
    Backbone,
    ClientContext,
    FedMF,
    backbone_class,
    backbone_names,
    register_backbone,
)
from fedpeft_ext.nn import FullEmbedding, Items


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


def test_a_backbone_of_ones_own() -> None:
    class Mine(FedMF):
        name = "mine"

    assert register_backbone(Mine) is backbone_class("mine")
    with pytest.raises(ValueError, match="registered already"):
        register_backbone(Mine)
