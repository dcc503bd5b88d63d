"""Advantages: how much better a thought was than expected, token by token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..text.transfer import exact_dtype


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """
    Generalised advantage estimation (Schulman et al., 2016, eq. 16) over the tokens of each thought.

    `delta_k = r_k + gamma * V_{k+1} - V_k` and `A_k = delta_k + gamma * lambda * A_{k+1}`, where V and A are 0 after
    the last token. Nothing flows between thoughts.

    Args:
        rewards, values (`torch.Tensor` of shape `(..., L)`):
            Reward given at each token and value of the state it was drawn in.
        mask (`torch.Tensor` of shape `(..., L)`, bool):
            Which tokens exist; they come first.
        gamma, gae_lambda (`float`):
            Discount and trace decay, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(..., L)`; 0 where masked.
    """
    rewards, values = rewards * mask, values * mask
    next_values = torch.nn.functional.pad(values[..., 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[..., 0])
    for k in range(deltas.shape[-1] - 1, -1, -1):
        running = deltas[..., k] + gamma * gae_lambda * running
        advantages[..., k] = running
    return advantages * mask


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """
    Mean reward of the *other* thoughts at the same position (RLOO, huggingface.co/papers/2402.14740, eq. 7).

    Args:
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            One for each thought.

    Raises:
        `ValueError`: if G is 1.
    """
    G = rewards.shape[-1]
    if G < 2:
        raise ValueError("A leave-one-out baseline needs `num_thoughts` of at least 2, got 1.")
    return (rewards.sum(-1, keepdim=True) - rewards) / (G - 1)


def group_mean(rewards: torch.Tensor) -> torch.Tensor:
    """Mean reward of all thoughts at the same position (Quiet-STaR, eq. 3), `(B, J, 1)` for rewards of shape `(B, J, G)`."""
    return rewards.mean(-1, keepdim=True)


def squared_scores(logps: torch.Tensor) -> torch.Tensor:
    """
    Squared length of the score function of tokens, `|∇ log π|^2` in the logits, up to a factor between 1 and 2.

    The score of a token drawn with probability p is `e - π`, of squared length `(1 - p)^2 + Σ π_k^2` over the other tokens. Their
    probabilities add up to `1 - p`, so that the sum is between 0 and `(1 - p)^2`. This is `(1 - p)^2`.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of the tokens, in nats.

    Returns:
        `torch.Tensor` of the same shape, in [0, 1].
    """
    return torch.expm1(logps) ** 2


@dataclass(frozen=True)
class Baseline:
    """
    What a thought's reward is compared with.

    Parameters:
        of_rewards (`Callable`, *optional*):
            From the rewards `(B, J, G)` of a position's thoughts to what is taken from them; needs two thoughts or more.
        uses_value_head (`bool`):
            Whether the value head predicts what is then left of the reward.
        has_least_variance (`bool`):
            Whether the value head predicts, in place of the mean reward, the baseline with which a token's part of the policy
            gradient varies least: `E[w r] / E[w]` with `w = |∇ log π|^2` (Greensmith, Bartlett and Baxter, JMLR 5, 2004). This is
            where the squared error weighted by w is least, here by [`squared_scores`].
    """

    of_rewards: Callable[[torch.Tensor], torch.Tensor] | None = None
    uses_value_head: bool = False
    has_least_variance: bool = False


# `advantage_baseline` by its name
BASELINES = {
    "value": Baseline(uses_value_head=True),
    "least_variance": Baseline(uses_value_head=True, has_least_variance=True),
    "leave_one_out": Baseline(leave_one_out),
    "both": Baseline(leave_one_out, uses_value_head=True),
    "mean": Baseline(group_mean),
    "none": Baseline(),
}


def value_weights(logps: torch.Tensor, baseline: str) -> torch.Tensor | None:
    """Weight of each thought token in the value head's squared error, from its log-probability, for a name in `BASELINES`. None: 1."""
    return squared_scores(logps) if BASELINES[baseline].has_least_variance else None


# `normalize_advantages`
NORMALIZATIONS = ("none", "group", "step")


def thought_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    baseline: str = "value",
    use_gae: bool = True,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantage of each thought token, and the return its value should have predicted.

    The reward comes at the thought's last token. Without a value function there is nothing to bootstrap from: every token of a
    thought then has one and the same, undiscounted advantage.

    Args:
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            Reward of each thought.
        values, mask (`torch.Tensor` of shape `(B, J, G, L)`):
            Value of the state each token was drawn in, and which tokens exist.
        baseline (`str`):
            A name in `BASELINES`.
        use_gae (`bool`):
            With a value head that predicts the mean reward: multi-step GAE; otherwise reward minus value.
        gamma, gae_lambda (`float`):
            Of GAE.

    Returns:
        `tuple`: advantages and returns of shape `(B, J, G, L)`, without gradient, 0 where masked.
    """
    values, chosen = values.detach(), BASELINES[baseline]
    if chosen.of_rewards is not None:
        rewards = rewards - chosen.of_rewards(rewards)
    spread = rewards[..., None].expand_as(values) * mask
    if not chosen.uses_value_head:
        return spread, spread
    if chosen.has_least_variance or not use_gae:  # between two baselines there is no temporal difference to add up
        return (spread - values) * mask, spread
    last = mask & ~torch.nn.functional.pad(mask[..., 1:], (0, 1))
    advantages = gae(spread * last, values, mask, gamma, gae_lambda)
    return advantages, (advantages + values) * mask


def group_deviation(rewards: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the rewards at each position, over G - 1 as in TRL: `(B, J, 1)` for rewards of shape `(B, J, G)`."""
    return rewards.std(-1, keepdim=True)


def scale_by_group(advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """
    Divides advantages by the standard deviation of the rewards at their position (GRPO, huggingface.co/papers/2402.03300,
    section 4.1.2).

    Args:
        advantages (`torch.Tensor` of shape `(B, J, G, L)`):
            Of the thought tokens, measured from a baseline of the group.
        rewards (`torch.Tensor` of shape `(B, J, G)`):
            Of the thoughts; G is at least 2.

    Returns:
        `torch.Tensor` of the advantages' shape; 0 where all rewards of a group are equal.
    """
    deviation = group_deviation(rewards)
    rounding = 100 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(-1, keepdim=True)
    # what rounding leaves of equal rewards is no spread; one that is no number is kept, for the fault to be found
    return torch.where((deviation <= rounding)[..., None], 0.0, advantages / deviation[..., None])


class MovingAverage:
    """
    Average over the steps so far, in which each step counts `decay` times as much as the one after it.

    Args:
        decay (`float`):
            In [0, 1).
    """

    def __init__(self, decay: float):
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    @property
    def value(self) -> float | None:
        """None before the first step."""
        return self.total / self.weight if self.weight else None

    def add(self, value: float) -> None:
        """Takes in the value of a step."""
        self.total, self.weight = self.decay * self.total + value, self.decay * self.weight + 1


def standardize(
    advantages: list[torch.Tensor], masks: list[torch.Tensor], reduce: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """
    Shifts and scales advantages to mean 0 and standard deviation 1 over the thought tokens of all batches of a step.

    Args:
        advantages, masks (`list[torch.Tensor]` of shape `(B, J, G, L)`):
            Of each batch, and which tokens exist.
        reduce (`Callable`):
            Sums a tensor over processes.

    Returns:
        The advantages in the same shapes; 0 where masked, and everywhere where all are equal.
    """
    pairs = [(x.to(exact_dtype(x.device)), mask) for x, mask in zip(advantages, masks, strict=True)]
    sums = [torch.stack([(x * mask).sum(), (x**2 * mask).sum(), mask.sum().to(x)]) for x, mask in pairs]
    total, square, count = reduce(torch.stack(sums).sum(0))
    count = count.clamp(min=1)
    mean = total / count
    variance = reduce(torch.stack([((x - mean) ** 2 * mask).sum() for x, mask in pairs]).sum()) / count
    # equal advantages stay 0: their spread is below what rounding leaves of their size
    rounding = 100 * torch.finfo(advantages[0].dtype).eps * (square / count).sqrt()
    scale = variance.sqrt() + rounding + 1e-12
    return [((x - mean) / scale * mask).to(x.dtype) for x, mask in zip(advantages, masks, strict=True)]
