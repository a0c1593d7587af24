"""The simulator: clients in batches, local training, aggregation, bytes and ranking metrics; `Simulator` ties
them.
"""

from fedpeft_ext.simulation.aggregation import Aggregator
from fedpeft_ext.simulation.callbacks import Callback, Metrics, RoundInfo
from fedpeft_ext.simulation.communication import Traffic, traffic
from fedpeft_ext.simulation.distributed import RankError
from fedpeft_ext.simulation.evaluation import Evaluator, rank_counts, ranking_metrics
from fedpeft_ext.simulation.local_training import ClientError
from fedpeft_ext.simulation.privacy import PrivacyReport
from fedpeft_ext.simulation.serving import (
    ClientModel,
    RankedItems,
    TrainedRun,
    TrainedServer,
    UserMetrics,
    load_run,
    load_server,
    popularity_run,
)
from fedpeft_ext.simulation.simulator import Interrupted, Simulator, Summary

__all__ = [
    "Aggregator",
    "Callback",
    "ClientError",
    "ClientModel",
    "Evaluator",
    "Interrupted",
    "Metrics",
    "PrivacyReport",
    "RankError",
    "RankedItems",
    "RoundInfo",
    "Simulator",
    "Summary",
    "Traffic",
    "TrainedRun",
    "TrainedServer",
    "UserMetrics",
    "load_run",
    "load_server",
    "popularity_run",
    "rank_counts",
    "ranking_metrics",
    "traffic",
]
