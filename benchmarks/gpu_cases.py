"""Every op as a benchmark case: the call, the leaves that take a gradient, the bytes that each direction must
move, and PyTorch's own op for the same thing where there is one.

Bytes are the least that any implementation moves: each input byte that is needed once, however often it is
used, and each output byte once. So a kernel that serves repeats from a cache gets no credit for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """C clients of P positions, I items, width D; L codebooks of K codes; M buckets and H hashes; SENet width
    S; rank r; R rows a client holds; N rows to encode; W positions of a loss; E epochs of negatives."""

    C: int
    P: int
    I: int
    D: int
    L: int
    K: int
    M: int
    H: int
    S: int
    r: int
    R: int
    N: int
    W: int
    E: int


# Every case moves more than the largest L2 (an H200's is 60 MB, a B200's 126 MB).
LARGE = Sizes(4096, 256, 1 << 20, 64, 4, 256, 512, 4, 16, 8, 256, 1 << 18, 4096, 4)
# A small round: kernels take less time than their launch.
SMALL = Sizes(64, 64, 2000, 64, 4, 32, 128, 2, 8, 4, 64, 512, 64, 2)
# Share of gradients that agree behind ReLU: of many units a few are so near zero that another order of their
# sum has another sign.
RECTIFIED = 0.98
# For checks: all ways through the kernels that tiny arguments can take, odd widths among them; and those
# where a block copies into shared memory a client's table, or its gradients, some or all of their columns,
# which take clients for all of a device (here of up to 148 multiprocessors).
CHECKS = (
    Sizes(4, 40, 50, 16, 3, 5, 7, 2, 4, 4, 9, 70, 40, 2),
    Sizes(3, 11, 20, 7, 2, 40, 60, 3, 5, 3, 11, 33, 11, 1),
    Sizes(2, 1100, 300, 33, 2, 4, 300, 2, 3, 5, 200, 40, 5000, 1),
    Sizes(150, 300, 50, 36, 2, 40, 60, 3, 5, 3, 30, 33, 5, 1),
    Sizes(1200, 260, 64, 24, 3, 5, 7, 2, 4, 4, 60, 33, 5, 1),
)


@dataclass(frozen=True)
class Case:
    """`call(ops)` returns the op's output, or None where it works in place on `state`."""

    call: Callable[[Any], Any]
    inputs: tuple[Tensor, ...]  # the floating tensors that it reads
    forward_bytes: int
    leaves: tuple[Tensor, ...] = ()  # those of the inputs that take a gradient
    backward_bytes: int = 0
    state: tuple[Tensor, ...] = ()
    native: Callable[[], Tensor] | None = None  # the same numbers by one op of PyTorch
    native_name: str = ""
    compiles: bool = True  # whether torch.compile takes the twin
    slow_twin: bool = False  # takes seconds at large shapes: it is asked at small ones alone
    agreement: float = 1.0  # share of the elements that must equal the twin's, floats within the tolerance
    capturable: str = ""  # why a CUDA graph cannot hold it
    flops: int = 0
    tolerance: float = 1e-4


