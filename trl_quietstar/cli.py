"""The command line.

    trl-quietstar train --config recipes/demo.yaml --learning_rate 2e-4
    trl-quietstar eval --model_name_or_path out/lora --dataset_name test.jsonl --anti-theater
    accelerate launch -m trl_quietstar.cli train --config recipes/lora.yaml

Every field of `QuietStarConfig`, TRL's `ModelConfig` and `DataArguments` is a key of the recipe and a flag, which wins.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .config import QuietStarConfig
from .modeling import saved_settings
from .report import print_anti_theater, print_comparison, print_evaluation, print_thoughts
from .trainer import QuietStarREINFORCETrainer


USAGE = """usage: trl-quietstar train|eval [--config RECIPE.yaml] [--FIELD VALUE ...]

train   trains a causal language model to think, evaluates it before and after where there is evaluation data, and
        saves it
eval    evaluates a model; with --anti-theater, also whether its thoughts are used or decoration

`trl-quietstar train --help` and `trl-quietstar eval --help` list every field."""


@dataclass
class DataArguments:
    """
    What to train and evaluate on.

    Parameters:
        dataset_name (`str`):
            Id on the Hub, local folder (data files, or one written by `save_to_disk`), or JSON-lines file.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_train_split (`str`):
            Split to train on.
        eval_dataset_name (`str`, *optional*):
            Where the evaluation data is, if elsewhere.
        dataset_test_split (`str`, *optional*):
            Split to evaluate on. Defaults to `"test"` or `"validation"` where there is one, and to `"train"` of a
            separate JSON-lines file.
        dataset_streaming (`bool`):
            Whether to stream the training data.
        column_mapping (`str`, *optional*):
            JSON object that renames columns, e.g. `{"question": "prompt", "answer": "completion"}`.
        max_eval_samples (`int`, *optional*):
            Cuts the evaluation data.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, local folder or JSON-lines file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluation data, if elsewhere."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Whether to stream the training data."})
    column_mapping: dict | str | None = field(default=None, metadata={"help": "JSON object that renames columns."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Cuts the evaluation data."})

    def __post_init__(self):
        if isinstance(self.column_mapping, str):
            self.column_mapping = json.loads(self.column_mapping)


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


def load_splits(name: str, config: str | None, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """
    All splits of a dataset from the Hub, a local folder or a JSON-lines file.

    Args:
        name (`str`):
            Id or path.
        config (`str`, *optional*):
            Configuration of a Hub dataset.
        streaming (`bool`):
            Whether to stream.

    Raises:
        `FileNotFoundError`: if a path to a file does not exist.
    """
    path = Path(name)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name!r}.")
        return load_dataset("json", data_files={"train": str(path)}, streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(name)
        return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
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
        raise ValueError("`dataset_name` is missing; give a Hub id, a local folder or a JSON-lines file.")
    splits = load_splits(arguments.dataset_name, arguments.dataset_config, arguments.dataset_streaming)
    train = _split(splits, arguments.dataset_train_split, arguments.dataset_name)
    if arguments.eval_dataset_name is not None:
        others = load_splits(arguments.eval_dataset_name, None)
        evaluation = _split(others, arguments.dataset_test_split or next(iter(others)), arguments.eval_dataset_name)
    else:
        name = arguments.dataset_test_split or next((s for s in ("test", "validation") if s in splits), None)
        evaluation = None if name is None else _split(splits, name, arguments.dataset_name)
    if arguments.column_mapping:
        train = train.rename_columns(arguments.column_mapping)
        evaluation = evaluation and evaluation.rename_columns(arguments.column_mapping)
    return train, evaluation and _cut(evaluation, arguments)


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
    before = trainer.evaluate() if eval_dataset is not None else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
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


def evaluate(argv: list[str]) -> None:
    """Evaluates a model on held-out text, by the settings it was trained with unless others are given."""
    parser = TrlParser((EvalArguments, DataArguments, QuietStarConfig, ModelConfig), prog="trl-quietstar eval")
    *_, model_args = parser.parse_args_and_config(argv)
    with tempfile.TemporaryDirectory() as scratch:
        parser.set_defaults(output_dir=scratch, report_to="none", **saved_fields(model_args))
        eval_args, data_args, args, model_args = parser.parse_args_and_config(argv)
        train_dataset, eval_dataset = load_data(data_args)
        args.model_init_kwargs = {**model_kwargs(model_args), **(args.model_init_kwargs or {})}
        trainer = QuietStarREINFORCETrainer(
            model=model_args.model_name_or_path,
            args=args,
            eval_dataset=_cut(train_dataset, data_args) if eval_dataset is None else eval_dataset,
            quantization_config=get_quantization_config(model_args),
        )
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


def saved_fields(model_args: ModelConfig) -> dict:
    """
    The fields of `QuietStarConfig` that a saved thinking model keeps.

    Raises:
        `ValueError`: if no model is named.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing; give a Hub id or a local folder.")
    settings = saved_settings(model_args.model_name_or_path, revision=model_args.model_revision)
    if settings is None:
        return {}
    fields = settings.to_dict()
    return {"reward_prediction": fields.pop("prediction"), **fields}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": train, "eval": evaluate}
    if argv[:1] and argv[0] in commands:
        commands[argv[0]](argv[1:])
        return 0
    print(USAGE, file=sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
