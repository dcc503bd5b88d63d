"""Bad rows: each in its line of docs/bad_input.md, refused by name, value and fix, or treated as said there."""

import copy
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset, IterableDataset, List, Value
from datasets import Features as DataFeatures
from transformers import AutoTokenizer

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.data.prepare import prepare_texts

from .tiny import byte_tokenizer, sums
from .training import logged, plain_model, tiny_args, tiny_trainer


DOCS = Path(__file__).parent.parent / "docs" / "bad_input.md"
GOOD = [{"text": text} for text in sums()[:3]]
NAN = float("nan")


def stream(rows: list[dict]) -> IterableDataset:
    """The rows as a stream."""
    return IterableDataset.from_generator(lambda: iter(rows))


def ids(**columns) -> dict:
    """A row of token ids with other columns."""
    return {"input_ids": [5, 6, 7], **columns}


# a good row of the same kind, the bad one, and what the message says beside its number
BAD_ROWS = {
    "a number for text": (GOOD[0], {"text": 5}, "5 (`int`) in 'text'; give a string"),
    "bytes for text": (GOOD[0], {"text": b"a b"}, "(`bytes`) in 'text'; give a string"),
    "None for text": (GOOD[0], {"text": None}, "nothing in 'text'; give it a value, or leave the row out"),
    "NaN for text": (GOOD[0], {"text": NAN}, "nan (`float`) in 'text'"),
    "no text": (GOOD[0], {"label": 1}, "nothing in 'text'"),
    "a lone surrogate": (
        GOOD[0],
        {"text": "a \ud800"},
        "half of a surrogate pair in 'text'; give text that is Unicode",
    ),
    "NaN ids": (ids(), {"input_ids": [5, NAN]}, "nan (`float`) in 'input_ids'; whole numbers from 0 to 299"),
    "float ids": (ids(), {"input_ids": [5.0, 6.0]}, "5.0 (`float`) in 'input_ids'"),
    "negative ids": (ids(), {"input_ids": [5, -1]}, "-1 (`int`) in 'input_ids'; whole numbers from 0 to 299"),
    "ids beyond the vocabulary": (
        ids(),
        {"input_ids": [5, 300]},
        "300 (`int`) in 'input_ids'; whole numbers from 0 to 299",
    ),
    "None for ids": (ids(), {"input_ids": None}, "nothing in 'input_ids'"),
    "a number for ids": (ids(), {"input_ids": 5}, "5 (`int`) in 'input_ids'; give a list of whole numbers"),
    "too few labels": (
        ids(labels=[5, 6, 7]),
        ids(labels=[5, 6]),
        "2 `labels` and 3 `input_ids`; give one for each token",
    ),
    "labels beyond the vocabulary": (
        ids(labels=[5, 6, 7]),
        ids(labels=[5, 6, 300]),
        "300 (`int`) in 'labels'; whole numbers",
    ),
    "negative labels": (ids(labels=[5, 6, -100]), ids(labels=[5, 6, -1]), "-1 (`int`) in 'labels'"),
    "too long a thought mask": (
        ids(thought_mask=[1, 1, 1]),
        ids(thought_mask=[1] * 4),
        "4 `thought_mask` and 3 `input_ids`",
    ),
    "a thought mask of twos": (ids(thought_mask=[1, 1, 1]), ids(thought_mask=[2] * 3), "2 (`int`) in 'thought_mask'"),
    "no thought mask": (ids(thought_mask=[1, 1, 1]), ids(), "nothing in 'thought_mask'"),
    "lengths that do not add up": (
        ids(seq_lengths=[1, 2]),
        ids(seq_lengths=[1, 1]),
        "add up to 2, and 3 `input_ids`; make",
    ),
    "a length of zero": (ids(seq_lengths=[1, 2]), ids(seq_lengths=[0, 3]), "0 (`int`) in 'seq_lengths'"),
    "padded rows": (
        ids(attention_mask=[1, 1, 1]),
        ids(attention_mask=[1, 1, 0]),
        "zeros in 'attention_mask'; leave out",
    ),
    "a prompt without completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "nothing in 'completion'"),
    "None for a completion": (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        "in 'completion'",
    ),
    "no messages": ({"messages": [{"role": "user", "content": "a"}]}, {"messages": []}, "give a list of at least one"),
    "a message without content": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
        "None (`NoneType`) in 'messages content'",
    ),
    "a message that is text": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": ["a"]},
        "'role' and 'content'",
    ),
    "labels of their own": (
        ids(labels=[5, 6, 7]),
        ids(labels=[5, 9, -100]),
        "the label 9 beside the id 6, at token 1; labels only say which of `input_ids` are predicted",
    ),
    "shifted labels": (ids(labels=[5, 6, 7]), ids(labels=[6, 7, -100]), "the label 6 beside the id 5, at token 0"),
    "labels that a mask leaves out": (
        ids(labels=[5, -100, 7], completion_mask=[0, 0, 1]),
        ids(labels=[5, 6, 7], completion_mask=[0, 0, 1]),
        "a label at token 1, which 'completion_mask' leaves out; give -100 there",
    ),
    "labels that the first row has not": (ids(), ids(labels=[-100, 6, 7]), "'labels', which the first row has not"),
    "a picture that the first row has not": (
        {"text": "a b"},
        {"text": "a b", "image": "a.png"},
        "'image', which the first row has not; give it to each row, or to none",
    ),
    "tools that the first row has not": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": "[]"},
        "'tools', which the first row has not",
    ),
    "ids that are switches": (ids(), {"input_ids": [True, False]}, "True (`bool`) in 'input_ids'; whole numbers"),
    "positions of packed texts": (
        ids(position_ids=[0, 1, 2]),
        ids(position_ids=[0, 1, 0]),
        "'position_ids' that do not count its tokens from 0; leave them out, and give `seq_lengths`",
    ),
    "messages in JSON": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": '[{"role": "user", "content": "a"}]'},
        "(`str`) in 'messages'; give a list of at least one message, read from JSON with `json.loads`",
    ),
    "conversations in JSON": (
        {"conversations": [{"from": "user", "value": "a"}]},
        {"conversations": "[]"},
        "'[]' (`str`) in 'conversations'; give a list of at least one message, read from JSON",
    ),
    "a string where the others have messages": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        "'a' (`str`) in 'prompt'; give a list of at least one message",
    ),
    "messages where the others have a string": (
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        "(`list`) in 'prompt'; give a string",
    ),
    "a string after messages": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        "'b' (`str`) in 'completion'; give a list of at least one message",
    ),
    "a template's options that are preparation's": (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tokenize": False}},
        "{'tokenize': False} (`dict`) in 'chat_template_kwargs'; give a dictionary of what the template reads, without",
    ),
    "a template's options in JSON": (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {}},
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": "{}"},
        "'{}' (`str`) in 'chat_template_kwargs'; give a dictionary",
    ),
    "a picture in a message": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]},
        "{'type': 'image'} (`dict`) in 'messages content'; give parts such as",
    ),
    "parts that the template does not read": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "parts of a message that the chat template writes as [{'type': 'text', 'text': 'a'}] (`list`); give the content",
    ),
    "a lone surrogate in a part": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]},
        "half of a surrogate pair in 'messages content'",
    ),
    "a call that the template leaves out": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]},
        "a tool call without content, which the chat template leaves out; take a template that writes calls",
    ),
}


