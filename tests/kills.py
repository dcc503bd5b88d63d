"""Runs of a tiny model that are killed, again and again, until one gets to its end.

    python -m tests.kills FOLDER --kills 60

Each life is a child forked from a process that has imported everything but used nothing, trains in the same output directory
and resumes from the last whole checkpoint there. It dies by SIGKILL: after a random time, or at the n-th operation of a phase
(a step, an evaluated batch, or a file operation, by Python's audit events), so that deaths fall between any two files of a
checkpoint. The run that gets to its end is compared with one that nothing disturbed.
"""

import argparse
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

from trl_quietstar import QuietStarREINFORCETrainer
from trl_quietstar.training.folders import STATE_NAME, check_checkpoint

from .tiny import byte_tokenizer
from .training import saved_model, text_data, tiny_args


PHASES = ("starting", "training", "evaluating", "saving", "keeping", "ending")
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
CLOCK = ("runtime", "per_second")
OPTIONS = dict(
    warmup_steps=2,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="steps",
    save_steps=2,
    logging_steps=3,  # so that some windows are saved half full
    save_total_limit=2,
    load_best_model_at_end=True,
    learning_rate=1e-2,
    beta=0.1,
    sync_ref_model=True,
    ref_model_sync_steps=3,
    anti_theater_steps=3,
    anti_theater_action="rollback",
    single_pass=True,
    gradient_accumulation_steps=2,
    per_device_train_batch_size=2,
    num_train_epochs=1,
)


class Life:
    """What a child is doing, seen by its parent in shared memory, and when it is to die."""

    def __init__(self, phase: str | None = None, operation: int | None = None):
        self.memory = memoryview(mmap.mmap(-1, 8 * len(PHASES) + 8)).cast("Q")
        self.deadline = phase, operation

    @property
    def phase(self) -> str:
        return PHASES[self.memory[-1]]

    @phase.setter
    def phase(self, name: str) -> None:
        self.memory[-1] = PHASES.index(name)

    def operations(self) -> dict[str, int]:
        """How many there were so far in each phase."""
        return dict(zip(PHASES, self.memory, strict=False))

    def operation(self) -> None:
        """Counts one; the last of this life kills."""
        self.memory[self.memory[-1]] += 1
        if self.deadline == (self.phase, self.memory[self.memory[-1]]):
            os.kill(os.getpid(), signal.SIGKILL)


