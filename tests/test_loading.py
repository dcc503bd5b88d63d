"""What is loaded is what was named: its revision, its tokenizer, its vocabulary and its heads; and the rest is said clearly."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ProcessorMixin,
)

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.cli import main
from trl_quietstar.loading import build_model
from trl_quietstar.model.adapters import heads_aside
from trl_quietstar.model.saved import SETTINGS_NAME

from .tiny import byte_tokenizer, randomize
from .training import plain_model, saved_model, tiny_args, tiny_trainer


LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
IDS = torch.arange(1, 13)[None]
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(byte_tokenizer()),
    max_position_embeddings=128,
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
SETTINGS = QuietStarSettings(3, 2, value_head_hidden_size=16)
REPO = "someone/tiny"
REVISIONS = {"main": "a" * 40, "v2": "b" * 40}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def with_adapter(model):
    """As users put one on."""
    with heads_aside(model):
        return get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))


@pytest.fixture
def cache(tmp_path) -> str:
    """A cache of the Hub with a model of two revisions, whose weights and tokenizers differ, and a third in a subfolder."""
    folder = tmp_path / "cache/models--someone--tiny"
    for seed, (name, commit) in enumerate(REVISIONS.items()):
        for where in (folder / "snapshots" / commit, folder / "snapshots" / commit / "sub"):
            tokenizer, model = byte_tokenizer(pad_token=f"<pad-{name}-{where.name}>"), plain_model()
            model.resize_token_embeddings(len(tokenizer))
            randomize(model, seed + 10 * where.name.count("sub"))
            model.save_pretrained(where)
            tokenizer.save_pretrained(where)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return str(tmp_path / "cache")


# Revisions and tokenizers


def test_an_adapter_comes_back_on_the_revision_it_was_trained_on(cache, tmp_path):
    """Named in `model_init_kwargs`, or loaded by the user. (Transformers notes no revision from 5.24 on.)"""
    kwargs = {"revision": "v2", "cache_dir": cache}
    model = QuietStarForCausalLM.from_pretrained(REPO, settings=SETTINGS, **kwargs)
    ways = {
        "named": tiny_trainer(
            tmp_path / "named", REPO, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"), model_init_kwargs=kwargs
        ),
        "object": tiny_trainer(tmp_path / "object", model, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM")),
        "adapter": tiny_trainer(
            tmp_path / "adapter",
            with_adapter(QuietStarForCausalLM.from_pretrained(REPO, settings=SETTINGS, **kwargs)),
        ),
    }
    for name, trainer in ways.items():
        trainer.save_model()
        again = QuietStarForCausalLM.from_pretrained(tmp_path / name, cache_dir=cache)
        assert torch.equal(logits(again), logits(trainer.model)), name
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "named", cache_dir=cache)
    assert torch.equal(logits(by_peft), logits(ways["named"].model))


@pytest.mark.parametrize("is_given", [False, True], ids=["config", "model"])
def test_an_adapter_without_a_task_is_loaded_by_peft(is_given, tmp_path):
    """The README's configuration names none. PEFT then saves the class of the base, and imports none from this package."""
    config, path = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), saved_model(tmp_path / "m")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config) if is_given else path
    trainer = tiny_trainer(tmp_path / "out", model, peft_config=None if is_given else config)
    trainer.save_model()
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(by_peft), logits(trainer.model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trainer.model))


@pytest.mark.parametrize(
    "hub", [{}, {"revision": "v2"}, {"subfolder": "sub"}, {"revision": "v2", "subfolder": "sub"}], ids=str
)
def test_the_tokenizer_is_that_of_the_model(hub, cache, tmp_path):
    """In its revision and subfolder."""
    trainer = tiny_trainer(tmp_path, REPO, model_init_kwargs={**hub, "cache_dir": cache})
    place = hub.get("subfolder", REVISIONS[hub.get("revision", "main")])
    assert trainer.processing_class.pad_token == f"<pad-{hub.get('revision', 'main')}-{place}>"
    expected = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=cache, **hub)
    assert torch.equal(logits(trainer.model), logits(expected))


