"""Does a model learn to think? A task that cannot be answered directly, but can after a few intermediate steps.

    python -m benchmarks.learning --seeds 0 1 2 --output out/learning.json
    python -m benchmarks.learning --task hard --steps 1000
    python -m benchmarks.learning --sabotage flipped_reward
    python -m benchmarks.learning --recipe recipes/rlp.yaml --set learning_rate=1e-3

The language is `d1 d2 d3 d4 = a`, `a` being the digits' sum modulo 10. A quarter of the pretraining text answers directly;
the rest writes `= > s1 s2 s3 s4 < a` with the running sum in letters (a right chain) or random letters. Right chains are
60% of those at first and 10% in the last 30% of pretraining, so the pretrained 2-layer Llama reads a right chain without
fail but writes one in about a tenth of its tries only, and answers at chance without. In the task `rare` right chains are
2% at the end of pretraining; in `hard`, moreover, eight digits are summed; in `short` three, which a model can also learn to
do at once, in about a thousand steps of plain training.

Quiet-STaR then thinks after `=`, with the start and end embeddings copied from `>` and `<`, 32 problems and 256 thoughts a
step, beside as many texts of the pretraining mix, without which the skill would be forgotten. Everything else is
`QuietStarConfig`'s default, but for the learning rates of a model this small. Thoughts have to be discovered: nothing but
the likelihood of `a` says what a good one is.

With `--recipe` the method is that of a recipe and the scale that of this benchmark: see [`recipe_options`].

Answers are compared among the ten digits, so that no condition loses for predicting `>`. Intervals are 95%, by bootstrap
over problems. A sabotaged run must be reported as theater.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.branches.base import BranchPath, Encoded
from trl_quietstar.evaluation.controls import CONTROLS, controlled
from trl_quietstar.learning.rewards import thought_rewards
from trl_quietstar.text.batch import Text, Thoughts
from trl_quietstar.text.positions import choose_positions, seeded_generators
from trl_quietstar.thinking.drawing import uniforms
from trl_quietstar.thinking.sampling import sample_thoughts
from trl_quietstar.thinking.scoring import ScoreRequest, at_talk, score


VOCABULARY = [*"0123456789", *"abcdefghij", "=", ">", "<", "<pad>"]
EQUALS, START, END, PAD = (VOCABULARY.index(x) for x in ("=", ">", "<", "<pad>"))
FIRST_LETTER = VOCABULARY.index("a")
THOUGHTS = 8  # at a problem
PROBLEMS = 32  # in a step
HELD_OUT = 500
IGNORED = -100
MUON_LEARNING_RATE = 1e-3
# fields of a recipe that say how large its run is, what on, and what is looked at meanwhile; the rest is its method
SCALE = {
    *("output_dir", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "branch_batch_size"),
    *("max_steps", "num_train_epochs", "learning_rate", "heads_learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("thought_positions", "difficulty_threshold", "min_thought_interval"),
    *("thought_length", "talk_length", "num_thoughts", "thought_start_text", "thought_end_text", "thought_prompt"),
    # answers are scored whole, and thoughts are all of one length here
    "score_pattern",
    *("min_thought_length", "thought_stop_string", "unfinished_thought_penalty"),
    *("save_strategy", "save_steps", "save_total_limit", "logging_steps", "report_to", "log_thoughts"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold", "anti_theater_steps"),
}
SABOTAGES = ("random_thoughts", "flipped_reward", "no_thought_needed")


@dataclass(frozen=True)
class Task:
    """How many digits are summed, and the share of right chains in the first and the last part of pretraining."""

    terms: int = 4
    right_chains: tuple[float, float] = (0.6, 0.1)
    needs_thought: bool = True  # otherwise the answer is the last digit


TASKS = {"easy": Task(), "rare": Task(4, (0.6, 0.02)), "hard": Task(8, (0.6, 0.02)), "short": Task(3)}


def draw_problems(task: Task, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Digits and their running sums modulo 10, each of shape `(count, terms)`, and answers, of shape `(count,)`."""
    digits = torch.randint(10, (count, task.terms), generator=generator)
    sums = digits.cumsum(1) % 10
    return digits, sums, (sums if task.needs_thought else digits)[:, -1]


