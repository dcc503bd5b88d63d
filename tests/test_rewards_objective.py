"""Rewards, coherence, KL and the objective against loops, bounds and closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_quietstar.learning.objective import (
    Coefficients,
    LossInputs,
    WrittenInputs,
    entropy_coefficient,
    kl_divergence,
    policy_terms,
    quietstar_loss,
)
from trl_quietstar.learning.rewards import (
    REWARD_TYPES,
    WEIGHTINGS,
    coherence,
    masked_mean,
    talk_weights,
    thought_rewards,
)


B, J, G, L, M = 2, 3, 2, 4, 3
NOTHING = Coefficients(**dict.fromkeys(Coefficients.__dataclass_fields__, 0.0))
seeds = st.integers(0, 100_000)


def only(name: str, weight: float = 1.0) -> Coefficients:
    """Every weight 0 but one."""
    return Coefficients(**{**vars(NOTHING), name: weight})


def talk(seed: int, tied: bool = False) -> dict[str, torch.Tensor]:
    """What scoring yields about talk tokens, in float64, masked here and there and once throughout."""
    generator = torch.Generator().manual_seed(seed)

    def logps(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-6).log()

    def flags(*shape):
        return torch.rand(shape, generator=generator) < 0.5

    mask = flags(B, J, 1, M)
    mask[0, 0] = False
    mask[1, 1] = True
    return {
        "logps_with": logps(B, J, G, M),
        "logps_without": logps(B, J, 1, M),
        "correct_with": flags(B, J, G, M),
        "correct_without": flags(B, J, 1, M),
        "mask": mask,
    }


def reward_by_loop(talk: dict[str, torch.Tensor], reward_type: str, b: int, j: int, g: int) -> float:
    """The definition, one thought at a time."""
    said = [m for m in range(M) if talk["mask"][b, j, 0, m]]
    with_ = [math.prod(math.exp(talk["logps_with"][b, j, k, m]) for m in said) for k in range(G)]
    without = math.prod(math.exp(talk["logps_without"][b, j, 0, m]) for m in said)
    if reward_type == "sequence_probability":
        return with_[g] - without
    if reward_type == "sequence_log_likelihood":
        return math.log(with_[g] / without)
    if reward_type == "marginal_log_likelihood":
        others = [p for k, p in enumerate(with_) if k != g]
        return math.log(sum(with_) / G) - math.log(sum(others) / (G - 1))
    gains = []
    for m in range(M):
        if not talk["mask"][b, j, 0, m]:
            continue
        with_, without = talk["logps_with"][b, j, g, m].item(), talk["logps_without"][b, j, 0, m].item()
        if reward_type == "probability":
            gains.append(math.exp(with_) - math.exp(without))
        elif reward_type == "log_likelihood":
            gains.append(with_ - without)
        else:
            gains.append(int(talk["correct_with"][b, j, g, m]) - int(talk["correct_without"][b, j, 0, m]))
    mean = sum(gains) / len(gains) if gains else 0.0
    return float(mean > 0) if reward_type == "binary" else mean


@given(seeds, st.sampled_from(REWARD_TYPES))
def test_rewards_are_their_definition(seed, reward_type):
    """Each reward type equals a plain loop over the talk tokens that count, and stays in its bounds."""
    numbers = talk(seed)
    rewards = thought_rewards(**numbers, reward_type=reward_type)
    assert rewards.shape == (B, J, G)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (B, J, G))).tolist():
        assert rewards[tuple(index)].item() == pytest.approx(reward_by_loop(numbers, reward_type, *index), abs=1e-12)
    if reward_type in ("probability", "accuracy"):
        assert rewards.abs().max() <= 1
    if reward_type == "binary":
        assert set(rewards.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_a_useless_thought_earns_nothing(reward_type):
    """The same prediction with and without the thought: reward 0."""
    numbers = talk(0)
    numbers["logps_with"] = numbers["logps_without"].expand(B, J, G, M)
    numbers["correct_with"] = numbers["correct_without"].expand(B, J, G, M)
    assert not thought_rewards(**numbers, reward_type=reward_type).any()


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_masked_talk_is_never_read(reward_type):
    """Infinities at talk tokens that do not count change no reward."""
    numbers = talk(0)
    plain = thought_rewards(**numbers, reward_type=reward_type)
    numbers["logps_with"] = torch.where(numbers["mask"], numbers["logps_with"], -1e9)
    numbers["correct_with"] = numbers["correct_with"] | ~numbers["mask"]
    assert torch.equal(thought_rewards(**numbers, reward_type=reward_type), plain)


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_rewards_carry_no_gradient(reward_type):
    """REINFORCE: the reward is a number, not a path to the model."""
    numbers = talk(0)
    numbers["logps_with"].requires_grad_()
    numbers["logps_without"].requires_grad_()
    assert not thought_rewards(**numbers, reward_type=reward_type).requires_grad


def test_unknown_reward_is_refused():
    """An unknown reward type is an error that lists the known ones."""
    with pytest.raises(ValueError, match=r"'bleu'.*probability.*log_likelihood"):
        thought_rewards(**talk(0), reward_type="bleu")


def weight_by_loop(
    talk: dict[str, torch.Tensor], rewards: torch.Tensor, weighting: str, b: int, j: int, g: int
) -> float:
    """The definition, one thought at a time."""
    likelihoods = [
        math.prod(math.exp(talk["logps_with"][b, j, k, m].item()) for m in range(M) if talk["mask"][b, j, 0, m])
        for k in range(G)
    ]
    if weighting == "gain":
        return float(rewards[b, j, g] > 0)
    return likelihoods[g] if weighting == "probability" else likelihoods[g] / (sum(likelihoods) / G)


@given(seeds, st.sampled_from([name for name in WEIGHTINGS if name != "uniform"]))
def test_talk_weights_are_their_definition(seed, weighting):
    """Each weight equals a plain loop over the talk tokens that count; the shares of a group have the mean 1."""
    numbers = talk(seed)
    rewards = thought_rewards(**numbers, reward_type="probability")
    numbers["logps_with"].requires_grad_()
    weights = talk_weights(numbers["logps_with"], numbers["mask"], rewards, weighting)
    assert weights is not None and weights.shape == (B, J, G) and not weights.requires_grad
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (B, J, G))).tolist():
        expected = weight_by_loop(numbers, rewards, weighting, *index)
        assert weights[tuple(index)].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    if weighting == "share":
        torch.testing.assert_close(weights.mean(-1), torch.ones(B, J, dtype=torch.float64))


def test_uniform_weights_are_none_at_all():
    """The objective of before is computed as before, without a product by 1."""
    numbers = talk(0)
    assert talk_weights(numbers["logps_with"], numbers["mask"], torch.ones(B, J, G), "uniform") is None


@given(seeds)
def test_masked_mean_is_a_mean_over_the_mask(seed):
    """Over everything or one dimension; 0 where nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator) < 0.4
    mask[0] = False
    chosen = values[mask]
    expected = chosen.mean() if len(chosen) else torch.zeros(())
    assert masked_mean(values, mask).item() == pytest.approx(expected.item(), abs=1e-12)
    for row, mean in enumerate(masked_mean(values, mask, dim=1).tolist()):
        inside = values[row][mask[row]].tolist()
        assert mean == pytest.approx(sum(inside) / len(inside) if inside else 0.0, abs=1e-12)


