"""Low precision: how far scores in half precision and of quantized models lie from float32, and that they train."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.precision import has_bf16, warn_of_precision
from trl_quietstar.thinking.check import QUANTIZED_TOLERANCE, path_difference
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .tiny import mixed_text, think, tiny_model
from .training import logged, plain_model, saved_model, text_data, tiny_trainer


# largest difference of a log-probability in nats from float32 with the same weights, on the tiny random model, whose
# predictions are far more peaked than a trained model's
STATED = {torch.bfloat16: 0.5, torch.float16: 0.05}
QUANTIZED = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True),
    "NF4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}


def lora() -> LoraConfig:
    """A new one each time: PEFT writes the base's name into it."""
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def assert_learns(trainer) -> None:
    """The evaluation data's likelihood improves, with thoughts and without."""
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_nll_with", "eval_nll_without"):
        assert after[name] < before[name], name


def largest_difference(a, b) -> float:
    """Over all log-probabilities."""
    names = ("thought_logps", "talk_logps", "reader_logps", "text_logps")
    return max(float((getattr(a, name).double() - getattr(b, name).double()).abs().max()) for name in names)


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()], ids=["shared prefix", "replay"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
@pytest.mark.parametrize("dtype", STATED)
def test_half_precision_scores_as_float32_within_the_stated_tolerance(dtype, autocast, path):
    """The same thoughts by the same weights, which are rounded to the lower precision first."""
    model, text = tiny_model(), mixed_text()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    request = ScoreRequest(text, think(model, text), 3, path)
    with torch.no_grad():
        expected = score(model, request)
        if autocast:
            with torch.autocast("cpu", dtype):
                found = score(model, request)
        else:
            found = score(model.to(dtype), request)
    difference = largest_difference(found, expected)
    assert 0 < difference < STATED[dtype]


@pytest.mark.parametrize("options", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
def test_mixed_precision_trains(options, tmp_path):
    """Weights stay float32, everything is finite, and the likelihood improves."""
    trainer = tiny_trainer(tmp_path, max_steps=8, evaluation=text_data(8), **options)
    assert_learns(trainer)
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_model_trains_with_its_heads_in_float32(dtype, tmp_path):
    """Heads are small and learn at a high rate; the base keeps the precision it was asked for."""
    trainer = tiny_trainer(
        tmp_path,
        model=saved_model(tmp_path / "m"),
        max_steps=10,
        model_init_kwargs={"dtype": dtype},
        peft_config=lora(),
        learning_rate=1e-2,
        evaluation=text_data(8),
    )
    assert_learns(trainer)
    base = trainer.model.get_base_model()
    assert base.dtype == getattr(torch, dtype) and base.quietstar.start_embedding.dtype == torch.float32


def warnings_of_rounding(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "rounded away" in r.getMessage()]


@pytest.mark.parametrize(
    ("dtype", "options", "is_told"),
    [
        (torch.bfloat16, dict(learning_rate=1e-6), True),
        (torch.bfloat16, dict(learning_rate=1e-6, muon_learning_rate=0.3), True),  # embeddings and norms are left
        (torch.bfloat16, dict(learning_rate=0.3), False),
        (torch.bfloat16, dict(learning_rate=0.0), False),  # the heads alone, on purpose
        (torch.bfloat16, dict(learning_rate=1e-6, peft_config=lora()), False),
        (torch.float32, dict(learning_rate=1e-6), False),
    ],
)
def test_weights_that_updates_do_not_change_are_told(dtype, options, is_told, tmp_path, caplog):
    """A model that a user has loaded may be in bfloat16, whose weights AdamW at the default rate leaves as they were."""
    model = plain_model().to(dtype)
    trainer = tiny_trainer(tmp_path, model, max_steps=1, **options)
    weights = [p for p in model.parameters() if p.requires_grad and p.dtype == dtype != torch.float32]
    before = [p.detach().clone() for p in weights]
    trainer.train()
    told = warnings_of_rounding(caplog)
    assert len(told) == is_told
    if is_told and "muon_learning_rate" not in options:
        changed = sum((p != b).sum().item() for p, b in zip(weights, before, strict=True))
        assert 0 < changed / sum(p.numel() for p in weights) < 0.02
        assert "are bfloat16" in told[0] and "learning rate (1e-06)" in told[0] and "`dtype=torch.float32`" in told[0]


def test_float16_weights_are_refused_where_gradients_are_scaled(tmp_path, monkeypatch):
    """PyTorch says of them in the middle of the first step that it does not unscale them."""
    trainer = tiny_trainer(tmp_path, plain_model().half())
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu"))  # as on a GPU
    with pytest.raises(ValueError, match=r"`fp16=True` scales gradients.*`dtype=torch.float32`"):
        trainer.train()


def test_a_base_that_stays_frozen_is_loaded_in_bfloat16(tmp_path):
    """Under `bf16` and LoRA, also where training goes on with a saved adapter: in float32 it would take twice the memory."""
    whole = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    path = saved_model(tmp_path / "m")
    for name, config, bf16, expected in [
        ("frozen", lora(), True, torch.bfloat16),
        ("head", whole, True, torch.float32),
        ("full", lora(), False, torch.float32),
    ]:
        first = tiny_trainer(tmp_path / name, path, peft_config=config, bf16=bf16)
        first.save_model()
        again = tiny_trainer(tmp_path / "again", str(tmp_path / name), bf16=bf16)
        for trainer in (first, again):
            base = trainer.model.get_base_model()
            assert base.dtype == expected, name
            assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}, name
    (tmp_path / "head/adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged: it is no valid JSON"):
        tiny_trainer(tmp_path / "again", str(tmp_path / "head"), bf16=True)


@pytest.mark.parametrize("name", ["8 bits", "NF4", pytest.param("4 bits", marks=pytest.mark.slow)])
def test_a_quantized_model_learns_by_its_adapter(name, tmp_path):
    """4 and 8 bits, on the shared prefix, saved as an adapter repository and loaded back."""
    pytest.importorskip("bitsandbytes")
    path = saved_model(tmp_path / "m", hidden_size=64, intermediate_size=64)
    trainer = tiny_trainer(
        tmp_path,
        model=path,
        max_steps=10,
        quantization_config=QUANTIZED[name],
        peft_config=lora(),
        learning_rate=1e-2,
        evaluation=text_data(8),
    )
    base = trainer.model.get_base_model()
    assert base.is_quantized and isinstance(trainer.path, SharedPrefix)
    assert path_difference(base.eval(), SharedPrefix()) < QUANTIZED_TOLERANCE
    assert_learns(trainer)
    trainer.save_model(tmp_path / "saved")
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=QUANTIZED[name])
    expected, found = (m.get_base_model().quietstar.state_dict() for m in (trainer.model, again))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_gradients_pass_through_4_bit_layers_after_sampling(tmp_path):
    """They are those of the same weights in full; sampling in `eval()` mode must not switch to kernels without any."""
    bnb = pytest.importorskip("bitsandbytes")
    path = saved_model(tmp_path / "m", hidden_size=64, intermediate_size=64)
    trainer = tiny_trainer(tmp_path, model=path, quantization_config=QUANTIZED["4 bits"], peft_config=lora())
    base, text = trainer.model.get_base_model(), mixed_text()
    request = ScoreRequest(text, think(base.eval(), text), 3, trainer.path)

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train().zero_grad()
        score(base, request).talk_logps.sum().backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}

    quantized = gradients()
    for module in trainer.model.modules():
        if isinstance(getattr(module, "base_layer", None), bnb.nn.Linear4bit):
            weight = module.base_layer.weight
            full = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            module.base_layer = torch.nn.Linear(full.shape[1], full.shape[0], bias=False)
            module.base_layer.weight.data = full
    for name, expected in gradients().items():
        torch.testing.assert_close(quantized[name], expected, rtol=1e-3, atol=1e-4)
        assert expected.abs().sum() > 0


