"""The bound on memory: what a token keeps, how many branches fit, and that nothing depends on the choice."""

from types import SimpleNamespace

import pytest
import torch

from trl_quietstar import memory as memory_module
from trl_quietstar import trainer as trainer_module
from trl_quietstar.memory import branches_that_fit, free_bytes, kept_per_token, memory_budget, suits_one_pass

from .tiny import tiny_model
from .training import plain_model, saved_model, tiny_trainer


def test_what_a_token_keeps():
    """More in a wider model; less with checkpointed layers, and hardly anything of a frozen one."""
    model = tiny_model("llama").train()
    kept = kept_per_token(model)
    # inputs of two norms and of the projections alone: at least 4 float32 vectors of 32 in each of 2 layers
    assert 2 * 4 * 32 * 4 < kept < 100_000
    assert kept_per_token(tiny_model("llama", hidden_size=64).train()) > 1.3 * kept
    model.gradient_checkpointing_enable()
    assert kept_per_token(model) < 0.5 * kept
    assert kept_per_token(tiny_model("llama").requires_grad_(False)) < 0.1 * kept


@pytest.mark.parametrize("free, expected", [(1e12, 50), (1e6, 3), (0, 1)], ids=["plenty", "some", "none"])
def test_how_many_branches_fit(free, expected):
    """(0.6 · 10^6 / 1,000 / 2 - 200) / 28 = 3.6."""
    assert branches_that_fit(1e3, rows=2, text_length=200, branches=50, slots=28, free=free) == expected


def test_free_memory_is_that_of_the_machine():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


def test_free_memory_of_other_devices(monkeypatch):
    """By the device's own count, with what PyTorch has reserved and does not use; never the host's."""
    own = SimpleNamespace(
        mem_get_info=lambda device: (1000, 5000), memory_reserved=lambda device: 70, memory_allocated=lambda device: 30
    )
    for kind in ("cuda", "xpu"):
        for name, function in vars(own).items():
            monkeypatch.setattr(getattr(torch, kind), name, function)
        assert free_bytes(torch.device(kind, 0)) == 1040
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 900)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 200)
    assert free_bytes(torch.device("mps")) == 700


def trained(folder, **options) -> dict[str, torch.Tensor]:
    """Weights after two steps."""
    trainer = tiny_trainer(folder, max_steps=2, learning_rate=1e-2, **options)
    trainer.train()
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [{"single_pass": False}, {"branch_batch_size": 1}, {"branch_batch_size": 3}, {"gradient_checkpointing": True}],
)
def test_the_choice_changes_no_weight(options, tmp_path):
    """One pass, two, groups and checkpointed layers take the same steps."""
    expected, found = trained(tmp_path / "a", single_pass=True), trained(tmp_path / "b", **options)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-4)


def plans(monkeypatch) -> list:
    """A list of what is planned from now on."""
    sizes = []
    plan = trainer_module.QuietStarREINFORCETrainer._plan

    def noted(self, text, mode):
        sizes.append(plan(self, text, mode))
        return sizes[-1]

    monkeypatch.setattr(trainer_module.QuietStarREINFORCETrainer, "_plan", noted)
    return sizes


@pytest.mark.parametrize("free, one_pass", [(1e12, True), (1e5, False)])
def test_the_estimate_decides(free, one_pass, tmp_path, monkeypatch):
    """Where memory is short, thoughts are sampled first and scored in groups that fit."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: free)
    sizes = plans(monkeypatch)
    trained(tmp_path)
    assert len(sizes) == 2 and all(size == ((True, None) if one_pass else (False, 1)) for size in sizes)


def test_a_run_keeps_its_plan(tmp_path, monkeypatch):
    """Memory that comes free, in a run or before it is resumed, changes neither what is planned nor a bit of the weights."""
    path, sizes, free = saved_model(tmp_path / "model"), plans(monkeypatch), iter([1e5, 1e12])
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: next(free))
    ended = []
    for resume in (None, str(tmp_path / "0/checkpoint-1")):
        folder = tmp_path / str(len(ended))
        trainer = tiny_trainer(folder, path, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        ended.append(trainer.model)
    assert sizes == [(False, 1)] * 3
    assert all(map(torch.equal, ended[0].parameters(), ended[1].parameters()))


def test_what_is_to_come_is_left_free(monkeypatch):
    """A gradient and two moments of each trainable parameter."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 10**9)
    model = tiny_model("llama")
    assert memory_budget(model) == 10**9 - 12 * sum(p.numel() for p in model.parameters())
    assert memory_budget(model.requires_grad_(False)) == 10**9


def test_long_thoughts_take_two_passes():
    """Copies of keys and values, 2 · 2 · 32 · 4 bytes a slot for half of the slots, must not exceed what a slot keeps, and fit."""
    model = tiny_model("llama", num_key_value_heads=4)
    size = dict(rows=1, text_length=0, branches=2)
    for slots, free, expected in [(20, 1e12, True), (21, 1e12, False), (20, 2 * 20 * 2 * 5120 / 0.6 * 0.99, False)]:
        assert suits_one_pass(model, 5120, **size, slots=slots, free=free) is expected


def test_thoughts_of_the_length_of_a_text_are_sampled_first(tmp_path, monkeypatch):
    """Left alone, the trainer does not keep the graph of sampling where thoughts are long."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 1e12)
    for length, one_pass in ((3, True), (60, False)):
        trainer = tiny_trainer(tmp_path, thought_length=length)
        text = trainer._text(next(iter(trainer.get_train_dataloader())))
        assert trainer._plan(text, "train") == (one_pass, None)


@pytest.mark.parametrize(
    "other", [{"branch_batch_size": 4}, {"gradient_checkpointing": True}, {"disable_dropout": False}]
)
def test_one_pass_is_not_combined_with_what_it_cannot_do(other, tmp_path):
    with pytest.raises(ValueError, match="leave"):
        tiny_trainer(tmp_path, single_pass=True, **other)


def test_one_pass_needs_attention_that_branches(tmp_path):
    with pytest.raises(ValueError, match="whose attention can branch"):
        tiny_trainer(tmp_path, single_pass=True, thought_path="replay")


def test_dropout_of_attention_is_applied_or_off(tmp_path):
    """With dropout the family's own attention is used, by a mask; without it no module keeps a rate."""

    kept = tiny_trainer(tmp_path / "a", plain_model(attention_dropout=0.5), disable_dropout=False, max_steps=1)
    assert type(kept.path).__name__ == "MaskedPrefix"
    kept.train()
    off = tiny_trainer(tmp_path / "b", plain_model(attention_dropout=0.5), max_steps=1)
    assert type(off.path).__name__ == "SharedPrefix"
    assert all(layer.self_attn.attention_dropout == 0 for layer in off.model.model.layers)
    off.train()
