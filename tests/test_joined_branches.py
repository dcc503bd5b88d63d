"""Thoughts that say the same run as one branch until they differ: the thoughts, and all that is known of them, stay as they were."""

import pytest
import torch

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix, SharedPrefixCache
from trl_quietstar.text.batch import talk_after
from trl_quietstar.thinking import writing
from trl_quietstar.thinking.sampling import ThoughtSampler
from trl_quietstar.thinking.scoring import ScoreRequest, Scores, score

from .agreement import Counter
from .tiny import exact_model, generators, mixed_text, positions_of, sampling, think


NUMBERS = [name for name in Scores._fields if name not in ("thoughts", "router_loss")]
CONFIDENT = {"num_thoughts": 8, "thought_length": 12, "stop": None}


def ends(token_ids: torch.Tensor) -> torch.Tensor:
    """At one token in four or so."""
    return token_ids[:, -1] % 4 == 0


ENDINGS: dict[str, dict] = {
    "at the last token": {},
    "early": {"stop": ends},
    "not too early": {"stop": ends, "min_thought_length": 4},
    "greedy": {"do_sample": False},
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral-window"])
def test_thoughts_are_those_of_branches_of_their_own(name, temperature, ending, monkeypatch):
    """As sampled, and with their statistics and talk where one pass samples and scores; from the nearly certain policy to the
    undecided one."""
    model, text = exact_model(name), mixed_text()
    positions, settings = positions_of(text, 2), sampling(**{**CONFIDENT, **ENDINGS[ending]}, temperature=temperature)

    def found():
        alone = think(model, text, SharedPrefix(), positions, settings)
        sampler = ThoughtSampler(settings, generators(text, step=1), 2)
        with torch.no_grad():
            return alone, score(model, ScoreRequest(text, sampler, 3, SharedPrefix(), temperature))

    thoughts, scores = found()
    with monkeypatch.context() as patch:
        patch.setattr(writing, "JOINED_TEXT", 0)
        expected_thoughts, expected = found()
    for ours, theirs in ((thoughts, expected_thoughts), (scores.thoughts, expected.thoughts)):
        assert torch.equal(ours.token_ids, theirs.token_ids) and torch.equal(ours.mask, theirs.mask)
    for field in NUMBERS:
        torch.testing.assert_close(getattr(scores, field), getattr(expected, field), atol=1e-9, rtol=0, msg=field)
    for path in (Replay(), SharedPrefix()):
        with torch.no_grad():
            again = score(model, ScoreRequest(text, scores.thoughts, 3, path, temperature))
        for field in NUMBERS:
            torch.testing.assert_close(getattr(scores, field), getattr(again, field), atol=1e-9, rtol=0, msg=field)


@pytest.mark.parametrize("ending", ["at the last token", "early"])
def test_what_thoughts_share_is_run_once(ending, monkeypatch):
    """Of each position, every beginning of a thought is run once, beside the start, which is run for each thought."""
    model, text = exact_model(), mixed_text()
    positions, settings = positions_of(text, 2), sampling(**{**CONFIDENT, **ENDINGS[ending]}, temperature=0.1)
    counter = Counter(model, monkeypatch)
    thoughts = think(model, text, SharedPrefix(), positions, settings)
    ran = counter.tokens - text.input_ids.numel()
    beginnings = {
        (row, place, *thoughts.token_ids[row, place, g, : t + 1].tolist())
        for row, place, g, t in thoughts.mask.nonzero().tolist()
    }
    slots = thoughts.mask[..., 0].numel()
    assert len(beginnings) < 0.6 * int(thoughts.mask.sum())  # there is something to share
    assert ran <= slots + len(beginnings)


def test_long_texts_are_not_copied(monkeypatch):
    """Where each branch would need a copy of much text, every thought has a branch of its own."""
    model, text = exact_model(), mixed_text()
    positions, settings = positions_of(text, 2), sampling(**CONFIDENT, temperature=0.1)
    slots = positions.mask.numel() * settings.num_thoughts
    monkeypatch.setattr(writing, "JOINED_TEXT", slots * text.input_ids.shape[1] - 1)
    counter = Counter(model, monkeypatch)
    think(model, text, SharedPrefix(), positions, settings)
    assert counter.tokens - text.input_ids.numel() == slots * settings.thought_length


def test_with_a_graph_every_thought_has_its_branch(monkeypatch):
    """Gradients are summed over thoughts as the objective is, token by token."""
    model, text = exact_model(), mixed_text()
    settings = sampling(**CONFIDENT, temperature=0.1)
    counter = Counter(model, monkeypatch)
    scores = score(model, ScoreRequest(text, ThoughtSampler(settings, generators(text), 2), 3, SharedPrefix(), 0.1))
    assert scores.thought_logps.requires_grad
    assert counter.tokens - text.input_ids.numel() >= scores.thoughts.mask[..., 0].numel() * settings.thought_length


def test_the_talk_after_thoughts_that_say_the_same_is_run_once(monkeypatch):
    """Where one pass samples and scores: the last token of a thought, its end and the talk."""
    model, text = exact_model(), mixed_text()
    sampler = ThoughtSampler(sampling(**CONFIDENT, temperature=0.02), generators(text, step=1), 2)
    runs = []
    for limit in (writing.JOINED_TEXT, 0):
        monkeypatch.setattr(writing, "JOINED_TEXT", limit)
        with monkeypatch.context() as patch, torch.no_grad():
            counter = Counter(model, patch)
            score(model, ScoreRequest(text, sampler, 3, SharedPrefix(), 0.02))
            runs.append(counter.tokens)
    # the start, 12 tokens, the end and two of the talk
    assert runs[1] == text.input_ids.numel() + 5 * 2 * 8 * (1 + 12 + 1 + 2)
    assert runs[0] < 0.4 * runs[1]


def test_slots_that_hold_nothing_are_not_run_after_thoughts(monkeypatch):
    """A thought that ended early has run its last token already, one that closed itself has no end, and talk ends with the text."""
    model, text = exact_model(), mixed_text()
    settings = sampling(**{**CONFIDENT, "stop": ends}, temperature=0.02)
    ran, grow = [], SharedPrefixCache.grow

    def watched(self, anchors, embeds, mask, keep=False):
        ran.append(((anchors.numel(), embeds.shape[2]), keep))
        return grow(self, anchors, embeds, mask, keep)

    monkeypatch.setattr(SharedPrefixCache, "grow", watched)
    sampler = ThoughtSampler(settings, generators(text, step=1), 2)
    with torch.no_grad():
        thoughts = score(model, ScoreRequest(text, sampler, 6, SharedPrefix(), 0.02)).thoughts
    shape = thoughts.mask.shape
    ids = thoughts.token_ids.masked_fill(~thoughts.mask, -1)
    talk = talk_after(text, thoughts.positions, 6).input_mask[..., 1:].sum(-1)
    # the end; and the last token where there was no time to run it
    slots = talk[..., None] + 1 + thoughts.mask[..., -1].long()
    said = {
        (row, place, *ids[row, place, g].tolist()): int(slots[row, place, g])
        for row, place, g in torch.ones(shape[:3]).nonzero().tolist()
    }
    after = [size for size, keep in ran if not keep]
    assert sum(branches for branches, _ in after) == len(said)
    assert sum(branches * width for branches, width in after) < 1.5 * sum(said.values()) < 0.5 * 7 * slots.numel()
