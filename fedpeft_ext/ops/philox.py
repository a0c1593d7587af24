"""Counter-based random numbers in NumPy: every draw is a pure function of (seed, round, client, position,
purpose).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit key and a
128-bit counter into four 32-bit words. The key is (seed low, seed high), the counter (position, client,
round, stream) with stream = purpose << 24 | layer << 16 | epoch, so that results depend neither on the order
of draws nor on how work is cut into chunks, threads or processes. csrc/common/philox.h agrees word for word.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt32: TypeAlias = npt.NDArray[np.uint32]
UInt64: TypeAlias = npt.NDArray[np.uint64]
Float64: TypeAlias = npt.NDArray[np.float64]
IntLike: TypeAlias = int | npt.NDArray[np.integer]

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# Blocks computed at a time: ten arrays of them stay in a core's cache.
_CHUNK = 1 << 13


class Purpose(IntEnum):
    """What a draw is for; each purpose has its own stream."""

    NEGATIVES = 1
    DROPOUT = 2
    INITIALISATION = 3
    NOISE = 4
    CLIENT_SAMPLING = 5
    EVALUATION_CANDIDATES = 6
    BATCH_ORDER = 7


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike) -> UInt32:
    """The ten-round bijection: counter [..., 4] and key [..., 2] of 32-bit words -> words [..., 4],
    uint32."""
    c = np.asarray(counter).astype(np.uint64)
    k = np.asarray(key).astype(np.uint64)
    if c.shape[-1:] != (4,) or k.shape[-1:] != (2,):
        raise ValueError(
            f"philox4x32: expected counter [..., 4] and key [..., 2], got {c.shape} and {k.shape}"
        )
    return _blocks([c[..., i] for i in range(4)], [k[..., i] for i in range(2)])


def _blocks(counter: list[UInt64], key: list[UInt64]) -> UInt32:
    """`philox4x32` of words that broadcast together, each below 2^32."""
    shape = np.broadcast_shapes(*(word.shape for word in (*counter, *key)))
    flat = [np.broadcast_to(word, shape).reshape(-1) for word in counter]
    keys = [word.reshape(()) if word.size == 1 else np.broadcast_to(word, shape).reshape(-1) for word in key]
    result = np.empty((flat[0].size, 4), np.uint32)
    for start in range(0, len(result), _CHUNK):
        part = slice(start, start + _CHUNK)
        k0, k1 = (word if word.ndim == 0 else word[part] for word in keys)
        c0, c1, c2, c3 = (word[part].copy() for word in flat)
        p0, p1 = np.empty_like(c0), np.empty_like(c0)
        for i in range(10):
            np.multiply(c0, _M0, out=p0)
            np.multiply(c2, _M1, out=p1)
            np.right_shift(p1, _32, out=c0)
            c0 ^= c1
            c0 ^= (k0 + np.uint64(i * _W0 & 0xFFFFFFFF)) & _LOW
            np.right_shift(p0, _32, out=c2)
            c2 ^= c3
            c2 ^= (k1 + np.uint64(i * _W1 & 0xFFFFFFFF)) & _LOW
            np.bitwise_and(p1, _LOW, out=c1)
            np.bitwise_and(p0, _LOW, out=c3)
        for column, word in enumerate((c0, c1, c2, c3)):
            result[part, column] = word
    return result.reshape(*shape, 4)


def _checked(value: IntLike, bits: int, name: str) -> UInt64:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and not isinstance(value, int):  # NumPy has no dtype for an int past 2^64
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << bits):
        raise ValueError(
            f"{name}: expected 0 to 2^{bits} - 1, got values from {int(array.min())} to {int(array.max())}"
        )
    return array.astype(np.uint64)


def words(
    seed: IntLike,
    round: IntLike,
    client: IntLike,
    position: IntLike,
    purpose: int,
    layer: IntLike = 0,
    epoch: IntLike = 0,
) -> UInt32:
    """One Philox block for each element of the broadcast arguments: uint32 [*broadcast, 4].

    seed < 2^64, round, client and position < 2^32, layer < 2^8, epoch < 2^16; a value out of range is a
    ValueError.
    """
    stream = (
        _checked(int(purpose), 8, "purpose") << np.uint64(24)
        | _checked(layer, 8, "layer") << np.uint64(16)
        | _checked(epoch, 16, "epoch")
    )
    seeds = _checked(seed, 64, "seed")
    counter = [
        _checked(position, 32, "position"),
        _checked(client, 32, "client"),
        _checked(round, 32, "round"),
        stream,
    ]
    return _blocks(counter, [seeds & _LOW, seeds >> _32])


def low64(block: UInt32) -> UInt64:
    """Words 1 (high) and 0 (low) of each block [..., 4] as one 64-bit number."""
    return block[..., 1].astype(np.uint64) << _32 | block[..., 0].astype(np.uint64)


def multiply_high(a: UInt64, b: IntLike) -> UInt64:
    """floor(a * b / 2^64): maps uniform 64-bit numbers to [0, b)."""
    b = np.asarray(b).astype(np.uint64)
    a_high, a_low, b_high, b_low = a >> _32, a & _LOW, b >> _32, b & _LOW
    low = a_low * b_low
    middle = a_high * b_low + (low >> _32)
    other = a_low * b_high + (middle & _LOW)
    result: UInt64 = a_high * b_high + (middle >> _32) + (other >> _32)
    return result


def integers(
    high: IntLike,
    seed: IntLike,
    round: IntLike,
    client: IntLike,
    position: IntLike,
    purpose: int,
    layer: IntLike = 0,
    epoch: IntLike = 0,
) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, high), one for each element of the broadcast arguments; high from 1 to 2^63 -
    1."""
    bound = np.asarray(high)
    if bound.size and (int(bound.min()) < 1 or int(bound.max()) >= 1 << 63):
        raise ValueError(f"high: expected 1 to 2^63 - 1, got values from {bound.min()} to {bound.max()}")
    drawn = low64(words(seed, round, client, position, purpose, layer, epoch))
    return multiply_high(drawn, bound).astype(np.int64)


