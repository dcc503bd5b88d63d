"""Tables of an evaluation say what each number is, what was not measured, and why numbers seem to disagree."""

import math

import pytest

from trl_quietstar import QuietStarConfig
from trl_quietstar.evaluation.meaning import changes, contradictions, evaluation_rows
from trl_quietstar.evaluation.report import print_comparison, print_evaluation
from trl_quietstar.learning.rewards import REWARD_TYPES, UNITS

from .training import logged, text_data, tiny_trainer


# of a text in which nothing is uncertain enough to think about
NOWHERE = dict(thought_positions="difficulty", difficulty_threshold=1.0)
MEASURED = {"eval_loss": 1.0, "eval_reward": 0.1, "eval_nll_with": 1.0, "eval_nll_without": 1.2}
MEASURED |= {"eval_accuracy_with": 0.6, "eval_accuracy_without": 0.5}


def labels(metrics: dict, **options) -> list[str]:
    return list(evaluation_rows(metrics, QuietStarConfig(**options)))


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_the_reward_has_its_unit(reward_type):
    """Each type has one, and the table gives it."""
    assert UNITS.keys() == set(REWARD_TYPES)
    assert labels(MEASURED, reward_type=reward_type)[0] == f"reward (gain, {UNITS[reward_type]})"


def test_what_makes_the_reward_has_rows_of_its_own():
    """Gain and penalty; functions before their weights; and the limits of clipping."""
    fined = {**MEASURED, "eval_gain": 0.3, "eval_penalty": 0.2}
    assert labels(fined, reward_clip_range=[-0.5, 1.0])[:3] == [
        "reward (gain − penalty)",
        "gain, probability a token, clipped to -0.5 … 1",
        "penalty on unfinished thoughts",
    ]
    mixed = {**MEASURED, "eval_rewards/exact_match/mean": 0.3, "eval_rewards/<lambda>/mean": 0.2}
    assert labels(mixed)[:3] == ["reward (weighted sum of functions)", "- exact_match", "- lambda"]


def test_an_evaluation_of_nothing_says_so(tmp_path, capsys, caplog):
    """Without a place for a thought there is no reward of 0; training goes on, by the best model that there is."""
    best = dict(load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1)
    trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300), **NOWHERE, **best, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    for name in ("reward", "nll_with", "nll_without", "accuracy_with", "coherence"):
        assert math.isnan(metrics[f"eval_{name}"])
    assert math.isfinite(metrics["eval_loss"]) and math.isnan(logged(trainer, "eval_reward")[0]["eval_reward"])
    assert "has no place for a thought" in caplog.text
    print_evaluation(metrics, trainer.args)
    print_comparison(metrics, metrics, "Steps", trainer.args)
    lines = [line for line in capsys.readouterr().out.splitlines() if "reward (gain" in line]
    assert [line.count("not measured") for line in lines] == [1, 2] and not [x for x in lines if "nan" in x]


def test_numbers_that_were_not_finite_are_not_called_unmeasured(capsys):
    print_evaluation(dict.fromkeys(MEASURED, math.nan), QuietStarConfig())
    assert capsys.readouterr().out.count("not finite") == 5


@pytest.mark.parametrize(
    ("changed", "options", "expected"),
    [
        ({}, {}, []),
        ({"eval_nll_with": 1.3}, {}, ["help by reward and accuracy, and hurt by NLL", "of probabilities"]),
        ({"eval_accuracy_with": 0.4}, {"reward_type": "log_likelihood"}, ["hurt by accuracy", "mean over thoughts"]),
        ({"eval_nll_with": 1.3}, {"reward_type": "accuracy"}, ["hurt by NLL", "the reward asks only"]),
        ({"eval_nll_with": 1.3, "eval_rewards/short/mean": 1.0}, {}, ["what its functions give"]),
        # the penalty is no harm that thoughts do
        ({"eval_reward": -0.1, "eval_gain": 0.1, "eval_penalty": 0.2}, {}, []),
        ({"eval_nll_with": 1.2, "eval_accuracy_with": 0.5}, {}, []),
        ({"eval_accuracy_with": math.nan, "eval_reward": 0.0}, {}, ["Nothing that rewards look at"]),
        (dict.fromkeys(MEASURED, math.nan), {}, []),
    ],
)
def test_numbers_that_disagree_are_explained(changed, options, expected):
    """Only where they do, by what each of them counts."""
    notes = " ".join(contradictions({**MEASURED, **changed}, QuietStarConfig(**options)))
    assert bool(notes) == bool(expected)
    for phrase in expected:
        assert phrase in notes


def test_a_reward_that_moves_against_the_likelihood_is_explained():
    """The reward is a difference, so that it falls where the prediction without thoughts gains more."""
    better = {**MEASURED, "eval_reward": 0.05, "eval_nll_with": 0.9, "eval_nll_without": 1.0}
    assert "fell although" in " ".join(changes(MEASURED, better))
    assert "rose although" in " ".join(changes(better, MEASURED))
    assert not changes(MEASURED, MEASURED)
    assert not changes(MEASURED, {**MEASURED, "eval_reward": 0.2, "eval_nll_with": 0.9})
    assert not changes({}, MEASURED)


def test_nothing_about_thoughts_where_there_are_none(capsys):
    """A model without thoughts has the rows that were measured, and no note."""
    plain = {"eval_loss": 1.0, "eval_nll_without": 1.0, "eval_accuracy_without": 0.5}
    print_evaluation(plain, QuietStarConfig(thought_positions="none"))
    out = capsys.readouterr().out
    assert "NLL without thoughts, nats a token" in out and "with thoughts" not in out and "reward" not in out
