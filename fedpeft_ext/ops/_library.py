"""Glue between the compiled ops and PyTorch: fakes, autograd, vmap and autocast, each registered in one line
an op.

`torch.library.register_autograd` builds an ordinary autograd.Function, which refuses to run inside
torch.func.grad; `register_autograd` below also works there, at any nesting of vmap, grad and jvp, and takes a
rule for forward mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, is_grad_enabled

# By their own names: each lookup in a module takes a fraction of a microsecond of every call.
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C import _AutoDispatchBelowADInplaceOrView as _BelowADInplaceOrView
from torch._C import _AutoDispatchBelowAutograd as _BelowAutograd
from torch.autograd import forward_ad as _forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from ._checks import check_dense

NAMESPACE = "fedpeft_ext"
_torch_library: Any = torch.library  # untyped in torch
LIBRARY = _torch_library.Library(NAMESPACE, "FRAGMENT")
_FORWARD_AD: Any = _forward_ad

Dims = tuple[int | None, ...]


def raw_op(name: str) -> Any:
    """The overload `torch.ops.fedpeft_ext.<name>.default`: skips overload resolution at each call."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class EagerOp:
    """An op as the public functions call it: without the dispatcher's detour through Python wherever that
    would change nothing, which is plain tensors outside transforms, modes, tracing and compilation.

    Autograd's kernel is written in Python. The dispatcher would enter it at each call, with arguments
    converted back and forth; from Python it is one call away, and without a gradient it is not needed at all.
    """

    def __init__(self, name: str) -> None:
        self._op = raw_op(name)
        self.apply: Callable[..., Any] | None = None  # an autograd.Function's, for differentiable ops
        self.written: tuple[int, ...] = ()  # arguments that the op writes into

    def __call__(self, *args: Any) -> Any:
        if is_compiling():
            return self._op(*args)
        try:
            if not is_plain(args):
                return self._op(*args)
            if is_grad_enabled() and _any_requires_grad(*args):
                return self._op(*args) if self.apply is None else self.apply(*args)
            if self.written:
                increment_version(_tensors_at(args, self.written))
                with _BelowADInplaceOrView():
                    return self._op(*args)
            with _BelowAutograd():
                return self._op(*args)
        except NotImplementedError:
            # The dispatcher has no kernel for a tensor's layout, and does not say which tensor's.
            for argument, value in zip(self._op._schema.arguments, args, strict=True):
                for t in value if isinstance(value, list) else [value]:
                    if isinstance(t, Tensor):
                        check_dense(t, argument.name)
            raise


_EAGER_OPS: dict[str, EagerOp] = {}


def eager_op(name: str) -> EagerOp:
    """The one `EagerOp` of an op; `register_autograd` gives it its gradient."""
    return _EAGER_OPS.setdefault(name, EagerOp(name))


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, list, type(None), bool, int, float})


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are of torch's own types, and nothing but autograd transforms or records calls."""
    if (
        _FORWARD_AD._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
    ):
        return False
    types = set(map(type, args))
    if list in types:
        for x in args:
            if type(x) is list:
                types.update(map(type, x))
    types -= _PLAIN_TYPES
    return not types or not any(issubclass(t, Tensor) for t in types)


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return cast(
        Callable[[Callable[..., Any]], Callable[..., Any]],
        torch.library.register_fake(f"{NAMESPACE}::{name}", lib=LIBRARY),
    )


# Autograd ---------------------------------------------------------------------------------------------------


def _have_tangents(args: tuple[Any, ...]) -> bool:
    return _FORWARD_AD._current_level >= 0 and any(
        isinstance(x, Tensor) and _FORWARD_AD.unpack_dual(x).tangent is not None for x in args
    )


def total(*terms: Tensor | None) -> Tensor:
    """The sum of those that are there, at least one."""
    return reduce(torch.add, [t for t in terms if t is not None])


def or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


_Tangent = Callable[[tuple[Any, ...], tuple[Any, ...], Any], Any]


def linear_tangent(op: Callable[..., Tensor]) -> _Tangent:
    """The rule of an op whose first argument alone can have a tangent, in which it is linear."""

    def tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Tensor) -> Tensor:
        return op(tangents[0], *args[1:])

    return tangent