def draw_texts(task: Task, count: int, right_chains: float, generator: torch.Generator) -> list[list[int]]:
    """Texts of the language: a quarter direct, the others with a chain that is right with the given probability."""
    digits, sums, answers = draw_problems(task, count, generator)
    right = torch.rand(count, 1, generator=generator) < right_chains
    chains = FIRST_LETTER + torch.where(right, sums, torch.randint(10, sums.shape, generator=generator))
    direct = torch.rand(count, generator=generator) < 0.25
    texts = []
    for row, chain, answer, plain in zip(digits.tolist(), chains.tolist(), answers.tolist(), direct, strict=True):
        texts.append([*row, EQUALS, *([] if plain else [START, *chain, END]), answer])
    return texts


def pretrain(task: Task, seed: int, steps: int) -> PreTrainedModel:
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
    first, last = task.right_chains
    for step in range(steps):
        texts = draw_texts(task, 128, first if step < 0.7 * steps else last, generator)
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


def problem_rows(task: Task, count: int, generator: torch.Generator) -> list[dict]:
    """Problems to think about, after `=` only."""
    digits, _, answers = draw_problems(task, count, generator)
    labels, mask = [IGNORED] * (task.terms + 1), [0] * task.terms + [1, 0]
    return [
        {"input_ids": [*row, EQUALS, answer], "labels": [*labels, answer], "thought_mask": mask}
        for row, answer in zip(digits.tolist(), answers.tolist(), strict=True)
    ]


def training_data(task: Task, seed: int, steps: int, each: int = 1) -> Dataset:
    """Problems to think about, and texts to remember the language by, in turn: `each` problems, then a text."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    problems = problem_rows(task, each * PROBLEMS * steps, generator)
    texts = draw_texts(task, PROBLEMS * steps, task.right_chains[1], generator)
    rows = []
    for i, text in enumerate(texts):
        rows += problems[i * each : (i + 1) * each]
        rows.append({"input_ids": text, "labels": text, "thought_mask": [0] * len(text)})
    return Dataset.from_list(rows)


def held_out_data(task: Task) -> Dataset:
    """The problems that [`evaluate`] asks, as text."""
    return Dataset.from_list(problem_rows(task, HELD_OUT, torch.Generator().manual_seed(7)))


@dataclass
class ReadOnce:
    """A way to run a text with its branches that does so once: no prediction of a text's last token depends on that token."""

    path: BranchPath
    encoded: Encoded | None = None

    def encode(self, *arguments) -> Encoded:
        if self.encoded is None:
            self.encoded = self.path.encode(*arguments)
        return self.encoded


def text_with(digits: torch.Tensor, answer: int) -> Text:
    """Problems of digits, of shape `(count, terms)`, with one answer to all of them, which alone is a label."""
    ids = torch.cat([digits, torch.tensor([[EQUALS, answer]]).expand(len(digits), -1)], dim=1)
    return Text.from_batch(ids, labels=torch.where(torch.arange(ids.shape[1]) > digits.shape[1], ids, IGNORED))


