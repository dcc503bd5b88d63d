"""Does the package run on a GPU, how often does the host wait for it, and how many kernels does it launch? Without one.

    python -m tests.device_check                                   # all scenarios but the launches of large models
    python -m tests.device_check train/default generate --lines    # the waits and kernels of each line
    python -m tests.device_check train --float64 refused           # as on Apple's MPS
    python -m tests.device_check launches/llama-1b --lines         # of one layer more, and of all 16
    python -m tests.device_check --output figures.json
    python -m tests.device_check --real --kernels                  # on the machine's own CUDA device
    python -m tests.device_check --real --part 0/4                 # every fourth scenario

It runs on a faked device (`fake_device`), whose numbers are those of the CPU, or with `--real` on a real one (`real_device`).
Figures are of a steady step of training, without logging; of a generated token; or of a call. In `launches` floating-point numbers are not computed, only their shapes, and hidden
sizes are small, on which no count depends: two runs, of one layer and of two, tell what 16 launch.

The exit code is 1 if a scenario fails.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch


REAL = "--real" in sys.argv
if REAL:
    from .real_device import DEVICE, Device, install
else:
    from .fake_device import DEVICE, Device, install  # before PyTorch

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false"
)
os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1")
if not REAL:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402

from trl_quietstar import QuietStarForCausalLM  # noqa: E402
from trl_quietstar.branches import cuda_graph  # noqa: E402
from trl_quietstar.branches.cached_replay import CachedReplay  # noqa: E402
from trl_quietstar.branches.masked_prefix import MaskedPrefix  # noqa: E402
from trl_quietstar.branches.shared_prefix import SharedPrefix  # noqa: E402
from trl_quietstar.cli import main as command  # noqa: E402
from trl_quietstar.text.transfer import exact_dtype  # noqa: E402

from .speaking import padded, prompts, thinking_model  # noqa: E402
from .tiny import byte_tokenizer, mixed_text, sampling, think  # noqa: E402
from .training import plain_model, saved_model, text_data, tiny_trainer  # noqa: E402


LAUNCHES, REFUSED = "launches/", "float32/"  # scenarios that need the faked device
TRACE = 12  # last lines of a traceback that are kept
COMMON = dict(use_cpu=False, dataloader_pin_memory=False, max_steps=2, logging_steps=1000)
SMALL = dict(thought_positions="all", num_thoughts=2)
STAGES = {
    "0": {"thought_length": 3},
    "1": {"thought_length": 2, "distillation_coefficient": 1.0},
    "2": {"thought_positions": "none"},
}
RUNS: dict[str, dict] = {
    "default": {},
    "logging": dict(logging_steps=1),
    "thought": dict(reward_prediction="thought"),
    "difficulty": dict(thought_positions="difficulty", difficulty_threshold=0.1),
    "random": dict(thought_positions=3),
    "fraction": dict(thought_positions=0.3),
    "prompt_end": dict(thought_positions="prompt_end", talk_length="completion", completions=True),
    "packing": dict(packing=True, max_length=48),
    "groups": dict(branch_batch_size=4),
    "single_pass": dict(single_pass=True),
    "two_passes": dict(single_pass=False),
    "checkpointing": dict(gradient_checkpointing=True),
    "kl": dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1),
    "reference": dict(no_thought_model="reference", max_length=None),
    "lora": dict(peft_config=True, beta=0.1),
    "stop": dict(thought_stop_string="1", min_thought_length=2, unfinished_thought_penalty=0.1),
    "early_ends": dict(thought_stop_string="1", min_thought_length=1, thought_length=12, single_pass=True),
    "early_ends_ahead": dict(thought_stop_string="1", min_thought_length=1, thought_length=12, single_pass=False),
    "warpers": dict(top_k=5, top_p=0.9, min_p=0.01, temperature=0.7),
    "accumulation": dict(gradient_accumulation_steps=2, thought_stop_string="1", normalize_advantages="step"),
    "iterations": dict(num_iterations=2),
    "curriculum": dict(curriculum=STAGES, max_steps=3),
    "baselines": dict(advantage_baseline="both", value_head_type="transformer", positive_advantages_only=True),
    "replay": dict(thought_path="replay"),
    "optimizers": dict(muon_learning_rate=1e-3, grokfast_lambda=0.1),
    "fp16": dict(fp16=True),
    "gpt2": dict(model="gpt2"),
    "windows": dict(model="mistral-window"),
    "mixture": dict(model="mixtral", router_aux_loss_coef=0.01),
    "log_thoughts": dict(log_thoughts=True),
    "full_determinism": dict(full_determinism=True, top_p=0.9, top_k=20, min_p=0.01),
    "tf32": dict(tf32=True, bf16=False),
    "dropout": dict(peft_config=True, disable_dropout=False, branch_batch_size=4),
    "frozen": dict(peft_config=True, saved=True),
}


@dataclass(frozen=True)
class Counts:
    """
    What was counted.

    Parameters:
        waits, kernels (`Counter`):
            By line, and of waits by operation.
        unit (`str`):
            Of what: `"step"`, `"token"` or `"call"`.
    """

    waits: Counter
    kernels: Counter
    unit: str = "call"

    @classmethod
    def now(cls, unit: str = "call") -> "Counts":
        """Since the last reset."""
        return cls(*Device.counted(), unit)

    def plus(self, other: "Counts", factor: float = 1) -> "Counts":
        """With as much of another; those of no difference are left out."""
        pairs = ((self.waits, other.waits), (self.kernels, other.kernels))
        sums = ({key: a[key] + factor * b[key] for key in a | b} for a, b in pairs)
        return Counts(*(Counter({key: n for key, n in x.items() if n}) for x in sums), self.unit)

    def times(self, factor: float) -> "Counts":
        """Of so many."""
        return Counts(Counter(), Counter(), self.unit).plus(self, factor)


class LastStep(transformers.TrainerCallback):
    """Counts from the end of the last step but one to the end of the last."""

    counts: Counts

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            Device.reset()
        elif state.global_step == state.max_steps:
            self.counts = Counts.now("step")


def train(
    name: str | None = None,
    model=None,
    peft_config: bool = False,
    completions: bool = False,
    saved: bool = False,
    **options,
):
    """A scenario: two steps, whose second is counted."""

    def act(folder: Path) -> Counts:
        made = plain_model(model) if isinstance(model, str) else saved_model(folder / "model") if saved else model
        own = {"peft_config": peft.LoraConfig(target_modules="all-linear", lora_dropout=0.1)} if peft_config else {}
        own |= {"data": completed()} if completions else {}
        last, bf16 = LastStep(), options.get("bf16", not options.get("fp16"))
        trainer = tiny_trainer(folder, made, callbacks=[last], **{**COMMON, **SMALL, **own, **options})
        dropped = [] if options.get("disable_dropout", True) else watch_dropout(trainer.model)
        trainer.train()
        assert trainer.accelerator.device.type == "cuda" and trainer.args.bf16 == bf16
        wanted = MaskedPrefix if dropped else CachedReplay if "thought_path" in options else SharedPrefix
        assert type(trainer.path) is wanted, f"the start-up check chose {trainer.path}"
        check_dropout(dropped)
        return last.counts

    return act


def watch_dropout(model: torch.nn.Module) -> list[bytes]:
    """Where dropout will have struck, forward by forward in the graph."""
    dropped: list[bytes] = []

    def note(module, inputs, output):
        if module.training and torch.is_grad_enabled() and output.requires_grad:
            dropped.append((output == 0).cpu().numpy().tobytes())

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            module.register_forward_hook(note)
    return dropped


def check_dropout(dropped: list[bytes]) -> None:
    """All that is computed again in the backward drops what it dropped in the forward."""
    lone = [count for count in Counter(dropped).values() if count == 1]
    assert not lone, f"of {len(dropped)} dropouts {len(lone)} were alone"


def completed() -> Dataset:
    """Prompts and completions."""
    pairs = [(f"{a} plus 1 is", f" {a + 1} .") for a in range(32)]
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def launches(layers: int, shape: dict, texts: int, length: int, **options):
    """A scenario: a step of a Llama of so many layers, from one of one and one of two."""

    def step(folder: Path, layers: int) -> Counts:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**shape, num_hidden_layers=layers, eos_token_id=0, max_position_embeddings=1024)
        )
        ids = torch.randint(1, shape["vocab_size"], (texts, length), generator=torch.Generator().manual_seed(0))
        data = Dataset.from_dict(
            {"input_ids": [*ids[:, :16].tolist(), *ids.tolist()]}
        )  # the first step is not counted
        own = dict(per_device_train_batch_size=texts, max_length=length, model=model, **options)
        own["train_sampling_strategy"] = "sequential"
        last = LastStep()
        trainer = tiny_trainer(folder, data=data, callbacks=[last], **{**COMMON, **own})
        Device.hollow = True  # after the start-up check
        try:
            trainer.train()
        finally:
            Device.hollow = False
        return last.counts

    def act(folder: Path) -> Counts:
        one, two = (step(folder / str(count), count) for count in (1, 2))
        return one.plus(two.plus(one, -1), layers - 1)

    return act


SMOLLM2 = dict(vocab_size=49_152, hidden_size=18, intermediate_size=16, num_attention_heads=9, num_key_value_heads=3)
LLAMA_1B = dict(
    vocab_size=128_256, hidden_size=64, intermediate_size=64, num_attention_heads=32, num_key_value_heads=8
)
SMALL_LLAMA = dict(
    vocab_size=32_000, hidden_size=16, intermediate_size=16, num_attention_heads=8, num_key_value_heads=4
)
OF_1B = dict(
    layers=16,
    shape=LLAMA_1B,
    texts=8,
    length=512,
    thought_positions=64,
    num_thoughts=4,
    thought_length=16,
    talk_length=8,
)
OF_135M = {**OF_1B, "layers": 30, "shape": SMOLLM2}
OF_ALL = dict(
    layers=2, shape=SMALL_LLAMA, texts=1, length=256, thought_positions="all", thought_length=7, talk_length=4
)
OF_ALL |= dict(num_thoughts=1)


def evaluate(folder: Path) -> Counts:
    """An evaluation that writes a report."""
    evaluation = text_data(6, 90)
    trainer = tiny_trainer(folder, evaluation=evaluation, report_thoughts=True, **{**COMMON, **SMALL})
    trainer.train()
    Device.reset()
    trainer.evaluate()
    return Counts.now()


def validate(folder: Path) -> Counts:
    """An anti-theater validation."""
    trainer = tiny_trainer(folder, evaluation=text_data(6, 90), **{**COMMON, **SMALL})
    trainer.train()
    Device.reset()
    trainer.validate_thoughts()
    return Counts.now()


def resume(folder: Path) -> Counts:
    """A step after a checkpoint between two updates of a batch."""
    options = {**COMMON, **SMALL, **dict(save_strategy="steps", save_steps=1, num_iterations=2)}
    tiny_trainer(folder, **{**options, "max_steps": 3}).train()
    last = LastStep()
    trainer = tiny_trainer(folder, callbacks=[last], **{**options, "max_steps": 5})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return last.counts


def generate(name: str = "llama", **options):
    """A scenario: a token, from the difference of two runs."""

    def run(model, inputs: dict, count: int) -> Counts:
        own = dict(options)
        if own.pop("stream", False):
            inputs = {key: value[1:] for key, value in inputs.items()}
            streams = [transformers.TextStreamer(byte_tokenizer()) for _ in range(2)]
            own |= {"streamer": streams[0], "thought_streamer": streams[1]}
        if own.pop("stops", False):
            own |= {"stop_strings": ["no such"], "tokenizer": byte_tokenizer()}
        Device.reset()
        own |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
        model.generate(**inputs, **{"do_sample": False, **own})
        return Counts.now("token")

    def act(folder: Path) -> Counts:
        model = thinking_model(name).to(DEVICE)
        model.branches_in_cache  # noqa: B018  # the start-up check
        inputs = {key: value.to(DEVICE) for key, value in padded(prompts(5, 9)).items()}
        few, more = (run(model, inputs, count) for count in (3, 9))
        return more.plus(few, -1).times(1 / 6)

    return act


def score(**options):
    """Log-likelihoods of two texts; `options` say when to think."""

    def act(folder: Path) -> Counts:
        model = thinking_model().to(DEVICE)
        model.thought_path  # noqa: B018
        inputs = {key: value.to(DEVICE) for key, value in padded(prompts(5, 9)).items()}
        Device.reset()
        model.log_likelihoods(**inputs, **options)
        return Counts.now()

    return act


def replayed(folder: Path) -> Counts:
    """
    Thoughts that are sampled by a CUDA graph for each token.

    Raises:
        `ValueError`: if they are not those that are sampled kernel by kernel, or the model could not be recorded.
    """
    model, text = thinking_model().to(DEVICE), mixed_text().to(DEVICE)
    settings, found = sampling(num_thoughts=2, thought_length=16, stop=None), []
    for can_record in (lambda device: False, cuda_graph.can_record):
        with patch.object(cuda_graph, "can_record", can_record):
            Device.reset()
            found.append(think(model, text, SharedPrefix(), settings=settings).token_ids.cpu())
    if not torch.equal(*found) or model in cuda_graph._unfit:
        same = (found[0] == found[1]).flatten(0, 2).all(0).tolist()
        raise ValueError(f"Tokens that are replayed as they are by kernel, by their place in a thought: {same}.")
    return Counts.now()


def inspect(folder: Path) -> Counts:
    """The command that writes a report."""
    (folder / "text.txt").write_text("3 plus 4 is 7 .")
    flags = ("--thought_length", "3", "--thought_positions", "all")
    files = ("--model", saved_model(folder / "model"), "--text", str(folder / "text.txt"))
    Device.reset()
    assert command(["inspect", *files, "--output", str(folder / "page.html"), *flags]) == 0
    return Counts.now()


def harness(folder: Path) -> Counts:
    """Choices scored and a text written, by the model that lm-eval gets."""
    from trl_quietstar.evaluation.harness import QuietStarLM  # lm-eval is optional

    model = QuietStarForCausalLM.from_pretrained(saved_model(folder / "plain"))
    model.save_pretrained(folder / "thinker")
    byte_tokenizer().save_pretrained(folder / "thinker")
    lm = QuietStarLM(str(folder / "thinker"), batch_size=2)
    assert lm.device.type == "cuda"
    Device.reset()
    lm._loglikelihood_tokens([(("a", "b"), [1, 2, 3], [4, 5]), (("c", "d"), [1, 2], [6])], disable_tqdm=True)
    ids = torch.tensor([[1, 2, 3]], device=DEVICE)
    lm._model_generate(ids, 8, ["."], attention_mask=torch.ones_like(ids), do_sample=False)
    return Counts.now()


def without_float64(act):
    """A scenario on a device as Apple's MPS."""

    def refused(folder: Path) -> Counts:
        exact_dtype.cache_clear()
        Device.refuses_float64, before = True, Device.refuses_float64
        try:
            return act(folder)
        finally:
            Device.refuses_float64 = before
            exact_dtype.cache_clear()

    return refused


