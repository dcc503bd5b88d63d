"""`trl-quietstar merge`: one model of an adapter, its base and its heads."""

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, OFTConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.cli import main
from trl_quietstar.model.adapters import base_of

from .training import saved_model, tiny_trainer


LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
MODULES = ["q_proj", "v_proj"]
IDS = torch.arange(1, 13)[None]
GREEDY = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)


def adapter_in(folder, config, **base) -> str:
    """The folder of an adapter as it may be after training on a tiny model, whose thoughts decide what is said."""
    path = base.pop("path", None) or saved_model(folder / "base", **base)
    trainer = tiny_trainer(folder / "adapter", model=path, peft_config=config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        base_of(trainer.model).quietstar.mixing_head.bias.fill_(3)
    trainer.save_model()
    return str(folder / "adapter")


@torch.no_grad()
def logps(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float().log_softmax(-1)


def assert_merges(folder, config, **base) -> None:
    """What is saved loads plainly and as a thinking model, and is the adapter's model."""
    adapter, output = adapter_in(folder, config, **base), str(folder / "merged")
    assert main(["merge", adapter, output]) == 0
    adapted, thinking = (QuietStarForCausalLM.from_pretrained(path) for path in (adapter, output))
    plain, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and "QuietStar" not in type(plain).__name__
    expected = logps(adapted)
    assert (expected - logps(AutoModelForCausalLM.from_pretrained(folder / "base"))).abs().max() > 1e-3
    for model in (plain, thinking):
        torch.testing.assert_close(logps(model), expected, rtol=0, atol=1e-5)
    for think in ("always", "never"):
        found = [model.generate(input_ids=IDS, think=think, **GREEDY) for model in (adapted.eval(), thinking.eval())]
        assert torch.equal(*found)
    assert torch.equal(plain.generate(input_ids=IDS, **GREEDY), found[0])
    assert AutoTokenizer.from_pretrained(output)("7 plus")["input_ids"]
    heads = base_of(adapted).quietstar.state_dict()
    for name, tensor in thinking.quietstar.state_dict().items():
        assert torch.equal(tensor, heads[name]), name


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(
            **{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head", "embed_tokens"], use_dora=True
        ),
        OFTConfig(oft_block_size=4, target_modules=MODULES, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "dora and saved modules", "oft"],
)
def test_an_adapter_is_merged(config, tmp_path):
    """Of several methods; the model generates the same, with thoughts and without."""
    assert_merges(tmp_path, config)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["embed_tokens", "q_proj"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj"], trainable_token_indices=[1, 2, 3]),
    ],
    ids=["adapted", "saved", "tokens"],
)
def test_embeddings_that_the_lm_head_shares(options, tmp_path):
    """What the adapter does to the one it does not do to the other, where it did not."""
    assert_merges(tmp_path, LoraConfig(**{**LORA, **options}), tie_word_embeddings=True)


def test_weights_are_saved_in_another_type(tmp_path, capsys):
    """The heads stay as they are, and what the rounding did is said."""
    adapter, output = adapter_in(tmp_path, LoraConfig(**LORA)), tmp_path / "merged"
    assert main(["merge", adapter, str(output), "--dtype", "bfloat16"]) == 0
    assert "in bfloat16. Log-probabilities differ from the adapter's by " in capsys.readouterr().out
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    with safe_open(output / "quietstar.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved_model(tmp_path_factory.mktemp("merge") / "base")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("BASE", "out"), "is no adapter: it has no adapter_config.json"),
        (("BASE", "FULL"), "FULL', which is there and not an empty folder"),
        (("BASE", "out", "--dtype", "int8"), "`dtype` is 'int8'; choose one of float32"),
        (("BASE",), "`output` is missing"),
        ((), "`adapter` is missing"),
        (("no/body", "out"), "There is no model 'no/body'"),
    ],
)
def test_what_is_no_adapter(argv, message, base, tmp_path, monkeypatch):
    """Before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/file").write_text("")
    with pytest.raises((ValueError, OSError), match=message):
        main(["merge", *(base if part == "BASE" else part for part in argv)])


def test_a_method_that_cannot_be_merged(base, tmp_path):
    """By name."""
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    adapter = adapter_in(tmp_path, config, path=base)
    with pytest.raises(ValueError, match=r"AdaptionPromptConfig \(ADAPTION_PROMPT\) cannot be merged into its base"):
        main(["merge", adapter, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_base_is_not_merged_into(base, tmp_path):
    """One that is saved in 4 bits. QLoRA quantizes as it loads, and merges into the base as it is saved."""
    pytest.importorskip("bitsandbytes")
    quantized = str(tmp_path / "quantized")
    config = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(quantized)
    AutoTokenizer.from_pretrained(base).save_pretrained(quantized)
    adapter = adapter_in(tmp_path, LoraConfig(**LORA), path=quantized)
    with pytest.raises(ValueError, match="The base .*quantized' is quantized"):
        main(["merge", adapter, str(tmp_path / "out")])
