"""Processor time and peak memory of a step with long thoughts, as RLP has them: one position of a text, thoughts scored two at a time.

    python -m benchmarks.long_thoughts --output out/long_thoughts.json

A random Llama (hidden 128, 2 layers, 4 heads, vocabulary 1,024) in float32, a text of 64 tokens, 4 thoughts of exactly L tokens:
none may end early. The fields are those of `recipes/rlp.yaml`, the reference included. Memory is what a step, gradients included,
takes above the loaded model and its reference, each in a fresh process; `one_pass` is the same with sampling in the graph of
training, which keeps every thought's keys and values of every step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer

from .measuring import in_fresh_process, machine, peak_above
from .speed import tokenizer


LENGTHS = (256, 512, 1024, 2048)
MODEL = dict(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=8192,
)
RLP = dict(
    thought_positions=1,
    talk_length=1,
    num_thoughts=4,
    temperature=0.7,
    reward_type="log_likelihood",
    reward_prediction="thought",
    no_thought_model="reference",
    advantage_baseline="leave_one_out",
    nll_coefficient=0.0,
    base_nll_coefficient=0.0,
    reader_nll_coefficient=0.0,
    entropy_coefficient=0.0,
    min_entropy_coefficient=0.0,
)
WAYS = {"groups": dict(branch_batch_size=2), "one_pass": dict(single_pass=True)}
LONGEST_IN_ONE_PASS = 512  # four times the memory at twice the length


def measure(length: int, way: str) -> dict[str, float]:
    """Processor seconds and peak MB of a step, the first one."""
    disable_progress_bars()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Dataset.from_dict({"input_ids": [torch.randint(MODEL["vocab_size"], (64,)).tolist()]})
    with tempfile.TemporaryDirectory() as folder:
        options = dict(per_device_train_batch_size=1, use_cpu=True, report_to="none", thought_length=length)
        trainer = QuietStarREINFORCETrainer(
            LlamaForCausalLM(LlamaConfig(**MODEL)),
            QuietStarConfig(folder, **RLP, **WAYS[way], **options),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        start = time.process_time()
        peak = peak_above(lambda: trainer.training_step(trainer.model.train(), dict(batch)))
    return {"seconds": time.process_time() - start, "peak_mb": peak / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    rows = []
    for way in args.ways:
        for length in args.lengths:
            if way == "one_pass" and length > LONGEST_IN_ONE_PASS:
                continue
            rows.append({"way": way, "thought_length": length, **in_fresh_process(measure, length, way)})
            print("{way}, {thought_length} tokens: {seconds:.1f} s, {peak_mb:.0f} MB".format(**rows[-1]), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine(), "steps": rows}, indent=2))


if __name__ == "__main__":
    main()
