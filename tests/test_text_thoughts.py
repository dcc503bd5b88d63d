"""Thoughts between strings of ordinary tokens, and prompts that ask for them: by hand, on every path, and as plain generation
writes them."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.evaluation.controls import controlled
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.thinking.answers import greedy_answers
from trl_quietstar.thinking.drawing import thought_sampling, uniforms
from trl_quietstar.thinking.sampling import ThoughtSampler, sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, score, score_thoughts
from trl_quietstar.thinking.when import Thinking

from .conformance import tiny_model as family_model
from .speaking import of_generated, padded
from .tiny import byte_tokenizer, exact_model, generators, positions_of, randomize
from .training import finite, logged, tiny_trainer


TOKENIZER = byte_tokenizer()
START, END, PROMPT = " plus", " is 1", "0 plus "
TEXT = dict(thought_format="text", thought_start_text=START, thought_end_text=END)
L, M, G = 5, 3, 2


def ids_of(string: str | None) -> list[int]:
    return [] if string is None else TOKENIZER(string)["input_ids"]


def text_model(name: str = "llama", **changes):
    """An exact model over the tokenizer's vocabulary, whose thoughts stand between strings unless it is told otherwise."""
    settings = QuietStarSettings(
        **{"thought_length": L, "talk_length": M, **TEXT, "thought_prompt": PROMPT, **changes}
    )
    model = exact_model(name, settings, vocab_size=len(TOKENIZER))
    model.thought_tokenizer(TOKENIZER)
    return model


