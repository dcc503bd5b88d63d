"""Replay that goes on from the family's own cache, against replay that runs everything again."""

from dataclasses import replace

import pytest
import torch

from trl_quietstar.branches.cached_replay import CachedReplay, States
from trl_quietstar.branches.replay import Replay
from trl_quietstar.thinking.check import TOLERANCES, choose_path, path_difference
from trl_quietstar.thinking.sampling import greedy_continuation

from .agreement import Counter
from .conformance import tiny_model
from .speaking import SETTINGS, generated, padded, prompts, thinking_model
from .tiny import mixed_text, positions_of, sampling, think


CHUNKED, BY_TOKEN = CachedReplay(), CachedReplay(by_token=True)
CONTINUED = ("mamba2", "qwen3_next", "lfm2", "bloom", "gpt_neo", "falcon_h1")
PATHS = {**dict.fromkeys(CONTINUED, CHUNKED), **dict.fromkeys(("mamba", "jamba"), BY_TOKEN)}


@pytest.mark.parametrize("name", PATHS)
def test_the_cache_is_chosen_where_it_is_exact(name):
    """The start-up check tries it on the model itself; a family that cannot continue by several tokens takes them singly."""
    path = choose_path(tiny_model(name))
    assert isinstance(path, CachedReplay) and path.by_token == PATHS[name].by_token


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "openai-gpt"])
def test_other_families_are_replayed(name):
    """A one-token step that is wrong in a batch, states that are kept elsewhere, no cache at all."""
    assert type(choose_path(tiny_model(name), "replay")) is Replay


@pytest.mark.parametrize("name", PATHS)
def test_thoughts_are_those_of_plain_replay(name):
    """Whatever the padding and packing, and wherever a thought ends."""
    model, text = tiny_model(name), mixed_text()
    for positions in (positions_of(text), positions_of(text, 0.4)):
        ours, oracle = (think(model, text, path, positions) for path in (PATHS[name], Replay()))
        assert torch.equal(ours.token_ids * ours.mask, oracle.token_ids * oracle.mask)
    assert path_difference(model, PATHS[name]) < TOLERANCES[torch.float32] / 10


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "bloom"])
def test_continuations_without_thoughts_are_those_of_plain_replay(name):
    """Branches that begin with a token rather than the start embedding."""
    model, text = tiny_model(name), mixed_text()
    positions = positions_of(text)
    ours, oracle = (
        greedy_continuation(model, path.read(model, text), positions, 4) for path in (PATHS[name], Replay())
    )
    assert torch.equal(ours[positions.mask], oracle[positions.mask])


@pytest.mark.parametrize("name", PATHS)
def test_a_thought_depends_on_earlier_tokens_only(name):
    """Of its own document: padding, later tokens and neighbours change nothing; the token before does."""
    model, text = tiny_model(name), mixed_text()
    positions, changed = positions_of(text), text.input_ids.clone()
    changed[~text.attention_mask] += 1
    changed[0, 8:] += 1
    changed[3, 5:8] += 1  # the second of three documents
    before, after = (
        think(model, t, PATHS[name], positions).token_ids for t in (text, replace(text, input_ids=changed % 97))
    )
    same = positions.mask & (text.input_ids.gather(1, positions.index) == changed.gather(1, positions.index) % 97)
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[positions.mask], after[positions.mask])


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "bloom"])
def test_sampling_reads_no_token_twice(name, monkeypatch):
    """Each document up to its last thought, and each thought token once."""
    model, text = tiny_model(name), mixed_text()
    positions, path = positions_of(text), PATHS[name]
    B, J = positions.index.shape
    counter = Counter(model, monkeypatch)
    think(model, text, path, positions, sampling(min_thought_length=None, stop=None))
    documents, longest = 7, int(text.position_ids.gather(1, positions.index).max()) + 1
    assert counter.tokens == documents * longest + B * J * 2 * 4
    assert counter.forwards == longest + 4


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "bloom"])
def test_generation_reads_no_token_twice(name, every, monkeypatch):
    """The prompt; then each token, its thought (start, L tokens, end), and the tokens that a thought serves."""
    model, new = thinking_model(name), 7
    inputs = padded(prompts(9, 9))
    assert isinstance(model.thought_path, CachedReplay)  # checked here, ahead of the count
    counter = Counter(model, monkeypatch)
    generated(model, inputs, new=new, think_every=every)
    thoughts = -(-new // every)
    steps = (new - 1) + thoughts * (SETTINGS.thought_length + 2) + (new - thoughts)
    assert counter.tokens == 2 * (9 + steps) and counter.forwards == 1 + steps


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "bloom", "falcon_h1", "gemma3_text"])
def test_copies_share_nothing(name):
    """Rows of unequal lengths go on, copied, joined and chosen, as each does alone; the original is left as it was."""
    model = tiny_model(name)
    embed = model.get_input_embeddings()
    rows = [embed(torch.randint(1, 300, (1, n), generator=torch.Generator().manual_seed(n))) for n in (9, 4, 7)]
    nexts = embed(torch.tensor([5, 6, 7]))
    with torch.no_grad():
        expected = torch.cat(
            [States(model).read(torch.cat([row, nexts[i, None, None]], 1))[:, -1] for i, row in enumerate(rows)]
        )
        alone = [States(model) for _ in rows]
        for states, row in zip(alone, rows, strict=True):
            states.read(row)
        joined = States.join(alone)
        order = torch.tensor([2, 0, 1, 2])
        for _ in range(2):
            chosen = joined.select(order)
            torch.testing.assert_close(chosen.step(nexts[order]), expected[order], rtol=1e-5, atol=1e-5)
        for i, states in enumerate(alone):
            torch.testing.assert_close(states.step(nexts[i, None]), expected[i, None], rtol=1e-5, atol=1e-5)


def test_the_check_sees_padding_that_is_wrong(monkeypatch):
    """Keys padded by what is read, or on the wrong side, are no rounding."""
    from trl_quietstar.branches import cached_replay

    model = tiny_model("falcon_h1")
    pad_left = cached_replay._pad_left
    for wrong in (lambda x, shape: pad_left(x.flip(2), shape).flip(2), lambda x, shape: pad_left(x, shape).roll(1, 2)):
        monkeypatch.setattr(cached_replay, "_pad_left", wrong)
        assert path_difference(model, CHUNKED) > 10 * TOLERANCES[torch.float32]
