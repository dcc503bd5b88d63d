"""Is the estimate of memory right? What a token keeps for the backward: estimated, and measured in longer forwards.

    python -m benchmarks.plan --output out/plan.json

The model has the shapes of SmolLM2-135M, with random weights, trained whole or with LoRA on all linear layers. `estimate` is what
the trainer plans by, the difference of two short forwards. `one forward` is what a single one of 32 tokens would say, in which
autocast's copies of weights count as if they grew with the tokens. `measured` is the difference of forwards of 256 and 512
tokens. `branches` is how many of 25 slots after a text of 256 tokens would then fit into 8 GiB.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_quietstar.branches.memory import Size, branches_that_fit, kept_by_forward, kept_per_token

from .gpu import SMOLLM2


ONE, LONG = 32, (256, 512)  # tokens
SIZE = Size(rows=1, text_length=256, branches=10**6, slots=25)
FREE = 8 * 2**30
# name: dtype of the weights, and whether autocast computes in bf16
PRECISIONS = {
    "float32": (torch.float32, False),
    "float32, bf16 autocast": (torch.float32, True),
    "bf16 weights": (torch.bfloat16, False),
    "bf16 weights, bf16 autocast": (torch.bfloat16, True),
}


def measure(precision: str, lora: bool) -> dict[str, float]:
    """Bytes a token, and branches that fit by each."""
    dtype, autocast = PRECISIONS[precision]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2, max_position_embeddings=1024), dtype=dtype).train()
    if lora:
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        short, long = kept_by_forward(model, LONG[0]), kept_by_forward(model, LONG[1])
        found = {
            "one forward": kept_by_forward(model, ONE) / ONE,
            "estimate": kept_per_token(model),
            "measured": (long - short) / (LONG[1] - LONG[0]),
        }
    return {**found, **{f"branches by {name}": branches_that_fit(x, SIZE, FREE) for name, x in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    columns = ("one forward", "estimate", "measured")
    table = Table("precision", "trained", *(f"{name}, MiB" for name in columns), "estimate / measured", "branches")
    outcomes = {}
    for precision in PRECISIONS:
        for lora in (False, True):
            trained = "LoRA" if lora else "all weights"
            found = outcomes[f"{precision}; {trained}"] = measure(precision, lora)
            ratio = found["estimate"] / found["measured"]
            branches = " → ".join(str(found[f"branches by {name}"]) for name in ("one forward", "estimate"))
            sizes = (f"{found[name] / 2**20:.2f}" for name in columns)
            table.add_row(precision, trained, *sizes, f"{ratio:.2f}", branches)
    Console().print(table)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    main()
