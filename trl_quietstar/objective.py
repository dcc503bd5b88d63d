"""The objective: one sum of masked means, from numbers that scoring yields to a loss."""

from dataclasses import dataclass

import torch

from .rewards import masked_mean


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
    reference_logps: torch.Tensor | None = None,
    router_loss: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    `policy + c_v value - c_e entropy + beta KL + c_n NLL(with) + c_r NLL(reader) + c_b NLL(without)`, each a masked
    mean.

    Policy is REINFORCE, `-A * log pi(thought token)`, over thought tokens only (Quiet-STaR, eq. 4); value the squared
    error to the returns; the NLLs are those of the true text after a thought, by the rewarded prediction and by the
    thought's alone (the reader's), and without one.

    Args:
        thought_logps, thought_entropies, values, advantages, returns, thought_mask (shape `(B, J, G, L)`):
            Of the thought tokens. Advantages and returns carry no gradient.
        talk_logps, reader_logps (shape `(B, J, G, M)`), talk_mask (shape `(B, J, 1, M)`):
            Of the text after a thought.
        text_logps, text_mask (shape `(B, T - 1)`):
            Of the text without thoughts.
        coefficients ([`Coefficients`]):
            Weights of the terms.
        reference_logps (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Thought tokens under the reference; needed where the KL's weight is not 0.
        router_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts.

    Returns:
        `tuple`: the loss (scalar) and a dictionary of the terms, detached and unweighted.
    """
    terms = {
        "policy_loss": masked_mean(-advantages.detach() * thought_logps, thought_mask),
        "value_loss": masked_mean((values - returns.detach()) ** 2, thought_mask),
        "entropy": masked_mean(thought_entropies, thought_mask),
        "nll_with": -masked_mean(talk_logps, talk_mask.expand_as(talk_logps)),
        "reader_nll": -masked_mean(reader_logps, talk_mask.expand_as(reader_logps)),
        "nll_without": -masked_mean(text_logps, text_mask),
    }
    weights = {
        "policy_loss": coefficients.policy,
        "value_loss": coefficients.value,
        "entropy": -coefficients.entropy,
        "nll_with": coefficients.nll,
        "reader_nll": coefficients.reader_nll,
        "nll_without": coefficients.base_nll,
    }
    if reference_logps is not None:
        terms["kl_divergence"] = masked_mean(kl_divergence(thought_logps, reference_logps), thought_mask)
        weights["kl_divergence"] = coefficients.kl
    if router_loss is not None:
        terms["router_loss"], weights["router_loss"] = router_loss, coefficients.router
    # a term of weight 0 stays out of the graph's arithmetic, where 0 * inf would be NaN
    loss = torch.zeros((), device=thought_logps.device)
    for name, term in terms.items():
        if weights[name] != 0:
            loss = loss + weights[name] * term
    return loss, {name: term.detach() for name, term in terms.items()}
