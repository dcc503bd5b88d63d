"""`QuietStarREINFORCETrainer`: wires the steps of a Quiet-STaR update into the Hugging Face Trainer.

No maths here: positions, sampling, scoring, rewards, advantages and objective are modules of their own, and
`_compute_loss` reads as the data flows through them.
"""

import copy
import functools
import itertools
import math
import os
import textwrap
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    is_trackio_available,
    is_wandb_available,
)
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PredictionOutput
from trl import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from ._compat import fingerprint, left_on_host
from .branches.cached_replay import CachedReplay
from .branches.memory import Plan, Size, free_bytes, kept_per_token, memory_budget, plan_batch
from .branches.replay import Replay
from .branches.shared_prefix import SharedPrefix
from .config import QuietStarConfig
from .data.prepare import (
    OWN_COLUMNS,
    RepeatedRows,
    TextCollator,
    check_amount,
    check_longest,
    longest_text,
    prepare_texts,
)
from .evaluation.anti_theater import AntiTheaterReport, check_texts, judge, text_sums
from .evaluation.inspection import inspect_texts
from .evaluation.page import write_page
from .evaluation.report import card_name, card_section, print_thoughts, thought_table
from .learning.experience import Experience, StepPart, experience_of, finish_advantages, flat, unflat
from .learning.metrics import BatchResult, MetricSums, batch_metrics
from .learning.objective import Coefficients, LossInputs, TokenCounts, entropy_coefficient, quietstar_loss
from .learning.rewards import RewardFunction, coherence, column_parameters, has_columns
from .loading import build_model, check_adapter, check_kinds, check_quantization, disable_dropout, pad_token_id
from .model.adapters import AdapterReference, base_of, check_trainable
from .model.routing import has_router_loss, use_router_loss
from .modeling import save_settings
from .text.batch import Text, Thoughts, talk_after
from .text.positions import most_positions, seeded_generators, talk_span
from .thinking.check import choose_path
from .thinking.drawing import thought_sampling
from .thinking.sampling import ThoughtSampler
from .thinking.scoring import ScoreRequest, Scores, ThoughtScores, score_thoughts
from .training.callbacks import (
    AntiTheaterCallback,
    CurriculumCallback,
    EmptyEpochCallback,
    LastWindowCallback,
    check_callbacks,
)
from .training.checkpoints import CheckpointTrainer, kept_weights
from .training.collapse import CollapseWatch
from .training.distributed import check_engine, greatest, is_sharded, prepare_reference
from .training.faults import FaultGuard
from .training.folders import check_output_dir
from .training.optimizers import check_optimizers, combine, hold_all
from .training.resuming import optimizer_fields


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

if is_wandb_available():
    import wandb

if is_trackio_available():
    import trackio


NO_LOGITS = (
    "evaluation scores thoughts and holds no logits. `evaluate` returns reward, NLL and accuracy; for a number of your own "
    "call `model.log_likelihoods` or `model.generate` in a callback's `on_evaluate`."
)
# what other trainers take, and what to do here
UNKNOWN = {
    "compute_loss_func": "the loss is Quiet-STaR's; weigh its terms by the coefficients of `QuietStarConfig`.",
    "compute_metrics": NO_LOGITS,
    "data_collator": "rows are padded with their thought positions by its own; bring `input_ids`, `labels` and `thought_mask`.",
    "formatting_func": "map the dataset to a `text` column first.",
    "model_init": "give the model as `model`; make a trainer for each trial of a search.",
    "optimizer_cls_and_kwargs": "set `optim` and `optim_args`, or give an optimizer in `optimizers`.",
    "preprocess_logits_for_metrics": NO_LOGITS,
    "ref_model": "the reference is a copy of the model at the start, kept where `beta` is above 0.",
    "reward_funcs": "give one `reward_function`.",
    "tokenizer": "give it as `processing_class`.",
}

EVAL_METRICS = ("reward", "nll_with", "nll_without", "accuracy_with", "accuracy_without", "coherence")


