"""A run's rounds and evaluations as events that TensorBoard shows."""

from __future__ import annotations

import math
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
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "log.tensorboard: expected tensorboardX: pip install 'fedpeft_ext[tensorboard]'"
            ) from error
        self._open: Any = lambda first: SummaryWriter(str(folder), purge_step=first)
        self._writer: Any = None

    def on_start(self, simulator: Simulator) -> None:
        """Begin a file of events."""
        self._writer = self._open(simulator.rounds_done + 1 if simulator.rounds_done else None)

    def on_round(self, info: RoundInfo) -> None:
        """Loss and speed."""
        if math.isfinite(info.loss):
            self._writer.add_scalar("train/loss", info.loss, info.round)
        self._writer.add_scalar("train/clients_per_second", info.clients_per_second, info.round)

    def on_evaluate(self, metrics: Metrics) -> None:
        """Every metric."""
        for name, value in metrics.values.items():
            self._writer.add_scalar(f"evaluation/{name}", value, metrics.round)
        self._writer.flush()

    def on_end(self, summary: Summary) -> None:
        """Close the file."""
        self._writer.close()
