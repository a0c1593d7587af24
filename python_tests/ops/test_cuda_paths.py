"""Paths of the CUDA kernels that small cases do not take: long lists, sorted scatters, tables that shared
memory does not hold, sums over many blocks. The emulator runs them; each must equal the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import (
    EMULATED,
    emulated_kernels,
    grid_limit,
    in_both_orders,
    kernel_launches,
    multiprocessors,
    shared_limit,
)
from op_cases import CASES, IDS, Case

from fedpeft_ext import ops
from fedpeft_ext.ops import ItemParts

pytestmark = pytest.mark.skipif(not EMULATED, reason="fedpeft_ext._emulator is not built")

# Shared memory of a block in bytes: what GPUs have, and so little that every scatter sorts its entries.
LIMITS = [99 << 10, 1 << 10]


def both(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(torch.ops.fedpeft_ext, name), in_both_orders(name)


def assert_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("width", [3, 8, 200])
@pytest.mark.parametrize("positions", [70, 700])
def test_row_gradients(limit: int, width: int, positions: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 9, (2, positions), generator=g)
    rows[0, :40] = 3  # a row long enough to cross tiles of the sorted entries
    grad = torch.randn(2, positions, width, generator=g)
    cpu, gpu = both("client_embedding_backward")
    with shared_limit(limit):
        assert_close(gpu(grad, rows, 9, True), cpu(grad, rows, 9, True))
        assert_close(gpu(grad, rows, 9, False), cpu(grad, rows, 9, False))


@pytest.mark.parametrize("limit", LIMITS)
def test_many_rows(limit: int) -> None:
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(-1, 9000, (1, 500), generator=g)
    grad = torch.randn(1, 500, 4, generator=g)
    cpu, gpu = both("client_embedding_backward")
    with shared_limit(limit):
        assert torch.equal(gpu(grad, rows, 9000, True), cpu(grad, rows, 9000, True))


# Tables of blocks' own, in three launches: slices of columns, odd widths, several copies of a table, several
# ranges of its rows (1250 of 16 bits), a row that many positions read, lanes without a column. Blocks loop.
@pytest.mark.parametrize(
    ("items", "levels", "rows", "width"),
    [(300, 4, 40, 64), (40, 2, 3, 7), (300, 3, 90, 8), (9000, 5, 250, 40), (300, 5, 16, 130), (300, 1, 7, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_shared_tables(
    items: int, levels: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(11)
    ids = torch.randint(-1, items, (3, 6000 // levels + 5), generator=g)
    ids[1, :700] = 5
    grad = torch.randn(*ids.shape, width, generator=g).to(dtype)
    grad[ids < 0] = torch.nan  # which padding must not let in
    unaligned = torch.empty(grad.numel() + 1, dtype=dtype)[1:].view_as(grad).copy_(grad)
    codes = torch.randint(0, rows, (items, levels), generator=g, dtype=torch.uint8)
    hashes = torch.randint(1, 2**61 - 1, (levels, 2), generator=g)
    table = torch.zeros(rows, width, dtype=dtype)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("rq_lookup_backward", (ids, codes, rows, False)),
        ("hash_lookup_backward", (ids, table, hashes, None, None, None, None, True)),
        ("client_embedding_backward", (ids.clamp(max=2 * rows - 1), 2 * rows, False)),
    ]
    for name, arguments in calls:
        cpu, gpu = both(name)
        with shared_limit(48 << 10), grid_limit(64), kernel_launches() as launched:
            found = gpu(unaligned if name == "hash_lookup_backward" else grad, *arguments)
        expected = cpu(grad.double(), *(a.double() if a is table else a for a in arguments))
        if name == "hash_lookup_backward":
            found, expected = found[0], expected[0]
        assert launched.count == 3 or name == "client_embedding_backward"  # short ones are lists
        close = {"rtol": 1e-2, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(found.double(), expected, **close)


# Codes of an item as one word (2 and 4 levels), and not: 3 levels, words that are not aligned.
@pytest.mark.parametrize(
    ("levels", "shift", "index"),
    [(3, 0, torch.int64), (4, 0, torch.int64), (2, 0, torch.int32), (4, 1, torch.int64)],
)
def test_lookups_in_large_shared_codebooks(levels: int, shift: int, index: torch.dtype) -> None:
    g = torch.Generator().manual_seed(12)
    ids = torch.randint(-1, 500, (3000,), generator=g).to(index)
    codes = torch.randint(0, 60, (500 * levels + 1,), generator=g, dtype=torch.uint8)
    codes = codes[shift : shift + 500 * levels].view(500, levels)
    base = torch.randn(500, 72, generator=g)
    cpu, gpu = both("rq_lookup")
    for dtype in (torch.float32, torch.bfloat16):
        codebooks, under = torch.randn(levels, 60, 72, generator=g).to(dtype), base.to(dtype)
        for limit in (99 << 10, 32 << 10, 16 << 10):  # from L1; whole; columns in slices, the last narrower
            with shared_limit(limit):
                assert torch.equal(gpu(ids, codes, codebooks, under), cpu(ids, codes, codebooks, under))
    with shared_limit(16 << 10):
        assert torch.equal(gpu(ids, codes, codebooks, None), cpu(ids, codes, codebooks, None))
        last = int(ids.max())
        with pytest.raises(IndexError, match=f"items: index {last} at position"):
            gpu(ids, codes[:last], codebooks, None)
        codes[last, 1] = 60
        with pytest.raises(IndexError, match="codes: index 60 at position"):
            gpu(ids, codes, codebooks, None)


# Indices of a turn come with the rows of the one before, at every size of an index.
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("code", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("per_client", [True, False])
def test_lookups_whose_blocks_take_several_turns(
    index: torch.dtype, code: torch.dtype, per_client: bool
) -> None:
    g = torch.Generator().manual_seed(12)
    clients, positions, width = (3, 2100, 128) if per_client else (1, 6300, 128)
    items = torch.randint(-1, 50, (clients, positions), generator=g).to(index)
    base = torch.randn(50, width, generator=g)
    codes = torch.randint(0, 7, (50, 2), generator=g).to(code)
    hashes = torch.randint(1, 2**61 - 1, (2, 2), generator=g)
    lead = (clients,) if per_client else ()
    codebooks, table = (
        torch.randn(*lead, 2, 7, width, generator=g),
        torch.randn(*lead, 5000, width, generator=g),
    )
    for name, arguments in (
        ("rq_lookup", (items, codes, codebooks, base)),
        ("hash_lookup", (items, table, hashes, None, None, None, None, False, base)),
    ):
        cpu, gpu = both(name)
        assert_close(gpu(*arguments), cpu(*arguments))


# Enough clients and positions that a block copies its client's table, whole or in slices of columns, and
# goes through chunks of positions; or else lanes look it up.
@pytest.mark.parametrize("limit", [99 << 10, 9 << 10, 1 << 10])
@pytest.mark.parametrize(("positions", "width"), [(25, 72), (1100, 36)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lookups_in_copied_tables(limit: int, positions: int, width: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(13)
    clients = 34 if positions == 25 else 9
    items = torch.randint(-1, 60, (clients, positions), generator=g)
    codes = torch.randint(0, 6, (60, 3), generator=g, dtype=torch.uint8)
    hashes = torch.randint(1, 2**61 - 1, (3, 2), generator=g)
    base = torch.randn(60, width, generator=g).to(dtype)
    codebooks = torch.randn(clients, 3, 6, width, generator=g).to(dtype)
    table = codebooks[:, 0]
    for under in (base, None):
        cpu, gpu = both("rq_lookup")
        with shared_limit(limit):
            found = gpu(items, codes, codebooks, under)
        assert torch.equal(found, cpu(items, codes, codebooks, under))
        cpu, gpu = both("hash_lookup")
        with shared_limit(limit):
            found = gpu(items, table, hashes, None, None, None, None, True, under)
        torch.testing.assert_close(found, cpu(items, table, hashes, None, None, None, None, True, under))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebooks(limit: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    items = torch.randint(-1, 30, (2, 90), generator=g)
    codes = torch.randint(0, 5, (30, 3), generator=g, dtype=torch.uint8)
    codebooks = torch.randn(2, 3, 5, 16, generator=g).to(dtype)
    cpu, gpu = both("rq_lookup")
    with shared_limit(
        limit
    ):  # with enough memory the codebooks are copied into it: 90 positions for 5 codes a level
        assert torch.equal(gpu(items, codes, codebooks, None), cpu(items, codes, codebooks, None))
    grad = torch.randn(2, 90, 16, generator=g).to(dtype)
    cpu, gpu = both("rq_lookup_backward")
    with shared_limit(limit):
        torch.testing.assert_close(gpu(grad, items, codes, 5, True), cpu(grad, items, codes, 5, True))
        torch.testing.assert_close(gpu(grad, items, codes, 5, False), cpu(grad, items, codes, 5, False))


@pytest.mark.parametrize("limit", [99 << 10, 8 << 10])
@pytest.mark.parametrize("senet", [False, True])
@pytest.mark.parametrize("per_client", [False, True])
def test_hash_tables(limit: int, senet: bool, per_client: bool) -> None:
    g = torch.Generator().manual_seed(3)
    items = torch.randint(-1, 400, (2, 1100), generator=g)
    lead = (2,) if per_client else ()
    table = torch.randn(*lead, 7, 12, generator=g, dtype=torch.float64)
    hashes = torch.randint(1, 2**61 - 1, (3, 2), generator=g)
    net = [torch.randn(*lead, *s, generator=g, dtype=torch.float64) for s in ((4, 3), (4,), (3, 4), (3,))]
    weights = net if senet else [None] * 4
    cpu, gpu = both("hash_lookup")
    with shared_limit(limit):
        assert_close(
            gpu(items, table, hashes, *weights, True, None), cpu(items, table, hashes, *weights, True, None)
        )
    grad = torch.randn(2, 1100, 12, generator=g, dtype=torch.float64)
    cpu, gpu = both("hash_lookup_backward")
    with shared_limit(limit):
        assert_close(
            gpu(grad, items, table, hashes, *weights, True), cpu(grad, items, table, hashes, *weights, True)
        )


# Clients that a block each takes whole; columns of a table in slices; one row read by most positions.
@pytest.mark.parametrize("limit", [99 << 10, 40 << 10])
@pytest.mark.parametrize("senet", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_tables_of_many_clients(limit: int, senet: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(10)
    items = torch.randint(-1, 400, (5, 150), generator=g)
    items[:, ::3] = 7
    hashes = torch.randint(1, 2**61 - 1, (3, 2), generator=g)
    shapes = ((90, 128), (17, 3), (17,), (3, 17), (3,))
    table, *net = [torch.randn(5, *s, generator=g).to(dtype) for s in shapes]
    weights = net if senet else [None] * 4
    grad = torch.randn(5, 150, 128, generator=g).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.5}
    cpu, gpu = both("hash_lookup")
    with shared_limit(limit):
        found = gpu(items, table, hashes, *weights, True, None)
    torch.testing.assert_close(found, cpu(items, table, hashes, *weights, True, None), **tolerance)
    cpu, gpu = both("hash_lookup_backward")
    with shared_limit(limit), kernel_launches() as launched:
        found = gpu(grad, items, table, hashes, *weights, True)
    if limit > 90 << 10:
        assert launched.count == 1
    torch.testing.assert_close(found, cpu(grad, items, table, hashes, *weights, True), **tolerance)


# Lists whose values lie in shared memory: all columns at a time, in slices (the last narrower), or, as the
# limit goes down, in none; clients so small that a warp takes one. Which of these it is changes no bit.
@pytest.mark.parametrize(
    ("clients", "positions", "rows", "width"),
    [(9, 150, 31, 64), (5, 150, 30, 72), (4, 40, 7, 37), (9, 300, 2, 12), (4, 0, 50, 40), (17, 12, 5, 6)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_in_shared_memory(
    clients: int, positions: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(12)
    items = torch.randint(-1, 90, (clients, positions), generator=g)
    items[:, ::3] = 7
    grad = torch.randn(clients, positions, width, generator=g).to(dtype)
    unaligned = torch.empty(grad.numel() + 1, dtype=dtype)[1:].view_as(grad)
    codes = torch.randint(0, rows, (90, 3), generator=g, dtype=torch.uint8)
    hashes = torch.randint(1, 2**61 - 1, (3, 2), generator=g)
    table = torch.zeros(clients, rows, width, dtype=dtype)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("rq_lookup_backward", (items, codes, rows, True)),
        ("hash_lookup_backward", (items, table, hashes, None, None, None, None, True)),
        ("client_embedding_backward", (items.remainder(rows + 1) - 1, rows, True)),
    ]
    for name, arguments in calls:
        cpu, gpu = both(name)
        values = grad.clone()
        values[arguments[0] < 0] = torch.nan  # which padding must not let in
        exact = cpu(values.double(), *(a.double() if a is table else a for a in arguments))
        results = []
        for limit in (227 << 10, 40 << 10, 16 << 10, 6 << 10):
            with shared_limit(limit), kernel_launches() as launched:
                found = gpu(values if limit > 20 << 10 else unaligned.copy_(values), *arguments)
            assert launched.count == 1
            results.append(found[0] if isinstance(found, tuple) else found)
        for limit in (227 << 10, 6 << 10):
            with shared_limit(limit), grid_limit(2):  # so that blocks take several clients
                found = gpu(values, *arguments)
            results.append(found[0] if isinstance(found, tuple) else found)
        assert all(torch.equal(results[0], other) for other in results[1:])
        close = {"rtol": 1e-2, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
        exact = exact[0] if isinstance(exact, tuple) else exact
        torch.testing.assert_close(results[0].double(), exact, **close)


# Fewer clients than multiprocessors: several blocks share a client's rows, or its positions.
@pytest.mark.parametrize("senet", [False, True])
def test_few_clients_on_a_large_device(senet: bool) -> None:
    g = torch.Generator().manual_seed(15)
    items = torch.randint(-1, 400, (3, 300), generator=g)
    grad = torch.randn(3, 300, 40, generator=g, dtype=torch.float64)
    codes = torch.randint(0, 50, (400, 3), generator=g, dtype=torch.uint8)
    hashes = torch.randint(1, 2**61 - 1, (3, 2), generator=g)
    shapes = ((150, 40), (5, 3), (5,), (3, 5), (3,))
    table, *net = [torch.randn(3, *s, generator=g, dtype=torch.float64) for s in shapes]
    A, B = torch.randn(3, 400, 4, generator=g).double(), torch.randn(3, 40, 4, generator=g).double()
    weights = net if senet else [None] * 4
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("hash_lookup", (items, table, hashes, *weights, True, None)),
        ("hash_lookup_backward", (grad, items, table, hashes, *weights, True)),
    ]
    if not senet:
        calls += [
            ("rq_lookup_backward", (grad, items, codes, 50, True)),
            ("client_embedding_backward", (grad, items, 400, True)),
            ("lora_lookup_backward", (grad, items, A, B)),
        ]
    for name, arguments in calls:
        cpu, gpu = both(name)
        with multiprocessors(132):
            assert_close(gpu(*arguments), cpu(*arguments))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("per_client", "width", "rank"), [(False, 60, 4), (True, 131, 11)])
def test_low_rank(limit: int, per_client: bool, width: int, rank: int) -> None:
    g = torch.Generator().manual_seed(4)
    items = torch.randint(-1, 50, (2, 1100), generator=g)
    lead = (2,) if per_client else ()
    A = torch.randn(*lead, 50, rank, generator=g, dtype=torch.float64)
    B = torch.randn(*lead, width, rank, generator=g, dtype=torch.float64)
    cpu, gpu = both("lora_lookup")
    with shared_limit(limit):  # B takes 1920 bytes or more
        assert_close(gpu(items, A, B, None, None), cpu(items, A, B, None, None))
    grad = torch.randn(2, 1100, width, generator=g, dtype=torch.float64)
    cpu, gpu = both("lora_lookup_backward")
    with shared_limit(limit):
        assert_close(gpu(grad, items, A, B), cpu(grad, items, A, B))


# Blocks take whole clients, warps several tiles of positions: vectors and single elements; more columns
# and ranks than a pass takes.
@pytest.mark.parametrize(("width", "rank"), [(64, 8), (27, 3), (136, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_low_rank_of_many_positions(width: int, rank: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(14)
    items = torch.randint(-1, 50, (3, 150), generator=g)
    A = torch.randn(3, 50, rank, generator=g).to(dtype)
    B = torch.randn(3, width, rank, generator=g).to(dtype)
    grad = torch.randn(3, 150, width, generator=g).to(dtype)
    cpu, gpu = both("lora_lookup_backward")
    with kernel_launches() as launched:
        found = gpu(grad, items, A, B)
    assert launched.count == 1
    with grid_limit(2):
        assert all(map(torch.equal, gpu(grad, items, A, B), found))
    exact = cpu(*(t.double() if t.is_floating_point() else t for t in (grad, items, A, B)))
    close = {"rtol": 1e-2, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close([t.double() for t in found], list(exact), **close)


# Kernels read the first row at padding, and for hashes that there are not: what is in it must not come in.
def test_first_rows_that_are_not_looked_up() -> None:
    g = torch.Generator().manual_seed(13)
    items = torch.randint(-1, 40, (2, 30), generator=g)
    items[items == 0] = 1
    items[:, ::7] = -1
    base, table = torch.randn(40, 64, generator=g), torch.randn(2, 25, 64, generator=g)
    codes = torch.randint(1, 25, (40, 1), generator=g, dtype=torch.uint8)
    A, B = torch.randn(2, 40, 4, generator=g), torch.randn(2, 64, 4, generator=g)
    base[0] = table[:, 0] = A[:, 0] = torch.nan
    hashes = torch.randint(1, 2**61 - 1, (3, 2), generator=g)
    net = [torch.randn(2, *s, generator=g) for s in ((5, 3), (5,), (3, 5), (3,))]
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("rq_lookup", (items, codes, table.unsqueeze(1), base)),
        ("hash_lookup", (items, table, hashes, None, None, None, None, True, base)),
        ("hash_lookup", (items, table, hashes, *net, True, base)),
        ("lora_lookup", (items, A, B, base, None)),
    ]
    for name, arguments in calls:
        cpu, gpu = both(name)
        found = gpu(*arguments)
        assert bool((found[items < 0] == 0).all()), name
        assert name == "hash_lookup" or not bool(found.isnan().any()), name
        torch.testing.assert_close(found, cpu(*arguments), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_losses_of_many_positions() -> None:
    g = torch.Generator().manual_seed(5)
    positive, negative = torch.randn(2, 2, 9000, generator=g)
    items = torch.randint(-1, 3, (2, 9000), generator=g)
    for name in ("bpr_loss", "bce_loss"):
        cpu, gpu = both(name)
        assert_close(gpu(positive, negative, items), cpu(positive, negative, items))
        cpu, gpu = both(name + "_backward")
        grad = torch.tensor([1.0, 2.0])
        assert_close(gpu(grad, positive, negative, items), cpu(grad, positive, negative, items))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_whose_blocks_go_through_many_tiles(dropout: float) -> None:
    """A block keeps its weights for five tiles of positions, some of them padding alone."""
    cpu, gpu = both("client_layer")
    g = torch.Generator().manual_seed(6)
    clients, positions = 65, 300
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((65, 300, 8), (65, 5, 8), (65, 5)))
    items = torch.randint(-1, 9, (clients, positions), generator=g)
    items[:20, 64:192] = -1
    items[20:40, 128:] = -1
    arguments = (x, weight, bias, items, torch.arange(clients), dropout, 1, 2, 3, 4)
    assert_close(gpu(*arguments), cpu(*arguments))
    # Of float64 a block takes a tile, and then another.
    doubles = [t[:22].double() for t in (x, weight, bias)]
    single = (*doubles, items[:22], torch.arange(22), dropout, 1, 2, 3, 4)
    with grid_limit(2):
        assert_close(gpu(*single), cpu(*single))


# One and several tiles of outputs, of inputs; vectors and single elements.
@pytest.mark.parametrize("shape", [(2, 200, 64, 64), (4, 150, 72, 68), (9, 70, 5, 130)])
def test_both_gradients_of_a_layer_from_one_read(shape: tuple[int, int, int, int]) -> None:
    """The bits of the kernel of devices with less shared memory, in which each tile is a block's."""
    cpu, gpu = both("client_layer_backward")
    clients, positions, inputs, outputs = shape
    g = torch.Generator().manual_seed(7)
    grad, out = torch.randn(2, clients, positions, outputs, generator=g)
    x = torch.randn(clients, positions, inputs, generator=g)
    weight = torch.randn(clients, outputs, inputs, generator=g)
    items = torch.randint(-1, 9, (clients, positions), generator=g)
    items[0, :64] = -1
    items[1, 10:] = -1
    arguments = (grad, x.where(items[..., None] >= 0, torch.nan), weight, out, items, 0.5)
    with shared_limit(99 << 10), grid_limit(3):
        apart = gpu(*arguments)
    with shared_limit(227 << 10), grid_limit(3):
        together = gpu(*arguments)
    assert all(map(torch.equal, together, apart))
    assert_close(together, cpu(*arguments))


