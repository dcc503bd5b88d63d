"""The trainer on every kind of model: by path, saved, with adapters, held against a reference, in low precision."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer, QuietStarSettings
from trl_quietstar.model.adapters import base_of

from .tiny import byte_tokenizer
from .training import (
    EVAL_METRICS,
    LORA,
    Recorder,
    finite,
    logged,
    plain_model,
    saved_model,
    text_data,
    tiny_args,
    tiny_trainer,
)


def test_a_model_by_path(tmp_path):
    """A path loads model and tokenizer; weights are float32 and become a thinking class."""
    trainer = tiny_trainer(tmp_path / "out", model=saved_model(tmp_path / "model"), max_steps=1)
    trainer.train()
    assert type(trainer.model).__name__ == "QuietStarLlamaForCausalLM"
    assert trainer.model.dtype == torch.float32
    assert trainer.processing_class.eos_token == "<eos>"


def test_a_path_and_an_object_are_one_model(tmp_path):
    """Before training, both predict the same."""
    path = saved_model(tmp_path / "model")
    metrics = []
    for model in (path, QuietStarForCausalLM.from_pretrained(path)):
        trainer = tiny_trainer(
            tmp_path, model=model, tokenizer=byte_tokenizer(), evaluation=text_data(6, 300), value_head_hidden_size=256
        )
        metrics.append(trainer.evaluate()["eval_nll_without"])
    assert metrics[0] == metrics[1]


def test_the_smallest_call(tmp_path, monkeypatch):
    """Model and data alone are enough; the output directory is named after the model."""
    monkeypatch.chdir(tmp_path)
    path = saved_model(tmp_path / "model")
    trainer = QuietStarREINFORCETrainer(model=path, train_dataset=text_data(8))
    assert isinstance(trainer.args, QuietStarConfig) and trainer.args.output_dir == "model-QuietStar"


def test_the_start_is_an_em_dash(tmp_path):
    """A new model's start and end begin as the strings the configuration names."""
    tokenizer, model = byte_tokenizer(), plain_model()
    table = model.get_input_embeddings().weight
    trainer = tiny_trainer(tmp_path, model=model, thought_end_text=" plus")
    for string, ours in (("—", "start_embedding"), (" plus", "end_embedding")):
        ids = tokenizer(string, add_special_tokens=False)["input_ids"]
        assert torch.equal(getattr(trainer.model.quietstar, ours), table[ids].mean(0)), string


def test_training_goes_on_from_a_saved_model(tmp_path):
    """A saved thinking model keeps its heads when it is trained further."""
    first = tiny_trainer(tmp_path / "first")
    first.train()
    first.save_model()
    again = tiny_trainer(tmp_path / "again", model=str(tmp_path / "first"))
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_lora(tmp_path):
    """With an adapter, the adapter and the heads train; the base stays as it was, and saving takes little."""
    path = saved_model(tmp_path / "base")
    trainer = tiny_trainer(tmp_path / "out", model=path, peft_config=LoraConfig(**LORA), evaluation=text_data(6, 300))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_" in name or "quietstar" in name), name
        assert parameter.requires_grad == changed
    trainer.save_model()
    assert not (tmp_path / "out/model.safetensors").exists()
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    again = tiny_trainer(tmp_path, model=loaded, tokenizer=byte_tokenizer(), evaluation=text_data(6, 300))
    for name in EVAL_METRICS:
        assert again.evaluate()[f"eval_{name}"] == trainer.evaluate()[f"eval_{name}"], name


def test_a_peft_model(tmp_path):
    """A `PeftModel` is trained as it is, with heads that carry no adapter."""
    peft = get_peft_model(plain_model(), LoraConfig(**LORA))
    trainer = tiny_trainer(tmp_path, model=peft)
    trainer.train()
    assert trainer.model is peft
    assert not [name for name, _ in peft.named_parameters() if "quietstar" in name and "lora" in name]


