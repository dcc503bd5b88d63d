"""Non-finite values are found, named, skipped and counted, so that a bad batch costs one optimizer step and not the run.

Each optimizer step has two checks. The first looks at the reward and the terms of the objective when a batch has been scored.
The second looks at the norm of the gradients after the last backward. It comes ahead of clipping, which would spread a NaN to
all gradients.

A fault in one batch, on one process, or of one gradient skips the whole step on all processes: the gradients are dropped, and an
optimizer leaves parameters without a gradient alone, with their moments and their decay. The Trainer's counts go on (global step,
learning rate), and with them all that is keyed by the step: thoughts, data, entropy coefficient.

Under fp16 the gradient scaler finds its scale by overflowing, and skips those steps itself. Such an overflow is no fault. It is
one when the scale has come down to 1; and a loss that is not finite is always one.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ..config import QuietStarConfig
from ..learning.experience import StepPart
from ..learning.metrics import BatchResult
from ..precision import check_weights
from ..thinking.scoring import Scores
from .distributed import summed


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
        args ([`QuietStarConfig`]):
            Options of the run.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model whose gradients are checked.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Decodes the texts that messages quote.
        save (`Callable`):
            Writes a checkpoint of the current step.

    Raises:
        `FloatingPointError`: when training stops.
    """

    def __init__(
        self,
        args: QuietStarConfig,
        model: nn.Module,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase | None,
        save: Callable[[], None],
    ):
        self.args, self.model, self.accelerator, self.tokenizer, self.save = args, model, accelerator, tokenizer, save
        self.skipped = 0  # optimizer steps of the run; kept in checkpoints
        self.in_a_row = 0  # optimizer steps up to the last one; kept in checkpoints
        self._faults: dict[str, list[str]] = {"train": [], "eval": []}  # of the current step or evaluation
        self._unread: list[_Check] = []

    def begin_run(self) -> None:
        """Counts from 0 again."""
        self.skipped = self.in_a_row = 0
        self._faults["train"], self._unread = [], []

    # Checks

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        check_weights(optimizer, self.accelerator)

    def check(self, batch: BatchResult, part: StepPart) -> torch.Tensor | None:
        """
        Looks whether reward, loss and every term of a batch are finite on all processes. In training the host reads the answer
        in [`FaultGuard.check_gradients`], so that it does not wait for the device after each batch.

        Args:
            batch ([`BatchResult`]):
                The batch.
            part ([`~learning.experience.StepPart`]):
                Its part of the optimizer step or of the evaluation data.

        Returns:
            `torch.Tensor`: a scalar bool on the device; None where the host knows already that something is not finite.
        """
        mode = "train" if part.training else "eval"
        values = [batch.loss, _reward(batch), *batch.terms.values()]
        mine = ~torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        check = _Check(_detached(batch), part.rows, mode, mine, self._total(mine))
        self._unread.append(check)
        at_once = mode == "eval" or self._steps_in_backward()
        found = self._read() if at_once else []
        if found and mode == "train":
            self._stop(part.step, f"Stopped at step {part.step}: {'; '.join(found)}.")
        return None if found else check.total == 0

    def check_gradients(self) -> bool:
        """Looks whether the gradients of an optimizer step are finite, once those of all batches have been added up. Reads the
        checks of the step's batches too, and returns whether everything is finite."""
        scaler = self.accelerator.scaler
        overflow_is_normal = scaler is not None and scaler.get_scale() > 1
        gradients = {}
        if not (overflow_is_normal or self._steps_in_backward()):
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        if gradients:
            mine = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients.values()))
            mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
            self._unread.append(_Check(gradients, [], "train", mine, self._total(mine)))
        self._read()
        return not self._faults["train"]

    def _total(self, mine: torch.Tensor) -> torch.Tensor:
        """Number of processes that have a fault, on the device."""
        return summed(mine.float(), self.accelerator)

    def _read(self) -> list[str]:
        """Notes and returns the faults of all processes. Every process gets the same list, with one wait for the device."""
        checks, self._unread = self._unread, []
        if not checks:
            return []
        noted: list[str] = []
        found = torch.stack([torch.stack([check.mine.to(check.total), check.total]) for check in checks])
        for check, (mine, total) in zip(checks, found.tolist(), strict=True):
            # gradients of a batch with a fault have one too
            if total and not (isinstance(check.what, dict) and self._faults[check.mode]):
                faults = gather_object([self._words(check)] if mine else [])
                noted += dict.fromkeys(faults)  # a gradient is the same everywhere
                self._faults[check.mode] += dict.fromkeys(faults)
        return noted

    def _words(self, check: "_Check") -> str:
        """Names what is not finite on this process, and where."""
        if isinstance(check.what, BatchResult):
            return f"{' and '.join(bad_values(check.what))} {self._where(check.what, check.rows, check.mode)}"
        names = [name for name, gradient in check.what.items() if not bool(torch.isfinite(gradient).all())]
        return f"the gradient of {listed(names)}" if names else "the norm of all gradients together"

    def take_evaluation_faults(self, step: int) -> list[str]:
        """Warns of what was not finite in the evaluation that ends, and returns it; `step` is the number of optimizer steps so
        far."""
        faults, self._faults["eval"] = self._faults["eval"], []
        if faults and self.accelerator.is_main_process:
            logger.warning(
                f"Evaluation at step {step}: not finite is {'; '.join(faults)}. Its metrics are "
                "NaN, so it counts as no improvement."
            )
        return faults

    # The optimizer step

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._faults["train"]:
            optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args, state, control, **kwargs):
        faults, self._faults["train"] = self._faults["train"], []
        if not faults:
            if not self.accelerator.optimizer_step_was_skipped:  # by the scaler, which tells nothing
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
            self._stop(state.global_step, complaint)
        if state.is_world_process_zero:
            logger.warning(complaint)

    def _stop(self, step: int, complaint: str) -> None:
        """Saves the model as it was before the faults, and raises."""
        self.in_a_row, self._faults["train"] = 0, []  # a run that resumes from here has its whole patience again
        self.save()
        raise FloatingPointError(
            f"{complaint} The weights of before are in checkpoint-{step} of {self.args.output_dir!r}. Look at the data that is "
            "named, lower `learning_rate`, or compute in float32; then resume from there."
        )

    def state(self) -> dict:
        """What a checkpoint keeps: the counts of skipped steps."""
        return {"skipped_steps": [self.skipped, self.in_a_row]}

    def load(self, state: dict) -> None:
        """Takes back what [`FaultGuard.state`] gave."""
        self.skipped, self.in_a_row = state["skipped_steps"]

    # Processes, and words

    def _steps_in_backward(self) -> bool:
        name = self.args.optim
        return self.accelerator.state.deepspeed_plugin is not None or "lomo" in name or "layerwise" in name

    def _where(self, batch: BatchResult, rows: list[int], mode: str) -> str:
        """The rows that are at fault, and how their texts begin."""
        whole = "the global batch" if mode == "train" else "the evaluation data"
        bad, tokenizer = bad_rows(batch), self.tokenizer
        if not bad:
            return f"in one of the rows {rows[0]} to {rows[-1]} of {whole}"
        return f"in {listed([f'row {rows[b]} ({excerpt(batch, b, tokenizer)!r})' for b in bad])} of {whole}"