def prepared(data, folder: Path, **options) -> list[dict]:
    """Rows as the trainer has them, without a model."""
    args = tiny_args(folder, **{"max_length": 60, **options})
    return list(prepare_texts(data, byte_tokenizer(), args, "train", 300))


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_in_a_stream(name, tmp_path):
    """Refused when it comes by its number, with column, value and fix; the good ones before it pass."""
    good, bad, words = BAD_ROWS[name]
    assert len(prepared(stream([good, good]), tmp_path)) == 2
    with pytest.raises(ValueError, match="^Row 2 of the train dataset has ") as error:
        prepared(stream([good, good, bad, good]), tmp_path)
    assert words in str(error.value)


def test_a_bad_row_in_the_middle_of_training(tmp_path):
    """The rows before it are trained on."""
    good, bad, words = BAD_ROWS["a number for text"]
    trainer = tiny_trainer(
        tmp_path, data=stream([good, good, bad, good]), per_device_train_batch_size=1, max_length=60
    )
    with pytest.raises(ValueError, match="^Row 2 of the train dataset has ") as error:
        trainer.train()
    assert words in str(error.value) and trainer.state.global_step > 0


TYPED = [
    "None for text",
    "float ids",
    "negative ids",
    "too few labels",
    "lengths that do not add up",
    "no messages",
    "labels of their own",
]


@pytest.mark.parametrize("name", TYPED)
def test_a_bad_row_in_a_dataset(name, tmp_path):
    """Refused before anything is trained, where Arrow lets the row in at all."""
    good, bad, words = BAD_ROWS[name]
    rows = [good, bad] if name != "float ids" else [bad]
    with pytest.raises(ValueError, match=rf"^Row {len(rows) - 1} of the train dataset has ") as error:
        prepared(Dataset.from_list(rows), tmp_path)
    assert words in str(error.value)


