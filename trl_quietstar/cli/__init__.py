"""The command line.

    trl-quietstar train --config recipes/demo.yaml --learning_rate 2e-4
    trl-quietstar generate --model out/lora --prompt "Twice seven is" --show-thoughts
    trl-quietstar eval --model_name_or_path out/lora --dataset_name test.jsonl --anti-theater
    trl-quietstar eval --model out/lora --tasks gsm8k --compare
    trl-quietstar inspect --model out/lora --text story.txt --output report.html
    accelerate launch -m trl_quietstar.cli train --config recipes/lora.yaml

Every field of `QuietStarConfig`, TRL's `ModelConfig` and `DataArguments` is a key of the recipe and a flag, which wins.
"""

import os


# threads that wait for each other sleep: beside a busy neighbour that is several times as fast. Read when PyTorch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import glob
import json
import re
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..config import QuietStarConfig
from ..data.files import READERS, load_files, load_folder, reader_of
from ..evaluation.inspection import ShownScores, inspect_texts
from ..evaluation.page import write_page
from ..evaluation.report import (
    TerminalStreamer,
    print_anti_theater,
    print_comparison,
    print_evaluation,
    print_outcomes,
    print_thoughts,
)
from ..loading import build_model, load_tokenizer, pad_token_id, warn_of_untrained_heads
from ..model.adapters import base_of
from ..model.family import check_length, max_positions
from ..model.lm_head import normalized_entropy, token_statistics
from ..modeling import HUB_KWARGS, QuietStarForCausalLM, saved_settings
from ..text.batch import Text, Thoughts
from ..text.positions import choose_positions, seeded_generators, talk_span
from ..thinking.check import choose_path
from ..thinking.drawing import fixed_draws, thought_sampling
from ..thinking.likelihood import think_in_chunks
from ..thinking.when import Thinking
from ..trainer import QuietStarREINFORCETrainer


USAGE = """usage: trl-quietstar train|generate|eval|inspect [--config RECIPE.yaml] [--FIELD VALUE ...]

train     trains a causal language model to think, evaluates it before and after where there is evaluation data, and
          saves it
generate  writes on from a prompt, thinking; with --show-thoughts, the thoughts too
eval      evaluates a model; with --anti-theater, also whether its thoughts are used or decoration; with --tasks, on any
          tasks of lm-evaluation-harness, and with --compare there also without thoughts
inspect   writes a page of what a model thinks after each token of a text: --model PATH --text FILE --output PAGE.html; with
          --prompt FILE, of what it thinks between a prompt and the text

`trl-quietstar COMMAND --help` lists every field."""


