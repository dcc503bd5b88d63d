"""Does a model learn to think? A task that cannot be answered directly, but can after a few intermediate steps.

    python -m benchmarks.learning --seeds 0 1 2 --output learning.json

The language is `d1 d2 d3 d4 = a`, `a` being the digits' sum modulo 10. A quarter of the pretraining text answers directly;
the rest writes `= > s1 s2 s3 s4 < a` with the running sum in letters (a right chain) or random letters. Right chains are
60% of those at first and 10% in the last 30% of pretraining, so the pretrained 2-layer Llama reads a right chain without
fail but writes one in about a tenth of its tries only, and answers at chance without.

Quiet-STaR then thinks after `=`, with the start and end embeddings copied from `>` and `<`, 32 problems and 256 thoughts a
step, beside as many texts of the pretraining mix, without which the skill would be forgotten. Everything else is
`QuietStarConfig`'s default, but for the learning rates of a model this small. Thoughts have to be discovered: nothing but
the likelihood of `a` says what a good one is.

Answers are compared among the ten digits, so that no condition loses for predicting `>`.
"""

import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.controls import CONTROLS, controlled
from trl_quietstar.geometry import Text, choose_positions, seeded_generators
from trl_quietstar.sampling import sample_thoughts
from trl_quietstar.scoring import ScoreRequest, at_talk, score


VOCABULARY = [*"0123456789", *"abcdefghij", "=", ">", "<", "<pad>"]
EQUALS, START, END, PAD = (VOCABULARY.index(x) for x in ("=", ">", "<", "<pad>"))
FIRST_LETTER = VOCABULARY.index("a")
TERMS = 4
THOUGHTS = 8
PROBLEMS = 32
IGNORED = -100


