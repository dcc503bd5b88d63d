"""What thinking costs in generation, in units of plain cached decoding of the same model, side by side in one run.

    python -m benchmarks.generation --model .demo/SmolLM2-135M-Instruct --output out/generation.json

Each way of decoding emits the same number of tokens after the same context, in alternating repeats; the unit is the median
time of a token by the base model's own `generate`. Adaptive thinking takes the threshold at which a quarter of the emitted
tokens has a thought, or the nearest below.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings


SHARE = 0.25  # of the tokens, with adaptive thinking
FIXED_WAYS = {
    "plain": dict(think="never"),
    "always": dict(think="always"),
    "every 4": dict(think="always", think_every=4),
}


def context_of(tokenizer, data: str, length: int) -> torch.Tensor:
    """The first tokens of the data's texts, one after another: shape `(1, length)`."""
    texts = load_dataset("json", data_files=data, split="train")
    ids = tokenizer("\n".join(str(next(iter(row.values()))) for row in texts.take(2_000)))["input_ids"]
    return torch.tensor([ids[:length]])


def quarter_threshold(model, context: torch.Tensor, tokens: int) -> float:
    """The threshold at which a quarter of the emitted tokens has a thought, by bisection; each run writes its own text."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        share = seconds_per_token(model, context, tokens, think="adaptive", thinking_threshold=middle)[1]
        if share == SHARE:
            return middle
        low, high = (middle, high) if share > SHARE else (low, middle)
    return high


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to print."""


def seconds_per_token(model, context: torch.Tensor, tokens: int, **options) -> tuple[float, float]:
    """Mean time of a token after the first, which pays for the prompt; and the share of those that had a thought."""
    clock, thinks = Clock(), options["think"] != "never"
    if thinks:
        options["return_thoughts"] = True
    options |= dict(do_sample=False, eos_token_id=None, pad_token_id=0, streamer=clock)
    out = model.generate(context, max_new_tokens=1 + tokens, **options)
    seconds = (clock.times[-1] - clock.times[1]) / tokens  # the first call is the prompt's
    written = out.thoughts[0] if thinks else []
    return seconds, sum(thought.position >= context.shape[1] for thought in written) / tokens


def compare(
    model, context: torch.Tensor, ways: dict[str, dict], tokens: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a token by each way of decoding, in alternating repeats; and the share that had a thought."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    share = {}
    for _ in range(repeats):
        for name, options in ways.items():
            seconds, share[name] = seconds_per_token(model, context, tokens, **options)
            times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}, share


def measure(model, tokenizer, data: str, length: int, tokens: int, repeats: int) -> dict:
    """Medians for one context length."""
    context = context_of(tokenizer, data, length)
    threshold = quarter_threshold(model, context, tokens)
    ways = {**FIXED_WAYS, "adaptive": dict(think="adaptive", thinking_threshold=threshold)}
    medians, share = compare(model, context, ways, tokens, repeats)
    return {
        "context": length,
        "seconds per plain token": medians["plain"],
        "units": {name: median / medians["plain"] for name, median in medians.items()},
        "thoughts per token": share,
        "adaptive / always": medians["adaptive"] / medians["always"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".demo/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--data", default=".demo/word_problems/train.jsonl", help="JSON lines; the first column is the text"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--thought_length", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = QuietStarSettings(thought_length=args.thought_length, talk_length=4)
    model = QuietStarForCausalLM.from_pretrained(args.model, settings=settings).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    assert model.branches_in_cache  # checked here, ahead of the clock
    result = {
        "model": args.model,
        "thought_length": args.thought_length,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": [measure(model, tokenizer, args.data, n, args.tokens, args.repeats) for n in args.contexts],
    }
    print(json.dumps(result, indent=2))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