@dataclass
class DataArguments:
    """
    What to train and evaluate on.

    Parameters:
        dataset_name (`str`):
            Id on the Hub, local folder (data files, or one written by `save_to_disk`), or data file: JSON lines, Parquet,
            CSV, or text, each line of which is one.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_train_split (`str`):
            Split to train on.
        eval_dataset_name (`str`, *optional*):
            Where the evaluation data is, if elsewhere.
        dataset_test_split (`str`, *optional*):
            Split to evaluate on. Defaults to `"test"` or `"validation"` where there is one, and to `"train"` of a
            separate data file.
        dataset_streaming (`bool`):
            Whether to stream the training data.
        column_mapping (`str`, *optional*):
            JSON object that renames columns, e.g. `{"question": "prompt", "answer": "completion"}`.
        max_eval_samples (`int`, *optional*):
            Cuts the evaluation data.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local folder or data file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluation data, if elsewhere."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Whether to stream the training data."})
    column_mapping: dict | str | None = field(default=None, metadata={"help": "JSON object that renames columns."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Cuts the evaluation data."})

    def __post_init__(self):
        if isinstance(self.column_mapping, str):
            self.column_mapping = _mapping(self.column_mapping)
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(f"`max_eval_samples` is {self.max_eval_samples}; give a number of texts, at least 1.")


def _mapping(text: str) -> dict:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"`column_mapping` is {text!r}; give a JSON object from names to names.")
    return mapping


@dataclass
class EvalArguments:
    """
    What to find out.

    Parameters:
        anti_theater (`bool`):
            Whether to validate that the thoughts are used.
        output_file (`str`, *optional*):
            JSON file for the metrics.
    """

    anti_theater: bool = field(default=False, metadata={"help": "Whether to validate that the thoughts are used."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the metrics."})


@dataclass
class InspectArguments:
    """
    What to look at.

    Parameters:
        model (`str`):
            Id on the Hub or local folder of a thinking model, an adapter with its heads, or a plain causal LM.
        text (`str`):
            UTF-8 file, or `-` for standard input.
        prompt (`str`, *optional*):
            UTF-8 file with what stands before the text and is not predicted, such as a question. Needed where the model
            thinks at the end of a prompt.
        output (`str`):
            HTML file to write.
    """

    model: str | None = field(default=None, metadata={"help": "Hub id or local folder."})
    text: str | None = field(default=None, metadata={"help": "UTF-8 file, or - for standard input."})
    prompt: str | None = field(default=None, metadata={"help": "UTF-8 file with what stands before the text."})
    output: str = field(default="report.html", metadata={"help": "HTML file to write."})


def load_splits(name: str, config: str | None, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """
    All splits of a dataset from the Hub, a local folder or a data file.

    Args:
        name (`str`):
            Id or path. Files may end in what [`data.files.READERS`] names, and be compressed.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`):
            Whether to stream.

    Raises:
        `FileNotFoundError`: if a path to a file does not exist.
        `ValueError`: for a file that is not read or broken, or a folder with a card whose name is a pattern.
    """
    path = Path(name)
    if path.is_file() or (reader_of(path) is not None and not path.is_dir()):
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name!r}.")
        if reader_of(path) is None:
            *others, last = READERS
            raise ValueError(
                f"The data file {name!r} is of no kind that is read; give one that ends in .{', .'.join(others)} or .{last}, "
                "compressed or not."
            )
        if config is not None:  # of a recipe, perhaps, whose data this file takes the place of
            print(
                f"Warning: `dataset_config` is {config!r}, and a file has none; all of {name!r} is read.",
                file=sys.stderr,
            )
        return {"train": load_files([path], streaming)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(name)
        loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return {split: x.to_iterable_dataset() if streaming else x for split, x in loaded.items()}
    card = path / "README.md"
    is_described = card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE)
    if path.is_dir() and config is None and not is_described:
        splits = load_folder(path, streaming)
        if splits:
            return splits
    if path.is_dir() and glob.has_magic(str(path.absolute())):  # the library looks for files by patterns
        raise ValueError(
            f"The folder {str(path.absolute())!r} has one of *?[ in its name, and files of another would be taken for its "
            "own; rename it."
        )
    return load_dataset(name, config, streaming=streaming)


def load_data(arguments: DataArguments) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Training and evaluation data, the latter None where there is none.

    Args:
        arguments ([`DataArguments`]):
            What to load.

    Raises:
        `ValueError`: if no dataset is named, or it lacks the split.
    """
    if arguments.dataset_name is None:
        raise ValueError("`dataset_name` is missing; give a Hub id, a local folder or a data file.")
    splits = load_splits(arguments.dataset_name, arguments.dataset_config, arguments.dataset_streaming)
    train = _split(splits, arguments.dataset_train_split, arguments.dataset_name)
    if arguments.eval_dataset_name is not None:
        others = load_splits(arguments.eval_dataset_name, None)
        evaluation = _split(others, arguments.dataset_test_split or next(iter(others)), arguments.eval_dataset_name)
    else:
        name = arguments.dataset_test_split or next((s for s in ("test", "validation") if s in splits), None)
        evaluation = None if name is None else _split(splits, name, arguments.dataset_name)
    if arguments.column_mapping:
        train = _rename(train, arguments.column_mapping, arguments.dataset_name)
        if evaluation is not None:
            source = arguments.eval_dataset_name or arguments.dataset_name
            evaluation = _rename(evaluation, arguments.column_mapping, source)
    return train, None if evaluation is None else _cut(evaluation, arguments)


def _rename(dataset: Dataset | IterableDataset, mapping: dict, source: str) -> Dataset | IterableDataset:
    names = dataset.column_names or list(next(iter(dataset), {}))
    missing = [name for name in mapping if name not in names]
    if missing:
        raise ValueError(
            f"`column_mapping` renames {missing[0]!r}, which is no column of {source!r}; it has {', '.join(names)}."
        )
    renamed = [mapping.get(name, name) for name in names]
    twice = [name for name in renamed if renamed.count(name) > 1]
    if twice:
        raise ValueError(f"`column_mapping` gives the name {twice[0]!r} twice among the columns of {source!r}.")
    return dataset.rename_columns(mapping)


def _cut(dataset: Dataset | IterableDataset, arguments: DataArguments) -> Dataset | IterableDataset:
    return dataset if arguments.max_eval_samples is None else dataset.take(arguments.max_eval_samples)


def _split(splits: dict, name: str, source: str):
    if name not in splits:
        raise ValueError(f"{source!r} has no split {name!r}; it has {', '.join(splits)}.")
    return splits[name]


def model_kwargs(model_args: ModelConfig) -> dict:
    """Keyword arguments for loading the model, from TRL's `ModelConfig`."""
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def train(argv: list[str]) -> None:
    """Trains from a recipe: evaluates, trains, evaluates again, prints what changed, and saves."""
    parser = TrlParser((DataArguments, QuietStarConfig, ModelConfig), prog="trl-quietstar train")
    parser.set_defaults(dtype=None)  # the trainer's own default, which goes by what is trained
    data_args, args, model_args = parser.parse_args_and_config(argv)
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing; give a Hub id or a local folder.")
    train_dataset, eval_dataset = load_data(data_args)
    args.model_init_kwargs = {**model_kwargs(model_args), **(args.model_init_kwargs or {})}
    trainer = QuietStarREINFORCETrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    checkpoint = trainer.find_checkpoint(_truth(args.resume_from_checkpoint))  # refused before anything is computed
    before = trainer.evaluate() if eval_dataset is not None else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if before is not None:
        after = trainer.evaluate()
        trainer.save_metrics("eval", after)
        if trainer.accelerator.is_main_process:
            print_thoughts(trainer.sampled_thoughts(), "Thoughts on held-out text")
            print_comparison(before, after, f"After {trainer.state.global_step} steps")
    if args.anti_theater_steps is not None:
        report = trainer.validate_thoughts()
        if trainer.accelerator.is_main_process:
            print_anti_theater(report)
    trainer.create_model_card()
    if trainer.accelerator.is_main_process:
        print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


def _truth(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint true` means the last checkpoint, as `True` does in Python, and no folder of that name."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


