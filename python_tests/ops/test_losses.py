"""bpr_loss, bce_loss and dot_scores against PyTorch's own losses and their twins, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOATS, WIDTHS, Case, assert_equals_twin, padded_items

from fedpeft_ext import reference

LOSSES = ("bpr_loss", "bce_loss")


def loss_case(
    name: str,
    clients: int | None,
    positions: int,
    *,
    index: torch.dtype = torch.int64,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    shape = (positions,) if clients is None else (clients, positions)
    scores = [torch.randn(shape, generator=g) * scale for _ in range(2)]
    return Case(name, lambda o, *a: getattr(o, name)(*a), (*scores, padded_items(shape, 9, g, index)))


def scores_case(clients: int | None, positions: int, width: int, *, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    lead = () if clients is None else (clients,)
    vectors, user = (
        torch.randn((*lead, positions, width), generator=g),
        torch.randn((*lead, width), generator=g),
    )
    return Case("scores", lambda o, *a: o.dot_scores(*a), (vectors, user))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("clients", [None, 3])
def test_losses_of_every_type(
    name: str, dtype: torch.dtype, index: torch.dtype, clients: int | None, target: Any
) -> None:
    assert_equals_twin(loss_case(name, clients, 37, index=index).to(target.device), target.ops, dtype)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=40)
@given(
    clients=st.none() | st.integers(0, 5),
    positions=st.integers(0, 40),
    scale=st.sampled_from([0.1, 1.0, 30.0, 500.0]),
    seed=st.integers(0, 9),
)
def test_losses_of_any_shape(target: Any, name: str, **shape: Any) -> None:
    assert_equals_twin(loss_case(name, **shape).to(target.device), target.ops, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("clients", [None, 3])
def test_scores_of_every_type(dtype: torch.dtype, width: int, clients: int | None, target: Any) -> None:
    assert_equals_twin(scores_case(clients, 13, width).to(target.device), target.ops, dtype, terms=128)


@settings(deadline=None, max_examples=40)
@given(
    clients=st.none() | st.integers(0, 5),
    positions=st.integers(0, 40),
    width=st.integers(0, 70),
    seed=st.integers(0, 9),
)
def test_scores_of_any_shape(target: Any, **shape: Any) -> None:
    assert_equals_twin(scores_case(**shape).to(target.device), target.ops, torch.float64, terms=128)


def test_losses_equal_torch(target: Any) -> None:
    for space in (target.ops, reference):
        case = loss_case("bpr_loss", 3, 11).to(target.device)
        positive, negative, items = (t.double() if t.is_floating_point() else t for t in case.tensors)
        for c in range(3):
            p, n = positive[c][items[c] != -1], negative[c][items[c] != -1]
            torch.testing.assert_close(
                space.bpr_loss(positive, negative, items)[c], F.softplus(n - p, threshold=1000).mean()
            )
            labels = torch.cat([torch.ones_like(p), torch.zeros_like(n)])
            torch.testing.assert_close(
                space.bce_loss(positive, negative, items)[c],
                F.binary_cross_entropy_with_logits(torch.cat([p, n]), labels),
            )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_scores_and_padding_stay_finite(name: str, dtype: torch.dtype, target: Any) -> None:
    """Large scores do not overflow; NaN and infinity at padding reach neither the loss nor a gradient."""
    positive = torch.tensor(
        [[1e4, -1e4, 0.0, float("nan")]], dtype=dtype, device=target.device, requires_grad=True
    )
    negative = torch.tensor(
        [[-1e4, 1e4, 0.0, float("inf")]], dtype=dtype, device=target.device, requires_grad=True
    )
    items = torch.tensor([[1, 2, 3, -1]], device=target.device)
    for space in (target.ops, reference):
        loss = getattr(space, name)(positive, negative, items)
        assert bool(loss.isfinite().all())
        for g in torch.autograd.grad(loss.sum(), (positive, negative)):
            assert bool(g.isfinite().all())
            assert float(g[0, 3]) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_client_without_items_loses_nothing(name: str, target: Any) -> None:
    scores = torch.ones(2, 3, device=target.device, requires_grad=True)
    items = torch.tensor([[-1, -1, -1], [1, -1, -1]], device=target.device)
    for space in (target.ops, reference):
        loss = getattr(space, name)(scores, scores, items)
        assert float(loss.detach()[0]) == 0
        assert float(loss.detach()[1]) > 0
        (grad,) = torch.autograd.grad(loss.sum(), scores)
        assert bool((grad[0] == 0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_no_bit(name: str, target: Any) -> None:
    case = loss_case(name, 2, 300).to(target.device)
    short = case.run(target.ops, *case.tensors)
    longer = [F.pad(t, (0, 70), value=-1) for t in case.tensors]
    assert torch.equal(case.run(target.ops, *longer), short)


LOSS = {
    "positive": torch.zeros(2, 3),
    "negative": torch.zeros(2, 3),
    "items": torch.zeros(2, 3, dtype=torch.int64),
}
BAD_LOSS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("scalar", {"positive": torch.zeros(())}, ValueError, "positive: expected shape .P. or .C, P."),
    ("integer", {"positive": torch.zeros(2, 3).int()}, TypeError, "positive: expected float32"),
    (
        "dtype",
        {"negative": torch.zeros(2, 3).double()},
        TypeError,
        "negative: expected the dtype of positive",
    ),
    ("shape", {"negative": torch.zeros(2, 4)}, ValueError, "negative: expected shape"),
    ("items", {"items": torch.zeros(3, dtype=torch.int64)}, ValueError, "items: expected shape"),
    ("float items", {"items": torch.zeros(2, 3)}, TypeError, "items: expected int32 or int64"),
]
SCORES = {"vectors": torch.zeros(2, 3, 4), "user": torch.zeros(2, 4)}
BAD_SCORES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("flat", {"vectors": torch.zeros(4)}, ValueError, "vectors: expected shape .P, D. or .C, P, D."),
    ("integer", {"vectors": torch.zeros(2, 3, 4).int()}, TypeError, "vectors: expected float32"),
    ("width", {"user": torch.zeros(2, 5)}, ValueError, "user: expected shape .2, 4."),
    ("shared user", {"user": torch.zeros(4)}, ValueError, "user: expected shape .2, 4."),
    ("dtype", {"user": torch.zeros(2, 4).double()}, TypeError, "user: expected the dtype of vectors"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD_LOSS], ids=[b[0] for b in BAD_LOSS]
)
@pytest.mark.parametrize("name", LOSSES)
def test_bad_losses(
    name: str, change: dict[str, Any], error: type[Exception], message: str, target: Any
) -> None:
    for device in (target.device, "meta"):
        arguments = {k: v.to(device) for k, v in (LOSS | change).items()}
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                getattr(space, name)(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"), [b[1:] for b in BAD_SCORES], ids=[b[0] for b in BAD_SCORES]
)
def test_bad_scores(change: dict[str, Any], error: type[Exception], message: str, target: Any) -> None:
    for device in (target.device, "meta"):
        arguments = {k: v.to(device) for k, v in (SCORES | change).items()}
        for space in (target.ops, reference):
            with pytest.raises(error, match=message):
                space.dot_scores(**arguments)
