"""What takes real weights or minutes: run by `make test-all`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.check import TOLERANCES, path_difference
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts

from .tiny import divergence_by_hand


DEMO = Path(__file__).parents[1] / ".demo"
SMOLLM = DEMO / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def smollm():
    """The model that `make demo-data` prepares, and its tokenizer."""
    if not (SMOLLM / "model.safetensors").is_file():
        pytest.skip("needs SmolLM2-135M: run `make demo-data`")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    model = QuietStarForCausalLM.from_pretrained(str(SMOLLM), dtype=torch.float32).eval()
    model.initialize_thought_embeddings(tokenizer)
    return model, tokenizer


@pytest.mark.real
def test_the_fast_path_is_exact_on_real_weights(smollm):
    """The start-up check finds rounding and nothing else."""
    assert path_difference(smollm[0], SharedPrefix()) < TOLERANCES[torch.float32]


@pytest.mark.real
@torch.no_grad()
def test_a_real_model_without_thoughts_is_its_base(smollm):
    """The very same logits."""
    model, tokenizer = smollm
    plain = AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32).eval()
    ids = tokenizer("A thought is a sentence that nobody hears.", return_tensors="pt")["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.real
@torch.no_grad()
def test_an_untrained_real_model_with_thoughts_stays_close(smollm):
    """Before training, its own thoughts move the prediction of real text by under 0.05 nats (KL) on average."""
    model, tokenizer = smollm
    row = json.loads((DEMO / "word_problems/test.jsonl").read_text().splitlines()[0])
    text = Text.from_batch(tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"][:, :96])
    generators = seeded_generators(0, 0, [0])
    positions, path = choose_positions(text, 12, generators), SharedPrefix()
    thoughts = sample_thoughts(
        model,
        path.read(model, text),
        positions,
        SamplingSettings(8),
        uniforms(positions, SamplingSettings(8), generators),
    )
    pairs = zip(positions.index[0].tolist(), thoughts.token_ids[0, :, 0], strict=True)
    divergences = torch.tensor([divergence_by_hand(model, text.input_ids[0, : j + 1], ids) for j, ids in pairs])
    assert 0 < divergences.mean() < 0.05


@pytest.mark.slow
def test_a_model_learns_to_think():
    """The learning benchmark: thoughts make the answers right, and nothing else in their place does."""
    from benchmarks.learning import TASKS, pretrain, run

    model = pretrain(TASKS["easy"], seed=0, steps=3_000)
    after = run(TASKS["easy"], model, seed=0, steps=300, options={})["after"]["accuracy"]
    assert after.pop("with") > 0.9
    assert max(after.values()) < 0.2
