"""What thoughts that end early, and thoughts that begin alike, cost: tokens that sampling runs for each that exists, and its time.

    python -m benchmarks.early_ends --output out/early_ends.json
    python -m benchmarks.early_ends --temperature 0.01 --texts 32 --length 16 --positions 1 --num_thoughts 8 --thought_length 24

Thoughts at some positions of a few texts, on a random Llama of hidden size 256 and 4 layers. By default their lengths are drawn so that
the mean is an eighth of the longest: each token ends its thought with that probability. At a low temperature the thoughts of a
position begin alike, and hardly any ends.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking import writing
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts

from .replay import Counted


VOCAB = 1024
PATHS = {"attention": SharedPrefix(), "mask": MaskedPrefix(), "replay": Replay()}


def measure(name: str, args: argparse.Namespace) -> dict:
    """Tokens run beyond the texts, tokens that exist, and the median time of sampling in times of what it takes without
    ends, and with a branch for each thought, alternating."""
    torch.manual_seed(0)
    size = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    model = QuietStarForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB, **size)).eval()
    rows = list(range(args.texts))
    text = Text.from_batch(torch.randint(VOCAB, (args.texts, args.length)))
    positions = choose_positions(text, args.positions, seeded_generators(0, 0, rows))
    least = VOCAB - 8 * VOCAB // args.thought_length  # the ids from here on end a thought
    ends = SamplingSettings(
        args.thought_length, args.num_thoughts, temperature=args.temperature, stop=lambda ids: ids[:, -1] >= least
    )
    draws = uniforms(positions, ends, seeded_generators(0, 1, rows))
    without = replace(ends, stop=lambda ids: ids[:, -1] < 0)
    ways = {"with": (ends, writing.JOINED_TEXT), "without": (without, writing.JOINED_TEXT), "apart": (ends, 0)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, (settings, joined) in ways.items():
            with Counted(model) as counted, torch.no_grad(), mock.patch.object(writing, "JOINED_TEXT", joined):
                cache = PATHS[name].read(model, text)
                counted.tokens = 0  # of the texts
                thoughts = sample_thoughts(model, cache, positions, settings, draws)
            seconds[way].append(counted.seconds)
            if way == "with":
                run, existing = counted.tokens, int(thoughts.mask.sum())
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "path": name,
        "thoughts": args.texts * args.positions * args.num_thoughts,
        "tokens that exist": existing,
        "tokens run": run,
        "run for each that exists": round(run / existing, 3),
        "of the time without ends": round(medians["with"] / medians["without"], 3),
        "of the time with a branch for each thought": round(medians["with"] / medians["apart"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=["attention"])
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--positions", type=int, default=8)
    parser.add_argument("--num_thoughts", type=int, default=2)
    parser.add_argument("--thought_length", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=9.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [measure(name, args) for name in args.paths]
    print(json.dumps(rows, indent=2))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
