"""Tokenizers of every kind that open models use: thoughts are sampled, ended by a string, shown and trained."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.thinking.drawing import thought_end

from .tiny import randomize, sums, tiny_config
from .tokenizers import KINDS
from .training import text_data, tiny_trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_trains_and_comes_back(kind, tmp_path):
    """Thoughts end at a string of its own pieces, the table shows them as text, and the saved model brings it along."""
    tokenizer = KINDS[kind](tmp_path)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer) + 3))
    randomize(model)
    trainer = tiny_trainer(
        tmp_path / "out",
        model=model,
        tokenizer=tokenizer,
        evaluation=text_data(8, 100),
        thought_length=6,
        min_thought_length=1,
        thought_stop_string="1",
    )
    trainer.train()
    expected = trainer.evaluate()
    columns = trainer.sampled_thoughts()
    assert any(text in "".join(sums()) for text in columns["next"] if text.strip())
    trainer.save_model()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(sums()[17])["input_ids"] == tokenizer(sums()[17])["input_ids"]
    found = tiny_trainer(
        tmp_path / "again",
        model=QuietStarForCausalLM.from_pretrained(tmp_path / "out"),
        tokenizer=again,
        evaluation=text_data(8, 100),
        thought_length=6,
        min_thought_length=1,
        thought_stop_string="1",
    ).evaluate()
    assert found["eval_nll_with"] == pytest.approx(expected["eval_nll_with"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thought_ends_at_the_token_that_completes_the_string(kind, tmp_path):
    """Whatever pieces the string is made of."""
    tokenizer = KINDS[kind](tmp_path)
    ids = tokenizer("2 plus 6 is 8 .", add_special_tokens=False)["input_ids"]
    ends = thought_end(tokenizer, "us")
    ended = [bool(ends(torch.tensor([ids[:length]]))) for length in range(1, len(ids) + 1)]
    assert ended.count(True) == 1
    upto = tokenizer.decode(ids[: ended.index(True) + 1])
    assert "us" in upto and "6" not in upto


def test_a_stop_string_needs_a_tokenizer_that_decodes():
    """One that drops what it does not know cannot look for strings, and is refused by name."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="thought_stop_string.*'b'.*min_thought_length"):
        thought_end(PreTrainedTokenizerFast(tokenizer_object=backend), "b")
