"""Generation with thoughts against a naive loop that runs everything again for every token."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from trl_quietstar import QuietStarSettings
from trl_quietstar.geometry import Branches, Positions, Text
from trl_quietstar.lm_head import logits_of, normalized_entropy
from trl_quietstar.modeling import heads_aside
from trl_quietstar.paths import CACHE_NAMES, Replay
from trl_quietstar.sampling import fixed_draws, sample_thoughts, thought_sampling

from .conformance import tiny_model as family_model
from .tiny import byte_tokenizer, tiny_model


FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "gemma4_text", "mistral", "mamba", "bloom", "qwen3_next", "rwkv")
SETTINGS = QuietStarSettings(thought_length=3, talk_length=4)


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
def naive(model, prompt, new: int, every: int = 1, threshold: float | None = None) -> list[int]:
    """One row: for each token the whole text is read, the thought sampled and read again, by replay."""
    ids, settings = prompt.clone(), thought_sampling(model.quietstar_settings, None)
    embed, heads, path = model.get_input_embeddings(), model.quietstar, Replay()
    anchor, thought = -1, None
    for _ in range(new):
        text = Text.from_batch(ids[None])
        here = len(ids) - 1
        hidden = path.text_hidden(model, text)[:, -1]
        if thought is not None and here - anchor >= every:
            thought = None
        if thought is None and (threshold is None or float(normalized_entropy(model, hidden)) >= threshold):
            positions = Positions(torch.tensor([[here]]), torch.tensor([[True]]))
            draws = fixed_draws(positions.index, settings)
            thought = sample_thoughts(model, path.read(model, text), text, positions, settings, draws).token_ids[
                0, 0, 0
            ]
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


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gemma4_text"])
def test_greedy_generation_equals_the_naive_loop(name, every):
    """Token for token, on the cache and by replay; and thoughts do change what is said."""
    model = thinking_model(name)
    (prompt,) = prompts(7)
    expected = naive(model, prompt, 8, every)
    assert generated(model, padded([prompt]), think_every=every)[0].tolist() == expected
    options = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    spoken, plain = (model.generate(prompt[None], think=think, **options).logits[0] for think in ("always", "never"))
    assert (spoken - plain).abs().max() > 1e-2


@pytest.mark.parametrize("every", [1, 2])
def test_adaptive_thinking_equals_the_naive_loop(every):
    """Thoughts only where the prediction is uncertain, each serving its tokens."""
    model = thinking_model()
    (prompt,) = prompts(6)
    with torch.no_grad():
        hidden = Replay().text_hidden(model, Text.from_batch(torch.randint(1, 300, (4, 12))))
    threshold = float(normalized_entropy(model, hidden).median())
    out = model.generate(
        **padded([prompt]),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        think="adaptive",
        think_every=every,
        thinking_threshold=threshold,
        return_thoughts=True,
    )
    assert 0 < len(out.thoughts[0]) < 12
    assert out.sequences[0, 6:].tolist() == naive(model, prompt, 12, every, threshold)


@pytest.mark.parametrize("options", [{}, {"think_every": 2}, {"think": "adaptive", "think_every": 3}])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3_text", "gpt2", "gemma4_text", "bloom", "mamba", "jamba", "rwkv"]
)
def test_a_batch_equals_its_rows(name, options):
    """Prompts of different lengths, thinking at different places, side by side and alone: text and thoughts."""
    model, rows = thinking_model(name), prompts(9, 4, 6)
    if "think" in options:
        with torch.no_grad():
            hidden = model.get_output_embeddings().weight[:64]
        options = options | {"thinking_threshold": float(normalized_entropy(model, hidden).median())}
    options = options | dict(
        do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0, return_thoughts=True
    )
    together = model.generate(**padded(rows), **options)
    for row, prompt in enumerate(rows):
        alone = model.generate(**padded([prompt]), **options)
        assert alone.sequences[0, len(prompt) :].tolist() == together.sequences[row, 9:].tolist()
        shift = 9 - len(prompt)
        assert [(t.position + shift, t.token_ids) for t in alone.thoughts[0]] == [
            (t.position, t.token_ids) for t in together.thoughts[row]
        ]
        for a, b in zip(alone.thoughts[0], together.thoughts[row], strict=True):
            assert a.mixing_weights == pytest.approx(b.mixing_weights, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_never_is_the_base_model(name):
    """Greedy, sampled and by beams, `think="never"` is the family's own `generate`."""
    model, inputs = thinking_model(name), padded(prompts(5, 8))
    plain = type(model)._plain_class
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}):
        options |= dict(max_new_tokens=6, pad_token_id=0)
        torch.manual_seed(0)
        ours = model.generate(**inputs, think="never", **options)
        torch.manual_seed(0)
        assert torch.equal(ours, plain.generate(model, **inputs, **options))


