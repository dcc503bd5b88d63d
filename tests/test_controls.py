"""Causal controls: each changes what it says, and nothing else."""

import pytest
import torch

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.evaluation.controls import CONTROLS, controlled
from trl_quietstar.text.batch import Thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import VOCAB, exact_model, mixed_text, think


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def thoughts() -> Thoughts:
    """Two thoughts at every position of a batch with padding and packed documents; some end early."""
    return think(exact_model(), mixed_text())


def groups(thoughts: Thoughts) -> list[tuple]:
    """The thoughts of each position that exists, tokens and mask, in order."""
    places = thoughts.positions.mask
    pairs = zip(thoughts.token_ids[places].tolist(), thoughts.mask[places].tolist(), strict=True)
    return [(str(tokens), str(mask)) for tokens, mask in pairs]


def test_the_real_thoughts_are_left_alone(thoughts):
    """`"real"` is what the others are compared with."""
    assert controlled(thoughts, "real", VOCAB, generator()) is thoughts


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_leave_what_they_are_given(control, thoughts):
    """The thoughts handed in, and where they stand, do not change."""
    tokens, mask = thoughts.token_ids.clone(), thoughts.mask.clone()
    result = controlled(thoughts, control, VOCAB, generator())
    assert torch.equal(thoughts.token_ids, tokens) and torch.equal(thoughts.mask, mask)
    assert result.positions is thoughts.positions
    assert not result.mask[~thoughts.positions.mask].any()


def test_shuffled_thoughts_come_from_elsewhere(thoughts):
    """Every position gets another position's thoughts, each used once, with their lengths."""
    shuffled = controlled(thoughts, "shuffled", VOCAB, generator())
    before, after = groups(thoughts), groups(shuffled)
    assert sorted(before) == sorted(after)
    moved = [a != b for a, b in zip(before, after, strict=True)]
    assert sum(moved) >= len(moved) - 1  # two positions may have thought the same


def test_a_single_thought_has_no_other_place():
    """With one position there is nothing to swap with; the thought stays."""
    text = mixed_text()
    everywhere = think(exact_model(), text)
    mask = torch.zeros_like(everywhere.positions.mask)
    mask[0, 3] = True
    alone = Thoughts(
        type(everywhere.positions)(everywhere.positions.index, mask), everywhere.token_ids, everywhere.mask
    )
    assert groups(controlled(alone, "shuffled", VOCAB, generator())) == groups(alone)


def test_random_thoughts_are_uniform(thoughts):
    """Any token of the vocabulary, as long as the thought was, reproducible by its generator."""
    first, again, other = (controlled(thoughts, "random", VOCAB, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.token_ids, again.token_ids) and not torch.equal(first.token_ids, other.token_ids)
    assert torch.equal(first.mask, thoughts.mask)
    assert 0 <= first.token_ids.min() and first.token_ids.max() < VOCAB
    assert first.token_ids.unique().numel() > 0.9 * VOCAB


def test_truncated_thoughts_are_half_as_long(thoughts):
    """The first half of each thought's own tokens, rounded up."""
    truncated = controlled(thoughts, "truncated", VOCAB, generator())
    lengths = thoughts.mask.sum(-1)
    assert torch.equal(truncated.mask.sum(-1), (lengths + 1) // 2)
    assert torch.equal(truncated.token_ids, thoughts.token_ids)
    assert (truncated.mask <= thoughts.mask).all()
    assert set(lengths.unique().tolist()) >= {0, 2, 3, 4}


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()])
def test_filler_is_the_start_embedding_repeated(path, thoughts):
    """Compute without content: what is read is the start embedding in every slot, done by hand."""
    model, text, M, at = exact_model(), mixed_text(), 3, 4
    filler = controlled(thoughts, "filler", VOCAB, generator())
    embed, heads = model.get_input_embeddings(), model.quietstar
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, filler, M, path, prediction="thought"))
        length = int(thoughts.mask[0, at, 0].sum())
        spoken = text.input_ids[0, at + 1 : at + 1 + M]
        slots = heads.start_embedding.expand(length + 1, -1)
        row = [embed(text.input_ids[0, : at + 1]), slots, heads.end_embedding[None], embed(spoken[:-1])]
        logits = model.lm_head(model.base_model(inputs_embeds=torch.cat(row)[None]).last_hidden_state[0])
    said = logits[at + 1 + length + 1 :].log_softmax(-1).gather(1, spoken[:, None])[:, 0]
    torch.testing.assert_close(scores.talk_logps[0, at, 0], said, rtol=0, atol=1e-9)


@pytest.mark.parametrize("control", CONTROLS[1:])
def test_controls_change_the_talk_and_not_the_text(control, thoughts):
    """After a control the talk is predicted otherwise; the text without thoughts is predicted as before."""
    model, text = exact_model(), mixed_text()
    changed = controlled(thoughts, control, VOCAB, generator())
    with torch.no_grad():
        real, other = (score(model, ScoreRequest(text, t, 3, SharedPrefix())) for t in (thoughts, changed))
    assert torch.equal(real.text_logps, other.text_logps)
    assert (real.talk_logps - other.talk_logps).abs().max() > 1e-2


def test_an_unknown_control_is_refused(thoughts):
    """The error lists the controls there are."""
    with pytest.raises(ValueError, match=r"'placebo'.*real, shuffled, random, filler, truncated"):
        controlled(thoughts, "placebo", VOCAB, generator())
