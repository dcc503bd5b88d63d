"""What thinking costs on an accelerator: training, sampling, scoring and generation.

    python -m benchmarks.gpu --output out/gpu.json
    python -m benchmarks.gpu --output out/gpu.json --models llama-1b --set num_thoughts=8
    python -m benchmarks.gpu --output out/gpu.json --cpu --repeats 1    # tiny models on the CPU: does it run?

The models are SmolLM2-135M (from `--model`, a local folder, where it exists) and a Llama of 1.24 billion parameters (the shapes
of Llama 3.2 1B), each trained whole and with LoRA on all linear layers, by the trainer's own defaults: bfloat16 where the device
has it. A batch is B texts of T tokens with J thought positions, G thoughts of L tokens at each, read for M tokens. Weights that
are not there, and all texts, are random: nothing here depends on them.

The unit is one plain step of the same model on the same texts, forward and backward with labels, in alternation with what it
measures. No optimizer runs. Launches are counted in one more step, by PyTorch's profiler. The file is written after each
measure. Without an accelerator nothing is measured, and launches and waits of a step are those of the faked device
(`tests/fake_device.py`), which needs `g++`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.branches import cuda_graph
from trl_quietstar.learning.experience import StepPart
from trl_quietstar.model.adapters import base_of
from trl_quietstar.text.batch import Text

from .generation import FIXED_WAYS, compare
from .learning import parse
from .measuring import LAUNCHES, WAITS, calls, machine, peak_above
from .speed import median_run, plain_step, rate, thinking_step, tokenizer


SMOLLM2 = dict(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
LLAMA_1B = dict(
    vocab_size=128_256,
    hidden_size=2_048,
    intermediate_size=8_192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
)
MODELS = {"smollm2-135m": SMOLLM2, "llama-1b": LLAMA_1B}
TINY = dict(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BATCH = dict(texts=8, length=512)
OPTIONS = dict(thought_positions=64, num_thoughts=4, thought_length=16, talk_length=8, gradient_checkpointing=False)
TINY_BATCH = dict(texts=2, length=24)
TINY_OPTIONS = dict(thought_positions=3, num_thoughts=2, thought_length=3, talk_length=4, gradient_checkpointing=False)
LORA = dict(target_modules="all-linear", r=16)
CONTEXT, GENERATED_TOKENS = 256, 32
NOT_MEASURED = "not measured"
COLUMNS = {  # of the table: its title, the key of a row, and how a number is printed
    "plain s": ("plain seconds", "{:.3f}"),
    "step s": ("step seconds", "{:.3f}"),
    "units": ("units", "{:.2f}"),
    "text tokens/s": ("text tokens per second", "{:,.0f}"),
    "TFLOP/s": ("TFLOP/s", "{:.1f}"),
    "peak GB": ("peak GB", "{:.2f}"),
    "sampled tokens/s": ("thought tokens per second", "{:,.0f}"),
    "… by kernel": ("thought tokens per second, by kernel", "{:,.0f}"),
    "scored tokens/s": ("scored tokens per second", "{:,.0f}"),
    "units a generated token": ("generation units", "{:.1f}"),
    "launches a step": ("launches", "{:,.0f}"),
    "waits a step": ("waits", "{:,.0f}"),
}
DEFINITIONS = {
    "units": "seconds of the step / seconds of the plain step",
    "text tokens per second": "B * T / seconds of the step",
    "TFLOP/s": "6 * parameters * (B * T + B * J * G * (L + M + 1)) / seconds of the step / 10^12",
    "peak GB": "largest memory in use during the step, gradients included, above that of the loaded model, in 10^9 bytes",
    "thought tokens per second": "of sampling alone, without gradient",
    "thought tokens per second, by kernel": "the same without CUDA graphs",
    "scored tokens per second": "text tokens, by log_likelihoods with a thought before each",
    "generation units": "seconds of a token with a thought before it / of a plain cached one, after a context of 256 tokens",
    "launches, waits": "kernels that a step launches, and how often the host waits for the device in it; on the faked device where "
    "there is none, there in one pass",
}


@dataclass(frozen=True)
class Case:
    """What is measured: a model, how it is trained, and the batch."""

    name: str
    shape: dict
    folder: str | None
    lora: bool
    options: dict
    texts: int
    length: int
    cpu: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.cpu else torch.accelerator.current_accelerator()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random texts, without padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, self.shape["vocab_size"], (self.texts, self.length), generator=generator).to(
            self.device
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def plain_model(self):
        """A causal LM without heads, in float32."""
        if self.folder is not None:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        torch.manual_seed(0)
        config = LlamaConfig(**self.shape, max_position_embeddings=8_192, tie_word_embeddings=True)
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    @contextmanager
    def trainer(self):
        """A trainer of that model."""
        data = Dataset.from_dict({"input_ids": self.inputs()["input_ids"].tolist()})
        own = dict(max_length=self.length, use_cpu=self.cpu, report_to="none", per_device_train_batch_size=self.texts)
        adapter = LoraConfig(**LORA) if self.lora else None
        with tempfile.TemporaryDirectory() as directory:
            args = QuietStarConfig(directory, **{**own, **self.options})
            model = self.plain_model()
            yield QuietStarREINFORCETrainer(model, args, data, processing_class=tokenizer(), peft_config=adapter)


def step_row(case: Case, trainer: QuietStarREINFORCETrainer, repeats: int) -> dict:
    """Time of a step, by stage, and its memory."""
    inputs, args = case.inputs(), trainer.args
    plain_step(trainer, inputs)
    thinking_step(trainer, inputs)  # the first of a logging window computes more, and plans
    runs = [(plain_step(trainer, inputs)["plain"], thinking_step(trainer, inputs)) for _ in range(repeats)]
    plain, stages = statistics.median(run[0] for run in runs), median_run([run[1] for run in runs])
    seconds, branches = sum(stages.values()), args.thought_positions * args.num_thoughts
    tokens = case.texts * (case.length + branches * (args.thought_length + args.talk_length + 1))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return {
        "plain seconds": plain,
        "step seconds": seconds,
        "units": seconds / plain,
        "stage units": {name: value / plain for name, value in stages.items()},
        "text tokens per second": case.texts * case.length / seconds,
        "TFLOP/s": 6 * parameters * tokens / seconds / 1e12,
        "peak GB": peak_above(lambda: thinking_step(trainer, inputs)) / 1e9,
    }


def sampling_row(case: Case, trainer: QuietStarREINFORCETrainer, repeats: int) -> dict:
    """Thought tokens a second, without gradient."""
    text = Text.from_batch(**case.inputs())
    trainer.model.train()
    part, plan = StepPart(list(range(case.texts))), trainer.thinker.plan(text, training=True)

    def sample() -> int:
        with trainer.accelerator.autocast():
            return int(trainer.thinker.sample(text, part, plan).mask.sum())

    def tokens_a_second() -> float:
        return statistics.median([rate(sample) for _ in range(repeats + 1)][1:])

    with patch.object(cuda_graph, "can_record", lambda device: False):
        one_by_one = tokens_a_second()
    return {"thought tokens per second": tokens_a_second(), "thought tokens per second, by kernel": one_by_one}


def scoring_row(case: Case, trainer: QuietStarREINFORCETrainer, repeats: int) -> dict:
    """Text tokens a second that are scored with thoughts."""
    model, inputs = base_of(trainer.model), case.inputs()

    def scored() -> int:
        with trainer.accelerator.autocast():
            return model.log_likelihoods(inputs["input_ids"], inputs["attention_mask"])[0].numel()

    return {"scored tokens per second": statistics.median([rate(scored) for _ in range(repeats + 1)][1:])}


def generation_row(case: Case, trainer: QuietStarREINFORCETrainer, repeats: int) -> dict:
    """Units of plain cached decoding, of one text."""
    model, context = base_of(trainer.model), case.inputs()["input_ids"][:1, :CONTEXT]
    assert model.branches_in_cache  # checked here, ahead of the clock
    with trainer.accelerator.autocast():
        compare(model, context, FIXED_WAYS, 2, 1)
        medians, _ = compare(model, context, FIXED_WAYS, min(GENERATED_TOKENS, case.length), repeats)
    units = {name: median / medians["plain"] for name, median in medians.items()}
    return {"seconds per plain token": medians["plain"], "generation units": units}


def launches_row(case: Case, trainer: QuietStarREINFORCETrainer, repeats: int) -> dict:
    """Kernels and waits of a step, by PyTorch's profiler; without an accelerator, or on the CPU, by the faked one."""
    if case.cpu or not torch.accelerator.is_available():
        return faked_launches(case.name, case.lora)
    inputs, model = case.inputs(), trainer.model.train()

    def step() -> None:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    own = getattr(ProfilerActivity, case.device.type.upper(), ProfilerActivity.CUDA)
    with profile(activities=[ProfilerActivity.CPU, own]) as profiled:
        step()
    return {"launches": calls(profiled, LAUNCHES), "waits": calls(profiled, WAITS)}


