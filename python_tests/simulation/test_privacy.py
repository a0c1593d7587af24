"""Clipping, the noise's distribution, the accountant, and a server that sees weighted sums alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq
from small_federation import DIM, small_config
from torch import Tensor

from fedpeft_ext.config import Config, ConfigError, PrivacyConfig
from fedpeft_ext.data import Dataset
from fedpeft_ext.ops import philox
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator
from fedpeft_ext.simulation.aggregation import Aggregator, Server
from fedpeft_ext.simulation.communication import message
from fedpeft_ext.simulation.privacy import (
    Clipping,
    Ledger,
    Noise,
    composed_epsilon,
    epsilon,
    gaussian_sum,
    laplace_sum,
)
from fedpeft_ext.simulation.randomness import sample_clients_independently
from fedpeft_ext.simulation.uploads import Uploads, pairwise_sum


def config(**changes: Any) -> Config:
    return small_config(
        **{
            "training.rounds": 3,
            "training.weighting": "uniform",
            "privacy.mode": "cdp",
            "privacy.clip": 0.05,
            "privacy.noise_multiplier": 0.5,
            **changes,
        }
    )


def trained(dataset: Dataset, pretrained: Pretrained, **changes: Any) -> dict[str, Tensor]:
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    for _ in range(simulator.config.training.rounds):
        simulator.round()
    return {name: tensor.clone() for name, tensor in simulator.state_dict().items()}


def uploads(clients: int = 4, padding: int = 0, scale: float = 1.0) -> Uploads:
    """Clients that touch 1, 2, ... rows; padding carries garbage."""
    generator = torch.Generator().manual_seed(0)
    width = clients + padding
    rows = torch.full((clients, width), -1)
    table = torch.full((clients, width, 3), float("nan"))
    for c in range(clients):
        rows[c, : c + 1] = torch.arange(c + 1)
        table[c, : c + 1] = scale * torch.randn(c + 1, 3, generator=generator)
    small = scale * torch.randn(clients, 2, 2, generator=generator)
    weights = torch.ones(clients, dtype=torch.float64)
    tables = frozenset({"table"})
    return Uploads({"table": table, "small": small}, weights, rows, tables, torch.arange(clients), 1)


# ---- clipping


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_of_the_whole_upload(order: Any) -> None:
    given = uploads(padding=3)
    for c, norm in enumerate(given.norms(order).tolist()):
        whole = torch.cat([given.updates["table"][c, : c + 1].flatten(), given.updates["small"][c].flatten()])
        assert norm == pytest.approx(float(torch.linalg.vector_norm(whole.double(), order)), rel=1e-14)


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_the_same_bits_for_any_padding_and_company(order: Any) -> None:
    expected = uploads(6).norms(order)
    assert torch.equal(uploads(6, padding=11).norms(order), expected)
    alone = [uploads(6, padding=2).selected(torch.arange(6) == c).norms(order) for c in range(6)]
    assert torch.equal(torch.cat(alone), expected)


@given(st.lists(st.floats(-1e6, 1e6), max_size=70), st.integers(0, 40))
@settings(deadline=None, max_examples=50)
def test_pairwise_sum(values: list[float], zeros: int) -> None:
    row = torch.tensor([values], dtype=torch.float64)
    total = pairwise_sum(row)
    assert float(total) == pytest.approx(sum(values), rel=1e-12, abs=1e-6)
    assert torch.equal(pairwise_sum(torch.nn.functional.pad(row, (0, zeros))), total)


@pytest.mark.parametrize("order", [1, 2])
@given(scale=st.floats(1e-6, 1e6), bound=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=25)
def test_no_upload_exceeds_the_bound(order: Any, scale: float, bound: float) -> None:
    given = uploads(scale=scale)
    before = given.norms(order)
    (clipped,) = Clipping(bound, order)(given)
    after = before * clipped.weights
    assert bool((after <= bound * (1 + 1e-12)).all())
    # Short uploads are left alone, long ones end at the bound.
    torch.testing.assert_close(after, before.clamp(max=bound), rtol=1e-12, atol=0.0)


def test_broken_uploads_count_as_zero() -> None:
    given = uploads()
    given.updates["small"][1, 0, 0] = float("nan")
    given.updates["table"][2, 0, 0] = float("inf")
    (clipped,) = Clipping(1.0, 2)(given)
    for update in clipped.updates.values():
        assert torch.equal(update[1:3], torch.zeros_like(update[1:3]))
    assert torch.equal(clipped.weights[1:3], torch.ones(2, dtype=torch.float64))


# ---- noise


@pytest.mark.parametrize("summands", [1, 2, 37])
def test_noise_sums_have_their_exact_distribution(summands: int) -> None:
    gaussian = gaussian_sum(20_001, summands, seed=5, round=2, index=0)
    assert stats.kstest(gaussian, stats.norm(scale=np.sqrt(summands)).cdf).pvalue > 1e-3
    laplace = laplace_sum(20_001, summands, seed=5, round=2, index=0)
    if summands == 1:
        assert stats.kstest(laplace, stats.laplace.cdf).pvalue > 1e-3
    # Against sums that NumPy draws one by one.
    drawn = np.random.default_rng(0).laplace(size=(20_001, summands)).sum(1)
    assert stats.ks_2samp(laplace, drawn).pvalue > 1e-3
    assert abs(np.corrcoef(gaussian[:-1], gaussian[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(laplace[:-1], laplace[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("draw", [gaussian_sum, laplace_sum])
def test_noise_is_a_function_of_its_place(draw: Any) -> None:
    whole = draw(101, 3, seed=1, round=7, index=2)
    assert np.array_equal(draw(40, 3, seed=1, round=7, index=2), whole[:40])
    for change in ({"seed": 2}, {"round": 8}, {"index": 3}):
        other = draw(101, 3, **{"seed": 1, "round": 7, "index": 2, **change})
        assert not np.isin(other, whole).any()


@pytest.mark.parametrize(
    ("mode", "mechanism", "deviation"),
    [
        ("cdp", "gaussian", 1.0),
        ("cdp", "laplace", np.sqrt(2.0)),
        ("ldp", "gaussian", np.sqrt(9.0)),
        ("ldp", "laplace", np.sqrt(2.0 * 9.0)),
    ],
)
def test_noise_reaches_every_element_at_the_stated_scale(
    dataset: Dataset, pretrained: Pretrained, mode: str, mechanism: str, deviation: float
) -> None:
    """Full embeddings, most rows untouched: what a round adds beside clipped updates is noise."""
    changes = {"embedding.name": "full", "privacy.mode": mode, "privacy.mechanism": mechanism}
    noisy = Simulator(config(**changes), dataset, pretrained=pretrained)
    quiet = Simulator(config(**changes, **{"privacy.noise_multiplier": 0.0}), dataset, pretrained=pretrained)
    differences = []
    for simulator in (noisy, quiet):
        before = simulator.model.item_embedding.weight.detach().clone()
        simulator.round()
        differences.append(simulator.model.item_embedding.weight.detach() - before)
    noise = (differences[0] - differences[1]).double().flatten().numpy() * 9 / (0.5 * 0.05)
    assert bool((noise != 0.0).all())
    assert len(noise) == 60 * DIM  # standard error of the deviation: 3% (Gaussian), 5% (Laplace)
    assert np.std(noise) == pytest.approx(deviation, rel=0.15)
    assert abs(np.mean(noise)) < 4 * deviation / np.sqrt(len(noise))


@pytest.mark.parametrize("freeze_full", [True, False])
def test_everything_that_is_sent_is_clipped_and_noised(
    dataset: Dataset, pretrained: Pretrained, freeze_full: bool
) -> None:
    changes = {"embedding.name": "p-lora", "embedding.freeze_full": freeze_full, "privacy.clip": 0.1}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    sent = message(simulator.model)
    before = {name: value.clone() for name, value in sent.items()}
    simulator.round()
    assert all(bool((value != before[name]).all()) for name, value in sent.items())


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_noise_of_the_most_extreme_draws_is_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def extreme(*place: Any) -> np.ndarray:
        return np.full((place[3].size, 4), word, dtype=np.uint32)

    monkeypatch.setattr(philox, "words", extreme)
    for draw in (gaussian_sum, laplace_sum):
        assert bool(np.isfinite(draw(4, 1, seed=1, round=1, index=0)).all())


# ---- engines, chunks


@pytest.mark.parametrize("mode", ["cdp", "ldp"])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("strategy", ["full", "p-rq+lora"])
def test_engines_agree(
    dataset: Dataset, pretrained: Pretrained, mode: str, mechanism: str, strategy: str
) -> None:
    changes = {
        "dtype": "float64",
        "embedding.name": strategy,
        "privacy.mode": mode,
        "privacy.mechanism": mechanism,
        "training.client_sampling": "poisson",
    }
    theirs = trained(dataset, pretrained, **changes, engine="sequential")
    for engine in ("fused", "batched"):
        for name, value in trained(dataset, pretrained, **changes, engine=engine).items():
            torch.testing.assert_close(value, theirs[name], rtol=0.0, atol=1e-9)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("engine", ["fused", "batched"])
@pytest.mark.parametrize(("mode", "mechanism"), [("cdp", "gaussian"), ("ldp", "laplace")])
@pytest.mark.parametrize("strategy", ["full", "p-hash+senet"])
def test_same_bits_for_any_chunks_and_threads(
    dataset: Dataset, pretrained: Pretrained, strategy: str, mode: str, mechanism: str, engine: str
) -> None:
    changes = {"embedding.name": strategy, "privacy.mode": mode, "privacy.mechanism": mechanism}
    results = [
        trained(dataset, pretrained, **changes, engine=engine, chunk_memory_mb=memory, threads=count)
        for memory, count in ((1e6, 1), (1e6, 3), (0.05, 2), (1e-6, 3))
    ]
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_warm_up_is_private_too(dataset: Dataset, pretrained: Pretrained) -> None:
    changes = {"training.warmup_rounds": 1, "privacy.noise_multiplier": 50.0}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    simulator.round()
    moved = (simulator.model.item_embedding.base - pretrained.full).std()
    assert float(moved) == pytest.approx(50.0 * 0.05 / 9, rel=0.15)
    assert simulator.privacy is not None
    assert simulator.privacy.releases == 1


# ---- accounting


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of one Gaussian release of sensitivity 1 (Balle and Wang, ICML 2018, theorem 8)."""

    def excess(eps: float) -> float:
        a, b = 0.5 / sigma - eps * sigma, -0.5 / sigma - eps * sigma
        return float(stats.norm.cdf(a) - np.exp(eps) * stats.norm.cdf(b) - delta)

    return float(brentq(excess, 0.0, 500.0))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("multiplier", "releases"), [(2.0, 1), (20.0, 100)])