def test_codes_of_wide_rows() -> None:
    g = torch.Generator().manual_seed(6)
    x, codebooks = torch.randn(70, 600, generator=g), torch.randn(2, 300, 600, generator=g)
    cpu, gpu = both("rq_encode")
    assert torch.equal(gpu(x, codebooks), cpu(x, codebooks))
    # Residuals made anew for each tile of codes, where shared memory does not hold them.
    x, codebooks = torch.randn(130, 600, generator=g), torch.randn(3, 70, 600, generator=g)
    with shared_limit(48 << 10):
        assert torch.equal(gpu(x, codebooks), cpu(x, codebooks))


@pytest.mark.parametrize("length", [700, 4096, 4500])
def test_lists_sorted_within_a_block_and_longer_ones(length: int) -> None:
    items = torch.randint(-1, 900, (2, length), generator=torch.Generator().manual_seed(8))
    cpu, gpu = both("touched_rows")
    for dtype in (torch.int32, torch.int64):
        for mine, theirs in zip(gpu(items.to(dtype)), cpu(items.to(dtype)), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("clients", [32, 33, 100])
def test_sums_of_many_clients(clients: int) -> None:
    g = torch.Generator().manual_seed(9)
    updates, weights = torch.randn(clients, 70, generator=g), torch.rand(clients, generator=g).double()
    start = torch.randn(70, generator=g).double()
    cpu, gpu = both("accumulate_updates_")
    sums = start.clone(), start.clone()
    cpu(sums[0], updates, weights, None, 2.0**-40)
    gpu(sums[1], updates, weights, None, 2.0**-40)
    assert torch.equal(*sums)  # on a grid, sums are exact


def test_samples_of_many_clients() -> None:
    cpu, gpu = both("sample_clients")
    clients = torch.randperm(20_000, generator=torch.Generator().manual_seed(10))
    # Of at most a sixteenth places are drawn, and once more as many as were drawn twice.
    for count, launches in ((0, 1), (1, 2), (1250, 2), (1251, 3), (19_999, 3), (20_000, 3)):
        with kernel_launches() as launched:
            chosen = gpu(clients, count, 1, 2, 3)
        assert torch.equal(chosen, cpu(clients, count, 1, 2, 3))
        assert launched.count == launches
    # More clients than a block ranks at a time share the bin where the sample ends.
    clients = torch.cat([torch.arange(100), torch.full((600,), 7)])
    for count in (90, 300, 600):
        assert torch.equal(gpu(clients, count, 1, 2, 3), cpu(clients, count, 1, 2, 3))


# Shared memory for all groups of a block; for a warp a position; for none: activations in memory, with more
# positions than have room at a time.
@pytest.mark.parametrize(("limit", "hidden"), [(99 << 10, 9), (1 << 10, 9), (1 << 8, 40)])
@pytest.mark.parametrize("per_client", [False, True])
def test_senets_of_any_size(limit: int, hidden: int, per_client: bool) -> None:
    g = torch.Generator().manual_seed(7)
    lead = (2,) if per_client else ()
    items = torch.randint(-1, 400, (2, 60), generator=g)
    table = torch.randn(*lead, 9, 8, generator=g)
    hashes = torch.randint(1, 2**61 - 1, (12, 2), generator=g)
    shapes = ((hidden, 12), (hidden,), (12, hidden), (12,))
    weights = [torch.randn(*lead, *s, generator=g) for s in shapes]
    grad = torch.randn(2, 60, 8, generator=g)
    cpu, gpu = both("hash_lookup")
    with shared_limit(limit):
        assert_close(
            gpu(items, table, hashes, *weights, True, None), cpu(items, table, hashes, *weights, True, None)
        )
    cpu, gpu = both("hash_lookup_backward")
    arguments = (grad, items, table, hashes, *weights, True)
    with shared_limit(limit):
        torch.testing.assert_close(gpu(*arguments), cpu(*arguments), rtol=1e-4, atol=1e-4)


# Two positions a group, a client a block, and a position a group.
@pytest.mark.parametrize(
    ("num_hashes", "rows", "width", "positions"), [(2, 16, 32, 40), (5, 16, 8, 40), (5, 600, 8, 60)]
)
def test_senets_whose_blocks_take_several_clients(
    num_hashes: int, rows: int, width: int, positions: int
) -> None:
    g = torch.Generator().manual_seed(11)
    clients, hidden = 7, 6
    items = torch.randint(-1, 400, (clients, positions), generator=g)
    hashes = torch.randint(1, 2**61 - 1, (num_hashes, 2), generator=g)
    shapes = ((rows, width), (hidden, num_hashes), (hidden,), (num_hashes, hidden), (num_hashes,))
    table, *weights = [torch.randn(clients, *shape, generator=g) for shape in shapes]
    grad = torch.randn(clients, positions, width, generator=g)
    for name, arguments in (
        ("hash_lookup", (items, table, hashes, *weights, True, None)),
        ("hash_lookup_backward", (grad, items, table, hashes, *weights, True)),
    ):
        cpu, gpu = both(name)
        with grid_limit(2):
            torch.testing.assert_close(gpu(*arguments), cpu(*arguments), rtol=1e-4, atol=1e-4)


def test_index_errors_name_the_argument() -> None:
    _, gpu = both("client_embedding")
    with pytest.raises(IndexError, match="rows: index 5 at position 1 is out of range: expected -1"):
        gpu(torch.tensor([[0, 5]]), torch.zeros(1, 5, 4))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_small_cases_take_one_launch_a_direction(case: Case) -> None:
    inputs = case.floats(torch.float32, requires_grad=True)
    with emulated_kernels():
        with kernel_launches() as forward:
            out = case.function(ops)(*inputs)
        with kernel_launches() as backward:
            torch.autograd.grad(out.sum(), inputs)
    assert forward.count == 1
    has_base = case.name.endswith("base") or case.name == "lora_client_rows"
    assert backward.count == 1 + has_base  # a base's gradient is a scatter of its own


# A block takes two of the three clients. Layers of float64 have kernels of their own.
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_loop(case: Case, dtype: torch.dtype) -> None:
    inputs = case.floats(dtype, requires_grad=True)

    def run() -> list[torch.Tensor]:
        out = case.function(ops)(*inputs)
        return [out, *torch.autograd.grad((out * out).sum(), inputs)]

    with emulated_kernels():
        expected = run()
        with grid_limit(2):
            assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("length", [70, 5000])
def test_blocks_that_loop_over_lists(length: int) -> None:
    cpu, gpu = both("touched_rows")
    items = torch.randint(-1, 40, (7, length), generator=torch.Generator().manual_seed(3))
    with grid_limit(2):
        assert all(map(torch.equal, gpu(items), cpu(items)))


def other_ops() -> dict[str, Callable[[], Any]]:
    g = torch.Generator().manual_seed(8)
    rows = torch.tensor([[0, 1, 2], [3, 4, 4]])
    clients, indptr, steps = torch.tensor([0, 1]), torch.tensor([0, 3, 5]), torch.ones(2, dtype=torch.int64)
    items = torch.tensor([0, 1, 2, 3, 4])
    param, grad, first, second = torch.rand(4, 2, 3, 4, generator=g)
    return {
        "sample_negatives": lambda: ops.sample_negatives(rows, clients, indptr, items, 9, 2, seed=1, round=0),
        "hash_buckets": lambda: ops.hash_buckets(rows, ops.make_hashes(2, seed=0), 7),
        "rq_encode": lambda: ops.rq_encode(param[0], grad),
        "client_adam_": lambda: ops.client_adam_(param, grad, first, second, steps, l2=0.1),
        "client_sgd_": lambda: ops.client_sgd_(param, grad, first, momentum=0.9),
        "touched_rows": lambda: ops.touched_rows(rows),  # besides torch's sort
        "accumulate_updates_": lambda: ops.accumulate_updates_(
            param[0].double(), grad, torch.ones(2).double()
        ),
        "apply_updates_": lambda: ops.apply_updates_(
            param[0], first[0].double(), torch.tensor([1]), scale=0.5
        ),
    }


def test_other_ops_take_one_launch() -> None:
    calls, counts = other_ops(), {}
    with emulated_kernels():
        for name, call in calls.items():
            with kernel_launches() as launched:
                call()
            counts[name] = launched.count
    assert counts == dict.fromkeys(calls, 1)


def test_other_ops_whose_blocks_loop() -> None:
    g = torch.Generator().manual_seed(15)
    items = torch.randint(-1, 90, (3, 900), generator=g)
    met = torch.randperm(90, generator=g)[:12].view(3, 4).sort().values.flatten()
    clients, users = torch.tensor([2, 0, 1]), torch.randperm(5000, generator=g)
    x, codebooks = torch.randn(200, 12, generator=g), torch.randn(2, 70, 12, generator=g)
    param, grad, first, second = torch.rand(4, 3, 900, 4, generator=g)
    weights, steps = torch.rand(3, generator=g).double(), torch.tensor([1, 0, 5])
    total = torch.zeros(900, 4, dtype=torch.float64)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("sample_negatives", (items, clients, torch.arange(0, 13, 4), met, 90, 2, 1, 2)),
        ("hash_buckets", (items, torch.randint(1, 2**61 - 1, (2, 2), generator=g), 7)),
        ("client_dropout", (x.view(10, 20, 12), torch.arange(10), 0.4, 1, 2, 3, 4)),
        ("rq_encode", (x, codebooks)),
        ("rq_encode", (x[:, :0], codebooks[..., :0])),
        ("client_adam_", (param, grad, first, second, steps, 0.1, 0.9, 0.99, 1e-8, 0.0)),
        ("client_adam_", (param, grad, first, second, steps, 0.1, 0.9, 0.99, 1e-8, 0.1)),
        ("client_sgd_", (param, grad, first, 0.1, 0.9, 0.0)),
        ("accumulate_updates_", (total, grad, weights, None, 2.0**-40)),
        ("accumulate_updates_", (total, grad, weights, items, 2.0**-40)),
        ("apply_updates_", (param[0], grad[0].double(), None, 0.5)),
        ("sample_clients", (users, 2000, 1, 2, 3)),
        ("sample_clients_independently", (users, 0.3, 1, 2, 3)),
    ]
    for name, arguments in calls:
        cpu, gpu = both(name)
        mine, theirs = (
            [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2)
        )
        with grid_limit(2):
            found = gpu(*mine)
        assert_close([found, *mine], [cpu(*theirs), *theirs])


