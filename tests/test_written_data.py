"""Written thoughts in data: taken out of texts or given beside them, at their places, with the ending that sampling knows."""

import logging
import pickle
import re
from importlib.resources import files

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from trl_quietstar.data.batches import TextCollator
from trl_quietstar.data.prepare import prepare_texts
from trl_quietstar.data.written import TakeOut, without_thoughts
from trl_quietstar.thinking.drawing import thought_end

from .tiny import byte_tokenizer, sums
from .tokenizers import KINDS
from .training import tiny_args, tiny_trainer


BRACKETS = dict(thought_pattern=r"\[(.*?)\]", thought_stop_string="]")
# in the style of GSM8K
PROBLEM = {
    "prompt": "A crate holds 6 rows of 8 jars. 5 jars break, and the rest is shared by 4 shops. How many has each?\n",
    "completion": (
        "There are 6*8 = <<6*8=48>>48 jars.\nOf these 48-5 = <<48-5=43>>43 are whole, and one more is bought, which makes "
        "<<43+1=44>>44.\nEach shop has 44/4 = <<44/4=11>>11 jars.\n#### 11"
    ),
}
COLUMN = {"prompt": "3 plus 4 is", "completion": " 7"}
TALK = [{"role": "user", "content": "3 plus 4 is"}, {"role": "assistant", "content": "7 ."}]
TEMPLATES = sorted(
    str(path.name) for path in files("trl").joinpath("chat_templates").iterdir() if path.suffix == ".jinja"
)


def prepare(rows, folder, tokenizer=None, name="train", **options):
    """What becomes of rows ahead of training, with thoughts of up to 40 tokens that may end early."""
    options = {"thought_length": 40, "min_thought_length": 1, "max_length": None, **options}
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = tiny_args(folder, **options)
    return prepare_texts(data, tokenizer, args, name, len(tokenizer), args.packing)


def stream(rows: list[dict]) -> IterableDataset:
    """The rows as a stream."""
    return IterableDataset.from_generator(lambda: iter(rows))


def read(row: dict, tokenizer=None) -> list[tuple[str, str, str]]:
    """For each written thought of a row: the text before it, the thought, and the text after it."""
    decode = (tokenizer or byte_tokenizer()).decode
    ids = row["input_ids"]
    return [
        (decode(ids[: at + 1]), decode(thought), decode(ids[at + 1 :]))
        for at, thought in zip(row["written_at"], row["written_ids"], strict=True)
    ]


# Where thoughts come from, and where they stand


def test_equations_are_taken_out_of_a_solution(tmp_path):
    """GSM8K's: each at its place, ended by the EOS token, and the text reads as if it had not been there."""
    (row,) = prepare([PROBLEM], tmp_path, thought_pattern="<<(.*?)>>")
    clean = re.sub("<<.*?>>", "", PROBLEM["completion"])
    assert byte_tokenizer().decode(row["input_ids"]) == PROBLEM["prompt"] + clean + "<eos>"
    found = read(row)
    assert [thought for _, thought, _ in found] == ["6*8=48<eos>", "48-5=43<eos>", "43+1=44<eos>", "44/4=11<eos>"]
    edges = [before.split()[-1] + "|" + after.split()[0] for before, _, after in found]
    assert edges == ["=|48", "=|43", "makes|44.", "=|11"]
    assert all(row["labels"][at + 1] != -100 for at in row["written_at"])


def test_texts_and_whole_matches(tmp_path):
    """Without a group the whole match is the thought, which has its ending already; text has thoughts anywhere."""
    options = dict(thought_pattern=r"\[.*?\]", thought_stop_string="]")
    (row,) = prepare([{"text": "3 plus 4[so\nfar 7] plus 2 is[7+2=9] 9 ."}], tmp_path, **options)
    assert read(row) == [
        ("3 plus 4", "[so\nfar 7]", " plus 2 is 9 .<eos>"),
        ("3 plus 4 plus 2 is", "[7+2=9]", " 9 .<eos>"),
    ]


