"""Attention of branches against a dense softmax over everything, and which models take it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_quietstar.branches import attention as branch_attention
from trl_quietstar.branches import interface
from trl_quietstar.branches.attention import SeenText, _Attend, _Layout
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.thinking.sampling import ThoughtSampler
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .agreement import assert_paths_agree, assert_same_gradients, assert_same_scores, run
from .conformance import tiny_model as family_model
from .tiny import FAMILIES, exact_model, generators, mixed_text, sampling


B, HEADS, GROUPS, N, Q, T, D = 2, 2, 3, 7, 2, 9, 4
KINDS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "all": {"window": 4, "softcap": 0.5, "sinks": True},
}


def dense(query, text_key, text_value, own_key, own_value, sinks, first, last, slots, softcap):
    """The same by one softmax over all keys, with a mask."""
    keys = torch.cat([text_key[:, :, None].expand(-1, -1, N, -1, -1), own_key], dim=3)
    values = torch.cat([text_value[:, :, None].expand(-1, -1, N, -1, -1), own_value], dim=3)
    scores = query.unflatten(3, (GROUPS, Q)) @ keys[:, :, :, None].mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    index = torch.arange(T)
    seen = (index >= first[..., None]) & (index <= last[..., None, None])
    seen = torch.cat([seen.expand(-1, -1, Q, -1), slots], dim=3)
    scores = scores.masked_fill(~seen[:, None, :, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(HEADS, 1, GROUPS, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[3]]
    return (weights @ values[:, :, :, None]).flatten(3, 4)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_softmax_over_text_and_own_slots(kind, chunk):
    """Outputs and all gradients, whatever the chunk."""
    options = KINDS[kind]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    own = 3
    tensors = [random(B, HEADS, N, GROUPS * Q, D), random(B, HEADS, T, D), random(B, HEADS, T, D)]
    tensors += [random(B, HEADS, N, own, D), random(B, HEADS, N, own, D)]
    sinks = random(HEADS * GROUPS) if options.get("sinks") else None
    last = torch.randint(T, (B, N), generator=generator).sort(1).values
    first = torch.minimum(torch.randint(4, (B, N), generator=generator), last)[..., None]
    if "window" in options:
        first = torch.maximum(first, last[..., None] + torch.arange(1, Q + 1) - options["window"] + 1)
    slots = torch.rand(B, N, Q, own, generator=generator) < 0.6
    slots[..., -1] = True
    lows, highs = first.amin((0, 2)), last.amax(0)
    spans = [
        (int(a.min()), int(max(a.min(), b.max()))) for a, b in zip(lows.split(chunk), highs.split(chunk), strict=True)
    ]
    text = SeenText(first, last, [(min(low, T - 1), high) for low, high in spans], chunk)
    layout = _Layout(first, slots, text)
    ours = _Attend.apply(*tensors, sinks, layout, options.get("softcap"))
    oracle = dense(*tensors, sinks, first, last, slots, options.get("softcap"))
    torch.testing.assert_close(ours, oracle)
    wanted = [*tensors, *([sinks] if sinks is not None else [])]
    weight = torch.randn(oracle.shape, generator=generator, dtype=torch.float64)
    for mine, expected in zip(*(torch.autograd.grad((x * weight).sum(), wanted) for x in (ours, oracle)), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3_text", "gpt_oss", "mistral"])
def test_a_forward_without_branches_is_the_family_s_own(name):
    """To the last bit, padded or not; and taken back, nothing is left of it."""
    model = family_model(name)
    before = model.config._attn_implementation
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        own = [model(input_ids=ids, attention_mask=m).logits for m in (None, mask)]
        assert interface.enable(model) and model.config._attn_implementation != before
        assert all(
            torch.equal(x, model(input_ids=ids, attention_mask=m).logits)
            for x, m in zip(own, (None, mask), strict=True)
        )
    interface.disable(model)
    assert model.config._attn_implementation == before


def test_it_leaves_no_trace_on_disk(tmp_path):
    """A saved model loads with Transformers' own attention."""
    model = family_model("llama")
    interface.enable(model)
    model.save_pretrained(tmp_path)
    assert f"{interface.PREFIX}sdpa" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_in_the_graph_changes_nothing(name):
    """Thoughts drawn in the forward that is trained are those that replay draws; scores and gradients too are replay's."""
    model, text = exact_model(name), mixed_text()

    def sampler():
        return ThoughtSampler(sampling(temperature=0.8), generators(text, 5), 0.7)

    thoughts = sampler().sample(model, text, Replay())
    assert not thoughts.mask[thoughts.positions.mask].all(), "no thought ended early: the case is not covered"
    ours, our_gradients = run(model, text, sampler(), SharedPrefix())
    oracle, gradients = run(model, text, thoughts, Replay())
    assert torch.equal(ours.thoughts.token_ids * thoughts.mask, thoughts.token_ids * thoughts.mask)
    assert torch.equal(ours.thoughts.mask, thoughts.mask)
    assert_same_scores(ours, oracle)
    assert_same_gradients(our_gradients, gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_long_thoughts_attend_in_parts(name, monkeypatch):
    """However few of a branch's slots attend at once, scores and gradients are those of replay."""
    monkeypatch.setattr(branch_attention, "CHUNK_SLOTS", 3)
    assert_paths_agree(exact_model(name))


OTHERS = ["gemma3_text", "gemma2", "gpt_oss", "cohere", "granite", "deepseek_v3"]


@pytest.mark.parametrize("name, slots", [*((name, 256) for name in OTHERS), ("gemma2", 3), ("gpt_oss", 3)])
def test_other_families_too(name, slots, monkeypatch):
    """Windows, soft-caps, sinks, logit scales, scaled embeddings, latent keys: in one pass as by replay, gradients
    included; and where slots attend in parts."""
    monkeypatch.setattr(branch_attention, "CHUNK_SLOTS", slots)
    model, text = family_model(name).float(), mixed_text(300)
    model.config.output_router_logits = False

    def sampler():
        return ThoughtSampler(sampling(top_k=20), generators(text, 5), 0.7)

    thoughts = sampler().sample(model, text, Replay())
    results = []
    for drawn, path in ((sampler(), SharedPrefix()), (thoughts, Replay())):
        model.zero_grad()
        scores = score(model, ScoreRequest(text, drawn, 3, path))
        (scores.talk_logps.sum() - scores.thought_logps.sum() + scores.reader_logps.sum()).backward()
        results.append((scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (oracle, gradients) = results
    assert torch.equal(ours.thoughts.token_ids * thoughts.mask, thoughts.token_ids * thoughts.mask)
    assert_same_scores(ours, oracle, 1e-4)
    assert_same_gradients(our_gradients, gradients, 1e-3)


@pytest.mark.parametrize("graph", [False, True])
def test_a_slot_sees_its_window_of_its_branch(graph):
    """Slots that are added one by one see as many of those before them as the window holds, as by replay."""
    model, text = exact_model("mistral-window", sliding_window=3), mixed_text()
    anchors = torch.tensor([[4, 6, 5]]).expand(len(text.input_ids), -1)
    embeds = torch.randn(6, *anchors.shape, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.set_grad_enabled(graph):
        ours, oracle = (
            [cache.extend(anchors, slot) for slot in embeds]
            for cache in (path.read(model, text) for path in (SharedPrefix(), Replay()))
        )
    torch.testing.assert_close(ours, oracle, atol=1e-9, rtol=0)


def test_chunks_fill_the_device():
    """A CPU's fit its cache; another device gets as much as keeps it busy, whatever the number of branches."""
    sizes = [branch_attention.chunk_size(64, 1024, torch.device(kind)) for kind in ("cpu", "cuda")]
    assert sizes == [16, 1024] and branch_attention.chunk_size(2, 8, torch.device("cpu")) == 64


def test_masks_are_made_once_for_all_layers(monkeypatch):
    """And once more for layers with a window."""
    made = []
    chunks = branch_attention._Layout.chunks.func
    monkeypatch.setattr(branch_attention._Layout, "chunks", property(lambda self: made.append(self) or chunks(self)))
    for name, kinds in (("llama", 1), ("gemma2", 2)):
        model, made[:] = family_model(name), []
        with torch.no_grad():
            thoughts = ThoughtSampler(sampling(), generators(mixed_text(300)), 0.7).sample(
                model, mixed_text(300), SharedPrefix()
            )
        steps = thoughts.mask.shape[3]
        assert (len(set(map(id, made))), len(made)) == (kinds * steps, 2 * steps)
