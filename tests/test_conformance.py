"""A representative dozen of the families in `docs/models.md`, through every step of the conformance suite."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .conformance import DOZEN, EXCEPTIONS, REASONS, Row, examine, table, tiny_config, tiny_model


MASKED = ("llama4_text",)
REPLAYED = ("bloom", "mamba", "gpt_neo", "qwen3_next")


# one of each kind: rotary, learned and no positions, windows, experts, biases of attention, states, a mask of its own
FEW = ("llama", "gemma3_text", "gpt2", "gpt_oss", "bloom", "mamba", "qwen3_next", "llama4_text")


@pytest.mark.parametrize(
    "model_type", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in DOZEN]
)
def test_a_family_passes_every_step(model_type, tmp_path):
    """Start-up check, training, reload, plain load and LoRA; on the path the architecture allows, exactly."""
    row = examine(model_type, tmp_path)
    assert not row.failed, (row.failed, row.note)
    path = "shared prefix (mask)" if model_type in MASKED else "shared prefix"
    assert row.path == ("cached replay" if model_type in REPLAYED else path)
    assert row.difference < 1e-4


def test_exceptions_are_for_types_that_exist():
    assert set(EXCEPTIONS) | set(REASONS) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_models_are_tiny_and_their_attention_matters():
    """The check would not see a wrong mask on a model that hardly attends: here an earlier token changes much."""
    for model_type in ("llama", "gpt2", "gemma3_text"):
        model = tiny_model(model_type)
        assert sum(p.numel() for p in model.parameters()) < 1e6
        assert tiny_config(model_type).num_hidden_layers == 2
        ids = torch.arange(1, 9)[None].repeat(2, 1)
        ids[1, 0] = 99
        with torch.no_grad():
            logps = model(input_ids=ids).logits[:, 4].log_softmax(-1)
        assert (logps[0] - logps[1]).abs().max() > 1e-2


def test_a_refused_type_is_a_row_with_its_reason(tmp_path):
    """XLNet reads in any order; the table says at which step it failed and why."""
    row = examine("xlnet", tmp_path)
    assert row.failed == "check" and "both directions" in row.note
    text = table([row, Row("llama", "shared prefix", 1e-7, note="LlamaForCausalLM")])
    assert "Of 2 model types 1 pass every step, 1 of them on the shared prefix and 0 by cached replay." in text
    assert "| xlnet |" in text and "**check**" in text
