"""Muon beside AdamW, and Grokfast: which parameter goes where, and that a step is the one written out by hand."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from trl_quietstar.model.adapters import base_of
from trl_quietstar.training.optimizers import CombinedOptimizer, check_optimizers, hidden_weights

from .conformance import tiny_model as any_model
from .tiny import tiny_model
from .training import plain_model, saved_model, tiny_args, tiny_trainer


LAMBDA, ALPHA = 0.5, 0.9


# Which parameter goes where


def muon_names(model: nn.Module) -> set[str]:
    """Names of Muon's parameters, each once."""
    ids = [id(p) for p in hidden_weights(model)]
    assert len(ids) == len(set(ids))
    return {name for name, p in model.named_parameters() if id(p) in ids}


LAYER_MATRICES = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYER_MATRICES)
def test_muon_takes_the_matrices_of_the_layers(name, tied):
    """And nothing else: no embedding of tokens or positions, LM head, norm, bias or thinking head, tied or not."""
    prefix = "transformer.h" if name == "gpt2" else "model.layers"
    expected = {f"{prefix}.{i}.{matrix}.weight" for i in range(2) for matrix in LAYER_MATRICES[name]}
    assert muon_names(tiny_model(name, tie_word_embeddings=tied)) == expected


def test_muon_takes_attention_and_router_of_a_mixture_of_experts():
    """The experts, which are fused into three dimensions, are AdamW's."""
    model = any_model("mixtral")
    names = muon_names(model)
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate"}
    assert any(p.ndim == 3 for p in model.parameters())


def test_muon_leaves_matrices_that_multiply_nothing():
    """Mamba's `A_log` has two dimensions and is no weight."""
    names = muon_names(any_model("mamba"))
    assert names and {name.split(".")[-2] for name in names} == {"in_proj", "x_proj", "dt_proj", "out_proj"}


