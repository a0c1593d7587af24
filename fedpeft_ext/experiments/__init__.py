"""Experiments over the simulator: `compare` embeddings, as tables and pictures."""

from fedpeft_ext.experiments.compare import Comparison, compare
from fedpeft_ext.experiments.plots import plot_accuracy_against_bytes, plot_learning_curves
from fedpeft_ext.experiments.results import RunResult
from fedpeft_ext.experiments.tables import csv_table, markdown_table, summary_table, terminal_table

__all__ = [
    "Comparison",
    "RunResult",
    "compare",
    "csv_table",
    "markdown_table",
    "plot_accuracy_against_bytes",
    "plot_learning_curves",
    "summary_table",
    "terminal_table",
]
