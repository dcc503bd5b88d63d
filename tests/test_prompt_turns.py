"""Prompts that ask for a thought as a turn of the conversation: the branch sees what the chat template makes of it, on every path."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.cached_replay import CachedReplay
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.cli import main
from trl_quietstar.model.marks import Marks
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.thinking.answers import greedy_answers
from trl_quietstar.thinking.drawing import thought_sampling
from trl_quietstar.thinking.sampling import ThoughtSampler
from trl_quietstar.thinking.scoring import ScoreRequest, score, score_thoughts
from trl_quietstar.thinking.when import Thinking

from .conformance import tiny_model as family_model
from .speaking import of_generated
from .tiny import byte_tokenizer, exact_model, generators, randomize, tiny_config
from .training import finite, logged, tiny_trainer


# as ChatML has it; and as Llama 3 does, whose messages are stripped
CHATML = (
    "{% for message in messages %}{{ message['role'] + '\n' }}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ eos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n\n' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
TOKENIZER = byte_tokenizer(chat_template=CHATML)
CONTENT, START, END = "0 plus 4", " plus", " is 1"
TEXT = dict(thought_format="text", thought_start_text=START, thought_end_text=END)
TURN = dict(
    thought_prompt=CONTENT, thought_prompt_role="user", thought_positions="prompt_end", talk_length="completion"
)
M, L = 3, 4
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def ids_of(string: str) -> list[int]:
    return TOKENIZER(string, add_special_tokens=False)["input_ids"]


def asked(question: str, *turns: tuple[str, str]) -> list[int]:
    """The tokens of a conversation to be answered, by the chat template."""
    messages = [{"role": role, "content": content} for role, content in (("user", question), *turns)]
    return ids_of(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def turn_model(name: str = "llama", **changes):
    """An exact model that a turn asks for its thoughts."""
    settings = QuietStarSettings(**{**TEXT, **TURN, "thought_length": L, "prediction": "thought", **changes})
    model = exact_model(name, settings, vocab_size=len(TOKENIZER))
    model.thought_tokenizer(TOKENIZER)
    return model


def written(model, ids: torch.Tensor, new: int, **options):
    """What greedy generation writes; with a mask, since the padding token stands in conversations."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **GREEDY, **options)


def beside(model, folder) -> None:
    """Puts the tokenizer where the model is loaded from."""
    TOKENIZER.save_pretrained(folder)
    model.config.name_or_path = str(folder)


def batch() -> tuple[Text, Thoughts]:
    """A row of two packed conversations and a padded one; the thoughts of an answer are cut, or close themselves."""
    rows = [asked(question) + ids_of(" is 7 1") for question in ("3 plus 4", "4", "5 plus 2 is")]
    ends = [len(row) - len(ids_of(" is 7 1")) - 1 for row in rows]
    packed, T = rows[0] + rows[1], len(rows[0] + rows[1])
    ids = torch.tensor([packed, rows[2] + [0] * (T - len(rows[2]))])
    mask = torch.arange(T) < torch.tensor([[T], [len(rows[2])]])
    position_ids = torch.stack([torch.cat([torch.arange(len(row)) for row in rows[:2]]), torch.arange(T)])
    index = torch.tensor([[ends[0], len(rows[0]) + ends[1]], [ends[2], 0]])
    positions = Positions(index, torch.tensor([[True, True], [True, False]]))
    tokens, exists = torch.zeros(2, 2, 2, L, dtype=torch.long), torch.zeros(2, 2, 2, L, dtype=torch.bool)
    for place, thought in (
        ((0, 0, 0), [7, 9, 4, 8]),
        ((0, 0, 1), [5, *ids_of(END)]),
        ((1, 0, 0), [11, 2]),
        ((1, 0, 1), [3]),
    ):
        tokens[place][: len(thought)], exists[place][: len(thought)] = torch.tensor(thought), True
    tokens[0, 1], exists[0, 1] = torch.tensor([[8, 8, 2, 9], [6, *ids_of(END), 0]]), exists[0, 0]
    return Text.from_batch(ids, mask, position_ids=position_ids), Thoughts(positions, tokens * exists, exists)


