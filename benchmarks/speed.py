"""What thinking costs in training and generation: time in units of a plain step of the same model, and peak memory.

    python -m benchmarks.speed --output out/speed.json
    python -m benchmarks.speed --output out/speed.json --cases reference checkpointing --repeats 3
    python -m benchmarks.speed --output out/speed.json --skip replay --set temperature=0.9

The model is a random Llama in float32, the reference a text of T = 256 tokens with a thought of L = 7 tokens after each, read
for M = 4. The unit is one plain step of the same model on the same text, forward and backward with labels; it is timed in
alternation with the steps that it measures, and is never checkpointed. No optimizer runs. Medians of all repeats.

- `reference`; `quarter`: a random quarter of the positions; `checkpointing`: by groups of 32 branches, and by layers;
- sweeps: `length` (T), `positions` (J), `thought_length` (L), `num_thoughts` (G); but for `positions` at 64 random positions;
- `replay`: branches as ordinary sequences, once. Its graph would take some 20 GB, so it and its rival are checkpointed;
- `sampling`: thought tokens a second, against TRL's `RLOOTrainer` that continues prefixes of the text as separate prompts;
- `generation`: each way of decoding, in units of plain cached decoding.

Peak memory is what a step, gradients included, takes above the loaded model: resident memory on the CPU (Linux), where freed
memory is returned at once (and once more with what malloc keeps of it), allocated memory on CUDA; each in a fresh process. It
includes the coherence metric, which the first step of each logging window computes; times do not. Metrics and rewards are the
stage `rest`; sampling that happens inside scoring is no stage of its own.

Beside `FILE.json` goes `FILE.png` with the sweeps. `--set` changes the fields of `QuietStarConfig` that a case leaves alone.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from trl import RLOOConfig, RLOOTrainer

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.learning.experience import StepPart
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions, seeded_generators

from .generation import FIXED_WAYS, compare
from .learning import parse
from .measuring import Stopwatch, in_fresh_process, machine, peak_above


MODEL = dict(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1_408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2_048,
)
REFERENCE = dict(
    thought_length=7, talk_length=4, num_thoughts=1, thought_positions="all", gradient_checkpointing=False
)
LENGTH = 256
WARM_UP_LENGTH = 16
RLOO_PROMPTS = 32  # of the text's prefixes, on the CPU; all of them on CUDA
GENERATED_TOKENS = 32
SOME = {"thought_positions": 64}
CHECKPOINTED = {"gradient_checkpointing": True}
# for each case: text lengths, and fields that differ from the reference
CASES: dict[str, list[tuple[int, dict]]] = {
    "reference": [(LENGTH, {})],
    "quarter": [(LENGTH, {"thought_positions": 0.25})],
    "checkpointing": [(LENGTH, {"branch_batch_size": 32}), (LENGTH, CHECKPOINTED)],
    "length": [(length, SOME) for length in (64, 128, 256, 512, 1024)],
    "positions": [(LENGTH, {"thought_positions": count}) for count in (16, 64, 128, "all")],
    "thought_length": [(LENGTH, {**SOME, "thought_length": count}) for count in (3, 7, 15, 31)],
    "num_thoughts": [(LENGTH, {**SOME, "num_thoughts": count}) for count in (1, 2, 4, 8)],
    "replay": [(LENGTH, {"thought_path": "replay", **CHECKPOINTED}), (LENGTH, CHECKPOINTED)],
}
# glibc then gives each freed block of that size back to the system, so that resident memory is memory in use
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}
SWEEPS = {"length": "T", "positions": "J", "thought_length": "L", "num_thoughts": "G"}
DEFINITIONS = {
    "units": "seconds of the step / seconds of the plain step",
    "branch tokens": "J * G * (L + M + 1): start, thought, end and M - 1 talk tokens of each branch",
    "seconds per branch token": "(seconds of the step - seconds of the plain step of the same T) / branch tokens",
    "peak MB": "largest memory in use during the step, above that of the loaded model, in 10^6 bytes",
    "peak MB with what malloc keeps": "the same with freed memory that glibc, by default, does not give back at once",
    "growth per branch token": "seconds per branch token at the largest T / at the smallest",
    "memory growth": "peak MB at the largest T / at the one before",
    "replay / shared prefix": "seconds of the step by replay / by the shared prefix, both with checkpointing",
}


@dataclass(frozen=True)
class Case:
    """What is measured: fields of `LlamaConfig` and of `QuietStarConfig`, and T."""

    model: dict
    options: dict
    length: int

    def inputs(self, length: int | None = None) -> dict[str, torch.Tensor]:
        """A batch of one random text of T tokens, or of `length`."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.model["vocab_size"], (1, length or self.length), generator=generator).to(device())
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def plain_model(self) -> PreTrainedModel:
        """A Llama without heads; the same weights at each call."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**self.model), dtype=torch.float32)

    @contextmanager
    def trainer(self):
        """A trainer of that model."""
        common = dict(max_length=self.length, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none")
        data = Dataset.from_dict({"input_ids": self.inputs()["input_ids"].tolist()})
        with tempfile.TemporaryDirectory() as directory:
            args = QuietStarConfig(directory, **{**common, **self.options})
            trainer = QuietStarREINFORCETrainer(self.plain_model(), args, data, processing_class=tokenizer())
            if args.gradient_checkpointing:  # which is otherwise done by `train()`
                trainer.model.gradient_checkpointing_enable()
            yield trainer


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; the texts are made of ids."""
    words = {"<eos>": 0, "<pad>": 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")


def plain_step(trainer: QuietStarREINFORCETrainer, inputs: dict) -> dict[str, float]:
    """Seconds of a plain step. In `eval()` mode layers are not checkpointed; a Llama has no dropout to lose."""
    watch, model = Stopwatch(), trainer.model.eval()
    with watch.stage("plain"):
        with trainer.accelerator.autocast():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    return watch.seconds


def thinking_step(trainer: QuietStarREINFORCETrainer, inputs: dict, training: bool = True) -> dict[str, float]:
    """Seconds of a step of the trainer, by stage."""
    watch, model = Stopwatch(), trainer.model.train(training)
    sampling = patch.object(trainer.thinker, "sample", watch.timed("sampling", trainer.thinker.sample))
    scoring = patch.object(model, "forward", watch.timed("scoring", model.forward))
    with sampling, scoring, watch.stage("rest"):
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, inputs)
        with watch.stage("backward"):
            loss.backward()
    model.zero_grad(set_to_none=True)
    return watch.seconds


