"""Where thoughts are written, what is read after them, and how their tokens are drawn."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.text.batch import Positions, Text, Thoughts, talk_after
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.drawing import SamplingSettings, thought_end, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score

from .tiny import byte_tokenizer, every_fourth, exact_model, generators, mixed_text, sampling, think


@st.composite
def packed_texts(draw) -> Text:
    """Rows of random documents with masked labels, padded on either side; some rows hold nothing usable."""
    length, rows = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100_000)))
    ids = torch.randint(50, (rows, length), generator=generator)
    mask, position_ids = torch.ones_like(ids), torch.zeros_like(ids)
    for row in range(rows):
        left, right = draw(st.integers(0, length // 2)), draw(st.integers(0, length // 2))
        mask[row, :left] = 0
        mask[row, length - right :] = 0
        starts = torch.rand(length, generator=generator) < 0.3
        at = 0
        for t in range(left, length - right):
            at = 0 if starts[t] and t > left else at
            position_ids[row, t] = at
            at += 1
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return Text.from_batch(ids, mask, labels, position_ids)


def usable_places(text: Text, row: int) -> list[int]:
    """The definition: text whose next token is text of the same document, and a label."""
    return [
        t
        for t in range(text.input_ids.shape[1] - 1)
        if text.attention_mask[row, t]
        and text.attention_mask[row, t + 1]
        and text.position_ids[row, t + 1] == text.position_ids[row, t] + 1
        and text.labels[row, t + 1] != -100
    ]


def chosen_places(positions: Positions) -> list[list[int]]:
    """Indices by row; also checks the form: chosen ones first, in ascending order, and no wider than needed."""
    rows = []
    for index, mask in zip(positions.index.tolist(), positions.mask.tolist(), strict=True):
        count = sum(mask)
        assert mask == [True] * count + [False] * (len(mask) - count)
        assert index[:count] == sorted(set(index[:count]))
        rows.append(index[:count])
    assert positions.mask.shape[1] == max(1, *(len(row) for row in rows))
    return rows


@given(packed_texts())
def test_all_positions_are_the_usable_ones(text):
    """Never on padding, before a masked token, or at a document's end; everywhere else."""
    rows = chosen_places(choose_positions(text, "all", generators(text)))
    assert rows == [usable_places(text, row) for row in range(len(rows))]


@given(packed_texts(), st.integers(1, 8), st.integers(0, 100))
def test_a_number_of_positions(text, count, seed):
    """So many usable places in each row, or all of them where there are fewer."""
    for row, places in enumerate(chosen_places(choose_positions(text, count, generators(text, seed)))):
        usable = usable_places(text, row)
        assert set(places) <= set(usable) and len(places) == min(count, len(usable))


@given(packed_texts(), st.floats(0.01, 1), st.integers(0, 100))
def test_a_fraction_of_positions(text, fraction, seed):
    """The rounded share of the usable places, and at least one where there is any."""
    for row, places in enumerate(chosen_places(choose_positions(text, fraction, generators(text, seed)))):
        usable = usable_places(text, row)
        assert set(places) <= set(usable)
        assert len(places) == (max(round(fraction * len(usable)), 1) if usable else 0)


@given(packed_texts(), st.floats(0, 1), st.integers(1, 5), st.integers(0, 100))
def test_difficult_positions(text, threshold, interval, seed):
    """From the left: every usable place that reaches the threshold and is far enough from the one before."""
    entropy = torch.rand(text.input_ids[:, 1:].shape, generator=torch.Generator().manual_seed(seed))
    rows = chosen_places(choose_positions(text, "difficulty", generators(text), lambda: entropy, threshold, interval))
    for row, places in enumerate(rows):
        expected = []
        for t in usable_places(text, row):
            if entropy[row, t] >= threshold and (not expected or t - expected[-1] >= interval):
                expected.append(t)
        assert places == expected


def test_every_place_is_drawn_equally_often():
    """Random positions favour no place."""
    text = Text.from_batch(torch.zeros(4000, 9, dtype=torch.long))
    places = torch.tensor(chosen_places(choose_positions(text, 2, generators(text))))
    counts = torch.bincount(places.flatten(), minlength=8).double()
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


