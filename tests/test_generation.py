"""Generation with thoughts against a naive loop that runs everything again for every token."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, MaxTimeCriteria, TextIteratorStreamer

from trl_quietstar import QuietStarSettings
from trl_quietstar.branches.replay import Replay
from trl_quietstar.model.adapters import heads_aside
from trl_quietstar.model.family import CACHE_NAMES
from trl_quietstar.model.lm_head import normalized_entropy
from trl_quietstar.text.batch import Text

from .speaking import generated, naive, padded, prompts, thinking_model
from .tiny import byte_tokenizer, tiny_model


FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "gemma4_text", "mistral", "mamba", "bloom", "qwen3_next", "rwkv")


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


WAYS = ({}, {"think_every": 2}, {"think": "adaptive", "think_every": 3})
BATCHED = ("llama", "mamba", "gemma3_text", "gpt2", "gemma4_text", "bloom", "jamba", "rwkv", "qwen3")


@pytest.mark.parametrize(
    ("name", "options"),  # each family in one way, and one family of each decoder in all
    [(name, way) for i, name in enumerate(BATCHED) for j, way in enumerate(WAYS) if i < 2 or i % 3 == j],
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


def test_thoughts_stream_to_their_end():
    """To a reader in a thread of its own, who would wait for ever without it; to the end of the last word where they are printed."""
    model, tokenizer, (prompt,) = thinking_model(), byte_tokenizer(), prompts(5)
    options = dict(do_sample=False, max_new_tokens=3, eos_token_id=None)
    thoughts = model.generate(prompt[None], return_thoughts=True, **options).thoughts[0]
    expected = tokenizer.decode([i for thought in thoughts for i in thought.token_ids])
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    model.generate(prompt[None], thought_streamer=streamer, **options)
    assert "".join(streamer) == expected


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
    from trl_quietstar.branches import decoders as module

    decoders = []

    class Watched(module.CachedDecoder):
        def __init__(self, *args):
            super().__init__(*args)
            decoders.append(self)

    monkeypatch.setattr(module, "CachedDecoder", Watched)
    model, (prompt,) = thinking_model(), prompts(5)
    generated(model, padded([prompt]), new=9)
    assert decoders[0].cache.get_seq_length() == 5 + 8 == decoders[0].positions.shape[1]
    assert decoders[0].cache.layers[0].keys.shape[2] == 13


@pytest.mark.parametrize(
    "options, message",
    [
        ({"think": "often"}, "`think` is 'often'; choose one of always, adaptive, prompt_end, never"),
        ({"think_every": 0}, "`think_every` is 0, below its limit of 1"),
        ({"think_every": 5}, "`think_every` is 5, but the model reads a thought for `talk_length` 4 tokens"),
        ({"think": "adaptive", "thinking_threshold": 1.5}, "`thinking_threshold` is 1.5; it lies between 0 and 1"),
        ({"num_beams": 2}, "not with 'beam_search'"),
        ({"inputs_embeds": torch.zeros(1, 4, 32), "input_ids": None}, "no `input_ids` to think after"),
        ({"think": "never", "return_thoughts": True}, "no thoughts to return"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, "padded on the right; set `padding_side='left'`"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "`inputs_embeds` does not go with thoughts"),
        (
            {"position_ids": torch.arange(5)[None] + 1},
            "`position_ids` does not go with thoughts, .* counted from 0; leave it",
        ),
        ({"logits_to_keep": 3}, "`logits_to_keep` does not go with thoughts"),
        ({"input_ids": torch.tensor([[1, 9999]])}, "`input_ids` has the id 9999, and the model's tokens are 0 to"),
    ],
)
def test_requests_that_cannot_be_met(options, message):
    """Refused before anything is run."""
    with pytest.raises(ValueError, match=message):
        thinking_model().generate(**{"input_ids": prompts(5)[0][None], "max_new_tokens": 2, **options})


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "cache", "past_key_values"])
def test_what_follows_from_the_tokens_may_be_given(name):
    """Positions that count them, as some pipelines pass; the one type that they are of; and a cache that holds nothing."""
    model, inputs = thinking_model(), padded(prompts(5, 7))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    types = torch.zeros_like(positions)
    given = {"position_ids": positions, "token_type_ids": types}.get(name, DynamicCache())
    if name == "token_type_ids":
        model = thinking_model("gpt2")
    assert torch.equal(generated(model, {**inputs, name: given}), generated(model, inputs))


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


def stops_at(model, prompt, tokenizer) -> tuple[str, list[int]]:
    """A string that greedy text holds, and that text up to it."""
    ids = generated(model, padded([prompt]), new=8)[0].tolist()
    string = tokenizer.decode(ids[2])
    end = next(i for i in range(8) if string in tokenizer.decode(ids[: i + 1]))
    return string, ids[: end + 1]


@pytest.mark.parametrize("given", ["argument", "config", "model", "both"])
@pytest.mark.parametrize("think", ["always", "never"])
def test_stop_strings_stop_wherever_they_are_given(given, think):
    """As an argument, which wins, in a generation config, or in the model's own; beside other criteria or none."""
    model, tokenizer, (prompt,) = thinking_model(), byte_tokenizer(), prompts(5)
    prompt = prompt % 250 + 1
    string, expected = stops_at(model, prompt, tokenizer)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    if think == "never":
        expected = model.generate(prompt[None], think="never", stop_strings=string, tokenizer=tokenizer, **options)
        expected = expected[0, 5:].tolist()
    config = GenerationConfig(**options, stop_strings="plus" if given == "both" else string)
    arguments = {
        "argument": dict(stop_strings=string, **options),
        "config": dict(generation_config=config),
        "model": options,
        "both": dict(generation_config=config, stop_strings=string),
    }[given]
    if given == "model":
        model.generation_config.stop_strings = [string]
    for criteria in (None, [], [MaxTimeCriteria(1e6)]):
        out = model.generate(prompt[None], stopping_criteria=criteria, think=think, tokenizer=tokenizer, **arguments)
        assert out[0, 5:].tolist() == expected
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(prompt[None], think=think, **arguments)