QUESTIONS = {(0, 0): "3 plus 4", (0, 1): "4", (1, 0): "5 plus 2 is"}


def by_hand(model, thoughts: Thoughts, place: tuple, role: str = "user") -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a thought and of the talk after it: an ordinary forward over the rendered conversation."""
    thought = thoughts.token_ids[place][thoughts.mask[place]].tolist()
    end = [] if thought[-len(ids_of(END)) :] == ids_of(END) else ids_of(END)
    before = asked(QUESTIONS[place[:2]], (role, CONTENT)) + ids_of(START)
    row = torch.tensor(before + thought + end + ids_of(" is 7 1")[:M])
    said = model.lm_head(model.base_model(input_ids=row[None]).last_hidden_state[0]).log_softmax(-1)
    said = said[:-1].gather(1, row[1:, None])[:, 0]
    return said[len(before) - 1 :][: len(thought)], said[-M:]


@pytest.mark.parametrize(
    "path", [SharedPrefix(), MaskedPrefix(), Replay(), CachedReplay()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize(("name", "role"), [("llama", "user"), ("qwen2-window", "system"), ("gpt2", "user")])
def test_scores_are_those_of_the_conversation(name, role, path):
    """With the turn in it, as the chat template renders it: scores and gradients, to 1e-9."""
    if isinstance(path, CachedReplay) and name != "llama":
        pytest.skip("it is exact where prompts may be padded")
    model, (text, thoughts) = turn_model(name, thought_prompt_role=role), batch()
    scores = score(model, ScoreRequest(text, thoughts, M, path, prediction="thought"))
    ours, oracle = [], []
    for place in map(tuple, thoughts.mask[..., 0].nonzero().tolist()):
        thought, talk = by_hand(model, thoughts, place, role)
        mine = scores.thought_logps[place][thoughts.mask[place]], scores.talk_logps[place]
        for one, other in zip(mine, (thought, talk), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        ours.append(mine[0].sum() - 0.5 * mine[1].sum())
        oracle.append(thought.sum() - 0.5 * talk.sum())
    parameters = [p for n, p in model.named_parameters() if "quietstar" not in n]
    pairs = (
        torch.autograd.grad(sum(x), parameters, allow_unused=True, materialize_grads=True) for x in (ours, oracle)
    )
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("path", [SharedPrefix(), Replay(), CachedReplay()], ids=lambda x: type(x).__name__)
def test_thoughts_are_drawn_from_the_conversation(path):
    """Sampling, in the graph or before it, and a reference see what scoring sees."""
    model, (text, _) = turn_model(), batch()
    model.adopt_settings(
        QuietStarSettings(**{**TEXT, **TURN, "thought_length": L, "thought_end_text": "1"}), TOKENIZER
    )
    labels = text.labels.clone()
    for place in QUESTIONS:
        at = int(batch()[1].positions.index[place])
        labels[place[0], at - len(asked(QUESTIONS[place])) + 1 : at + 1] = -100
    text = Text.from_batch(text.input_ids, text.attention_mask, labels, text.position_ids)
    sampler = ThoughtSampler(thought_sampling(model.quietstar_settings, TOKENIZER, 2), generators(text), "prompt_end")
    with torch.no_grad():
        thoughts = sampler.sample(model, text, path)
        scores = score_thoughts(model, text, thoughts, path)
        for place in map(tuple, thoughts.mask[..., 0].nonzero().tolist()):
            expected, _ = by_hand(model, thoughts, place)
            torch.testing.assert_close(scores.thought_logps[place][thoughts.mask[place]], expected)
        if type(path) is SharedPrefix:
            again = ThoughtSampler(sampler.settings, generators(text), "prompt_end")
            one = score(model, ScoreRequest(text, again, M, path, prediction="thought"))
            assert torch.equal(one.thoughts.token_ids, thoughts.token_ids)
            torch.testing.assert_close(one.thought_logps, scores.thought_logps)


@pytest.mark.parametrize("template", [CHATML, HEADERS], ids=["ChatML", "headers"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_turn_is_that_of_the_template(template, role):
    """Whatever was said before it."""
    tokenizer = byte_tokenizer(chat_template=template)
    settings = QuietStarSettings(**{**TEXT, **TURN, "thought_prompt_role": role})
    marks = Marks.of(settings, tokenizer, len(tokenizer))
    for said in ("1?", "Is it so?\n\n", "plus <eos>"):
        messages = [{"role": "system", "content": "b"}, {"role": "user", "content": said}]
        ids = [
            tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False)
            for x in (messages, [*messages, {"role": role, "content": CONTENT}])
        ]
        assert marks.opened(ids[0]) == ids[1] + ids_of(START)


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_plain_generation_writes_the_same(name, role, tmp_path):
    """A thought that ends itself, and the answer, are what Transformers' own greedy `generate` of the saved model writes after the
    rendered conversation and the start, token for token."""
    model, checked = exact_model(name, vocab_size=len(TOKENIZER)), 0
    if name == "gpt2":  # which would say the last token again, since its LM head is tied
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.1)
    beside(model, tmp_path)
    for a in range(60):
        prompt = torch.tensor([[*asked(f"{a} plus 4", (role, CONTENT)), *ids_of(START)]])
        said = written(model, prompt, 10, think="never")[0, prompt.shape[1] :].tolist()
        ends = [(TOKENIZER.decode(said[:at]), TOKENIZER.decode(said[at])) for at in range(1, 6)]
        end = next((x for before, x in ends if x.isascii() and x.isprintable() and x not in before), None)
        if end is None or 0 in said:
            continue
        model.adopt_settings(
            QuietStarSettings(
                **{**TEXT, **TURN, "thought_end_text": end, "thought_prompt_role": role, "prediction": "thought"}
            ),
            TOKENIZER,
        )
        ids = torch.tensor([asked(f"{a} plus 4")])
        ours = written(model, ids, 4, return_thoughts=True)
        wrote = ours.thoughts[0][0].token_ids + ours.sequences[0, ids.shape[1] :].tolist()
        assert wrote == said[: len(wrote)]
        checked += 1
        if checked == 1:
            model.save_pretrained(tmp_path)
            plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
            assert written(plain, prompt, 10)[0, prompt.shape[1] :].tolist() == said
            again = QuietStarForCausalLM.from_pretrained(tmp_path, dtype=model.dtype).eval()
            assert torch.equal(written(again, ids, 4), ours.sequences)
        if checked == 2:
            return
    raise AssertionError(f"only {checked} thoughts ended")


@pytest.mark.parametrize("name", ["llama", "mamba", "bloom"])
def test_scoring_agrees_with_generation(name, tmp_path):
    """In a batch of prompts of different lengths, on a model that a mask, a copy of its state, or replay serves."""
    model = family_model(name)
    beside(model, tmp_path)
    settings = QuietStarSettings(**{**TEXT, **TURN, "thought_length": L, "thought_end_text": "1"})
    model.adopt_settings(settings, TOKENIZER)
    with torch.no_grad():
        model.quietstar.mixing_head.bias.fill_(0.5)
    rows = [asked("3 plus 4"), asked("5 is")]
    T = max(map(len, rows))
    inputs = dict(
        input_ids=torch.tensor([[0] * (T - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows]),
    )
    expected, logps, correct, _ = of_generated(model, inputs, Thinking("prompt_end", greedy=True))
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    assert correct.all()


def test_answers_after_them():
    """The answers that rewards judge follow the conversation with the turn."""
    model, (text, thoughts) = turn_model(), batch()
    with torch.no_grad():
        answers = greedy_answers(model, text, thoughts, torch.full((2, 2), 2), [])
        for number, place in enumerate((b, j, g) for b in range(2) for j in range(2) for g in range(2)):
            if not thoughts.mask[place][0]:
                continue
            thought = thoughts.token_ids[place][thoughts.mask[place]].tolist()
            end = [] if thought[-len(ids_of(END)) :] == ids_of(END) else ids_of(END)
            row = asked(QUESTIONS[place[:2]], ("user", CONTENT)) + ids_of(START) + thought + end
            for token in answers[number]:
                assert int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()) == token
                row.append(token)


def conversations(count: int = 8) -> Dataset:
    prompts = [[{"role": "user", "content": f"{a} plus 4"}] for a in range(count)]
    answers = [[{"role": "assistant", "content": f" is {a + 4}"}] for a in range(count)]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


@pytest.mark.parametrize("thought_format", ["text", "embeddings"])
def test_training_and_saving(thought_format, tmp_path):
    """On conversations; the saved model is asked by the same turn, and another turn makes another loss."""
    options = dict(TURN, thought_format=thought_format, data=conversations(), tokenizer=TOKENIZER)
    if thought_format == "text":
        options |= TEXT
    losses = []
    for content in (CONTENT, "1"):
        trainer = tiny_trainer(tmp_path, **{**options, "thought_prompt": content})
        trainer.train()
        losses.append(logged(trainer)[0]["loss"])
        assert finite(losses[-1])
    assert losses[0] != losses[1]
    trainer.save_model(tmp_path / "saved")
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert model.quietstar_settings.thought_prompt_role == "user"
    assert model.thought_marks.prompt == trainer.model.thought_marks.prompt
    assert model.thought_marks.unread == tuple(ids_of("assistant\n"))


def test_messages_of_several_turns_train(tmp_path):
    """A thought is asked for before each answer of the assistant."""
    turns = [{"role": role, "content": f" is {a}"} for a in range(2) for role in ("user", "assistant")]
    data = Dataset.from_dict({"messages": [turns] * 8})
    template = CHATML.replace(
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}", "{{ CONTENT }}"
    )
    template = template.replace(
        "{{ CONTENT }}",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}",
    )
    tokenizer = byte_tokenizer(chat_template=template)
    trainer = tiny_trainer(tmp_path, data=data, tokenizer=tokenizer, assistant_only_loss=True, **TEXT, **TURN)
    trainer.train()
    assert finite(logged(trainer)[0]["loss"])


@pytest.mark.parametrize("role", ["user", None])
@pytest.mark.parametrize("thought_format", ["text", "embeddings"])
def test_exported_templates_ask(thought_format, role, tmp_path):
    """An exported model's chat template puts the same turn, or text, before the start, and its greedy answers are ours."""
    settings = QuietStarSettings(
        **{**TURN, "thought_format": thought_format, "thought_prompt_role": role, "thought_start_text": START},
        **dict(
            thought_end_text="1",
            thought_stop_string="1",
            min_thought_length=1,
            thought_length=30,
            top_k=1,
            prediction="thought",
        ),
    )
    model = QuietStarForCausalLM.from_config(tiny_config("llama", vocab_size=len(TOKENIZER)), settings)
    randomize(model)
    model.save_pretrained(tmp_path / "thinking")
    TOKENIZER.save_pretrained(tmp_path / "thinking")
    assert main(["export", str(tmp_path / "thinking"), str(tmp_path / "plain")]) == 0
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "thinking").eval()
    plain, own = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
        AutoTokenizer.from_pretrained(tmp_path / "plain"),
    )
    assert not (tmp_path / "plain" / "quietstar.safetensors").exists()
    start = () if thought_format == "text" else tuple(own.convert_tokens_to_ids(["<think>"]))
    end = () if thought_format == "text" else tuple(own.convert_tokens_to_ids(["</think>"]))
    for a in range(60):
        ids, message = asked(f"{a} plus 4"), [{"role": "user", "content": f"{a} plus 4"}]
        opened = own.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert opened == [*model.thought_marks.opened(ids), *start]
        assert own.apply_chat_template(message, tokenize=False) == TOKENIZER.apply_chat_template(
            message, tokenize=False
        )
        ours = written(model, torch.tensor([ids]), 4, return_thoughts=True)
        thought, answer = ours.thoughts[0][0].token_ids, ours.sequences[0, len(ids) :].tolist()
        if "1" not in TOKENIZER.decode(thought) or 0 in thought or "1" in TOKENIZER.decode(answer):
            continue
        wrote = [*thought, *end, *answer]
        assert written(plain, torch.tensor([opened]), len(wrote))[0, len(opened) :].tolist() == wrote
        return
    raise AssertionError("no thought ended")


