"""Settings beyond the defaults: thoughts before a completion that read it whole, rewards of one's own, stages."""

import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from datasets import Dataset

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.learning.advantages import thought_advantages
from trl_quietstar.learning.objective import Coefficients, LossInputs, quietstar_loss
from trl_quietstar.learning.rewards import thought_rewards
from trl_quietstar.settings import OPTIONS
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions, talk_span
from trl_quietstar.thinking.sampling import unfinished

from .tiny import byte_tokenizer, generators, sampling, think, tiny_model
from .training import DEFAULTS, log_of, logged, saved_model, text_data, tiny_args, tiny_trainer


PROBLEMS = Dataset.from_dict(
    {
        "prompt": [f"{a} plus {a} is" for a in range(12)],
        "completion": [f" {a + a} . {'and so on ' * a}" for a in range(12)],
    }
)
IGNORED = -100


def text_with_prompts() -> Text:
    """A prompt of three; two turns; a packed row of two documents with prompts; and one without."""
    ids = torch.arange(40).view(4, 10)
    prompts = torch.tensor(
        [
            [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 1, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
    )
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    position_ids = torch.arange(10).repeat(4, 1)
    position_ids[2, 5:] = torch.arange(5)
    return Text.from_batch(ids, mask, ids.masked_fill(prompts.bool(), IGNORED), position_ids)


# Settings made by hand


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction": "foo"}, "`prediction` is 'foo'; choose one of mixed, thought"),
        ({"thought_length": 0}, "`thought_length` is 0, below its limit of 1"),
        ({"top_p": 1.5}, "`top_p` is 1.5, above its limit of 1"),
        ({"talk_length": "4"}, "`talk_length` is '4'; give 4"),
        ({"thought_positions": "often"}, "`thought_positions` is 'often'; give one of"),
        ({"thought_stop_string": ""}, "`thought_stop_string` is empty"),
        ({"min_thought_length": 9}, r"`min_thought_length` \(9\) exceeds `thought_length` \(8\)"),
        ({"thought_prompt_role": "user"}, "`thought_prompt_role` is 'user', the turn before an answer"),
    ],
)
def test_settings_keep_the_rules_of_the_options_they_remember(changes, message):
    """Wherever a model is given them."""
    model, settings = tiny_model(), QuietStarSettings(**changes)
    for give in (model.adopt_settings, lambda x: QuietStarForCausalLM.from_config(model.config, x)):
        with pytest.raises(ValueError, match=message):
            give(settings)
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(QuietStarSettings)}


# Thoughts before a completion


def test_prompt_ends_are_where_labels_begin():
    """The last token before each run of labels, in each document; none where there is no prompt."""
    text = text_with_prompts()
    positions = choose_positions(text, "prompt_end", generators(text))
    rows = [index[mask].tolist() for index, mask in zip(positions.index, positions.mask, strict=True)]
    assert rows == [[2], [1, 6], [1, 7], []]


@pytest.mark.parametrize("positions", ["all", "prompt_end", "difficulty", 3])
def test_the_talk_spans_the_completion(positions):
    """`"completion"` reads to the last label of the document, as a loop finds it; a number stays what it is."""
    text = text_with_prompts()
    usable = text.predicted()
    if positions == "prompt_end":
        usable = usable & (text.labels[:, :-1] == IGNORED)
    longest = 1
    for b, t in usable.nonzero().tolist():
        ends = [
            i for i in range(10) if text.labels[b, i] != IGNORED and text.document_ids[b, i] == text.document_ids[b, t]
        ]
        longest = max(longest, max(ends) - t)
    assert talk_span(text, "completion", positions) == longest
    assert talk_span(text, 3, positions) == 3


def test_the_whole_answer_is_rewarded(tmp_path, monkeypatch):
    """Each problem has one position, after its prompt, and every token of its answer counts; the saved model knows."""
    from trl_quietstar.training.step import experience_of

    seen = []
    monkeypatch.setattr(
        "trl_quietstar.training.step.experience_of",
        lambda text, *rest: seen.append((text, experience_of(text, *rest))) or seen[-1][1],
    )
    trainer = tiny_trainer(
        tmp_path,
        model=saved_model(tmp_path / "model"),
        data=PROBLEMS,
        talk_length="completion",
        thought_positions="prompt_end",
    )
    trainer.train()
    for text, experience in seen:
        assert experience.thoughts.positions.mask.sum(1).tolist() == [1] * len(text.input_ids)
        assert experience.talk_mask.sum((1, 2, 3)).tolist() == (text.labels != IGNORED).sum(1).tolist()
    trainer.save_model()
    model = QuietStarForCausalLM.from_pretrained(str(tmp_path))
    assert model.quietstar_settings.talk_length == "completion"
    ids = byte_tokenizer()("5 plus 5 is", return_tensors="pt")["input_ids"]
    once = model.generate(ids, max_new_tokens=9, do_sample=False, return_thoughts=True)
    assert len(once.thoughts[0]) == 1 and len(once.thoughts[0][0].mixing_weights) == 9


