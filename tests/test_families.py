"""One engine for every family: the start-up check's verdict, and the family's own logits, on two dozen architectures."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.text.batch import Positions, Text
from trl_quietstar.thinking.check import choose_path, path_difference
from trl_quietstar.thinking.drawing import SamplingSettings
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import VOCAB, mixed_text, sampling, think


SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4)
FAMILIES = {
    "biogpt": {},
    "codegen": GPT,
    "cohere": dict(logit_scale=0.3),
    "cohere2": dict(logit_scale=0.3, sliding_window=6, head_dim=8),
    "exaone4": dict(sliding_window=6, head_dim=8),
    "falcon": {},
    "gemma": dict(head_dim=8),
    "gemma2": dict(sliding_window=6, query_pre_attn_scalar=8, head_dim=8),
    "gemma3_text": dict(sliding_window=6, query_pre_attn_scalar=8, head_dim=8),
    "glm4": dict(head_dim=8),
    "gpt_neox": {},
    "gptj": GPT,
    "granite": dict(logits_scaling=2.0, embedding_multiplier=3.0),
    "helium": dict(head_dim=8),
    "hyperclovax": dict(head_dim=8),
    "mixtral": dict(num_local_experts=4),
    "nemotron": {},
    "olmo2": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16),
    "phi": {},
    "phi3": dict(sliding_window=6),
    "smollm3": {},
    "stablelm": {},
    "starcoder2": dict(sliding_window=6),
    "xglm": dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
}


def family(name: str):
    """A tiny model of a family, peaked, with open heads."""
    torch.manual_seed(0)
    model = QuietStarForCausalLM.from_config(CONFIG_MAPPING[name](**{**SHAPE, **FAMILIES[name]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        model.quietstar.start_embedding.normal_(std=0.3)
        model.quietstar.end_embedding.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_path_is_exact(name):
    """Sampling and scoring by shared prefix agree with ordinary forwards, and either with the model's own logits."""
    model = family(name)
    assert isinstance(choose_path(model), (SharedPrefix, MaskedPrefix))
    assert path_difference(model, Replay()) < 1e-5


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite", "hyperclovax", "opt"])
def test_thoughts_are_scored_by_the_familys_own_logits(name):
    """Logit scales and soft-caps apply to thoughts and talk as in the family's forward."""
    model, text, M = family(name), mixed_text(), 3
    thoughts = think(model, text, Replay(), settings=sampling(min_thought_length=None, stop=None))
    embed, heads, at = model.get_input_embeddings(), model.quietstar, 5
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, thoughts, M, SharedPrefix(), 0.7, "thought"))
        tokens, spoken = thoughts.token_ids[0, at, 1], text.input_ids[0, at + 1 : at + 1 + M]
        row = [embed(text.input_ids[0, : at + 1]), heads.start_embedding[None], embed(tokens)]
        row += [heads.end_embedding[None], embed(spoken[:-1])]
        logits = model(inputs_embeds=torch.cat(row)[None]).logits[0, at + 1 :]
    drawn = (logits[: len(tokens)] / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    said = logits[len(tokens) + 1 :].log_softmax(-1).gather(1, spoken[:, None])[:, 0]
    torch.testing.assert_close(scores.thought_logps[0, at, 1], drawn, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.talk_logps[0, at, 1], said, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite"])
def test_thoughts_are_drawn_by_the_familys_own_logits(name):
    """They apply to sampling as well: tokens come as often as the family's forward says."""
    model, ids = family(name), torch.tensor([3, 1, 5])
    text = Text.from_batch(ids.repeat(100, 1))
    positions = Positions(torch.ones(100, 1, dtype=torch.long), torch.ones(100, 1, dtype=torch.bool))
    drawn = think(model, text, positions=positions, settings=SamplingSettings(1, num_thoughts=100)).token_ids
    row = torch.cat([model.get_input_embeddings()(ids[:2]), model.quietstar.start_embedding[None]])
    with torch.no_grad():
        expected = model(inputs_embeds=row[None]).logits[0, -1].softmax(-1) * drawn.numel()
    likely = expected > 5
    counts = torch.bincount(drawn.flatten(), minlength=VOCAB)
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum())
    assert freedom > 20 and statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite"])
def test_the_logit_transform_matters_here(name):
    """The families above do transform their logits, so the comparison says something."""
    model = family(name)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.arange(9)[None]).last_hidden_state
        plain = model.get_output_embeddings()(hidden).log_softmax(-1)
        own = model(input_ids=torch.arange(9)[None]).logits.log_softmax(-1)
    assert (plain - own).abs().max() > 1e-2