def test_a_start_that_is_joined_is_not_exported(tmp_path):
    """Since the plain model would read another token than the one that it learned."""
    settings = QuietStarSettings(
        **{**TEXT, **TURN, "thought_prompt": None, "thought_prompt_role": None, "thought_start_text": "plus"},
        prediction="thought",
    )
    QuietStarForCausalLM.from_config(tiny_config("llama", vocab_size=300), settings).save_pretrained(
        tmp_path / "thinking"
    )
    byte_tokenizer().save_pretrained(tmp_path / "thinking")  # whose answers begin after a space
    with pytest.raises(
        ValueError, match="'plus', or `thought_prompt`, is joined by the tokenizer with the text before it"
    ):
        main(["export", str(tmp_path / "thinking"), str(tmp_path / "plain")])


# Bad input


def refusing(template: str) -> str:
    return template.replace(
        "{{ message['role']", "{% if loop.index > 1 %}{{ raise_exception('alternate') }}{% endif %}{{ message['role']"
    )


LEADING = "{% for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}" + CHATML
SILENT = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)


@pytest.mark.parametrize(
    ("template", "role", "says"),
    [
        (None, "user", "the tokenizer has no chat template"),
        (refusing(CHATML), "user", r"the chat template refuses it \(TemplateError: alternate\)"),
        (SILENT, "system", "the chat template leaves it out"),
        (LEADING, "system", "does not write it between the last message and the answer"),
    ],
)
def test_templates_that_have_no_such_turn(template, role, says):
    """Are told at the start, with what to do."""
    settings = QuietStarSettings(**{**TURN, "thought_prompt_role": role})
    with pytest.raises(ValueError, match=says):
        Marks.of(settings, byte_tokenizer(chat_template=template), 300)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(TURN, thought_prompt_role="tool"), "`thought_prompt_role` is 'tool'; choose one of system, user"),
        (dict(TURN, thought_prompt=None), "`thought_prompt_role` is 'user', .* set `thought_prompt`"),
        (dict(TURN, thought_positions="all"), "set `thought_prompt` and `thought_positions='prompt_end'`"),
        (
            dict(TURN, data=Dataset.from_dict({"prompt": ["3 plus 4"] * 4, "completion": [" is 7"] * 4})),
            "a prompt of the train dataset does not end with what opens an answer",
        ),
    ],
)
def test_bad_options(options, says, tmp_path):
    """Before anything is trained."""
    with pytest.raises(ValueError, match=says):
        tiny_trainer(tmp_path, **{"data": conversations(), "tokenizer": TOKENIZER, **options})


def test_thoughts_that_a_turn_cannot_ask_for(tmp_path):
    """Elsewhere than before an answer: in scoring, and in generation."""
    model, (text, thoughts) = turn_model(), batch()
    with pytest.raises(ValueError, match="the text does not end with what opens an answer"):
        inside = Thoughts(
            Positions(thoughts.positions.index + 1, thoughts.positions.mask), thoughts.token_ids, thoughts.mask
        )
        score(model, ScoreRequest(text, inside, M, SharedPrefix(), prediction="thought"))
    beside(model, tmp_path)
    for ids in (ids_of("3 plus 4 is 7"), ids_of("\n")):
        with pytest.raises(ValueError, match="the text does not end with what opens an answer"):
            written(model, torch.tensor([ids]), 2)
    prompt = torch.tensor([asked("3 plus 4")])
    with pytest.raises(ValueError, match="`think` is 'always', and with `thought_prompt_role`"):
        written(model, prompt, 2, think="always")
    assert written(model, torch.tensor([ids_of("3 plus")]), 2, think="never").shape[1] > 2
