"""The ServerApp, where `flwr run` looks for it."""

from fedpeft_ext.flower.server import app

__all__ = ["app"]
