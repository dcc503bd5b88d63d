"""Models that think while they write, and what they write: by generation, by a naive loop, by scoring."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import Gemma3TextConfig

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.replay import Replay
from trl_quietstar.model.lm_head import logits_of, normalized_entropy
from trl_quietstar.text.batch import Branches, Positions, Text
from trl_quietstar.thinking.drawing import fixed_draws, thought_sampling
from trl_quietstar.thinking.likelihood import log_likelihoods
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.when import Thinking

from .conformance import tiny_model as family_model
from .tiny import byte_tokenizer, randomize, tiny_config


SETTINGS = QuietStarSettings(thought_length=3, talk_length=4)
# thoughts of the most likely tokens at the end of a prompt, as a plain model writes them in a greedy answer
PLAIN = dict(
    thought_length=30,
    talk_length="completion",
    prediction="thought",
    top_k=1,
    min_thought_length=1,
    thought_stop_string="1",
    thought_positions="prompt_end",
)
# greedy answers of four tokens
GREEDY = dict(do_sample=False, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True, output_logits=True)

EXPORTABLE = ("llama", "qwen3", "gemma3", "gpt2")


def exportable_model(name: str = "llama", settings: QuietStarSettings | None = None, **shape):
    """A model over the tokenizer's vocabulary, whose thoughts matter. Its heads have 32 dimensions, the fewest that vLLM takes on a CPU."""
    shape.setdefault("vocab_size", len(byte_tokenizer()))
    if name == "gpt2":
        config = tiny_config(name, **shape, n_head=1)
    else:
        shape |= dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
        config = tiny_config("llama" if name == "gemma3" else name, **shape)
    if name == "gemma3":  # a random one with a tied LM head says the last token again
        shape |= dict(num_hidden_layers=2, intermediate_size=48, max_position_embeddings=128)
        config = Gemma3TextConfig(**shape, tie_word_embeddings=False, eos_token_id=0)
    model = QuietStarForCausalLM.from_config(config, settings or QuietStarSettings(**PLAIN))
    randomize(model)
    if name == "gpt2":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.1)  # tied too
    return model.eval()


class Said(NamedTuple):
    """What a model thinks and answers."""

    prompt: str | list[dict]
    input_ids: torch.Tensor  # (1, T)
    thought: list[int]
    answer: list[int]
    output: Any  # of `generate`


def ended_thoughts(
    model, prompts: Iterable[str | list[dict]], count: int, tokenizer=None, end: str = "1"
) -> Iterator[Said]:
    """Of the first prompts or messages at which a greedy thought ends by itself, with `end`, and the answer has neither that nor EOS."""
    tokenizer, ended = tokenizer or byte_tokenizer(), 0
    for prompt in prompts:
        text = prompt
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model.generate(ids, return_thoughts=True, tokenizer=tokenizer, **GREEDY)
        thought, answer = output.thoughts[0][0].token_ids, output.sequences[0, ids.shape[1] :].tolist()
        if end in tokenizer.decode(thought) and 0 not in thought + answer and end not in tokenizer.decode(answer):
            yield Said(prompt, ids, thought, answer, output)
            ended += 1
        if ended == count:
            return
    raise AssertionError(f"only {ended} thoughts ended")


def thinking_model(name: str = "llama", settings: QuietStarSettings = SETTINGS):
    """A tiny model whose thoughts matter: peaked weights and an open mixing head."""
    model = family_model(name)
    model.adopt_settings(settings)
    with torch.no_grad():
        model.quietstar.mixing_head.bias.fill_(0.5)
        for vector, seed in ((model.quietstar.start_embedding, 1), (model.quietstar.end_embedding, 2)):
            vector.copy_(0.5 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)))
    return model


@torch.no_grad()
def naive(
    model, prompt, new: int, every: int = 1, threshold: float | None = None, reach: int | None = None
) -> list[int]:
    """One row: for each token the whole text is read, the thought sampled and read again, by replay. Thoughts are `every`
    tokens apart or more, and each is read for `reach` tokens."""
    ids, settings = prompt.clone(), thought_sampling(model.quietstar_settings, None)
    embed, heads, path = model.get_input_embeddings(), model.quietstar, Replay()
    anchor, thought = -1, None
    for _ in range(new):
        text = Text.from_batch(ids[None])
        here = len(ids) - 1
        hidden = path.text_hidden(model, text)[:, -1]
        if thought is not None and here - anchor >= (every if reach is None else reach):
            thought = None
        due = anchor < 0 or here - anchor >= every
        if due and (threshold is None or float(normalized_entropy(model, hidden)) >= threshold):
            positions = Positions(torch.tensor([[here]]), torch.tensor([[True]]))
            draws = fixed_draws(positions.index, settings)
            thought = sample_thoughts(model, path.read(model, text), positions, settings, draws).token_ids[0, 0, 0]
            anchor = here
        if thought is not None:
            prefix = Text.from_batch(ids[None, : anchor + 1])
            slots = [heads.start_embedding[None], embed(thought), heads.end_embedding[None], embed(ids[anchor + 1 :])]
            slots = torch.cat(slots)[None, None]
            branches = Branches(torch.tensor([[anchor]]), slots, torch.ones(slots.shape[:3], dtype=torch.bool))
            read = path.branch_hidden(model, prefix, branches)[:, 0, -1]
            weight = heads.mixing_head(hidden, read)[:, None]
            hidden = weight * read + (1 - weight) * hidden
        ids = torch.cat([ids, logits_of(model, hidden).argmax(-1)])
    return ids[len(prompt) :].tolist()


def prompts(*lengths: int) -> list[torch.Tensor]:
    """Random prompts without the padding token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 300, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts side by side, padded on the left."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, inputs: dict, new: int = 8, **options) -> torch.Tensor:
    """The new tokens of greedy generation, which goes on after EOS."""
    options = dict(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0) | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def of_generated(model, inputs: dict, thinking: Thinking, new: int = 8):
    """Greedy text with the log-probabilities that generation gave each new token, and those of scoring it."""
    options = dict(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    out = model.generate(**inputs, think=thinking, **options)
    said = torch.stack(out.logits, dim=1).log_softmax(-1)
    start = inputs["input_ids"].shape[1]
    expected = said.gather(2, out.sequences[:, start:, None])[..., 0]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out.sequences[:, start:])], dim=1)
    wanted = torch.zeros_like(mask)
    wanted[:, start:] = 1
    logps, correct = log_likelihoods(model, out.sequences, mask, wanted, thinking)
    return expected, logps[:, start - 1 :], correct[:, start - 1 :], logps[:, : start - 1]
