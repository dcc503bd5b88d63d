"""`trl-quietstar export`: a plain model that thinks by itself, for Transformers, or for llama.cpp by its own converter."""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from ..config import QuietStarConfig
from ..data.prepare import prepare_texts
from ..loading import load_tokenizer
from ..model.heads import ThinkingModel
from ..model.plain import check_settings, largest_difference, make_plain, plain_logits, thoughtful_logits
from ..model.saved import has_file, saved_settings
from ..modeling import QuietStarForCausalLM
from ..settings import QuietStarSettings
from .arguments import (
    DataArguments,
    argument,
    check_model,
    check_new_folder,
    load_data,
    named,
    required,
    revision_of,
)
from .merge import DTYPES, LARGEST_DIFFERENCE, merged_exactly, some_tokens, tokenizer_of
from .parser import CommandParser


FORMATS = ("hf", "gguf")
CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass
class ExportArguments:
    """What to export. What each field means stands in its `help`."""

    model: str | None = argument(
        None, "Id on the Hub or local folder of a thinking model, or an adapter with its heads."
    )
    output: str | None = argument(None, "Folder to write the plain model to; new or empty.")
    format: str = argument("hf", "`hf`: a folder of Transformers; `gguf`: a file for llama.cpp, by its own converter.")
    dtype: str = argument("float32", "Type that the weights are saved in: `float32`, `bfloat16` or `float16`.")
    prediction: str | None = argument(
        None,
        "`thought`: exports a model with a mixing head without it, so that the thought alone predicts; `dataset_name` shows what "
        "that costs.",
    )
    dataset_name: str | None = argument(
        None, "Data with answers, as for `eval`: the log-probability of each is measured before and after."
    )
    converter: str | None = argument(
        None, f"Path of llama.cpp's `{CONVERTER}`. By default the one that the shell finds."
    )
    revision: str | None = argument(None, "Revision of the model on the Hub.")
    trust_remote_code: bool = argument(False, "Whether to run code that comes with a model on the Hub.")


def run(argv: list[str]) -> None:
    """Exports a model: `--model MODEL --output DIR`, then flags."""
    (args,) = CommandParser((ExportArguments,), "export").parse_args_and_config(named(argv, "--model", "--output"))
    source, output = required(args, "model", "output")
    hub, converter = revision_of(args), _check(args)
    check_model(source, **hub)
    settings = saved_settings(source, **hub)
    if settings is None:
        raise ValueError(f"{source!r} is a plain model already: it has no thinking heads.")
    _check_prediction(settings, args)
    check_settings(settings)
    model, tokenizer = _loaded(source, args)
    if args.dataset_name is not None:
        _measure(model, tokenizer, args.dataset_name)
    model.adopt_settings(replace(settings, prediction="thought"), tokenizer)
    text = some_tokens(model)[:, :30]
    before = thoughtful_logits(model, text)
    marks = model.thought_marks
    start, end = make_plain(model, tokenizer)
    added = [] if marks.start is not None else [tokenizer.get_vocab()[name] for name in (start, end)]
    around = [*marks.prompt, *(marks.start or added[:1])], list(marks.end or added[1:])
    _check_same(largest_difference(before, plain_logits(model, text, *around), added))
    nn.Module.to(model, DTYPES[args.dtype])
    difference = largest_difference(before, plain_logits(model, text, *around), added)
    card = model_card(Path(output).name, settings, tokenizer, start, end)
    _save(model, tokenizer, card, output, converter)
    print(f"Saved to {output}, in {args.dtype}. Log-probabilities differ by {difference:.0e} at most.")
    print(_how_to_open(tokenizer, settings, start))
    if added:
        print(f"The ids of {start} and {end} are {added[0]} and {added[1]}.")


