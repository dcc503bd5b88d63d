"""Trains a causal LM to think on text, shows what it thinks, and generates with thoughts.

    python examples/quickstart.py --steps 200 --output out/quickstart

Without a hub, on what `make demo-data` prepares:

    python examples/quickstart.py --model .demo/SmolLM2-135M-Instruct --data .demo/word_problems/train.jsonl --steps 10
"""

import argparse

from transformers import AutoTokenizer

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer
from trl_quietstar.cli import load_splits
from trl_quietstar.evaluation.report import print_comparison, print_thoughts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or local folder")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="Hub id, local folder or JSON-lines file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="out/quickstart")
    parser.add_argument("--prompt", default="Once upon a time")
    arguments = parser.parse_args()

    texts = load_splits(arguments.data, None)["train"]
    texts = texts.select(range(min(len(texts), 2_000))).train_test_split(test_size=16, seed=0)
    args = QuietStarConfig(
        arguments.output,
        max_length=128,
        thought_positions=16,
        learning_rate=1e-5,
        per_device_train_batch_size=2,
        max_steps=arguments.steps,
        logging_steps=max(arguments.steps // 4, 1),
        log_thoughts=True,
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
    trainer.save_metrics("eval", after)
    print_thoughts(trainer.sampled_thoughts(), "Thoughts on held-out text")
    print_comparison(before, after, f"After {arguments.steps} steps", trainer.args)

    model = QuietStarForCausalLM.from_pretrained(arguments.output)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_thoughts=True)
    print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    for thought in output.thoughts[0]:
        print(f"  after token {thought.position}: {tokenizer.decode(thought.token_ids)!r}")


if __name__ == "__main__":
    main()