def can_fake() -> bool:
    """Whether there can be a faked device: with a compiler for it, and a build of PyTorch without CUDA."""
    return shutil.which("g++") is not None and torch.version.cuda is None


def faked_launches(name: str, lora: bool) -> dict:
    """The same of the faked device, in a process of its own; nothing where there cannot be one."""
    if not can_fake():
        return {}
    scenario = f"launches/{name}" + ("-lora" if lora else "-full")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "figures.json")
        command = [sys.executable, "-m", "tests.device_check", scenario, "--output", str(file)]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
        figures = json.loads(file.read_text())[scenario]
    return {"launches": figures["kernels"], "waits": figures["waits"], "faked": True}


MEASURES = {
    "step": step_row,
    "sampling": sampling_row,
    "scoring": scoring_row,
    "generation": generation_row,
    "launches": launches_row,
}


def measure(case: Case, measures: list[str], repeats: int) -> Iterator[dict]:
    """A row of the result, after each measure."""
    row = {"model": case.name, "way": "LoRA" if case.lora else "full", "weights": case.folder or "random"}
    if not case.cpu and not torch.accelerator.is_available():
        yield row | (faked_launches(case.name, case.lora) if "launches" in measures else {})
        return
    with case.trainer() as trainer:
        for name in measures:
            start = time.perf_counter()
            row |= MEASURES[name](case, trainer, repeats)
            print(f"{row['model']}, {row['way']}, {name}: {time.perf_counter() - start:.1f} s", flush=True)
            yield row


