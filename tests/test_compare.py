"""What runs leave of their course, and `trl-quietstar compare`, which reads it."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from transformers import TrainerCallback

from trl_quietstar.cli import main
from trl_quietstar.cli.compare import QUANTILES, Run, interval, unit_of
from trl_quietstar.evaluation.plots import PANELS
from trl_quietstar.training.history import HISTORY, PLOT, RUN, read_history

from .training import text_data, tiny_trainer


def words(path) -> list[str]:
    """The words in a plot, which is well-formed."""
    return [element.text for element in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("evaluates", [True, False])
def test_every_run_leaves_its_history_and_a_plot(evaluates, tmp_path):
    """Nothing is saved and perhaps nothing evaluated: each entry of the log is there, with its step, and all panels are drawn."""
    evaluation = text_data(4, 300) if evaluates else None
    trainer = tiny_trainer(tmp_path / "out", evaluation=evaluation, save_strategy="no", hub_token="hf_secret")
    if evaluates:
        trainer.evaluate()
    trainer.train()
    settings, entries = read_history(tmp_path / "out")
    before = entries[: int(evaluates)]
    assert all(entry["step"] == 0 and "eval_reward" in entry for entry in before)
    expected = [{name: x for name, x in entry.items() if name != "total_flos"} for entry in trainer.state.log_history]
    assert entries[len(before) :] == expected  # the Trainer takes that one out as it prints
    assert settings["thought_length"] == 3 and "secret" not in (tmp_path / "out" / RUN).read_text()
    assert set(PANELS) <= set(words(tmp_path / "out" / PLOT)) and "nothing was logged" not in words(
        tmp_path / "out" / PLOT
    )


class Killed(TrainerCallback):
    """Ends a run as a signal would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_that_is_killed_leaves_its_history(tmp_path):
    """Up to where it came; one that goes on from its checkpoint begins with what that had logged, and a new one anew."""
    options = dict(save_strategy="steps", save_steps=2, max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, callbacks=[Killed()], **options).train()
    assert [entry["step"] for entry in read_history(tmp_path)[1]] == [1, 2]
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in read_history(tmp_path)[1] if "loss" in entry] == [1, 2, 3, 4]
    trainer.train()
    assert [entry["step"] for entry in read_history(tmp_path)[1] if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_does_not_end_for_its_history(tmp_path, caplog):
    """A file that cannot be written is warned about."""
    (tmp_path / "out" / HISTORY).mkdir(parents=True)
    tiny_trainer(tmp_path / "out").train()
    assert "history of the run cannot be written" in caplog.text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two settings with two seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for rate in (1e-3, 1e-2):
        for seed in (0, 1):
            name = folder / f"{rate}-{seed}"
            tiny_trainer(name, seed=seed, learning_rate=rate, run_name=f"{rate} {seed}", max_steps=2).train()
    return folder


def test_settings_are_compared_over_seeds(runs, capsys, monkeypatch, tmp_path):
    """A row for each setting, named by what it differs in, with the mean over its seeds and its interval; and a plot."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", *sorted(str(path) for path in runs.iterdir())]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate=0.001" in printed and "learning_rate=0.01" in printed and "seed=" not in printed
    for rate in ("0.001", "0.01"):
        values = [read_history(runs / f"{rate}-{seed}")[1] for seed in (0, 1)]
        values = [next(e["rl/nll_with"] for e in reversed(log) if "rl/nll_with" in e) for log in values]
        assert (
            f"{sum(values) / 2:.4f}" in printed
            and f"({interval(values)[0]:.4f} to {interval(values)[1]:.4f})" in printed
        )
    assert {"learning_rate=0.001", "learning_rate=0.01", *PANELS} <= set(words("compare.svg"))


def test_one_setting_and_evaluations(tmp_path, capsys):
    """Evaluations come before logging windows; a single run has no interval."""
    tiny_trainer(tmp_path / "a", evaluation=text_data(4, 300), eval_strategy="steps", eval_steps=3).train()
    assert main(["compare", str(tmp_path / "a"), "--output", str(tmp_path / "plot.svg")]) == 0
    printed = capsys.readouterr().out
    last = [entry for entry in read_history(tmp_path / "a")[1] if "eval_reward" in entry][-1]
    assert "last evaluation" in printed and "one setting" in printed and f"{last['eval_reward']:+.4f}" in printed
    assert "reward (probability a token)" in printed
    assert " to " not in printed and (tmp_path / "plot.svg").is_file()


def test_the_unit_of_rewards_that_are_compared():
    """Of one type it is the type's; a log tells of functions, whatever the type says."""
    a, b, own = (
        Run(name, {"reward_type": kind}, [{"step": 1, "rl/reward": 0.1, **more}])
        for name, kind, more in (
            ("a", "accuracy", {}),
            ("b", "log_likelihood", {}),
            ("own", "accuracy", {"rl/rewards/short/mean": 1.0}),
        )
    )
    assert unit_of([a, a]) == "share of right tokens" and unit_of([own]) == "of functions"
    assert unit_of([a, b]) == unit_of([a, own]) == "units differ"


def test_intervals_are_students():
    """By their definition."""
    stats = pytest.importorskip("scipy.stats")
    assert interval([1.0]) is None
    for count in (2, 3, 10):
        values = [math.sin(i) for i in range(count)]
        expected = stats.t.interval(0.95, count - 1, loc=stats.tmean(values), scale=stats.sem(values))
        assert interval(values) == pytest.approx(expected, rel=1e-3)
    assert len(QUANTILES) == 9


def test_what_is_no_run(runs, tmp_path):
    """Said in a sentence, with what to give."""
    one = next(runs.iterdir())
    with pytest.raises(ValueError, match="No run is given; give the output directories"):
        main(["compare"])
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no run.json"):
        main(["compare", str(tmp_path)])
    for name in (RUN, HISTORY):
        (tmp_path / name).write_bytes((one / name).read_bytes())
    lines = (tmp_path / HISTORY).read_text()
    (tmp_path / HISTORY).write_text(lines + '{"step": 3, "rl/rew')  # killed while it wrote
    assert len(read_history(tmp_path)[1]) == len(lines.splitlines())
    (tmp_path / HISTORY).write_text("{\n" + lines)
    with pytest.raises(ValueError, match=r"Line 1 of history.jsonl of .* is broken"):
        main(["compare", str(tmp_path)])
    (tmp_path / HISTORY).write_text("")
    with pytest.raises(ValueError, match="has logged nothing yet"):
        main(["compare", str(tmp_path)])
    (tmp_path / RUN).write_text("{}")
    with pytest.raises(ValueError, match="run.json of .* is broken"):
        main(["compare", str(tmp_path)])
