"""Rewards: what a thought adds to the prediction of the true next tokens, and how much the reader learns from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of `values` where `mask`; 0 where the mask is empty. Over everything, or over `dim`."""
    mask = mask.to(values.dtype)
    if dim is None:
        return (values * mask).sum() / mask.sum().clamp(min=1)
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)


@dataclass(frozen=True)
class Gains:
    """
    The predictions of the true text after each thought, and those without one; no gradient.

    Parameters:
        logps_with, correct_with (`torch.Tensor` of shape `(B, J, G, M)`):
            Log-probability in nats, and correctness, of the talk tokens after the thought.
        logps_without, correct_without (`torch.Tensor` of shape `(B, J, 1, M)`):
            Log-probability and correctness of those tokens without a thought.
        mask (`torch.Tensor` of shape `(B, J, 1, M)`, bool):
            Talk tokens that count.
    """

    logps_with: torch.Tensor
    logps_without: torch.Tensor
    correct_with: torch.Tensor
    correct_without: torch.Tensor
    mask: torch.Tensor


def probability(gains: Gains) -> torch.Tensor:
    """`p_with - p_without`, in [-1, 1]."""
    return masked_mean(gains.logps_with.exp() - gains.logps_without.exp(), gains.mask, dim=-1)


def log_likelihood(gains: Gains) -> torch.Tensor:
    """`log p_with - log p_without`, in nats, unbounded (Quiet-STaR, section 4.4)."""
    return masked_mean(gains.logps_with - gains.logps_without, gains.mask, dim=-1)


def sequence_log_likelihood(gains: Gains) -> torch.Tensor:
    """`log p_with - log p_without` of the whole talk, the sum over its tokens, in nats, unbounded (LaTRO,
    huggingface.co/papers/2411.04282, eq. 4)."""
    return talk_log_likelihood(gains.logps_with, gains.mask) - talk_log_likelihood(gains.logps_without, gains.mask)


def marginal_log_likelihood(gains: Gains) -> torch.Tensor:
    """
    What a thought adds to the log of the group's mean probability of the whole talk, in nats:
    `log (1/G) sum_j p_j - log 1/(G-1) sum_{j != i} p_j` (JEPO, huggingface.co/papers/2503.19618, section 4, after eq. 7).

    The part without the thought is the control variate: it does not depend on the thought, and all else that the talk's
    prediction without thoughts would take away cancels.

    Raises:
        `ValueError`: if G is 1.
    """
    logps = talk_log_likelihood(gains.logps_with, gains.mask)
    G = logps.shape[-1]
    if G < 2:
        raise ValueError("`reward_type='marginal_log_likelihood'` needs `num_thoughts` of at least 2, got 1.")
    itself = torch.eye(G, dtype=torch.bool, device=logps.device)
    others = logps[..., None, :].masked_fill(itself, -math.inf)
    return _log_mean(logps[..., None, :], G) - _log_mean(others, G - 1)


def _log_mean(logps: torch.Tensor, count: int) -> torch.Tensor:
    """Log of the mean of `count` probabilities along the last dimension; exactly their own where all are equal."""
    highest = logps.amax(-1, keepdim=True)
    return highest[..., 0] + ((logps - highest).exp().sum(-1) / count).log()


def accuracy(gains: Gains) -> torch.Tensor:
    """Top-1 correctness with minus without, in [-1, 1]."""
    dtype = gains.logps_with.dtype
    return masked_mean(gains.correct_with.to(dtype) - gains.correct_without.to(dtype), gains.mask, dim=-1)


def binary(gains: Gains) -> torch.Tensor:
    """1 where accuracy over the talk is higher with than without, else 0."""
    rewards = accuracy(gains)
    return (rewards > 0).to(rewards.dtype)


def sequence_probability(gains: Gains) -> torch.Tensor:
    """Probability of the whole talk, the product over its tokens, with minus without, in [-1, 1] (VeriFree,
    huggingface.co/papers/2505.21493): a talk with one wrong token earns next to nothing."""
    return talk_probability_gain(gains.logps_with, gains.logps_without, gains.mask)


# `reward_type` by its name: each gives one number for a thought's talk, `(B, J, G)`, and 0 where no talk token counts. A new
# one is a function above and its name here
REWARDS: dict[str, Callable[[Gains], torch.Tensor]] = {
    "probability": probability,
    "sequence_probability": sequence_probability,
    "log_likelihood": log_likelihood,
    "sequence_log_likelihood": sequence_log_likelihood,
    "marginal_log_likelihood": marginal_log_likelihood,
    "accuracy": accuracy,
    "binary": binary,
}
REWARD_TYPES = tuple(REWARDS)
# what a reward of each type is counted in, for tables
UNITS = {
    "probability": "probability a token",
    "sequence_probability": "probability of all tokens together",
    "log_likelihood": "nats a token",
    "sequence_log_likelihood": "nats of all tokens together",
    "marginal_log_likelihood": "nats, over the other thoughts",
    "accuracy": "share of right tokens",
    "binary": "share of thoughts",
}
GROUP_REWARDS = ("marginal_log_likelihood",)  # that compare a thought with the others at its position already


