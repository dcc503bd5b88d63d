"""Compares ways of thinking on tasks of lm-evaluation-harness: always, where the model is uncertain, and never. Tests are paired.

    python examples/evaluate.py --model out/quickstart --tasks arc_easy --limit 200 --output out/arc_easy.json

Without a hub, on problems that are generated:

    python examples/prepare_tasks.py .demo/tasks
    python examples/evaluate.py --model .demo/out --tasks chain_sum,chain_sum_choice --include-path examples/tasks

Needs `pip install trl-quietstar[eval]`. `trl-quietstar eval --tasks ... --compare` compares one way of thinking with none.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from trl_quietstar.evaluation.harness import QuietStarLM, evaluate_tasks, paired_test
from trl_quietstar.evaluation.report import print_outcomes
from trl_quietstar.thinking.when import Thinking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/quickstart", help="thinking model: Hub id or local folder")
    parser.add_argument("--tasks", default="arc_easy", help="names, separated by commas")
    parser.add_argument("--include-path", help="folder with task files")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", help="JSON file for the outcomes")
    arguments = parser.parse_args()

    tasks = arguments.tasks.split(",")
    model = QuietStarLM(arguments.model, think="never", batch_size=arguments.batch_size)
    plain = evaluate_tasks(model, tasks, arguments.include_path, arguments.limit)
    found = {"never": [asdict(outcome) for outcome in plain]}
    for mode in ("always", "adaptive"):
        model.thinking = Thinking.of(model.thinker.quietstar_settings, mode)
        outcomes = evaluate_tasks(model, tasks, arguments.include_path, arguments.limit)
        p_values = [paired_test(a, b) for a, b in zip(outcomes, plain, strict=True)]
        print(f"Thinking: {mode}")
        print_outcomes(outcomes, plain, p_values)
        found[mode] = [{**asdict(a), "p": p} for a, p in zip(outcomes, p_values, strict=True)]
    if arguments.output is not None:
        Path(arguments.output).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
