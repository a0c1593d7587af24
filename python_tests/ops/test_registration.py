"""PyTorch's own checks of the registrations, the completeness of the surface, and the documented examples."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from emulated import _emulator
from op_cases import CPU_ALONE, mapped, tensors_in
from torch import Tensor

import fedpeft_ext
from fedpeft_ext import ops, reference
from fedpeft_ext.ops._library import eager_op, is_plain

g = torch.Generator().manual_seed(0)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=g, requires_grad=True)


ITEMS = torch.tensor([[0, 3, -1], [2, 2, 1]])
CODES = torch.tensor([[0, 1], [1, 1], [2, 0], [1, 2]], dtype=torch.uint8)
HASHES = torch.tensor([[3, 1], [5, 2]])
NONE4 = (None,) * 4
SENET = (floats(3, 2), floats(3), floats(2, 3), floats(2))
MLP = [torch.ones(2, 4, 8), torch.ones(2, 4), torch.ones(2, 4)]
CLIENTS = (torch.tensor([0, 1]), torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([0, 2, 1]), 4)
NO_MLP = ([], 0.0)
SETTINGS = (True, False, 2, 0, True, True, 0.1, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.0, 1, 2)
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("rq_lookup", (ITEMS, CODES, floats(2, 2, 3, 5), floats(4, 5))),
    ("rq_lookup", (ITEMS, CODES, floats(2, 3, 5), None)),
    ("rq_lookup_backward", (floats(2, 3, 5), ITEMS, CODES, 3, True)),
    ("rq_lookup_backward", (floats(2, 3, 5), ITEMS, CODES, 3, False)),
    ("hash_buckets", (ITEMS, HASHES, 7)),
    ("hash_lookup", (ITEMS, floats(2, 6, 5), HASHES, *NONE4, True, floats(4, 5))),
    ("hash_lookup", (ITEMS, floats(6, 5), HASHES, *SENET, False, None)),
    ("hash_lookup_backward", (floats(2, 3, 5), ITEMS, floats(2, 6, 5), HASHES, *NONE4, True)),
    ("hash_lookup_backward", (floats(2, 3, 5), ITEMS, floats(6, 5), HASHES, *SENET, False)),
    ("lora_lookup", (ITEMS, floats(2, 4, 2), floats(2, 5, 2), floats(4, 5), None)),
    ("lora_lookup", (ITEMS, floats(2, 4, 2), floats(2, 5, 2), floats(9, 5), ITEMS)),
    ("lora_lookup_backward", (floats(2, 3, 5), ITEMS, floats(4, 2), floats(5, 2))),
    ("client_embedding", (ITEMS, floats(2, 4, 5))),
    ("client_embedding_backward", (floats(2, 3, 5), ITEMS, 4, True)),
    ("dot_scores", (floats(2, 3, 5), floats(2, 5))),
    ("dot_scores_backward", (floats(2, 3), floats(2, 3, 5), floats(2, 5))),
    (
        "client_layer",
        (floats(2, 3, 5), floats(2, 4, 5), floats(2, 4), ITEMS, torch.tensor([1, 2]), 0.4, 1, 2, 3, 4),
    ),
    ("client_layer", (floats(3, 5), floats(4, 5), floats(4), ITEMS[0], torch.tensor(1), 0.0, 1, 2, 3, 4)),
    (
        "client_layer_backward",
        (floats(2, 3, 4), floats(2, 3, 5), floats(2, 4, 5), torch.randn(2, 3, 4), ITEMS, 0.4),
    ),
    (
        "client_mlp",
        (
            *(torch.randn(2, 3, 5), [torch.randn(2, 4, 5), torch.randn(2, 6, 4)]),
            *([torch.randn(2, 4), torch.randn(2, 6)], torch.randn(2, 6)),
            *(ITEMS, torch.tensor([1, 2]), 0.4, 1, 2, 3),
        ),
    ),
    (
        "client_mlp_backward",
        (
            *(torch.randn(2, 3), torch.randn(2, 3, 5), [torch.randn(2, 4, 5), torch.randn(2, 6, 4)]),
            *(torch.randn(2, 6), torch.randn(2, 3 * 16), ITEMS, 0.4),
        ),
    ),
    ("bpr_loss", (floats(2, 3), floats(2, 3), ITEMS)),
    ("bpr_loss_backward", (floats(2), floats(2, 3), floats(2, 3), ITEMS)),
    ("bce_loss", (floats(2, 3), floats(2, 3), ITEMS)),
    ("bce_loss_backward", (floats(2), floats(2, 3), floats(2, 3), ITEMS)),
    ("client_dropout", (floats(2, 3), torch.tensor([1, 2]), 0.5, 1, 2, 3, 4)),
    (
        "sample_negatives",
        (ITEMS, torch.tensor([0, 1]), torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), 4, 2, 1, 0),
    ),
    (
        "local_train",
        (
            *(
                *CLIENTS,
                torch.ones(2, 5),
                torch.ones(4, 5),
                torch.ones(4, 5),
                torch.ones(4, 2),
                torch.ones(5, 2),
            ),
            *(*NONE4, *NONE4, *NO_MLP, *SETTINGS),
        ),
    ),
    (
        "local_train",
        (
            *(*CLIENTS, torch.ones(2, 5), *NONE4, CODES, torch.ones(2, 3, 5), torch.ones(6, 5), HASHES),
            *(*(w.detach() for w in SENET), *NO_MLP, *SETTINGS),
        ),
    ),
    (
        "local_train",
        (
            *(*CLIENTS, torch.ones(2, 3), torch.ones(4, 5), *NONE4, *NONE4, *NONE4[:3], MLP, 0.5),
            *SETTINGS,
        ),
    ),
    (
        "local_train_sum_",
        (
            *(CLIENTS[0], torch.ones(2).double(), *CLIENTS[1:], torch.ones(2, 5), torch.ones(4, 5)),
            *(torch.ones(4, 5), *NONE4, *NONE4, *NONE4[:2], *NO_MLP, torch.zeros(4, 5).double()),
            *(*NONE4, *NONE4, [], torch.zeros(4, dtype=torch.uint8), *SETTINGS, 0.0),
        ),
    ),
    (
        "local_train_sum_",
        (
            *(CLIENTS[0], torch.ones(2).double(), *CLIENTS[1:], torch.ones(2, 3), torch.ones(4, 5)),
            *(None, *NONE4, *NONE4, *NONE4[:2], [t[0] for t in MLP], 0.5, *NONE4, *NONE4, None),
            *([t[0].double() for t in MLP], None, *SETTINGS, 0.0),
        ),
    ),
    (
        "local_train_sum_",
        (
            *(CLIENTS[0], torch.ones(2).double(), *CLIENTS[1:], torch.ones(2, 3), torch.ones(4, 5)),
            *(None, *NONE4, *NONE4, *NONE4[:2], MLP, 0.5, *NONE4, *NONE4, None, [], None, *SETTINGS, 0.0),
        ),
    ),
    (
        "train_round_",
        (
            *(CLIENTS[0], 2, True, 1.0, *CLIENTS[1:], torch.ones(2, 5), torch.ones(4, 5), torch.ones(4, 5)),
            *(*NONE4, *NONE4, *NONE4[:2], *NO_MLP, torch.zeros(4, 5).double(), *NONE4, *NONE4, []),
            *(*SETTINGS, 3),
        ),
    ),
    (
        "train_round_",
        (
            *(CLIENTS[0], 1, False, 1.0, *CLIENTS[1:], torch.ones(2, 3), torch.ones(4, 5), None, *NONE4),
            *(*NONE4, *NONE4[:2], [t[0].clone() for t in MLP], 0.5, *NONE4, *NONE4, None),
            *([t[0].double() * 0 for t in MLP], *SETTINGS, 3),
        ),
    ),
    ("touched_rows", (ITEMS,)),
    ("apply_updates_", (torch.ones(4, 5), torch.ones(4, 5).double(), torch.tensor([0, 2]), 0.5)),
    ("sample_clients", (torch.arange(5), 2, 0, 1, 2)),
    ("sample_clients_independently", (torch.arange(5), 0.5, 0, 1, 2)),
    ("rq_encode", (torch.randn(4, 5), torch.randn(2, 3, 5))),
    (
        "client_adam_",
        (*(torch.ones(2, 3) for _ in range(4)), torch.tensor([1, 2]), 0.1, 0.9, 0.99, 1e-8, 0.1),
    ),
    ("client_sgd_", (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), 0.1, 0.9, 0.1)),
    ("client_sgd_", (torch.ones(2, 3), torch.ones(2, 3), None, 0.1, 0.0, 0.1)),
    (
        "accumulate_updates_",
        (torch.ones(4, 5), torch.ones(2, 3, 5), torch.ones(2, dtype=torch.float64), ITEMS),
    ),
    (
        "accumulate_updates_",
        (torch.ones(5).double(), torch.ones(2, 5), torch.ones(2, dtype=torch.float64), None),
    ),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)])
def test_opcheck(name: str, arguments: tuple[Any, ...], target: Any) -> None:
    if target.device.type == "cuda" and name in CPU_ALONE:
        pytest.skip("serves the CPU alone")

    def place(a: Any) -> Any:
        if isinstance(a, list):
            return [place(t) for t in a]
        return a.detach().to(target.device).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a

    placed = tuple(map(place, arguments))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if torch.__version__.startswith("2.11.") and name == "hash_lookup_backward":
        checks.pop()  # torch 2.11 fails an internal assertion of its own there
    op = getattr(torch.ops.fedpeft_ext, name).default
    result = torch.library.opcheck(op, placed, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


def other_layouts(t: Tensor) -> list[Tensor]:
    """The tensor in those that it can have and no kernel reads."""
    made = [t.to_sparse()]
    if t.dim() > 1:
        made += [torch.nested.nested_tensor(list(t), layout=x) for x in (torch.strided, torch.jagged)]
    return made + ([t.to_mkldnn()] if t.dtype == torch.float32 else [])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CALLS)])
def test_tensors_of_other_layouts_are_named(name: str, arguments: tuple[Any, ...]) -> None:
    op = eager_op(name)
    arguments = mapped(arguments, Tensor.detach)
    for i, given in enumerate(arguments):
        tensors = given if isinstance(given, list) else tensors_in(given)
        for other in (x for t in tensors[:1] for x in other_layouts(t)):
            changed = [other, *given[1:]] if isinstance(given, list) else other
            message = f"^{op._op._schema.arguments[i].name}: expected a dense tensor, got (layout|a nested)"
            with pytest.raises(TypeError, match=message):
                op(*arguments[:i], changed, *arguments[i + 1 :])


def test_only_torchs_own_tensors_take_the_short_way() -> None:
    class Other(Tensor):
        pass

    plain = torch.zeros(2)
    other = plain.as_subclass(Other)
    assert is_plain((plain, torch.nn.Parameter(plain), None, 1, 0.5, True, [], [plain, None]))
    assert not is_plain((plain, other))
    assert not is_plain((plain, [plain, other]))


def test_memory_that_there_is_not() -> None:
    # Torch before 2.13 does not tell an extension what failed, but writes it to standard error.
    said = "can't allocate memory|failed; torch has written why"
    with pytest.raises(RuntimeError, match=said):  # the output
        ops.client_embedding(torch.full((2**10,), -1), torch.empty(0, 2**40))
    with pytest.raises(RuntimeError, match=said):  # a copy without strides
        ops.client_embedding(ITEMS, torch.zeros(1).expand(2**50, 4))


@pytest.mark.skipif(_emulator is None, reason="fedpeft_ext._emulator is not built")
def test_memory_that_a_gpu_has_not_is_torchs_own_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        _emulator.throw_with_message("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")


def test_every_op_is_checked() -> None:
    defined = {
        s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fedpeft_ext::")
    }
    assert defined == {name for name, _ in CALLS}


def test_every_op_has_a_public_function_and_a_twin() -> None:
    assert set(ops.__all__) == set(reference.__all__)
    public = {name for name, _ in CALLS if not name.endswith("_backward")}
    assert public <= set(ops.__all__)
    for name in ops.__all__:
        assert getattr(ops, name).__doc__
        assert getattr(fedpeft_ext, name) is getattr(ops, name)


@pytest.mark.parametrize(
    "module",
    [
        "aggregate",
        "client_embedding",
        "client_layer",
        "client_mlp",
        "dot_scores",
        "hash_lookup",
        "local_train",
        "lora_lookup",
        "losses",
        "optim",
        "rq_encode",
        "rq_lookup",
        "sampling",
    ],
)
def test_documented_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fedpeft_ext.ops.{module}"))
    assert result.failed == 0
    assert result.attempted > 0