def test_talk_lengths_in_words_are_checked(tmp_path):
    """A number in quotes, as the command line gives it, is a number; other words are refused."""
    assert QuietStarConfig(str(tmp_path), talk_length="6", use_cpu=True).talk_length == 6
    with pytest.raises(ValueError, match="talk_length.*'answer'.*'completion'"):
        QuietStarConfig(str(tmp_path), talk_length="answer", use_cpu=True)


# Rewards


def test_a_reward_function_is_the_reward(tmp_path):
    """A function that gives what a reward type gives trains the same; another one, otherwise; text and thoughts reach it."""
    shapes = []

    def probability(text, thoughts, **gains):
        shapes.append((tuple(text.input_ids.shape), tuple(thoughts.token_ids.shape)))
        return thought_rewards(**gains, reward_type="probability")

    options = dict(reward_clip_range=[-0.01, 0.01])
    runs = {
        name: tiny_trainer(tmp_path, reward_functions=function, **options)
        for name, function in (
            ("none", None),
            ("same", probability),
            ("other", lambda **kwargs: -probability(**kwargs)),
        )
    }
    for trainer in runs.values():
        trainer.train()
    rewards = {name: [entry["rl/reward"] for entry in logged(trainer)] for name, trainer in runs.items()}
    assert rewards["same"] == rewards["none"] != rewards["other"]
    assert shapes and all(text[0] == thoughts[0] for text, thoughts in shapes)


@pytest.mark.parametrize("wrong", [lambda **_: 1.0, lambda logps_with, **_: logps_with], ids=["a number", "a token's"])
def test_a_reward_function_gives_one_number_a_thought(wrong, tmp_path):
    """Anything else is refused by name, with the shape that is wanted."""
    with pytest.raises(ValueError, match=r"The reward function `<lambda>` gave .*\(B, J, G\)"):
        tiny_trainer(tmp_path, reward_functions=wrong).train()


def test_unfinished_thoughts_pay(tmp_path):
    """Those that ran into `thought_length` lose the penalty, the others nothing."""
    model, text = tiny_model(), text_with_prompts()
    settings = sampling(min_thought_length=1)
    thoughts = think(model, text, settings=settings)
    cut = unfinished(thoughts, settings)
    for place in itertools.product(*map(range, cut.shape)):
        ids = thoughts.token_ids[place][thoughts.mask[place]]
        assert bool(cut[place]) == (len(ids) == 4 and int(ids[-1]) % 4 != 0)
    assert cut.any() and not cut.all()
    assert not unfinished(thoughts, sampling(stop=None)).any()

    options = dict(min_thought_length=1, thought_stop_string="1", max_steps=1)
    plain, fined = (tiny_trainer(tmp_path, unfinished_thought_penalty=p, **options) for p in (0.0, 0.5))
    plain.train(), fined.train()
    difference = logged(plain)[0]["rl/reward"] - logged(fined)[0]["rl/reward"]
    assert 0 < difference <= 0.5
    entry = logged(fined)[0]
    assert entry["rl/penalty"] == pytest.approx(difference) and "rl/penalty" not in logged(plain)[0]
    assert entry["rl/gain"] == pytest.approx(logged(plain)[0]["rl/reward"], abs=1e-6)


def test_the_penalty_needs_thoughts_that_end(tmp_path):
    """Of thoughts of a fixed length none could be finished."""
    with pytest.raises(ValueError, match="unfinished_thought_penalty=0.5.*min_thought_length"):
        tiny_args(tmp_path, unfinished_thought_penalty=0.5)


def test_thoughts_that_all_end_take_no_more_slots(tmp_path):
    """A limit of 60 tokens costs nothing where all thoughts end at once, in one pass as in two."""
    for single_pass in (True, False):
        trainer = tiny_trainer(
            tmp_path,
            thought_length=60,
            min_thought_length=1,
            thought_stop_string=" ",
            single_pass=single_pass,
            max_steps=1,
        )
        lengths = []
        trainer.thinker.sampling = type(trainer.sampling)(
            **{**vars(trainer.sampling), "stop": lambda ids: ids[:, -1] >= 0}
        )
        trainer.runlog.add = lambda batch, plan, training, lengths=lengths: lengths.append(
            batch.scores.thought_logps.shape[-1]
        )
        trainer.train()
        assert lengths == [1]


