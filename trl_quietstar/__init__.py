"""Quiet-STaR for TRL and Transformers: language models that learn to think from plain text."""

from .config import QuietStarConfig
from .heads import QuietStarSettings
from .modeling import QuietStarForCausalLM
from .trainer import QuietStarREINFORCETrainer


__all__ = ["QuietStarConfig", "QuietStarForCausalLM", "QuietStarREINFORCETrainer", "QuietStarSettings"]
