"""`OptimizerStep`: the batches of an optimizer step, what each adds to it, and what their thoughts are worth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import QuietStarConfig
from ..learning.advantages import MovingAverage
from ..learning.experience import Experience, StepPart, experience_of, finish_advantages, flat, unflat
from ..learning.objective import TokenCounts, WrittenInputs
from ..learning.reward_functions import RewardFunctions
from ..learning.selection import drop_groups, fold_repeats, kept_thoughts, worth_training_on
from ..text.batch import Positions, Text, talk_after
from ..text.divided import Divided
from ..thinking.scoring import Scores
from .distributed import summed
from .imitation import SelfImitation
from .reference import Reference
from .thinker import Thinker, ThoughtRequest


# how much of the average of a group's spread a step keeps; `filter_ema_ratio` in RLPR's code
DEVIATION_DECAY = 0.99


class OptimizerStep:
    """
    Holds the batches of the current optimizer step, so that several of them, here and on other processes, add up to what one
    batch of all would be; and the experience that further updates on them reuse.

    Args:
        args ([`QuietStarConfig`]):
            Options of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        thinker ([`Thinker`]), reference ([`Reference`]):
            Sample and score thoughts.
        reward_functions ([`~learning.reward_functions.RewardFunctions`], *optional*):
            In place of `args.reward_type`.
    """

    def __init__(
        self,
        args: QuietStarConfig,
        accelerator: Accelerator,
        thinker: Thinker,
        reference: Reference,
        reward_functions: RewardFunctions | None = None,
    ):
        self.args, self.accelerator, self.thinker, self.reference = args, accelerator, thinker, reference
        self.reward_functions = reward_functions
        self._rows_seen = 0  # of the evaluation, before the current batch
        self.begin_run()

    def begin_run(self) -> None:
        """Forgets the batches of the run before."""
        self._batches: list[dict] = []
        self._divided: list[Divided] = []
        self._parts: list[StepPart] = []
        self._experiences: list[Experience] = []  # of each batch, for further updates on it
        self._deviation = MovingAverage(DEVIATION_DECAY)  # of rewards within a group
        self.imitation = SelfImitation(self.args, self.accelerator)

    def begin_evaluation(self) -> None:
        """Takes the model, and counts the rows of evaluation data from 0 again."""
        self.thinker.take_model()
        self._rows_seen = 0

    def begin(self, batches: list[dict]) -> list[dict]:
        """Takes in the batches of a step; returns them with a number each, by which [`OptimizerStep.take`] knows them."""
        # not looked at yet: a callback may change settings as the step begins
        self._batches, self._divided, self._parts = batches, [], []
        return [{**batch, "part": i} for i, batch in enumerate(batches)]

    def take(self, model: nn.Module, inputs: dict, step: int) -> tuple[Divided, StepPart]:
        """
        A batch by what happens to its rows, and its part of the step. The first batch of a step has all of its batches looked at: sampled or
        judged ahead, where the step's means depend on that.

        Args:
            model (`nn.Module`):
                The policy as its engine has wrapped it.
            inputs (`dict`):
                The collated batch, with the number that [`OptimizerStep.begin`] gave it; without one it is a batch of its own.
            step (`int`):
                Number of the optimizer step.
        """
        if "part" not in inputs:
            text = self.thinker.text(inputs)
            return Divided.undivided(text), self.alone(text, model.training, step)
        if not self._parts:
            self._divided = [self.thinker.divide(batch) for batch in self._batches]
            if self.args.self_imitation_batch_size:
                self._divided = self.imitation.beside(self._divided, step)
            self._parts = self._divide(model, step)
        return self._divided[inputs["part"]], self._parts[inputs["part"]]

    def alone(self, text: Text, training: bool, step: int = 0) -> StepPart:
        """The part of a batch that is evaluated, or that `compute_loss` got by hand."""
        rows, before = len(text.input_ids), 0
        if not training:
            before, self._rows_seen, step = self._rows_seen, self._rows_seen + rows, 0
        return StepPart(self._row_indices(rows, before), step=step, training=training)

    def judge(
        self,
        part: StepPart,
        request: ThoughtRequest,
        scores: Scores,
        columns: dict[str, list] | None = None,
        written: WrittenInputs | None = None,
    ) -> tuple[Experience, TokenCounts]:
        """
        What the thoughts of a batch are worth, and what the means of its step are taken over; as far as that is not known from
        before.

        Args:
            part ([`~learning.experience.StepPart`]), request ([`ThoughtRequest`]), scores ([`~thinking.scoring.Scores`]):
                The batch's part of the step, what was asked, and the answer.
            columns (`dict`, *optional*):
                Columns of the data, for the reward functions.
            written ([`~learning.objective.WrittenInputs`], *optional*):
                Of the batch's rows with written thoughts, whose tokens count as well.
        """
        experience, reduce = part.experience, self._sum if part.training else _alone
        if experience is None:
            judged = self._experience(request, scores, columns, part)
            (experience,) = finish_advantages([judged], self.args, reduce)
            if part.training and self.args.num_iterations > 1:
                self._experiences.append(experience)
        own = [experience.counts(request.text), *([] if written is None else [written.counts()])]
        return experience, part.counts or TokenCounts.total(own, reduce)

    # The batches of a step

    def _divide(self, model: nn.Module, step: int) -> list[StepPart]:
        """The part of each batch, with what the step's means are taken over as far as several batches need to know it
        ahead."""
        args, texts = self.args, [divided.sampled for divided in self._divided]
        share = 1 / max(len(texts) * self.accelerator.num_processes, 1)
        sizes = [len(batch["input_ids"]) for batch in self._batches]
        indices = [self._row_indices(size, sum(sizes[:i])) for i, size in enumerate(sizes)]
        rows = [[own[row] for row in x.rows] for own, x in zip(indices, self._divided, strict=True)]
        parts = [StepPart(own, share, step) for own in rows]
        if step % args.num_iterations == 0 or [len(x.rewards) for x in self._experiences] != [len(x) for x in rows]:
            self._experiences = []  # of another sampling, or of other processes
        if self._experiences:
            parts = [replace(part, experience=x) for part, x in zip(parts, self._experiences, strict=True)]
        elif not args.drops_thoughts and len(texts) < 2:
            return parts
        elif args.normalize_advantages == "step" or args.drops_thoughts:
            parts = self._judged_ahead(model, parts)
        elif args.thought_positions == "difficulty" or self.thinker.sampling.stop is not None:
            pairs = zip(texts, parts, strict=True)
            parts = [replace(part, thoughts=self.thinker.sample(text, part)) for text, part in pairs]
        counts = [self._counts(*x) for x in zip(texts, parts, strict=True)]
        for written in (divided.written for divided in self._divided):
            if written is not None:
                counts.append(self._counted(written.text, written.thoughts.positions, written.thoughts.mask, True))
        total = TokenCounts.total(counts, self._sum)
        parts = [replace(part, counts=total) for part in parts]
        if args.drops_thoughts:  # the means stay those over all thoughts
            parts = [self._worth_training_on(i, part) for i, part in enumerate(parts)]
        return parts

    def _worth_training_on(self, number: int, part: StepPart) -> StepPart:
        """Leaves the thoughts that are dropped out of a batch that was judged ahead, with rows that have no others."""
        divided, args = self._divided[number], self.args
        assert part.experience is not None
        text, keeps_rows = divided.sampled, args.base_nll_coefficient > 0
        kept = kept_thoughts(part.experience, args.advantage_threshold)
        kept, folded = fold_repeats(part.experience, kept)
        rows, experience = worth_training_on(folded, kept, text.input_ids.shape[1], keeps_rows)
        numbers = rows.tolist()
        self._divided[number] = replace(divided, sampled=text.rows(rows), rows=[divided.rows[row] for row in numbers])
        judged = {**part.judged, "experience": part.experience} if part.judged else {"is_reused": True}
        return replace(part, rows=[part.rows[row] for row in numbers], experience=experience, judged=judged)

    def _row_indices(self, rows: int, before: int) -> list[int]:
        """Index of each of a batch's rows in the step's global batch, or in the evaluation data, where processes have read
        `before` rows each."""
        start = before * self.accelerator.num_processes + self.accelerator.process_index * rows
        return list(range(start, start + rows))

    def _counts(self, text: Text, part: StepPart) -> TokenCounts:
        """Tokens of a batch, some of which are known before its thoughts are."""
        if part.experience is not None:
            return part.experience.counts(text)
        if part.thoughts is None:
            positions = self.thinker.sampler(part).positions(text)
            mask = positions.mask[..., None, None].expand(-1, -1, self.args.num_thoughts, self.args.thought_length)
        else:
            positions, mask = part.thoughts.positions, part.thoughts.mask
        return self._counted(text, positions, mask)

    def _counted(self, text: Text, positions: Positions, mask: torch.Tensor, written: bool = False) -> TokenCounts:
        """Tokens of rows with thoughts at positions, of shape `(B, J, G, L)`."""
        talk = talk_after(text, positions, self.thinker.talk_length(text, positions))
        return TokenCounts.of(mask, talk.target_mask[:, :, None], text.predicted(), written)

    @torch.no_grad()
    def _judged_ahead(self, model: nn.Module, parts: list[StepPart]) -> list[StepPart]:
        """Thoughts of all batches and what they are worth, in a pass of their own, before the first one is trained on: advantages
        are standardized over all of them, or tell which are trained on."""
        experiences, logs_all = [], self.args.drops_thoughts
        for i, (batch, divided) in enumerate(zip(self._batches, self._divided, strict=True)):
            request = self.thinker.request(divided.sampled, parts[i], with_graph=False)
            scores = request.scores(model)
            experiences.append(self._experience(request, scores, divided.columns(batch), parts[i]))
            if logs_all:
                parts[i] = replace(parts[i], judged={"text": divided.sampled, "scores": scores})
        experiences = finish_advantages(experiences, self.args, self._sum)
        if self.args.reward_std_filter is not None:
            experiences = drop_groups(experiences, self.args.reward_std_filter, self._deviation, self._sum)
        if self.args.num_iterations > 1:
            self._experiences = experiences
        return [replace(part, experience=x) for part, x in zip(parts, experiences, strict=True)]

    def _experience(
        self, request: ThoughtRequest, scores: Scores, columns: dict[str, list] | None, part: StepPart
    ) -> Experience:
        reference, sampling = self.reference.score(request, scores.thoughts), self.thinker.sampling
        functions = self.reward_functions
        made = {} if functions is None else self._made(functions, request, scores, part.training)
        experience = experience_of(request.text, scores, reference, self.args, sampling, functions, columns, made)
        if part.training and self.args.self_imitation_batch_size:
            self.imitation.add(request.text, scores, experience, part.rows)
        if functions is None or not functions.asks_for("log_metric") or self.accelerator.num_processes == 1:
            return experience
        # metrics are summed over processes by their order, and another process may have logged others
        names, nothing = gather_object(list(experience.measured)), torch.zeros(0, device=self.accelerator.device)
        measured = {name: experience.measured.get(name, (nothing, nothing)) for name in sorted(set(names))}
        return replace(experience, measured=measured)

    def _made(
        self, functions: RewardFunctions, request: ThoughtRequest, scores: Scores, training: bool
    ) -> dict[str, Any]:
        """The arguments that reward functions ask for and that take time."""
        makers = {
            "thought_texts": lambda: self.thinker.texts(scores.thoughts),
            "answers": lambda: self.thinker.answers(request.text, scores.thoughts, request.talk_length, training),
        }
        return {name: make() for name, make in makers.items() if functions.asks_for(name)}

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return summed(values, self.accelerator)

    # Checkpoints

    def state(self) -> dict:
        """What a checkpoint keeps beside experience: the moving average of the standard deviation of a group's rewards."""
        return {"reward_deviation": [self._deviation.total, self._deviation.weight]}

    def load(self, state: dict) -> None:
        """Takes back what [`OptimizerStep.state`] gave; checkpoints from before there was an average hold none."""
        self._deviation.total, self._deviation.weight = state.get("reward_deviation", (0.0, 0.0))

    def save(self, folder: str, step: int) -> None:
        """Writes the experience of this process's batches beside a checkpoint's state, where the next update after so many
        steps reuses it; each process its own."""
        self.imitation.save(folder)
        if step % self.args.num_iterations:
            save_file(flat(self._experiences), self._file(folder))

    def restore(self, folder: str) -> None:
        """Reads what [`OptimizerStep.save`] wrote, if anything. With another number of processes a step samples anew."""
        self.imitation.restore(folder)
        if self._file(folder).is_file():
            self._experiences = unflat(load_file(self._file(folder), device=str(self.accelerator.device)))

    def _file(self, folder: str) -> Path:
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        return Path(folder, f"quietstar_experience-{process}-of-{count}.safetensors")


def _alone(values: torch.Tensor) -> torch.Tensor:
    """No reduction: an evaluation's batch has means of its own."""
    return values
