"""Every method of PEFT trains as it says, or is refused by name; and what a run with an adapter starts from."""

import copy
import functools

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, TrainerCallback

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer, QuietStarSettings
from trl_quietstar.model.adapters import AdapterReference, base_of
from trl_quietstar.modeling import attach_heads
from trl_quietstar.text.batch import Text
from trl_quietstar.thinking.check import _text_logps

from .tiny import byte_tokenizer
from .training import logged, plain_model, saved_model, text_data, tiny_args, tiny_trainer


MODULES = ["q_proj", "v_proj"]
LORA = dict(r=4, target_modules=MODULES)
IDS = torch.arange(1, 13)[None]
METHODS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# what a method needs to be told for layers as small as these
OPTIONS: dict[str, dict] = {
    "ADALORA": dict(total_step=20, target_modules=MODULES),
    "ADAPTION_PROMPT": dict(adapter_len=4, adapter_layers=2),
    "BOFT": dict(boft_block_size=4, target_modules=MODULES),
    "C3A": dict(block_size=8, target_modules=MODULES),
    "CPT": dict(cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "FOURIERFT": dict(n_frequency=10, target_modules=MODULES),
    "IA3": dict(target_modules=MODULES, feedforward_modules=[]),
    "LN_TUNING": dict(target_modules=["input_layernorm"]),
    "MISS": dict(r=4, target_modules=MODULES),
    "OFT": dict(oft_block_size=4, target_modules=MODULES),
    "PSOFT": dict(r=4, target_modules=MODULES),
    "ROAD": dict(group_size=8, target_modules=MODULES),
    "SHIRA": dict(r=2, target_modules=MODULES),
    "TRAINABLE_TOKENS": dict(token_indices=[1, 2, 3, 40]),
    "VBLORA": dict(num_vectors=16, vector_length=4, topk=2, r=2, target_modules=MODULES),
    "WAVEFT": dict(n_frequency=16, target_modules=MODULES),
    **dict.fromkeys(
        ("CARTRIDGE", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
        dict(num_virtual_tokens=4),
    ),
    "XLORA": dict(adapters={}),
}
REFUSED = {
    **dict.fromkeys(
        ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), "virtual tokens"
    ),
    "ADALORA": "prunes ranks",
    "POLY": "task_ids",
    "SHADOW": "second state",
    "XLORA": "weighs its adapters",
}
# ways to begin, and to train more or elsewhere
LORAS = {
    "pissa": dict(init_lora_weights="pissa"),
    "random": dict(init_lora_weights=False),
    "dora": dict(use_dora=True),
    "bias": dict(bias="all"),
    "embeddings": dict(target_modules=["embed_tokens", "q_proj"]),
    "saved modules": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": dict(trainable_token_indices=[1, 2, 3]),
}


@functools.cache
def base_folder(root) -> str:
    """A plain model with its tokenizer, once for all tests of this file."""
    return saved_model(root / "base")


@pytest.fixture
def base(tmp_path_factory) -> str:
    return base_folder(tmp_path_factory.getbasetemp())


def config_of(name: str, **changes) -> PeftConfig:
    options = OPTIONS.get(name, dict(target_modules=MODULES))
    return METHODS[name](task_type="CAUSAL_LM", **{**options, **changes})


@torch.no_grad()
def logps(model) -> torch.Tensor:
    """Log-probabilities of a text by the model's own forward."""
    logits = model.eval()(input_ids=IDS).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, IDS[0, 1:, None]).squeeze(-1)


def trained(folder, base: str, config: PeftConfig):
    """A trainer that took three steps against its reference, with how each trained parameter began."""
    trainer = tiny_trainer(folder, model=base, peft_config=config, learning_rate=1e-2, beta=0.1)
    began = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return trainer, began