@dataclass(frozen=True)
class _Check:
    """
    The outcome of a check that the host has not read yet.

    Parameters:
        what ([`BatchResult`] or `dict[str, torch.Tensor]`):
            The batch, or the gradients by name.
        rows (`list[int]`), mode (`str`):
            Indices of the batch's rows, and `"train"` or `"eval"`.
        mine, total (`torch.Tensor`, scalar on the device):
            Whether this process has a fault, and the number of processes that have.
    """

    what: BatchResult | dict[str, torch.Tensor]
    rows: list[int]
    mode: str
    mine: torch.Tensor
    total: torch.Tensor


def _detached(batch: BatchResult) -> BatchResult:
    """The batch without its graph, which would be held in memory until the check is read."""
    scores = Scores._make(x.detach() if isinstance(x, torch.Tensor) else x for x in batch.scores)
    return replace(batch, scores=scores, loss=batch.loss.detach())


def _reward(batch: BatchResult) -> torch.Tensor:
    """Sum of the rewards, which is finite only if each of them is."""
    return batch.experience.rewards.masked_fill(~batch.experience.exists, 0).sum()


def bad_values(batch: BatchResult) -> list[str]:
    """Which of the reward and the terms of a batch are not finite, each with its value. If all are, it is the loss that is not."""
    parts = {
        f"reward of `{name.split('/')[1]}`": values.masked_fill(~mask, 0).sum()
        for name, (values, mask) in batch.experience.measured.items()
        if name.startswith("rewards/")
    }
    values = {"reward": _reward(batch), **parts, **batch.terms}
    if all(math.isfinite(value) for value in values.values()):
        values = {"loss": batch.loss}
    return [f"{name} ({value.item()})" for name, value in values.items() if not math.isfinite(value)]


def bad_rows(batch: BatchResult) -> list[int]:
    """Rows of a batch with a score or reward that is not finite; empty where neither is at fault."""
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
    """The beginning of a row's text, or of its token ids where there is no tokenizer."""
    ids = batch.text.input_ids[row][batch.text.attention_mask[row]][:EXCERPT].tolist()
    text = str(ids) if tokenizer is None else str(tokenizer.decode(ids))
    return textwrap.shorten(text, EXCERPT, placeholder=" ...")


def listed(names: list[str]) -> str:
    """The first three names, and the number of the others."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
