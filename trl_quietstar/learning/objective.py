"""The objective: one sum of masked means, from the numbers that scoring yields to a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..text.batch import Text, talk_after
from ..thinking.scoring import Scores, at_talk


if TYPE_CHECKING:
    from ..config import QuietStarConfig
    from .experience import Experience


@dataclass(frozen=True)
class TokenCounts:
    """
    How many tokens the objective's means are taken over.

    Parameters:
        thought, talk, text, written (`torch.Tensor`, scalar):
            Tokens of sampled thoughts; talk tokens that count, once for each thought; text tokens that are predicted; tokens of
            written thoughts.
    """

    thought: torch.Tensor
    talk: torch.Tensor
    text: torch.Tensor
    written: torch.Tensor

    @classmethod
    def of(
        cls, thought_mask: torch.Tensor, talk_mask: torch.Tensor, text_mask: torch.Tensor, written: bool = False
    ) -> "TokenCounts":
        """
        Counts the tokens of one batch.

        Args:
            thought_mask (`torch.Tensor` of shape `(B, J, G, L)`), talk_mask (of shape `(B, J, 1, M)`), text_mask (of
            shape `(B, T - 1)`):
                Which tokens count.
            written (`bool`):
                Whether the thoughts are written, and not sampled.
        """
        thought, none = thought_mask.sum(), torch.zeros_like(thought_mask.sum())
        talk, text = talk_mask.sum() * thought_mask.shape[2], text_mask.sum()
        return cls(none, talk, text, thought) if written else cls(thought, talk, text, none)

    @classmethod
    def total(cls, parts: list["TokenCounts"], reduce: Callable[[torch.Tensor], torch.Tensor]) -> "TokenCounts":
        """Adds up the counts of batches, and those of all processes, over which `reduce` sums a tensor."""
        return cls(*reduce(torch.stack([torch.stack([x.thought, x.talk, x.text, x.written]) for x in parts]).sum(0)))


@dataclass(frozen=True)
class Coefficients:
    """Weights of the objective's terms at one optimizer step."""

    policy: float = 1.0
    value: float = 0.5
    entropy: float = 0.01
    kl: float = 0.0
    nll: float = 1.0
    reader_nll: float = 1.0
    base_nll: float = 1.0
    distillation: float = 0.0
    written: float = 1.0
    router: float = 0.0

    @classmethod
    def of(cls, args: "QuietStarConfig", step: int, router: float = 0.0) -> "Coefficients":
        """
        Takes the weights from a configuration.

        Args:
            args ([`QuietStarConfig`]):
                The configuration.
            step (`int`):
                Optimizer step, by which the entropy's weight decays.
            router (`float`):
                Weight of the router's loss, which depends on the model too.
        """
        return cls(
            policy=args.policy_coefficient,
            value=args.value_loss_coefficient if args.uses_value_head else 0.0,
            entropy=entropy_coefficient(
                step, args.entropy_coefficient, args.entropy_decay, args.min_entropy_coefficient
            ),
            kl=args.beta,
            nll=args.nll_coefficient,
            reader_nll=args.reader_nll_coefficient,
            base_nll=args.base_nll_coefficient,
            distillation=args.distillation_coefficient,
            written=args.written_thought_coefficient,
            router=router,
        )

    def by_term(self) -> dict[str, float]:
        """The weight of each term that [`quietstar_loss`] names; the entropy is a bonus, so its weight is negative."""
        return {
            "policy_loss": self.policy,
            "value_loss": self.value,
            "entropy": -self.entropy,
            "nll_with": self.nll,
            "reader_nll": self.reader_nll,
            "nll_without": self.base_nll,
            "distillation_loss": self.distillation,
            "written_nll": self.written,
            "kl_divergence": self.kl,
            "router_loss": self.router,
        }


@dataclass(frozen=True)
class WrittenInputs:
    """
    The numbers of a batch's written thoughts that the objective is made of. Log-probabilities are in nats.

    Parameters:
        thought_logps, thought_mask (shape `(R, J, 1, L)`):
            Of the thought tokens.
        talk_logps, reader_logps, talk_mask (shape `(R, J, 1, M)`):
            Of the text after a thought: by the rewarded prediction, and by the thought's alone.
        text_logps, text_mask (shape `(R, T - 1)`):
            Of the text without thoughts.
        router_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts.
    """

    thought_logps: torch.Tensor
    thought_mask: torch.Tensor
    talk_logps: torch.Tensor
    reader_logps: torch.Tensor
    talk_mask: torch.Tensor
    text_logps: torch.Tensor
    text_mask: torch.Tensor
    router_loss: torch.Tensor | None = None

    @classmethod
    def of(cls, text: Text, scores: Scores) -> "WrittenInputs":
        """Collects the numbers of rows with written thoughts from their scores."""
        thoughts, talk_length = scores.thoughts, scores.talk_logps.shape[-1]
        talk_mask = talk_after(text, thoughts.positions, talk_length).target_mask[:, :, None]
        return cls(
            scores.thought_logps,
            thoughts.mask,
            scores.talk_logps,
            scores.reader_logps,
            talk_mask,
            scores.text_logps,
            text.predicted(),
            scores.router_loss,
        )

    def counts(self) -> TokenCounts:
        """Tokens of these rows."""
        return TokenCounts.of(self.thought_mask, self.talk_mask, self.text_mask, written=True)


