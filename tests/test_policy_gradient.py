"""The estimator's expectation is the gradient of what it is to ascend.

On a model small enough to enumerate every thought, two gradients are computed exactly and compared with the mean of the real
code's gradient over thousands of sampled thoughts: that of the expected reward, through the policy alone, for every baseline; and
that of the whole quantity, through policy and reader, for every objective in the table of docs/method.md.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from trl_quietstar import QuietStarConfig
from trl_quietstar.branches.replay import Replay
from trl_quietstar.learning.advantages import thought_advantages
from trl_quietstar.learning.experience import experience_of, finish_advantages
from trl_quietstar.learning.objective import Coefficients, LossInputs, quietstar_loss
from trl_quietstar.learning.rewards import thought_rewards
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.text.positions import seeded_generators
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score

from .tiny import exact_model


V, L, M, G, AT = 5, 2, 2, 2, 1
END = 2  # the token that ends thoughts, where any does
GROUPS = 8000
DIRECTIONS = 6
LIMIT = 4.5  # standard errors; six directions exceed it by chance once in 25,000 runs, and the seeds are fixed
POLICY_ONLY = Coefficients(**{**dict.fromkeys(Coefficients.__dataclass_fields__, 0.0), "policy": 1.0})


@functools.cache
def model():
    """One layer, five tokens, float64."""
    return exact_model(
        "llama",
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


def text(rows: int) -> Text:
    """The same four tokens in every row."""
    return Text.from_batch(torch.tensor([[3, 2, 0, 4]]).repeat(rows, 1))


def positions(rows: int) -> Positions:
    return Positions(torch.full((rows, 1), AT), torch.ones(rows, 1, dtype=torch.bool))


def every_thought(ends: bool = False) -> Thoughts:
    """All thoughts at one place: V ** L, or fewer if `END` ends them early."""
    token_ids = torch.cartesian_prod(*[torch.arange(V)] * L)
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    if ends:
        mask[:, 1] = token_ids[:, 0] != END
        token_ids, mask = (x[mask[:, 1] | (token_ids[:, 1] == 0)] for x in (token_ids, mask))
    return Thoughts(positions(1), token_ids.view(1, 1, -1, L), mask.view(1, 1, -1, L))


def numbers_of(thoughts: Thoughts, ends: bool) -> torch.Tensor:
    """Where sampled thoughts, one group a row, stand among all: `(rows, G)`."""
    base, all_ = torch.tensor([V, 1]), every_thought(ends)
    index = torch.zeros(V**L, dtype=torch.long)
    index[(all_.token_ids * all_.mask)[0, 0] @ base] = torch.arange(all_.token_ids.shape[2])
    return index[(thoughts.token_ids * thoughts.mask)[:, 0] @ base]


def score_and_reward(rows: int, thoughts: Thoughts, temperature: float):
    """Scores with gradient, and rewards, by the real code."""
    batch = text(rows)
    scores = score(model(), ScoreRequest(batch, thoughts, M, Replay(), temperature))
    rewards = thought_rewards(
        scores.talk_logps,
        at_talk(scores.text_logps, thoughts, M),
        scores.talk_correct,
        at_talk(scores.text_correct, thoughts, M),
        torch.ones(rows, 1, 1, M, dtype=torch.bool),
        "log_likelihood",
    )
    return batch, scores, rewards


@functools.cache
def directions() -> torch.Tensor:
    """Fixed random unit directions in parameter space, of shape `(D, P)`."""
    size = sum(p.numel() for p in model().parameters())
    drawn = torch.randn(DIRECTIONS, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def projected_gradient(loss: torch.Tensor) -> torch.Tensor:
    """Of the whole model, on the directions: shape `(D,)`."""
    parameters = list(model().parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    return directions() @ torch.cat([g.flatten() for g in gradients])


@dataclass
class Exact:
    """Of every thought: `gradient` of the expected reward `(D,)`, and of each token's log-probability `(V^L, L, D)`."""

    gradient: torch.Tensor
    token_gradients: torch.Tensor


@functools.cache
def exact(temperature: float) -> Exact:
    """The sum over all thoughts of p(thought) · reward, differentiated through p only."""
    _, scores, rewards = score_and_reward(1, every_thought(), temperature)
    logps = scores.thought_logps[0, 0]
    probabilities = logps.sum(-1).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    gradient = projected_gradient((probabilities * rewards[0, 0]).sum())
    each = torch.stack([torch.stack([projected_gradient(logp) for logp in row]) for row in logps])
    return Exact(gradient, each)


