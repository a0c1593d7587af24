"""The embedding modules: like nn.Embedding, padding, frozen base, functional use, training, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedpeft_ext.nn import (
    FullEmbedding,
    HashEmbedding,
    ItemEmbedding,
    Items,
    LoRAEmbedding,
    RQEmbedding,
    SumEmbedding,
    build_embedding,
    register_strategy,
    residual_kmeans,
    spec,
)
from fedpeft_ext.nn.embedding import read_rows

I, D = 20, 8
CODES = torch.randint(6, (I, 3), generator=torch.Generator().manual_seed(3))
BASE = torch.randn(I, D, generator=torch.Generator().manual_seed(4))
FLOAT8 = BASE.to(torch.float8_e4m3fn)

Make = Callable[..., ItemEmbedding]


def make_sum(base: Tensor | None = None, freeze_base: bool = True, **options: Any) -> SumEmbedding:
    if base is not None:
        options = {"dtype": base.dtype, "device": base.device, **options}
    parts = [RQEmbedding(I, D, CODES, codebook_size=6, **options), LoRAEmbedding(I, D, **options)]
    return SumEmbedding(parts, base=base, freeze_base=freeze_base)


MAKERS: dict[str, Make] = {
    "full": lambda **o: FullEmbedding(I, D, **o),
    "lora": lambda **o: LoRAEmbedding(I, D, rank=3, **o),
    "hash-mean": lambda **o: HashEmbedding(I, D, table_size=16, num_hashes=3, **o),
    "hash-sum": lambda **o: HashEmbedding(I, D, table_size=16, reduce="sum", **o),
    "hash-senet": lambda **o: HashEmbedding(I, D, table_size=16, senet=True, **o),
    "rq": lambda **o: RQEmbedding(I, D, CODES, codebook_size=6, **o),
    "sum": make_sum,
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def moved(module: ItemEmbedding) -> ItemEmbedding:
    """The module away from its start, where LoRA's B is zero and hides its A."""
    with torch.no_grad():
        for parameter in module.compressed_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


# --- like nn.Embedding -----------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 0, 7, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_full_equals_nn_embedding(padding_idx: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    expected = nn.Embedding(I, D, padding_idx, dtype=dtype)
    torch.manual_seed(1)
    module = FullEmbedding(I, D, padding_idx, dtype=dtype)
    assert module.padding_idx == expected.padding_idx
    assert torch.equal(module.weight, expected.weight)
    items = torch.tensor([[0, 7, 18], [3, 7, 3]])
    out, reference = module(items), expected(items)
    assert torch.equal(out, reference)
    out.square().sum().backward()
    reference.square().sum().backward()
    torch.testing.assert_close(module.weight.grad, expected.weight.grad)
    module.load_state_dict(expected.state_dict())


@every
@given(shape=st.lists(st.integers(0, 4), max_size=3), index=st.sampled_from([torch.int32, torch.int64]))
@settings(deadline=None, max_examples=10)
def test_any_shape(make: Make, shape: list[int], index: torch.dtype) -> None:
    module = moved(make(base=BASE))
    items = torch.randint(-1, I, shape, dtype=index)
    out = module(items)
    assert out.shape == (*shape, D)
    flat = module(items.reshape(-1).long())
    torch.testing.assert_close(out.reshape(-1, D), flat)


@every
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "plugged"])
def test_padding_is_zero_without_gradient(make: Make, base: Tensor | None) -> None:
    module = moved(make(base=base, padding_idx=5))
    items = torch.tensor([-1, 5, 2, 5, -1])
    out = module(items)
    assert torch.equal(out[[0, 1, 3, 4]], torch.zeros(4, D))
    assert out[2].abs().sum() > 0
    grads = torch.autograd.grad(out[[0, 1, 3, 4]].sum(), list(module.parameters()), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)
    assert module.full_embedding()[5].abs().sum() == 0


@every
def test_gradients(make: Make) -> None:
    module = moved(make(base=BASE.double()))
    names = list(module.compressed_parameters())
    items = torch.tensor([4, -1, 4, 0, 19])

    def vectors(*values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (items,))

    assert torch.autograd.gradcheck(vectors, tuple(module.compressed_parameters().values()))


