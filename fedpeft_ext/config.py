"""Settings of an experiment: typed, validated, frozen, read from YAML and overridden by
``section.key=value``.

Every section is a pydantic model that refuses unknown keys. Whatever is wrong is reported as a `ConfigError`
naming the dotted path of each setting, what was expected and what came, and for an unknown key the nearest
valid name.
"""

from __future__ import annotations

import difflib
import inspect
import reprlib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedpeft_ext.presets import FOLDER, preset_names

ScheduleName = Literal["constant", "linear", "cosine"]

# A count is not a yes: without this pydantic would read `rounds: true` as 1.
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_MAX_VALUES, _SHOWN = 10_000, 500
"""Values that a file of settings may hold, and characters of a parser's message that are shown."""


class ConfigError(ValueError):
    """A setting that is unknown or does not make sense; the message names each by its dotted path."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key, value in values.items():
                field = cls.model_fields.get(key) if isinstance(key, str) else None
                if isinstance(value, bool) and field is not None and not _accepts_bool(field.annotation):
                    raise ValueError(f"{key}: expected a number or a name, got {value!r}")
        return values


def _accepts_bool(annotation: Any) -> bool:
    if annotation in (bool, Any):
        return True
    return any(_accepts_bool(argument) for argument in typing.get_args(annotation))


def _check_own_options(section: BackboneConfig | EmbeddingConfig, declared: Iterable[str]) -> None:
    """Raise ValueError for one of `options` that is a setting of the section, or that nothing declares."""
    valid = sorted(set(declared) - type(section).model_fields.keys())
    for name in section.options:
        if name in type(section).model_fields:
            raise ValueError(f"options: expected none of the settings beside it, got {name!r}")
        if name not in valid:
            known = f"one of {', '.join(valid)}" if valid else f"none, since {section.name} has none"
            raise ValueError(f"options: expected {known}, got {name!r}")


class DatasetConfig(_Section):
    """Which interactions to load: `fedpeft_ext.data.load_dataset(name, **options)`."""

    name: str = "ml-100k"
    options: dict[str, Any] = Field(default_factory=dict)


class BackboneConfig(_Section):
    """The recommendation model that every client holds."""

    name: str = "fedmf"
    dim: _Count = Field(default=32, description="width D of item and user vectors")
    init_std: _Positive = Field(default=0.1, description="standard deviation of a new client's user vector")
    hidden: Annotated[tuple[_Count, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="FedNCF, PFedRec: widths of the MLP's hidden layers (None: 64, 128, 64 and 64, 32)",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="FedNCF, PFedRec: of hidden units (None: 0.5 and 0)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="of a registered backbone: its other options, by name"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from fedpeft_ext.backbones import backbone_class

        backbone_class(name)
        return name

    @model_validator(mode="after")
    def _options_of_the_backbone(self) -> BackboneConfig:
        from fedpeft_ext.backbones import backbone_class

        for option in ("hidden", "dropout"):
            if getattr(self, option) is not None and option not in backbone_class(self.name).options:
                raise ValueError(f"{option}: expected none, since {self.name} does not have it")
        _check_own_options(self, backbone_class(self.name).options)
        return self


class EmbeddingConfig(_Section):
    """The item embedding: `full`, `c-X` (compressed alone), `p-X` (frozen full + compressed), X joined by
    '+'.
    """

    name: str = "p-rq"
    rank: _Count = Field(default=4, description="LoRA: rank r")
    levels: _Count = Field(default=3, description="RQ: codebooks L")
    codebook_size: _Count = Field(default=128, description="RQ: rows K of a codebook")
    table_size: _Count = Field(default=512, description="hash: rows M of the shared table")
    num_hashes: _Count = Field(default=2, description="hash: rows H that an item reads")
    senet_hidden: _Count | None = Field(
        default=None, description="SENet: hidden width (None: 16 x num_hashes)"
    )
    reduce: Literal["mean", "sum"] = Field(
        default="mean", description="hash: how the rows of an item combine"
    )
    init_std: _Positive = Field(default=0.1, description="standard deviation of new compressed parameters")
    freeze_full: bool = Field(
        default=True, description="p-X: false trains and sends the full embedding as well"
    )
    warm_start_codebooks: bool = Field(default=False, description="RQ: start from the pre-trained codebooks")
    options: dict[str, Any] = Field(
        default_factory=dict, description="of registered strategies: their other options, by name"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from fedpeft_ext.nn import parse_spec

        return str(parse_spec(name))

    @model_validator(mode="after")
    def _options_of_strategies(self) -> EmbeddingConfig:
        from fedpeft_ext.nn.spec import registered_options

        _check_own_options(self, registered_options())
        return self


class PretrainConfig(_Section):
    """Server-side preparation of the full embeddings (AutoEncoder) and the semantic codes (RQ-VAE)."""

    features: str = Field(
        default="tfidf",
        description="tfidf or sentence-transformers (item text), a .npy or .safetensors file, or random",
    )
    feature_dim: _Count = Field(default=256, description="TF-IDF: features to keep")
    text_model: str = Field(
        default="sentence-transformers/sentence-t5-base",
        description="sentence-transformers: name or folder of the model",
    )
    epochs: _Count = Field(default=100, description="AutoEncoder: passes over the items at most")
    lr: _Positive = Field(default=1e-3, description="AutoEncoder: learning rate")
    codes: Literal["rq-vae", "rq-kmeans"] = Field(
        default="rq-vae",
        description="RQ: how codes are made (rq-kmeans: of the full embeddings, by residual k-means)",
    )
    code_epochs: _Count = Field(default=60, description="RQ-VAE: passes over the items")
    code_lr: _Positive = Field(default=3e-3, description="RQ-VAE: learning rate")
    batch_size: Annotated[int, Field(ge=2)] = 512
    scale: _Positive | None = Field(
        default=0.1,
        description="standard deviation that the full embeddings are scaled to (None: as trained)",
    )
    cache: bool = Field(default=True, description="keep results on disk and reuse them")
    cache_dir: str | None = Field(default=None, description="where (None: the user's cache folder)")


class TrainingConfig(_Section):
    """Federated training. `lr=None` is the backbone's own default (FedMF 1e-2, the others 1e-3)."""

    rounds: Annotated[int, Field(ge=0)] = 100
    clients_per_round: int | float = Field(
        default=0.1, description="a share of all clients (float) or a count (int)"
    )
    client_sampling: Literal["fixed", "poisson"] = Field(
        default="fixed",
        description="a round takes this many clients, or each client on its own with this probability",
    )
    local_epochs: _Count = 2
    batch_size: _Count | None = Field(default=None, description="positives per local step (None: full batch)")
    loss: Literal["bpr", "bce"] = "bpr"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: _Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="of local SGD, from zero in every round"
    )
    l2: _NonNegative = 1e-8
    algorithm: Literal["fedavg", "scaffold"] = Field(
        default="fedavg",
        description="plain local training (with prox_mu: FedProx), or SGD corrected by control variates",
    )
    prox_mu: _NonNegative = Field(
        default=0.0, description="FedProx: weight mu of the squared distance to the global parameters"
    )
    warmup_rounds: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="first rounds, which train the full embedding; p-X then freezes it as the base, full "
        "goes on; c-X has none and no warm-up",
    )
    warmup_optimizer: Literal["adam", "sgd"] | None = Field(
        default=None, description="of warm-up rounds (None: as optimizer)"
    )
    warmup_lr: _Positive | None = Field(default=None, description="of warm-up rounds (None: as lr)")
    warmup_server_lr: _Positive | None = Field(
        default=None, description="of warm-up rounds (None: as server_lr)"
    )
    warmup_server_optimizer: Literal["avg", "adam"] | None = Field(
        default=None,
        description="of warm-up rounds (None: as server_optimizer); where it is another one and has no "
        "warmup_server_lr, its rate is that of server_lr's None",
    )
    weighting: Literal["samples", "uniform"] = Field(
        default="samples", description="weight of a client's update"
    )
    server_optimizer: Literal["avg", "adam"] = "avg"
    server_lr: _Positive | None = Field(default=None, description="None: 1 for avg, 0.01 for adam")
    schedule: ScheduleName = Field(
        default="constant",
        description="how lr falls over the rounds after warm-up: not, along a line, or along half a cosine",
    )
    server_schedule: ScheduleName = Field(default="constant", description="the same of server_lr")
    schedule_end: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.01, description="share of the rate that a schedule leaves in the last round"
    )

    @field_validator("clients_per_round")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        if isinstance(value, int):
            if value < 1:
                raise ValueError(f"expected a count of at least 1 or a share in (0, 1], got {value}")
        elif not 0.0 < value <= 1.0:
            raise ValueError(f"expected a share in (0, 1] or a count (an integer), got {value}")
        return value

    @model_validator(mode="after")
    def _local_training_agrees(self) -> TrainingConfig:
        optimizers = {"optimizer": self.optimizer, "warmup_optimizer": self.warmup_optimizer}
        if self.momentum > 0.0 and "sgd" not in optimizers.values():
            raise ValueError(f"momentum: expected 0 without optimizer sgd, got {self.momentum}")
        if self.algorithm == "scaffold":
            for name, optimizer in optimizers.items():
                if optimizer == "adam":
                    raise ValueError(
                        f"{name}: expected 'sgd' with algorithm scaffold, whose control variates are mean "
                        f"gradients of its steps, got {optimizer!r}"
                    )
            for name in ("momentum", "prox_mu"):
                if getattr(self, name) > 0.0:
                    raise ValueError(f"{name}: expected 0 with algorithm scaffold, got {getattr(self, name)}")
        return self

    @model_validator(mode="after")
    def _warmup_within_rounds(self) -> TrainingConfig:
        if self.warmup_rounds > self.rounds:
            raise ValueError(
                f"warmup_rounds: expected at most rounds ({self.rounds}), since it counts the first of them, "
                f"got {self.warmup_rounds}"
            )
        return self