def test_the_tokenizer_of_a_loaded_model_is_of_its_revision(cache, tmp_path):
    """For training, and for thoughts that end early."""
    model = QuietStarForCausalLM.from_pretrained(REPO, settings=SETTINGS, revision="v2", cache_dir=cache)
    _, tokenizer = build_model(model, tiny_args(tmp_path, min_thought_length=1), None, None, None)
    assert tokenizer.pad_token == model.thought_tokenizer().pad_token == f"<pad-v2-{REVISIONS['v2']}>"


def test_heads_of_a_plainly_loaded_model_are_of_its_revision(cache, tmp_path, monkeypatch):
    """Where its user trusts the code beside it, which thinks with the heads of that revision and not of `main`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name, commit in REVISIONS.items():
        model = QuietStarForCausalLM.from_pretrained(REPO, revision=name, settings=SETTINGS)
        randomize(model.quietstar, seed=len(name))
        model.save_pretrained(Path(cache, "models--someone--tiny/snapshots", commit))
    for name in REVISIONS:
        expected = QuietStarForCausalLM.from_pretrained(REPO, revision=name)
        plain = AutoModelForCausalLM.from_pretrained(REPO, revision=name, trust_remote_code=True)
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, return_thoughts=True)
        assert plain.generate(IDS, **options).thoughts == expected.generate(IDS, **options).thoughts
        assert torch.equal(plain.quietstar.start_embedding, expected.quietstar.start_embedding)


def test_an_adapter_in_a_subfolder(cache, tmp_path):
    """A local one is a folder like any other; of the Hub's an adapter could not say where it is."""
    kwargs = {"subfolder": "sub"}
    folder = Path(cache, "models--someone--tiny/snapshots", REVISIONS["main"])
    options = dict(peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"), model_init_kwargs=kwargs)
    trainer = tiny_trainer(tmp_path / "out", str(folder), **options)
    trainer.save_model()
    assert torch.equal(logits(QuietStarForCausalLM.from_pretrained(tmp_path / "out")), logits(trainer.model))
    options["model_init_kwargs"] = {**kwargs, "cache_dir": cache}
    with pytest.raises(ValueError, match="subfolder 'sub' of 'someone/tiny'.*download"):
        tiny_trainer(tmp_path / "out", REPO, **options)


# Heads and settings


def test_thought_embeddings_set_by_hand_are_kept(tmp_path):
    """Both, or one of them."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "m"), settings=SETTINGS)
    mine, mean = torch.linspace(-1, 1, 32), model.quietstar.end_embedding.clone()
    with torch.no_grad():
        model.quietstar.start_embedding.copy_(mine)
    trainer = tiny_trainer(tmp_path / "out", model=model)
    assert torch.equal(trainer.model.quietstar.start_embedding, mine)
    assert not torch.equal(trainer.model.quietstar.end_embedding, mean)


def test_untouched_thought_embeddings_are_set_in_any_dtype(tmp_path):
    """Rounding is no hand."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "m"))
    mean = model.quietstar.start_embedding.clone()
    model.to(torch.bfloat16).to(torch.float32)
    assert model.fresh_thought_embeddings
    model.initialize_thought_embeddings(byte_tokenizer(), only_fresh=True)
    assert not model.fresh_thought_embeddings
    assert (model.quietstar.start_embedding - mean).abs().max() > 0.05


def test_a_published_checkpoint_says_that_its_heads_are_not_read(tmp_path):
    """Its weights hold heads of the published code, which Transformers would drop."""
    path = saved_model(tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    extra = {
        "start_embedding": torch.zeros(2, 32),
        "end_embedding": torch.zeros(2, 32),
        "talk_head.0.0.weight": torch.ones(3, 3),
    }
    save_file({**weights, **extra}, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    says = r"published Quiet-STaR code: its heads \(end_embedding.*`trl-quietstar convert .*save_pretrained"
    with pytest.raises(ValueError, match=says):
        QuietStarForCausalLM.from_pretrained(path)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "base")
    QuietStarForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"thought_length": 3, "telepathy": True}, "has telepathy.*newer version.*Upgrade"),
        ({"thought_length": "three"}, "damaged: `thought_length` is 'three'"),
        ({"thought_length": None}, "damaged: `thought_length` is None"),
        ([3, 2], r"damaged: \[3, 2\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", [False, True])
