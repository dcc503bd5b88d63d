"""What cannot work is refused before any compute, with the value, the limit and the fix."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    T5Config,
    TrainingArguments,
)

from trl_quietstar import QuietStarForCausalLM, QuietStarREINFORCETrainer, QuietStarSettings
from trl_quietstar.learning.metrics import EVAL_METRICS, PENALIZED
from trl_quietstar.training.checks import check_best_metric

from .tiny import byte_tokenizer, sums, tiny_config
from .training import logged, plain_model, text_data, tiny_args, tiny_trainer


LORA = dict(r=4, target_modules="all-linear")


def assert_says(error: pytest.ExceptionInfo, *parts: str) -> None:
    """The message holds every part."""
    message = str(error.value)
    assert not [part for part in parts if not re.search(re.escape(part), message)], message


# Values: what was given, what the message must name

VALUES = [
    (dict(thought_length=0), "thought_length", "0", "1"),
    (dict(thought_length=-2), "thought_length", "-2", "1"),
    (dict(talk_length=0), "talk_length", "0", "1"),
    (dict(num_thoughts=0), "num_thoughts", "0", "1"),
    (dict(min_thought_length=9, thought_length=4), "min_thought_length", "9", "thought_length", "4"),
    (dict(temperature=0.0), "temperature", "0.0"),
    (dict(temperature=float("nan")), "temperature", "nan"),
    (dict(top_p=0.0), "top_p", "0.0"),
    (dict(top_p=1.2), "top_p", "1.2", "1"),
    (dict(top_k=-1), "top_k", "-1", "0"),
    (dict(min_p=1.5), "min_p", "1.5", "1"),
    (dict(gamma=1.1), "gamma", "1.1", "1"),
    (dict(gae_lambda=-0.1), "gae_lambda", "-0.1", "0"),
    (dict(entropy_decay=1.5), "entropy_decay", "1.5", "1"),
    (dict(entropy_coefficient=-1.0), "entropy_coefficient", "-1.0", "0"),
    (dict(beta=-0.1), "beta", "-0.1", "0"),
    (dict(heads_learning_rate=-1.0), "heads_learning_rate", "-1.0"),
    (dict(muon_learning_rate=-1.0), "muon_learning_rate", "-1.0", "0"),
    (dict(grokfast_lambda=-0.1), "grokfast_lambda", "-0.1", "0"),
    (dict(preflight_thoughts=0), "preflight_thoughts", "0", "1"),
    (dict(useful_gain=-0.1), "useful_gain", "-0.1", "0"),
    (dict(useful_gain=1.5), "useful_gain", "1.5", "1"),
    (dict(grokfast_alpha=1.1), "grokfast_alpha", "1.1", "1"),
    (dict(muon_learning_rate=1e-3, optim="sgd"), "muon_learning_rate", "0.001", "sgd", "adamw_torch"),
    (dict(grokfast_lambda=0.1, optim="adafactor"), "grokfast_lambda", "0.1", "adafactor", "adamw_torch"),
    (dict(difficulty_threshold=1.5), "difficulty_threshold", "1.5", "1"),
    (dict(max_length=1), "max_length", "1", "2"),
    (dict(early_stopping_patience=0), "early_stopping_patience", "0", "1"),
    (dict(anti_theater_steps=0), "anti_theater_steps", "0", "1"),
    (dict(anti_theater_action="panic"), "anti_theater_action", "panic", "warn", "stop", "rollback"),
    (dict(reward_clip_range=[1.0, -1.0]), "reward_clip_range", "1.0", "lower one first"),
    (dict(reward_clip_range=[1.0]), "reward_clip_range", "two numbers"),
    (dict(reward_type="bleu"), "reward_type", "bleu", "probability", "log_likelihood", "accuracy", "binary"),
    (dict(nll_weighting="none"), "nll_weighting", "none", "uniform", "gain", "probability", "share"),
    (dict(reward_prediction="both"), "reward_prediction", "both", "mixed", "thought"),
    (dict(no_thought_model="base"), "no_thought_model", "base", "policy", "reference"),
    (dict(advantage_baseline="critic"), "advantage_baseline", "critic", "value", "leave_one_out", "both", "none"),
    (dict(value_head_type="cnn"), "value_head_type", "cnn", "linear", "mlp", "transformer"),
    (dict(mixing_head_type="cnn"), "mixing_head_type", "cnn", "mlp", "published"),
    (dict(thought_path="fast"), "thought_path", "fast", "auto", "shared_prefix", "replay"),
    (dict(thought_positions="0"), "thought_positions", "0", "at least 1"),
    (dict(thought_positions="-3"), "thought_positions", "-3", "at least 1"),
    (dict(thought_positions="1.5"), "thought_positions", "1.5", "up to 1"),
    (dict(thought_positions="0.0"), "thought_positions", "0.0", "above 0"),
    (dict(thought_positions="abc"), "thought_positions", "abc", "all", "difficulty"),
    (dict(thought_positions=0), "thought_positions", "0", "at least 1"),
    (dict(thought_positions=float("nan")), "thought_positions", "nan"),
    (dict(num_thoughts=1, advantage_baseline="leave_one_out"), "num_thoughts", "1", "at least 2", "leave_one_out"),
    (dict(num_thoughts=1, advantage_baseline="both"), "num_thoughts", "1", "at least 2"),
    (dict(sync_ref_model=True), "sync_ref_model", "beta", "no_thought_model"),
    (dict(packing=True, max_length=None), "packing", "max_length"),
    (dict(load_best_model_at_end=True), "load_best_model_at_end", "eval_strategy", "eval_dataset"),
    (dict(early_stopping_patience=3), "early_stopping_patience", "eval_strategy", "eval_dataset"),
]


@pytest.mark.parametrize("options, parts", [(v[0], v[1:]) for v in VALUES], ids=lambda x: str(x)[:60])
def test_values_out_of_bounds(options, parts, tmp_path):
    """The configuration refuses what lies outside a limit, or contradicts itself, and says what to do."""
    with pytest.raises(ValueError) as error:
        tiny_args(tmp_path, **options)
    assert_says(error, *parts)


@pytest.mark.parametrize(
    "given, parsed", [("all", "all"), ("difficulty", "difficulty"), ("16", 16), ("0.25", 0.25), ("1.0", 1.0), (4, 4)]
)
def test_thought_positions_are_read(given, parsed, tmp_path):
    """On the command line everything is a string: whole numbers are counts, decimals are fractions."""
    value = tiny_args(tmp_path, thought_positions=given).thought_positions
    assert value == parsed and type(value) is type(parsed)


# Data


LONG = Dataset.from_dict({"text": ["short", " ".join(sums()[:10])]})


@pytest.mark.parametrize("stream", [False, True])
def test_texts_too_long_for_the_model(stream, tmp_path):
    """A text that does not fit with its thought is refused, naming its length, the limit and the `max_length` to set."""
    model = plain_model(max_position_embeddings=32)
    data = LONG.to_iterable_dataset() if stream else LONG
    with pytest.raises(ValueError) as error:
        tiny_trainer(tmp_path, model=model, data=data, max_length=None).train()
    assert_says(error, "thought_length", "32", "set `max_length` to 28")
    fitting = tiny_trainer(tmp_path, model=plain_model(max_position_embeddings=32), data=LONG, max_length=28)
    fitting.train()
    assert len(logged(fitting)) == 3


def test_the_longest_text_that_is_let_through_trains(tmp_path):
    """GPT-2's position table ends at `n_positions`; a text at the very limit fits with a thought at every position."""
    data = Dataset.from_dict({"input_ids": [list(range(1, 29))]})
    with pytest.raises(ValueError, match="lower `max_length` to"):
        tiny_trainer(tmp_path, model=plain_model("gpt2", n_positions=31), data=data)
    model = plain_model("gpt2", n_positions=32)
    trainer = tiny_trainer(tmp_path, model=model, data=data, thought_positions="all", max_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1


def test_packed_rows_may_be_longer_than_the_model(tmp_path):
    """Positions restart with each packed text, so it is the texts that must fit, not the row."""
    model = plain_model("gpt2", n_positions=32)
    trainer = tiny_trainer(tmp_path, model=model, packing=True, max_length=64, max_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": [[5], [6]]},
        {"input_ids": [[5, 6, 7]], "labels": [[-100, -100, -100]]},
        {"prompt": [" ".join(sums()[:10])], "completion": [" 3"]},
        {"input_ids": [[5, 6, 7]], "thought_mask": [[0, 0, 1]]},
    ],
    ids=["one token", "all masked", "cut off", "thought mask"],
)
def test_no_usable_position(columns, tmp_path):
    """Data without any token to think about are refused, with the likely causes."""
    with pytest.raises(ValueError) as error:
        tiny_trainer(tmp_path, data=Dataset.from_dict(columns), max_length=16)
    assert_says(error, "train", "thought position", "max_length")


