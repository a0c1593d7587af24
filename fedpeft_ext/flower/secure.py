"""Secure aggregation: the server gets the sum of the nodes' vectors and no single one.

The protocol of Bonawitz et al. ("Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, figure 4, for a server that follows it but is curious), in which a node deals with some neighbours
(Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020) instead of all.
A round has four exchanges, for which a node calls, in this order,

    offer     two fresh public keys
    share     secrets, cut so that `threshold` neighbours can restore them, sealed for each neighbour
    mask      its vector, plus a mask of its own and one for each neighbour, which cancel in the sum
    reveal    a share of each neighbour's secret: the own mask's seed of one in the sum, else its masks' key

and the server `masked_sum`. Vectors are fixed-point numbers modulo 2^bits.

Key agreement (ECDH on P-384, HKDF), sealing (Fernet) and sharing (Shamir) are Flower's. Masks are AES-256 in
counter mode instead of Flower's `pseudo_rand_gen`, which makes them from 32 bits of the key by a Mersenne
Twister: the lowest bits of any sum of such masks obey one public linear recurrence, and most of an update is
zero, so that whoever sees the masked vector can tell the rest of the lowest bits.
"""

from __future__ import annotations

import base64
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from torch import Tensor

from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import Config, SecureAggregationConfig
from fedpeft_ext.flower.protocol import SECURE, to_tensors
from fedpeft_ext.simulation.communication import message as averaged
from fedpeft_ext.simulation.state import prefixed

log = logging.getLogger("fedpeft_ext.flower")

OFFER, SHARE, REVEAL = (f"{MessageType.QUERY}.{step}" for step in ("offer", "share", "reveal"))
"""Kinds of messages; vectors come with `train`."""

Vector = np.ndarray[Any, np.dtype[Any]]
"""Unsigned integers of `bits` bits, [n]."""

Ask = Callable[[str, Mapping[int, RecordDict]], dict[int, RecordDict]]
"""Sends messages of a kind to nodes, and returns the answers of those that gave one."""


# ---- vectors