def test_a_bad_evaluation_row_names_its_dataset(tmp_path):
    """Of several evaluation datasets, the message names the one."""
    bad = Dataset.from_list([ids(), {"input_ids": [900]}])
    with pytest.raises(ValueError, match="Row 1 of the hard dataset has 900"):
        tiny_trainer(tmp_path, evaluation={"easy": Dataset.from_list(GOOD), "hard": bad})
    with pytest.raises(ValueError, match="The hard dataset is empty"):
        tiny_trainer(tmp_path, evaluation={"easy": Dataset.from_list(GOOD), "hard": Dataset.from_dict({"text": []})})


@pytest.mark.parametrize("packing", [False, True])
def test_empty_texts_are_counted_and_left_out(packing, tmp_path, monkeypatch):
    """Empty texts, texts of one token, and characters that tokenize to nothing: dropped with a warning that counts them."""
    said = []
    monkeypatch.setattr(
        logging.getLogger("trl_quietstar.data.prepare"), "warning", lambda words, *_: said.append(words)
    )
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    data = Dataset.from_dict({"text": ["", "3", sums()[0], ""]})
    trainer = tiny_trainer(tmp_path, data=data, tokenizer=tokenizer, packing=packing, max_length=60, max_steps=1)
    assert len(trainer.train_dataset) == 1 and said[0].startswith("3 of 4 rows of the train dataset are left out")
    trainer.train()
    assert len(logged(trainer)) == 1


def test_odd_characters_train(tmp_path):
    """NUL bytes, direction marks and emoji are text like any other."""
    data = Dataset.from_dict({"text": ["a\x00b\x00", "\u202eabc\u2028", "🙂" * 5]})
    trainer = tiny_trainer(tmp_path, data=data, max_steps=1)
    trainer.train()
    assert len(trainer.train_dataset) == 3 and len(logged(trainer)) == 1


def test_a_hundred_thousand_tokens(tmp_path):
    """Cut to `max_length`; without one, refused by the model's positions before any step."""
    data = Dataset.from_dict({"text": ["3 plus 4 is 7 . " * 20_000]})
    assert len(tiny_trainer(tmp_path, data=data, max_length=60).train_dataset[0]["input_ids"]) == 60
    with pytest.raises(ValueError, match=r"A text of \d{5,} tokens .* set `max_length` to 124"):
        tiny_trainer(tmp_path, data=data, max_length=None)


@pytest.mark.parametrize(
    "row, options, words",
    [
        ({"text": "a b", "prompt": "a", "completion": "b"}, {}, "several kinds of data, under 'prompt', 'text'"),
        ({"text": "a b", "messages": []}, {}, "several kinds of data, under 'messages', 'text'"),
        ({"prompt": "a b"}, dict(dataset_text_field="prompt"), "`dataset_text_field` is 'prompt'"),
        (ids(seq_lengths=[3]), dict(packing=True), "packed already; set `packing=False`"),
        ({"text": "a b"}, dict(completion_only_loss=True), "`completion_only_loss=True` needs 'prompt'"),
        ({"text": "a b"}, dict(assistant_only_loss=True), "`assistant_only_loss=True` needs messages"),
        ({"text": "a b", "image": "a.png"}, {}, "has the column 'image', and only text is trained on; remove it with"),
        ({"prompt": "a", "completion": "b", "images": ["a.png"]}, {}, "has the column 'images'"),
        (ids(pixel_values=[[0.5]]), {}, "has the column 'pixel_values'"),
    ],
    ids=str,
)
def test_data_that_contradict_themselves_or_an_option(row, options, words, tmp_path):
    """Neither the one nor the other is chosen in silence."""
    with pytest.raises(ValueError, match=re.escape(words)):
        tiny_trainer(tmp_path, data=stream([row, row]), **options)


def test_token_ids_may_stand_beside_their_text(tmp_path):
    """The ids are what is trained on; so may a class label stand beside a text."""
    data = Dataset.from_dict({"text": ["unused"], "input_ids": [[5, 6, 7]], "label": [1]})
    assert tiny_trainer(tmp_path, data=data).train_dataset[0]["input_ids"] == [5, 6, 7]
    data = Dataset.from_dict({"text": ["3 plus 4"], "labels": [1], "prompt": ["x"]})
    row = tiny_trainer(tmp_path, data=data).train_dataset[0]
    assert row["labels"] == row["input_ids"]


