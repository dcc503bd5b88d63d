"""The thinking model is its base model, and others can read what it saves."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, T5Config

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.model.adapters import base_of, heads_aside
from trl_quietstar.model.heads import MixingHead
from trl_quietstar.modeling import attach_heads
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import (
    FAMILIES,
    byte_tokenizer,
    divergence_by_hand,
    exact_model,
    mixed_text,
    randomize,
    sampling,
    think,
    tiny_config,
    tiny_model,
)


IDS = torch.arange(24).view(2, 12)


def plain_model(name: str = "llama", **changes):
    """The family's own class with random, peaked weights."""
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32)
    randomize(model)
    return model.eval()


def scores_of(model) -> dict[str, torch.Tensor]:
    """Scores of fixed thoughts, which depend on every weight and head."""
    text = mixed_text()
    base = base_of(model).eval()
    thoughts = think(tiny_model(), text, settings=sampling(stop=None, min_thought_length=None))
    with torch.no_grad():
        scores = score(base, ScoreRequest(text, thoughts, 3, SharedPrefix()))
    return {name: values for name, values in scores._asdict().items() if isinstance(values, torch.Tensor)}


def assert_same_scores(ours, oracle, atol: float = 0.0) -> None:
    """Two models say the same of the same thoughts."""
    ours, oracle = scores_of(ours), scores_of(oracle)
    for name, value in oracle.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=name)


# Without thoughts