@dataclass
class TaskArguments:
    """
    What to run in lm-evaluation-harness.

    Parameters:
        model (`str`):
            Id on the Hub or local folder.
        tasks (`str`):
            Names, separated by commas.
        compare (`bool`):
            Whether to run without thoughts too, and compare document by document.
        include_path (`str`, *optional*):
            Folder with task files of one's own.
        limit, num_fewshot (`int`, *optional*), batch_size (`int`):
            Documents of each task; examples in the prompt; texts at once.
        think, think_every, thinking_threshold:
            As in `generate` of a thinking model.
        revision (`str`, *optional*), trust_remote_code (`bool`):
            Of the model on the Hub; whether to run code from there.
        output_file (`str`, *optional*):
            JSON file for the outcomes.
    """

    model: str | None = field(default=None, metadata={"help": "Hub id or local folder."})
    tasks: str | None = field(default=None, metadata={"help": "Tasks of lm-eval, separated by commas."})
    compare: bool = field(default=False, metadata={"help": "Whether to run without thoughts too."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    limit: int | None = field(default=None, metadata={"help": "Documents of each task."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt."})
    batch_size: int = field(default=1, metadata={"help": "Texts at once."})
    think: str | None = field(
        default=None, metadata={"help": "`always`, `adaptive`, `prompt_end` or `never`; by default as it was trained."}
    )
    think_every: int | None = field(default=None, metadata={"help": "Tokens that one thought serves."})
    thinking_threshold: float | None = field(default=None, metadata={"help": "Least normalised entropy to think at."})
    revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run model code from the Hub."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the outcomes."})


def evaluate_on_tasks(argv: list[str]) -> None:
    """Runs tasks of lm-evaluation-harness with thoughts, and without them to compare."""
    try:
        from ..evaluation.harness import QuietStarLM, evaluate_tasks, paired_test
    except ImportError as error:
        raise ImportError("`--tasks` needs lm-eval; install it with `pip install trl-quietstar[eval]`.") from error
    argv = _renamed(argv, "--model_name_or_path", "--model")
    (args,) = TrlParser((TaskArguments,), prog="trl-quietstar eval").parse_args_and_config(argv)
    for name in ("model", "tasks"):
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` is missing; give `--{name}`.")
    hub = {} if args.revision is None else {"revision": args.revision}
    model = QuietStarLM(
        args.model,
        args.think,
        args.think_every,
        args.thinking_threshold,
        trust_remote_code=args.trust_remote_code,
        batch_size=args.batch_size,
        **hub,
    )
    print(f"Thinks {model.thinking}.")
    tasks = [task.strip() for task in args.tasks.split(",")]
    options = (tasks, args.include_path, args.limit, args.num_fewshot)
    outcomes, plain, p_values = evaluate_tasks(model, *options), None, []
    if args.compare:
        model.thinking = Thinking("never")
        plain = evaluate_tasks(model, *options)
        p_values = [paired_test(a, b) for a, b in zip(outcomes, plain, strict=True)]
    print_outcomes(outcomes, plain, p_values)
    if args.output_file is not None:
        found = {"with": outcomes, "without": plain or [], "p": p_values}
        Path(args.output_file).write_text(json.dumps(found, indent=2, default=asdict))


def evaluate(argv: list[str]) -> None:
    """Evaluates a model on held-out text, by the settings it was trained with unless others are given; or on tasks."""
    if any(flag.split("=")[0] in ("--tasks", "--compare") for flag in argv):
        evaluate_on_tasks(argv)
        return
    argv = _renamed(argv, "--model", "--model_name_or_path")
    description = (
        "On held-out text. `trl-quietstar eval --tasks TASKS` runs tasks of lm-evaluation-harness instead; "
        "`trl-quietstar eval --tasks TASKS --help` lists its options."
    )
    parser = TrlParser(
        (EvalArguments, DataArguments, QuietStarConfig, ModelConfig),
        prog="trl-quietstar eval",
        description=description,
    )
    *_, args, model_args = parser.parse_args_and_config(argv)
    with tempfile.TemporaryDirectory() as scratch:
        if model_args.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is missing; give a Hub id or a local folder.")
        hub = {"revision": model_args.model_revision, **hub_kwargs(args)}
        fields = saved_fields(model_args.model_name_or_path, **hub)
        if not fields:
            warn_of_untrained_heads(model_args.model_name_or_path)
        parser.set_defaults(output_dir=scratch, report_to="none", **fields)
        eval_args, data_args, args, model_args = parser.parse_args_and_config(argv)
        train_dataset, eval_dataset = load_data(data_args)
        args.model_init_kwargs = {**model_kwargs(model_args), **(args.model_init_kwargs or {})}
        trainer = QuietStarREINFORCETrainer(
            model=model_args.model_name_or_path,
            args=args,
            eval_dataset=_cut(train_dataset, data_args) if eval_dataset is None else eval_dataset,
            quantization_config=get_quantization_config(model_args),
        )
        if trainer.accelerator.is_main_process:
            print(thinking_line(args))
        metrics = trainer.evaluate()
        report = trainer.validate_thoughts() if eval_args.anti_theater else None
        if report is not None:
            metrics |= {f"anti_theater_{name}": value for name, value in report.metrics().items()}
        if trainer.accelerator.is_main_process:
            print_thoughts(trainer.sampled_thoughts(), "Thoughts on held-out text")
            print_evaluation(metrics)
            if report is not None:
                print_anti_theater(report)
            if eval_args.output_file is not None:
                Path(eval_args.output_file).write_text(json.dumps(metrics, indent=2))


def _renamed(argv: list[str], flag: str, name: str) -> list[str]:
    """The arguments with one flag under its other name."""
    return [name + part[len(flag) :] if part.split("=")[0] == flag else part for part in argv]


@dataclass
class GenerateArguments:
    """
    What to write, and how to think.

    Parameters:
        model (`str`):
            Id on the Hub or local folder: a thinking model, or an adapter with its heads.
        prompt (`str`):
            The text to go on from; `-` reads it from the standard input.
        show_thoughts (`bool`):
            Whether to print each thought before the text it served.
        chat (`bool`):
            Whether the prompt is a user's message, by the model's chat template.
        max_new_tokens (`int`):
            The most visible tokens.
        do_sample (`bool`), temperature, top_p (`float`):
            Of the visible text.
        think, think_every, thinking_threshold:
            As in `generate` of a thinking model.
        seed (`int`):
            Of sampling.
        revision (`str`, *optional*):
            Of the model on the Hub.
        trust_remote_code (`bool`):
            Whether to run model code from the Hub. Off unless you say so.
    """

    model: str | None = field(default=None, metadata={"help": "Hub id or local folder."})
    prompt: str | None = field(default=None, metadata={"help": "The text to go on from; `-`: standard input."})
    show_thoughts: bool = field(default=False, metadata={"help": "Whether to print the thoughts too."})
    chat: bool = field(default=False, metadata={"help": "Whether the prompt is a user's message in a chat."})
    max_new_tokens: int = field(default=64, metadata={"help": "The most visible tokens."})
    do_sample: bool = field(default=False, metadata={"help": "Whether to sample the visible text."})
    temperature: float = field(default=1.0, metadata={"help": "Of the visible text, if sampled."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the visible text, if sampled."})
    think: str | None = field(
        default=None, metadata={"help": "`always`, `adaptive`, `prompt_end` or `never`; by default as it was trained."}
    )
    think_every: int | None = field(default=None, metadata={"help": "Tokens that one thought serves."})
    thinking_threshold: float | None = field(default=None, metadata={"help": "Least normalised entropy to think at."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run model code from the Hub."})


def generate(argv: list[str]) -> None:
    """Writes on from a prompt, token by token as they come."""
    (args,) = TrlParser((GenerateArguments,), prog="trl-quietstar generate").parse_args_and_config(argv)
    for name in ("model", "prompt"):
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` is missing; give `--{name}`.")
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    model = QuietStarForCausalLM.from_pretrained(args.model, **hub).eval()
    if base_of(model).fresh_thought_embeddings and args.think != "never":
        warn_of_untrained_heads(args.model)
    tokenizer = load_tokenizer(args.model, **hub)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("`prompt` has no tokens; give at least one, since a thought follows a token.")
    set_seed(args.seed)
    console = Console()
    thinking = Thinking.of(base_of(model).quietstar_settings, args.think, args.think_every, args.thinking_threshold)
    print(f"Thinks {thinking}.", file=sys.stderr)  # the standard output is the text
    options = {"temperature": args.temperature, "top_p": args.top_p} if args.do_sample else {}
    if args.show_thoughts and thinking.mode != "never":
        options["thought_streamer"] = TerminalStreamer(tokenizer, console, thoughts=True)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        pad_token_id=pad_token_id(tokenizer),
        think=thinking,
        tokenizer=tokenizer,
        streamer=TerminalStreamer(tokenizer, console),
        **options,
    )


def hub_kwargs(args: QuietStarConfig) -> dict:
    """Where on the Hub the model is, as `model_init_kwargs` say it."""
    return {name: value for name, value in (args.model_init_kwargs or {}).items() if name in HUB_KWARGS}


def saved_fields(source: str, **hub) -> dict:
    """The fields of `QuietStarConfig` that a saved thinking model keeps; none for a plain model."""
    settings = saved_settings(source, **hub)
    if settings is None:
        return {}
    fields = settings.to_dict()
    return {"reward_prediction": fields.pop("prediction"), **fields}


def thinking_line(args: QuietStarConfig) -> str:
    """Where and how a model thinks in an evaluation, in one sentence."""
    read = "all that follow" if args.talk_length == "completion" else f"the next {args.talk_length}"
    return (
        f"Thoughts of up to {args.thought_length} tokens, {args.num_thoughts} at a time, at the positions "
        f"{args.thought_positions!r}, read for {read} tokens; temperature {args.temperature:g}, seed {args.seed}."
    )


def inspect(argv: list[str]) -> None:
    """Writes a page of what a model thinks after each token of a text, by its saved settings unless others are given."""
    parser = TrlParser((InspectArguments, QuietStarConfig), prog="trl-quietstar inspect")
    with tempfile.TemporaryDirectory() as scratch:
        parser.set_defaults(output_dir=scratch, report_to="none", num_thoughts=3, seed=0)
        inspect_args, args = parser.parse_args_and_config(argv)
        if inspect_args.model is None or inspect_args.text is None:
            missing = "model" if inspect_args.model is None else "text"
            raise ValueError(f"`{missing}` is missing; give `--{missing}`.")
        fields = saved_fields(inspect_args.model, **hub_kwargs(args))
        if not isinstance(fields.get("thought_positions"), str):  # some of them, to save time in training
            fields.pop("thought_positions", None)
        parser.set_defaults(**fields)
        inspect_args, args = parser.parse_args_and_config(argv)
    if args.thought_positions == "prompt_end" and inspect_args.prompt is None:
        raise ValueError(
            "`thought_positions` is 'prompt_end', and there is no prompt; give its file with `--prompt`, or "
            "`--thought_positions all` to think after every token."
        )
    words = read_text(inspect_args.text)
    prompt = "" if inspect_args.prompt is None else read_text(inspect_args.prompt)
    model, tokenizer = build_model(inspect_args.model, args, None, None, None)
    base = base_of(model.to(args.device).eval())
    ids = tokenizer(prompt + words)["input_ids"]
    kept, given = ids[: args.max_length], len(tokenizer(prompt)["input_ids"]) if prompt else 0
    if len(kept) < max(given + 1, 2):
        raise ValueError(
            f"The text {inspect_args.text!r} has {len(kept) - given} tokens within `max_length` ({args.max_length}) of which "
            f"the prompt takes {given}; give a longer one, or raise `max_length`."
            if given
            else f"The text {inspect_args.text!r} has fewer than two tokens; give a longer one."
        )
    check_length(len(kept), args.thought_length, max_positions(base.config))
    token_ids = torch.tensor([kept])
    labels = token_ids.masked_fill(torch.arange(len(kept)) < given, -100)
    text = Text.from_batch(token_ids, labels=labels).to(args.device)
    texts = inspect_texts(tokenizer, text, *think_about(base, text, tokenizer, args))
    warnings = _warnings(inspect_args.model, bool(fields), len(kept), len(ids))
    for warning in warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    settings = f"Model {inspect_args.model}. {thinking_line(args)}"
    print(settings)
    name = "standard input" if inspect_args.text == "-" else Path(inspect_args.text).name
    write_page(Path(inspect_args.output), f"Thoughts on {name}", texts, [settings, *warnings])
    print(f"Wrote {inspect_args.output}")


def _warnings(model: str, trained: bool, shown: int, tokens: int) -> list[str]:
    """What a reader of the report must know."""
    warnings = []
    if shown < tokens:
        warnings.append(f"The text has {tokens:,} tokens, of which the first {shown:,} are shown; raise `max_length`.")
    if not trained:
        warnings.append(f"{model} was never trained to think: its heads, and so its thoughts, are untrained.")
    return warnings


def think_about(
    model: PreTrainedModel, text: Text, tokenizer: PreTrainedTokenizerBase, args: QuietStarConfig
) -> tuple[Thoughts, ShownScores]:
    """A model's thoughts on a text of one row, by the configuration, and their scores."""
    path = choose_path(model, args.thought_path)
    generators = seeded_generators(args.seed, 0, [0])
    with torch.no_grad():
        cache = path.read(model, text)
        text_logps = token_statistics(
            model, cache.text_hidden[:, :-1], text.input_ids[:, 1:], text.host.predicted()
        ).logps
        positions = choose_positions(
            text,
            args.thought_positions,
            generators,
            lambda: normalized_entropy(model, cache.text_hidden[:, :-1]),
            args.difficulty_threshold,
            args.min_thought_interval,
        )
    settings = thought_sampling(args.settings(), tokenizer, args.num_thoughts)
    draws = fixed_draws(
        text.host.position_ids.gather(1, positions.host.index), settings, args.seed
    )  # as greedy generation has
    talk_length = talk_span(text, args.talk_length, args.thought_positions)
    thoughts, scores = think_in_chunks(
        model, path, text, positions, settings, draws, talk_length, args.reward_prediction, cache
    )
    return thoughts, ShownScores(scores.talk_logps, scores.mixing_weights, text_logps)


def read_text(name: str) -> str:
    """
    A UTF-8 file, or standard input for `-`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is not UTF-8, or empty.
    """
    if name != "-" and not Path(name).is_file():
        raise FileNotFoundError(f"There is no text file {name!r}; give a UTF-8 file, or `-` for standard input.")
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        words = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text {name!r} is not UTF-8 ({error}); save it as UTF-8.") from None
    if not words.strip():
        raise ValueError(f"The text {name!r} is empty; give a longer one.")
    return words


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": train, "generate": generate, "eval": evaluate, "inspect": inspect}
    if argv[:1] and argv[0] in commands:
        commands[argv[0]](argv[1:])
        return 0
    print(USAGE, file=sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


def _is_own(error: Exception) -> bool:
    """Whether this package worded an error, in this process or in one of a pool's, whose traceback is text."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if type(error.__cause__).__name__ == "RemoteTraceback":
        raised_in = re.findall(r'^  File "(.*?)", line', str(error.__cause__), re.MULTILINE)[-1]
    return Path(raised_in).is_relative_to(Path(__file__).parents[1])


def console() -> int:
    """Entry point of the console script: of an error that this package words itself, prints the words alone."""
    if not sys.warnoptions:  # what libraries deprecate in each other would break into the text that streams
        warnings.simplefilter("ignore", FutureWarning)
    try:
        return main()
    except (ValueError, OSError, ImportError) as error:
        if not _is_own(error):
            raise
        print(f"trl-quietstar: {error}", file=sys.stderr)
        return 1
