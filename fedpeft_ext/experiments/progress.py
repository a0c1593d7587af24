"""Progress of runs: a bar for each on a terminal, plain lines elsewhere (logs, CI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedpeft_ext.simulation import Callback, Metrics, RoundInfo
from fedpeft_ext.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from fedpeft_ext.simulation import Simulator, Summary

_WIDE = 70
"""Columns of a terminal from which on a bar has all that there is to tell."""


def progress_display(console: Console) -> Progress:
    """The display that `ProgressBar`s draw into; a context manager. A narrow terminal gets less."""
    if console.width < _WIDE:
        return Progress(
            TextColumn("[bold]{task.description}"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metric]}"),
            console=console,
        )
    return Progress(
        TextColumn("[bold]{task.description}"),
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[speed]} clients/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        expand=True,
    )


class _Watcher(Callback):
    """Keeps what both kinds of progress show."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._clients = 0
        self._seconds = 0.0

    def _count(self, info: RoundInfo) -> str:
        """Clients trained in a second so far."""
        self._clients += info.clients
        self._seconds += info.seconds
        return f"{self._clients / self._seconds:,.0f}" if self._seconds > 0.0 else "-"


class ProgressBar(_Watcher):
    """One bar: round, loss, `metric` so far, clients/s, time left.

    Args:
        display: of `progress_display`, started.
        metric: name of a metric, such as 'HR@10'.
    """

    def __init__(self, display: Progress, metric: str) -> None:
        super().__init__(metric)
        self._display = display
        self._task: TaskID | None = None

    def on_start(self, simulator: Simulator) -> None:
        """Begin the bar."""
        self._task = self._display.add_task(
            simulator.config.embedding.name,
            total=simulator.config.training.rounds,
            completed=simulator.rounds_done,
            loss="-",
            metric=f"{self._metric} -",
            speed="-",
        )

    def on_round(self, info: RoundInfo) -> None:
        """Move on by a round."""
        self._update(advance=1, loss=f"{info.loss:.3f}", speed=self._count(info))

    def on_evaluate(self, metrics: Metrics) -> None:
        """Show the newest metric."""
        self._update(metric=f"{self._metric} {metrics[self._metric]:.3f}")

    def _update(self, advance: float | None = None, **fields: str) -> None:
        if self._task is None:
            raise RuntimeError("on_start: expected before any round or evaluation")
        self._display.update(self._task, advance=advance, **fields)  # type: ignore[arg-type]


class ProgressLines(_Watcher):
    """Lines of text: one at the end of the run, and one at every evaluation where asked.

    Args:
        console: where to print.
        metric: name of a metric, such as 'HR@10'.
        evaluations: whether every evaluation is told.
    """

    def __init__(self, console: Console, metric: str, *, evaluations: bool) -> None:
        super().__init__(metric)
        self._console = console
        self._evaluations = evaluations
        self._line = ""

    def on_start(self, simulator: Simulator) -> None:
        """Tell where a run goes on that was trained before; with evaluations, those tell their rounds."""
        if not simulator.rounds_done:
            return
        config = simulator.config
        self._line = f"round {simulator.rounds_done}/{config.training.rounds}"
        if not self._evaluations:
            self._print(
                f"{config.embedding.name}: going on after round {simulator.rounds_done} of "
                f"{config.training.rounds}"
            )

    def on_round(self, info: RoundInfo) -> None:
        """Remember the round for the next evaluation."""
        self._line = f"round {info.round}/{info.rounds}  loss {info.loss:.4f}  {self._count(info)} clients/s"

    def on_evaluate(self, metrics: Metrics) -> None:
        """Tell the round and its metric."""
        if self._evaluations:
            self._print(f"{self._line or 'untrained'}  {self._metric} {metrics[self._metric]:.4f}")

    def on_end(self, summary: Summary) -> None:
        """Tell the result."""
        if not self._evaluations:
            value = summary.metrics[self._metric]
            self._print(
                f"{summary.embedding}: {self._metric} {value:.4f} after {counted(summary.rounds, 'round')}, "
                f"{summary.seconds:.1f} s, {summary.clients_per_second:,.0f} clients/s"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
