"""The Trainer's checkpoints: what is written when, and how a run goes on from one.

How a folder is written and checked stands in `folders`, and whether it fits a run in `resuming`.
"""

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .._compat import BaseTrainer
from ..config import QuietStarConfig
from ..contradictions import ADAMW
from ..model.adapters import base_of
from ..model.sharding import full_state_dict, gathered, load_sharded, loaded_whole
from .distributed import check_optimizer_file, is_sharded, load_optimizer, save_optimizer
from .folders import (
    STATE_NAME,
    check_checkpoint,
    check_output_dir,
    check_space,
    last_checkpoint,
    remove_unfinished,
    rotate,
    whole_folder,
)
from .resuming import check_fits, check_groups, check_optimizer_fields, load_weights


logger = logging.getLogger(__name__)

REFERENCE_NAME = "reference"


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Puts parameters and buffers back after a block that casts the model. A copy of them lies in the CPU's memory until then."""
    parameters = [(parameter, parameter.data.cpu()) for parameter in model.parameters()]
    buffers = [(m, name, x.cpu()) for m in model.modules() for name, x in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data.to(parameter.device)
        for module, name, data in buffers:
            setattr(module, name, data.to(getattr(module, name).device))


def checkpoint_bytes(model: PreTrainedModel, args: QuietStarConfig) -> int:
    """Least size of a checkpoint in bytes: the weights or the adapter, and AdamW's two moments of each weight that is trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    has_moments = args.optim in ADAMW and not args.save_only_model
    return (trained if is_peft_model(model) else sum(size for size, _ in sizes)) + has_moments * 2 * trained


class CheckpointTrainer(BaseTrainer):
    """
    The Trainer with checkpoints that are whole or not there, and that hold all that a run goes on from. A run that is resumed
    has the losses that it would have had without a break. A run that had ended, by `max_steps` or early stopping, ends again
    at once.

    A subclass adds state of its own by [`_checkpoint_state`] and [`_restore_checkpoint_state`].
    """

    args: QuietStarConfig
    ref_model: PreTrainedModel | None  # the copy of the policy that `sync_ref_model` moves
    _staging: str | None = None  # where a checkpoint is being written
    _resumed: dict | None = None  # state of the checkpoint that training goes on from, until it does
    # weights and optimizer as a run began, where `auto_find_batch_size` may begin it again
    _beginning: tuple[list[torch.Tensor], dict | None] | None = None

    def _checkpoint_state(self) -> dict:
        """What a checkpoint holds beside what the Trainer keeps; a JSON object."""
        raise NotImplementedError

    def _restore_checkpoint_state(self, state: dict) -> None:
        """Takes back what [`_checkpoint_state`] gave."""
        raise NotImplementedError

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        if trial is not None:
            raise ValueError(f"`trial` is {trial!r}, of a search that is not supported; set its values in the `args`.")
        self.take_engine()
        if self.args.should_save:
            remove_unfinished(str(self.args.output_dir))
        self._check_output()
        self._resumed = self._beginning = None
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        try:
            return super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
        finally:
            self._end_run()

    def _end_run(self) -> None:
        """Ends a run, also one that an error or a user (in a notebook) has interrupted, of which the Trainer would think that it goes on."""
        self.is_in_train = False

    def _check_output(self) -> None:
        """Finds before training that nothing could be saved."""
        if self.args.should_save:
            check_output_dir(str(self.args.output_dir))
            if self.args.save_strategy != SaveStrategy.NO:
                check_space(str(self.args.output_dir), checkpoint_bytes(self.model, self.args))

    def _inner_training_loop(self, *args, **kwargs):
        """A run: in `train`, and once more for each smaller batch that `auto_find_batch_size` tries."""
        self._begin_run()
        return super()._inner_training_loop(*args, **kwargs)

    def _begin_run(self) -> None:
        """Sets back what belongs to a run: patience, and where `auto_find_batch_size` may begin it again also what it trains."""
        for callback in self._early_stopping():
            callback.early_stopping_patience_counter = 0
        for jit in self.callback_handler.callbacks:
            if isinstance(jit, JITCheckpointCallback):  # within a step it would save a part of the step's metrics
                jit.on_pre_optimizer_step = jit.on_substep_end  # type: ignore[method-assign]  # of this object alone
        if not self.args.auto_find_batch_size or is_sharded(self.accelerator) or self.is_deepspeed_enabled:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self._beginning is None:
            optimizer = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())
            self._beginning = [p.detach().to("cpu", copy=True) for p in parameters], optimizer
            return
        weights, optimizer = self._beginning  # the run before took steps until memory was short
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        if self.optimizer is None or optimizer is None:
            self.optimizer = None
        else:
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))

    def _finalize_training(self, *args, **kwargs):
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # or it deletes by halves, and by prefix
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if self.args.should_save and limit == 1 and best is not None:
            rotate(str(self.args.output_dir), limit, (best,))
        return output

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        The checkpoint that `train` would resume from, once it is known to be whole and of this model.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As for `train`: a folder, or True for the last whole one of the output directory.

        Returns:
            `str`, or None to start anew.

        Raises:
            `FileNotFoundError`: if the folder or a file in it is missing.
            `ValueError`: if there is none, a file is damaged, or it is another model's.
        """
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(str(self.args.output_dir))
        else:
            checkpoint = os.fspath(resume_from_checkpoint)
            check_checkpoint(checkpoint)
        if not self.is_deepspeed_enabled:  # whose parameters may have no shape here
            check_fits(checkpoint, self.accelerator.unwrap_model(self.model))
            check_optimizer_fields(checkpoint, self.args)
        return checkpoint

    # Saving

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model, trial) -> None:
        directory = self._get_output_dir(trial)
        target = os.path.join(directory, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with whole_folder(target, self.accelerator, self.args.should_save) as staged:
            self._staging = os.path.dirname(staged)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._note_best(directory, target)
            state = {**self._window(), **self._checkpoint_state()}
            self.accelerator.wait_for_everyone()  # for the files of all
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                sizes = {
                    p.relative_to(staged).as_posix(): p.stat().st_size for p in Path(staged).rglob("*") if p.is_file()
                }
                Path(staged, STATE_NAME).write_text(json.dumps({**state, "files": sizes}))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(target)
        if self.args.should_save:
            rotate(directory, self.args.save_total_limit, (target, self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet: an upload goes on in the background, and the folder is about to be renamed."""

    def _note_best(self, directory: str, target: str) -> None:
        """Notes the best checkpoint under the name that it has or is about to get, in place of that of the folder being
        written."""
        if self.args.save_strategy == SaveStrategy.NO or not self.state.best_global_step:
            return
        best = os.path.join(directory, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == target or os.path.isdir(best):
            self.state.best_model_checkpoint = best

    def _window(self) -> dict:
        """What the Trainer forgets when it is resumed: the loss that is not logged yet, and the patience of early stopping."""
        loss, logged_at = self.loss_since_log()
        return {
            "loss": self.accelerator.gather(loss.reshape(1)).mean().item(),
            "loss_logged_at": logged_at,
            "patience_used": [callback.early_stopping_patience_counter for callback in self._early_stopping()],
        }

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if (
            self.accelerator.is_fsdp2 and self.optimizer is not None
        ):  # in the files of a run of one process, which all engines read
            save_optimizer(self.optimizer, os.path.join(output_dir, OPTIMIZER_NAME), self.args.should_save)
            if self.args.should_save:
                state = self.lr_scheduler.state_dict()  # type: ignore[union-attr]  # made with the optimizer
                torch.save(state, os.path.join(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model and self.ref_model is not None:
            with gathered(self.ref_model):
                whole = full_state_dict(self.ref_model)  # which takes all processes
                if self.args.should_save:
                    self.ref_model.save_pretrained(os.path.join(output_dir, REFERENCE_NAME), state_dict=whole)

    # Resuming

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self.optimizer
        if checkpoint is not None and optimizer is not None and not self.is_deepspeed_enabled:
            check_optimizer_file(checkpoint)
            check_groups(checkpoint, optimizer)
        if checkpoint is not None and optimizer is not None and self.accelerator.is_fsdp2:
            if Path(checkpoint, OPTIMIZER_NAME).is_file():
                load_optimizer(optimizer, os.path.join(checkpoint, OPTIMIZER_NAME))
                state = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
                self.lr_scheduler.load_state_dict(state)  # type: ignore[union-attr]  # made with the optimizer
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if Path(checkpoint, STATE_NAME).is_file():
            self._take_back(checkpoint)
        reference = Path(checkpoint, REFERENCE_NAME)
        if self.args.sync_ref_model and reference.is_dir():  # `save_only_model` keeps none
            self._read_model(self.ref_model, str(reference))

    def _take_back(self, checkpoint: str) -> None:
        """Restores what a checkpoint holds beside what the Trainer keeps."""
        state = json.loads(Path(checkpoint, STATE_NAME).read_text())
        try:
            self._restore_checkpoint_state(state)
            self._resumed = {name: state[name] for name in ("loss", "loss_logged_at", "patience_used")}
        except KeyError as error:
            raise ValueError(
                f"{STATE_NAME!r} in the checkpoint {checkpoint!r} has no {error}: another version of trl-quietstar wrote "
                f"it. Resume with that version, or start anew from its weights with `model={checkpoint!r}`."
            ) from error

    def _run_epoch(self, *args, **kwargs) -> None:
        """Takes back patience and loss of the run that is resumed: the Trainer has just set them to 0."""
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            self.restore_loss_since_log(state["loss"], state["loss_logged_at"])
            for callback, used in zip(self._early_stopping(), state["patience_used"], strict=False):
                callback.early_stopping_patience_counter = used
            if self._has_ended():  # the Trainer would take one step more
                logger.warning(
                    "No step is taken: the run had ended where the checkpoint was written, at step %d of %d. To go on, raise "
                    "`max_steps` or `num_train_epochs`, or the patience of early stopping.",
                    self.state.global_step,
                    self.state.max_steps,
                )
                self.control.should_training_stop = True
                return
        super()._run_epoch(*args, **kwargs)

    def _has_ended(self) -> bool:
        """Whether the run that wrote the checkpoint stopped there, and by the present settings still would."""
        return self.state.global_step >= self.state.max_steps or any(
            c.early_stopping_patience_counter >= c.early_stopping_patience for c in self._early_stopping()
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.accelerator.is_fsdp2 and (is_peft_model(self.model) or self.is_deepspeed_enabled):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            base_of(self.model).load_heads(resume_from_checkpoint)
        else:
            self._read_model(self.model, resume_from_checkpoint)

    def _read_model(self, model, directory: str) -> None:
        """Reads weights and heads of a policy or its reference."""
        if self.accelerator.is_fsdp2:
            load_sharded(model, directory)
            base_of(model).load_heads(directory)
        else:
            with gathered(model), loaded_whole(self.args):
                load_weights(model, directory)
                base_of(model).load_heads(directory)

    def restore_model(self, directory: str) -> None:
        """Takes back the weights of the model, or of its adapter, and of the heads from a checkpoint or `save_model`."""
        self._load_from_checkpoint(directory)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # whose own files hold the heads too
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self.restore_model(self.state.best_model_checkpoint)