def test_epsilon_without_sampling_is_the_analytic_one(
    multiplier: float, releases: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n Gaussian releases are one with the deviation divided by sqrt(n); who is known to take part changes an
    upload by 2 clip.
    """
    if old:  # accountants before 0.6, which pfl-research asks for
        monkeypatch.delattr(dp_accounting, "gaussian_mechanism", raising=False)
    expected = gaussian_epsilon(multiplier / np.sqrt(releases) / 2.0, 1e-5)
    assert epsilon("gaussian", multiplier, releases, 1e-5, None) == pytest.approx(expected, rel=1e-3)
    expected = gaussian_epsilon(multiplier / np.sqrt(releases), 1e-5)
    mine = epsilon("gaussian", multiplier, releases, 1e-5, 1.0)
    assert mine == pytest.approx(expected, rel=1e-3)
    # The numerical composition of almost certain sampling comes to the same.
    mine = epsilon("gaussian", multiplier, releases, 1e-5, 1.0 - 1e-9)
    assert mine == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("multiplier", "share", "releases"), [(1.0, 0.1, 120), (2.0, 0.05, 300)])
def test_epsilon_with_sampling_agrees_with_another_library(
    multiplier: float, share: float, releases: int
) -> None:
    """Against Microsoft's prv-accountant (Gopi, Lee, Wutschitz, NeurIPS 2021), which bounds its own error."""
    prv = pytest.importorskip("prv_accountant", reason="the second accountant is not installed")
    other = prv.PRVAccountant(
        prvs=prv.PoissonSubsampledGaussianMechanism(share, multiplier),
        max_self_compositions=releases,
        eps_error=0.05,
        delta_error=1e-9,
    )
    low, _, high = other.compute_epsilon(1e-5, releases)
    assert low <= epsilon("gaussian", multiplier, releases, 1e-5, share) <= high


def test_published_epsilon() -> None:
    """Abadi et al. ("Deep Learning with Differential Privacy", CCS 2016, section 3.2): with q = 0.01,
    sigma = 4 and 10,000 steps the moments accountant shows epsilon 1.26 at delta 1e-5; the tight value is a
    bit below.
    """
    assert 0.9 < epsilon("gaussian", 4.0, 10_000, 1e-5, 0.01) < 1.26


def test_epsilon_of_noise_of_several_kinds() -> None:
    delta = 1e-5
    assert composed_epsilon({}, delta) == 0.0
    assert composed_epsilon({("laplace", 4.0): 0}, delta) == 0.0
    for kind in (("gaussian", 4.0), ("laplace", 4.0)):
        assert composed_epsilon({kind: 7}, delta) == epsilon(*kind, 7, delta, None)
        assert composed_epsilon({kind: 7, ("gaussian", 0.0): 1}, delta) == math.inf
    # Four uploads with twice the noise tell as much as one; an accountant that composes agrees.
    gaussian = composed_epsilon({("gaussian", 4.0): 2, ("gaussian", 8.0): 4}, delta)
    assert gaussian == pytest.approx(epsilon("gaussian", 4.0, 3, delta, None))
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.GaussianDpEvent(2.0), 2)
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 4)
    assert gaussian == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)
    # Where Laplace noise comes in it is an upper bound.
    mixed = composed_epsilon({("gaussian", 4.0): 2, ("gaussian", 8.0): 4, ("laplace", 10.0): 5}, delta)
    assert mixed == pytest.approx(gaussian + 5 * 2 / 10)
    accountant.compose(dp_accounting.LaplaceDpEvent(5.0), 5)
    assert mixed > accountant.get_epsilon(delta) > gaussian


