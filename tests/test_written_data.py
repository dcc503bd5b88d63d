"""Written thoughts in data: taken out of texts or given beside them, at their places, with the ending that sampling knows."""

from datasets import Dataset

from trl_quietstar.data.prepare import prepare_texts

from .tiny import byte_tokenizer
from .training import tiny_args


BRACKETS = dict(thought_pattern=r"\[(.*?)\]", thought_stop_string="]", thought_length=40, max_length=None)


def prepared(rows, folder, tokenizer=None, **options):
    """What becomes of rows ahead of training."""
    args = tiny_args(folder, **{"thought_length": 40, "max_length": None, **options})
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    return prepare_texts(data, tokenizer, args, "train", len(tokenizer), args.packing)


def test_thoughts_are_taken_out_of_completions(tmp_path):
    row = {"prompt": "2 plus 3 plus 4 is", "completion": " [2+3=5]5 plus 4 is [5+4=9]9 ."}
    tokenizer = byte_tokenizer()
    (found,) = prepared([row], tmp_path, **BRACKETS)
    assert [tokenizer.decode(ids) for ids in found["written_ids"]] == ["2+3=5]", "5+4=9]"]
    assert tokenizer.decode(found["input_ids"]) == "2 plus 3 plus 4 is 5 plus 4 is 9 .<eos>"
