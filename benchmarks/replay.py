"""What replay costs a model whose masks or states cannot branch, with the family's cache and without: tokens read and seconds.

    python -m benchmarks.replay --output out/replay.json

Sampling thoughts at some positions of a text, and generating a few tokens after it, on random models of hidden size 256 and 4
layers. Both ways write the same thoughts and the same text.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import BloomConfig, MambaConfig, Qwen3NextConfig

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.base import BranchPath
from trl_quietstar.branches.replay import Replay
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.check import choose_path
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts


SIZE = dict(vocab_size=1024, hidden_size=256, pad_token_id=0, bos_token_id=0, eos_token_id=0)
CONFIGS = {
    "mamba": MambaConfig(num_hidden_layers=4, **SIZE),
    "qwen3_next": Qwen3NextConfig(
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        **SIZE,
    ),
    "bloom": BloomConfig(n_layer=4, n_head=4, **SIZE),
}


class Counted:
    """Counts the tokens that a model's forward reads, and takes the time."""

    def __init__(self, model):
        self.model, self.tokens = model, 0

    def __enter__(self) -> "Counted":
        self.plain = type(self.model).forward

        def forward(module, *args, **kwargs):
            self.tokens += kwargs["inputs_embeds"].shape[:2].numel()
            return self.plain(module, *args, **kwargs)

        type(self.model).forward = forward
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.start
        type(self.model).forward = self.plain


def sample(model, path: BranchPath, args: argparse.Namespace) -> Counted:
    """Thoughts at the positions of one text."""
    text = Text.from_batch(torch.randint(1, 1024, (1, args.length), generator=torch.Generator().manual_seed(0)))
    positions = choose_positions(text, args.positions, seeded_generators(0, 0, [0]))
    settings = SamplingSettings(args.thought_length, args.num_thoughts)
    draws = uniforms(positions, settings, seeded_generators(0, 1, [0]))
    with Counted(model) as counted, torch.no_grad():
        sample_thoughts(model, path.read(model, text), positions, settings, draws)
    return counted


def generate(model, path: BranchPath, args: argparse.Namespace) -> Counted:
    """New tokens after a text, each with a thought."""
    model.thought_path = path
    ids = torch.randint(1, 1024, (1, args.length), generator=torch.Generator().manual_seed(0))
    with Counted(model) as counted:
        model.generate(ids, max_new_tokens=args.tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return counted


def measure(name: str, args: argparse.Namespace) -> dict:
    """Tokens read and median seconds of each way, alternating."""
    torch.manual_seed(0)
    settings = QuietStarSettings(thought_length=args.thought_length)
    model = QuietStarForCausalLM.from_config(CONFIGS[name], settings).eval()
    ways = {"again": Replay(), "cached": choose_path(model, "replay")}
    row: dict = {"model": name, "by token": getattr(ways["cached"], "by_token", None)}
    for task in (sample, generate):
        runs: dict[str, list[Counted]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, path in ways.items():
                runs[way].append(task(model, path, args))
        row[task.__name__] = {
            way: {"tokens": counted[0].tokens, "seconds": statistics.median(c.seconds for c in counted)}
            for way, counted in runs.items()
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--num_thoughts", type=int, default=2)
    parser.add_argument("--thought_length", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [measure(name, args) for name in args.models]
    print(json.dumps(rows, indent=2))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
