"""What sampling and judging a batch's thoughts gave: all that an update needs beside the scores of the current policy."""

from dataclasses import dataclass, fields

import torch

from ..config import QuietStarConfig
from ..text.batch import Positions, Text, Thoughts, talk_after
from ..thinking.sampling import SamplingSettings, unfinished
from ..thinking.scoring import Scores, ThoughtScores, at_talk
from .advantages import thought_advantages
from .objective import TokenCounts
from .rewards import RewardFunction, columns_taken, thought_rewards


@dataclass(frozen=True)
class Experience:
    """
    Thoughts and their worth; nothing here carries gradient.

    Parameters:
        thoughts ([`Thoughts`]):
            As they were sampled.
        talk_mask, logps_without, correct_without (`torch.Tensor` of shape `(B, J, 1, M)`):
            Talk tokens that count, and the no-thought prediction of them.
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            Of the thoughts.
        advantages, returns (`torch.Tensor` of shape `(B, J, G, L)`):
            Of the thought tokens.
        sampled_logps (`torch.Tensor` of shape `(B, J, G, L)`):
            Their log-probabilities in nats under the policy that wrote them.
        reference_logps (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            The same under the reference, where there is a KL term.
    """

    thoughts: Thoughts
    talk_mask: torch.Tensor
    logps_without: torch.Tensor
    correct_without: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    sampled_logps: torch.Tensor
    reference_logps: torch.Tensor | None = None

    @property
    def exists(self) -> torch.Tensor:
        """Mask of shape `(B, J, G)`: thoughts that were written."""
        return self.thoughts.positions.mask[..., None].expand_as(self.rewards)

    def counts(self, text: Text) -> TokenCounts:
        """What the objective's means are taken over in this batch, whose text is given."""
        return TokenCounts.of(self.thoughts.mask, self.talk_mask, text.predicted())


@torch.no_grad()
def experience_of(
    text: Text,
    scores: Scores,
    reference: ThoughtScores | None,
    args: QuietStarConfig,
    sampling: SamplingSettings,
    reward_function: RewardFunction | None = None,
    columns: dict[str, list] | None = None,
) -> Experience:
    """
    Rewards and advantages of scored thoughts. Advantages are not standardized yet: that takes all batches of a step.

    Args:
        text ([`Text`]):
            The batch.
        scores ([`Scores`]):
            By the policy that wrote the thoughts.
        reference ([`ThoughtScores`], *optional*):
            By the reference, where there is one.
        args ([`QuietStarConfig`]):
            What is rewarded, and against which baseline.
        sampling ([`~thinking.sampling.SamplingSettings`]):
            How the thoughts were sampled; for the penalty on unfinished ones.
        reward_function (`Callable`, *optional*):
            In place of `args.reward_type`.
        columns (`dict`, *optional*):
            Columns of the data, one value for each row, for the reward function.

    Raises:
        `ValueError`: if a reward function gives anything but one number for each thought.
    """
    thoughts = scores.thoughts
    talk_length = scores.talk_logps.shape[-1]
    talk_mask = talk_after(text, thoughts.positions, talk_length).target_mask[:, :, None]
    no_thought: Scores | ThoughtScores = scores
    if args.no_thought_model == "reference":
        assert reference is not None
        no_thought = reference
    logps_without = at_talk(no_thought.text_logps, thoughts, talk_length)
    correct_without = at_talk(no_thought.text_correct, thoughts, talk_length)
    gains = {
        "logps_with": scores.talk_logps,
        "logps_without": logps_without,
        "correct_with": scores.talk_correct,
        "correct_without": correct_without,
        "mask": talk_mask,
    }
    if reward_function is None:
        rewards = thought_rewards(**gains, reward_type=args.reward_type)
    else:
        taken = columns_taken(reward_function, columns or {})
        rewards = reward_function(**gains, text=text, thoughts=thoughts, **taken)
        wanted = tuple(thoughts.mask.shape[:3])
        if not isinstance(rewards, torch.Tensor) or rewards.shape != wanted:
            given = tuple(rewards.shape) if isinstance(rewards, torch.Tensor) else type(rewards).__name__
            raise ValueError(
                f"`reward_function` gave {given}; it must give a tensor of shape (B, J, G), here {wanted}."
            )
        rewards = rewards.to(scores.talk_logps) * thoughts.mask[..., 0]
    if args.reward_clip_range is not None:
        rewards = rewards.clamp(*args.reward_clip_range)
    if args.unfinished_thought_penalty:
        rewards = rewards - args.unfinished_thought_penalty * unfinished(thoughts, sampling)
    advantages, returns = thought_advantages(
        rewards,
        scores.thought_values,
        thoughts.mask,
        baseline=args.advantage_baseline,
        use_gae=args.use_gae,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
    )
    return Experience(
        thoughts,
        talk_mask,
        logps_without,
        correct_without,
        rewards,
        advantages,
        returns,
        scores.thought_logps.detach(),
        reference.thought_logps if reference is not None and args.beta > 0 else None,
    )


def flat(experiences: list[Experience]) -> dict[str, torch.Tensor]:
    """The tensors of a step's batches by name, for a file; [`unflat`] takes them back."""
    tensors: dict[str, torch.Tensor] = {}
    for i, experience in enumerate(experiences):
        own = {field.name: getattr(experience, field.name) for field in fields(experience)}
        thoughts = own.pop("thoughts")
        own |= {"index": thoughts.positions.index, "positions": thoughts.positions.mask}
        own |= {"token_ids": thoughts.token_ids, "mask": thoughts.mask}
        # clones: a file holds no views
        tensors |= {f"{i}.{name}": tensor.clone() for name, tensor in own.items() if tensor is not None}
    return tensors


def unflat(tensors: dict[str, torch.Tensor]) -> list[Experience]:
    """What [`flat`] wrote."""
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        batches.setdefault(int(number), {})[name] = tensor
    experiences = []
    for _, own in sorted(batches.items()):
        positions = Positions(own.pop("index"), own.pop("positions"))
        experiences.append(Experience(Thoughts(positions, own.pop("token_ids"), own.pop("mask")), **own))
    return experiences


@dataclass(frozen=True)
class StepPart:
    """
    A batch's place in its optimizer step.

    Parameters:
        rows (`list[int]`):
            Index of each row in the step's global batch, or in the evaluation data.
        share (`float`):
            Of this batch among the batches of the step, on all processes.
        counts ([`TokenCounts`], *optional*):
            Of the whole step; None where they are known only once this batch, the only one, has been sampled.
        thoughts ([`Thoughts`], *optional*):
            Where they had to be sampled ahead of the step.
        experience ([`Experience`], *optional*):
            Where thoughts had to be judged ahead, or were in an earlier update.
    """

    rows: list[int]
    share: float = 1.0
    counts: TokenCounts | None = None
    thoughts: Thoughts | None = None
    experience: Experience | None = None
