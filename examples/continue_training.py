"""Continues to train a thinking model, on other data or longer. The model may be saved, pushed, or an adapter repository.

    python examples/quickstart.py --output out/quickstart
    python examples/continue_training.py --model out/quickstart --output out/longer

Weights, heads and the settings of thinking come from `--model`. The optimizer starts anew. To resume an interrupted run with
its optimizer and data order, use the run's own script with `trainer.train(resume_from_checkpoint=True)` instead.
"""

import argparse

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.cli import load_splits, saved_fields
from trl_quietstar.evaluation.report import print_comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart", help="thinking model: Hub id or local folder")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="Hub id, local folder or JSON-lines file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="out/longer")
    arguments = parser.parse_args()

    texts = load_splits(arguments.data, None)["train"]
    texts = texts.select(range(min(len(texts), 2_000))).train_test_split(test_size=16, seed=0)
    args = QuietStarConfig(
        arguments.output,
        # thought_length, talk_length, temperature and so on, with the values that the model was trained with
        **{**saved_fields(arguments.model), "thought_positions": 16},
        max_length=128,
        learning_rate=1e-5,
        per_device_train_batch_size=2,
        max_steps=arguments.steps,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = QuietStarREINFORCETrainer(
        arguments.model, args, train_dataset=texts["train"], eval_dataset=texts["test"]
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("before", before)
    trainer.save_metrics("eval", after)
    print_comparison(before, after, f"After {arguments.steps} more steps", trainer.args)


if __name__ == "__main__":
    main()
