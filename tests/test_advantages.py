"""Advantages against the equations, written as loops."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trl_quietstar.learning.advantages import (
    MovingAverage,
    gae,
    leave_one_out,
    scale_by_group,
    squared_scores,
    standardize,
    thought_advantages,
)


B, J = 2, 3
unit = st.floats(0, 1)


@st.composite
def thoughts(draw, most_thoughts: int = 4):
    """Rewards `(B, J, G)`, values and mask `(B, J, G, L)` in float64; some thoughts end early, some do not exist."""
    G, L = draw(st.integers(1, most_thoughts)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rewards = torch.randn(B, J, G, generator=generator, dtype=torch.float64)
    values = torch.randn(B, J, G, L, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, L + 1, (B, J, G, 1), generator=generator)
    lengths[0, 0, 0] = L
    return rewards, values, torch.arange(L) < lengths


def gae_by_loops(rewards, values, length, gamma, gae_lambda) -> list[float]:
    """Eq. 16 of Schulman et al. (2016) as a double sum: discounted sum of temporal differences."""
    values = [*values[:length], 0.0]
    deltas = [rewards[k] + gamma * values[k + 1] - values[k] for k in range(length)]
    return [sum((gamma * gae_lambda) ** (i - k) * deltas[i] for i in range(k, length)) for k in range(length)]


def terminal(reward: float, length: int) -> list[float]:
    """The reward at the last token."""
    return [0.0] * (length - 1) + [reward]


def by_row(*tensors):
    """Rewards as numbers, the rest as lists, thought by thought, with the thought's length last."""
    rewards, *others, mask = tensors
    for index in torch.cartesian_prod(*(torch.arange(n) for n in rewards.shape)).tolist():
        index = tuple(index)
        yield rewards[index].item(), *(x[index].tolist() for x in others), int(mask[index].sum())


@given(thoughts(), unit, unit)
def test_gae_is_the_double_sum(batch, gamma, gae_lambda):
    """Vectorised GAE equals the paper's double sum, for any lengths, discount and decay."""
    rewards, values, mask = batch
    ours, returns = thought_advantages(rewards, values, mask, "value", True, gamma, gae_lambda)
    for reward, value, advantage, target, n in by_row(rewards, values, ours, returns, mask):
        oracle = gae_by_loops(terminal(reward, n), value, n, gamma, gae_lambda) if n else []
        assert advantage[:n] == pytest.approx(oracle, abs=1e-12)
        assert target[:n] == pytest.approx([a + v for a, v in zip(oracle, value[:n], strict=True)], abs=1e-12)
        assert not any(advantage[n:]) and not any(target[n:])


@given(thoughts(), unit, unit, st.integers(0, 100))
def test_gae_takes_a_reward_at_any_token(batch, gamma, gae_lambda, seed):
    """The estimator itself holds for rewards along the way, not only at the end."""
    _, values, mask = batch
    rewards = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = gae(rewards, values, mask, gamma, gae_lambda)
    rows = zip(*(x.flatten(0, -2).tolist() for x in (rewards, values, ours, mask)), strict=True)
    for reward, value, advantage, exists in rows:
        n = sum(exists)
        assert advantage[:n] == pytest.approx(gae_by_loops(reward, value, n, gamma, gae_lambda), abs=1e-12)


@given(thoughts())
def test_without_discount_gae_is_reward_minus_value(batch):
    """gamma = lambda = 1: the advantage is the reward minus the value, and the return is the reward."""
    rewards, values, mask = batch
    advantages, returns = thought_advantages(rewards, values, mask, "value", True, 1.0, 1.0)
    torch.testing.assert_close(advantages, (rewards[..., None] - values) * mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, rewards[..., None] * mask, rtol=0, atol=1e-12)


