"""SCAFFOLD: written out as in its paper, alike in both engines, and refused where it makes no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_federation import DIM, make_dataset
from test_engines import assert_equal, config, trained
from torch import Tensor

from fedpeft_ext import reference
from fedpeft_ext.config import ConfigError
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation import batched as batched_module
from fedpeft_ext.simulation.randomness import sample_clients
from fedpeft_ext.simulation.scaffold import ControlVariates, check_memory

SCAFFOLD: dict[str, Any] = {
    "training.algorithm": "scaffold",
    "training.optimizer": "sgd",
    "training.lr": 0.5,
    "training.rounds": 5,  # clients come again, with a control variate of their own
}


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_scaffold_is_the_algorithm_of_its_paper(
    pretrained: Pretrained, weighting: str, schedule: str
) -> None:
    """Algorithm 1, option II, dense and client by client in plain PyTorch (FedMF, full embeddings)."""
    dataset = make_dataset(users=4, items=60)
    changes = {**SCAFFOLD, "training.l2": 0.0, "training.clients_per_round": 2, "training.server_lr": 1.5}
    settings = config(
        **changes,
        dtype="float64",
        **{"embedding.name": "full", "training.weighting": weighting},
        **{"training.schedule": schedule, "training.schedule_end": 0.2},
    )
    simulator = Simulator(settings, dataset, pretrained=pretrained)
    x = simulator.model.item_embedding.full_embedding()
    users = simulator.store.state["user"].clone()
    c, own = torch.zeros_like(x), torch.zeros(4, *x.shape, dtype=x.dtype)
    sizes = torch.from_numpy(np.diff(dataset.indptr)).double()
    share = sizes / sizes.sum() if weighting == "samples" else torch.full((4,), 0.25, dtype=x.dtype)
    csr = [torch.from_numpy(part) for part in dataset.positives()]
    for number in range(1, 6):
        change, drift = torch.zeros_like(x), torch.zeros_like(x)
        lr = 0.5 if schedule == "constant" else 0.5 - 0.1 * (number - 1)
        chosen = sample_clients(np.arange(4), 2, settings.seed, number)
        for i in chosen.tolist():
            positives = torch.from_numpy(dataset.indices[dataset.indptr[i] : dataset.indptr[i + 1]])
            negatives = reference.sample_negatives(
                positives[None], torch.tensor([i]), *csr, 60, 2, settings.seed, number
            )[0]
            y, user = x.clone().requires_grad_(), users[i].clone().requires_grad_()
            for epoch in range(2):
                loss = -F.logsigmoid((y[positives] - y[negatives[epoch]]) @ user).mean()
                gradient, moved = torch.autograd.grad(loss, (y, user))
                y.data -= lr * (gradient - own[i] + c)
                user.data -= lr * moved
            after = own[i] - c + (x - y.detach()) / (2 * lr)
            change += share[i] / share[chosen].sum() * (y.detach() - x)
            drift += share[i] * (after - own[i])
            own[i], users[i] = after, user.detach()
        x, c = x + 1.5 * change, c + drift
        simulator.round()
        torch.testing.assert_close(simulator.model.item_embedding.full_embedding(), x, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(simulator.store.state["user"], users, rtol=0.0, atol=1e-12)
    assert float(c.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("backbone", "strategy", "changes"),
    [
        ("fedmf", "full", {}),
        ("fedmf", "p-lora", {"training.batch_size": 3}),
        ("fedmf", "p-rq+lora", {"embedding.freeze_full": False}),
        ("fedmf", "c-hash+senet", {"training.weighting": "uniform", "training.local_epochs": 3}),
        ("fedmf", "p-rq", {"training.warmup_rounds": 2, "training.loss": "bce"}),
        ("fedmf", "p-lora", {"training.schedule": "cosine", "training.server_schedule": "linear"}),
        ("fedncf", "p-rq+lora", {"training.batch_size": 4, "backbone.hidden": "[12, 20]"}),
        ("pfedrec", "full", {"training.server_optimizer": "adam", "backbone.hidden": "[12, 20]"}),
        ("fedpergnn", "p-lora", {"training.clients_per_round": 1.0}),
    ],
)
def test_batched_equals_sequential(
    dataset: Dataset, pretrained: Pretrained, backbone: str, strategy: str, changes: dict[str, Any]
) -> None:
    changes = {
        "backbone.name": backbone,
        "embedding.name": strategy,
        "dtype": "float64",
        **SCAFFOLD,
        **changes,
    }
    batched = trained(dataset, pretrained, **changes)
    assert_equal(batched, trained(dataset, pretrained, **changes, engine="sequential"), 1e-9)
    plain = trained(dataset, pretrained, **{**changes, "training.algorithm": "fedavg"}, engine="batched")
    assert any(not torch.equal(value, plain[0][name]) for name, value in batched[0].items())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("backbone", "strategy", "batch_size"),
    [("fedmf", "full", None), ("fedmf", "p-rq+lora", 4), ("fedncf", "p-lora", None)],
)
def test_same_bits_for_any_chunks_and_threads(
    dataset: Dataset,
    pretrained: Pretrained,
    backbone: str,
    strategy: str,
    batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {**SCAFFOLD, "backbone.name": backbone, "embedding.name": strategy}
    changes |= {"training.batch_size": batch_size, "training.lr": 0.3}
    results = []
    for memory, overhead, count in ((1e6, 10**9, 1), (1e-6, 10**9, 3), (1e6, 0, 2), (0.05, 4, 3)):
        monkeypatch.setattr(batched_module, "CHUNK_OVERHEAD", overhead)
        results.append(trained(dataset, pretrained, **changes, chunk_memory_mb=memory, threads=count))
    for state, losses in results[1:]:
        assert losses == results[0][1]
        for name, value in state.items():
            assert torch.equal(value, results[0][0][name]), name


@pytest.mark.parametrize("strategy", ["full", "p-rq"])
def test_the_only_client_is_not_corrected(pretrained: Pretrained, strategy: str) -> None:
    """With one client c = c_i in every round: SCAFFOLD is local SGD."""
    alone = make_dataset(users=2, longest=30)
    alone = Dataset(
        **{
            **{
                name: getattr(alone, name)
                for name in ("name", "num_items", "item_ids", "item_text", "report")
            },
            "num_users": 1,
            "indptr": alone.indptr[:2],
            "indices": alone.indices[: alone.indptr[1]],
            "test_items": alone.test_items[:1],
            "valid_items": alone.valid_items[:1],
            "user_ids": alone.user_ids[:1],
        }
    )
    changes = {**SCAFFOLD, "training.clients_per_round": 1, "embedding.name": strategy, "dtype": "float64"}
    plain = trained(alone, pretrained, **{**changes, "training.algorithm": "fedavg"})
    assert_equal(trained(alone, pretrained, **changes), plain, 1e-12)


def test_the_servers_variate_is_the_mean_of_the_clients(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {**SCAFFOLD, "embedding.name": "p-rq+lora", "training.weighting": "uniform", "dtype": "float64"}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    for _ in range(4):
        simulator.round()
    variates = simulator.variates
    assert variates is not None
    everyone = torch.arange(dataset.num_users)
    assert 9 < len(variates.clients) <= dataset.num_users
    for name, own in variates.own(everyone, None).items():
        torch.testing.assert_close(variates.server[name], own.mean(0), rtol=0.0, atol=1e-13)
        assert float(own.abs().max()) > 0.0


def test_a_discarded_round_leaves_the_variates(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {**SCAFFOLD, "embedding.name": "full", "engine": "batched"}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    simulator.round()
    variates = simulator.variates
    assert variates is not None
    before = {name: value.clone() for name, value in variates.state_dict().items()}
    simulator.store.state["user"][:, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        simulator.round()
    after = variates.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_state_goes_into_another_instance(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {**SCAFFOLD, "embedding.name": "p-rq+lora"}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    fresh = Simulator(config(**changes), dataset, pretrained=pretrained).variates
    for _ in range(3):
        simulator.round()
    variates = simulator.variates
    assert variates is not None
    assert fresh is not None
    state = variates.state_dict()
    fresh.load_state_dict(state)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in state.items())
    clients = torch.tensor(sorted(variates.clients))
    rows = variates.rows(clients)
    for name, value in variates.own(clients, rows).items():
        assert torch.equal(value, fresh.own(clients, rows)[name])


def test_both_ways_carry_twice_as_much(dataset: Dataset, pretrained: Pretrained) -> None:
    for name, sent in (("p-rq", 3 * 16 * DIM), ("full", 60 * DIM)):
        info = Simulator(
            config(**SCAFFOLD, **{"embedding.name": name}), dataset, pretrained=pretrained
        ).round()
        assert (info.bytes_down, info.bytes_up) == (2 * 4 * sent, 2 * 4 * sent)


def test_what_does_not_fit_in_memory_is_refused() -> None:
    parameters = {"table": torch.zeros(1000, 64), "small": torch.zeros(1000, 1000)}
    tables = frozenset({"table"})
    check_memory(parameters, tables, [10] * 100)
    with pytest.raises(
        ValueError, match=r"training\.algorithm: scaffold keeps .* for each of 1,000,000 clients"
    ):
        check_memory(parameters, tables, [10] * 1_000_000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.optimizer": "adam"}, r"training\.optimizer: expected 'sgd' with algorithm scaffold"),
        ({"training.warmup_optimizer": "adam"}, r"training\.warmup_optimizer: expected 'sgd'"),
        ({"training.momentum": 0.5}, r"training\.momentum: expected 0 with algorithm scaffold"),
        ({"training.prox_mu": 0.5}, r"training\.prox_mu: expected 0 with algorithm scaffold"),
        ({"compression.method": "fp16"}, r"compression\.method: expected 'none' with training\.algorithm"),
        ({"faults.reject": True}, r"faults\.reject: expected false with training\.algorithm"),
        (
            {"privacy.mode": "cdp", "privacy.scale": 1.0, "training.weighting": "uniform"},
            r"privacy\.mode: expected 'none' with training\.algorithm scaffold",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**{**SCAFFOLD, **changes})


def test_fused_refuses_and_auto_goes_on(dataset: Dataset, pretrained: Pretrained) -> None:
    assert Simulator(config(**SCAFFOLD), dataset, pretrained=pretrained).engine == "batched"
    with pytest.raises(ValueError, match="it knows no control variates"):
        Simulator(config(**SCAFFOLD, engine="fused"), dataset, pretrained=pretrained)


def test_variates_of_nobody() -> None:
    variates = ControlVariates({"table": torch.zeros(5, 2)}, frozenset({"table"}), 3.0)
    clients = torch.arange(3)
    rows = torch.tensor([[0, 4], [1, -1], [-1, -1]])
    assert variates.rows(clients).shape == (3, 0)
    own: dict[str, Tensor] = variates.own(clients, rows)
    assert torch.equal(own["table"], torch.zeros(3, 2, 2))
