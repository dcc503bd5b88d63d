"""Trainers that take a second: a tiny model, a few short texts, two or three steps."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.model.adapters import base_of

from .tiny import byte_tokenizer, randomize, sums, tiny_config


DEFAULTS = dict(
    per_device_train_batch_size=4,
    max_steps=3,
    logging_steps=1,
    learning_rate=1e-3,
    heads_learning_rate=1e-2,
    thought_length=3,
    talk_length=2,
    thought_positions=3,
    value_head_hidden_size=16,
    gradient_checkpointing=False,
    preflight_thoughts=None,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
OWN = ("peft_config", "callbacks", "optimizers", "quantization_config", "reward_functions")
EVAL_METRICS = (
    *("reward", "nll_with", "nll_without", "accuracy_with", "accuracy_without", "coherence"),
    *("exact_match_with", "exact_match_without", "useful_thoughts"),
)
LORA = dict(r=4, target_modules="all-linear")
# metrics that no two runs share
CLOCK = ("rl/tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def tiny_args(folder: Path, **changes) -> QuietStarConfig:
    """Short thoughts, few positions, on the CPU."""
    return QuietStarConfig(str(folder), **{**DEFAULTS, **changes})


def plain_model(name: str = "llama", **changes) -> PreTrainedModel:
    """A causal LM over the tokenizer's vocabulary, as a user brings it: peaked, without heads."""
    model = AutoModelForCausalLM.from_config(tiny_config(name, vocab_size=len(byte_tokenizer()), **changes))
    randomize(model)
    return model.to(torch.float32)


def saved_model(folder: Path, name: str = "llama", **changes) -> str:
    """A checkpoint of a plain causal LM with its tokenizer; returns its path."""
    plain_model(name, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def text_data(count: int = 64, first: int = 0) -> Dataset:
    """Texts of the corpus."""
    return Dataset.from_dict({"text": sums()[first : first + count]})


def tiny_trainer(folder: Path, model=None, data=None, evaluation=None, tokenizer=None, **options):
    """A trainer; `options` are those of the configuration, and `peft_config`, `callbacks` and the like."""
    own = {name: options.pop(name) for name in OWN if name in options}
    return QuietStarREINFORCETrainer(
        model=plain_model() if model is None else model,
        args=tiny_args(folder, **options),
        train_dataset=text_data() if data is None else data,
        eval_dataset=evaluation,
        processing_class=byte_tokenizer() if tokenizer is None and not isinstance(model, str) else tokenizer,
        **own,
    )


def logged(trainer, marker: str = "rl/reward") -> list[dict]:
    """The entries of the log history that hold a metric."""
    return [entry for entry in trainer.state.log_history if marker in entry]


def state_of(model) -> dict[str, torch.Tensor]:
    """All weights, heads and adapter included."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(ours, oracle) -> None:
    """Two models have the same weights, bit for bit."""
    ours, oracle = state_of(ours), state_of(oracle)
    assert ours.keys() == oracle.keys()
    assert not [name for name, value in oracle.items() if not torch.equal(ours[name], value)]


def log_of(trainer, after: int = 0) -> list[dict]:
    """The log of the steps after one, without the clock and the whole run's summary."""
    entries = [e for e in trainer.state.log_history if e["step"] > after and "train_runtime" not in e]
    return [{name: value for name, value in entry.items() if name not in CLOCK} for entry in entries]


class States(TrainerCallback):
    """Weights, optimizer state and learning rate after each optimizer step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        self.states.append([*(p.detach().clone() for p in model.parameters()), *moments])

    def unchanged(self, step: int) -> bool:
        """Whether an optimizer step left all as it was."""
        before, after = self.states[step - 2], self.states[step - 1]
        return len(before) == len(after) and all(map(torch.equal, before, after))


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def finite(value) -> bool:
    """Whether something is a number, and none that means a fault."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def assert_same_logs(ours, oracle, rel: float = 0.0) -> None:
    """The same training metrics, but for the clock."""
    ours, oracle = logged(ours), logged(oracle)
    assert len(ours) == len(oracle) > 0
    for mine, theirs in zip(ours, oracle, strict=True):
        for name, value in theirs.items():
            if value is not None and name != "rl/tokens_per_second":
                assert mine[name] == pytest.approx(value, rel=rel, abs=rel), name


class Recorder(TrainerCallback):
    """Learning rates in force at each optimizer step, and which trainable parameters have no gradient."""

    def __init__(self):
        self.rates, self.without = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        heads = {id(p) for p in base_of(model).quietstar.parameters()}
        groups = optimizer.param_groups
        own = {g["lr"] for g in groups for p in g["params"] if id(p) in heads}
        others = {g["lr"] for g in groups for p in g["params"] if id(p) not in heads}
        assert len(own) == len(others) == 1
        self.rates.append((others.pop(), own.pop()))
        self.without += [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