def product_tangent(op: Callable[..., tuple[Tensor, ...]], *factors: int) -> _Tangent:
    """The rule of an op that is linear in its first argument, and in those at `factors` together."""

    def tangent(args: tuple[Any, ...], tangents: tuple[Any, ...], output: Any) -> tuple[Tensor, ...]:
        moved = [or_zeros(tangents[i], x) if i in factors else x for i, x in enumerate(args)]
        by_factors = op(*moved)
        if tangents[0] is None:
            return by_factors
        return tuple(map(torch.add, op(tangents[0], *args[1:]), by_factors))

    return tangent


def register_autograd(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    tangent: _Tangent,
) -> None:
    """Registers both modes of differentiation.

    `backward(ctx, *grads)` returns one gradient (or None) for each argument of the op, `tangent(args,
    tangents, output)` the tangent of each output, where at least one of the arguments has one and the others'
    are None. It calls differentiable functions, so that forward mode nests with both modes.
    """
    op = raw_op(name)

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with _BelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(*args: Any) -> Any:
        *inputs, keyset = args
        if _are_functorch_transforms_active():
            # Outer levels of functorch's stack run inside this call and record gradients and tangents of
            # their own, which an autograd.Function's forward, without both modes, must not switch off.
            with torch.enable_grad(), _FORWARD_AD._set_fwd_grad_enabled(True):
                return below(keyset, tuple(inputs))
        return below(keyset, tuple(inputs))

    def setup_without_keyset(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs[:-1], output)
        if _FORWARD_AD._current_level >= 0:
            with _FORWARD_AD._set_fwd_grad_enabled(True):  # to see them
                if _have_tangents(inputs):
                    ctx.moving = inputs[:-1], output

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        args, output = ctx.moving
        del ctx.moving  # the output holds the context
        primals = tuple(_FORWARD_AD.unpack_dual(x).primal if isinstance(x, Tensor) else x for x in args)
        with _FORWARD_AD._set_fwd_grad_enabled(True):  # as above
            return tangent(primals, tangents[:-1], output)

    def eager_forward(ctx: Any, *args: Any) -> Any:
        with _BelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    def backward_and_keyset(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(ctx, *grads), None)

    # A Function's apply would hand over to functorch, but this kernel already runs at one level of its stack,
    # as functorch's own functions of this base do.
    function: Any = type(
        f"fedpeft_ext_{name}",
        (torch.autograd.function._SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_without_keyset),
            "backward": staticmethod(backward_and_keyset),
            "jvp": staticmethod(jvp),
        },
    )
    apply_here = function.apply

    eager_function = type(
        f"fedpeft_ext_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(eager_forward), "backward": staticmethod(backward)},
    )
    eager_op(name).apply = super(torch.autograd.Function, eager_function).apply  # type: ignore[misc]

    def kernel(keyset: Any, *args: Any) -> Any:
        recorded = is_grad_enabled() and _any_requires_grad(*args)
        if not recorded and not _have_tangents(args):
            return below(keyset, args)
        if not _are_functorch_transforms_active():
            return apply_here(*args, keyset)
        from torch._functorch.utils import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return apply_here(*args, keyset)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def register_not_differentiable(name: str) -> None:
    """For an op without a gradient: refuses inputs that need one, which would lose it without a word."""
    op = raw_op(name)

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        if is_grad_enabled() and _any_requires_grad(*args):
            raise RuntimeError(f"{name} is not differentiable: call it under torch.no_grad()")
        if _have_tangents(args):
            raise RuntimeError(f"{name} is not differentiable: call it on tensors without tangents")
        with _BelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def _tensors_at(args: tuple[Any, ...], places: Sequence[int]) -> list[Tensor]:
    """The tensors among and in the arguments at these places."""
    values = (args[i] for i in places)
    return [t for v in values if v is not None for t in ((v,) if isinstance(v, Tensor) else v)]


def register_in_place(name: str, *mutated: int) -> None:
    """For an op that writes into the arguments at `mutated`: not differentiable (as torch's optimizers it
    runs under no_grad), seen by autograd's version counters, refused by vmap."""
    op = raw_op(name)

    def version_kernel(keyset: Any, *args: Any) -> Any:
        increment_version(_tensors_at(args, mutated))
        with _BelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def vmap_rule(size: int, in_dims: Dims, *args: Any) -> Any:
        raise NotImplementedError(
            f"{name} writes in place and has no vmap rule: call it outside vmap on stacked tensors [C, ...]"
        )

    register_not_differentiable(name)
    eager_op(name).written = mutated
    LIBRARY.impl(name, version_kernel, "ADInplaceOrView", with_keyset=True)
    register_vmap(name)(vmap_rule)


