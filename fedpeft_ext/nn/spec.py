"""Names of embeddings, as settings and the command line write them, and the modules that they stand for.

Grammar (case does not matter): `full` | `c-X` | `p-X`, where X is strategies joined by '+' out of `full`,
`lora`, `hash` and `rq`; `senet` after `hash` weights its rows by SENet. `c-` is the compressed part alone,
`p-` plugs it into frozen full embeddings: `p-rq+lora`, `c-hash+senet`, `p-hash+senet+rq`. Names follow Yuan
et al. (AAAI 2026).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedpeft_ext.nn.contract import check_strategy
from fedpeft_ext.nn.embedding import ItemEmbedding, has_values, require_table
from fedpeft_ext.nn.full import FullEmbedding
from fedpeft_ext.nn.hash import HashEmbedding
from fedpeft_ext.nn.lora import LoRAEmbedding
from fedpeft_ext.nn.rq import RQEmbedding, residual_kmeans
from fedpeft_ext.nn.sum import SumEmbedding

_HASH_OPTIONS = ("table_size", "num_hashes", "seed", "init_std")

STRATEGIES: dict[str, tuple[str, ...]] = {
    "full": ("init_std",),
    "lora": ("rank", "init_std"),
    "hash": (*_HASH_OPTIONS, "reduce"),
    "hash+senet": (*_HASH_OPTIONS, "senet_hidden"),
    "rq": ("codes", "codebooks", "codebook_size", "levels", "warm_start", "seed", "init_std"),
}
"""The strategies and the options of each."""

_REGISTERED: dict[str, type[ItemEmbedding]] = {}
_Class = TypeVar("_Class", bound=type[ItemEmbedding])


def register_strategy(name: str, *options: str) -> Callable[[_Class], _Class]:
    """Class decorator: make an `ItemEmbedding` the strategy `name`, so that `c-name`, `p-name` and sums work.
    Defining the same class anew, as a notebook's cell does that runs again, replaces it.

    Args:
        name: lower-case letters, digits and underscores.
        options: keyword arguments of the constructor that settings may give: of the same name in
            `config.EmbeddingConfig`, or as `embedding.options.NAME`; `codes` gets the items' codes [I, L].
            It must also take those of `ItemEmbedding`, and `generator`.

    Raises:
        TypeError: not a subclass of `ItemEmbedding`. ValueError: another name, or that of another strategy.
    """
    if name == "senet" or not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(f"name: expected a new name of lower-case letters, digits and '_', got {name!r}")

    def register(cls: _Class) -> _Class:
        if not (isinstance(cls, type) and issubclass(cls, ItemEmbedding)):
            raise TypeError(f"strategy {name!r}: expected a subclass of ItemEmbedding, got {cls!r}")
        other = _REGISTERED.get(name)
        if name in STRATEGIES and (other is None or _place(other) != _place(cls)):
            raise ValueError(f"name: expected a new name, got {name!r}, which is a strategy already")
        STRATEGIES[name] = options
        _REGISTERED[name] = cls
        return cls

    return register


def registered_options() -> set[str]:
    """Options of registered strategies that none of this package's has."""
    own = {option for name in STRATEGIES.keys() - _REGISTERED for option in STRATEGIES[name]}
    return {option for name in _REGISTERED for option in STRATEGIES[name]} - own


def _place(cls: type) -> tuple[str, str]:
    """Where a class is defined."""
    return cls.__module__, cls.__qualname__


@dataclass(frozen=True)
class EmbeddingSpec:
    """A parsed name: `plug` for `p-`, and the strategies that are summed. `str()` writes the name back."""

    plug: bool
    parts: tuple[str, ...]

    def __str__(self) -> str:
        if not self.plug and self.parts == ("full",):
            return "full"
        return ("p-" if self.plug else "c-") + "+".join(self.parts)


def parse_spec(text: str) -> EmbeddingSpec:
    """Parse the name of an embedding, such as "full" or "p-hash+senet+rq".

    Raises:
        TypeError: not a string. ValueError: not in the grammar; an unknown strategy is told the nearest valid
            one.
    """
    if not isinstance(text, str):
        raise TypeError(f"embedding: expected a name such as 'p-rq', got {type(text).__name__}")
    name = text.strip().lower()
    if name == "full":
        return EmbeddingSpec(False, ("full",))
    prefix, dash, rest = name.partition("-")
    if not dash or prefix not in ("c", "p"):
        raise ValueError(
            "embedding: expected 'full', 'c-X' (compressed alone) or 'p-X' (plugged into full embeddings), "
            f"got {text!r}; the nearest valid name is {_nearest_spec(name)!r}"
        )
    return EmbeddingSpec(prefix == "p", _parse_parts(rest, text))


def _parse_parts(joined: str, text: str) -> tuple[str, ...]:
    parts: list[str] = []
    for token in (token.strip() for token in joined.split("+")):
        if token == "senet":
            if not parts or parts[-1] != "hash":
                raise ValueError(
                    f"embedding: expected 'senet' right after 'hash', as in 'hash+senet', got {text!r}"
                )
            parts[-1] = "hash+senet"
        elif token in STRATEGIES:
            parts.append(token)
        else:
            valid = [name for name in STRATEGIES if "+" not in name] + ["senet"]
            raise ValueError(
                f"embedding: expected strategies out of {', '.join(valid)} joined by '+', "
                f"got {token!r} in {text!r}; "
                f"the nearest is {nearest(token, valid)!r}"
            )
    kinds = [part.partition("+")[0] for part in parts]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(f"embedding: expected each strategy at most once, got {twice!r} twice in {text!r}")
    return tuple(parts)


def _nearest_spec(name: str) -> str:
    return nearest(name, ["full", *(f"{prefix}-{part}" for part in STRATEGIES for prefix in "pc")])


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name most like `name`."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)[0]


