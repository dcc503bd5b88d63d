"""Every field of Transformers' `TrainingArguments` in turn: it changes what a run does, is refused by name, or stands here with
the reason why the Trainer alone sees to it. A field that a new Transformers brings must be entered."""

import ast
import functools
import inspect
import re
import signal
import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import trl_quietstar
from trl_quietstar import QuietStarREINFORCETrainer
from trl_quietstar.training.distributed import check_engine
from trl_quietstar.training.folders import check_checkpoint

from .training import log_of, text_data, tiny_args, tiny_trainer


FIELDS = [field.name for field in fields(TrainingArguments)]
NEWER = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
}  # than the oldest Transformers that is supported

# Refused, unless it is what the trainer does in any case: a value, and the options it needs to be a value at all
REFUSED = {
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "label_names": ["targets"],
    "length_column_name": "n_tokens",
    "optim_target_modules": ["q_proj"],
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "neftune_noise_alpha": 5.0,
}

# Seen in the log, the weights or the files of a run: what the other run has besides, and the value that makes the difference
SAVES = dict(save_strategy="steps", save_steps=1)
EVALUATES = dict(eval_strategy="steps", eval_steps=1)
GROUPS = dict(train_sampling_strategy="group_by_length", per_device_train_batch_size=2)
CHANGES = {
    "output_dir": ({}, "elsewhere"),
    "per_device_train_batch_size": ({}, 2),
    "num_train_epochs": (dict(max_steps=-1, num_train_epochs=0.5), 1.0),
    "max_steps": ({}, 1),
    "learning_rate": ({}, 1e-2),
    "lr_scheduler_type": ({}, "constant"),
    "warmup_steps": ({}, 1),
    "optim": ({}, "sgd"),
    "weight_decay": ({}, 0.5),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.5),
    "adam_epsilon": ({}, 1e-2),
    "gradient_accumulation_steps": ({}, 2),
    "max_grad_norm": ({}, 0.1),
    "bf16": (dict(bf16=False), True),
    "bf16_full_eval": (dict(evaluates=True), True),
    "fp16_full_eval": (dict(evaluates=True), True),
    "logging_strategy": ({}, "no"),
    "logging_steps": ({}, 2),
    "logging_first_step": (dict(logging_steps=2), True),
    "include_num_input_tokens_seen": ({}, "non_padding"),
    "eval_strategy": ({}, "epoch"),
    "eval_steps": (EVALUATES, 2),
    "eval_delay": (EVALUATES, 2),
    "eval_on_start": (EVALUATES, True),
    "per_device_eval_batch_size": (dict(evaluates=True), 2),
    "save_only_model": (SAVES, True),
    "save_strategy": ({}, "steps"),
    "save_steps": (SAVES, 2),
    "save_total_limit": (SAVES, 1),
    "load_best_model_at_end": (dict(learning_rate=3.0, **SAVES, **EVALUATES), True),
    "metric_for_best_model": (dict(metric_for_best_model="eval_reward", **SAVES, **EVALUATES), "eval_nll_with"),
    "greater_is_better": (dict(metric_for_best_model="eval_loss", **SAVES, **EVALUATES), True),
    "seed": ({}, 7),
    "data_seed": ({}, 7),
    "dataloader_drop_last": (dict(max_steps=3, per_device_eval_batch_size=1), True),
    "train_sampling_strategy": ({}, "sequential"),
    "skip_memory_metrics": ({}, False),
    "optim_args": (dict(optim="sgd"), "momentum=0.5"),
    "lr_scheduler_kwargs": (dict(lr_scheduler_type="polynomial"), {"power": 3.0}),
}

