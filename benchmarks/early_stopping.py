"""How much training time does early stopping save, and what does it cost in reward?

    python -m benchmarks.early_stopping --seeds 0 1 2 --output early_stopping.json

The learning benchmark with the schedule of `recipes/iss007.yaml` at a tenth of its length: 1,000 steps, an evaluation every
50, threshold 0.001. It is run to the end, and again with each patience; the best model is restored in all of them. Saved is
the wall time, evaluations included.
"""

import copy
import json
import tempfile
import time

from transformers import PreTrainedModel

from trl_quietstar import QuietStarREINFORCETrainer

from .learning import (
    HELD_OUT,
    TASKS,
    Task,
    accuracies,
    benchmark_parser,
    configuration,
    held_out_data,
    pretrain,
    tokenizer,
    training_data,
)


STEPS, EVERY, THRESHOLD = 1_000, 50, 0.001
PATIENCES = (10, 5, 3)


def run(task: Task, model: PreTrainedModel, seed: int, patience: int | None) -> dict:
    """One run with early stopping, or to the end."""
    with tempfile.TemporaryDirectory() as directory:
        args = configuration(
            task,
            directory,
            seed,
            STEPS,
            eval_strategy="steps",
            eval_steps=EVERY,
            save_strategy="best",
            save_total_limit=1,
            load_best_model_at_end=True,
            early_stopping_patience=patience,
            early_stopping_threshold=THRESHOLD,
        )
        trainer = QuietStarREINFORCETrainer(
            copy.deepcopy(model), args, training_data(task, seed, STEPS), held_out_data(task), tokenizer()
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        accuracy, _ = accuracies(trainer, task, HELD_OUT)
    return {
        "patience": patience,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "best_reward": trainer.state.best_metric,
        "accuracy": accuracy,
    }


def main() -> None:
    arguments = benchmark_parser(__doc__).parse_args()
    task, results = TASKS["easy"], {}
    for seed in arguments.seeds:
        model = pretrain(task, seed, arguments.pretraining_steps)
        full, *stopped = results[seed] = [run(task, model, seed, patience) for patience in (None, *PATIENCES)]
        for result in (full, *stopped):
            result["saved"] = 1 - result["seconds"] / full["seconds"]
            print(
                f"seed {seed}, patience {result['patience']}: {result['steps']} steps, {result['seconds']:.0f} s "
                f"({result['saved']:+.0%} saved), best reward {result['best_reward']:.4f}, "
                f"accuracy with thoughts {result['accuracy']:.3f}",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
