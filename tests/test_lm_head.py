"""Token statistics tile by tile against the whole vocabulary at once, forward and backward."""

import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from trl_quietstar.model import tiles
from trl_quietstar.model.family import logit_transform
from trl_quietstar.model.lm_head import logits_by_rows, prediction_statistics, token_statistics
from trl_quietstar.thinking.drawing import BLOCK, SamplingSettings, _invert, draw_tokens, draw_with_statistics

from .tiny import Casts


V, H = 37, 6
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"final_logit_softcapping": 0.8},
    "all": {"bias": True, "logit_scale": 1.7, "final_logit_softcapping": 1.1},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, the last of which is narrower."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(tiles, "LEAST_WIDTH", 8)


def model_with(kind: str):
    """All that the statistics ask of a model: an LM head in float64, and a configuration."""
    options = dict(HEADS[kind])
    torch.manual_seed(0)
    head = torch.nn.Linear(H, V, bias=options.pop("bias", False), dtype=torch.float64)
    config = SimpleNamespace(model_type="test", **options)
    config.get_text_config = lambda: config
    return SimpleNamespace(get_output_embeddings=lambda: head, config=config)


def log_probs(model, hidden, temperature=1.0):
    """By the definition."""
    scale, softcap = logit_transform(model.config)
    logits = model.get_output_embeddings()(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same_gradients(ours, oracle, wanted):
    """Of two scalars with respect to tensors."""
    for mine, expected in zip(*(torch.autograd.grad(x, wanted) for x in (ours, oracle)), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
def test_statistics(kind, temperature):
    model, hidden = model_with(kind), random(3, 5, H)
    targets, mask = torch.randint(V, (3, 5)), torch.rand(3, 5) < 0.7
    found = token_statistics(model, hidden, targets, mask, temperature)
    expected = log_probs(model, hidden, temperature)
    logps = expected.gather(-1, targets[..., None])[..., 0] * mask
    entropies = -(expected.exp() * expected).sum(-1) * mask
    torch.testing.assert_close(found.logps, logps)
    torch.testing.assert_close(found.entropies, entropies)
    assert torch.equal(found.correct, (expected.argmax(-1) == targets) & mask)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    pair = ((weights[0] * a + weights[1] * b).sum() for a, b in ((found.logps, found.entropies), (logps, entropies)))
    assert_same_gradients(*pair, [hidden, *model.get_output_embeddings().parameters()])


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("kind", HEADS)
def test_suppressed_tokens_have_no_probability(kind, drawn):
    """As if their logits were minus infinity; where they fill a tile too, and where the targets were drawn from these states."""
    suppressed = (1, 9, *range(32, 37))
    model, hidden, mask = model_with(kind), random(3, 5, H), torch.ones(3, 5, dtype=torch.bool)
    settings, u = SamplingSettings(1, temperature=0.7, suppressed=suppressed), torch.rand(3, 5, dtype=torch.float64)
    known = draw_with_statistics(model, hidden.detach(), u, settings)
    assert torch.equal(known.token_ids, draw_tokens(model, hidden.detach(), u, settings))
    found = token_statistics(
        model, hidden, known.token_ids, mask, 0.7, known if drawn else None, suppressed=suppressed
    )
    logits = log_probs(model, hidden, 0.7).index_fill(-1, torch.tensor(suppressed), -torch.inf)
    expected = logits.log_softmax(-1)
    logps = expected.gather(-1, known.token_ids[..., None])[..., 0]
    entropies = -(expected.exp() * expected.masked_fill(expected.isinf(), 0)).sum(-1)
    torch.testing.assert_close(found.logps, logps)
    torch.testing.assert_close(found.entropies, entropies)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    pair = ((weights[0] * a + weights[1] * b).sum() for a, b in ((found.logps, found.entropies), (logps, entropies)))
    assert_same_gradients(*pair, [hidden, *model.get_output_embeddings().parameters()])


@pytest.mark.parametrize("kind", HEADS)
def test_mixed_predictions(kind):
    """Equal to mixing hidden states before the head, though the head is applied before."""
    model, text_hidden, read, weights = (
        model_with(kind),
        random(2, 5, H),
        random(2, 3, 2, H),
        torch.rand(2, 3, 2).double(),
    )
    weights.requires_grad_()
    text_targets, targets = torch.randint(V, (2, 5)), torch.randint(V, (2, 3, 2))
    text_mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    index = torch.tensor([[[0, 1], [3, 4], [0, 0]], [[1, 2], [3, 3], [2, 1]]])
    mask = torch.rand(2, 3, 2) < 0.8
    text, mixed, own = prediction_statistics(
        model, text_hidden, text_targets, text_mask, read, index, weights, targets, mask
    )
    base = torch.stack([hidden[i] for hidden, i in zip(text_hidden, index, strict=True)])
    states = (text_hidden, weights[..., None] * read + (1 - weights[..., None]) * base, read)
    wanted = []
    for state, target, where in zip(states, (text_targets, targets, targets), (text_mask, mask, mask), strict=True):
        expected = log_probs(model, state)
        wanted.append(
            (expected.gather(-1, target[..., None])[..., 0] * where, (expected.argmax(-1) == target) & where)
        )
    for found, (logps, correct) in ((text, wanted[0]), (mixed, wanted[1])):
        torch.testing.assert_close(found.logps, logps)
        assert torch.equal(found.correct, correct)
    torch.testing.assert_close(own, wanted[2][0])
    noise = [torch.randn(x.shape, dtype=torch.float64) for x, _ in wanted]
    ours = sum((a * n).sum() for a, n in zip((text.logps, mixed.logps, own), noise, strict=True))
    oracle = sum((a * n).sum() for (a, _), n in zip(wanted, noise, strict=True))
    assert_same_gradients(ours, oracle, [text_hidden, read, weights, *model.get_output_embeddings().parameters()])


def test_a_frozen_head_gets_no_gradient():
    """And none is computed for it."""
    model, hidden = model_with("plain"), random(4, H)
    model.get_output_embeddings().requires_grad_(False)
    token_statistics(model, hidden, torch.arange(4), torch.ones(4, dtype=torch.bool)).logps.sum().backward()
    assert hidden.grad is not None and model.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("size", [5, BLOCK, 3 * BLOCK, 2 * BLOCK + 17])
def test_a_token_is_drawn_where_the_cumulative_probability_passes_u(size):
    """As by one sum over the whole vocabulary; a token without probability never."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(200, size, generator=generator, dtype=torch.float64)
    probs[torch.rand(200, size, generator=generator) < 0.5] = 0
    probs[:, size // 2] += 1e-3
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    u[:3] = torch.tensor([0.0, 1 - 1e-16, 1 - 1e-9])
    drawn = _invert(probs, u[:, None])[:, 0]
    assert (probs.gather(1, drawn[:, None]) > 0).all()
    cumulative = probs.cumsum(-1)
    expected = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
    assert (drawn[3:] == expected[3:]).all()


def statistics_of(model, seed: int) -> torch.Tensor:
    """Log-probabilities of rows whose number and values depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(50 + seed, H, generator=generator, dtype=torch.float64)
    targets = torch.arange(50 + seed) % V
    return token_statistics(model, hidden, targets, torch.ones_like(targets, dtype=torch.bool)).logps


def test_threads_write_into_tiles_of_their_own():
    """As many at once as alone."""
    model = model_with("softcap")  # made here: its weights come from the random state that threads share
    run = torch.no_grad()(functools.partial(statistics_of, model))
    with ThreadPoolExecutor(4) as pool:
        expected = [run(seed) for seed in range(16)]
        for found, alone in zip(pool.map(run, range(16)), expected, strict=True):
            assert torch.equal(found, alone)


def test_a_tile_of_inference_mode_is_written_to_outside_of_it():
    """Whichever comes first, in a thread that has no tiles yet."""

    model = model_with("softcap")

    def first_in_inference_mode():
        with torch.inference_mode():
            inside = statistics_of(model, 900)
        return inside.clone(), statistics_of(model, 900)

    with ThreadPoolExecutor(1) as pool:
        inside, outside = pool.submit(first_in_inference_mode).result()
    assert torch.equal(inside, outside)


def test_the_head_is_cast_once_and_not_tile_by_tile():
    """Under autocast: once forward, once backward; the gradient is that of float32 as far as bf16 goes."""
    head, hidden = torch.nn.Linear(H, V, bias=False), torch.randn(9, H, requires_grad=True)
    config = SimpleNamespace(model_type="test")
    config.get_text_config = lambda: config
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=config)
    targets, mask = torch.arange(9), torch.ones(9, dtype=torch.bool)
    grads = []
    for enabled in (True, False):
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logps = token_statistics(model, hidden, targets, mask).logps
            grads.append(torch.autograd.grad(logps.sum(), [hidden, head.weight]))
        assert casts.shapes.count((V, H)) == (2 if enabled else 0)
        assert not any(len(shape) == 2 and shape[0] <= 8 and shape[1] == H for shape in casts.shapes)
    for low, full in zip(*grads, strict=True):
        torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [False, True])
def test_drawing_tokens_casts_the_head_once(bias):
    """Under autocast once for all rows; without it never, and states of another type than the head's are multiplied in theirs."""
    head, hidden = torch.nn.Linear(H, V, bias=bias), torch.randn(9, H)
    config = SimpleNamespace(model_type="test")
    config.get_text_config = lambda: config
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=config)
    expected = head(hidden)
    for enabled in (True, False):
        with torch.no_grad(), Casts() as casts, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = torch.cat([rows.clone() for _, rows in logits_by_rows(model, hidden)])
        assert casts.shapes.count((V, H)) == (1 if enabled else 0)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 if enabled else 1e-5)
    head.bfloat16()
    with torch.no_grad():
        logits = torch.cat([rows.clone() for _, rows in logits_by_rows(model, hidden)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


def test_tiles_fill_the_device():
    """A CPU's fit its cache; another device gets as much as keeps it busy."""
    sizes = [tiles.tile_elements(torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert sizes == [tiles.TILE_ELEMENTS, tiles.GPU_TILE_ELEMENTS, tiles.GPU_TILE_ELEMENTS]