def table(rows: list[dict]) -> Table:
    """A line for each row; stages and further ways of generation are in the file."""
    out = Table("model", "way", *COLUMNS)
    for row in rows:
        out.add_row(row["model"], row["way"], *(cell(row.get(key), form) for key, form in COLUMNS.values()))
    return out


def cell(value, form: str) -> str:
    if isinstance(value, dict):
        value = value["always"]
    return NOT_MEASURED if value is None else form.format(value)


def cases(args: argparse.Namespace) -> list[Case]:
    """Each model, trained whole and with LoRA."""
    options = {name: parse(value) for name, value in (option.split("=", 1) for option in args.set)}
    options = {**(TINY_OPTIONS if args.cpu else OPTIONS), **options}
    batch = TINY_BATCH if args.cpu else BATCH
    is_there = not args.cpu and (Path(args.model) / "config.json").is_file()
    folders = {"smollm2-135m": args.model if is_there else None}
    return [
        Case(name, TINY if args.cpu else MODELS[name], folders.get(name), lora, options, **batch, cpu=args.cpu)
        for name in args.models
        for lora in (False, True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=".demo/SmolLM2-135M-Instruct", help="a local folder; random weights without it"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of QuietStarConfig")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    disable_progress_bars()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict = {"machine": machine(), "repeats": args.repeats, "definitions": DEFINITIONS, "rows": []}
    for case in cases(args):
        result |= {"batch": {"B": case.texts, "T": case.length}, "options": case.options}
        rows = result["rows"]
        for row in measure(case, args.measures, args.repeats):
            result["rows"] = [*rows, row]
            args.output.write_text(json.dumps(result, indent=2))  # what is known, should the next measure not end
    Console(width=200).print(result["machine"], table(result["rows"]))


if __name__ == "__main__":
    main()