# Everything of a client in shared memory; a part; nothing.
@pytest.mark.parametrize("limit", [99 << 10, 16 << 10, 4 << 10])
@pytest.mark.parametrize(("batch_size", "graph"), [(None, False), (33, False), (33, True)])
def test_training_wherever_memory_lies(limit: int, batch_size: int | None, graph: bool) -> None:
    g = torch.Generator().manual_seed(9)
    sizes = torch.tensor([0, 70, 3, 1])  # the longest walks several chunks of draws and rows
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    items = torch.cat([torch.randperm(3000, generator=g)[:n] for n in sizes])
    positives = torch.cat([part.sort().values for part in items.split(sizes.tolist())])
    codes = torch.randint(0, 9, (3000, 2), generator=g)
    parts = ItemParts(
        table=torch.randn(3000, 40, generator=g),
        A=torch.randn(3000, 4, generator=g),
        B=torch.randn(40, 4, generator=g),
        codes=codes,
        codebooks=torch.randn(2, 9, 40, generator=g),
    )
    arguments = (torch.tensor([1, 3, 0, 2]), indptr, items, positives, 3000)
    user = torch.randn(4, 40, generator=g)

    options: dict[str, Any] = {"batch_size": batch_size, "graph": graph, "l2_items": 0.1}

    def train() -> Any:
        return ops.local_train(*arguments, user, parts, **options, seed=1, round=2)

    def tensors_of(updates: Any) -> list[torch.Tensor]:
        return [t for t in updates if isinstance(t, torch.Tensor)]

    expected = train()
    with emulated_kernels():
        whole = train()
        with shared_limit(limit):
            assert all(map(torch.equal, tensors_of(train()), tensors_of(whole)))
    assert torch.equal(whole.rows, expected.rows)
    assert len(tensors_of(whole)) == 7
    torch.testing.assert_close(tensors_of(whole), tensors_of(expected), rtol=1e-4, atol=1e-4)


