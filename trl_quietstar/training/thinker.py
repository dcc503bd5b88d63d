"""`Thinker`: how the thoughts of a batch are drawn and asked for, in the memory that there is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._compat import checkpoints_layers
from ..branches.base import BranchPath
from ..branches.cached_replay import CachedReplay
from ..branches.decoders import ReplayDecoder, decoder_of
from ..branches.memory import Plan, Size, branches_without_graph, free_bytes, kept_per_token, memory_budget, plan_batch
from ..branches.replay import Replay
from ..branches.shared_prefix import SharedPrefix
from ..config import QuietStarConfig
from ..data.prepare import check_longest
from ..learning.experience import StepPart
from ..learning.metrics import BatchResult
from ..learning.rewards import coherence
from ..model.adapters import base_of
from ..model.concurrency import eval_mode
from ..model.family import eos_ids
from ..model.heads import ThinkingModel
from ..model.routing import has_router_loss
from ..settings import OPTIONS
from ..text.batch import Positions, Text, Thoughts, talk_after
from ..text.divided import Divided, Written, divide, has_written, no_thoughts
from ..text.positions import most_positions, seeded_generators, talk_span, usable_positions
from ..text.transfer import to_host
from ..thinking.answers import greedy_answers
from ..thinking.check import choose_path
from ..thinking.drawing import thought_sampling
from ..thinking.sampling import ThoughtSampler
from ..thinking.scoring import ScoreRequest, Scores, score_each, score_thoughts
from .distributed import greatest, is_sharded
from .rollouts import Rollouts


@dataclass(frozen=True, kw_only=True)
class ThoughtRequest(ScoreRequest):
    """
    What to score of a batch, and by which plan of memory; as [`~thinking.scoring.ScoreRequest`] otherwise.

    Parameters:
        plan ([`~branches.memory.Plan`]):
            How many branches are run at once, here and where the same thoughts are scored again.
    """

    plan: Plan

    def scores(self, model: nn.Module) -> Scores:
        """Scores by the policy, given as its engine has wrapped it."""
        return call_inside(model, self.text, self)

    def scores_beside(self, model: nn.Module, other: ScoreRequest | None) -> tuple[Scores, Scores | None]:
        """Scores of this and of another request in one forward of the wrapped model, as engines want it."""
        if other is None:
            return self.scores(model), None
        own, others = call_inside(model, self.text, lambda base: score_each(base, [self, other]))
        return own, others


def call_inside(model: nn.Module, text: Text, function: Callable[[Any], Any]) -> Any:
    """
    Calls a function of the base model inside the forward of the model around it.

    The answer comes out in a list. Engines look for tensors in lists as in tuples; Transformers' search for overflows
    (`debug="underflow_overflow"`) looks into tuples alone, and fails at the masks in the answer.
    """
    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    (answer,) = model(**inputs, quietstar_request=lambda base: [function(base)])
    return answer


@torch.no_grad()
def ask(accelerator: Accelerator, model: nn.Module, text: Text, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """
    Calls a function of the base model inside the forward of the model around it, where sharded weights are whole.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the run, whose autocast holds.
        model (`nn.Module`):
            The thinking model, or its reference.
        text ([`Text`]):
            The batch.
        function (`Callable`):
            Called with the base model and all further arguments.
    """
    with accelerator.autocast():
        return call_inside(model, text, lambda base: function(base, *args, **kwargs))


class Thinker:
    """
    Draws and scores the thoughts of batches with the policy.

    Args:
        args ([`QuietStarConfig`]):
            Options of the run. A curriculum changes them; [`Thinker.adopt_settings`] then takes them over.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The thinking model.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tells where a thought ends.

    Raises:
        `ValueError`: if `single_pass=True` is asked of a model that cannot.
    """

    def __init__(
        self,
        args: QuietStarConfig,
        model: nn.Module,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.args, self.model, self.accelerator, self.tokenizer = args, model, accelerator, tokenizer
        self.base = cast(ThinkingModel, base_of(model))
        self.rollouts: Rollouts | None = None  # what draws the thoughts of training, if we do not
        self.is_sharded = is_sharded(accelerator)
        # how often layers run is agreed on where each process holds a part of the parameters only
        self.greatest = functools.partial(greatest, accelerator=accelerator) if self.is_sharded else int
        self.path: BranchPath = choose_path(self.base, args.thought_path, with_dropout=not args.disable_dropout)
        if self.is_sharded and isinstance(self.path, CachedReplay):  # reads texts in as many forwards as they need
            self.path = Replay()
        self.samples_in_graph = self._can_sample_in_graph()
        if args.single_pass and not self.samples_in_graph:
            raise ValueError(
                f"`single_pass=True` needs a model whose attention can branch, that trains no router and whose parameters are "
                f"not sharded, which {type(self.base).__name__} is not here; leave it out."
            )
        # bytes; the same on all processes, and in a run that resumes. Measured when they are needed, or before parameters are
        # sharded
        self.kept_per_token: float | None = None
        self.memory_budget: int | None = None
        if self.is_sharded and args.branch_batch_size is None and not args.gradient_checkpointing:
            with accelerator.autocast():
                self.kept_per_token = kept_per_token(self.base)
        self.adopt_settings()

    def begin_run(self) -> None:
        """Takes the model; and connects to vLLM, where it draws the thoughts of training."""
        self.take_model()
        if self.args.use_vllm:
            self.rollouts = self.rollouts or Rollouts(self.args, self.model, self.accelerator, self.tokenizer)
            self.rollouts.begin_run()

    def adopt_settings(self) -> None:
        """Takes over from `args` how thoughts are drawn and read, for what follows."""
        self._adopted = {name: getattr(self.args, name) for name in (*OPTIONS.values(), "num_thoughts")}
        self.base.adopt_settings(self.args.settings(), self.tokenizer)
        self.sampling = thought_sampling(self.args.settings(), self.tokenizer, self.args.num_thoughts)

    def take_model(self) -> None:
        """
        Has the model think by this trainer's options: another trainer may have had it. Options that were changed by hand since they
        were taken over would hold in some places and not in others. Those of a curriculum are changed by its stages, also for another
        trainer with the same `args`.

        Raises:
            `ValueError`: if options were changed by hand.
        """
        for name, adopted in self._adopted.items():
            value = getattr(self.args, name)
            if value != adopted and not self.args.curriculum:
                raise ValueError(
                    f"`args.{name}` was changed to {value!r} after the trainer had taken over {adopted!r}, for which it has prepared "
                    "data and model; make a new trainer, with `model=trainer.model`."
                )
        self.base.adopt_settings(self.args.settings(), self.tokenizer)

    def _can_sample_in_graph(self) -> bool:
        """Not where dropout would be on in sampling, nor where routers are watched forward by forward, nor where each
        forward of a layer in the graph costs another reduction of its gradients."""
        args, base = self.args, self.base
        return (
            type(self.path) is SharedPrefix
            and args.disable_dropout
            and args.policy_temperature is None  # what was drawn is known at that of sampling
            and not (args.gradient_checkpointing or checkpoints_layers(base))
            and args.single_pass is not False
            and not args.use_vllm
            and args.branch_batch_size is None
            and not has_router_loss(base.config)
            and not self.is_sharded
        )

    # Batches

    def divide(self, inputs: dict) -> Divided:
        """A collated batch to train on, by what happens to its rows. Plain training reads no written thoughts."""
        text, args = self.text(inputs), self.args
        if not has_written(inputs) or args.written_thought_coefficient == 0 or args.thought_positions == "none":
            return Divided.undivided(text)
        held = int((inputs["written_at"] >= 0).any())
        return divide(text, inputs, always=self.greatest(held) > 0)

    def text(self, inputs: dict) -> Text:
        """
        The text of a collated batch, on the device.

        Raises:
            `ValueError`: if it is longer than the model can read, where no `max_length` has seen to that.
        """
        aside = ("part", "columns", "written_ids", "written_at")
        text = Text.from_batch(**{name: x for name, x in inputs.items() if name not in aside})
        if self.args.max_length is None:
            longest, around = int(text.host.position_ids.max()) + 1, self.base.thought_marks.around
            check_longest(longest, self.args, self.base.config, around)
        return text.to(self.accelerator.device)

    def talk_length(self, text: Text, positions: Positions | None = None) -> int:
        """M of a batch, whose thoughts may be at all usable positions or are at those given."""
        return talk_span(text, self.args.talk_length, self.args.thought_positions, positions)

    def sampler(self, part: StepPart) -> ThoughtSampler:
        """How the thoughts of a batch are drawn, each row's from its own random numbers."""
        args, settings = self.args, self.sampling
        if not part.training and not args.eval_do_sample:
            settings = replace(settings, do_sample=False)
        return ThoughtSampler(
            settings,
            seeded_generators(args.seed, part.step, part.rows),
            args.thought_positions,
            args.difficulty_threshold,
            args.min_thought_interval,
            self.greatest,
        )

    def sample(self, text: Text, part: StepPart, plan: Plan | None = None) -> Thoughts:
        """Draws the thoughts of a batch, without gradient; by default by a plan of its own."""
        if self.rollouts is not None and part.training:
            marks, positions = self.base.thought_marks, self.sampler(part).positions(text)
            return self.rollouts.sample(text, positions, marks, self.sampling, part.step)
        if self._writes_nothing(text):
            return no_thoughts(text, self.args.num_thoughts)
        plan = plan or self.plan(text, part.training)
        training = self.base.training
        self.base.eval()  # no dropout, and a cache even where layers are checkpointed
        try:
            return self.ask(text, self.sampler(part).sample, text, self.path, plan.sampling)
        finally:
            self.base.train(training)

    def request(self, text: Text, part: StepPart, with_graph: bool = True) -> ThoughtRequest:
        """What to score of a batch. Thoughts are sampled on the way where one pass is enough, and now where it is not. Without a
        graph for the backward, one pass is enough if all branches run at once."""
        args, plan = self.args, self.plan(text, part.training)
        known = part.experience
        thoughts: Thoughts | ThoughtSampler | None = known.thoughts if known else part.thoughts
        if thoughts is None:
            at_once = self.samples_in_graph and plan.sampling is None and plan.scoring is None and not with_graph
            one_pass = (plan.single_pass or at_once) and not self._writes_nothing(text)
            thoughts = self.sampler(part) if one_pass else self.sample(text, part, plan)
        talk_length = known.talk_mask.shape[-1] if known else self.talk_length(text)
        return self._request(text, thoughts, talk_length, args.logps_temperature, plan, part.training)

    def written_request(self, written: Written) -> ThoughtRequest:
        """What to score of the rows with written thoughts: their likelihood is taken at temperature 1."""
        text, thoughts = written.text, written.thoughts
        talk_length = self.talk_length(text, thoughts.positions)
        slots = self.base.thought_marks.slots(thoughts.mask.shape[3], talk_length)
        plan = self._planned(text, thoughts.mask.shape[1], slots, training=True)
        return self._request(text, thoughts, talk_length, 1.0, plan, training=True)

    def _request(
        self,
        text: Text,
        thoughts: Thoughts | ThoughtSampler,
        talk_length: int,
        temperature: float,
        plan: Plan,
        training: bool,
    ) -> ThoughtRequest:
        return ThoughtRequest(
            text=text,
            thoughts=thoughts,
            talk_length=talk_length,
            path=self.path,
            temperature=temperature,
            prediction=self.args.reward_prediction,
            branch_batch_size=plan.training if training else plan.scoring,
            plan=plan,
        )

    def _writes_nothing(self, text: Text) -> bool:
        """Whether no row has a place for a thought, so that none need be sampled. Not asked where each process must run the
        layers as often as the others."""
        return not self.is_sharded and not bool(usable_positions(text.host, self.args.thought_positions).any())

    def ask(self, text: Text, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of the policy's base model without gradient; see [`ask`]."""
        return ask(self.accelerator, self.model, text, function, *args, **kwargs)

    def coherence(self, batch: BatchResult, plan: Plan) -> torch.Tensor:
        """Coherence of a batch's thoughts, of shape `(B, J, G)`; see [`~learning.rewards.coherence`]."""
        experience, thoughts = batch.experience, batch.experience.thoughts
        args = (batch.text, thoughts, self.path)
        plain = self.ask(batch.text, score_thoughts, *args, start=False, branch_batch_size=plan.scoring)
        return coherence(
            batch.scores.similarity,
            plain.thought_logps,
            thoughts.mask,
            batch.scores.talk_logps,
            experience.logps_without,
            experience.talk_mask,
        )

    def texts(self, thoughts: Thoughts) -> list[list[list[str]]]:
        """What thoughts say, without special tokens: strings in lists of B, J and G; empty where there is no thought."""
        ids, mask = to_host([thoughts.token_ids, thoughts.mask])
        flat = [own[exists].tolist() for own, exists in zip(ids.flatten(0, 2), mask.flatten(0, 2), strict=True)]
        return self._nested(self.tokenizer.batch_decode(flat, skip_special_tokens=True), thoughts)

    @staticmethod
    def _nested(texts: list[str], thoughts: Thoughts) -> list[list[list[str]]]:
        """A string for each thought, in lists of B, J and G."""
        return np.array(texts, dtype=object).reshape(thoughts.mask.shape[:3]).tolist()

    def answers(self, text: Text, thoughts: Thoughts, talk_length: int, training: bool) -> list[list[list[str]]]:
        """
        What the policy says after each thought, greedily, by the prediction that is rewarded: strings in lists of B, J and G. An
        answer ends at an EOS token, and has as many tokens as there are to be predicted after the thought.

        Args:
            text ([`Text`]), thoughts ([`Thoughts`]):
                The batch and its thoughts.
            talk_length (`int`):
                M.
            training (`bool`):
                Whether the batch is trained on; for the memory that there is.
        """
        if not self.is_sharded and not bool(thoughts.positions.host.mask.any()):
            return self._nested([""] * thoughts.mask[..., 0].numel(), thoughts)
        (B, J, G, L), (_, free) = thoughts.mask.shape, self._memory(training)
        limits = talk_after(text, thoughts.positions, talk_length).host.target_mask.sum(-1)
        # each thought is read with a copy of its text, as in replay
        size = Size(B, text.input_ids.shape[1], J * G, self.base.thought_marks.slots(L, talk_length))
        fitting = -self.greatest(-branches_without_graph(self.base, Replay(), size, 1, free))
        decoder = ReplayDecoder if self.is_sharded else decoder_of  # whose caches run layers as often as rows need it
        with eval_mode(self.base):
            args = (text, thoughts, limits, eos_ids(self.base, self.tokenizer), fitting, decoder, self.greatest)
            ids = self.ask(text, greedy_answers, *args)
        return self._nested(self.tokenizer.batch_decode(ids, skip_special_tokens=True), thoughts)

    # Memory

    def plan(self, text: Text, training: bool) -> Plan:
        """Whether one pass is enough for a batch, and how many branches to run at once if not."""
        args = self.args
        branches = args.num_thoughts * most_positions(text, args.thought_positions, args.min_thought_interval)
        slots = self.base.thought_marks.slots(args.thought_length, self.talk_length(text))
        return self._planned(text, branches, slots, training)

    def _planned(self, text: Text, branches: int, slots: int, training: bool) -> Plan:
        """The plan for a text with so many branches a row, of so many slots."""
        args, size = self.args, self.args.branch_batch_size
        if args.single_pass:
            return Plan(self.samples_in_graph)
        B, T = text.input_ids.shape
        with self.accelerator.autocast():
            kept, free = self._memory(training)
            plan = plan_batch(
                self.base,
                self.path,
                Size(B, T, self.greatest(branches), slots),
                kept,
                free,
                self.samples_in_graph,
                lambda number: -self.greatest(-number),
            )
        return plan if size is None else replace(plan, training=size, scoring=size)

    def _memory(self, training: bool) -> tuple[float | None, int]:
        """Bytes that a token keeps for the backward, where groups are chosen for one, and bytes that are free."""
        if not training:
            return None, free_bytes(self.base.device)
        if self.memory_budget is None:  # that of the process with the least
            self.memory_budget = -greatest(-memory_budget(self.base), self.accelerator)
        if self.args.gradient_checkpointing or self.args.branch_batch_size is not None:
            return None, self.memory_budget
        if self.kept_per_token is None:
            self.kept_per_token = kept_per_token(self.base)
        return self.kept_per_token, self.memory_budget

    def state(self) -> dict:
        """What a checkpoint keeps: the measured memory, so that a resumed run plans as the first did."""
        return {"memory": [self.kept_per_token, self.memory_budget]}

    def load(self, state: dict) -> None:
        """Takes back what [`Thinker.state`] gave."""
        if state["memory"][1] is not None:
            self.kept_per_token, self.memory_budget = state["memory"]