@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_a_model_just_trained_with_sft(adapter, tmp_path):
    """`SFTTrainer` puts a forward of its own on the object; the model still thinks, and still works for SFT."""
    options = dict(max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    sft = SFTTrainer(
        model=plain_model(),
        args=SFTConfig(str(tmp_path), **options),
        train_dataset=text_data(),
        processing_class=byte_tokenizer(),
        peft_config=adapter,
    )
    sft.train()
    trainer = tiny_trainer(tmp_path, model=sft.model, evaluation=text_data(6, 300))
    trainer.train()
    model = trainer.model.eval()
    assert finite(logged(trainer)[-1]["rl/reward"]) and finite(trainer.evaluate()["eval_reward"])
    ids = torch.tensor([[1, 2, 3]])
    assert finite(model(input_ids=ids, labels=ids).loss.item())
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (1, 5)


def test_evaluation_needs_no_training_data(tmp_path):
    """A trainer with evaluation data alone evaluates as one with both does."""
    model, evaluation = saved_model(tmp_path / "model"), text_data(6, 300)
    both = tiny_trainer(tmp_path, model=model, evaluation=evaluation)
    alone = QuietStarREINFORCETrainer(model, tiny_args(tmp_path), eval_dataset=evaluation)
    for name in EVAL_METRICS:
        assert alone.evaluate()[f"eval_{name}"] == both.evaluate()[f"eval_{name}"], name
    with pytest.raises(ValueError, match="train_dataset"):
        alone.train()


def test_a_peft_model_of_a_thinking_model(tmp_path):
    """PEFT freezes everything it is given; the heads are trained all the same, and come back with the adapter."""
    path, settings = saved_model(tmp_path / "base"), QuietStarSettings(3, 2, value_head_hidden_size=16)
    thinking = QuietStarForCausalLM.from_pretrained(path, settings=settings)
    peft = get_peft_model(thinking, LoraConfig(r=4, target_modules=["q_proj"]))
    assert not any(p.requires_grad for p in thinking.quietstar.parameters())
    trainer = tiny_trainer(tmp_path / "out", model=peft, evaluation=text_data(6, 300))
    before = thinking.quietstar.start_embedding.clone()
    trainer.train()
    assert not torch.equal(thinking.quietstar.start_embedding, before)
    trainer.save_model()
    again = base_of(QuietStarForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(again.quietstar.start_embedding, thinking.quietstar.start_embedding)


def test_lora_with_gradient_checkpointing(tmp_path):
    """Recomputed layers pass gradient to the adapter, though the embeddings are frozen."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, peft_config=LoraConfig(**LORA), gradient_checkpointing=True, callbacks=[recorder], max_steps=2
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    assert not recorder.without
    assert not any(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


@pytest.mark.parametrize("peft", [False, True])
def test_the_reference_is_the_model_at_the_start(peft, tmp_path):
    """KL is 0 before the first update and above 0 after it."""
    trainer = tiny_trainer(tmp_path, beta=0.1, peft_config=LoraConfig(**LORA) if peft else None)
    trainer.train()
    divergences = [entry["rl/kl_divergence"] for entry in logged(trainer)]
    assert divergences[0] == pytest.approx(0, abs=1e-9)
    assert all(value > 1e-6 for value in divergences[1:])


@pytest.mark.parametrize(
    ("moved", "peft"), [("learning_rate", True), ("heads_learning_rate", True), ("heads_learning_rate", False)]
)
def test_the_reference_has_its_own_weights_and_heads(moved, peft, tmp_path):
    """Training the model alone, or the heads alone, moves the policy away: the reference follows in neither."""
    rates = {"learning_rate": 0.0, "heads_learning_rate": 0.0, moved: 1e-2}
    trainer = tiny_trainer(tmp_path, beta=0.1, peft_config=LoraConfig(**LORA) if peft else None, **rates)
    trainer.train()
    divergences = [entry["rl/kl_divergence"] for entry in logged(trainer)]
    assert divergences[0] == pytest.approx(0, abs=1e-9) and divergences[2] > 1e-6


@pytest.mark.parametrize("peft", [False, True])
def test_thoughts_can_be_held_against_the_reference(peft, tmp_path):
    """`no_thought_model="reference"`: what is predicted without thoughts stays as it was while the policy learns."""
    trainer = tiny_trainer(
        tmp_path,
        no_thought_model="reference",
        evaluation=text_data(16, 300),
        max_steps=15,
        learning_rate=1e-2,
        data=text_data(200),
        peft_config=LoraConfig(**LORA) if peft else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_nll_with"] < before["eval_nll_with"] - 0.3
    assert after["eval_accuracy_with"] > before["eval_accuracy_with"]
    for name in ("eval_nll_without", "eval_accuracy_without"):
        assert after[name] == before[name], name


def test_the_reference_follows_when_synchronised(tmp_path):
    """With weight 1 and a synchronisation every step, the reference is the policy again: KL stays 0."""
    trainer = tiny_trainer(tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    assert [entry["rl/kl_divergence"] for entry in logged(trainer)] == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_unless_wanted(disable, tmp_path):
    """`disable_dropout` sets every dropout to 0, the adapter's too; without it they stay."""
    peft = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True)
    trainer = tiny_trainer(tmp_path, model=plain_model("gpt2"), peft_config=peft, disable_dropout=disable)
    rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0} if disable else rates >= {0.1, 0.2}


