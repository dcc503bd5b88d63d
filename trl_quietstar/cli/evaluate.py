"""`trl-quietstar eval`: evaluates a model on held-out text, or on tasks of lm-evaluation-harness."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from trl import ModelConfig, get_quantization_config

from ..config import QuietStarConfig
from ..evaluation.report import print_anti_theater, print_evaluation, print_outcomes, print_thoughts
from ..loading import hub_kwargs, warn_of_untrained_heads
from ..rules import Limits
from ..thinking.when import Thinking
from ..trainer import QuietStarREINFORCETrainer
from .arguments import (
    DataArguments,
    ThinkerArguments,
    argument,
    chat_tokenizer,
    check_model,
    check_numbers,
    check_output,
    cut,
    load_data,
    model_kwargs,
    named_model,
    renamed,
    required,
    revision_of,
    saved_fields,
    thinking_line,
)
from .commands import TASKS
from .help import names_tasks
from .parser import CommandParser


@dataclass
class EvalArguments:
    """What to find out on held-out text. What each field means stands in its `help`."""

    anti_theater: bool = argument(False, "Whether to validate that the thoughts are used.")
    output_file: str | None = argument(None, "JSON file to write the metrics to.")


@dataclass
class TaskArguments(ThinkerArguments):
    """What to run in lm-evaluation-harness. What each field means stands in its `help`."""

    tasks: str | None = argument(None, "Names of lm-eval's tasks, separated by commas.")
    compare: bool = argument(False, "Whether to run without thoughts too, and compare the two document by document.")
    include_path: str | None = argument(None, "Folder with task files of your own.")
    limit: Annotated[int | None, Limits(1)] = argument(None, "Number of documents of each task. None: all.")
    num_fewshot: Annotated[int | None, Limits(0)] = argument(
        None, "Number of examples in the prompt. None: the task's own."
    )
    batch_size: Annotated[int, Limits(1)] = argument(1, "Number of texts at once.")
    output_file: str | None = argument(None, "JSON file to write the outcomes to.")

    def __post_init__(self):
        check_numbers(self)


def run(argv: list[str]) -> None:
    """Evaluates a model on held-out text, or on tasks where a flag names some."""
    evaluate_on_tasks(argv) if names_tasks(argv) else evaluate_on_text(argv)


def evaluate_on_tasks(argv: list[str]) -> None:
    """Runs tasks of lm-evaluation-harness with thoughts, and without them to compare."""
    try:
        from ..evaluation.harness import QuietStarLM, evaluate_tasks, paired_test
    except ImportError as error:
        raise ImportError("`--tasks` needs lm-eval; install it with `pip install trl-quietstar[eval]`.") from error
    argv = renamed(argv, "--model_name_or_path", "--model")
    (args,) = CommandParser((TaskArguments,), "eval", TASKS).parse_args_and_config(argv)
    source, names = required(args, "model", "tasks")
    check_output("output_file", args.output_file)
    hub = revision_of(args)
    check_model(source, **hub)
    model = QuietStarLM(
        source,
        args.think,
        args.think_every,
        args.thinking_threshold,
        trust_remote_code=args.trust_remote_code,
        batch_size=args.batch_size,
        **hub,
    )
    print(f"Thinks {model.thinking}.")
    tasks = [task.strip() for task in names.split(",")]
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


def evaluate_on_text(argv: list[str]) -> None:
    """Evaluates a model on held-out text, by the settings that it was trained with unless others are given."""
    argv = renamed(argv, "--model", "--model_name_or_path")
    parser = CommandParser((EvalArguments, DataArguments, QuietStarConfig, ModelConfig), "eval")
    eval_args, *_, args, model_args = parser.parse_args_and_config(argv)
    check_output("output_file", eval_args.output_file)
    with tempfile.TemporaryDirectory() as scratch:
        source = named_model(model_args, args)
        fields = saved_fields(source, **{"revision": model_args.model_revision, **hub_kwargs(args)})
        if not fields:
            warn_of_untrained_heads(source)
        parser.set_defaults(output_dir=scratch, report_to="none", **fields)
        eval_args, data_args, args, model_args = parser.parse_args_and_config(argv)
        train_dataset, eval_dataset = load_data(data_args, args.dataset_text_field)
        args.model_init_kwargs = model_kwargs(model_args, args)
        trainer = QuietStarREINFORCETrainer(
            model=source,
            args=args,
            eval_dataset=cut(train_dataset, data_args) if eval_dataset is None else eval_dataset,
            processing_class=chat_tokenizer(data_args, source, args),
            quantization_config=get_quantization_config(model_args),
        )
        if trainer.accelerator.is_main_process:
            print(thinking_line(args))
        _report(trainer, eval_args)


def _report(trainer: QuietStarREINFORCETrainer, eval_args: EvalArguments) -> None:
    """Evaluates, prints what was found, and writes the metrics if a file is named."""
    metrics = trainer.evaluate()
    report = trainer.validate_thoughts() if eval_args.anti_theater else None
    if not trainer.accelerator.is_main_process:
        return
    print_thoughts(trainer.sampled_thoughts(), "Thoughts on held-out text")
    print_evaluation(metrics, trainer.args)
    if report is not None:
        print_anti_theater(report)
    if eval_args.output_file is not None:
        validation = {} if report is None else report.metrics()
        found = {**metrics, **{f"anti_theater_{name}": value for name, value in validation.items()}}
        Path(eval_args.output_file).write_text(json.dumps(found, indent=2))
