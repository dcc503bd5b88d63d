"""`EvaluationTrainer`: what a run measures on data that it does not train on."""

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from .._compat import fingerprint
from ..evaluation.anti_theater import AntiTheaterReport, judge, text_sums
from ..evaluation.meaning import card_name
from ..evaluation.report import card_section
from ..model.adapters import base_of
from ..other_trainers import NO_LOGITS
from .checkpoints import kept_weights
from .data import DataTrainer
from .faults import FaultGuard
from .history import HistoryCallback
from .progress import end_run, show_progress, watched
from .runlog import RunLog
from .step import OptimizerStep
from .thinker import Thinker


class EvaluationTrainer(DataTrainer):
    """The Trainer with evaluations that score thoughts, hold no logits and take any data that training takes; with the validation
    of thoughts; and with a model card that tells what was measured."""

    thinker: Thinker
    step: OptimizerStep
    runlog: RunLog
    guard: FaultGuard

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        show_progress(self.callback_handler)
        if self.train_dataset is not None:
            self.add_callback(HistoryCallback(str(base_of(self.model).config.name_or_path)))

    def _end_run(self) -> None:
        super()._end_run()
        end_run(self.callback_handler)

    def evaluate(
        self,
        eval_dataset: str | Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        As the Trainer does, on any data that the trainer takes: a dataset given here is prepared as `eval_dataset` was.

        Args:
            eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict` of them or `str`, *optional*):
                Data, or the name of one of those given at the start. Defaults to all of those.
            ignore_keys (`list[str]`, *optional*):
                Not used, since there are no predictions.
            metric_key_prefix (`str`):
                Before the name of each metric.

        Returns:
            `dict[str, float]`: Metrics.

        Raises:
            `ValueError`: for data that cannot be evaluated on.
        """
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if isinstance(eval_dataset, str) and eval_dataset not in names:
            raise ValueError(
                f"There is no evaluation data {eval_dataset!r}; the trainer was given "
                f"{', '.join(map(repr, names)) or 'none by name'}. Give a dataset."
            )
        evaluated = self._name_of(eval_dataset)
        # each dataset of a `dict` comes here by itself
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._prepared_as(eval_dataset, metric_key_prefix.removeprefix("eval_"))
        self.runlog.evaluated = evaluated
        try:
            with self.runlog.untimed():
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]  # typed for a `Dataset`, and takes all of these
        finally:
            self.runlog.evaluated = None
        self.runlog.report(metric_key_prefix, self.state)  # only now is this evaluation in the log history
        return metrics

    def predict(
        self,
        test_dataset: Dataset | IterableDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """
        Metrics on other data, which are prepared as `eval_dataset` was. There are no predictions: `generate` writes.

        Args:
            test_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Data of any kind that the trainer takes.
            ignore_keys (`list[str]`, *optional*):
                Not used, since there are no predictions.
            metric_key_prefix (`str`):
                Before the name of each metric.

        Returns:
            [`~transformers.trainer_utils.PredictionOutput`]: Its `metrics`; `predictions` and `label_ids` are None.

        Raises:
            `ValueError`: for data that cannot be evaluated on.
        """
        with self.runlog.untimed():
            return super().predict(self._prepared_as(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, inputs)  # type: ignore[assignment]  # never with outputs
            return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.compute_metrics is not None:
            raise ValueError(f"`compute_metrics` was set on the trainer, which cannot call it: {NO_LOGITS}.")
        self.step.begin_evaluation()
        self.runlog.begin_evaluation()
        casts = (self.args.fp16_full_eval or self.args.bf16_full_eval) and not self.is_in_train
        with kept_weights(self.model) if casts else nullcontext():
            arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
            output = super().evaluation_loop(*arguments)
        step = self.state.global_step
        is_faulty, metrics = bool(self.guard.take_evaluation_faults(step)), output.metrics or {}
        self.runlog.end_evaluation(metrics, metric_key_prefix, step, is_faulty)
        return output._replace(metrics=metrics)

    def _name_of(self, eval_dataset) -> str | None:
        """What evaluations of the same data have in common: the trainer's own go by their metrics' prefix alone, others also
        by a fingerprint; None for what has none."""
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if eval_dataset is None or isinstance(eval_dataset, str) or any(eval_dataset is dataset for dataset in own):
            return ""
        return fingerprint(eval_dataset)

    def hyperparameter_search(self, *args, **kwargs):
        raise NotImplementedError(
            "`hyperparameter_search` makes the model anew for each trial, by a `model_init` that this trainer does not take. "
            "Make a trainer for each trial: in a loop over `QuietStarConfig`s, or in the objective of an Optuna study that "
            "returns `trainer.evaluate()['eval_reward']`."
        )

    def validate_thoughts(self) -> AntiTheaterReport:
        """
        Anti-theater validation on the whole evaluation data: are the thoughts used, or decoration? Deterministic.

        Returns:
            [`~evaluation.anti_theater.AntiTheaterReport`], the same on every process.

        Raises:
            `ValueError`: without evaluation data, or with fewer than two texts of it.
        """
        if self.eval_dataset is None:
            raise ValueError("Anti-theater validation needs an `eval_dataset`.")
        training = self.model.training
        self.model.eval()
        self.step.begin_evaluation()
        generator = torch.Generator().manual_seed(self.args.seed)
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        is_shown = not self.args.disable_tqdm and self.is_world_process_zero()
        with self.runlog.untimed():
            sums = [
                self._examined(inputs, generator)
                for dataset in datasets.values()
                for inputs in watched(self.get_eval_dataloader(dataset), "Validation of the thoughts", is_shown)
            ]
        self.model.train(training)
        return judge(torch.cat(sums), self.args.seed)

    def _examined(self, inputs: dict, generator: torch.Generator) -> torch.Tensor:
        """The sums of each text of a batch that its thoughts are judged by, of all processes."""
        thinker, text = self.thinker, self.thinker.text(inputs)
        plan = thinker.plan(text, training=False)
        thoughts = thinker.sample(text, self.step.alone(text, training=False), plan)
        examined = (text, thoughts, thinker.talk_length(text), thinker.path, self.args.reward_prediction)
        sums = thinker.ask(text, text_sums, *examined, generator, plan)
        return self.accelerator.gather_for_metrics(sums)

    def sampled_thoughts(self) -> dict[str, list]:
        """A few thoughts of the last evaluation, in the columns of [`evaluation.report.thought_table`]; empty before the first."""
        return self.runlog.samples.get("eval", {})

    def create_model_card(  # type: ignore[override]  # as TRL's
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """TRL's model card, with how to load the heads and what the last evaluation measured."""
        if model_name is None:
            model_name = str(self.args.hub_model_id or self.args.output_dir).rstrip("/").split("/")[-1]
        model_name, dataset_name = card_name(model_name), dataset_name and card_name(dataset_name)
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_nll_without" in entry]
        samples = self.runlog.samples.get("eval") or self.runlog.samples.get("train")
        name, evaluation = self.args.hub_model_id or model_name, evaluations[-1] if evaluations else None
        section = card_section(name, is_peft_model(self.model), evaluation, samples, self.args)
        with Path(str(self.args.output_dir), "README.md").open("a", encoding="utf-8", errors="replace") as card:
            card.write(section)