SCENARIOS = {
    **{f"train/{name}": train(**options) for name, options in RUNS.items()},
    "evaluate": evaluate,
    "validate": validate,
    "resume": resume,
    "generate/greedy": generate(),
    "generate/sample": generate(do_sample=True, return_thoughts=True),
    "generate/adaptive": generate(think="adaptive", think_every=3, thinking_threshold=0.1),
    "generate/stream": generate(stream=True),
    "generate/stops": generate(stops=True),
    "generate/replay": generate("mamba"),
    "score": score(),
    "score/adaptive": score(think="adaptive", thinking_threshold=0.1),
    "replayed": replayed,
    "inspect": inspect,
    "lm-eval": harness,
    "float32/train": without_float64(train()),
    "float32/validate": without_float64(validate),
    "float32/generate": without_float64(generate(do_sample=True)),
    "float32/score": without_float64(score()),
    "launches/llama-1b-two-passes": launches(**OF_1B, single_pass=False),
    "launches/llama-1b-groups": launches(**OF_1B, branch_batch_size=82),
    # which the plan takes where a layer has more to do for each token
    "launches/llama-1b-full": launches(**OF_1B, single_pass=True),
    "launches/llama-1b-lora": launches(
        **OF_1B, single_pass=True, peft_config=peft.LoraConfig(target_modules="all-linear")
    ),
    "launches/smollm2-135m-full": launches(**OF_135M),
    "launches/smollm2-135m-lora": launches(**OF_135M, peft_config=peft.LoraConfig(target_modules="all-linear")),
    "launches/all-positions": launches(**OF_ALL),
}


