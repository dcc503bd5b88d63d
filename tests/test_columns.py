"""Columns of the data: those that a reward function takes, those that stay, and data that come after the start."""

import re

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from trl_quietstar.data.batches import RepeatedRows
from trl_quietstar.data.prepare import prepare_texts
from trl_quietstar.learning.reward_functions import RewardFunctions
from trl_quietstar.learning.rewards import thought_rewards

from .tiny import byte_tokenizer, sums
from .training import text_data, tiny_args, tiny_trainer


def marked(count: int = 8, first: int = 0) -> Dataset:
    """Texts that say which they are, beside themselves."""
    texts = sums()[first : first + count]
    return Dataset.from_dict({"text": texts, "answer": [text.split()[-2] for text in texts], "number": range(count)})


class Reward:
    """A reward that keeps what it was given; `named` takes columns by name."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def note(self, text, columns):
        rows = [ids[mask] for ids, mask in zip(text.input_ids, text.attention_mask, strict=True)]
        self.seen.append((self.tokenizer.batch_decode(rows), columns))

    def named(self, text, thoughts, answer, number=None, **gains):
        self.note(text, {"answer": answer, "number": number})
        return thought_rewards(**gains, reward_type="probability")

    def any_of_them(self, text, mask, logps_with, **others):
        self.note(text, {name: x for name, x in others.items() if isinstance(x, list)})
        return (logps_with.exp() * mask).sum(-1)

    def check(self, columns: set[str]) -> None:
        """Each row came with its own values, in every call."""
        assert self.seen
        for texts, given in self.seen:
            assert {name for name, values in given.items() if values is not None} == columns
            for text, answer in zip(texts, given["answer"], strict=True):
                assert text.split("<eos>")[0].split()[-2] == answer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "normalize_advantages": "step"},  # judged ahead of the step
        {"num_iterations": 2, "per_device_train_batch_size": 2},
    ],
    ids=str,
)
def test_columns_reach_the_reward_function_by_name(options, tmp_path):
    """In training and in evaluation, with each row its own values, as TRL gives them: lists of one for each row."""
    tokenizer = byte_tokenizer()
    reward = Reward(tokenizer)
    data = {"tokenizer": tokenizer, "data": marked(), "evaluation": marked(3, first=40)}
    trainer = tiny_trainer(tmp_path, reward_functions=reward.named, max_steps=2, **data, **options)
    trainer.train()
    trainer.evaluate()
    reward.check({"answer", "number"})
    assert set(trainer.train_dataset.column_names) >= {"answer", "number"}


def test_all_columns_reach_a_function_that_takes_any(tmp_path):
    """With `remove_unused_columns=False`, from a stream too; other than that, none that it does not name."""
    tokenizer = byte_tokenizer()
    rows = marked().to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for data in (marked(), stream):
        reward = Reward(tokenizer)
        options = dict(max_steps=1, max_length=60, remove_unused_columns=False)
        tiny_trainer(tmp_path, data=data, tokenizer=tokenizer, reward_functions=reward.any_of_them, **options).train()
        reward.check({"answer", "number"})
    reward = Reward(tokenizer)
    tiny_trainer(
        tmp_path, data=marked(), tokenizer=tokenizer, reward_functions=reward.any_of_them, max_steps=1
    ).train()
    assert all(columns == {} for _, columns in reward.seen)


def test_prompts_and_messages_reach_it_as_they_were(tmp_path):
    """Not with the end-of-text token that preparation adds, nor as what a template makes of them."""
    seen = []

    def reward(logps_with, prompt, completion, **_):
        seen.append((prompt, completion))
        return logps_with.mean(-1)

    rows = {"prompt": ["3 plus 4 is"], "completion": [" 7 ."]}
    tiny_trainer(tmp_path, data=Dataset.from_dict(rows), reward_functions=reward, max_steps=1).train()
    assert seen == [(["3 plus 4 is"], [" 7 ."])]


def prepare(data, folder, reward=None, **options) -> Dataset:
    """What becomes of data ahead of training."""
    args = tiny_args(folder, **{"max_length": 60, **options})
    functions = RewardFunctions.of(reward, args)
    return prepare_texts(data, byte_tokenizer(), args, "train", 300, args.packing, functions)


def test_all_columns_stay_where_none_is_to_be_removed(tmp_path):
    """As they were, in datasets and streams; their names are not taken for other kinds of data, nor their labels for ours."""
    row = {"text": "3 plus 4", "prompt": "?", "messages_of": [{"role": "user"}], "labels": 1, "score": 0.5}
    kept = {name: value for name, value in row.items() if name != "labels"}
    talk = {"conversations": [{"from": "user", "value": "a"}], "score": 1}
    for data in (Dataset.from_list([talk]), IterableDataset.from_generator(lambda: iter([talk]))):
        (found,) = prepare(data, tmp_path, remove_unused_columns=False)
        assert {name: found[name] for name in talk} == talk
    for data in (Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        (found,) = prepare(data, tmp_path, remove_unused_columns=False)
        assert {name: found[name] for name in kept} == kept
        assert found["labels"] == found["input_ids"] and set(found) == {*kept, "labels", "input_ids"}
        (found,) = prepare(data, tmp_path)
        assert not set(found) & {"score", "prompt"}


@pytest.mark.parametrize(
    "reward, options, words",
    [
        (
            lambda answer, **_: 0,
            {},
            "The reward function `<lambda>` takes 'answer', which is no column of the train dataset (text, mask)",
        ),
        (lambda labels, **_: 0, {}, "takes 'labels', which it finds in `text`"),
        (
            lambda text, **_: 0,
            dict(remove_unused_columns=False),
            "The column 'mask' of the train dataset has the name",
        ),
        (lambda answer=0, **_: 0, dict(packing=True, remove_unused_columns=False), "'mask' of the train"),
    ],
    ids=["missing", "labels", "clash", "clash in packing"],
)
def test_columns_that_cannot_be_given(reward, options, words, tmp_path):
    """Said at the start, by name."""
    with pytest.raises(ValueError, match=re.escape(words)):
        prepare(Dataset.from_dict({"text": sums()[:2], "mask": [1, 2]}), tmp_path, reward, **options)


def test_packing_has_no_columns(tmp_path):
    """Rows are joined, so that nothing is a row's own; without a reward function that asks, they are left out as in TRL."""
    with pytest.raises(ValueError, match=r"`packing=True` joins rows, and `reward_functions` take .*\(answer\)"):
        prepare(marked(), tmp_path, lambda answer, **_: 0, packing=True)
    packed = prepare(marked(), tmp_path, packing=True, remove_unused_columns=False)
    assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths"}


