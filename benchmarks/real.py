"""Does thinking pay on a real model? A small pretrained model on problems with one right answer, in four ways for equal time.

    python -m benchmarks.real --task chain_sum --output out/real
    python -m benchmarks.real --report out/real --plot out/real.png

Each arm has the same minutes for training, of the processor's time or, on a GPU, of the clock; measuring and saving are not counted.
Arms that run at the same time share a GPU.

- `plain`: TRL's `SFTTrainer` on the answers of all problems.
- `supervised`: written thoughts and the answers after them, of the few problems that have any, for the whole time.
- `thinking`: the first part of `supervised` as a cold start, for `cold_share` of the time; then reinforcement by the answers of all
  problems alone, with a few written thoughts in each step. A cold start is trained once for both arms, and counted in both.
- `no_cold_start`: that reinforcement from the untouched model, for the whole time. It never sees a written thought, but in the
  examples that `step_sum` shows before each problem.

All arms see the same problems in the same order, as far as they get. All weights are trained, by AdamW, with bfloat16
autocast where the machine has instructions for it. Learning rates follow the time used: a warm-up of `warmup` of an arm's time,
then constant, then a line to 0 over the last part, `decay`. An arm stops before the step that would pass its time.

A run that is killed goes on by the same command; a finished arm is not run again. `--set FIELD=VALUE` changes a field of
[`~real_settings.Settings`], and `--set STAGE.FIELD=VALUE` one of the [`QuietStarConfig`] of a stage: `written`, `reinforcement` or `plain`; or
of `all`. Settings stand in `real_settings`, what is measured in `real_measures`, the problems in `real_tasks`, table and plot in
`real_report`.
"""

import argparse
import fcntl
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PrinterCallback, Trainer
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks import real_measures as measures
from benchmarks.measuring import machine
from benchmarks.real_clock import Clock, Continued, last_checkpoint, last_used, state_of
from benchmarks.real_report import report
from benchmarks.real_settings import ON_GPU, PLAIN, RUN, SETTINGS, Settings
from benchmarks.real_tasks import TASKS, Row, draw
from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer


MODEL = ".demo/SmolLM2-135M-Instruct"
ARMS = ("thinking", "supervised", "plain", "no_cold_start")
STAGE_OF = {"cold_start": "written", "supervised": "written", "thinking": "reinforcement"}
STAGE_OF |= {"plain": "plain", "no_cold_start": "reinforcement"}
ORDER_LENGTH = 100_000  # rows, after which an order begins anew


