"""plug() on models of several shapes, the grammar of names, and build_embedding()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from fedpeft_ext.nn import (
    EmbeddingSpec,
    FullEmbedding,
    HashEmbedding,
    LoRAEmbedding,
    RQEmbedding,
    SumEmbedding,
    build_embedding,
    parse_spec,
    plug,
    residual_kmeans,
)

I, D = 20, 8
BASE = torch.randn(I, D, generator=torch.Generator().manual_seed(4))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(I, D, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(D, D), nn.Embedding(5, D)])


class Recommender(nn.Module):
    """Scores the whole catalogue by the embedding's weight, as sequential recommenders do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.user_embedding = nn.Embedding(3, D)

    def forward(self, history: Tensor) -> Tensor:
        vectors = self.encoder.item_embedding(history)
        user = self.encoder.layers[0](vectors.sum(-2))
        return user @ self.encoder.item_embedding.weight.T


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("lora", LoRAEmbedding),
        ("hash", HashEmbedding),
        ("Hash+SENet", HashEmbedding),
        ("rq", RQEmbedding),
        ("full", FullEmbedding),
        ("rq+lora", SumEmbedding),
        ("full+hash+senet+rq", SumEmbedding),
    ],
)
@pytest.mark.parametrize("name", ["encoder.item_embedding", "item_embedding"])
def test_plug_replaces_and_freezes(strategy: str, kind: type[nn.Module], name: str) -> None:
    model = Recommender().double().eval()
    old = model.encoder.item_embedding
    weight = old.weight.detach().clone()
    options = {"codebook_size": 6} if "rq" in strategy else {}
    new = plug(model, name, strategy, **options)
    assert type(new) is kind
    assert model.encoder.item_embedding is new
    assert new.padding_idx == 0
    assert not new.training
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.tensor([[0, 2, 3]])), torch.tensor([4])).backward()
        optimizer.step()
    assert new.base is not None
    assert torch.equal(new.base, weight)
    assert not torch.equal(new.full_embedding(), weight)
    assert not any(parameter is old.weight for parameter in model.parameters())


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_plug_keeps_what_the_model_computes(strategy: str) -> None:
    model = Recommender()
    history = torch.tensor([[0, 2, 3], [4, 0, 0]])
    expected = model(history)
    plug(model, "item_embedding", strategy)
    torch.testing.assert_close(model(history), expected)


@pytest.mark.parametrize("strategy", ["lora", "hash", "rq", "rq+lora"])
def test_plug_without_freezing_or_without_the_full_one(strategy: str) -> None:
    options = {"codebook_size": 6} if "rq" in strategy else {}
    thawed = plug(Recommender(), "item_embedding", strategy, freeze_full=False, **options)
    assert "base" in thawed.compressed_parameters()
    alone = plug(Recommender(), "item_embedding", strategy, compressed_only=True, **options)
    assert alone.base is None


def test_plug_full_without_freezing_is_the_weight_itself() -> None:
    model = Recommender()
    weight = model.encoder.item_embedding.weight.detach().clone()
    new = plug(model, "item_embedding", "full", freeze_full=False)
    assert list(new.compressed_parameters()) == ["weight"]
    assert torch.equal(new.weight, weight)


def test_plug_in_a_list_and_under_two_names() -> None:
    model = Recommender()
    new = plug(model, "encoder.layers.1", "lora", rank=2)
    assert model.encoder.layers[1] is new
    shared = nn.Embedding(I, D)
    both = nn.ModuleDict({"a": shared, "b": shared})
    new = plug(both, "a")
    assert both["a"] is new
    assert both["b"] is new


def test_plugged_model_saves_and_loads() -> None:
    model, other = Recommender(), Recommender()
    for each in (model, other):
        plug(each, "item_embedding", "hash+senet+rq", codebook_size=6)
    other.load_state_dict(model.state_dict())
    history = torch.tensor([[1, 2]])
    assert torch.equal(model(history), other(history))
    merged = model(history)
    model.encoder.item_embedding = model.encoder.item_embedding.merge()
    torch.testing.assert_close(model(history), merged)


