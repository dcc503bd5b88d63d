"""What serves an exported model: `transformers serve`, asked by an OpenAI client; and what vLLM would load of a folder."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.cli import main

from .loaders import loaded_by_pattern
from .servers import served
from .speaking import PLAIN, ended_thoughts, exportable_model
from .tiny import byte_tokenizer, tiny_config


# asked for by a turn
ASKED = dict(thought_prompt="0 plus 4", thought_prompt_role="system")
SETTINGS = dict(**PLAIN, **ASKED, thought_start_text=" plus", thought_end_text="1")
CHATML = (
    "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
TOKENIZER = byte_tokenizer(chat_template=CHATML)


def thinking(folder, thought_format: str) -> QuietStarForCausalLM:
    """A model that thinks, and its tokenizer, in a folder."""
    settings = QuietStarSettings(**SETTINGS, thought_format=thought_format)
    exportable_model(settings=settings).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return QuietStarForCausalLM.from_pretrained(folder).eval()


def answers(model, end: str) -> list[tuple[list[dict], str, int]]:
    """Messages, what the model thinks and answers, and in how many tokens; of three prompts at which the thought ends by itself."""
    asked = [[{"role": "user", "content": f"{a} plus 4"}] for a in range(60)]
    return [
        (
            said.prompt,
            TOKENIZER.decode(said.thought) + end + TOKENIZER.decode(said.answer),
            len(said.thought) + bool(end) + len(said.answer),
        )
        for said in ended_thoughts(model, asked, 3, TOKENIZER)
    ]


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'")
def test_transformers_serve_answers_as_ours(tmp_path):
    """It gives the greedy thoughts and answers of `generate`, of learned embeddings and of text, asked for by a turn."""
    from openai import OpenAI

    expected = {}
    for thought_format, end in (("embeddings", "</think>"), ("text", "")):
        source, output = tmp_path / f"thinking-{thought_format}", tmp_path / thought_format
        expected[str(output)] = answers(thinking(source, thought_format), end)
        assert main(["export", str(source), str(output)]) == 0
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    with served([*command, "--device", "cpu"], tmp_path / "log.txt") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        for model, asked in expected.items():
            for messages, said, length in asked:
                options = dict(temperature=0, max_tokens=length)
                choice = client.chat.completions.create(model=model, messages=messages, **options).choices[0]
                assert choice.message.content == said


@pytest.mark.parametrize("thought_format", ["embeddings", "text"])
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_finds_the_weights_and_nothing_else(tied, thought_format, tmp_path):
    """By its loader's rule, of the saved and of the exported folder: each weight of the plain model, by its own name; a tied LM head
    may be left out. The configuration is the family's, with as many tokens as the embedding has rows."""
    config = tiny_config("llama", vocab_size=len(TOKENIZER), tie_word_embeddings=tied)
    QuietStarForCausalLM.from_config(
        config, QuietStarSettings(**SETTINGS, thought_format=thought_format)
    ).save_pretrained(tmp_path / "saved")
    TOKENIZER.save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "saved" / "quietstar.safetensors").is_file()
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        found, plain = loaded_by_pattern(folder), AutoModelForCausalLM.from_pretrained(folder)
        weights = plain.state_dict()
        assert set(found) == set(weights) - ({"lm_head.weight"} if tied else set())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
        assert len(found["model.embed_tokens.weight"]) == plain.config.vocab_size
        own = json.loads((folder / "config.json").read_text())
        assert own["architectures"] == ["LlamaForCausalLM"] and own["tie_word_embeddings"] is tied
        assert not list(folder.glob("consolidated*.safetensors"))  # which it would take instead
