"""A run's rounds and evaluations as events that TensorBoard shows."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft_ext.simulation.callbacks import Callback, Metrics, RoundInfo

if TYPE_CHECKING:
    from fedpeft_ext.simulation.simulator import Simulator, Summary


class TensorBoard(Callback):
    """Writes `train/...` after every round and `evaluation/...` after every evaluation.

    Args:
        folder: for the event files; a resumed run hides what an interrupted one wrote beyond its checkpoint.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # The classes below SummaryWriter, whose thread may still hold events after its `flush`.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary as Values
        except ImportError as error:
            raise ImportError(
                "log.tensorboard: expected tensorboardX: pip install 'fedpeft_ext[tensorboard]'"
            ) from error
        self._make_writer, self._event, self._session, self._values = EventsWriter, Event, SessionLog, Values
        self._folder = folder
        self._writer: Any = None

    def on_start(self, simulator: Simulator) -> None:
        """Begin a file of events."""
        self._folder.mkdir(exist_ok=True)
        done = simulator.rounds_done
        # Files are named by the second, in which a run may have ended and be resumed.
        suffix = f".after-{done}-{os.getpid()}"
        self._writer = self._make_writer(str(self._folder / "events"), suffix)
        if done:  # events of later rounds are void
            started = self._session(status=self._session.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=done + 1, session_log=started))

    def on_round(self, info: RoundInfo) -> None:
        """Loss and speed."""
        if math.isfinite(info.loss):
            self._add("train/loss", info.loss, info.round)
        self._add("train/clients_per_second", info.clients_per_second, info.round)

    def on_evaluate(self, metrics: Metrics) -> None:
        """Every metric."""
        for name, value in metrics.values.items():
            self._add(f"evaluation/{name}", value, metrics.round)
        self._writer.flush()

    def on_save(self) -> None:
        """Bring events to disk, since a resumed run does not repeat them."""
        self._writer.flush()

    def on_end(self, summary: Summary) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, name: str, value: float, round: int) -> None:
        values = self._values(value=[self._values.Value(tag=name, simple_value=value)])
        self._writer.write_event(self._event(wall_time=time.time(), step=round, summary=values))