# vmap -------------------------------------------------------------------------------------------------------


def register_vmap(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers `rule(size, in_dims, *args) -> (output, out_dims)`."""

    def register(rule: Callable[..., Any]) -> None:
        def with_info(info: Any, in_dims: Any, *args: Any) -> Any:
            return rule(info.batch_size, in_dims, *args)

        torch.library.register_vmap(f"{NAMESPACE}::{name}", with_info, lib=LIBRARY)

    return register


def to_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension first; a tensor without one is expanded (no copy)."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def loop_over(op: Any, size: int, in_dims: Dims, args: Sequence[Any]) -> tuple[Any, Any]:
    """One call a sample: the rule for arguments that the kernels cannot batch (codes and hashes)."""
    if size == 0:
        raise ValueError("vmap over codes or hashes: expected at least one sample, got 0")
    outputs = [
        op(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0,) * len(outputs[0])


class LookupBatch:
    """How a vmapped lookup becomes one call of the op.

    | parameters | the op's parameters | items become        |
    |------------|---------------------|---------------------|
    | batched    | shared              | [B, P] (per client) |
    | batched    | per client [C, ...] | [B * C, P]          |
    | same for all | shared            | [B, *]              |
    | same for all | per client        | [C, B * P]          |
    """

    def __init__(self, size: int, per_client: bool, batched: bool) -> None:
        self.size, self.per_client, self.batched = size, per_client, batched
        self.shape: tuple[int, ...] = ()  # [B, *items.shape], known after the first positions()

    def positions(self, x: Tensor, dim: int | None, trailing: int = 0) -> Tensor:
        """Items, rows (trailing = 0) or the gradient of the output (trailing = 1)."""
        x = to_front(x, dim, self.size)
        tail = tuple(x.shape[x.dim() - trailing :])
        self.shape = tuple(x.shape[: x.dim() - trailing])
        if self.batched:
            return (
                x.flatten(0, 1) if self.per_client else x.reshape(self.size, math.prod(self.shape[1:]), *tail)
            )
        if self.per_client:
            _, clients, positions = self.shape
            return x.transpose(0, 1).reshape(clients, self.size * positions, *tail)
        return x

    def parameter(self, x: Tensor, dim: int | None) -> Tensor:
        if not self.batched:
            return x
        x = to_front(x, dim, self.size)
        return x.flatten(0, 1) if self.per_client else x

    def output(self, out: Tensor) -> tuple[Tensor, int]:
        """The lookup's output, [*items.shape, D] for each sample."""
        if self.per_client and not self.batched:
            _, clients, positions = self.shape
            return out.reshape(clients, self.size, positions, out.size(-1)), 1
        return out.reshape(*self.shape, out.size(-1)), 0

    def parameter_output(self, out: Tensor) -> tuple[Tensor, int]:
        """A gradient in the shape of the parameter, for each sample."""
        return (out.reshape(self.size, self.shape[1], *out.shape[1:]) if self.per_client else out), 0


def add_batched_base(
    out: tuple[Tensor, int], size: int, items: Tensor, items_dim: int | None, base: Tensor, base_dim: int
) -> tuple[Tensor, int]:
    """Adds base rows where vmap runs over base itself, which the lookups read as one table for all."""
    batch = LookupBatch(size, per_client=False, batched=True)
    rows = raw_op("client_embedding")(batch.positions(items, items_dim), batch.parameter(base, base_dim))
    return out[0].movedim(out[1], 0) + batch.output(rows)[0], 0


# Autocast ---------------------------------------------------------------------------------------------------


def promoted(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, operands of different float dtypes in their widest one; otherwise as they came.

    Unlike matmul, a lookup gains nothing from lower precision, so autocast never lowers it (as nn.Embedding).
    """
    first = tensors[0]
    for t in tensors:
        if isinstance(t, Tensor) and isinstance(first, Tensor) and t.dtype != first.dtype:
            break
    else:
        return tensors
    present = [t for t in tensors if isinstance(t, Tensor)]
    device = first.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not autocast or not all(t.is_floating_point() for t in present):
        return tensors
    widest = reduce(torch.promote_types, (t.dtype for t in present))
    return tuple(t.to(widest) if isinstance(t, Tensor) else t for t in tensors)