def thought_rewards(
    logps_with: torch.Tensor,
    logps_without: torch.Tensor,
    correct_with: torch.Tensor,
    correct_without: torch.Tensor,
    mask: torch.Tensor,
    reward_type: str,
) -> torch.Tensor:
    """
    The gain of each thought.

    Args:
        logps_with, logps_without, correct_with, correct_without, mask:
            As in [`Gains`].
        reward_type (`str`):
            A name in `REWARDS`.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, without gradient; 0 where no talk token counts.

    Raises:
        `ValueError`: if the reward type is unknown.
    """
    if reward_type not in REWARDS:
        raise ValueError(f"`reward_type` is {reward_type!r}; choose one of {', '.join(REWARDS)}.")
    gains = Gains(logps_with.detach(), logps_without.detach(), correct_with, correct_without, mask)
    return REWARDS[reward_type](gains)


def talk_log_likelihood(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Log-probability of a whole talk: the sum over its tokens.

    Args:
        logps (`torch.Tensor` of shape `(B, J, G, M)`):
            Log-probabilities in nats of the talk tokens.
        mask (`torch.Tensor` of shape `(B, J, 1, M)`, bool):
            Talk tokens that count.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, in nats; 0 where no talk token counts.
    """
    return torch.where(mask, logps, 0.0).sum(-1)


def talk_probability_gain(logps_with: torch.Tensor, logps_without: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """By how much each thought raises the probability of its whole talk, of shape `(B, J, G)`; arguments as for [`useful`]."""
    return talk_log_likelihood(logps_with, mask).exp() - talk_log_likelihood(logps_without, mask).exp()


def useful(
    logps_with: torch.Tensor, logps_without: torch.Tensor, mask: torch.Tensor, least_gain: float
) -> torch.Tensor:
    """
    Which thoughts make their whole talk more probable by more than `least_gain`.

    Args:
        logps_with (`torch.Tensor` of shape `(B, J, G, M)`), logps_without, mask (of shape `(B, J, 1, M)`):
            Log-probabilities in nats of the talk tokens with and without a thought, and which count.
        least_gain (`float`):
            In probability, of 0 to 1.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, bool.
    """
    return talk_probability_gain(logps_with, logps_without, mask) > least_gain


def exact_match(correct: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Whether all tokens of a talk are the most likely ones: what greedy decoding would write. A talk without a token that counts
    matches nothing.

    Args:
        correct (`torch.Tensor` of shape `(B, J, G, M)`, bool), mask (of shape `(B, J, 1, M)`, bool):
            Which talk tokens are the most likely ones, and which count.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, bool.
    """
    return (correct | ~mask).all(-1) & mask.any(-1)


def is_mixed(groups: torch.Tensor) -> torch.Tensor:
    """Which groups hold both kinds of thoughts, of shape `(B, J)` for a kind of each thought of shape `(B, J, G)`, bool."""
    return groups.any(-1) & ~groups.all(-1)


# `nll_weighting` by its name: from the rewards and the log-probability of the whole talk after each thought, both `(B, J, G)`,
# to the weight of the thought in the NLLs of that talk
WEIGHTINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None] = {
    # 1: the gradient of `E[log p]` (LaTRO, huggingface.co/papers/2411.04282, eq. 4)
    "uniform": None,
    "gain": lambda rewards, logps: (rewards > 0).to(logps.dtype),
    # the gradient of `E[p]` (VeriFree, huggingface.co/papers/2505.21493)
    "probability": lambda rewards, logps: logps.exp(),
    # the gradient of `log mean p` over the group (JEPO of several samples, huggingface.co/papers/2503.19618)
    "share": lambda rewards, logps: logps.softmax(-1) * logps.shape[-1],
}


def talk_weights(
    logps: torch.Tensor, mask: torch.Tensor, rewards: torch.Tensor, weighting: str
) -> torch.Tensor | None:
    """
    Weight of each thought in the NLLs of the talk after it.

    Args:
        logps (`torch.Tensor` of shape `(B, J, G, M)`), mask (of shape `(B, J, 1, M)`, bool):
            Log-probabilities in nats of the talk tokens after the thought, and which count.
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            Of the thoughts.
        weighting (`str`):
            A name in `WEIGHTINGS`.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, without gradient; None: all weights are 1.
    """
    weigh = WEIGHTINGS[weighting]
    return None if weigh is None else weigh(rewards.detach(), talk_log_likelihood(logps.detach(), mask))


def coherence(
    similarity: torch.Tensor,
    plain_logps: torch.Tensor,
    thought_mask: torch.Tensor,
    logps_with: torch.Tensor,
    logps_without: torch.Tensor,
    talk_mask: torch.Tensor,
) -> torch.Tensor:
    """
    How much a thought looks like text that belongs here and helps: 0.4 semantic + 0.3 syntactic + 0.3 predictive.

    Semantic is `(cosine + 1) / 2` of the thought's mean hidden state and its context's; syntactic the likelihood of
    the thought's tokens (geometric mean) as plain text under the no-thought model; predictive
    `p_with / (p_with + p_without)`, the talk's mean.

    Args:
        similarity (`torch.Tensor` of shape `(B, J, G)`):
            Cosine.
        plain_logps, thought_mask (`torch.Tensor` of shape `(B, J, G, L)`):
            Log-probabilities in nats of the thought tokens as plain text, and which exist.
        logps_with (`torch.Tensor` of shape `(B, J, G, M)`), logps_without, talk_mask (of shape `(B, J, 1, M)`):
            Log-probabilities in nats of the talk tokens, and which count.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, in [0, 1].
    """
    semantic = (similarity + 1) / 2
    syntactic = masked_mean(plain_logps, thought_mask, dim=-1).exp()
    predictive = masked_mean(torch.sigmoid(logps_with - logps_without), talk_mask, dim=-1)
    return 0.4 * semantic + 0.3 * syntactic + 0.3 * predictive