def test_tied_weights_need_leave() -> None:
    class Tied(nn.Module):
        def __init__(self, share_memory_only: bool) -> None:
            super().__init__()
            self.item_embedding = nn.Embedding(I, D)
            self.out = nn.Linear(D, I, bias=False)
            weight = self.item_embedding.weight
            self.out.weight = nn.Parameter(weight.data) if share_memory_only else weight

    for share_memory_only in (False, True):
        model = Tied(share_memory_only)
        with pytest.raises(ValueError, match=r"tied to out\.weight.*allow_tied=True"):
            plug(model, "item_embedding")
        assert type(model.item_embedding) is nn.Embedding
        new = plug(model, "item_embedding", allow_tied=True)
        before = new.full_embedding()
        with torch.no_grad():
            model.out.weight.zero_()
        assert torch.equal(new.full_embedding(), before)


@pytest.mark.parametrize("strategy", ["lora", "hash+senet+rq", "full"])
def test_plug_into_a_fake_model(strategy: str) -> None:
    with FakeTensorMode():
        model = Recommender()
        codes = {"codes": torch.zeros(I, 3, dtype=torch.int64), "codebook_size": 6}
        plug(model, "item_embedding", strategy, **(codes if "rq" in strategy else {}))
        assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, I)
        tied = nn.ModuleDict({"e": nn.Embedding(I, D), "out": nn.Linear(D, I)})
        tied["out"].weight = nn.Parameter(tied["e"].weight.data)
        with pytest.raises(ValueError, match=r"tied to out\.weight"):
            plug(tied, "e")
        with pytest.raises(ValueError, match=r"codes: expected .* got FakeTensor"):
            plug(Recommender(), "item_embedding", "rq")


class Sharded(Tensor):
    """A tensor of another type, as DTensor is."""


def sharded() -> nn.ModuleDict:
    embedding = nn.Embedding(I, D)
    embedding.weight = nn.Parameter(embedding.weight.detach().as_subclass(Sharded))
    return nn.ModuleDict({"e": embedding})