def test_what_a_pattern_takes_out():
    """The first group is the thought; a match without one is taken out all the same; neighbours share a place."""
    assert without_thoughts("a<b>c<>d<e><f>", "<(.*?)>") == ("acd", [(1, "b"), (3, "e"), (3, "f")])
    assert without_thoughts("<a>b", "<.*?>") == ("b", [(0, "<a>")])
    assert without_thoughts("aXb-YcZ", "X(.*?)-|Y(?:.*?)Z") == ("a", [(1, "b")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_thoughts_stands_before_the_completion(kind, tmp_path):
    """After the prompt's last token, whatever the tokenizer; a row has one, several, or none."""
    tokenizer = KINDS[kind](tmp_path)
    prompt, completion = "3 plus 4 plus 2 is", " 9 ."
    rows = [
        {"prompt": prompt, "completion": completion, "thought": thought}
        for thought in (["7 plus 2 is 9 E", " 3 plus 6 is 9"], None, [])
    ]
    found = prepare(rows, tmp_path, tokenizer, thought_stop_string="E")
    assert found["written_at"][1:] == [[], []] and found["written_ids"][1:] == [[], []]
    row = found[0]
    assert row["written_at"] == [len(tokenizer(prompt)["input_ids"]) - 1] * 2
    assert row["labels"][row["written_at"][0] :][:2] == [-100, row["input_ids"][row["written_at"][0] + 1]]
    thoughts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows[0]["thought"]]
    assert row["written_ids"][0] == thoughts[0]  # which ends with the string
    assert row["written_ids"][1] == tokenizer(" 3 plus 6 is 9E", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_thoughts_reassemble(kind, tmp_path_factory):
    """Thoughts anywhere between words: put back at their places, all reads as before, but for spaces at their edges."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = KINDS[kind](folder)
    word = st.sampled_from("plus is 7 12 . 104".split())
    thought = st.lists(word, min_size=1, max_size=4).map(lambda words: f"X{' '.join(words)}Z")
    place = st.sampled_from(["{} ", " {}", "{}", " {} "])
    piece = st.one_of(word.map(" {}".format), st.tuples(place, thought).map(lambda x: x[0].format(x[1])))

    options = dict(thought_pattern="X(.*?)Z", thought_stop_string="Z")

    @settings(max_examples=8)
    @given(st.lists(st.lists(piece, max_size=12).map("".join), min_size=5, max_size=12))
    def check(tails):
        texts = [f"2 plus 2{tail} 9" for tail in tails]
        for text, row in zip(
            texts, prepare([{"text": text} for text in texts], folder, tokenizer, **options), strict=True
        ):
            parts, end = [], 0
            for at, ids in zip(row.get("written_at", ()), row.get("written_ids", ()), strict=True):
                parts += [tokenizer.decode(row["input_ids"][end : at + 1]), "X", tokenizer.decode(ids)]
                end = at + 1
            again = "".join([*parts, tokenizer.decode(row["input_ids"][end:])])
            assert re.sub("<eos>|<bos>|</?s>| ", "", again) == text.replace(" ", "")

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_end_where_sampling_would_end_them(kind, tmp_path):
    """At their last token, and at none before."""
    tokenizer = KINDS[kind](tmp_path)
    text = "3 plus 4" + "".join(f"X{problem} EndZ is" for problem in sums()[20:60:7]) + " 7 ."
    for stop in ("ndZ", None) if tokenizer.eos_token else ("ndZ",):
        ends = thought_end(tokenizer, stop)
        (row,) = prepare([{"text": text}], tmp_path, tokenizer, thought_pattern="X(.*?)Z", thought_stop_string=stop)
        assert len(row["written_ids"]) == 6
        for ids in row["written_ids"]:
            ended = [bool(ends(torch.tensor([ids[: length + 1]]))) for length in range(len(ids))]
            assert ended == [False] * (len(ids) - 1) + [True]


def test_a_place_within_a_token_moves_before_it(tmp_path):
    """The row keeps the tokens that it has without a thought."""
    (row,) = prepare([{"text": "3 pl[no]us 4"}], tmp_path, **BRACKETS)
    (plain,) = prepare([{"text": "3 plus 4"}], tmp_path)
    assert row["input_ids"] == plain["input_ids"]
    assert read(row) == [("3", "no]", " plus 4<eos>")]


# Conversations


def test_thoughts_of_assistants_turns(tmp_path):
    """A pattern finds them in each turn of the assistant's, and leaves others alone; a place at a turn's start is the
    prompt's end, as in generation."""
    tokenizer = byte_tokenizer()
    messages = [
        {"role": "user", "content": "2 [two] plus"},
        {"role": "assistant", "content": "[first]3 is [then]5"},
        {"role": "user", "content": "and 4"},
        {"role": "assistant", "content": "[last] 9"},
    ]
    (row,) = prepare([{"messages": messages}], tmp_path, **BRACKETS)
    clean = [{**m, "content": re.sub(r"\[(first|then|last)\]", "", m["content"])} for m in messages]
    assert row["input_ids"] == tokenizer.apply_chat_template(clean, return_dict=True)["input_ids"]
    prompts = [tokenizer.apply_chat_template(clean[:n], add_generation_prompt=True, tokenize=False) for n in (1, 3)]
    found = read(row)
    assert [thought for _, thought, _ in found] == ["first]", "then]", "last]"]
    # in the turn's middle a space is a part of the next token, and so it is of the first turn's first
    assert [before for before, _, _ in found] == [prompts[0].rstrip(), prompts[0] + "3 is", prompts[1]]
    talk = [{"from": m["role"], "value": m["content"]} for m in messages]
    (other,) = prepare([{"conversations": talk}], tmp_path, **BRACKETS)
    assert all(other[name] == row[name] for name in ("input_ids", "labels", "written_ids", "written_at"))
    (halved,) = prepare([{"prompt": messages[:2], "completion": messages[2:]}], tmp_path, **BRACKETS)
    assert [thought for _, thought, _ in read(halved)] == ["last]"]
    assert "[first]" in tokenizer.decode(halved["input_ids"])


def test_a_column_beside_messages(tmp_path):
    """It belongs before the assistant's last turn, in prompts and completions as in conversations."""
    prompt = byte_tokenizer().apply_chat_template(TALK[:1], add_generation_prompt=True, tokenize=False)
    rows = [
        {"messages": [*TALK, TALK[0]], "thought": "easy"},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in TALK], "thought": "easy"},
        {"prompt": TALK[:1], "completion": TALK[1:], "thought": "easy"},
    ]
    for row in rows:
        for data in ([row], stream([row])):
            (found,) = prepare(data, tmp_path)
            assert [x[:2] for x in read(found)] == [(prompt.rstrip(), "easy<eos>")]  # " 7" is a token
    (found,) = prepare([{"messages": TALK[1:], "thought": "easy"}], tmp_path)
    assert read(found) == [("assistant:", "easy<eos>", " 7 .<eos>")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_of_open_models(template, tmp_path):
    """A column of thoughts, and one within the content: each stands before a label, and the content follows it."""
    text = files("trl").joinpath("chat_templates", template).read_text()
    tokenizer = byte_tokenizer(chat_template=text)
    marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", text))
    talk = [TALK[0], {"role": "assistant", "content": "[at once]7 or [well] 8 ."}]
    try:
        rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception as error:
        pytest.skip(f"the template does not take this conversation: {error}")
    if "or [well]" not in rendered:
        pytest.skip("the template reads lists of parts alone")
    (row,) = prepare([{"messages": talk}], tmp_path, tokenizer, assistant_only_loss=marks, **BRACKETS)
    first, second = read(row, tokenizer)
    assert first[1] == "at once]" and "7 or" in first[2] and "7 or" not in first[0]
    assert second[1] == "well]" and "7 or" in second[0] and second[2].lstrip().startswith("8 .")
    (halves,) = prepare([{"prompt": talk[:1], "completion": TALK[1:], "thought": "at once"}], tmp_path, tokenizer)
    (at,) = halves["written_at"]
    assert halves["labels"][at] == -100 != halves["labels"][at + 1]


# Cuts, streams, batches


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [2, 7, 20, 33, 100])
def test_cut_texts_keep_the_thoughts_that_stand_in_them(mode, max_length, tmp_path, caplog):
    """At shifted places if the beginning is cut; each with the token before it and the one after it."""
    text = "0 plus 1" + "".join(f"[thought {n}] plus {n}" for n in range(2, 9))
    (whole,) = prepare([{"text": text}], tmp_path, **BRACKETS)
    length = len(whole["input_ids"])
    first, end = (max(length - max_length, 0), length) if mode == "keep_end" else (0, min(length, max_length))
    (row,) = prepare([{"text": text}], tmp_path, max_length=max_length, truncation_mode=mode, **BRACKETS)
    assert row["input_ids"] == whole["input_ids"][first:end] and row["labels"] == row["input_ids"]
    kept = [k for k, at in enumerate(whole["written_at"]) if first <= at and at + 1 < end]
    assert row.get("written_at", []) == [whole["written_at"][k] - first for k in kept]
    assert row.get("written_ids", []) == [whole["written_ids"][k] for k in kept]