def batch() -> tuple[Text, Thoughts]:
    """Two texts, one of them padded and one of two packed documents, with thoughts that close themselves and others that do not."""
    ids = torch.randint(1, len(TOKENIZER), (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    position_ids = torch.arange(12).repeat(2, 1)
    position_ids[1] %= 6
    text = Text.from_batch(ids, mask, position_ids=position_ids)
    end = ids_of(END)
    assert len(end) == 2 and len(ids_of(START)) == 1 and len(ids_of(PROMPT)) > 1
    written = [[7, 9, 4, 8, 3], [5, *end], [11, 2, 6, *end], [5, *end[:1]], end, [end[1], 6]]
    tokens = torch.zeros(2, 3, G, L, dtype=torch.long)
    exists = torch.zeros_like(tokens, dtype=torch.bool)
    for number in range(2 * 3 * G):
        place, thought = (number // 6, number // 2 % 3, number % 2), written[number % len(written)]
        tokens[place][: len(thought)], exists[place][: len(thought)] = torch.tensor(thought), True
    positions = Positions(torch.tensor([[1, 4, 8], [2, 7, 0]]), torch.tensor([[True] * 3, [True, True, False]]))
    exists[1, 2] = False
    return text, Thoughts(positions, tokens * exists, exists)


def slots_by_hand(model, thought: list[int], start: bool = True, filler: bool = False) -> tuple[list[int], int]:
    """The tokens of a branch up to its talk, and how many stand before the thought."""
    settings, end = model.quietstar_settings, ids_of(END)
    before = ids_of(settings.thought_prompt) + ids_of(START) if start else []
    if filler:
        return before + (ids_of(START) * len(thought))[: len(thought)] + end, len(before)
    return before + thought + ([] if thought[-len(end) :] == end else end), len(before)


def by_hand(model, text: Text, thoughts: Thoughts, place: tuple, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a thought and of its talk by the thought alone: an ordinary forward over token ids."""
    b, j, g = place
    at = int(thoughts.positions.index[b, j])
    document = (text.document_ids[b] == text.document_ids[b, at]).nonzero().flatten().tolist()
    prefix = [int(text.input_ids[b, t]) for t in document if t <= at]
    talk = [int(text.input_ids[b, t]) for t in document if t > at][:M]
    thought = thoughts.token_ids[place][thoughts.mask[place]].tolist()
    slots, before = slots_by_hand(model, thought, **how)
    row = torch.tensor(prefix + slots + talk)
    logps = model.lm_head(model.base_model(input_ids=row[None]).last_hidden_state[0]).log_softmax(-1)
    said = logps[:-1].gather(1, row[1:, None])[:, 0]
    first = len(prefix) + before - 1
    return said[first : first + len(thought)], said[len(prefix) + len(slots) - 1 :]


def places(thoughts: Thoughts) -> list[tuple]:
    return [tuple(place) for place in thoughts.mask[..., 0].nonzero().tolist()]


@pytest.mark.parametrize("path", [SharedPrefix(), MaskedPrefix(), Replay()], ids=["shared", "masked", "replay"])
@pytest.mark.parametrize(("name", "prompt"), [("llama", PROMPT), ("qwen2-window", None), ("gpt2", PROMPT)])
def test_scores_are_those_of_plain_sequences(name, prompt, path):
    """A thought that has closed itself is followed by its talk, another one by its end; scores and gradients are those of
    ordinary sequences of tokens, to 1e-9."""
    model, (text, thoughts) = text_model(name, thought_prompt=prompt), batch()
    scores = score(model, ScoreRequest(text, thoughts, M, path, prediction="thought"))
    ours, oracle = [], []
    for place in places(thoughts):
        thought, talk = by_hand(model, text, thoughts, place)
        mine = scores.thought_logps[place][thoughts.mask[place]], scores.talk_logps[place][: len(talk)]
        for one, other in zip(mine, (thought, talk), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        ours.append(mine[0].sum() - 0.5 * mine[1].sum())
        oracle.append(thought.sum() - 0.5 * talk.sum())
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if "quietstar" not in n), strict=True)
    pairs = (
        torch.autograd.grad(sum(x), parameters, allow_unused=True, materialize_grads=True) for x in (ours, oracle)
    )
    for parameter, mine, theirs in zip(names, *pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9, msg=parameter)


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared", "replay"])
def test_a_reference_scores_them(path):
    """A reference sees prompt and start too; judged as plain text, a thought has neither."""
    model, (text, thoughts) = text_model(), batch()
    for start in (True, False):
        with torch.no_grad():
            scores = score_thoughts(model, text, thoughts, path, start=start)
            for place in places(thoughts):
                thought, _ = by_hand(model, text, thoughts, place, start=start)
                torch.testing.assert_close(scores.thought_logps[place][thoughts.mask[place]], thought)


def test_filler_repeats_the_start():
    """The control without content has the start's tokens in place of the thought's, and its end."""
    model, (text, thoughts) = text_model(), batch()
    filler = controlled(thoughts, "filler", len(TOKENIZER), torch.Generator())
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, filler, M, SharedPrefix(), prediction="thought"))
        for place in places(thoughts):
            _, talk = by_hand(model, text, thoughts, place, filler=True)
            torch.testing.assert_close(scores.talk_logps[place][: len(talk)], talk)


def often(model, end: str = "1", length: int = L):
    """Sampling under which some thoughts close themselves, and some do not."""
    settings = QuietStarSettings(
        **{**TEXT, "thought_prompt": PROMPT, "thought_end_text": end, "thought_length": length}
    )
    model.adopt_settings(settings, TOKENIZER)
    return thought_sampling(settings, TOKENIZER, 3)


@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_one_pass_is_two(prompt):
    """Thoughts that are drawn in the forwards that are trained have the scores, and the gradients, of a second pass by replay."""
    model, (text, _) = text_model(thought_prompt=prompt), batch()
    settings = often(model)
    sampler = ThoughtSampler(settings, generators(text), "all")
    one = score(model, ScoreRequest(text, sampler, M, SharedPrefix()))
    two = score(model, ScoreRequest(text, one.thoughts, M, Replay()))
    closed = model.thought_marks.closed(one.thoughts.token_ids, one.thoughts.mask)
    exists = one.thoughts.mask[..., 0]
    assert closed.any() and (exists & ~closed).any()
    for field in ("thought_logps", "thought_entropies", "talk_logps", "reader_logps", "mixing_weights", "similarity"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), rtol=1e-9, atol=1e-9, msg=field)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = [
        torch.autograd.grad(
            x.thought_logps.sum() + x.talk_logps.sum(), parameters, materialize_grads=True, allow_unused=True
        )
        for x in (one, two)
    ]
    for parameter, mine, theirs in zip(names, *pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9, msg=parameter)


def test_all_paths_write_the_same():
    """Sampled thoughts do not depend on the path, and end with their string or at their length."""
    model, (text, _) = text_model(), batch()
    settings, positions = often(model), positions_of(batch()[0])
    draws = uniforms(positions, settings, generators(text, 1))
    written = []
    for path in (SharedPrefix(), MaskedPrefix(), Replay()):
        with torch.no_grad():
            written.append(sample_thoughts(model, path.read(model, text), positions, settings, draws))
    assert all(torch.equal(x.token_ids, written[0].token_ids) for x in written)
    closed = model.thought_marks.closed(written[0].token_ids, written[0].mask)
    for place in places(written[0]):
        tokens = written[0].token_ids[place][written[0].mask[place]]
        ends = TOKENIZER.decode(tokens).endswith("1") or "1" in TOKENIZER.decode(tokens[-1:])
        assert ends == bool(closed[place]) and (ends or len(tokens) == L or tokens[-1] == TOKENIZER.eos_token_id)


# Generation


GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def opened(prompt: torch.Tensor) -> torch.Tensor:
    """A prompt, with what asks for a thought and opens it."""
    return torch.cat([prompt, torch.tensor(ids_of(PROMPT) + ids_of(START))])[None]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_plain_generation_writes_the_same(name, tmp_path):
    """A thought that ends itself at the end of a prompt, and the text after it, are what Transformers' own greedy `generate` of the
    saved model writes after prompt and start, token for token."""
    settings = dict(thought_positions="prompt_end", talk_length="completion", prediction="thought", thought_length=8)
    model, prompt, new = plain_and_text(name, settings)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    model = QuietStarForCausalLM.from_pretrained(tmp_path, dtype=model.dtype).eval()
    out = model.generate(input_ids=prompt[None], max_new_tokens=new, return_thoughts=True, **GREEDY)
    ((thought,),) = out.thoughts
    length = len(thought.token_ids)
    assert 2 <= length < 8 and model.thought_marks.ends(torch.tensor([thought.token_ids])).all()
    said = plain.generate(input_ids=opened(prompt), max_new_tokens=length + new, **GREEDY)[
        0, opened(prompt).shape[1] :
    ]
    assert said.tolist() == thought.token_ids + out.sequences[0, len(prompt) :].tolist()


def gemma():
    """A tiny Gemma 3, with a window, whose predictions are peaked."""
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    sizes |= dict(vocab_size=len(TOKENIZER), sliding_window=6, query_pre_attn_scalar=8, head_dim=8)
    sizes |= dict(
        layer_types=["sliding_attention", "full_attention"], pad_token_id=None, bos_token_id=None, eos_token_id=0
    )
    model = QuietStarForCausalLM.from_config(Gemma3TextConfig(**sizes, tie_word_embeddings=False), dtype=torch.float32)
    randomize(model)
    return model.eval()


def plain_and_text(name: str, settings: dict):
    """A model, a prompt and a number of tokens to write; thoughts end with what it writes after a token or more there."""
    model = gemma() if name == "gemma3_text" else exact_model(name, vocab_size=len(TOKENIZER))
    prompts = torch.randint(1, len(TOKENIZER), (128, 5), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([opened(prompt) for prompt in prompts])
    said = model.generate(input_ids=rows, max_new_tokens=7, think="never", **GREEDY)[:, rows.shape[1] :].tolist()
    for prompt, own, size, at in (
        (*x, n, i) for n in (2, 1) for i in (1, 2, 3, 4) for x in zip(prompts, said, strict=True)
    ):
        end, before = TOKENIZER.decode(own[at : at + size]), TOKENIZER.decode(own[: at + size - 1])
        if end.isascii() and end.isprintable() and len(end) >= size and end not in before and 0 not in own:
            changed = QuietStarSettings(**{**TEXT, **settings, "thought_end_text": end, "thought_prompt": PROMPT})
            model.adopt_settings(changed, TOKENIZER)
            return model, prompt, 6
    raise AssertionError("the model writes nothing that could end a thought")


def family(name: str, folder, **settings):
    """A model of a family with an open mixing head and its tokenizer beside it, whose thoughts are of text: of three digits,
    one of which ends them."""
    model = family_model(name)
    TOKENIZER.save_pretrained(folder)
    model.config.name_or_path = str(folder)
    few = {token_id for digit in "123" for token_id in ids_of(digit)}
    own = dict(TEXT, thought_length=4, talk_length=3, thought_end_text="1", thought_prompt=PROMPT, temperature=30.0)
    own["thought_suppress_tokens"] = sorted(set(range(320)) - few)
    with torch.no_grad():
        model.quietstar.mixing_head.bias.fill_(0.5)
    model.adopt_settings(QuietStarSettings(**own | settings), TOKENIZER)
    return model


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bloom", "rwkv"])
def test_scoring_agrees_with_generation(name, greedy, tmp_path):
    """What generation wrote, in a batch and with thoughts of different lengths, has the log-probabilities it was written with."""
    model, generator = family(name, tmp_path), torch.Generator().manual_seed(0)
    inputs = padded([torch.randint(1, len(TOKENIZER), (length,), generator=generator) for length in (3, 5)])
    thinking = Thinking("always", 3, greedy=greedy)
    expected, logps, correct, _ = of_generated(model, inputs, thinking)
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    assert correct.all()
    thoughts = model.generate(**inputs, max_new_tokens=8, think=thinking, return_thoughts=True, **GREEDY).thoughts
    lengths = {len(thought.token_ids) for row in thoughts for thought in row}
    assert greedy or len(lengths) > 1


def test_text_thoughts_are_greedy_where_the_text_is(tmp_path):
    """By default a model of text thoughts writes them as plain generation would; sampling the text samples them too."""
    model = family("llama", tmp_path, thought_suppress_tokens=None)
    assert (
        model.quietstar_thinking.greedy
        and not family("llama", tmp_path, thought_format="embeddings").quietstar_thinking.greedy
    )
    prompt = torch.tensor([[5, 9, 20]])
    options = dict(max_new_tokens=1, return_thoughts=True)
    said = [
        model.generate(prompt, **{**GREEDY, **options, "do_sample": sample}).thoughts[0][0] for sample in (0, 0, 1)
    ]
    (plain,) = model.generate(opened(prompt[0]), max_new_tokens=len(said[0].token_ids), think="never", **GREEDY)
    assert said[0].token_ids == said[1].token_ids == plain[opened(prompt[0]).shape[1] :].tolist() != said[2].token_ids


def test_answers_after_them():
    """The answers that rewards judge follow a thought that has closed itself, or its end."""
    model, (text, thoughts) = text_model(prediction="thought"), batch()
    with torch.no_grad():
        answers = greedy_answers(model, text, thoughts, torch.full((2, 3), 2), [])
        for place, answer in zip(thoughts.mask[..., 0].nonzero().tolist(), answers, strict=False):
            b, j, g = place
            at = int(thoughts.positions.index[b, j])
            first = at - int(text.position_ids[b, at])
            thought = thoughts.token_ids[b, j, g][thoughts.mask[b, j, g]].tolist()
            row = text.input_ids[b, first : at + 1].tolist() + slots_by_hand(model, thought)[0]
            for token in answer:
                assert int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()) == token
                row.append(token)


# In training


def test_training_and_saving(tmp_path):
    """Thoughts of text train neither embedding, and the saved model thinks between the same strings."""
    trainer = tiny_trainer(tmp_path, **TEXT, thought_prompt=PROMPT, thought_length=4)
    heads = trainer.model.quietstar
    before = heads.start_embedding.clone(), heads.end_embedding.clone()
    assert not heads.start_embedding.requires_grad and not heads.end_embedding.requires_grad
    assert trainer.args.thought_stop_string == END and trainer.args.min_thought_length == 1
    trainer.train()
    assert torch.equal(heads.start_embedding, before[0]) and torch.equal(heads.end_embedding, before[1])
    trainer.save_model(tmp_path / "saved")
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert model.quietstar_settings == trainer.args.settings()
    assert model.quietstar_settings.thought_format == "text" and model.quietstar_settings.thought_prompt == PROMPT
    marks, own = model.thought_marks, trainer.model.thought_marks
    assert (marks.prompt, marks.start, marks.end) == (own.prompt, own.start, own.end)
    prompt = torch.tensor([ids_of("3 plus 4")])
    texts = [
        x.eval().generate(prompt, max_new_tokens=4, tokenizer=TOKENIZER, **GREEDY) for x in (model, trainer.model)
    ]
    assert torch.equal(*texts)


def test_training_without_any_head(tmp_path):
    """With the thought's prediction alone and no value head nothing of the heads is trained, and training goes on."""
    options = dict(reward_prediction="thought", advantage_baseline="leave_one_out", use_gae=False)
    trainer = tiny_trainer(tmp_path, **TEXT, **options, thought_positions=2)
    assert not any(p.requires_grad for p in trainer.model.quietstar.parameters())
    trainer.train()
    assert all(finite(entry["loss"]) for entry in logged(trainer))


@pytest.mark.parametrize("thought_format", ["text", "embeddings"])
def test_the_prompt_is_read_by_thoughts_alone(thought_format, tmp_path):
    """Another prompt changes what comes after thoughts, and not the text without them."""
    found = []
    for prompt in ("0 plus", " is 7"):
        model, (text, thoughts) = text_model(thought_format=thought_format, thought_prompt=prompt), batch()
        with torch.no_grad():
            found.append(score(model, ScoreRequest(text, thoughts, M, SharedPrefix())))
    assert torch.equal(found[0].text_logps, found[1].text_logps)
    exists = thoughts.mask[..., 0]
    assert (found[0].talk_logps - found[1].talk_logps)[exists][:, 0].abs().min() > 1e-4


def test_a_prompt_before_a_learned_start():
    """With learned embeddings the prompt stands before the start embedding."""
    model, (text, thoughts) = text_model(thought_format="embeddings"), batch()
    embed, heads = model.get_input_embeddings(), model.quietstar
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, thoughts, M, SharedPrefix(), prediction="thought"))
        thought = thoughts.token_ids[0, 1, 0][thoughts.mask[0, 1, 0]]
        ids = text.input_ids[0]
        row = [embed(ids[:5]), embed(torch.tensor(ids_of(PROMPT))), heads.start_embedding[None], embed(thought)]
        row = torch.cat([*row, heads.end_embedding[None], embed(ids[5:7])])
        hidden = model.base_model(inputs_embeds=row[None]).last_hidden_state[0]
        said = model.lm_head(hidden).log_softmax(-1)
        torch.testing.assert_close(scores.talk_logps[0, 1, 0], said[-3:].gather(1, ids[5:8, None])[:, 0])
        first = 4 + len(ids_of(PROMPT)) + 1
        expected = said[first : first + len(thought)].gather(1, thought[:, None])[:, 0]
        torch.testing.assert_close(scores.thought_logps[0, 1, 0, : len(thought)], expected)


def test_written_thoughts_close_themselves(tmp_path):
    """Written thoughts are taught in the slots that sampled ones have: they end with their string, which is not put again."""
    rows = {"prompt": ["3 plus 4"] * 4, "completion": [" is 7 ."] * 4, "thought": [" 7"] * 4}
    options = dict(thought_positions="prompt_end", talk_length="completion", thought_length=6)
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict(rows), **TEXT, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    written = trainer.thinker.divide(batch).written
    tokens = written.thoughts.token_ids[0, 0, 0][written.thoughts.mask[0, 0, 0]].tolist()
    assert tokens == ids_of(" 7" + END)
    assert trainer.model.thought_marks.closed(written.thoughts.token_ids, written.thoughts.mask).all()
    trainer.train()
    assert finite(logged(trainer, "rl/written_nll")[-1]["rl/written_nll"])


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(thought_format="words"), "`thought_format` is 'words'; choose one of embeddings, text"),
        (
            dict(TEXT, thought_stop_string="]"),
            r"`thought_stop_string` is '\]', but .*`thought_end_text` \(' is 1'\); leave",
        ),
        (dict(thought_prompt=""), "`thought_prompt` is empty; give text"),
        (dict(TEXT, thought_end_text=""), "`thought_end_text` is empty; give text"),
        (dict(TEXT, thought_start_text=""), "`thought_start_text` is empty; give text"),
        (dict(TEXT, max_length=None, thought_length=60, thought_prompt="0 plus " * 40), "and its start and end needs"),
    ],
)
def test_bad_input(options, says, tmp_path):
    """What cannot be is refused before anything is trained."""
    with pytest.raises(ValueError, match=says):
        tiny_trainer(tmp_path, **options)