def test_steps_draw_different_positions():
    """A new step thinks elsewhere; the same step, again, does not."""
    text = mixed_text()
    first, again, next_ = (choose_positions(text, 3, generators(text, 0, step)) for step in (0, 0, 1))
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.index, next_.index)


@given(packed_texts(), st.integers(1, 5))
def test_talk_is_what_follows_in_the_document(text, M):
    """The next true tokens of the same document; targets are those of them that are labels."""
    positions = choose_positions(text, "all", generators(text))
    talk = talk_after(text, positions, M)
    for b, j in positions.mask.nonzero().tolist():
        at = int(positions.index[b, j])
        for m in range(M):
            t = at + 1 + m
            inside = t < text.input_ids.shape[1] and bool(text.document_ids[b, t] == text.document_ids[b, at])
            assert bool(talk.input_mask[b, j, m]) == inside
            assert bool(talk.target_mask[b, j, m]) == (inside and bool(text.labels[b, t] != -100))
            if inside:
                assert talk.token_ids[b, j, m] == text.input_ids[b, t]
    assert not talk.input_mask[~positions.mask].any()


@given(packed_texts(), st.integers(1, 5))
def test_the_texts_own_predictions_line_up_with_the_talk(text, M):
    """What the text says of a talk token without a thought is found at that very token."""
    positions = choose_positions(text, "all", generators(text))
    tokens = torch.zeros(*positions.index.shape, 1, 1, dtype=torch.long)
    thoughts = Thoughts(positions, tokens, tokens.bool())
    talk = talk_after(text, positions, M)
    found = at_talk(text.input_ids[:, 1:], thoughts, M)
    assert found.shape == (*positions.index.shape, 1, M)
    assert torch.equal(found[:, :, 0][talk.input_mask], talk.token_ids[talk.input_mask])


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 1000))
def test_generators_depend_on_their_key_alone(seed, step, index):
    """The same seed, step and row give the same numbers; another one of the three gives others."""
    keys = [(seed, step, index), (seed, step, index), (seed + 1, step, index), (seed, step + 1, index)]
    keys.append((seed, step, index + 1))
    same, again, *others = (torch.rand(4, generator=seeded_generators(a, b, [c])[0]) for a, b, c in keys)
    assert torch.equal(same, again)
    assert len({tuple(draws.tolist()) for draws in (same, *others)}) == 4


def test_random_numbers_do_not_depend_on_the_batch():
    """A row's numbers are the same beside a row with more positions, which makes the tensor wider."""
    settings = SamplingSettings(3, num_thoughts=2)
    narrow = Positions(torch.arange(2)[None], torch.ones(1, 2, dtype=torch.bool))
    wide = Positions(torch.arange(5).repeat(2, 1), torch.tensor([[True] * 2 + [False] * 3, [True] * 5]))
    alone = uniforms(narrow, settings, seeded_generators(0, 0, [4]))
    beside = uniforms(wide, settings, seeded_generators(0, 0, [4, 5]))
    assert torch.equal(alone[0], beside[0, :2])
    drawn = beside[wide.mask]
    assert drawn.unique().numel() == drawn.numel() and 0 <= drawn.min() and drawn.max() < 1


# Drawing tokens


V = 7
ROWS, PER_ROW = 200, 100


@functools.cache
def small_vocabulary():
    return exact_model("llama", vocab_size=V)


def first_token_logits() -> torch.Tensor:
    """Logits of a thought's first token, done by hand: shape `(V,)`."""
    model = small_vocabulary()
    embeds = model.get_input_embeddings()(torch.tensor([3, 1, 5]))
    row = torch.cat([embeds, model.quietstar.start_embedding[None]])
    return model.lm_head(model.base_model(inputs_embeds=row[None]).last_hidden_state[0, -1]).detach()


