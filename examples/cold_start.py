"""A cold start: a model that cannot think yet imitates written thoughts first, and then finds its own by the answers alone.

    python examples/cold_start.py --imitate 300 --steps 500 --output out/cold_start
    python examples/cold_start.py --imitate 130 --steps 330 --batch-size 128 --learning-rate 2e-4    # on a GPU; not measured

The rows have a column `thought` beside `prompt` and `completion`. While `written_thought_coefficient` is above 0, a row that has a
thought is taught by it, in the very slots in which thoughts are sampled later; a second stage of `curriculum` sets it to 0, and
from then on thoughts are sampled and rewarded by the likelihood of the answer. Problems are sums such as ` 62-35+35=`, with the
running sums as thought. The log has `rl/written_nll` in the first stage; in the second, `rl/mixed_groups` says how much there is
to learn from: the share of problems on which some thoughts help and some do not.

`python -m benchmarks.real` holds the same objective against plain training and against written thoughts alone, with fewer written thoughts and a rate and
batch of their own. There it solved 75% on a GPU, where those solved 29% and 42% (docs/results.md).
"""

import argparse
import random

from datasets import Dataset

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer


def problem(generator: random.Random, terms: int = 3) -> dict[str, str]:
    """A sum of numbers of one or two digits, its running sums, and its answer."""
    total = generator.randint(1, 99)
    prompt = thought = str(total)
    for _ in range(terms - 1):
        number = generator.randint(-99, 99)
        total += number
        prompt += f"{number:+d}"
        thought += f"{number:+d}={total}"
    # a space first: models without a BOS token cannot read the first token, which is a sink of attention
    return {"prompt": f" {prompt}=", "completion": f" {total}", "thought": thought}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or local folder")
    parser.add_argument("--imitate", type=int, default=300, help="steps of the first stage")
    parser.add_argument("--steps", type=int, default=500, help="steps of both stages together")
    parser.add_argument("--batch-size", type=int, default=16, help="problems in a step, each with eight thoughts")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", default="out/cold_start")
    arguments = parser.parse_args()

    generator = random.Random(0)
    held_out = [problem(generator) for _ in range(64)]
    asked = {row["prompt"] for row in held_out}
    rows = [row for row in (problem(generator) for _ in range(8_000)) if row["prompt"] not in asked]
    args = QuietStarConfig(
        arguments.output,
        thought_positions="prompt_end",
        talk_length="completion",
        thought_length=32,
        thought_start_text=" [",
        thought_end_text="]",
        thought_stop_string="]",
        num_thoughts=8,
        reward_prediction="thought",
        reward_type="sequence_probability",  # of the whole answer: a partly right one earns little
        nll_weighting="probability",  # what comes after a wrong thought teaches little
        base_nll_coefficient=0.0,  # the answer without a thought would teach the model to guess
        reader_nll_coefficient=0.0,  # the same as the other one, where the thought's prediction is the only one
        advantage_baseline="leave_one_out",
        positive_advantages_only=True,
        advantage_threshold=0.02,  # thoughts that say nothing new cost no update
        entropy_coefficient=0.0,
        min_entropy_coefficient=0.0,
        curriculum={"0": {}, str(arguments.imitate): {"written_thought_coefficient": 0.0}},
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = QuietStarREINFORCETrainer(
        arguments.model, args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(held_out)
    )
    trainer.train()
    trainer.save_metrics("eval", trainer.evaluate())  # eval_exact_match_with, eval_exact_match_without
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
