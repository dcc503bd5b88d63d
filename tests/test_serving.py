"""What serves an exported model: `transformers serve`, asked by an OpenAI client; and what vLLM would load of a folder."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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


if TYPE_CHECKING:
    import openai

# asked for by a turn
ASKED = dict(thought_prompt="0 plus 4", thought_prompt_role="system")
SETTINGS = dict(**PLAIN, **ASKED, thought_start_text=" plus", thought_end_text="1")
CHATML = (
    "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
TOKENIZER = byte_tokenizer(chat_template=CHATML)
UNENDED = "\N{REPLACEMENT CHARACTER}"  # as which a tokenizer writes the bytes of a part of a character


def thinking(folder, thought_format: str) -> QuietStarForCausalLM:
    """A model that thinks, and its tokenizer, in a folder."""
    settings = QuietStarSettings(**SETTINGS, thought_format=thought_format)
    exportable_model(settings=settings).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return QuietStarForCausalLM.from_pretrained(folder).eval()


def answers(model, end: str) -> list[tuple[list[dict], str, str, int]]:
    """Messages, what the model thinks and answers, and in how many tokens; of three prompts at which the thought ends by itself. A thought
    of text has its end in its last token, and is without it here."""
    asked = [[{"role": "user", "content": f"{a} plus 4"}] for a in range(60)]
    found = []
    for said in ended_thoughts(model, asked, 3, TOKENIZER):
        thought, answer, length = TOKENIZER.decode(said.thought), TOKENIZER.decode(said.answer), len(said.answer)
        if not end:
            thought, _, rest = thought.partition("1")
            answer = rest + answer
        found.append((said.prompt, thought, answer, len(said.thought) + bool(end) + length))
    return found


@contextmanager
def serving(folder, *flags: str) -> Iterator["openai.OpenAI"]:
    """A client of `transformers serve`."""
    import openai

    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", *flags]
    with served([*command, "--device", "cpu"], folder / "log.txt") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)


def streamed(client, **request) -> tuple[str, str, "openai.types.CompletionUsage"]:
    """Thought, answer and usage, as they come; the bytes of a last character that has not ended never do."""
    thought, answer, usage = "", "", None
    for chunk in client.chat.completions.create(stream=True, **request):
        delta, usage = chunk.choices[0].delta, chunk.usage or usage
        thought += getattr(delta, "reasoning_content", None) or ""
        answer += delta.content or ""
    return thought, answer, usage


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'")
def test_transformers_serve_answers_as_ours(tmp_path):
    """It gives the greedy thoughts and answers of `generate`, of learned embeddings and of text, asked for by a turn: apart from each
    other, at once and in a stream. It draws them where a client asks for a temperature."""
    expected = {}
    for thought_format, end in (("embeddings", "</think>"), ("text", "")):
        source, output = tmp_path / f"thinking-{thought_format}", tmp_path / thought_format
        expected[str(output)] = answers(thinking(source, thought_format), end)
        assert main(["export", str(source), str(output)]) == 0
    with serving(tmp_path) as client:
        for model, asked in expected.items():
            for messages, thought, answer, length in asked:
                request = dict(model=model, messages=messages, max_tokens=length)
                said = client.chat.completions.create(**request, temperature=0)
                assert said.choices[0].message.reasoning_content == thought
                assert said.choices[0].message.content == answer
                assert said.usage.completion_tokens == length
                assert streamed(client, **request, temperature=0)[:2] == (thought, answer.rstrip(UNENDED))
            drawn = {streamed(client, **request, temperature=1.5, seed=seed)[:2] for seed in (1, 1, 2, 3)}
            assert 1 < len(drawn) <= 3


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="pip install 'transformers[serving]'")
def test_transformers_serve_hides_the_thoughts_of_a_saved_model(tmp_path):
    """Where remote code is trusted: also of a model that cannot be exported, which thinks before each token. Only the answer is in
    the text and counts as tokens, and only it is searched for stop strings. It is drawn as a client asks, where the folder allows."""
    settings = QuietStarSettings(thought_length=3, talk_length=4)
    model = exportable_model(settings=settings)
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "saved")
    TOKENIZER.save_pretrained(tmp_path / "saved")
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "saved").eval()
    message = {"role": "user", "content": "3 plus 4"}
    inputs = TOKENIZER.apply_chat_template(
        [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = dict(do_sample=False, max_new_tokens=12, pad_token_id=0, return_thoughts=True)
    ours = model.generate(**inputs, tokenizer=TOKENIZER, **options)
    tokens = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    answer = TOKENIZER.decode(tokens, skip_special_tokens=True)
    inside = next(
        text
        for thought in ours.thoughts[0]
        for text in map(TOKENIZER.decode, thought.token_ids)
        if text.isprintable() and text not in answer and UNENDED not in text
    )
    request = dict(model=str(tmp_path / "saved"), messages=[message], max_tokens=12, temperature=0)
    with serving(tmp_path, "--trust-remote-code") as client:
        for stop in (None, inside, [inside, "never"]):
            said = client.chat.completions.create(**request, stop=stop)
            assert said.choices[0].message.content == answer
            assert said.usage.completion_tokens == len(tokens)
            assert streamed(client, **request, stop=stop)[1] == answer.rstrip(UNENDED)
        cut = next(letter for letter in answer if letter.isascii())
        said = client.chat.completions.create(**request, stop=cut).choices[0]
        assert said.finish_reason == "stop" and cut in said.message.content
        assert answer.startswith(said.message.content) and said.message.content != answer
        drawn = [streamed(client, **{**request, "temperature": 1.5}, seed=seed)[1] for seed in (1, 1, 2, 3)]
        assert drawn[0] == drawn[1] and len(set(drawn)) > 1
        # a client that leaves in the middle of a stream
        with client.chat.completions.create(**{**request, "max_tokens": 100_000}, stream=True) as left:
            assert next(iter(left)).choices
        assert client.chat.completions.create(**request).choices[0].message.content == answer


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