def test_cut_rows_of_prompts(tmp_path):
    """A row whose prompt fills it is left out, as ever, and its thought with it."""
    rows = [{"prompt": " ".join(sums()[:9]), "completion": " 5", "thought": "x"}, PROBLEM | {"thought": "y"}]
    assert len(prepare(rows, tmp_path, max_length=20, truncation_mode="keep_end")) == 2
    assert len(prepare([*rows, {"prompt": "1", "completion": " 2", "thought": "z"}], tmp_path, max_length=20)) == 1


def test_thoughts_where_the_model_will_not_think(tmp_path, caplog):
    """A thought within a completion is no example for a model that only thinks before it; a warning says so, once."""
    rows = [COLUMN | {"completion": " [so]7 [and]."}, COLUMN | {"completion": "[so] 7"}]
    for row, warns in zip(rows, (True, False), strict=True):
        for positions in ("prompt_end", "all"):
            prepare([row], tmp_path, name=f"{positions} {warns}", thought_positions=positions, **BRACKETS)
    found = [record.message for record in caplog.records if "the model will think once, before it" in record.message]
    assert len(found) == 1 and "Some written thoughts of the prompt_end True dataset" in found[0]


def test_streams_and_datasets_agree(tmp_path):
    """Row by row; a stream has the columns whether or not a row has thoughts, and its own rows stay as they were."""
    rows = [PROBLEM, {"prompt": "1 plus 1 is", "completion": " 2"}]
    talk = [{"messages": [TALK[0], {"role": "assistant", "content": "[so]7"}]}]
    for given_rows, options in ((rows, dict(thought_pattern="<<(.*?)>>")), (talk, BRACKETS)):
        copies = [dict(row) for row in given_rows]
        found = list(prepare(stream(given_rows), tmp_path, **options))
        wanted = list(prepare(given_rows, tmp_path, **options))
        own = ("input_ids", "labels", "written_ids", "written_at")
        assert [{k: row[k] for k in own} for row in found] == [{k: row[k] for k in own} for row in wanted]
        assert given_rows == copies
    (row,) = prepare(stream(rows[1:]), tmp_path, thought_pattern="<<(.*?)>>")
    assert row["written_ids"] == row["written_at"] == []