def run(act, trace: bool) -> tuple[Counts | None, dict]:
    """What a scenario counted, and why it failed: `error` is None if it did not."""
    Device.reset()
    torch.manual_seed(0)
    counts, found = None, {"error": None}
    with tempfile.TemporaryDirectory() as folder, Device(), contextlib.redirect_stdout(io.StringIO()):
        try:
            counts = act(Path(folder))
        except (Exception, SystemExit) as raised:
            found["error"] = f"{type(raised).__name__}: {str(raised)[:800]}"
            found["trace"] = traceback.format_exc().splitlines()[-TRACE:]
            if trace:
                traceback.print_exc()
    torch.use_deterministic_algorithms(False)
    found["error"] = found["error"] or "; ".join(Device.mixed) or None
    return counts, found


def chosen(names: list[str], part: str) -> dict:
    """Scenarios by the beginnings of their names; of those, every n-th from the k-th on."""
    apart = (LAUNCHES, REFUSED) if REAL else () if names else (LAUNCHES,)
    found = [name for name in SCENARIOS if not names or any(name.startswith(beginning) for beginning in names)]
    found = [name for name in found if not name.startswith(apart)]
    k, n = map(int, part.split("/"))
    return {name: SCENARIOS[name] for name in found[k::n]}


def show_lines(counts: Counts) -> None:
    """Prints which lines of code wait and launch, the worst first."""
    for (where, what), times in counts.waits.most_common():
        print(f"    {times:9.1f} waits   {where:28} {what}")
    for where, times in counts.kernels.most_common(40):
        print(f"    {times:9.1f} kernels {where}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scenarios, or beginnings of their names")
    parser.add_argument("--lines", action="store_true", help="waits and kernels by line")
    parser.add_argument("--trace", action="store_true", help="tracebacks of failures")
    parser.add_argument("--float64", choices=("taken", "refused"), default="taken", help="by the device")
    parser.add_argument("--output", type=Path, help="for the figures, as JSON")
    parser.add_argument("--real", action="store_true", help="on the machine's own CUDA device")
    parser.add_argument("--kernels", action="store_true", help="with --real, count launches too")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every N-th scenario from number K on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    install()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    Device.refuses_float64, Device.counts_kernels = options.float64 == "refused", options.kernels
    figures, start = {}, time.perf_counter()
    for name, act in chosen(options.names, options.part).items():
        began = time.perf_counter()
        counts, figures[name] = run(act, options.trace)
        error = figures[name]["error"]
        figures[name]["seconds"] = seconds = round(time.perf_counter() - began, 1)
        line = f"{name:28} {seconds:5.1f} s"
        if counts is not None:
            waits, kernels = sum(counts.waits.values()), sum(counts.kernels.values())
            figures[name] |= {"waits": waits, "kernels": kernels, "unit": counts.unit}
            figures[name]["lines"] = {f"{where} {what}": n for (where, what), n in counts.waits.most_common()}
            line += f" {waits:7.1f} waits {kernels:9,.0f} kernels a {counts.unit}"
        print(line if error is None else f"{line}\n    {error}", flush=True)
        if options.lines and counts is not None:
            show_lines(counts)
        if options.output:
            options.output.write_text(json.dumps(figures, indent=2))
    failed = [name for name, found in figures.items() if found["error"]]
    print(
        f"{len(failed)} of {len(figures)} failed, {time.perf_counter() - start:.0f} s: {', '.join(failed) or 'none'}"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
