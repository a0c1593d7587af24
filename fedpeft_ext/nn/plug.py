"""`plug`: make an embedding of any model parameter-efficient, in place."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fedpeft_ext.nn.embedding import ItemEmbedding
from fedpeft_ext.nn.spec import (
    EmbeddingSpec,
    build_embedding,
    check_options,
    nearest,
    parse_spec,
    spec_options,
)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def plug(
    model: nn.Module,
    name: str,
    strategy: str = "lora",
    *,
    freeze_full: bool = True,
    compressed_only: bool = False,
    allow_tied: bool = False,
    **options: Any,
) -> ItemEmbedding:
    """Replace an `nn.Embedding` inside `model` by a parameter-efficient one that starts from its weight.

    The old weight becomes the frozen base (a copy, as a buffer) and only the compressed part is trained. Make
    the optimizer afterwards: one made before holds the old weight. Device, dtype, training mode and
    `padding_idx` carry over; the vector at `padding_idx` becomes zero if it was not. Gradients are dense,
    whatever `sparse` was. A module found under several names is replaced under all.

    Args:
        model: any module; changed in place.
        name: of the embedding: its dotted path ("encoder.item_embedding"), or the end of it where only one
            path ends so.
        strategy: "lora", "hash", "hash+senet", "rq", "full", or a sum such as "rq+lora".
        freeze_full: freeze the old weight; False trains it too.
        compressed_only: drop the old weight and keep the compressed part alone.
        allow_tied: go on where other modules use the same weight (say, an output projection). They keep it as
            it is, and no longer share it.
        **options: of the strategy, see `build_embedding`: rank; table_size, num_hashes, reduce, senet_hidden;
            codes, codebooks, codebook_size, levels, warm_start; seed; init_std.

    Returns:
        The new module, already in place.

    Raises:
        ValueError: no such embedding (the message lists those there are, and the nearest), unknown strategy,
            a tied weight, a model in `DistributedDataParallel`, or an embedding that does more than look up
            (`max_norm`, `scale_grad_by_freq`, hooks, a `forward` of its own). TypeError: not an
            `nn.Embedding`, a weight that is sharded or quantised, or an option that the strategy lacks.

    Example:
        >>> model = nn.ModuleDict({"item_embedding": nn.Embedding(1000, 32), "out": nn.Linear(32, 1)})
        >>> plug(model, "item_embedding", "lora", rank=2)
        LoRAEmbedding(1000, 32, rank=2, base=frozen)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name: expected the path of an embedding, got {type(name).__name__}")
    spec = _strategy_spec(strategy, compressed_only)
    check_options(options, spec_options(spec))
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model: expected one that DistributedDataParallel does not wrap yet, since that goes on with the "
            "parameters that it found; plug first, then wrap"
        )
    path, found = _find(model, name)
    old = _require_plain(path, found)
    if not allow_tied:
        _require_untied(model, path, old)
    new = build_embedding(
        spec,
        old.num_embeddings,
        old.embedding_dim,
        base=old.weight,
        freeze_full=freeze_full,
        padding_idx=old.padding_idx,
        **options,
    ).train(old.training)
    for other, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    return new


def _strategy_spec(strategy: str, compressed_only: bool) -> EmbeddingSpec:
    if not isinstance(strategy, str):
        raise TypeError(f"strategy: expected a name such as 'lora', got {type(strategy).__name__}")
    if strategy.strip().lower().startswith(("c-", "p-")):
        raise ValueError(
            f"strategy: expected a name without prefix, such as 'lora' (compressed_only=True is 'c-'), "
            f"got {strategy!r}"
        )
    name = ("c-" if compressed_only else "p-") + strategy
    try:
        spec = parse_spec(name)
    except ValueError as error:
        told = str(error).removeprefix("embedding: ").replace(repr(name), repr(strategy))
        raise ValueError(f"strategy: {told}") from None
    if compressed_only and "full" in spec.parts:
        raise ValueError(
            f"compressed_only: expected False for the uncompressed strategy 'full' in {strategy!r}"
        )
    return spec


def _find(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name and name in modules:
        return name, modules[name]
    embeddings = [path for path, module in modules.items() if path and isinstance(module, nn.Embedding)]
    ending = [path for path in embeddings if path.endswith(f".{name}")]
    if len({id(modules[path]) for path in ending}) == 1:
        return ending[0], modules[ending[0]]
    if ending:
        raise ValueError(
            f"name: expected the whole path of one embedding, got {name!r}, the end of {', '.join(ending)}"
        )
    if isinstance(model, nn.Embedding):
        raise ValueError(
            "model: expected a module that has an embedding inside, got the embedding itself; "
            "LoRAEmbedding.from_pretrained(embedding.weight) and the like make a new one of it"
        )
    if not embeddings:
        raise ValueError(
            f"name: expected an nn.Embedding inside {type(model).__name__}, got {name!r}; there is none"
        )
    raise ValueError(
        f"name: expected an embedding of {type(model).__name__} out of {', '.join(embeddings)}, "
        f"got {name!r}; "
        f"the nearest is {nearest(name, embeddings)!r}"
    )


def _require_plain(path: str, module: nn.Module) -> nn.Embedding:
    if isinstance(module, ItemEmbedding):
        raise TypeError(
            f"{path}: expected an nn.Embedding, got a {type(module).__name__}; put its merge() there first"
        )
    if isinstance(module, nn.EmbeddingBag):
        raise TypeError(
            f"{path}: expected nn.Embedding, got EmbeddingBag; put an nn.Embedding of its weight there and "
            "sum or average the vectors of a bag (-1 pads bags of differing size)"
        )
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter, FakeTensor):
        raise TypeError(
            f"{path}.weight: expected an ordinary tensor, got {type(weight).__name__}; plug first, then "
            "shard or quantise the model"
        )
    if type(module) is not nn.Embedding:
        raise TypeError(
            f"{path}: expected nn.Embedding itself, whose forward is known, got {type(module).__qualname__}"
        )
    if module.max_norm is not None:
        raise ValueError(
            f"{path}: expected max_norm=None, since it changes the weight in place, got {module.max_norm}"
        )
    if module.scale_grad_by_freq:
        raise ValueError(
            f"{path}: expected scale_grad_by_freq=False, since gradients here are not scaled, got True"
        )
    own = [name for name in _HOOKS if getattr(module, name, None)]
    own += ["forward"] if "forward" in vars(module) else []
    if own:
        raise ValueError(
            f"{path}: expected an embedding without hooks and changes, which would be lost, got "
            f"{', '.join(own)}; remove them first and put them on what plug returns"
        )
    return module


def _require_untied(model: nn.Module, path: str, old: nn.Embedding) -> None:
    users = [
        f"{name}.{parameter_name}" if name else parameter_name
        for name, module in model.named_modules()
        if module is not old
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter is old.weight or _same_memory(parameter, old.weight)
    ]
    if users:
        raise ValueError(
            f"{path}: expected a weight of its own, got one tied to {', '.join(users)}; "
            "allow_tied=True leaves that as it is and unties it"
        )


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.numel() > 0
        and torch._C._has_storage(one)
        and cast(Any, torch._C)._is_alias_of(one, other)
        and one.storage_offset() == other.storage_offset()
    )