def test_the_mean_of_all_thoughts_is_a_baseline():
    """Reward minus the mean of the position's rewards; leave-one-out times (G - 1) / G."""
    rewards, values, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5), torch.ones(2, 3, 4, 5, dtype=torch.bool)
    ours, _ = thought_advantages(rewards, values, mask, "mean")
    torch.testing.assert_close(ours[..., 0], rewards - rewards.mean(-1, keepdim=True))
    theirs, _ = thought_advantages(rewards, values, mask, "leave_one_out")
    torch.testing.assert_close(ours, theirs * 3 / 4)


def test_the_policy_may_have_a_temperature_of_its_own(tmp_path):
    """Thoughts are drawn at one temperature, their log-probabilities taken at the other, in two passes."""
    runs = [tiny_trainer(tmp_path, policy_temperature=t, max_steps=1) for t in (None, 1.0, 3.0)]
    for trainer in runs:
        trainer.train()
    plain, same, other = (logged(trainer)[0] for trainer in runs)
    for name in ("rl/reward", "rl/policy_loss", "rl/entropy"):
        assert same[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-7), name
    assert other["rl/reward"] == pytest.approx(plain["rl/reward"], rel=1e-4)  # the same thoughts
    assert other["rl/entropy"] > plain["rl/entropy"] + 0.1
    with pytest.raises(ValueError, match="policy_temperature"):
        tiny_args(tmp_path, policy_temperature=3.0, single_pass=True)


# Without thoughts


def test_no_thoughts_is_plain_training(tmp_path):
    """With `thought_positions="none"` the loss is the text's likelihood, and only the model's own weights learn."""
    held_out = text_data(4, 300)
    trainer = tiny_trainer(tmp_path, thought_positions="none", max_steps=2, weight_decay=0.0, evaluation=held_out)
    heads = {name: p.clone() for name, p in trainer.model.quietstar.named_parameters()}
    trainer.train()
    for entry in logged(trainer):
        assert entry["rl/num_thoughts"] == 0
        assert entry["loss"] == pytest.approx(entry["rl/total_loss"])
        assert entry["loss"] == pytest.approx(entry["rl/nll_without"], rel=1e-6)
    assert all(torch.equal(p, heads[name]) for name, p in trainer.model.quietstar.named_parameters())
    metrics = trainer.evaluate()
    assert metrics["eval_nll_without"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert "eval_nll_with" not in metrics and "eval_reward" not in metrics


def test_thinking_teaches_the_plain_prediction():
    """`-max(p_with - p_without, 0) log p_without` of true tokens; the thinking prediction is a teacher, not taught."""
    with_, without = (torch.tensor(p, dtype=torch.float64).log().requires_grad_() for p in ([0.6, 0.2], [0.4, 0.5]))
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    inputs = LossInputs(
        *[nothing] * 5,
        thought_mask=nothing.bool(),
        talk_logps=with_.view(1, 1, 1, 2),
        reader_logps=with_.view(1, 1, 1, 2),
        talk_mask=torch.ones(1, 1, 1, 2, dtype=torch.bool),
        text_logps=without.view(1, 2),
        text_mask=torch.ones(1, 2, dtype=torch.bool),
        logps_without=without.view(1, 1, 1, 2),
    )
    loss, terms = quietstar_loss(inputs, Coefficients(0, 0, 0, 0, 0, 0, 0, distillation=2.0))
    assert terms["distillation_loss"].item() == pytest.approx(-0.2 * math.log(0.4) / 2)
    loss.backward()
    torch.testing.assert_close(without.grad, torch.tensor([-0.2, 0.0], dtype=torch.float64))
    assert with_.grad is None


def test_distillation_moves_the_plain_prediction_towards_the_thinking_one(tmp_path):
    """Alone, the term makes true tokens likelier without thoughts; it is logged, and off unless asked for."""
    names = ("policy", "nll", "reader_nll", "base_nll", "value_loss", "entropy", "min_entropy")
    off = {f"{name}_coefficient": 0.0 for name in names}
    trainer = tiny_trainer(
        tmp_path,
        data=text_data(4),  # the same texts at every step
        distillation_coefficient=10.0,
        max_steps=20,
        learning_rate=3e-3,
        heads_learning_rate=0.0,
        **off,
    )
    trainer.train()
    entries = logged(trainer)
    assert all(entry["rl/distillation_loss"] > 0 for entry in entries)
    assert entries[-1]["rl/nll_without"] < entries[0]["rl/nll_without"]
    plain = tiny_trainer(tmp_path, max_steps=1)
    plain.train()
    assert "rl/distillation_loss" not in logged(plain)[0]


# Stages

STAGES = {"0": {"thought_length": 4}, "2": {"thought_length": 2, "talk_length": 1}, "4": {"policy_coefficient": 0.0}}


def staged(folder, resume=None, **options):
    """A run through the stages, with a checkpoint in the middle."""
    trainer = tiny_trainer(folder, max_steps=6, curriculum=STAGES, save_strategy="steps", save_steps=3, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_stages_change_what_they_say(tmp_path):
    """From each stage's first step on its fields hold, until the next; heads and optimizer go on."""
    trainer = staged(tmp_path / "run", gradient_accumulation_steps=2)
    assert [entry["rl/thought_length"] for entry in logged(trainer)] == [4, 4, 2, 2, 2, 2]
    assert trainer.args.policy_coefficient == 0 and trainer.args.talk_length == 1
    trainer.save_model()
    assert QuietStarForCausalLM.from_pretrained(str(tmp_path / "run")).quietstar_settings.thought_length == 2
    assert len(trainer.optimizer.state) == len(list(trainer.model.parameters()))
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} >= {6}


def test_a_run_resumes_in_its_stage(tmp_path):
    """A checkpoint in the second stage: the resumed run is the run."""
    whole = staged(tmp_path / "run")
    resumed = staged(tmp_path / "again", str(tmp_path / "run/checkpoint-3"))
    assert log_of(resumed, after=3) == log_of(whole, after=3)


def test_a_stage_is_evaluated_as_it_was_trained(tmp_path):
    """At the step where a stage ends, evaluation and checkpoint are still of that stage."""
    lengths = []
    trainer = tiny_trainer(
        tmp_path,
        max_steps=3,
        curriculum={"0": {"thought_length": 4}, "2": {"thought_length": 2}},
        evaluation=Dataset.from_dict({"text": ["1 plus 1 is 2 ."]}),
        eval_strategy="steps",
        eval_steps=1,
    )
    add = trainer.runlog.add
    trainer.runlog.add = lambda batch, plan, training: (
        lengths.append(batch.experience.thoughts.mask.shape[-1]) if not training else None,
        add(batch, plan, training),
    )
    trainer.train()
    assert lengths == [4, 4, 2]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"5": {"thought_length": 2.5}}, "thought_length.*2.5"),
        ({"0": 3}, "mapping from steps"),
        ({"soon": {"thought_length": 2}}, "whole number"),
        ({"-1": {"thought_length": 2}}, "-1"),
        ({"5": {"learning_rate": 1.0}}, "learning_rate"),
        ({"5": {"thought_length": 0}}, "thought_length.*0"),
        ({"5": {"talk_length": "answer"}}, "talk_length.*answer"),
        ({"5": {"num_thoughts": 1}}, "num_thoughts.*1"),
    ],
)
def test_stages_are_checked_before_the_first(stages, message, tmp_path):
    """A stage that could not be trained is refused at once, by name and value."""
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_args(tmp_path, curriculum=stages, advantage_baseline="leave_one_out")


