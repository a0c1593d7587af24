"""Tuned settings that come with the package: a YAML file each, taken by name."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Names of the tuned settings, as `config.load_config` takes them."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))
