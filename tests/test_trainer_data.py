"""The trainer on every kind of data: where it thinks, and what of a text is trained on."""

import pytest
from datasets import Dataset

from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions

from .tiny import byte_tokenizer, generators, sums
from .training import EVAL_METRICS, assert_same_logs, finite, logged, text_data, tiny_trainer


def thought_places(trainer) -> tuple[Text, list[list[int]]]:
    """The first training batch, and the text indices at which it may think."""
    batch = next(iter(trainer.get_train_dataloader()))
    text = Text.from_batch(**batch)
    positions = choose_positions(text, "all", generators(text))
    return text, [i[m].tolist() for i, m in zip(positions.index, positions.mask, strict=True)]


def test_text(tmp_path):
    """Plain text: a thought may follow every token but the last, and EOS is the last to be predicted."""
    trainer = tiny_trainer(tmp_path)
    text, places = thought_places(trainer)
    for row, at in enumerate(places):
        length = int(text.attention_mask[row].sum())
        assert at == list(range(length - 1))
        assert text.input_ids[row, length - 1] == byte_tokenizer().eos_token_id


def test_prompt_completion(tmp_path):
    """Prompt and completion: thoughts only where the next token is of the completion."""
    tokenizer = byte_tokenizer()
    data = Dataset.from_dict({"prompt": ["3 plus 4 is", "10 plus 2 is"], "completion": [" 7 .", " 12 ."]})
    trainer = tiny_trainer(tmp_path, data=data, max_steps=1, per_device_train_batch_size=2)
    text, places = thought_places(trainer)
    for row, at in enumerate(places):
        said = tokenizer.decode([text.input_ids[row, t + 1] for t in at])
        assert said in (" 7 .<eos>", " 12 .<eos>")
    trainer.train()
    assert finite(logged(trainer)[0]["loss"])


def test_prompt_counts_when_asked(tmp_path):
    """`completion_only_loss=False`: thoughts in the prompt as well."""
    data = Dataset.from_dict({"prompt": ["3 plus 4 is"], "completion": [" 7 ."]})
    trainer = tiny_trainer(tmp_path, data=data, completion_only_loss=False)
    text, places = thought_places(trainer)
    assert places[0] == list(range(int(text.attention_mask[0].sum()) - 1))


CHAT = {
    "messages": [
        [{"role": "user", "content": "3 plus 4"}, {"role": "assistant", "content": "7 ."}],
        [{"role": "user", "content": "10 plus 2"}, {"role": "assistant", "content": "12 ."}],
    ]
}


@pytest.mark.parametrize("assistant_only", [True, False])
def test_messages(assistant_only, tmp_path):
    """Conversations through the chat template; with `assistant_only_loss`, thoughts in the assistant's turns only."""
    tokenizer = byte_tokenizer()
    trainer = tiny_trainer(
        tmp_path,
        data=Dataset.from_dict(CHAT),
        assistant_only_loss=assistant_only,
        max_steps=1,
        per_device_train_batch_size=2,
    )
    text, places = thought_places(trainer)
    for row, at in enumerate(places):
        said = tokenizer.decode([text.input_ids[row, t + 1] for t in at])
        assert ("assistant: " not in said) == assistant_only
        assert ("plus" not in said) == assistant_only and " .<eos>" in said
    trainer.train()
    assert finite(logged(trainer)[0]["loss"])


def test_tokenized_data(tmp_path):
    """`input_ids` are taken as they are; `labels` beside them say where to think."""
    ids = [[5, 6, 7, 8, 9], [10, 11, 12, 13]]
    labels = [[-100, -100, 7, 8, -100], [-100, 11, 12, 13]]
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict({"input_ids": ids, "labels": labels}))
    text, places = thought_places(trainer)
    rows = {tuple(text.input_ids[row][text.attention_mask[row]].tolist()): at for row, at in enumerate(places)}
    assert rows == {tuple(ids[0]): [1, 2], tuple(ids[1]): [0, 1, 2]}


def test_a_thought_mask(tmp_path):
    """A `thought_mask` beside `input_ids` says where a thought may follow; the text is predicted as without it."""
    ids, mask = [[5, 6, 7, 8, 9], [10, 11, 12]], [[0, 1, 0, 1, 1], [1, 0, 0]]
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict({"input_ids": ids, "thought_mask": mask}))
    text, places = thought_places(trainer)
    rows = {
        int(text.attention_mask[row].sum()): (at, int(text.predicted()[row].sum())) for row, at in enumerate(places)
    }
    assert rows == {5: ([1, 3], 4), 3: ([0], 2)}
    trainer.train()
    assert finite(logged(trainer)[-1]["loss"])


def test_a_stream(tmp_path):
    """A streaming dataset trains as the same data in memory does."""
    stream = text_data(12).to_iterable_dataset()
    held_out = text_data(4, 300)
    ours = tiny_trainer(tmp_path, data=stream, evaluation=held_out.to_iterable_dataset(), max_length=64, max_steps=2)
    oracle = tiny_trainer(tmp_path, evaluation=held_out)
    before = ours.evaluate(), oracle.evaluate()
    for name in EVAL_METRICS:
        assert before[0][f"eval_{name}"] == before[1][f"eval_{name}"], name
    ours.train()
    assert len(logged(ours)) == 2 and finite(ours.evaluate()["eval_reward"])


def test_packed_texts(tmp_path):
    """Packing puts several texts in a row, and no thought is written at the end of one."""
    trainer = tiny_trainer(tmp_path, packing=True, max_length=40, max_steps=2)
    text, places = thought_places(trainer)
    assert int(text.document_ids.max()) > 1
    eos = byte_tokenizer().eos_token_id
    for row, at in enumerate(places):
        assert at and not any(text.input_ids[row, t] == eos for t in at)
        assert not any(text.document_ids[row, t] != text.document_ids[row, t + 1] for t in at)
    trainer.train()
    assert finite(logged(trainer)[-1]["loss"])


def test_long_texts_are_cut(tmp_path):
    """`max_length` bounds a text, from either end."""
    long = Dataset.from_dict({"text": [" ".join(sums()[:20])]})
    trainer = tiny_trainer(tmp_path, data=long, max_length=17)
    assert len(trainer.train_dataset[0]["input_ids"]) == 17
    ending = tiny_trainer(tmp_path, data=long, max_length=17, truncation_mode="keep_end")
    assert ending.train_dataset[0]["input_ids"][-1] == byte_tokenizer().eos_token_id


def test_a_left_padding_tokenizer(tmp_path):
    """The tokenizer's padding side changes nothing in training."""
    left, right = (tiny_trainer(tmp_path, tokenizer=byte_tokenizer(padding_side=side)) for side in ("left", "right"))
    left.train(), right.train()
    assert_same_logs(left, right)


def test_a_tokenizer_with_a_pad_token(tmp_path):
    """A pad token of its own, or none: padding is masked, so the run is the same."""
    with_pad, without = tiny_trainer(tmp_path, tokenizer=byte_tokenizer(pad_token="<eos>")), tiny_trainer(tmp_path)
    with_pad.train(), without.train()
    assert_same_logs(with_pad, without)
