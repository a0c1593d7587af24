"""`ItemEmbedding`: what all embedding modules share: the frozen base, padding, `Items`, bytes, and merging.

A module's vector of item i is e_i + c_i (Yuan et al., "Plug-and-Play Parameter-Efficient Tuning of Embeddings
for Federated Recommendation", AAAI 2026): the *full* embedding e_i, here `base`, is frozen, and the
*compressed* part c_i is all that is trained and sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Self

from fedpeft_ext import ops
from fedpeft_ext.nn.items import Items
from fedpeft_ext.ops._checks import FLOAT_DTYPES, check_dense, check_float


class BaseOptions(TypedDict, total=False):
    """Options of every `ItemEmbedding`, which the subclasses' constructors hand on; see there."""

    padding_idx: int | None
    base: Tensor | None
    freeze_base: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class ItemEmbedding(nn.Module, ABC):
    """Base class of the embedding modules; used like `torch.nn.Embedding`.

    `forward` maps integer ids of any shape to vectors of that shape + [embedding_dim]. Ids of -1, and of
    `padding_idx`, give zeros and no gradient.

    Args:
        num_embeddings: number of items I.
        embedding_dim: width D.
        padding_idx: item that stands for padding, or None. As in `nn.Embedding` a negative one counts from
            the end.
        base: full embeddings [I, D] that the compressed part is added to, or None. Copied.
        freeze_base: keep `base` as a buffer, out of reach of optimizers and of `requires_grad_`; False makes
            it a parameter, which is then trained and sent as well.
        device, dtype: of the parameters; those of `base` where None, else torch's defaults.

    A subclass implements `_lookup`, `reset_parameters` and `_options`, and lists its item-indexed parameters
    in `_row_parameters`.

    Raises:
        TypeError: `base` or ids of a wrong type. ValueError: a size or shape that does not fit.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    base: Tensor | None
    _row_parameters: tuple[str, ...] = ()
    takes_stacked: bool = True
    """Whether `_lookup`, as it is, also takes parameters [C, ...] with items [C, P], as the package's ops do.
    With False simulations run the module under `torch.func.vmap`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        base: Tensor | None = None,
        freeze_base: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype}")
        if padding_idx is not None:
            require_integer("padding_idx", padding_idx)
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"padding_idx: expected an item in [-{num_embeddings}, {num_embeddings}), "
                    f"got {padding_idx}"
                )
            padding_idx = int(padding_idx % num_embeddings)
        # NumPy's integers, as counts of a data frame are, would break graphs of torch.compile.
        self.num_embeddings = int(num_embeddings)
        self.embedding_dim = int(embedding_dim)
        self.padding_idx = padding_idx
        if base is None:
            self.register_buffer("base", None)
        else:
            require_table("base", base, (num_embeddings, embedding_dim))
            # A copy: a base that shared storage with a live parameter would move with it.
            base = base.detach().to(device=device, dtype=dtype, copy=True)
            if freeze_base:
                self.register_buffer("base", base)
            else:
                self.register_parameter("base", nn.Parameter(base))

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **options: Any
    ) -> Self:
        """Plug a new compressed part into pre-trained full embeddings [I, D], which become the `base`.

        Args:
            embeddings: floating [I, D]; copied.
            freeze: keep them frozen, as a buffer; False trains them too, as a parameter.
            padding_idx: as in the constructor.
            **options: of the constructor.
        """
        require_table("embeddings", embeddings)
        num_embeddings, embedding_dim = embeddings.shape
        options = {"padding_idx": padding_idx, "base": embeddings, "freeze_base": freeze, **options}
        return cls(num_embeddings, embedding_dim, **options)

    @abstractmethod
    def _lookup(self, items: Items, base: Tensor | None) -> Tensor:
        """Compressed vectors of `items` plus, where given, the rows of `base` at `items.ids`; zeros at -1."""

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the compressed part anew, as at construction; base and codes stay as they are."""

    def _options(self) -> str:
        return ""

    def forward(self, items: Tensor | Items) -> Tensor:
        """Vectors of `items`.

        Args:
            items: ids (int32 or int64, any shape; a jagged nested tensor stands for bags of differing size,
                as in `nn.Embedding`), or `Items(ids, rows)`: then the parameters in
                `row_parameters` are read at `rows`, as a caller needs that passes only the touched rows
                through `torch.func.functional_call`. Parameters passed that way may also carry a leading
                client dimension C, with items [C, P].

        Returns:
            [*items.shape, embedding_dim], of the dtype of the parameters; zero at -1 and at `padding_idx`.

        Raises:
            TypeError: `items` are not int32 or int64. IndexError: an id, or a row, out of range (on CUDA a
                device-side assertion).
        """
        items = items if isinstance(items, Items) else Items(items)
        if isinstance(items.ids, Tensor) and items.ids.is_nested:
            return self._jagged(items)
        items = self._masked(items)
        base = self.base
        trained = "base" in self._parameters
        if base is None or (not trained and base.dtype == self._dtype()):
            return self._vectors(items, base)
        # A trained base is one more table indexed by item: a client holds only the rows it touches. And where
        # parameters are cast for the forward alone (FSDP2's mixed precision), the base, a buffer, is not.
        vectors = self._vectors(items, None)
        return vectors + read_rows(base, items if trained else Items(items.ids)).to(vectors.dtype)

    def _jagged(self, items: Items) -> Tensor:
        ids: Any = items.ids
        if ids.layout != torch.jagged:
            raise TypeError("items.ids: expected a nested tensor of layout torch.jagged, got torch.strided")
        rows: Any = items.rows
        vectors = self(Items(ids.values(), None if rows is None else rows.values()))
        bags: Tensor = torch.nested.nested_tensor_from_jagged(
            vectors, ids.offsets(), ids.lengths(), jagged_dim=ids._ragged_idx
        )
        return bags

    def _dtype(self) -> torch.dtype | None:
        """Of the compressed part; None where there is no parameter."""
        # Most modules have one of their own; `named_parameters` takes microseconds, on every call.
        for name, parameter in self._parameters.items():
            if parameter is not None and name != "base":
                return parameter.dtype
        return next((p.dtype for name, p in self.named_parameters() if name != "base"), None)

    def _vectors(self, items: Items, base: Tensor | None) -> Tensor:
        """`_lookup`, with rows only where they index a parameter of this module; raises ValueError on another
        shape than that of vectors."""
        vectors = self._lookup(items if self._row_parameters else Items(items.ids), base)
        if vectors.shape != (*items.ids.shape, self.embedding_dim):
            raise ValueError(
                f"{type(self).__name__}._lookup: expected vectors "
                f"{[*items.ids.shape, self.embedding_dim]} of items {list(items.ids.shape)}, "
                f"got shape {list(vectors.shape)}"
            )
        return vectors

    def _masked(self, items: Items) -> Items:
        for name, index in zip(Items._fields, items, strict=True):
            if index is None and name == "rows":
                continue
            if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
                got = str(index.dtype) if isinstance(index, Tensor) else type(index).__name__
                raise TypeError(f"items.{name}: expected an int32 or int64 tensor, got {got}")
            if index.layout is not torch.strided:
                check_dense(index, f"items.{name}")
        if self.padding_idx is None:
            return items
        padding = items.ids == self.padding_idx
        rows = None if items.rows is None else items.rows.masked_fill(padding, -1)
        return Items(items.ids.masked_fill(padding, -1), rows)

    @property
    def row_parameters(self) -> tuple[str, ...]:
        """Names of the parameters whose first dimension is the item: those that `Items.rows` indexes."""
        return (("base",) if "base" in self._parameters else ()) + self._row_parameters

    def new_rows(self, name: str, rows: Tensor, count: int) -> Tensor:
        """What items that arrive later start with in a tensor with a row for each item.

        The default is the mean of the trained rows, in each of `row_parameters`. Rows of the base, and codes,
        are encoded from the items' text instead, and not asked for.

        Args:
            name: of the parameter or buffer.
            rows: [I, ...], of the items before.
            count: of items that arrive.

        Returns:
            [count, ...].

        Raises:
            ValueError: a tensor that is not in `row_parameters`.
        """
        if name not in self.row_parameters:
            raise ValueError(
                f"{type(self).__name__}.new_rows: expected rows of new items in {name!r}, which is none of "
                "row_parameters, got none"
            )
        return rows.mean(0).expand(count, *rows.shape[1:])

    def compressed_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and sent, by name: every parameter that requires a gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def bytes_per_round(self) -> int:
        """Bytes of one transfer of `compressed_parameters`, one way."""
        return sum(p.numel() * p.element_size() for p in self.compressed_parameters().values())

    @torch.no_grad()
    def full_embedding(self, chunk_size: int = 65536) -> Tensor:
        """The final table [I, D], base plus compressed part, detached; `chunk_size` items at a time."""
        require_positive(chunk_size=chunk_size)
        device = next(self.parameters()).device
        ids = torch.arange(self.num_embeddings, device=device)
        return torch.cat([self(chunk) for chunk in torch.split(ids, chunk_size)])

    def merge(self) -> nn.Embedding:
        """A plain `nn.Embedding` of the final vectors, for deployment without this package."""
        return nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self.full_embedding()
        )

    def _table(self) -> Tensor:
        """The final table [I, D] with gradients: what `weight` is to `nn.Embedding`."""
        table: Tensor = self(torch.arange(self.num_embeddings, device=next(self.parameters()).device))
        return table

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "weight" not in self.__dict__.get("_parameters", ()) and hasattr(self, name):
            raise AttributeError(
                f"weight: {type(self).__name__} computes it from its base and its compressed part; to start "
                "from other vectors, make a new module of them, by from_pretrained or plug"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}{self._options()}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.base is not None:
            text += f", base={'trained' if 'base' in self._parameters else 'frozen'}"
        return text


def read_rows(table: Tensor, items: Items) -> Tensor:
    """Rows of an item-indexed `table` [(C,) R, D]: at the rows where given, else at the ids.

    Raises:
        IndexError: one is out of range; ValueError: another device. Named as the caller of the module gave
            it, `rows` or `items`.
    """
    if items.rows is not None:
        return ops.client_embedding(items.rows, table)
    try:
        return ops.client_embedding(items.ids, table)
    except (IndexError, ValueError) as error:
        raise type(error)(f"items{str(error).removeprefix('rows')}") from None


def has_values(t: Tensor) -> bool:
    """Whether a tensor has values to look at: not on device "meta", and no fake one."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def require_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def require_positive(**sizes: int) -> None:
    """Raise unless each named size is an integer of at least 1."""
    for name, size in sizes.items():
        require_integer(name, size)
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def require_table(name: str, table: Tensor, shape: tuple[int, int] | None = None) -> None:
    """Raise unless `table` is a floating tensor [I, D], of the given shape where one is given."""
    check_float(table, name)
    check_dense(table, name)
    if table.dim() != 2 or (shape is not None and tuple(table.shape) != shape):
        expected = "[I, D]" if shape is None else list(shape)
        raise ValueError(f"{name}: expected shape {expected}, got {list(table.shape)}")


