"""Differential privacy of what is sent: clipping, noise, and the (epsilon, delta) that they give.

The unit is a client: all interactions of a user together. Each client's whole upload u (every tensor that is
sent, all item tables included) is scaled to u * min(1, clip / ||u||), with the L2 norm for Gaussian and the
L1 norm for Laplace noise. Then

- `cdp` (McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018): a trusted
  server, or secure aggregation, adds noise of scale s = noise_multiplier * clip once to the sum and divides
  by the number of clients *expected* in a round, which does not depend on data.
- `ldp` (Kasiviswanathan et al., "What Can We Learn Privately?", 2011): each of the n clients adds noise of
  scale s to its own upload. Only the sum of these is ever used, so it is drawn at once from its exact
  distribution: a sum of n independent N(0, s^2) is N(0, n s^2); a sum of n independent Laplace(s) is
  s (G1 - G2) with independent G1, G2 of Gamma(n, 1), since a Laplace variable is the difference of two
  exponential ones (Kotz, Kozubowski, Podgorski, "The Laplace Distribution and Generalizations", 2001,
  sections 2.2.1 and 2.3).

Noise reaches every element of every averaged parameter, rows that no client touched included. It is a
function of (seed, round, parameter, element), so results depend neither on chunks nor on processes. Whoever
knows the seed can subtract it: the stated epsilon is that of a deployment whose noise is secret.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext.config import PrivacyConfig
from fedpeft_ext.ops import philox
from fedpeft_ext.simulation.distributed import Ranks
from fedpeft_ext.simulation.state import State, copy_into
from fedpeft_ext.simulation.uploads import Uploads, UploadStage

Sampling = Literal["fixed", "poisson"]
Mechanism = Literal["gaussian", "laplace"]


class Clipping(UploadStage):
    """The stage that bounds each client's upload.

    The scaling goes into the client's weight, which the sum multiplies in float64. Uploads with NaN or
    infinite values become zero.

    Args:
        bound: largest norm of an upload.
        order: 1 or 2, which norm.
    """

    def __init__(self, bound: float, order: Literal[1, 2]) -> None:
        self._bound = bound
        self._order = order

    def __call__(self, uploads: Uploads) -> Iterable[Uploads]:
        norms = uploads.norms(self._order)
        broken = ~torch.isfinite(norms)
        if bool(broken.any()):
            uploads = uploads.zeroed(broken)
            norms = torch.where(broken, 0.0, norms)
        scale = (self._bound / norms).clamp(max=1.0)  # x / 0 is infinite: an upload of zero stays as it is
        return [uploads.replaced(weights=uploads.weights * scale)]


def make_clipping(config: PrivacyConfig) -> list[UploadStage]:
    """The stage that the settings ask for, if they do."""
    if config.clip is None:
        return []
    return [Clipping(config.clip, 2 if config.mechanism == "gaussian" else 1)]


class Noise:
    """Draws the noise of a round's sum.

    Args:
        mode, mechanism: as in `PrivacyConfig`.
        scale: s, the standard deviation of Gaussian or the parameter b of Laplace noise.
        expected_clients: the divisor of `cdp`; an attribute, for rounds of another size.
        seed: of the noise.
    """

    def __init__(
        self,
        mode: Literal["cdp", "ldp"],
        mechanism: Mechanism,
        scale: float,
        expected_clients: float,
        seed: int,
    ) -> None:
        self._mode = mode
        self._mechanism = mechanism
        self._scale = scale
        self.expected_clients = expected_clients
        self._seed = seed

    def add_(self, totals: Mapping[str, Tensor], uploads: int, round: int) -> float:
        """Add the noise of `uploads` clients to their summed uploads {name: float64}, in place.

        Returns:
            The weight to divide the sums by.
        """
        summands = 1 if self._mode == "cdp" else uploads
        if summands > 0 and self._scale > 0.0:
            draw = gaussian_sum if self._mechanism == "gaussian" else laplace_sum
            for index, total in enumerate(totals.values()):
                noise = self._scale * draw(total.numel(), summands, self._seed, round, index)
                total.add_(torch.from_numpy(noise).view(total.shape).to(total.device))
        return self.expected_clients if self._mode == "cdp" else float(uploads)


def secret_seed() -> int:
    """63 bits from the operating system, as many as a seed has, for draws that nobody else may know."""
    return secrets.randbits(63)


def noisy_upload(update: Mapping[str, Tensor], scale: float, config: PrivacyConfig) -> dict[str, Tensor]:
    """`scale` times a client's own upload, with the noise of `ldp` from a secret seed: in float64, rounded to
    its dtype at the end.
    """
    noise = Noise("ldp", config.mechanism, config.noise_scale, 1.0, secret_seed())
    noisy = {name: scale * value.to(torch.float64) for name, value in update.items()}
    noise.add_(noisy, 1, 0)
    return {name: value.to(update[name].dtype) for name, value in noisy.items()}


def make_noise(config: PrivacyConfig, expected_clients: float, seed: int) -> Noise | None:
    """The noise of a round's sum that the settings ask for, if they do."""
    if config.mode == "none":
        return None
    return Noise(config.mode, config.mechanism, config.noise_scale, expected_clients, seed)