class WatchedTrainer(QuietStarREINFORCETrainer):
    """Tells its phase, writes down its thoughts, and lets every anti-theater validation pass."""

    life: Life

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add = self.runlog.add

        def noted(batch, plan, training: bool):
            add(batch, plan, training)
            self.write_down(batch, "train" if training else "eval")

        self.runlog.add = noted

    def write_down(self, batch, mode: str) -> None:
        thoughts = batch.experience.thoughts
        entry = {
            "step": self.state.global_step,
            "mode": mode,
            "text": batch.text.input_ids.tolist(),
            "positions": thoughts.positions.index.tolist(),
            "tokens": (thoughts.token_ids * thoughts.mask).tolist(),
        }
        descriptor = os.open(Path(self.args.output_dir, "thoughts.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(entry) + "\n").encode())  # in one piece, or not at all
        os.close(descriptor)

    def training_step(self, *args, **kwargs):
        self.life.phase = "training"
        self.life.operation()
        return super().training_step(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        self.life.phase = "evaluating"
        self.life.operation()
        return super().prediction_step(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.life.phase = "saving"
        super()._save_checkpoint(*args, **kwargs)
        self.life.phase = "training"

    def validate_thoughts(self):
        self.life.phase = "keeping"
        return SimpleNamespace(passed=True, metrics=dict)

    def _finalize_training(self, *args, **kwargs):
        self.life.phase = "ending"
        return super()._finalize_training(*args, **kwargs)


def live(folder: Path, model: str, steps: int, life: Life) -> None:
    """A whole life: from the last checkpoint, if there is one, to the end, if it is reached."""
    life.phase = "starting"
    trainer = WatchedTrainer(
        model,
        tiny_args(folder, max_steps=steps, **OPTIONS),
        text_data(40),
        text_data(4, 300),
        processing_class=byte_tokenizer(),
    )
    trainer.life = life

    def count(event: str, args: tuple) -> None:
        writes = event in WRITES or (event == "open" and isinstance(args[1], str) and args[1][0] in "wax")
        if writes and str(folder) in str(args[0]):
            life.operation()

    sys.addaudithook(count)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    end = {
        "model": trainer.model.state_dict(),
        "reference": trainer.ref_model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "entropy coefficient": trainer.entropy_coefficient,
        "recent rewards": list(trainer.runlog.recent_rewards),
        "log": [{k: v for k, v in entry.items() if not any(part in k for part in CLOCK)} for entry in history],
        "best": (trainer.state.best_metric, Path(trainer.state.best_model_checkpoint).name),
    }
    torch.save(end, folder / "end.pt")


def spend(folder: Path, model: str, steps: int, life: Life, seconds: float | None = None) -> bool:
    """One life, in a child; whether it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            live(folder, model, steps, life)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"A life failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return os.WIFSIGNALED(status)


def differences(ours, oracle, name: str = "") -> list[str]:
    """Where two nested structures are not the same to the bit."""
    if isinstance(oracle, torch.Tensor):
        return [] if torch.equal(ours, oracle) else [name]
    if isinstance(oracle, dict) and ours.keys() == oracle.keys():
        return [d for key in oracle for d in differences(ours[key], oracle[key], f"{name}/{key}")]
    if isinstance(oracle, list) and len(ours) == len(oracle):
        return [d for i, pair in enumerate(zip(ours, oracle, strict=True)) for d in differences(*pair, f"{name}/{i}")]
    return [] if ours == oracle else [name]


def halves(folder: Path) -> list[str]:
    """What a death left half written, or half deleted, under the name of something whole."""
    found = []
    for path in (*folder.glob("checkpoint-*"), *folder.glob("_passed-*")):
        try:
            if path.name.startswith("checkpoint-"):
                check_checkpoint(path)
            last = STATE_NAME if path.name.startswith("checkpoint-") else "training_args.bin"
            (path / last).stat()
        except (OSError, ValueError) as error:
            found.append(f"{path.name} ({error})")
    return found


def thoughts_of(folder: Path) -> dict[tuple, set[str]]:
    """What was thought at each batch, by all lives."""
    found: dict[tuple, set[str]] = {}
    for line in (folder / "thoughts.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault((entry["step"], entry["mode"], str(entry["text"])), set()).add(line)
    return found


def random_life(chance: random.Random, operations: dict[str, int], seconds: float) -> tuple[Life, float | None]:
    """One that is to end at a random time, or at a random operation of a random phase."""
    if chance.random() < 0.25:
        return Life(), chance.uniform(0.1, 1.0) * seconds
    phase = chance.choice([name for name, count in operations.items() if count])
    return Life(phase, chance.randint(1, max(operations[phase] // 3, 1))), None


def main(folder: Path, kills: int, steps: int, seed: int) -> dict:
    """Kills so often, in as many chains as that takes, and compares each chain's end."""
    torch.set_num_threads(1)
    start, chance = time.perf_counter(), random.Random(seed)
    model, whole, undisturbed = saved_model(folder / "model"), folder / "whole", Life()
    whole.mkdir()
    spend(whole, model, steps, undisturbed)
    seconds, operations = time.perf_counter() - start, undisturbed.operations()
    oracle, thoughts = torch.load(whole / "end.pt"), thoughts_of(whole)

    killed, chains, wrong = Counter(), 0, []
    while killed.total() < kills:
        run = folder / f"chain-{chains}"
        run.mkdir()
        chains += 1
        deaths = min(chance.randint(4, 12), kills - killed.total())
        while True:
            life, after = random_life(chance, operations, seconds) if deaths > 0 else (Life(), None)
            if not spend(run, model, steps, life, after):
                break
            killed[life.phase] += 1
            wrong += [f"{run.name}: half of {name}" for name in halves(run)]
            deaths -= 1
        found = differences(torch.load(run / "end.pt"), oracle)
        ours = thoughts_of(run)
        found += [f"thoughts at {key}" for key in thoughts.keys() | ours.keys() if ours.get(key) != thoughts.get(key)]
        wrong += [f"{run.name}: {name}" for name in found]
    return {
        "kills": killed.total(),
        "by phase": dict(killed),
        "chains": chains,
        "operations": operations,
        "differences": wrong,
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(main(options.folder, options.kills, options.steps, options.seed)))
