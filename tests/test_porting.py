"""A script, a recipe or data of another trainer of TRL: what is named otherwise here is said, and what is common is read."""

import inspect
import json
import logging
import re
from dataclasses import fields

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser
from trl.scripts import sft

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer
from trl_quietstar.cli import main
from trl_quietstar.cli.arguments import DataArguments, load_data
from trl_quietstar.cli.parser import CommandParser
from trl_quietstar.data.prepare import prepare_texts
from trl_quietstar.model.saved import saved_settings
from trl_quietstar.other_trainers import ARGUMENTS_ELSEWHERE, OPTIONS_ELSEWHERE

from .commands import write_lines
from .tiny import byte_tokenizer, sums
from .training import DEFAULTS, LORA, assert_same_state, saved_model, text_data, tiny_args, tiny_trainer


OWN = {field.name for field in fields(QuietStarConfig)}
OTHERS = {
    field.name: kind
    for kind in ("DPOConfig", "RLOOConfig", "GRPOConfig", "SFTConfig")
    for field in fields(getattr(trl, kind))
    if field.name not in OWN
}
KINDS = (DataArguments, QuietStarConfig, ModelConfig)


# Options and arguments


def test_options_of_other_trainers():
    """It is said what to do, and no name that is merely spelt alike is offered, in Python and as a flag."""
    parser, of_model = CommandParser(KINDS, "train"), {field.name for field in fields(ModelConfig)}
    for name in {**OTHERS, **OPTIONS_ELSEWHERE, **ARGUMENTS_ELSEWHERE}:
        with pytest.raises(TypeError, match=rf"^`QuietStarConfig` has no option `{name}`: .{{10,}}\.$"):
            QuietStarConfig("out", **{name: None})
        if name not in of_model | {"config", "datasets"}:  # which are flags
            with pytest.raises(ValueError, match=rf"^There is no flag `--{name}`: .{{10,}}\.$"):
                parser.parse_args_and_config([f"--{name}=1"])


