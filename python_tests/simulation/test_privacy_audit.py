"""Audits: what an adversary finds out about clients bounds epsilon from below, and has to stay below what is
reported. Each audit is repeated with planted faults, under which it must not.

The adversary plays the game of the definition: was this client there, or not? From its answers in the two
worlds, Clopper and Pearson's intervals of the rates of true and of false alarms give
epsilon >= log((true - delta) / false) (Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine
Learning", NeurIPS 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch.nn.functional import normalize

from fedpeft_ext.config import Config, PrivacyConfig
from fedpeft_ext.data import Dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator, privacy
from fedpeft_ext.simulation.privacy import epsilon, make_clipping, noisy_upload
from fedpeft_ext.simulation.uploads import Uploads

DIM, DELTA = 8, 0.05
CLIP = 1e-3
ERROR = 0.05
"""Probability that a bound is above the true epsilon."""


def lower_bound(inside: np.ndarray, outside: np.ndarray) -> float:
    """Epsilon at `DELTA` that these scores, of independent trials in either world, show. The threshold is
    chosen on the first half of the trials, and judged on the second.
    """

    def shown(threshold: float, half: slice) -> float:
        n = len(inside[half])
        true, false = (int((scores[half] > threshold).sum()) for scores in (inside, outside))
        low = beta.ppf(ERROR / 2, true, n - true + 1) if true else 0.0
        high = beta.ppf(1 - ERROR / 2, false + 1, n - false) if false < n else 1.0
        return float(np.log(max(low - DELTA, 1e-9) / high))

    middle = len(inside) // 2
    thresholds = np.quantile(np.concatenate([inside[:middle], outside[:middle]]), np.linspace(0.5, 0.99, 50))
    best = max(thresholds, key=lambda threshold: shown(threshold, slice(0, middle)))
    return shown(best, slice(middle, None))


# ---- the simulator, central noise

pytestmark = pytest.mark.filterwarnings("ignore:privacy.delta")  # a large one takes fewer trials


def canaries(number: int) -> Dataset:
    """Twice as many users: those of even number have one item, which no one else has; the others' data were
    left out. There are as many items again, which are only drawn as negatives.
    """
    users = np.arange(2 * number)
    test = np.full(2 * number, -1)
    test[0] = 4 * number - 1  # somebody is to be evaluated
    return Dataset(
        name="canaries",
        num_users=2 * number,
        num_items=4 * number,
        indptr=np.concatenate([[0], np.cumsum(users % 2 == 0)]).astype(np.int64),
        indices=users[::2].astype(np.int64),
        test_items=test.astype(np.int64),
        valid_items=np.full(2 * number, -1, dtype=np.int64),
        user_ids=[""] * (2 * number),
        item_ids=[""] * (4 * number),
    )


def play(
    number: int, share: float, rounds: int, seed: int = 0, plant: Callable[[Simulator], Any] | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores of canaries that took part and of those that did not, and epsilon as reported.

    With small steps from item vectors of zero all passes over a client's item add up, and each pass has
    negatives of its own, so that a clipped upload lies almost whole in its item's row, along the user's first
    vector. The adversary knows all this, and looks how far the model moved there.
    """
    config = Config().updated(
        [
            "embedding.name=full",
            f"backbone.dim={DIM}",
            "backbone.init_std=1",
            "training.optimizer=sgd",
            "training.lr=0.01",
            "training.local_epochs=9",
            "training.weighting=uniform",
            "training.client_sampling=poisson",
            f"training.clients_per_round={share}",
            "privacy.mode=cdp",
            f"privacy.clip={CLIP}",
            f"privacy.noise_multiplier={share * rounds**0.5}",
            f"privacy.delta={DELTA}",
            "evaluation.num_negatives=1",
            "evaluation.full_ranking=false",
            f"seed={seed}",
        ]
    )
    dataset = canaries(number)
    full = torch.zeros(dataset.num_items, DIM)
    simulator = Simulator(config, dataset, pretrained=Pretrained(full=full))
    if plant is not None:
        plant(simulator)
    directions = normalize(simulator.store.state["user"].clone())
    for _ in range(rounds):
        simulator.round()
    moved = simulator.model.item_embedding.weight.detach()[: dataset.num_users]
    scores = (moved * directions).sum(1).double().numpy()
    assert simulator.privacy is not None
    assert simulator.privacy.epsilon is not None
    return scores[::2], scores[1::2], simulator.privacy.epsilon


def half_noise(simulator: Simulator) -> None:
    noise = simulator._aggregator._noise
    assert noise is not None
    noise._scale /= 2


def no_clipping(simulator: Simulator) -> None:
    simulator._aggregator._stages = ()


def everybody_in_every_round(simulator: Simulator) -> None:
    everyone = simulator._interactions.by_size(simulator._eligible)
    simulator._sample = lambda round, attempt: everyone  # type: ignore[method-assign]


def one_round_counted(simulator: Simulator) -> None:
    ledger = simulator._ledger
    assert ledger is not None
    ledger.add_round = lambda clients: setattr(ledger, "rounds", 1)  # type: ignore[method-assign]


@pytest.mark.parametrize(("share", "rounds"), [(1.0, 4), (0.5, 8)])
def test_central_noise_hides_a_client(share: float, rounds: int) -> None:
    inside, outside, reported = play(2500, share, rounds)
    assert 0.25 * reported < lower_bound(inside, outside) < reported


@pytest.mark.parametrize("fault", [half_noise, no_clipping, everybody_in_every_round, one_round_counted])
def test_the_audit_finds_faults(fault: Callable[[Simulator], None]) -> None:
    inside, outside, reported = play(2500, 0.5, 8, plant=fault)
    assert lower_bound(inside, outside) > reported


@pytest.mark.slow
@pytest.mark.parametrize(("share", "rounds"), [(1.0, 4), (0.5, 8), (0.25, 16)])
def test_central_noise_hides_a_client_closely(share: float, rounds: int) -> None:
    games = [play(4000, share, rounds, seed) for seed in range(16)]
    bound = lower_bound(*(np.concatenate([game[world] for game in games]) for world in (0, 1)))
    print(f"share {share}, {rounds} rounds: epsilon {bound:.2f} shown, {games[0][2]:.2f} reported")
    assert 0.5 * games[0][2] < bound < games[0][2]


# ---- a node's uploads, local noise


def local_scores(mechanism: Any, sign: float, fault: str, number: int = 1500) -> np.ndarray:
    """What the server sees of a client's one element in as many uploads, clipped and noised as nodes do."""
    config = PrivacyConfig(mode="ldp", mechanism=mechanism, clip=CLIP, noise_multiplier=2.0)
    weak = config.model_copy(update={"noise_multiplier": 1.0})
    update = torch.zeros(number, 2, 3)
    update[:, 1, 2] = sign
    uploads = Uploads(
        {"table": update}, torch.ones(number).double(), None, frozenset(), torch.arange(number), 1
    )
    if fault != "no clipping":
        ((uploads,),) = (stage(uploads) for stage in make_clipping(config))
    return np.array(
        [
            float(noisy_upload({"table": u}, w, weak if fault == "half the noise" else config)["table"][1, 2])
            for u, w in zip(update, uploads.weights.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("fault", ["", "half the noise", "no clipping"])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_local_noise_hides_which_data_a_client_has(
    mechanism: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy, "secret_seed", count().__next__)
    bound = lower_bound(*(local_scores(mechanism, sign, fault) for sign in (1.0, -1.0)))
    reported = epsilon(mechanism, 2.0, 1, DELTA, None)
    assert bound > reported if fault else 0.25 * reported < bound < reported