# Data that come after the start


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One for all tests that only evaluate."""
    return tiny_trainer(tmp_path_factory.mktemp("out"), evaluation=text_data(4, first=100), max_length=60)


NUMBERS = ("loss", "reward", "nll_with", "nll_without", "accuracy_with", "coherence")


def test_other_data_are_evaluated_as_given_at_the_start(trainer):
    """`evaluate` and `predict` on a raw dataset, a stream, or several: the numbers of the same data at the start."""
    raw = text_data(4, first=100)
    stream = IterableDataset.from_generator(lambda: iter(raw.to_list()))
    right = trainer.evaluate()
    for given in (raw, stream, raw.map(lambda row: {**trainer.processing_class(row["text"] + "<eos>")})):
        found, predicted = trainer.evaluate(given), trainer.predict(given)
        assert predicted.predictions is None
        for name in NUMBERS:
            assert found[f"eval_{name}"] == predicted.metrics[f"test_{name}"] == right[f"eval_{name}"], name
    several = trainer.evaluate(DatasetDict(one=raw, two=raw))
    assert several["eval_one_reward"] == several["eval_two_reward"] == right["eval_reward"]


def test_bad_rows_of_other_data_are_named(trainer):
    """By the name that they were given under."""
    bad = Dataset.from_dict({"input_ids": [[5, 6], [5, 900]]})
    for name, call in {
        "eval": lambda: trainer.evaluate(bad),
        "hard": lambda: trainer.evaluate({"hard": bad}),
        "test": lambda: trainer.predict(bad),
    }.items():
        with pytest.raises(ValueError, match=f"^Row 1 of the {name} dataset has 900"):
            call()
    with pytest.raises(ValueError, match="may have `max_length`|A text of 200 tokens"):
        trainer.args.max_length, kept = None, trainer.args.max_length
        try:
            trainer.evaluate(Dataset.from_dict({"input_ids": [[5] * 200]}))
        finally:
            trainer.args.max_length = kept


def test_names_of_evaluation_data(trainer):
    """One that was not given is no column of the data, as the Trainer would have it."""
    with pytest.raises(ValueError, match="There is no evaluation data 'hard'; the trainer was given none by name"):
        trainer.evaluate("hard")


def test_workers_that_stay_read_the_data_that_were_given(tmp_path):
    """The Trainer would give them the dataset of the first evaluation again."""
    options = dict(dataloader_persistent_workers=True, dataloader_num_workers=1)
    evaluation = {"one": text_data(4), "two": text_data(5)}
    trainer = tiny_trainer(tmp_path, evaluation=evaluation, **options)
    for given, rows in (("one", 4), ("two", 5), (trainer.eval_dataset["two"], 5), (trainer.eval_dataset["one"], 4)):
        assert len(trainer.get_eval_dataloader(given).dataset) == rows


# The order of rows


def test_rows_that_are_read_again_are_grouped_by_length(tmp_path):
    """Each chunk comes twice, holds rows of about one length, and is another one in another epoch, the same when resumed."""
    lengths = torch.randint(5, 60, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": [[5] * n for n in lengths]})
    options = dict(num_iterations=2, train_sampling_strategy="group_by_length", max_length=60)
    trainer = tiny_trainer(tmp_path, data=data, **options)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, RepeatedRows)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        order = list(sampler)
        orders.append(order)
        chunks = [order[i : i + 4] for i in range(0, len(order), 4)]
        assert chunks[::2] == chunks[1::2] and sorted(sum(chunks[::2], [])) == list(range(64))
        spread = [max(lengths[i] for i in chunk) - min(lengths[i] for i in chunk) for chunk in chunks]
        assert sorted(spread)[len(spread) // 2] <= 15  # of any four rows about 35
    assert orders[0] == orders[2] != orders[1]
    trainer.train()


def test_rows_dealt_out_anew_cannot_be_read_again(tmp_path):
    """Refused by name."""
    with pytest.raises(ValueError, match="`num_iterations=2` reads the rows of a step again, and `batch_rebalance`"):
        tiny_trainer(tmp_path, num_iterations=2, train_sampling_strategy="batch_rebalance")
