"""Calls on one model from several threads, calls on two models, and calls in any mode of PyTorch give what one call alone gives."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings

from .speaking import SETTINGS, generated, padded, prompts, thinking_model
from .tiny import tiny_model
from .training import saved_model, text_data, tiny_trainer


THREADS = 4


def at_once(calls: list[Callable]) -> list:
    """The results of calls that begin together, each in a thread of its own, several times over."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return [call() for _ in range(3)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def same(found, expected) -> bool:
    """Whether results, of one kind of call, agree."""
    if isinstance(expected, tuple):
        return all(same(*pair) for pair in zip(found, expected, strict=True))
    return torch.allclose(found, expected, atol=1e-5) if expected.is_floating_point() else torch.equal(found, expected)


def different_calls(model) -> list[Callable]:
    """Generation with thoughts and without, a forward, and scoring, each on texts of its own."""
    inputs = [padded(rows) for rows in (prompts(7, 4), prompts(9, 6), prompts(5), prompts(11, 8))]
    return [
        lambda: generated(model, inputs[0], new=6),
        lambda: generated(model, inputs[1], new=6, think="never"),
        lambda: model.log_likelihoods(**inputs[3]),
        lambda: model(**inputs[2]).logits,
        lambda: model.log_likelihoods(**inputs[1], think="adaptive", thinking_threshold=0.5),
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_threads_share_a_model(name):
    """From its very first calls on, whose start-up check one thread makes for all."""
    expected = [call() for call in different_calls(thinking_model(name))]
    model = thinking_model(name)
    for found, wanted in zip(at_once(different_calls(model)), expected, strict=True):
        assert all(same(result, wanted) for result in found)
    assert "forward" not in vars(model.get_output_embeddings())


def test_threads_share_a_mixture_of_experts():
    """Whose router's logits are asked for in scoring, and in no other thread's forward."""
    model = tiny_model("mixtral", QuietStarSettings(thought_length=3), output_router_logits=True, vocab_size=300)
    texts = [rows[0][None] for rows in (prompts(9), prompts(12), prompts(6))]
    calls = [
        lambda: model.log_likelihoods(texts[0]),
        lambda: model.log_likelihoods(texts[1]),
        lambda: generated(model, {"input_ids": texts[2]}, new=5),
        lambda: model(texts[1], output_router_logits=False).logits,
    ]
    expected = [call() for call in calls]
    for found, wanted in zip(at_once(calls), expected, strict=True):
        assert all(same(result, wanted) for result in found)


def test_threads_leave_the_mode_as_it_was():
    """Dropout is off in every call however they overlap, and each module is as it was when the last has ended."""
    model = tiny_model("llama", SETTINGS, attention_dropout=0.5, vocab_size=300)
    expected = generated(model, padded(prompts(7, 4)), new=6)
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    scored = model.eval().log_likelihoods(**padded(prompts(9)))
    model.train()
    model.model.layers[1].eval()
    calls = [
        lambda: generated(model, padded(prompts(7, 4)), new=6),
        lambda: model.log_likelihoods(**padded(prompts(9))),
    ]
    found = at_once(calls * 2)
    for results, wanted in zip(found, (expected, scored) * 2, strict=True):
        assert all(same(result, wanted) for result in results)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_two_models_in_two_threads(tmp_path):
    """One writes while another is trained: each as if it were alone."""

    def train(folder):
        trainer = tiny_trainer(folder, max_steps=2)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    model = thinking_model()
    expected, weights = generated(model, padded(prompts(7, 4)), new=6), train(tmp_path / "alone")
    written, trained = at_once(
        [lambda: generated(model, padded(prompts(7, 4)), new=6), lambda: train(tmp_path / "beside")]
    )
    assert all(torch.equal(result, expected) for result in written)
    assert all(torch.equal(result, weights) for result in trained)


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", ["inference_mode", "autocast", pytest.param("no_grad", marks=pytest.mark.slow)])
def test_any_mode_gives_the_same_and_leaves_nothing_behind(mode, tmp_path):
    """The first calls of all are made in it; what follows, a training step above all, does not notice."""

    def train(model, folder):
        trainer = tiny_trainer(folder, model=model, max_steps=1)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    base, settings = saved_model(tmp_path / "base"), replace(SETTINGS, value_head_hidden_size=16)
    plain = QuietStarForCausalLM.from_pretrained(base, settings)
    model = copy.deepcopy(plain)
    inputs = {name: x % 200 + (name == "input_ids") for name, x in padded(prompts(7, 4)).items()}
    inputs["attention_mask"] = padded(prompts(7, 4))["attention_mask"]
    with MODES[mode]():
        inside = generated(model, inputs, new=5), model.log_likelihoods(**inputs)
    outside = generated(model, inputs, new=5), model.log_likelihoods(**inputs)
    if mode != "autocast":  # which rounds otherwise, as it should
        assert same(inside, outside)
    assert same(outside, (generated(plain, inputs, new=5), plain.log_likelihoods(**inputs)))
    assert torch.equal(train(model, tmp_path / "after"), train(plain, tmp_path / "alone"))


def test_heads_that_come_in_inference_can_be_trained(tmp_path):
    """A plainly loaded model gets its heads at its first `generate`, which a server may call in inference mode."""
    trainer = tiny_trainer(tmp_path / "out", model=saved_model(tmp_path / "base"), max_steps=1)
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = {name: x % 200 for name, x in padded(prompts(6)).items()}
    thinking = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = at_once([lambda: generated(model, inputs, new=4)] * THREADS)
    expected = generated(thinking, inputs, new=4)
    assert all(torch.equal(result, expected) for results in found for result in results)
    assert not any(parameter.is_inference() for parameter in model.quietstar.parameters())
    tiny_trainer(tmp_path / "again", model=model, data=text_data(8), max_steps=1).train()


def test_threads_share_an_adapter(tmp_path):
    """Through PEFT's own methods."""
    trainer = tiny_trainer(
        tmp_path, model=saved_model(tmp_path / "base"), max_steps=1, peft_config=LoraConfig(target_modules=["q_proj"])
    )
    trainer.train()
    model = trainer.model.eval()
    inputs = {name: x % 200 for name, x in padded(prompts(6, 6)).items()}
    expected = generated(model, inputs, new=4)
    found = at_once([lambda: generated(model, inputs, new=4)] * THREADS)
    assert all(torch.equal(result, expected) for results in found for result in results)