def draw(L: int = 1, **settings) -> torch.Tensor:
    """20,000 thoughts at one place, of shape `(20000, L)`."""
    text = Text.from_batch(torch.tensor([[3, 1, 5, 0]]).repeat(ROWS, 1))
    positions = Positions(torch.full((ROWS, 1), 2), torch.ones(ROWS, 1, dtype=torch.bool))
    settings = SamplingSettings(L, num_thoughts=PER_ROW, **settings)
    return think(small_vocabulary(), text, positions=positions, settings=settings).token_ids.flatten(0, 2)


def chi_square(outcomes: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic, outcomes expected fewer than 5 times taken together."""
    counts = torch.bincount(outcomes, minlength=len(probabilities)).double()
    expected = probabilities * len(outcomes)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.8])
def test_frequencies_are_the_models(temperature):
    """Tokens come as often as the model's distribution at that temperature says, and no other."""
    tokens, logits = draw(temperature=temperature)[:, 0], first_token_logits()
    limit = 35  # 6 degrees of freedom: once in 200,000
    assert chi_square(tokens, torch.softmax(logits / temperature, -1)) < limit
    assert chi_square(tokens, torch.softmax(logits / (1.3 * temperature), -1)) > limit


def test_thoughts_come_as_often_as_scoring_says():
    """On-policy: a whole thought is drawn with the probability that its scored log-probabilities multiply to."""
    drawn = draw(L=2, temperature=0.7)
    every = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    text = Text.from_batch(torch.tensor([[3, 1, 5, 0]]))
    positions = Positions(torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.bool))
    thoughts = think(small_vocabulary(), text, positions=positions, settings=SamplingSettings(2, num_thoughts=V * V))
    thoughts.token_ids[0, 0] = every
    with torch.no_grad():
        scores = score(small_vocabulary(), ScoreRequest(text, thoughts, 1, SharedPrefix(), 0.7))
    probabilities = scores.thought_logps[0, 0].sum(-1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    assert chi_square(drawn[:, 0] * V + drawn[:, 1], probabilities) < 110  # 48 degrees of freedom at most


def allowed_by_hand(probabilities: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float | None = None):
    """The tokens a filter leaves, from its definition."""
    order = probabilities.argsort(descending=True).tolist()
    if top_k:
        return set(order[:top_k])
    if min_p is not None:
        return {t for t in order if probabilities[t] >= min_p * probabilities.max()}
    total, kept = 0.0, set()
    for token in order:
        kept.add(token)
        total += probabilities[token].item()
        if total >= top_p:
            return kept
    return kept


@pytest.mark.parametrize("filters", [dict(top_k=3), dict(top_p=0.6), dict(top_p=0.9), dict(min_p=0.3)])
def test_filters_leave_the_allowed_set_only(filters):
    """Top-k, top-p and min-p: nothing outside the set their definition allows, and the rest in proportion."""
    probabilities = torch.softmax(first_token_logits(), -1)
    tokens, allowed = draw(**filters)[:, 0], allowed_by_hand(probabilities, **filters)
    assert 1 < len(allowed) < V
    assert set(tokens.unique().tolist()) == allowed
    inside = torch.tensor([t in allowed for t in range(V)])
    kept = torch.where(inside, probabilities, 0.0)
    assert chi_square(tokens, kept / kept.sum()) < 35


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()])
def test_greedy_takes_the_most_likely(path):
    """Each token is the arg max of an ordinary forward over what came before; all thoughts of a place are equal."""
    model, text = exact_model(), mixed_text()
    thoughts = think(model, text, path, settings=sampling(do_sample=False, min_thought_length=None, stop=None))
    embed = model.get_input_embeddings()
    for row, j in ((0, 2), (0, 12), (1, 4)):
        at = int(thoughts.positions.index[row, j])
        tokens = thoughts.token_ids[row, j, 0]
        embeds = torch.cat(
            [embed(text.input_ids[row, : at + 1]), model.quietstar.start_embedding[None], embed(tokens[:-1])]
        )
        with torch.no_grad():
            hidden = model.base_model(inputs_embeds=embeds[None]).last_hidden_state[0, at + 1 :]
            assert torch.equal(model.lm_head(hidden).argmax(-1), tokens)
    assert torch.equal(thoughts.token_ids[:, :, 0], thoughts.token_ids[:, :, 1])


