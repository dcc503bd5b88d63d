"""What a run shows of itself on a terminal: a line for each logging window and evaluation, and bars that say what of. In a notebook
it is a table (`notebook`).

All metrics are in `history.jsonl` of the output directory, in checkpoints, and with loggers such as W&B. With `disable_tqdm` they are
printed whole, as the Trainer does.
"""

import time
from collections.abc import Iterable
from datetime import timedelta

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length


# what a line says of a logging window or an evaluation, by the metrics without `rl/` or `eval_`
PARTS = {
    "reward": "reward {:+.4f}",
    "nll_with": "NLL {:.3f} with thoughts",
    "nll_without": "{:.3f} without",
    "exact_match_with": "right {:.1%} with thoughts",
    "exact_match_without": "{:.1%} without",
    "thought_length": "thoughts of {:.1f} tokens",
}
OF_WINDOWS = ("reward", "nll_with", "nll_without", "thought_length")


class RunCallback(TrainerCallback):
    """A callback that is told of the end of a run even if it was interrupted, of which the Trainer tells none."""

    def end_run(self) -> None:
        """Forgets what belongs to the run."""
        raise NotImplementedError


class ThoughtProgress(ProgressCallback, RunCallback):
    """The Trainer's progress, with lines that fit a terminal and named bars."""

    def end_run(self) -> None:
        for bar in (self.prediction_bar, self.training_bar):  # the inner one first, which stands below
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.began, self.first_step = time.monotonic(), state.global_step
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.prediction_bar is None and state.is_world_process_zero and has_length(eval_dataloader):
            self.prediction_bar = _bar(eval_dataloader, f"Evaluation at step {state.global_step}")
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not state.is_world_process_zero:
            return
        line = line_of(logs, state)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
            return
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if "loss" in logs and done > 0:
            seconds = (time.monotonic() - self.began) / done * left
            line += f", {timedelta(seconds=round(seconds))} left"
        self.training_bar.write(line)


def line_of(logs: dict, state: TrainerState) -> str | None:
    """A line for a logging window, an evaluation of data that may have a name, preflight, a
    validation, or the end; None for anything else."""
    if "preflight_useful_thoughts" in logs:
        mixed = logs.get("preflight_mixed_groups")
        groups = "" if mixed is None else f", {mixed:.0%} of their positions have useful and useless ones"
        return f"Before training: {logs['preflight_useful_thoughts']:.0%} of the thoughts are useful{groups}"
    if "rl/anti_theater_passed" in logs:
        verdict = "passed" if logs["rl/anti_theater_passed"] else "failed"
        return f"Validation of the thoughts at step {state.global_step}: {verdict}"
    if "train_runtime" in logs:
        return f"Trained {state.global_step} steps in {timedelta(seconds=round(logs['train_runtime']))}"
    if "loss" in logs:
        found = {name: logs.get(f"rl/{name}") for name in OF_WINDOWS}
        title = f"Step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4g}"
    else:
        prefix = prefix_of(logs)
        if prefix is None:
            return None
        found = {name: logs.get(prefix + name) for name in PARTS}
        of = prefix.removeprefix("eval_").strip("_")
        title = f"Evaluation{f' of {of}' if of else ''} at step {state.global_step}"
    parts = [PARTS[name].format(value) for name, value in found.items() if value is not None]
    return (", " if "loss" in logs else ": ").join([title, ", ".join(parts)] if parts else [title])


def prefix_of(logs: dict) -> str | None:
    """What stands before the names of an evaluation's metrics, as `eval_`; None for other logs."""
    return next((name.removesuffix("nll_without") for name in logs if name.endswith("_nll_without")), None)


def show_progress(handler: CallbackHandler) -> None:
    """Has a run show itself by these lines, or in a notebook by a table of the same numbers, where the Trainer would show it."""
    handler.callbacks[:] = [_of_thoughts(callback) for callback in handler.callbacks]


def _of_thoughts(callback: TrainerCallback) -> TrainerCallback:
    if type(callback) is ProgressCallback:
        return ThoughtProgress()
    if type(callback) is DEFAULT_PROGRESS_CALLBACK:  # the notebook's, where that is the default
        from .notebook import ThoughtTable  # needs IPython

        return ThoughtTable()
    return callback


def end_run(handler: CallbackHandler) -> None:
    """Tells each [`RunCallback`] that the run has ended."""
    for callback in handler.callbacks:
        if isinstance(callback, RunCallback):
            callback.end_run()


def watched(batches: DataLoader, title: str, shown: bool) -> Iterable:
    """The batches, with a bar of that name where it is to be shown."""
    bar = _bar(batches, title, disable=not shown or not has_length(batches))
    try:
        for batch in batches:
            yield batch
            bar.update(1)
    finally:
        bar.close()


def _bar(batches: DataLoader, title: str, disable: bool = False) -> tqdm:
    total = len(batches) if has_length(batches) else None
    return tqdm(total=total, desc=title, leave=False, dynamic_ncols=True, disable=disable)