@functools.cache
def drawn(settings: SamplingSettings) -> Thoughts:
    """Thousands of groups of thoughts by the real code."""
    batch, places = text(GROUPS), positions(GROUPS)
    draws = seeded_generators(11, 0, list(range(GROUPS)))
    with torch.no_grad():
        cache = Replay().read(model(), batch)
    return sample_thoughts(model(), cache, places, settings, uniforms(places, settings, draws))


def sampled(temperature: float, positive_only: bool = False, **advantage_options) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The real code's ascent direction from thousands of groups of thoughts.

    Returns:
        `tuple`: its projection, `(D,)`, and each group's own, `(groups, D)`, whose mean it is.
    """
    thoughts = drawn(SamplingSettings(L, num_thoughts=G, temperature=temperature))
    batch, scores, rewards = score_and_reward(GROUPS, thoughts, temperature)
    options = dict(use_gae=True, gamma=1.0, gae_lambda=1.0)
    advantages, returns = thought_advantages(
        rewards, scores.thought_values, thoughts.mask, **{**options, **advantage_options}
    )
    if positive_only:
        advantages = advantages.clamp(min=0)
    inputs = LossInputs(
        scores.thought_logps,
        scores.thought_entropies,
        scores.thought_values,
        advantages,
        returns,
        thoughts.mask,
        scores.talk_logps,
        talk_mask=torch.ones(GROUPS, 1, 1, M, dtype=torch.bool),
        reader_logps=scores.talk_logps,
        text_logps=scores.text_logps,
        text_mask=batch.predicted(),
    )
    loss, _ = quietstar_loss(inputs, POLICY_ONLY)
    number = numbers_of(thoughts, ends=False)
    each = (advantages[:, 0, :, :, None] * exact(temperature).token_gradients[number]).sum(2).mean(1)
    return -L * projected_gradient(loss), each  # the loss is a mean over tokens, the expectation one over thoughts


def z_scores(temperature: float, **advantage_options) -> torch.Tensor:
    """Distance of the estimate from the exact gradient, in standard errors of independent groups."""
    estimate, each = sampled(temperature, **advantage_options)
    torch.testing.assert_close(estimate, each.mean(0), rtol=1e-9, atol=1e-12)
    return (estimate - exact(temperature).gradient) / (each.std(0) / GROUPS**0.5)


UNBIASED = {
    "none": dict(baseline="none"),
    "leave-one-out": dict(baseline="leave_one_out"),
    "value, GAE": dict(baseline="value"),
    "value, one step": dict(baseline="value", use_gae=False),
    "both": dict(baseline="both"),
    "least variance": dict(baseline="least_variance"),
}


@pytest.mark.parametrize(
    ("name", "temperature"),
    [
        ("none", 0.7),
        ("leave-one-out", 1.0),
        ("value, GAE", 0.7),
        ("value, one step", 1.0),
        ("both", 0.7),
        ("least variance", 1.0),
    ],
)
def test_estimator_is_the_policy_gradient(name, temperature):
    """For every baseline the mean of the sampled gradient is the exact gradient of the expected reward."""
    assert z_scores(temperature, **UNBIASED[name]).abs().max() < LIMIT


@pytest.mark.parametrize("wrong", [dict(baseline="none", positive_only=True), dict(baseline="value", gamma=0.0)])
def test_a_biased_estimator_is_caught(wrong):
    """The comparison has the power to reject: two advantages that are known to be biased fail it."""
    assert z_scores(1.0, **wrong).abs().max() > LIMIT


def test_the_comparison_has_power():
    """The gradient is many standard errors long, rewards have both signs, and the value head is far from constant."""
    _, scores, rewards = score_and_reward(1, every_thought(), 1.0)
    _, each = sampled(1.0, baseline="leave_one_out")
    assert (exact(1.0).gradient / (each.std(0) / GROUPS**0.5)).abs().max() > 4 * LIMIT
    assert rewards.min() < -0.05 and rewards.max() > 0.05
    assert scores.thought_values[0, 0, :, 1].std() > 0.05


# The objectives, through policy and reader


@dataclass
class Every:
    """
    Every thought, with gradient.

    Parameters:
        logps, lengths (shape `(N,)`), talk (shape `(N, M)`), without (shape `(M,)`):
            Log-probability and length of the thought, and log-probabilities of the talk after it and of the talk without one.
        token_gradients (shape `(N, L, D)`), talk_gradients (shape `(N, M, D)`):
            Of each token's log-probability, on the directions.
    """

    logps: torch.Tensor
    lengths: torch.Tensor
    talk: torch.Tensor
    without: torch.Tensor
    token_gradients: torch.Tensor
    talk_gradients: torch.Tensor

    def gains(self) -> torch.Tensor:
        """What `probability` measures, of shape `(N,)`."""
        return (self.talk.exp() - self.without.exp()).mean(-1).detach()

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the policy's thoughts of a value of each, `(N,)`."""
        return (self.logps.exp() * values).sum()

    def groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All groups of thoughts by their numbers, `(N^G, G)`, and how likely the policy writes each, `(N^G,)`."""
        numbers = torch.cartesian_prod(*[torch.arange(len(self.logps))] * G_ALL)
        return numbers, self.logps[numbers].sum(-1).exp()


@functools.cache
def every(ends: bool = False) -> Every:
    thoughts = every_thought(ends)
    _, scores, _ = score_and_reward(1, thoughts, 1.0)
    mask, talk = thoughts.mask[0, 0], scores.talk_logps[0, 0]
    logps = scores.thought_logps[0, 0] * mask
    of_tokens, of_talk = (
        torch.stack([torch.stack([projected_gradient(logp) for logp in row]) for row in x]) for x in (logps, talk)
    )
    without = at_talk(scores.text_logps, thoughts, M)[0, 0, 0].detach()
    return Every(logps.sum(-1), mask.sum(-1), talk, without, of_tokens, of_talk)


def log_of_the_mean(all_: Every) -> torch.Tensor:
    """`E[log (1/G) sum_j P_j]` over all groups (JEPO, eq. 6)."""
    numbers, probabilities = all_.groups()
    return (probabilities * (all_.talk.sum(-1)[numbers].logsumexp(-1) - math.log(G_ALL))).sum()


def normalised_by_group(all_: Every) -> torch.Tensor:
    """What the policy ascends if the advantages of each group are `(r - mean) / std` (GRPO); its gradient counts, not its value."""
    numbers, probabilities = all_.groups()
    rewards = all_.gains()[numbers]
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-30)
    return (probabilities.detach() * (advantages * all_.logps[numbers]).mean(-1)).sum()


@dataclass(frozen=True)
class Objective:
    """
    An objective of docs/method.md.

    Parameters:
        options (`dict`):
            The fields that make it.
        quantity (`Callable`):
            What it ascends, from all thoughts.
        wrong (`list[dict]`):
            Fields, each of which makes it another one.
    """

    options: dict
    quantity: Callable[[Every], torch.Tensor]
    wrong: list[dict]


G_ALL = 3
POLICY, BOTH = dict(policy_coefficient=L, nll_coefficient=0.0), dict(policy_coefficient=L, nll_coefficient=M)
OBJECTIVES = {
    "E[P]": Objective(
        dict(reward_type="sequence_probability", nll_weighting="probability", **BOTH),
        lambda x: x.expected(x.talk.sum(-1).exp()),
        [dict(nll_weighting="uniform"), dict(policy_coefficient=0.0)],
    ),
    "E[log P]": Objective(
        dict(reward_type="sequence_log_likelihood", **BOTH),
        lambda x: x.expected(x.talk.sum(-1)),
        [dict(nll_weighting="probability"), dict(policy_coefficient=0.0)],
    ),
    "E[mean log p]": Objective(
        dict(reward_type="log_likelihood", policy_coefficient=L, nll_coefficient=1.0),
        lambda x: x.expected(x.talk.mean(-1)),
        [BOTH],
    ),
    "log mean P": Objective(
        dict(
            reward_type="marginal_log_likelihood",
            advantage_baseline="none",
            nll_weighting="share",
            policy_coefficient=G_ALL * L,
            nll_coefficient=M,
        ),
        log_of_the_mean,
        [dict(nll_weighting="uniform"), dict(policy_coefficient=L)],
    ),
    "mean p": Objective(
        dict(reward_type="probability", **POLICY),
        lambda x: x.expected(x.gains()),
        [dict(reward_type="sequence_probability")],
    ),
    "mean p, clipped at 0": Objective(
        dict(reward_type="probability", reward_clip_range=[0.0, 1.0], **POLICY),
        lambda x: x.expected(x.gains().clamp(min=0)),
        [dict(reward_clip_range=None)],
    ),
    "normalised by group": Objective(
        dict(reward_type="probability", advantage_baseline="mean", normalize_advantages="group", **POLICY),
        normalised_by_group,
        [dict(normalize_advantages="none")],
    ),
}


@functools.cache
def scored_groups(ends: bool):
    """Thousands of groups, and their scores with gradient."""
    settings = SamplingSettings(L, num_thoughts=G_ALL, stop=ends_here if ends else None)
    batch, scores, _ = score_and_reward(GROUPS, drawn(settings), 1.0)
    return settings, batch, scores


def ends_here(token_ids: torch.Tensor) -> torch.Tensor:
    return token_ids[:, -1] == END


def ascent(options: dict, ends: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The direction in which the loss of a configuration descends, whole model and all terms, from thousands of groups.

    Returns:
        `tuple`: its projection, `(D,)`, and each group's own, `(groups, D)`, whose mean it is.
    """
    none = ("reader_nll", "base_nll", "entropy", "min_entropy")
    args = QuietStarConfig(
        "unused",
        use_cpu=True,
        num_thoughts=G_ALL,
        **{"advantage_baseline": "leave_one_out", **{f"{name}_coefficient": 0.0 for name in none}, **options},
    )
    settings, batch, scores = scored_groups(ends)
    (experience,) = finish_advantages([experience_of(batch, scores, None, args, settings)], args, lambda sums: sums)
    loss, _ = quietstar_loss(LossInputs.of(batch, scores, experience, args), Coefficients.of(args, 0))
    number, mask = numbers_of(scores.thoughts, ends), scores.thoughts.mask
    of_policy = (experience.advantages[:, 0, ..., None] * every(ends).token_gradients[number]).sum(2)
    of_reader = every(ends).talk_gradients[number].sum(2) / M
    if experience.talk_weights is not None:
        of_reader = of_reader * experience.talk_weights[:, 0, :, None]
    of_policy = of_policy / mask.sum() * mask[..., 0].sum()  # by the mean length of a thought
    each = (args.policy_coefficient * of_policy + args.nll_coefficient * of_reader).mean(1)
    return -projected_gradient(loss), each