def test_data_without_thoughts_have_no_such_columns(tmp_path, caplog):
    """Nor does anything else of them change; where thoughts were asked for, a warning says that there are none."""
    rows = [{"prompt": text, "completion": " yes"} for text in sums()[:3]]
    plain = prepare(rows, tmp_path)
    for changed, options in ((rows, BRACKETS), ([{**row, "thought": None} for row in rows], {})):
        with caplog.at_level(logging.WARNING):
            found = prepare(changed, tmp_path, **options)
        assert "No row of the train dataset has a written thought." in caplog.text
        caplog.clear()
        assert not {"written_ids", "written_at"} & set(found.column_names)
        assert [found[name] for name in ("input_ids", "labels")] == [plain[name] for name in ("input_ids", "labels")]


def test_thoughts_that_begin_late(tmp_path):
    """The first rows, by which a library tells types, may all be without; with several processes too."""
    rows = [{"text": "3 plus 4"}] * 1100 + [{"text": "3 plus[so] 4"}]
    for workers in (None, 2):
        found = prepare(rows, tmp_path, dataset_num_proc=workers, **BRACKETS)
        assert len(found) == 1101 and found[1100]["written_at"] == [1] and found[0]["written_at"] == []


def test_a_column_of_thoughts_may_be_kept(tmp_path):
    """As it was given, beside what became of it."""
    row = COLUMN | {"thought": ["a", "b"], "score": 1}
    for data in ([row], stream([row])):
        (found,) = prepare(data, tmp_path, remove_unused_columns=False)
        assert {name: found[name] for name in row} == row
        assert set(found) == {*row, "input_ids", "labels", "written_ids", "written_at"}


def test_a_stream_goes_to_other_processes():
    """After its first rows were read, as the workers of a data loader get it where they are spawned."""
    step, row = (
        TakeOut("train", "prompt", "text", False, byte_tokenizer(), None, "]", 1, 9),
        COLUMN | {"thought": "a]"},
    )
    wanted = step(row, 0)
    assert pickle.loads(pickle.dumps(step))(row, 0) == wanted