@given(thoughts(), unit)
def test_lambda_zero_is_one_step(batch, gamma):
    """lambda = 0: the temporal difference to the next state's value alone."""
    rewards, values, mask = batch
    advantages, _ = thought_advantages(rewards, values, mask, "value", True, gamma, 0.0)
    for reward, value, advantage, n in by_row(rewards, values, advantages, mask):
        following = [*value[1:n], 0.0]
        oracle = (
            [r + gamma * v - u for r, v, u in zip(terminal(reward, n), following, value, strict=False)] if n else []
        )
        assert advantage[:n] == pytest.approx(oracle, abs=1e-12)


@given(thoughts(), unit, unit)
def test_one_token_has_no_horizon(batch, gamma, gae_lambda):
    """A thought of one token: reward minus value, whatever the discount."""
    rewards, values, mask = batch
    advantages, _ = thought_advantages(rewards, values[..., :1], mask[..., :1], "value", True, gamma, gae_lambda)
    torch.testing.assert_close(advantages, (rewards[..., None] - values[..., :1]) * mask[..., :1], rtol=0, atol=1e-12)


@given(thoughts())
def test_without_gae_it_is_reward_minus_value(batch):
    """`use_gae=False`: one-step form, and the reward as the value's target."""
    rewards, values, mask = batch
    advantages, returns = thought_advantages(rewards, values, mask, "value", False, 0.3, 0.3)
    torch.testing.assert_close(advantages, (rewards[..., None] - values) * mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, rewards[..., None] * mask, rtol=0, atol=1e-12)


@given(thoughts(), unit, unit)
def test_least_variance_is_reward_minus_value(batch, gamma, gae_lambda):
    """Whatever GAE is set to: two such baselines have no temporal difference."""
    rewards, values, mask = batch
    ours = thought_advantages(rewards, values, mask, "least_variance", True, gamma, gae_lambda)
    oracle = thought_advantages(rewards, values, mask, "value", False)
    for a, b in zip(ours, oracle, strict=True):
        assert torch.equal(a, b)


@given(st.integers(2, 9), st.floats(0, 8), st.integers(0, 10_000))
def test_squared_scores_are_those_of_the_logits_up_to_two(V, sharpness, seed):
    """The gradient of a token's log-probability on the logits, by autograd, for every token."""
    drawn = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = (sharpness * drawn).requires_grad_()
    logps = logits.log_softmax(-1)
    for logp in logps:
        (score,) = torch.autograd.grad(logp, logits, retain_graph=True)
        length, ours = score.square().sum().item(), squared_scores(logp).item()
        assert ours * (1 - 1e-9) <= length + 1e-15 and length <= 2 * ours * (1 + 1e-9) + 1e-15


def test_the_gradient_varies_least_with_it():
    """A sure and mostly right policy of one token, enumerated: the weighted mean of the rewards nearly reaches the least variance that
    any baseline has; the mean reward does worse than no baseline."""
    logits = torch.tensor([4.0, 0.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.9, 0.1, 0.0, 0.1], dtype=torch.float64)
    logps = logits.log_softmax(-1)
    scores = torch.stack([torch.autograd.grad(logp, logits, retain_graph=True)[0] for logp in logps])
    p, lengths = logps.exp().detach(), scores.square().sum(-1)

    def mean(values, weights):
        return (p * weights * values).sum() / (p * weights).sum()

    def variance(baseline):  # up to the squared mean gradient, which no baseline changes
        return (p * (rewards - baseline) ** 2 * lengths).sum()

    least, ours = variance(mean(rewards, lengths)), variance(mean(rewards, squared_scores(logps.detach())))
    assert all(variance(b) >= least for b in torch.linspace(-1, 1, 201))
    assert least <= ours <= 1.05 * least
    assert ours < 0.9 * variance(0.0) < 0.9 * variance(mean(rewards, torch.ones_like(p)))