def test_laplace_epsilon() -> None:
    assert epsilon("laplace", 4.0, 10, 0.0, None) == pytest.approx(10 * 2 / 4.0)
    assert epsilon("laplace", 4.0, 10, 0.0, 1.0) == pytest.approx(10 / 4.0)
    assert epsilon("laplace", 4.0, 10, 0.0, 0.1) == pytest.approx(10 * np.log1p(0.1 * np.expm1(1 / 4.0)))
    assert epsilon("laplace", 1e-3, 1, 0.0, None) == pytest.approx(2000.0)  # exp(2000) is infinite
    assert epsilon("laplace", 1e-3, 1, 0.0, 0.1) == pytest.approx(1000.0 + np.log(0.1))
    for share in (None, 0.1):
        pure, approximate = (epsilon("laplace", 4.0, 200, d, share) for d in (0.0, 1e-5))
        assert approximate < pure
    # One release: delta(eps) = 1 - exp((eps - 1/b) / 2) in closed form (sensitivity 1, no sampling).
    assert epsilon("laplace", 2.0, 1, 0.1, 1.0) == pytest.approx(0.5 + 2 * np.log(0.9), abs=1e-3)


@pytest.mark.parametrize("share", [None, 0.1])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_epsilon_moves_the_right_way(mechanism: Any, share: float | None) -> None:
    base = epsilon(mechanism, 2.0, 20, 1e-5, share)
    assert epsilon(mechanism, 2.0, 0, 1e-5, share) == 0.0
    assert epsilon(mechanism, 4.0, 20, 1e-5, share) < base
    assert epsilon(mechanism, 2.0, 40, 1e-5, share) > base
    assert epsilon(mechanism, 2.0, 20, 1e-6, share) >= base
    if share is not None:
        assert base < epsilon(mechanism, 2.0, 20, 1e-5, 0.2) < epsilon(mechanism, 2.0, 20, 1e-5, None)