@given(seeds)
def test_coherence_is_its_definition(seed):
    """0.4 semantic + 0.3 syntactic + 0.3 predictive, thought by thought, within [0, 1]."""
    generator, numbers = torch.Generator().manual_seed(seed), talk(seed)
    similarity = torch.rand(B, J, G, generator=generator, dtype=torch.float64) * 2 - 1
    plain = torch.rand(B, J, G, L, generator=generator, dtype=torch.float64).clamp(min=1e-3).log()
    lengths = torch.randint(1, L + 1, (B, J, G, 1), generator=generator)
    thought_mask = torch.arange(L) < lengths
    ours = coherence(similarity, plain, thought_mask, numbers["logps_with"], numbers["logps_without"], numbers["mask"])
    assert ours.min() >= 0 and ours.max() <= 1
    for b, j, g in torch.cartesian_prod(*(torch.arange(n) for n in (B, J, G))).tolist():
        n = int(lengths[b, j, g])
        likelihood = math.prod(math.exp(x) for x in plain[b, j, g, :n].tolist()) ** (1 / n)
        shares = [
            (p := math.exp(numbers["logps_with"][b, j, g, m])) / (p + math.exp(numbers["logps_without"][b, j, 0, m]))
            for m in range(M)
            if numbers["mask"][b, j, 0, m]
        ]
        predictive = sum(shares) / len(shares) if shares else 0.0
        expected = 0.4 * (similarity[b, j, g].item() + 1) / 2 + 0.3 * likelihood + 0.3 * predictive
        assert ours[b, j, g].item() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=5), st.integers(0, 1000))
