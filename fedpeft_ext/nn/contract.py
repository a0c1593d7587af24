"""What engines rely on and cannot see: checked once of every strategy that is not this package's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from fedpeft_ext.nn.embedding import ItemEmbedding, has_values
from fedpeft_ext.nn.items import Items


def check_strategy(module: ItemEmbedding) -> None:
    """Raise ValueError unless padding gives zeros, a frozen base is read, and `takes_stacked` holds."""
    kind, parameters = type(module).__name__, dict(module.named_parameters())
    tensors = [*parameters.values(), *module.buffers()]
    if not all(has_values(tensor) for tensor in tensors):
        return
    ids = torch.arange(min(2, module.num_embeddings), device=tensors[0].device)
    padding = f"{kind}._lookup: expected zeros for items of -1, which are padding"
    try:
        with torch.no_grad():
            nothing = module(ids.new_tensor([-1]))
    except IndexError as error:
        raise ValueError(f"{padding} (IndexError: {error})") from error
    if bool(nothing.any()):
        raise ValueError(padding)
    if module.base is not None and "base" not in parameters:
        base = module.base.detach().requires_grad_()
        with torch.enable_grad():
            total = module._vectors(Items(ids), base).sum()
        if not total.requires_grad or torch.autograd.grad(total, base, allow_unused=True)[0] is None:
            raise ValueError(f"{kind}._lookup: expected rows of `base`, where it is given, in the vectors")
    if module.takes_stacked:
        _check_stacked(kind, module, parameters, ids)


@torch.no_grad()
def _check_stacked(kind: str, module: ItemEmbedding, parameters: Mapping[str, Tensor], ids: Tensor) -> None:
    """Two clients at once must get what they get one by one."""
    rows = module.row_parameters
    one = {name: p[ids] if name in rows else p for name, p in parameters.items()}
    clients = [{name: scale * p for name, p in one.items()} for scale in (1.0, 0.5)]
    items = Items(ids, torch.arange(len(ids), device=ids.device))
    expected = torch.stack([functional_call(module, client, (items,)) for client in clients])
    both = {name: torch.stack([client[name] for client in clients]) for name in one}
    pairs = Items._make(index.expand(2, -1).contiguous() for index in items if index is not None)
    message = (
        f"{kind}.takes_stacked: expected False, since _lookup does not give the vectors [C, P, D] of "
        "parameters [C, ...] with items [C, P]"
    )
    try:
        got = functional_call(module, both, (pairs,))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from error
    if not torch.allclose(got, expected, rtol=0.01, atol=1e-4, equal_nan=True):
        raise ValueError(message)