def test_arguments_may_stand_in_their_places():
    """As Transformers' own `generate` takes them."""
    model, (prompt,) = thinking_model(), prompts(5)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(prompt[None], generation_config=config)
    assert torch.equal(model.generate(prompt[None], config, None, None, None), expected)
    assert torch.equal(model.generate(prompt[None], config, stopping_criteria=None, logits_processor=None), expected)


# of `GenerationConfig`: values that thinking follows or that change nothing but how fast it goes, and what shows it
FOLLOWED = {
    "max_length": 9, "max_new_tokens": 3, "min_length": 9, "min_new_tokens": 3, "max_time": 100.0, "do_sample": True,
    "use_cache": False, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "top_h": 0.5, "typical_p": 0.5,
    "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "max_cache_len": 64, "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "renormalize_logits": True, "forced_bos_token_id": 3,
    "forced_eos_token_id": 3, "remove_invalid_values": True, "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": [5], "begin_suppress_tokens": [5], "sequence_bias": [[[5], 2.0]], "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0}, "num_return_sequences": 1, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 7, "prefill_chunk_size": 4,
    "cache_implementation": "static",
}  # fmt: skip
# and values that it cannot follow, each refused by what it asks for
REFUSED = {
    "num_beams": 2, "penalty_alpha": 0.6, "dola_layers": "low", "prompt_lookup_num_tokens": 2, "output_attentions": True,
    "output_hidden_states": True, "token_healing": True, "assistant_early_exit": 1,
}  # fmt: skip
# of no effect in one of the modes above, of encoders, or on how an assistant drafts
WITHOUT_EFFECT = (
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "decoder_start_token_id", "low_memory"),
    *(
        "cache_config",
        "return_legacy_cache",
        "compile_config",
        "disable_compile",
        "transformers_version",
        "stop_strings",
    ),
    *("speculation_type", "use_mtp", "assistant_ensemble_weight", "continuous_batching_config", "generation_kwargs"),
)


def test_every_field_of_a_generation_config_is_followed_or_refused():
    """None is accepted and forgotten: where thoughts change nothing, each gives what plain generation gives."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - set(FOLLOWED) - set(REFUSED) - set(WITHOUT_EFFECT) == set()
    model, (prompt,) = thinking_model(), prompts(5)
    with torch.no_grad():  # a thought then says what the text does
        model.quietstar.mixing_head.bias.fill_(-60)
        model.quietstar.mixing_head.MIN_WEIGHT = 0.0
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    for name, value in FOLLOWED.items():
        if name not in known:
            continue
        changed = {**options, name: value}
        if name == "max_length":
            del changed["max_new_tokens"]
        if "decay" in name:
            changed["eos_token_id"] = 7
        found = []
        for think in ("always", "never"):
            torch.manual_seed(0)
            found.append(model.generate(prompt[None], think=think, **changed))
        if changed.get("return_dict_in_generate"):
            found = [out.sequences for out in found]
        if not changed["do_sample"]:
            assert torch.equal(*found), name
    for name, value in REFUSED.items():
        if name in known:
            with pytest.raises((ValueError, TypeError)):
                model.generate(prompt[None], **{**options, name: value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"custom_generate": "transformers-community/dola"}, "`custom_generate` .* does not go with thoughts"),
        ({"assistant_model": torch.nn.Identity()}, "`assistant_model` .a `Identity`. does not go with thoughts"),
        ({"synced_gpus": True}, "`synced_gpus` .True. does not go with thoughts"),
        ({"cache_implementation": "paged"}, "`cache_implementation` .'paged'. does not go with thoughts"),
        ({"cache_implementation": "quantized"}, "`cache_implementation` .'quantized'. does not go with thoughts"),
        ({"output_attentions": True}, "`output_attentions` .*does not go with thoughts"),
        ({"think": "never", "thought_streamer": object()}, "no thoughts to return or to stream"),
    ],
)
def test_what_a_custom_loop_would_not_be_told_is_refused(options, message):
    """Transformers keeps these from it without a word, or runs something else in its place."""
    with pytest.raises(ValueError, match=message):
        thinking_model().generate(prompts(5)[0][None], max_new_tokens=2, **options)
