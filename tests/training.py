"""Trainers that take a second: a tiny model, a few short texts, two or three steps."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer

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
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
OWN = ("peft_config", "callbacks", "optimizers", "quantization_config", "reward_function")


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