# A run is the same with it as without, as it should be; or another test sees to it
SAME = {
    "auto_find_batch_size": (True, "where memory does not run short; test_runs.py for where it does"),
    "activation_checkpointing": (True, "layers are computed again, to the same"),
    "torch_empty_cache_steps": (1, "frees what is free"),
    "eval_accumulation_steps": (1, "losses go to the CPU earlier"),
    "eval_use_gather_object": (True, "gathers losses by another call"),
    "eval_do_concat_batches": (False, "of predictions, which there are none of; losses are joined in the end"),
    "prediction_loss_only": (True, "what evaluation does in any case: there are no predictions"),
    "average_tokens_across_devices": (False, "on one process; refused on several"),
    "logging_nan_inf_filter": (False, "of losses that are not finite, whose steps the trainer skips: test_faults.py"),
    "restore_callback_states_from_checkpoint": (
        True,
        "of a run that does not resume; early stopping is restored always",
    ),
    "ignore_data_skip": (True, "of a run that does not resume"),
    "dataloader_num_workers": (1, "rows come in the same order"),
    "debug": ("underflow_overflow", "hooks that look at what layers return"),
    "save_on_each_node": (True, "there is one"),
    "accelerator_config": ({"split_batches": True}, "on one process"),
}

# those of both that nothing in the package reads or replaces: the Trainer's loop, optimizers and log, as for any of its trainers
OF_THE_TRAINERS_LOOP = {
    *(
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "optim_args",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "warmup_steps",
    ),
    *("logging_first_step", "include_num_input_tokens_seen", "skip_memory_metrics", "eval_delay", "eval_on_start"),
    *("fp16_full_eval", "save_on_each_node", "eval_accumulation_steps", "eval_use_gather_object"),
    *("eval_do_concat_batches", "prediction_loss_only", "torch_empty_cache_steps"),
}

LOADER = "of the data loaders, which the trainer leaves to the Trainer"
ENGINE = "of Accelerate's engine or of the devices, set up by the Trainer before the trainer comes in"
HUB = "of the Trainer's upload, which is called with whole checkpoints: test_hub.py"
REPORT = "of the integrations that log, which get the trainer's log as it is"
SCRIPT = "for scripts: no Trainer reads it"
UNCHANGED = {
    "activation_checkpointing_kwargs": "handed to the model by the Trainer; reentrant ones are refused",
    "gradient_checkpointing": "an older name of `activation_checkpointing`",
    "gradient_checkpointing_kwargs": "an older name of `activation_checkpointing_kwargs`",
    "use_cache": "set in the model's config by the Trainer",
    "dataloader_pin_memory": LOADER,
    "dataloader_persistent_workers": LOADER,
    "dataloader_prefetch_factor": LOADER,
    "dataloader_multiprocessing_context": LOADER,
    "dataloader_in_order": LOADER,
    "remove_unused_columns": "which columns reach a reward function: test_columns.py",
    "enable_jit_checkpoint": "a signal handler of the Trainer; below",
    "fp16": ENGINE + "; without effect on a CPU, which a warning says",
    "tf32": ENGINE,
    "use_cpu": ENGINE,
    "parallelism_config": ENGINE + "; what splits texts is refused, below",
    "ddp_find_unused_parameters": ENGINE,
    "ddp_bucket_cap_mb": ENGINE,
    "ddp_broadcast_buffers": ENGINE,
    "ddp_static_graph": ENGINE,
    "ddp_backend": ENGINE,
    "ddp_timeout": ENGINE,
    "fsdp": ENGINE,
    "fsdp_config": ENGINE,
    "deepspeed": ENGINE,
    "local_rank": ENGINE,
    "push_to_hub": HUB,
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "log_on_each_node": REPORT,
    "log_level": REPORT,
    "log_level_replica": REPORT,
    "full_determinism": ENGINE,
    "disable_tqdm": REPORT,
    "report_to": REPORT,
    "run_name": REPORT,
    "project": REPORT,
    "trackio_space_id": REPORT,
    "trackio_bucket_id": REPORT,
    "trackio_static_space_id": REPORT,
    "do_train": SCRIPT,
    "do_eval": SCRIPT,
    "do_predict": SCRIPT,
    "resume_from_checkpoint": SCRIPT + ", and the command line does",
}


def test_every_field_is_entered_once():
    """A field that is new in Transformers must be tried, and one that is gone leaves this page."""
    entered = [*REFUSED, *CHANGES, *SAME, *UNCHANGED]
    assert len(entered) == len(set(entered))
    assert not set(FIELDS) - set(entered) and not set(entered) - set(FIELDS) - NEWER


# What the Trainer alone sees to


