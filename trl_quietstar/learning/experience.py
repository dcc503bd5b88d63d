"""What sampling and judging a batch's thoughts gave: all that an update needs beside the scores of the current policy."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..text.batch import Positions, Text, Thoughts, talk_after
from ..text.transfer import exact_dtype
from ..thinking.drawing import SamplingSettings
from ..thinking.sampling import unfinished
from ..thinking.scoring import Scores, ThoughtScores, at_talk
from .advantages import (
    BASELINES,
    MovingAverage,
    group_deviation,
    scale_by_group,
    squared_scores,
    standardize,
    thought_advantages,
)
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
            How many thoughts of the group each stands for, where [`fold_repeats`] has left one of those that say the same. None: 1.
        dropped (`torch.Tensor` of shape `(B, J)`, bool, *optional*):
            Groups that [`drop_groups`] leaves out of the update.
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
    if args.reward_clip_range is not None:
        rewards = rewards.clamp(*args.reward_clip_range)
    penalties = None
    if args.unfinished_thought_penalty:
        penalties = args.unfinished_thought_penalty * unfinished(thoughts, sampling)
        rewards = rewards - penalties
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
        value_weights=squared_scores(scores.thought_logps) if BASELINES[baseline].has_least_variance else None,
        penalties=penalties,
        measured=measured,
    )


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


@torch.no_grad()
def drop_groups(
    experiences: list[Experience],
    factor: float,
    average: MovingAverage,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> list[Experience]:
    """
    Marks the groups of a step whose rewards hardly differ (standard deviation filtering of RLPR,
    huggingface.co/papers/2506.18254).

    Args:
        experiences (`list` of [`Experience`]):
            Of each batch.
        factor (`float`):
            A group is dropped where the standard deviation of its rewards is below this share of `average`; one that is no
            number is kept, for the fault to be found.
        average ([`~learning.advantages.MovingAverage`]):
            Of the steps' mean standard deviation, before this step; takes in this step's. Nothing is dropped at the first step.
        reduce (`Callable`):
            Sums a tensor over processes.
    """
    deviations = [group_deviation(x.rewards)[..., 0] for x in experiences]
    groups = [x.groups for x in experiences]
    bound = 0.0 if average.value is None else factor * average.value
    dropped = [(own < bound) & mask for own, mask in zip(deviations, groups, strict=True)]
    known = [own[mask & own.isfinite()] for own, mask in zip(deviations, groups, strict=True)]
    exact = exact_dtype(groups[0].device)
    sums = [torch.stack([x.to(exact).sum(), x.new_full((), len(x), dtype=exact)]) for x in known]
    total, count = reduce(torch.stack(sums).sum(0)).tolist()
    if count:
        average.add(total / count)
    return [replace(x, dropped=own) for x, own in zip(experiences, dropped, strict=True)]


@torch.no_grad()
def kept_thoughts(experience: Experience, threshold: float | None) -> torch.Tensor:
    """
    The thoughts of a batch that are trained on.

    A thought whose advantage is 0 adds nothing to the policy gradient. So groups in which all thoughts earn the same, solved
    or hopeless, only cost time.

    Args:
        experience ([`Experience`]):
            Of the batch, with one advantage for all tokens of a thought.
        threshold (`float`, *optional*):
            The least size of an advantage that is kept; one that is no number is kept too, for the fault to be found.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, bool.
    """
    kept = experience.thoughts.mask[..., 0]
    if experience.dropped is not None:
        kept = kept & ~experience.dropped[..., None]
    return kept if threshold is None else kept & ~(experience.advantages.abs().amax(-1) < threshold)


@torch.no_grad()
def fold_repeats(experience: Experience, kept: torch.Tensor) -> tuple[torch.Tensor, Experience]:
    """
    Leaves one of the thoughts of a group that say the same, to count as often as they are.

    Their gradients are equal, so that one run stands for all of them. A model that is sure of itself writes few different ones: of a
    sum's right thoughts all are one text.

    Args:
        experience ([`Experience`]):
            Of the batch.
        kept (`torch.Tensor` of shape `(B, J, G)`, bool):
            Which thoughts are trained on.

    Returns:
        `tuple`: which are trained on now, and the experience: with the mean of what the folded ones have earned, and how many they
            are.
    """
    # the clipped surrogate of further updates is linear in advantages of one sign only
    is_negative = experience.advantages[..., 0].signbit()
    same = experience.thoughts.alike() & (is_negative[:, :, :, None] == is_negative[:, :, None])
    same = same & kept[:, :, :, None] & kept[:, :, None]
    own = torch.arange(kept.shape[2], device=kept.device)
    first = same.long().argmax(3) == own  # of those that are the same
    repeats = same.sum(3).to(experience.rewards.dtype)
    share = same / repeats.clamp(min=1)[..., None]
    weights = experience.talk_weights
    return kept & first, replace(
        experience,
        advantages=torch.where(kept[..., None], torch.einsum("bjgh,bjhl->bjgl", share, experience.advantages), 0),
        talk_weights=None if weights is None else torch.einsum("bjgh,bjh->bjg", share, weights),
        repeats=repeats,
    )


@torch.no_grad()
def worth_training_on(
    experience: Experience, kept: torch.Tensor, text_length: int, keeps_rows: bool
) -> tuple[torch.Tensor, Experience]:
    """
    The part of a batch's experience that is trained on, in as few rows, positions and thoughts as hold it.

    Args:
        experience ([`Experience`]):
            Of the batch.
        kept (`torch.Tensor` of shape `(B, J, G)`, bool):
            Which thoughts, as [`kept_thoughts`] gives them.
        text_length (`int`):
            T.
        keeps_rows (`bool`):
            Whether the loss is of the rows' text too: then each stays, once. Otherwise rows without a thought that is kept are
            left out, and a row with many of them may come several times, with a few of them each.

    Returns:
        `tuple`: the index of the rows, `(rows,)`, in the host's memory, at least one; and their experience. Slots of thoughts
            that are left out are empty, with a talk of weight 0; that of others has the weight of all that they stand for.
    """
    thoughts = experience.thoughts
    chosen = _chosen(kept.cpu(), keeps_rows)
    lengths = thoughts.host_mask[chosen.rows[:, None, None], chosen.columns[..., None], chosen.places].sum(-1)
    cut = max(int((lengths * chosen.kept).max()), 1)
    if not keeps_rows:
        chosen = _regrouped(chosen, text_length, cut + experience.talk_mask.shape[-1] + 1)
    chosen = _Chosen(*(x.to(kept.device) for x in chosen))
    of_talk = (chosen.rows[:, None], chosen.columns)
    of_thought = (chosen.rows[:, None, None], chosen.columns[..., None], chosen.places)
    positions = Positions(thoughts.positions.index[of_talk], thoughts.positions.mask[of_talk] & chosen.kept.any(2))
    mask = thoughts.mask[of_thought][..., :cut] & chosen.kept[..., None]
    weights, repeats = (1.0 if x is None else x[of_thought] for x in (experience.talk_weights, experience.repeats))
    repeats = chosen.kept.to(experience.rewards.dtype) * repeats
    reference = experience.reference_logps
    return chosen.rows.cpu(), Experience(
        Thoughts(positions, thoughts.token_ids[of_thought][..., :cut] * mask, mask),
        experience.talk_mask[of_talk],
        experience.score_mask[of_talk],
        experience.logps_without[of_talk],
        experience.correct_without[of_talk],
        experience.rewards[of_thought],
        experience.advantages[of_thought][..., :cut],
        experience.returns[of_thought][..., :cut],
        experience.sampled_logps[of_thought][..., :cut],
        None if reference is None else reference[of_thought][..., :cut],
        weights * repeats,
        repeats,
    )


class _Chosen(NamedTuple):
    """
    Which thoughts of a batch are taken, and where they go.

    Parameters:
        rows (`torch.Tensor` of shape `(b,)`), columns (of shape `(b, j)`), places (of shape `(b, j, g)`):
            Where each thought stands in the batch: its row, its position's number and its own.
        kept (`torch.Tensor` of shape `(b, j, g)`, bool):
            Which of them are taken; the others fill up.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor


