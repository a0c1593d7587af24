"""What a backbone is: ONE client's recommendation model in ordinary PyTorch, and the registry of those that
exist.

A backbone is written as if there were a single client. The engines of `fedpeft_ext.simulation` run it for one
client (`sequential`) or, through `torch.func.vmap` over stacked parameters, for many at once (`batched`). Its
parameters are of three kinds: the item embedding's, which the server averages; those named in
`local_parameters`, which never leave the client; and any others (a shared MLP), which the server averages
too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedpeft_ext.nn import ItemEmbedding, Items


class ClientContext(NamedTuple):
    """What a backbone may use of the client besides the items to score. Tensors carry no client dimension.

    Attributes:
        client: int64 scalar, the client's id (keys its random draws).
        history: the client's training items, padded with -1.
        seed, round, epoch: the other keys of counter-based random draws; outside training, round and epoch
            are 0.
    """

    client: Tensor
    history: Items
    seed: int
    round: int
    epoch: int


class Backbone(nn.Module):
    """Base class of one client's model: scores items by its item embedding and the client's own parameters.

    Args:
        item_embedding: module from items to vectors [*, dim].
        dim: width D of item vectors.

    A subclass implements `forward`, `initial_state` where it has local parameters, and `reset_parameters`
    where it has others besides the item embedding. Randomness such as
    dropout must be a function of the context (`ops.client_dropout`), so that results do not depend on how
    clients are grouped.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    """What the constructor takes by name besides `dim`: settings of `config.BackboneConfig`, or others, which
    are then given as `backbone.options.NAME`."""
    local_parameters: tuple[str, ...] = ()
    averaged_start: tuple[str, ...] = ()
    """Local parameters that a client without a state of its own starts with the mean of, over those that the
    last round's clients ended with (before the first round: the values in this module)."""
    default_lr: ClassVar[float] = 1e-3
    l2_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters besides the item embedding's that the L2 penalty covers: embeddings, not weights of an MLP.
    """
    takes_stacked: ClassVar[bool] = False
    """Whether `forward`, as it is, also takes parameters [C, ...] and items [C, P] and gives scores [C, P]
    (if it only calls ops and modules of this package). Engines then do without `vmap`, which is faster."""
    uses_history: ClassVar[bool] = False
    """Whether `forward` reads the client's items (context.history); otherwise evaluation leaves it empty."""

    def __init__(self, item_embedding: ItemEmbedding, dim: int) -> None:
        super().__init__()
        self.item_embedding = item_embedding
        self.dim = dim

    def forward(self, items: Tensor | Items, context: ClientContext | None = None) -> Tensor:
        """Scores [P] of `items` [P] (padding -1 scores anything; losses skip it)."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the parameters besides the item embedding's that all clients start from. Default: none."""

    @property
    def scoring_width(self) -> int:
        """Numbers held for a client and an item in `catalogue_scores` and `client_scores`, which bounds how
        many clients are evaluated at once. Default: some item vectors; a wider `forward` overrides it."""
        return 8 * self.dim

    @property
    def item_dtype(self) -> torch.dtype:
        """dtype of the parameters."""
        return next(self.parameters()).dtype

    def initial_state(self, clients: Tensor, seed: int, init_std: float) -> dict[str, Tensor]:
        """Local parameters of new clients: {name: [C, ...]}, each row a pure function of (seed, client)."""
        if set(self.local_parameters) - set(self.averaged_start):
            raise NotImplementedError(f"{type(self).__name__} has local parameters but no initial_state")
        return {}

    def new_rows(self, name: str, rows: Tensor, count: int) -> Tensor:
        """What items that arrive later start with in a tensor with a row for each item; as
        `ItemEmbedding.new_rows`, which the default asks, and refuses tensors of the backbone itself.
        """
        module, dot, own = name.partition(".")
        if dot and module == "item_embedding":
            return self.item_embedding.new_rows(own, rows, count)
        raise ValueError(
            f"{type(self).__name__}.new_rows: expected rows of new items in {name!r}, which has one for each "
            "item, got none"
        )

    def catalogue_scores(
        self, vectors: Tensor, state: Mapping[str, Tensor], context: ClientContext
    ) -> Tensor:
        """Scores [C, I] of the whole catalogue for C clients, without gradients.

        Args:
            vectors: [I, D] all item vectors.
            state: local parameters {name: [C, ...]}.
            context: with a leading client dimension on its tensors.

        The default runs `forward` over all items for each client; a backbone with a closed form overrides it.
        """
        items = torch.arange(len(vectors), device=vectors.device).expand(len(context.client), -1)
        return self.client_scores(items, state, context)

    def client_scores(self, items: Tensor, state: Mapping[str, Tensor], context: ClientContext) -> Tensor:
        """Scores [C, P] of each client's own `items` [C, P]; the rest as in `catalogue_scores`."""
        shared = {name: p for name, p in self.named_parameters() if name not in self.local_parameters}

        def one_client(local: dict[str, Tensor], ids: Tensor, ctx: ClientContext) -> Tensor:
            result: Tensor = torch.func.functional_call(self, {**shared, **local}, (ids, ctx))
            return result

        in_dims = (0, 0, stacked_dims(rows=False)[1])
        scores: Tensor = torch.func.vmap(one_client, in_dims=in_dims)(dict(state), items, context)
        if scores.shape != items.shape:
            raise ValueError(
                f"{type(self).__name__}.forward: expected scores [P] of items [P], {items.shape[1]} of them, "
                f"got shape {list(scores.shape[1:])}"
            )
        return scores