@every
def test_state_dict_and_deepcopy(make: Make) -> None:
    module = moved(make(base=BASE))
    clone = copy.deepcopy(module)
    other = make(base=torch.zeros_like(BASE))
    other.load_state_dict(module.state_dict())
    items = torch.arange(I)
    expected = module(items)
    assert torch.equal(clone(items), expected)
    assert torch.equal(other(items), expected)
    moved(clone)
    assert torch.equal(module(items), expected)


@every
def test_used_as_modules_of_torch_are(make: Make, tmp_path: Path) -> None:
    module = moved(make(base=BASE))
    items = torch.tensor([[3, 14, -1], [0, 5, 19]])
    expected = module(items)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    loaded = make(base=torch.zeros_like(BASE))
    loaded.load_state_dict(torch.load(tmp_path / "module.pt", weights_only=True))
    assert torch.equal(loaded(items), expected)
    assert torch.equal(module(items.t()), expected.transpose(0, 1))  # items that are not contiguous
    assert module(items[:0]).shape == (0, 3, D)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(vectors, expected) for vectors in pool.map(module, [items] * 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.linear(module(items), torch.ones(2, D)).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    frozen = module.requires_grad_(False)(items)
    assert not frozen.requires_grad
    assert torch.equal(frozen, expected)


@every
def test_dtype(make: Make) -> None:
    module = moved(make(base=BASE)).to(torch.float64)
    wide = module(torch.arange(I))
    assert wide.dtype == torch.float64
    half = module.to(torch.bfloat16)(torch.arange(I))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wide, rtol=0.05, atol=0.05)
    assert make(base=BASE.double()).full_embedding().dtype == torch.float64
    assert make(base=BASE, dtype=torch.float64).full_embedding().dtype == torch.float64


@every
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained-base"])
def test_parameters_cast_for_the_forward_decide_the_dtype(make: Make, freeze: bool) -> None:
    """As FSDP2's mixed precision does, which casts no buffers."""
    module = moved(make(base=BASE, freeze_base=freeze))
    cast = {name: p.detach().bfloat16() for name, p in module.named_parameters() if name != "base"}
    vectors = functional_call(module, cast, (torch.arange(I),))
    assert vectors.dtype == torch.bfloat16
    torch.testing.assert_close(vectors.float(), module(torch.arange(I)), rtol=0.05, atol=0.05)


@every
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_bags_of_differing_size(make: Make) -> None:
    module = moved(make(base=BASE, padding_idx=5))
    sizes, ids = torch.tensor([2, 0, 3]), torch.tensor([1, 5, 3, -1, 19])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    bags = torch.nested.nested_tensor_from_jagged(ids, offsets)
    vectors = module(bags)
    assert vectors.shape == (3, bags.shape[1], D)
    assert torch.equal(vectors.values(), module(ids))
    assert torch.equal(module(Items(bags, bags)).values(), module(ids))
    vectors.values().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(TypeError, match=r"layout torch\.jagged"):
        module(torch.nested.nested_tensor([ids[:2], ids[2:]]))