def test_bfloat16_on_a_cpu(tmp_path):
    """A step under bfloat16 autocast is finite, with float32 master weights, near the float32 one."""
    half, single = (tiny_trainer(tmp_path, bf16=bf16, max_steps=2) for bf16 in (True, False))
    half.train(), single.train()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert all(finite(entry["loss"]) and finite(entry["grad_norm"]) for entry in logged(half))
    assert logged(half)[0]["loss"] == pytest.approx(logged(single)[0]["loss"], rel=0.05)


def test_two_trainers_of_one_model(tmp_path):
    """As where a cell is run again with other values: each trains and saves the model by its own, and goes on after the other."""
    model = plain_model()
    first = tiny_trainer(tmp_path, model, thought_length=3, max_steps=1)
    second = tiny_trainer(tmp_path, model, thought_length=2, max_steps=1)
    for trainer, length in ((second, 2), (first, 3), (second, 2)):
        trainer.train()
        assert logged(trainer)[-1]["rl/thought_length"] == length == model.quietstar_settings.thought_length


def test_two_trainers_evaluate_one_model(tmp_path):
    """Each by its own options, whoever had the model last."""
    model, data = plain_model(), text_data(4, 300)
    strings = dict(thought_format="text", thought_start_text=" plus", thought_end_text=" is")
    first = tiny_trainer(tmp_path, model, evaluation=data)
    alone = first.evaluate()
    second = tiny_trainer(tmp_path, model, evaluation=data, **strings)
    others = second.evaluate()
    again = first.evaluate()
    assert again["eval_nll_with"] == alone["eval_nll_with"] != others["eval_nll_with"]
    assert second.evaluate()["eval_nll_with"] == others["eval_nll_with"]


@pytest.mark.parametrize("name, value", [("thought_length", 2), ("num_thoughts", 1), ("talk_length", 1)])
def test_options_changed_by_hand(name, value, tmp_path):
    """Some would hold in some places alone; others change freely between two runs."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300), max_steps=1)
    setattr(trainer.args, name, value)
    for call in (trainer.train, trainer.evaluate, trainer.validate_thoughts):
        with pytest.raises(ValueError, match=f"`args.{name}` was changed to {value} .* make a new trainer"):
            call()
    setattr(trainer.args, name, getattr(tiny_args(tmp_path), name))
    trainer.args.max_steps = 2
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("call", ["train", "evaluate", "validate_thoughts", "get_train_dataloader"])
def test_options_made_after_the_trainer(call, tmp_path):
    """They empty the state of Accelerate, which all trainers of a process share, and with which Transformers' own would then fail."""
    trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300), bf16=True, max_steps=1)
    tiny_args(tmp_path / "others")
    getattr(trainer, call)()
    assert trainer.accelerator.state.mixed_precision == "bf16"
