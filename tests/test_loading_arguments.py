"""What `from_pretrained` takes means what it means to Transformers, or is refused by its name."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.model.adapters import base_of
from trl_quietstar.model.saved import saved_settings

from .training import saved_model, tiny_trainer


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> str:
    """A saved thinking model."""
    folder = tmp_path_factory.mktemp("models")
    model = QuietStarForCausalLM.from_pretrained(saved_model(folder / "base"), QuietStarSettings(3))
    model.save_pretrained(folder / "thinker")
    return str(folder / "thinker")


def base_state(model) -> dict[str, torch.Tensor]:
    """The weights that a plain model has."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quietstar.")}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "float64"},
        {"torch_dtype": torch.float16},
        {"attn_implementation": "eager"},
        {"rms_norm_eps": 0.5},  # of the configuration
        {"attention_dropout": 0.25, "use_cache": False},
        {"output_loading_info": True},
        {"ignore_mismatched_sizes": True},
        {"low_cpu_mem_usage": True},
        {"key_mapping": {"^model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj"}},
        {"device_map": "cpu"},
        {"local_files_only": True},
        {"use_safetensors": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_mean_what_they_mean_to_transformers(options, thinker):
    """The base is the one that `AutoModelForCausalLM` loads with the same argument, weights and configuration."""
    ours = QuietStarForCausalLM.from_pretrained(thinker, **options)
    theirs = AutoModelForCausalLM.from_pretrained(thinker, **options)
    if options.get("output_loading_info"):
        (ours, info), (theirs, expected) = ours, theirs
        assert info == expected
    for name, tensor in base_state(theirs).items():
        mine = base_state(ours)[name]
        assert mine.dtype == tensor.dtype and torch.equal(mine, tensor), name
    known = {name: value for name, value in theirs.config.to_dict().items() if name != "quietstar"}
    assert {name: ours.config.to_dict()[name] for name in known} == known
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.quietstar_settings.thought_length == 3


def test_a_configuration_may_be_given(thinker):
    """As an object or by its place; the model's own heads load."""
    config = AutoConfig.from_pretrained(thinker)
    config.rms_norm_eps = 0.5
    assert QuietStarForCausalLM.from_pretrained(thinker, config=config).config.rms_norm_eps == 0.5
    assert QuietStarForCausalLM.from_pretrained(thinker, config=thinker).quietstar_settings.thought_length == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"use_safetensors": False}, "`use_safetensors=False`: thinking models are read from safetensors only"),
    ],
)
def test_what_cannot_be_followed_is_refused(options, message, thinker):
    """By its name."""
    with pytest.raises((TypeError, ValueError), match=message):
        QuietStarForCausalLM.from_pretrained(thinker, **options)


def test_an_adapter_takes_other_settings(tmp_path):
    """Settings that are given win over the saved ones."""
    options = dict(max_steps=1, peft_config=LoraConfig(target_modules=["q_proj"]), thought_positions="all")
    trainer = tiny_trainer(tmp_path / "out", model=saved_model(tmp_path / "base"), **options)
    trainer.train()
    trainer.save_model()
    folder = str(tmp_path / "out")
    model = QuietStarForCausalLM.from_pretrained(folder)
    assert base_of(model).quietstar_settings == saved_settings(folder) == base_of(trainer.model).quietstar_settings
    given = QuietStarSettings(7, value_head_hidden_size=16)
    model = QuietStarForCausalLM.from_pretrained(folder, given)
    assert base_of(model).quietstar_settings == given
    assert torch.equal(base_of(model).quietstar.start_embedding, base_of(trainer.model).quietstar.start_embedding)


def test_every_setting_is_understood_again(tmp_path):
    """Whatever a configuration may put there."""
    settings = QuietStarSettings(
        3, "completion", "thought", "linear", 8, 1, 5, 1, 0.1, 2, "]", thought_positions=0.25, difficulty_threshold=1
    )
    assert QuietStarSettings.from_dict(json.loads(json.dumps(settings.to_dict())), "somewhere") == settings
    assert QuietStarSettings.from_dict({}, "somewhere") == QuietStarSettings()
