"""Do thoughts beat plain training? LoRA on GSM8K twice, for the same time: learning to think, and the control.

    python examples/gsm8k.py thoughts --minutes 60 --output out/thoughts
    python examples/gsm8k.py plain    --minutes 60 --output out/plain

The control is TRL's `SFTTrainer` with the same adapter, data, order, batch size, learning rate and minutes on the same
machine. The time that thinking costs, the control spends on more text. The same code evaluates both on the same tokens of the
same held-out solutions, and writes the numbers to `results.json`.

`--model` and `--data` take local paths: a model folder, and a JSON-lines file with `question` and `answer`.
"""

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.evaluation.report import print_comparison


class StopAfter(TrainerCallback):
    """Ends training once its time is up."""

    def __init__(self, minutes: float):
        self.seconds, self.start = 60 * minutes, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.perf_counter() - self.start >= self.seconds


def load_problems(data: str, held_out: int) -> tuple[Dataset, Dataset]:
    """Questions as prompts and solutions as completions: for training, and the last `held_out` of them."""
    files = {"path": "json", "data_files": data} if Path(data).is_file() else {"path": data, "name": "main"}
    problems = load_dataset(**files, split="train")
    problems = problems.map(
        lambda row: {"prompt": f"{row['question']}\n", "completion": row["answer"]},
        remove_columns=problems.column_names,
    )
    return problems.select(range(len(problems) - held_out)), problems.select(
        range(len(problems) - held_out, len(problems))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("thoughts", "plain"))
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    train, held_out = load_problems(arguments.data, arguments.held_out)
    shared = {
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "learning_rate": 4e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_steps": 1_000_000,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    }
    thinking = QuietStarConfig(
        arguments.output,
        thought_positions=12,
        thought_length=6,
        talk_length=4,
        num_thoughts=2,
        thought_start_text=" [",
        thought_end_text=" ]",
        thought_stop_string="]",
        beta=0.05,
        policy_coefficient=1.0,
        heads_learning_rate=5e-3,
        per_device_eval_batch_size=4,
        **shared,
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = QuietStarREINFORCETrainer(
        arguments.model, thinking, train_dataset=train, eval_dataset=held_out, peft_config=adapter
    )
    before = trainer.evaluate()
    if arguments.arm == "plain":
        control = SFTTrainer(
            arguments.model,
            SFTConfig(arguments.output, completion_only_loss=True, bf16=thinking.bf16, **shared),
            train_dataset=train,
            callbacks=[StopAfter(arguments.minutes)],
            peft_config=adapter,
        )
        control.train()
        state = control.state
        trainer = QuietStarREINFORCETrainer(control.model, thinking, train_dataset=train, eval_dataset=held_out)
    else:
        trainer.add_callback(StopAfter(arguments.minutes))
        trainer.train()
        state = trainer.state
    after = trainer.evaluate()
    trainer.save_model()
    title = f"{arguments.arm}: {state.global_step} steps in {arguments.minutes:g} minutes"
    print_comparison(before, after, title, trainer.args)
    results = {"arm": arguments.arm, "minutes": arguments.minutes, "steps": state.global_step}
    results |= {"before": before, "after": after, "log": state.log_history}
    Path(arguments.output, "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