def test_what_cannot_be_quantized_is_refused(tmp_path):
    """Before anything is loaded."""
    config, path = BitsAndBytesConfig(load_in_8bit=True), saved_model(tmp_path / "m")
    with pytest.raises(ValueError, match="own weights cannot be trained; pass a `peft_config`"):
        tiny_trainer(tmp_path, model=path, quantization_config=config)
    with pytest.raises(ValueError, match="loaded already together with a `quantization_config`"):
        tiny_trainer(tmp_path, quantization_config=config, peft_config=lora())
    with pytest.raises(ValueError, match="given twice"):
        tiny_trainer(
            tmp_path,
            model=path,
            quantization_config=config,
            peft_config=lora(),
            model_init_kwargs={"quantization_config": config},
            data=text_data(),
        )


def test_bf16_is_for_an_accelerator_that_has_it(tmp_path, monkeypatch):
    """And is used: a run on the CPU of such a machine stays in float32."""
    for module, name in (
        (torch.accelerator, "is_available"),
        (torch.cuda, "is_available"),
        (torch.cuda, "is_bf16_supported"),
    ):
        monkeypatch.setattr(module, name, lambda **_: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert has_bf16()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)  # a T4
    assert not has_bf16()
    assert not QuietStarConfig(str(tmp_path), use_cpu=True).bf16
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert not has_bf16()


