"""Which of the sampled thoughts an update is trained on, and how few rows hold them."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..text.batch import Positions, Thoughts
from ..text.transfer import exact_dtype
from .advantages import MovingAverage, group_deviation
from .experience import Experience


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
