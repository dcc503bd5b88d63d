"""Makes the documents of the local tasks in `examples/tasks`, without a hub.

The problems are reasoning-gym's `chain_sum` and `gsm_symbolic`, generated from seeds that `examples/prepare_demo.py` does not
train on. GSM8K is no part of this project: `--gsm8k` takes its file, JSON lines with `question` and `answer`. The last problems
of the file become documents, and the ones before them become examples for the prompt.

    python examples/prepare_tasks.py .demo/tasks --gsm8k gsm8k_train.jsonl
    trl-quietstar eval --model .demo/out --include_path examples/tasks --tasks chain_sum,gsm_symbolic_solution --compare
"""

import argparse
import json
import random
from pathlib import Path

import reasoning_gym


EXAMPLES = 8  # for prompts
NEAR_MISSES = (-10, -2, -1, 1, 2, 10)


def chain_sums(size: int, seed: int) -> list[dict]:
    """Sums of two or three numbers below 100, with the answer among three near misses."""
    options = dict(min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    draw, documents = random.Random(seed), []
    for problem in reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **options):
        answer = int(problem["answer"])
        choices = [answer, *(answer + miss for miss in draw.sample(NEAR_MISSES, 3))]
        draw.shuffle(choices)
        question = f"{problem['metadata']['expression']} ="
        documents.append({"question": question, "choices": [str(x) for x in choices], "label": choices.index(answer)})
    return documents


def word_problems(size: int, seed: int) -> list[dict]:
    """Word problems with worked solutions, in GSM8K's format."""
    return [
        {"question": problem["question"].split(" Give the result")[0], "answer": problem["metadata"]["answer_cot"]}
        for problem in reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    ]


def gsm8k(path: Path, size: int) -> list[dict]:
    """The last problems of the file."""
    lines = path.read_text(encoding="utf-8").splitlines()[-size:]
    return [json.loads(line) for line in lines]


def write(folder: Path, documents: list[dict]) -> None:
    """Writes the splits of a dataset: a few examples as `train`, the rest as `test`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", documents[:EXAMPLES]), ("test", documents[EXAMPLES:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gsm8k", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--size", type=int, default=200, help="documents of each task")
    arguments = parser.parse_args()
    size = EXAMPLES + arguments.size
    write(arguments.directory / "chain_sum", chain_sums(size, seed=2))
    write(arguments.directory / "gsm_symbolic", word_problems(size, seed=2))
    if arguments.gsm8k is None or not arguments.gsm8k.is_file():
        where = "no --gsm8k was given" if arguments.gsm8k is None else f"there is no file {arguments.gsm8k}"
        print(f"Skipped the tasks gsm8k_solution and gsm8k_written: {where}.")
        return
    write(arguments.directory / "gsm8k", gsm8k(arguments.gsm8k, size))


if __name__ == "__main__":
    main()