class FixedPoint:
    """Real numbers as integers modulo 2^bits.

    Args:
        bits: 32 or 64.
        shapes: {name: shape} of the tensors in a vector, in its order.
        steps: {name: what the values of a tensor are multiples of}. A sum over nodes has to stay below
            2^(bits - 1) steps in magnitude.

    Attributes:
        dtype, size: of a vector.
    """

    def __init__(self, bits: int, shapes: Mapping[str, torch.Size], steps: Mapping[str, float]) -> None:
        self._shapes, self._steps = dict(shapes), dict(steps)
        self._most = 2.0 ** (bits - 1)
        self.dtype = np.dtype(f"<u{bits // 8}")
        self.size = sum(shape.numel() for shape in self._shapes.values())

    def encode(self, tensors: Mapping[str, Tensor], nodes: int) -> Vector:
        """The sum over users of tensors {name: float [C, ...]}, each rounded towards zero to a multiple of
        its step, so that no user's norm grows; zero for a name that is not there.

        Raises:
            ValueError: a value is not finite, or a sum over users could make that of `nodes` nodes
                overflow.
        """
        parts = []
        for name, shape in self._shapes.items():
            values = tensors.get(name, torch.zeros(0, *shape, device="cpu")).to("cpu", torch.float64)
            largest, limit = float(values.abs().sum(0).max()), self._most * self._steps[name] / nodes
            if not largest < limit:  # NaN is not
                raise ValueError(
                    f"{name}: expected magnitudes below {limit:g}, which secure_aggregation.max_sum or bits "
                    f"leave to each of {nodes} nodes, got {largest:g}"
                )
            parts.append((values / self._steps[name]).trunc().to(torch.int64).sum(0).flatten())
        vector: Vector = torch.cat(parts).numpy().astype(self.dtype)  # modulo 2^bits
        return vector

    def decode(self, vector: Vector) -> dict[str, Tensor]:
        """Tensors {name: float64, its shape} of a sum of vectors."""
        signed = vector.view(vector.dtype.str.replace("u", "i")).astype(np.float64)
        parts = torch.split(torch.from_numpy(signed), [shape.numel() for shape in self._shapes.values()])
        return {
            name: self._steps[name] * part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


def vector_format(config: Config, model: Backbone) -> FixedPoint:
    """Of what a node sends in a round: sums over its users of weighted updates, of the state whose mean
    newcomers start from, of (weight, 1), which are whole numbers, and of the loss.
    """
    starts = model.averaged_start if config.privacy.mode == "none" else ()
    parameters = dict(model.named_parameters())
    shapes = prefixed("updates", {name: value.shape for name, value in averaged(model).items()})
    shapes |= prefixed("starts", {name: parameters[name].shape for name in starts})
    bits = config.secure_aggregation.bits
    steps = dict.fromkeys(shapes, config.secure_aggregation.max_sum / 2.0 ** (bits - 1))
    return FixedPoint(
        bits,
        {**shapes, "counts": torch.Size([2]), "loss": torch.Size([1])},
        {**steps, "counts": 1.0, "loss": 2.0 ** -(bits // 2)},
    )


def expand(key: bytes, like: Vector) -> Vector:
    """A mask of a 32-byte key that is used for nothing else: AES-256 in counter mode."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(like.nbytes))
    return np.frombuffer(stream, dtype=like.dtype)


def pairwise_mask(private: bytes, public: bytes, own: int, other: int, like: Vector) -> Vector:
    """What node `own` adds for its neighbour `other`, which adds the negative."""
    mask = expand(base64.urlsafe_b64decode(_agree(private, public)), like)
    return mask if own > other else np.negative(mask)


def shares_needed(holders: int, settings: SecureAggregationConfig) -> int:
    """Of `holders` shares of a secret, those that restore it: more than half, so that no two separate groups
    of holders can be told different things and each restore one of a node's two secrets.
    """
    return max(2, math.ceil(settings.threshold * holders))


def _agree(private: bytes, public: bytes) -> bytes:
    key: bytes = generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))
    return key


# ---- a node


class Member:
    """A node in a round of secure aggregation.

    Secrets are in `state` between two calls. Each is used in one step and then gone, so that a step can be
    asked for once a round.

    Args:
        state: the node's `Context.state`.
        node: its id.
        settings: of the run.
        least: nodes, itself included, that the node wants to be hidden among, whatever the settings say.
    """

    def __init__(self, state: RecordDict, node: int, settings: SecureAggregationConfig, least: int) -> None:
        self._state, self._node, self._settings = state, node, settings
        self._least = max(2, least)

    def offer(self) -> ConfigRecord:
        """Begin, and forget what an earlier round left: public keys of masks and of seals."""
        pairs = [generate_key_pairs() for _ in range(2)]
        self._keep("offered", {"private": [private_key_to_bytes(private) for private, _ in pairs]})
        return ConfigRecord({"keys": [public_key_to_bytes(public) for _, public in pairs]})

    def share(self, keys: Mapping[str, Any]) -> ConfigRecord:
        """Sealed shares {neighbour: bytes} of the node's two secrets.

        Args:
            keys: {node: [public keys]} of the neighbours and of the node itself.
        """
        own = self._take("offered")
        seed, nodes = os.urandom(32), sorted(map(int, keys))
        if [*keys.get(str(self._node), [])] != [_public(private) for private in own["private"]]:
            raise ValueError("keys: expected this node's own among them")
        if len({key for both in keys.values() for key in both}) != 2 * len(nodes):
            raise ValueError("keys: expected two of each node, each once")
        self._check_many(nodes, self._least)
        needed = shares_needed(len(nodes), self._settings)
        shares = zip(*(create_shares(s, needed, len(nodes)) for s in (seed, own["private"][0])), strict=True)
        sealed: dict[str, bytes] = {}
        for node, both in zip(nodes, shares, strict=True):
            if node == self._node:
                held = list(both)
                continue
            text = share_keys_plaintext_concat(self._node, node, *both)
            sealed[str(node)] = encrypt(_agree(own["private"][1], keys[str(node)][1]), text)
        public = [key for node in nodes for key in keys[str(node)]]
        self._keep("shared", {**own, "seed": seed, "nodes": nodes, "public": public, "held": held})
        return ConfigRecord(sealed)

    def mask(self, sealed: Mapping[str, Any], vector: Vector) -> Vector:
        """The vector under its masks.

        Args:
            sealed: {neighbour: bytes}, what those that go on sealed for this node.
            vector: what is to be summed.
        """
        own = self._take("shared")
        public = dict(zip(own["nodes"], _pairs(own["public"]), strict=True))
        others = sorted(map(int, sealed))
        self._check_many([*others, self._node], max(self._least, shares_needed(len(public), self._settings)))
        held = {self._node: own["held"]}
        masked = vector + expand(own["seed"], vector)
        for node in others:
            if node not in public or node == self._node:
                raise ValueError(f"sealed: expected shares of neighbours, got one of node {node}")
            text = decrypt(_agree(own["private"][1], public[node][1]), sealed[str(node)])
            source, target, *both = share_keys_plaintext_separate(text)
            if (source, target) != (node, self._node):
                raise ValueError(f"sealed: expected shares of node {node}, got those of node {source}")
            held[node] = both
            masked = masked + pairwise_mask(own["private"][0], public[node][0], self._node, node, vector)
        self._keep(
            "masked",
            {
                "nodes": list(held),
                "held": [share for both in held.values() for share in both],
                "needed": shares_needed(len(public), self._settings),
            },
        )
        return masked

    def reveal(self, alive: list[int], dropped: list[int]) -> ConfigRecord:
        """Shares {node: bytes}: of the seed of those `alive`, whose vectors arrived, and of the key of those
        `dropped`; never both of one.
        """
        own = self._take("masked")
        if sorted([*alive, *dropped]) != sorted(own["nodes"]) or self._node not in alive:
            raise ValueError(
                f"alive, dropped: expected {sorted(own['nodes'])}, each in one of them and node {self._node} "
                f"alive, got {sorted(alive)} and {sorted(dropped)}"
            )
        self._check_many(alive, max(self._least, own["needed"]))
        held = dict(zip(own["nodes"], _pairs(own["held"]), strict=True))
        return ConfigRecord({str(node): held[node][node in dropped] for node in own["nodes"]})

    def _check_many(self, nodes: list[int], least: int) -> None:
        if len(nodes) < least:
            raise ValueError(f"secure aggregation: expected {least} nodes or more, got {len(nodes)}")

    def _keep(self, step: str, values: dict[str, Any]) -> None:
        self._state[SECURE] = ConfigRecord({**values, "step": step})

    def _take(self, step: str) -> dict[str, Any]:
        kept = dict(self._state.config_records.get(SECURE, {}))
        self._state.config_records.pop(SECURE, None)
        if kept.get("step") != step:
            raise RuntimeError(f"secure aggregation: expected a node that has {step}, got {kept.get('step')}")
        return kept


def _pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    """What a state, whose lists are flat, keeps of each node."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _public(private: bytes) -> bytes:
    key: bytes = public_key_to_bytes(bytes_to_private_key(private).public_key())
    return key


# ---- the server


def masked_sum(
    ask: Ask, contents: Mapping[int, RecordDict], fixed: FixedPoint, settings: SecureAggregationConfig
) -> Vector | None:
    """Have nodes do what `train` messages of these contents ask for, and sum their vectors.

    Args:
        ask: the way to the nodes.
        contents: by node.
        fixed: the vectors' format.
        settings: of the run.

    Returns:
        The sum over those that stayed long enough, or None where too few did to know it.

    Raises:
        ValueError: a malformed answer.
    """
    neighbours = neighbourhoods(list(contents), settings.neighbours)

    def near(node: int, among: Mapping[int, Any]) -> list[int]:
        return [other for other in neighbours[node] if other in among]

    def too_few(left: Mapping[int, Any], step: str) -> bool:
        lost = [n for n in left if len(near(n, left)) < shares_needed(len(near(n, offered)), settings)]
        if len(left) >= settings.min_nodes and not lost:
            return False
        log.warning("secure aggregation: round lost, %d of %d nodes have %s", len(left), len(contents), step)
        return True

    answers = ask(OFFER, dict.fromkeys(contents, RecordDict()))
    offered = {node: [*_record(answer, node, ["keys"])["keys"]] for node, answer in answers.items()}
    if too_few(offered, "offered keys"):
        return None
    keys = {
        node: RecordDict({SECURE: ConfigRecord({str(n): offered[n] for n in near(node, offered)})})
        for node in offered
    }
    shared = {
        node: _record(answer, node, [str(n) for n in near(node, offered) if n != node])
        for node, answer in ask(SHARE, keys).items()
    }
    if too_few(shared, "shared secrets"):
        return None
    trained = ask(
        MessageType.TRAIN,
        {
            node: RecordDict(
                {
                    **contents[node],
                    SECURE: ConfigRecord(
                        {str(n): shared[n][str(node)] for n in near(node, shared) if n != node}
                    ),
                }
            )
            for node in shared
        },
    )
    if too_few(trained, "sent a vector"):
        return None
    total = np.zeros(fixed.size, fixed.dtype)
    for node, answer in trained.items():
        total += _vector(answer, fixed, node)
    groups = {
        node: RecordDict(
            {
                SECURE: ConfigRecord(
                    {
                        "alive": near(node, trained),
                        "dropped": [n for n in near(node, shared) if n not in trained],
                    }
                )
            }
        )
        for node in trained
    }
    shares: dict[int, list[bytes]] = {node: [] for node in shared}
    for node, answer in ask(REVEAL, groups).items():
        for owner, share in _record(answer, node, [str(n) for n in near(node, shared)]).items():
            shares[int(owner)].append(share)
    needed = {node: shares_needed(len(near(node, offered)), settings) for node in shared}
    if any(len(shares[node]) < needed[node] for node in shared):
        log.warning("secure aggregation: round lost, too few nodes have revealed shares")
        return None
    for node in shared:
        secret = combine_shares(shares[node][: needed[node]])
        if node in trained:
            total -= expand(secret, total)
            continue
        for other in near(node, trained):  # whose masks for the one that dropped out have nothing to cancel
            total += pairwise_mask(secret, offered[other][0], node, other, total)
    return total


def neighbourhoods(nodes: list[int], neighbours: int) -> dict[int, list[int]]:
    """For each node its neighbours and itself: those next to it on a ring, in an order that is drawn anew."""
    ring = list(nodes)
    secrets.SystemRandom().shuffle(ring)
    count = len(ring)
    half = min((neighbours + 1) // 2, count // 2)
    reach = range(-half, half + 1)
    return {node: sorted({ring[(at + by) % count] for by in reach}) for at, node in enumerate(ring)}


def to_vector_record(vector: Vector) -> ArrayRecord:
    """A masked vector as Flower sends it."""
    return ArrayRecord({"masked": torch.from_numpy(vector.view(vector.dtype.str.replace("u", "i")))})


def _record(answer: RecordDict, node: int, names: list[str]) -> Mapping[str, Any]:
    record: Mapping[str, Any] = answer.config_records.get(SECURE, {})
    if sorted(record) != sorted(names):
        raise ValueError(f"node {node}, {SECURE}: expected {sorted(names)}, got {sorted(record)}")
    return record


def _vector(answer: RecordDict, fixed: FixedPoint, node: int) -> Vector:
    value = to_tensors(answer, SECURE).get("masked", torch.empty(0, device="cpu")).numpy()
    expected = np.dtype(f"i{fixed.dtype.itemsize}")
    if value.shape != (fixed.size,) or value.dtype != expected:
        raise ValueError(
            f"node {node}, masked: expected {expected} {(fixed.size,)}, got {value.dtype} {value.shape}"
        )
    return value.view(fixed.dtype)