@pytest.mark.parametrize(
    "options",
    [
        dict(curriculum={"3": {"thought_length": 126}}),
        dict(thought_length=126, curriculum={"3": {"thought_length": 2}}),
    ],
    ids=["a later one", "before the first"],
)
def test_the_longest_stage_must_fit(options, tmp_path):
    """Thoughts that the model has no positions for are refused at the start, in a stage or before the first."""
    with pytest.raises(ValueError, match="thought_length.*126"):
        tiny_trainer(tmp_path, **options)


def test_a_curriculum_stays_as_it_was_given(tmp_path):
    """Values in words are read, and what the user passed is left alone."""
    stages = {"2": {"talk_length": "1", "thought_positions": "0.5"}}
    args = tiny_args(tmp_path, curriculum=stages)
    assert args.enter_stage(2) and (args.talk_length, args.thought_positions) == (1, 0.5)
    assert stages == {"2": {"talk_length": "1", "thought_positions": "0.5"}}


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "before the stages were an object"])
def test_pickled_arguments_keep_their_stages(is_old, tmp_path):
    """A `training_args.bin` that the Trainer wrote is the configuration, and enters its stages."""
    args = tiny_args(tmp_path, curriculum=STAGES)
    assert args.enter_stage(2)
    if is_old:
        vars(args)["_before_stages"] = vars(args).pop("stages").before
    again = pickle.loads(pickle.dumps(args))
    assert (again.thought_length, again.longest_thought) == (2, 4)
    assert again.enter_stage(0) and (again.thought_length, again.talk_length) == (4, DEFAULTS["talk_length"])
    assert again.to_dict() == tiny_args(tmp_path, curriculum=STAGES).to_dict()


def test_a_saved_model_remembers_options_by_their_names(tmp_path):
    """Every setting is an option, with its default and its value."""
    defaults = {field.name: field.default for field in dataclasses.fields(QuietStarConfig)}
    assert {name: defaults[option] for name, option in OPTIONS.items()} == QuietStarSettings().to_dict()
    settings = tiny_args(tmp_path, reward_prediction="thought", min_p=0.1).settings()
    assert (settings.prediction, settings.min_p, settings.thought_length) == ("thought", 0.1, 3)
