"""Callbacks of a run: stages of a curriculum, anti-theater validation with its consequences, the log of the last steps, and an
end to epochs without a step."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import IntervalStrategy, TrainerCallback
from transformers.utils import logging

from ..evaluation.anti_theater import THRESHOLDS, AntiTheaterReport
from .folders import remove_folder, whole_folder
from .thinker import Thinker


if TYPE_CHECKING:
    from .evaluation import EvaluationTrainer


logger = logging.get_logger(__name__)

PASSED = "_passed"  # what the Trainer's uploads to the Hub pass over


class CurriculumCallback(TrainerCallback):
    """
    Enters the stages of `curriculum` at the steps that they begin at. An evaluation or a checkpoint between two stages belongs
    to the earlier one.

    Args:
        thinker ([`Thinker`]):
            Takes over what a stage changes.
    """

    def __init__(self, thinker: Thinker):
        self.thinker = thinker

    def on_step_begin(self, args, state, control, **kwargs):
        if args.enter_stage(state.global_step):
            self.thinker.adopt_settings()


class AntiTheaterCallback(TrainerCallback):
    """
    Validates the thoughts every `anti_theater_steps` optimizer steps and once more at the end of training, on the model
    that training returns. A validation that fails does what `anti_theater_action` says.

    For `"rollback"`, the last model that passed (or its adapter) is kept with its heads in `_passed-{step}` of the output
    directory (the underscore keeps it out of uploads to the Hub), and so is the one that the last checkpoint refers to. A
    rollback also stops: the same data and settings led from that model to the one that failed.

    Args:
        trainer ([`EvaluationTrainer`]):
            The trainer that the callback is added to: it validates thoughts, logs, saves and restores the model.
    """

    def __init__(self, trainer: "EvaluationTrainer"):
        self.trainer = trainer
        self.begin_run()

    def begin_run(self) -> None:
        """Forgets the validations of the run before."""
        self.last_passed: str | None = None  # directory of the model; kept in checkpoints
        self.saved_passed: str | None = None  # what `last_passed` was when the last checkpoint was written
        self.has_stopped = False  # whether a failed validation has stopped training; kept in checkpoints
        self.last_step = -1  # of the last validation
        self.report: AntiTheaterReport | None = None  # of the last validation, unless it brought another model back

    def state(self) -> dict:
        """What a checkpoint keeps: the last model that passed, and whether a failed validation has stopped training."""
        return {"last_passed": self.last_passed, "failed_validation": self.has_stopped}

    def load(self, state: dict) -> None:
        """Takes back what [`AntiTheaterCallback.state`] gave."""
        last_passed = state["last_passed"]
        if last_passed is not None and Path(last_passed).is_dir():  # a later one may have replaced it
            self.last_passed = last_passed
        self.saved_passed = self.last_passed
        self.has_stopped = state["failed_validation"]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.anti_theater_steps == 0 and not self._passes(args, state):
            has_passed = self.last_passed is not None
            if args.anti_theater_action == "stop" or (args.anti_theater_action == "rollback" and has_passed):
                control.should_training_stop = self.has_stopped = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_passed = self.last_passed
        self._forget()

    def on_train_end(self, args, state, control, **kwargs):
        best_is_back = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if best_is_back or self.last_step != state.global_step:
            self._passes(args, state)

    def _passes(self, args, state) -> bool:
        """Validates and logs. Keeps a model that passes, and rolls back one that fails, if that is the action."""
        self.last_step = state.global_step
        self.report = report = self.trainer.validate_thoughts()
        metrics: dict[str, Any] = {f"rl/anti_theater_{name}": value for name, value in report.metrics().items()}
        self.trainer.log(metrics)  # None where a test is undefined
        rolls_back = args.anti_theater_action == "rollback"
        if report.passed:
            if rolls_back:
                self._keep(str(Path(args.output_dir, f"{PASSED}-{state.global_step}")))
            return True
        complaint = _complaint(report, state.global_step)
        if rolls_back and self.last_passed is not None:
            complaint += f" Rolling back to the model in {self.last_passed!r}."
            self.trainer.restore_model(self.last_passed)
            self.report = None
        elif rolls_back:
            complaint += " No model has passed yet that could be rolled back to."
        if state.is_world_process_zero:
            logger.warning(complaint)
        return False

    def _keep(self, directory: str) -> None:
        """Saves the model as the last one that passed."""
        with whole_folder(directory, self.trainer.accelerator, self.trainer.args.should_save) as folder:
            self.trainer.save_locally(folder)
        self.last_passed = directory
        self._forget()

    def _forget(self) -> None:
        """Deletes models that passed and that neither this run nor its last checkpoint would roll back to."""
        if self.trainer.args.should_save:
            kept = {Path(folder).name for folder in (self.last_passed, self.saved_passed) if folder is not None}
            for folder in Path(str(self.trainer.args.output_dir)).glob(f"{PASSED}-*"):
                if folder.name not in kept and folder.name.removeprefix(f"{PASSED}-").isdecimal():
                    remove_folder(str(folder))


def _complaint(report: AntiTheaterReport, step: int) -> str:
    """Names each test that failed, its value and its threshold."""
    parts = []
    for name in report.failures:
        estimate = report.estimates[name]
        if name == "content_gain":
            parts.append(f"content_gain {estimate.value:.3f} (95% interval from {estimate.low:.3f}; above 0 wanted)")
        else:
            parts.append(f"{name} {estimate.value:.3f} (above {THRESHOLDS[name]} wanted)")
    return f"The thoughts failed anti-theater validation at step {step}: {', '.join(parts)}."


class LastWindowCallback(TrainerCallback):
    """Logs the last steps of a run even if they are fewer than `logging_steps`."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_training_stop and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True  # which the Trainer does only where steps are not logged yet

    def on_epoch_end(self, args, state, control, **kwargs):  # an evaluation may have stopped training after the step
        self.on_step_end(args, state, control)


class EmptyEpochCallback(TrainerCallback):
    """Ends what would never end: a stream too short for one optimizer step, which the Trainer reads again and again."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step, self.epochs = state.global_step, 0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs = self.epochs + 1 if state.global_step == self.step else 0
        self.step = state.global_step
        if self.epochs == 2:  # a single one may have been read before training was resumed
            raise ValueError(
                f"The train dataset has too few rows for an optimizer step of `gradient_accumulation_steps` "
                f"({args.gradient_accumulation_steps}) batches of `per_device_train_batch_size` "
                f"({args.per_device_train_batch_size}); lower them, leave out `dataloader_drop_last`, or give more rows."
            )