class QuietStarREINFORCETrainer(CheckpointTrainer):
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
        _refuse_unknown(unknown)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = QuietStarConfig(f"{name.split('/')[-1]}-QuietStar")
        _check_inputs(model, args, train_dataset, eval_dataset, quantization_config, peft_config)
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
        prepared = functools.partial(_prepared, processing_class, args, base.config, reward_function)
        super().__init__(
            model=model,
            args=args,
            data_collator=TextCollator(
                pad_id if pad_id < base.config.get_text_config().vocab_size else 0, reward_function is not None
            ),
            train_dataset=prepared(train_dataset, "train", trains=True),
            eval_dataset=(
                {name: prepared(x, name) for name, x in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else prepared(eval_dataset, "eval")
            ),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"`nn.DataParallel` on {args.n_gpu} GPUs is not supported; launch with `accelerate launch`, or make a "
                "single GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        check_optimizers(args, optimizers, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if optimizers[0] is not None:
            hold_all(*optimizers, self.model, args.heads_learning_rate)
        check_engine(self.accelerator)
        self._check_streams()
        if train_dataset is not None:
            self._check_output()
        self._sharded = is_sharded(self.accelerator)
        if args.anti_theater_action == "rollback" and self._sharded and self.is_deepspeed_enabled:
            raise ValueError(
                "`anti_theater_action='rollback'` takes back weights that ZeRO-3 has partitioned; use 'stop', or FSDP2."
            )
        if args.fp16_full_eval or args.bf16_full_eval:
            if self._sharded:
                raise ValueError(
                    f"`fp16_full_eval` ({args.fp16_full_eval}) and `bf16_full_eval` ({args.bf16_full_eval}) cast the weights, "
                    "which cannot be taken back where they are sharded; leave them out, and set `bf16=True`."
                )
            if not self.is_model_parallel:  # until `train` or `evaluate`, Transformers leaves it where it was
                self.move_model()
        self.router_coefficient = use_router_loss(base.config, args.router_aux_loss_coef)
        self.path = choose_path(base, args.thought_path, with_dropout=not args.disable_dropout)
        if self._sharded and isinstance(self.path, CachedReplay):  # reads texts in as many forwards as they need
            self.path = Replay()
        self._prepare_reference()
        self._add_callbacks()
        self._samples_in_graph = self._can_sample_in_graph()
        if args.single_pass and not self._samples_in_graph:
            raise ValueError(
                f"`single_pass=True` needs a model whose attention can branch, that trains no router and whose parameters are "
                f"not sharded, which {type(base).__name__} is not here; leave it out."
            )
        # bytes; the same on all processes, and in a run that resumes. Measured when they are needed, or before parameters are
        # sharded
        self._kept_per_token: float | None = None
        self._memory_budget: int | None = None
        if self._sharded and args.branch_batch_size is None and not args.gradient_checkpointing:
            with self.accelerator.autocast():
                self._kept_per_token = kept_per_token(base)
        self.adopt_settings()
        self._metrics = {"train": MetricSums(), "eval": MetricSums()}
        self._read_rewards: deque[float] = deque(maxlen=100)  # of the last optimizer steps
        # sum and weight, on the device: of the batches of the current step, and of steps that ended
        self._batch_rewards: list[torch.Tensor] = []
        self._step_rewards: list[torch.Tensor] = []
        self._rows_seen = 0  # of the evaluation, before the current batch
        self._batches: list[dict] = []  # of the current optimizer step
        self._parts: list[StepPart] = []
        self._experiences: list[Experience] = []  # of each batch of a step, for further updates on it
        self._last_logged_step = 0
        self._window_start: float | None = None  # of the logging window, once a run has its first batch
        self._evaluated: str | None = None  # name of the data that `evaluate` is on
        self._samples: dict[str, list] = {}
        self._inspected: list[dict] | None = None  # texts of an evaluation's first batch, until they are written

    def _check_streams(self) -> None:
        """A stream that one process reads for all is dealt out as tensors, and columns are none."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        streams = [x for x in (self.train_dataset, *evaluation.values()) if isinstance(x, IterableDataset)]
        if self.accelerator.num_processes == 1 or self.accelerator.dispatch_batches is False or not streams:
            return
        if self.reward_function is not None and has_columns(self.reward_function, self.args):
            raise ValueError(
                "`reward_function` takes columns of a stream, which one process reads for all; set "
                "`accelerator_config={'dispatch_batches': False}`, or load the data whole."
            )

    def _begin_run(self) -> None:
        check_callbacks(self.callback_handler.callbacks, self.model)
        super()._begin_run()
        self._metrics["train"] = MetricSums()
        self._read_rewards.clear()
        self._batch_rewards, self._step_rewards = [], []
        self._batches, self._parts, self._experiences = [], [], []
        self._last_logged_step, self._window_start = 0, None
        self._guard.begin_run()
        self._anti_theater.begin_run()
        self._collapse.begin_run()

    def _add_callbacks(self) -> None:
        args = self.args
        self._guard, self._anti_theater = FaultGuard(self), AntiTheaterCallback(self)
        self._collapse = CollapseWatch(warns=self.is_world_process_zero())
        if args.anti_theater_steps is not None:
            # ahead of the loggers, which close at the end of training
            self.callback_handler.callbacks.insert(0, self._anti_theater)
        self.callback_handler.callbacks.insert(0, self._guard)  # drops gradients before others see them
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):  # in mid-step it would save a part of the step's metrics
                callback.on_pre_optimizer_step = callback.on_substep_end
        self.add_callback(EmptyEpochCallback())
        self.add_callback(LastWindowCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        if args.curriculum:
            self.add_callback(CurriculumCallback(self))

    def _can_sample_in_graph(self) -> bool:
        """Not where dropout would be on in sampling, nor where routers are watched forward by forward, nor where each
        forward of a layer in the graph costs another reduction of its gradients."""
        args, base = self.args, base_of(self.model)
        return (
            type(self.path) is SharedPrefix
            and args.disable_dropout
            and args.policy_temperature is None  # what was drawn is known at that of sampling
            and not (args.gradient_checkpointing or base.is_gradient_checkpointing)
            and args.single_pass is not False
            and args.branch_batch_size is None
            and not has_router_loss(base.config)
            and not self._sharded
        )

    # Model and reference

    def adopt_settings(self) -> None:
        """Takes over from `args` how thoughts are drawn and read, for what follows."""
        base_of(self.model).adopt_settings(self.args.settings())
        self.sampling = thought_sampling(self.args.settings(), self.processing_class, self.args.num_thoughts)

    def _prepare_reference(self) -> None:
        """A frozen copy of the policy, or under PEFT what the adapter was at the start."""
        self.ref_model, self._adapter_reference = None, None
        if not self.args.uses_reference:
            return
        if is_peft_model(self.model):
            if self.args.sync_ref_model:
                raise ValueError(
                    "`sync_ref_model=True` needs a reference of its own, but under PEFT the reference is the adapter as it was "
                    "at the start; set `sync_ref_model=False`."
                )
            self._adapter_reference = AdapterReference(self.model, self._sharded)
            return
        self.ref_model = prepare_reference(copy.deepcopy(self.model).requires_grad_(False).eval(), self.accelerator)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    @contextmanager
    def _reference(self):
        """The reference policy, ready to be scored with."""
        if self._adapter_reference is None:
            yield self.ref_model
            return
        with self._adapter_reference.in_place():
            yield self.model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer does, with the heads in parameter groups that have `heads_learning_rate`; then Muon and Grokfast."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        heads = {id(p) for p in base_of(self.model).quietstar.parameters()}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in heads]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                options = {k: v for k, v in group.items() if k != "params"}
                optimizer.add_param_group({**options, "params": own, "lr": self.args.heads_learning_rate})
        self.optimizer = combine(optimizer, self.model, self.args)
        return self.optimizer

    def _set_signature_columns_if_needed(self) -> None:
        named = {} if self.reward_function is None else column_parameters(self.reward_function)[0]
        self.keep_columns([*OWN_COLUMNS, *named])

    # One step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("QuietStarREINFORCETrainer does not return outputs with its loss.")
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        """From a batch to the loss, through every step of the method; metrics are noted on the way."""
        args, mode = self.args, "train" if model.training else "eval"
        text = self._text(inputs)
        part = self._part(inputs["part"]) if "part" in inputs else self._lone_part(text, mode)
        plan = self._plan(text, mode)
        scores = model(
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            quietstar_request=self._score_request(text, part, mode, plan),
        )
        experience, reduce = part.experience, self._reduce if mode == "train" else _alone
        if experience is None:
            experience = self._experience(text, scores, inputs, plan)
            (experience,) = finish_advantages([experience], args, reduce)
            if mode == "train" and args.num_iterations > 1:
                self._experiences.append(experience)
        counts = part.counts or TokenCounts.total([experience.counts(text)], reduce)
        distills, reuses = args.distillation_coefficient != 0, args.num_iterations > 1
        inputs = LossInputs.of(text, scores, experience, distills, reuses)
        loss, terms = quietstar_loss(inputs, self._coefficients(), args.clip_range, counts, part.share)
        with torch.no_grad():
            batch = BatchResult(text, scores, experience, loss, terms, part.share)
            finite = self._guard.check(batch, part.rows, mode)
            if finite is not None:
                self._note_metrics(replace(batch, finite=finite), mode, plan)
        # engines average gradients over processes, whose parts add up
        return loss * self.accelerator.num_processes if mode == "train" else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and not self._guard.check_gradients():
            metrics = self._metrics["train"]
            if metrics.mean("reward") is None:  # the window has nothing yet: the next batch begins it
                self._metrics["train"] = MetricSums()
        return loss

    def _text(self, inputs: dict) -> Text:
        text = Text.from_batch(**{name: x for name, x in inputs.items() if name not in ("part", "columns")})
        if self.args.max_length is None:
            check_longest(int(text.host.position_ids.max()) + 1, self.args, base_of(self.model).config)
        return text.to(self.accelerator.device)

    # The batches of a step

    def get_train_dataloader(self) -> DataLoader:
        return left_on_host(super().get_train_dataloader())

    def _prepare_inputs(self, inputs: dict) -> dict:
        """A batch stays in the host's memory, where its masks and lengths are read; [`_text`] moves what the model needs."""
        return inputs

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        """As the Trainer does; the rows of a step come again for each further update on them."""
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        batches = (
            1 if self.accelerator.split_batches else self.accelerator.num_processes
        )  # read at once, by all processes
        return RepeatedRows(
            dataset,
            mini_repeat_count=1,
            batch_size=self.rows_per_batch * args.gradient_accumulation_steps * batches,
            repeat_count=args.num_iterations,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=(
                [len(ids) for ids in dataset["input_ids"]]
                if args.train_sampling_strategy == "group_by_length"
                else None
            ),
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As the Trainer does; each batch comes with its part of the optimizer step, so that several batches, here and on
        other processes, add up to what one batch of all would be."""
        self._finish_step()
        # not looked at yet: a callback may change settings as the step begins
        self._batches, self._parts = list(itertools.islice(epoch_iterator, num_batches)), []
        if self._window_start is None:
            self._window_start = time.perf_counter()
        # no number of items, which the Trainer would have to fetch from the device: the loss is scaled by our own counts
        return [{**batch, "part": i} for i, batch in enumerate(self._batches)], None

    def _part(self, index: int) -> StepPart:
        if not self._parts:
            self._parts = self._step_parts(self._batches)
        return self._parts[index]

    def _step_parts(self, batches: list[dict]) -> list[StepPart]:
        """Of each batch, with what the step's means are taken over as far as several batches need to know it ahead."""
        args, texts = self.args, [self._text(batch) for batch in batches]
        share = 1 / max(len(batches) * self.accelerator.num_processes, 1)
        rows = [len(text.input_ids) for text in texts]
        parts = [StepPart(self._row_indices(n, sum(rows[:i])), share) for i, n in enumerate(rows)]
        if self.state.global_step % args.num_iterations == 0 or [len(x.rewards) for x in self._experiences] != rows:
            self._experiences = []  # of another sampling, or of other processes
        if self._experiences:
            parts = [replace(part, experience=x) for part, x in zip(parts, self._experiences, strict=True)]
        elif len(batches) < 2:
            return parts
        elif args.normalize_advantages:
            parts = self._judged_ahead(batches, texts, parts)
        elif args.thought_positions == "difficulty" or self.sampling.stop is not None:
            pairs = zip(texts, parts, strict=True)
            parts = [replace(part, thoughts=self._sampled_ahead(text, part)) for text, part in pairs]
        counts = TokenCounts.total([self._counts(*x) for x in zip(texts, parts, strict=True)], self._reduce)
        return [replace(part, counts=counts) for part in parts]

    def _counts(self, text: Text, part: StepPart) -> TokenCounts:
        """Tokens of a batch, some of which are known before its thoughts are."""
        if part.experience is not None:
            return part.experience.counts(text)
        if part.thoughts is None:
            positions = self._sampler(part, "train").positions(text)
            mask = positions.mask[..., None, None].expand(-1, -1, self.args.num_thoughts, self.args.thought_length)
        else:
            positions, mask = part.thoughts.positions, part.thoughts.mask
        talk_mask = talk_after(text, positions, self._talk_length(text)).target_mask[:, :, None]
        return TokenCounts.of(mask, talk_mask, text.predicted())

    def _sampled_ahead(self, text: Text, part: StepPart) -> Thoughts:
        return self._sample_thoughts(text, self._sampler(part, "train"), self._plan(text, "train"))

    @torch.no_grad()
    def _judged_ahead(self, batches: list[dict], texts: list[Text], parts: list[StepPart]) -> list[StepPart]:
        """Thoughts of all batches and what they are worth, in a pass of their own: advantages are standardized over all
        of them, before the first one is trained on."""
        experiences = []
        for batch, text, part in zip(batches, texts, parts, strict=True):
            plan, sampled = self._plan(text, "train"), replace(part, thoughts=self._sampled_ahead(text, part))
            request = self._score_request(text, sampled, "train", plan)
            with self.compute_loss_context_manager():
                scores = self.model_wrapped(
                    input_ids=text.input_ids, attention_mask=text.attention_mask, quietstar_request=request
                )
            experiences.append(self._experience(text, scores, batch, plan))
        experiences = finish_advantages(experiences, self.args, self._reduce)
        return [replace(part, experience=x) for part, x in zip(parts, experiences, strict=True)]

    def _experience(self, text: Text, scores: Scores, batch: dict, plan: Plan) -> Experience:
        reference, columns = self._score_reference(text, scores.thoughts, plan), batch.get("columns")
        return experience_of(text, scores, reference, self.args, self.sampling, self.reward_function, columns)

    def _row_indices(self, rows: int, before: int) -> list[int]:
        """Index of each of a batch's rows in the step's global batch, or in the evaluation data, where processes have read
        `before` rows each."""
        start = before * self.accelerator.num_processes + self.accelerator.process_index * rows
        return list(range(start, start + rows))

    def _lone_part(self, text: Text, mode: str) -> StepPart:
        """Of a batch that is evaluated, or that `compute_loss` got by hand."""
        rows, before = len(text.input_ids), self._rows_seen if mode == "eval" else 0
        self._rows_seen += rows if mode == "eval" else 0
        return StepPart(self._row_indices(rows, before))

    def _score_request(self, text: Text, part: StepPart, mode: str, plan: Plan) -> ScoreRequest:
        """What to score, and whether thoughts are sampled before or on the way."""
        args = self.args
        thoughts: Thoughts | ThoughtSampler | None = part.experience.thoughts if part.experience else part.thoughts
        if thoughts is None:
            sampler = self._sampler(part, mode)
            thoughts = sampler if plan.single_pass else self._sample_thoughts(text, sampler, plan)
        return ScoreRequest(
            text,
            thoughts,
            self._talk_length(text),
            self.path,
            args.logps_temperature,
            args.reward_prediction,
            plan.training if mode == "train" else plan.scoring,
        )

    def _talk_length(self, text: Text) -> int:
        return talk_span(text, self.args.talk_length, self.args.thought_positions)

    def _plan(self, text: Text, mode: str) -> Plan:
        """Whether one pass is enough for a batch, and how many branches to run at once if not."""
        args, size = self.args, self.args.branch_batch_size
        if args.single_pass:
            return Plan(self._samples_in_graph)
        in_all = functools.partial(greatest, accelerator=self.accelerator) if self._sharded else int
        B, T = text.input_ids.shape
        branches = args.num_thoughts * most_positions(text, args.thought_positions, args.min_thought_interval)
        slots = args.thought_length + self._talk_length(text) + 1
        with self.accelerator.autocast():
            kept, free = self._memory(mode)
            plan = plan_batch(
                base_of(self.model),
                self.path,
                Size(B, T, in_all(branches), slots),
                kept,
                free,
                self._samples_in_graph,
                lambda number: -in_all(-number),
            )
        return plan if size is None else replace(plan, training=size, scoring=size)

    def _memory(self, mode: str) -> tuple[float | None, int]:
        """Bytes that a token keeps for the backward, where groups are chosen for one, and bytes that are free."""
        base = base_of(self.model)
        if mode == "eval":
            return None, free_bytes(base.device)
        if self._memory_budget is None:  # that of the process with the least
            self._memory_budget = -greatest(-memory_budget(base), self.accelerator)
        if self.args.gradient_checkpointing or self.args.branch_batch_size is not None:
            return None, self._memory_budget
        if self._kept_per_token is None:
            self._kept_per_token = kept_per_token(base)
        return self._kept_per_token, self._memory_budget

    def _sampler(self, part: StepPart, mode: str) -> ThoughtSampler:
        """How the thoughts of a batch are drawn, each row's from its own random numbers."""
        args, settings = self.args, self.sampling
        if mode == "eval" and not args.eval_do_sample:
            settings = replace(settings, do_sample=False)
        step = self.state.global_step if mode == "train" else 0
        generators = seeded_generators(args.seed, step, part.rows)
        return ThoughtSampler(
            settings,
            generators,
            args.thought_positions,
            args.difficulty_threshold,
            args.min_thought_interval,
            functools.partial(greatest, accelerator=self.accelerator) if self._sharded else int,
        )

    def _sample_thoughts(self, text: Text, sampler: ThoughtSampler, plan: Plan) -> Thoughts:
        """Thoughts of a batch, without gradient."""
        base = base_of(self.model)
        training = base.training
        base.eval()  # no dropout, and a cache even where layers are checkpointed
        try:
            return self._ask(self.model, text, sampler.sample, text, self.path, plan.sampling)
        finally:
            base.train(training)

    @torch.no_grad()
    def _ask(self, model: nn.Module, text: Text, function: Callable, *args, **kwargs):
        """What a function of the base model says, called inside the forward of the model around it, where sharded weights
        are there."""
        with self.accelerator.autocast():
            return model(
                input_ids=text.input_ids,
                attention_mask=text.attention_mask,
                quietstar_request=lambda base: function(base, *args, **kwargs),
            )

    def _score_reference(self, text: Text, thoughts: Thoughts, plan: Plan) -> ThoughtScores | None:
        if not self.args.uses_reference:
            return None
        args = (text, thoughts, self.path, self.args.logps_temperature)
        with self._reference() as reference:
            return self._ask(reference, text, score_thoughts, *args, branch_batch_size=plan.scoring)

    def _coefficients(self) -> Coefficients:
        return Coefficients.of(self.args, self.state.global_step, self.router_coefficient)

    @property
    def entropy_coefficient(self) -> float:
        """Weight of the entropy bonus at the current optimizer step."""
        return self._entropy_coefficient(self.state.global_step)

    def _entropy_coefficient(self, step: int) -> float:
        args = self.args
        return entropy_coefficient(step, args.entropy_coefficient, args.entropy_decay, args.min_entropy_coefficient)

    # Metrics

    def _note_metrics(self, batch: BatchResult, mode: str, plan: Plan) -> None:
        """Adds a batch to the running sums, reduced over processes."""
        metrics = batch_metrics(batch)
        if not self.args.uses_value_head:
            metrics["value_loss"] = metrics["_residual"] = None
        if self.args.thought_positions == "none":  # no talk to take them on: of all text
            predicted = batch.text.predicted()
            metrics["nll_without"] = (-batch.scores.text_logps, predicted)
            metrics["accuracy_without"] = (batch.scores.text_correct, predicted)
        if self.args.num_iterations > 1:
            low, high = self.args.clip_range
            ratio = torch.exp(batch.scores.thought_logps - batch.experience.sampled_logps)
            metrics["clip_ratio"] = ((ratio < 1 - low) | (ratio > 1 + high), batch.experience.thoughts.mask)
        first = not self._metrics[mode]  # of the logging window or of the evaluation
        if mode == "eval" or first:
            metrics["coherence"] = (self._coherence(batch, plan), batch.experience.exists)
        if first:
            self._samples[mode] = thought_table(self.processing_class, batch, self.args.num_thoughts_to_print)
            if mode == "eval" and self.args.report_thoughts and self.accelerator.is_main_process:
                self._inspected = inspect_texts(
                    self.processing_class, batch.text, batch.experience.thoughts, batch.scores
                )
        if mode == "train":
            tokens = batch.text.predicted().sum() + batch.experience.thoughts.mask.sum()
            metrics["num_thoughts"] = (batch.experience.exists.sum(), torch.ones((), device=tokens.device))
            metrics["tokens"] = (tokens, torch.ones_like(tokens))
        grown = self._metrics[mode].add(metrics, self._reduce, batch.finite)
        if mode == "train":
            self._batch_rewards.append(grown["reward"])

    def _reduce(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.to(self.accelerator.device), "sum")

    def _coherence(self, batch: BatchResult, plan: Plan) -> torch.Tensor:
        experience, thoughts = batch.experience, batch.experience.thoughts
        args = (batch.text, thoughts, self.path)
        plain = self._ask(self.model, batch.text, score_thoughts, *args, start=False, branch_batch_size=plan.scoring)
        return coherence(
            batch.scores.similarity,
            plain.thought_logps,
            thoughts.mask,
            batch.scores.talk_logps,
            experience.logps_without,
            experience.talk_mask,
        )

    def _finish_step(self) -> None:
        """Takes the reward of the optimizer step that ended into the moving average."""
        if self._batch_rewards:
            self._step_rewards.append(torch.stack(self._batch_rewards).sum(0))
            self._batch_rewards = []

    @property
    def _recent_rewards(self) -> deque[float]:
        """Mean reward of each of the last 100 optimizer steps that had any."""
        if self._step_rewards:
            sums = torch.stack(self._step_rewards).tolist()
            self._read_rewards.extend(total / weight for total, weight in sums if weight)
            self._step_rewards = []
        return self._read_rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        ends_window, is_due = "loss" in logs and start_time is not None, self.control.should_log
        if ends_window:  # the Trainer's own log, not a user's
            if not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that was skipped
                del logs["grad_norm"]
            self._finish_step()
            logs.update(self._training_metrics(logs))
            logs.update(self._collapse.training(logs, self.state.global_step))
            self._metrics["train"] = MetricSums()
            if self.args.log_thoughts and "train" in self._samples and self.accelerator.is_main_process:
                self._log_thoughts()
        super().log(logs, start_time)
        if not ends_window:  # a callback that logs takes away no window that is due
            self.control.should_log = is_due

    def _training_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """The `rl/*` metrics of a logging window; those that it did not measure are left out."""
        sums, now = self._metrics["train"], time.perf_counter()
        start = now if self._window_start is None else self._window_start
        steps = max(self.state.global_step - self._last_logged_step, 1)
        metrics = {f"rl/{name}": mean for name, mean in sums.means().items() if name != "tokens"}
        rewards = self._recent_rewards
        metrics.update(
            {
                "rl/episode": self.state.global_step,
                "rl/avg_reward_100": sum(rewards) / max(len(rewards), 1),
                "rl/entropy_coefficient": self._entropy_coefficient(self.state.global_step - 1),  # of the last step
                "rl/num_thoughts": sums.total("num_thoughts") / steps,
                "rl/learning_rate": logs.get("learning_rate"),
                "rl/grad_norm": logs.get("grad_norm"),
                "rl/skipped_steps": self._guard.skipped,
                "rl/tokens_per_second": sums.total("tokens") / max(now - start, 1e-9),
            }
        )
        self._window_start, self._last_logged_step = now, self.state.global_step
        return {name: value for name, value in metrics.items() if value is not None}

    @contextmanager
    def _untimed(self):
        """Takes no time of the logging window, so that `rl/tokens_per_second` is of training alone; may be nested."""
        start, window_start = time.perf_counter(), self._window_start
        try:
            yield
        finally:
            if window_start is not None:
                self._window_start = window_start + time.perf_counter() - start

    def _log_thoughts(self) -> None:
        table = self._table("train")
        print_thoughts(table, f"Thoughts at step {self.state.global_step}")
        self._send_table("thoughts", table)

    def _table(self, mode: str) -> dict[str, list]:
        samples = self._samples[mode]
        return {"step": [self.state.global_step] * len(samples["thought"]), **samples}

    def _send_table(self, name: str, table: dict[str, list]) -> None:
        """Sends a table of thoughts to W&B and trackio, where they are in use."""
        backends = []
        if "wandb" in self.args.report_to and wandb.run is not None:
            backends.append(wandb)
        if "trackio" in self.args.report_to:
            backends.append(trackio)
        for backend in backends:
            backend.log({name: backend.Table(dataframe=pd.DataFrame(table))})

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        if self.compute_metrics is not None:
            raise ValueError(f"`compute_metrics` was set on the trainer, which cannot call it: {NO_LOGITS}")
        self._rows_seen, self._metrics["eval"] = 0, MetricSums()
        casts = (self.args.fp16_full_eval or self.args.bf16_full_eval) and not self.is_in_train
        with kept_weights(self.model) if casts else nullcontext():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = {name: self._metrics["eval"].mean(name) for name in EVAL_METRICS}
        thinks = self.args.thought_positions != "none"
        means = {name: mean or 0.0 for name, mean in means.items() if thinks or mean is not None}
        if self._guard.take_evaluation_faults():  # a mean of the other batches would pass for one of all
            means = dict.fromkeys(("loss", *means), float("nan"))
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        if self._evaluated is not None:
            watched = (output.metrics, metric_key_prefix, self.state.global_step, self._evaluated)
            output.metrics.update(self._collapse.evaluation(*watched))
        return output

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return left_on_host(super().get_eval_dataloader(eval_dataset))
        return self.get_test_dataloader(eval_dataset)  # never one that persistent workers hold of another dataset

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return left_on_host(super().get_test_dataloader(test_dataset))

    def _prepared_as(self, dataset, name: str):
        """A dataset that came after the start, as those that were given then."""
        config = base_of(self.model).config
        return _prepared(self.processing_class, self.args, config, self.reward_function, dataset, name)

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
        self._evaluated = evaluated
        try:
            with self._untimed():
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated = None
        if self._inspected is not None:  # only now is this evaluation in the log history
            texts, self._inspected = self._inspected, None
            self._send_table(f"{metric_key_prefix}_thoughts", self._table("eval"))
            suffix = metric_key_prefix.removeprefix("eval").replace("_", "-", 1)
            path = Path(self.args.output_dir, "reports", f"step-{self.state.global_step}{suffix}.html")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_page(path, f"Thoughts at step {self.state.global_step}", texts, history=self.state.log_history)
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
        with self._untimed():
            return super().predict(self._prepared_as(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

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
        with self._untimed():
            return self._validate_thoughts()

    def _validate_thoughts(self) -> AntiTheaterReport:
        if self.eval_dataset is None:
            raise ValueError("Anti-theater validation needs an `eval_dataset`.")
        args, training = self.args, self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(args.seed)
        self._rows_seen, sums = 0, []
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for dataset in datasets.values():
            for inputs in self.get_eval_dataloader(dataset):
                text = self._text(inputs)
                plan = self._plan(text, "eval")
                thoughts = self._sample_thoughts(text, self._sampler(self._lone_part(text, "eval"), "eval"), plan)
                of_texts = self._ask(
                    self.model,
                    text,
                    text_sums,
                    *(text, thoughts, self._talk_length(text), self.path, args.reward_prediction, generator, plan),
                )
                sums.append(self.accelerator.gather_for_metrics(of_texts))
        self.model.train(training)
        return judge(torch.cat(sums), args.seed)

    def sampled_thoughts(self) -> dict[str, list]:
        """A few thoughts of the last evaluation, in the columns of [`evaluation.report.thought_table`]; empty before the first."""
        return self._samples.get("eval", {})

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
        section = card_section(
            self.args.hub_model_id or model_name,
            is_peft_model(self.model),
            evaluations[-1] if evaluations else None,
            self._samples.get("eval") or self._samples.get("train"),
        )
        with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8", errors="replace") as card:
            card.write(section)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # which each process has of its own, as it has experience
        if self.state.global_step % self.args.num_iterations:
            save_file(flat(self._experiences), os.path.join(output_dir, self._experience_name()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        file = None if checkpoint is None else os.path.join(checkpoint, self._experience_name())
        if file is not None and os.path.isfile(file):
            self._experiences = unflat(load_file(file, device=str(self.accelerator.device)))

    def _experience_name(self) -> str:
        return f"quietstar_experience-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.safetensors"

    def _save_checkpoint(self, model, trial) -> None:
        with self._untimed():
            self.create_model_card()
            super()._save_checkpoint(model, trial)

    def _checkpoint_state(self) -> dict:
        self._finish_step()
        return {
            "entropy_coefficient": self.entropy_coefficient,
            "recent_rewards": list(self._recent_rewards),
            "metrics": self._metrics["train"].state(),
            "last_logged_step": self._last_logged_step,
            "last_passed": self._anti_theater.last_passed,
            "collapse": self._collapse.state(),
            "skipped_steps": [self._guard.skipped, self._guard.in_a_row],
            "failed_validation": self._anti_theater.has_stopped,
            "memory": [self._kept_per_token, self._memory_budget],
            "optimizer": optimizer_fields(self.args),
        }

    def _restore_checkpoint_state(self, state: dict) -> None:
        self._recent_rewards.extend(state["recent_rewards"])
        self._metrics["train"] = MetricSums(state["metrics"])
        self._last_logged_step = state["last_logged_step"]
        self._collapse.load(state["collapse"])
        self._guard.skipped, self._guard.in_a_row = state["skipped_steps"]
        last_passed = state["last_passed"]
        if last_passed is not None and os.path.isdir(last_passed):  # a later one may have replaced it
            self._anti_theater.last_passed = last_passed
        self._anti_theater.saved_passed = self._anti_theater.last_passed
        self._anti_theater.has_stopped = state["failed_validation"]
        if state["memory"][1] is not None:
            self._kept_per_token, self._memory_budget = state["memory"]

    def _has_ended(self) -> bool:
        stops = self.args.anti_theater_steps is not None and self.args.anti_theater_action != "warn"
        return super()._has_ended() or (stops and self._anti_theater.has_stopped)


def _prepared(
    tokenizer, args: QuietStarConfig, config: PreTrainedConfig, reward_function, dataset, name, trains=False
):
    """A dataset as the trainer reads it, if there is one, its texts known to fit the model."""
    if dataset is None:
        return None
    vocab_size = config.get_text_config().vocab_size
    dataset = prepare_texts(dataset, tokenizer, args, name, vocab_size, trains and args.packing, reward_function)
    if trains:
        check_amount(dataset, args)
    longest = longest_text(dataset, args.max_length)
    if longest is not None:
        check_longest(longest, args, config, is_stream=isinstance(dataset, IterableDataset))
    return dataset


def _alone(sums: torch.Tensor) -> torch.Tensor:
    """No reduction: an evaluation's batch has means of its own."""
    return sums


def _refuse_unknown(arguments: dict) -> None:
    for name in arguments:
        advice = UNKNOWN.get(name)
        raise TypeError(f"`QuietStarREINFORCETrainer` takes no argument `{name}`" + (f": {advice}" if advice else "."))


def _check_inputs(model, args, train_dataset, eval_dataset, quantization_config, peft_config) -> None:
    """What can be refused before anything is loaded."""
    if not isinstance(args, QuietStarConfig):
        raise TypeError(f"`args` is a `{type(args).__name__}`; give a `QuietStarConfig`.")
    if train_dataset is None and not eval_dataset:
        raise ValueError("There is no data: give a `train_dataset`, or an `eval_dataset` to evaluate only.")
    if train_dataset is not None and args.should_save:
        check_output_dir(args.output_dir)
    if args.num_iterations > 1 and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"`num_iterations={args.num_iterations}` reads rows again and needs a map-style dataset, not a stream; load it "
            "whole or leave it at 1."
        )
    if args.num_iterations > 1 and args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            f"`num_iterations={args.num_iterations}` reads the rows of a step again, and `batch_rebalance` deals them out "
            "another way each time; set `train_sampling_strategy='group_by_length'`, or leave `num_iterations` at 1."
        )
    if args.anti_theater_steps is not None:
        if not eval_dataset:
            raise ValueError(
                f"`anti_theater_steps={args.anti_theater_steps}` needs an `eval_dataset` to validate the thoughts on."
            )
        if isinstance(eval_dataset, Dataset):
            check_texts(len(eval_dataset))
    if str(args.eval_strategy.value) != "no" and not eval_dataset:
        raise ValueError(f"`eval_strategy={args.eval_strategy.value!r}` needs an `eval_dataset`.")
    if quantization_config is not None:
        check_quantization(model, args, peft_config, training=train_dataset is not None)
    if peft_config is not None:
        check_adapter(model, peft_config)
