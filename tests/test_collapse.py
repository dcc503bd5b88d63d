"""Reward collapse is measured and warned about, once each time it begins."""

import json

import pytest
import torch

from trl_quietstar.training.collapse import DRIFT, MIXED, WINDOWS, ZERO_STD, CollapseWatch

from .training import logged, plain_model, text_data, tiny_trainer


@pytest.fixture
def messages(caplog):
    """Warnings of the project."""
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "trl_quietstar.training.collapse"
    ]


def feed(watch: CollapseWatch, nlls, std: float = 0.1) -> list[float | None]:
    """Logging windows with the given NLL without and with thoughts; returns the drifts."""
    return [
        watch.training({"rl/reward_std": std, "rl/nll_without": a, "rl/nll_with": b}, step).get("rl/no_thought_drift")
        for step, (a, b) in enumerate(nlls)
    ]


# Scripted runs


def test_no_gain_warns_once_an_episode(messages):
    """Thoughts that all earn the same for some windows warn once, and again only after there was a gain in between."""
    watch, level = CollapseWatch(), [(1.0, 1.0)]
    feed(watch, level * (WINDOWS - 1), std=0.0)
    assert messages() == []
    feed(watch, level * 10, std=0.5 * ZERO_STD)
    (message,) = messages()
    assert all(name in message for name in ("`rl/reward_std`", "`rl/mixing_weight`", "`temperature`", "`reward_type`"))
    feed(watch, level, std=2 * ZERO_STD)
    feed(watch, level * (WINDOWS - 1), std=0.0)
    assert len(messages()) == 1
    feed(watch, level, std=0.0)
    assert len(messages()) == 2


def test_no_gain_needs_windows_in_a_row(messages):
    """A window with gains, however small, starts the count anew; one without thoughts does not."""
    watch, level = CollapseWatch(), [(1.0, 1.0)]
    for _ in range(5):
        feed(watch, level * (WINDOWS - 1), std=0.0)
        feed(watch, level, std=1e-3)
    assert messages() == []
    feed(watch, level * (WINDOWS - 1), std=0.0)
    watch.training({"rl/reward_std": None}, 0)
    feed(watch, level, std=0.0)
    assert len(messages()) == 1


def test_drift_is_the_rise_above_the_lowest(messages):
    """The drift is the mean without thoughts over the last windows minus its lowest, in nats."""
    flat, low, high = [(2.0, 1.5)] * WINDOWS, [(1.0, 1.0)] * WINDOWS, [(1.5, 1.0)] * WINDOWS
    drifts = feed(CollapseWatch(), flat + low + high)
    assert drifts[: WINDOWS - 1] == [None] * (WINDOWS - 1)
    assert drifts[WINDOWS - 1 : 2 * WINDOWS] == [0.0] * (WINDOWS + 1)
    assert drifts[2 * WINDOWS :] == pytest.approx([0.5 * (i + 1) / WINDOWS for i in range(WINDOWS)])
    (message,) = messages()
    assert "`rl/nll_without`" in message and "`base_nll_coefficient`" in message


@pytest.mark.parametrize(
    ("rise", "gained", "warns"),
    [
        (0.5 * DRIFT, 0.0, 0),
        (2 * DRIFT, 0.0, 1),
        (2 * DRIFT, DRIFT, 1),
        (2 * DRIFT, 3 * DRIFT, 0),
        (2 * DRIFT, -1.0, 1),
    ],
)
def test_drift_warns_where_thoughts_have_not_gained_as_much(rise, gained, warns, messages):
    """On the same texts, a worse no-thought prediction counts unless the one with thoughts has gained more."""
    watch = CollapseWatch()
    watch.evaluation({"eval_nll_without": 2.0, "eval_nll_with": 2.0}, "eval", 1)
    for step in (2, 3):
        metrics = watch.evaluation({"eval_nll_without": 2.0 + rise, "eval_nll_with": 2.0 - gained}, "eval", step)
        assert metrics == {"eval_no_thought_drift": pytest.approx(rise)}
    assert len(messages()) == warns


def test_evaluations_are_followed_by_name(messages):
    """Sets of their own level do not mix, and what is not finite is left out."""
    watch = CollapseWatch()
    for prefix, level in (("eval_a", 1.0), ("eval_b", 3.0), ("eval_a", float("nan")), ("eval_a", 1.1)):
        watch.evaluation({f"{prefix}_nll_without": level, f"{prefix}_nll_with": level}, prefix, 1)
    assert messages() == []
    again = CollapseWatch()
    again.load(watch.state())
    assert again.evaluation({"eval_a_nll_without": 1.5, "eval_a_nll_with": 1.5}, "eval_a", 2) == {
        "eval_a_no_thought_drift": 0.5
    }


