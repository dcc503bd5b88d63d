"""What belongs to a run ends with it, is logged in full, and is found out before the first step where it cannot be."""

import json
import math
import shutil
import time
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import BEMACallback

from trl_quietstar import QuietStarForCausalLM, QuietStarREINFORCETrainer
from trl_quietstar.training.folders import rotate

from .training import assert_same_state, log_of, logged, saved_model, text_data, tiny_args, tiny_trainer


FROZEN = dict(learning_rate=0.0, heads_learning_rate=0.0)
EVALUATES = dict(eval_strategy="steps", eval_steps=1)


# The state of a run


def test_a_second_run_starts_from_nothing(tmp_path):
    """`train` again on a model that did not change: every number is that of the first run."""
    trainer = tiny_trainer(
        tmp_path,
        evaluation=text_data(6, 300),
        max_steps=5,
        logging_steps=2,
        early_stopping_patience=9,
        **EVALUATES,
        **FROZEN,
    )
    trainer.train()
    first = log_of(trainer)
    (stopping,) = trainer._early_stopping()
    used = stopping.early_stopping_patience_counter
    trainer.guard.skipped = 7
    trainer.train()
    assert log_of(trainer) == first and used > 0
    assert stopping.early_stopping_patience_counter == used


def test_a_second_run_is_validated_at_its_end(tmp_path):
    """The last validation of the run before was at the same step, and is no reason to leave this one out."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(6, 300), anti_theater_steps=2)
    for _ in range(2):
        trainer.train()
        assert [entry["step"] for entry in logged(trainer, "rl/anti_theater_passed")] == [2, 3]


def test_drift_is_told_for_each_data_set(tmp_path, caplog):
    """A harder data set is no worse prediction of the easier one, under the same prefix or another."""
    easy, hard = text_data(8), text_data(8, 300).map(lambda row: {"text": row["text"][::-1]})
    trainer = tiny_trainer(tmp_path, evaluation=easy, max_steps=8, data=easy, learning_rate=1e-2)
    others = [tiny_trainer(tmp_path, evaluation=data).eval_dataset for data in (hard, easy)]
    trainer.train()
    own = [trainer.evaluate(), trainer.evaluate(), trainer.evaluate(trainer.eval_dataset)]
    other = [trainer.evaluate(data) for data in (others[0], others[1], others[0])]
    assert other[0]["eval_nll_without"] > own[0]["eval_nll_without"] + 0.5
    assert [metrics["eval_no_thought_drift"] for metrics in own + other] == [0.0] * 6
    assert not [record for record in caplog.records if record.name == "trl_quietstar.training.collapse"]
    assert not [name for name in trainer.predict(others[0]).metrics if "drift" in name]


def test_full_evaluation_leaves_the_weights(tmp_path):
    """Evaluated in bfloat16 and then trained: the run, and what it leaves, is that of a trainer that only trained."""
    path = saved_model(tmp_path / "model")
    options = dict(model=path, evaluation=text_data(6, 300), max_steps=2)
    plain, cast = (tiny_trainer(tmp_path, bf16_full_eval=casts, **options) for casts in (False, True))
    before = {name: buffer.clone() for name, buffer in cast.model.named_buffers()}
    in_single, in_half = plain.evaluate()["eval_loss"], cast.evaluate()["eval_loss"]
    assert in_half != in_single and in_half == pytest.approx(in_single, rel=0.05)
    for trainer in (plain, cast):
        trainer.train()
        trainer.evaluate()
    assert_same_state(cast.model, plain.model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in cast.model.named_buffers())
    assert log_of(cast)[:2] == log_of(plain)[:2]


class ShortMemory(TrainerCallback):
    """Runs out of memory in the third step of batches of 4."""

    def __init__(self):
        self.raised = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and state.train_batch_size == 4:
            self.raised += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("options", [{}, dict(num_iterations=2, muon_learning_rate=1e-3)], ids=str)
def test_a_smaller_batch_begins_anew(options, tmp_path):
    """After two steps and a lack of memory, `auto_find_batch_size` gives the run that the smaller batch alone gives."""
    path, memory = saved_model(tmp_path / "model"), ShortMemory()
    found = tiny_trainer(tmp_path, model=path, auto_find_batch_size=True, callbacks=[memory], max_steps=4, **options)
    wanted = tiny_trainer(tmp_path, model=path, per_device_train_batch_size=3, max_steps=4, **options)
    found.train(), wanted.train()
    assert memory.raised == 1 and found.state.train_batch_size == 3
    assert log_of(found) == log_of(wanted)
    assert_same_state(found.model, wanted.model)


# What is logged


def test_the_last_window_is_logged(tmp_path):
    """Five steps, two a window: the fifth is logged too, and is the step that a log of each step shows."""
    single, double = (tiny_trainer(tmp_path, max_steps=5, logging_steps=steps) for steps in (1, 2))
    single.train(), double.train()
    assert [entry["step"] for entry in logged(double)] == [2, 4, 5]
    last, same = log_of(double)[-1], log_of(single)[-1]
    assert last == {name: value for name, value in same.items() if name != "rl/no_thought_drift"}  # of five windows


class Stop(TrainerCallback):
    """Ends training where it is told to."""

    def __init__(self, where: str):
        setattr(self, where, self.stop)

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("where", ["on_step_end", "on_evaluate"])
def test_the_window_of_a_run_cut_short_is_logged(where, tmp_path):
    """Whoever ends a run, its last steps are logged; unless nothing is."""
    options = dict(max_steps=9, evaluation=text_data(4, 300), **EVALUATES)
    for strategy, steps in (("steps", [2, 3]), ("no", [])):
        trainer = tiny_trainer(
            tmp_path, callbacks=[Stop(where)], logging_steps=2, logging_strategy=strategy, **options
        )
        trainer.train()
        assert [entry["step"] for entry in logged(trainer)] == steps


def test_the_entropy_coefficient_is_that_of_the_step(tmp_path):
    """The first step has the initial coefficient, and each is logged with what it was trained with."""
    used = []
    trainer = tiny_trainer(tmp_path, entropy_decay=0.5, entropy_coefficient=0.1, max_steps=3)
    coefficients = trainer.coefficients
    trainer.coefficients = lambda: used.append(coefficients()) or used[-1]
    trainer.train()
    assert [entry["rl/entropy_coefficient"] for entry in logged(trainer)] == [0.1, 0.05, 0.025]
    assert [each.entropy for each in used] == [0.1, 0.05, 0.025]


class Slow(TrainerCallback):
    """Takes half a second for an event of each step."""

    def on_evaluate(self, args, state, control, **kwargs):
        time.sleep(0.5)


def test_tokens_per_second_are_of_training(tmp_path):
    """The time before training and that of evaluations is in no window: 7 * 4 * 2 tokens cannot come at 100 a second."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300), callbacks=[Slow()], max_steps=3, **EVALUATES)
    trainer.evaluate()
    trainer.train()
    tokens = trainer.args.per_device_train_batch_size * (4 + 3 * 3 * 2)  # at least: of text, and of thoughts
    seconds = [tokens / entry["rl/tokens_per_second"] for entry in logged(trainer)]
    assert max(seconds) < 0.5