def distributed() -> nn.Module:
    """Without a process group, which wrapping by the constructor needs."""
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = Recommender()
    return nn.Sequential(wrapped)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.ModuleDict:
    embedding = nn.Embedding(I, D)
    embedding.register_forward_hook(lambda module, args, out: 2 * out)
    embedding.forward = embedding.forward  # as libraries do that wrap it
    return nn.ModuleDict({"e": embedding})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: plug(Recommender(), "item_embeding"),
            ValueError,
            r"encoder\.item_embedding, encoder\.layers\.1, user_.*nearest is 'encoder\.item_embedding'",
        ),
        (lambda: plug(nn.Linear(2, 2), "x"), ValueError, "inside Linear, got 'x'; there is none"),
        (lambda: plug(nn.Embedding(I, D), ""), ValueError, "model: .*the embedding itself.*from_pretrained"),
        (lambda: plug([], "x"), TypeError, "model: expected an nn.Module, got list"),  # type: ignore[arg-type]
        (lambda: plug(Recommender(), None), TypeError, "name: expected .* got NoneType"),  # type: ignore[arg-type]
        (lambda: plug(nn.ModuleDict({"e": nn.EmbeddingBag(I, D)}), "e"), TypeError, "got EmbeddingBag; put"),
        (
            lambda: plug(nn.ModuleDict({"a": Encoder(), "b": Encoder()}), "item_embedding"),
            ValueError,
            r"whole path.*a\.item_embedding, b\.item_embedding",
        ),
        (lambda: plug(Recommender(), "encoder.layers.0"), TypeError, "expected nn.Embedding itself.*Linear"),
        (
            lambda: plug(nn.ModuleDict({"e": Scaled(I, D)}), "e"),
            TypeError,
            "expected nn.Embedding itself.*Scaled",
        ),
        (lambda: plug(nn.ModuleDict({"e": LoRAEmbedding(I, D)}), "e"), TypeError, "LoRAEmbedding.*merge"),
        (lambda: plug(nn.ModuleDict({"e": nn.Embedding(I, D, max_norm=1.0)}), "e"), ValueError, "max_norm"),
        (
            lambda: plug(nn.ModuleDict({"e": nn.Embedding(I, D, scale_grad_by_freq=True)}), "e"),
            ValueError,
            "e: expected scale_grad_by_freq=False",
        ),
        (lambda: plug(sharded(), "e"), TypeError, "e.weight: .* ordinary tensor, got Sharded; plug first"),
        (lambda: plug(distributed(), "item_embedding"), ValueError, "model: .*DistributedDataParallel"),
        (lambda: plug(hooked(), "e"), ValueError, "without hooks.*got _forward_hooks, forward;"),
        (
            lambda: plug(nn.ModuleDict({"e": nn.Embedding(I, D, device="meta")}), "e", "rq"),
            ValueError,
            "codes: expected .* on device 'meta'",
        ),
        (
            lambda: plug(Recommender(), "item_embedding", "lroa"),
            ValueError,
            "^strategy: .*got 'lroa' in 'lroa'.*'lora'",
        ),
        (lambda: plug(Recommender(), "item_embedding", "p-lora"), ValueError, "without prefix"),
        (
            lambda: plug(Recommender(), "item_embedding", "lora", rnak=2),
            TypeError,
            "got 'rnak'.*nearest is 'rank'",
        ),
        (lambda: plug(Recommender(), "item_embedding", "lora", table_size=2), TypeError, "got 'table_size'"),
        (
            lambda: plug(Recommender(), "item_embedding", "full", compressed_only=True),
            ValueError,
            "compressed_only",
        ),
    ],
)
def test_plug_wrong_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("full", EmbeddingSpec(False, ("full",))),
        ("P-RQ", EmbeddingSpec(True, ("rq",))),
        (" c-lora ", EmbeddingSpec(False, ("lora",))),
        ("c-hash+senet", EmbeddingSpec(False, ("hash+senet",))),
        ("p-rq+lora", EmbeddingSpec(True, ("rq", "lora"))),
        ("p-hash+senet+rq", EmbeddingSpec(True, ("hash+senet", "rq"))),
        ("p-rq+hash", EmbeddingSpec(True, ("rq", "hash"))),
    ],
)
def test_parse_spec(text: str, spec: EmbeddingSpec) -> None:
    assert parse_spec(text) == spec
    assert parse_spec(str(spec)) == spec


@given(
    plugged=st.booleans(),
    parts=st.permutations(["full", "lora", "hash", "rq"]),
    count=st.integers(1, 4),
    senet=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_parse_spec_reads_what_str_writes(plugged: bool, parts: list[str], count: int, senet: bool) -> None:
    chosen = tuple("hash+senet" if senet and part == "hash" else part for part in parts[:count])
    spec = EmbeddingSpec(plugged, chosen)
    assert parse_spec(str(spec).upper()) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora", "nearest valid name is '[cp]-lora'"),
        ("ful", "nearest valid name is 'full'"),
        ("x-rq", "nearest valid name is '[cp]-rq'"),
        ("", "got ''"),
        ("p-", "got ''"),
        ("p-rqvae", "got 'rqvae'.*nearest is 'rq'"),
        ("p-senet", "'senet' right after 'hash'"),
        ("p-hash+rq+senet", "'senet' right after 'hash'"),
        ("p-hash+senet+senet", "'senet' right after 'hash'"),
        ("p-lora+lora", "at most once, got 'lora' twice"),
        ("p-hash+hash+senet", "at most once, got 'hash' twice"),
    ],
)
def test_parse_spec_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


