"""Compressed uploads: half precision, 8-bit integers with stochastic rounding, the largest elements alone.

Every method is a stage that replaces updates by what the server decodes, and a pair `encode` / `decode` of
one client's upload to and from bytes, which a test holds equal. The bytes that a run reports are the length
of the encoding. Encodings hold whole tensors, untouched rows included, in the order of the message.

- `fp16`: IEEE half precision, values beyond its range at its largest.
- `int8`: for each tensor q = floor(u / s + r) with s = max |u| / 127 and r uniform in [0, 1), so that the
  mean of s q is u (Alistarh et al., "QSGD", NeurIPS 2017). r is a function of (seed, round, client, element),
  in the middle of one of 2^16 cells, so that the mean is exact to s / 2^17.
- `top-k`: the k elements of largest size of u + e, where e is what the client did not send before and then
  becomes the rest ("error feedback": Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.ops import philox
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.randomness import UPLOAD_ROUNDING
from fedpeft_ext.simulation.state import State
from fedpeft_ext.simulation.uploads import Uploads, UploadStage

Method = Literal["fp16", "int8", "top-k"]
HALF_MAX = 65504.0
LEVELS = 127


def make_stage(method: Method, parameters: Mapping[str, Tensor], *, share: float, seed: int) -> UploadStage:
    """The stage of a method for uploads of `parameters` (the message). `share` is that of `top-k`."""
    if method == "fp16":
        return HalfPrecision()
    if method == "int8":
        return StochasticRounding(list(parameters), seed)
    return TopK(parameters, share)


class HalfPrecision(UploadStage):
    """The stage of `fp16`."""

    def __call__(self, uploads: Uploads) -> Iterable[Uploads]:
        return [uploads.replaced({name: to_half(u).to(u.dtype) for name, u in uploads.updates.items()})]


class StochasticRounding(UploadStage):
    """The stage of `int8`.

    Args:
        names: of the message's tensors, in its order.
        seed: of the rounding.
    """

    def __init__(self, names: list[str], seed: int) -> None:
        self._layers = {name: index for index, name in enumerate(names)}
        self._seed = seed

    def __call__(self, uploads: Uploads) -> Iterable[Uploads]:
        clients = uploads.clients.cpu().numpy()
        updates = {}
        for name, update in uploads.updates.items():
            rows = uploads.rows_of(name)
            rounded, scale = quantize(
                update, rows, clients, self._seed, uploads.round, uploads.attempt, self._layers[name]
            )
            updates[name] = dequantize(rounded, scale, update.dtype)
        return [uploads.replaced(updates)]


class TopK(UploadStage):
    """The stage of `top-k`. It keeps what each client has not sent yet.

    Args:
        parameters: the message's tensors.
        share: of all their elements that is sent.

    Attributes:
        residuals: {client: [N]}, the message's tensors flattened and joined.
    """

    def __init__(self, parameters: Mapping[str, Tensor], share: float) -> None:
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._kept = kept_elements(parameters, share)
        self._none = torch.cat([p.detach().flatten() for p in parameters.values()])[None][:0].clone()
        self.residuals: dict[int, Tensor] = {}
        self._rests: dict[int, Tensor] = {}

    def __call__(self, uploads: Uploads) -> Iterable[Uploads]:
        for c, client in enumerate(uploads.clients.tolist()):
            wanted = self._flat(uploads, c)
            if client in self.residuals:
                wanted += self.residuals[client]
            chosen = largest(wanted, self._kept)
            sent = torch.zeros_like(wanted)
            sent[chosen] = wanted[chosen]
            wanted[chosen] = 0.0
            self._rests[client] = wanted
            updates = {name: u[None] for name, u in split(sent, self._shapes).items()}
            at = slice(c, c + 1)
            yield Uploads(
                updates,
                uploads.weights[at],
                None,
                frozenset(),
                uploads.clients[at],
                uploads.round,
                uploads.attempt,
            )

    def commit(self) -> None:
        """What was not sent in this round is the clients' rest from now on."""
        self.residuals |= self._rests
        self._rests = {}

    def discard(self) -> None:
        """Clients keep the rests of before."""
        self._rests = {}

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`."""
        own = {c: rest for c, rest in self.residuals.items() if ranks is None or c in ranks.owned}
        clients = torch.tensor(list(own), dtype=torch.int64, device="cpu")
        rests = torch.stack(list(own.values())) if own else self._none
        if ranks is not None:
            clients, rests = ranks.gather_rows(clients), ranks.gather_rows(rests)
        return {"clients": clients, "residuals": rests}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        rests = state["residuals"].to(self._none.device, copy=True).unbind()
        self.residuals = dict(zip(state["clients"].tolist(), rests, strict=True))

    def _flat(self, uploads: Uploads, c: int) -> Tensor:
        return torch.cat([uploads.whole(name, c, shape).flatten() for name, shape in self._shapes.items()])


def kept_elements(parameters: Mapping[str, Tensor], share: float) -> int:
    """How many of the parameters' elements `top-k` sends: at least 1."""
    return max(1, round(share * sum(p.numel() for p in parameters.values())))


def largest(values: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` elements of [N] that are largest in size; the first of equal ones.

    Sizes are compared in float32, so that a rest of rounding in float64 does not decide between equal ones.
    NaN counts as infinite: it is sent, and found, rather than kept.
    """
    sizes = values.abs().float()
    sizes = torch.where(sizes.isnan(), torch.inf, sizes)
    limit = sizes.topk(count, sorted=False).values.min()
    chosen = sizes > limit
    equal = (sizes == limit).nonzero()[: count - int(chosen.sum())]
    chosen[equal] = True
    return chosen.nonzero().squeeze(1)


def split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """[N] cut into tensors of these shapes."""
    parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def to_half(update: Tensor) -> Tensor:
    """float16, finite values beyond its range at its largest."""
    return torch.where(update.isfinite(), update.clamp(-HALF_MAX, HALF_MAX), update).half()


def quantize(
    update: Tensor,
    rows: Tensor | None,
    clients: np.ndarray,
    seed: int,
    round: int,
    attempt: int,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """One tensor of C clients in 8 bits.

    Args:
        update: [C, ...], or [C, R, W] at `rows` [C, R].
        clients: int64 [C].
        layer: number of the tensor in the message.

    Returns:
        int8 like update, 0 at padding, and the scales, float32 [C].
    """
    values = update.detach().to(torch.promote_types(update.dtype, torch.float32))
    if rows is not None:
        values = values.masked_fill((rows < 0).unsqueeze(-1), 0.0)
    else:  # the last dimension is a row's, so that a table is rounded alike with and without `rows`
        values = values.reshape(len(values), -1, values.shape[-1] if values.dim() > 1 else 1)
        rows = torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
    size = values.abs().flatten(1).amax(1) if values.numel() else values.new_zeros(len(values))
    # Rounded up, so that no quotient is above 127.
    scale = torch.nextafter((size / LEVELS).float(), torch.tensor(torch.inf, device=size.device))
    blocks = -(-values.shape[2] // 8)  # of eight draws of 16 bits
    row = rows.clamp(min=0).cpu().numpy()
    position = row[:, :, None] * blocks + np.arange(blocks)
    words = philox.words(
        seed, round, clients[:, None, None], position, UPLOAD_ROUNDING, layer=layer, epoch=attempt
    )
    halves = words.astype("<u4", copy=False).view("<u2").reshape(*position.shape[:2], -1)
    random = torch.from_numpy(halves.astype(np.int32)[:, :, : values.shape[2]]).to(values)
    rounded = (values / scale.to(values.dtype)[:, None, None]).add_(random.add_(0.5).mul_(2.0**-16))
    rounded = rounded.floor_().clamp_(-LEVELS, LEVELS)
    return rounded.to(torch.int8).view(update.shape), scale


def dequantize(rounded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of int8 [C, ...] with scales [C]."""
    return (rounded.double() * scale.double().view(-1, *[1] * (rounded.dim() - 1))).to(dtype)