def check_options(options: Iterable[str], valid: Iterable[str] | None = None) -> None:
    """Raise TypeError at the first option that is not among `valid` (default: those of any strategy)."""
    names = sorted({name for part in STRATEGIES.values() for name in part} if valid is None else set(valid))
    for option in options:
        if option not in names:
            raise TypeError(
                f"option: expected one of {', '.join(names)}, got {option!r}; "
                f"the nearest is {nearest(option, names)!r}"
            )


def spec_options(spec: EmbeddingSpec) -> set[str]:
    """Names of the options that the strategies of `spec` have."""
    return {option for part in spec.parts for option in STRATEGIES[part]}


def build_embedding(
    spec: str | EmbeddingSpec,
    num_embeddings: int,
    embedding_dim: int,
    *,
    base: Tensor | None = None,
    freeze_full: bool = True,
    padding_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> ItemEmbedding:
    """The module that a name stands for.

    Args:
        spec: a name (see `parse_spec`) or a parsed one.
        num_embeddings, embedding_dim: I and D.
        base: full embeddings [I, D]. `p-X` needs them and adds X to them; `full` starts from them, or at
            random where None; `c-X` does not hold them, and at most fits its codes to them.
        freeze_full: whether the base of `p-X` is frozen, or trained and sent too. `p-full` with False is
            `full`.
        padding_idx, device, dtype: see `ItemEmbedding`; device and dtype default to those of `base`.
        generator: source of the initial draws; None: torch's global one.
        **options: of the strategies (`STRATEGIES`); each takes those that it has, so that one set serves many
            specs. rq takes `codes` [I, L], or, where None, `levels`, `codebook_size` and `seed` to fit codes
            to `base`; and `codebooks` [L, K, D] or `warm_start` as in `RQEmbedding.from_pretrained`.

    Returns:
        A `FullEmbedding`, `LoRAEmbedding`, `HashEmbedding` or `RQEmbedding`, or a `SumEmbedding` of several.

    Raises:
        ValueError: unknown spec, or something that it needs is missing. TypeError: an option that no strategy
            has.
    """
    if not isinstance(spec, EmbeddingSpec):
        spec = parse_spec(spec)
    check_options(options)
    if base is not None:
        require_table("base", base, (num_embeddings, embedding_dim))
        device = base.device if device is None else device
        dtype = base.dtype if dtype is None else dtype
    elif spec.plug:
        raise ValueError(f"base: expected full embeddings [I, D] for {str(spec)!r}, got None")
    common: dict[str, Any] = {
        "padding_idx": padding_idx,
        "device": device,
        "dtype": dtype,
        "generator": generator,
    }

    if spec.parts == ("full",) and base is not None and not (spec.plug and freeze_full):
        return FullEmbedding.from_pretrained(base, freeze=False, **common, **_chosen("full", options))

    alone = len(spec.parts) == 1
    own_base: dict[str, Any] = {"base": base, "freeze_base": freeze_full} if alone and spec.plug else {}
    parts = [
        _build_part(part, num_embeddings, embedding_dim, base, spec.plug, options, {**common, **own_base})
        for part in spec.parts
    ]
    return (
        parts[0] if alone else SumEmbedding(parts, base=base if spec.plug else None, freeze_base=freeze_full)
    )


def _chosen(part: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in STRATEGIES[part]}


def _build_part(
    part: str,
    num_embeddings: int,
    embedding_dim: int,
    vectors: Tensor | None,
    plug: bool,
    options: dict[str, Any],
    common: dict[str, Any],
) -> ItemEmbedding:
    own = _chosen(part, options)
    if part == "full":
        if plug:
            own["init_std"] = 0.0  # a change of the base, so that training starts at the base
        return FullEmbedding(num_embeddings, embedding_dim, **own, **common)
    if part in _REGISTERED:
        module = _REGISTERED[part](num_embeddings, embedding_dim, **own, **common)
        check_strategy(module)
        return module
    if part == "lora":
        return LoRAEmbedding(num_embeddings, embedding_dim, **own, **common)
    if part != "rq":
        return HashEmbedding(num_embeddings, embedding_dim, senet=part == "hash+senet", **own, **common)
    return RQEmbedding(num_embeddings, embedding_dim, **_codes_and_codebooks(vectors, **own), **common)


def _codes_and_codebooks(
    vectors: Tensor | None,
    *,
    codes: Tensor | None = None,
    codebooks: Tensor | None = None,
    codebook_size: int = 128,
    levels: int | None = None,
    warm_start: bool = False,
    seed: int = 0,
    init_std: float = 0.1,
) -> dict[str, Any]:
    """Keyword arguments of `RQEmbedding`; fits codes to `vectors` where none are given."""
    if codes is None:
        if codebooks is not None:
            raise ValueError("codes: expected the codes [I, L] that the given codebooks belong to, got None")
        if vectors is None:
            raise ValueError("codes: expected codes [I, L], or a base [I, D] to fit them to, got neither")
        if not has_values(vectors):
            got = "one on device 'meta'" if vectors.is_meta else type(vectors).__name__
            raise ValueError(f"codes: expected codes [I, L], or a base with values, got {got}")
        codes, fitted = residual_kmeans(vectors, 3 if levels is None else levels, codebook_size, seed=seed)
        codebooks = fitted if warm_start else None
    else:
        if warm_start and codebooks is None:
            raise ValueError("warm_start: expected codebooks beside the given codes, got None")
        if levels is not None and codes.dim() == 2 and codes.shape[1] != levels:
            raise ValueError(f"codes: expected shape [I, levels = {levels}], got {list(codes.shape)}")
    return {"codes": codes, "codebooks": codebooks, "codebook_size": codebook_size, "init_std": init_std}