def test_texts_without_a_position_are_dropped(tmp_path):
    """Among others, a text too short to think about is left out."""
    data = Dataset.from_dict({"input_ids": [[5], [6, 7, 8], [9]]})
    assert len(tiny_trainer(tmp_path, data=data).train_dataset) == 1


@pytest.mark.parametrize("which", ["train", "eval"])
def test_an_empty_dataset(which, tmp_path):
    """The message says which dataset is empty."""
    empty = Dataset.from_dict({"text": []})
    data = dict(data=empty) if which == "train" else dict(evaluation=empty)
    with pytest.raises(ValueError, match=f"{which} dataset is empty"):
        tiny_trainer(tmp_path, **data)


def test_a_missing_column(tmp_path):
    """The message lists the columns there are and those that would do."""
    with pytest.raises(ValueError) as error:
        tiny_trainer(tmp_path, data=Dataset.from_dict({"words": ["a b c"]}))
    assert_says(error, "words", "text", "dataset_text_field", "prompt", "messages", "input_ids")
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict({"words": ["a b c"]}), dataset_text_field="words")
    assert len(trainer.train_dataset) == 1


def test_not_a_dataset(tmp_path):
    """A list is a type error that names what is wanted."""
    with pytest.raises(TypeError, match=r"`list`.*datasets\.Dataset"):
        tiny_trainer(tmp_path, data=[{"text": "a b"}])


