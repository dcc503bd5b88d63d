"""Preflight: whether a model can think about its data at all, measured before anything is trained.

Some thoughts of the model as it is, on the first rows of the training data, give the share of useful thoughts and that of groups
which hold both useful and useless ones (`rl/useful_thoughts` and `rl/mixed_groups` before the first step). Where hardly any
thought is useful, reinforcement has nothing to reinforce, and a warning says what helps.

It draws from random generators of its own, so that training is the same with it and without.
"""

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.batches import TOKEN_COLUMNS
from ..learning.experience import StepPart
from ..learning.metrics import Measured, MetricSums, group_metrics
from ..learning.rewards import talk_probability_gain
from ..text.batch import Text, talk_after
from ..text.positions import seeded_generators, usable_positions
from ..thinking.scoring import ScoreRequest, Scores, at_talk
from .collapse import MIXED, advice
from .distributed import greatest, summed


if TYPE_CHECKING:
    from .evaluation import EvaluationTrainer


logger = logging.get_logger(__name__)

POSITIONS = 8  # of a row at most, so that they are of several rows, and of no more than it takes
READ_AHEAD = 4  # rows that are looked at for each position that is wanted: not all have one
CANDIDATES = 4  # positions that are looked at for each one that is wanted, where not all are difficult


class Found(NamedTuple):
    """
    What some thoughts of a model are worth, as it is; shares are None where no thought was written.

    Parameters:
        thoughts (`int`):
            Their number.
        useful, mixed (`float`, *optional*):
            Shares of the thoughts that are useful, and of the groups with useful and useless ones.
        helping, gain (`float`, *optional*):
            Share of the thoughts that raise the probability of the tokens after them at all, and by how much thoughts raise it on
            average.
        least (`float`):
            Above which gain a thought is useful.
        written (`bool`):
            Whether other rows bring written thoughts.
    """

    thoughts: int
    useful: float | None
    mixed: float | None
    helping: float | None
    gain: float | None
    least: float
    written: bool

    @property
    def is_hopeless(self) -> bool:
        """Whether there is little to reinforce, and nothing to imitate first."""
        return self.useful is not None and self.useful < MIXED and not self.written

    def told(self) -> str:
        """The shares in a sentence, and what to do where there is little to reinforce."""
        groups = (
            "" if self.mixed is None else f", and {self.mixed:.0%} of the positions have both such thoughts and others"
        )
        measured = (
            f"{self.useful:.0%} of {self.thoughts} thoughts raise the probability of the tokens after them by more than {self.least} "
            f"(`useful_gain`){groups}."
        )
        if not self.is_hopeless:
            return measured
        return f"{measured} There is little to reinforce: {advice(self.useful or 0.0)}"


