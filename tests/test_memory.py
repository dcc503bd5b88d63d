"""The bound on memory: what a token keeps, how many branches fit, and that nothing depends on the choice."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_quietstar.branches import memory as memory_module
from trl_quietstar.branches.attention import TextReading
from trl_quietstar.branches.base import backbone
from trl_quietstar.branches.memory import (
    Plan,
    Size,
    branches_that_fit,
    branches_without_graph,
    cached_per_token,
    free_bytes,
    kept_per_token,
    memory_budget,
    passing_per_token,
    plan_batch,
    suits_one_pass,
)
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.model.embeddings import embed_tokens
from trl_quietstar.text.batch import Branches, Text
from trl_quietstar.training import thinker as thinker_module

from .conformance import tiny_model as family_model
from .tiny import tiny_model
from .training import plain_model, saved_model, text_data, tiny_trainer


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
    assert kept_per_token(tiny_model("gpt2", max_position_embeddings=20).train()) > 0  # shorter than a probe


def test_a_model_that_is_done_with_is_freed(tmp_path):
    """As a notebook makes one trainer after the other. Autograd's graph is held by no Python object that the collector would see."""

    def weights_of_a_run(**options) -> list[weakref.ref]:
        trainer = tiny_trainer(tmp_path, evaluation=text_data(4, 300), max_steps=1, **options)
        trainer.train()
        trainer.validate_thoughts()
        return [weakref.ref(parameter) for parameter in trainer.model.parameters()]

    for options in (
        {},
        {"single_pass": False, "beta": 0.1},
        {"peft_config": LoraConfig(r=2, target_modules="all-linear")},
    ):
        weights = weights_of_a_run(**options)
        gc.collect()
        assert not [weight for weight in weights if weight() is not None], options


def kept_in(model, act) -> int:
    """Bytes that are kept for the backward of what `act` does, weights aside."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = act()
    del held
    return sum(kept.values())


def slopes(model) -> tuple[float, float]:
    """Bytes kept for each further token of a text, and of branches."""
    text = Text.from_batch(torch.arange(40)[None])

    def read(tokens: int):
        return backbone(model, embed_tokens(model, torch.arange(tokens)[None] % 90), use_cache=False)

    def branch(count: int, slots: int = 10):
        embeds = embed_tokens(model, (torch.arange(count * slots) % 90).view(1, count, slots))
        mask = torch.ones(1, count, slots, dtype=torch.bool)
        return SharedPrefix().encode(model, text, Branches(torch.arange(count)[None], embeds, mask))

    by_text = kept_in(model, lambda: read(110)) - kept_in(model, lambda: read(90))
    by_branch = kept_in(model, lambda: branch(20)) - kept_in(model, lambda: branch(10))
    return by_text / 20, by_branch / 100


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_the_estimate_is_what_a_token_adds(precision, lora):
    """Within 1.3 times, of a text and of branches: copies of weights, which do not grow with the tokens, do not count."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, max_position_embeddings=256)
    model = tiny_model("llama", dtype=dtype, **sizes).train()
    if lora:
        get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        kept = kept_per_token(model)
        for slope in slopes(model):
            assert 1 / 1.3 < kept / slope < 1.3


