"""Pieces shared by the plain-PyTorch twins of the ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def values_available(t: Tensor) -> bool:
    """Whether looking at values is allowed: eager, on the CPU, outside torch.func transforms and tracing."""
    return (
        t.device.type == "cpu"
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def check_index_values(index: Tensor, size: int | None, name: str, padding: bool = True) -> None:
    """Raises IndexError unless every value is -1 (where padding is allowed) or in [0, size)."""
    if not values_available(index):
        return
    bad = index < (-1 if padding else 0)
    if size is not None:
        bad |= index >= size
    if bool(bad.any()):
        position = int(bad.flatten().nonzero()[0])
        value = int(index.flatten()[position])
        low = "-1 (padding) or 0" if padding else "0"
        limit = "more" if size is None else str(size - 1)
        raise IndexError(
            f"{name}: index {value} at position {position} is out of range: expected {low} to {limit}"
        )


def check_offsets(indptr: Tensor, clients: Tensor, count: int) -> None:
    """Raises ValueError unless indptr [U + 1] gives each of the clients a range of [0, count)."""
    if not values_available(indptr):
        return
    for client in clients.tolist():
        first, last = indptr[client : client + 2].tolist()
        if not 0 <= first <= last <= count:
            raise ValueError(
                f"indptr: expected ascending offsets of 0 to {count}, got {first} and {last} "
                f"for client {client}"
            )


def nonempty(table: Tensor) -> Tensor:
    """A table [*, N, D] without rows gets one of zeros, so that padding has something to read."""
    return table if table.size(-2) > 0 else F.pad(table, (0, 0, 0, 1))


def pad_to_zero(out: Tensor, items: Tensor) -> Tensor:
    """Zero where items is -1; masked, not multiplied, so that a NaN does not leak."""
    return out.masked_fill((items < 0).unsqueeze(-1), 0)


def embedding(index: Tensor, table: Tensor) -> Tensor:
    """torch.nn.functional.embedding, also of rows without elements, where its backward on CUDA reads a null
    pointer (pytorch issue 189668)."""
    return F.embedding(index, table) if table.size(-1) > 0 else table[index]


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table [N, D] at rows [*], or table [C, N, D] at rows [C, P]; zero at -1."""
    table = nonempty(table)
    index = rows.clamp(min=0).long()
    if table.dim() == 3:
        clients, size, width = table.shape
        index = index + size * torch.arange(clients, device=rows.device).unsqueeze(1)
        table = table.reshape(clients * size, width)
    return pad_to_zero(embedding(index, table), rows)


def philox_words(seed: int, round: int, client: Tensor, position: Tensor, stream: int) -> Tensor:
    """`philox.words` on tensors: int64 [*broadcast of client and position, 4].

    Products wrap around 2^64, which leaves their bits right.
    """
    low = 2**32 - 1
    c0, c1 = position.long(), client.long()
    c2, c3 = torch.full_like(c0, round), torch.full_like(c0, stream)
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & low ^ c1 ^ k0, p1 & low, (p0 >> 32) & low ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=-1)
