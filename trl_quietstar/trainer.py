"""`QuietStarREINFORCETrainer`: wires the steps of a Quiet-STaR update into the Hugging Face Trainer.

No maths here, and no state: positions, sampling, scoring, rewards, advantages and objective are modules of their own, and four
objects hold what a run keeps. `_compute_loss` reads as the data flows through them.
"""

import functools
import itertools
import os
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from .branches.base import BranchPath
from .config import QuietStarConfig
from .data.batches import TextCollator
from .evaluation.report import card_name, card_section
from .learning.metrics import BatchResult
from .learning.objective import Coefficients, LossInputs, quietstar_loss
from .learning.rewards import RewardFunction
from .loading import build_model, check_kinds, disable_dropout, pad_token_id
from .model.adapters import base_of, check_trainable
from .model.routing import use_router_loss
from .model.saved import save_settings
from .thinking.drawing import SamplingSettings
from .training.callbacks import (
    AntiTheaterCallback,
    CurriculumCallback,
    EmptyEpochCallback,
    LastWindowCallback,
    check_callbacks,
)
from .training.checks import check_engine_options, check_inputs, check_streams, refuse_unknown
from .training.data import prepared
from .training.evaluation import EvaluationTrainer
from .training.faults import FaultGuard
from .training.optimizers import combine, hold_all, set_heads_apart
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
            Text, prompt/completion, conversational or pre-tokenized data. Beside `input_ids`, a column
            `thought_mask` may say after which tokens (1) thoughts are allowed. Needed to train, not to evaluate.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Data to evaluate on; never packed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer, or a processor whose tokenizer is taken. Defaults to the model's own. A missing pad token is taken care of.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        reward_function (`Callable`, *optional*):
            Your own reward, in place of `args.reward_type`. Called with the named arguments of
            [`~learning.rewards.thought_rewards`] (`logps_with` and so on, `mask`) and `text` and `thoughts`; returns one number for
            each thought, `(B, J, G)`. Any other parameter is a column of the data, a list of one value for each row; with
            `args.remove_unused_columns=False` a function that takes `**kwargs` gets all columns.
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

    loss_is_scaled_for_ga = True  # by the counts of the whole step

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
        reward_function: RewardFunction | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        **unknown,
    ):
        refuse_unknown(unknown)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = QuietStarConfig(f"{name.split('/')[-1]}-QuietStar")
        check_inputs(model, args, train_dataset, eval_dataset, quantization_config, peft_config)
        check_kinds(model, args, processing_class, reward_function)

        set_seed(args.seed)  # adapters and heads start at random
        model, processing_class = build_model(model, args, processing_class, quantization_config, peft_config)
        base = base_of(model)
        base.add_model_tags(self._tag_names)
        if train_dataset is not None:
            check_trainable(model)
        if args.disable_dropout:
            disable_dropout(model)
        if not args.uses_value_head:  # an unused head would stall DDP and drift under weight decay
            base.quietstar.value_head.requires_grad_(False)
        if args.reward_prediction == "thought":
            base.quietstar.mixing_head.requires_grad_(False)
        pad_id = pad_token_id(processing_class)  # which may have been added to the tokenizer alone
        self.reward_function = reward_function
        rest = (args, processing_class, base.config, reward_function)
        evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        evaluation = {name: prepared(dataset, name, *rest) for name, dataset in evaluation.items()}
        super().__init__(
            model=model,
            args=args,
            data_collator=TextCollator(
                pad_id if pad_id < base.config.get_text_config().vocab_size else 0, reward_function is not None
            ),
            train_dataset=prepared(train_dataset, "train", *rest, trains=True),
            eval_dataset=evaluation if isinstance(eval_dataset, dict) else evaluation["eval"],
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine_options(args, self.accelerator, optimizers)
        if optimizers[0] is not None:
            hold_all(*optimizers, self.model, args.heads_learning_rate)
        check_streams(args, self.accelerator, [self.train_dataset, *evaluation.values()], reward_function)
        if train_dataset is not None:
            self._check_output()
        if (args.fp16_full_eval or args.bf16_full_eval) and not self.is_model_parallel:
            self.move_model()  # until `train` or `evaluate`, Transformers leaves it where it was
        self.router_coefficient = use_router_loss(base.config, args.router_aux_loss_coef)
        self.thinker = Thinker(args, self.model, self.accelerator, processing_class)
        self.reference = Reference(args, self.model, self.accelerator)
        self.step = OptimizerStep(args, self.accelerator, self.thinker, self.reference, reward_function)
        self.runlog = RunLog(args, self.accelerator, self.thinker)
        self.guard = FaultGuard(args, self.model, self.accelerator, processing_class, self.save_checkpoint)
        self.anti_theater = AntiTheaterCallback(self)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        args, callbacks = self.args, self.callback_handler.callbacks
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        if args.anti_theater_steps is not None:
            callbacks.insert(0, self.anti_theater)  # ahead of the loggers, which close at the end of training
        callbacks.insert(0, self.guard)  # drops gradients before others see them
        for callback in callbacks:
            if isinstance(callback, JITCheckpointCallback):  # in mid-step it would save a part of the step's metrics
                callback.on_pre_optimizer_step = callback.on_substep_end
        self.add_callback(EmptyEpochCallback())
        self.add_callback(LastWindowCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        if args.curriculum:
            self.add_callback(CurriculumCallback(self.thinker))

    def _begin_run(self) -> None:
        check_callbacks(self.callback_handler.callbacks, self.model)
        super()._begin_run()
        for part in (self.runlog, self.step, self.guard, self.anti_theater):
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
    def ref_model(self) -> nn.Module | None:
        """The reference model, where there is one of its own."""
        return self.reference.model

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
            set_heads_apart(optimizer, base_of(self.model).quietstar, self.args.heads_learning_rate)
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
        text, part = self.step.take(model, inputs, self.state.global_step)
        request = self.thinker.request(text, part)
        scores = model(**request.inputs)
        experience, counts = self.step.judge(part, request, scores, inputs.get("columns"))
        distills, reuses = args.distillation_coefficient != 0, args.num_iterations > 1
        terms_of = LossInputs.of(text, scores, experience, distills, reuses)
        loss, terms = quietstar_loss(terms_of, self.coefficients(), args.clip_range, counts, part.share)
        batch = BatchResult(text, scores, experience, loss, terms, part.share)
        finite = self.guard.check(batch, part)
        if finite is not None:
            self.runlog.add(replace(batch, finite=finite), request.plan, part.training)
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

    # Saving and loading

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if is_peft_model(self.model) and self.args.should_save:
            base, directory = base_of(self.model), output_dir or self.args.output_dir
            save_settings(base, directory)
            base.save_heads(directory, state_dict)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """TRL's model card, with how to load the heads and what the last evaluation measured."""
        if model_name is None:
            model_name = (self.args.hub_model_id or self.args.output_dir).rstrip("/").split("/")[-1]
        model_name, dataset_name = card_name(model_name), dataset_name and card_name(dataset_name)
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_nll_without" in entry]
        samples = self.runlog.samples.get("eval") or self.runlog.samples.get("train")
        name, evaluation = self.args.hub_model_id or model_name, evaluations[-1] if evaluations else None
        section = card_section(name, is_peft_model(self.model), evaluation, samples)
        with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8", errors="replace") as card:
            card.write(section)

    def _save_checkpoint(self, model, trial) -> None:
        with self.runlog.untimed():
            self.create_model_card()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # which each process has of its own, as it has experience
        if self.state.global_step % self.args.num_iterations:
            save_file(self.step.state(), self._experience_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.isfile(self._experience_file(checkpoint)):
            self.step.load(load_file(self._experience_file(checkpoint), device=str(self.accelerator.device)))

    def _experience_file(self, folder: str) -> str:
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        return os.path.join(folder, f"quietstar_experience-{process}-of-{count}.safetensors")

    def _checkpoint_state(self) -> dict:
        own = {"entropy_coefficient": self.entropy_coefficient, "optimizer": optimizer_fields(self.args)}
        parts = (self.runlog, self.thinker, self.guard, self.anti_theater)
        return functools.reduce(lambda state, part: state | part.state(), parts, own)

    def _restore_checkpoint_state(self, state: dict) -> None:
        for part in (self.runlog, self.thinker, self.guard, self.anti_theater):
            part.load(state)

    def _has_ended(self) -> bool:
        stops = self.args.anti_theater_steps is not None and self.args.anti_theater_action != "warn"
        return super()._has_ended() or (stops and self.anti_theater.has_stopped)
