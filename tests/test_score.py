"""A scored part of the completion: what rewards look at, where it comes from in data, and what stays of the whole talk."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.evaluation.anti_theater import SUMS, text_sums
from trl_quietstar.evaluation.inspection import inspect_texts
from trl_quietstar.learning.experience import experience_of, flat, unflat
from trl_quietstar.learning.metrics import BatchResult, run_metrics
from trl_quietstar.learning.objective import LossInputs
from trl_quietstar.learning.rewards import REWARD_TYPES, WEIGHTINGS, talk_weights
from trl_quietstar.text.batch import Positions, Text, Thoughts, talk_after
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import byte_tokenizer, exact_model, sampling
from .training import tiny_args


PROMPT, LENGTHS = 3, (10, 7, 9)
SCORED = torch.zeros(3, 10, dtype=torch.bool)
SCORED[0, 6:8] = SCORED[1, 2:5] = True  # a part within the completion; one that begins in the prompt; none
AT = Positions(torch.tensor([[2, 5, 7], [2, 4, 0], [2, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool())
M = 7


@functools.cache
def token_ids() -> torch.Tensor:
    """At random, but for some that the model itself would say without thoughts: right predictions, which thoughts may spoil."""
    ids = torch.randint(1, 97, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    model = exact_model()
    with torch.no_grad():
        for at in (4, 6, 9):
            ids[:, at] = model(ids[:, :at]).logits[:, -1].argmax(-1)
    return ids


def batch(scored: torch.Tensor | None = SCORED) -> Text:
    """Three prompts with completions of unequal length."""
    ids = token_ids()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return Text.from_batch(ids, mask, ids.masked_fill(torch.arange(max(LENGTHS)) < PROMPT, -100), score_mask=scored)


def thoughts() -> Thoughts:
    """Two thoughts of up to three tokens at each position."""
    ids = torch.randint(1, 97, (3, 3, 2, 3), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[[3, 1]], [[2, 3]], [[1, 2]]])[..., None].expand(3, 3, 2, 1)
    mask = (torch.arange(3) < lengths) & AT.mask[..., None, None]
    return Thoughts(AT, ids * mask, mask)


def judged(folder, text: Text, path=None, **options) -> BatchResult:
    """What the thoughts earn, with their scores."""
    args = tiny_args(folder, talk_length=M, **options)
    scores = score(exact_model(), ScoreRequest(text, thoughts(), M, path or SharedPrefix()))
    experience = experience_of(text, scores, None, args, sampling())
    zero = torch.zeros(())
    return BatchResult(text, scores, experience, zero, {})


def measured(batch: BatchResult, args) -> dict[str, float]:
    """The mean of each metric that is defined."""
    metrics = {name: pair for name, pair in run_metrics(batch, args).items() if pair is not None}
    return {
        name: float((x.detach().double() * mask).sum() / mask.sum())
        for name, (x, mask) in metrics.items()
        if mask.any()
    }


# What rewards look at


def test_the_scored_part_of_a_talk():
    """Tokens of the talk that are labels and scored; by default all that are labels."""
    text = batch()
    talk = talk_after(text, AT, M)
    for b, j in AT.mask.nonzero().tolist():
        places = [int(AT.index[b, j]) + 1 + m for m in range(M)]
        wanted = [PROMPT <= at < LENGTHS[b] and bool(SCORED[b, at]) for at in places]
        assert talk.score_mask[b, j].tolist() == wanted
    assert not talk.score_mask[~AT.mask].any()
    assert torch.equal(text.rows(torch.tensor([2, 0])).score_mask, SCORED[[2, 0]])
    plain = talk_after(batch(None), AT, M)
    assert torch.equal(plain.score_mask, plain.target_mask)
    assert all(torch.equal(getattr(talk, name), getattr(plain, name)) for name in ("token_ids", "target_mask"))


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared", "replay"])
def test_a_reward_is_by_hand(path, tmp_path):
    """The probability of the scored tokens after a thought, less that without it, by ordinary forwards; to 1e-9."""
    model, text = exact_model(), batch()
    options = dict(reward_type="sequence_probability", reward_prediction="thought", nll_weighting="share")
    scores = score(model, ScoreRequest(text, thoughts(), M, path, prediction="thought"))
    experience = experience_of(text, scores, None, tiny_args(tmp_path, talk_length=M, **options), sampling())
    b, j, at, own = 0, 1, 5, [6, 7]
    embed, heads, ids = model.get_input_embeddings(), model.quietstar, text.input_ids[b]

    def probability(*before: torch.Tensor) -> float:
        rows = torch.cat([embed(ids[: at + 1]), *before, embed(ids[at + 1 : own[-1]])])
        logps = model.lm_head(model.base_model(inputs_embeds=rows[None]).last_hidden_state[0]).log_softmax(-1)
        ahead = len(rows) - own[-1]  # what the branch has more than the text
        return math.exp(sum(logps[ahead + place - 1, ids[place]].item() for place in own))

    with_ = []
    for g in range(2):
        own_thought = thoughts().token_ids[b, j, g][thoughts().mask[b, j, g]]
        with_.append(probability(heads.start_embedding[None], embed(own_thought), heads.end_embedding[None]))
    rewards = [x - probability() for x in with_]
    assert experience.rewards[b, j].tolist() == pytest.approx(rewards, abs=1e-9)
    shares = [2 * x / sum(with_) for x in with_]
    assert experience.talk_weights[b, j].tolist() == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize("reward_type", REWARD_TYPES)
def test_rewards_are_those_of_the_scored_tokens_alone(reward_type, tmp_path):
    """As if no other token were a label; and a talk without a scored token earns 0."""
    text = batch()
    alone = replace(text, labels=text.labels.masked_fill(~SCORED, -100))
    ours, oracle = (judged(tmp_path, x, reward_type=reward_type).experience for x in (text, alone))
    torch.testing.assert_close(ours.rewards, oracle.rewards, rtol=0, atol=1e-12)
    whole = judged(tmp_path, batch(None), reward_type=reward_type).experience
    if reward_type != "binary":  # which may be 0 in both cases
        assert (ours.rewards != whole.rewards).any()
    assert not ours.rewards[0, 2].any() and not ours.rewards[2].any()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_the_reader_are_those_of_the_scored_tokens(weighting, tmp_path):
    """By the probability of these tokens; the NLLs themselves stay of the whole talk."""
    ours = judged(tmp_path, batch(), nll_weighting=weighting)
    whole = judged(tmp_path, batch(None), nll_weighting=weighting)
    mask = talk_after(batch(), AT, M).score_mask[:, :, None]
    wanted = talk_weights(ours.scores.talk_logps, mask, ours.experience.rewards, weighting)
    if wanted is None:
        assert ours.experience.talk_weights is None
    else:
        assert torch.equal(ours.experience.talk_weights, wanted)
        assert not torch.equal(wanted, whole.experience.talk_weights)
    args = tiny_args(tmp_path)
    numbers = [LossInputs.of(batch(None), x.scores, x.experience, args) for x in (ours, whole)]
    for name in ("talk_mask", "talk_logps", "reader_logps", "text_mask", "text_logps"):
        assert torch.equal(*(getattr(x, name) for x in numbers))


def test_metrics_are_of_the_scored_tokens(tmp_path):
    """Exact match and accuracy over talks that have scored tokens, useful thoughts over all; the NLLs are of the whole talk."""
    args = tiny_args(tmp_path, useful_gain=0.0)
    ours = judged(tmp_path, batch(), useful_gain=0.0)
    scores, experience = ours.scores, ours.experience
    found, whole = measured(ours, args), measured(judged(tmp_path, batch(None)), args)
    thoughts_ = [(b, j, g) for b, j in AT.mask.nonzero().tolist() for g in range(2)]
    scored = {x: [m for m in range(M) if experience.score_mask[x[0], x[1], 0, m]] for x in thoughts_}
    assert len([x for x in thoughts_ if scored[x]]) == 6 < len(thoughts_) == 14
    exact = [all(scores.talk_correct[x][scored[x]]) for x in thoughts_ if scored[x]]
    right = [bool(correct) for x in thoughts_ for correct in scores.talk_correct[x][scored[x]]]
    gains = [(scores.reader_logps[x] - experience.logps_without[x[0], x[1], 0])[scored[x]].sum() for x in thoughts_]
    assert found["exact_match_with"] == pytest.approx(sum(exact) / 6)
    assert found["accuracy_with"] == pytest.approx(sum(right) / len(right))
    assert found["useful_thoughts"] == pytest.approx(sum(gain > 0 for gain in gains) / 14)
    for name in ("nll_with", "nll_without", "reader_nll", "mixing_weight"):
        assert found[name] == whole[name]
    assert "exact_match_with" not in measured(judged(tmp_path, batch(torch.zeros_like(SCORED))), args)


def test_experience_is_kept_and_read_again(tmp_path):
    """With its scored tokens; a file from before there were any has all talk tokens scored."""
    experience = judged(tmp_path, batch()).experience
    state = flat([experience])
    assert torch.equal(unflat(dict(state))[0].score_mask, experience.score_mask)
    del state["0.score_mask"]
    assert torch.equal(unflat(state)[0].score_mask, experience.talk_mask)


# Evaluation


def test_validation_of_thoughts_is_of_the_scored_tokens():
    """Each condition's sums are over them, and over thoughts that have any."""
    text = batch()
    alone = replace(text, labels=text.labels.masked_fill(~SCORED, -100))
    ours, oracle, whole = (
        dict(
            zip(
                SUMS,
                text_sums(exact_model(), x, thoughts(), M, SharedPrefix(), "mixed", torch.Generator()).T,
                strict=True,
            )
        )
        for x in (text, alone, batch(None))
    )
    assert ours["thoughts"].tolist() == [4, 2, 0] and whole["thoughts"].tolist() == [6, 4, 4]
    assert ours["tokens"].tolist() == [8, 4, 0]
    for name in (
        "tokens",
        "correctness",
        "correctness_squared",
        *(x for x in SUMS if x.startswith(("nll_", "correct_"))),
    ):
        torch.testing.assert_close(ours[name], oracle[name], rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours["nll_real"], whole["nll_real"])


def test_a_page_shows_the_gain_in_scored_tokens():
    """While it gives the NLL of each token of the talk."""
    text = batch()
    scores = score(exact_model(), ScoreRequest(text, thoughts(), M, SharedPrefix()))
    token = inspect_texts(byte_tokenizer(), text, thoughts(), scores)[0]["tokens"][5]
    first = token["thoughts"][0]
    gains = scores.talk_logps[0, 1, 0, :2] - scores.text_logps[0, 5:7]
    assert first["gain"] == pytest.approx(float(gains.detach().mean()), abs=1e-5)
    assert len([nll for nll in first["nll_with"] if nll is not None]) == 4
