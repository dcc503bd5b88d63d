"""Two rewards together: whether the model's own answer is right, and how likely thoughts make the right one.

    python examples/exact_match.py --weights 1 0.5 --output out/exact

An exact match is what one wants in the end, but it is 0 for most thoughts of a model that has learned little. The probability of the
right answer tells such thoughts apart. Their weighted sum is the reward, and the log has each by itself: `rl/rewards/exact_match/mean`
and `rl/rewards/sequence_probability/mean`. The same on the command line, for data with the columns `prompt`, `completion` and `answer`:

    trl-quietstar train --reward_functions exact_match sequence_probability --reward_weights 1 0.5 \\
        --thought_positions prompt_end --talk_length completion ...
"""

import argparse

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.cli import load_splits


def short(row: dict) -> dict:
    """A problem whose completion is the final answer alone, which thoughts have to prepare."""
    answer = row["answer"].split("####")[-1].strip()
    return {"prompt": f"{row['question']}\nAnswer:", "completion": f" {answer}", "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or local folder")
    parser.add_argument(
        "--data", default="openai/gsm8k", help="Hub id or JSON-lines file with `question` and `answer`"
    )
    parser.add_argument("--config", default=None, help="configuration of the data; `main` of GSM8K")
    parser.add_argument("--weights", type=float, nargs=2, default=[1.0, 0.5], help="of exact match and probability")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="out/exact_match")
    arguments = parser.parse_args()

    config = arguments.config or ("main" if arguments.data == "openai/gsm8k" else None)
    problems = load_splits(arguments.data, config)["train"]
    problems = problems.map(short, remove_columns=["question"])
    args = QuietStarConfig(
        arguments.output,
        reward_functions=["exact_match", "sequence_probability"],
        reward_weights=arguments.weights,
        thought_positions="prompt_end",
        talk_length="completion",
        num_thoughts=4,
        advantage_baseline="leave_one_out",
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        max_steps=arguments.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = QuietStarREINFORCETrainer(arguments.model, args, train_dataset=problems)
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # with the log


if __name__ == "__main__":
    main()
