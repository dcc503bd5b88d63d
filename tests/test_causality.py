"""A thought, and every score, depends on its own past only: not on later text, padding, other rows or documents."""

import dataclasses

import pytest
import torch

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.model.lm_head import normalized_entropy
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import exact_model, mixed_text, positions_of, sampling, think


M = 3
PATHS = pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared_prefix", "replay"])
FIELDS = ("thought_logps", "thought_entropies", "thought_values", "talk_logps", "mixing_weights", "similarity")
AMOUNTS = pytest.mark.parametrize("amount", ["all", 5, 0.5, "difficulty"])


def roll_out(model, text: Text, path, amount="all", rows: list[int] | None = None):
    """Positions, thoughts and scores of a batch whose rows have the given numbers in the run."""
    rows = list(range(len(text.input_ids))) if rows is None else rows
    draws = seeded_generators(7, 0, rows)
    with torch.no_grad():
        hidden = path.read(model, text).text_hidden
        positions = choose_positions(
            text, amount, draws, lambda: normalized_entropy(model, hidden[:, :-1]), difficulty_threshold=0.5
        )
        thoughts = _think(model, text, path, positions, draws)
        return thoughts, score(model, ScoreRequest(text, thoughts, M, path))


def _think(model, text, path, positions, draws) -> Thoughts:
    """Thoughts of a path at the positions, by the random numbers of `draws`."""
    from trl_quietstar.thinking.drawing import uniforms
    from trl_quietstar.thinking.sampling import sample_thoughts

    return sample_thoughts(
        model, path.read(model, text), positions, sampling(), uniforms(positions, sampling(), draws)
    )


def of_row(thoughts: Thoughts, scores, row: int) -> dict[int, dict[str, torch.Tensor]]:
    """Everything about the thoughts of one row, by text index."""
    places = thoughts.positions.mask[row].nonzero().flatten().tolist()
    return {
        int(thoughts.positions.index[row, j]): {
            "mask": thoughts.mask[row, j],
            "token_ids": thoughts.token_ids[row, j] * thoughts.mask[row, j],
            **{name: getattr(scores, name)[row, j] for name in FIELDS},
        }
        for j in places
    }


def assert_same(ours: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> None:
    """Equal tokens, and scores that differ by rounding only."""
    assert ours.keys() == oracle.keys()
    for name, value in oracle.items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-11, msg=name)
        else:
            assert torch.equal(ours[name], value), name


def assert_same_row(ours, oracle, row: int, oracle_row: int, shift: int = 0, oracle_shift: int = 0) -> None:
    """The same thoughts at the same places, with the same scores; indices are counted from `shift`."""
    left = {at - shift: x for at, x in of_row(*ours, row).items()}
    right = {at - oracle_shift: x for at, x in of_row(*oracle, oracle_row).items()}
    assert left.keys() == right.keys() and left
    for at in right:
        assert_same(left[at], right[at])


def full_text(length: int = 14, rows: int = 2, seed: int = 0) -> Text:
    """Rows without padding."""
    return Text.from_batch(torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed)))


def with_token(text: Text, k: int) -> Text:
    """Another token at index `k` of every row."""
    ids = text.input_ids.clone()
    ids[:, k] = (ids[:, k] + 41) % 97
    return Text.from_batch(ids, text.attention_mask.long(), None, text.position_ids)


@PATHS
@AMOUNTS
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_a_later_token_changes_nothing_before_it(name, amount, path):
    """Thoughts, their places and all scores before index k are the same whatever the text says from k on."""
    model, text = exact_model(name), full_text()
    for k in (5, 9):
        before, after = (roll_out(model, t, path, amount) for t in (text, with_token(text, k)))
        for row in range(2):
            ours, oracle = of_row(*after, row), of_row(*before, row)
            earlier = [at for at in oracle if at < k]
            assert earlier and [at for at in ours if at < k] == earlier
            for at in earlier:
                unread = k - at - 1  # talk tokens before the changed one
                for name in ("talk_logps", "mixing_weights"):
                    ours[at][name], oracle[at][name] = ours[at][name][:, :unread], oracle[at][name][:, :unread]
                assert_same(ours[at], oracle[at])
        torch.testing.assert_close(
            after[1].text_logps[:, : k - 1], before[1].text_logps[:, : k - 1], rtol=0, atol=1e-11
        )


@PATHS
def test_a_token_changes_what_follows(path):
    """The check above can fail: what comes after the changed token does change."""
    model, text = exact_model(), full_text()
    before, after = (of_row(*roll_out(model, t, path), 0) for t in (text, with_token(text, 5)))
    assert not torch.equal(before[5]["token_ids"], after[5]["token_ids"])
    assert (before[4]["talk_logps"][:, 0] - after[4]["talk_logps"][:, 0]).abs().min() > 1e-3
    assert (before[4]["thought_logps"] == after[4]["thought_logps"]).all()


