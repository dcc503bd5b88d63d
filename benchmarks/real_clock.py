"""Training for a time: [`Clock`] ends a run of [`benchmarks.real`], sets its learning rates, and has it measured and saved."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback


SHOWN = (
    "loss",
    "reward",
    "reward_std",
    "entropy",
    "written_nll",
    "useful_thoughts",
    "mixed_groups",
    "thought_length",
    "grad_norm",
)
LEAST = 0.01  # of a learning rate's peak, lest a step do nothing


class Clock(TrainerCallback):
    """
    Ends a run before the step that would pass its time, and sets learning rates by the time used. What was used and measured
    stands in the log history, which is part of each checkpoint.

    Args:
        start, until, total (`float`):
            Seconds: used before the run, when it ends, and when the arm would end.
        warmup, decay (`float`):
            Share of `total` in which learning rates rise from the start, and in which they fall to 0 at the end.
        points (`int`):
            Measurements in `total`, at equal distances.
        checkpoints (`float`):
            Seconds between two checkpoints.
        measure (`Callable`):
            Gives a point of the learning curve, as a dictionary.
        write (`Callable`):
            Given the Trainer's state whenever a checkpoint is saved.
        now (`Callable`):
            A clock in seconds. What passes in measuring and saving is not counted.
    """

    def __init__(
        self,
        start: float,
        until: float,
        total: float,
        *,
        warmup: float,
        decay: float,
        points: int,
        checkpoints: float,
        measure: Callable[[], dict],
        write: Callable,
        now: Callable[[], float] = time.process_time,
    ):
        self.start, self.until, self.total, self.used = start, until, total, start
        self.warmup, self.decay = warmup * total, decay * total
        self.interval, self.checkpoints = total / points, checkpoints
        self.measure, self.write, self.now = measure, write, now

    def on_train_begin(self, args, state, control, **kwargs):
        self.used = self.saved = last_used(state.log_history, self.start)
        self.step, self.last = 0.0, None  # seconds of the last step, and when it ended
        if state.global_step == 0 and self.start == 0:
            self._note_point(state)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.last = self.now() if self.last is None else self.last
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor()

    def factor(self) -> float:
        """What learning rates are multiplied by: it rises, stays, and falls."""
        risen = (self.used - self.start + self.step) / max(self.warmup, 1e-9)
        return max(min(1.0, risen, (self.total - self.used) / max(self.decay, 1e-9)), LEAST)

    def on_step_end(self, args, state, control, **kwargs):
        before, self.step = self.used, self.now() - self.last
        self.used += self.step
        ends = self.used + self.step > self.until
        if ends or self.used // self.interval > before // self.interval:
            self._note_point(state)
        if ends or self.used - self.saved >= self.checkpoints:
            self._note(state, **({"ended": self.until} if ends else {}))
            self.saved, control.should_save = self.used, True
        control.should_training_stop |= ends
        self.last = self.now()

    def on_save(self, args, state, control, **kwargs):
        self.write(state)
        self.last = self.now()

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: (logs or {}).get(name, (logs or {}).get(f"rl/{name}")) for name in SHOWN}
        self._print(state, {name: value for name, value in shown.items() if value is not None})

    def _note_point(self, state) -> None:
        point = self.measure()
        self._note(state, curve=point)
        self._print(state, point)

    def _note(self, state, **values) -> None:
        state.log_history.append({"step": state.global_step, "used": self.used, **values})

    def _print(self, state, values: dict) -> None:
        words = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        print(f"{self.used / 60:7.2f} min  step {state.global_step:<5} {words}", flush=True)


class Continued(TrainerCallback):
    """
    Begins a run with the optimizer's state that another one ended with. The first steps of a fresh AdamW have their full size whatever
    the gradients say, and those of reinforcement, small and noisy, then undo what a cold start has taught.

    Args:
        file (`Path`):
            The optimizer's state in a checkpoint.
    """

    def __init__(self, file: Path):
        self.file = file

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 0:
            before = torch.load(self.file, map_location="cpu", mmap=True)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": before["state"]})


def last_used(log: list[dict], start: float) -> float:
    """Seconds that a run has used, by its log history."""
    return next((entry["used"] for entry in reversed(log) if "used" in entry), start)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; the Trainer writes its state last."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max((x.parent for x in states), key=lambda x: int(x.name.rpartition("-")[2]), default=None)


def state_of(checkpoint: Path | None) -> dict:
    """The Trainer's state in a checkpoint."""
    if checkpoint is None:
        return {"log_history": [], "global_step": 0}
    return json.loads((checkpoint / "trainer_state.json").read_text())