def test_advice_names_what_there_is():
    """Each name in it is an option, or an argument of the trainer, and no option that there is has advice."""
    known = OWN | {field.name for kind in (DataArguments, ModelConfig) for field in fields(kind)}
    known |= set(inspect.signature(QuietStarREINFORCETrainer.__init__).parameters)
    known |= {
        "chat_template_kwargs",
        "input_ids",
        "thought_mask",
        "text",
        "labels",
        "evaluate",
        "on_evaluate",
        "QuietStarConfig",
    }
    known |= {"TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "env", "messages"}
    for words in (*OPTIONS_ELSEWHERE.values(), *ARGUMENTS_ELSEWHERE.values()):
        assert set(re.findall(r"`(\w+)(?:=[^`]*)?`", words)) <= known, words
    assert not OWN & set(OPTIONS_ELSEWHERE)


@pytest.mark.parametrize(
    "name, words",
    {
        "beta": "set it in `args`, a `QuietStarConfig`",
        "max_seq_length": "it is `max_length`",
        "train_datasets": "did you mean `train_dataset`?",
        "tools": "without tools",
    }.items(),
)
def test_an_argument_of_another_trainer(name, words, tmp_path):
    """An option of the configuration is sent there, and a slip is named."""
    with pytest.raises(TypeError, match=re.escape(words)):
        QuietStarREINFORCETrainer("nowhere", tiny_args(tmp_path), text_data(), **{name: None})


def test_a_slip_in_an_option():
    """With what may have been meant; a class of the user's own may take more."""
    with pytest.raises(TypeError, match="no option `thought_lenght`; did you mean `thought_length`?"):
        QuietStarConfig("out", thought_lenght=3)

    class Own(QuietStarConfig):
        def __init__(self, *args, of_mine=None, **others):
            super().__init__(*args, **others)
            self.of_mine = of_mine

    assert Own("out", of_mine=3, use_cpu=True).of_mine == 3


def test_switches_stand_alone():
    """`--gradient_checkpointing` and `--bf16`, as in commands of TRL."""
    for name in ("gradient_checkpointing", "fp16", "single_pass"):
        _, args, _ = CommandParser(KINDS, "train").parse_args_and_config([f"--{name}", "--use_cpu"])
        assert getattr(args, name) is True
    _, args, _ = CommandParser(KINDS, "train").parse_args_and_config(["--gradient_checkpointing", "false"])
    assert args.gradient_checkpointing is False


def test_the_dtype_by_its_former_name(tmp_path):
    """`torch_dtype` in `model_init_kwargs` is heeded."""
    trainer = tiny_trainer(
        tmp_path / "out", saved_model(tmp_path / "m"), model_init_kwargs={"torch_dtype": "bfloat16"}
    )
    assert trainer.model.dtype == torch.bfloat16


def test_a_reward_of_whole_completions(tmp_path):
    """What TRL's reward functions take is not looked for among the columns."""
    with pytest.raises(ValueError, match="takes 'completions', as TRL's do of whole completions; .*`thought_texts`"):
        tiny_trainer(tmp_path, reward_functions=lambda completions, **_: [0.0])


def test_the_script_of_trl(tmp_path, monkeypatch):
    """TRL's own `sft.py` trains by this trainer: a mixture of data, a recipe with `env`, an adapter, and evaluation."""
    monkeypatch.setattr("trl.SFTTrainer", QuietStarREINFORCETrainer)
    monkeypatch.delenv("OF_RECIPE", raising=False)
    part = {"path": "json", "data_files": write_lines(tmp_path / "data.jsonl", sums()[:20]), "split": "train[:50%]"}
    recipe = DEFAULTS | {"model_name_or_path": saved_model(tmp_path / "m"), "output_dir": str(tmp_path / "out")}
    recipe |= {"datasets": [part, part], "test_split_size": 0.2, "env": {"OF_RECIPE": "1"}, "eval_strategy": "epoch"}
    recipe |= {"use_peft": True, "lora_target_modules": "all-linear", "max_steps": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    parser = TrlParser((ScriptArguments, QuietStarConfig, ModelConfig, DatasetMixtureConfig))
    sft.main(*parser.parse_args_and_config(["--config", str(tmp_path / "recipe.json")]))
    assert (tmp_path / "out/quietstar.safetensors").is_file()


# Data


def test_a_recipe_lists_several_datasets_as_in_trl(tmp_path, capsys):
    """Their rows come one after the other, one part with written thoughts; some are set apart for evaluation; and such a recipe trains."""
    rows = [{"prompt": f"{i} plus {i}", "completion": f" {2 * i}"} for i in range(20)]
    thoughts, data = tmp_path / "thoughts.jsonl", tmp_path / "data.jsonl"
    thoughts.write_text("".join(json.dumps({**row, "thought": "so"}) + "\n" for row in rows[:10]))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {"path": "json", "data_files": str(data), "split": "train[:50%]"}
    recipe = DEFAULTS | {"model_name_or_path": saved_model(tmp_path / "m"), "output_dir": str(tmp_path / "out")}
    recipe |= {"datasets": [part, {"path": "json", "data_files": str(thoughts)}], "eval_size": 2, "max_steps": 1}
    recipe |= {"thought_stop_string": "]"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    main(["train", "--config", str(tmp_path / "recipe.yaml")])
    assert "Of the 20 rows of 'datasets', 2 are set apart" in capsys.readouterr().out
    assert (tmp_path / "out/quietstar.safetensors").is_file()
    train, evaluation = load_data(DataArguments(datasets=recipe["datasets"], dataset_train_split="train[5:]"))
    assert train["thought"] == [None] * 5 + ["so"] * 10 and evaluation is None
    train, _ = load_data(DataArguments(datasets=recipe["datasets"][1:], dataset_streaming=True))
    assert len(list(train)) == 10


@pytest.mark.parametrize(
    ("datasets", "options", "message"),
    [
        (["org/name"], {}, "give each as a mapping with a `path`"),
        ([{"name": "main"}], {}, "give each as a mapping with a `path`"),
        ([{"path": "FILE"}], {}, "give `path: json` and `data_files: FILE`"),
        ([{"path": "json", "file": "FILE"}], {}, "unknown field .*'file'"),
        ([], {}, "No datasets"),
        ([{"path": "json"}], {"dataset_name": "FILE"}, "so does `dataset_name`; leave out the one"),
        ([{"path": "json"}], {"dataset_config": "main"}, "so does `dataset_config`; leave out the one"),
    ],
)
def test_datasets_that_cannot_be_read_are_named(datasets, options, message, tmp_path):
    """A part that is no mapping of TRL's fields, or a second name for the data."""
    file = str(write_lines(tmp_path / "data.jsonl", sums()[:2]))
    datasets, options = json.loads(json.dumps([datasets, options]).replace("FILE", file))
    with pytest.raises(ValueError, match=message.replace("FILE", file)):
        load_data(DataArguments(datasets=datasets, **options))


def prepare(rows: list[dict], folder, tokenizer=None, **options):
    """What becomes of rows ahead of training."""
    data = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows)
    args = tiny_args(folder, max_length=100, **options)
    return prepare_texts(data, tokenizer or byte_tokenizer(), args, "train", 300)


TALK = [{"role": "user", "content": "3 plus 4"}, {"role": "assistant", "content": "7"}]
SHAREGPT = [{"from": "human", "value": "3 plus 4"}, {"from": "gpt", "value": "7"}]


@pytest.mark.parametrize("streams", [False, True])
def test_conversations_of_sharegpt_are_messages(streams, tmp_path):
    """Roles have the names that chat templates know; keys may be those of messages. The rows of a user stay as they are."""
    right = prepare([{"messages": TALK}], tmp_path, assistant_only_loss=True)[0]
    for talk in (SHAREGPT, TALK):
        rows = [{"conversations": talk, "source": None}]
        data = IterableDataset.from_generator(lambda rows=rows: iter(rows)) if streams else rows
        (row,) = prepare(data, tmp_path, assistant_only_loss=True)
        assert row["input_ids"] == right["input_ids"] and row["labels"] == right["labels"]
        (row,) = prepare(data, tmp_path, assistant_only_loss=True, remove_unused_columns=False)
        assert row["conversations"] == talk


UNREAD = {
    "Alpaca": (
        {"instruction": "add", "input": "3 4", "output": "7"},
        "Rename 'instruction' to 'prompt' and 'output' to 'completion', with `dataset.rename_columns({'instruction': 'prompt', "
        "'output': 'completion'})` (on the command line: `--column_mapping`). Put 'input' into the prompt first, with `dataset.map`.",
    ),
    "GRPO": ({"prompt": "3 plus 4", "answer": "7"}, "Rename 'answer' to 'completion'"),
    "questions": (
        {"question": "3 plus 4", "answer": "7"},
        "Rename 'question' to 'prompt' and 'answer' to 'completion'",
    ),
    "prompts alone": ({"prompt": "3 plus 4"}, "give the true answers too, as 'completion'"),
    "preferences": ({"prompt": "3", "chosen": "4", "rejected": "5"}, "Rename 'chosen' to 'completion'"),
    "preferred talks": ({"chosen": TALK, "rejected": TALK}, "Rename 'chosen' to 'messages'"),
    "a conversation": ({"conversation": TALK}, "Rename 'conversation' to 'messages'"),
    "an article": ({"article": "3", "id": 1}, "To train on all of 'article', set `dataset_text_field='article'`"),
    "a message a row": ({"role": "user", "content": "3"}, "A row holds a whole conversation"),
    "rows in a row": ({"data": [{"text": "3"}]}, "If all rows are in 'data', load them by `load_dataset('json',"),
    "nothing known": ({"a": "3"}, "'messages', or 'input_ids'."),
}


@pytest.mark.parametrize("name", UNREAD)
def test_columns_of_other_names(name, tmp_path):
    """What is likely meant, for datasets and streams."""
    row, words = UNREAD[name]
    for data in ([row], IterableDataset.from_generator(lambda: iter([row]))):
        with pytest.raises(ValueError, match=re.escape(words)):
            prepare(data, tmp_path)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": SHAREGPT}, "with 'role' and 'content', or call the column 'conversations'"),
        ({"prompt": TALK[:1], "completion": "7"}, "such as [{'role': 'assistant', 'content': '...'}]"),
        ({"messages": json.dumps(TALK)}, "read from JSON with `json.loads`"),
    ],
    ids=["ShareGPT", "answers of text", "JSON"],
)
def test_messages_of_other_forms(row, words, tmp_path):
    """With the form that is read."""
    with pytest.raises(ValueError, match=re.escape(words)):
        prepare([row], tmp_path)