@dataclass
class Draw:
    """Random tensors on a device."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def floats(self, *shape: int) -> Tensor:
        options: dict[str, Any] = {"generator": self.generator, "device": self.device}
        return torch.randn(shape, **options, dtype=torch.float32).to(self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.floats(*shape).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rows_read(index: Tensor, table: Tensor) -> int:
    """Bytes of the distinct rows of `table` (its last dimension) that flat `index` reads."""
    return int(torch.unique(index).numel()) * table.size(-1) * table.element_size()


def per_client(index: Tensor, rows: int) -> Tensor:
    """index [C, P, ...] into each client's table of `rows` rows as an index into all clients' tables."""
    first = torch.arange(index.size(0), device=index.device) * rows
    return index + first.view(-1, *[1] * (index.dim() - 1))


def _rq(s: Sizes, draw: Draw, shared: bool) -> Case:
    items = draw.integers(s.I, s.C, s.P)
    codes = draw.integers(s.K, s.I, s.L).to(torch.uint8)
    codebooks = draw.leaf(s.L, s.K, s.D) if shared else draw.leaf(s.C, s.L, s.K, s.D)
    base = None if shared else draw.floats(s.I, s.D)
    index = codes[items].long() + s.K * torch.arange(s.L, device=items.device)  # [C, P, L]
    flat = index if shared else per_client(index, s.L * s.K)
    table = codebooks.detach().flatten(0, -2)
    out = items.numel() * s.D * codebooks.element_size()
    lookups = size(items) + rows_read(items, codes)
    forward = lookups + rows_read(flat, table) + out + (0 if base is None else rows_read(items, base))
    return Case(
        lambda o: o.rq_lookup(items, codes, codebooks, base),
        (codebooks,),
        forward,
        (codebooks,),
        lookups + out + size(codebooks),
        native=(lambda: F.embedding_bag(flat.flatten(0, 1), codebooks.flatten(0, -2), mode="sum"))
        if shared
        else None,
        native_name="embedding_bag",
    )


def _hash(s: Sizes, draw: Draw, kind: str) -> Case:
    from fedpeft_ext import reference

    shared = kind == "shared"
    items, base = draw.integers(s.I, s.C, s.P), None if shared else draw.floats(s.I, s.D)
    hashes = reference.make_hashes(s.H, seed=0).to(items.device)
    lead = () if shared else (s.C,)
    table = draw.leaf(*lead, s.M, s.D)
    senet = None
    if kind == "senet":
        shapes = ((s.S, s.H), (s.S,), (s.H, s.S), (s.H,))
        senet = reference.SENetWeights(*(draw.leaf(*lead, *shape) for shape in shapes))
    buckets = reference.hash_buckets(items, hashes, s.M)  # [C, P, H]
    flat = buckets if shared else per_client(buckets, s.M)
    out = items.numel() * s.D * table.element_size()
    weights = () if senet is None else tuple(senet)
    reduce = "sum" if shared else "mean"
    forward = size(items, *weights) + rows_read(flat, table) + out
    forward += 0 if base is None else rows_read(items, base)
    backward = size(items, *weights) * 2 + out + size(table)
    return Case(
        lambda o: o.hash_lookup(items, table, hashes, senet, reduce, base),
        (table, *weights),
        forward,
        (table, *weights),
        # The gradient of the gates needs the rows themselves.
        backward + (rows_read(flat, table) if senet else 0),
        native=(lambda: F.embedding_bag(buckets.flatten(0, 1), table, mode="sum")) if shared else None,
        native_name="embedding_bag",
        agreement=RECTIFIED if senet else 1.0,
        tolerance=1e-3,
    )


def _buckets(s: Sizes, draw: Draw) -> Case:
    from fedpeft_ext import reference

    items = draw.integers(s.I, s.C, 4 * s.P)
    hashes = reference.make_hashes(s.H, seed=0).to(items.device)
    return Case(
        lambda o: o.hash_buckets(items, hashes, s.M), (), size(items) + items.numel() * s.H * 8, tolerance=0
    )


def _lora(s: Sizes, draw: Draw) -> Case:
    items, rows = draw.integers(s.I, s.C, s.P), draw.integers(s.R, s.C, s.P)
    A, B, base = draw.leaf(s.C, s.R, s.r), draw.leaf(s.C, s.D, s.r), draw.floats(s.I, s.D)
    read = rows_read(per_client(rows, s.R), A)
    out = items.numel() * s.D * A.element_size()
    return Case(
        lambda o: o.lora_lookup(items, A, B, base, rows),
        (A, B),
        size(items, rows, B) + read + rows_read(items, base) + out,
        (A, B),
        size(rows, B) + read + out + size(A, B),
        tolerance=1e-3,
    )


def _embedding(s: Sizes, draw: Draw) -> Case:
    rows, weight = draw.integers(s.R, s.C, s.P), draw.leaf(s.C, s.R, s.D)
    flat = per_client(rows, s.R)
    out = rows.numel() * s.D * weight.element_size()
    return Case(
        lambda o: o.client_embedding(rows, weight),
        (weight,),
        size(rows) + rows_read(flat, weight) + out,
        (weight,),
        size(rows) + out + size(weight),
        native=lambda: F.embedding(flat, weight.flatten(0, 1)),
        native_name="embedding",
    )


def _scores(s: Sizes, draw: Draw) -> Case:
    vectors, user = draw.leaf(s.C, s.P, s.D), draw.leaf(s.C, s.D)
    out = s.C * s.P * vectors.element_size()
    return Case(
        lambda o: o.dot_scores(vectors, user),
        (vectors, user),
        size(vectors, user) + out,
        (vectors, user),
        2 * size(vectors, user) + out,
        native=lambda: torch.bmm(vectors, user.unsqueeze(2)).squeeze(2),
        native_name="bmm",
        tolerance=1e-3,
    )


def _layer(s: Sizes, draw: Draw) -> Case:
    x, weight, bias = draw.leaf(s.C, s.P, s.D), draw.leaf(s.C, s.D, s.D), draw.leaf(s.C, s.D)
    items, clients = draw.integers(s.I, s.C, s.P), torch.arange(s.C, device=x.device)
    return Case(
        lambda o: o.client_layer(x, weight, bias, items, clients, 0.5, 1, 2, 3, 4),
        (x, weight, bias),
        2 * size(x) + size(weight, bias, items),
        (x, weight, bias),
        4 * size(x) + 2 * size(weight, bias) + size(items),
        flops=2 * s.C * s.P * s.D * s.D,
        agreement=RECTIFIED,
        tolerance=1e-3,
    )


def _mlp(s: Sizes, draw: Draw) -> Case:
    widths = (s.D, s.D, 2 * s.D, s.D)
    x, output = draw.leaf(s.C, s.P, s.D), draw.leaf(s.C, s.D)
    weights = [draw.leaf(s.C, o, i) for i, o in pairwise(widths)]
    biases = [draw.leaf(s.C, o) for o in widths[1:]]
    items, clients = draw.integers(s.I, s.C, s.P), torch.arange(s.C, device=x.device)
    trained = (x, output, *weights, *biases)
    between = s.C * s.P * x.element_size()  # a column of what a layer leaves, for all
    forward = size(*trained, items) + 2 * between * sum(widths[1:])
    return Case(
        lambda o: o.client_mlp(x, weights, biases, output, items, clients, 0.5, 1, 2, 3),
        trained,
        forward,
        trained,
        2 * forward,
        flops=2 * s.C * s.P * sum(i * o for i, o in pairwise(widths)),
        agreement=RECTIFIED,
        tolerance=1e-3,
    )


def _loss(s: Sizes, draw: Draw, name: str) -> Case:
    positive, negative = draw.leaf(s.C, s.W), draw.leaf(s.C, s.W)
    items = draw.integers(s.I, s.C, s.W)
    return Case(
        lambda o: getattr(o, name)(positive, negative, items),
        (positive, negative),
        size(positive, negative, items),
        (positive, negative),
        2 * size(positive, negative) + size(items),
    )


def _adam(s: Sizes, draw: Draw) -> Case:
    param, grad = draw.floats(s.C, s.M, s.D), draw.floats(s.C, s.M, s.D)
    mean, square = torch.zeros_like(param), torch.zeros_like(param)
    if param.dtype in (torch.float16, torch.bfloat16):
        mean, square = mean.float(), square.float()
    steps = torch.ones(s.C, dtype=torch.int64, device=param.device)
    return Case(
        lambda o: o.client_adam_(param, grad, mean, square, steps, l2=1e-4),
        (grad,),
        size(param, mean, square) * 2 + size(grad),
        state=(param, mean, square),
        tolerance=1e-3,
    )


def _sgd(s: Sizes, draw: Draw) -> Case:
    param, grad = draw.floats(s.C, s.M, s.D), draw.floats(s.C, s.M, s.D)
    buffer = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
    return Case(
        lambda o: o.client_sgd_(param, grad, buffer, momentum=0.9),
        (grad,),
        size(param, buffer) * 2 + size(grad),
        state=(param, buffer),
        tolerance=1e-3,
    )


def _negatives(s: Sizes, draw: Draw) -> Case:
    met = min(s.P, s.I // 2)
    # Distinct and ascending within a user: one of each stretch of items.
    stretch = s.I // met
    indices = (draw.integers(stretch, s.C, met) + stretch * torch.arange(met, device=draw.device)).flatten()
    indptr = torch.arange(s.C + 1, device=draw.device) * met
    clients, items = torch.arange(s.C, device=draw.device), draw.integers(s.I, s.C, s.P)
    return Case(
        lambda o: o.sample_negatives(items, clients, indptr, indices, s.I, s.E, seed=1, round=2),
        (),
        size(items, clients, indptr, indices) + size(items) * s.E,
        compiles=False,  # its twin is NumPy
        tolerance=0,
    )


def _dropout(s: Sizes, draw: Draw) -> Case:
    x, clients = draw.leaf(s.C, s.P, s.D), torch.arange(s.C, device=draw.device)
    return Case(
        lambda o: o.client_dropout(x, clients, 0.3, seed=1, round=2),
        (x,),
        2 * size(x),
        (x,),
        2 * size(x),
    )


def _touched(s: Sizes, draw: Draw) -> Case:
    items = draw.integers(s.I, s.C, 4 * s.P)
    return Case(
        lambda o: o.touched_rows(items),
        (),
        3 * size(items),
        compiles=False,  # the size of its output is a value
        tolerance=0,
        capturable="the number of rows is a result: it waits for the device to know the size of its output",
    )


def _accumulate(s: Sizes, draw: Draw, by_row: bool) -> Case:
    updates = draw.floats(s.C, s.R, s.D)
    weights = torch.rand(s.C, generator=draw.generator, device=draw.device, dtype=torch.float64)
    if not by_row:
        total = torch.zeros(s.R, s.D, dtype=torch.float64, device=draw.device)
        rows = None
        moved = size(updates, weights) + 2 * size(total)
    else:
        total = torch.zeros(s.I, s.D, dtype=torch.float64, device=draw.device)
        stretch = max(s.I // s.R, 1)
        rows = draw.integers(stretch, s.C, s.R) + stretch * torch.arange(s.R, device=draw.device)
        rows = rows.clamp(max=s.I - 1)
        moved = size(updates, weights, rows) + 2 * rows_read(rows, total)
    return Case(
        lambda o: o.accumulate_updates_(total, updates, weights, rows),
        (updates,),
        moved,
        state=(total,),
        compiles=False,  # its twin loops over the clients
    )


def _apply(s: Sizes, draw: Draw, by_row: bool) -> Case:
    parameter = draw.floats(s.I, s.D)
    total = draw.floats(s.I, s.D).double()
    rows = torch.arange(0, s.I, 2, device=draw.device) if by_row else None
    moved = 2 * size(parameter, total)
    return Case(
        lambda o: o.apply_updates_(parameter, total, rows, scale=0.5),
        (),
        moved if rows is None else moved // s.I * len(rows) + size(rows),
        state=(parameter, total),
    )


def _clients(s: Sizes, draw: Draw, few: bool) -> Case:
    clients = torch.arange(16 * s.I, device=draw.device)
    count = len(clients) // (100 if few else 4)  # of few places are drawn, of many keys
    return Case(
        lambda o: o.sample_clients(clients, count, seed=1, round=2),
        (),
        (len(clients) // 8 + 16 * count) if few else (size(clients) + 8 * count),
        compiles=False,  # its twin is NumPy
        slow_twin=True,
        tolerance=0,
    )


def _independent(s: Sizes, draw: Draw) -> Case:
    clients = torch.arange(16 * s.I, device=draw.device)
    return Case(
        lambda o: o.sample_clients_independently(clients, 0.1, seed=1, round=2),
        (),
        size(clients) + size(clients) // 10,
        compiles=False,  # its twin is NumPy
        slow_twin=True,
        capturable="it waits for the device to know how many were chosen",
        tolerance=0,
    )


def _encode(s: Sizes, draw: Draw) -> Case:
    x, codebooks = draw.floats(s.N, s.D), draw.floats(s.L, s.K, s.D)
    return Case(
        lambda o: o.rq_encode(x, codebooks),
        (x, codebooks),
        size(x, codebooks) + s.N * s.L,
        # Two codes may be as near as rounding can tell, and then all later levels differ.
        agreement=0.98,
        flops=2 * s.N * s.L * s.K * s.D,
    )


def _train(s: Sizes, draw: Draw, kind: str, graph: bool = False, mlp: str = "") -> Case:
    from fedpeft_ext import reference

    count, steps = max(s.C // 4, 2), 2  # clients, each of met items; epochs
    met = min(s.P, s.I // 4)
    stretch = s.I // met
    positives = (
        draw.integers(stretch, count, met) + stretch * torch.arange(met, device=draw.device)
    ).flatten()
    indptr, clients = (
        torch.arange(count + 1, device=draw.device) * met,
        torch.arange(count, device=draw.device),
    )
    half = draw.dtype in (torch.float16, torch.bfloat16)  # which it does not train in
    numbers = Draw(draw.device, torch.float32) if half else draw
    user = numbers.floats(count, 0 if mlp == "own" else s.D)
    base = numbers.floats(s.I, s.D)
    layers: list[Tensor] = []
    if mlp:
        widths = (user.size(1) + s.D, s.D, 2 * s.D, s.D)  # FedNCF's three, with D for 64
        shapes = [shape for i, o in pairwise(widths) for shape in ((o, i), (o,))]
        lead = (count,) if mlp == "own" else ()
        layers = [numbers.floats(*lead, *shape) / shape[-1] ** 0.5 for shape in (*shapes, (s.D,))]
    trained: dict[str, Tensor] = {}
    codes = hashes = None
    if kind == "LoRA":
        trained = {"A": numbers.floats(s.I, s.r), "B": numbers.floats(s.D, s.r)}
    elif kind == "RQ":
        trained = {"codebooks": numbers.floats(s.L, s.K, s.D)}
        codes = numbers.integers(s.K, s.I, s.L).to(torch.uint8)
    else:
        trained = {"buckets": numbers.floats(s.M, s.D)}
        hashes = reference.make_hashes(s.H, seed=0).to(draw.device)

    def call(o: Any) -> tuple[Tensor, ...]:
        parts = o.ItemParts(base=base, codes=codes, hashes=hashes, **trained)
        with torch.enable_grad():  # which the twin uses, whoever calls it
            updates = o.local_train(
                *(clients, indptr, positives, positives, s.I, user, parts),
                epochs=steps,
                optimizer="sgd",
                lr=0.1,
                graph=graph,
                mlp=layers,
                dropout=0.5 if mlp else 0.0,
                seed=1,
                round=2,
            )
        # Without the rows of A, whose order is the op's own.
        named = tuple(getattr(updates, name) for name in ("user", "losses", *trained) if name != "A")
        return (*named, *updates.mlp)

    def read(table: Tensor) -> int:
        # Positives and negatives, nearly all of them different rows.
        return min(count * met * (1 + steps), s.I) * table.size(1) * table.element_size()

    whole = [t for name, t in trained.items() if name != "A"]
    moved = 2 * size(positives, user) + read(base) + sum(size(t) * (1 + count) for t in whole)
    moved += size(*layers) * (2 if mlp == "own" else 1 + count)
    if "A" in trained:
        moved += read(trained["A"]) + count * met * (1 + steps) * (8 + s.r * user.element_size())
    weights = sum(t.numel() for t in layers) // (count if mlp == "own" else 1)
    return Case(
        call,
        (user, base, *trained.values(), *layers),
        moved + (0 if codes is None else read(codes)),
        compiles=False,  # its twin loops over the clients
        slow_twin=True,
        capturable="it waits for the device to know its clients' sizes, and for errors",
        flops=6 * 2 * count * met * steps * weights,  # forward, and the gradients of weights and inputs
        tolerance=1e-3,
    )


def _long(make: Callable[[Sizes, Draw], Case]) -> Callable[[Sizes, Draw], Case]:
    """Fewer clients with longer lists, which take other ways through the gradients."""

    def build(s: Sizes, draw: Draw) -> Case:
        longer = replace(s, C=max(s.C // 8, 1), P=min(8 * s.P, 2048))
        return replace(make(longer, draw), compiles=False)

    return build


CASES: dict[str, Callable[[Sizes, Draw], Case]] = {
    "rq_lookup": lambda s, d: _rq(s, d, False),
    "rq_lookup, shared": lambda s, d: _rq(s, d, True),
    "hash_lookup": lambda s, d: _hash(s, d, "plain"),
    "hash_lookup, shared": lambda s, d: _hash(s, d, "shared"),
    "hash_lookup, SENet": lambda s, d: _hash(s, d, "senet"),
    "rq_lookup, long lists": _long(lambda s, d: _rq(s, d, False)),
    "hash_lookup, long lists": _long(lambda s, d: _hash(s, d, "plain")),
    "lora_lookup, long lists": _long(_lora),
    "hash_buckets": _buckets,
    "lora_lookup": _lora,
    "client_embedding": _embedding,
    "client_layer": _layer,
    "client_mlp": _mlp,
    "dot_scores": _scores,
    "bpr_loss": lambda s, d: _loss(s, d, "bpr_loss"),
    "bce_loss": lambda s, d: _loss(s, d, "bce_loss"),
    "client_adam_": _adam,
    "client_sgd_": _sgd,
    "sample_negatives": _negatives,
    "client_dropout": _dropout,
    "touched_rows": _touched,
    "accumulate_updates_": lambda s, d: _accumulate(s, d, False),
    "accumulate_updates_, rows": lambda s, d: _accumulate(s, d, True),
    "apply_updates_": lambda s, d: _apply(s, d, False),
    "apply_updates_, rows": lambda s, d: _apply(s, d, True),
    "sample_clients": lambda s, d: _clients(s, d, False),
    "sample_clients, few": lambda s, d: _clients(s, d, True),
    "sample_clients_independently": _independent,
    "rq_encode": _encode,
    "local_train, LoRA": lambda s, d: _train(s, d, "LoRA"),
    "local_train, RQ": lambda s, d: _train(s, d, "RQ"),
    "local_train, hash": lambda s, d: _train(s, d, "hash"),
    "local_train, graph with LoRA": lambda s, d: _train(s, d, "LoRA", graph=True),
    "local_train, MLP with LoRA": lambda s, d: _train(s, d, "LoRA", mlp="shared"),
    "local_train, own MLPs with RQ": lambda s, d: _train(s, d, "RQ", mlp="own"),
}
