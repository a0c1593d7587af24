"""Every op beside its plain-PyTorch twin and the best that PyTorch itself offers for the same inputs.

    make bench                                                     # with bench_engines.py, a table at the end
    python -m pytest benchmarks/bench_kernels.py -o python_files='bench_*.py' -q -k rq_lookup
    ... --results                                                  # write benchmarks/results/cpu-<machine>.*

A case is an op, a shape, a direction and a number of threads. Contenders take turns, so that what else the
machine does hits all alike: in each of pytest-benchmark's rounds of the op every rival runs and is timed
once, all in an order drawn anew, for what ran before decides what lies in the caches. They also share their
tensors, since a tensor's place in memory alone changes times by 8 %. Rivals start from the same inputs as the
op, but may have made a table of each item's rows (its codes or buckets) once before. The bound, where there
is one, is no rival: PyTorch's lookup alone, which gets the flat index of every row of this very batch for
free. Ops are called through their public functions, checks included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft_ext import ops, reference

SECONDS = 0.1  # a case's measurement, about
ROUNDS = (7, 60)  # fewest and most
BOUND = "ready indices"


@dataclass(frozen=True)
class Shape:
    """C clients (None: all positions share one set of parameters), P positions a client, L levels of K codes,
    width D, I items."""

    name: str
    C: int | None
    P: int
    L: int
    K: int
    D: int
    I: int
    dtype: torch.dtype = torch.float32

    @property
    def clients(self) -> int:
        return self.C or 1

    def parameter(self, *shape: int) -> Tensor:
        lead = () if self.C is None else (self.C,)
        return torch.randn(*lead, *shape).to(self.dtype)

    def items(self) -> Tensor:
        return torch.randint(self.I, (self.P,) if self.C is None else (self.C, self.P))

    def flat(self, rows_of: Tensor | None, items: Tensor, rows: int) -> Tensor:
        """Each position's rows (those of its item in the table rows_of, or the items themselves) as indices
        into all clients' rows, `rows` a client.
        """
        index = items if rows_of is None else rows_of[items]
        if self.C is None:
            return index
        offset = torch.arange(self.C) * rows
        return index + offset.reshape(-1, *[1] * (index.dim() - 1))


SHAPES = [
    Shape("256 clients, 64 rows", 256, 64, 4, 64, 64, 5000),
    Shape("1000 small clients", 1000, 20, 3, 64, 32, 100_000),
    Shape("16 large clients", 16, 1000, 4, 256, 128, 100_000),
    Shape("shared, 20000 rows", None, 20_000, 4, 256, 64, 100_000),
    Shape("D = 50", 94, 210, 3, 128, 50, 1682),
    Shape("float64", 94, 128, 3, 128, 32, 1682, torch.float64),
    Shape("bfloat16", 94, 128, 3, 128, 64, 1682, torch.bfloat16),
]


@dataclass
class Contest:
    """What is timed. `tolerance`: how far rivals' results may be off; None where they draw other numbers, or
    change their arguments. `agreement`: the share of elements that must be so near."""

    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any]]
    tolerance: float | None = 1e-4
    bound: Callable[[], Any] | None = None
    agreement: float = 1.0


@dataclass
class Lookup:
    """A differentiable function of `parameters`; rivals take and return tensors of the same shapes."""

    ours: Callable[..., Tensor]
    rivals: dict[str, Callable[..., Tensor]]
    parameters: list[Tensor] = field(default_factory=list)
    bound: Callable[..., Tensor] | None = None
    agreement: float = 1.0  # of gradients

    def forward(self) -> Contest:
        def bind(f: Callable[..., Tensor]) -> Callable[[], Tensor]:
            return lambda: f(*self.parameters)

        rivals = {name: bind(f) for name, f in self.rivals.items()}
        return Contest(bind(self.ours), rivals, bound=self.bound and bind(self.bound))

    def backward(self) -> Contest:
        leaves = [p.clone().requires_grad_() for p in self.parameters]
        out_grad = torch.randn_like(self.ours(*self.parameters))

        def bind(f: Callable[..., Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(f(*leaves), leaves, out_grad)

        rivals = {name: bind(f) for name, f in self.rivals.items()}
        return Contest(bind(self.ours), rivals, 1e-3, self.bound and bind(self.bound), self.agreement)


def rq_lookup(s: Shape) -> Lookup:
    items, codes = s.items(), torch.randint(s.K, (s.I, s.L)).to(torch.uint8)
    rows_of = codes.long() + torch.arange(s.L) * s.K

    def flat() -> Tensor:
        return s.flat(rows_of, items, s.L * s.K).reshape(-1, s.L)

    ready = flat()

    def bag(codebooks: Tensor, index: Tensor) -> Tensor:
        return F.embedding_bag(index, codebooks.reshape(-1, s.D), mode="sum").reshape(*items.shape, s.D)

    return Lookup(
        lambda books: ops.rq_lookup(items, codes, books),
        {
            "twin": lambda books: reference.rq_lookup(items, codes, books),
            "embedding_bag": lambda books: bag(books, flat()),
        },
        [s.parameter(s.L, s.K, s.D)],
        lambda books: bag(books, ready),
    )


def hash_lookup(s: Shape, reduce: Any, senet: bool = False) -> Lookup:
    M, H, S = s.L * s.K, 3 if reduce == "sum" else 2, 16
    items, hashes = s.items(), ops.make_hashes(H, 0)
    rows_of = ops.hash_buckets(torch.arange(s.I), hashes, M)

    def flat() -> Tensor:
        return s.flat(rows_of, items, M).reshape(-1, H)

    ready = flat()

    def bag(table: Tensor, index: Tensor) -> Tensor:
        return F.embedding_bag(index, table.reshape(-1, s.D), mode=reduce).reshape(*items.shape, s.D)

    def gated(index: Tensor, table: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        rows = F.embedding(index, table.reshape(-1, s.D)).reshape(*items.shape, H, s.D)
        if s.C is None:
            hidden = F.linear(rows.mean(-1), w1, b1).relu()
            gate = F.linear(hidden, w2, b2).sigmoid()
        else:
            hidden = torch.baddbmm(b1.unsqueeze(1), rows.mean(-1), w1.mT).relu()
            gate = torch.baddbmm(b2.unsqueeze(1), hidden, w2.mT).sigmoid()
        return (gate.unsqueeze(-2) @ rows).squeeze(-2)

    parameters = [s.parameter(M, s.D)]
    if senet:
        parameters += [s.parameter(S, H), s.parameter(S), s.parameter(H, S), s.parameter(H)]

    def of(space: Any) -> Callable[..., Tensor]:
        def run(table: Tensor, *weights: Tensor) -> Tensor:
            gates = ops.SENetWeights(*weights) if weights else None
            out: Tensor = space.hash_lookup(items, table, hashes, gates, reduce)
            return out

        return run

    if senet:
        return Lookup(
            of(ops),
            {"twin": of(reference), "embedding and matmul": lambda *p: gated(flat(), *p)},
            parameters,
            lambda *p: gated(ready, *p),
            0.99,  # of many hidden values a few are so near zero that ReLU takes another side of them
        )
    return Lookup(
        of(ops),
        {"twin": of(reference), "embedding_bag": lambda table: bag(table, flat())},
        parameters,
        lambda table: bag(table, ready),
    )


def lora_lookup(s: Shape, rank: int = 4) -> Lookup:
    rows = min(s.P, s.I)
    items = torch.randint(rows, s.items().shape)
    ready = s.flat(None, items, rows)

    def matmul(A: Tensor, B: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, A.reshape(-1, rank)) @ B.mT

    return Lookup(
        lambda A, B: ops.lora_lookup(items, A, B),
        {
            "twin": lambda A, B: reference.lora_lookup(items, A, B),
            "embedding and matmul": lambda A, B: matmul(A, B, s.flat(None, items, rows)),
        },
        [s.parameter(rows, rank), s.parameter(s.D, rank)],
        lambda A, B: matmul(A, B, ready),
    )


def client_embedding(s: Shape) -> Lookup:
    rows = min(s.P, s.I)
    items = torch.randint(rows, s.items().shape)
    ready = s.flat(None, items, rows)

    def embedding(weight: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, weight.reshape(-1, s.D))

    return Lookup(
        lambda weight: ops.client_embedding(items, weight),
        {
            "twin": lambda weight: reference.client_embedding(items, weight),
            "embedding": lambda weight: embedding(weight, s.flat(None, items, rows)),
        },
        [s.parameter(rows, s.D)],
        lambda weight: embedding(weight, ready),
    )


def dot_scores(s: Shape) -> Lookup:
    return Lookup(
        ops.dot_scores,
        {
            "twin": reference.dot_scores,
            "matmul": lambda vectors, user: (vectors @ user.unsqueeze(-1)).squeeze(-1),
            "multiply and sum": lambda vectors, user: (vectors * user.unsqueeze(-2)).sum(-1),
        },
        [s.parameter(s.P, s.D), s.parameter(s.D)],
    )


def loss(s: Shape, name: str) -> Lookup:
    items = s.items()
    mask = torch.ones_like(items, dtype=s.dtype)

    def masked(positive: Tensor, negative: Tensor) -> Tensor:
        if name == "bpr_loss":
            terms = -F.logsigmoid(positive - negative)
        else:
            terms = 0.5 * (F.softplus(-positive) + F.softplus(negative))
        return (terms * mask).sum(-1) / mask.sum(-1)

    return Lookup(
        lambda positive, negative: getattr(ops, name)(positive, negative, items),
        {
            "twin": lambda positive, negative: getattr(reference, name)(positive, negative, items),
            "logsigmoid or softplus": masked,
        },
        [s.parameter(s.P), s.parameter(s.P)],
    )


def rq_encode(s: Shape) -> Contest:
    x, books = torch.randn(4000, s.D).to(s.dtype), torch.randn(s.L, s.K, s.D).to(s.dtype)

    def nearest() -> Tensor:
        residual, codes = x, []
        for book in books:
            code = torch.addmm(book.square().sum(1) * -0.5, residual, book.T).argmax(1)
            codes.append(code)
            residual = residual - book[code]
        return torch.stack(codes, 1)

    return Contest(
        lambda: ops.rq_encode(x, books),
        {"twin": lambda: reference.rq_encode(x, books), "addmm and argmax": nearest},
        None,
    )


def client_adam_(s: Shape) -> Contest:
    values = s.parameter(s.L * s.K, s.D)
    values = values.unsqueeze(0) if s.C is None else values
    wide = values.double() if s.dtype == torch.float64 else values.float()
    state = [values, 0.01 * torch.randn_like(values), torch.zeros_like(wide), torch.zeros_like(wide)]
    fused = [t.to(s.dtype) for t in state]  # torch's kernel keeps moments in the dtype of parameters
    steps, step = torch.ones(s.clients, dtype=torch.int64), torch.ones(())

    def torch_fused() -> None:
        param, grad, exp_avg, exp_avg_sq = fused
        torch._fused_adam_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    return Contest(
        lambda: ops.client_adam_(*state, steps),
        {"twin": lambda: reference.client_adam_(*state, steps), "torch._fused_adam_": torch_fused},
        None,
    )


def client_sgd_(s: Shape) -> Contest:
    param = s.parameter(s.L * s.K, s.D).reshape(s.clients, -1, s.D)
    grad = torch.randn_like(param)

    def torch_fused() -> None:
        torch._fused_sgd_(
            [param],
            [grad],
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=1e-6,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    return Contest(
        lambda: ops.client_sgd_(param, grad, lr=1e-6),
        {
            "twin": lambda: reference.client_sgd_(param, grad, lr=1e-6),
            "add_": lambda: param.add_(grad, alpha=-1e-6),
            "torch._fused_sgd_": torch_fused,
        },
        None,
    )


def sample_negatives(s: Shape) -> Contest:
    clients, positives = torch.arange(s.clients), min(s.P, s.I // 4)
    generator = np.random.default_rng(0)
    met = np.stack([np.sort(generator.choice(s.I, positives, replace=False)) for _ in range(s.clients)])
    sorted_items = torch.from_numpy(met)
    items = sorted_items[:, torch.randint(positives, (s.P,))]
    indptr, indices = torch.arange(s.clients + 1) * positives, sorted_items.flatten()
    gaps = sorted_items - torch.arange(positives)

    def search() -> Tensor:
        k = torch.randint(s.I - positives, items.shape)
        return k + torch.searchsorted(gaps, k, right=True)

    def arguments(space: Any) -> Callable[[], Any]:
        return lambda: space.sample_negatives(items, clients, indptr, indices, s.I, 1, 0, 0)

    return Contest(arguments(ops), {"twin": arguments(reference), "randint and searchsorted": search}, None)


def client_dropout(s: Shape) -> Contest:
    x, clients = s.parameter(s.P, s.D).reshape(s.clients, s.P, s.D), torch.arange(s.clients)
    return Contest(
        lambda: ops.client_dropout(x, clients, 0.3, 0, 0),
        {
            "twin": lambda: reference.client_dropout(x, clients, 0.3, 0, 0),
            "F.dropout": lambda: F.dropout(x, 0.3),
        },
        None,
    )


def touched_rows(s: Shape) -> Contest:
    items = s.items().reshape(s.clients, s.P)

    def by_sort() -> tuple[Tensor, Tensor]:
        values, order = items.sort(1)
        new = F.pad(values[:, 1:] != values[:, :-1], (1, 0), value=True)
        rank = new.cumsum(1) - 1
        rows = torch.full((s.clients, int(rank.max()) + 1), -1).scatter_(1, rank, values)
        return rows, torch.empty_like(items).scatter_(1, order, rank)

    return Contest(
        lambda: ops.touched_rows(items),
        {"twin": lambda: reference.touched_rows(items), "sort and scatter": by_sort},
        0.0,
    )


def accumulate_updates_(s: Shape, with_rows: bool) -> Contest:
    C = s.clients if s.C is not None else 32
    weights = torch.rand(C, dtype=torch.float64)
    if with_rows:
        R, items = max(s.P // 8, 4) if s.C is None else s.P, 20_000
        updates, rows = torch.randn(C, R, s.D).to(s.dtype), torch.randint(items, (C, R))
        total = torch.zeros(items, s.D, dtype=s.dtype)

        def rival() -> None:
            scaled = updates * weights.to(s.dtype)[:, None, None]
            total.index_add_(0, rows.flatten(), scaled.flatten(0, 1))

        name = "multiply and index_add_"
    else:
        updates, rows = torch.randn(C, 3000, s.D).to(s.dtype), None
        total = torch.zeros(3000, s.D, dtype=s.dtype)

        def rival() -> None:
            total.view(-1).addmv_(updates.flatten(1).T, weights.to(s.dtype))

        name = "addmv_"
    return Contest(
        lambda: ops.accumulate_updates_(total, updates, weights, rows),
        {"twin": lambda: reference.accumulate_updates_(total, updates, weights, rows), name: rival},
        None,
    )


DIFFERENTIABLE: dict[str, Callable[[Shape], Lookup]] = {
    "rq_lookup": rq_lookup,
    "hash_lookup mean": lambda s: hash_lookup(s, "mean"),
    "hash_lookup sum": lambda s: hash_lookup(s, "sum"),
    "hash_lookup SENet": lambda s: hash_lookup(s, "mean", senet=True),
    "lora_lookup": lora_lookup,
    "client_embedding": client_embedding,
    "dot_scores": dot_scores,
    "bpr_loss": lambda s: loss(s, "bpr_loss"),
    "bce_loss": lambda s: loss(s, "bce_loss"),
}
OTHERS: dict[str, Callable[[Shape], Contest]] = {
    "rq_encode": rq_encode,
    "client_adam_": client_adam_,
    "client_sgd_": client_sgd_,
    "sample_negatives": sample_negatives,
    "client_dropout": client_dropout,
    "touched_rows": touched_rows,
    "accumulate_updates_ dense": lambda s: accumulate_updates_(s, False),
    "accumulate_updates_ rows": lambda s: accumulate_updates_(s, True),
}
CASES = [
    *((name, way) for name in DIFFERENTIABLE for way in ("forward", "forward+backward")),
    *((name, "forward") for name in OTHERS),
]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(ours: Any, theirs: Any, tolerance: float, agreement: float) -> None:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for a, b in pairs:
        # 16-bit rivals round at every step.
        slack = 0.1 if a.dtype == torch.bfloat16 else tolerance
        near = torch.isclose(a, b, rtol=slack, atol=slack * max(1.0, float(a.abs().max())))
        share = float(near.double().mean())
        assert a.shape == b.shape
        assert share >= agreement, (
            f"{1 - share:.2%} of the elements differ, by up to {float((a - b).abs().max())}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda x: x)
def test_kernel(
    benchmark: Any, name: str, way: str, shape: Shape, threads: int, contests: list[dict[str, Any]]
) -> None:
    if shape.C is None and name in ("client_adam_", "client_sgd_"):
        pytest.skip("parameters of one client each")
    torch.manual_seed(0)
    if name in OTHERS:
        contest = OTHERS[name](shape)
    else:
        lookup = DIFFERENTIABLE[name](shape)
        contest = lookup.forward() if way == "forward" else lookup.backward()

    missing = {}
    start = time.perf_counter()
    ours = contest.ours()
    spent = time.perf_counter() - start
    for rival, run in list(contest.rivals.items()):
        start = time.perf_counter()
        try:
            theirs = run()
        except (RuntimeError, NotImplementedError) as error:  # a dtype that torch's kernel lacks
            missing[rival] = str(error).partition("\n")[0]
            del contest.rivals[rival]
            continue
        spent += time.perf_counter() - start
        if contest.tolerance is not None:
            same(ours, theirs, contest.tolerance, contest.agreement)

    others = contest.rivals | ({BOUND: contest.bound} if contest.bound is not None else {})
    if contest.bound is not None:
        try:
            contest.bound()
        except (RuntimeError, NotImplementedError):
            del others[BOUND]
    times: dict[str, list[float]] = {other: [] for other in others}
    order, turn = random.Random(0), list(others)
    before = 0  # how many take their turn before the op in this round

    def take_turns(names: list[str]) -> None:
        for rival in names:
            begin = time.perf_counter()
            others[rival]()
            times[rival].append(time.perf_counter() - begin)

    def run_before() -> None:
        nonlocal before
        order.shuffle(turn)
        before = order.randint(0, len(turn))
        take_turns(turn[:before])

    def run_after() -> None:
        take_turns(turn[before:])

    def run_ours() -> None:
        contest.ours()  # its result dies within the call, as the rivals' do, so that all reuse memory alike

    rounds = int(min(max(SECONDS / spent, ROUNDS[0]), ROUNDS[1]))
    benchmark.pedantic(run_ours, setup=run_before, teardown=run_after, rounds=rounds, warmup_rounds=1)
    mine = list(benchmark.stats.stats.data)
    result = {
        "op": name,
        "way": way,
        "shape": shape.name,
        "threads": threads,
        "rounds": rounds,
        "ours": summary(mine),
        "rivals": {rival: summary(times[rival][1:]) for rival in contest.rivals},
        "bound": summary(times[BOUND][1:]) if BOUND in times else None,
        "missing": missing,
    }
    benchmark.extra_info.update(result)
    contests.append(result)


def summary(seconds: list[float]) -> dict[str, float]:
    """Minimum, median and 90th percentile in ms."""
    low, middle, high = (1e3 * float(q) for q in np.quantile(seconds, [0.0, 0.5, 0.9]))
    return {"min": low, "median": middle, "p90": high}