class PrivacyConfig(_Section):
    """Differential privacy of uploads (`simulation.privacy`). The noise is `noise_multiplier` x `clip`, or
    `scale`.
    """

    mode: Literal["none", "cdp", "ldp"] = Field(
        default="none", description="noise once on the sum (cdp), or on each client's upload (ldp)"
    )
    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    clip: _Positive | None = Field(
        default=None,
        description="largest norm of a client's upload, L2 for gaussian, L1 for laplace (None: no clipping)",
    )
    noise_multiplier: _NonNegative | None = Field(
        default=None,
        description="standard deviation (gaussian) or b (laplace) of the noise, in clips",
    )
    scale: _NonNegative | None = Field(default=None, description="the same in units of the update")
    delta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=1e-5, description="at which epsilon is told; well below 1 / clients"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PrivacyConfig:
        given = [name for name in ("clip", "noise_multiplier", "scale") if getattr(self, name) is not None]
        if self.mode == "none":
            if given:
                raise ValueError(f"mode: expected cdp or ldp where {' and '.join(given)} is set, got 'none'")
        elif (self.noise_multiplier is None) == (self.scale is None):
            raise ValueError(
                f"noise_multiplier: expected it or scale with mode {self.mode}, got "
                f"{'neither' if self.scale is None else 'both'}"
            )
        elif self.noise_multiplier is not None and self.clip is None:
            raise ValueError("clip: expected a bound, of which noise_multiplier is a multiple, got None")
        return self

    @property
    def noise_scale(self) -> float:
        """Standard deviation (Gaussian) or b (Laplace) of the noise, in units of the update; 0 without."""
        if self.scale is not None:
            return self.scale
        return (self.noise_multiplier or 0.0) * (self.clip or 0.0)

    def why_no_guarantee(self) -> tuple[str, ...]:
        """What keeps these settings from giving an (epsilon, delta); empty where nothing does."""
        if self.mode == "none":
            return ("no noise is added",)
        reasons = []
        if self.clip is None:
            reasons.append("uploads are not clipped, so no noise bounds what one client can change")
        if self.noise_scale == 0.0:
            reasons.append("the noise is zero")
        if self.mechanism == "gaussian" and self.delta == 0.0:
            reasons.append("Gaussian noise gives none at delta 0")
        return tuple(reasons)