def test_packed_rows_are_cut_with_their_lengths(tmp_path):
    """`seq_lengths` of a dataset that is packed already follow `max_length`, at either end; and so does a `thought_mask`."""
    mask = [1, 0, 1, 1, 0, 1, 1, 1, 0, 0]
    data = Dataset.from_dict({"input_ids": [list(range(1, 11))], "seq_lengths": [[4, 6]], "thought_mask": [mask]})
    for mode, lengths, kept in (("keep_start", [4, 2], mask[:6]), ("keep_end", [6], mask[4:])):
        trainer = tiny_trainer(tmp_path, data=data, max_length=6, truncation_mode=mode, max_steps=1)
        row = trainer.train_dataset[0]
        assert row["seq_lengths"] == lengths and row["thought_mask"] == kept
        trainer.train()


def test_tensors_are_read_as_lists(tmp_path):
    """A dataset that gives PyTorch tensors trains as one of lists does."""
    features = DataFeatures({"input_ids": List(Value("int64"))})
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]]}, features=features).with_format("torch")
    assert tiny_trainer(tmp_path, data=data).train_dataset[0]["input_ids"] == [5, 6, 7]


def test_ids_of_a_stream_may_be_arrays(tmp_path):
    """Or tensors, or tuples, as a `Dataset` takes them; what they hold is checked as that of lists is."""
    for make in (np.array, torch.tensor, tuple):
        row = {"input_ids": make([5, 6, 7]), "thought_mask": make([1, 0, 1])}
        (found,) = prepared(stream([row]), tmp_path)
        assert found == {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "thought_mask": [1, 0, 1]}
        for wrong, words in (([5.0], "5.0 (`float`) in 'input_ids'"), ([[5, 6]], "[5, 6] (`list`) in")):
            bad = stream([{"input_ids": [5, 6]}, {"input_ids": make(wrong)}])
            with pytest.raises(ValueError, match=re.escape(f"Row 1 of the train dataset has {words}")):
                prepared(bad, tmp_path)


def test_a_chat_template_that_refuses(tmp_path):
    """Its own words are kept, with the number of the row; a missing template is said at once."""
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages }}"
    data = Dataset.from_list([{"messages": [{"role": role, "content": "a"}]} for role in ("user", "assistant")])
    with pytest.raises(
        ValueError, match="Row 1 of the train dataset has 'messages' that the chat template .*user first"
    ):
        tiny_trainer(tmp_path, data=data, tokenizer=byte_tokenizer(chat_template=template))
    with pytest.raises(ValueError, match="no chat template"):
        tiny_trainer(tmp_path, data=data, tokenizer=byte_tokenizer(chat_template=None))


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3"])
def test_a_chat_template_that_trl_marks(family, tmp_path):
    """`assistant_only_loss` takes what `SFTTrainer` takes: the turns are those of TRL's template, and the saved one stays."""
    template = (Path(trl.__file__).parent / f"chat_templates/{family}.jinja").read_text()
    tokenizer = byte_tokenizer(chat_template=template, bos_token="<eos>", model_max_length=320)
    says = [("user", "3 plus 4 is"), ("assistant", "7 ."), ("user", "2 plus 2 is"), ("assistant", "4 .")]
    data = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in says]}])
    options = dict(assistant_only_loss=True, thought_positions="prompt_end")
    model = plain_model(max_position_embeddings=320)
    trainer = tiny_trainer(tmp_path, model=model, data=data, tokenizer=tokenizer, max_length=300, **options)
    row = trainer.train_dataset[0]
    own = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert "7 ." in own and "4 ." in own and "plus" not in own and "plus" in tokenizer.decode(row["input_ids"])
    assert trainer.processing_class.chat_template == template


def test_a_tokenizer_of_another_model(tmp_path):
    """Ids that the model has not are refused before a table is asked for them."""
    with pytest.raises(ValueError, match="take the model's own tokenizer"):
        tiny_trainer(tmp_path, model=plain_model_of(40), data=Dataset.from_list(GOOD))


@pytest.mark.parametrize("vocabulary", [601, 600])
def test_a_tokenizer_with_half_of_the_models_tokens(tmp_path, caplog, vocabulary):
    """Below, it is likely another model's, whose every id the model has; above, the table may be filled up to a round size."""
    tiny_trainer(tmp_path, model=plain_model_of(vocabulary), data=Dataset.from_list(GOOD))
    assert ("The tokenizer has 300 tokens and the model's vocabulary 601" in caplog.text) == (vocabulary > 600)