# Alone on a multiprocessor and with more of what layers leave in memory; two blocks of a multiprocessor.
@pytest.mark.parametrize(("limit", "clients"), [(58 << 10, 3), (120 << 10, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_an_mlp_wherever_memory_lies(limit: int, clients: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(9)
    sizes = torch.tensor([70, 3, 1])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    positives = torch.cat([torch.randperm(300, generator=g)[:n].sort().values for n in sizes])
    parts = ItemParts(
        A=torch.randn(300, 4, generator=g).to(dtype), B=torch.randn(10, 4, generator=g).to(dtype)
    )
    mlp = [torch.randn(shape, generator=g).to(dtype) / 4 for shape in ((70, 16), (70,), (6, 70), (6,), (6,))]
    user = torch.randn(3, 6, generator=g).to(dtype)
    options: dict[str, Any] = {"mlp": mlp, "dropout": 0.3, "epochs": 1, "seed": 1, "round": 2}

    def train(count: int) -> list[torch.Tensor]:
        ids = torch.arange(count) % 3
        updates = ops.local_train(ids, indptr, positives, positives, 300, user, parts, **options)
        return [t[:3] for t in (*updates[:3], updates.A, updates.B, *updates.mlp) if t is not None]

    with emulated_kernels():
        whole = train(3)
        with shared_limit(limit):
            assert all(map(torch.equal, train(clients), whole))
