"""What users call by hand takes an argument of another kind as an error that names it, and no other library's."""

import inspect
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, TextStreamer

import trl_quietstar
from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer, QuietStarSettings
from trl_quietstar.modeling import QuietStarMixin

from .speaking import generated, padded, prompts, thinking_model
from .tiny import byte_tokenizer, tiny_config
from .training import LORA, plain_model, saved_model, text_data, tiny_args, tiny_trainer


PACKAGE = Path(trl_quietstar.__file__).parent
IDS = prompts(5)[0][None]
NO_IDS = {
    "a list": IDS.tolist(),
    "a list of tensors": [IDS[0]],
    "a string": "3 plus 4 is",
    "an array": IDS.numpy(),
    "all that a tokenizer gives": byte_tokenizer()("3 plus 4 is", return_tensors="pt"),
    "a row": IDS[0],
    "three dimensions": IDS[None],
    "no texts": IDS[:0],
    "numbers with a fraction": IDS.float(),
    "a mask": IDS.bool(),
}
OF_MODELS = {
    "generate": [
        *(("input_ids", ids) for ids in NO_IDS.values()),
        ("attention_mask", [[1] * 5]),
        ("attention_mask", torch.ones(1, 3)),
        ("tokenizer", "gpt2"),
        ("thought_streamer", "out"),
        ("thought_streamer", TextStreamer),
        ("think", True),
        ("think_every", 1.5),
        ("think_every", "2"),
        ("think_every", True),
        ("thinking_threshold", "0.5"),
    ],
    "log_likelihoods": [
        *(("input_ids", ids) for ids in NO_IDS.values()),
        ("input_ids", IDS[:, :0]),
        ("input_ids", IDS + 300),
        ("input_ids", torch.tensor([[1, 2, -100]])),
        ("attention_mask", [[1] * 5]),
        ("attention_mask", torch.ones(1, 3)),
        ("score_mask", [[1] * 5]),
        ("score_mask", torch.ones(5)),
        ("tokenizer", "gpt2"),
        ("think", 1),
        ("think_every", 1.5),
        ("thinking_threshold", "0.5"),
    ],
    "initialize_thought_embeddings": [("tokenizer", "gpt2"), ("tokenizer", None)],
    "adopt_settings": [("settings", {"thought_length": 3}), ("settings", QuietStarSettings), ("tokenizer", "gpt2")],
    "save_heads": [("save_directory", None)],
    "load_heads": [("path", None)],
    "save_pretrained": [("save_directory", None)],
    "from_pretrained": [("pretrained_model_name_or_path", None), ("settings", {"thought_length": 3})],
}
GIVEN = {  # of arguments that have to be there
    "input_ids": IDS,
    "tokenizer": byte_tokenizer(),
    "settings": QuietStarSettings(3, 4),
    "save_directory": "nowhere",
    "path": "nowhere",
    "pretrained_model_name_or_path": "nowhere",
}
# Transformers' own, which is refused as a whole
WHOLE = {"init_continuous_batching"}


def assert_named(call, name: str) -> None:
    """A call ends in an error of the package's own wording, with the argument's name."""
    with pytest.raises((TypeError, ValueError), match=f"`{name}") as caught:
        call()
    raised_in = traceback.extract_tb(caught.tb)[-1].filename
    assert Path(raised_in).is_relative_to(PACKAGE), raised_in


def test_every_public_method_is_here():
    """A new one has to be entered above."""
    own = {
        name
        for name, member in vars(QuietStarMixin).items()
        if not name.startswith("_") and not isinstance(member, property)
    }
    assert own == {*OF_MODELS, *WHOLE}


@pytest.mark.parametrize("method", OF_MODELS)
def test_methods_of_a_model(method):
    """Each refuses each wrong argument by its name, in generation as in scoring."""
    model = thinking_model()
    parameters = inspect.signature(getattr(model, method)).parameters
    for name, value in OF_MODELS[method]:
        given = {key: x for key, x in GIVEN.items() if key in parameters or (key, method) == ("input_ids", "generate")}
        given |= {"think": "adaptive"} if name == "thinking_threshold" else {}
        assert_named(
            lambda given=given, name=name, value=value: getattr(model, method)(**{**given, name: value}), name
        )


def test_factories_and_settings(tmp_path):
    """And what a settings object is made of."""
    source, config = saved_model(tmp_path), tiny_config("llama")
    for settings in ({"thought_length": 3}, 3, QuietStarSettings, tiny_args(tmp_path / "out")):
        assert_named(lambda x=settings: QuietStarForCausalLM.from_pretrained(source, x), "settings")
        assert_named(lambda x=settings: QuietStarForCausalLM.from_config(config, x), "settings")
    for name in (None, 5, plain_model()):
        assert_named(lambda x=name: QuietStarForCausalLM.from_pretrained(x), "pretrained_model_name_or_path")
    for wrong in ("llama", None, config.to_dict()):
        assert_named(lambda x=wrong: QuietStarForCausalLM.from_config(x), "config")
    wrong = {
        "thought_length": "3",
        "talk_length": 2.5,
        "temperature": "1",
        "thought_suppress_tokens": 5,
        "top_k": True,
    }
    for name, value in wrong.items():
        assert_named(lambda name=name, value=value: QuietStarSettings(**{name: value}), name)


@pytest.mark.parametrize("args", ["given", "default"])
def test_the_trainers_model(args, tmp_path):
    """Told apart from a name and a model before anything is made of it."""
    args = tiny_args(tmp_path) if args == "given" else None
    for model in (tmp_path, None, 5):
        assert_named(lambda x=model: QuietStarREINFORCETrainer(x, args, train_dataset=text_data()), "model")


def test_a_prompt_without_tokens_in_a_batch():
    """Is called that, and not padded on the right."""
    inputs = padded(prompts(5, 5))
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="leaves a prompt without a token"):
        generated(thinking_model(), inputs)


# What else a user does with a model


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_model_is_pickled(adapter, tmp_path):
    """For `torch.save`, another process, or a cache: it comes back with its thoughts, though its class is made at run time."""
    model = thinking_model()
    if adapter:
        trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(**LORA, init_lora_weights=False))
        model = trainer.model.eval()
    inputs = padded([prompts(5)[0] % 250 + 1])
    expected = generated(model, inputs)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and torch.equal(generated(again, inputs), expected)


def test_continuous_batching_is_not_without_a_word(tmp_path):
    """Transformers' loop of its own would write without thoughts; a model that never thinks may use it."""
    with pytest.raises(
        ValueError, match=r"`generate_batch`.* writes without thoughts, and this model thinks before every"
    ):
        thinking_model().generate_batch([IDS[0].tolist()])
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path), QuietStarSettings(thought_positions="none"))
    ids = IDS[0] % 250 + 1
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # else its cache takes most of the machine's memory
    options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    (said,) = model.generate_batch([ids.tolist()], **options).values()
    assert (
        said.generated_tokens
        == generated(AutoModelForCausalLM.from_pretrained(tmp_path), {"input_ids": ids[None]}, 3)[0].tolist()
    )


def test_a_configuration_is_no_settings(tmp_path):
    """The advice says where its settings are."""
    with pytest.raises(TypeError, match=r"`settings` is a `QuietStarConfig`; .* `args.settings\(\)`"):
        QuietStarForCausalLM.from_config(tiny_config("llama"), QuietStarConfig(str(tmp_path), use_cpu=True))