@pytest.mark.parametrize(
    "options",
    [
        dict(advantage_baseline="none"),
        dict(thought_positions="none"),
        dict(max_grad_norm=0.0, num_iterations=2),
        dict(reward_prediction="thought", use_gae=False, logging_steps=2),
    ],
    ids=str,
)
def test_nothing_is_logged_without_a_value(options, tmp_path):
    """What a run does not measure is not in its log: every entry is a finite number."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300), **options, **EVALUATES)
    trainer.train()
    entries = trainer.state.log_history
    assert not [
        name for entry in entries for name, value in entry.items() if value is None or not math.isfinite(value)
    ]


class Logs(TrainerCallback):
    """Logs a loss of its own in each step."""

    def __init__(self):
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.log({"loss": 0.5})


def test_a_loss_of_ones_own_can_be_logged(tmp_path):
    """It is logged as it is, before and during a run, and changes nothing of the run's own windows."""
    logs = Logs()
    plain = tiny_trainer(tmp_path, logging_steps=2, max_steps=4)
    trainer = tiny_trainer(tmp_path, logging_steps=2, max_steps=4, callbacks=[logs])
    logs.trainer = trainer
    trainer.log({"loss": 0.5})
    assert trainer.state.log_history == [{"loss": 0.5, "epoch": 0, "step": 0}]
    plain.train(), trainer.train()
    entries = log_of(trainer)
    assert [entry for entry in entries if "rl/reward" in entry] == log_of(plain)
    assert [entry["loss"] for entry in entries if "rl/reward" not in entry] == [0.5] * 4


