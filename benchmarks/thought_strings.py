"""Which strings should the start and end embeddings begin as? How well an untrained model reads on after each pair.

    python -m benchmarks.thought_strings --model .demo/SmolLM2-135M-Instruct --data .demo/word_problems/test.jsonl

Prints, for thoughts sampled from the untrained model, the NLL (nats a token) of the true next tokens without a thought and
by the thought's prediction alone. `make demo-data` prepares the model and the data.
"""

import argparse
import json

import torch
from transformers import AutoTokenizer

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.learning.rewards import masked_mean
from trl_quietstar.text.batch import Text, talk_after
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.drawing import SamplingSettings, uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score


PAIRS = [
    ("—", "—"),
    ("(", ")"),
    (" (", ")"),
    (" [", " ]"),
    ("\n", "\n"),
    ("...", "..."),
    (" ", " "),
    ("<think>", "</think>"),
]
TALK_LENGTH = 4


@torch.no_grad()
def reading(model, texts: list[Text], thought_length: int) -> tuple[float, float]:
    """NLL of the talk without a thought, and by the thought's prediction, over all texts."""
    path, without, reader = SharedPrefix(), [], []
    for index, text in enumerate(texts):
        generators = seeded_generators(0, 0, [index])
        positions = choose_positions(text, 8, generators)
        settings = SamplingSettings(thought_length)
        thoughts = sample_thoughts(
            model, path.read(model, text), positions, settings, uniforms(positions, settings, generators)
        )
        scores = score(model, ScoreRequest(text, thoughts, TALK_LENGTH, path))
        mask = talk_after(text, positions, TALK_LENGTH).target_mask[:, :, None]
        without.append(-masked_mean(at_talk(scores.text_logps, thoughts, TALK_LENGTH), mask).item())
        reader.append(-masked_mean(scores.reader_logps, mask).item())
    return sum(without) / len(texts), sum(reader) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSON lines with `prompt` and `completion`")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--thought-length", type=int, default=4)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = QuietStarForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    texts = []
    with open(arguments.data) as file:
        for line, _ in zip(file, range(arguments.texts), strict=False):
            row = json.loads(line)
            ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"][:128]])
            prompt = len(tokenizer(row["prompt"])["input_ids"])
            labels = torch.where(torch.arange(ids.shape[1]) < prompt, -100, ids)
            if (labels != -100).any():
                texts.append(Text.from_batch(ids, labels=labels))
    for start, end in PAIRS:
        model.initialize_thought_embeddings(tokenizer, start, end)
        without, reader = reading(model, texts, arguments.thought_length)
        print(f"{start!r:>10} {end!r:<12} without {without:.3f}   reader {reader:.3f}", flush=True)


if __name__ == "__main__":
    main()
