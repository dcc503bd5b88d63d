"""Quiet-STaR for TRL and Transformers: language models that learn to think from plain text."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import QuietStarConfig
    from .modeling import QuietStarForCausalLM
    from .settings import QuietStarSettings
    from .trainer import QuietStarREINFORCETrainer

__version__ = "0.1.0"

__all__ = ["QuietStarConfig", "QuietStarForCausalLM", "QuietStarREINFORCETrainer", "QuietStarSettings"]

MODULES = {
    "QuietStarConfig": "config",
    "QuietStarForCausalLM": "modeling",
    "QuietStarREINFORCETrainer": "trainer",
    "QuietStarSettings": "settings",
}


def __getattr__(name: str):
    """Imports a class when it is asked for, since the command line has settings to make before PyTorch is imported."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)