@PATHS
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_ids_on_padding_change_nothing(name, path):
    """What stands under the padding is never read."""
    model, text = exact_model(name), mixed_text()
    ids = torch.where(text.attention_mask, text.input_ids, (text.input_ids + 41) % 97)
    assert not torch.equal(ids, text.input_ids)
    ours, oracle = (roll_out(model, t, path) for t in (dataclasses.replace(text, input_ids=ids), text))
    for row in range(len(ids)):
        assert_same_row(ours, oracle, row, row)
    torch.testing.assert_close(ours[1].text_logps, oracle[1].text_logps, rtol=0, atol=1e-11)


def padded(text: Text, row: int, left: int, right: int) -> Text:
    """One row, alone, between padding."""
    ids = torch.nn.functional.pad(text.input_ids[row : row + 1], (left, right), value=3)
    mask = torch.nn.functional.pad(text.attention_mask[row : row + 1].long(), (left, right))
    return Text.from_batch(ids, mask)


@PATHS
@AMOUNTS
@pytest.mark.parametrize("left, right", [(0, 4), (0, 9), (4, 0), (3, 2)])
def test_padding_changes_nothing(left, right, amount, path):
    """More padding, or padding on the other side, gives the same thoughts at the same places and the same scores."""
    model, text = exact_model("qwen2-window"), full_text()
    ours = roll_out(model, padded(text, 0, left, right), path, amount)
    oracle = roll_out(model, padded(text, 0, 0, 0), path, amount)
    assert_same_row(ours, oracle, 0, 0, shift=left)
    plain = ours[1].text_logps[:, left : left + 13]
    torch.testing.assert_close(plain, oracle[1].text_logps, rtol=0, atol=1e-11)


@PATHS
@AMOUNTS
def test_other_rows_change_nothing(amount, path):
    """A row gives the same thoughts and scores in a batch as alone."""
    model, text = exact_model(), mixed_text()
    together = roll_out(model, text, path, amount)
    for row in range(len(text.input_ids)):
        fields = {f.name: getattr(text, f.name)[row : row + 1] for f in dataclasses.fields(Text)}
        alone = roll_out(model, Text(**fields), path, amount, rows=[row])
        assert_same_row(alone, together, 0, row)
        torch.testing.assert_close(alone[1].text_logps[0], together[1].text_logps[row], rtol=0, atol=1e-11)


@PATHS
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_packed_documents_are_strangers(name, path):
    """A document scores the same packed among others as alone, with the same thoughts."""
    model, text, row = exact_model(name), mixed_text(), 3
    thoughts, scores = roll_out(model, text, path)
    for number in (1, 2, 3):
        inside = text.document_ids[row] == number
        start, length = int(inside.nonzero()[0]), int(inside.sum())
        document = Text.from_batch(text.input_ids[row : row + 1, inside])
        own = (thoughts.positions.index[row] >= start) & (thoughts.positions.index[row] < start + length)
        own &= thoughts.positions.mask[row]
        positions = Positions(thoughts.positions.index[row : row + 1, own] - start, torch.ones(1, length - 1).bool())
        given = Thoughts(positions, thoughts.token_ids[row : row + 1, own], thoughts.mask[row : row + 1, own])
        with torch.no_grad():
            alone = score(model, ScoreRequest(document, given, M, path))
        for name in FIELDS:
            whole = getattr(scores, name)[row, own]
            torch.testing.assert_close(getattr(alone, name)[0], whole, rtol=0, atol=1e-11, msg=name)
        inside_logps = scores.text_logps[row, start : start + length - 1]
        torch.testing.assert_close(alone.text_logps[0], inside_logps, rtol=0, atol=1e-11)


@PATHS
def test_another_document_changes_no_thought(path):
    """Thoughts of a packed document are the same whatever its neighbours say."""
    model, text, row = exact_model(), mixed_text(), 3
    others = torch.where(text.document_ids == 2, text.input_ids, (text.input_ids + 41) % 97)
    changed = dataclasses.replace(text, input_ids=others)
    ours, oracle = (of_row(*roll_out(model, t, path), row) for t in (changed, text))
    assert [at for at in oracle if 5 <= at < 7] == [5, 6]
    for at in (5, 6):
        assert_same(ours[at], oracle[at])
    assert not torch.equal(ours[0]["token_ids"], oracle[0]["token_ids"])


def test_sampling_with_a_path_reads_no_thought_of_another_branch():
    """Two thoughts at one position share no token: swapping the random numbers of one leaves the other as it was."""
    model, text = exact_model(), full_text(rows=1)
    positions = positions_of(text)
    two = think(model, text, positions=positions, settings=sampling(num_thoughts=2))
    changed = two.token_ids.clone()
    changed[:, :, 1] = (changed[:, :, 1] + 5) % 97
    other = Thoughts(positions, changed, two.mask)
    with torch.no_grad():
        ours, oracle = (score(model, ScoreRequest(text, t, M, SharedPrefix())) for t in (other, two))
    torch.testing.assert_close(ours.talk_logps[:, :, 0], oracle.talk_logps[:, :, 0], rtol=0, atol=1e-11)
    assert (ours.talk_logps[:, :, 1] - oracle.talk_logps[:, :, 1]).abs().max() > 1e-3
