"""Non-finite values are found, named, skipped and counted, so that a bad batch costs one optimizer step and not the run.

Two checks for each optimizer step: reward and terms of the objective when a batch has been scored, and the norm of the
gradients after the last backward, ahead of clipping, which would spread a NaN to all of them. A fault in one batch, on
one process, or of one gradient skips the whole step on all processes: its gradients are dropped, and an optimizer leaves
parameters without a gradient alone, with their moments and their decay. What the Trainer counts goes on (global step,
learning rate), and with it what is keyed by the step: thoughts, data, entropy coefficient.

Under fp16 the gradient scaler looks for its scale by overflowing and skips those steps itself. That is no fault; gradients
that overflow when the scale has come down to 1 are, and so is a loss that is not finite, whose step also lowers the scale.
"""

import math
import textwrap

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from .metrics import BatchResult


logger = logging.get_logger(__name__)

EXCERPT = 80  # characters of a row's text in a message
NAMED = 3  # rows or parameters in a message


class FaultGuard(TrainerCallback):
    """
    Skips optimizer steps with non-finite values, and stops training after `max_skipped_steps` of them in a row, with a
    checkpoint of the weights as they were before.

    Where the backward applies its gradients at once (DeepSpeed, LOMO, layerwise optimizers), nothing is left to skip: the
    first batch with a fault stops training ahead of its backward, and gradients are not checked.

    Args:
        trainer ([`QuietStarREINFORCETrainer`]):
            The trainer it is added to.

    Raises:
        `FloatingPointError`: when training stops.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.skipped = 0  # optimizer steps; kept in checkpoints, as is the next
        self.in_a_row = 0
        self._faults: dict[str, list[str]] = {"train": [], "eval": []}  # of the current step or evaluation

    # Checks

    def is_finite(self, batch: BatchResult, rows: list[int], mode: str) -> bool:
        """Whether reward, loss and every term of a batch are finite on all processes; if not, notes what is not, in which of
        its `rows`, which go by their index in the global batch or in the evaluation data."""
        mine = []
        if not _all_finite(batch):
            mine = [f"{' and '.join(bad_values(batch))} {self._where(batch, rows, mode)}"]
        faults = self._agreed(mine)
        self._faults[mode] += faults
        if faults and mode == "train" and self._steps_in_backward():
            self._stop(f"Stopped at step {self.trainer.state.global_step}: {'; '.join(faults)}.")
        return not faults

    def check_gradients(self) -> None:
        """Notes gradients that are not finite, once all of an optimizer step's have been added up."""
        scaler = self.trainer.accelerator.scaler
        overflow_is_normal = scaler is not None and scaler.get_scale() > 1
        if self._faults["train"] or overflow_is_normal or self._steps_in_backward():
            return
        gradients = {n: p.grad for n, p in self.trainer.model.named_parameters() if p.grad is not None}
        mine = []
        if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients.values()))):
            names = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
            mine = [f"the gradient of {_listed(names)}" if names else "the norm of all gradients together"]
        self._faults["train"] += self._agreed(mine)

    def take_evaluation_faults(self) -> list[str]:
        """What was not finite in the evaluation that ends; said in a warning."""
        faults, self._faults["eval"] = self._faults["eval"], []
        if faults and self.trainer.is_world_process_zero():
            logger.warning(
                f"Evaluation at step {self.trainer.state.global_step}: not finite is {'; '.join(faults)}. Its metrics are "
                "NaN, so it counts as no improvement."
            )
        return faults

    # The optimizer step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._faults["train"]:
            self.trainer.optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args, state, control, **kwargs):
        faults, self._faults["train"] = self._faults["train"], []
        if not faults:
            if not self.trainer.accelerator.optimizer_step_was_skipped:  # by the scaler, which tells nothing
                self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        limit = args.max_skipped_steps
        complaint = (
            f"Optimizer step {state.global_step} was skipped: not finite is {'; '.join(faults)}. "
            f"Skipped so far: {self.skipped}, in a row: {self.in_a_row} (`max_skipped_steps`: {limit})."
        )
        if limit is not None and self.in_a_row >= limit:
            self._stop(complaint)
        if state.is_world_process_zero:
            logger.warning(complaint)

    def _stop(self, complaint: str) -> None:
        """Saves what training had come to before the faults, and raises."""
        trainer = self.trainer
        self.in_a_row, self._faults["train"] = 0, []  # a run that resumes from here has its whole patience again
        trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        raise FloatingPointError(
            f"{complaint} The weights of before are in checkpoint-{trainer.state.global_step} of "
            f"{trainer.args.output_dir!r}. Look at the data that is named, lower `learning_rate`, or compute in float32; "
            "then resume from there."
        )

    # Processes, and words

    def _agreed(self, mine: list[str]) -> list[str]:
        """The faults of all processes, the same on each."""
        accelerator = self.trainer.accelerator
        count = torch.tensor(float(len(mine)), device=accelerator.device)
        if accelerator.reduce(count, "sum").item() == 0:
            return []
        return list(dict.fromkeys(gather_object(mine)))  # a gradient is the same everywhere

    def _steps_in_backward(self) -> bool:
        return self.trainer.is_deepspeed_enabled or any(
            name in self.trainer.args.optim.value for name in ("lomo", "layerwise")
        )

    def _where(self, batch: BatchResult, rows: list[int], mode: str) -> str:
        """The rows that are at fault, and how their texts begin."""
        whole = "the global batch" if mode == "train" else "the evaluation data"
        bad, tokenizer = bad_rows(batch), self.trainer.processing_class
        if not bad:
            return f"in one of the rows {rows[0]} to {rows[-1]} of {whole}"
        return f"in {_listed([f'row {rows[b]} ({excerpt(batch, b, tokenizer)!r})' for b in bad])} of {whole}"