# Callbacks and arguments of other trainers


def test_bema_averages_the_model(tmp_path):
    """TRL's `BEMACallback` leaves a thinking model; without its averages it is the trained one."""
    bema = BEMACallback(update_freq=1, ema_power=0.0, bias_power=99.0)
    trainer = tiny_trainer(tmp_path, callbacks=[bema])
    trainer.train()
    averaged = QuietStarForCausalLM.from_pretrained(tmp_path / "bema")
    assert_same_state(averaged, trainer.model)
    again = type(averaged).from_pretrained(tmp_path / "bema")
    assert type(again) is type(trainer.model)
    assert_same_state(again, trainer.model)


@pytest.mark.parametrize(
    "options", [dict(advantage_baseline="none"), dict(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))], ids=str
)
def test_bema_of_a_model_frozen_in_part(options, tmp_path):
    """It would fail at its first update, hundreds of steps later."""
    trainer = tiny_trainer(tmp_path, callbacks=[BEMACallback()], **options)
    with pytest.raises(ValueError, match="`BEMACallback` averages whole models, and .* are frozen"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "name", ["compute_metrics", "data_collator", "model_init", "reward_funcs", "tokenizer", "foo"]
)
def test_arguments_of_other_trainers(name, tmp_path):
    """Are refused by name, with what to do instead, before anything is loaded."""
    with pytest.raises(TypeError, match=f"takes no argument `{name}`{'.' if name == 'foo' else ': .{20,}'}"):
        QuietStarREINFORCETrainer("nowhere", tiny_args(tmp_path), text_data(), **{name: None})


def test_metrics_set_afterwards(tmp_path):
    """A `compute_metrics` that would never be called is refused at the first evaluation."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300))
    trainer.compute_metrics = dict
    with pytest.raises(ValueError, match="`compute_metrics` was set .*no logits"):
        trainer.evaluate()


def test_a_search_is_refused(tmp_path):
    """Plainly, with what to do; and so is a trial given to `train`."""
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(NotImplementedError, match="`hyperparameter_search`.*a trainer for each trial"):
        trainer.hyperparameter_search(direction="maximize")
    with pytest.raises(ValueError, match="`trial` is"):
        trainer.train(trial={"learning_rate": 1.0})


# The output directory


def test_only_numbered_checkpoints_rotate(tmp_path):
    """`checkpoint-best`, `checkpoint-2-copy` and the like are someone's own, at every save and at the end."""
    mine = [tmp_path / name for name in ("checkpoint-best", "checkpoint-2-copy", "checkpoint-", "_passed-mine")]
    for folder in mine:
        folder.mkdir()
        (folder / "note").write_text("mine")
    trainer = tiny_trainer(
        tmp_path, evaluation=text_data(4, 300), save_strategy="steps", save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, anti_theater_steps=2, anti_theater_action="rollback", **EVALUATES,
    )  # fmt: skip
    trainer.train()
    assert all((folder / "note").is_file() for folder in mine)
    left = [path.name for path in tmp_path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    assert left == [trainer.state.best_model_checkpoint.split("/")[-1]]
    assert trainer.args.save_total_limit == 1


def test_rotation_counts_numbered_ones(tmp_path):
    """Others take no place among those that stay."""
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-best"):
        (tmp_path / name).mkdir()
    rotate(str(tmp_path), 2, ())
    assert {path.name for path in tmp_path.glob("*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-best"}


def test_an_output_directory_that_cannot_be_written(tmp_path):
    """Is found before the model is loaded, or, where it came to be so later, before training."""
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(OSError, match=rf"`output_dir` '.*{place}' cannot be written to \(.*\); give another"):
            QuietStarREINFORCETrainer("nowhere", tiny_args(tmp_path / place), text_data())
    trainer = tiny_trainer(tmp_path / "out")
    trainer.training_step = None
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="cannot be written to"):
        trainer.train()


@pytest.mark.parametrize(
    ("adapter", "saves", "needed"), [(False, {}, 3), (False, dict(save_only_model=True), 1), (True, {}, 3)]
)
def test_an_output_directory_without_room(adapter, saves, needed, tmp_path, monkeypatch):
    """One byte less than a checkpoint takes is found before training; without checkpoints nothing is asked for."""
    lora = LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None
    trainer = tiny_trainer(tmp_path, peft_config=lora, save_strategy="steps", save_steps=1, max_steps=1, **saves)
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed * trained - 1))
    with pytest.raises(OSError, match="has room for .* GB, and a checkpoint takes .* GB; make room"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed * trained))
    trainer.train()
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*.*") if path.suffix != ".json")
    assert written > needed * trained  # the estimate is a least size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0))
    tiny_trainer(tmp_path, max_steps=1).train()