def distance(objective: Objective, changes: dict, ends: bool = False) -> float:
    """Of the sampled gradient from the enumerated one, in standard errors of independent groups; the largest of all directions."""
    estimate, each = ascent({**objective.options, **changes}, ends)
    torch.testing.assert_close(estimate, each.mean(0), rtol=1e-9, atol=1e-12)
    exact_ = projected_gradient(objective.quantity(every(ends)))
    return ((estimate - exact_) / (each.std(0) / GROUPS**0.5)).abs().max().item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_the_gradient_of_its_quantity(name):
    """Policy and reader together follow the gradient of what the table says; with one field changed they do not."""
    objective = OBJECTIVES[name]
    assert distance(objective, {}) < LIMIT
    for changes in objective.wrong:
        assert distance(objective, changes) > LIMIT, changes


@pytest.mark.parametrize("name", ["E[P]", "log mean P"])
def test_objective_of_thoughts_of_many_lengths(name):
    """Thoughts that end early: the mean length takes the place of L in the policy's coefficient."""
    lengths = scored_groups(True)[2].thoughts.mask.sum(-1).double()
    assert 0 < (lengths < L).double().mean() < 1
    objective = OBJECTIVES[name]
    right = objective.options["policy_coefficient"] * lengths.mean().item() / L
    assert distance(objective, dict(policy_coefficient=right), ends=True) < LIMIT
    assert distance(objective, dict(policy_coefficient=2 * right), ends=True) > LIMIT