def _uniform_pairs(count: int, seed: int, round: int, index: int) -> philox.Float64:
    """Two independent uniform float64 in (0, 1), of 52 bits, from each of `count` blocks: [count, 2]."""
    block = philox.words(seed, round, index, np.arange(count), philox.Purpose.NOISE)
    words = np.stack([philox.low64(block), philox.low64(block[:, 2:])], axis=1)
    # With a bit more the largest would round to 1, at which Laplace noise is infinite.
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gaussian_sum(count: int, summands: int, seed: int, round: int, index: int) -> philox.Float64:
    """`count` draws of a sum of `summands` standard normals (Box and Muller, 1958): float64 [count]."""
    uniform = _uniform_pairs(-(-count // 2), seed, round, index)
    radius = np.sqrt(-2.0 * summands * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    result: philox.Float64 = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return result[:count]


def laplace_sum(count: int, summands: int, seed: int, round: int, index: int) -> philox.Float64:
    """`count` draws of a sum of `summands` standard Laplace variables: float64 [count].

    The difference of two Gamma(summands, 1) variables, each by inversion of its distribution function.
    """
    from scipy.special import gammaincinv

    gammas = gammaincinv(float(summands), _uniform_pairs(count, seed, round, index))
    result: philox.Float64 = gammas[:, 0] - gammas[:, 1]
    return result


# ---- accounting
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyReport:
    """What a run's settings guarantee after the rounds so far.

    Attributes:
        mode, mechanism, clip: as in `PrivacyConfig`.
        scale: of the noise, in units of the update.
        releases: noisy results that count: rounds with `cdp` and `poisson`, else rounds of the client that
            took part most often.
        neighbours: what epsilon is about: "one client's data replaced", or "one client added or removed".
        epsilon, delta: the guarantee; None where there is none.
        reasons: why there is none.
    """

    mode: str
    mechanism: str
    clip: float | None
    scale: float
    releases: int
    neighbours: str
    epsilon: float | None
    delta: float | None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One sentence."""
        if self.epsilon is None or self.delta is None:
            return f"no guarantee: {'; '.join(self.reasons)}"
        return (
            f"epsilon {self.epsilon:.4g} at delta {self.delta:g} ({self.mode}, {self.mechanism}, "
            f"{self.neighbours})"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; epsilon and delta appear only where there is a guarantee."""
        result: dict[str, Any] = {
            "mode": self.mode,
            "mechanism": self.mechanism,
            "clip": self.clip,
            "scale": self.scale,
            "releases": self.releases,
            "neighbours": self.neighbours,
            "guarantee": str(self),
        }
        if self.epsilon is not None:
            result |= {"epsilon": self.epsilon, "delta": self.delta}
        return result

    def metric(self) -> float | str:
        """Epsilon for a line of metrics."""
        return "no guarantee" if self.epsilon is None else self.epsilon


class Ledger:
    """Counts what was released and tells its privacy.

    Args:
        config: the settings; `mode` is not `none`.
        sampling: how clients are chosen: a `fixed` number of them, or each on its own (`poisson`).
        population: clients to choose from.
        expected_clients: how many are chosen, on average.
        num_users: all users, for the count of each one's uploads; more where `add_round` has others.

    Attributes:
        rounds: rounds released so far.
        participations: int64 [num_users], rounds that each user was chosen in.

    Raises:
        ImportError: the accountant's library is not installed.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        sampling: Sampling,
        population: int,
        expected_clients: float,
        num_users: int,
    ) -> None:
        self._config = config
        self._sampling: Sampling = sampling
        self._share = expected_clients / population
        self.rounds = 0
        self.participations = np.zeros(num_users, dtype=np.int64)
        check_accountant(config)  # to fail now rather than after the first round
        if not config.why_no_guarantee() and config.delta >= 1.0 / population:
            warnings.warn(
                f"privacy.delta: expected it well below 1 / {population:,}, one over the clients, "
                f"got {config.delta:g}, at which publishing one client's data would count as private",
                stacklevel=2,
            )

    def add_round(self, clients: np.ndarray, share: float = 0.0) -> None:
        """A round with these clients (user ids) was released, chosen from all with probability `share` where
        that is more than before.
        """
        self.rounds += 1
        self._share = max(self._share, share)
        new = int(clients.max(initial=-1)) + 1 - len(self.participations)
        if new > 0:
            self.participations = np.pad(self.participations, (0, new))
        self.participations[clients] += 1

    def state_dict(self, ranks: Ranks | None = None) -> State:
        """See `state.Stateful`."""
        return {
            "rounds": self.rounds,
            "share": self._share,
            "participations": torch.from_numpy(self.participations),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state.Stateful`."""
        copy_into({"participations": torch.from_numpy(self.participations)}, state)
        self.rounds = state["rounds"]
        self._share = max(self._share, state.get("share", 0.0))

    def report(self) -> PrivacyReport:
        """The guarantee for everything released so far."""
        config, reasons = self._config, self._config.why_no_guarantee()
        hidden = config.mode == "cdp" and self._sampling == "poisson"
        releases = self.rounds if hidden else int(self.participations.max(initial=0))
        value = None
        if not reasons:
            multiplier = config.noise_scale / float(config.clip or 0.0)
            share = self._share if hidden else None
            value = epsilon(config.mechanism, multiplier, releases, config.delta, share)
            if not math.isfinite(value):
                reasons = (f"epsilon is infinite at delta {config.delta:g}",)
                value = None
        return PrivacyReport(
            config.mode,
            config.mechanism,
            config.clip,
            config.noise_scale,
            releases,
            "one client added or removed" if hidden else "one client's data replaced",
            value,
            None if value is None else config.delta,
            tuple(reasons),
        )


_COARSE, _FINE, _SMALL_EPSILON = 1e-3, 1e-4, 5.0
"""Steps of privacy loss in which the accountant composes, always to an upper bound. Coarse ones take a tenth
of the time, seconds where noise is small, and above this epsilon change it by less than 1e-5 of its value."""


@lru_cache(maxsize=4096)
def epsilon(
    mechanism: Mechanism,
    multiplier: float,
    releases: int,
    delta: float,
    share: float | None,
) -> float:
    """The smallest epsilon that the accountant can show at `delta`; infinite where it can show none.

    Tight numerical composition (Doroshenko et al., "Connect the Dots", PoPETs 2022). Gaussian noise without
    sampling has a closed form, since n releases are as one with the deviation divided by sqrt(n) (Balle and
    Wang, ICML 2018).

    Clients keep state from round to round, so what they upload may tell who took part before. Chosen
    independently of each other they tell nothing about anybody else; samples of a fixed size are not
    independent, so that no bound for these counts on their being secret.

    Args:
        mechanism: `gaussian` or `laplace`.
        multiplier: scale of the noise / clip.
        releases: how many results.
        delta: 0 <= delta < 1.
        share: probability that a client takes part in a round, independently of all others and unknown
            ("Poisson sampling"): neighbours differ by one client, which changes a sum by at most clip. None:
            it is known who takes part, in each of the `releases`; neighbours differ in one client's data,
            which changes an upload by at most 2 clip.
    """
    if releases == 0:
        return 0.0
    dp = _accounting()
    from dp_accounting.pld import PLDAccountant

    share, ratio = (1.0, multiplier / 2.0) if share is None else (share, multiplier)  # scale / sensitivity
    event = dp.GaussianDpEvent(ratio) if mechanism == "gaussian" else dp.LaplaceDpEvent(ratio)
    value = math.inf
    if mechanism == "laplace":  # pure privacy amplified: log(1 + share (exp(1 / ratio) - 1))
        value = releases * (1.0 / ratio + math.log(share + (1.0 - share) * math.exp(-1.0 / ratio)))
        if delta == 0.0:
            return value
    elif share >= 1.0 and hasattr(dp, "gaussian_mechanism"):  # from 0.6 on; the tight bound below is close
        return float(dp.gaussian_mechanism.get_epsilon_gaussian(ratio / math.sqrt(releases), delta))
    for interval in (_COARSE, _FINE):
        tight = PLDAccountant(value_discretization_interval=interval)
        tight.compose(dp.PoissonSampledDpEvent(share, event) if share < 1.0 else event, releases)
        value = min(value, float(tight.get_epsilon(delta)))
        if value >= _SMALL_EPSILON:
            break
    return value


def composed_epsilon(uploads: Mapping[tuple[Mechanism, float], int], delta: float) -> float:
    """Epsilon at `delta` of what a client sent in rounds with noise of several kinds, whoever knows which.

    Of one kind it is that of `epsilon`. Otherwise all Gaussian noise is as that of one upload with the
    multiplier (sum of 1 / multiplier^2)^(-1/2), and each upload with Laplace noise adds its own epsilon at
    delta 0 (basic composition: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014,
    section 3.5).

    Args:
        uploads: how many, by (mechanism, scale of the noise / clip). A scale of 0 stands for uploads without
            any bound, which make it infinite.
        delta: 0 <= delta < 1.
    """
    kinds = [(kind, count) for kind, count in sorted(uploads.items()) if count]
    if any(multiplier == 0.0 for (_, multiplier), _ in kinds):
        return math.inf
    if len(kinds) == 1:
        ((mechanism, multiplier), count), *_ = kinds
        return epsilon(mechanism, multiplier, count, delta, None)
    precision = sum(count / multiplier**2 for (name, multiplier), count in kinds if name == "gaussian")
    value = epsilon("gaussian", precision**-0.5, 1, delta, None) if precision else 0.0
    for (name, multiplier), count in kinds:
        if name == "laplace":
            value += epsilon("laplace", multiplier, count, 0.0, None)
    return value


def check_accountant(config: PrivacyConfig) -> None:
    """Raise ImportError where the accountant is needed and not installed."""
    if not config.why_no_guarantee():
        _accounting()


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(
            "privacy: expected the accountant library dp-accounting: pip install 'fedpeft_ext[privacy]'"
        ) from error
    return dp_accounting