def test_a_delta_of_one_over_the_clients_is_warned_of() -> None:
    settings = PrivacyConfig(mode="cdp", clip=1.0, noise_multiplier=1.0, delta=0.1)
    with pytest.warns(UserWarning, match=r"privacy.delta: expected it well below 1 / 10, .* got 0.1"):
        Ledger(settings, "poisson", 10, 1.0, 10)


def test_the_ledger_follows_a_population_that_changes() -> None:
    """The largest share of clients that a round took, and users that nobody knew of at first."""
    settings = PrivacyConfig(mode="cdp", clip=1.0, noise_multiplier=1.0)
    ledger = Ledger(settings, "poisson", 100, 10.0, 0)
    for share in (0.1, 0.2, 0.05):
        ledger.add_round(np.array([3, 7]), share)
    ledger.add_round(np.array([], dtype=np.int64))
    assert ledger.participations.tolist() == [0, 0, 0, 3, 0, 0, 0, 3]
    assert ledger.report().epsilon == epsilon("gaussian", 1.0, 4, 1e-5, 0.2)
    other = Ledger(settings, "poisson", 100, 10.0, len(ledger.participations))
    other.load_state_dict(ledger.state_dict())
    assert other.report() == ledger.report()


@pytest.mark.parametrize(("multiplier", "releases", "share"), [(20.0, 1000, 0.01), (1.0, 60, 0.1)])
def test_steps_of_composition_are_fine_enough(multiplier: float, releases: int, share: float) -> None:
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    event = dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(multiplier))
    expected = accountant.compose(event, releases).get_epsilon(1e-5)
    assert epsilon("gaussian", multiplier, releases, 1e-5, share) == pytest.approx(expected, 1e-5)


