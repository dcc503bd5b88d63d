"""Scoring with thoughts is what generation with thoughts says, all positions at once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.branches.attention import TextReading
from trl_quietstar.model.lm_head import uncertainty
from trl_quietstar.thinking import likelihood
from trl_quietstar.thinking.likelihood import log_likelihoods
from trl_quietstar.thinking.when import Thinking

from .speaking import of_generated, padded, prompts, thinking_model
from .tiny import byte_tokenizer
from .training import saved_model


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gemma4_text", "bloom", "mamba"])
def test_generated_text_scores_as_it_was_generated(name, every):
    """Token by token, in a batch with padding; each token was the most likely one."""
    expected, found, correct, before = of_generated(
        thinking_model(name), padded(prompts(7, 4)), Thinking("always", every)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert correct.all() and (before == 0).all()


@pytest.mark.parametrize("every", [1, 2])
def test_adaptive_scoring_thinks_where_generation_does(every):
    """At the same places, and plainly elsewhere."""
    model = thinking_model()
    with torch.no_grad():
        entropies = uncertainty(model(**padded(prompts(20, 20))).logits)
    thinking = Thinking("adaptive", every, float(entropies.median()))
    expected, found, *_ = of_generated(model, padded(prompts(7, 4)), thinking, new=12)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows(side):
    """Padding on either side changes nothing."""
    model, rows = thinking_model(), prompts(11, 6)
    inputs = padded(rows)
    if side == "right":
        inputs = {name: x.clone() for name, x in inputs.items()}
        inputs["input_ids"][1] = inputs["input_ids"][1].roll(-5)
        inputs["attention_mask"][1] = inputs["attention_mask"][1].roll(-5)
    together, _ = log_likelihoods(model, **inputs)
    for row, ids in zip(together, rows, strict=True):
        alone, _ = log_likelihoods(model, ids[None])
        scored = row[row != 0]
        torch.testing.assert_close(scored, alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "limits", [{"tokens": 100}, {"free": 1.0}, {"rows": 2}], ids=["a CPU", "memory", "ragged rows"]
)
@pytest.mark.parametrize("name", ["llama", "gemma4_text", "bloom", "mamba"])
def test_chunks_change_nothing(name, limits, monkeypatch):
    """However few branches run at once, and where shorter rows are left out as soon as they have no more positions."""
    model, inputs = thinking_model(name), padded(prompts(4, 9, 6))
    monkeypatch.setattr(likelihood, "LEAST_GROUP", limits.get("rows", 16))
    whole = log_likelihoods(model, **{key: x.clone() for key, x in inputs.items()})
    monkeypatch.setattr(likelihood, "CPU_TOKENS", limits.get("tokens", 10**6))
    if "free" in limits:
        monkeypatch.setattr(likelihood, "free_bytes", lambda device: limits["free"])
    chunked = log_likelihoods(model, **inputs)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(chunked[1], whole[1])


def tokens_of(model, score) -> tuple[int, int]:
    """How many tokens went through the first layer, and in how many forwards."""
    layer, sizes = model.model.layers[0], []
    hook = layer.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[:2].numel()))
    score()
    hook.remove()
    return sum(sizes), len(sizes)


@pytest.mark.parametrize("lengths", [(40,) * 4, (60, 20, 20, 20)], ids=["equal", "ragged"])
def test_a_batch_costs_no_more_than_its_rows(lengths, monkeypatch):
    """It reads its texts once, and takes no more tokens through the model and no more forwards than row by row."""
    monkeypatch.setattr(likelihood, "CPU_TOKENS", 400)  # several groups
    model, rows = thinking_model(), prompts(*lengths)
    assert model.thought_path is not None  # which reads texts of its own
    read = []
    attend = TextReading.attend
    monkeypatch.setattr(
        TextReading, "attend", lambda self, *args, **kwargs: read.append(0) or attend(self, *args, **kwargs)
    )
    inputs = padded(rows)
    together, forwards = tokens_of(model, lambda: log_likelihoods(model, **inputs))
    assert len(read) == model.config.num_hidden_layers
    alone = [tokens_of(model, lambda row=row: log_likelihoods(model, row[None])) for row in rows]
    padding = inputs["input_ids"].numel() - sum(lengths)
    assert together <= sum(tokens for tokens, _ in alone) + padding
    assert forwards <= sum(count for _, count in alone)


def test_without_thoughts_it_is_the_base_model():
    """Log-softmax of the plain logits."""
    model, (ids,) = thinking_model(), prompts(9)
    with torch.no_grad():
        plain = model(input_ids=ids[None]).logits[:, :-1].log_softmax(-1)
    logps, correct = log_likelihoods(model, ids[None], thinking=Thinking("never"))
    torch.testing.assert_close(logps, plain.gather(2, ids[None, 1:, None])[..., 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(correct, plain.argmax(-1) == ids[None, 1:])
    assert (logps - log_likelihoods(model, ids[None])[0]).abs().max() > 1e-2


def test_the_models_own_method():
    """Takes what `generate` takes, checks it, and leaves the model's mode alone."""
    model, (ids,) = thinking_model().train(), prompts(9)
    for thinking in (Thinking(), Thinking("always", 2), Thinking("adaptive", 1, 0.9), Thinking("never")):
        options = dict(think=thinking.mode, think_every=thinking.every, thinking_threshold=thinking.threshold)
        found = model.log_likelihoods(ids[None], **options)
        assert model.training
        for mine, wanted in zip(found, log_likelihoods(model.eval(), ids[None], thinking=thinking), strict=True):
            assert torch.equal(mine, wanted)
        model.train()
    with pytest.raises(ValueError, match="`think_every` is 99, but .* `talk_length`"):
        model.log_likelihoods(ids[None], think_every=99)
    with pytest.raises(ValueError, match="`think` is 'hard'"):
        model.log_likelihoods(ids[None], think="hard")


def test_an_adapter_scores_too(tmp_path):
    """As it comes from its repository; the adapter's weights count, with and without thoughts."""
    base = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "base"))
    base.initialize_thought_embeddings(byte_tokenizer())
    ids = torch.tensor([byte_tokenizer()("3 plus 4 is 7 .")["input_ids"]])
    plain = base.eval().log_likelihoods(ids, think="never")[0]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for think in ("always", "never"):
        scored = model.log_likelihoods(ids, think=think)[0]
        assert (scored - plain).abs().max() > 1e-3
        torch.testing.assert_close(scored, log_likelihoods(base, ids, thinking=Thinking(think))[0])
