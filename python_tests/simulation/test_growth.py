"""Runs that go on from others with data that have grown, and trained runs with items that arrived later."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_federation import make_dataset, small_config
from torch import Tensor

from fedpeft_ext.backbones import FedMF, register_backbone
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset
from fedpeft_ext.nn import ItemEmbedding, register_strategy
from fedpeft_ext.nn.embedding import new_parameter, read_rows
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Interrupted, Simulator, TrainedRun, load_run, load_server
from fedpeft_ext.simulation.growth import aligned
from fedpeft_ext.simulation.numbering import ENCODER, ITEMS, USERS, read_encoder, read_ids

BACKBONES: dict[str, dict[str, Any]] = {
    "fedmf": {},
    "fedncf": {"backbone.hidden": [8, 4]},
    "pfedrec": {"backbone.hidden": [8], "training.clients_per_round": 5},
    "fedpergnn": {},
}
EMBEDDINGS = (
    "full",
    "c-hash",
    "c-rq",
    "c-full+lora",
    "p-lora",
    "p-hash+senet",
    "p-rq",
    "p-rq+lora",
    "p-full",
)
WORDS = ["drama", "comedy", "horror", "war", "crime", "1995", "1996", "1980"]
OLD_ITEMS, OLD_USERS = 48, 17


def config_of(embedding: str, backbone: str = "fedmf", **changes: Any) -> Config:
    return small_config(
        **{
            "backbone.name": backbone,
            "embedding.name": embedding,
            "pretrain.epochs": 3,
            "pretrain.code_epochs": 2,
            "training.rounds": 3,
            "training.warmup_rounds": 1,
            "evaluation.every": 1,
            **BACKBONES[backbone],
            **changes,
        }
    )


def with_text(dataset: Dataset) -> Dataset:
    rng = np.random.default_rng(0)
    return dataset.changed(item_text=[f"film {i} {' '.join(rng.choice(WORDS, 3))}" for i in range(60)])


def of_items(dataset: Dataset, order: np.ndarray) -> Dataset:
    """The data set with these items, in this order, and what users did with them."""
    numbers = np.full(dataset.num_items + 1, -1)
    numbers[order] = np.arange(len(order))
    kept = numbers[dataset.indices] >= 0
    return dataset.changed(
        num_items=len(order),
        indptr=np.concatenate([[0], np.cumsum(kept)])[dataset.indptr],
        indices=numbers[dataset.indices][kept],
        test_items=numbers[dataset.test_items],
        valid_items=numbers[dataset.valid_items],
        item_ids=[dataset.item_ids[item] for item in order],
        item_text=None if dataset.item_text is None else [dataset.item_text[item] for item in order],
    )


@pytest.fixture(scope="module", autouse=True)
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole() -> Dataset:
    """23 users, 60 items; users and items shuffled against those of `before`."""
    dataset = with_text(make_dataset())
    order = np.random.default_rng(1).permutation(60)
    return of_items(dataset, order).of_users(np.random.default_rng(2).permutation(23))


@pytest.fixture(scope="module")
def before() -> Dataset:
    """17 of the users and 48 of the items."""
    return of_items(with_text(make_dataset()), np.arange(OLD_ITEMS)).of_users(range(OLD_USERS))


def trained(config: Config, dataset: Dataset, out: Path, **options: Any) -> Simulator:
    simulator = Simulator(config, dataset, out=out, **options)
    simulator.run()
    return simulator


def tensors_of(simulator: Simulator) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in simulator.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def going_on(config: Config, folder: Path, rounds: int, **changes: Any) -> Config:
    values = {"start_from": folder, "training.rounds": rounds, **changes}
    return config.updated(f"{name}={value}" for name, value in values.items())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_on_the_same_data_it_goes_on_as_if_it_had_not_ended(
    before: Dataset, tmp_path: Path, embedding: str, backbone: str
) -> None:
    config = config_of(embedding, backbone, dtype="float64")
    first = trained(config, before, tmp_path / "a")
    new = Simulator(going_on(config, tmp_path / "a", 5), before)
    assert new.dataset is before
    assert_equal(tensors_of(new), tensors_of(first))
    assert new.evaluate().values == first.evaluate().values
    longer = Simulator.resume(tmp_path / "a", before, rounds=5)
    longer.run()
    new.run()
    assert_equal(tensors_of(new), tensors_of(longer))


@pytest.mark.parametrize(
    ("embedding", "backbone"),
    [*zip(EMBEDDINGS, itertools.cycle(BACKBONES)), *(("p-rq+lora", name) for name in BACKBONES)],
)
def test_a_grown_catalogue_keeps_what_was_trained(
    before: Dataset, whole: Dataset, tmp_path: Path, embedding: str, backbone: str
) -> None:
    config = config_of(embedding, backbone)
    old = tensors_of(trained(config, before, tmp_path / "a"))
    new = Simulator(going_on(config, tmp_path / "a", 4), whole, out=tmp_path / "b")
    assert [*new.dataset.item_ids[:OLD_ITEMS]] == before.item_ids
    assert {*new.dataset.item_ids} == {*whole.item_ids}
    for user in range(whole.num_users):  # the same interactions under other numbers
        items = new.dataset.indices[new.dataset.indptr[user] : new.dataset.indptr[user + 1]]
        met = whole.indices[whole.indptr[user] : whole.indptr[user + 1]]
        assert [new.dataset.item_ids[i] for i in items] == [whole.item_ids[i] for i in met]
    found = tensors_of(new)
    people = [whole.user_ids.index(name) for name in before.user_ids]
    for name, tensor in old.items():
        if name.startswith("clients"):
            assert torch.equal(found[name][people], tensor)
        else:
            assert torch.equal(found[name][: len(tensor)], tensor)
    means = {"A", "delta"} | ({"weight"} if embedding != "full" else set())
    for name, tensor in found.items():
        if name.split(".")[-1] in means and len(tensor) == 60 and not name.startswith("clients"):
            expected = old[name].mean(0).expand(60 - OLD_ITEMS, -1)
            torch.testing.assert_close(tensor[OLD_ITEMS:], expected)
    if "user" in new.model.local_parameters:  # the others as new clients start
        fresh = Simulator(config, whole, pretrained=new._pretrained).store.state["user"]
        later = [user for user in range(23) if user not in people]
        assert torch.equal(found["clients.user"][later], fresh[later])
    summary = new.run()
    assert summary.rounds == 4
    assert [line["round"] for line in summary.evaluations] == [3, 4]
    assert summary.started_from == {
        "run": str(tmp_path / "a"),
        "round": 3,
        "known_items": OLD_ITEMS,
        "new_items": 60 - OLD_ITEMS,
        "known_users": OLD_USERS,
        "new_users": 23 - OLD_USERS,
    }


def test_another_seed_changes_no_hash_functions(before: Dataset, tmp_path: Path) -> None:
    config = config_of("p-hash")
    first = trained(config, before, tmp_path / "a")
    new = Simulator(going_on(config, tmp_path / "a", 3, seed=7), before, out=tmp_path / "b")
    assert_equal(tensors_of(new), tensors_of(first))
    ranked = new.run().metrics["full/HR@10"]
    assert ranked == first.evaluate()["full/HR@10"]
    assert load_run(tmp_path / "b", before).evaluate().means()["full/HR@10"] == ranked


def test_new_rows_come_from_the_text_and_go_with_what_was_trained(
    before: Dataset, whole: Dataset, tmp_path: Path
) -> None:
    config = config_of("p-rq")
    first = trained(config, before, tmp_path / "a")
    encoder = read_encoder(tmp_path / "a")
    assert encoder is not None
    new = Simulator(going_on(config, tmp_path / "a", 3), whole)
    assert whole.item_text is not None
    texts = [whole.item_text[whole.item_ids.index(name)] for name in new.dataset.item_ids[OLD_ITEMS:]]
    full, codes = encoder.encode(texts)
    embedding, moved = new.model.item_embedding, first.model.item_embedding.base
    assert torch.equal(embedding.codes[OLD_ITEMS:], codes)
    torch.testing.assert_close(embedding.base[OLD_ITEMS:], aligned(encoder.anchor_rows, moved, full))
    assert not torch.allclose(encoder.anchor_rows, moved, atol=1e-3)


def test_the_encoder_goes_through_the_folder(before: Dataset, tmp_path: Path) -> None:
    for codes in ("rq-vae", "rq-kmeans"):
        simulator = trained(config_of("p-rq", **{"pretrain.codes": codes}), before, tmp_path / codes)
        own = simulator.trained_run.encoder
        kept = load_server(tmp_path / codes, before).encoder
        assert own is not None
        assert kept is not None
        texts = ["a drama of 1995", "", "nothing known"]
        with pytest.warns(UserWarning, match="2 of 3 new items have no usable text"):
            expected = own.encode(texts)
        with pytest.warns(UserWarning, match="2 of 3"):
            found = kept.encode(texts)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        with pytest.raises(ValueError, match="items: expected texts"):
            kept.encode(np.zeros((1, 4)))
    assert read_ids(tmp_path / "rq-vae" / ITEMS).to_list() == before.item_ids
    assert read_ids(tmp_path / "rq-vae" / USERS).to_list() == before.user_ids


def test_alignment_recovers_an_affine_map() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, new = torch.randn(40, 5, generator=generator), torch.randn(7, 5, generator=generator)
    matrix, shift = torch.randn(5, 5, generator=generator), torch.randn(5, generator=generator)
    assert torch.allclose(aligned(rows, rows @ matrix + shift, new), new @ matrix + shift, atol=1e-4)


@pytest.mark.parametrize("backbone", ["fedmf", "pfedrec"])
def test_items_and_users_may_go(before: Dataset, tmp_path: Path, backbone: str) -> None:
    config = config_of("p-lora", backbone)
    first = trained(config, before, tmp_path / "a")
    old = tensors_of(first)
    fewer = of_items(before, np.arange(1, OLD_ITEMS)[::-1]).of_users([9, 3])
    new = Simulator(going_on(config, tmp_path / "a", 4, **{"training.clients_per_round": 1}), fewer)
    assert new.dataset.item_ids == before.item_ids
    assert new.dataset.num_items == OLD_ITEMS
    assert new.dataset.item_text is not None
    assert new.dataset.item_text[0] == ""  # which the data do not have any more
    found = tensors_of(new)
    for name, tensor in old.items():
        expected = tensor[[9, 3]] if name.startswith("clients") else tensor
        assert torch.equal(found[name], expected)
    new.run()
    renamed = before.changed(user_ids=[f"other {name}" for name in before.user_ids])
    strangers = Simulator(going_on(config, tmp_path / "a", 4), renamed)
    assert strangers.run().started_from == {
        "run": str(tmp_path / "a"), "round": 3, "known_items": OLD_ITEMS, "new_items": 0, "known_users": 0,
        "new_users": OLD_USERS,
    }  # fmt: skip


def test_it_needs_the_run_no_more_once_it_has_begun(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    config = config_of("p-rq", "pfedrec", **{"training.server_optimizer": "adam"})
    trained(config, before, tmp_path / "a")
    schedules = {"training.schedule": "linear", "training.server_schedule": "cosine"}
    settings = going_on(config, tmp_path / "a", 6, **schedules, **{"training.warmup_rounds": 0})
    straight = trained(settings, whole, tmp_path / "b")
    stopped = Simulator(settings, whole, out=tmp_path / "c")
    stopped.round()
    stopped.stop()
    with pytest.raises(Interrupted, match="after round 4 of 6"):
        stopped.run()
    shutil.rmtree(tmp_path / "a")
    half = load_run(tmp_path / "c", whole)
    assert half.round == 4
    assert torch.equal(
        half.recommend(["u3"], 5).scores, load_run(tmp_path / "c", half.dataset).recommend(["u3"], 5).scores
    )
    again = Simulator.resume(tmp_path / "c", whole)
    summary = again.run()
    assert_equal(tensors_of(again), tensors_of(straight))
    assert summary.started_from is not None
    assert summary.started_from["round"] == 3
    run = load_run(tmp_path / "b", whole)
    users = np.flatnonzero(run.dataset.test_items >= 0)
    hits = (run.recommend(users).items.numpy() == run.dataset.test_items[users, None]).any(1)
    assert hits.mean() == summary.metrics["full/HR@10"]
    # And a third one goes on from it, with an encoder that the first one trained.
    third = Simulator(going_on(settings, tmp_path / "b", 7), whole, out=tmp_path / "d")
    assert_equal(tensors_of(third), tensors_of(again))
    third.run()
    assert (tmp_path / "d" / ENCODER).read_bytes() == (tmp_path / "b" / ENCODER).read_bytes()


def test_an_unfinished_run_will_do(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    config = config_of("p-rq", "pfedrec")
    simulator = Simulator(config, before, out=tmp_path / "a")
    simulator.round()
    simulator.round()
    simulator.stop()
    with pytest.raises(Interrupted):
        simulator.run()
    new = Simulator(going_on(config, tmp_path / "a", 3), before)
    assert_equal(tensors_of(new), tensors_of(simulator))
    live = Simulator(config, whole, start_from=simulator.trained_run)
    kept = Simulator(going_on(config, tmp_path / "a", 3), whole)
    assert_equal(tensors_of(live), tensors_of(kept))
    assert live.run().started_from == {**kept.run().started_from, "run": None}  # type: ignore[dict-item]


def test_a_servers_folder_starts_users_anew(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    config = config_of("p-rq", "pfedrec")
    trained(config, before, tmp_path / "a")
    # Copies, since they may be of the file, which is written over.
    old = {name: value.clone() for name, value in load_file(tmp_path / "a" / "model.safetensors").items()}
    server = {name: value for name, value in old.items() if not name.startswith("clients")}
    save_file(server, tmp_path / "a" / "model.safetensors")
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    del summary["dataset"]  # as a Flower server writes it
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "a" / USERS).unlink()
    new = Simulator(going_on(config, tmp_path / "a", 4), whole)
    assert new.store.trained is not None
    assert not new.store.trained.any()
    for name, value in new.store.starts.items():
        assert torch.equal(value, old[f"starts.{name}"])
    told = new.run().started_from
    assert told is not None
    assert (told["known_users"], told["new_users"], told["new_items"]) == (0, 23, 12)


def test_features_files_and_random_ones(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    """A file has the new items' features, too; random embeddings start new items at the mean."""
    features = np.random.default_rng(0).normal(size=(60, 9)).astype(np.float32)
    by_name = {f"i{item}": features[item] for item in range(60)}
    np.save(tmp_path / "old.npy", features[:OLD_ITEMS])
    np.save(tmp_path / "new.npy", np.stack([by_name[name] for name in whole.item_ids]))
    config = config_of("p-rq", **{"pretrain.features": tmp_path / "old.npy"})
    trained(config, before, tmp_path / "a")
    more = going_on(config, tmp_path / "a", 4, **{"pretrain.features": tmp_path / "new.npy"})
    new = Simulator(more, whole)
    run = load_run(tmp_path / "a", before)
    assert run.encoder is not None
    names = new.dataset.item_ids[OLD_ITEMS:]
    served = run.with_new_items({name: by_name[name] for name in names})
    for name, tensor in served.model.state_dict().items():
        if name.startswith("item_embedding"):
            assert torch.equal(tensor, new.model.state_dict()[name])
    for other in ("tfidf", "sentence-transformers", "random"):
        with pytest.raises(ValueError, match=rf"pretrain.features: expected a features file.*got '{other}'"):
            Simulator(more.updated([f"pretrain.features={other}"]), whole, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="features: expected rows of one length"):
        run.with_new_items({"a": features[0], "b": features[1, :5]})
    with pytest.raises(ValueError, match=r"items: expected features \[N, 9\]"):
        run.with_new_items(whole)

    config = config_of("p-rq", **{"pretrain.features": "random"})
    trained(config, before, tmp_path / "random")
    assert not (tmp_path / "random" / ENCODER).exists()
    new = Simulator(going_on(config, tmp_path / "random", 4), whole)
    base = new.model.item_embedding.base
    torch.testing.assert_close(base[OLD_ITEMS:], base[:OLD_ITEMS].mean(0).expand(12, -1))
    assert len(new.model.item_embedding.codes[OLD_ITEMS:].unique()) > 1
    new.run()
    with pytest.raises(ValueError, match=r"pretrain.features: expected random, as .*, got 'tfidf'"):
        Simulator(going_on(config, tmp_path / "random", 4, **{"pretrain.features": "tfidf"}), whole)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_new_items_are_served_as_a_run_would_start_with_them(
    before: Dataset, whole: Dataset, tmp_path: Path, embedding: str
) -> None:
    config = config_of(embedding, "fedncf")
    trained(config, before, tmp_path / "a")
    new = Simulator(going_on(config, tmp_path / "a", 3), whole)
    run = load_run(tmp_path / "a", before)
    assert new.dataset.item_text is not None
    texts = dict(zip(new.dataset.item_ids, new.dataset.item_text, strict=True))
    for items in (whole, texts):
        grown = run.with_new_items(items)
        assert isinstance(grown, TrainedRun)
        assert {*grown.dataset.item_ids} == {*whole.item_ids}
        order = [grown.dataset.item_ids.index(name) for name in new.dataset.item_ids]
        best = grown.recommend(["u3"], 60, exclude_met=False)
        scores = dict(zip(best.items[0].tolist(), best.scores[0].tolist(), strict=True))
        expected = new.trained_run.client_model("u3")(torch.arange(60))
        torch.testing.assert_close(torch.tensor([scores[i] for i in order]), expected.detach())
    assert torch.equal(
        run.model.item_embedding.full_embedding(),
        load_run(tmp_path / "a", before).model.item_embedding.full_embedding(),
    )
    assert run.with_new_items({"i3": "what it knows"}).dataset is run.dataset
    someone = run.server.with_new_items(texts).with_new_users({"me": ["i3", "i55"]}, 1)
    assert someone.recommend("me", 60).items.max() == 59
    with pytest.raises(ValueError, match=r"data set 'tiny'.*got none"):
        run.with_new_items(whole.changed(item_text=None))
    for name in (5, ""):
        with pytest.raises(ValueError, match=rf"items: expected external ids.*, got {name!r}"):
            run.with_new_items({"new": "drama", name: "war"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.dim": 4}, r"backbone.dim: expected 8, as in the run to start from, got 4"),
        ({"backbone.name": "fedpergnn"}, "backbone.name: expected 'fedmf'"),
        ({"embedding.name": "p-lora"}, "embedding.name: expected 'p-rq'"),
        ({"embedding.levels": 2}, "embedding.levels: expected 3"),
        ({"dtype": "float64"}, "dtype: expected 'float32'"),
        ({"training.rounds": 2}, "training.rounds: expected at least 3"),
        ({"training.rounds": 9, "training.warmup_rounds": 4}, "training.warmup_rounds: expected at most 3"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    before: Dataset, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fits"
    config = config_of("p-rq")
    if not folder.exists():
        trained(config, before, folder)
    with pytest.raises(ValueError, match=message):
        Simulator(going_on(config, folder, 3, **changes), before)


def test_what_cannot_be_started_from_is_named(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    config = config_of("p-rq")
    first = trained(config, before, tmp_path / "a")
    more = going_on(config, tmp_path / "a", 4)
    with pytest.raises(ValueError, match="out: expected another folder than that of start_from"):
        Simulator(more, before, out=tmp_path / "a", overwrite=True)
    with pytest.raises(ValueError, match="pretrained: expected None with start_from"):
        Simulator(more, before, pretrained=first._pretrained)
    with pytest.raises(FileNotFoundError, match="start_from: expected a finished run"):
        Simulator(going_on(config, tmp_path / "none", 4), before)
    with pytest.raises(ValueError, match="expected item text, of which new items are encoded, got none"):
        Simulator(more, whole.changed(item_text=None))
    (tmp_path / "a" / ENCODER).rename(tmp_path / "kept")
    Simulator(more, before)  # which has no new items
    with pytest.raises(ValueError, match="no encoder of new items"):
        Simulator(more, whole)
    (tmp_path / "a" / ENCODER).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="does not hold a saved ItemEncoder"):
        Simulator(more, whole)
    (tmp_path / "kept").rename(tmp_path / "a" / ENCODER)
    items = (tmp_path / "a" / ITEMS).read_bytes()
    (tmp_path / "a" / ITEMS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="does not hold the ids of a run"):
        Simulator(more, whole)
    (tmp_path / "a" / ITEMS).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected items\.parquet.*`fedpeft resume` writes them"):
        Simulator(more, whole)
    Simulator.resume(tmp_path / "a", before).run()
    assert (tmp_path / "a" / ITEMS).read_bytes() == items
    other = before.changed(item_ids=[f"other {name}" for name in before.item_ids])
    with pytest.raises(ValueError, match=r"dataset: expected items .*'i0'.*but such as 'other i0'"):
        Simulator(more, other)
    early = Simulator(config, before)
    with pytest.raises(ValueError, match="whose 1 warm-up rounds are over, got one after round 0"):
        Simulator(config, whole, start_from=early.trained_run)


def test_a_strategy_says_what_new_rows_start_with(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    @register_strategy("scaled")
    class Scaled(ItemEmbedding):
        """One number an item, in a parameter that a client holds whole."""

        def __init__(
            self,
            num_embeddings: int,
            embedding_dim: int,
            *,
            generator: torch.Generator | None = None,
            **options: Any,
        ) -> None:
            super().__init__(num_embeddings, embedding_dim, **options)
            self.scale = new_parameter(num_embeddings, 1, base=self.base, options=options)
            self.reset_parameters(generator)

        def _lookup(self, items: Any, base: Tensor | None) -> Tensor:
            vectors = read_rows(self.scale, items).expand(*items.ids.shape, self.embedding_dim)
            return vectors if base is None else vectors + read_rows(base, items)

        def reset_parameters(self, generator: torch.Generator | None = None) -> None:
            torch.nn.init.zeros_(self.scale)

    config = config_of("p-lora+scaled", engine="batched")
    trained(config, before, tmp_path / "a")
    more = going_on(config, tmp_path / "a", 4)
    with pytest.raises(ValueError, match=r"Scaled.new_rows: expected rows of new items in 'scale'"):
        Simulator(more, whole)

    def new_rows(self: Scaled, name: str, rows: Tensor, count: int) -> Tensor:
        return rows.new_full((count, 1), 7.0)

    Scaled.new_rows = new_rows  # type: ignore[method-assign]
    new = Simulator(more, whole)
    assert (dict(new.model.named_parameters())["item_embedding.parts.1.scale"][OLD_ITEMS:] == 7.0).all()


def test_a_backbone_says_what_new_rows_start_with(before: Dataset, whole: Dataset, tmp_path: Path) -> None:
    @register_backbone
    class Biased(FedMF):
        name = "biased"

        def __init__(self, item_embedding: ItemEmbedding, dim: int) -> None:
            super().__init__(item_embedding, dim)
            self.bias = torch.nn.Parameter(torch.zeros(item_embedding.num_embeddings))

    config = config_of("c-hash", **{"training.rounds": 0, "training.warmup_rounds": 0})
    config = config.updated(["backbone.name=biased"])
    trained(config, before, tmp_path / "a")
    more = going_on(config, tmp_path / "a", 0)
    with pytest.raises(ValueError, match=r"Biased.new_rows: expected rows of new items in 'bias'"):
        Simulator(more, whole)
    Biased.new_rows = lambda self, name, rows, count: rows.new_full((count,), 7.0)  # type: ignore[method-assign]
    bias = Simulator(more, whole).model.get_parameter("bias")
    assert bias.tolist() == [0.0] * OLD_ITEMS + [7.0] * (60 - OLD_ITEMS)


def test_random_pretrained_tables_have_no_encoder(before: Dataset, tmp_path: Path) -> None:
    pretrained = Pretrained(torch.randn(OLD_ITEMS, 8))
    config = config_of("p-lora", **{"pretrain.features": "tfidf"})
    trained(config, before, tmp_path / "a", pretrained=pretrained)
    with pytest.raises(ValueError, match="no encoder"):
        load_run(tmp_path / "a", before).with_new_items({"new": "words"})