def test_settings_that_cannot_be_read_are_named(entry, match, adapter, tmp_path):
    """Of a newer version, or damaged."""
    path = saved_model(tmp_path / "m")
    options = dict(peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM")) if adapter else {}
    tiny_trainer(tmp_path / "out", path, **options).save_model()
    if adapter:
        (tmp_path / "out" / SETTINGS_NAME).write_text(json.dumps(entry))
    else:
        config = json.loads((tmp_path / "out/config.json").read_text())
        (tmp_path / "out/config.json").write_text(json.dumps({**config, "quietstar": entry}))
    with pytest.raises(ValueError, match=match):
        QuietStarForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_config.json", SETTINGS_NAME])
def test_a_damaged_file_of_an_adapter_is_named(name, tmp_path):
    """Whichever it is."""
    path = saved_model(tmp_path / "m")
    tiny_trainer(tmp_path / "out", path, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM")).save_model()
    (tmp_path / "out" / name).write_text('{"peft_type": "LO')
    with pytest.raises(ValueError, match=rf"{name}' is damaged.*Copy it again"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "out")


def test_a_plain_model_that_is_to_think_is_said_to_be_one(tmp_path, caplog, capsys):
    """By the command line, whether it generates or evaluates; not where it shall not think, nor of a trained one."""
    path = saved_model(tmp_path / "m")
    generate = ["generate", "--prompt", "1 plus 2 is", "--max_new_tokens", "2", "--model"]
    (tmp_path / "data.jsonl").write_text('{"text": "1 plus 2 is 3 ."}\n' * 2)
    evaluate = ["eval", "--dataset_name", str(tmp_path / "data.jsonl"), "--thought_length", "2", "--model", path]
    word = f"{path!r} is a plain model without thinking heads"
    for argv in (evaluate, [*generate, path]):
        assert main(argv) in (None, 0)
        assert caplog.text.count(word) == 1
        caplog.clear()
    tiny_trainer(tmp_path / "out", model=path).save_model()
    for argv in ([*generate, path, "--think", "never"], [*generate, str(tmp_path / "out")]):
        assert main(argv) in (None, 0)
    assert word not in caplog.text


def test_heads_of_a_plainly_loaded_thinker_are_trained_on(tmp_path, caplog):
    """`AutoModelForCausalLM` drops them; where the folder has lost them, it is said that they are new."""
    first = tiny_trainer(tmp_path / "out", model=saved_model(tmp_path / "m"))
    randomize(first.model.quietstar)
    first.save_model()
    again = tiny_trainer(tmp_path / "again", model=AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for name, tensor in first.model.quietstar.state_dict().items():
        assert torch.equal(again.model.quietstar.state_dict()[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not caplog.records or "its heads are new ones" not in caplog.text
    (tmp_path / "out/quietstar.safetensors").unlink()
    tiny_trainer(tmp_path / "again", model=model)
    assert caplog.text.count("its heads are new ones") == 1
    QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert caplog.text.count("its heads are new ones") == 2


def test_the_command_line_reads_settings_where_it_reads_the_model(tmp_path, capsys):
    """In a subfolder, too."""
    tiny_trainer(tmp_path / "models/out", model=saved_model(tmp_path / "m"), thought_length=5).save_model()
    (tmp_path / "data.jsonl").write_text('{"text": "1 plus 2 is 3 ."}\n' * 2)
    flags = ["--model_init_kwargs", '{"subfolder": "out"}', "--model", str(tmp_path / "models")]
    assert main(["eval", "--dataset_name", str(tmp_path / "data.jsonl"), *flags]) in (None, 0)
    assert "Thoughts of up to 5 tokens" in capsys.readouterr().out


# Arguments of `from_pretrained`


def test_loading_info(tmp_path):
    """A pair, as Transformers gives it."""
    path = saved_model(tmp_path / "m")
    model, info = QuietStarForCausalLM.from_pretrained(path, output_loading_info=True)
    expected, own = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert info == own and not info["missing_keys"]
    assert torch.equal(logits(model), logits(expected))
    tiny_trainer(tmp_path / "out", path, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM")).save_model()
    with pytest.raises(ValueError, match="is an adapter; leave it out"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    with pytest.raises(TypeError, match="argument of `generate`"):
        QuietStarForCausalLM.from_pretrained(path, custom_generate="someone/else")


def test_offloaded_embeddings_are_named(tmp_path):
    """Thoughts read them at every token; offloaded layers can be read, but not trained."""
    path = saved_model(tmp_path / "m", tie_word_embeddings=False)
    options = dict(offload_folder=str(tmp_path / "off"))
    place = {
        "model.embed_tokens": "disk",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    with pytest.raises(ValueError, match="embeddings or the LM head .* are offloaded"):
        QuietStarForCausalLM.from_pretrained(path, device_map=place, **options)
    place |= {"model.embed_tokens": "cpu", "model.layers": "disk"}
    model = QuietStarForCausalLM.from_pretrained(path, device_map=place, **options)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(path)))
    with pytest.raises(ValueError, match="spread the model over cpu, disk"):
        tiny_trainer(tmp_path / "out", model=model)


# Models and tokenizers of another kind


def test_a_model_of_images_is_refused_by_name(tmp_path):
    """As an object and as a folder: a causal LM is looked for there."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION))
    )
    match = r"\(model_type 'llava'\) reads more than text"
    with pytest.raises(ValueError, match=f"LlavaForConditionalGeneration {match}"):
        tiny_trainer(tmp_path, model=model)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=match):
        QuietStarForCausalLM.from_pretrained(tmp_path / "m")


def test_a_model_that_transformers_knows_as_a_causal_lm_trains_on_text(tmp_path):
    """Gemma 3 reads images too; its text part is trained, and what is saved is the whole model."""
    config = Gemma3Config(
        text_config=dict(TEXT, head_dim=8, layer_types=["full_attention"] * 2),
        vision_config=VISION,
        mm_tokens_per_image=4,
    )
    trainer = tiny_trainer(tmp_path, model=Gemma3ForConditionalGeneration(config), max_steps=1)
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits(QuietStarForCausalLM.from_pretrained(tmp_path)), logits(trainer.model))


class TinyProcessor(ProcessorMixin):
    """A tokenizer and nothing else, in a processor's clothes."""

    attributes = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


def test_of_a_processor_the_tokenizer_is_taken(tmp_path):
    """Which is saved with the model."""
    trainer = tiny_trainer(tmp_path / "out", tokenizer=TinyProcessor(byte_tokenizer()))
    assert trainer.processing_class.eos_token == "<eos>"
    trainer.save_model()
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_arguments_of_another_kind_are_named(tmp_path, caplog):
    """Before anything is loaded; and what has no effect is said."""
    with pytest.raises(TypeError, match=r"`processing_class` is 'gpt2' \(`str`\); give a tokenizer"):
        tiny_trainer(tmp_path, tokenizer="gpt2")
    with pytest.raises(TypeError, match="`reward_functions` holds a `int`; give functions"):
        tiny_trainer(tmp_path, reward_functions=[print, 1])
    with caplog.at_level(logging.WARNING, logger="trl_quietstar"):
        trainer = tiny_trainer(tmp_path, model_init_kwargs={"dtype": "float64"})
    assert "`model_init_kwargs` (dtype) has no effect" in caplog.text
    assert trainer.model.model_tags == ["trl", "quietstar"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(neftune_noise_alpha=5.0), "`neftune_noise_alpha=5.0` is not supported"),
        (dict(torch_compile=True), "`torch_compile=True` is not supported"),
        (dict(torch_compile_backend="eager"), "`torch_compile_backend='eager'` is not supported"),
        (dict(torch_compile_mode="default"), "`torch_compile_mode='default'` is not supported"),
    ],
)
def test_options_that_would_change_what_is_scored_are_refused(options, match, tmp_path):
    """Also where one switches on another."""
    with pytest.raises(ValueError, match=match):
        tiny_args(tmp_path, **options)


def test_thoughts_that_may_end_early_need_an_ending(tmp_path):
    """Without an EOS token and a stop string each would run to its full length, without a word."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`min_thought_length` is 2, and the tokenizer has no EOS token"):
        build_model(plain_model(), tiny_args(tmp_path, min_thought_length=2), tokenizer, None, None)
    build_model(plain_model(), tiny_args(tmp_path, thought_stop_string="]"), tokenizer, None, None)