def uniform(
    seed: IntLike,
    round: IntLike,
    client: IntLike,
    position: IntLike,
    purpose: int,
    layer: IntLike = 0,
    epoch: IntLike = 0,
) -> Float64:
    """Uniform float64 in [0, 1) on a grid of 2^-53, one for each element of the broadcast arguments."""
    drawn = low64(words(seed, round, client, position, purpose, layer, epoch))
    result: Float64 = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def normal(
    seed: IntLike,
    round: IntLike,
    client: IntLike,
    position: IntLike,
    purpose: int,
    layer: IntLike = 0,
    epoch: IntLike = 0,
) -> Float64:
    """Standard normal float64, one for each element of the broadcast arguments (Box and Muller, 1958).

    The radius comes from words 0 and 1, the angle from words 2 and 3, 53 bits each.
    """
    block = words(seed, round, client, position, purpose, layer, epoch)
    scale = 2.0**-53
    radius = ((low64(block) >> np.uint64(11)).astype(np.float64) + 0.5) * scale
    angle = (low64(block[..., 2:]) >> np.uint64(11)).astype(np.float64) * scale
    result: Float64 = np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)
    return result


def normals(
    count: int, seed: int, round: int, client: int, purpose: int, layer: int = 0, epoch: int = 0
) -> Float64:
    """`count` standard normals, four to a block of 32-bit words: for whole tensors, four times as fast as
    `normal`.

    Element e is a function of e alone, whatever `count` is; its resolution (2^-32) bounds it by 6.8 in size.
    """
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    block = words(seed, round, client, np.arange(-(-count // 4)), purpose, layer, epoch).astype(np.float64)
    uniforms = (block.reshape(-1, 2, 2) + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2.0 * np.log(uniforms[..., 0])), 2.0 * np.pi * uniforms[..., 1]
    result: Float64 = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:count]
    return result
