"""`trl-quietstar train`: trains from a recipe, with an evaluation before and after."""

import os
import sys
from typing import NamedTuple, cast

from datasets import Dataset
from huggingface_hub import HfApi
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..config import QuietStarConfig
from ..evaluation.report import print_anti_theater, print_comparison, print_evaluation, print_teaching, print_thoughts
from ..trainer import QuietStarREINFORCETrainer
from .arguments import DataArguments, chat_tokenizer, load_data, model_kwargs, named_model
from .parser import CommandParser
from .preview import print_fields, print_rows


class Asked(NamedTuple):
    """What a command line asks for, and which fields it gives."""

    data: DataArguments
    args: QuietStarConfig
    model: ModelConfig
    given: list[str]

    @classmethod
    def of(cls, argv: list[str], name: str) -> "Asked":
        """Reads recipe and flags of a command that takes what training takes."""
        parser = CommandParser((DataArguments, QuietStarConfig, ModelConfig), name)
        data_args, args, model_args = parser.parse_args_and_config(argv)
        _check_adapter_options(parser.given)
        sys.path.append(os.getcwd())  # `reward_functions` may name modules there; a console script does not look in it
        return cls(data_args, args, model_args, parser.given)

    def trainer(self) -> QuietStarREINFORCETrainer:
        """The trainer of the run, its data read and its model loaded."""
        data_args, args, model_args, _ = self
        source = named_model(model_args, args)
        train_dataset, eval_dataset = load_data(data_args, args.dataset_text_field)
        args.model_init_kwargs = model_kwargs(model_args, args)
        return QuietStarREINFORCETrainer(
            model=source,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=chat_tokenizer(data_args, source, args),
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )


def _check_adapter_options(given: list[str]) -> None:
    """Refuses options that nothing would read, so that no run trains all weights, or none in 4 bits, where they ask for others."""
    asks = {"lora_": "use_peft", "use_rslora": "use_peft", "use_dora": "use_peft"}
    asks |= {"bnb_4bit_": "load_in_4bit", "use_bnb_": "load_in_4bit"}
    for name in given:
        for beginning, needed in asks.items():
            if name.startswith(beginning) and needed not in given:
                raise ValueError(f"`{name}` has no effect without `{needed}`; set `{needed}: true`, or leave it out.")


def run(argv: list[str]) -> None:
    """Trains from a recipe: shows what was asked for, evaluates, trains, evaluates again, prints what changed, and saves."""
    asked = Asked.of(argv, "train")
    data_args, args = asked.data, asked.args
    if args.push_to_hub:
        _check_hub(args)
    trainer = asked.trainer()
    if trainer.accelerator.is_main_process:
        print_fields(asked, "train")
        print_rows(trainer, 1)
    checkpoint = trainer.find_checkpoint(_truth(args.resume_from_checkpoint))  # refused before anything is computed
    before = trainer.evaluate() if trainer.eval_dataset is not None else None
    if before is not None and trainer.accelerator.is_main_process:
        print_evaluation(before, args, "Before training")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_locally(str(args.output_dir))
    if before is not None:
        after = _last_evaluation(trainer) or trainer.evaluate()
        trainer.save_metrics("eval", after)
        if trainer.accelerator.is_main_process:
            print_thoughts(trainer.sampled_thoughts(), "Thoughts on held-out text")
            print_comparison(before, after, f"After {trainer.state.global_step} steps", args)
            if args.thought_positions != "none" and not data_args.dataset_streaming:
                print_teaching(*_taught(trainer))
    if args.anti_theater_steps is not None:
        # made as training ended, unless it rolled back
        report = trainer.anti_theater.report or trainer.validate_thoughts()
        if trainer.accelerator.is_main_process:
            print_anti_theater(report)
    trainer.create_model_card()
    if trainer.accelerator.is_main_process:
        print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        _push(trainer)


def _last_evaluation(trainer: QuietStarREINFORCETrainer) -> dict[str, float] | None:
    """The last evaluation in training, if it was of the very model that training returned."""
    args, state = trainer.args, trainer.state
    entry: dict = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {"step": None})
    is_other = args.load_best_model_at_end and state.best_global_step != state.global_step
    rolls_back = args.anti_theater_steps is not None and args.anti_theater_action == "rollback"
    if entry["step"] != state.global_step or is_other or rolls_back:
        return None
    return {name: value for name, value in entry.items() if name != "step"}


def _taught(trainer: QuietStarREINFORCETrainer) -> tuple[int, int]:
    """How many rows of the training data held a written thought that was trained in some stage, and how many rows there are."""
    stages, dataset = trainer.args.stages, cast(Dataset, trainer.train_dataset)
    is_taught = any(stages.at(step)["written_thought_coefficient"] > 0 for step in stages.starts)
    written = dataset["written_ids"] if is_taught and "written_ids" in dataset.column_names else []
    return sum(map(bool, written)), len(dataset)


def _check_hub(args: QuietStarConfig) -> None:
    """Refuses to train for a Hub that would take nothing: it is out of reach, or does not know the user."""
    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:  # of several libraries
        raise ConnectionError(
            f"`push_to_hub` needs the Hub ({_first_line(error)}). Log in by `hf auth login` where it can be reached, or leave "
            "`push_to_hub` out and upload the folder later: `hf upload REPOSITORY FOLDER`."
        ) from error


def _push(trainer: QuietStarREINFORCETrainer) -> None:
    """Uploads what was trained; if that fails, what was trained is on disk all the same."""
    try:
        trainer.push_to_hub()
    except Exception as error:
        raise ConnectionError(
            f"What was trained is in {trainer.args.output_dir!r}, and could not be pushed ({_first_line(error)}). Upload it later: "
            f"`hf upload REPOSITORY {trainer.args.output_dir}`."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _truth(value: str | bool | None) -> str | bool | None:
    """A switch that the command line gives as a word: `true` is the last checkpoint, and no folder of that name."""
    return {"true": True, "false": False}.get(str(value).lower(), value)