def test_batches_are_padded(tmp_path):
    """-1 stands where there is no thought, and no token."""
    rows = [{"text": "3 plus[abc][d] 4"}, {"text": "3 plus 4"}, {"text": "3[ab] plus"}]
    found = prepare(rows, tmp_path, **BRACKETS)
    batch = TextCollator(0)(list(found))
    assert batch["written_at"].tolist() == [[1, 1], [-1, -1], [0, -1]]
    ids = batch["written_ids"]
    assert ids.dtype == batch["written_at"].dtype == torch.long and ids.shape[:2] == (3, 2)
    assert [[[t for t in k if t != -1] for k in row] for row in ids.tolist()] == [
        [*found[0]["written_ids"]],
        [[], []],
        [*found[2]["written_ids"], []],
    ]
    empty = TextCollator(0)([found[1]])
    assert empty["written_ids"].tolist() == [[[-1]]] and empty["written_at"].tolist() == [[-1]]
    assert "written_ids" not in TextCollator(0)(list(prepare(rows[1:2], tmp_path)))


@pytest.mark.parametrize("options", [{}, dict(num_iterations=2), dict(remove_unused_columns=False)], ids=str)
def test_the_trainer_keeps_them(options, tmp_path):
    """In batches of training and of evaluation, beside a reward function, which sees the columns as they were given."""
    row = {"prompt": "3 plus 4 is", "completion": " <<3+4=7>>7, and 1 <<7+1=8>>8 ."}
    data = Dataset.from_list([row] * 8)
    seen = []

    def reward(logps_with, completion=None, **_):
        return logps_with.mean(-1)

    def trainer(data):
        return tiny_trainer(
            tmp_path,
            data=data,
            evaluation=Dataset.from_list([row] * 4),
            reward_functions=reward,
            thought_pattern="<<(.*?)>>",
            min_thought_length=1,
            thought_length=20,
            max_length=60,
            **options,
        )

    for given_data in [data] if "num_iterations" in options else [data, data.to_iterable_dataset()]:
        ours = trainer(given_data)
        for loader in (ours.get_train_dataloader(), ours.get_eval_dataloader()):
            batch = next(iter(loader))
            assert batch["written_ids"].shape[:2] == batch["written_at"].shape
            assert (batch["written_at"][:, 0] >= 0).all()
            assert batch["columns"]["completion"] == [row["completion"]] * 4
            assert not {"written_ids", "written_at"} & set(batch["columns"])
            seen.append(batch["written_at"].tolist())
    assert seen == [seen[0]] * len(seen)


# What is refused


BAD_ROWS = {
    "too long": (COLUMN | {"thought": "3 plus " * 30}, {}, "tokens with its ending, above the limit of 40 (`thought"),
    "too short": (
        COLUMN | {"thought": "3"},
        dict(min_thought_length=3),
        "the written thought '3' of 2 tokens with its ending, below `min_thought_length` (3); lower",
    ),
    "EOS within": (
        COLUMN | {"thought": "so<eos> 3"},
        {},
        "'so<eos> 3', which holds the EOS token before its end; a sampl",
    ),
    "EOS twice": (COLUMN | {"thought": "so<eos>"}, {}, "'so<eos>', which holds the EOS token before its end"),
    "a suppressed token": (
        COLUMN | {"thought": "3"},
        dict(thought_suppress_tokens=byte_tokenizer()("3")["input_ids"]),
        f"the written thought '3', which holds the suppressed token {byte_tokenizer()('3')['input_ids'][0]}; leave the thought out",
    ),
    "the string within": (
        COLUMN | {"thought": "a] b"},
        dict(thought_stop_string="]"),
        "'a] b', which holds `thought_stop_string` (']') before its end; a sampled thought would end there",
    ),
    "a number": ({**COLUMN, "thought": 5}, {}, "5 (`int`) in 'thought'; give a string"),
    "a number among alternatives": ({**COLUMN, "thought": [5]}, {}, "5 (`int`) in 'thought'; give a string"),
    "a surrogate": ({**COLUMN, "thought": "\ud800"}, {}, "half of a surrogate pair in 'thought'"),
    "no turn": ({"messages": TALK[:1], "thought": "a"}, {}, "a 'thought' and no turn of the assistant's; leave out"),
    "nothing before it": (
        {"text": "[a] 3 plus 4"},
        BRACKETS,
        "a written thought before its first token; a thought follows a token: put text before it",
    ),
    "no label after it": (
        {"messages": [TALK[0], {"role": "assistant", "content": "7[a]"}]},
        BRACKETS | {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        "whose next token is no label; put a thought before text that is to be predicted",
    ),
    "parts": (
        {"messages": [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "[a] 7"}]}]},
        BRACKETS | {"chat_template": "{% for m in messages %}{{ m.role }}{{ m.content is string }}{% endfor %}"},
        "parts of a message in which `thought_pattern` finds a thought; give the content of that message as a string",
    ),
    "a template that refuses a part": (
        {"messages": TALK, "thought": "a"},
        {"chat_template": "{% if messages | length == 1 %}{{ raise_exception('odd') }}{% endif %}abc"},
        "messages around a thought or a score that the chat template refuses (TemplateError: odd); change the one",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case, tmp_path):
    """By row, value and fix: at once in a dataset, and when it comes in a stream."""
    bad, options, words = BAD_ROWS[case]
    tokenizer = byte_tokenizer(**{k: v for k, v in options.items() if k == "chat_template"})
    options = {k: v for k, v in options.items() if k != "chat_template"}
    good = {name: "3 plus 4" if isinstance(value, str) else value for name, value in bad.items()}
    good |= {"thought": None} if "thought" in bad else {}
    if "messages" in bad:
        good["messages"] = [TALK[0], {"role": "assistant", "content": "7 plus"}, TALK[0]]
    rows = [good, bad]
    with pytest.raises(ValueError, match=rf"Row 1 of the train dataset has .*{re.escape(words)}"):
        list(prepare(stream(rows), tmp_path, tokenizer, **options))
    try:
        data = Dataset.from_list(rows)
    except Exception:  # columns of mixed types are no dataset
        return
    with pytest.raises(ValueError, match=rf"Row 1 of the train dataset has .*{re.escape(words)}"):
        prepare(data, tmp_path, tokenizer, shuffle_dataset=True, **options)