@pytest.mark.parametrize(("mode", "sampling"), [("ldp", "fixed"), ("ldp", "poisson"), ("cdp", "fixed")])
def test_where_it_is_known_who_takes_part_the_busiest_client_counts(
    mode: str, sampling: str, dataset: Dataset, pretrained: Pretrained
) -> None:
    changes = {"privacy.mode": mode, "training.client_sampling": sampling, "training.rounds": 6}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained)
    chosen = np.zeros(dataset.num_users, dtype=int)
    for _ in range(6):
        before = simulator.store.state["user"].clone()
        simulator.round()
        chosen += (simulator.store.state["user"] != before).any(1).numpy()
    report = simulator.privacy
    assert report is not None
    assert report.releases == chosen.max() < 6
    assert report.neighbours == "one client's data replaced"
    assert report.epsilon == epsilon("gaussian", 0.5, int(chosen.max()), 1e-5, None)


def test_independent_sampling() -> None:
    eligible = np.arange(100, 300)
    rounds = [sample_clients_independently(eligible, 0.3, 3, r) for r in range(1, 301)]
    sizes = np.array([len(chosen) for chosen in rounds])
    # Binomial(200, 0.3): mean 60, deviation 6.5, neither of which a fixed sample has.
    assert sizes.mean() == pytest.approx(60, abs=1.5)
    assert sizes.std() == pytest.approx(6.5, abs=1.0)
    counts = np.bincount(np.concatenate(rounds) - 100, minlength=200)
    assert stats.chisquare(counts).pvalue > 1e-3