def test_a_trainer_estimates_under_its_autocast(tmp_path):
    """What is trained in bf16 keeps less."""
    trainer = tiny_trainer(tmp_path, bf16=True)
    trainer.thinker.plan(trainer.thinker.text(next(iter(trainer.get_train_dataloader()))), training=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_per_token(plain_model().train())
    assert trainer.thinker.kept_per_token == kept < 0.8 * kept_per_token(plain_model().train())


def test_what_a_token_takes_without_gradient():
    """Its keys and values stay, and the widest place of one layer is passed; under autocast keys and values are half as large."""
    model = tiny_model("llama")
    assert passing_per_token(model) == (8 * 32 + 4 * 48) * 4
    assert cached_per_token(model) == 2 * 2 * 2 * 8 * 4
    with torch.autocast("cpu", torch.bfloat16):
        assert cached_per_token(model) == 2 * 2 * 2 * 8 * 2
    # sizes that differ from layer to layer, and those that a configuration does not have
    assert cached_per_token(family_model("gemma4_text")) > 0 and passing_per_token(family_model("mamba")) > 0


@pytest.mark.parametrize("path, new", [(SharedPrefix(), 1), (SharedPrefix(), 10), (Replay(), 1)])
def test_how_many_branches_run_without_gradient(path, new):
    """One slot at a time in sampling, all of them in scoring; with replay the whole text with each."""
    model, size = tiny_model("llama"), Size(rows=2, text_length=100, branches=1_000, slots=10)
    token = passing_per_token(model) + cached_per_token(model)
    found = branches_without_graph(model, path, size, new, 2 * (100 * token + 1e6) / 0.6)
    seen = 110 if isinstance(path, Replay) else 10
    one = (110 if isinstance(path, Replay) else new) * passing_per_token(model) + 2 * seen * cached_per_token(model)
    assert found == int(1e6 / one) > 1
    assert branches_without_graph(model, path, size, new, 1e12) == 1_000
    assert branches_without_graph(model, path, size, new, 0) == 1


def test_a_small_forward_away_from_the_cpu_takes_two_passes():
    """Which launch fewer kernels; one whose arithmetic takes longer than its launches is sampled in the graph."""
    model = tiny_model("llama").to("meta")
    for branches, one_pass in ((100, False), (2**30, True)):
        assert suits_one_pass(model, 1e6, Size(1, 10, branches, 4), 1e30) is one_pass
        assert suits_one_pass(tiny_model("llama"), 1e6, Size(1, 10, branches, 4), 1e30)


def test_processes_go_by_the_one_with_least():
    """Where each must call the layers as often as the others."""
    model, size = tiny_model("llama"), Size(1, 10, 8, 4)
    assert plan_batch(model, SharedPrefix(), size, 1e3, 1e12, True) == Plan(True)
    assert plan_batch(model, SharedPrefix(), size, 1e3, 1e12, True, lambda number: min(number, 3)) == Plan(
        False, 3, 3, 3
    )


@pytest.mark.parametrize("free, expected", [(1e12, 50), (1e6, 3), (0, 1)], ids=["plenty", "some", "none"])
def test_how_many_branches_fit(free, expected):
    """(0.6 · 10^6 / 1,000 / 2 - 200) / 28 = 3.6."""
    assert branches_that_fit(1e3, Size(rows=2, text_length=200, branches=50, slots=28), free) == expected


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
    plan = thinker_module.Thinker.plan

    def noted(self, text, training):
        sizes.append(plan(self, text, training))
        return sizes[-1]

    monkeypatch.setattr(thinker_module.Thinker, "plan", noted)
    return sizes


@pytest.mark.parametrize("free, one_pass", [(1e12, True), (1e5, False)])
def test_the_estimate_decides(free, one_pass, tmp_path, monkeypatch):
    """Where memory is short, thoughts are sampled first and scored in groups that fit."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: free)
    sizes = plans(monkeypatch)
    trained(tmp_path)
    assert sizes == [Plan(True) if one_pass else Plan(False, 1, 1, 1)] * 2


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
    assert sizes == [Plan(False, 1, 1, 1)] * 3
    assert all(map(torch.equal, ended[0].parameters(), ended[1].parameters()))


def test_evaluation_goes_by_memory_too(tmp_path, monkeypatch):
    """In groups where it is short, with the same outcome; validation of thoughts reads each text twice, to sample and to examine."""
    found, read = [], []
    attend = TextReading.attend
    trainer = tiny_trainer(tmp_path, evaluation=text_data(6, 90), thought_positions="all", beta=0.1)
    monkeypatch.setattr(TextReading, "attend", lambda self, *args, **own: read.append(0) or attend(self, *args, **own))
    for free in (1e12, 1e5):
        monkeypatch.setattr(thinker_module, "free_bytes", lambda device, free=free: free)
        metrics = trainer.evaluate()
        read.clear()
        report = trainer.validate_thoughts()
        assert len(read) == 2 * 2  # of one batch, by 2 layers
        found.append(
            ({name: metrics[name] for name in ("eval_loss", "eval_reward", "eval_coherence")}, report.metrics())
        )
    text = trainer.thinker.text(next(iter(trainer.get_eval_dataloader())))
    assert trainer.thinker.plan(text, training=False).scoring is not None
    for name in found[0][0]:
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=1e-4, abs=1e-6)
    for name, value in found[0][1].items():
        assert found[1][1][name] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5))


def test_what_is_to_come_is_left_free(monkeypatch):
    """A gradient and two moments of each trainable parameter."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 10**9)
    model = tiny_model("llama")
    assert memory_budget(model) == 10**9 - 12 * sum(p.numel() for p in model.parameters())
    assert memory_budget(model.requires_grad_(False)) == 10**9


def test_long_thoughts_take_two_passes():
    """Copies of keys and values, 2 · 2 · 32 · 4 bytes a slot for half of the slots, must not exceed what a slot keeps, and fit."""
    model = tiny_model("llama", num_key_value_heads=4)
    for slots, free, expected in [(20, 1e12, True), (21, 1e12, False), (20, 2 * 20 * 2 * 5120 / 0.6 * 0.99, False)]:
        assert suits_one_pass(model, 5120, Size(1, 0, 2, slots), free) is expected


def test_thoughts_of_the_length_of_a_text_are_sampled_first(tmp_path, monkeypatch):
    """Left alone, the trainer does not keep the graph of sampling where thoughts are long."""
    monkeypatch.setattr(memory_module, "free_bytes", lambda device: 1e12)
    for length, one_pass in ((3, True), (60, False)):
        trainer = tiny_trainer(tmp_path, thought_length=length)
        text = trainer.thinker.text(next(iter(trainer.get_train_dataloader())))
        assert trainer.thinker.plan(text, training=True) == Plan(one_pass)


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
