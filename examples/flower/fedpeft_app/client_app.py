"""The ClientApp, where `flwr run` looks for it."""

from fedpeft_ext.flower.client import app

__all__ = ["app"]