class CompressionConfig(_Section):
    """How uploads are encoded (`simulation.compression`)."""

    method: Literal["none", "fp16", "int8", "top-k"] = "none"
    top_k: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.05, description="top-k: share of all elements that is sent"
    )


class SecureAggregationConfig(_Section):
    """Masks under which a Flower server sees sums of nodes' updates and no single one (`flower.secure`)."""

    min_nodes: Annotated[int, Field(ge=0)] = Field(
        default=0, description="nodes that a sum needs, 2 or more; 0: the server sees single updates"
    )
    neighbours: Annotated[int, Field(ge=2)] = Field(
        default=20, description="nodes that a node shares masks, and the secrets behind them, with"
    )
    threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        default=0.6,
        description="share of a node's neighbours, itself included, that must stay until a round's end",
    )
    bits: Literal[32, 64] = Field(default=64, description="of each number that is sent")
    max_sum: _Positive = Field(
        default=2.0**31,
        description="magnitude that no element of the sum of weighted updates reaches; they are rounded to "
        "multiples of 2 max_sum / 2^bits",
    )

    @field_validator("min_nodes")
    @classmethod
    def _a_sum(cls, min_nodes: int) -> int:
        if min_nodes == 1:
            raise ValueError("expected 0, or 2 and more nodes, since a sum of one hides nothing, got 1")
        return min_nodes