@pytest.mark.parametrize(
    "make", [make for name, make in MAKERS.items() if "rq" not in name and name != "sum"]
)
def test_made_on_the_default_device_and_filled_later(make: Make) -> None:
    with torch.device("meta"):
        module = make()
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    module.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(3))
    expected = make(generator=torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


# --- the base --------------------------------------------------------------------------------------


def pretrained(name: str, freeze: bool = True, padding_idx: int | None = None) -> ItemEmbedding:
    """`from_pretrained(BASE)` of the strategy."""
    if name == "full":
        return FullEmbedding.from_pretrained(BASE, freeze, padding_idx)
    if name == "lora":
        return LoRAEmbedding.from_pretrained(BASE, freeze, padding_idx, rank=3)
    if name == "hash":
        return HashEmbedding.from_pretrained(BASE, freeze, padding_idx, senet=True)
    if name == "rq":
        return RQEmbedding.from_pretrained(BASE, freeze, padding_idx, levels=2, codebook_size=4)
    parts = [LoRAEmbedding(I, D, padding_idx=padding_idx), HashEmbedding(I, D, padding_idx=padding_idx)]
    return SumEmbedding.from_pretrained(BASE, freeze, padding_idx, parts=parts)


NAMES = ["full", "lora", "hash", "rq", "sum"]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_base_does_not_move(name: str) -> None:
    module = pretrained(name)
    module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    before = {key: value.clone() for key, value in module.compressed_parameters().items()}
    for _ in range(3):
        optimizer.zero_grad()
        (module(torch.arange(I)) - 1).square().sum().backward()
        optimizer.step()
    assert module.base is not None
    assert torch.equal(module.base, BASE)
    assert "base" not in module.compressed_parameters()
    assert all(not torch.equal(value, before[key]) for key, value in module.compressed_parameters().items())


@pytest.mark.parametrize("name", NAMES)
def test_trained_base_moves_and_counts(name: str) -> None:
    module, frozen = pretrained(name, freeze=False), pretrained(name)
    extra = 0 if name == "full" else BASE.numel() * 4  # Full trains the vectors themselves
    assert module.bytes_per_round() == frozen.bytes_per_round() + extra
    assert set(module.row_parameters) - set(frozen.row_parameters) == (
        {"weight"} if name == "full" else {"base"}
    )
    module(torch.arange(I)).square().sum().backward()
    moved_one = module.weight if name == "full" else module.base
    assert moved_one is not None
    assert moved_one.grad is not None
    assert moved_one.grad.any()


@pytest.mark.parametrize("name", ["full", "lora"])
def test_from_pretrained_starts_there(name: str) -> None:
    for freeze in (True, False):
        assert torch.equal(pretrained(name, freeze).full_embedding(), BASE)
    padded = pretrained(name, padding_idx=0).full_embedding()
    assert torch.equal(padded[1:], BASE[1:])
    assert not padded[0].any()


@pytest.mark.parametrize("make", [MAKERS["hash-mean"], MAKERS["rq"]])
def test_zero_std_starts_at_the_base(make: Make) -> None:
    assert torch.equal(make(base=BASE, init_std=0.0).full_embedding(), BASE)


def test_base_is_a_copy_of_a_live_parameter() -> None:
    live = nn.Parameter(BASE.clone())
    module = LoRAEmbedding.from_pretrained(live)
    with torch.no_grad():
        live.zero_()
    assert module.base is not None
    assert torch.equal(module.base, BASE)


def test_lora_first_step_moves_b_alone() -> None:
    module = LoRAEmbedding(I, D)
    (module(torch.arange(I)) * BASE).sum().backward()
    assert module.A.grad is not None
    assert module.B.grad is not None
    assert not module.A.grad.any()
    assert module.B.grad.any()


# --- the table and what is sent --------------------------------------------------------------------


@every
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "plugged"])
def test_tables_agree(make: Make, base: Tensor | None) -> None:
    module = moved(make(base=base, padding_idx=2))
    expected = module(torch.arange(I)).detach()
    assert torch.equal(module.full_embedding(chunk_size=7), expected)
    assert not module.full_embedding().requires_grad
    torch.testing.assert_close(module.weight.detach()[3:], expected[3:])
    assert module.weight.requires_grad
    plain = module.merge()
    assert type(plain) is nn.Embedding
    assert plain.padding_idx == 2
    assert torch.equal(plain(torch.arange(I)), expected)


def test_bytes_per_round() -> None:
    sizes = {
        "full": I * D,
        "lora": 3 * (I + D),
        "hash-mean": 16 * D,
        "hash-senet": 16 * D + 2 * 32 * 2 + 32 + 2,
        "rq": 3 * 6 * D,
        "sum": 3 * 6 * D + 4 * (I + D),
    }
    for name, numbers in sizes.items():
        assert MAKERS[name](base=BASE).bytes_per_round() == 4 * numbers, name
        assert MAKERS[name](dtype=torch.float64).bytes_per_round() == 8 * numbers, name
    module = LoRAEmbedding(I, D)
    module.A.requires_grad_(False)
    assert list(module.compressed_parameters()) == ["B"]


def test_row_parameters() -> None:
    rows = {name: make().row_parameters for name, make in MAKERS.items()}
    assert rows["full"] == ("weight",)
    assert rows["lora"] == ("A",)
    assert rows["sum"] == ("parts.1.A",)
    assert rows["rq"] == rows["hash-mean"] == rows["hash-senet"] == ()
    assert FullEmbedding(I, D, base=BASE).row_parameters == ("delta",)


@every
def test_reset_parameters_is_seeded_and_leaves_the_base(make: Make) -> None:
    module = make(base=BASE)
    first = []
    for _ in range(2):
        moved(module).reset_parameters(torch.Generator().manual_seed(7))
        first.append(module.full_embedding())
    assert torch.equal(*first)
    assert module.base is not None
    assert torch.equal(module.base, BASE)
    if isinstance(module, FullEmbedding | LoRAEmbedding):
        assert torch.equal(first[0], BASE)


