"""Callbacks of TRL: they work as with its own trainers, or are refused before the first step."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl import BEMACallback, LogCompletionsCallback, SyncRefModelCallback


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.bema_for_ref_model import BEMACallback as BEMAForReference

from .tiny import byte_tokenizer
from .training import assert_same_state, plain_model, text_data, tiny_trainer


SHORT = GenerationConfig(max_new_tokens=3, do_sample=False)


def prompts(count: int) -> Dataset:
    """Prompts with their completions."""
    return Dataset.from_dict(
        {"prompt": [f"{a} plus {a} is" for a in range(count)], "completion": [f" {2 * a} ." for a in range(count)]}
    )


def refused(trainer, message: str) -> None:
    """Training is refused before its first step."""
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_bema_of_a_second_run(tmp_path):
    """It would go on with the places of the first run's averages, and fail at its first update."""
    trainer = tiny_trainer(tmp_path, callbacks=[BEMACallback()], max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="averages of an earlier run"):
        trainer.train()
    trainer.remove_callback(BEMACallback)
    trainer.add_callback(BEMACallback())
    assert trainer.train().global_step == 1


def test_bema_of_a_reference(tmp_path):
    """The callback would miss the reference at step `ref_model_update_freq`."""
    bema = BEMAForReference(update_ref_model=True)
    refused(tiny_trainer(tmp_path, callbacks=[bema]), "update_ref_model=True.* set `sync_ref_model=True`")


def test_another_reference_to_move(tmp_path):
    """A model without heads would be moved in part, and then fail."""
    callback = SyncRefModelCallback(plain_model(), None)
    refused(tiny_trainer(tmp_path, callbacks=[callback]), "with its heads.*`sync_ref_model=True`")


def test_completions_are_logged(tmp_path):
    """With thoughts, as `generate` writes them, and without a change to the run."""
    options = dict(data=prompts(8), evaluation=prompts(2), max_steps=1)
    plain = tiny_trainer(tmp_path, tokenizer=byte_tokenizer(pad_token="<eos>"), **options)
    trainer = tiny_trainer(tmp_path, tokenizer=byte_tokenizer(pad_token="<eos>"), **options)
    callback = LogCompletionsCallback(trainer, SHORT, freq=1)
    trainer.add_callback(callback)
    plain.train(), trainer.train()
    assert_same_state(trainer.model, plain.model)
    ids = trainer.processing_class("1 plus 1 is", return_tensors="pt")
    with torch.no_grad():
        written = trainer.model.generate(**ids, generation_config=SHORT)[0, ids.input_ids.shape[1] :]
    expected = trainer.processing_class.decode(written, skip_special_tokens=True)
    assert callback.table[1] == ("1", "1 plus 1 is", expected)


@pytest.mark.parametrize(
    "evaluation, tokenizer, message",
    [
        (
            text_data(2),
            byte_tokenizer(pad_token="<eos>"),
            "the column `prompt` of one evaluation dataset, which has text, input_ids",
        ),
        ({"own": prompts(2)}, byte_tokenizer(pad_token="<eos>"), "which has no columns"),
        (prompts(2), byte_tokenizer(), "no padding token: set `tokenizer.pad_token"),
    ],
    ids=["text", "several", "no padding"],
)
def test_completions_that_would_fail(evaluation, tokenizer, message, tmp_path):
    """At the step of the first completions."""
    trainer = tiny_trainer(tmp_path, evaluation=evaluation, tokenizer=tokenizer)
    trainer.add_callback(LogCompletionsCallback(trainer, SHORT, freq=2))
    refused(trainer, message)
