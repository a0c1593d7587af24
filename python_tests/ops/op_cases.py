"""A table of calls of the differentiable ops, for the properties that all of them share, and comparisons with
a twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpeft_ext import reference

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Ops of the simulator on the CPU; on a GPU it does without them.
CPU_ALONE = ("local_train_sum_", "train_round_")
WIDTHS = (1, 3, 7, 8, 32, 33, 64, 100)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int = 16) -> None:
    """`actual`, computed in `dtype`, against a float64 result.

    A sum of n terms in the accumulator (float32 for 16-bit types) is off by at most about n accumulator
    epsilons of the sum of sizes; then it is rounded to dtype once. Random signs make sums smaller than their
    terms, hence the absolute part.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    actual, expected = actual.detach(), expected.detach()
    bound = torch.finfo(dtype).eps + terms * torch.finfo(accumulator).eps
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=bound, atol=bound * scale)


def assert_equals(actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int) -> None:
    """As `assert_near` where it is floating; else it must be the same."""
    assert actual.shape == expected.shape
    if actual.is_floating_point():
        assert_near(actual, expected, dtype, terms)
    else:
        assert torch.equal(actual, expected)


def padded_items(
    shape: tuple[int, ...], high: int, generator: torch.Generator, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Items in [0, high) with about a fifth of padding."""
    items = torch.randint(high, shape, generator=generator).to(dtype)
    return items.masked_fill(torch.rand(shape, generator=generator) < 0.2, -1)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with `change` of each tensor, also of those in tuples and named tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, depth first."""
    found: list[Tensor] = []
    mapped(value, lambda t: found.append(t) or t)
    return found


@dataclass(frozen=True)
class Case:
    """A call `run(ops, *tensors)` of one op; the floating tensors are differentiable.

    `tied` are the tensors (by position) that vmap must batch together.
    """

    name: str
    run: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    tied: tuple[int, ...] = ()

    def floating(self) -> list[int]:
        return [i for i, t in enumerate(self.tensors) if t.is_floating_point()]

    def function(self, ops: Any) -> Callable[..., Any]:
        """The call as a function of its floating tensors."""
        places = self.floating()

        def call(*floats: Tensor) -> Any:
            tensors = list(self.tensors)
            for place, t in zip(places, floats, strict=True):
                tensors[place] = t
            return self.run(ops, *tensors)

        return call

    def floats(self, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Tensor]:
        return [self.tensors[i].to(dtype).detach().requires_grad_(requires_grad) for i in self.floating()]

    def to(self, device: torch.device) -> Case:
        return Case(self.name, self.run, tuple(t.to(device) for t in self.tensors), self.tied)


def cotangent_of(out: Tensor) -> Tensor:
    """In [-1, 1], of three bits each, so that it is the same for a twin in float64."""
    return ((5 * torch.arange(out.numel(), device=out.device) % 17 - 8) / 8).reshape(out.shape).to(out)


def gradients(
    function: Callable[..., Any], inputs: list[Tensor], cotangent: Tensor | None = None
) -> tuple[Tensor, ...]:
    out = function(*inputs)
    if cotangent is None:
        cotangent = cotangent_of(out)
    return torch.autograd.grad(out, inputs, cotangent.to(out))


def assert_equals_twin(case: Case, ops: Any, dtype: torch.dtype, terms: int = 32) -> None:
    """Values and gradients in `dtype` equal those of the twin in float64 on the same (rounded) numbers."""
    inputs = case.floats(dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    function, twin = case.function(ops), case.function(reference)
    out, expected = function(*inputs), twin(*exact)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert_near(out, expected, dtype, terms)
    for x, a, b in zip(inputs, gradients(function, inputs), gradients(twin, exact), strict=True):
        assert a.dtype == dtype
        assert a.shape == x.shape
        assert_near(a, b, dtype, 2 * terms)


def cases() -> list[Case]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    C, P, I, L, K, D, M, H, S, R, r = 3, 5, 7, 2, 3, 4, 6, 2, 3, 4, 2
    items, rows = padded_items((C, P), I, g), padded_items((C, P), R, g)
    rows = torch.where(items < 0, -1, rows.clamp(min=0))
    codes = torch.randint(K, (I, L), generator=g, dtype=torch.uint8)
    hashes = torch.tensor([[3, 1], [5, 2]])
    clients = torch.tensor([5, 9, 2])

    def senet(*lead: int) -> tuple[Tensor, ...]:
        return draw(*lead, S, H), draw(*lead, S), draw(*lead, H, S), draw(*lead, H)

    def hash_plain(reduce: str) -> Callable[..., Any]:
        return lambda ops, i, t, h, *b: ops.hash_lookup(i, t, h, None, reduce, *b)

    def hash_senet(ops: Any, i: Tensor, t: Tensor, h: Tensor, *rest: Tensor) -> Tensor:
        out: Tensor = ops.hash_lookup(i, t, h, ops.SENetWeights(*rest[:4]), "mean", *rest[4:])
        return out

    def scores(*lead: int) -> tuple[Tensor, Tensor]:
        return draw(*lead, P), draw(*lead, P)

    def layer(p: float) -> Callable[..., Any]:
        return lambda ops, *t: ops.client_layer(*t, p, 3, 1, 2, 5)

    def one_layer(ops: Any, x: Tensor, w: Tensor, b: Tensor, i: Tensor, c: Tensor) -> Tensor:
        out: Tensor = ops.client_layer(x, w, b, i, c[0], 0.4, 3, 1, 2, 5)
        return out

    return [
        Case("rq_shared", lambda o, *a: o.rq_lookup(*a), (items, codes, draw(L, K, D))),
        Case("rq_shared_base", lambda o, *a: o.rq_lookup(*a), (items, codes, draw(L, K, D), draw(I, D))),
        Case("rq_client", lambda o, *a: o.rq_lookup(*a), (items, codes, draw(C, L, K, D))),
        Case("rq_client_base", lambda o, *a: o.rq_lookup(*a), (items, codes, draw(C, L, K, D), draw(I, D))),
        Case("hash_mean", hash_plain("mean"), (items, draw(M, D), hashes)),
        Case("hash_sum_client_base", hash_plain("sum"), (items, draw(C, M, D), hashes, draw(I, D))),
        Case("hash_senet", hash_senet, (items, draw(M, D), hashes, *senet())),
        Case("hash_senet_client_base", hash_senet, (items, draw(C, M, D), hashes, *senet(C), draw(I, D))),
        Case("lora_shared", lambda o, *a: o.lora_lookup(*a), (items, draw(I, r), draw(D, r))),
        Case(
            "lora_client_base",
            lambda o, *a: o.lora_lookup(*a),
            (items, draw(C, I, r), draw(C, D, r), draw(I, D)),
        ),
        Case(
            "lora_client_rows",
            lambda o, *a: o.lora_lookup(*a),
            (items, draw(C, R, r), draw(C, D, r), draw(I, D), rows),
            tied=(0, 4),
        ),
        Case("embedding_shared", lambda o, *a: o.client_embedding(*a), (items, draw(I, D))),
        Case("embedding_client", lambda o, *a: o.client_embedding(*a), (items, draw(C, I, D))),
        Case("scores", lambda o, *a: o.dot_scores(*a), (draw(P, D), draw(D))),
        Case("scores_client", lambda o, *a: o.dot_scores(*a), (draw(C, P, D), draw(C, D))),
        Case("bpr", lambda o, *a: o.bpr_loss(*a), (*scores(), items[0])),
        Case("bpr_client", lambda o, *a: o.bpr_loss(*a), (*scores(C), items)),
        Case("bce", lambda o, *a: o.bce_loss(*a), (*scores(), items[0])),
        Case("bce_client", lambda o, *a: o.bce_loss(*a), (*scores(C), items)),
        Case("layer", one_layer, (draw(P, D), draw(S, D), draw(S), items[0], clients)),
        Case("layer_client", layer(0.0), (draw(C, P, D), draw(C, S, D), draw(C, S), items, clients)),
        Case("layer_client_dropout", layer(0.4), (draw(C, P, D), draw(C, S, D), draw(C, S), items, clients)),
        Case("dropout", lambda o, x, c: o.client_dropout(x, c, 0.4, 3, 1, 2, 5), (draw(C, P, D), clients)),
    ]


CASES = cases()
IDS = [case.name for case in CASES]