def _all_finite(batch: BatchResult) -> bool:
    values = [batch.loss, _reward(batch), *batch.terms.values()]
    return bool(torch.isfinite(torch.stack([value.detach().float() for value in values])).all())


def _reward(batch: BatchResult) -> torch.Tensor:
    return batch.experience.rewards.masked_fill(~batch.experience.exists, 0).sum()


def bad_values(batch: BatchResult) -> list[str]:
    """The reward and the terms of a batch that are not finite, each with its value; else the loss."""
    values = {"reward": _reward(batch), **batch.terms}
    if all(math.isfinite(value) for value in values.values()):
        values = {"loss": batch.loss}
    return [f"{name} ({value.item()})" for name, value in values.items() if not math.isfinite(value)]


def bad_rows(batch: BatchResult) -> list[int]:
    """Rows of a batch with a score or reward that is not finite; empty where it lies in none of them."""
    scores, experience = batch.scores, batch.experience
    talk, tokens = experience.talk_mask, experience.thoughts.mask
    places: tuple = (
        (experience.rewards, experience.exists),
        (experience.logps_without, talk),
        (scores.talk_logps, talk),
        (scores.reader_logps, talk),
        (scores.thought_logps, tokens),
        (scores.thought_entropies, tokens),
        (scores.thought_values, tokens),
        (scores.text_logps, batch.text.predicted()),
    )
    bad = torch.stack([(~torch.isfinite(values) & mask).flatten(1).any(1) for values, mask in places]).any(0)
    return bad.nonzero().flatten().tolist()


def excerpt(batch: BatchResult, row: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """How the text of a row begins; its token ids where there is no tokenizer."""
    ids = batch.text.input_ids[row][batch.text.attention_mask[row]][:EXCERPT].tolist()
    text = str(ids) if tokenizer is None else str(tokenizer.decode(ids))
    return textwrap.shorten(text, EXCERPT, placeholder=" ...")


def _listed(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