def test_no_training_data(tmp_path):
    """Nothing to train on is said at once."""
    with pytest.raises(ValueError, match="train_dataset"):
        QuietStarREINFORCETrainer(plain_model(), tiny_args(tmp_path), processing_class=byte_tokenizer())


def test_evaluation_without_data(tmp_path):
    """`eval_strategy` without an `eval_dataset` is said before training, not at the first evaluation."""
    with pytest.raises(ValueError, match=r"eval_strategy='steps'.*eval_dataset"):
        tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=1)


def test_anti_theater_validation_without_data(tmp_path):
    """Said before training, not at the first validation."""
    with pytest.raises(ValueError, match=r"anti_theater_steps=5.*eval_dataset"):
        tiny_trainer(tmp_path, anti_theater_steps=5)
    with pytest.raises(ValueError, match="needs an `eval_dataset`"):
        tiny_trainer(tmp_path).validate_thoughts()


def test_anti_theater_validation_on_one_text(tmp_path):
    """One text allows no interval; that too is said before training."""
    with pytest.raises(ValueError, match=r"at least 2 of them, got 1; give a larger `eval_dataset`"):
        tiny_trainer(tmp_path, evaluation=text_data(1), anti_theater_steps=5)


# Models


def test_an_encoder_decoder(tmp_path):
    """As an object and by path: refused, naming the kind of model that is needed."""
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=r"encoder-decoder.*causal"):
        tiny_trainer(tmp_path, model=model)
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"encoder-decoder.*causal"):
        tiny_trainer(tmp_path, model=str(tmp_path / "t5"), tokenizer=byte_tokenizer())