class FaultsConfig(_Section):
    """Faulty clients (`simulation.faults`): simulated ones, and what is done about any."""

    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of a round's clients that drop out of it"
    )
    corrupt_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of updates that become NaN, infinite or a million times as large"
    )
    reject: bool = Field(
        default=False,
        description="leave NaN, infinite, exploding and empty updates out, and count them (false: NaN and "
        "infinite ones end the run)",
    )
    max_norm: _Positive | None = Field(
        default=None, description="L2 norm from which on an update is exploding (None: any is fine)"
    )
    min_clients: Annotated[int, Field(ge=0)] = Field(
        default=0, description="accepted updates that a round needs"
    )
    too_few: Literal["skip", "repeat"] = Field(
        default="skip", description="a round with fewer: goes without a step, or again with other clients"
    )
    max_repeats: _Count = Field(default=3, description="repeat: how often, before it is skipped")

    @model_validator(mode="after")
    def _limit_is_used(self) -> FaultsConfig:
        if self.max_norm is not None and not self.reject:
            raise ValueError(f"max_norm: expected None unless reject is true, got {self.max_norm}")
        return self


class EvaluationConfig(_Section):
    """Ranking of each user's test item, among sampled candidates and among the whole catalogue."""

    every: _Count = Field(default=10, description="evaluate after every so many rounds, and after the last")
    num_negatives: _Count = 100
    full_ranking: bool = True
    ks: tuple[_Count, ...] = (5, 10, 20, 50)
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None, description="of the sampled candidates (None: the experiment's seed)"
    )
    select_by: str | None = Field(
        default=None,
        description="metric that chooses the best round, and in studies the best settings: HR@k, NDCG@k or "
        "MRR, with full/ before it among all items (None: HR@10, or HR at the smallest cut-off)",
    )

    @property
    def selection_metric(self) -> str:
        """Name of the metric of `select_by`."""
        return self.select_by or f"HR@{10 if 10 in self.ks else self.ks[0]}"

    @model_validator(mode="after")
    def _evaluated(self) -> EvaluationConfig:
        names = [*(f"{name}@{k}" for name in ("HR", "NDCG") for k in self.ks), "MRR"]
        names += [f"full/{name}" for name in names] if self.full_ranking else []
        if self.selection_metric not in names:
            raise ValueError(f"select_by: expected one of {', '.join(names)}, got {self.select_by!r}")
        return self

    def candidate_seed(self, experiment: int) -> int:
        """Of the sampled candidates, in an experiment of this seed."""
        return experiment if self.seed is None else self.seed

    @field_validator("ks")
    @classmethod
    def _some_and_distinct(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if not ks or len(set(ks)) != len(ks):
            raise ValueError(f"expected at least one cut-off, each once, got {list(ks)}")
        return tuple(sorted(ks))


class CheckpointConfig(_Section):
    """When a run with an output folder saves what `fedpeft resume` goes on from (`simulation.checkpoint`)."""

    every: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="rounds between two (None: as often as takes 1% of the time, 10 s or more apart; "
        "0: none)",
    )
    keep: _Count = Field(default=1, description="newest ones that are kept")


class LogConfig(_Section):
    """What a run with an output folder writes besides metrics.jsonl."""

    csv: bool = Field(default=False, description="metrics.csv, the same as a table")
    tensorboard: bool = Field(
        default=False, description="events for TensorBoard, of every round (needs fedpeft_ext[tensorboard])"
    )


def _require_off(*settings: tuple[str, bool, str], because: str) -> None:
    """Raise for the first (name, whether it is off, how it is when off) that is not off."""
    for name, is_off, expected in settings:
        if not is_off:
            raise ValueError(f"{name}: expected {expected} with {because}")


