"""The objective: one sum of masked means, from numbers that scoring yields to a loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenCounts:
    """
    How many tokens the objective's means are taken over.

    Parameters:
        thought, talk, text (`torch.Tensor`, scalar):
            Thought tokens; talk tokens that count, once for each thought; text tokens that are predicted.
    """

    thought: torch.Tensor
    talk: torch.Tensor
    text: torch.Tensor

    @classmethod
    def of(cls, thought_mask: torch.Tensor, talk_mask: torch.Tensor, text_mask: torch.Tensor) -> "TokenCounts":
        """
        Those of one batch.

        Args:
            thought_mask (`torch.Tensor` of shape `(B, J, G, L)`), talk_mask (of shape `(B, J, 1, M)`), text_mask (of
            shape `(B, T - 1)`):
                Which tokens count.
        """
        return cls(thought_mask.sum(), talk_mask.sum() * thought_mask.shape[2], text_mask.sum())

    @classmethod
    def total(cls, parts: list["TokenCounts"], reduce: Callable[[torch.Tensor], torch.Tensor]) -> "TokenCounts":
        """Sum over batches, and over processes, which `reduce` adds up."""
        return cls(*reduce(torch.stack([torch.stack([x.thought, x.talk, x.text]) for x in parts]).sum(0)))


@dataclass(frozen=True)
class Coefficients:
    """Weights of the objective's terms; the entropy's is the one in force at this step."""

    policy: float = 1.0
    value: float = 0.5
    entropy: float = 0.01
    kl: float = 0.0
    nll: float = 1.0
    reader_nll: float = 1.0
    base_nll: float = 1.0
    distillation: float = 0.0
    router: float = 0.0


def entropy_coefficient(step: int, initial: float, decay: float, floor: float) -> float:
    """Coefficient of the entropy bonus at an optimizer step: `max(floor, initial * decay ** step)`."""
    return max(floor, initial * decay**step)


def kl_divergence(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """
    Per-token estimate of `KL(policy || reference)` from tokens drawn from the policy: `exp(d) - d - 1` with
    `d = log reference - log policy` ("k3", unbiased and never negative; huggingface.co/papers/2402.03300, eq. 4).

    Args:
        logps, reference_logps (`torch.Tensor` of any one shape):
            Log-probabilities in nats of the same tokens. Gradients flow through the first.
    """
    difference = reference_logps.detach() - logps
    return torch.exp(difference) - difference - 1


def policy_terms(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    sampled_logps: torch.Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.2),
) -> torch.Tensor:
    """
    What each thought token adds to the policy term.

    In the update that follows sampling this is REINFORCE, `-A * log pi` (Quiet-STaR, eq. 4). In further ones it is the
    clipped surrogate `-min(r * A, clip(r, 1 - low, 1 + high) * A)` with `r = pi / pi_sampled` (PPO,
    huggingface.co/papers/1707.06347, eq. 7), whose gradient at `r = 1` is that of REINFORCE.

    Args:
        logps, advantages (`torch.Tensor` of any one shape):
            Log-probabilities in nats of the thought tokens, and their advantages.
        sampled_logps (`torch.Tensor`, *optional*):
            Their log-probabilities under the policy that wrote them; None: that is this policy.
        clip_range (`tuple[float, float]`):
            How far below and above 1 the ratio may go.
    """
    if sampled_logps is None:
        return -advantages * logps
    ratio = torch.exp(logps - sampled_logps)
    low, high = clip_range
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def quietstar_loss(
    thought_logps: torch.Tensor,
    thought_entropies: torch.Tensor,
    values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    thought_mask: torch.Tensor,
    talk_logps: torch.Tensor,
    reader_logps: torch.Tensor,
    talk_mask: torch.Tensor,
    text_logps: torch.Tensor,
    text_mask: torch.Tensor,
    coefficients: Coefficients,
    logps_without: torch.Tensor | None = None,
    reference_logps: torch.Tensor | None = None,
    router_loss: torch.Tensor | None = None,
    sampled_logps: torch.Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.2),
    counts: TokenCounts | None = None,
    share: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    `policy + c_v value - c_e entropy + beta KL + c_n NLL(with) + c_r NLL(reader) + c_b NLL(without) + c_d distillation`,
    each a masked mean.

    Policy is as in [`policy_terms`], over thought tokens only; value the squared error to the returns; the NLLs are
    those of the true text after a thought, by the rewarded prediction and by the thought's alone (the reader's), and
    without one. Distillation is REINFORCE on the prediction without thoughts, `-max(p_with - p_without, 0) *
    log p_without` of the true tokens.

    With `counts` of a whole optimizer step this is one batch's part of it: the parts of all batches on all processes add
    up to the loss of one batch that holds them all, however unequal their numbers of tokens.

    Args:
        thought_logps, thought_entropies, values, advantages, returns, thought_mask (shape `(B, J, G, L)`):
            Of the thought tokens. Advantages and returns carry no gradient.
        talk_logps, reader_logps (shape `(B, J, G, M)`), talk_mask (shape `(B, J, 1, M)`):
            Of the text after a thought.
        text_logps, text_mask (shape `(B, T - 1)`):
            Of the text without thoughts.
        coefficients ([`Coefficients`]):
            Weights of the terms.
        logps_without (`torch.Tensor` of shape `(B, J, 1, M)`, *optional*):
            Of the text after each position without thoughts; needed where the weight of distillation is not 0.
        reference_logps (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Thought tokens under the reference; needed where the KL's weight is not 0.
        router_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts.
        sampled_logps, clip_range:
            As in [`policy_terms`].
        counts ([`TokenCounts`], *optional*):
            What the means are taken over. Defaults to this batch's own tokens.
        share (`float`):
            This batch's share of the batches of the step, for the router's loss, which is no mean of tokens.

    Returns:
        `tuple`: the loss (scalar) and a dictionary of the terms, detached and unweighted.
    """
    counts = counts or TokenCounts.of(thought_mask, talk_mask, text_mask)
    policy = policy_terms(thought_logps, advantages.detach(), sampled_logps, clip_range)
    terms = {
        "policy_loss": _part(policy, thought_mask, counts.thought),
        "value_loss": _part((values - returns.detach()) ** 2, thought_mask, counts.thought),
        "entropy": _part(thought_entropies, thought_mask, counts.thought),
        "nll_with": -_part(talk_logps, talk_mask, counts.talk),
        "reader_nll": -_part(reader_logps, talk_mask, counts.talk),
        "nll_without": -_part(text_logps, text_mask, counts.text),
    }
    weights = {
        "policy_loss": coefficients.policy,
        "value_loss": coefficients.value,
        "entropy": -coefficients.entropy,
        "nll_with": coefficients.nll,
        "reader_nll": coefficients.reader_nll,
        "nll_without": coefficients.base_nll,
    }
    if logps_without is not None:
        gains = (talk_logps.detach().exp() - logps_without.detach().exp()).clamp(min=0)
        terms["distillation_loss"] = _part(-gains * logps_without, talk_mask, counts.talk)
        weights["distillation_loss"] = coefficients.distillation
    if reference_logps is not None:
        terms["kl_divergence"] = _part(kl_divergence(thought_logps, reference_logps), thought_mask, counts.thought)
        weights["kl_divergence"] = coefficients.kl
    if router_loss is not None:
        terms["router_loss"], weights["router_loss"] = router_loss * share, coefficients.router
    # a term of weight 0 stays out of the graph's arithmetic, where 0 * inf would be NaN
    loss = torch.zeros((), device=thought_logps.device)
    for name, term in terms.items():
        if weights[name] != 0:
            loss = loss + weights[name] * term
    return loss, {name: term.detach() for name, term in terms.items()}


def _part(values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """A batch's part of a masked mean over `count` tokens; 0 where there are none."""
    return (values * mask).sum() / count.clamp(min=1).to(values.dtype)