def test_kl_estimate_is_never_negative(logps, seed):
    """k3 is at least 0 on every sample, and 0 against oneself."""
    logps = torch.tensor(logps, dtype=torch.float64)
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert (kl_divergence(logps, logps + noise) >= 0).all()
    assert (kl_divergence(logps, logps.clone()) == 0).all()


@given(seeds)
def test_kl_estimate_is_unbiased(seed):
    """Its expectation over the policy's tokens is KL(policy || reference), in that direction."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    expectation = (policy.exp() * kl_divergence(policy, reference)).sum()
    assert expectation.item() == pytest.approx((policy.exp() * (policy - reference)).sum().item(), abs=1e-10)


def test_kl_reaches_the_policy_only():
    """The reference is a constant."""
    policy, reference = torch.randn(5).requires_grad_(), torch.randn(5).requires_grad_()
    kl_divergence(policy, reference).sum().backward()
    assert policy.grad.abs().min() > 0 and reference.grad is None


@given(st.floats(0, 1), st.floats(0.5, 1), st.floats(0, 1))
def test_entropy_coefficient_decays_to_its_floor(initial, decay, floor):
    """Initial weight times decay to the power of the step, never below the floor, never rising."""
    steps = [entropy_coefficient(step, initial, decay, floor) for step in range(60)]
    weight = initial
    for value in steps:
        assert value == pytest.approx(max(floor, weight))
        weight *= decay
    assert all(a >= b for a, b in zip(steps, steps[1:], strict=False))
    assert entropy_coefficient(10**6, 0.01, 0.9995, 0.001) == 0.001


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Everything the objective takes, in float64, as leaves of a graph."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    thought_mask = torch.arange(L) < torch.randint(1, L + 1, (B, J, G, 1), generator=generator)
    thought_mask[1, 2] = False
    return {
        "thought_logps": leaf(B, J, G, L),
        "thought_entropies": leaf(B, J, G, L),
        "values": leaf(B, J, G, L),
        "advantages": leaf(B, J, G, L),
        "returns": leaf(B, J, G, L),
        "thought_mask": thought_mask,
        "talk_logps": leaf(B, J, G, M),
        "reader_logps": leaf(B, J, G, M),
        "talk_mask": torch.rand(B, J, 1, M, generator=generator) < 0.6,
        "text_logps": leaf(B, 9),
        "text_mask": torch.rand(B, 9, generator=generator) < 0.6,
        "reference_logps": leaf(B, J, G, L),
    }


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """Of the loss, or zeros where the leaf has no part in it."""
    return torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True, retain_graph=True)[0]


def test_policy_gradient_is_minus_the_advantage():
    """d policy / d log pi = -A / n on the thought tokens, 0 elsewhere; advantages are constants."""
    given_ = inputs()
    loss, _ = quietstar_loss(LossInputs(**given_), only("policy", 2.0))
    mask = given_["thought_mask"]
    expected = torch.where(mask, -2.0 * given_["advantages"].detach() / mask.sum(), 0.0)
    torch.testing.assert_close(gradient(loss, given_["thought_logps"]), expected, rtol=0, atol=1e-14)
    for name in ("advantages", "values", "returns", "talk_logps", "text_logps", "thought_entropies"):
        assert not gradient(loss, given_[name]).any(), name


def test_the_clipped_surrogate_by_hand():
    """`min(r A, clip(r) A)`: no gradient beyond the range in the direction of the advantage, and full gradient back."""
    ratios = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5, 1.25], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    terms = policy_terms(logps, advantages, torch.zeros(6, dtype=torch.float64), (0.2, 0.3))
    expected = torch.tensor([-0.5, 0.8, -2.0, -1.3, 1.5, -1.25], dtype=torch.float64)
    torch.testing.assert_close(terms.detach(), expected)
    gradients = torch.autograd.grad(terms.sum(), logps)[0]
    torch.testing.assert_close(gradients, torch.tensor([-0.5, 0.0, -2.0, 0.0, 1.5, -1.25], dtype=torch.float64))


def test_value_gradient_is_the_error():
    """d value / d V = 2 (V - return) / n on the thought tokens; the returns are constants."""
    given_ = inputs()
    loss, terms = quietstar_loss(LossInputs(**given_), only("value", 0.5))
    mask, error = given_["thought_mask"], (given_["values"] - given_["returns"]).detach()
    expected = torch.where(mask, error / mask.sum(), 0.0)
    torch.testing.assert_close(gradient(loss, given_["values"]), expected, rtol=0, atol=1e-14)
    assert not gradient(loss, given_["returns"]).any()
    assert terms["value_loss"].item() == pytest.approx((error[mask] ** 2).mean().item())


def test_value_gradient_is_the_weighted_error():
    """With a weight of each token d value / d V = 2 w (V - return) / n. A constant is best where it is the weighted mean."""
    given_, weights = inputs(), torch.rand(B, J, G, L, dtype=torch.float64)
    mask, returns = given_["thought_mask"], given_["returns"].detach()
    constant = ((weights * returns)[mask].sum() / weights[mask].sum()).requires_grad_()
    given_["values"] = constant.expand(B, J, G, L)
    loss, _ = quietstar_loss(LossInputs(**given_, value_weights=weights), only("value", 0.5))
    expected = torch.where(mask, weights * (constant - returns) / mask.sum(), 0.0).detach()
    torch.testing.assert_close(gradient(loss, given_["values"]), expected, rtol=0, atol=1e-14)
    assert gradient(loss, constant).abs() < 1e-12
    assert not torch.allclose(constant, returns[mask].mean())


def test_entropy_is_a_bonus():
    """A higher entropy lowers the loss, on thought tokens only."""
    given_ = inputs()
    loss, _ = quietstar_loss(LossInputs(**given_), only("entropy", 0.1))
    mask = given_["thought_mask"]
    expected = torch.where(mask, -0.1 / mask.sum(), 0.0).double()
    torch.testing.assert_close(gradient(loss, given_["thought_entropies"]), expected, rtol=0, atol=1e-9)


def test_likelihoods_are_masked_means():
    """Both NLLs are means over the tokens that count; each thought's talk counts once."""
    given_ = inputs()
    loss, terms = quietstar_loss(LossInputs(**given_), Coefficients(**{**vars(NOTHING), "nll": 0.7, "base_nll": 0.2}))
    said = given_["talk_logps"].detach()[given_["talk_mask"].expand(B, J, G, M)]
    plain = given_["text_logps"].detach()[given_["text_mask"]]
    assert terms["nll_with"].item() == pytest.approx(-said.mean().item())
    assert terms["nll_without"].item() == pytest.approx(-plain.mean().item())
    assert loss.item() == pytest.approx(-0.7 * said.mean().item() - 0.2 * plain.mean().item())