@pytest.mark.parametrize(
    "row, options, words",
    [
        ({"text": "3 plus", "thought": "a"}, {}, "has the column 'thought', and 'text', where such thoughts have no"),
        ({"input_ids": [5, 6], "thought": "a"}, {}, "has the column 'thought', and 'input_ids', where such thoughts"),
        ({"input_ids": [5, 6]}, BRACKETS, "holds token ids, in which `thought_pattern` finds nothing; leave it out"),
        ({"input_ids": [5, 6], "written_at": [0]}, {}, "'written_at', which preparation itself makes"),
        (COLUMN | {"thought": "a"}, BRACKETS, "has the column 'thought', and `thought_pattern` is set; leave out"),
        (COLUMN | {"thought": "a"}, dict(packing=True, max_length=20), "which packing loses; set `packing=False`"),
        (COLUMN | {"thought": "a"}, dict(min_thought_length=None), "set `min_thought_length`, with which the EOS"),
        (COLUMN, dict(thought_pattern="X", min_thought_length=None), "`thought_pattern` gives thoughts that end as"),
    ],
    ids=str,
)
def test_data_that_have_no_place_for_thoughts(row, options, words, tmp_path):
    """Refused by the names of columns and options, before a row is read."""
    for data in ([row], stream([row])):
        with pytest.raises(ValueError, match=re.escape(words)):
            prepare(data, tmp_path, **options)


def test_a_thought_needs_an_ending(tmp_path):
    """A tokenizer without an EOS token ends thoughts by a string alone."""
    tokenizer = KINDS["characters"](tmp_path)
    with pytest.raises(ValueError, match="no EOS token that could end a thought; set `thought_stop_string`"):
        prepare([COLUMN | {"thought": "a"}], tmp_path, tokenizer)


def test_an_ending_that_the_tokenizer_does_not_write(tmp_path):
    """Sampling would look for a string that the thought's tokens do not spell."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"Row 0 .*'a', whose last token does not end it by .*'Z'.*; end thoughts by"):
        prepare([COLUMN | {"thought": "a"}], tmp_path, tokenizer, thought_stop_string="Z")


def test_thoughts_beyond_the_models_vocabulary(tmp_path):
    """As the text's own tokens."""
    args = tiny_args(tmp_path, min_thought_length=1, thought_length=9)
    ids = byte_tokenizer()("z")["input_ids"]
    data = Dataset.from_list([{"prompt": "!", "completion": '"', "thought": "z"}])
    with pytest.raises(ValueError, match=f"gives the id {ids[0]} in the train dataset"):
        prepare_texts(data, byte_tokenizer(), args, "train", ids[0])