def test_harder_texts_do_not_warn(messages):
    """Training windows whose texts scatter by 0.3 nats, with thoughts as without, are no collapse."""
    nlls = (2 + 0.3 * torch.randn(1_000, 1)).expand(-1, 2).tolist()
    assert max(drift for drift in feed(CollapseWatch(), nlls) if drift is not None) > 2 * DRIFT
    assert messages() == []


def feed_groups(watch: CollapseWatch, mixed: float | None, windows: int = WINDOWS, useful: float = 0.0) -> None:
    """Logging windows with the given shares of mixed groups and useful thoughts."""
    for step in range(windows):
        watch.training({"rl/mixed_groups": mixed, "rl/useful_thoughts": useful}, step)


@pytest.mark.parametrize(
    ("useful", "advised"),
    [(0.0, "written thoughts first"), (1.0, "Take harder ones"), (0.5, "either settled or out of reach")],
)
def test_mixed_groups_that_die_warn_once(useful, advised, messages):
    """The advice goes by how many thoughts are useful; windows without thoughts say nothing."""
    watch = CollapseWatch()
    feed_groups(watch, 2 * MIXED)
    feed_groups(watch, 0.5 * MIXED, WINDOWS - 1)
    feed_groups(watch, None)
    assert messages() == []
    feed_groups(watch, 0.5 * MIXED, 10, useful)
    (message,) = messages()
    assert advised in message and "`rl/mixed_groups` 1.0%" in message


def test_groups_that_were_never_mixed_do_not_warn(messages):
    """Single mixed windows are no life that could end."""
    watch = CollapseWatch()
    for _ in range(4):
        feed_groups(watch, 0.0, 2 * WINDOWS)
        feed_groups(watch, 0.5, WINDOWS - 1)
    assert messages() == []


def test_mixed_groups_are_warned_of_again_after_they_lived_again(messages):
    """A few mixed windows are no recovery, as many as it takes to be alive are one."""
    watch = CollapseWatch()
    for mixed, windows, warnings in ((0.5, WINDOWS, 0), (0.0, WINDOWS, 1), (0.5, 1, 1), (0.0, WINDOWS, 1)):
        feed_groups(watch, mixed, windows)
        assert len(messages()) == warnings
    feed_groups(watch, 0.5)
    feed_groups(watch, 0.0)
    assert len(messages()) == 2


def test_the_life_of_groups_is_kept_in_checkpoints(messages):
    """A run that goes on warns as the whole run would; states of before there was this watch load."""
    watch, again = CollapseWatch(), CollapseWatch()
    feed_groups(watch, 0.5)
    feed_groups(watch, 0.0, WINDOWS - 1)
    again.load(json.loads(json.dumps(watch.state())))
    feed_groups(again, 0.0, 1)
    assert len(messages()) == 1
    old = {name: value for name, value in watch.state().items() if name not in ("mixed", "was_mixed")}
    again.load(old)
    feed_groups(again, 0.0)
    assert len(messages()) == 1
    again.begin_run()
    feed_groups(again, 0.0)
    assert len(messages()) == 1


# Real runs


def test_accuracy_rewards_behind_a_closed_gate_warn(tmp_path, messages):
    """With an accuracy reward, thoughts that the mixing head hardly lets through never change the likeliest token."""
    tiny_trainer(tmp_path, reward_type="accuracy", heads_learning_rate=0.0, max_steps=8).train()
    (message,) = messages()
    assert "All thoughts have earned the same for 5 logging windows up to step" in message


def test_a_healthy_run_does_not_warn(tmp_path, messages):
    """The defaults on the same model, with a falling NLL."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(8, 300), max_steps=15, eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert messages() == []
    assert logged(trainer)[-1]["rl/no_thought_drift"] >= 0
    assert logged(trainer, "eval_reward")[-1]["eval_no_thought_drift"] == 0


def test_the_policy_term_alone_spoils_the_prediction_without_thoughts(tmp_path, messages):
    """A model that knows the texts, trained with no NLL term at all, forgets them, and the warning says so."""
    model = plain_model()
    first = dict(learning_rate=5e-3, data=text_data(200), evaluation=text_data(16, 300), per_device_train_batch_size=8)
    tiny_trainer(tmp_path, model, max_steps=40, policy_coefficient=0.0, **first).train()
    trainer = tiny_trainer(
        tmp_path, model, max_steps=40, eval_strategy="steps", eval_steps=10, eval_on_start=True,
        nll_coefficient=0.0, reader_nll_coefficient=0.0, base_nll_coefficient=0.0, **first,
    )  # fmt: skip
    trainer.train()
    drift = logged(trainer, "eval_reward")[-1]["eval_no_thought_drift"]
    assert drift > DRIFT
    assert [message for message in messages() if "`eval_nll_without`" in message]