@pytest.mark.parametrize(
    "given, words",
    [
        (
            lambda data: DatasetDict(train=data, test=data),
            "give one of its splits (train, test), such as `dataset['train']`",
        ),
        (lambda data: data.to_list(), "made by `Dataset.from_list`"),
        (lambda data: data.to_dict(), "made by `Dataset.from_dict`"),
        (lambda data: data.to_pandas(), "made by `Dataset.from_pandas`"),
        (lambda data: "data.jsonl", "loaded by `datasets.load_dataset`"),
    ],
    ids=["splits", "list", "dict", "pandas", "name"],
)
def test_what_is_no_dataset(given, words, tmp_path):
    """How to make one of it."""
    with pytest.raises(TypeError, match=re.escape(words)):
        tiny_trainer(tmp_path, data=given(text_data(4)))


def test_a_part_of_a_split(tmp_path):
    """As `load_dataset` takes it, for training and for evaluation."""
    file = write_lines(tmp_path / "data.jsonl", sums()[:20])
    for train, test, first, second in (("train[:80%]", "train[80%:]", 16, 4), ("train[:5]", "train[-2:]", 5, 2)):
        data = load_data(DataArguments(dataset_name=file, dataset_train_split=train, dataset_test_split=test))
        assert [len(part) for part in data] == [first, second] and data[1][-1]["text"] == sums()[19]
    with pytest.raises(ValueError, match="has no split 'none"):
        load_data(DataArguments(dataset_name=file, dataset_train_split="none[:3]"))
    with pytest.raises(ValueError, match=r"'train\[3' is no part of a split"):
        load_data(DataArguments(dataset_name=file, dataset_train_split="train[3"))


