"""What sampling and judging a batch's thoughts gave: all that an update needs beside the scores of the current policy."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from ..text.batch import Positions, Text, Thoughts, talk_after
from ..thinking.drawing import SamplingSettings
from ..thinking.sampling import unfinished
from ..thinking.scoring import Scores, ThoughtScores, at_talk
from .advantages import scale_by_group, standardize, thought_advantages, value_weights
from .objective import TokenCounts
from .reward_functions import RewardFunctions
from .rewards import talk_weights, thought_rewards


if TYPE_CHECKING:
    from ..config import QuietStarConfig


@dataclass(frozen=True)
class Experience:
    """
    Thoughts and their worth; nothing here carries gradient. Log-probabilities are in nats.

    Parameters:
        thoughts ([`Thoughts`]):
            The sampled thoughts.
        talk_mask, logps_without, correct_without (`torch.Tensor` of shape `(B, J, 1, M)`):
            Talk tokens that count, and the no-thought prediction of them.
        score_mask (`torch.Tensor` of shape `(B, J, 1, M)`):
            Those of them that the reward looks at.
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            Reward of each thought.
        advantages, returns (`torch.Tensor` of shape `(B, J, G, L)`):
            Of the thought tokens.
        sampled_logps (`torch.Tensor` of shape `(B, J, G, L)`):
            Log-probabilities of the thought tokens under the policy that wrote them.
        reference_logps (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Log-probabilities of the thought tokens under the reference, where there is a KL term.
        talk_weights (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            Weight of each thought in the NLLs of the talk after it, by `args.nll_weighting`. None: all are 1.
        repeats (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            How many thoughts of the group each stands for, where [`~learning.selection.fold_repeats`] has left one of
            those that say the same. None: 1.
        dropped (`torch.Tensor` of shape `(B, J)`, bool, *optional*):
            Groups that [`~learning.selection.drop_groups`] leaves out of the update.
        value_weights (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Weight of each thought token in the value head's squared error. None: 1.
        penalties (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            What was taken off the gain of each thought to make its reward. None: nothing was.
        measured (`dict`):
            Metrics of the reward functions, as in [`~learning.reward_functions.RewardFunctions.judge`].
    """

    thoughts: Thoughts
    talk_mask: torch.Tensor
    score_mask: torch.Tensor
    logps_without: torch.Tensor
    correct_without: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    sampled_logps: torch.Tensor
    reference_logps: torch.Tensor | None = None
    talk_weights: torch.Tensor | None = None
    repeats: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
    value_weights: torch.Tensor | None = None
    penalties: torch.Tensor | None = None
    measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def exists(self) -> torch.Tensor:
        """Mask of shape `(B, J, G)`: the thoughts that were written."""
        return self.thoughts.positions.mask[..., None].expand_as(self.rewards)

    @property
    def groups(self) -> torch.Tensor:
        """Mask of shape `(B, J)`: the positions with thoughts and something to be rewarded for."""
        return self.thoughts.positions.mask & self.score_mask.flatten(2).any(-1)

    def counts(self, text: Text) -> TokenCounts:
        """Numbers of tokens that the objective's means are taken over in this batch, given its text."""
        return TokenCounts.of(self.thoughts.mask, self.talk_mask, text.predicted())


@torch.no_grad()
def experience_of(
    text: Text,
    scores: Scores,
    reference: ThoughtScores | None,
    args: "QuietStarConfig",
    sampling: SamplingSettings,
    reward_functions: RewardFunctions | None = None,
    columns: dict[str, list] | None = None,
    made: dict[str, Any] | None = None,
) -> Experience:
    """
    Rewards and advantages of scored thoughts. Advantages are not yet final: see [`finish_advantages`].

    Args:
        text ([`Text`]):
            The batch.
        scores ([`Scores`]):
            By the policy that wrote the thoughts.
        reference ([`ThoughtScores`], *optional*):
            By the reference, where there is one.
        args ([`QuietStarConfig`]):
            Tells the reward, its clipping and penalty, and the baseline.
        sampling ([`~thinking.drawing.SamplingSettings`]):
            How the thoughts were sampled; for the penalty on unfinished ones.
        reward_functions ([`~learning.reward_functions.RewardFunctions`], *optional*):
            In place of `args.reward_type`.
        columns (`dict`, *optional*):
            Columns of the data, one value for each row, for the reward functions.
        made (`dict`, *optional*):
            Further arguments that reward functions ask for, by their names.

    Raises:
        `ValueError`: if a reward function gives anything but one number for each thought.
    """
    thoughts, talk_length = scores.thoughts, scores.talk_logps.shape[-1]
    assert reference is not None or not args.uses_reference
    no_thought = scores if reference is None or args.no_thought_model == "policy" else reference
    talk = talk_after(text, thoughts.positions, talk_length)
    gains = {
        "logps_with": scores.talk_logps,
        "logps_without": at_talk(no_thought.text_logps, thoughts, talk_length),
        "correct_with": scores.talk_correct,
        "correct_without": at_talk(no_thought.text_correct, thoughts, talk_length),
        "mask": talk.score_mask[:, :, None],
    }
    measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if reward_functions is None:
        rewards = thought_rewards(**gains, reward_type=args.reward_type)
    else:
        own = {**gains, "text": text, "thoughts": thoughts, **(made or {})}
        rewards, measured = reward_functions.judge(own, columns or {}, scores.talk_logps.dtype)
    rewards, penalties = _fined(rewards, thoughts, args, sampling)
    baseline, gae = args.advantage_baseline, (args.use_gae, args.gamma, args.gae_lambda)
    advantages, returns = thought_advantages(rewards, scores.thought_values, thoughts.mask, baseline, *gae)
    return Experience(
        thoughts,
        talk.target_mask[:, :, None],
        gains["mask"],
        gains["logps_without"],
        gains["correct_without"],
        rewards,
        advantages,
        returns,
        scores.thought_logps.detach(),
        None if reference is None or args.beta == 0 else reference.thought_logps,
        talk_weights(scores.talk_logps, gains["mask"], rewards, args.nll_weighting),
        value_weights=value_weights(scores.thought_logps, baseline),
        penalties=penalties,
        measured=measured,
    )


def _fined(
    rewards: torch.Tensor, thoughts: Thoughts, args: "QuietStarConfig", sampling: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Clips rewards, and takes off what unfinished thoughts cost, where configured; and that cost."""
    if args.reward_clip_range is not None:
        rewards = rewards.clamp(*args.reward_clip_range)
    if not args.unfinished_thought_penalty:
        return rewards, None
    penalties = args.unfinished_thought_penalty * unfinished(thoughts, sampling)
    return rewards - penalties, penalties


def finish_advantages(
    experiences: list[Experience], args: "QuietStarConfig", reduce: Callable[[torch.Tensor], torch.Tensor]
) -> list[Experience]:
    """
    Normalises the advantages of all batches of a step, and sets negative ones to 0, as configured.

    Args:
        experiences (`list` of [`Experience`]):
            Of each batch.
        args ([`QuietStarConfig`]):
            Tells which of the two is done.
        reduce (`Callable`):
            Sums a tensor over processes.
    """
    advantages = [x.advantages for x in experiences]
    if args.normalize_advantages == "group":
        advantages = [scale_by_group(x.advantages, x.rewards) for x in experiences]
    elif args.normalize_advantages == "step":
        advantages = standardize(advantages, [x.thoughts.mask for x in experiences], reduce)
    if args.positive_advantages_only:
        advantages = [x.clamp(min=0) for x in advantages]
    return [replace(x, advantages=values) for x, values in zip(experiences, advantages, strict=True)]


def flat(experiences: list[Experience]) -> dict[str, torch.Tensor]:
    """The tensors of a step's batches by name, for a file; [`unflat`] takes them back."""
    tensors: dict[str, torch.Tensor] = {}
    for i, experience in enumerate(experiences):
        own = {field.name: getattr(experience, field.name) for field in fields(experience)}
        thoughts, measured = own.pop("thoughts"), own.pop("measured")
        own |= {"index": thoughts.positions.index, "positions": thoughts.positions.mask}
        own |= {"token_ids": thoughts.token_ids, "mask": thoughts.mask}
        for name, pair in measured.items():
            own |= {f"values.{name}": pair[0], f"counted.{name}": pair[1]}
        # clones: a file holds no views
        tensors |= {f"{i}.{name}": tensor.clone() for name, tensor in own.items() if tensor is not None}
    return tensors


def unflat(tensors: dict[str, torch.Tensor]) -> list[Experience]:
    """Makes the experience of a step's batches from the tensors that [`flat`] gave."""
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        batches.setdefault(int(number), {})[name] = tensor
    experiences = []
    for _, own in sorted(batches.items()):
        positions = Positions(own.pop("index"), own.pop("positions"))
        own.setdefault("score_mask", own["talk_mask"])  # in checkpoints from before there were scores
        thoughts = Thoughts(positions, own.pop("token_ids"), own.pop("mask"))
        names = [name.removeprefix("values.") for name in own if name.startswith("values.")]
        measured = {name: (own.pop(f"values.{name}"), own.pop(f"counted.{name}")) for name in names}
        experiences.append(Experience(thoughts, **own, measured=measured))
    return experiences


@dataclass(frozen=True)
class StepPart:
    """
    A batch's place in its optimizer step.

    Parameters:
        rows (`list[int]`):
            Index of each row in the step's global batch, or in the evaluation data.
        share (`float`):
            Share of this batch among the batches of the step, on all processes.
        step (`int`):
            Number of the optimizer step, by which thoughts are drawn; 0 throughout evaluation.
        training (`bool`):
            Whether the batch is trained on, and not evaluated.
        counts ([`TokenCounts`], *optional*):
            Numbers of tokens in the whole step; None where they are known only once this batch, the only one, has been sampled.
        thoughts ([`Thoughts`], *optional*):
            The batch's thoughts, where they had to be sampled ahead of the step.
        experience ([`Experience`], *optional*):
            The batch's experience, where thoughts had to be judged ahead, or were in an earlier update.
        judged (`dict`):
            Where only some of the batch's thoughts are trained on, what [`~learning.metrics.BatchResult`] is to hold in place of
            theirs: text, scores and experience of all, which are logged; or that they were logged before.
    """

    rows: list[int]
    share: float = 1.0
    step: int = 0
    training: bool = True
    counts: TokenCounts | None = None
    thoughts: Thoughts | None = None
    experience: Experience | None = None
    judged: dict = field(default_factory=dict)
