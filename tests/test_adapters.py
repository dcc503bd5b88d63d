"""Adapters other than plain LoRA, and several at once: trained, saved with the heads, and loaded back."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from trl_quietstar import QuietStarForCausalLM

from .training import plain_model, saved_model, text_data, tiny_trainer


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_rslora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


def adapter_weights(model, name: str = "default") -> dict[str, torch.Tensor]:
    """Copies of an adapter's parameters."""
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}" in key}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_learns_and_comes_back_with_its_heads(kind, tmp_path):
    """The adapter moves, the base does not, and the saved folder evaluates as the trained model."""
    path = saved_model(tmp_path / "base")
    trainer = tiny_trainer(tmp_path, model=path, evaluation=text_data(6, 300), peft_config=CONFIGS[kind])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    own = set(adapter_weights(trainer.model))
    assert moved & own and any("quietstar." in name for name in moved)
    assert all(name in own or "quietstar." in name for name in moved)
    assert not any("quietstar." in name for name in own)
    expected = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "saved")
    found = tiny_trainer(tmp_path, model=again, evaluation=text_data(6, 300)).evaluate()
    for name in ("eval_nll_with", "eval_nll_without", "eval_reward"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_an_adapter_that_was_saved_goes_on_training(tmp_path):
    """From its folder the trainer takes up the adapter itself, not the heads alone."""
    path = saved_model(tmp_path / "base")
    first = tiny_trainer(tmp_path / "first", model=path, peft_config=CONFIGS["lora"])
    first.train()
    first.save_model(tmp_path / "saved")
    second = tiny_trainer(tmp_path / "second", model=str(tmp_path / "saved"))
    before = adapter_weights(second.model)
    assert before and all(torch.equal(value, adapter_weights(first.model)[name]) for name, value in before.items())
    second.train()
    assert any(not torch.equal(value, adapter_weights(second.model)[name]) for name, value in before.items())


def test_only_the_active_one_of_several_adapters_is_trained(tmp_path):
    """Another adapter on the same model stays as it was, and can be switched to afterwards."""
    model = get_peft_model(plain_model(), CONFIGS["lora"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("default")
    before, other = adapter_weights(model), adapter_weights(model, "other")
    assert before and other
    trainer = tiny_trainer(tmp_path, model=model, evaluation=text_data(6, 300))
    trainer.train()
    after = adapter_weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, other[name]) for name, value in adapter_weights(model, "other").items())
    trained = trainer.evaluate()["eval_nll_without"]
    model.set_adapter("other")
    assert trainer.evaluate()["eval_nll_without"] != trained


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_the_reference_is_the_base_under_any_adapter(kind, tmp_path):
    """KL from the base begins at 0 and grows as the adapter learns."""
    trainer = tiny_trainer(tmp_path, peft_config=CONFIGS[kind], beta=0.1, learning_rate=1e-2, max_steps=6)
    trainer.train()
    divergence = [entry["rl/kl_divergence"] for entry in trainer.state.log_history if "rl/kl_divergence" in entry]
    assert divergence[0] == pytest.approx(0, abs=1e-5)
    assert divergence[-1] > 1e-5