def read_by(source: str) -> dict[str, set[str]]:
    """For each function of a module, the fields that it reads of `args`."""
    tree = ast.parse(textwrap.dedent(source))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {
        function.name: {
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and node.attr in FIELDS
            and "args" in (getattr(node.value, "id", None), getattr(node.value, "attr", None))
        }
        for function in functions
    }


def replaced() -> set[str]:
    """Methods of the Trainer that the trainer replaces without calling them."""
    ours = [cls for cls in QuietStarREINFORCETrainer.__mro__ if cls.__module__.startswith("trl_quietstar")]
    sources = "".join(inspect.getsource(cls) for cls in ours)
    names = {name for cls in ours for name in vars(cls) if callable(getattr(Trainer, name, None))}
    return {name for name in names if f"super().{name}(" not in sources}


def test_unchanged_fields_are_the_trainers_alone():
    """None of them is read in a method that the trainer replaces, nor by the package, but for those that say so."""
    methods = read_by(inspect.getsource(Trainer))
    assert "compute_loss" in replaced() and "average_tokens_across_devices" in methods["compute_loss"]  # it can fail
    lost = set().union(*(methods.get(name, set()) for name in replaced()))
    modules = [
        path.read_text("utf-8")
        for path in Path(trl_quietstar.__file__).parent.rglob("*.py")
        if path.parent.name != "cli"
        and path.stem not in ("rules", "contradictions", "precision")  # which check options, and do nothing by them
    ]
    ours = set().union(*(names for module in modules for names in read_by(module).values()))
    told_apart = {
        "deepspeed",
        "disable_tqdm",
        "gradient_checkpointing",
        "hub_model_id",
        "push_to_hub",
        "remove_unused_columns",
        "report_to",
    }
    assert not (lost | ours) & UNCHANGED.keys() - told_apart


# Runs


@functools.cache
def trace(folder: Path, options: tuple) -> tuple:
    """What there is to see of a run of two steps: its log, its weights, its files, its best step, and how many batches it evaluated."""
    options = dict(options)
    evaluates = options.pop("evaluates", False)
    out = folder / options.pop("output_dir", "out")
    options = {name: dict(value) if isinstance(value, tuple) else value for name, value in options.items()}
    torch.manual_seed(0)
    short = dict(max_steps=2, thought_length=1, talk_length=1)
    trainer = tiny_trainer(out, data=text_data(10), evaluation=text_data(5, 300), **{**short, **options})
    batches: list[int] = []
    counter = TrainerCallback()
    counter.on_prediction_step = lambda args, state, control, **_: batches.append(state.global_step)
    trainer.add_callback(counter)
    trainer.train()
    if evaluates:
        trainer.evaluate()
    clock = ("runtime", "per_second", "time")
    log = [{k: v for k, v in entry.items() if not any(c in k for c in clock)} for entry in trainer.state.log_history]
    weights = [parameter.detach().double().sum().item() for parameter in trainer.model.parameters()]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return log, weights, files, trainer.state.best_global_step, len(batches)


