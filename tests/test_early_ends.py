"""Thoughts that end early: they are the beginnings of longer ones, and the model does not run on for them."""

import pytest
import torch

from trl_quietstar.branches.cached_replay import CachedReplay
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.text.batch import Positions, Thoughts
from trl_quietstar.thinking.sampling import ThoughtSampler
from trl_quietstar.thinking.scoring import ScoreRequest, score, score_thoughts

from .agreement import Counter
from .tiny import exact_model, generators, mixed_text, positions_of, sampling, think, tiny_model


PATHS = {"attention": SharedPrefix(), "mask": MaskedPrefix(), "replay": Replay(), "cache": CachedReplay()}
LENGTH = 24


def ends(token_ids: torch.Tensor) -> torch.Tensor:
    """At one token in five or so."""
    return token_ids[:, -1] % 5 == 0


@pytest.mark.parametrize("rows", [slice(0, 5), slice(2, 3)], ids=["five texts", "one"])
@pytest.mark.parametrize("name", PATHS)
def test_an_early_end_only_cuts(name, rows):
    """A thought that ends is what it would have been, up to there, had none of them ended: the same tokens by the same seeds
    whoever is left to be written beside it."""
    model, whole_text = exact_model("mistral-window" if name != "cache" else "llama"), mixed_text()
    text = whole_text.rows(torch.arange(5)[rows])
    options = dict(thought_length=LENGTH, min_thought_length=3, temperature=3.0)
    short, whole = (think(model, text, PATHS[name], settings=sampling(**options, stop=stop)) for stop in (ends, None))
    ended = whole.token_ids % 5 == 0
    ended[..., :2] = False  # of fewer tokens none ends
    mask = whole.mask & (ended.long().cumsum(-1) - ended.long() == 0)
    assert torch.equal(short.mask, mask)
    assert torch.equal(short.token_ids, whole.token_ids * mask)
    lengths = mask.sum(-1)[short.positions.mask]
    assert lengths.min() == 3 and lengths.max() > 1.5 * lengths.float().mean()


def test_what_has_ended_is_not_run_on(monkeypatch):
    """Lengths with a mean of an eighth of the longest cost at most twice the tokens that there are."""
    model, text = tiny_model(max_position_embeddings=512), mixed_text()
    settings = sampling(
        thought_length=256, min_thought_length=1, temperature=9.0, stop=lambda ids: ids[:, -1] % 32 == 1
    )
    for path, read in ((SharedPrefix(), text.input_ids.numel()), (MaskedPrefix(), text.input_ids.numel())):
        counter = Counter(model, monkeypatch)
        thoughts = think(model, text, path, settings=settings)
        existing = int(thoughts.mask.sum())
        assert 20 < existing / int(thoughts.positions.mask.sum() * 2) < 45 and bool(thoughts.mask[..., 80].any())
        assert existing < counter.tokens - read <= 2 * existing
        monkeypatch.undo()


def test_one_text_of_many_is_run_alone(monkeypatch):
    """The keys and values of texts whose thoughts have all ended are left out too."""
    model, text = tiny_model(), mixed_text()
    positions = positions_of(text, 1)
    settings = sampling(thought_length=40, num_thoughts=1, min_thought_length=1, temperature=9.0, stop=ends)
    counter = Counter(model, monkeypatch)
    thoughts = think(model, text, SharedPrefix(), positions, settings, seed=6)
    existing = int(thoughts.mask.sum())
    lengths = thoughts.mask.sum((1, 2, 3))
    assert lengths.max() > 1.9 * lengths.float().mean()
    assert counter.tokens - text.input_ids.numel() <= 2 * existing


def test_sampling_in_the_graph_is_scoring(monkeypatch):
    """One pass leaves out what has ended too; scores and gradients are those of two passes."""
    model, text = exact_model(), mixed_text()
    settings = sampling(thought_length=LENGTH, min_thought_length=2, temperature=2.0, stop=ends)

    def scored(thoughts):
        model.zero_grad()
        scores = score(model, ScoreRequest(text, thoughts, 3, SharedPrefix(), 2.0))
        fields = ("thought_logps", "thought_entropies", "thought_values", "talk_logps", "text_logps", "similarity")
        sum((getattr(scores, name).sin().sum() for name in fields), torch.zeros(())).backward()
        return scores, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    counter = Counter(model, monkeypatch)
    one, gradients = scored(ThoughtSampler(settings, generators(text, step=1), "all"))
    existing, slots = int(one.thoughts.mask.sum()), one.thoughts.mask[..., 0].numel()
    # end and talk are run for all, as is the last token of a thought
    assert counter.tokens - text.input_ids.numel() <= 2 * existing + slots * 4
    two, expected = scored(one.thoughts)
    for name in ("thought_logps", "thought_entropies", "thought_values", "talk_logps", "similarity"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-9, rtol=0)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize(("name", "size"), [("attention", None), ("attention", 3), ("replay", None)])
def test_scoring_runs_no_slots_that_no_thought_has(name, size, monkeypatch):
    """Long and short thoughts are scored apart: numbers and gradients are those of each thought alone."""
    model, text, path = exact_model(), mixed_text(), PATHS[name]
    options = dict(thought_length=80, min_thought_length=1, temperature=9.0)
    settings = sampling(**options, stop=lambda ids: ids[:, -1] % 9 == 0)
    thoughts = think(model, text, positions=positions_of(text, 0.4), settings=settings)
    fields = ("thought_logps", "thought_values", "talk_logps", "similarity")

    def scored(thoughts):
        scores = score(model, ScoreRequest(text, thoughts, 3, path, branch_batch_size=size))
        both = (score_thoughts(model, text, thoughts, path, start=start).thought_logps for start in (True, False))
        found = {field: getattr(scores, field) for field in fields} | dict(
            zip(("reference", "plain"), both, strict=True)
        )
        sum((values.sin().sum() for values in found.values()), torch.zeros(())).backward()
        return found

    def gradients():
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    counter = Counter(model, monkeypatch)
    ours, ours_gradients = scored(thoughts), gradients()
    (B, J, G, L), tokens = thoughts.mask.shape, counter.tokens
    assert tokens < 0.8 * (B * J * G * (L + 4 + 2 * L) + 3 * text.input_ids.numel())
    for j in range(J):
        for g in range(G):
            places = Positions(thoughts.positions.index[:, j : j + 1], thoughts.positions.mask[:, j : j + 1])
            at = (slice(None), slice(j, j + 1), slice(g, g + 1))
            for field, values in scored(Thoughts(places, thoughts.token_ids[at], thoughts.mask[at])).items():
                torch.testing.assert_close(ours[field][at], values, atol=1e-9, rtol=0, msg=field)
    for parameter, gradient in gradients().items():
        torch.testing.assert_close(ours_gradients[parameter], gradient, atol=1e-8, rtol=1e-8, msg=parameter)
