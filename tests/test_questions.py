"""Questions and answers of one's own: their columns, the chat made of them, and rows set apart for evaluation."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from trl_quietstar.cli import DataArguments, load_data, main
from trl_quietstar.data.questions import as_chat, as_prompts, give_template, split_off

from .tiny import byte_tokenizer
from .training import logged, saved_model, tiny_trainer


ROWS = [{"question": f"{a} plus {b} is", "answer": f"{a + b}"} for a in range(6) for b in range(10)]
QA = Path(__file__).parent.parent / "recipes/qa.yaml"


def lines(path: Path, rows: list[dict]) -> str:
    """A JSON-lines file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_of_questions_and_answers():
    """They are what `prompt` and `completion` are; where data say themselves what they are, nothing is added."""
    first = {"prompt": "0 plus 0 is", "completion": "0", **ROWS[0]}
    assert as_prompts(Dataset.from_list(ROWS), "text")[0] == first
    stream = as_prompts(IterableDataset.from_generator(lambda: iter(ROWS)), "text")
    assert next(iter(stream)) == first
    for names, text_field in ((("question", "answer", "text"), "text"), (("question", "answer"), "answer")):
        data = Dataset.from_list([dict.fromkeys(names, "a")])
        assert set(as_prompts(data, text_field).column_names) == set(names)


@pytest.mark.parametrize("chat", [False, True])
def test_rewards_find_the_columns_of_the_file(chat, tmp_path):
    """`exact_match` takes `answer`, which is also what is read as the completion."""
    train, _ = load_data(DataArguments(dataset_name=lines(tmp_path / "data.jsonl", ROWS), chat=chat))
    options = dict(reward_functions=["exact_match"], thought_positions="prompt_end", talk_length="completion")
    trainer = tiny_trainer(tmp_path / "out", data=train, max_steps=1, **options)
    assert trainer.train_dataset[7]["answer"] == ROWS[7]["answer"]
    trainer.train()
    assert "rl/rewards/exact_match/mean" in logged(trainer)[0]


@pytest.mark.parametrize("size, count", [(0.1, 6), (0.01, 2), (7, 7)])
def test_rows_are_set_apart(size, count):
    """The same ones each time, in the order of the data, none in both parts and none lost."""
    data = Dataset.from_dict({"text": [f"{i:02}" for i in range(60)]})
    train, evaluation = (part["text"][:] for part in split_off(data, size))
    assert len(evaluation) == count and sorted(train + evaluation) == data["text"][:]
    assert train == sorted(train) and evaluation == sorted(evaluation)
    assert split_off(data, size)[1]["text"][:] == evaluation != data["text"][:count]


def test_what_is_set_apart_is_said(tmp_path, capsys):
    """Where no evaluation data are given; a file of them is taken as it is."""
    train, test = lines(tmp_path / "train.jsonl", ROWS), lines(tmp_path / "test.jsonl", ROWS[:3])
    parts = load_data(DataArguments(dataset_name=train, eval_size=0.1))
    assert [len(part) for part in parts] == [54, 6]
    assert "Of the 60 rows of" in (said := capsys.readouterr().out) and "6 are set apart" in said
    parts = load_data(DataArguments(dataset_name=train, eval_size=0.1, eval_dataset_name=test))
    assert [len(part) for part in parts] == [60, 3] and not capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(eval_size=1.5), "`eval_size` is 1.5; give a share below 1, or a number of rows"),
        (dict(eval_size=0.0), "`eval_size` is 0; give"),
        (dict(eval_size=60), "takes 60 rows of 60 and leaves none to train on; lower it"),
        (
            dict(eval_size=0.1, dataset_streaming=True),
            "`eval_size` needs to know how many rows there are, and a stream",
        ),
        (dict(chat=True, column_mapping={"question": "text"}), "`chat` makes messages of 'prompt' and 'completion'"),
    ],
)
def test_what_cannot_be_set_apart_or_asked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(dataset_name=lines(tmp_path / "data.jsonl", ROWS), **options))


def test_evaluation_that_options_need(tmp_path):
    """The message names what sets rows apart."""
    with pytest.raises(ValueError, match=r"anti_theater_steps=5.*`--eval_size 0.1`"):
        tiny_trainer(tmp_path, anti_theater_steps=5)


@pytest.mark.parametrize("has_template", [True, False])
def test_a_chat_of_questions(has_template, tmp_path):
    """By the model's own template, or by one that ends the prompt before the answer; the answer alone is trained on."""
    tokenizer = byte_tokenizer(**({} if has_template else {"chat_template": None}))
    give_template(tokenizer)
    data = as_chat(as_prompts(Dataset.from_list(ROWS), "text"))
    row = tiny_trainer(tmp_path, data=data, tokenizer=tokenizer, thought_positions="prompt_end").train_dataset[13]
    of_answer = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    shown = "user: 1 plus 3 is<eos>assistant: 4<eos>" if has_template else "Question: 1 plus 3 is\nAnswer: 4<eos>"
    assert tokenizer.decode(row["input_ids"]) == shown and tokenizer.decode(of_answer) == " 4<eos>"
    if not has_template:  # the other one ends the prompt with a space, which goes to the token after it
        prompt = tokenizer.apply_chat_template(data[13]["prompt"], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"] == [*prompt, *of_answer]


def test_messages_stay_messages():
    """`chat` has nothing to do for data that are a chat already."""
    talk = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}])
    assert as_chat(talk)[0] == talk[0]
    prompts = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    )
    assert as_chat(prompts)[0] == prompts[0]


def test_bad_questions_are_named(tmp_path):
    """By the number of their row, as in data without `chat`."""
    data = as_chat(Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}]))
    with pytest.raises(ValueError, match=r"Row 1 .*nothing in 'prompt'"):
        tiny_trainer(tmp_path, data=data)


@pytest.mark.slow
def test_a_model_that_was_taught_by_questions_speaks(tmp_path, monkeypatch, capsys):
    """The recipe on a file, with a model that has no template: the one it gets comes along, and `--chat` and `eval` find it."""
    monkeypatch.chdir(tmp_path)
    saved_model(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    lines(tmp_path / "data.jsonl", ROWS)
    small = (
        "--model_name_or_path model --max_steps 2 --thought_length 4 --num_thoughts 2 --use_cpu --preflight_thoughts 4"
    )
    assert main(["train", "--config", str(QA), *small.split()]) == 0
    assert "6 are set apart" in capsys.readouterr().out
    assert main("generate --model out/qa --max_new_tokens 2 --chat --prompt".split() + ["2 plus 2 is"]) == 0
    assert "Question: 2 plus 2 is\nAnswer:" in capsys.readouterr().out
    assert main("eval --model out/qa --chat --dataset_name data.jsonl --max_eval_samples 4 --use_cpu".split()) == 0
    assert "NLL" in capsys.readouterr().out