# ---- bytes
# ---------------------------------------------------------------------------------------------------------


def encode(
    update: Mapping[str, Tensor],
    method: Method,
    *,
    share: float = 1.0,
    seed: int = 0,
    round: int = 0,
    client: int = 0,
    attempt: int = 0,
) -> bytes:
    """One client's upload {name: tensor} as the bytes that it sends. For `top-k`, `update` includes the rest
    of the rounds before.

    Layout, little-endian, tensor by tensor: `fp16` their elements; `int8` the float32 scale, then the
    elements. `top-k`: k indices of 32 bits into the joined tensors, then their k values.
    """
    if method == "fp16":
        return b"".join(_raw(to_half(u)) for u in update.values())
    if method == "int8":
        pieces = []
        for layer, value in enumerate(update.values()):
            who = np.array([client])
            rounded, scale = quantize(value[None], None, who, seed, round, attempt, layer)
            pieces += [_raw(scale), _raw(rounded)]
        return b"".join(pieces)
    flat = torch.cat([u.flatten() for u in update.values()])
    chosen = largest(flat, kept_elements(update, share))
    return chosen.cpu().numpy().astype("<u4").tobytes() + _raw(flat[chosen])


def decode(
    data: bytes, shapes: Mapping[str, torch.Size], method: Method, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The upload that `encode` made these bytes of, as the server takes it.

    Raises:
        ValueError: the bytes are not an encoding of tensors of these shapes.
    """
    count = sum(shape.numel() for shape in shapes.values())
    if method == "top-k":
        width = 4 + dtype.itemsize
        if len(data) % width or len(data) > count * width:
            raise ValueError(f"data: expected pairs of {width} bytes, at most {count}, got {len(data)} bytes")
        kept = len(data) // width
        index = np.frombuffer(data, "<u4", kept).astype(np.int64)
        if kept and int(index.max()) >= count:
            raise ValueError(f"data: expected indices below {count}, got {int(index.max())}")
        flat = torch.zeros(count, dtype=dtype, device="cpu")
        values = np.frombuffer(data, f"<f{dtype.itemsize}", kept, 4 * kept).copy()
        flat[torch.from_numpy(index)] = torch.from_numpy(values)
        return split(flat, shapes)
    expected = 2 * count if method == "fp16" else count + 4 * len(shapes)
    if len(data) != expected:
        raise ValueError(f"data: expected {expected} bytes, got {len(data)}")
    if method == "fp16":
        return split(torch.from_numpy(np.frombuffer(data, "<f2").copy()).to(dtype), shapes)
    result, offset = {}, 0
    for name, shape in shapes.items():
        scale = torch.from_numpy(np.frombuffer(data, "<f4", 1, offset).copy())
        rounded = torch.from_numpy(np.frombuffer(data, "i1", shape.numel(), offset + 4).copy())
        result[name] = dequantize(rounded.view(1, *shape), scale, dtype)[0]
        offset += 4 + shape.numel()
    return result


def _raw(tensor: Tensor) -> bytes:
    array = tensor.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
