"""`Simulator`: a federation from a configuration and a data set, run round by round or to the end.

A run goes along the path of Yuan et al. (AAAI 2026): full embeddings and codes are prepared on the server,
some warm-up rounds may train the full embeddings in the federation, they are frozen, and the compressed part
is trained from then on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft_ext import _C
from fedpeft_ext.backbones import Backbone
from fedpeft_ext.config import Config, ConfigError, TrainingConfig, load_config
from fedpeft_ext.data import Dataset
from fedpeft_ext.data.dataset import numbers_of
from fedpeft_ext.nn import parse_spec
from fedpeft_ext.pretrain import ItemEncoder, Pretrained
from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.callbacks import Callback, Metrics, RoundInfo
from fedpeft_ext.simulation.checkpoint import (
    RUN,
    Checkpoint,
    CheckpointFolder,
    load_checkpoint,
    trained_state,
)
from fedpeft_ext.simulation.client_batch import TRAINED, ClientStore, Interactions, initial_states
from fedpeft_ext.simulation.communication import Traffic, message, setup_message, shared_state
from fedpeft_ext.simulation.compression import make_stage
from fedpeft_ext.simulation.distributed import Ranks, pretrained_everywhere, rank_device, train_round
from fedpeft_ext.simulation.evaluation import Evaluator
from fedpeft_ext.simulation.faults import make_faults
from fedpeft_ext.simulation.fused import FusedEngine
from fedpeft_ext.simulation.growth import grown_dataset, grown_items, take_over, take_over_users
from fedpeft_ext.simulation.local_training import (
    Federation,
    LocalSettings,
    ParameterRoles,
    first_not_finite,
)
from fedpeft_ext.simulation.memory import on_huge_pages
from fedpeft_ext.simulation.numbering import ITEMS, read_encoder, read_ids, write_numbering
from fedpeft_ext.simulation.output import (
    CONFIG,
    TENSORBOARD,
    RunFolder,
    clear_folder,
    dataset_of_run,
    flat,
    prepare_folder,
    saved_metrics,
)
from fedpeft_ext.simulation.privacy import Ledger, PrivacyReport, make_clipping, make_noise
from fedpeft_ext.simulation.randomness import choose_clients
from fedpeft_ext.simulation.scaffold import ControlVariates, check_memory
from fedpeft_ext.simulation.serving import TrainedRun, TrainedServer, load_start
from fedpeft_ext.simulation.setup import (
    after_warmup,
    build_model,
    carry_over,
    clients_per_round,
    counted_traffic,
    eligible_clients,
    local_settings,
    make_engine,
    needs_pretrained,
    prepare_items,
    server_settings,
    warmup_rounds,
)
from fedpeft_ext.simulation.state import Stateful, below, copy_into, prefixed
from fedpeft_ext.simulation.tensorboard import TensorBoard
from fedpeft_ext.simulation.uploads import UploadStage

VALID = "valid/"
"""Before the names of metrics of validation items."""


@dataclass(frozen=True)
class Summary:
    """What a finished run comes down to.

    Attributes:
        dataset, backbone, embedding, engine, seed: what was run.
        rounds: trained rounds, `warmup_rounds` of them as warm-up.
        metrics: of the last evaluation, by name as in `Metrics`.
        best_round: the evaluated round of the highest `evaluation.select_by` of the validation items. Where
            none are held out it is chosen on the test items, which flatters: it then describes a curve and
            does not compare methods.
        best_by: the metric that chose it, such as `valid/HR@10`.
        best: metrics of that round.
        evaluations: every evaluation: {"round": r, metric: value, ...}.
        bytes_down, bytes_up: received and sent by a client in each round it takes part in, after warm-up.
        bytes_setup: received once by each client (frozen tensors).
        total_bytes: sent both ways by all clients in all rounds, warm-up included, set-up left out.
        trained_clients: clients trained, summed over rounds.
        training_seconds: wall time of the rounds, evaluation left out; `seconds` is that of the whole run.
        privacy: `PrivacyReport.as_dict`, with epsilon and delta where there is a guarantee; None without
            privacy.
        faults: `Faults.counts`; None where no fault is simulated or rejected.
        excluded_clients: users that cannot train, and are never chosen: without a training item, or with
            every item.
        dataset_digest: `Dataset.digest` of the data; "" from a version that did not write it.
        started_from: what this run went on from: {"run": its folder or None, "round": after which, and counts
            of "known_items", "new_items", "known_users", "new_users"}; None for a run from the beginning.
            `rounds` are counted on from that round; bytes, clients, times, privacy and faults are those of
            this run alone.
    """

    dataset: str
    backbone: str
    embedding: str
    engine: str
    seed: int
    rounds: int
    warmup_rounds: int
    metrics: Mapping[str, float]
    best_round: int
    best_by: str
    best: Mapping[str, float]
    evaluations: Sequence[Mapping[str, float]]
    bytes_down: int
    bytes_up: int
    bytes_setup: int
    total_bytes: int
    trained_clients: int
    training_seconds: float
    seconds: float
    privacy: Mapping[str, Any] | None = None
    faults: Mapping[str, int] | None = None
    excluded_clients: int = 0
    dataset_digest: str = ""
    started_from: Mapping[str, Any] | None = None

    @property
    def clients_per_second(self) -> float:
        """Training throughput over the whole run."""
        return self.trained_clients / self.training_seconds if self.training_seconds > 0.0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "clients_per_second": self.clients_per_second}


class Interrupted(Exception):
    """A run ended before its last round because `Simulator.stop` was called; with a folder, it is saved."""


class Simulator:
    """A federation that trains in rounds.

    Args:
        config: all settings.
        dataset: the interactions.
        pretrained: full embeddings and codes; None prepares what the embedding needs, as `config.pretrain`
            says.
        callbacks: told about rounds and evaluations, on the first rank.
        out: folder for the run's files (see `output`); made and tried first. Checkpoints in it let `resume`
            go on after the process was killed.
        overwrite: whether `out` may hold an earlier run, whose files are replaced.
        start_from: a trained run to go on from, or what a server has of it; None: that in the folder
            `config.start_from`, if one is named. Items and users are known by external id; `dataset` of this
            object has the items in the numbers of that run, new ones after them. Rounds are counted on, so
            that no draw comes twice with the same seed; what the server's optimizer, control variates,
            uploads and the account of privacy have gathered begins anew.

    `config.threads` sets torch's number of CPU threads for the whole process.

    In an initialised torch.distributed process group all ranks make the same Simulator and call the same
    methods; they share the clients (`distributed`), and the first writes the files.

    Raises:
        ValueError: settings that do not fit the data set or each other, named by their dotted path.
        FileExistsError, OSError: `out` is not empty, or cannot be written.
        RankError: another rank failed.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        *,
        pretrained: Pretrained | None = None,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
        overwrite: bool = False,
        start_from: TrainedRun | TrainedServer | None = None,
    ) -> None:
        began = time.perf_counter()
        if config.secure_aggregation.min_nodes:
            raise ValueError(
                "secure_aggregation.min_nodes: expected 0 in a simulation, which hides no update, got "
                f"{config.secure_aggregation.min_nodes}"
            )
        self._ranks = ranks = Ranks()
        if config.start_from is not None:
            if out is not None and Path(out).resolve() == Path(config.start_from).resolve():
                raise ValueError(f"out: expected another folder than that of start_from, got {out}")
            if start_from is None:
                with ranks.together("reading start_from"):
                    start_from = load_start(config.start_from)
        original = dataset
        start = start_from.server if isinstance(start_from, TrainedRun) else start_from
        if start is not None:
            if pretrained is not None:
                raise ValueError("pretrained: expected None with start_from, which has it, got some")
            read = ranks.gather_texts(str(start.round))
            if len(set(read)) > 1:  # it is training
                raise ValueError(
                    f"start_from: expected a run after the same round on all ranks, got {', '.join(read)}"
                )
            dataset = grown_dataset(config, start, dataset)
        self._device = rank_device(check_device(config.device))
        self._on_gpu = self._device.type == "cuda"
        spec = parse_spec(config.embedding.name)
        training = config.training
        self.config = config
        self.dataset = dataset
        self._spec = spec
        self._warmup_rounds = warmup_rounds(config)
        self._eligible = eligible_clients(dataset)
        self._per_round = clients_per_round(training.clients_per_round, len(self._eligible))
        self._faults = make_faults(config)
        if self._faults is not None and config.faults.min_clients > self._per_round:
            raise ValueError(
                f"faults.min_clients: expected at most the {self._per_round} clients of a round, got "
                f"{config.faults.min_clients}"
            )
        self._ledger: Ledger | None = None
        if config.privacy.mode != "none":
            self._ledger = Ledger(
                config.privacy,
                training.client_sampling,
                len(self._eligible),
                self._per_round,
                dataset.num_users,
            )
        with ranks.together("preparing the folder"):
            if out is not None and ranks.first:
                prepare_folder(out, overwrite, clear=False)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._callbacks = tuple(callbacks) if ranks.first else ()
        self._dtype = getattr(torch, config.dtype)
        self._interactions = Interactions(dataset, self._device)
        ranks.divide(self._interactions.sizes)
        self._evaluators = evaluators(config, dataset, self._interactions, ranks)
        self._pretrained = pretrained
        if pretrained is None and needs_pretrained(config.embedding.name):
            self._pretrained = pretrained_everywhere(
                ranks,
                lambda: (
                    prepare_items(config, dataset)
                    if start is None
                    else grown_items(config, start, original, dataset)
                ),
            )
        if self._pretrained is not None:
            self._pretrained = dataclasses.replace(
                self._pretrained, full=on_huge_pages(self._pretrained.full)
            )

        self.rounds_done = self._begun = 0 if start is None else start.round
        self._total_bytes = self._trained_clients = 0
        self._training_seconds = 0.0
        self._evaluations: list[Metrics] = []
        self._store: ClientStore | None = None
        self._federation: Federation
        self._begin_phase()
        self._started_from: dict[str, Any] | None = None
        if start is not None:
            store = start_from.store if isinstance(start_from, TrainedRun) else None
            self._take_over(start, store)
        self._seconds = time.perf_counter() - began
        self._mark: Mapping[str, Any] | None = None  # how far metrics.jsonl is that of this federation
        self._saved_rounds = config.training.rounds  # as many as the run to go on with was to have
        self._stopping = False
        self._out: Path | None = None
        self._folder: Path | None = None
        if out is not None:
            with ranks.together("clearing the folder"):
                if ranks.first:
                    clear_folder(Path(out))
            self._open(Path(out))

    def _take_over(self, start: TrainedServer, store: ClientStore | None) -> None:
        """Become the federation that was trained, as far as users and items are those of it."""
        dataset, known = self.dataset, 0
        take_over(start.model, self.model)
        copy_into(self.store.starts, start.starts)
        if store is not None:  # else users' state is theirs alone
            users = numbers_of(dataset.user_ids, start.catalogue.user_ids)
            known = int((users >= 0).sum())
            take_over_users(store, users, self.store, self._ranks.owned)
        old = start.catalogue.num_items
        self._started_from = {
            "run": self.config.start_from,
            "round": start.round,
            "known_items": old,
            "new_items": dataset.num_items - old,
            "known_users": known,
            "new_users": dataset.num_users - known,
        }

    def _open(self, folder: Path) -> None:
        """Have `run` write into this folder, from the first rank."""
        self._out = folder
        self._folder = folder if self._ranks.first else None
        if self.config.log.tensorboard and self._ranks.first:
            self.add_callbacks(TensorBoard(folder / TENSORBOARD))

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        dataset: Dataset | None = None,
        *,
        rounds: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Simulator:
        """The run in `folder` as it was saved last; `run()` goes on from there.

        It ends with the same files, bit for bit and times aside, as a run that was never interrupted, given
        the same versions of this package and torch. Settings are those of the folder's config.yaml, which
        may differ from those that the run began with in what changes no result up to here (`ADJUSTABLE`).

        Args:
            dataset: the same as before; None loads `config.dataset`.
            rounds: train up to this round instead of `training.rounds`.
            callbacks: as for a new run.

        Raises:
            FileNotFoundError: there is nothing to go on from.
            ValueError: a file is damaged, or settings or data are not those of the run; names the file.
                Nothing is written.
        """
        began = time.perf_counter()
        folder = Path(folder)
        saved = load_checkpoint(folder)
        if RUN in saved.header:
            raise ValueError(
                f"resume: {folder} is that of a Flower server, which `flwr run` with this `out` goes on with"
            )
        saved_metrics(folder, saved.header["metrics"])
        config = _resumed_config(folder, saved)
        if rounds is not None:
            config = config.updated([f"training.rounds={rounds}"])
        check_schedule(config.training, saved.header["config"]["training"]["rounds"])
        if config.training.rounds < saved.round:
            raise ValueError(
                f"training.rounds: expected at least {saved.round}, after which {saved.path} was saved, got "
                f"{config.training.rounds}"
            )
        if dataset is None:
            dataset = dataset_of_run(config, folder)
        if saved.header.get("started_from") is not None:
            dataset = dataset.after_catalogue(read_ids(folder / ITEMS))
        if dataset.digest != saved.header["dataset"]:
            raise ValueError(
                f"dataset: {saved.path} was saved by a run on other data than {dataset.name!r} "
                f"({saved.header['dataset'][:12]} against {dataset.digest[:12]})"
            )
        given = None
        if "pretrained.full" in saved.constants:
            given = Pretrained.from_tensors(below("pretrained", saved.constants))
            given = dataclasses.replace(given, encoder=read_encoder(folder))
        # What it started from is in the checkpoint, and may be gone.
        begun = config.model_copy(update={"start_from": None})
        simulator = cls(begun, dataset, pretrained=given, callbacks=callbacks)
        simulator.config = config
        simulator._restore(saved)
        simulator._open(folder)
        simulator._seconds += time.perf_counter() - began
        return simulator

    # ---- the federation
    # -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Backbone:
        """The model with the current global parameters."""
        return self._federation.model

    @property
    def store(self) -> ClientStore:
        """The clients' own state."""
        return self._federation.store

    @property
    def traffic(self) -> Traffic:
        """Bytes per client in the current phase."""
        return self._traffic

    @property
    def engine(self) -> str:
        """The engine in use: "fused", "batched" or "sequential"."""
        return self._engine_name

    @property
    def ranks(self) -> Ranks:
        """The processes that share the clients."""
        return self._ranks

    @property
    def phase(self) -> str:
        """ "warm-up" or "training", of the next round."""
        return "warm-up" if self.rounds_done < self._warmup_rounds else "training"

    @property
    def trained_run(self) -> TrainedRun:
        """The federation as it is, to use: recommendations, new users, a device's model. Its parameters and
        the clients' state are those of the simulator, so later rounds change them.

        Raises RuntimeError where the clients' state is spread over processes: `load_run` reads it together.
        """
        if self._ranks.size > 1:
            raise RuntimeError(
                f"trained_run: expected one process, got {self._ranks.size}, each with the state of its own "
                "clients; `load_run` of the run's folder has all"
            )
        return TrainedRun(self.config, self.dataset, self.model, self.store, self.rounds_done, self._encoder)

    @property
    def _encoder(self) -> ItemEncoder | None:
        return None if self._pretrained is None else self._pretrained.encoder

    def add_callbacks(self, *callbacks: Callback) -> None:
        """Have these told about the run as well, on the first rank."""
        if self._ranks.first:
            self._callbacks += callbacks

    def stop(self) -> None:
        """Have `run` end after the round that it is at. May be called from a callback, a signal's handler or
        another thread.
        """
        self._stopping = True

    def _begin_phase(self) -> None:
        """Set up model, engine and aggregation for the phase of the next round."""
        config, pretrained = self.config, self._pretrained
        self._constants: dict[str, Tensor] | None = None
        model = build_model(
            config,
            self.dataset.num_items,
            base=None if pretrained is None else pretrained.full.to(self._device, self._dtype),
            codes=None if pretrained is None else pretrained.codes,
            codebooks=None if pretrained is None else pretrained.codebooks,
            warmup=self.phase == "warm-up",
        ).to(self._device)
        for parameter in model.parameters():
            parameter.data = on_huge_pages(parameter.data)
        if self._store is None:
            users = self.dataset.num_users
            parameters = dict(model.named_parameters())
            owned = torch.arange(self._ranks.owned.start, self._ranks.owned.stop, device="cpu")
            self._store = ClientStore(
                initial_states(model, owned, users, config.seed, config.backbone.init_std),
                {name: parameters[name] for name in model.averaged_start},
                users,
            )
        else:
            carry_over(self._federation.model, model)
        training, warmup = config.training, self.phase == "warm-up"
        settings = local_settings(config, model, warmup=warmup, begun=self._begun)
        variates = self._control_variates(model, settings) if training.algorithm == "scaffold" else None
        self._federation = Federation(model, self._store, self._interactions, settings, variates)
        self._engine_name, self._engine = make_engine(config, self._federation)
        self._aggregator = Aggregator(
            message(model),
            frozenset(ParameterRoles.of(model).rows),
            **server_settings(config, warmup=warmup, begun=self._begun),
            stages=self._upload_stages(model),
            noise=make_noise(config.privacy, self._per_round, config.seed),
            faults=self._faults,
            variates=variates,
        )
        self._whole_round = self._rounds_in_one_call()
        self._traffic = counted_traffic(config, model)

    def _rounds_in_one_call(self) -> Callable[[int], np.ndarray] | None:
        """`FusedEngine.whole_rounds`, where nothing of this run asks for the parts of a round."""
        config = self.config
        alone = self._ranks.size == 1 and self._faults is None and self._ledger is None
        fixed = config.training.client_sampling != "poisson" and self._per_round >= config.faults.min_clients
        if not (alone and fixed and isinstance(self._engine, FusedEngine)) or self.store.starts:
            return None
        return self._engine.whole_rounds(self._aggregator, self._eligible, self._per_round)

    @property
    def variates(self) -> ControlVariates | None:
        """SCAFFOLD's control variates in the present phase; None without it."""
        return self._federation.variates

    def _control_variates(self, model: Backbone, settings: LocalSettings) -> ControlVariates:
        """Those of a phase, zero at first."""
        sizes = self._interactions.sizes[self._eligible]
        touched = np.minimum(sizes * (1 + settings.epochs), self.dataset.num_items)
        tables = frozenset(ParameterRoles.of(model).rows)
        check_memory(message(model), tables, touched.tolist())
        return ControlVariates(message(model), tables, float(settings.weights(sizes).sum()))

    def _upload_stages(self, model: Backbone) -> list[UploadStage]:
        """What uploads go through before they are summed. Clipping comes last: it bounds what is decoded."""
        stages: list[UploadStage] = []
        privacy, compression = self.config.privacy, self.config.compression
        if compression.method != "none":
            stages.append(
                make_stage(compression.method, message(model), share=compression.top_k, seed=self.config.seed)
            )
        return [*stages, *make_clipping(privacy)]

    @property
    def privacy(self) -> PrivacyReport | None:
        """What the rounds so far guarantee; None without privacy."""
        return None if self._ledger is None else self._ledger.report()

    def _sample(self, round: int, attempt: int) -> np.ndarray:
        """Clients chosen for a round, sorted by (size, id)."""
        sampling = self.config.training.client_sampling
        clients = choose_clients(self._eligible, self._per_round, sampling, self.config.seed, round, attempt)
        return self._interactions.by_size(clients)

    # ---- running
    # --------------------------------------------------------------------------------------------------------

    def round(self) -> RoundInfo:
        """Train one round and return its record. It may go beyond `config.training.rounds`.

        Raises:
            ClientError: local training failed. FloatingPointError: a loss is NaN or infinite. The federation
                is as it was before the round.
        """
        number, phase = self.rounds_done + 1, self.phase
        began = time.perf_counter()
        counts = None if self._faults is None else self._faults.state_dict()
        try:
            if self._whole_round is not None:
                losses = self._whole_round(number)
                chosen = trained = len(losses)
            else:
                losses, chosen, trained = self._round_in_parts(number)
        except BaseException:
            self._discard()
            if self._faults is not None and counts is not None:
                self._faults.load_state_dict(counts)
            raise
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began

        info = RoundInfo(
            round=number,
            rounds=self.config.training.rounds,
            phase=phase,
            loss=float(np.add.reduce(losses)) / len(losses) if len(losses) else float("nan"),
            clients=trained,
            seconds=seconds,
            bytes_down=self._traffic.down,
            bytes_up=self._traffic.up,
            faults=None if self._faults is None else dict(self._faults.counts),
        )
        self.rounds_done = number
        self._total_bytes += chosen * info.bytes_down + trained * info.bytes_up
        self._trained_clients += trained
        self._training_seconds += seconds
        if phase == "warm-up" and self.phase == "training":
            self._pretrained = after_warmup(self.model, self._pretrained)
            self._begin_phase()
        for callback in self._callbacks:
            callback.on_round(info)
        return info

    def _round_in_parts(self, number: int) -> tuple[np.ndarray, int, int]:
        """Losses of a round's clients, and how many were chosen and trained, again if it was repeated."""
        faults = self.config.faults
        repeats = faults.max_repeats if faults.too_few == "repeat" else 0
        chosen = trained = 0
        for attempt in range(repeats + 1):
            sampled = self._sample(number, attempt)
            clients = sampled if self._faults is None else self._faults.present(sampled, number, attempt)
            weights = self._federation.settings.weights(self._interactions.sizes[clients])
            self._aggregator.begin(number, attempt, float(weights.sum()))
            losses = self._train(clients, number)
            chosen, trained = chosen + len(sampled), trained + len(clients)
            if self._aggregator.uploads >= faults.min_clients:
                self._aggregator.apply()
                # No noise covers the mean of the clients' states, so that with privacy it stays unknown.
                self.store.commit(self._ranks, average=self.config.privacy.mode == "none")
                break
            self._discard()
            if self._faults is not None:
                self._faults.counts["repeated" if attempt < repeats else "skipped"] += 1
        if self._ledger is not None:
            self._ledger.add_round(sampled)
        return losses, chosen, trained

    def _train(self, clients: np.ndarray, number: int) -> np.ndarray:
        """Local training of a round: losses of the clients whose updates were accepted."""
        losses = train_round(self._ranks, self._engine, clients, number, self._aggregator)
        if self._faults is not None:
            self._faults.exchange(self._ranks, clients)
            accepted = self._faults.accepted(clients)
            losses, clients = losses[accepted], clients[accepted]
        first_not_finite(losses, clients, number)
        self._aggregator.check_finite()
        return losses

    def _discard(self) -> None:
        """Forget what the round's clients wrote and sent."""
        self._aggregator.discard()
        self.store.discard()

    def evaluate(self) -> Metrics:
        """Rank the test items with the current parameters. Raises FloatingPointError on NaN scores."""
        began = time.perf_counter()
        values: dict[str, float] = {}
        for prefix, evaluator in self._evaluators.items():
            with self._ranks.together("evaluating"):
                result = evaluator(self.model, self.store, self.rounds_done)
            values |= {prefix + name: value for name, value in result.items()}
        metrics = Metrics(self.rounds_done, values, time.perf_counter() - began)
        self._evaluations.append(metrics)
        for callback in self._callbacks:
            callback.on_evaluate(metrics)
        return metrics

    def run(self) -> Summary:
        """Train all rounds that are left, evaluating on the way, and write the files of the run.

        Raises:
            Interrupted: `stop` was called. All that `round` raises: what was saved before stays on disk.
            OSError: a file cannot be written, say for lack of space; what was saved before stays.
        """
        began = time.perf_counter() - self._seconds
        rounds, every = self.config.training.rounds, self.config.evaluation.every
        resumed, self._mark = self._mark, None
        folder = saves = saved = None  # folder and saves: on the first rank
        with self._ranks.together("opening the folder"):
            if self._folder is not None:
                folder = RunFolder(self._folder, self.config, resumed)
                saves = CheckpointFolder(self._folder, self.config.checkpoint)
        saving = self._out is not None and self.config.checkpoint.every != 0

        def save(mark: Mapping[str, Any] | None = None) -> None:
            nonlocal saved
            if not saving or saved == self.rounds_done:
                return
            state = trained_state(self.model, self._parts(), self._ranks)  # from all
            with self._ranks.together("saving"):
                for callback in self._callbacks:
                    callback.on_save()
                if folder is not None and saves is not None:
                    header = self._header(mark or folder.mark(), time.perf_counter() - began)
                    saves.save(Checkpoint(self.rounds_done, header, state, self._saved_constants()))
            saved = self.rounds_done

        def agreed() -> tuple[bool, bool]:
            """Whether to stop, and whether it is time to save, the same on all ranks."""
            wishes = [self._stopping, saves is not None and saves.due(self.rounds_done)]
            stop, due = self._ranks.sum_numbers(np.array(wishes, dtype=np.float64))
            return bool(stop), bool(due)

        try:
            with self._ranks.together("opening the folder"):
                if self._folder is not None:
                    write_numbering(self._folder, self.dataset, self._encoder)
            for callback in self._callbacks:
                callback.on_start(self)
            if resumed is None:
                save()
            elif saving and self._ended_early():
                # The last evaluation of a run of fewer rounds, which one of these would not have made. It
                # leaves the checkpoint first, which is then good for the file with that line and without.
                self._evaluations.pop()
                shorter = None if folder is None else folder.mark_before_last()
                save(shorter)
                if folder is not None and shorter is not None:
                    folder.cut(shorter)
            if resumed is None or not self._evaluations:
                self._evaluated_line(folder, None)
                saved = None
            stop, _ = agreed()
            while self.rounds_done < rounds and not stop:
                info = self.round()
                if self.rounds_done % every == 0 or self.rounds_done == rounds:
                    self._evaluated_line(folder, info)
                stop, due = agreed()
                if due:
                    save()
            save()
            self._seconds = time.perf_counter() - began
            if self._out is not None:
                self._mark = {} if folder is None else folder.mark()
            if self.rounds_done < rounds:
                self._stopping = False
                raise Interrupted(f"stopped after round {self.rounds_done} of {rounds}")
            summary = self._summary(self._seconds)
            tensors = self.state_dict()  # from all ranks
            if folder is not None:
                folder.finish(summary.as_dict(), tensors)
        finally:
            if folder is not None:
                folder.close()
        for callback in self._callbacks:
            callback.on_end(summary)
        return summary

    def _evaluated_line(self, folder: RunFolder | None, info: RoundInfo | None) -> None:
        metrics = self.evaluate()
        if folder is not None:
            record = {} if info is None else info.as_dict()
            if self._ledger is not None:
                record["epsilon"] = self._ledger.report().metric()
            if self._faults is not None:
                record["excluded_clients"] = self.dataset.num_users - len(self._eligible)
            folder.add_metrics(
                {"round": metrics.round, **record, **metrics.values, "total_bytes": self._total_bytes}
            )

    # ---- checkpoints
    # ----------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Stateful]:
        """All that lives from round to round besides the model and the counters of `_progress`."""
        parts: dict[str, Stateful] = {"clients": self.store, "aggregation": self._aggregator}
        if self._faults is not None:
            parts["faults"] = self._faults
        if self._ledger is not None:
            parts["privacy"] = self._ledger
        return parts

    def _ended_early(self) -> bool:
        """Whether this goes on with a run that had ended, with an evaluation out of turn."""
        last, every = self.rounds_done, self.config.evaluation.every
        return (
            self._saved_rounds == last < self.config.training.rounds
            and last % every != 0
            and len(self._evaluations) > 0
            and self._evaluations[-1].round == last
        )

    def _saved_constants(self) -> dict[str, Tensor]:
        """What does not change within a phase: the same object in all of it."""
        if self._constants is None:
            self._constants = prefixed("model", setup_message(self.model))
            if self._pretrained is not None:
                self._constants |= prefixed("pretrained", self._pretrained.tensors())
        return self._constants

    def _header(self, mark: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The rest of a checkpoint, with metrics.jsonl as `mark` says, after `seconds` of work."""
        return {
            "config": self.config.model_dump(mode="json"),
            "dataset": self.dataset.digest,
            "started_from": self._started_from,
            "progress": {
                "total_bytes": self._total_bytes,
                "trained_clients": self._trained_clients,
                "training_seconds": self._training_seconds,
                "seconds": seconds,
                "evaluations": [asdict(metrics) for metrics in self._evaluations],
            },
            "metrics": mark,
        }

    def _restore(self, saved: Checkpoint) -> None:
        """Become the federation that was saved."""
        phase, self._started_from = self.phase, saved.header.get("started_from")
        self._begun = 0 if self._started_from is None else self._started_from["round"]
        self.rounds_done = saved.round
        if self.phase != phase or self._begun:  # whose schedules begin there
            self._begin_phase()
        saved.restore(self.model, self._parts())
        progress = saved.header["progress"]
        self._total_bytes = progress["total_bytes"]
        self._trained_clients = progress["trained_clients"]
        self._training_seconds = progress["training_seconds"]
        self._seconds = progress["seconds"]
        self._evaluations = [Metrics(**metrics) for metrics in progress["evaluations"]]
        self._mark = saved.header["metrics"]
        self._saved_rounds = saved.header["config"]["training"]["rounds"]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of the federation: the server's by their name in the model, the clients' as
        `clients.<name>` [U, ...], what new ones start from the same value of as `starts.<name>` [...], and
        then who no longer does as `clients_trained`, bool [U].
        """
        clients = {name: self._ranks.gather_rows(v) for name, v in self.store.rows(self._ranks.owned).items()}
        state = shared_state(self.model) | prefixed("clients", clients)
        state |= prefixed("starts", self.store.starts)
        if self.store.trained is not None:
            own = slice(self._ranks.owned.start, self._ranks.owned.stop)
            state[TRAINED] = self._ranks.gather_rows(self.store.trained[own])
        return state

    def _summary(self, seconds: float) -> Summary:
        config = self.config
        judge = VALID * (VALID in self._evaluators) + config.evaluation.selection_metric
        best = max(self._evaluations, key=lambda metrics: metrics[judge])
        return Summary(
            dataset=self.dataset.name,
            backbone=config.backbone.name,
            embedding=str(self._spec),
            engine=self._engine_name,
            seed=config.seed,
            rounds=self.rounds_done,
            warmup_rounds=min(self._warmup_rounds, self.rounds_done),
            metrics=dict(self._evaluations[-1].values),
            best_round=best.round,
            best_by=judge,
            best=dict(best.values),
            evaluations=[{"round": metrics.round, **metrics.values} for metrics in self._evaluations],
            bytes_down=self._traffic.down,
            bytes_up=self._traffic.up,
            bytes_setup=self._traffic.setup,
            total_bytes=self._total_bytes,
            trained_clients=self._trained_clients,
            training_seconds=self._training_seconds,
            seconds=seconds,
            privacy=None if self._ledger is None else self._ledger.report().as_dict(),
            faults=None if self._faults is None else dict(self._faults.counts),
            excluded_clients=self.dataset.num_users - len(self._eligible),
            dataset_digest=self.dataset.digest,
            started_from=self._started_from,
        )


ADJUSTABLE = ("training.rounds", "threads", "chunk_memory_mb", "checkpoint", "log", "dataset")
"""Settings, or sections, that a run may go on with other values of. `dataset` tells where the data are; that
they are the same is checked by their digest.
"""


def _resumed_config(folder: Path, saved: Checkpoint) -> Config:
    """The settings in the folder, checked against those that the run was saved with."""
    path = folder / CONFIG
    if not path.exists():
        return _saved_config(saved)
    config = load_config(path)
    check_resumable(config, saved, path)
    return config


def check_resumable(config: Config, saved: Checkpoint, source: Path | str) -> None:
    """Raise ValueError, which names the `source` of `config`, where a run that was saved cannot go on with
    these settings.
    """
    now, then = (flat(settings.model_dump(mode="json")) for settings in (config, _saved_config(saved)))
    for key in now.keys() | then.keys():
        adjustable = any(key == name or key.startswith(f"{name}.") for name in ADJUSTABLE)
        if now.get(key) != then.get(key) and not adjustable:
            raise ValueError(
                f"{source}: {key}: expected {then.get(key)!r}, with which the run in {saved.path} began, got "
                f"{now.get(key)!r}"
            )


def _saved_config(saved: Checkpoint) -> Config:
    try:
        return Config.from_dict(saved.header["config"])
    except ConfigError as error:
        raise ValueError(f"resume: {saved.path} has settings that are not known here: {error}") from None


def check_schedule(training: TrainingConfig, before: int) -> None:
    """Raise ValueError where other `rounds` than `before` would have given past rounds other rates."""
    for name in ("schedule", "server_schedule"):
        kind = getattr(training, name)
        if kind != "constant" and training.rounds != before:
            raise ValueError(
                f"training.rounds: expected {before}, over which training.{name} {kind} goes, got "
                f"{training.rounds}"
            )


def evaluators(
    config: Config, dataset: Dataset, interactions: Interactions, ranks: Ranks | None = None
) -> dict[str, Evaluator]:
    """Evaluators by the prefix of their metrics' names: of test items, and of validation items if there are
    any. The latter only choose between rounds and settings, so they are ranked among all items where the
    metric that chooses asks for it: it would take as long again as for test items.
    """
    settings = config.evaluation
    seed = settings.candidate_seed(config.seed)
    shared: dict[str, Any] = {"num_negatives": settings.num_negatives, "ks": settings.ks, "seed": seed}
    shared["ranks"] = ranks
    result = {"": Evaluator(dataset, interactions, full_ranking=settings.full_ranking, **shared)}
    if (dataset.valid_items >= 0).any():
        full = settings.selection_metric.startswith("full/")
        result[VALID] = Evaluator(dataset, interactions, full_ranking=full, target="valid", **shared)
    return result


def check_device(name: str) -> torch.device:
    """The device of a name. Raises ValueError where it is a GPU that this machine does not have."""
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"torch finds cuda:0 to cuda:{count - 1} only" if count else "torch finds no GPU"
            raise ValueError(f"device: expected one that this machine has, got {name!r} and {found}")
        if not _C.build_info()["cuda"]:
            raise ValueError(
                f"device: got {name!r}, and fedpeft_ext was built without CUDA kernels: build it with `pip "
                "install --no-build-isolation -C cmake.define.FEDPEFT_CUDA=ON .`, which says what is missing"
            )
    return device
