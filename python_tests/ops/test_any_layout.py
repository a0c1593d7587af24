"""Every op of the public surface on tensors of any strides, sizes (0 among them), dtypes and index dtypes.

Three properties of each call: it equals the twin's result in float64; the same values in other strides give
the same bits on the CPU, gradients included; and it writes nothing but what it says it writes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from emulated import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU_ALONE, FLOATS, assert_equals, cotangent_of, mapped, tensors_in
from test_local_train import named
from torch import Tensor

from fedpeft_ext import ops, reference
from fedpeft_ext.ops import ItemParts, ItemSums, SENetWeights

INDEX = (torch.int64, torch.int32)
CODES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class Inputs:
    """Draws the arguments of a call: tensors whose strides, offset and order of dimensions are arbitrary,
    with NaN, or indices that are out of range, between their elements."""

    def __init__(self, data: st.DataObject, device: torch.device) -> None:
        self._data, self._device = data, device
        self._generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "values"))
        self.dtype: torch.dtype = self.one_of(*FLOATS)

    def one_of(self, *options: Any) -> Any:
        return self._data.draw(st.sampled_from(options))

    def size(self, low: int = 0, high: int = 5) -> int:
        return self._data.draw(st.integers(low, high))

    def width(self) -> int:
        """Of rows: around the registers' widths."""
        return int(self.one_of(3, 0, 1, 8, 17, 32, 64, 67))

    def laid_out(self, values: Tensor, expand: bool = True) -> Tensor:
        """The values in some layout. With `expand` a dimension may have stride 0, which makes its values
        equal."""
        values = values.to(self._device)
        draw = random.Random(self._data.draw(st.integers(0, 99), "layout"))
        shape, strides, size = list(values.shape), [0] * values.dim(), 1
        if expand and values.numel() > 0:
            shape = [1 if n > 1 and draw.random() < 0.15 else n for n in shape]
        for d in draw.sample(range(values.dim()), values.dim()):
            step = draw.choice((1, 1, 2))
            strides[d], size = size * step, size * step * shape[d]
        offset = draw.choice((0, 1, 3))
        gap = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
        buffer = torch.full((offset + max(1, size),), gap, dtype=values.dtype, device=self._device)
        laid = buffer.as_strided(shape, strides, offset)
        laid.copy_(values[tuple(slice(n) for n in shape)])
        return laid.expand(values.shape)

    def reals(self, *shape: int, dtype: torch.dtype | None = None, expand: bool = True) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return self.laid_out(values.to(dtype or self.dtype), expand)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype, expand: bool = True) -> Tensor:
        """In [low, high)."""
        values = torch.randint(low, max(high, low + 1), shape, generator=self._generator)
        return self.laid_out(values.to(dtype), expand)

    def items(self, high: int, *shape: int) -> Tensor:
        """In [-1, high)."""
        return self.integers(-1, high, *shape, dtype=self.one_of(*INDEX))

    def clients(self, count: int) -> Tensor:
        """Ids of any size."""
        dtype = self.one_of(*INDEX)
        return self.integers(0, 2 ** (31 if dtype == torch.int32 else 32), count, dtype=dtype)

    def lead(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Leading dimensions of parameters, and the shape of items: of clients', or shared."""
        if self.one_of(True, False):
            clients = self.size()
            return (clients,), (clients, self.size())
        return (), self.one_of((4,), (), (0,), (2, 3), (2, 0, 2))

    def base(self, items: int, width: int) -> Tensor | None:
        return self.reals(items, width) if self.one_of(False, True) else None

    def draw_of(self) -> dict[str, int]:
        return {"seed": self.one_of(0, 7, 2**63 - 1), "round": self.one_of(0, 3, 2**32 - 1)}

    def met(self, users: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
        """indptr, items in an order of training, and ascending; no user has met all."""
        rows = [
            torch.randperm(items, generator=self._generator)[: self.size(0, max(0, items - 1))]
            for _ in range(users)
        ]
        indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        ordered = [row.sort().values for row in rows]
        return (
            self.laid_out(indptr.to(self.one_of(*INDEX)), expand=False),
            self.laid_out(torch.cat([indptr[:0], *rows]).to(self.one_of(*INDEX)), expand=False),
            self.laid_out(torch.cat([indptr[:0], *ordered]).to(self.one_of(*INDEX)), expand=False),
        )


@dataclass
class Call:
    """The arguments of an op.

    Attributes:
        written: arguments that the op writes into, which are results too.
        results: the tensors to compare, of what the op returns.
        terms: how many roundings of the accumulator a result may be off by (see `assert_near`).
        compared: how many results, the op's and then gradients, must equal the twin's; None: all.
    """

    args: tuple[Any, ...]
    options: dict[str, Any]
    written: tuple[int, ...] = ()
    results: Callable[[Any], list[Tensor]] = tensors_in
    terms: int = 64
    compared: int | None = None
    differentiable: bool = False


def call(*args: Any, **options: Any) -> Call:
    return Call(args, options)


def differentiable(*args: Any, **options: Any) -> Call:
    return Call(args, options, differentiable=True)


def rq_lookup(d: Inputs) -> Call:
    (lead, shape), items, levels, size, width = d.lead(), d.size(), d.size(), d.size(1), d.width()
    codes = d.integers(0, size, items, levels, dtype=d.one_of(*CODES))
    return differentiable(
        d.items(items, *shape), codes, d.reals(*lead, levels, size, width), d.base(items, width)
    )


def hashes_of(d: Inputs, count: int) -> Tensor:
    return d.laid_out(ops.make_hashes(max(count, 1), seed=d.size())[:count])


def hash_buckets(d: Inputs) -> Call:
    items = d.items(d.one_of(5, 2**31 - 1), *d.lead()[1])
    return call(items, hashes_of(d, d.size(1)), d.size(1, 9))


def hash_lookup(d: Inputs) -> Call:
    (lead, shape), items, rows, width, count = d.lead(), d.size(), d.size(1), d.width(), d.size(1, 3)
    senet = None
    if d.one_of(False, True):
        hidden = d.size(1)
        senet = SENetWeights(
            d.reals(*lead, hidden, count),
            d.reals(*lead, hidden),
            d.reals(*lead, count, hidden),
            d.reals(*lead, count),
        )
    table, base = d.reals(*lead, rows, width), d.base(items, width)
    return differentiable(
        d.items(items, *shape), table, hashes_of(d, count), senet, d.one_of("mean", "sum"), base
    )


def lora_lookup(d: Inputs) -> Call:
    (lead, shape), items, rank, width = d.lead(), d.size(), d.size(1, 9), d.width()
    ids, B, base = d.items(items, *shape), d.reals(*lead, width, rank), d.base(items, width)
    if d.one_of(True, False):
        return differentiable(ids, d.reals(*lead, items, rank), B, base)
    rows = d.size(1)
    chosen = torch.where(ids.cpu() < 0, -1, d.integers(0, rows, *shape, dtype=torch.int64).cpu())
    where = d.laid_out(chosen.to(d.one_of(*INDEX)), expand=False)
    return differentiable(ids, d.reals(*lead, rows, rank), B, base, where)


def client_embedding(d: Inputs) -> Call:
    (lead, shape), rows = d.lead(), d.size()
    return differentiable(d.items(rows, *shape), d.reals(*lead, rows, d.width()))


def clients_and_positions(d: Inputs) -> tuple[tuple[int, ...], int]:
    return d.one_of((), (2,), (0,), (5,)), d.one_of(3, 0, 1, 9, 40)


def dot_scores(d: Inputs) -> Call:
    (lead, positions), width = clients_and_positions(d), d.width()
    return differentiable(d.reals(*lead, positions, width), d.reals(*lead, width))


def client_layer(d: Inputs) -> Call:
    (lead, positions), inputs, outputs = clients_and_positions(d), d.width(), d.width()
    return differentiable(
        d.reals(*lead, positions, inputs),
        d.reals(*lead, outputs, inputs),
        d.reals(*lead, outputs),
        d.items(9, *lead, positions),
        d.clients(lead[0]) if lead else d.clients(1)[0],
        d.one_of(0.0, 0.3),
        **d.draw_of(),
    )


def client_mlp(d: Inputs) -> Call:
    (lead, positions), widths = clients_and_positions(d), [d.width() for _ in range(d.one_of(2, 3, 4))]
    made = differentiable(
        d.reals(*lead, positions, widths[0]),
        tuple(d.reals(*lead, outputs, inputs) for inputs, outputs in pairwise(widths)),
        tuple(d.reals(*lead, outputs) for outputs in widths[1:]),
        d.reals(*lead, widths[-1]),
        d.items(9, *lead, positions),
        d.clients(lead[0]) if lead else d.clients(1)[0],
        d.one_of(0.0, 0.3),
        **d.draw_of(),
    )
    if d.dtype not in (torch.float32, torch.float64):
        made.terms = 2**18  # layers leave 16 bits
        made.compared = 1  # and their rounding decides whether ReLU lets a gradient through
    return made


def loss(d: Inputs) -> Call:
    lead, positions = clients_and_positions(d)
    scores = (d.reals(*lead, positions) for _ in range(2))
    return differentiable(*scores, d.items(9, *lead, positions))


def state_dtype(d: Inputs) -> torch.dtype:
    return torch.float64 if d.dtype == torch.float64 else torch.float32


def parameters(d: Inputs) -> tuple[int, ...]:
    return (d.size(), *d.one_of((), (3,), (2, 5), (0, 2), (2, 1, 40)))


def client_adam_(d: Inputs) -> Call:
    shape = parameters(d)
    moments = d.reals(*shape, dtype=state_dtype(d), expand=False)
    squares = d.reals(*shape, dtype=state_dtype(d), expand=False).square_().add_(0.1)
    steps = d.integers(0, 9, shape[0], dtype=d.one_of(*INDEX))
    param, grad = d.reals(*shape, expand=False), d.reals(*shape)
    made = call(param, grad, moments, squares, steps, lr=0.1, l2=d.one_of(0.0, 0.5))
    made.written = (0, 2, 3)
    return made


def client_sgd_(d: Inputs) -> Call:
    shape = parameters(d)
    buffer = d.reals(*shape, dtype=state_dtype(d), expand=False) if d.one_of(True, False) else None
    momentum = 0.0 if buffer is None else 0.9
    param, grad = d.reals(*shape, expand=False), d.reals(*shape)
    made = call(param, grad, buffer, lr=0.1, momentum=momentum, l2=d.one_of(0.0, 0.5))
    made.written = (0,) if buffer is None else (0, 2)
    return made


def sample_negatives(d: Inputs) -> Call:
    clients, users, items = d.size(), d.size(1), d.size(1, 9)
    indptr, _, ascending = d.met(users, items)
    ids = d.integers(0, users, clients, dtype=d.one_of(*INDEX))
    return call(d.items(items, clients, d.size()), ids, indptr, ascending, items, d.size(), **d.draw_of())


def sample_clients(d: Inputs) -> Call:
    ids = torch.randperm(d.size(0, 40), generator=d._generator)
    count = d.size(0, len(ids))
    return call(d.laid_out(ids.to(d.one_of(*INDEX)), expand=False), count, **d.draw_of(), attempt=d.size())


def sample_clients_independently(d: Inputs) -> Call:
    ids = d.laid_out(torch.randperm(d.size(0, 40), generator=d._generator).to(d.one_of(*INDEX)), expand=False)
    return call(ids, d.one_of(0.4, 0.0, 1.0), **d.draw_of(), attempt=d.size())


def client_dropout(d: Inputs) -> Call:
    shape = parameters(d)
    made = d.reals(*shape), d.clients(shape[0]), d.one_of(0.3, 0.0, 1.0)
    return differentiable(*made, **d.draw_of(), epoch=d.size(), layer=d.one_of(0, 255))


def touched_rows(d: Inputs) -> Call:
    return call(d.items(d.one_of(4, 2**31 - 1), d.size(), d.one_of(4, 0, 1, 40)))


def accumulate_updates_(d: Inputs) -> Call:
    clients, total = d.size(), d.one_of(torch.float64, d.dtype)
    weights = d.reals(clients, dtype=torch.float64)
    grid = d.one_of(0.0, 2.0**-12) if total == torch.float64 else 0.0
    if d.one_of(True, False):
        shape, rows = parameters(d)[1:], None
    else:
        shape = (d.size(1), d.width())
        rows = d.items(shape[0], clients, d.size())
    updates = d.reals(clients, *(shape if rows is None else (rows.size(1), shape[1])))
    made = call(d.reals(*shape, dtype=total, expand=False), updates, weights, rows, grid)
    made.written = (0,)
    # A 16-bit total is rounded a client at a time.
    made.terms = 64 if total == torch.float64 or d.dtype in (torch.float32, torch.float64) else 2**18
    return made


def contiguous(d: Inputs, t: Tensor) -> Tensor:
    """Contiguous, as some arguments must be, at an offset."""
    buffer = torch.full((t.numel() + 3,), 99, dtype=t.dtype, device=d._device)
    return buffer[3:].view(t.shape).copy_(t)


def apply_updates_(d: Inputs) -> Call:
    shape = parameters(d)
    rows = None
    if d.one_of(True, False):
        chosen = torch.randperm(shape[0], generator=d._generator)[: d.size(0, shape[0])]
        rows = d.laid_out(chosen.to(d.one_of(*INDEX)), expand=False)
    parameter, total = d.reals(*shape), d.reals(*shape, dtype=torch.float64)
    made = call(contiguous(d, parameter), contiguous(d, total), rows, scale=d.one_of(0.5, -2.0))
    made.written = (0, 1)
    return made


def rq_encode(d: Inputs) -> Call:
    """Whole numbers, whose distances are exact: rows equally near are equal for the twin too."""
    width, size = d.width(), d.one_of(3, 1, 16, 40, 256, 257)
    x = d.integers(-4, 5, d.one_of(3, 0, 1, 20), width, dtype=d.dtype)
    return call(x, d.integers(-4, 5, d.size(0, 3), size, width, dtype=d.dtype))


def federation(d: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of local_train from `clients` to `parts`, and options."""
    d.dtype = d.one_of(torch.float32, torch.float64)
    users, items, width = d.size(1), d.size(1, 9), d.one_of(1, 3, 8, 17, 64, 0)
    parts: dict[str, Any] = {"base": d.base(items, width)}
    if d.one_of(True, False):
        parts["table"] = d.reals(items, width)
    if d.one_of(False, True):
        rank = d.size(1)
        parts |= {"A": d.reals(items, rank), "B": d.reals(width, rank)}
    if d.one_of(False, True):
        levels, size = d.size(1), d.size(1)
        codes = d.integers(0, size, items, levels, dtype=d.one_of(*CODES))
        parts |= {"codes": codes, "codebooks": d.reals(levels, size, width)}
    if d.one_of(False, True):
        count, hidden = d.size(1, 3), d.size(1)
        parts |= {"buckets": d.reals(d.size(1), width), "hashes": hashes_of(d, count)}
        parts["reduce"] = d.one_of("mean", "sum")
        if d.one_of(False, True):
            parts["senet"] = SENetWeights(
                d.reals(hidden, count), d.reals(hidden), d.reals(count, hidden), d.reals(count)
            )
    ids = torch.randperm(users, generator=d._generator)[: d.size(0, users)]
    clients = d.laid_out(ids.to(d.one_of(*INDEX)), expand=False)
    model = (*d.met(users, items), items, d.reals(users, width), ItemParts(**parts))
    # No weight decay: it acts on rows whose gradient is not zero, which rounding decides where items share
    # vectors.
    options = {
        "epochs": d.size(1, 2),
        "batch_size": d.one_of(None, 1, 2),
        "loss": d.one_of("bpr", "bce"),
        "optimizer": d.one_of("sgd", "adam"),
        "lr": 0.01,
        # Where a gradient cancels, as of shared vectors, Adam would step along what rounding leaves of it.
        "eps": 0.1,
        "prox": d.one_of(0.0, 0.1),
        **d.draw_of(),
    }
    return (clients, *model), options


def local_train(d: Inputs) -> Call:
    args, options = federation(d)
    made = Call(args, options)
    made.results = lambda updates: list(named(updates, args[4]).values())
    return made


def local_train_sum_(d: Inputs) -> Call:
    (clients, *model), options = federation(d)
    parts: ItemParts = model[-1]
    options["grid"] = 0.0

    def zeros(t: Any) -> Any:
        return mapped(t, lambda x: contiguous(d, torch.zeros(x.shape, dtype=torch.float64, device=d._device)))

    sums = ItemSums(*map(zeros, (parts.table, parts.A, parts.B, parts.codebooks, parts.buckets, parts.senet)))
    touched = None
    if parts.table is not None or parts.A is not None:
        touched = contiguous(d, torch.zeros(model[3], dtype=torch.uint8))
    weights = d.reals(len(clients), dtype=torch.float64)
    made = Call((clients, weights, *model, sums, touched), options)
    made.written = (8, 9)
    made.results = lambda result: [result.user, result.losses, result.rows.sort().values, result.broken]
    return made


def train_round_(d: Inputs) -> Call:
    """Parameters are contiguous, since they are written."""
    (clients, *data, user, parts), options = federation(d)
    parts, user = mapped(parts, lambda x: contiguous(d, x)), contiguous(d, user)

    def zeros(t: Any) -> Any:
        return mapped(t, lambda x: contiguous(d, torch.zeros(x.shape, dtype=torch.float64, device=d._device)))

    sums = ItemSums(*map(zeros, (parts.table, parts.A, parts.B, parts.codebooks, parts.buckets, parts.senet)))
    options["weighting"] = d.one_of("samples", "uniform")
    args = (clients, d.size(0, len(clients)), *data, user, parts, sums)
    made = Call(args, options)
    made.written = (6, 7, 8)
    return made


CALLS: dict[str, Callable[[Inputs], Call]] = {
    "rq_lookup": rq_lookup,
    "hash_buckets": hash_buckets,
    "hash_lookup": hash_lookup,
    "lora_lookup": lora_lookup,
    "client_embedding": client_embedding,
    "dot_scores": dot_scores,
    "client_layer": client_layer,
    "client_mlp": client_mlp,
    "bpr_loss": loss,
    "bce_loss": loss,
    "client_adam_": client_adam_,
    "client_sgd_": client_sgd_,
    "sample_negatives": sample_negatives,
    "sample_clients": sample_clients,
    "sample_clients_independently": sample_clients_independently,
    "client_dropout": client_dropout,
    "touched_rows": touched_rows,
    "accumulate_updates_": accumulate_updates_,
    "apply_updates_": apply_updates_,
    "rq_encode": rq_encode,
    "local_train": local_train,
    "local_train_sum_": local_train_sum_,
    "train_round_": train_round_,
}


def test_every_op_is_here() -> None:
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert functions - {"make_hashes"} == CALLS.keys()


def in_double(value: Any) -> Any:
    return mapped(value, lambda t: t.double() if t.is_floating_point() else t)


def copied(value: Any) -> Any:
    return mapped(value, lambda t: t.clone(memory_format=torch.contiguous_format))


def storage(t: Tensor) -> Tensor:
    """All that is allocated for t, as elements."""
    return t.new_empty(0).set_(t.untyped_storage())


def unwritten(t: Tensor) -> Tensor:
    """The elements of t's storage that are not t's."""
    whole = storage(t)
    places = torch.arange(len(whole), device=t.device).as_strided(t.shape, t.stride(), t.storage_offset())
    mine = torch.zeros(len(whole), dtype=torch.bool, device=t.device)
    mine[places.flatten()] = True
    return whole[~mine].clone()


def run(
    function: Callable[..., Any], made: Call, args: tuple[Any, ...], strided: bool = False
) -> list[Tensor]:
    """What it returns, what it writes, and the gradients of all floating arguments, which it leaves as they
    are."""
    written = [t for i in made.written for t in tensors_in(args[i])]
    rest = [t for t in tensors_in(args) if not any(t is w for w in written)]
    before = [storage(t).clone() for t in rest], [unwritten(t) for t in written]
    if made.differentiable:
        args = mapped(args, lambda t: t.detach().requires_grad_(t.is_floating_point()))
    results = made.results(function(*args, **made.options))
    inputs = [t for t in tensors_in(args) if t.requires_grad]
    if inputs:
        cotangent = cotangent_of(results[0])
        if strided and cotangent.dim() > 0:
            cotangent = cotangent.movedim(-1, 0).contiguous().movedim(0, -1)
        results += torch.autograd.grad(results[0], inputs, cotangent)
    after = [storage(t) for t in rest], [unwritten(t) for t in written]
    for old, new in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert torch.equal(bits(old), bits(new))
    return [*results, *written]


@pytest.mark.parametrize("name", CALLS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_layout(name: str, data: st.DataObject, target: Any) -> None:
    if target.device.type == "cuda" and name in CPU_ALONE:
        pytest.skip("serves the CPU alone")
    inputs = Inputs(data, target.device)
    made = CALLS[name](inputs)
    exact = run(getattr(reference, name), made, in_double(copied(made.args)))
    plain = run(getattr(target.ops, name), made, copied(made.args))
    strided = run(getattr(target.ops, name), made, made.args, strided=True)
    compared = len(exact) if made.compared is None else made.compared
    for i, (mine, same, expected) in enumerate(zip(strided, plain, exact, strict=True)):
        assert (mine.shape, mine.dtype) == (same.shape, same.dtype)
        # Of GPU kernels, alignment decides how much a lane reads at once, and so the order of some sums.
        if target.name == "cpu":
            assert torch.equal(bits(mine), bits(same))
        assert mine.shape == expected.shape
        if i < compared:
            assert_equals(mine, expected, inputs.dtype, made.terms)