def draw_problems(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits and their running sums modulo 10, each of shape `(count, TERMS)`."""
    digits = torch.randint(10, (count, TERMS), generator=generator)
    return digits, digits.cumsum(1) % 10


def draw_texts(count: int, right_chains: float, generator: torch.Generator) -> list[list[int]]:
    """Texts of the language: a quarter direct, the others with a chain that is right with the given probability."""
    digits, sums = draw_problems(count, generator)
    right = torch.rand(count, 1, generator=generator) < right_chains
    chains = FIRST_LETTER + torch.where(right, sums, torch.randint(10, (count, TERMS), generator=generator))
    direct = torch.rand(count, generator=generator) < 0.25
    texts = []
    for row, chain, total, plain in zip(digits.tolist(), chains.tolist(), sums[:, -1].tolist(), direct, strict=True):
        texts.append([*row, EQUALS, *([] if plain else [START, *chain, END]), total])
    return texts


def pretrain(seed: int, steps: int) -> PreTrainedModel:
    """A small Llama that knows the language."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        texts = draw_texts(128, 0.6 if step < 0.7 * steps else 0.1, generator)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True, padding_value=PAD)
        labels = ids.masked_fill(ids == PAD, IGNORED)
        model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a symbol."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def training_data(seed: int, steps: int) -> Dataset:
    """Problems to think about, and texts to remember the language by, in turn."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    digits, sums = draw_problems(PROBLEMS * steps, generator)
    rows = []
    for row, total, text in zip(
        digits.tolist(), sums[:, -1].tolist(), draw_texts(PROBLEMS * steps, 0.1, generator), strict=True
    ):
        problem = [*row, EQUALS, total]
        labels = [IGNORED] * (TERMS + 1) + [total]
        rows.append({"input_ids": problem, "labels": labels, "thought_mask": [0] * TERMS + [1, 0]})
        rows.append({"input_ids": text, "labels": text, "thought_mask": [0] * len(text)})
    return Dataset.from_list(rows)


@torch.no_grad()
def evaluate(trainer: QuietStarREINFORCETrainer, problems: int = 500) -> dict[str, dict[str, float]]:
    """Accuracy and NLL (nats) of held-out answers without a thought, with one, and after each control."""
    digits, sums = draw_problems(problems, torch.Generator().manual_seed(7))
    model = trainer.model.eval()

    def text_with(answers: torch.Tensor) -> Text:
        ids = torch.cat([digits, torch.full((problems, 1), EQUALS), answers[:, None]], dim=1)
        return Text.from_batch(ids, labels=torch.where(torch.arange(TERMS + 2) > TERMS, ids, IGNORED))

    text = text_with(sums[:, -1])
    generators = seeded_generators(7, 0, list(range(problems)))
    positions = choose_positions(text, "all", generators)
    thoughts = sample_thoughts(model, trainer.path.read(model, text), text, positions, trainer.sampling, generators)
    logps = {}
    for control in CONTROLS:
        other = controlled(thoughts, control, len(VOCABULARY), torch.Generator().manual_seed(7))
        candidates = []
        for digit in range(10):
            answer = text_with(torch.full((problems,), digit))
            scores = score(model, ScoreRequest(answer, other, 1, trainer.path, 1.0, trainer.args.reward_prediction))
            candidates.append(scores.talk_logps[:, 0, :, 0])
            if control == "real":
                logps.setdefault("none", []).append(at_talk(scores.text_logps, thoughts, 1)[:, 0, :, 0])
        logps[control] = candidates
    truth = sums[:, -1, None]
    results: dict[str, dict[str, float]] = {"accuracy": {}, "nll": {}}
    for name, candidates in logps.items():
        stacked = torch.stack(candidates, dim=-1)  # (problems, G, 10)
        key = "with" if name == "real" else name
        results["accuracy"][key] = (stacked.argmax(-1) == truth).double().mean().item()
        results["nll"][key] = -stacked.gather(-1, truth[..., None].expand(*stacked.shape[:2], 1)).mean().item()
    letters = FIRST_LETTER + sums[:, None, None]
    results["right_chains"] = (thoughts.token_ids == letters).all(-1).double().mean().item()
    return results


class Until90(TrainerCallback):
    """Notes the step and the time at which accuracy with thoughts first reaches 90%."""

    def __init__(self, every: int):
        self.every, self.steps, self.seconds, self.start = every, None, None, time.perf_counter()
        self.trainer: QuietStarREINFORCETrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps is None and state.global_step % self.every == 0:
            if evaluate(self.trainer, problems=200)["accuracy"]["with"] >= 0.9:
                self.steps, self.seconds = state.global_step, time.perf_counter() - self.start
            self.trainer.model.train()


def run(seed: int, steps: int, pretraining_steps: int, options: dict) -> dict:
    """Pretrains, trains to think, and measures before and after."""
    model = pretrain(seed, pretraining_steps)
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "thought_length": TERMS,
            "talk_length": 1,
            "num_thoughts": THOUGHTS,
            "thought_start_text": ">",
            "thought_end_text": "<",
            "per_device_train_batch_size": 2 * PROBLEMS,
            "max_steps": steps,
            "learning_rate": 3e-4,
            "heads_learning_rate": 1e-3,
            "warmup_steps": 10,
            "lr_scheduler_type": "constant_with_warmup",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "seed": seed,
            **options,
        }
        trainer = QuietStarREINFORCETrainer(
            model, QuietStarConfig(directory, **settings), training_data(seed, steps), processing_class=tokenizer()
        )
        before = evaluate(trainer)
        until = Until90(every=20)
        until.trainer = trainer
        trainer.add_callback(until)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = evaluate(trainer)
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "steps_to_90": until.steps,
        "seconds_to_90": until.seconds,
        "seconds": seconds,
    }


def print_run(result: dict) -> None:
    """A line for each condition."""
    print(f"seed {result['seed']}: 90% after {result['steps_to_90']} steps, {result['seconds']:.0f} s in all")
    print("  condition   accuracy before → after      NLL before → after")
    for name, accuracy in result["before"]["accuracy"].items():
        after, nll = result["after"], result["before"]["nll"][name]
        print(
            f"  {name:<10} {accuracy:>10.3f} → {after['accuracy'][name]:.3f} {nll:>15.3f} → {after['nll'][name]:.3f}"
        )
    print(f"  right chains {result['before']['right_chains']:.3f} → {result['after']['right_chains']:.3f}", flush=True)


def parse(value: str):
    """A field's value from the command line: JSON where it is any, else a string."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pretraining-steps", type=int, default=3_000)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of QuietStarConfig")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    options = {name: parse(value) for name, value in (option.split("=", 1) for option in arguments.set)}
    results = []
    for seed in arguments.seeds:
        results.append(run(seed, arguments.steps, arguments.pretraining_steps, options))
        print_run(results[-1])
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"options": options, "steps": arguments.steps, "seeds": results}, file, indent=2)


if __name__ == "__main__":
    main()