def assert_trains_as_it_says(folder, base: str, config: PeftConfig) -> None:
    """Each trained parameter moves, KL begins at 0, scores are those of the logits, and the saved adapter is the trained one."""
    trainer, began = trained(folder / "out", base, config)
    own = dict(trainer.model.named_parameters())
    assert len(began) > 12  # more than the heads
    assert not [name for name, before in began.items() if torch.equal(own[name], before)]
    divergences = [entry["rl/kl_divergence"] for entry in logged(trainer)]
    assert divergences[0] == pytest.approx(0, abs=1e-9) and divergences[2] > 1e-9
    expected = logps(trainer.model)
    assert (expected - logps(QuietStarForCausalLM.from_pretrained(base))).abs().max() > 1e-4
    scored = _text_logps(base_of(trainer.model), trainer.path, Text.from_batch(IDS)).detach()
    torch.testing.assert_close(scored[0], expected, rtol=0, atol=1e-5)
    trainer.save_model()
    again = QuietStarForCausalLM.from_pretrained(folder / "out")
    torch.testing.assert_close(logps(again), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_a_name_that_no_module_has(option, base, tmp_path, caplog):
    """PEFT passes over it where another fits, so that less is trained than was meant."""
    misspelt = (
        {option: ["q_proj", "k_porj", "mlp.up_proj"]}
        if option == "target_modules"
        else {option: ["embed_token", "head"]}
    )
    tiny_trainer(tmp_path, model=base, peft_config=LoraConfig(**{**LORA, **misspelt}, task_type="CAUSAL_LM"))
    absent = "'k_porj'" if option == "target_modules" else "'embed_token'"
    assert f"`{option}` names {absent}, and no module" in caplog.text


def marked(names, quick):
    """Those that few others are like at every run, the rest with the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", marked([x for x in METHODS if x not in REFUSED], ("LN_TUNING", "OFT", "SHIRA", "VBLORA"))
)
def test_a_method_trains_as_it_says(name, base, tmp_path):
    """All of the installed PEFT."""
    assert_trains_as_it_says(tmp_path, base, config_of(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", marked(LORAS, ("pissa", "bias", "saved modules")))
def test_lora_trains_as_it_says(name, base, tmp_path):
    """However it begins, and wherever it is."""
    assert_trains_as_it_says(tmp_path, base, LoraConfig(**{**LORA, **LORAS[name]}))


# What is refused


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_would_not_be_trained_is_refused_by_name(name, tmp_path):
    """Before any compute, as a configuration and as a `PeftModel`."""
    config = config_of(name)
    match = f"{type(config).__name__} .*{REFUSED[name]}"
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, peft_config=config)
    if name in ("PROMPT_TUNING", "PREFIX_TUNING", "ADALORA"):  # others need more than a tiny model
        with pytest.raises(ValueError, match=match):
            tiny_trainer(tmp_path, model=get_peft_model(plain_model(), config))


def test_a_saved_method_that_would_not_be_trained_is_refused_by_name(base, tmp_path):
    """Also where another trainer saved it."""
    trainer = tiny_trainer(tmp_path / "out", model=base, peft_config=LoraConfig(**LORA))
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, config_of("PROMPT_TUNING")).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="PromptTuningConfig .*virtual tokens"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"), "alora_invocation_tokens.*embeddings"),
        (dict(task_type="SEQ_CLS"), "`task_type`.*'SEQ_CLS'.*CAUSAL_LM"),
        (dict(target_modules=["lm_head"]), "LM head.*'lm_head'.*exclude_modules=.*modules_to_save"),
    ],
)
def test_an_option_that_would_not_be_trained_is_refused_by_name(options, match, tmp_path):
    """LoRA has some."""
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, peft_config=LoraConfig(**{**LORA, **options}))


def test_the_lm_head_is_named_as_the_model_names_it(tmp_path):
    """Advice names what is there: BERT calls it a decoder, and a pattern may match it unasked."""
    config = BertConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    with pytest.raises(ValueError, match=r"exclude_modules=\['decoder'\]"):
        peft_config = LoraConfig(r=4, target_modules=r".*(query|decoder)")
        tiny_trainer(tmp_path, model=BertLMHeadModel(config), peft_config=peft_config)


@pytest.fixture
def adapter(base, tmp_path) -> str:
    """A plain LoRA adapter that was trained before: PEFT's files alone."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_what_is_frozen_is_refused(base, adapter, tmp_path):
    """Nothing but the heads would be trained; evaluation alone is no training."""
    frozen = PeftModel.from_pretrained(plain_model(), adapter)
    with pytest.raises(ValueError, match="adapter is frozen.*is_trainable=True"):
        tiny_trainer(tmp_path, model=frozen)
    with pytest.raises(ValueError, match="adapter is frozen.*inference_mode=False"):
        tiny_trainer(tmp_path, peft_config=PeftConfig.from_pretrained(adapter))
    with pytest.raises(ValueError, match="All parameters of the model are frozen"):
        tiny_trainer(tmp_path, model=plain_model().requires_grad_(False))
    with pytest.raises(ValueError, match="Transformers put in"):
        tiny_trainer(tmp_path, model=AutoModelForCausalLM.from_pretrained(adapter))
    tiny_trainer(tmp_path, model=PeftModel.from_pretrained(plain_model(), adapter, is_trainable=True))


def test_adapters_that_would_not_be_read_again_are_refused(adapter, base, tmp_path):
    """One of another name, and a second one."""
    with pytest.raises(ValueError, match=r"\['other'\].*adapter_name='default'"):
        tiny_trainer(tmp_path, model=get_peft_model(plain_model(), LoraConfig(**LORA), adapter_name="other"))
    tiny_trainer(tmp_path / "out", model=base, peft_config=LoraConfig(**LORA)).save_model()
    with pytest.raises(ValueError, match="is an adapter, and you passed a `peft_config`"):
        tiny_trainer(tmp_path, model=str(tmp_path / "out"), peft_config=LoraConfig(**LORA))


# What a run starts from


def test_the_reference_of_a_trained_adapter_is_that_adapter(base, adapter, tmp_path):
    """Not the base below it, and it stays while the adapter is trained."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    trainer = tiny_trainer(tmp_path, model=model, no_thought_model="reference", beta=0.1, evaluation=text_data(8, 300))
    before, own = trainer.evaluate(), [p.clone() for p in model.parameters()]
    trainer.train()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), own, strict=True))
    divergences = [entry["rl/kl_divergence"] for entry in logged(trainer)]
    assert divergences[0] == pytest.approx(0, abs=1e-9) and divergences[2] > 1e-9
    after = trainer.evaluate()
    assert after["eval_nll_with"] != before["eval_nll_with"]
    assert after["eval_nll_without"] == before["eval_nll_without"]


def test_a_copy_of_an_adapter_is_not_sharded(adapter):
    """A new LoRA needs none, and is a reference under any engine."""
    model = get_peft_model(plain_model(), LoraConfig(**LORA))
    attach_heads(base_of(model), QuietStarSettings())
    AdapterReference(model, sharded=True)
    model = PeftModel.from_pretrained(plain_model(), adapter, is_trainable=True)
    attach_heads(base_of(model), QuietStarSettings())
    AdapterReference(model, sharded=False)
    with pytest.raises(ValueError, match="FSDP and ZeRO-3 would not shard"):
        AdapterReference(model, sharded=True)


def test_an_adapter_on_a_resized_vocabulary_comes_back(tmp_path):
    """PEFT saves the embeddings beside it; the base is resized to them."""
    path = saved_model(tmp_path / "base", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(model.config.vocab_size + 7)
    trainer = tiny_trainer(tmp_path / "out", model=model, peft_config=LoraConfig(**LORA), learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logps(again), logps(trainer.model), rtol=0, atol=1e-6)


# Gradients


def gradients(folder, model, **options) -> dict[str, torch.Tensor]:
    """Of the first step, by name."""
    found: dict[str, torch.Tensor] = {}

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    tiny_trainer(folder, model=model, max_steps=1, max_grad_norm=0.0, callbacks=[Recorder()], **options).train()
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_reentrant_checkpointing_of_the_model_is_exact(lora, tmp_path):
    """Switched on on the model rather than in the configuration, as `prepare_model_for_kbit_training` does it."""
    options = dict(peft_config=LoraConfig(**LORA, init_lora_weights=False)) if lora else {}
    expected = gradients(tmp_path, plain_model(), **copy.deepcopy(options))
    model = plain_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if lora:  # the standard recipe
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model)
        del model.is_loaded_in_4bit
    found = gradients(tmp_path, model, **options)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# An optimizer that was made before the trainer


def test_an_optimizer_made_before_the_heads_trains_them(tmp_path):
    """They become a group of their own."""
    model = plain_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = tiny_trainer(tmp_path, model=model, optimizers=(optimizer, None), heads_learning_rate=2e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-2]
    trainer.train()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_an_optimizer_without_all_that_is_trained_is_refused(tmp_path):
    """Of another model, of the base alone, or with a scheduler that knows no further group."""
    with pytest.raises(
        ValueError, match="parameters that are to be trained in none of its groups: model.embed_tokens"
    ):
        other = torch.optim.AdamW(plain_model().parameters())
        tiny_trainer(tmp_path, optimizers=(other, None))
    with pytest.raises(ValueError, match="in none of its groups: .*lora_A"):
        model = plain_model()
        optimizer = torch.optim.AdamW(model.parameters())
        tiny_trainer(tmp_path, model=model, peft_config=LoraConfig(**LORA), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="in none of its groups: quietstar.start_embedding"):
        model = plain_model()
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        tiny_trainer(tmp_path, model=model, optimizers=(optimizer, scheduler))


@pytest.mark.parametrize(
    ("rates", "is_told"),
    [
        ({}, True),  # the default is for all weights
        (dict(learning_rate=1e-4), False),
        (dict(learning_rate=0.0), False),  # the heads alone, on purpose
        (dict(muon_learning_rate=1e-3), False),
    ],
)
def test_a_rate_at_which_lora_hardly_learns_is_told(rates, is_told, tmp_path, caplog):
    """Whether the adapter is made here or given. All weights learn at such a rate, and without training data nothing does."""
    default = dict(learning_rate=QuietStarConfig(str(tmp_path)).learning_rate)
    config = LoraConfig(target_modules="all-linear")
    given = dict(model=get_peft_model(plain_model(), config))
    for options in (dict(peft_config=config), given, {}):
        caplog.clear()
        tiny_trainer(tmp_path, **{**default, **rates, **options})
        assert ("LoRA hardly learns" in caplog.text) == (is_told and options != {})
    caplog.clear()
    evaluates = dict(eval_dataset=text_data(4), processing_class=byte_tokenizer(), peft_config=config)
    QuietStarREINFORCETrainer(plain_model(), tiny_args(tmp_path, **{**default, **rates}), **evaluates)
    assert "LoRA hardly learns" not in caplog.text