class Config(_Section):
    """All settings of one experiment. Results are a function of this and of the data set alone."""

    dataset: DatasetConfig = DatasetConfig()
    backbone: BackboneConfig = BackboneConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    pretrain: PretrainConfig = PretrainConfig()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    compression: CompressionConfig = CompressionConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    engine: Literal["auto", "fused", "batched", "sequential"] = Field(
        default="auto",
        description="fused: a client's training in one call (fedmf, fedpergnn; on the CPU every backbone; "
        "those other than fedmf without SENet); batched: any backbone; sequential: plain torch, a client at "
        "a time; auto: fused where it applies, else batched",
    )
    chunk_memory_mb: _Positive = Field(
        default=64.0, description="batched and fused engines: memory of one chunk of clients"
    )
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    threads: _Count | None = Field(default=None, description="CPU threads (None: torch's choice)")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    start_from: str | None = Field(
        default=None, description="folder of a run to go on from, with data that may have grown"
    )

    @field_validator("device")
    @classmethod
    def _a_device(cls, device: str) -> str:
        import torch

        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"expected a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
        return device

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.privacy.mode != "none" and self.training.weighting != "uniform":
            raise ValueError(
                "training.weighting: expected 'uniform' with privacy, since the number of a client's samples "
                f"is private and would scale its influence, got {self.training.weighting!r}"
            )
        if self.privacy.mode == "ldp" and self.compression.method != "none":
            raise ValueError(
                "compression.method: expected 'none' with privacy.mode ldp, whose noise is drawn for the "
                f"sum of uploads, got {self.compression.method!r}"
            )
        plain_uploads = (
            ("compression.method", self.compression.method == "none", "'none'"),
            ("faults.reject", not self.faults.reject, "false"),
        )
        if self.training.algorithm == "scaffold":
            # What no stage between client and server sees: control variates.
            _require_off(
                ("privacy.mode", self.privacy.mode == "none", "'none'"),
                *plain_uploads,
                ("faults.corrupt_rate", self.faults.corrupt_rate == 0.0, "0"),
                because="training.algorithm scaffold, whose control variates are sent beside the updates and "
                "would go past it",
            )
        if self.secure_aggregation.min_nodes > 0:
            # What looks at single updates, or encodes them so that their sum is not that of the codes.
            _require_off(
                ("training.algorithm", self.training.algorithm == "fedavg", "'fedavg'"),
                *plain_uploads,
                because="secure_aggregation, whose server sees nothing but the sum of whole updates",
            )
        if self.privacy.mode != "none" and self.faults.min_clients > 0:
            raise ValueError(
                "faults.min_clients: expected 0 with privacy, since a round that is skipped for its updates "
                f"tells about them, got {self.faults.min_clients}"
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Validate nested dictionaries. Raises `ConfigError`, one line for each wrong setting."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    def updated(self, overrides: Iterable[str]) -> Config:
        """A copy with ``section.key=value`` overrides applied (values are YAML) and validated again."""
        return Config.from_dict(_apply(self.model_dump(), overrides))

    def to_yaml(self) -> str:
        """YAML text that `load_config` reads back into an equal `Config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _settings_file(path: str | Path) -> Path:
    file, names = Path(path), preset_names()
    if file.is_file():
        return file
    if str(path) in names:
        return FOLDER / f"{path}.yaml"
    nearest = difflib.get_close_matches(str(path), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise FileNotFoundError(
        f"config: expected a YAML file or one of {', '.join(names)}, found no file {file}{hint}"
    )


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration: defaults, then the YAML file, then ``section.key=value`` overrides.

    Args:
        path: a YAML file, or the name of settings that come with the package (`presets.preset_names`).
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: not YAML, unknown key (with the nearest valid one), or wrong value (with its dotted
            path).
    """
    values: Any = {}
    if path is not None:
        path = _settings_file(path)
        values = _read_yaml(path)
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected sections such as 'training:', got a {type(values).__name__}")
    return Config.from_dict(_apply(values, overrides))


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's rule, which PyYAML leaves to its users: a second section of a name would silently replace the
    first.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"{key.value!r} is given a second time"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds. It may come from anyone, so no size on disk bounds what it expands to."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"{path} is not YAML: {place}{str(error.problem)[:_SHOWN]}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that there is not
        raise ConfigError(f"{path} is not YAML: {str(error)[:_SHOWN]}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not YAML of settings: it is nested too deeply") from None
    pending, count = [values], 0
    while pending:
        value = pending.pop()
        count += 1
        if count > _MAX_VALUES:  # aliases can name values within values, or a value within itself
            raise ConfigError(f"{path}: expected settings, got more than {_MAX_VALUES} values")
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
    return values


def _apply(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    result = _copied(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override: expected section.key=value, got {override!r}")
        value = parse_value(path.strip(), text)
        node = result
        for depth, key in enumerate(keys[:-1], start=1):
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{override!r}: {'.'.join(keys[:depth])} is a value, not a section")
            node = child
        node[keys[-1]] = value
    return result


def parse_value(name: str, text: str) -> Any:
    """The value of ``name=text``, which is YAML. Raises `ConfigError` naming `name` where it is not."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that there is not
        raise ConfigError(f"{name}: expected a YAML value, got {text[:_SHOWN]!r}") from None


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


# In words of YAML, by pydantic's type of an error.
_EXPECTED = {
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "dict_type": "expected a mapping",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "int_from_float": "expected an integer",
    "int_parsing": "expected an integer",
    "int_type": "expected an integer",
    "model_type": "expected a section of settings",
    "string_type": "expected a string",
    "tuple_type": "expected a list",
}


def _explain(error: ValidationError) -> str:
    lines: dict[str, list[str]] = {}
    for item in error.errors():
        path, section = _settings_path(item["loc"])
        if item["type"] == "extra_forbidden":
            lines.setdefault(path, []).append(_unknown(str(item["loc"][-1]), section))
            continue
        message = item["msg"].removeprefix("Value error, ").replace("Input should be ", "expected ")
        if item["type"] == "value_error":
            name, colon, rest = message.partition(": ")
            if colon and name in section.model_fields:  # raised by the section about one of its fields
                path, message = f"{path}.{name}" if path else name, rest
            elif colon and name in path.split("."):  # by a function that has an argument of this name
                message = rest
        else:
            message = f"{_EXPECTED.get(item['type'], message)}, got {reprlib.repr(item['input'])}"
        lines.setdefault(path, []).append(message)
    return "\n".join(
        f"{path}: {' or '.join(dict.fromkeys(messages))}" if path else "\n".join(messages)
        for path, messages in lines.items()
    )


def _settings_path(location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """Dotted path of a pydantic location without the union labels pydantic adds, and the innermost section on
    it.
    """
    section: type[BaseModel] = Config
    parts: list[str] = []
    for part in location:
        parts.append(str(part))
        field = section.model_fields.get(str(part))
        if field is None:
            break
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
        else:
            break
    return ".".join(parts), section


def _unknown(name: str, section: type[BaseModel]) -> str:
    valid = list(section.model_fields)
    places: dict[str, list[str]] = {}  # of the keys that only sections have
    for outer, inner in _sections():
        for key in inner.model_fields:
            places.setdefault(key, []).append(f"{outer}.{key}")
    options = _inner_options(section)
    for key, path in options.items():
        places.setdefault(key, [path])
    # A name that another section has was probably put at the wrong level.
    everywhere = [*valid, *(places if section is Config else options)]
    nearest = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.5)
    key = name if name in places and (section is Config or not nearest) else (nearest or [""])[0]
    suggestions = [key] if key in valid else places.get(key, [])
    return (
        f"unknown key; did you mean {' or '.join(map(repr, suggestions))}?"
        if suggestions
        else f"unknown key; expected one of {', '.join(valid)}"
    )


def _inner_options(section: type[BaseModel]) -> dict[str, str]:
    """Paths, by name, of what may be set under `options` of a section, or of all sections."""
    from fedpeft_ext.backbones import backbone_class, backbone_names
    from fedpeft_ext.data import read_dataset, synthetic_dataset
    from fedpeft_ext.nn.spec import registered_options

    parameters = (inspect.signature(function).parameters for function in (read_dataset, synthetic_dataset))
    of_data = {name for names in parameters for name in names} - {"path", "name", "seed"}
    of_backbones = {option for name in backbone_names() for option in backbone_class(name).options}
    return {
        name: f"{where}.options.{name}"
        for kind, where, names in (
            (DatasetConfig, "dataset", of_data),
            (EmbeddingConfig, "embedding", registered_options()),
            (BackboneConfig, "backbone", of_backbones),
        )
        if section in (Config, kind)
        for name in sorted(names - kind.model_fields.keys())
    }


def _sections() -> list[tuple[str, type[BaseModel]]]:
    return [
        (name, field.annotation)
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