def order(plain: list[int], taught: list[int], step: int, mix: int, seed: int) -> list[int]:
    """The rows of a run, in turn: in each optimizer step of `step` rows, `mix` of those with written thoughts come last."""

    def endless(rows: list[int], part: str) -> Iterator[int]:
        generator = random.Random(f"{part} {seed}")
        while True:
            yield from generator.sample(rows, len(rows))

    problems, thoughts = endless(plain, "problems"), endless(taught, "written")
    steps = ([*itertools.islice(problems, step - mix), *itertools.islice(thoughts, mix)] for _ in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(steps), ORDER_LENGTH // step * step))


@contextmanager
def alone(folder: Path):
    """Waits until no other process is in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class Runs:
    """
    All arms of one seed.

    Parameters:
        task (`str`), model (`str`), data (`str`), seconds (`float`), seed (`int`), settings ([`Settings`]):
            What is run, on what, for how long.
        output (`Path`):
            Where the folder of the seed is.
        now (`Callable`):
            A clock in seconds; of the processor where training is on one, else of the wall.
    """

    task: str
    model: str
    data: str
    seconds: float
    seed: int
    settings: Settings
    output: Path
    now: Callable[[], float] = time.process_time

    def __post_init__(self):
        self.folder = self.output / f"seed-{self.seed}"
        s = self.settings
        amounts = dict(problems=s.problems, written=s.written, held_out=s.held_out)
        size = dict(terms=s.terms, fewest_terms=s.fewest_terms, digits=s.digits, data=self.data)
        parts = draw(self.task, self.seed, **amounts, **size)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        stage, end = s.stages["all"], f"{self.tokenizer.eos_token}\n"
        if len(parts[1]) < s.examples:
            raise ValueError(f"{s.examples} examples need as many `written` problems, not {len(parts[1])}; raise it.")
        self.end = stage["thought_end_text"]
        examples = "".join(
            f"{row['prompt']}{stage['thought_start_text']}{row['thought']}{self.end}{row['completion']}{end}"
            for row in parts[1][: s.examples]
        )
        self.train_rows, self.taught_rows, self.held_out = (
            [{**row, "prompt": examples + row["prompt"]} for row in rows] for rows in parts
        )

    def run(self, arm: str) -> None:
        """Trains and measures an arm, as far as that is still to be done."""
        if arm in ("thinking", "supervised"):
            self._stage("cold_start", self.model, 0.0, self.settings.cold_share * self.seconds, "supervised")
        if arm == "thinking":
            used = self.result("cold_start")["seconds"]
            self._stage(arm, str(self.folder / "cold_start"), used, self.seconds, arm)
        else:
            self._stage(arm, self.model, 0.0, self.seconds, arm)

    def result(self, name: str) -> dict:
        """What is known of an arm, or of the cold start."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def _stage(self, name: str, model: str, start: float, until: float, work: str) -> None:
        """Trains from a model until a time is used, with checkpoints in the folder of `work`; then measures."""
        if self._is_done(name):  # no matter who goes on in that folder
            print(f"{self.folder / name}: done before", flush=True)
            return
        with alone(self.folder / work):
            if self._is_done(name):
                return
            print(f"{self.folder / name}: {start / 60:.1f} to {until / 60:.1f} minutes", flush=True)
            folder = self.folder / work / "checkpoints"
            checkpoint = last_checkpoint(folder)
            state = state_of(checkpoint)
            has_ended = any(entry.get("ended") == until for entry in state["log_history"])  # and was not measured yet
            trainer = self.trainer(name, str(checkpoint) if has_ended else model, folder)
            if not has_ended:
                trainer.add_callback(self._clock(trainer, name, start, until))
                if name == "thinking":
                    trainer.add_callback(Continued(Path(model, "optimizer.pt")))
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
                state = vars(trainer.state)
            trainer.save_model(str(self.folder / name))
            if name == "cold_start":
                shutil.copy(last_checkpoint(folder) / "optimizer.pt", self.folder / name)
            self._write(name, state["log_history"], state["global_step"], start, self.measured(trainer, name))
            if name == work:  # a cold start goes on in `supervised`
                shutil.rmtree(folder)

    def _is_done(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists() and "exact" in self.result(name)

    def _clock(self, trainer: Trainer, name: str, start: float, until: float) -> Clock:
        return Clock(
            *(start, until, self.seconds),
            warmup=self.settings.warmup,
            decay=self.settings.decay,
            points=self.settings.points,
            checkpoints=60 * self.settings.checkpoint_minutes,
            measure=lambda: self._point(trainer, name),
            write=lambda state: self._write(name, state.log_history, state.global_step, start),
            now=self.now,
        )

    def trainer(self, name: str, model: str, folder: Path) -> Trainer:
        """A trainer for an arm or the cold start, with the arm's rows in their order."""
        stage, has_written = STAGE_OF[name], name not in ("plain", "no_cold_start")
        options = {"seed": self.seed, "use_cpu": not torch.accelerator.is_available(), **RUN}
        options |= {**self.settings.stages["all"], **self.settings.stages[stage]}
        held_out = Dataset.from_list([answered(row) for row in self.held_out])
        if stage == "plain":
            known = {field.name for field in fields(SFTConfig)}
            args = SFTConfig(str(folder), **PLAIN, **{x: value for x, value in options.items() if x in known})
            trainer = SFTTrainer(model, args, train_dataset=self._rows(0), eval_dataset=held_out)
        else:
            args = QuietStarConfig(str(folder), **options)
            trainer = QuietStarREINFORCETrainer(
                model, args, self._rows(args.thought_length if has_written else 0), held_out
            )
        if len(trainer.eval_dataset) != len(self.held_out):
            raise ValueError(f"Some held-out problems do not fit `max_length` ({args.max_length}); raise it.")
        trainer.remove_callback(PrinterCallback)
        data = trainer.train_dataset
        taught = [i for i, ids in enumerate(data["written_ids"]) if ids] if has_written else []
        others = sorted(set(range(len(data))) - set(taught))
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        mix = {"written": step, "reinforcement": self.settings.written_mix if has_written else 0, "plain": 0}[stage]
        trainer.train_dataset = data.select(np.array(order(others, taught, step, mix, self.seed)))
        return trainer

    def _rows(self, longest: int) -> Dataset:
        """All problems by their answers; and, after them, those with a written thought of at most `longest` tokens, if any."""
        rows: list[dict] = [{**answered(row), "thought": None} for row in self.train_rows]
        fitting = [
            row for row in self.taught_rows if len(self.tokenizer(row["thought"] + self.end)["input_ids"]) <= longest
        ]
        return Dataset.from_list(rows + fitting if longest else [answered(row) for row in rows])

    # Measuring

    def _point(self, trainer: QuietStarREINFORCETrainer, name: str) -> dict:
        """A point of the learning curve, on the first held-out problems."""
        count = min(self.settings.watched, len(self.held_out))
        point = {"without": mean(measures.solved_without(trainer, count))}
        if name != "plain":
            solved, thoughts = measures.solved_after(trainer, count, ("with",))
            point |= {"with": mean(solved["with"]), "right_chains": mean(self.right_chains(thoughts))}
            point |= measures.group_shares(trainer, count)
        return point

    def right_chains(self, thoughts: list[str]) -> list[bool]:
        """Which thoughts are the written ones of the first held-out problems, word for word."""
        pairs = zip(thoughts, self.held_out, strict=False)
        return [thought.removesuffix(self.end).strip() == row["thought"].strip() for thought, row in pairs]

    def measured(self, trainer: QuietStarREINFORCETrainer, name: str) -> dict:
        """Everything, on all held-out problems; of the cold start, which is no arm, what it can do."""
        count, few = len(self.held_out), min(20, len(self.held_out))
        exact = {"without": measures.solved_without(trainer, count)}
        found: dict = {"exact": exact}
        if name != "plain":
            conditions = ("with",) if name == "cold_start" else tuple(measures.CONDITIONS)
            solved, thoughts = measures.solved_after(trainer, count, conditions)
            exact |= solved
            found["right_chains"] = self.right_chains(thoughts)
            found |= measures.group_shares(trainer, min(self.settings.watched, count))
            if name != "cold_start":
                validation = measures.validated(trainer)
                found |= {"anti_theater_passed": validation.passed, "anti_theater": validation.metrics()}
            rows = zip(self.held_out, thoughts, solved["with"], strict=True)
            found["samples"] = [{**row, "thought": t, "right": right} for row, t, right in itertools.islice(rows, 12)]
        own = exact["without" if name == "plain" else "with"][:few]
        said = measures.generated(trainer, self.held_out[:few], thinks=name != "plain")
        found["generated_alike"] = mean([a == b for a, b in zip(said, own, strict=True)])
        return found

    def _write(self, name: str, log: list[dict], steps: int, start: float, found: dict | None = None) -> None:
        """The file of an arm's results; without what is `found` at the end it is one of a run that goes on."""
        curve = [{"minutes": entry["used"] / 60, **entry["curve"]} for entry in log if "curve" in entry]
        before = self.result("cold_start") if name == "thinking" else {"curve": [], "steps": 0}
        values = {
            **{"task": self.task, "arm": name, "seed": self.seed, "model": self.model, "machine": machine()},
            **{"minutes": self.seconds / 60, "seconds": last_used(log, start), "cold_seconds": start},
            **{"steps": steps, "cold_steps": before["steps"], "curve": before["curve"] + curve},
            **(found or {}),
            "log": [entry for entry in log if "used" not in entry],
            "settings": asdict(self.settings),
        }
        write_json(self.folder / f"{name}.json", values)


def answered(row: Row) -> dict:
    """A problem without its written thought."""
    return {"prompt": row["prompt"], "completion": row["completion"]}


def mean(values: list[bool]) -> float:
    """Share of those that are true."""
    return sum(values) / len(values)


def write_json(path: Path, values: dict) -> None:
    """In one rename, so that a file is whole or not there, also where several processes write it at once."""
    written = path.with_suffix(f".{os.getpid()}.tmp")
    written.write_text(json.dumps(values, indent=1))
    os.replace(written, path)


def claim(output: Path, values: dict) -> None:
    """
    Notes in a folder what its runs have in common.

    Raises:
        `ValueError`: if the folder has runs of other settings, which no table may compare.
    """
    file = output / "settings.json"
    values = json.loads(json.dumps(values))
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, values)
    ours, known = flat(values), flat(json.loads(file.read_text()))
    different = [name for name in {**known, **ours} if known.get(name) != ours.get(name)]
    if different:
        listed = ", ".join(f"{name} {known.get(name)!r} ({ours.get(name)!r} here)" for name in different)
        raise ValueError(
            f"{output} has runs with other settings: {listed}. Take another `--output`, or the same command as before."
        )


def flat(values: dict, before: str = "") -> dict:
    """Nested settings under names such as `stages.plain.learning_rate`."""
    named: dict = {}
    for name, value in values.items():
        named |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="chain_sum")
    parser.add_argument("--arm", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=85.0, help="of training, for each arm and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--model", default=MODEL, help="a folder or a name on the Hub")
    parser.add_argument("--data", default="openai/gsm8k", help="GSM8K's JSON-lines file, or its name on the Hub")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--output", type=Path, help="where checkpoints and results go")
    parser.add_argument("--report", type=Path, help="prints the table of a folder of results, and runs nothing")
    parser.add_argument("--plot", type=Path, help="with `--report`: where the learning curves go")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(arguments.report, arguments.plot))
        return
    if arguments.output is None:
        parser.error("--output is needed to train")
    disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    on_device = torch.accelerator.is_available()
    settings = SETTINGS[arguments.task].changed([*(ON_GPU if on_device else ()), *arguments.set])
    chosen = {name: getattr(arguments, name) for name in ("task", "minutes", "model", "data")}
    claim(arguments.output, {**chosen, **asdict(settings)})
    now = time.perf_counter if on_device else time.process_time
    chosen["seconds"] = 60 * chosen.pop("minutes")
    for seed in arguments.seeds:
        runs = Runs(**chosen, seed=seed, settings=settings, output=arguments.output, now=now)
        for arm in arguments.arm:
            runs.run(arm)
    print(report(arguments.output, arguments.plot))


if __name__ == "__main__":
    main()