@given(thoughts())
def test_no_baseline_is_the_plain_reward(batch):
    """`"none"`: every token of a thought has its reward, undiscounted, whatever the values say."""
    rewards, values, mask = batch
    advantages, returns = thought_advantages(rewards, values, mask, "none", True, 0.5, 0.5)
    assert torch.equal(advantages, rewards[..., None] * mask)
    assert torch.equal(returns, rewards[..., None] * mask)


@pytest.mark.parametrize("baseline", ["value", "least_variance", "none"])
@pytest.mark.parametrize("use_gae", [True, False])
def test_thoughts_do_not_touch_each_other(baseline, use_gae):
    """Another thought's reward, and its values, change no advantage of this one."""
    rewards, values = torch.randn(B, J, 4), torch.randn(B, J, 4, 5)
    mask = torch.ones_like(values, dtype=torch.bool)
    before, _ = thought_advantages(rewards, values, mask, baseline, use_gae)
    rewards[1, 2, 3] += 10
    values[1, 2, 3] -= 3
    after, _ = thought_advantages(rewards, values, mask, baseline, use_gae)
    others = torch.ones(B, J, 4, dtype=torch.bool)
    others[1, 2, 3] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[1, 2, 3], after[1, 2, 3])


def test_leave_one_out_stays_at_its_position():
    """The baseline compares thoughts at one position; other positions' rewards do not enter."""
    rewards, values = torch.randn(B, J, 3), torch.zeros(B, J, 3, 2)
    mask = torch.ones_like(values, dtype=torch.bool)
    before, _ = thought_advantages(rewards, values, mask, "leave_one_out")
    rewards[0, 1] += torch.tensor([1.0, 2.0, 4.0])
    after, _ = thought_advantages(rewards, values, mask, "leave_one_out")
    others = torch.ones(B, J, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[0, 1], after[0, 1])


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_leave_one_out_is_the_mean_of_the_others(G, seed):
    """Equals a loop; and reward minus baseline sums to zero over the thoughts of a position."""
    rewards = torch.randn(B, J, G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = leave_one_out(rewards)
    for b in range(B):
        for j in range(J):
            for g in range(G):
                others = [rewards[b, j, i].item() for i in range(G) if i != g]
                assert ours[b, j, g].item() == pytest.approx(sum(others) / len(others), abs=1e-12)
    assert (rewards - ours).sum(-1).abs().max() < 1e-12


@given(thoughts(most_thoughts=4), unit, unit)
def test_both_is_gae_on_the_centred_reward(batch, gamma, gae_lambda):
    """`"both"`: leave-one-out first, then the value head as on any reward."""
    rewards, values, mask = (torch.cat([x, x.flip(0)], dim=2) for x in batch)
    ours = thought_advantages(rewards, values, mask, "both", True, gamma, gae_lambda)
    oracle = thought_advantages(rewards - leave_one_out(rewards), values, mask, "value", True, gamma, gae_lambda)
    for a, b in zip(ours, oracle, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("baseline", ["leave_one_out", "both"])
def test_one_thought_has_no_others(baseline):
    """A leave-one-out baseline of a single thought is refused, not NaN."""
    ones = torch.ones(1, 1, 1, 2)
    with pytest.raises(ValueError, match="num_thoughts"):
        thought_advantages(ones[..., 0], ones, ones.bool(), baseline)


@given(thoughts())
def test_normalised_advantages_are_standard(batch):
    """Mean 0 and standard deviation 1 over the tokens that exist, and 0 elsewhere."""
    rewards, values, mask = batch
    plain, _ = thought_advantages(rewards, values, mask)
    assume(int(mask.sum()) > 1 and plain[mask].std(correction=0) > 0.1)
    (advantages,) = standardize([plain], [mask], lambda sums: sums)
    chosen = advantages[mask]
    assert chosen.mean().abs() < 1e-9
    assert chosen.std(correction=0).item() == pytest.approx(1, abs=2e-3)  # the divisor may be guarded
    assert not advantages[~mask].any()


def test_equal_advantages_normalise_to_zero():
    """Nothing to tell apart: zeros, not rounding errors blown up to one."""
    mask = torch.ones(1, 2, 2, 3, dtype=torch.bool)
    (advantages,) = standardize([torch.full((1, 2, 2, 3), 0.3)], [mask], lambda sums: sums)
    assert advantages.abs().max() < 1e-2


@given(thoughts())
def test_batches_are_standardized_as_one(batch):
    """Split into two, by rows or over processes, advantages come out as those of the whole."""
    rewards, values, mask = batch
    plain, _ = thought_advantages(rewards, values, mask)
    (whole,) = standardize([plain], [mask], lambda sums: sums)
    parts = standardize([plain[:1], plain[1:]], [mask[:1], mask[1:]], lambda sums: sums)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)
    twice = standardize([plain], [mask], lambda sums: 2 * sums)  # another process with the same batch
    torch.testing.assert_close(twice[0], whole, rtol=0, atol=1e-9)


@given(thoughts(), st.sampled_from(["mean", "leave_one_out"]))
def test_group_scaling_is_grpo(batch, baseline):
    """Each thought's reward less its group's mean, over its group's standard deviation; leave-one-out is G / (G - 1) of that."""
    rewards, values, mask = batch
    G = rewards.shape[2]
    assume(G > 1)
    plain, _ = thought_advantages(rewards, values, mask, baseline)
    scaled = scale_by_group(plain, rewards)
    for b, j, g in torch.cartesian_prod(*(torch.arange(n) for n in rewards.shape)).tolist():
        own = rewards[b, j].tolist()
        expected = (own[g] - statistics.fmean(own)) / statistics.stdev(own)
        expected *= G / (G - 1) if baseline == "leave_one_out" else 1
        n = int(mask[b, j, g].sum())
        assert scaled[b, j, g, :n].tolist() == pytest.approx([expected] * n, rel=1e-9)
        assert not scaled[b, j, g, n:].any()


def test_groups_that_earned_the_same_scale_to_zero():
    """Nothing to tell apart: zeros, not rounding errors blown up to one; and a reward that is no number stays none."""
    rewards = torch.tensor([[[0.1, 0.1, 0.1], [0.1, 0.2, math.nan]]])
    mask = torch.ones(1, 2, 3, 1, dtype=torch.bool)
    plain, _ = thought_advantages(rewards, torch.zeros(1, 2, 3, 1), mask, "mean")
    scaled = scale_by_group(plain, rewards)
    assert not scaled[0, 0].any() and scaled[0, 1].isnan().all()


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 0.99))
def test_moving_average_is_a_weighted_mean(values, decay):
    """Of all steps so far, each counting `decay` times as much as the one after it; None before the first."""
    average = MovingAverage(decay)
    assert average.value is None
    for value in values:
        average.add(value)
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert average.value == pytest.approx(expected)


@pytest.mark.parametrize("baseline", ["value", "leave_one_out", "both", "none"])
def test_advantages_carry_no_gradient(baseline):
    """The policy term must not train the value head through its baseline."""
    values = torch.randn(1, 2, 3, 4, requires_grad=True)
    rewards, mask = torch.randn(1, 2, 3), torch.ones(1, 2, 3, 4, dtype=torch.bool)
    for result in thought_advantages(rewards, values, mask, baseline):
        assert not result.requires_grad


def test_masked_values_are_never_read():
    """Garbage in the values of tokens that do not exist changes nothing."""
    rewards, values = torch.randn(1, 2, 2), torch.randn(1, 2, 2, 4)
    mask = torch.tensor([True, True, False, False]).expand(1, 2, 2, 4)
    garbage = torch.where(mask, values, 1e6)
    for baseline in ("value", "both"):
        for a, b in zip(
            thought_advantages(rewards, values, mask, baseline),
            thought_advantages(rewards, garbage, mask, baseline),
            strict=True,
        ):
            assert torch.equal(a, b)