def test_streaming_equals_not_streaming():
    """The streamer gets the prompt and each visible token, never a thought."""
    model, tokenizer, (prompt,) = thinking_model(), byte_tokenizer(), prompts(5)
    chunks = []

    class Streamer(TextIteratorStreamer):
        def put(self, value):
            chunks.extend(value.flatten().tolist())

    out = model.generate(
        prompt[None], do_sample=False, max_new_tokens=6, eos_token_id=None, streamer=Streamer(tokenizer)
    )
    assert chunks == out[0].tolist()


def test_usual_arguments_work():
    """EOS and padding, logits processors, stopping criteria, several sequences a prompt, scores."""
    model, inputs = thinking_model(), padded(prompts(5, 3))
    plain = generated(model, inputs)
    eos = int(plain[0, 2])
    ended = generated(model, inputs, eos_token_id=eos)
    stop = plain[0].tolist().index(eos)
    assert ended[0, : stop + 1].tolist() == plain[0, : stop + 1].tolist() and (ended[0, stop + 1 :] == 0).all()
    banned = generated(model, inputs, bad_words_ids=[[int(plain[0, 0])]])
    assert banned[0, 0] != plain[0, 0]
    stopped = generated(model, inputs, stopping_criteria=[lambda ids, scores, **_: ids.shape[1] >= 8])
    assert stopped.shape[1] == 3
    tokenizer = byte_tokenizer()
    word = tokenizer.decode(plain[0, -1])
    told = generated(model, {name: x[:1] for name, x in inputs.items()}, stop_strings=[word], tokenizer=tokenizer)
    assert word in tokenizer.decode(told[0]) and word not in tokenizer.decode(told[0, :-1])
    out = model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=True,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences.shape == (4, 8) and len(out.scores) == 3 and out.thoughts is None


def test_sampling_thinks_anew_and_follows_the_seed():
    """With `do_sample` text and thoughts vary from call to call, and repeat with the seed."""
    model, (prompt,) = thinking_model(), prompts(5)
    options = dict(max_new_tokens=6, do_sample=True, return_thoughts=True, eos_token_id=None)
    torch.manual_seed(0)
    first, second = (model.generate(prompt[None], **options) for _ in range(2))
    torch.manual_seed(0)
    again = model.generate(prompt[None], **options)
    assert [t.token_ids for t in first.thoughts[0]] != [t.token_ids for t in second.thoughts[0]]
    assert torch.equal(first.sequences, again.sequences) and first.thoughts == again.thoughts


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_thoughts_end_early(name, tmp_path):
    """At the string they were trained with, told by the tokenizer given or by the one beside the model."""
    tokenizer = byte_tokenizer()
    settings = QuietStarSettings(thought_length=6, min_thought_length=2, thought_stop_string="1")
    model, (prompt,) = thinking_model(name, settings), prompts(5)
    with pytest.raises(ValueError, match=r"only its tokenizer knows; pass `tokenizer="):
        model.generate(prompt[None], max_new_tokens=2)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, return_thoughts=True)
    out = model.generate(prompt[None], tokenizer=tokenizer, **options)
    lengths = [len(thought.token_ids) for thought in out.thoughts[0]]
    assert min(lengths) >= 2 and max(lengths) <= 6 and len(set(lengths)) > 1
    for thought in out.thoughts[0]:
        assert (
            len(thought.token_ids) == 6
            or tokenizer.eos_token_id == thought.token_ids[-1]
            or "1" in tokenizer.decode(thought.token_ids[-1])
        )
    rows = prompts(5, 8)
    together = model.generate(**padded(rows), tokenizer=tokenizer, pad_token_id=0, **options)
    assert together.sequences[0, 8:].tolist() == out.sequences[0, 5:].tolist()
    tokenizer.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    assert torch.equal(model.generate(prompt[None], **options).sequences, out.sequences)


