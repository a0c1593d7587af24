"""A federation of separate processes on this machine: a SuperLink, two SuperNodes with half of the users
each, and some rounds of training, all on 127.0.0.1. Before the last round the server and a node end, and
go on.

    python examples/flower_loopback.py [--rounds 3] [--set section.key=value ...]

It needs flwr (extra `flower`; `make test-flower` makes an environment with it). What it starts is what
docs/flower.md starts on machines of their own, but for the certificates.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft_ext.config import load_config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.flower import load_node, prepare
from fedpeft_ext.flower.files import node_file
from fedpeft_ext.simulation import load_server

APP = Path(__file__).with_name("flower")
BIN = Path(sys.executable).parent
SETTINGS = (
    "dataset.name=synthetic",
    "embedding.name=p-rq",
    "pretrain.features=random",
    "training.clients_per_round=0.2",
    "evaluation.every=1",
)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(name: str, arguments: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A program of Flower in the background; it and what it started are ended when the block is left."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(BIN / name), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            yield
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended on its own:\n{log.read_text()[-2000:]}")
        finally:
            for end in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, end)
                    process.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    continue
                except ProcessLookupError:
                    pass
                process.wait()


def wait_for(port: int, seconds: float = 120.0) -> None:
    """Until somebody listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nobody listened on 127.0.0.1:{port} after {seconds:.0f} s")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for the whole run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    config = load_config(None, [*SETTINGS, f"training.rounds={options.rounds}", *options.set])
    with tempfile.TemporaryDirectory(prefix="fedpeft-flower-") as folder:
        home, prepared, out = (Path(folder) / name for name in ("home", "prepared", "out"))
        prepare(config, load_dataset(config.dataset.name, **config.dataset.options), prepared, 2)
        train(home, prepared, out, options.rounds, options.timeout)
        print((out / "metrics.jsonl").read_text(), end="")
        # What a node can do for its own users, with a copy of the server's folder.
        run = load_node(out, node_file(prepared, 0), home / "state-0")
        user = next(name for name in run.dataset.user_ids if name)
        best = run.recommend(user, 5).items[0]
        print(f"for {user}, on node 0: {', '.join(run.dataset.item_ids[item] for item in best)}")
        # What any device can do with the server's folder, whether its user took part or not.
        server = load_server(out)
        mine = server.catalogue.item_ids[:3]
        best = server.with_new_users({"me": mine}).recommend("me", 5).items[0]
        names = [server.catalogue.item_ids[item] for item in best]
        print(f"for somebody new with {', '.join(mine)}: {', '.join(names)}")


def train(home: Path, prepared: Path, out: Path, rounds: int, timeout: float) -> None:
    """Start everything, run the app to its end, in two parts, stop everything."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "{address}"\ninsecure = true\n')
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
    }

    def node(number: int) -> list[str]:
        config = f'data="{node_file(prepared, number)}" state="{home}/state-{number}"'
        return [
            *("--insecure", "--superlink", address, "--port", str(free_port())),
            *("--node-config", config),
        ]

    link = ["--insecure", "--port", str(port), "--disable-runtime-dependency-installation"]
    with running("flower-superlink", link, home / "superlink.log", environment):
        wait_for(port)
        with running("flower-supernode", node(1), home / "node-1.log", environment):
            for last in sorted({max(1, rounds - 1), rounds}):
                with running("flower-supernode", node(0), home / "node-0.log", environment):
                    config = f'prepared="{prepared}" out="{out}" min-nodes=2 rounds={last}'
                    run(home, config, environment, timeout)
                if not (out / "summary.json").is_file():  # `flwr run` does not tell by its exit status
                    logs = ("run.log", "superlink.log", "node-0.log", "node-1.log")
                    raise RuntimeError("\n".join((home / name).read_text()[-3000:] for name in logs))


def run(home: Path, config: str, environment: dict[str, str], timeout: float) -> None:
    """`flwr run` until it ends."""
    command = [str(BIN / "flwr"), "run", str(APP), "loopback", "--run-config", config, "--stream"]
    with (home / "run.log").open("a") as output:
        subprocess.run(command, env=environment, check=True, timeout=timeout, stdout=output, stderr=output)


if __name__ == "__main__":
    main()