def test_a_step_of_few_thoughts_of_many_lengths_is_nearly_unbiased():
    """The mean over a step's tokens divides by their number, which goes with what the thoughts earn. Where a step holds one pair,
    the expected policy part is 12% off what steps of many give, and half as much with two pairs; its direction hardly differs."""
    all_ = every(ends=True)
    pairs = torch.cartesian_prod(*[torch.arange(len(all_.logps))] * 2)
    likely, lengths = all_.logps.detach().exp(), all_.lengths.double()
    rewards, gradients = all_.talk.sum(-1).exp().detach(), all_.token_gradients.sum(1)
    sums = ((rewards[pairs] - rewards[pairs].flip(-1))[..., None] * gradients[pairs]).sum(1)
    likely_pairs, tokens = likely[pairs].prod(-1), lengths[pairs].sum(-1)
    of_many = likely_pairs @ sums / 2
    of_one = (likely_pairs / tokens) @ sums * (likely @ lengths)
    shares = (likely_pairs / (tokens[:, None] + tokens)).sum(1, keepdim=True)  # over what the other pair may be
    of_two = (likely_pairs[:, None] * shares * sums).sum(0) * 2 * (likely @ lengths)
    off = [((x - of_many).norm() / of_many.norm()).item() for x in (of_one, of_two)]
    assert off == pytest.approx([0.12, 0.06], abs=0.01)
    assert torch.cosine_similarity(of_one, of_many, dim=0) > 0.995