class PreflightCallback(TrainerCallback):
    """
    Measures before the first step of a run that is not resumed, and logs `preflight_useful_thoughts` and
    `preflight_mixed_groups`. All processes share the rows.

    Args:
        trainer ([`EvaluationTrainer`]):
            The trainer that the callback is added to.
    """

    def __init__(self, trainer: "EvaluationTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.preflight_thoughts is None or args.thought_positions == "none" or state.global_step > 0:
            return
        found = self.measure(args.preflight_thoughts)
        if found.useful is None:  # no position was difficult
            return
        shares = {"preflight_useful_thoughts": found.useful, "preflight_mixed_groups": found.mixed}
        self.trainer.log({name: share for name, share in shares.items() if share is not None})
        if self.trainer.accelerator.is_main_process:
            (logger.warning if found.is_hopeless else logger.info)(f"Before training, {found.told()}")

    def measure(self, thoughts: int) -> "Found":
        """What about so many thoughts are worth, on the first rows of the training data."""
        rows, written = self._rows(math.ceil(thoughts / self.trainer.args.num_thoughts))
        sums, least = self._measured(rows), self.trainer.args.useful_gain
        useful, mixed, helping, gain = map(sums.mean, ("useful_thoughts", "mixed_groups", "helping", "gain"))
        return Found(round(sums.total("thoughts")), useful, mixed, helping, gain, least, written)

    def places(self, row: dict) -> list[int]:
        """After which tokens of a prepared row a thought may be written."""
        return self._usable(self._collated([row]))[0].nonzero()[:, 0].tolist()

    def _rows(self, count: int) -> tuple[list[dict], bool]:
        """The first rows of the training data that thoughts are sampled in and that hold `count` positions together, as many for
        each process; and whether other rows bring written thoughts. A stream is read from its beginning, by an iterator of its
        own."""
        processes, positions, written = self.trainer.accelerator.num_processes, 0, False
        rows: list[dict] = []
        for row in itertools.islice(self.trainer.train_dataset, READ_AHEAD * count):  # type: ignore[arg-type]  # there is one
            is_written = self.trainer.args.written_thought_coefficient > 0 and bool(row.get("written_ids"))
            written = written or is_written
            usable = 0 if is_written else int(self._usable(self._collated([row])).sum())
            if usable:
                rows.append(row)
                positions += min(usable, POSITIONS)
            if positions >= count and len(rows) % processes == 0:
                break
        return rows, written

    def _collated(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A batch of rows, by their tokens alone."""
        return self.trainer.data_collator([{name: row[name] for name in TOKEN_COLUMNS if name in row} for row in rows])

    def _usable(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Where a thought may be written, of shape `(B, T - 1)`."""
        return usable_positions(Text.from_batch(**inputs), self.trainer.args.thought_positions)

    def _measured(self, rows: list[dict]) -> MetricSums:
        """The two shares over a few thoughts of each row, and the number of thoughts."""
        trainer, sums = self.trainer, MetricSums()
        numbers = list(range(trainer.accelerator.process_index, len(rows), trainer.accelerator.num_processes))
        # sharded layers run equally often on all processes
        numbers = numbers[: -greatest(-len(numbers), trainer.accelerator)]
        training = trainer.model.training
        trainer.model.eval()
        for first in range(0, len(numbers), trainer.rows_per_batch):
            chunk = numbers[first : first + trainer.rows_per_batch]
            inputs = self._narrowed(self._collated([rows[i] for i in chunk]), chunk)
            sums.add(self._shares(inputs, chunk), lambda x: summed(x, trainer.accelerator))
        trainer.model.train(training)
        return sums

    def _narrowed(self, inputs: dict[str, torch.Tensor], numbers: list[int]) -> dict[str, torch.Tensor]:
        """The batch with thoughts allowed at a few random positions of each row only, however many training would take."""
        count = POSITIONS * (CANDIDATES if self.trainer.args.thought_positions == "difficulty" else 1)
        usable = self._usable(inputs)
        generators = seeded_generators(self.trainer.args.seed, 0, numbers)
        noise = torch.stack([torch.rand(usable.shape[1], generator=generator) for generator in generators])
        ranks = noise.masked_fill(~usable, 2.0).argsort(1).argsort(1)
        chosen = usable & (ranks < count)
        return {**inputs, "thought_mask": torch.nn.functional.pad(chosen, (0, 1)).long()}

    def _shares(self, inputs: dict[str, torch.Tensor], numbers: list[int]) -> dict[str, Measured]:
        """Metrics of the thoughts of a batch, which are drawn as in training and scored without gradient."""
        thinker, args = self.trainer.thinker, self.trainer.args
        text = thinker.text(inputs)
        plan, talk_length = thinker.plan(text, training=False), thinker.talk_length(text)
        sampler = thinker.sampler(StepPart(numbers))
        if args.thought_positions != "difficulty":
            sampler = replace(sampler, thought_positions="all")  # that are left
        single = plan.single_pass
        thoughts = sampler if single else thinker.ask(text, sampler.sample, text, thinker.path, plan.sampling)
        # the mixed prediction needs the plain one at the talk alone, which is what is wanted of the text
        how = ScoreRequest(text, thoughts, talk_length, thinker.path, branch_batch_size=plan.scoring, whole_text=False)
        scores: Scores = thinker.ask(text, how)
        positions = scores.thoughts.positions
        mask = talk_after(text, positions, talk_length).score_mask[:, :, None]
        without = at_talk(scores.text_logps, scores.thoughts, talk_length)
        tried = positions.mask.sum() * args.num_thoughts
        gain = talk_probability_gain(scores.reader_logps, without, mask)
        exists = positions.mask[..., None].expand_as(gain)
        return {
            **group_metrics(scores.reader_logps, without, mask, positions, args.useful_gain),
            "helping": (gain > 0, exists),
            "gain": (gain, exists),
            "thoughts": (tried, torch.ones_like(tried)),
        }