# Other settings than those of the run that is resumed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run with `checkpoint-1`, and its model beside it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_trainer(folder / "out", model=saved_model(folder / "model"), save_strategy="steps", **ONE).train()
    return folder


ONE = dict(max_steps=1, save_steps=1)
OTHERS = {
    "optim": "sgd",
    "optim_args": "a=1",
    "muon_learning_rate": 1e-3,
    "grokfast_lambda": 0.1,
    "advantage_baseline": "leave_one_out",
    "reward_prediction": "thought",
    "lr_scheduler_type": "reduce_lr_on_plateau",
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_option_that_changes_the_optimizer_is_named(name, saved, tmp_path):
    """With both values, before training; and what a checkpoint of an earlier version lacks is told by its groups."""
    given = {} if name == "optim_args" else {name: OTHERS[name]}  # which AdamW does not read
    options = dict(evaluation=text_data(4, 300), **EVALUATES, **ONE) | given
    trainer = tiny_trainer(tmp_path / "out", model=str(saved / "model"), **options)
    trainer.args.optim_args = OTHERS[name] if name == "optim_args" else None
    trainer.training_step = None
    checkpoint = str(saved / "out/checkpoint-1")
    with pytest.raises(ValueError, match=rf"`{name}` is '?{OTHERS[name]}.* and was .* start anew .*`model="):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_groups_tell_an_optimizer_that_nothing_names(saved, tmp_path):
    """A checkpoint of an earlier version, an optimizer made by hand, and layers frozen by hand."""
    old = shutil.copytree(saved / "out/checkpoint-1", tmp_path / "checkpoint-1")
    state = json.loads((old / "quietstar_state.json").read_text())
    del state["optimizer"]
    (old / "quietstar_state.json").write_text(json.dumps(state))
    trainers = [
        tiny_trainer(tmp_path, model=str(saved / "model"), **options, **ONE) for options in (dict(optim="sgd"), {})
    ]
    trainers[1].model.model.embed_tokens.weight.requires_grad_(False)
    for trainer in trainers:
        trainer.training_step = None
        with pytest.raises(ValueError, match=r"groups of \[.*\] parameters with .* that of this run .*`optim`.*froze"):
            trainer.train(resume_from_checkpoint=str(old))
    tiny_trainer(tmp_path, model=str(saved / "model"), **ONE).train(resume_from_checkpoint=str(old))


def test_values_that_a_checkpoint_brings_are_named(saved, tmp_path, caplog):
    """A learning rate given on resuming would be overwritten in silence; without an optimizer's state it counts."""
    options = dict(model=str(saved / "model"), learning_rate=0.5, weight_decay=0.25, **ONE)
    tiny_trainer(tmp_path, **options).find_checkpoint(str(saved / "out/checkpoint-1"))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "trl_quietstar.training.resuming"]
    assert "`learning_rate` 0.001 (0.5 here), `weight_decay` 0.0 (0.25 here). For other values" in message