def test_bf16_on_a_gpu_without_instructions_for_it_warns(monkeypatch, caplog):
    """Such as a T4, where PyTorch emulates it; Transformers takes it for supported."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    args = dict(device=torch.device("cuda"), fp16=False, bf16=True, bf16_full_eval=False)
    warn_of_precision(SimpleNamespace(**args | {"bf16": False}))
    assert not caplog.records
    warn_of_precision(SimpleNamespace(**args))
    assert "this GPU has no instructions for bfloat16. Take `fp16=True`, or leave it out." in caplog.text


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_processor_without_instructions_for_it_warns(tmp_path, monkeypatch, caplog, supported):
    """A step takes ten times as long there."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    QuietStarConfig(str(tmp_path), use_cpu=True)
    assert "bfloat16" not in caplog.text
    QuietStarConfig(str(tmp_path), use_cpu=True, bf16=True, bf16_full_eval=True)
    assert ("`bf16=True` and `bf16_full_eval=True`: this processor has no" in caplog.text) != supported


def loaded(tmp_path, **options):
    """Dtypes of frozen weights, and of those that are trained, of a model that the trainer loads for LoRA."""
    options = {"bf16": True, "peft_config": LoraConfig(target_modules="all-linear"), **options}
    trainer = tiny_trainer(tmp_path / "run", saved_model(tmp_path / "model"), **options)
    parameters = list(trainer.model.parameters())
    return trainer, *({p.dtype for p in parameters if p.requires_grad is trained} for trained in (False, True))


def test_frozen_weights_are_in_bf16_where_autocast_is(tmp_path):
    """Autocast would copy them at every forward of a thought's token."""
    trainer, frozen, trained = loaded(tmp_path)
    assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(before[name].dtype == torch.float32 for name in moved)
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))
    inputs = trainer.processing_class("3 plus 4 is", return_tensors="pt")
    assert trainer.model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 2


def test_a_model_in_mixed_precision_is_checked_in_its_own(tmp_path):
    """The trainer's model has a forward under autocast, and may first generate after its training."""
    trainer = tiny_trainer(tmp_path, bf16=True, max_steps=1)
    trainer.train()
    wrapped = vars(trainer.model)["forward"]
    with trainer.accelerator.autocast():
        assert type(trainer.model.thought_path) is SharedPrefix and trainer.model.branches_in_cache
    assert vars(trainer.model)["forward"] is wrapped


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": False},
        {"model_init_kwargs": {"dtype": "float32"}},
        {"peft_config": LoraConfig(target_modules="all-linear", bias="all")},
        {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights="pissa")},
    ],
    ids=["no autocast", "asked for", "trained biases", "weights split off"],
)
def test_other_weights_stay_in_float32(options, tmp_path):
    _, frozen, trained = loaded(tmp_path, **options)
    assert frozen == trained == {torch.float32}