@dataclass(frozen=True)
class LossInputs:
    """
    The numbers of one batch that the objective is made of. Log-probabilities and entropies are in nats.

    Parameters:
        thought_logps, thought_entropies, values, advantages, returns, thought_mask (shape `(B, J, G, L)`):
            Of the thought tokens. Advantages and returns carry no gradient.
        talk_logps, reader_logps (shape `(B, J, G, M)`), talk_mask (shape `(B, J, 1, M)`):
            Of the text after a thought: by the rewarded prediction, and by the thought's alone.
        text_logps, text_mask (shape `(B, T - 1)`):
            Of the text without thoughts.
        logps_without (`torch.Tensor` of shape `(B, J, 1, M)`, *optional*):
            Of the text after each position without thoughts, with gradient. None: no distillation.
        reference_logps (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Of the thought tokens under the reference. None: no KL term.
        router_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts.
        sampled_logps (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Of the thought tokens under the policy that wrote them, as in [`policy_terms`].
        talk_weights (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            Weight of each thought in both NLLs of the talk after it. None: 1.
        repeats (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            How many thoughts each stands for in the means over thought tokens. None: 1.
        value_weights (`torch.Tensor` of shape `(B, J, G, L)`, *optional*):
            Weight of each thought token in the value head's squared error. None: 1.
        written ([`WrittenInputs`], *optional*):
            Of the rows with written thoughts. None: there are none.
    """

    thought_logps: torch.Tensor
    thought_entropies: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    thought_mask: torch.Tensor
    talk_logps: torch.Tensor
    reader_logps: torch.Tensor
    talk_mask: torch.Tensor
    text_logps: torch.Tensor
    text_mask: torch.Tensor
    logps_without: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    sampled_logps: torch.Tensor | None = None
    talk_weights: torch.Tensor | None = None
    repeats: torch.Tensor | None = None
    value_weights: torch.Tensor | None = None
    written: WrittenInputs | None = None

    @classmethod
    def of(
        cls,
        text: Text,
        scores: Scores,
        experience: "Experience",
        args: "QuietStarConfig",
        written: WrittenInputs | None = None,
    ) -> "LossInputs":
        """
        Collects the numbers of a batch.

        Args:
            text ([`Text`]), scores ([`Scores`]), experience ([`Experience`]):
                The batch, its scores under the current policy, and what its thoughts are worth.
            args ([`QuietStarConfig`]):
                Tells whether thinking teaches the prediction without thoughts, and whether thoughts are reused in further
                updates, which calls for the clipped surrogate.
            written ([`WrittenInputs`], *optional*):
                Of the batch's rows with written thoughts.
        """
        distills, reuses = args.distillation_coefficient != 0, args.num_iterations > 1
        talk_length = scores.talk_logps.shape[-1]
        return cls(
            scores.thought_logps,
            scores.thought_entropies,
            scores.thought_values,
            experience.advantages,
            experience.returns,
            experience.thoughts.mask,
            scores.talk_logps,
            scores.reader_logps,
            experience.talk_mask,
            scores.text_logps,
            text.predicted(),
            logps_without=at_talk(scores.text_logps, scores.thoughts, talk_length) if distills else None,
            reference_logps=experience.reference_logps,
            router_loss=scores.router_loss,
            sampled_logps=experience.sampled_logps if reuses else None,
            talk_weights=experience.talk_weights,
            repeats=experience.repeats,
            value_weights=experience.value_weights,
            written=written,
        )

    def counts(self) -> TokenCounts:
        """Tokens of this batch."""
        own = TokenCounts.of(self.thought_mask, self.talk_mask, self.text_mask)
        return own if self.written is None else TokenCounts.total([own, self.written.counts()], lambda counts: counts)


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
    inputs: LossInputs,
    coefficients: Coefficients,
    clip_range: tuple[float, float] = (0.2, 0.2),
    counts: TokenCounts | None = None,
    share: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    `policy + c_v value - c_e entropy + c_n NLL(with) + c_r NLL(reader) + c_b NLL(without) + c_d distillation + c_w NLL(written
    thoughts) + beta KL + c_x router`, each a masked mean. The NLL of text is taken over rows with sampled and with written
    thoughts alike.

    With the `counts` of a whole optimizer step this is one batch's part of the step's loss: the parts of all batches on all
    processes add up to the loss of one batch that holds them all, however unequal their numbers of tokens.

    Args:
        inputs ([`LossInputs`]):
            Numbers of the batch.
        coefficients ([`Coefficients`]):
            Weights of the terms.
        clip_range (`tuple[float, float]`):
            As in [`policy_terms`].
        counts ([`TokenCounts`], *optional*):
            Numbers of tokens that the means are taken over. Defaults to this batch's own.
        share (`float`):
            This batch's share of the batches of the step, for the router's loss, which is no mean of tokens.

    Returns:
        `tuple`: the loss (scalar) and a dictionary of the terms, detached and unweighted.
    """
    terms = _terms(inputs, counts or inputs.counts(), clip_range, share)
    weights = coefficients.by_term()
    # a term of weight 0 stays out of the graph's arithmetic, where 0 * inf would be NaN
    loss = torch.zeros((), device=inputs.thought_logps.device)
    for name, term in terms.items():
        if weights[name] != 0:
            loss = loss + weights[name] * term
    return loss, {name: term.detach() for name, term in terms.items()}


def _terms(
    inputs: LossInputs, counts: TokenCounts, clip_range: tuple[float, float], share: float
) -> dict[str, torch.Tensor]:
    """The batch's part of each term, with gradient; a new term of the objective is one entry here and its weight."""
    policy = policy_terms(inputs.thought_logps, inputs.advantages.detach(), inputs.sampled_logps, clip_range)
    thought, talk, text = inputs.thought_mask, inputs.talk_mask, inputs.text_mask
    thought = thought if inputs.repeats is None else thought * inputs.repeats[..., None]
    judged = thought if inputs.value_weights is None else thought * inputs.value_weights
    weights = inputs.talk_weights
    read = talk if weights is None else talk * weights.detach()[..., None]
    terms = {
        "policy_loss": _part(policy, thought, counts.thought),
        "value_loss": _part((inputs.values - inputs.returns.detach()) ** 2, judged, counts.thought),
        "entropy": _part(inputs.thought_entropies, thought, counts.thought),
        "nll_with": -_part(inputs.talk_logps, read, counts.talk),
        "reader_nll": -_part(inputs.reader_logps, read, counts.talk),
        "nll_without": -_part(inputs.text_logps, text, counts.text),
    }
    if inputs.logps_without is not None:
        # REINFORCE on the prediction without thoughts: -max(p_with - p_without, 0) * log p_without of the true tokens
        gains = (inputs.talk_logps.detach().exp() - inputs.logps_without.detach().exp()).clamp(min=0)
        terms["distillation_loss"] = _part(-gains * inputs.logps_without, talk, counts.talk)
    if inputs.reference_logps is not None:
        divergence = kl_divergence(inputs.thought_logps, inputs.reference_logps)
        terms["kl_divergence"] = _part(divergence, thought, counts.thought)
    if inputs.router_loss is not None:
        terms["router_loss"] = inputs.router_loss * share
    return terms if inputs.written is None else _with_written(terms, inputs.written, counts, share)


def _with_written(
    terms: dict[str, torch.Tensor], own: WrittenInputs, counts: TokenCounts, share: float
) -> dict[str, torch.Tensor]:
    """Adds what rows with written thoughts contribute to the terms of the sampled ones."""
    talk, text = own.talk_mask, own.text_mask
    added = {
        "written_nll": -_part(own.thought_logps, own.thought_mask, counts.written),
        "nll_with": -_part(own.talk_logps, talk, counts.talk),
        "reader_nll": -_part(own.reader_logps, talk, counts.talk),
        "nll_without": -_part(own.text_logps, text, counts.text),
    }
    if own.router_loss is not None:  # of a forward of its own, which counts as much as the other one
        terms["router_loss"] = terms["router_loss"] / 2
        added["router_loss"] = own.router_loss * share / 2
    return terms | {name: term + terms[name] if name in terms else term for name, term in added.items()}


def _part(values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """A batch's part of a masked mean over `count` tokens; 0 where there are none."""
    return (values * mask).sum() / count.clamp(min=1).to(values.dtype)