CASES = {
    "llama": lambda: (plain_model(), None),
    "tied": lambda: (plain_model(tie_word_embeddings=True), None),
    "gpt2": lambda: (plain_model("gpt2"), None),
    "lora": lambda: (plain_model(), LoraConfig(r=4, target_modules="all-linear")),
    "lora and head": lambda: (
        plain_model(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    ),
    "mixture of experts": lambda: (any_model("mixtral"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_in_one_group(case, tmp_path):
    """Each trainable parameter is optimised once: matrices by Muon, the heads at their rate, all else at the model's."""
    model, peft_config = CASES[case]()
    options = {} if case != "mixture of experts" else dict(value_head_hidden_size=256)
    trainer = tiny_trainer(tmp_path, model, peft_config=peft_config, muon_learning_rate=0.5, **options)
    groups = trainer.create_optimizer().param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    heads = {id(p) for p in base_of(trainer.model).quietstar.parameters()}
    muon = {id(p) for p in hidden_weights(trainer.model)}
    assert muon and not muon & heads
    for group in groups:
        for p in group["params"]:
            assert group["lr"] == (0.5 if id(p) in muon else 1e-2 if id(p) in heads else 1e-3)
            assert group["weight_decay"] == 0.0
    if peft_config is not None:
        names = muon_names(trainer.model)
        assert all(".lora_A." in name or ".lora_B." in name for name in names)


# The step


def toy() -> nn.ParameterDict:
    """A matrix for Muon, and for AdamW a vector and a parameter that never has a gradient; in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (6, 4), "vector": (5,), "unused": (3,)}
    return nn.ParameterDict(
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    )


def combined(model: nn.ParameterDict, **grokfast) -> CombinedOptimizer:
    """Muon and AdamW of [`toy`]."""
    adamw = torch.optim.AdamW([model["vector"], model["unused"]], lr=0.1, weight_decay=0.2)
    muon = torch.optim.Muon([model["matrix"]], lr=0.3, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    return CombinedOptimizer([adamw, muon], model, **grokfast)


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Of the step's loss."""
    generator = torch.Generator().manual_seed(step)
    return {
        "matrix": torch.randn(6, 4, generator=generator, dtype=torch.float64),
        "vector": torch.randn(5, generator=generator, dtype=torch.float64),
    }


def steps(model: nn.ParameterDict, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Makes them, with gradients of their own."""
    for step in range(first, last):
        optimizer.zero_grad()
        for name, gradient in gradients(step).items():
            model[name].grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("weight", [0.0, LAMBDA])
def test_a_step_is_that_of_each_alone(weight):
    """Muon alone on the matrix and AdamW alone on the rest, fed with Grokfast's formula by hand, in float64."""
    if weight:
        pytest.importorskip("pytorch_optimizer")
    ours, oracle = toy(), toy()
    steps(ours, combined(ours, grokfast_lambda=weight, grokfast_alpha=ALPHA), 0, 5)
    muon = torch.optim.Muon([oracle["matrix"]], lr=0.3, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([oracle["vector"]], lr=0.1, weight_decay=0.2)
    averages = gradients(0)
    for step in range(5):
        for name, gradient in gradients(step).items():
            averages[name] = ALPHA * averages[name] + (1 - ALPHA) * gradient
            oracle[name].grad = gradient + weight * averages[name]
        muon.step(), adamw.step()
    for name in ("matrix", "vector", "unused"):
        torch.testing.assert_close(ours[name], oracle[name], rtol=1e-12, atol=1e-12, msg=name)
    assert torch.equal(ours["unused"], toy()["unused"])


def test_a_schedule_scales_every_group():
    """By the same factor, also after a state was loaded, which replaces the groups."""
    model = toy()
    optimizer = combined(model)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    before = {name: p.detach().clone() for name, p in model.items()}
    optimizer.step(), schedule.step(), schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.075]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, 0, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.items())


@pytest.mark.parametrize("weight", [0.0, LAMBDA])
def test_a_saved_state_goes_on_as_before(weight, tmp_path):
    """To the last bit, averages included, through a file; without the state it would not."""
    if weight:
        pytest.importorskip("pytorch_optimizer")
    options = dict(grokfast_lambda=weight, grokfast_alpha=ALPHA)
    whole = toy()
    optimizer = combined(whole, **options)
    steps(whole, optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, forgetful = copy.deepcopy(whole), copy.deepcopy(whole)
    again = combined(resumed, **options)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(whole, optimizer, 3, 6), steps(resumed, again, 3, 6)
    steps(forgetful, combined(forgetful, **options), 3, 6)
    for name in ("matrix", "vector"):
        assert torch.equal(resumed[name], whole[name]) and not torch.equal(forgetful[name], whole[name])


def test_an_overflow_leaves_the_averages_alone():
    """Under a gradient scaler the average is of unscaled gradients, and a skipped step changes nothing."""
    pytest.importorskip("pytorch_optimizer")
    model, scaler = toy(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = combined(model, grokfast_lambda=LAMBDA, grokfast_alpha=ALPHA)
    scaler.scale(torch.zeros(()))  # a scaler learns its scale from a loss
    for gradient in (8.0, float("inf")):
        model["vector"].grad = torch.full((5,), gradient, dtype=torch.float64)
        scaler.step(optimizer), scaler.update()
        assert optimizer.state["grokfast"]["vector"].tolist() == [1.0] * 5
    assert optimizer.state[model["vector"]]["step"] == 1


def test_a_closure_is_evaluated_with_gradient():
    """As `torch.optim` promises: it may call `backward`, and its loss is returned."""
    model = toy()

    def closure():
        loss = model["vector"].square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert combined(model).step(closure).item() == before


# In the trainer


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to step on: the gradient after clipping."""

    def __init__(self):
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_grokfast_averages_the_clipped_gradient_of_the_whole_batch(tmp_path):
    """Once a step, however many micro-batches are accumulated."""
    pytest.importorskip("pytorch_optimizer")
    gradients = Gradients()
    trainer = tiny_trainer(
        tmp_path, grokfast_lambda=LAMBDA, grokfast_alpha=ALPHA, max_grad_norm=0.1, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, callbacks=[gradients],
    )  # fmt: skip
    trainer.train()
    assert len(gradients.seen) == 3
    averages = gradients.seen[0]
    for seen in gradients.seen[1:]:
        averages = {name: torch.lerp(averages[name], gradient, 1 - ALPHA) for name, gradient in seen.items()}
    saved = trainer.optimizer.state["grokfast"]
    assert saved.keys() == averages.keys()
    for name, average in averages.items():
        torch.testing.assert_close(saved[name], average, msg=name)
    assert torch.stack([average.norm() for average in saved.values()]).norm() <= 0.1001


def test_muon_trains_an_adapter_on_a_quantized_model(tmp_path):
    """The quantized weights are frozen; the adapter's matrices, which are not, move."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    trainer = tiny_trainer(
        tmp_path / "out", saved_model(tmp_path / "model"), muon_learning_rate=1e-3,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert before and muon_names(trainer.model) >= before.keys()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


# Refused


ASKED = [dict(muon_learning_rate=1e-3), dict(grokfast_lambda=0.1)]


@pytest.mark.parametrize("asked", ASKED, ids=["muon", "grokfast"])
def test_an_optimizer_of_the_user_s_is_refused(asked, tmp_path):
    """Beside it the fields would be ignored."""
    model = plain_model()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="would be ignored.*`optimizers`"):
        tiny_trainer(tmp_path, model, optimizers=(optimizer, None), **asked)


def test_a_scheduler_without_its_optimizer_is_refused(tmp_path):
    """Its rates would be logged, and those of another one trained with."""
    model = plain_model()
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters()), lambda step: 0.0)
    with pytest.raises(ValueError, match="a scheduler without its optimizer"):
        tiny_trainer(tmp_path, model, optimizers=(None, scheduler))


@pytest.mark.parametrize("asked", ASKED, ids=["muon", "grokfast"])
def test_sharded_parameters_are_refused(asked, tmp_path):
    """FSDP and DeepSpeed, as far as a single process can tell: by what the trainer says of itself."""
    with pytest.raises(ValueError, match="FSDP or DeepSpeed"):
        check_optimizers(tiny_args(tmp_path, **asked), (None, None), sharded=True)
    check_optimizers(tiny_args(tmp_path), (None, None), sharded=True)


def test_muon_without_a_matrix_is_refused(tmp_path):
    """The message says what has none."""
    model = plain_model()
    for parameter in hidden_weights(tiny_trainer(tmp_path, model).model):
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no hidden weight to train"):
        tiny_trainer(tmp_path, model, muon_learning_rate=1e-3).create_optimizer()
