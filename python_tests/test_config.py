"""Settings: defaults, YAML and overrides, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft_ext.backbones import FedMF, base, register_backbone
from fedpeft_ext.config import Config, ConfigError, load_config
from fedpeft_ext.nn import LoRAEmbedding, register_strategy, spec
from fedpeft_ext.presets import FOLDER, preset_names
from fedpeft_ext.simulation.setup import build_model, has_codes


def test_defaults_are_those_of_the_paper() -> None:
    config = load_config()
    assert config.training.local_epochs == 2
    assert config.training.batch_size is None
    assert config.training.l2 == 1e-8
    assert config.evaluation.ks == (5, 10, 20, 50)
    assert config.embedding.rank == 4
    assert config.engine == "auto"


def test_yaml_then_overrides_then_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training:\n  rounds: 7\n  lr: 1e-3\nseed: 3\n")
    config = load_config(path, ["training.rounds=9", "embedding.name=p-lora", "dataset.options.min_rating=4"])
    assert (config.training.rounds, config.training.lr, config.seed) == (9, 1e-3, 3)
    assert config.dataset.options == {"min_rating": 4}
    again = tmp_path / "b.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert config.updated(["seed=4"]) == load_config(again, ["seed=4"])


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.ronds=3", r"^training\.ronds: unknown key; did you mean 'rounds'\?$"),
        ("trainning.rounds=3", r"^trainning: unknown key; did you mean 'training'\?$"),
        ("rank=3", r"^rank: unknown key; did you mean 'embedding\.rank'\?$"),
        ("lr=3", r"^lr: unknown key; did you mean 'pretrain\.lr' or 'training\.lr'\?$"),
        ("round=3", r"^round: unknown key; did you mean 'training\.rounds'\?$"),
        ("training.rank=3", r"^training\.rank: unknown key; did you mean 'embedding\.rank'\?$"),
        ("training=3", r"^training: expected a section of settings, got 3$"),
        ("training.lr=fast", r"^training\.lr: expected a number, got 'fast'$"),
        ("evaluation.ks=5", r"^evaluation\.ks: expected a list, got 5$"),
        ("xyzzy=3", r"^xyzzy: unknown key; expected one of dataset, backbone"),
        ("training.rounds=-1", r"^training\.rounds: expected greater than or equal to 0, got -1$"),
        ("training.rounds=many", r"^training\.rounds: expected an integer, got 'many'$"),
        ("training.rounds=2.5", r"^training\.rounds: expected an integer, got 2\.5$"),
        ("training.rounds=true", r"^training\.rounds: expected .*, got True$"),
        ("training.lr=0", r"^training\.lr: expected greater than 0, got 0"),
        ("training.lr=.nan", r"^training\.lr: expected a finite number, got nan$"),
        ("training.loss=hinge", r"^training\.loss: expected 'bpr' or 'bce', got 'hinge'$"),
        (
            "training.clients_per_round=1.5",
            r"^training\.clients_per_round: expected a share in \(0, 1\] .*got 1\.5$",
        ),
        (
            "training.clients_per_round=0",
            r"^training\.clients_per_round: expected a count of at least 1 .*got 0$",
        ),
        (
            "training.warmup_rounds=101",
            r"^training\.warmup_rounds: expected at most rounds \(100\).*got 101$",
        ),
        ("training=3", r"^training: .*got 3$"),
        ("evaluation.ks=[]", r"^evaluation\.ks: expected at least one cut-off"),
        (
            "evaluation.select_by=HR@7",
            r"^evaluation\.select_by: expected one of HR@5, .*, MRR, .*got 'HR@7'$",
        ),
        ("training.schedule_end=0", r"^training\.schedule_end: expected greater than 0, got 0$"),
        ("evaluation.ks=[0]", r"^evaluation\.ks: expected greater than or equal to 1, got 0$"),
        (
            "backbone.name=fedfm",
            r"^backbone\.name: expected a backbone out of .*fedmf.*got 'fedfm' \(did you mean 'fedmf'\?\)$",
        ),
        ("embedding.name=p-lorra", r"^embedding\.name: .*'lorra'.*nearest is 'lora'"),
        ("device=abacus", r"^device: expected a torch device.*got 'abacus'$"),
        ("dtype=float16", r"^dtype: expected 'float32' or 'float64', got 'float16'$"),
        ("seed=-1", r"^seed: expected greater than or equal to 0, got -1$"),
        ("training.rounds", r"^override: expected section\.key=value, got 'training\.rounds'$"),
        ("training..rounds=1", r"^override: expected section\.key=value"),
        ("training.rounds.x=1", r"^training\.rounds: "),
        ("training.rounds=[", r"^training\.rounds: expected a YAML value, got '\['$"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_every_wrong_setting_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.rounds=-1", "embedding.rank=0", "sed=1"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML: line 1, column 5"),
        ("- 1", "expected sections such as 'training:', got a list"),
        (
            "training: {lr: 1}\nseed: 1\ntraining: {rounds: 2}",
            "line 3, column 1: 'training' is given a second",
        ),
        ("training: {lr: 1, rounds: 2, lr: 3}", "line 1, column 30: 'lr' is given a second time"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_share_and_count_of_clients_are_told_apart() -> None:
    assert load_config(None, ["training.clients_per_round=1"]).training.clients_per_round == 1
    share = load_config(None, ["training.clients_per_round=1.0"]).training.clients_per_round
    assert isinstance(share, float)
    assert share == 1.0


def test_errors_of_parsers_name_the_setting_once() -> None:
    with pytest.raises(ConfigError, match=r"^embedding\.name: expected strategies .* the nearest is 'rq'$"):
        load_config(None, ["embedding.name=p-rqq"])


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_found_by_name(name: str) -> None:
    config = load_config(name, ["seed=3"])
    backbone = config.backbone.name
    plain = config.dataset.name + (f"-{backbone}" if backbone != "fedmf" else "")
    assert name in (plain, f"{plain}-tuned")
    assert config.seed == 3
    assert config == load_config(FOLDER / f"{name}.yaml", ["seed=3"])


def test_a_file_goes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ml-1m").mkdir()  # say, of the data
    assert load_config("ml-1m").training.rounds == 400
    (tmp_path / "ml-100k").write_text("training: {rounds: 7}")
    assert load_config("ml-100k").training.rounds == 7
    with pytest.raises(FileNotFoundError, match=r"one of .*ml-100k, .*did you mean 'ml-100k'"):
        load_config("ml-100")
    with pytest.raises(FileNotFoundError, match=r"found no file .*none/ml-100k"):
        load_config(tmp_path / "none" / "ml-100k")


class _Own(LoRAEmbedding):
    """A strategy with settings of this package, one of its own, and codes."""

    def __init__(self, *sizes: int, levels: int, codes: Tensor, slope: float = 1.0, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.got = (levels, list(codes.shape), slope)


def test_registered_strategies_and_backbones_have_options_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spec, "STRATEGIES", dict(spec.STRATEGIES))
    monkeypatch.setattr(spec, "_REGISTERED", dict(spec._REGISTERED))
    monkeypatch.setattr(base, "_BACKBONES", dict(base._BACKBONES))
    register_strategy("own", "levels", "codes", "slope")(_Own)
    register_backbone(type("Heads", (FedMF,), {"name": "heads", "options": ("heads",)}))

    config = Config().updated(["embedding.name=c-own", "embedding.levels=2", "embedding.options.slope=3"])
    assert has_codes("p-lora+own")
    model = build_model(config, 5, codes=torch.zeros(5, 2, dtype=torch.int64))
    assert model.item_embedding.got == (2, [5, 2], 3)
    config.updated(["embedding.name=full"])  # of a comparison with `c-own`

    for override, message in (
        ("embedding.options.slop=1", "^embedding.options: expected one of slope, got 'slop'$"),
        ("embedding.options.rank=1", "^embedding.options: .*settings beside it, got 'rank'$"),
        ("embedding.slope=1", "^embedding.slope: unknown key; did you mean 'embedding.options.slope'"),
        ("slope=1", "did you mean 'embedding.options.slope'"),
        ("backbone.options.heads=2", "^backbone.options: expected none, since fedmf has none"),
        ("backbone.heads=2", "did you mean 'backbone.options.heads'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.updated([override])
    config = config.updated(["backbone.name=heads", "backbone.options.heads=2"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):  # FedMF's constructor got it
        build_model(config, 5, codes=torch.zeros(5, 2, dtype=torch.int64))
