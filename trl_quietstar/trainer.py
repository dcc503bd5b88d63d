"""`QuietStarREINFORCETrainer`: wires the steps of a Quiet-STaR update into the Hugging Face Trainer.

No maths here, and no state: positions, sampling, scoring, rewards, advantages and objective are modules of their own, and four
objects hold what a run keeps. `_compute_loss` reads as the data flows through them.
"""

import itertools
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import SyncRefModelCallback

from .branches.base import BranchPath
from .config import QuietStarConfig
from .learning.metrics import BatchResult
from .learning.objective import Coefficients, LossInputs, WrittenInputs, quietstar_loss
from .learning.reward_functions import RewardFunction, RewardFunctions
from .loading import build_model, default_args, prepare_to_train
from .model.routing import use_router_loss
from .other_trainers import refuse_arguments
from .thinking.drawing import SamplingSettings
from .training.callbacks import AntiTheaterCallback, CurriculumCallback, EmptyEpochCallback, LastWindowCallback
from .training.checks import check_callbacks, check_engine_options, check_inputs, check_streams
from .training.data import collator, prepared, prepared_evaluation
from .training.evaluation import EvaluationTrainer
from .training.faults import FaultGuard
from .training.optimizers import combine, hold_all, set_heads_apart
from .training.preflight import PreflightCallback
from .training.reference import Reference
from .training.resuming import optimizer_fields
from .training.runlog import RunLog
from .training.step import OptimizerStep
from .training.thinker import Thinker


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class QuietStarREINFORCETrainer(EvaluationTrainer):
    """
    Trainer for Quiet-STaR: a causal LM learns to write short hidden thoughts that make ordinary text more predictable.
    The method was proposed in [Quiet-STaR: Language Models Can Teach Themselves to Think Before
    Speaking](https://huggingface.co/papers/2403.09629); this trainer adds a value head, multi-step GAE, an entropy
    bonus with decay, and a KL term.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer

    >>> trainer = QuietStarREINFORCETrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M",
    ...     args=QuietStarConfig(output_dir="out", thought_positions=16),
    ...     train_dataset=load_dataset("openai/gsm8k", "main", split="train").rename_column("question", "text"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained: a model id or local path (loaded with `args.model_init_kwargs`, in float32 unless
            those say otherwise), a causal LM, or one with an adapter. An object is turned into its thinking class in
            place.
        args ([`QuietStarConfig`], *optional*):
            Configuration. Defaults to the default one, with an output directory named after the model.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Text, prompt/completion, conversational or pre-tokenized data. Beside `input_ids`, a column `thought_mask` may say
            after which tokens (1) thoughts are allowed, and `score_mask` which rewards look at. Needed to train, not to evaluate.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Data to evaluate on; never packed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer, or a processor whose tokenizer is taken. Defaults to the model's own. A missing pad token is taken care of.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        reward_functions (`Callable`, `str`, or `list` of them, *optional*):
            In place of `args.reward_type`: functions, or their names as in `args.reward_functions`. The reward is the sum of what
            they give, by `args.reward_weights`. Each is called with the named arguments that its signature asks for, and gives
            one number for each thought (docs/usage.md, "Rewards of your own").
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler, in place of those that `args` describes. An optimizer over a model without heads gets the
            heads as a group of their own, at `args.heads_learning_rate`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Loads the model, given as an id or path, in 4 or 8 bits; needs an adapter to train. Its library may support
            some machines only, and says so.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Wraps the model with an adapter. The heads are trained beside it, and saved with it.

    Raises:
        `FloatingPointError`: from `train`, after `args.max_skipped_steps` optimizer steps with non-finite values in a row.
        `OSError`: if nothing can be written to `args.output_dir`.
        `TypeError`: for an argument that other trainers take and this one does not, with what to do instead.
        `ValueError`: for a model that is no causal LM, data that cannot be trained on, texts too long for the model,
            a `PeftModel` together with `peft_config`, an adapter on the LM head, of a method that a thinking step does not
            train or that is frozen, or an optimizer without all that is trained.
    """

    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL has None; here it is scaled by the counts of the whole step

    _tag_names = ["trl", "quietstar"]
    _name = "Quiet-STaR"
    _paper = {
        "title": "Quiet-STaR: Language Models Can Teach Themselves to Think Before Speaking",
        "id": "2403.09629",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{zelikman2024quietstar,
                title     = {{Quiet-STaR: Language Models Can Teach Themselves to Think Before Speaking}},
                author    = {Eric Zelikman and Georges Harik and Yijia Shao and Varuna Jayasiri and Nick Haber and Noah D. Goodman},
                year      = 2024,
                booktitle = {First Conference on Language Modeling},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: QuietStarConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        reward_functions: RewardFunction | str | list[RewardFunction | str] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        **unknown,
    ):
        refuse_arguments(type(self), QuietStarConfig, unknown)
        args = default_args(model) if args is None else args
        given = (model, args, train_dataset, eval_dataset, processing_class, quantization_config, peft_config)
        check_inputs(*given, brings_metrics=bool(callbacks or reward_functions))
        self.reward_functions = functions = RewardFunctions.of(reward_functions, args)
        set_seed(args.seed)  # adapters and heads start at random
        thinking, tokenizer = build_model(model, args, processing_class, quantization_config, peft_config)
        base = prepare_to_train(thinking, args, needs_weights=train_dataset is not None)
        base.add_model_tags(self._tag_names)
        how = (args, tokenizer, base.config, functions)
        super().__init__(
            model=thinking,
            args=args,
            data_collator=collator(tokenizer, base.config, functions),
            train_dataset=prepared(train_dataset, "train", *how, trains=True),
            eval_dataset=prepared_evaluation(eval_dataset, *how),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine_options(args, self.accelerator, optimizers)
        hold_all(optimizers, self.model, args.heads_learning_rate)
        check_streams(args, self.accelerator, self.train_dataset, self.eval_dataset, functions)
        if train_dataset is not None:
            self._check_output()
        if (args.fp16_full_eval or args.bf16_full_eval) and not self.is_model_parallel:
            self.move_model()  # until `train` or `evaluate`, Transformers leaves it where it was
        self.router_coefficient = use_router_loss(base.config, args.router_aux_loss_coef)
        self.thinker = Thinker(args, self.model, self.accelerator, tokenizer)
        self.reference = Reference(args, self.model, self.accelerator)
        self.ref_model = self.reference.model
        self.step = OptimizerStep(args, self.accelerator, self.thinker, self.reference, functions)
        self.runlog = RunLog(args, self.accelerator, self.thinker)
        self.guard = FaultGuard(args, self.model, self.accelerator, tokenizer, self.save_checkpoint)
        self.anti_theater = AntiTheaterCallback(self)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        args, callbacks = self.args, self.callback_handler.callbacks
        if args.sync_ref_model and self.ref_model is not None:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        if args.anti_theater_steps is not None:
            callbacks.insert(0, self.anti_theater)  # ahead of the loggers, which close at the end of training
        callbacks.insert(0, self.guard)  # drops gradients before others see them
        for callback in (PreflightCallback(self), EmptyEpochCallback(), LastWindowCallback()):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        if args.curriculum:
            self.add_callback(CurriculumCallback(self.thinker))

    def _begin_run(self) -> None:
        check_callbacks(self.callback_handler.callbacks, self.model, self.processing_class)
        super()._begin_run()
        for part in (self.runlog, self.thinker, self.step, self.guard, self.anti_theater):
            part.begin_run()

    @property
    def path(self) -> BranchPath:
        """How branches are run through the model."""
        return self.thinker.path

    @property
    def sampling(self) -> SamplingSettings:
        """How thoughts are sampled."""
        return self.thinker.sampling

    @property
    def entropy_coefficient(self) -> float:
        """Weight of the entropy bonus at the current optimizer step."""
        return self.coefficients().entropy

    def coefficients(self) -> Coefficients:
        """Weights of the objective's terms at the current optimizer step."""
        return Coefficients.of(self.args, self.state.global_step, self.router_coefficient)

    # One step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer does, with the heads in parameter groups that have `heads_learning_rate`; then Muon and Grokfast."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            set_heads_apart(optimizer, self.thinker.base.quietstar, self.args.heads_learning_rate)
            self.optimizer = combine(optimizer, self.model, self.args)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As the Trainer does, without its number of items, which would have to be fetched from the device: the loss is scaled
        by our own counts."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.runlog.begin_step()
        return self.step.begin(batches), None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("QuietStarREINFORCETrainer does not return outputs with its loss.")
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        """From a batch to the loss, through every step of the method; metrics are noted on the way."""
        args = self.args
        rows, part = self.step.take(model, inputs, self.state.global_step)
        request = self.thinker.request(rows.sampled, part)
        lesson = self.thinker.written_request(rows.written) if rows.written is not None else None
        scores, of_lesson = request.scores_beside(model, lesson)
        written = WrittenInputs.of(lesson.text, of_lesson) if lesson is not None and of_lesson is not None else None
        experience, counts = self.step.judge(part, request, scores, rows.columns(inputs), written)
        numbers = LossInputs.of(rows.sampled, scores, experience, args, written)
        loss, terms = quietstar_loss(numbers, self.coefficients(), args.clip_range, counts, part.share)
        batch = BatchResult(rows.sampled, scores, experience, loss, terms, part.share, written=written)
        finite = self.guard.check(batch, part)
        if finite is not None:
            self.runlog.add(replace(batch, finite=finite, **part.judged), request.plan, part.training)
        # engines average gradients over processes, whose parts add up
        return loss * self.accelerator.num_processes if part.training else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and not self.guard.check_gradients():
            self.runlog.forget_faulty()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        ends_window, is_due = "loss" in logs and start_time is not None, self.control.should_log
        if ends_window:  # the Trainer's own log, not a user's
            self.runlog.end_window(logs, self.state.global_step, self.guard.skipped)
        super().log(logs, start_time)
        if not ends_window:  # a callback that logs takes away no window that is due
            self.control.should_log = is_due

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        with self.runlog.untimed():
            self.create_model_card()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # which each process has of its own, as it has experience
        self.step.save(output_dir, self.state.global_step)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.step.restore(checkpoint)

    def _checkpoint_state(self) -> dict:
        own = {"entropy_coefficient": self.entropy_coefficient, "optimizer": optimizer_fields(self.args)}
        parts = (self.runlog, self.thinker, self.step, self.guard, self.anti_theater)
        return own | {name: value for part in parts for name, value in part.state().items()}

    def _restore_checkpoint_state(self, state: dict) -> None:
        for part in (self.runlog, self.thinker, self.step, self.guard, self.anti_theater):
            part.load(state)

    def _has_ended(self) -> bool:
        stops = self.args.anti_theater_steps is not None and self.args.anti_theater_action != "warn"
        return super()._has_ended() or (stops and self.anti_theater.has_stopped)