@pytest.mark.parametrize("name", FAMILIES)
def test_without_thoughts_it_is_the_base(name):
    """Logits, loss and generated tokens without thoughts are exactly the base model's."""
    plain = plain_model(name)
    model = attach_heads(copy.deepcopy(plain), QuietStarSettings()).eval()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.no_grad():
        for inputs in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask, "labels": IDS}):
            ours, oracle = model(**inputs), plain(**inputs)
            assert torch.equal(ours.logits, oracle.logits)
            assert ours.loss is None or torch.equal(ours.loss, oracle.loss)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(IDS, think="never", **options), plain.generate(IDS, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_untrained_thoughts_hardly_matter(name):
    """With fresh heads on a peaked base, any thought moves the prediction by under 0.05 nats on average, but by some."""
    tokenizer = byte_tokenizer()
    model = attach_heads(plain_model(name, vocab_size=len(tokenizer)), QuietStarSettings())
    model.initialize_thought_embeddings(tokenizer)
    drawn = torch.randint(len(tokenizer), (30, 12), generator=torch.Generator().manual_seed(0))
    divergences = torch.tensor([divergence_by_hand(model, row[:8], row[8:]) for row in drawn])
    assert 0 < divergences.mean() < 0.05


@pytest.mark.parametrize("std", [0.5, 3.0])
def test_a_nearly_closed_mixing_head_keeps_the_distribution(std):
    """KL(base || mixed) stays under 0.05 nats at the initial weight, for peaked predictions too."""
    base, thought = (torch.randn(200, 50, generator=torch.Generator().manual_seed(i)) * std for i in (0, 1))
    weight = MixingHead(8)(torch.randn(200, 8), torch.randn(200, 8))[:, None].detach()
    mixed = (weight * thought + (1 - weight) * base).log_softmax(-1)
    kl = (base.log_softmax(-1).exp() * (base.log_softmax(-1) - mixed)).sum(-1)
    assert weight.min() == weight.max()
    assert 0 < kl.mean() < 0.05


def test_a_nearly_closed_mixing_head_still_learns():
    """Its gradient at the start is far from zero."""
    head, thought = MixingHead(8), torch.randn(5, 8)
    head(torch.randn(5, 8), thought).sum().backward()
    assert max(p.grad.abs().max() for p in head.parameters()) > 1e-2


# Saving and loading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_a_saved_model_comes_back(name, tied, tmp_path):
    """Weights, heads and settings survive a round trip, with tied embeddings or without."""
    settings = QuietStarSettings(3, 2, "thought", "transformer", 16)
    model = tiny_model(name, settings, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = QuietStarForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(again) is type(model)
    assert again.quietstar_settings == settings
    assert not again.fresh_thought_embeddings
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert_same_scores(again, model)


def test_saved_files_are_the_base_models_and_one_more(tmp_path):
    """Native `model_type` and `architectures`, no head in the base weights, heads in a file of their own."""
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["quietstar"] == QuietStarSettings().to_dict()
    assert "auto_map" not in config
    plain = set(plain_model().state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == plain
    heads = load_file(tmp_path / "quietstar.safetensors")
    assert {"start_embedding", "end_embedding"} < set(heads)
    assert not plain & set(heads)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_loading_gives_the_plain_model(name, tied, tmp_path):
    """`AutoModelForCausalLM` reads the checkpoint as the base: no key missing or left over, equal logits."""
    model = tiny_model(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(plain) in type(model).__mro__ and not hasattr(plain, "quietstar")
    with torch.no_grad():
        assert torch.equal(plain.eval()(IDS).logits, model(IDS).logits)


def test_a_sharded_checkpoint_keeps_heads_apart(tmp_path):
    """In several files, too, the base weights hold no head and load plainly."""
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert not any(key.startswith("quietstar.") for key in index["weight_map"])
    assert_same_scores(QuietStarForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), model)


def test_a_plain_checkpoint_gets_fresh_heads(tmp_path):
    """A plain model loads with new heads, marked as not yet initialised, and given settings."""
    plain_model().save_pretrained(tmp_path)
    model = QuietStarForCausalLM.from_pretrained(tmp_path, settings=QuietStarSettings(5, 2))
    assert type(model).__name__ == "QuietStarLlamaForCausalLM"
    assert model.quietstar_settings == QuietStarSettings(5, 2)
    assert model.fresh_thought_embeddings


def test_saving_again_is_plain_too(tmp_path):
    """A model loaded from its own checkpoint saves the same files."""
    tiny_model().save_pretrained(tmp_path / "first")
    QuietStarForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for name in ("model.safetensors", "quietstar.safetensors"):
        first, second = (load_file(tmp_path / folder / name) for folder in ("first", "second"))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_heads_are_float32_beside_a_half_precision_base(tmp_path):
    """bfloat16 base weights stay so; the heads, which are small and learn fast, are float32."""
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = QuietStarForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in again.quietstar.parameters()} == {torch.float32}
    assert_same_scores(again, model)


# Heads


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_value_heads_give_one_value_a_token(kind):
    """Every kind maps `(B, J, G, L, H)` to `(B, J, G, L)`; the trainable new ones start at 0."""
    settings = QuietStarSettings(value_head_type=kind, value_head_hidden_size=12)
    heads = QuietStarForCausalLM.from_config(tiny_config("llama"), settings).quietstar
    hidden = torch.randn(2, 3, 2, 4, 32, requires_grad=True)
    values = heads.values(hidden)
    assert values.shape == (2, 3, 2, 4)
    assert kind == "linear" or not values.any()
    values.sum().backward()
    assert hidden.grad is None
    assert any(p.grad is not None and p.grad.any() for p in heads.value_head.parameters())


def test_an_unknown_value_head_is_refused():
    """The error lists the kinds there are."""
    with pytest.raises(ValueError, match=r"'cnn'.*linear, mlp, transformer"):
        QuietStarForCausalLM.from_config(tiny_config("llama"), QuietStarSettings(value_head_type="cnn"))


def test_value_heads_of_trl_load(tmp_path):
    """A checkpoint of TRL's former value-head model starts a linear value head with its weights."""
    plain = plain_model()
    plain.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    save_file({**weights, **head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = QuietStarForCausalLM.from_pretrained(tmp_path, settings=QuietStarSettings(value_head_type="linear"))
    hidden = torch.randn(4, 32)
    expected = hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
    torch.testing.assert_close(model.quietstar.value_head(hidden), expected)
    other = QuietStarForCausalLM.from_pretrained(tmp_path, settings=QuietStarSettings(value_head_type="mlp"))
    assert not other.quietstar.value_head(hidden).any()


def test_thought_embeddings_start_as_the_em_dash():
    """Start and end begin as the mean embedding of their string's tokens, an em dash unless told otherwise."""
    tokenizer = byte_tokenizer()
    model = QuietStarForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer)))
    table = model.get_input_embeddings().weight
    assert model.fresh_thought_embeddings
    model.initialize_thought_embeddings(tokenizer)
    dash = table[tokenizer("—", add_special_tokens=False)["input_ids"]].mean(0)
    assert torch.equal(model.quietstar.start_embedding, dash) and torch.equal(model.quietstar.end_embedding, dash)
    assert not model.fresh_thought_embeddings
    model.initialize_thought_embeddings(tokenizer, start="plus", end=" is")
    for string, ours in (("plus", model.quietstar.start_embedding), (" is", model.quietstar.end_embedding)):
        assert torch.equal(ours, table[tokenizer(string, add_special_tokens=False)["input_ids"]].mean(0))
    with pytest.raises(ValueError, match="another start, end or prompt"):
        model.initialize_thought_embeddings(tokenizer, start="")


def test_the_vocabulary_stays_as_it_is():
    """Start and end are vectors, not tokens: no embedding row is added."""
    model = tiny_model()
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == tiny_config("llama").vocab_size


# What is refused


def test_encoder_decoders_are_refused(tmp_path):
    """T5 has no causal LM to think with: an error before anything is loaded."""
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        QuietStarForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder"):
        QuietStarForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_lm_head_is_refused():
    """A bare backbone is an error that names the fix, and is left as it was."""
    backbone = LlamaModel(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        attach_heads(backbone, QuietStarSettings())
    assert type(backbone) is LlamaModel and not hasattr(backbone, "quietstar")


def test_a_scalar_gate_of_before_loads(tmp_path):
    """The bias of the mixing head was a scalar once."""
    model = tiny_model()
    saved = {name: tensor.clone() for name, tensor in model.quietstar.state_dict().items()}
    saved["mixing_head.bias"] = torch.tensor(0.25)
    save_file(saved, tmp_path / "quietstar.safetensors")
    model.load_heads(tmp_path)
    assert model.quietstar.mixing_head.bias.tolist() == [0.25]


def test_heads_of_another_kind_are_refused(tmp_path):
    """Loading saved heads with another value head is an error that names them."""
    tiny_model(settings=QuietStarSettings(value_head_type="mlp")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"value_head\..*value_head_type"):
        QuietStarForCausalLM.from_pretrained(tmp_path, settings=QuietStarSettings(value_head_type="linear"))


def test_heads_of_another_size_are_refused(tmp_path):
    """Heads of a wider model do not load, and nothing of the model changes."""
    tiny_model(hidden_size=64).save_heads(tmp_path)
    model = tiny_model()
    before = copy.deepcopy(model.quietstar.state_dict())
    with pytest.raises(ValueError, match="start_embedding"):
        model.load_heads(tmp_path)
    assert all(torch.equal(before[k], v) for k, v in model.quietstar.state_dict().items())


def test_settings_that_need_other_heads_are_refused():
    """Lengths may change on a saved model, the value head may not."""
    model = tiny_model()
    model.adopt_settings(QuietStarSettings(thought_length=2, prediction="thought"))
    assert model.quietstar_settings.thought_length == 2
    with pytest.raises(ValueError, match=r"value_head_type='mlp'"):
        model.adopt_settings(QuietStarSettings(value_head_type="linear"))
    with pytest.raises(ValueError, match=r"value_head_hidden_size=256"):
        model.adopt_settings(QuietStarSettings(value_head_hidden_size=8))


def test_the_factory_makes_no_instances():
    """It is a name to load by, not a class to build."""
    with pytest.raises(TypeError, match="from_pretrained"):
        QuietStarForCausalLM()


# Adapters


def with_adapter(model, **changes):
    """LoRA everywhere it may go, with weights that matter."""
    with heads_aside(model):
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **changes))
    randomize_adapter(peft)
    return peft