def test_a_model_without_lm_head(tmp_path):
    """A backbone is refused, naming the class to load."""
    with pytest.raises(ValueError, match=r"LM head.*AutoModelForCausalLM"):
        tiny_trainer(tmp_path, model=LlamaModel(tiny_config("llama", vocab_size=300)))


def test_an_audio_decoder(tmp_path):
    """Several codes at a time are no text."""
    config = MusicgenDecoderConfig(
        vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, num_codebooks=2
    )
    with pytest.raises(ValueError, match="predicts 2 codes at a time, as audio decoders do"):
        tiny_trainer(tmp_path, model=MusicgenForCausalLM(config))


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_a_compiled_model(compiled, tmp_path):
    """Nothing has been compiled yet when it is refused; so is the option that asks for it."""
    with pytest.raises((TypeError, ValueError), match=r"compiled.*`layer.compile\(\)`"):
        tiny_trainer(tmp_path, model=compiled(plain_model()))
    with pytest.raises(ValueError, match=r"`torch_compile=True` is not supported"):
        tiny_trainer(tmp_path, torch_compile=True)


@pytest.mark.slow
def test_compiled_layers_train_as_they_are(tmp_path):
    """The way that the refusal names works, and gives the same run."""
    eager, compiled = plain_model(), plain_model()
    for layer in compiled.model.layers:
        layer.compile()
    runs = [tiny_trainer(tmp_path, model=model) for model in (eager, compiled)]
    for run in runs:
        run.train()
    expected, found = ([entry["rl/nll_with"] for entry in logged(run)] for run in runs)
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_adapter_twice(tmp_path):
    """A `PeftModel` with a `peft_config` on top is refused, with the two ways out."""
    peft = get_peft_model(plain_model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"PeftModel.*peft_config.*merge"):
        tiny_trainer(tmp_path, model=peft, peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapter_on_the_lm_head(wrapped, tmp_path):
    """It would silently not be trained, so it is refused."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(plain_model(), config) if wrapped else plain_model()
    with pytest.raises(ValueError, match=r"LM head.*target_modules"):
        tiny_trainer(tmp_path, model=model, peft_config=None if wrapped else config)


def test_an_adapter_on_the_heads(tmp_path):
    """A `PeftModel` whose adapter sits on the heads could not be loaded again, so it is refused."""
    settings = QuietStarSettings(3, 2, value_head_hidden_size=16)
    thinking = QuietStarForCausalLM.from_config(tiny_config("llama", vocab_size=300), settings)
    with pytest.raises(ValueError, match=r"heads.*target_modules"):
        tiny_trainer(tmp_path, model=get_peft_model(thinking, LoraConfig(**LORA)))


def test_a_moving_reference_under_an_adapter(tmp_path):
    """The reference under PEFT is the base, which does not move."""
    with pytest.raises(ValueError, match=r"sync_ref_model.*PEFT"):
        tiny_trainer(tmp_path, peft_config=LoraConfig(**LORA), beta=0.1, sync_ref_model=True)


def test_a_peft_config_of_the_wrong_type(tmp_path):
    """A dictionary is a type error that names the class."""
    with pytest.raises(TypeError, match=r"`dict`.*PeftConfig"):
        tiny_trainer(tmp_path, peft_config=dict(LORA))


@pytest.mark.parametrize(
    "wrong", [Path, lambda folder: torch.nn.DataParallel(plain_model()), lambda folder: torch.nn.Linear(2, 2)]
)
def test_a_model_of_the_wrong_type(wrong, tmp_path):
    """A `Path`, a model in a wrapper, or another module is a type error that says what to give."""
    model = wrong(tmp_path)
    with pytest.raises(TypeError, match=rf"`model` is a `{type(model).__name__}`; give an id or a path as a string"):
        tiny_trainer(tmp_path, model=model)


def test_arguments_of_another_trainer(tmp_path):
    """Plain `TrainingArguments` lack the method's fields."""
    with pytest.raises(TypeError, match=r"TrainingArguments.*QuietStarConfig"):
        QuietStarREINFORCETrainer(plain_model(), TrainingArguments(str(tmp_path)), text_data())


def test_a_saved_model_with_another_value_head(tmp_path):
    """Going on with other heads than were saved is refused, naming the option to set."""
    first = tiny_trainer(tmp_path / "first", max_steps=1)
    first.save_model()
    with pytest.raises(ValueError, match="value_head"):
        tiny_trainer(tmp_path, model=str(tmp_path / "first"), value_head_type="linear")


def test_a_start_string_without_tokens(tmp_path):
    """An empty start string has no embedding to begin from."""
    with pytest.raises(ValueError, match="another start, end or prompt"):
        tiny_trainer(tmp_path, thought_start_text="")


def test_a_missing_model(tmp_path):
    """A path that holds nothing is an error of loading, not a new model."""
    with pytest.raises(OSError):
        tiny_trainer(tmp_path, model=str(tmp_path / "nothing"))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(thought_positions="none"), dict(unfinished_thought_penalty=0.1)], ids=str
)
def test_the_best_model_goes_by_what_is_measured(options, named, tmp_path):
    """Exactly what an evaluation gives is taken as `metric_for_best_model`; the Trainer would fail at the first one without."""
    options = dict(min_thought_length=1, eval_strategy="steps", eval_steps=1, **options)
    data = {"a": text_data(4), "b": text_data(4, 9)} if named else text_data(4)
    measured = set(tiny_trainer(tmp_path, evaluation=data, **options).evaluate())
    for metric in {*(f"eval_{name}" for name in (*EVAL_METRICS, *PENALIZED, "no_thought_drift", "right")), *measured}:
        args = tiny_args(tmp_path, metric_for_best_model=metric, **options)
        if metric in measured and not metric.endswith(("_second", "_time", "runtime", "epoch")):
            check_best_metric(args, data, brings_metrics=False)
        else:
            with pytest.raises(ValueError, match="`metric_for_best_model` is 'eval_.*choose among eval_"):
                check_best_metric(args, data, brings_metrics=False)
    check_best_metric(tiny_args(tmp_path, metric_for_best_model="mine", **options), data, brings_metrics=True)


def test_the_best_model_of_a_run_that_ends_without_thoughts(tmp_path):
    """Its last stage measures no reward, which is the default; said before the first step."""
    options = dict(
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    with pytest.raises(ValueError, match="'eval_reward', which evaluations without thoughts do not measure"):
        tiny_trainer(tmp_path, evaluation=text_data(4), curriculum={2: {"thought_positions": "none"}}, **options)


# What looks wrong and is not


def test_no_pad_token_is_needed(tmp_path):
    """A tokenizer without a pad token trains, and is left without one."""
    tokenizer = byte_tokenizer()
    trainer = tiny_trainer(tmp_path, tokenizer=tokenizer, max_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1


def test_no_eos_token_is_needed(tmp_path):
    """A tokenizer without EOS trains; texts then have no token at their end."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    trainer = tiny_trainer(tmp_path, tokenizer=tokenizer, max_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1


def test_a_vocabulary_padded_beyond_the_tokenizer(tmp_path):
    """Models round their vocabulary up; thoughts may hold ids that the tokenizer does not know, and print still."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=512), dtype=torch.float32)
    trainer = tiny_trainer(tmp_path, model=model, log_thoughts=True, max_steps=1)
    trainer.train()
    assert len(logged(trainer)) == 1