def test_a_pad_token_that_the_model_has_not(tmp_path):
    """Often added to a tokenizer alone: EOS pads in its place, and what is saved loads and generates for a batch."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 300
    trainer = tiny_trainer(tmp_path, tokenizer=tokenizer, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side="left")
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.pad_token_id == saved.eos_token_id == model.config.pad_token_id
    inputs = saved(["3", "3 plus 4 is"], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=1).shape[0] == 2


def plain_model_of(vocabulary: int):
    """A model with so many embeddings."""
    model = plain_model()
    model.resize_token_embeddings(vocabulary)
    return model


def test_a_stream_needs_an_end(tmp_path):
    """It has no length, so `max_steps` says when to stop; too short for a single step, it is not read for ever."""
    with pytest.raises(ValueError, match="A stream has no length, and `max_steps` is -1"):
        tiny_trainer(tmp_path, data=stream(GOOD), max_steps=-1, max_length=60)
    short = tiny_trainer(tmp_path, data=stream(GOOD[:1]), gradient_accumulation_steps=2, max_length=60)
    with pytest.raises(ValueError, match=r"too few rows for an optimizer step of `gradient_accumulation_steps` \(2\)"):
        short.train()


def test_a_stream_without_a_usable_row(tmp_path):
    """One that goes on for ever is given up after so many rows, whether the rows or `max_length` leave nothing."""
    for rows in ({"text": ""}, {"prompt": "a " * 40, "completion": "b"}, ids(thought_mask=[0, 0, 0])):
        data = IterableDataset.from_generator(endless, gen_kwargs={"row": rows})
        with pytest.raises(ValueError, match="5,000 rows of the train .* look at what the stream|No text of the"):
            prepared(data, tmp_path, max_length=30)


def test_the_rest_of_a_stream_may_be_unusable(tmp_path):
    """After rows that can be trained on, too: reading on ends with an error, and not never."""
    data = IterableDataset.from_generator(endless, gen_kwargs={"row": {"text": ""}, "first": GOOD})
    with pytest.raises(ValueError, match="5,000 rows of the train dataset, one after the other, are left out"):
        prepared(data, tmp_path)


def endless(row: dict, first: list[dict] = ()):
    """Some rows, then the same one without end."""
    yield from first
    while True:
        yield dict(row)


def test_the_words_for_too_long_a_text_are_the_users(tmp_path):
    """A stream's default `max_length`, and the longest thought of a curriculum, are called what they are."""
    with pytest.raises(
        ValueError, match=r"may have `max_length` \(256, its default\) tokens, .*lower `max_length` to 124"
    ):
        tiny_trainer(tmp_path, data=stream(GOOD))
    with pytest.raises(ValueError, match=r"may have `max_length` \(126\) tokens, and with `thought_length` 3 "):
        tiny_trainer(tmp_path, data=stream(GOOD), max_length=126)
    options = dict(curriculum={"1": {"thought_length": 125}}, max_length=None)
    with pytest.raises(
        ValueError, match=r"with the `thought_length` 125 of a stage of `curriculum` .* set `max_length` to 2"
    ):
        tiny_trainer(tmp_path, data=Dataset.from_list(GOOD), **options)


def test_messages_without_content_are_read_as_trl_reads_them(tmp_path):
    """A call without content, with the key or without it, and parts of text reach a template that writes them."""
    template = (
        "{% for m in messages %}{{ m.role }}: {% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": "add"}}]
    spoken = {"role": "user", "content": [{"type": "text", "text": "3 plus 4"}]}
    tokenizer = byte_tokenizer(chat_template=template)
    for last in (
        {"role": "assistant", "tool_calls": calls},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ):
        args = tiny_args(tmp_path, max_length=60)
        (row,) = prepare_texts(stream([{"messages": [spoken, last]}]), tokenizer, args, "train", 300)
        assert tokenizer.decode(row["input_ids"]) == "user: 3 plus 4assistant: add"


def test_rows_in_memory_are_left_as_they_are(tmp_path):
    """A stream over a list gives the same objects again and again: they are neither renamed nor lengthened."""
    rows = [{"conversations": [{"from": "user", "value": "a"}]}, {"prompt": "a", "completion": "b"}, {"text": "a b"}]
    for row in rows:
        before = copy.deepcopy(row)
        once, twice = (prepared(stream([row]), tmp_path) for _ in range(2))
        assert row == before and [x["input_ids"] for x in once] == [x["input_ids"] for x in twice]


def test_a_full_batch_of_too_few_rows(tmp_path):
    """`dataloader_drop_last` would drop everything, and an evaluation of nothing would pass for one of zeros."""
    for data in (dict(data=Dataset.from_list(GOOD)), dict(evaluation=Dataset.from_list(GOOD))):
        with pytest.raises(ValueError, match="drops all 3 rows"):
            tiny_trainer(tmp_path, **data, dataloader_drop_last=True)