# --- build_embedding -------------------------------------------------------------------------------

ALL_OPTIONS: dict[str, Any] = {
    "rank": 2,
    "table_size": 16,
    "num_hashes": 3,
    "reduce": "sum",
    "senet_hidden": 5,
    "codebook_size": 6,
    "levels": 2,
    "seed": 3,
    "init_std": 0.2,
}


@pytest.mark.parametrize(
    "spec", ["full", "c-lora", "p-hash", "c-hash+senet", "p-rq", "c-rq", "p-rq+lora", "p-full"]
)
def test_one_set_of_options_serves_every_spec(spec: str) -> None:
    module = build_embedding(spec, I, D, base=BASE, padding_idx=1, **ALL_OPTIONS)
    assert module(torch.tensor([[2, -1]])).shape == (1, 2, D)
    assert module.padding_idx == 1
    assert (module.base is not None) == spec.startswith("p-")
    if isinstance(module, LoRAEmbedding):
        assert module.rank == 2
    if isinstance(module, HashEmbedding):
        assert (module.table_size, module.num_hashes) == (16, 3)
    if isinstance(module, RQEmbedding):
        assert (module.levels, module.codebook_size) == (2, 6)


def test_starting_points() -> None:
    assert torch.equal(build_embedding("full", I, D, base=BASE).full_embedding(), BASE)
    assert torch.equal(build_embedding("p-full", I, D, base=BASE).full_embedding(), BASE)
    assert torch.equal(build_embedding("p-lora", I, D, base=BASE).full_embedding(), BASE)
    assert torch.equal(build_embedding("p-full+lora", I, D, base=BASE).full_embedding(), BASE)
    assert build_embedding("full", I, D).full_embedding().std() > 0.5
    codes, codebooks = residual_kmeans(BASE, 2, 6)
    warm = build_embedding("c-rq", I, D, codes=codes, codebooks=codebooks, codebook_size=6)
    fitted = build_embedding("c-rq", I, D, base=BASE, codebook_size=6, levels=2, warm_start=True)
    assert torch.equal(warm.full_embedding(), fitted.full_embedding())
    assert (warm.full_embedding() - BASE).square().mean() < BASE.square().mean()


def test_freeze_full_false_trains_the_base() -> None:
    for spec in ("p-lora", "p-hash+rq"):
        frozen = build_embedding(spec, I, D, base=BASE, codebook_size=6)
        thawed = build_embedding(spec, I, D, base=BASE, codebook_size=6, freeze_full=False)
        assert thawed.bytes_per_round() == frozen.bytes_per_round() + 4 * I * D
        assert thawed.row_parameters[0] == "base"


def test_build_is_seeded_and_takes_the_dtype_of_the_base() -> None:
    tables = [
        build_embedding(
            "p-hash+senet+rq+lora",
            I,
            D,
            base=BASE.double(),
            generator=torch.Generator().manual_seed(5),
            **ALL_OPTIONS,
        ).full_embedding()
        for _ in range(2)
    ]
    assert torch.equal(*tables)
    assert tables[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: build_embedding("p-lora", I, D),
            ValueError,
            r"base: expected full embeddings \[I, D\] for 'p-lora'",
        ),
        (lambda: build_embedding("p-lora", I, D, base=BASE[:2]), ValueError, "base: expected shape"),
        (lambda: build_embedding("c-rq", I, D), ValueError, "codes: .* got neither"),
        (lambda: build_embedding("c-lora", I, D, rnk=2), TypeError, "got 'rnk'.*nearest is 'rank'"),
        (lambda: build_embedding("c-rq", I, D, codebooks=torch.ones(1, 2, D)), ValueError, "codes"),
        (
            lambda: build_embedding("c-rq", I, D, codes=torch.zeros(I, 2).int(), levels=3),
            ValueError,
            r"codes: expected shape \[I, levels = 3\]",
        ),
    ],
)
def test_build_wrong_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