def traced(folder: Path, options: dict) -> tuple:
    """The same, made once for each set of options."""
    hashable = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in options.items()}
    return trace(folder / re.sub(r"\W+", "_", str(hashable)), tuple(sorted(hashable.items())))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def slow_if(names: Collection[str], slow: Collection[str]) -> list:
    """Parameters of a test, some of which run with `make test-all` only."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", slow_if(CHANGES, OF_THE_TRAINERS_LOOP))
def test_a_field_changes_the_run(name, runs):
    """Two runs that differ in the field alone, differ."""
    options, value = CHANGES[name]
    assert traced(runs, options) != traced(runs, {**options, name: value})


@pytest.mark.parametrize("name", slow_if([name for name in SAME if name in FIELDS], OF_THE_TRAINERS_LOOP))
def test_a_field_leaves_the_run_as_it_is(name, runs):
    """Two runs that differ in the field alone are the same run, with an evaluation."""
    options, (value, _) = dict(evaluates=True), SAME[name]
    log, weights, *rest = traced(runs, options)
    own_log, own_weights, *own_rest = traced(runs, {**options, name: value})
    tolerance = 1e-4 if name == "activation_checkpointing" else 0  # computed in another order
    assert own_weights == pytest.approx(weights, rel=tolerance) and own_rest == rest
    for own, entry in zip(own_log, log, strict=True):
        assert own == pytest.approx(entry, rel=tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_is_refused(name, tmp_path):
    """By name and value, before anything is loaded; its default is taken."""
    value = REFUSED[name]
    with pytest.raises(ValueError, match=rf"`{name}.*{re.escape(str(value))}.*(Leave it out|lower it)"):
        tiny_args(tmp_path, **{name: value})
    tiny_args(tmp_path, **{name: getattr(tiny_args(tmp_path), name)})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_arguments_that_an_optimizer_does_not_read_are_refused(optim, tmp_path):
    """Transformers makes these optimizers without `optim_args`, whatever stands there. The others read theirs, as SGD does."""
    with pytest.raises(ValueError, match=f"`optim_args='amsgrad=True'` would be ignored by `optim='{optim}'`"):
        tiny_args(tmp_path, optim=optim, optim_args="amsgrad=True")
    args = tiny_args(tmp_path, optim=optim)
    made = Trainer.get_optimizer_cls_and_kwargs(args)
    args.optim_args = "amsgrad=True"
    assert Trainer.get_optimizer_cls_and_kwargs(args) == made


def test_several_processes_are_told_apart(tmp_path, monkeypatch):
    """A mean over each process's own tokens is no option; texts and layers are not split over processes."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="`average_tokens_across_devices=False` .* all 2 processes.*Leave it out"):
        tiny_args(tmp_path, average_tokens_across_devices=False)
    for name in ("tp_size", "cp_size", "sp_size"):
        accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(**{name: 2}), state=SimpleNamespace())
        with pytest.raises(ValueError, match=f"`parallelism_config` has {name} above 1"):
            check_engine(accelerator)
    check_engine(SimpleNamespace(parallelism_config=ParallelismConfig(dp_replicate_size=2), state=SimpleNamespace()))


@pytest.mark.parametrize("split", [True, False])
def test_rows_come_again_in_the_next_step(split, tmp_path, monkeypatch):
    """With `num_iterations=2`, two processes and batches that they split, or that each has of its own."""
    trainer = tiny_trainer(tmp_path, num_iterations=2, accelerator_config={"split_batches": split})
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    rows, step = list(trainer._get_train_sampler()), 4 if split else 8
    assert rows[:step] == rows[step : 2 * step] and not set(rows[:step]) & set(rows[2 * step : 3 * step])


def test_half_precision_on_a_cpu_is_told(tmp_path, caplog):
    """Accelerate leaves `fp16` out there, and says nothing."""
    tiny_args(tmp_path)
    assert not caplog.records
    tiny_args(tmp_path, fp16=True)
    assert [r for r in caplog.records if "`fp16=True` does nothing on a CPU" in r.getMessage()]


class Terminate(TrainerCallback):
    """Sends the signal of a scheduler that wants its machine back, in the middle of the second step."""

    def __init__(self):
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            (callback,) = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
            assert signal.getsignal(signal.SIGTERM) == callback.jit_manager._sigterm_handler
            callback.jit_manager.is_checkpoint_requested = True  # what the handler does, seconds later


def test_a_checkpoint_just_in_time(tmp_path):
    """`enable_jit_checkpoint` leaves a whole checkpoint of the step under way, and what resumes from it is the run."""
    options = dict(max_steps=4, logging_steps=4)
    terminate, handler = Terminate(), signal.getsignal(signal.SIGTERM)
    cut = tiny_trainer(tmp_path / "run", callbacks=[terminate], enable_jit_checkpoint=True, **options)
    terminate.trainer = cut
    cut.train()
    assert cut.state.global_step == 2 and [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [
        "checkpoint-2"
    ]
    assert signal.getsignal(signal.SIGTERM) == handler
    check_checkpoint(tmp_path / "run/checkpoint-2")
    whole, resumed = (tiny_trainer(tmp_path / name, **options) for name in ("whole", "again"))
    whole.train(), resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert log_of(resumed, after=2) == log_of(whole, after=2)