@torch.no_grad()
def randomize_adapter(peft) -> None:
    """An adapter that matters."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_adapters_never_land_on_the_heads():
    """`target_modules="all-linear"` means the base's linear layers."""
    peft = with_adapter(tiny_model())
    adapted = {name for name, _ in peft.named_parameters() if "lora_" in name}
    assert adapted and not any("quietstar" in name for name in adapted)


def test_an_adapter_changes_scores_until_disabled():
    """With the adapter off, the scores are the base model's."""
    model = tiny_model()
    before, peft = scores_of(model), with_adapter(copy.deepcopy(model))
    assert (scores_of(peft)["talk_logps"] - before["talk_logps"]).abs().max() > 1e-2
    with peft.disable_adapter():
        assert torch.equal(scores_of(peft)["talk_logps"], before["talk_logps"])


def test_a_merged_model_saves_and_loads(tmp_path):
    """Merging the adapter keeps scores and heads, and the result is an ordinary thinking checkpoint."""
    peft = with_adapter(tiny_model())
    before = scores_of(peft)
    merged = peft.merge_and_unload()
    for name, value in scores_of(merged).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-3, msg=name)
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert_same_scores(QuietStarForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), merged)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(plain.eval()(IDS).logits, merged(IDS).logits)


def save_adapter_repository(folder: Path):
    """A base checkpoint, and beside it an adapter repository as the trainer writes it; returns the `PeftModel`."""
    from trl_quietstar.model.saved import save_config

    base = plain_model()
    base.save_pretrained(folder / "base")
    model = QuietStarForCausalLM.from_pretrained(folder / "base", settings=QuietStarSettings(3, 2))
    randomize(model.quietstar)
    peft = with_adapter(model)
    peft.save_pretrained(folder / "adapter")
    save_config(model, folder / "adapter")
    model.save_heads(folder / "adapter")
    return peft


def test_an_adapter_repository_loads_with_its_heads(tmp_path):
    """`QuietStarForCausalLM.from_pretrained(adapter)` gives base, adapter, heads and settings."""
    peft = save_adapter_repository(tmp_path)
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again, PeftModel)
    assert base_of(again).quietstar_settings == QuietStarSettings(3, 2)
    assert_same_scores(again, peft)


def test_an_adapter_repository_is_small_and_plain_to_peft(tmp_path):
    """It holds no base weights, and PEFT alone loads the adapter onto the plain base."""
    peft = save_adapter_repository(tmp_path)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "quietstar.safetensors", "config.json"} <= files
    assert "model.safetensors" not in files
    assert not any("quietstar" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(adapted(IDS).logits, peft.eval()(IDS).logits)


def test_replay_and_shared_prefix_agree_under_an_adapter():
    """Both paths run the adapter."""
    model, text = exact_model(), mixed_text()
    thoughts = think(model, text)
    with heads_aside(model):
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    peft.double()
    randomize_adapter(peft)
    with torch.no_grad():
        ours, oracle = (score(model, ScoreRequest(text, thoughts, 3, path)) for path in (SharedPrefix(), Replay()))
    torch.testing.assert_close(ours.talk_logps, oracle.talk_logps, rtol=0, atol=1e-9)