# The end of a thought


@pytest.mark.parametrize("least", [1, 2, 4])
def test_thoughts_end_where_told_but_not_before_their_least_length(least):
    """A thought keeps the token that ends it, and nothing after; earlier signs are not heeded."""
    model, text = exact_model(), mixed_text()
    thoughts = think(model, text, settings=sampling(min_thought_length=least, stop=every_fourth))
    for b, j, g in thoughts.positions.mask[..., None].expand(-1, -1, 2).nonzero().tolist():
        tokens = thoughts.token_ids[b, j, g].tolist()
        ends = [k + 1 for k in range(least - 1, 4) if tokens[k] % 4 == 0]
        length = ends[0] if ends else 4
        assert thoughts.mask[b, j, g].tolist() == [True] * length + [False] * (4 - length)
    assert not thoughts.mask[~thoughts.positions.mask].any()


def test_without_a_least_length_thoughts_are_whole():
    """`min_thought_length=None`: every thought has all its tokens."""
    thoughts = think(exact_model(), mixed_text(), settings=sampling(min_thought_length=None, stop=None))
    assert torch.equal(thoughts.mask, thoughts.positions.mask[:, :, None, None].expand_as(thoughts.mask))


def test_an_early_end_changes_no_other_thought():
    """Where one thought ends does not move the random numbers of the others."""
    model, text = exact_model(), mixed_text()
    whole = think(model, text, settings=sampling(min_thought_length=None, stop=None))
    ended = think(model, text)
    assert not ended.mask.equal(whole.mask)
    assert torch.equal(ended.token_ids[ended.mask], whole.token_ids[ended.mask])


def ids_of(tokenizer, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def test_the_eos_token_ends_a_thought():
    """The tokenizer's EOS ends a thought where it is the last token, not where it came before."""
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    ends = thought_end(tokenizer, None)
    assert ends(torch.tensor([[5, eos], [eos, 5], [5, 6]])).tolist() == [True, False, False]


@pytest.mark.parametrize("stop", [" .", "is 7", "plus"])
def test_a_stop_string_ends_a_thought(stop):
    """The string ends a thought however it falls into tokens; EOS does so still."""
    tokenizer = byte_tokenizer()
    ends = thought_end(tokenizer, stop)
    ids = ids_of(tokenizer, "3 plus 4 is 7 .")
    for n in range(1, len(ids) + 1):
        string = tokenizer.decode(ids[:n])
        assert ends(torch.tensor([ids[:n]])).tolist() == [string.endswith(stop)], string
    assert any(tokenizer.decode(ids[:n]).endswith(stop) for n in range(1, len(ids) + 1))
    assert ends(torch.tensor([[tokenizer.eos_token_id]])).tolist() == [True]


def test_a_tokenizer_without_eos_still_stops_at_the_string():
    """No EOS token is not an end at id 0."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert thought_end(tokenizer, None)(torch.tensor([[0], [5]])).tolist() == [False, False]


def test_sampling_leaves_no_graph():
    """Sampling runs without autograd, whatever the caller's mode."""
    model, text = exact_model(), mixed_text()
    cache = SharedPrefix().read(model, text)
    places = choose_positions(text, 2, generators(text))
    thoughts = sample_thoughts(model, cache, places, sampling(), uniforms(places, sampling(), generators(text)))
    assert not thoughts.token_ids.requires_grad
    assert torch.is_grad_enabled()


def test_top_p_is_the_same_under_full_determinism():
    """Which sums whole numbers, on devices where PyTorch refuses the sum of others."""

    class Elsewhere(torch.Tensor):
        """Scores as on another device."""

        device = torch.device("cuda")

    scores = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    for top_p in (1e-9, 0.3, 0.9, 0.999):
        (warper,) = SamplingSettings(3, top_p=top_p).warpers()
        expected = warper(None, scores)
        torch.use_deterministic_algorithms(True)
        try:
            found = warper(None, scores.as_subclass(Elsewhere))
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(found.as_subclass(torch.Tensor), expected)
