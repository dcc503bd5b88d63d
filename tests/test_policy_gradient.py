"""The estimator's expectation is the policy gradient.

On a model small enough to enumerate every thought, the gradient of the expected reward, through the policy alone, is
computed exactly and compared with the mean of the real code's gradient over thousands of sampled thoughts.
"""

import functools
from dataclasses import dataclass

import pytest
import torch

from trl_quietstar.branches.replay import Replay
from trl_quietstar.learning.advantages import thought_advantages
from trl_quietstar.learning.objective import Coefficients, LossInputs, quietstar_loss
from trl_quietstar.learning.rewards import thought_rewards
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.text.positions import seeded_generators
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score

from .tiny import exact_model


V, L, M, G, AT = 5, 2, 2, 2, 1
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


def every_thought() -> Thoughts:
    """All V ** L thoughts at one place."""
    token_ids = torch.cartesian_prod(*[torch.arange(V)] * L).view(1, 1, -1, L)
    return Thoughts(positions(1), token_ids, torch.ones_like(token_ids, dtype=torch.bool))


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


def sampled(temperature: float, positive_only: bool = False, **advantage_options) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The real code's ascent direction from thousands of groups of thoughts.

    Returns:
        `tuple`: its projection, `(D,)`, and each group's own, `(groups, D)`, whose mean it is.
    """
    settings = SamplingSettings(L, num_thoughts=G, temperature=temperature)
    batch, places = text(GROUPS), positions(GROUPS)
    draws = seeded_generators(11, 0, list(range(GROUPS)))
    with torch.no_grad():
        cache = Replay().read(model(), batch)
    thoughts = sample_thoughts(model(), cache, places, settings, uniforms(places, settings, draws))
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
    number = thoughts.token_ids[:, 0, :, 0] * V + thoughts.token_ids[:, 0, :, 1]
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
}


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("none", 0.7), ("leave-one-out", 1.0), ("value, GAE", 0.7), ("value, one step", 1.0), ("both", 0.7)],
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