def new_parameter(*shape: int, base: Tensor | None, options: BaseOptions | Mapping[str, Any]) -> nn.Parameter:
    """An uninitialised parameter, on the device and of the dtype of the module's `base`, or as named."""
    if base is not None:
        return nn.Parameter(base.new_empty(shape))
    return nn.Parameter(torch.empty(shape, device=options.get("device"), dtype=options.get("dtype")))


def draw_normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with normal draws; a generator of another device gives the values that it gives there."""
    _draw(partial(nn.init.normal_, std=std), parameter, generator)


def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill with uniform draws from [-bound, bound]; as `draw_normal` for a generator of another device."""
    _draw(partial(nn.init.uniform_, a=-bound, b=bound), parameter, generator)


@torch.no_grad()
def _draw(fill: Callable[..., Tensor], parameter: Tensor, generator: torch.Generator | None) -> None:
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator is None or generator.device == parameter.device:
        fill(parameter, generator=generator)
    else:
        there = torch.empty_like(parameter, device=generator.device)
        parameter.copy_(fill(there, generator=generator))


def require_std(init_std: float) -> float:
    """Raise unless `init_std` is a finite standard deviation of at least 0."""
    if not isinstance(init_std, Real):
        raise TypeError(f"init_std: expected a number, got {type(init_std).__name__}")
    if not 0.0 <= init_std < float("inf"):
        raise ValueError(f"init_std: expected a finite number of at least 0, got {init_std}")
    return float(init_std)