THOUGHT = {"role": "assistant", "content": "7", "reasoning_content": "so"}
R1 = {"role": "assistant", "content": "<think>so</think>7"}


@pytest.mark.parametrize(
    "row, options, words",
    [
        ({"messages": [TALK[0], THOUGHT]}, {}, "hold 'reasoning_content', which the chat template leaves out"),
        ({"messages": [TALK[0], R1]}, {}, "set `thought_pattern='<think>(.*?)</think>'`"),
        ({"prompt": "3", "completion": "<think>so</think>7"}, {}, "set `thought_pattern"),
        ({"text": "<think>so</think>7"}, {}, "set `thought_pattern"),
        ({"messages": TALK}, {}, None),
        ({"messages": [TALK[0], THOUGHT]}, {"chat_template": "{{ messages[1].reasoning_content }}"}, None),
        ({"messages": [TALK[0], R1]}, {"thought_pattern": "<think>(.*?)</think>", "min_thought_length": 1}, None),
    ],
    ids=["left out", "messages", "completion", "text", "none", "read", "taken out"],
)
def test_reasoning_in_the_data(row, options, words, tmp_path, monkeypatch):
    """It is said where it would not be taught as a thought, in each preparation, and only there."""
    said = []
    monkeypatch.setattr(logging.getLogger("trl_quietstar.data.columns"), "warning", said.append)
    template = {name: options.pop(name) for name in ("chat_template",) if name in options}
    prepare([row], tmp_path, byte_tokenizer(**template), thought_length=10, **options)
    assert len(said) == (words is not None) and (words or "") in "".join(said)