# what the reader ascends, from the log-probabilities of the whole talk after each thought of a group, `(B, J, G)`
OBJECTIVES = {
    "uniform": lambda logps: logps.mean(-1),
    "probability": lambda logps: logps.exp().mean(-1),
    "share": lambda logps: logps.logsumexp(-1),  # and a constant: log of the mean
}


@pytest.mark.parametrize("weighting", OBJECTIVES)
@pytest.mark.parametrize("term, leaf", [("nll", "talk_logps"), ("reader_nll", "reader_logps")])
def test_weighted_likelihoods_are_the_gradient_of_their_objective(weighting, term, leaf):
    """`E[log p]`, `E[p]` and `log mean p` of whole talks: autograd of each is the gradient of the weighted NLL."""
    given_ = inputs()
    # the weights are taken on the prediction that is rewarded; where the reader's is another, they are its weights all the same
    given_["talk_logps"] = (-given_["talk_logps"].detach().abs()).requires_grad_()
    given_["reader_logps"] = given_["talk_logps"].detach().clone().requires_grad_()
    mask = given_["talk_mask"]
    weights = talk_weights(given_["talk_logps"], mask, torch.ones(B, J, G), weighting)
    loss, _ = quietstar_loss(LossInputs(**given_, talk_weights=weights), only(term))
    objective = OBJECTIVES[weighting]((given_[leaf] * mask).sum(-1)).sum()
    scale = mask.sum()  # the mean is over tokens, each once for each thought
    torch.testing.assert_close(-gradient(loss, given_[leaf]) * scale, gradient(objective, given_[leaf]))


