"""`RunLog`: what a run measures of its batches, and where that goes: the log, tables of thoughts, reports."""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from transformers import TrainerState, is_trackio_available, is_wandb_available
from transformers.utils import logging

from ..branches.memory import Plan
from ..config import QuietStarConfig
from ..evaluation.inspection import inspect_texts
from ..evaluation.page import write_page
from ..evaluation.report import markdown_table, print_thoughts, thought_table
from ..learning.metrics import DERIVED, EVAL_METRICS, PENALIZED, BatchResult, MetricSums, run_metrics
from ..learning.objective import Coefficients
from ..text.positions import usable_positions
from .collapse import CollapseWatch
from .distributed import greatest, summed
from .thinker import Thinker


if is_wandb_available():
    import wandb

if is_trackio_available():
    import trackio


logger = logging.get_logger(__name__)


class RunLog:
    """
    Sums the metrics of batches over logging windows and evaluations, and keeps a few thoughts of each for people to read.

    Args:
        args ([`QuietStarConfig`]):
            Options of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        thinker ([`Thinker`]):
            Asked for the coherence of thoughts, which takes a forward; and for its tokenizer.
    """

    def __init__(self, args: QuietStarConfig, accelerator: Accelerator, thinker: Thinker):
        self.args, self.accelerator, self.thinker = args, accelerator, thinker
        self.collapse = CollapseWatch(warns=accelerator.is_main_process)
        # a few thoughts of the last window ("train") and evaluation ("eval")
        self.samples: dict[str, dict[str, list]] = {}
        self.evaluated: str | None = None  # name of the data that an evaluation is of, while it lasts
        self._inspected: list[dict] | None = None  # texts of an evaluation's first batch, until they are written
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._writer = None  # of TensorBoard, once there is something to write
        self._own: dict[str, set[str]] = {"train": set(), "eval": set()}  # names of metrics of reward functions
        self._read_rewards: deque[float] = deque(maxlen=100)  # of the last optimizer steps
        self.begin_run()

    def begin_run(self) -> None:
        """Forgets the run before."""
        self._sums["train"] = MetricSums()
        self._read_rewards.clear()
        # sum and weight, on the device: of the batches of the current step, and of steps that ended
        self._batch_rewards: list[torch.Tensor] = []
        self._step_rewards: list[torch.Tensor] = []
        self._last_logged_step = 0
        self._window_start: float | None = None  # of the logging window, once a run has its first batch
        self.collapse.begin_run()

    def begin_step(self) -> None:
        """Notes that the batches of an optimizer step are there: the step before has ended, and time runs."""
        self.end_step()
        if self._window_start is None:
            self._window_start = time.perf_counter()

    def end_step(self) -> None:
        """Takes the reward of the optimizer step that ended into the moving average."""
        if self._batch_rewards:
            self._step_rewards.append(torch.stack(self._batch_rewards).sum(0))
            self._batch_rewards = []

    @property
    def recent_rewards(self) -> deque[float]:
        """Mean reward of each of the last 100 optimizer steps that had any."""
        if self._step_rewards:
            sums = torch.stack(self._step_rewards).tolist()
            self._read_rewards.extend(total / weight for total, weight in sums if weight)
            self._step_rewards = []
        return self._read_rewards

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Takes no time of the logging window, so that `rl/tokens_per_second` is of training alone; may be nested."""
        start, window_start = time.perf_counter(), self._window_start
        try:
            yield
        finally:
            if window_start is not None:
                self._window_start = window_start + time.perf_counter() - start

    # Batches

    @torch.no_grad()
    def add(self, batch: BatchResult, plan: Plan, training: bool) -> None:
        """Adds a batch to the running sums, reduced over processes."""
        mode, tokenizer = "train" if training else "eval", self.thinker.tokenizer
        metrics = run_metrics(batch, self.args)
        # of the logging window, among batches with a place for a sampled thought, or of the evaluation
        first = not batch.is_reused and self._first_with_places(batch) if training else not self._sums[mode]
        if first or not training:
            metrics["coherence"] = (self.thinker.coherence(batch, plan), batch.experience.exists)
        if first:
            self.samples[mode] = thought_table(tokenizer, batch, self.args.num_thoughts_to_print)
            if not training and self.args.report_thoughts and self.accelerator.is_main_process:
                self._inspected = inspect_texts(tokenizer, batch.text, batch.experience.thoughts, batch.scores)
        if training:
            tokens = batch.text.predicted().sum() + batch.experience.thoughts.mask.sum()
            if batch.written is not None:
                tokens = tokens + batch.written.text_mask.sum() + batch.written.thought_mask.sum()
            one = torch.ones_like(tokens)
            metrics["num_thoughts"] = (batch.experience.thoughts.mask[..., 0].sum(), one)
            metrics["tokens"] = (tokens, one)
        own = batch.experience.measured
        _refuse_twice(own.keys() & {*metrics, *DERIVED})
        self._own[mode] |= own.keys()
        metrics |= own
        grown = self._sums[mode].add(metrics, lambda sums: summed(sums, self.accelerator), batch.finite)
        if training:
            self._batch_rewards.append(grown["reward"])

    def _first_with_places(self, batch: BatchResult) -> bool:
        """Whether no batch before has been asked for its coherence, and this one can be; the same on every process."""
        if "coherence" in self._sums["train"]:
            return False
        usable = usable_positions(batch.text.host, self.args.thought_positions).any()
        return greatest(int(usable), self.accelerator) > 0

    def forget_faulty(self) -> None:
        """After a step that was skipped: has the next batch begin the logging window, if nothing else is in it."""
        if self._sums["train"].mean("total_loss") is None:
            self._sums["train"] = MetricSums()

    # Logging windows

    def end_window(self, logs: dict[str, float], step: int, skipped: int) -> None:
        """
        Adds the `rl/*` metrics of the logging window that ends to what the Trainer is about to log.

        Args:
            logs (`dict[str, float]`):
                The Trainer's own; changed in place.
            step (`int`):
                Optimizer steps so far.
            skipped (`int`):
                How many of them were skipped.
        """
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that was skipped
            del logs["grad_norm"]
        self.end_step()
        logs.update(self._window(logs, step, skipped))
        logs.update(self.collapse.training(logs, step))
        has_thoughts = "coherence" in self._sums["train"] and "train" in self.samples
        self._sums["train"] = MetricSums()
        if self.args.log_thoughts and has_thoughts and self.accelerator.is_main_process:
            table = self._table("train", step)
            print_thoughts(table, f"Thoughts at step {step}")
            self._send("thoughts", table)

    def _window(self, logs: dict[str, float], step: int, skipped: int) -> dict[str, float]:
        """The metrics of a logging window; those that it did not measure are left out."""
        sums, now = self._sums["train"], time.perf_counter()
        start = now if self._window_start is None else self._window_start
        metrics = {f"rl/{name}": mean for name, mean in sums.means().items() if name != "tokens"}
        rewards = self.recent_rewards
        window = {
            "rl/episode": step,
            "rl/avg_reward_100": sum(rewards) / len(rewards) if rewards else None,
            "rl/entropy_coefficient": Coefficients.of(self.args, step - 1).entropy,  # of the last step
            "rl/num_thoughts": sums.total("num_thoughts") / max(step - self._last_logged_step, 1),
            "rl/learning_rate": logs.get("learning_rate"),
            "rl/grad_norm": logs.get("grad_norm"),
            "rl/skipped_steps": skipped,
            "rl/tokens_per_second": sums.total("tokens") / max(now - start, 1e-9),
        }
        _refuse_twice({f"rl/{name}" for name in self._own["train"]} & window.keys())
        self._window_start, self._last_logged_step = now, step
        return {name: value for name, value in {**metrics, **window}.items() if value is not None}

    # Evaluations

    def begin_evaluation(self) -> None:
        """Begins the sums of an evaluation."""
        self._sums["eval"], self._own["eval"] = MetricSums(), set()

    def end_evaluation(self, metrics: dict[str, float], prefix: str, step: int, is_faulty: bool) -> None:
        """
        Adds the means of the evaluation that ends to the Trainer's metrics of it.

        Args:
            metrics (`dict[str, float]`):
                The Trainer's own; changed in place.
            prefix (`str`):
                Before the name of each metric.
            step (`int`):
                Optimizer steps so far.
            is_faulty (`bool`):
                Whether something in it was not finite. A mean of the other batches would pass for one of all: all are NaN.
        """
        found = self._sums["eval"].means()
        own = {*self._own["eval"], *PENALIZED}
        names = [*EVAL_METRICS, *(name for name in found if name in own or name.startswith("rewards/"))]
        measured = {name: found.get(name) for name in names}
        thinks = self.args.thought_positions != "none"
        # 0 would pass for a measurement, and without its name the Trainer could not look for the best model
        means = {
            name: math.nan if mean is None else mean for name, mean in measured.items() if thinks or mean is not None
        }
        if thinks and not is_faulty and math.isnan(means.get("reward", math.nan)) and self.accelerator.is_main_process:
            logger.warning(
                f"The evaluation {prefix!r} at step {step} has no place for a thought, so that its reward is not measured. Places come "
                "from `thought_positions` (with `difficulty`: from `difficulty_threshold`), from labels, and from `thought_mask`."
            )
        if is_faulty:
            means = dict.fromkeys(("loss", *means), float("nan"))
        metrics.update({f"{prefix}_{name}": mean for name, mean in means.items()})
        if self.evaluated is not None:
            metrics.update(self.collapse.evaluation(metrics, prefix, step, self.evaluated))

    def report(self, prefix: str, state: TrainerState) -> None:
        """Writes the thoughts of the evaluation that ended, where `report_thoughts` asks for it: a page, and a table that is
        sent."""
        if self._inspected is None:
            return
        texts, self._inspected, step = self._inspected, None, state.global_step
        self._send(f"{prefix}_thoughts", self._table("eval", step))
        suffix = prefix.removeprefix("eval").replace("_", "-", 1)
        path = Path(str(self.args.output_dir), "reports", f"step-{step}{suffix}.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, f"Thoughts at step {step}", texts, history=state.log_history)
        if self._reports_to("wandb") and wandb.run is not None:
            page = wandb.Artifact(f"thoughts-{wandb.run.id}", type="report")  # a version of it for each page
            page.add_file(str(path), path.name)
            wandb.run.log_artifact(page)

    def _table(self, mode: str, step: int) -> dict[str, list]:
        samples = self.samples[mode]
        return {"step": [step] * len(samples["thought"]), **samples}

    def _reports_to(self, name: str) -> bool:
        return name in (self.args.report_to or ())

    def _send(self, name: str, table: dict[str, list]) -> None:
        """Sends a table of thoughts to the loggers that are in use and show tables or text."""
        if self._reports_to("wandb") and wandb.run is not None:
            wandb.log({name: wandb.Table(dataframe=pd.DataFrame(table))})
        if self._reports_to("trackio"):
            trackio.log({name: trackio.Table(dataframe=pd.DataFrame(table))})
        if self._reports_to("tensorboard") and table["step"]:
            self._tensorboard().add_text(name, markdown_table(table), table["step"][0])
            self._tensorboard().flush()

    def _tensorboard(self):
        """The writer of thoughts: a run of its own beside that of the metrics, whose writer the Trainer keeps to itself."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            runs = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(str(self.args.output_dir), "runs")
            self._writer = SummaryWriter(str(Path(runs, "thoughts")))
        return self._writer

    # Checkpoints

    def state(self) -> dict:
        """What a checkpoint keeps: the logging window that has begun, the moving reward, and the watch on collapse."""
        self.end_step()
        return {
            "recent_rewards": list(self.recent_rewards),
            "metrics": self._sums["train"].state(),
            "last_logged_step": self._last_logged_step,
            "collapse": self.collapse.state(),
        }

    def load(self, state: dict) -> None:
        """Takes back what [`RunLog.state`] gave."""
        self._read_rewards.extend(state["recent_rewards"])
        self._sums["train"] = MetricSums(state["metrics"])
        self._last_logged_step = state["last_logged_step"]
        self.collapse.load(state["collapse"])


def _refuse_twice(names: set[str]) -> None:
    """Refuses names that a reward function logs and that the run logs too."""
    if names:
        raise ValueError(
            f"A reward function logs {min(names)!r}, which is a metric of the run; log it by another name."
        )
