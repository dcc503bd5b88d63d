"""Training in a notebook: what it shows, and that an interrupted run leaves a trainer that works."""

import re
import sys
import types

import pytest
from transformers import TrainerCallback, trainer

from trl_quietstar.training import progress
from trl_quietstar.training.history import read_history

from .training import assert_same_logs, text_data, tiny_trainer


EVALUATES = dict(eval_strategy="steps", eval_steps=2)


class Interrupt(TrainerCallback):
    """Ctrl+C, or the button of a notebook, once: where an event comes for a step."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.fire)

    def fire(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """All that is shown as HTML, by Transformers' own callback for notebooks, with a stand-in for IPython."""
    pages: list[str] = []
    handle = types.SimpleNamespace(update=pages.append)
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, lambda page, **kwargs: pages.append(page) or handle
    ipython = types.ModuleType("IPython")
    ipython.display = display
    of_ipython = ("transformers.utils.notebook", "trl_quietstar.training.notebook")
    for name in of_ipython:
        sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    from transformers.utils.notebook import NotebookProgressCallback

    for module in (trainer, progress):
        monkeypatch.setattr(module, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    yield pages
    for name in of_ipython:
        del sys.modules[name]


def table(page: str) -> list[list[str]]:
    """The rows of a page's table, headings first."""
    rows = re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_a_notebook_has_a_table_of_thoughts(shown, tmp_path, capsys):
    """The numbers of a terminal's lines, a row for each step and columns for each evaluation dataset; what is no number is printed."""
    data = {"easy": text_data(8, 300), "hard": text_data(8, 200)}
    options = dict(disable_tqdm=False, eval_on_start=True, preflight_thoughts=4, anti_theater_steps=3, **EVALUATES)
    run = tiny_trainer(tmp_path, evaluation=data, **options)
    run.train()
    headings, *rows = table(shown[-1])
    assert headings[:3] == ["step", "loss", "reward"] and {"easy reward", "hard right without"} < set(headings)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"] and len(set(map(len, rows))) == 1
    losses = [row[headings.index("loss")] for row in rows]
    assert losses == ["", *(f"{entry['loss']:.4g}" for entry in run.state.log_history if "loss" in entry)]
    easy = headings.index("easy reward")
    evaluated = {entry["step"] for entry in run.state.log_history if "eval_easy_reward" in entry}
    assert {int(row[0]) for row in rows if row[easy]} == evaluated >= {0, 2} and "policy_loss" not in shown[-1]
    printed = capsys.readouterr().out
    assert (
        "Before training: " in printed and "Validation of the thoughts at step 3" in printed and "Trained 3" in printed
    )


def test_an_evaluation_in_a_notebook(shown, tmp_path, capsys):
    """By hand it is a line below the cell, and its times stay in what it returns; after an interrupt, too."""
    run = tiny_trainer(
        tmp_path,
        evaluation=text_data(8, 300),
        callbacks=[Interrupt("on_prediction_step", 2)],
        disable_tqdm=False,
        **EVALUATES,
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    tables = [page for page in shown if "<table" in page]
    assert "eval_runtime" in run.evaluate()
    assert "Evaluation at step 2: reward" in capsys.readouterr().out
    assert [page for page in shown if "<table" in page] == tables


@pytest.mark.parametrize("event", ["on_log", "on_prediction_step"])
def test_an_interrupted_run_has_ended(event, tmp_path):
    """The next one begins as the first did; evaluations know that none goes on, as those in bfloat16 must."""
    options = dict(
        evaluation=text_data(8, 300), disable_tqdm=False, eval_on_start=True, bf16_full_eval=True, **EVALUATES
    )
    whole = tiny_trainer(tmp_path / "whole", **options)
    run = tiny_trainer(tmp_path / "run", callbacks=[Interrupt(event, 2)], **options)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not run.is_in_train
    run.model.load_state_dict(weights)
    run.optimizer = run.lr_scheduler = None
    run.train()
    assert_same_logs(run, whole)
    steps = [[entry["step"] for entry in read_history(tmp_path / name)[1]] for name in ("run", "whole")]
    assert steps[0] == steps[1]
