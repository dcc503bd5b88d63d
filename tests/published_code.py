"""Runs the published Quiet-STaR code itself, beside ours.

    git clone https://github.com/ezelikman/quiet-star ../quiet-star
    QUIET_STAR_CODE=../quiet-star python -m pytest tests/test_convert.py -k published_code

The code is a patch of two files of Transformers 4.37. What they import from there, and this Transformers no longer has, stands
here; what they only draw and report with is left out. No line of theirs is changed.
"""

import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import activations, modeling_outputs
from transformers.utils import logging

from .tiny import exact


FOLDER = os.environ.get("QUIET_STAR_CODE")
ROOT = "quiet_star_transformers"  # the package that the two files are put in
PLOTTING = ("pandas", "seaborn", "matplotlib", "matplotlib.pyplot", "matplotlib.colors", "wandb", "termcolor")
PLOTTING += ("reportlab", "reportlab.pdfgen", "reportlab.lib", "reportlab.lib.pagesizes", "reportlab.lib.colors")


OUTPUTS = ("BaseModelOutputWithPast", "CausalLMOutputWithPast", "SequenceClassifierOutputWithPast")


class Config:
    """As `PretrainedConfig`: attributes."""

    def __init__(self, **kwargs):
        defaults = dict(output_attentions=False, output_hidden_states=False, use_return_dict=True)
        vars(self).update({**defaults, "_attn_implementation": "sdpa", **kwargs})


class Model(nn.Module):
    """As `PreTrainedModel`: a module with a configuration."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        """Weights are loaded."""


class Cache:
    """Keys and values of each layer."""

    def __init__(self):
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def from_legacy_cache(cls, layers) -> "Cache":
        cache = cls()
        cache.layers = list(layers or [])
        return cache

    def to_legacy_cache(self):
        return tuple(self.layers)

    def get_usable_length(self, new_length: int, layer: int = 0) -> int:
        return self.layers[layer][0].shape[-2] if len(self.layers) > layer else 0

    def update(self, keys, values, layer: int, kwargs=None):
        if len(self.layers) > layer:
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(self.layers[layer], (keys, values), strict=True))
            self.layers[layer] = (keys, values)
        else:
            self.layers.append((keys, values))
        return keys, values


def causal_mask(mask, shape, embeds, past_length, sliding_window=None):
    """0 where a token may be seen and the least number elsewhere, for rows without padding; of shape `(B, 1, T, T)`."""
    assert past_length == 0 and bool(mask.all()) and sliding_window is None
    B, T = shape
    least = torch.finfo(embeds.dtype).min
    return torch.full((T, T), least, dtype=embeds.dtype).triu(1).expand(B, 1, T, T).clone()


def _module(name: str, **names) -> types.ModuleType:
    module = types.ModuleType(f"{ROOT}.{name}" if name else ROOT)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(names)
    return module


def _unchanged(*args, **kwargs) -> Callable:
    return lambda function: function


@contextmanager
def _surroundings() -> Iterator[None]:
    """The modules that the code imports."""
    flash = dict(is_flash_attn_2_available=lambda: False, is_flash_attn_greater_or_equal_2_10=lambda: False)
    decorators = ("add_start_docstrings", "add_start_docstrings_to_model_forward", "replace_return_docstrings")
    masks = dict.fromkeys(
        ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa"), causal_mask
    )
    modules = [
        _module(""),
        _module("models"),
        _module("models.mistral"),
        _module("activations", ACT2FN=activations.ACT2FN),
        _module("cache_utils", Cache=Cache, DynamicCache=Cache),
        _module("modeling_attn_mask_utils", **masks),
        _module("modeling_outputs", **{name: getattr(modeling_outputs, name) for name in OUTPUTS}),
        _module("modeling_utils", PreTrainedModel=Model),
        _module("configuration_utils", PretrainedConfig=Config),
        _module("utils", logging=logging, **flash, **dict.fromkeys(decorators, _unchanged)),
    ]
    absent = {name: MagicMock() for name in PLOTTING}
    with patch.dict(sys.modules, {**absent, **{module.__name__: module for module in modules}}):
        yield


def load_code() -> types.ModuleType:
    """The module `modeling_mistral` of the code, whose sampling and losses [`Recorder`] writes down."""
    with _surroundings():
        for name in ("configuration_mistral", "modeling_mistral"):
            full = f"{ROOT}.models.mistral.{name}"
            spec = importlib.util.spec_from_file_location(full, Path(str(FOLDER), f"{name}.py"))
            module = importlib.util.module_from_spec(spec)
            sys.modules[full] = module
            spec.loader.exec_module(module)
    return module


class Recorder:
    """`torch.nn.functional`, which notes the tokens that are sampled."""

    def __init__(self):
        self.drawn: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return getattr(torch.nn.functional, name)

    def gumbel_softmax(self, logits, **options):
        hard = torch.nn.functional.gumbel_softmax(logits, **options)
        self.drawn.append(hard.argmax(-1))
        return hard


class Run(NamedTuple):
    """
    What the code computed of texts of shape `(B, T)`.

    Parameters:
        thoughts (`torch.Tensor` of shape `(B, T, G, L)`):
            The tokens that it sampled after each token.
        logits (`torch.Tensor` of shape `(B · G, T, V)`):
            Of the last token of the talk.
        loss (`float`), reward (`float`), gradients (`dict`):
            Of training; the reward is the mean over thoughts of the sum over the talk.
    """

    thoughts: torch.Tensor
    logits: torch.Tensor
    loss: float = 0.0
    reward: float = 0.0
    gradients: dict[str, torch.Tensor] = {}


def run_code(checkpoint: Path, ids: torch.Tensor, n_ahead: int, training: dict | None = None) -> Run:
    """
    Runs the code on a checkpoint in safetensors, in float64.

    Args:
        checkpoint (`Path`):
            Its folder.
        ids (`torch.Tensor` of shape `(B, T)`):
            Texts without padding.
        n_ahead (`int`):
            The tokens of a thought and 3.
        training (`dict`, *optional*):
            Attributes of the model to set; then it runs in training, with labels and backward. Without them it runs as in
            evaluation.
    """
    code = load_code()
    code.F = recorder = Recorder()
    config = code.MistralConfig(**json.loads((checkpoint / "config.json").read_text()))
    model = exact(code.MistralForCausalLM(config).double())
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    tokenizer = SimpleNamespace(pad_token_id=config.eos_token_id, vocab_size=config.vocab_size - 2)
    start = config.vocab_size - 2
    # trained start, end and mixing head stay as they are only where the code believes to have set them already
    attributes = dict(tokenizer=tokenizer, start_token_id=start, end_token_id=start + 1, rm_initialized=True)
    attributes |= dict(n_ahead=n_ahead, kill_after=None, gumbel_temperature=1, **(training or {}))
    for name, value in attributes.items():
        setattr(model, name, value)
    model.train(training is not None)
    labels = None if training is None else ids.clone()
    with torch.set_grad_enabled(training is not None):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    (B, T), steps = ids.shape, recorder.drawn
    thoughts = torch.stack(steps, -1).view(B, -1, T, len(steps)).transpose(1, 2)
    if training is None:
        return Run(thoughts, output.logits)
    output.loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return Run(thoughts, output.logits, float(output.loss.detach()), float(model.log_dict["policy_reward"]), gradients)
