"""`trl-quietstar check`: what a run would be, before it is started.

    trl-quietstar check --config qa.yaml

Shows the fields that differ from the defaults and three rows as the model sees them. Then an optimizer step of one batch runs on the
real model and data in a folder that is deleted again (two on an accelerator), and some thoughts are sampled: what a step takes here, and
whether any thought helps. Nothing is saved, logged or uploaded.
"""

import math
import sys
import tempfile
import time

import torch
from rich.console import Console
from transformers import IntervalStrategy, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..branches.memory import free_bytes
from ..config import QuietStarConfig
from ..trainer import QuietStarREINFORCETrainer
from ..training.preflight import Found, PreflightCallback
from .preview import print_fields, print_rows
from .train import Asked


ROWS = 3  # that are shown
THOUGHTS = 64  # that are tried where `preflight_thoughts` says no number
WARM_UP = 1  # steps of the trial ahead of the one that is timed, on an accelerator, where the first one prepares much


def run(argv: list[str]) -> None:
    """Shows what a run would be, for the arguments of `train`."""
    asked = Asked.of(argv, "check")
    args, is_main = asked.args, asked.args.process_index == 0
    console = Console(highlight=False, markup=False, quiet=not is_main)
    if is_main:
        print_fields(asked, "check")
    batches, thoughts = args.gradient_accumulation_steps, args.preflight_thoughts or THOUGHTS
    epochs, steps = args.num_train_epochs, args.max_steps
    with tempfile.TemporaryDirectory() as scratch:
        as_trial(args, scratch)
        trainer = asked.trainer()
        if is_main:
            print_rows(trainer, ROWS)
        if args.thought_positions != "none":
            console.print(judged(PreflightCallback(trainer).measure(thoughts)))
        seconds = step_seconds(trainer) * batches
    rows_a_step = trainer.rows_per_batch * args.world_size * batches
    if steps < 1:
        rows = len(trainer.train_dataset)  # type: ignore[arg-type]  # a stream needs `max_steps`
        steps = math.ceil(epochs * rows / rows_a_step)
    console.print(
        f"A step of {rows_a_step} rows takes about {seconds:.3g} s on {args.device}; {steps} steps {duration(steps * seconds)}, without "
        f"evaluations and checkpoints. {memory(args.device)}"
    )


def as_trial(args: QuietStarConfig, folder: str) -> None:
    """Changes options so that a run makes a step or two of one batch, and leaves nothing behind."""
    args.output_dir, args.max_steps = folder, 1 if args.device.type == "cpu" else 1 + WARM_UP
    args.gradient_accumulation_steps = args.num_iterations = 1
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.save_strategy, args.load_best_model_at_end, args.push_to_hub = SaveStrategy.NO, False, False
    args.early_stopping_patience = args.anti_theater_steps = args.preflight_thoughts = None
    args.report_to, args.report_thoughts, args.log_thoughts = [], False, False


class _StepTimer(TrainerCallback):
    """Takes the time of each optimizer step."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = _now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = _now(args.device) - self.start


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def step_seconds(trainer: QuietStarREINFORCETrainer) -> float:
    """Seconds of the last optimizer step of a trial."""
    timer = _StepTimer()
    trainer.add_callback(timer)
    for silenced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silenced)
    trainer.train()
    return timer.seconds


def judged(found: Found) -> str:
    """Whether the model can think about its data at all, in words."""
    if found.useful is None:
        if found.written:
            return (
                "The first rows bring their thoughts, which are imitated, so that none of the model's own was tried."
            )
        return (
            "No position of the first rows is difficult, so that no thought was tried; lower `difficulty_threshold`."
        )
    return f"{found.told()} {found.helping:.0%} raise it at all; the mean change is {found.gain:+.3f}."


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def memory(device: torch.device) -> str:
    """The most memory that was in use on a device, and what is free now; empty where that is not known."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif sys.platform == "win32" or device.type != "cpu":
        return ""
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"Memory: {peak / 1e9:.2f} GB at most, and {free_bytes(device) / 1e9:.1f} GB are free besides."