# ---- settings and reports


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"privacy.mode": "none"},
            r"privacy\.mode: expected cdp or ldp where clip and noise_multiplier is set",
        ),
        ({"privacy.scale": 1.0}, r"privacy\.noise_multiplier: expected it or scale .* got both"),
        ({"privacy.noise_multiplier": None}, r"privacy\.noise_multiplier: .* got neither"),
        ({"privacy.clip": None}, r"privacy\.clip: expected a bound"),
        ({"privacy.clip": 0.0}, r"privacy\.clip"),
        ({"privacy.delta": 1.0}, r"privacy\.delta"),
        ({"training.weighting": "samples"}, r"training\.weighting: expected 'uniform' with privacy"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy.noise_multiplier": 0.0}, "the noise is zero"),
        ({"privacy.clip": None, "privacy.noise_multiplier": None, "privacy.scale": 1.0}, "not clipped"),
        ({"privacy.delta": 0.0}, "Gaussian noise gives none at delta 0"),
        ({"privacy.noise_multiplier": 0.01, "privacy.mechanism": "laplace"}, None),
    ],
)
def test_no_guarantee_is_never_a_number(
    dataset: Dataset, pretrained: Pretrained, tmp_path: Path, changes: dict[str, Any], reason: str | None
) -> None:
    out = tmp_path / "run"
    Simulator(config(**changes), dataset, pretrained=pretrained, out=out).run()
    privacy = json.loads((out / "summary.json").read_text())["privacy"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if reason is None:
        assert privacy["epsilon"] == lines[-1]["epsilon"] > 100
        assert lines[0]["epsilon"] == 0.0
    else:
        assert privacy["guarantee"].startswith("no guarantee: ")
        assert reason in privacy["guarantee"]
        assert not {"epsilon", "delta"} & privacy.keys()
        assert {line["epsilon"] for line in lines} == {"no guarantee"}


def test_a_run_reports_its_guarantee(dataset: Dataset, pretrained: Pretrained, tmp_path: Path) -> None:
    changes = {"training.client_sampling": "poisson", "privacy.noise_multiplier": 2.0}
    simulator = Simulator(config(**changes), dataset, pretrained=pretrained, out=tmp_path / "run")
    summary = simulator.run()
    privacy = summary.privacy
    assert privacy is not None
    assert privacy["epsilon"] == epsilon("gaussian", 2.0, 3, 1e-5, 9 / 23)
    assert (privacy["delta"], privacy["releases"]) == (1e-5, 3)
    assert privacy["neighbours"] == "one client added or removed"
    assert "privacy" in json.loads((tmp_path / "run" / "summary.json").read_text())
    off = Simulator(
        config(**{"privacy.mode": "none", "privacy.clip": None, "privacy.noise_multiplier": None}),
        dataset,
        pretrained=pretrained,
    )
    assert off.run().privacy is None


# ---- the server


@pytest.mark.parametrize("optimizer", ["avg", "adam"])
@pytest.mark.parametrize("strategy", ["full", "p-rq+lora"])
def test_a_server_that_is_given_weighted_sums_alone_comes_to_the_same_bits(
    dataset: Dataset,
    pretrained: Pretrained,
    strategy: str,
    optimizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What secure aggregation would hand over, the sums and the weight, makes the same model."""
    settings = config(
        **{
            "embedding.name": strategy,
            "training.server_optimizer": optimizer,
            "training.weighting": "samples",
            "engine": "batched",  # not a round in one call
            "privacy.mode": "none",
            "privacy.clip": None,
            "privacy.noise_multiplier": None,
        }
    )
    handed_over: list[tuple[dict[str, Tensor], float]] = []
    real = Server.step

    def step(self: Server, totals: Mapping[str, Tensor], weight: float, round: int, rows: Any = None) -> None:
        handed_over.append(({name: total.clone() for name, total in totals.items()}, weight))
        real(self, totals, weight, round, rows)

    simulator = Simulator(settings, dataset, pretrained=pretrained)
    start = {name: value.clone() for name, value in message(simulator.model).items()}
    monkeypatch.setattr(Server, "step", step)
    for _ in range(3):
        simulator.round()
    monkeypatch.undo()
    assert len(handed_over) == 3

    server = Server(start, optimizer)
    for totals, weight in handed_over:
        server.step(totals, weight, 1)
    for name, value in message(simulator.model).items():
        assert torch.equal(start[name], value), name


def test_stages_need_to_know_the_clients() -> None:
    aggregator = Aggregator({"p": torch.zeros(2)}, frozenset(), stages=[Clipping(1.0, 2)])
    with pytest.raises(ValueError, match=r"clients: expected int64 \[C\]"):
        aggregator.add({"p": torch.ones(1, 2)}, torch.ones(1, dtype=torch.float64))


def test_a_private_round_without_uploads() -> None:
    """cdp adds its noise all the same, for an empty round must look like any other; ldp has none."""
    for mode, moved in (("cdp", True), ("ldp", False)):
        parameter = torch.zeros(5)
        noise = Noise(mode, "gaussian", 1.0, 4.0, seed=0)  # type: ignore[arg-type]
        aggregator = Aggregator({"p": parameter}, frozenset(), noise=noise)
        aggregator.begin(1)
        aggregator.apply()
        assert bool((parameter != 0).all()) == moved
