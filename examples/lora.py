"""Trains an adapter to think, loads it back, and merges it into a whole model.

    python examples/lora.py --model HuggingFaceTB/SmolLM2-135M --steps 200 --output out/lora

`out/lora` then holds the adapter and the thinking heads (23 MB for SmolLM2-135M). `out/lora/merged` holds a whole thinking
model, which `AutoModelForCausalLM` loads too. Needs `pip install trl-quietstar[peft]`.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from trl_quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarREINFORCETrainer
from trl_quietstar.cli import load_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or local folder")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="Hub id, local folder or JSON-lines file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="out/lora")
    arguments = parser.parse_args()

    texts = load_splits(arguments.data, None)["train"]
    trainer = QuietStarREINFORCETrainer(
        arguments.model,
        QuietStarConfig(
            arguments.output,
            max_length=128,
            thought_positions=16,
            learning_rate=1e-4,
            heads_learning_rate=1e-3,
            per_device_train_batch_size=2,
            max_steps=arguments.steps,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=texts.select(range(min(len(texts), 2_000))),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()

    adapted = QuietStarForCausalLM.from_pretrained(arguments.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    ids = tokenizer("Three plus four is seven.", return_tensors="pt").input_ids
    with_adapter, _ = adapted.log_likelihoods(ids)
    merged = adapted.merge_and_unload()
    with_merged, _ = merged.log_likelihoods(ids)
    torch.testing.assert_close(with_merged, with_adapter, rtol=0, atol=1e-2)
    merged.save_pretrained(f"{arguments.output}/merged")
    tokenizer.save_pretrained(f"{arguments.output}/merged")
    print(f"Adapter in {arguments.output}, merged model in {arguments.output}/merged")


if __name__ == "__main__":
    main()