@every
def test_generator_of_another_device(make: Make) -> None:
    module = make(base=BASE.to("meta"), generator=torch.Generator().manual_seed(7))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert all(buffer.is_meta for buffer in module.buffers())


def test_hash_functions_follow_the_seed() -> None:
    one, same, other = (HashEmbedding(I, D, seed=seed).hashes for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (2, 2)
    assert one.dtype == torch.int64


def test_repr() -> None:
    assert repr(LoRAEmbedding(I, D, base=BASE, padding_idx=0)) == (
        f"LoRAEmbedding({I}, {D}, rank=4, padding_idx=0, base=frozen)"
    )
    assert "senet_hidden=32" in repr(MAKERS["hash-senet"]())
    assert "codebook_size=6" in repr(MAKERS["sum"](base=BASE, freeze_base=False))
    assert "base=trained" in repr(MAKERS["sum"](base=BASE, freeze_base=False))


# --- functional use, as the batched engine does ----------------------------------------------------


def stacked_clients(
    module: ItemEmbedding, clients: int, positions: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Own parameters of each client (row parameters at 6 items each), and its items and rows [C, P]."""
    held = torch.stack([torch.randperm(I)[:6] for _ in range(clients)])
    rows = torch.randint(-1, 6, (clients, positions))
    ids = torch.where(rows < 0, -1, held.gather(1, rows.clamp(min=0)))
    parameters = {}
    for name, value in module.compressed_parameters().items():
        own = value.detach() + 0.1 * torch.randn(clients, *value.shape)
        if name in module.row_parameters:
            own = own[torch.arange(clients)[:, None], held]
        parameters[name] = own
    return parameters, ids, rows


@every
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained-base"])
def test_vmap_over_clients_equals_a_loop(make: Make, freeze: bool) -> None:
    module = make(base=BASE, freeze_base=freeze, padding_idx=1)
    parameters, ids, rows = stacked_clients(module, clients=4, positions=5)

    def one(own: dict[str, Tensor], i: Tensor, r: Tensor) -> Tensor:
        return functional_call(module, own, (Items(i, r),))

    def loss(own: dict[str, Tensor], i: Tensor, r: Tensor) -> Tensor:
        return one(own, i, r).square().sum()

    together = vmap(one)(parameters, ids, rows)
    gradients = vmap(torch.func.grad(loss))(parameters, ids, rows)
    assert not together[ids == -1].any()
    assert not together[ids == 1].any()
    for c in range(4):
        own = {name: value[c] for name, value in parameters.items()}
        torch.testing.assert_close(together[c], one(own, ids[c], rows[c]))
        alone = torch.func.grad(loss)(own, ids[c], rows[c])
        for name, gradient in alone.items():
            torch.testing.assert_close(gradients[name][c], gradient)


@every
def test_leading_client_dimension_equals_vmap(make: Make) -> None:
    module = make(base=BASE)
    parameters, ids, rows = stacked_clients(module, clients=3, positions=4)
    direct = functional_call(module, parameters, (Items(ids, rows),))
    batched = vmap(lambda own, i, r: functional_call(module, own, (Items(i, r),)))(parameters, ids, rows)
    torch.testing.assert_close(direct, batched)


@every
def test_rows_of_the_whole_table_equal_ids(make: Make) -> None:
    module = moved(make(base=BASE))
    items = torch.tensor([3, -1, 0])
    assert torch.equal(module(Items(items, items)), module(items))
    assert torch.equal(module(Items(items)), module(items))


def test_sizes_of_numpy() -> None:
    """As counts of a data frame are."""
    torch.compiler.reset()
    items, width, two = np.int64(I), np.int32(D), np.int64(2)
    for module in (
        LoRAEmbedding(items, width, rank=two, padding_idx=two),
        HashEmbedding(items, width, table_size=two, num_hashes=two, senet=True, senet_hidden=two),
        RQEmbedding(items, width, CODES, codebook_size=np.int64(6)),
    ):
        assert all(not isinstance(value, np.integer) for value in vars(module).values())
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert compiled(torch.tensor([0, 2])).shape == (2, D)


@every
def test_compile(make: Make) -> None:
    torch.compiler.reset()  # all modules share a forward, whose compilations are limited in number
    module = moved(make(base=BASE, padding_idx=3))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    items = torch.tensor([[1, 3], [-1, 8]])
    torch.testing.assert_close(compiled(items), module(items))
    expected = torch.autograd.grad(module(items).sum(), list(module.parameters()))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(items).sum(), list(module.parameters())), expected
    )


# --- central training ------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "plugged"])
def test_central_training_learns(make: Make, base: Tensor | None) -> None:
    """Items of two kinds, told apart by a linear layer on their vectors."""
    model = nn.Sequential(make(base=base), nn.Linear(D, 1))
    items = torch.arange(I)
    labels = (CODES[:, 0] % 2).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(items)[:, 0], labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- codes -----------------------------------------------------------------------------------------


def test_residual_kmeans_recovers_sums_of_codewords() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = 10 * torch.randn(4, D, generator=generator)
    fine = torch.randn(3, D, generator=generator)
    which = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    vectors = (coarse[which[:, 0]] + fine[which[:, 1]]).repeat(5, 1)
    codes, codebooks = residual_kmeans(vectors, levels=2, codebook_size=4)
    assert codes.shape == (60, 2)
    assert codes.dtype == torch.uint8
    assert codebooks.shape == (2, 4, D)
    rebuilt = sum(codebooks[level, codes[:, level].long()] for level in range(2))
    assert (rebuilt - vectors).square().sum() < 0.05 * (vectors - vectors.mean(0)).square().sum()
    again, _ = residual_kmeans(vectors, levels=2, codebook_size=4)
    assert torch.equal(codes, again)


def test_rq_from_pretrained() -> None:
    fitted = RQEmbedding.from_pretrained(BASE, levels=2, codebook_size=5)
    codes, codebooks = residual_kmeans(BASE, 2, 5)
    assert torch.equal(fitted.codes, codes)
    assert not torch.equal(fitted.codebooks, codebooks)
    assert torch.equal(
        RQEmbedding.from_pretrained(BASE, levels=2, codebook_size=5, warm_start=True).codebooks, codebooks
    )
    given = RQEmbedding.from_pretrained(BASE, codes=CODES, codebook_size=300)
    assert torch.equal(given.codes.long(), CODES)
    assert given.codes.dtype == torch.int16
    assert RQEmbedding(I, D, CODES, codebook_size=256).codes.dtype == torch.uint8
    warm = RQEmbedding(I, D, CODES, codebooks=torch.ones(3, 6, D))
    assert warm.codebook_size == 6
    assert torch.equal(warm(torch.tensor([0])), torch.full((1, D), 3.0))


# --- wrong input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FullEmbedding(0, D), ValueError, "num_embeddings: expected at least 1, got 0"),
        (lambda: FullEmbedding(I, 2.0), TypeError, "embedding_dim: expected an integer, got float"),
        (lambda: FullEmbedding(I, D, I), ValueError, "padding_idx"),
        (lambda: FullEmbedding(I, D, init_std=-1.0), ValueError, "init_std"),
        (
            lambda: LoRAEmbedding(I, D, base=BASE[:3]),
            ValueError,
            r"base: expected shape \[20, 8\], got \[3, 8\]",
        ),
        (lambda: LoRAEmbedding(I, D, base=BASE.long()), TypeError, "base: expected float32, float64"),
        (lambda: LoRAEmbedding(I, D, base=FLOAT8), TypeError, "base: expected .* got torch.float8"),
        (
            lambda: LoRAEmbedding(I, D, base=BASE.to_sparse()),
            TypeError,
            "base: .* got layout torch.sparse_coo",
        ),
        (lambda: LoRAEmbedding(I, D, base=BASE.to_mkldnn()), TypeError, "base: .* got layout torch._mkldnn"),
        (lambda: LoRAEmbedding(I, D, dtype=torch.int64), TypeError, "dtype: expected .* got torch.int64"),
        (lambda: LoRAEmbedding(I, D, padding_idx=1.0), TypeError, "padding_idx: .* integer, got float"),
        (lambda: LoRAEmbedding(I, D, init_std="1"), TypeError, "init_std: expected a number, got str"),
        (
            lambda: LoRAEmbedding(I, D, generator=3),
            TypeError,
            "generator: expected a torch.Generator .* got int",
        ),
        (lambda: LoRAEmbedding(I, D, rank=0), ValueError, "rank: expected at least 1, got 0"),
        (lambda: LoRAEmbedding.from_pretrained(BASE[0]), ValueError, r"embeddings: expected shape \[I, D\]"),
        (
            lambda: LoRAEmbedding.from_pretrained([[1.0]]),
            TypeError,
            "embeddings: expected a Tensor, got list",
        ),
        (
            lambda: HashEmbedding(I, D, reduce="max"),
            ValueError,
            "reduce: expected 'mean' or 'sum', got 'max'",
        ),
        (lambda: HashEmbedding(I, D, num_hashes=0), ValueError, "num_hashes"),
        (lambda: RQEmbedding(I, D, CODES), ValueError, "codebook_size"),
        (lambda: RQEmbedding(I, D, CODES[:5], codebook_size=6), ValueError, "codes: expected shape"),
        (lambda: RQEmbedding(I, D, CODES.float(), codebook_size=6), TypeError, "codes: expected uint8"),
        (lambda: RQEmbedding(I, D, CODES.to_sparse(), codebook_size=6), TypeError, "codes: .* dense tensor"),
        (
            lambda: RQEmbedding(I, D, CODES, codebook_size=4),
            IndexError,
            r"codes: expected values in \[0, .* got 5",
        ),
        (lambda: RQEmbedding(I, D, CODES, codebooks=BASE), ValueError, "codebooks: expected shape"),
        (
            lambda: RQEmbedding.from_pretrained(BASE, codebook_size=50),
            ValueError,
            "codebook_size.*20, got 50",
        ),
        (
            lambda: RQEmbedding.from_pretrained(BASE / 0, codebook_size=5),
            ValueError,
            "vectors: expected finite",
        ),
        (lambda: RQEmbedding.from_pretrained(BASE, codes=CODES, warm_start=True), ValueError, "warm_start"),
        (lambda: SumEmbedding([]), ValueError, "parts: expected at least one"),
        (lambda: SumEmbedding([nn.Embedding(I, D)]), TypeError, r"parts\[0\]: .* got Embedding"),
        (lambda: SumEmbedding([LoRAEmbedding(I, D, base=BASE)]), ValueError, r"parts\[0\]: expected no base"),
        (lambda: SumEmbedding([LoRAEmbedding(I, D), LoRAEmbedding(I, 4)]), ValueError, r"parts\[1\]"),
        (lambda: FullEmbedding(I, D).full_embedding(0), ValueError, "chunk_size"),
        (lambda: FullEmbedding(I, D)(torch.ones(2)), TypeError, "items.ids: expected an int32 or int64"),
        (lambda: FullEmbedding(I, D)([1, 2]), TypeError, "items.ids: .* got list"),
        (lambda: FullEmbedding(I, D)(CODES.to_sparse()), TypeError, "items.ids: .* layout torch.sparse_coo"),
        (lambda: LoRAEmbedding(I, D)(Items(torch.ones(2).int(), torch.ones(2))), TypeError, "items.rows"),
        (
            lambda: setattr(LoRAEmbedding(I, D), "weight", nn.Parameter(BASE)),
            AttributeError,
            "weight: LoRAEmbedding computes it",
        ),
        (lambda: setattr(FullEmbedding(I, D, base=BASE), "weight", BASE), AttributeError, "computes it"),
    ],
)
def test_wrong_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [I, -2])
@pytest.mark.parametrize("freeze", [None, True, False], ids=["alone", "plugged", "trained-base"])
@every
def test_ids_out_of_range_are_named_as_the_caller_gave_them(
    make: Make, freeze: bool | None, bad: int
) -> None:
    module = make() if freeze is None else make(base=BASE, freeze_base=freeze)
    if isinstance(module, HashEmbedding) and freeze is None and bad > 0:
        assert module(torch.tensor([bad])).any()  # any id has its hashes
        return
    with pytest.raises(IndexError, match=f"^items: index {bad} at position 1 is out of range"):
        module(torch.tensor([0, bad]))


@every
def test_ids_on_another_device_are_named(make: Make) -> None:
    with pytest.raises(ValueError, match=r"^items: expected the device of \w+ \(cpu\), got meta"):
        make()(torch.zeros(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(("ids", "rows", "name"), [([0, 1], [0, I], "rows"), ([0, I], [0, 1], "items")])
def test_rows_out_of_range_are_told_from_ids(ids: list[int], rows: list[int], name: str) -> None:
    items = Items(torch.tensor(ids), torch.tensor(rows))
    for module in (FullEmbedding(I, D, base=BASE), LoRAEmbedding(I, D, base=BASE)):
        with pytest.raises(IndexError, match=f"^{name}: index 20 at position 1"):
            module(items)


class OwnTable(ItemEmbedding):
    """Reads a table that it does not list in `_row_parameters`, by ids."""

    def __init__(self, width: int = D) -> None:
        super().__init__(I, D)
        self.table = nn.Parameter(torch.randn(I, width, generator=torch.Generator().manual_seed(5)))

    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        return read_rows(self.table, items)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        pass


def test_rows_index_the_listed_tables_alone() -> None:
    module = SumEmbedding([OwnTable(), LoRAEmbedding(I, D, generator=torch.Generator().manual_seed(6))])
    nn.init.normal_(module.get_parameter("parts.1.B"), generator=torch.Generator().manual_seed(7))
    ids, rows = torch.tensor([7, 3, 11, -1]), torch.tensor([1, 0, 2, -1])
    touched = {"parts.1.A": module.get_parameter("parts.1.A")[[3, 7, 11]]}
    assert torch.equal(functional_call(module, touched, (Items(ids, rows),)), module(ids))


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"OwnTable\._lookup: expected vectors \[2, 8\].*got shape \[2, 4\]"):
        OwnTable(width=4)(torch.tensor([0, 1]))


def _plain(table: Tensor, items: Items, base: Tensor | None) -> Tensor:
    vectors = table[items.ids % I]
    return vectors * (items.ids >= 0)[..., None] + (0 if base is None else read_rows(base, items))


@pytest.mark.parametrize(
    ("lookup", "stacked", "message"),
    [
        (_plain, False, None),
        (_plain, True, r"Mine\.takes_stacked: expected False"),
        (
            lambda table, items, base: table[items.ids] + read_rows(base, items),
            False,
            "zeros for items of -1",
        ),
        (
            lambda table, items, base: nn.functional.embedding(items.ids, table) + read_rows(base, items),
            False,
            "zeros for items of -1.*IndexError",
        ),
        (lambda table, items, base: _plain(table, items, None), False, "rows of `base`"),
        (lambda table, items, base: read_rows(table, items) + read_rows(base, items), True, None),
        # Right for one client, and for many at once of a shape that looks right.
        (
            lambda table, items, base: read_rows(table.flatten(0, -2)[:I], items) + read_rows(base, items),
            True,
            "takes_stacked",
        ),
    ],
)
def test_strategies_of_others_are_checked_when_built(
    lookup: Callable[[Tensor, Items, Tensor | None], Tensor],
    stacked: bool,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spec, "STRATEGIES", dict(spec.STRATEGIES))
    monkeypatch.setattr(spec, "_REGISTERED", dict(spec._REGISTERED))

    class Mine(OwnTable):
        takes_stacked = stacked

        def __init__(self, items: int, dim: int, *, generator: torch.Generator, **options: Any) -> None:
            ItemEmbedding.__init__(self, items, dim, **options)
            self.table = nn.Parameter(torch.randn(items, dim, generator=generator))

        def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
            return lookup(self.table, items, base)

    register_strategy("mine")(Mine)
    base, generator = torch.ones(I, D), torch.Generator().manual_seed(0)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        build_embedding("p-mine", I, D, base=base, generator=generator)


def test_registering_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "STRATEGIES", dict(spec.STRATEGIES))
    monkeypatch.setattr(spec, "_REGISTERED", dict(spec._REGISTERED))
    register_strategy("mine")(OwnTable)
    again = type("OwnTable", (OwnTable,), {"__module__": OwnTable.__module__})
    register_strategy("mine", "rank")(again)
    assert (spec._REGISTERED["mine"], spec.STRATEGIES["mine"]) == (again, ("rank",))
    for name in ("mine", "lora"):
        with pytest.raises(ValueError, match=f"expected a new name, got '{name}'"):
            register_strategy(name)(LoRAEmbedding)
    with pytest.raises(TypeError, match="expected a subclass of ItemEmbedding"):
        register_strategy("other")(nn.Embedding)  # type: ignore[type-var]