def test_a_context_that_is_not_read(tmp_path, caplog):
    """A column beside prompts that is likely to belong to them; not an empty one, nor one that a reward function takes."""
    row = {"prompt": "add", "completion": "7", "context": "3 4", "system": None}
    for data in ([row], IterableDataset.from_generator(lambda: iter([row]))):
        caplog.clear()
        prepare(data, tmp_path)
        assert "The column 'context' of the train dataset is not read" in caplog.text and "'system'" not in caplog.text
    caplog.clear()
    prepare([row], tmp_path, remove_unused_columns=False)
    assert "not read" not in caplog.text


def test_answers_that_are_cut(tmp_path, caplog):
    """Rows of prompts and messages that reach `max_length` are counted; of plain text each part is as good as another."""
    talk = [{"messages": [TALK[0], {"role": "assistant", "content": "7 " * length}]} for length in (3, 200, 300)]
    prepare(talk, tmp_path)
    assert "2 of 3 rows of the train dataset have `max_length` (100) tokens or more" in caplog.text
    caplog.clear()
    prepare([{"text": "7 " * 200}], tmp_path)
    prepare(talk[:1], tmp_path)
    assert "`max_length`" not in caplog.text


# What others save


def test_a_plain_adapter_is_trained_on(tmp_path):
    """By its path it has no heads, and the error says how to load it; that way it trains and saves them."""
    model, args = (
        saved_model(tmp_path / "m"),
        SFTConfig(str(tmp_path / "sft"), report_to="none", use_cpu=True, max_steps=1),
    )
    plain = SFTTrainer(model, args, train_dataset=text_data(8), peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA))
    plain.train()
    plain.save_model()
    with pytest.raises(
        FileNotFoundError, match=r"`AutoPeftModelForCausalLM.from_pretrained\(..., is_trainable=True\)`"
    ):
        tiny_trainer(tmp_path / "out", str(tmp_path / "sft"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft", is_trainable=True)
    trainer = tiny_trainer(tmp_path / "out", loaded, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert_same_state(QuietStarForCausalLM.from_pretrained(tmp_path / "out"), trainer.model)


def test_an_adapter_on_a_thinking_model(tmp_path, caplog):
    """Another trainer saves it without heads. They are then those of its base; and an adapter that has lost its own is refused."""
    tiny_trainer(tmp_path / "base", saved_model(tmp_path / "m"), thought_length=5).save_model()
    base = QuietStarForCausalLM.from_pretrained(tmp_path / "base")
    options = dict(report_to="none", use_cpu=True, max_steps=1, save_strategy="no", max_length=60)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    other = SFTTrainer(
        base,
        SFTConfig(str(tmp_path / "sft"), **options),
        train_dataset=text_data(8),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    other.train()
    other.save_model()
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "sft")
    assert "the heads are those of its base" in caplog.text
    assert_same_state(
        loaded.get_base_model().quietstar, QuietStarForCausalLM.from_pretrained(tmp_path / "base").quietstar
    )
    assert saved_settings(str(tmp_path / "sft")).thought_length == 5
    loaded.save_pretrained(tmp_path / "own")
    (tmp_path / "own/quietstar.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no quietstar.safetensors"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "own")


def test_heads_that_another_trainer_did_not_save(tmp_path, caplog):
    """The warning says how it would have; and so it does."""
    first = tiny_trainer(tmp_path / "first", saved_model(tmp_path / "m"))
    first.save_model()
    options = dict(report_to="none", use_cpu=True, max_steps=1, save_strategy="no", max_length=60)
    own = QuietStarForCausalLM.from_pretrained(tmp_path / "first")
    for model, name in ((str(tmp_path / "first"), "plain"), (own, "own")):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
        other = SFTTrainer(
            model, SFTConfig(str(tmp_path / name), **options), train_dataset=text_data(8), processing_class=tokenizer
        )
        other.train()
        other.save_model()
        caplog.clear()
        QuietStarForCausalLM.from_pretrained(tmp_path / name)
        assert ("if another trainer saved it, give that trainer the model as" in caplog.text) == (name == "plain")