def _check(args: ExportArguments) -> str | None:
    """Refuses what cannot be written; returns the path of the converter, if one is wanted."""
    for name, choices in (("format", FORMATS), ("dtype", tuple(DTYPES))):
        if getattr(args, name) not in choices:
            raise ValueError(f"`{name}` is {getattr(args, name)!r}; choose one of {', '.join(choices)}.")
    check_new_folder(str(args.output))
    if args.format != "gguf":
        if args.converter is not None:
            raise ValueError("`converter` is for `--format gguf`; leave it out.")
        return None
    converter = args.converter or shutil.which(CONVERTER)
    if converter is None or not Path(converter).is_file():
        found = "is not found by the shell" if args.converter is None else f"is no file: {args.converter!r}"
        raise FileNotFoundError(
            f"llama.cpp's `{CONVERTER}` {found}. Get the source of llama.cpp, and give `--converter llama.cpp/{CONVERTER}`; it needs "
            "the package `gguf`."
        )
    return converter


def _check_prediction(settings: QuietStarSettings, args: ExportArguments) -> None:
    """Refuses to leave out a mixing head unless that is asked for, and its cost is to be measured."""
    if args.prediction not in (None, "thought"):
        raise ValueError(
            f"`prediction` is {args.prediction!r}, and a plain model has no mixing head; the choice is `thought`."
        )
    if settings.prediction != "mixed":
        return
    if args.prediction is None or args.dataset_name is None:
        missing = (
            "--prediction thought" if args.dataset_name is not None else "--prediction thought --dataset_name FILE"
        )
        raise ValueError(
            "The model was trained with `reward_prediction='mixed'`: its mixing head weighs the predictions with and without the "
            "thought, and a plain model has none. To export it with the thought's prediction alone, and see what that costs on "
            f"your data, give `{missing}`; or train with `reward_prediction='thought'`."
        )


def _loaded(source: str, args: ExportArguments) -> tuple[ThinkingModel, PreTrainedTokenizerBase]:
    """The model, with its adapter merged if it has one, and its tokenizer."""
    hub = revision_of(args)
    options = {**hub, "trust_remote_code": args.trust_remote_code}
    model = QuietStarForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
    if not has_file(source, ADAPTER_CONFIG_NAME, hub):
        return model, load_tokenizer(source, **options)
    tokenizer = tokenizer_of(source, model.get_base_model(), hub, options)
    return merged_exactly(model)[0], tokenizer


def _check_same(difference: float) -> None:
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(
            f"The plain model's log-probabilities differ by {difference:.1e}, above {LARGEST_DIFFERENCE}: its family treats tokens "
            "and embeddings in different ways. Generate with this package."
        )


# What the export costs


def _measure(model: ThinkingModel, tokenizer: PreTrainedTokenizerBase, dataset_name: str) -> None:
    """Prints the mean log-probability of the answers' tokens: as trained, by the thought alone, and without thoughts."""
    settings, rows = model.quietstar_settings, _answers(model, tokenizer, dataset_name)
    found = {"as trained": _mean_logp(model, tokenizer, rows)}
    if settings.prediction == "mixed":
        model.adopt_settings(replace(settings, prediction="thought"))
        found["exported, by the thought alone"] = _mean_logp(model, tokenizer, rows)
        model.adopt_settings(settings)
    found["without thoughts"] = _mean_logp(model, tokenizer, rows, think="never")
    print(f"Log-probability of a token of the answers in {dataset_name}, mean of {len(rows)} texts, in nats:")
    print(*(f"  {name}: {value:.4f}" for name, value in found.items()), sep="\n")


