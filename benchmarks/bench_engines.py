"""How many clients a second each engine trains: the training part of rounds, evaluation and preparation left
out.

    python -m benchmarks.bench_engines                                  # ML-100K, 94 clients a round, FedMF
    python -m benchmarks.bench_engines --embeddings p-lora,p-rq --threads 1 --json results.json
    python -m benchmarks.bench_engines --dataset synthetic --option num_users=20000 --set device=cuda

`make bench` runs the default settings under pytest-benchmark, a round a sample. As a script, each strategy
trains `--rounds` rounds after a few to warm up; the figure is clients / time, from the median round. Full
embeddings and codes are drawn at random, since speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks.machine import machine
from fedpeft_ext.config import Config
from fedpeft_ext.data import Dataset, load_dataset
from fedpeft_ext.pretrain import Pretrained
from fedpeft_ext.simulation import Simulator

EMBEDDINGS = "full,p-lora,p-hash,p-hash+senet,p-rq,p-rq+lora"


def random_pretrained(dataset: Dataset, config: Config) -> Pretrained:
    """Full embeddings and codes of the right shape."""
    generator = torch.Generator().manual_seed(0)
    size, levels = config.embedding.codebook_size, config.embedding.levels
    return Pretrained(
        full=0.1 * torch.randn(dataset.num_items, config.backbone.dim, generator=generator),
        codes=torch.randint(size, (dataset.num_items, levels), generator=generator),
        codebooks=None,
    )


def measure(config: Config, dataset: Dataset, warmup: int) -> dict[str, Any]:
    """Clients a second of one configuration."""
    simulator = Simulator(config, dataset, pretrained=random_pretrained(dataset, config))
    rounds = [simulator.round() for _ in range(warmup + config.training.rounds)][warmup:]
    seconds = np.array([info.seconds for info in rounds])
    return {
        "embedding": config.embedding.name,
        "engine": simulator.engine,
        "device": config.device,
        "clients_per_round": rounds[0].clients,
        "clients_per_second": float(rounds[0].clients / np.median(seconds)),
        "slowest_decile": float(rounds[0].clients / np.quantile(seconds, 0.9)),
        "bytes_up": rounds[0].bytes_up,
    }


@pytest.mark.parametrize("embedding", EMBEDDINGS.split(","))
def test_training(benchmark: Any, embedding: str) -> None:
    """Rounds of the batched engine; clients a second are in extra_info."""
    try:
        dataset = load_dataset("ml-100k")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = Config().updated([f"embedding.name={embedding}", "engine=batched"])
    simulator = Simulator(config, dataset, pretrained=random_pretrained(dataset, config))
    info = benchmark.pedantic(simulator.round, rounds=20, warmup_rounds=3)
    benchmark.extra_info["clients_per_second"] = info.clients / benchmark.stats.stats.median


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the data set")
    parser.add_argument("--embeddings", default=EMBEDDINGS, help="names, separated by commas")
    parser.add_argument("--engines", default="batched", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the clock starts")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dataset = load_dataset(
        options.dataset,
        **{key: yaml.safe_load(value) for key, value in (o.split("=", 1) for o in options.option)},
    )

    print(f"{dataset.name}, {machine()}, {torch.get_num_threads()} threads")
    print(f"{'embedding':<16}{'engine':<12}{'clients':>8}{'clients/s':>12}{'slow 10%':>12}{'KB up':>10}")
    results = []
    for engine in options.engines.split(","):
        for name in options.embeddings.split(","):
            config = Config().updated(
                [
                    f"embedding.name={name}",
                    f"engine={engine}",
                    f"training.rounds={options.rounds}",
                    *options.set,
                ]
            )
            result = measure(config, dataset, options.warmup)
            results.append(result)
            print(
                f"{name:<16}{engine:<12}{result['clients_per_round']:>8}{result['clients_per_second']:>12.0f}"
                f"{result['slowest_decile']:>12.0f}{result['bytes_up'] / 1000:>10.1f}"
            )
    if options.json is not None:
        record = {"machine": machine(), "dataset": dataset.name, "results": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