@torch.no_grad()
def logps_after(
    trainer: QuietStarREINFORCETrainer, digits: torch.Tensor, thoughts: Thoughts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the ten digits after thoughts, of shape `(count, G, 10)`, and without, of shape `(count, 1, 10)`."""
    path, found = ReadOnce(trainer.path), []
    for answer in range(10):
        text = text_with(digits, answer)
        scores = score(trainer.model, ScoreRequest(text, thoughts, 1, path, prediction=trainer.args.reward_prediction))
        found.append((scores.talk_logps[:, 0, :, 0], at_talk(scores.text_logps, thoughts, 1)[:, 0, :, 0]))
    with_, without = (torch.stack(candidates, dim=-1) for candidates in zip(*found, strict=True))
    return with_, without


@torch.no_grad()
def answer_logps(
    trainer: QuietStarREINFORCETrainer, task: Task, count: int, controls: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], Thoughts]:
    """Log-probabilities of the ten digits after each control, of shape `(count, G, 10)`, and the thoughts."""
    digits, _, _ = draw_problems(task, count, torch.Generator().manual_seed(7))
    model = trainer.model.eval()
    text, generators = text_with(digits, 0), seeded_generators(7, 0, list(range(count)))
    positions = choose_positions(text, "all", generators)
    thoughts = sample_thoughts(
        model,
        trainer.path.read(model, text),
        positions,
        trainer.sampling,
        uniforms(positions, trainer.sampling, generators),
    )
    logps: dict[str, torch.Tensor] = {}
    for control in controls:
        other = controlled(thoughts, control, len(VOCABULARY), torch.Generator().manual_seed(7))
        logps[control], without = logps_after(trainer, digits, other)
    return {"none": without, **logps}, thoughts


def evaluate(trainer: QuietStarREINFORCETrainer, task: Task) -> dict:
    """Accuracy and NLL (nats) of held-out answers without a thought, with one, and after each control; each with its
    interval; how well the model reads right chains, if it were to write them; and anti-theater validation."""
    digits, sums, answers = draw_problems(task, HELD_OUT, torch.Generator().manual_seed(7))
    logps, thoughts = answer_logps(trainer, task, HELD_OUT, CONTROLS)
    results: dict = {"accuracy": {}, "accuracy_interval": {}, "nll": {}, "nll_interval": {}}
    for name, candidates in logps.items():
        truth = answers[:, None, None].expand(*candidates.shape[:2], 1)
        key = "with" if name == "real" else name
        correct = (candidates.argmax(-1, keepdim=True) == truth).double().mean((1, 2))
        nll = -candidates.gather(-1, truth).double().mean((1, 2))
        for metric, values in (("accuracy", correct), ("nll", nll)):
            results[metric][key] = values.mean().item()
            results[f"{metric}_interval"][key] = interval(values)
    results["right_chains"] = results["read"] = None  # of thoughts too short to hold one
    if thoughts.token_ids.shape[-1] == task.terms:
        letters = FIRST_LETTER + sums[:, None, None]
        results["right_chains"] = (thoughts.token_ids == letters).all(-1).double().mean().item()
        right = Thoughts(thoughts.positions, letters, thoughts.mask[:, :, :1])
        read, truth = logps_after(trainer, digits, right)[0][:, 0], answers[:, None]
        results["read"] = {
            "accuracy": (read.argmax(-1, keepdim=True) == truth).double().mean().item(),
            "probability": read.gather(-1, truth).exp().mean().item(),
        }
    report = trainer.validate_thoughts()
    results["anti_theater_passed"] = report.passed
    results["anti_theater"] = report.metrics()
    return results


def accuracies(trainer: QuietStarREINFORCETrainer, task: Task, count: int) -> tuple[float, float]:
    """Accuracy of held-out answers with thoughts and without, which costs a fraction of [`evaluate`]."""
    logps, _ = answer_logps(trainer, task, count, ("real",))
    _, _, answers = draw_problems(task, count, torch.Generator().manual_seed(7))
    correct = {name: (x.argmax(-1) == answers[:, None]).double().mean().item() for name, x in logps.items()}
    return correct["real"], correct["none"]


def interval(values: torch.Tensor) -> list[float]:
    """95% interval of the mean, by bootstrap."""
    draws = np.random.default_rng(0).choice(values.numpy(), (2_000, len(values)))
    return np.percentile(draws.mean(1), [2.5, 97.5]).tolist()


class Until90(TrainerCallback):
    """Notes the step, and the seconds of training, after which accuracy with thoughts first reaches 90%, and ends training
    once it reaches `enough`. Seconds are those of the processor, which neighbours on the machine change little."""

    def __init__(self, task: Task, every: int = 20, enough: float | None = None):
        self.task, self.every, self.enough, self.steps, self.seconds = task, every, enough, None, None
        self.curve, self.curve_without = [], []
        self.measuring = 0.0  # seconds that were not training
        self.trainer: QuietStarREINFORCETrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            now = time.process_time()
            accuracy, without = accuracies(self.trainer, self.task, 200)
            self.trainer.model.train()
            self.curve.append([state.global_step, accuracy])
            self.curve_without.append([state.global_step, without])
            if self.steps is None and accuracy >= 0.9:
                self.steps, self.seconds = state.global_step, now - self.start - self.measuring
            self.measuring += time.process_time() - now
            control.should_training_stop |= self.enough is not None and accuracy >= self.enough

    def on_train_end(self, args, state, control, **kwargs):
        self.total = time.process_time() - self.start - self.measuring


def think_at_random(trainer: QuietStarREINFORCETrainer) -> None:
    """Has a trainer, of two passes, train on random tokens in place of the model's own thoughts."""
    own = trainer.thinker.request

    def request(text, part):
        asked = own(text, part)
        if not part.training:
            return asked
        generator = torch.Generator().manual_seed(part.step)
        return replace(asked, thoughts=controlled(asked.thoughts, "random", len(VOCABULARY), generator))

    trainer.thinker.request = request


def flipped(text, thoughts, **gains) -> torch.Tensor:
    """The reward with its sign turned."""
    return -thought_rewards(**gains, reward_type="probability")


def configuration(task: Task, directory: str, seed: int, steps: int, **options) -> QuietStarConfig:
    """The defaults, but for what the task forces."""
    settings = {
        "thought_length": task.terms,
        "talk_length": 1,
        "num_thoughts": THOUGHTS,
        "thought_start_text": ">",
        "thought_end_text": "<",
        "per_device_train_batch_size": 2 * PROBLEMS,
        "per_device_eval_batch_size": 100,
        "max_steps": steps,
        "learning_rate": 3e-4,
        "heads_learning_rate": 1e-3,
        "warmup_steps": 10,
        "lr_scheduler_type": "constant_with_warmup",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": seed,
    }
    return QuietStarConfig(directory, **{**settings, **options})


def recipe_options(path: Path, task: Task, steps: int) -> dict:
    """
    The method of a recipe at this benchmark's scale.

    Taken over is every field of [`QuietStarConfig`] that the recipe sets, but for those of `SCALE`: rewards, baselines,
    predictions, coefficients, temperatures, clipping, iterations, reference, optimizers with their decay. What `SCALE` names
    is the benchmark's, as are model and data, which say themselves where to think. Two fields are method and scale at
    once, and are translated:

    - `muon_learning_rate` becomes `MUON_LEARNING_RATE`;
    - the stages of a `curriculum` begin at the same shares of the run, with the longest thoughts as long as the task
      needs, and the others in proportion.

    Args:
        path (`Path`):
            A recipe, as `trl-quietstar train --config` reads it.
        task ([`Task`]), steps (`int`):
            What it is to be scaled to.
    """
    recipe = yaml.safe_load(path.read_text())
    known = {field.name for field in fields(QuietStarConfig)}
    options = {name: value for name, value in recipe.items() if name in known - SCALE}
    if "muon_learning_rate" in options:
        options["muon_learning_rate"] = MUON_LEARNING_RATE
    if "curriculum" in options:
        stages = options["curriculum"]
        longest = max(changes.get("thought_length", 0) for changes in stages.values())
        options["curriculum"] = {}
        for start, changes in stages.items():
            scaled = {name: value for name, value in changes.items() if name not in SCALE}
            if "thought_length" in changes:
                scaled["thought_length"] = max(1, changes["thought_length"] * task.terms // longest)
            options["curriculum"][str(round(int(start) * steps / recipe["max_steps"]))] = scaled
    return options


def run(
    task: Task,
    model: PreTrainedModel,
    seed: int,
    steps: int,
    options: dict,
    sabotage: str | None = None,
    enough: float | None = None,
) -> dict:
    """Trains a copy of a pretrained model to think, and measures before and after. Training ends early at an accuracy with
    thoughts of `enough`."""
    if sabotage == "random_thoughts":
        options = {**options, "single_pass": False}  # they come from elsewhere
    with tempfile.TemporaryDirectory() as directory:
        args = configuration(task, directory, seed, steps, **options)
        trainer = QuietStarREINFORCETrainer(
            copy.deepcopy(model),
            args,
            training_data(task, seed, steps, args.per_device_train_batch_size // PROBLEMS - 1),
            held_out_data(task),
            processing_class=tokenizer(),
            reward_functions=flipped if sabotage == "flipped_reward" else None,
        )
        if sabotage == "random_thoughts":
            think_at_random(trainer)
        before = evaluate(trainer, task)
        until = Until90(task, 20 * max(1, steps // 500), enough)
        until.trainer = trainer
        trainer.add_callback(until)
        trainer.train()
        after = evaluate(trainer, task)
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "steps_to_90": until.steps,
        "seconds_to_90": until.seconds,
        "steps": trainer.state.global_step,
        "seconds": until.total,
        "sampled_batches": -(-trainer.state.global_step // trainer.args.num_iterations),
        "curve": until.curve,
        "curve_without": until.curve_without,
    }


def print_run(result: dict) -> None:
    """A line for each condition."""
    before, after = result["before"], result["after"]
    print(
        f"seed {result['seed']}: 90% after {result['steps_to_90']} steps; {result['sampled_batches']} batches of thoughts, "
        f"{result['seconds']:.0f} s of the processor in training"
    )
    print("  condition   accuracy before → after [95% interval]     NLL before → after")
    for name, accuracy in before["accuracy"].items():
        low, high = after["accuracy_interval"][name]
        print(
            f"  {name:<10} {accuracy:>10.3f} → {after['accuracy'][name]:.3f} [{low:.3f}, {high:.3f}]"
            f" {before['nll'][name]:>15.3f} → {after['nll'][name]:.3f}"
        )
    print(f"  right chains {_number(before['right_chains'])} → {_number(after['right_chains'])}")
    for measure in ("accuracy", "probability"):
        values = (_number(x["read"] and x["read"][measure]) for x in (before, after))
        print(f"  {measure} of the answer after a right chain {' → '.join(values)}")
    for when, measured in (("before", before), ("after", after)):
        theater = measured["anti_theater"]
        values = ", ".join(
            f"{name} {_number(theater[name])}"
            for name in ("divergence", "ablation", "correlation", "content_gain", "content_gain_low")
        )
        print(
            f"  anti-theater {when}: {'passed' if measured['anti_theater_passed'] else 'failed'} ({values})",
            flush=True,
        )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def parse(value: str):
    """A field's value from the command line: JSON where it is any, else a string."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """What every benchmark on this task takes; quiet, and on one thread, which is as fast at this size."""
    disable_progress_bars()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining-steps", type=int, default=3_000)
    parser.add_argument("--output", type=Path, help="where the results go")
    return parser


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--task", choices=TASKS, default="easy")
    parser.add_argument("--sabotage", choices=SABOTAGES)
    parser.add_argument("--recipe", type=Path, help="a recipe whose method is taken, at this benchmark's scale")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of QuietStarConfig")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    if arguments.sabotage == "no_thought_needed":
        task = Task(task.terms, task.right_chains, needs_thought=False)
    options = recipe_options(arguments.recipe, task, arguments.steps) if arguments.recipe else {}
    options |= {name: parse(value) for name, value in (option.split("=", 1) for option in arguments.set)}
    results = []
    for seed in arguments.seeds:
        model = pretrain(task, seed, arguments.pretraining_steps)
        results.append(run(task, model, seed, arguments.steps, options, arguments.sabotage))
        print_run(results[-1])
    if arguments.output:
        settings = {name: getattr(arguments, name) for name in ("task", "steps", "sabotage", "pretraining_steps")}
        settings["recipe"] = arguments.recipe and str(arguments.recipe)
        arguments.output.write_text(json.dumps({**settings, "options": options, "seeds": results}, indent=2))


if __name__ == "__main__":
    main()