def stacked_dims(rows: bool) -> tuple[Any, Any]:
    """vmap's in_dims of `Items` and of a `ClientContext`; `rows`: whether items come with rows."""
    items: Any = Items._make((0, 0 if rows else None))
    context: Any = ClientContext._make((0, items, None, None, None))
    return items, context


_BACKBONES: dict[str, type[Backbone]] = {}


def register_backbone(cls: type[Backbone]) -> type[Backbone]:
    """Class decorator: make a backbone known by its `name`. Defining the same class anew, as a notebook's
    cell does that runs again, replaces it.

    Raises:
        TypeError: not a subclass of `Backbone`. ValueError: no name of lower-case letters, digits and '_', or
            that of another backbone.
    """
    if not (isinstance(cls, type) and issubclass(cls, Backbone)):
        raise TypeError(f"expected a subclass of Backbone, got {cls!r}")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(
            f"{cls.__qualname__}.name: expected lower-case letters, digits and '_', got {name!r}"
        )
    other = _BACKBONES.get(name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"backbone {name!r} is registered already, as {other.__qualname__}")
    _BACKBONES[name] = cls
    return cls


def backbone_names() -> list[str]:
    """Names of all registered backbones, sorted."""
    return sorted(_BACKBONES)


def backbone_class(name: str) -> type[Backbone]:
    """The class registered under `name`. Raises ValueError naming the nearest where there is none."""
    cls = _BACKBONES.get(name.lower())
    if cls is None:
        nearest = difflib.get_close_matches(name.lower(), _BACKBONES, n=1, cutoff=0.4)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"expected a backbone out of {', '.join(backbone_names())}, got {name!r}{hint}")
    return cls


def build_backbone(
    name: str, item_embedding: ItemEmbedding, dim: int, seed: int = 0, **options: Any
) -> Backbone:
    """The backbone registered under `name`, its shared parameters drawn from `seed`.

    Args:
        options: settings by name; None leaves the backbone's own default.

    Raises:
        ValueError: an unknown name, an option (not None) that the backbone does not have, or a backbone whose
            lists of parameters or initial state do not fit its parameters.
    """
    cls = backbone_class(name)
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in cls.options:
            has = f"its options are {', '.join(cls.options)}" if cls.options else "it has no such options"
            raise ValueError(f"backbone.{option}: {name} does not take it; {has}")
    # Another stream than the item embedding's, which is drawn from `seed` too.
    stream = seed ^ 0x6D6C70
    # Layers that a constructor draws depend on the seed alone, wherever new tensors are by default.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(stream)
        model = cls(item_embedding, dim, **given)
    model.reset_parameters(torch.Generator().manual_seed(stream))
    _check_parameters(model)
    return model


def _check_parameters(model: Backbone) -> None:
    """Raise ValueError where a list of names does not fit: a misspelt local parameter would be sent."""
    kind, parameters = type(model).__name__, dict(model.named_parameters())
    table, local = model.item_embedding, model.local_parameters
    for where, names, valid in (
        (f"{kind}.local_parameters", local, parameters),
        (f"{kind}.averaged_start", model.averaged_start, local),
        (f"{kind}.l2_parameters", model.l2_parameters, parameters),
        (f"{type(table).__name__}._row_parameters", table.row_parameters, dict(table.named_parameters())),
    ):
        for name in names:
            if name not in valid:
                raise ValueError(f"{where}: expected names out of {', '.join(valid)}, got {name!r}")
    state = model.initial_state(
        torch.zeros(1, dtype=torch.int64, device=next(iter(parameters.values())).device), 0, 0.1
    )
    own = [name for name in local if name not in model.averaged_start]
    expected = {name: [1, *parameters[name].shape] for name in own}
    got = {name: list(value.shape) for name, value in state.items()}
    if got != expected:
        raise ValueError(f"{kind}.initial_state: expected of one client the shapes {expected}, got {got}")
    for name in own:
        if state[name].dtype != parameters[name].dtype:
            raise ValueError(
                f"{kind}.initial_state: expected {name!r} in the dtype of the parameter, "
                f"{parameters[name].dtype}, got {state[name].dtype}"
            )