def test_the_cache_is_left_as_if_nothing_was_thought(monkeypatch):
    """A thought is dropped after use: the cache holds the text alone, however much was thought."""
    from trl_quietstar import generation

    decoders = []

    class Watched(generation.CachedDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            decoders.append(self)

    monkeypatch.setattr(generation, "CachedDecoder", Watched)
    model, (prompt,) = thinking_model(), prompts(5)
    generated(model, padded([prompt]), new=9)
    assert decoders[0].cache.get_seq_length() == 5 + 8 == decoders[0].positions.shape[1]
    assert decoders[0].cache.layers[0].keys.shape[2] == 13


@pytest.mark.parametrize(
    "options, message",
    [
        ({"think": "often"}, "`think` is 'often'; choose one of always, never, adaptive"),
        ({"think_every": 0}, "`think_every` is 0, below its limit of 1"),
        ({"think_every": 5}, "`think_every` is 5, but the model reads a thought for `talk_length` 4 tokens"),
        ({"think": "adaptive", "thinking_threshold": 1.5}, "`thinking_threshold` is 1.5; it lies between 0 and 1"),
        ({"num_beams": 2}, "not with 'beam_search'"),
        ({"inputs_embeds": torch.zeros(1, 4, 32), "input_ids": None}, "no `input_ids` to think after"),
        ({"think": "never", "return_thoughts": True}, "no thoughts to return"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, "padded on the right; set `padding_side='left'`"),
    ],
)
def test_requests_that_cannot_be_met(options, message):
    """Refused before anything is run."""
    with pytest.raises(ValueError, match=message):
        thinking_model().generate(**{"input_ids": prompts(5)[0][None], "max_new_tokens": 2, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype):
    """With float32 heads beside the base, as they are loaded; greedily the same twice."""
    model = thinking_model().to(dtype)
    model.quietstar.float()
    first, second = (generated(model, padded(prompts(5, 7))) for _ in range(2))
    assert torch.equal(first, second)


def test_an_adapter_generates():
    """Through PEFT's own `generate`, as with the adapter merged."""
    model, (prompt,) = thinking_model(), prompts(5)
    with heads_aside(model):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    inputs = padded([prompt])
    spoken = generated(adapted, inputs)
    with adapted.disable_adapter():
        assert not torch.equal(generated(adapted, inputs), spoken)
    assert torch.equal(generated(adapted.merge_and_unload(), inputs), spoken)


def test_a_table_of_positions_ends():
    """GPT-2 has 128 positions here: told before anything is run, with the longest text that fits."""
    model = thinking_model("gpt2")
    with pytest.raises(
        ValueError, match="A prompt of 5 tokens and `max_new_tokens` 120 .* lower `max_new_tokens` to 119"
    ):
        model.generate(prompts(5)[0][None], max_new_tokens=120)
    with pytest.raises(ValueError, match="needs 130 positions, and the model has 128; lower `max_length` to 124"):
        model.generate(prompts(5)[0][None], max_length=126)
    assert generated(model, padded(prompts(100)), new=24).shape[1] == 24


def test_training_mode_is_restored():
    """Dropout is off while generating."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.generate(prompts(5)[0][None] % 97, max_new_tokens=2)
    assert model.training


def test_a_cache_to_go_on_from_is_refused():
    """It would be read again from its beginning, or not at all."""
    model, (prompt,) = thinking_model(), prompts(6)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(model.config)(input_ids=prompt[None], use_cache=True)
    cache = next(value for name, value in cache.items() if name in CACHE_NAMES)
    with pytest.raises(ValueError, match="cannot go on from"):
        model.generate(prompt[None], past_key_values=cache, max_new_tokens=2)
