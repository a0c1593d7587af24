"""`python -m fedpeft_ext.flower`: write the files that server and nodes start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft_ext.config import load_config
from fedpeft_ext.data import load_dataset
from fedpeft_ext.flower.files import prepare


def main(
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    config: Annotated[
        Path | None,
        typer.Option(help="settings, a YAML file or the name of tuned ones; their data set is split"),
    ] = None,
    nodes: Annotated[int, typer.Option(help="how many nodes share the users")] = 2,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Pre-train on the server, and write its file and one for the users of each node."""
    try:
        settings = load_config(config, set_ or ())
        dataset = load_dataset(settings.dataset.name, **settings.dataset.options)
        prepare(settings, dataset, folder, nodes)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{folder}: settings, the server's file and {nodes} nodes' files")


if __name__ == "__main__":
    typer.run(main)