def _chosen(kept: torch.Tensor, keeps_rows: bool) -> _Chosen:
    """Takes the thoughts where `kept`, of shape `(B, J, G)`, with as few rows, positions and places as hold them."""
    rows = torch.arange(len(kept)) if keeps_rows else kept.flatten(1).any(1).nonzero().flatten()
    rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)
    kept = kept[rows]
    J, G = max(int(kept.any(2).sum(1).max()), 1), max(int(kept.sum(2).max()), 1)
    columns = torch.argsort((~kept.any(2)).int(), dim=1, stable=True)[:, :J]
    kept = kept.gather(1, columns[..., None].expand(-1, -1, kept.shape[2]))
    places = torch.argsort((~kept).int(), dim=2, stable=True)[..., :G]
    return _Chosen(rows, columns, places, kept.gather(2, places))


def _regrouped(chosen: _Chosen, text_length: int, slots: int) -> _Chosen:
    """Gives rows fewer places, and repeats those with more thoughts, so that the fewest tokens are run."""
    rows, columns, places, kept = chosen
    most = kept.sum(2).amax(1).clamp(min=1)  # thoughts at any position of a row
    G = _group_size(most, text_length, columns.shape[1] * slots)
    again = torch.arange(len(rows)).repeat_interleave(-(-most // G))
    first = torch.cat([torch.arange(0, int(number), G) for number in most])
    at = (first[:, None] + torch.arange(G))[:, None].expand(-1, columns.shape[1], -1)
    inside, at = at < kept.shape[2], at.clamp(max=kept.shape[2] - 1)
    return _Chosen(rows[again], columns[again], places[again].gather(2, at), kept[again].gather(2, at) & inside)


def _group_size(most: torch.Tensor, text_length: int, slots: int) -> int:
    """How many thoughts a row is to hold at a position, so that fewest tokens are run: a row is as wide as the widest one, and
    one with more thoughts comes again with its text."""
    sizes = range(1, int(most.max()) + 1)
    return min(sizes, key=lambda size: int((-(-most // size)).sum()) * (text_length + size * slots))


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