def test_thoughts_without_gain_teach_no_reader():
    """With `gain` the NLL after a thought that earned nothing has no gradient, and that after others has all of it."""
    given_ = inputs()
    rewards = torch.randn(B, J, G, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = talk_weights(given_["talk_logps"], given_["talk_mask"], rewards, "gain")
    plain = gradient(quietstar_loss(LossInputs(**given_), only("nll"))[0], given_["talk_logps"])
    weighted = gradient(
        quietstar_loss(LossInputs(**given_, talk_weights=weights), only("nll"))[0], given_["talk_logps"]
    )
    assert torch.equal(weighted, torch.where((rewards > 0)[..., None], plain, 0.0)) and plain[rewards <= 0].any()


def test_written_thoughts_have_a_mean_of_their_own():
    """Over their tokens; text and talk of both kinds of rows share one mean, and a written thought's talk has weight 1."""
    given_, other = inputs(), inputs(1)
    names = ("thought_logps", "thought_mask", "talk_logps", "reader_logps", "talk_mask", "text_logps", "text_mask")
    # one thought at a place
    written = WrittenInputs(
        **{name: other[name][:, :, :1] if other[name].dim() == 4 else other[name] for name in names}
    )
    weights = torch.rand(given_["thought_mask"].shape[:3], dtype=torch.float64)
    _, terms = quietstar_loss(LossInputs(**given_, talk_weights=weights, written=written), Coefficients())
    expected = masked_mean(-written.thought_logps, written.thought_mask)
    torch.testing.assert_close(terms["written_nll"], expected.detach(), rtol=1e-12, atol=0)
    sampled = given_["talk_mask"].expand_as(given_["talk_logps"])
    for term, name in (("nll_with", "talk_logps"), ("reader_nll", "reader_logps")):
        total = (weights[..., None] * given_[name] * sampled).sum() + (
            getattr(written, name) * written.talk_mask
        ).sum()
        wanted = -total.detach() / (sampled.sum() + written.talk_mask.sum())
        torch.testing.assert_close(terms[term], wanted, rtol=1e-12, atol=0)
    both = [torch.cat([given_[name], other[name]]) for name in ("text_logps", "text_mask")]
    torch.testing.assert_close(terms["nll_without"], masked_mean(-both[0], both[1]).detach(), rtol=1e-12, atol=0)


def test_kl_is_a_masked_mean_of_its_estimate():
    """The KL term sums k3 over the thought tokens, and only where a reference is given."""
    given_ = inputs()
    loss, terms = quietstar_loss(LossInputs(**given_), only("kl", 0.3))
    estimate = kl_divergence(given_["thought_logps"], given_["reference_logps"]).detach()
    assert terms["kl_divergence"].item() == pytest.approx(estimate[given_["thought_mask"]].mean().item())
    assert loss.item() == pytest.approx(0.3 * terms["kl_divergence"].item())
    del given_["reference_logps"]
    assert "kl_divergence" not in quietstar_loss(LossInputs(**given_), Coefficients())[1]


def test_loss_is_the_weighted_sum_of_its_terms():
    """The loss of several weights is the sum of the losses of each."""
    given_ = inputs()
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(vars(NOTHING))}
    whole, _ = quietstar_loss(LossInputs(**given_), Coefficients(**weights))
    parts = [quietstar_loss(LossInputs(**given_), only(name, weight))[0] for name, weight in weights.items()]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts))


@pytest.mark.parametrize(
    "name, off",
    [
        ("thought_logps", "policy"),
        ("values", "value"),
        ("thought_entropies", "entropy"),
        ("talk_logps", "nll"),
        ("reader_logps", "reader_nll"),
        ("text_logps", "base_nll"),
    ],
)
def test_a_term_of_weight_zero_cannot_poison_the_loss(name, off):
    """Infinities in a term that is switched off reach neither the loss nor a gradient."""
    given_ = inputs()
    del given_["reference_logps"]
    weights = {**vars(Coefficients()), off: 0.0}
    infinite = torch.full_like(given_[name], -math.inf).requires_grad_()
    loss, _ = quietstar_loss(LossInputs(**{**given_, name: infinite}), Coefficients(**weights))
    assert loss.isfinite()
    for other in ("thought_logps", "values", "talk_logps", "text_logps"):
        assert gradient(loss, given_[other]).isfinite().all()


def test_no_thoughts_give_no_loss():
    """A batch without a single thought or talk token: 0, not NaN."""
    given_ = inputs()
    for name in ("thought_mask", "talk_mask", "text_mask"):
        given_[name] = torch.zeros_like(given_[name])
    loss, terms = quietstar_loss(LossInputs(**given_), Coefficients(kl=0.1))
    assert loss.item() == 0
    assert all(term.item() == 0 for term in terms.values())