STEPS = {"plain": plain_step, "thinking": thinking_step}


def step_times(case: Case, repeats: int) -> dict:
    """Medians of alternating repeats, and what a branch token costs."""
    with case.trainer() as trainer:
        inputs = case.inputs()
        for step in STEPS.values():
            step(trainer, case.inputs(WARM_UP_LENGTH))
        runs = [{name: step(trainer, inputs) for name, step in STEPS.items()} for _ in range(repeats)]
        J, args = thought_positions(trainer, inputs), trainer.args
    plain = statistics.median(run["plain"]["plain"] for run in runs)
    stages = median_run([run["thinking"] for run in runs])
    seconds = sum(stages.values())
    tokens = J * args.num_thoughts * (args.thought_length + args.talk_length + 1)
    return {
        **dict(T=case.length, J=J, G=args.num_thoughts, L=args.thought_length, M=args.talk_length),
        "plain seconds": plain,
        "step seconds": seconds,
        "units": seconds / plain,
        "units of each repeat": [sum(run["thinking"].values()) / run["plain"]["plain"] for run in runs],
        "stage units": {name: value / plain for name, value in stages.items()},
        "branch tokens": tokens,
        "seconds per branch token": (seconds - plain) / tokens,
    }


def median_run(runs: list[dict[str, float]]) -> dict[str, float]:
    """The one with the median of all stages together, so that its stages add up to that."""
    return sorted(runs, key=lambda stages: sum(stages.values()))[(len(runs) - 1) // 2]


def thought_positions(trainer: QuietStarREINFORCETrainer, inputs: dict) -> int:
    """How many there are in a text (J)."""
    wanted = trainer.args.thought_positions
    return int(choose_positions(Text.from_batch(**inputs), wanted, seeded_generators(0, 0, [0])).mask.sum())


def peak_memory(case: Case, kind: str) -> int:
    """Bytes that a step takes above the loaded model at its peak; for a process that did nothing else."""
    disable_progress_bars()
    with case.trainer() as trainer:
        # libraries allocate at their first use; in training mode coherence would count as logged
        plain_step(trainer, case.inputs(WARM_UP_LENGTH))
        thinking_step(trainer, case.inputs(WARM_UP_LENGTH), training=False)
        inputs = case.inputs()
        return peak_above(lambda: STEPS[kind](trainer, inputs))


def measure(case: Case, repeats: int) -> dict:
    """Time and memory; replay takes minutes and is timed once."""
    if case.options.get("thought_path") == "replay":
        return step_times(case, 1)
    peaks = {kind: in_fresh_process(peak_memory, case, kind, **RETURNS_MEMORY) / 1e6 for kind in STEPS}
    kept = in_fresh_process(peak_memory, case, "thinking") / 1e6
    peaks = {"peak MB": peaks["thinking"], "plain peak MB": peaks["plain"], "peak MB with what malloc keeps": kept}
    return {**step_times(case, repeats), **peaks}


def no_reward(completions, **kwargs) -> list[float]:
    """RLOO does not start without one; nothing is rewarded here."""
    return [0.0] * len(completions)


def rloo_trainer(case: Case, directory: str) -> RLOOTrainer:
    """TRL's, on the same weights without heads, for completions of L tokens."""
    args = RLOOConfig(
        directory,
        max_completion_length=case.options["thought_length"],
        per_device_train_batch_size=2,
        num_generations=2,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    data = Dataset.from_dict({"prompt": ["<pad>"]})
    return RLOOTrainer(case.plain_model(), no_reward, args, data, processing_class=tokenizer())


def sampling_rates(case: Case, repeats: int) -> dict:
    """Thought tokens a second, of ours at all positions and of RLOO's after prefixes of the same mean length."""
    with case.trainer() as trainer, tempfile.TemporaryDirectory() as directory:
        rloo, inputs = rloo_trainer(case, directory), case.inputs()
        text, ids = Text.from_batch(**inputs), inputs["input_ids"][0].tolist()
        J = thought_positions(trainer, inputs)
        ends = torch.linspace(1, J, J if torch.cuda.is_available() else min(J, RLOO_PROMPTS)).round().int().tolist()
        prompts = [ids[:end] for end in ends]
        plain, ours, theirs = [], [], []
        for _ in range(repeats + 1):
            plain.append(plain_step(trainer, inputs)["plain"])
            trainer.model.train()
            plan = trainer.thinker.plan(text, training=True)
            ours.append(rate(lambda plan=plan: int(trainer.thinker.sample(text, StepPart([0]), plan).mask.sum())))
            theirs.append(rate(lambda: sum(map(len, rloo._generate_single_turn(prompts, None, {})))))
    ours_rate, theirs_rate = statistics.median(ours[1:]), statistics.median(theirs[1:])  # the first warms up
    return {
        "plain seconds": statistics.median(plain[1:]),
        "thought tokens per second": ours_rate,
        "RLOO tokens per second": theirs_rate,
        "RLOO prompts": len(prompts),
        "RLOO mean prompt length": statistics.mean(ends),
        "mean prefix length": (J + 1) / 2,
        "ours / RLOO": ours_rate / theirs_rate,
    }


def rate(function) -> float:
    """Of what a function makes and counts, how much a second."""
    watch = Stopwatch()
    count = watch.timed("all", function)()
    return count / watch.seconds["all"]


def generation_cost(case: Case, repeats: int) -> dict:
    """Units of plain cached decoding after the text, beside the time of a plain training step."""
    with case.trainer() as trainer:
        inputs = case.inputs()
        plain = [plain_step(trainer, inputs)["plain"] for _ in range(repeats)]
        model = trainer.model.eval()
        assert model.branches_in_cache  # checked here, ahead of the clock
        medians, _ = compare(model, inputs["input_ids"], FIXED_WAYS, GENERATED_TOKENS, repeats)
    units = {name: median / medians["plain"] for name, median in medians.items()}
    return {"plain seconds": statistics.median(plain), "seconds per plain token": medians["plain"], "units": units}


OTHERS = {"sampling": sampling_rates, "generation": generation_cost}


def summary(name: str, rows: list[dict]) -> dict:
    """What a case says beyond its rows."""
    if name == "length":
        costs, peaks = ([row[key] for row in rows] for key in ("seconds per branch token", "peak MB"))
        return {"growth per branch token": costs[-1] / costs[0], "memory growth": peaks[-1] / peaks[-2]}
    if name == "replay":
        return {"replay / shared prefix": rows[0]["step seconds"] / rows[1]["step seconds"]}
    return {}


def table(rows: dict[str, list[dict]]) -> Table:
    """A line for each row; stages in units."""
    stages = ("sampling", "scoring", "backward", "rest")
    out = Table(
        "case", *"TJGL", "plain s", "step s", "units", *stages, "µs / branch token", "peak MB", "plain peak MB"
    )
    for name, row in ((name, row) for name, group in rows.items() for row in group):
        split = [f"{row['stage units'][stage]:.2f}" if stage in row["stage units"] else "–" for stage in stages]
        peaks = [f"{row[key]:.0f}" if key in row else "–" for key in ("peak MB", "plain peak MB")]
        times = [f"{row['plain seconds']:.3f}", f"{row['step seconds']:.3f}", f"{row['units']:.2f}"]
        cost = f"{1e6 * row['seconds per branch token']:.0f}"
        out.add_row(name, *(str(row[letter]) for letter in "TJGL"), *times, *split, cost, *peaks)
    return out


def plot(rows: dict[str, list[dict]], path: Path) -> None:
    """Units over T, J, L and G, and memory over T, of the sweeps that ran."""
    sweeps = {name: letter for name, letter in SWEEPS.items() if name in rows}
    panels = [(name, letter, ("units",)) for name, letter in sweeps.items()]
    panels += [(name, letter, ("peak MB", "plain peak MB")) for name, letter in sweeps.items() if name == "length"]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), squeeze=False)
    for axis, (name, letter, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            axis.plot([row[letter] for row in rows[name]], [row[key] for row in rows[name]], marker="o", label=key)
        axis.set(title=name.replace("_", " "), xlabel=letter, ylabel=keys[0])
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(name: str, options: dict, repeats: int, measured: dict[str, dict]) -> tuple[list[dict], dict]:
    """The rows of a case and what it says beyond them. `measured` keeps rows, which cases share."""
    if name in OTHERS:
        return [], OTHERS[name](Case(MODEL, options, LENGTH), repeats)
    cases = [Case(MODEL, {**options, **changes}, length) for length, changes in CASES[name]]
    for case in cases:
        if repr(case) not in measured:
            measured[repr(case)] = measure(case, repeats)
    rows = [measured[repr(case)] for case in cases]
    return rows, summary(name, rows)


def main() -> None:
    names = [*CASES, *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--skip", nargs="+", choices=names, default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of QuietStarConfig")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    disable_progress_bars()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    options = {**REFERENCE, **{name: parse(value) for name, value in (option.split("=", 1) for option in args.set)}}
    result = {"machine": machine(), "model": MODEL, "options": options, "repeats": args.repeats}
    result |= {"definitions": DEFINITIONS, "rows": {}, "summary": {}}
    measured: dict[str, dict] = {}
    for name in (name for name in args.cases if name not in args.skip):
        rows, beyond = run(name, options, args.repeats, measured)
        result["rows"] |= {name: rows} if rows else {}
        result["summary"] |= {name: beyond} if beyond else {}
        args.output.write_text(json.dumps(result, indent=2))
        print(f"{name}: done", flush=True)
    plot(result["rows"], args.output.with_suffix(".png"))
    Console(width=160).print(result["machine"], table(result["rows"]), result["summary"])


if __name__ == "__main__":
    main()