def _answers(
    model: ThinkingModel, tokenizer: PreTrainedTokenizerBase, dataset_name: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each text its tokens up to the end of its last answer, and which of them are the answer, `(1, T)`."""
    train, test = load_data(DataArguments(dataset_name))
    vocab_size = model.config.get_text_config().vocab_size
    with tempfile.TemporaryDirectory() as scratch:
        args = QuietStarConfig(
            scratch, thought_positions="prompt_end", talk_length="completion", max_length=None, report_to="none"
        )
        dataset = prepare_texts(train if test is None else test, tokenizer, args, "eval", vocab_size)
    rows = []
    for row in dataset:
        labels = torch.tensor(row["labels"])
        stop = int((labels >= 0).nonzero().max()) + 1
        others = (labels[:stop] < 0).nonzero()
        mask = torch.arange(stop) > (int(others.max()) if len(others) else 0)
        rows.append((torch.tensor(row["input_ids"])[None, :stop], mask[None]))
    return rows


def _mean_logp(
    model: ThinkingModel, tokenizer: PreTrainedTokenizerBase, rows: list, think: str | None = None
) -> float:
    """Mean over all scored tokens."""
    total = count = 0.0
    for token_ids, mask in rows:
        logps, _ = model.log_likelihoods(token_ids, score_mask=mask, think=think, tokenizer=tokenizer)
        total, count = total + float(logps.sum()), count + float(mask.sum())
    return total / count


# What is written


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str, output: str, converter: str | None
) -> None:
    """Writes the folder, or what the converter makes of it."""
    if converter is None:
        _save_folder(model, tokenizer, output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _save_folder(model, tokenizer, folder)
            Path(output).mkdir(parents=True, exist_ok=True)
            _convert(converter, folder, str(Path(output, "model.gguf")), GGUF_TYPES[str(model.dtype).split(".")[1]])
    Path(output, "README.md").write_text(card, encoding="utf-8")


def _save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert(converter: str, folder: str, file: str, outtype: str) -> None:
    """Runs llama.cpp's converter on a folder."""
    done = subprocess.run(
        [sys.executable, converter, folder, "--outfile", file, "--outtype", outtype], capture_output=True, text=True
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise ValueError(
            f"llama.cpp's converter failed: {last[0]}. Where a package is missing, install it (`pip install gguf`); where it does not "
            "know the model or its tokenizer, take a newer llama.cpp, or `--format hf`."
        )


def _how_to_open(tokenizer: PreTrainedTokenizerBase, settings: QuietStarSettings, start: str) -> str:
    if settings.thought_prompt_role is not None:
        return "The chat template asks for the thought, in a turn of its own, and opens it; use it for each prompt."
    end = (settings.thought_prompt or "") + start
    if tokenizer.chat_template is not None:
        return f"The chat template opens the thought. A prompt without it must end with {end!r}."
    return f"There is no chat template: end each prompt with {end!r}, which opens the thought."


def model_card(
    name: str, settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase, start: str, end: str
) -> str:
    """
    Writes the model card of a plain model: how to serve it, how to hide its thoughts, and what differs.

    Args:
        name (`str`):
            Of the model.
        settings ([`~settings.QuietStarSettings`]):
            How it thought.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        start, end (`str`):
            The tokens that open and close a thought.
    """
    stop = settings.thought_stop_string
    if settings.thought_format == "text":
        how = f"Any engine does: the model writes {end!r} itself, in ordinary tokens, after which the answer follows."
    else:
        how = (
            f"In Transformers (`generate`, `pipeline`) nothing else is needed: `generation_config.json` writes `{end}` after {stop!r}, which\n"
            "  ends a thought. Engines that do not follow its `sequence_bias` and `suppress_tokens` (vLLM, llama.cpp) are asked twice, with\n"
            f"  both tokens forbidden by `logit_bias`: for the thought, up to {stop!r}, and for the answer, with the thought and `{end}` added\n"
            "  to the prompt."
        )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- trl-quietstar
---

# {name}

A plain causal language model that thinks before it answers, exported by
[trl-quietstar](https://pypi.org/project/trl-quietstar). What it writes is a thought, `{end}`, and the answer.

- **Open the thought.** {_how_to_open(tokenizer, settings, start)}
- **Hide the thought.** The answer is what follows the first `{end}`. For a chat, `pipeline` and `transformers serve` give the thought
  apart, as `reasoning_content`.
- **Draw, or not.** Tokens are drawn, unless a client asks for `temperature=0`, or a call for `do_sample=False`.
- **Serve it.** {how}

Two things differ from `generate` of trl-quietstar. There a thought is drawn at temperature {settings.temperature:g} also where the answer is
greedy, and cut after {settings.thought_length} tokens; here one setting draws both, and a thought ends by {stop!r} alone. And {stop!r} must not be
part of an answer.
"""
