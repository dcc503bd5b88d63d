"""`QuietStarConfig`: every option of the trainer, its default, and its limits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import torch
from transformers.utils import is_torch_bf16_gpu_available, logging

from ._compat import DICT_FIELDS, BaseConfig
from .learning.advantages import BASELINES
from .learning.rewards import REWARD_TYPES
from .model.heads import VALUE_HEAD_TYPES
from .settings import QuietStarSettings


logger = logging.get_logger(__name__)

VALUE_BASELINES = tuple(name for name, baseline in BASELINES.items() if baseline.uses_value_head)
POSITIONS = ("all", "difficulty", "prompt_end", "none")
LAYERED = ("galore", "apollo")  # optimizers that have target modules
ADAMW = ("adamw_torch", "adamw_torch_fused")  # what Muon and Grokfast go with
CHOICES = {
    "reward_type": REWARD_TYPES,
    "reward_prediction": ("mixed", "thought"),
    "no_thought_model": ("policy", "reference"),
    "advantage_baseline": tuple(BASELINES),
    "value_head_type": VALUE_HEAD_TYPES,
    "truncation_mode": ("keep_start", "keep_end"),
    "thought_path": ("auto", "shared_prefix", "replay"),
    "anti_theater_action": ("warn", "stop", "rollback"),
}
# name: (least, greatest); None is open. Every number is finite, and one of a whole type whole.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "thought_length": (1, None),
    "min_thought_length": (1, None),
    "talk_length": (1, None),
    "num_thoughts": (1, None),
    "difficulty_threshold": (0, 1),
    "min_thought_interval": (1, None),
    "temperature": (1e-3, None),
    "top_p": (1e-6, 1),
    "top_k": (0, None),
    "min_p": (0, 1),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "value_loss_coefficient": (0, None),
    "value_head_hidden_size": (1, 65_536),
    "entropy_coefficient": (0, None),
    "entropy_decay": (0, 1),
    "min_entropy_coefficient": (0, None),
    "beta": (0, None),
    "nll_coefficient": (0, None),
    "reader_nll_coefficient": (0, None),
    "base_nll_coefficient": (0, None),
    "policy_coefficient": (0, None),
    "num_iterations": (1, None),
    "unfinished_thought_penalty": (0, None),
    "policy_temperature": (1e-3, None),
    "distillation_coefficient": (0, None),
    "epsilon": (0, 1),
    "epsilon_high": (0, None),
    "router_aux_loss_coef": (0, None),
    "branch_batch_size": (1, None),
    "heads_learning_rate": (0, None),
    "muon_learning_rate": (0, None),
    "grokfast_lambda": (0, None),
    "grokfast_alpha": (0, 1),
    "ref_model_mixup_alpha": (0, 1),
    "ref_model_sync_steps": (1, None),
    "early_stopping_patience": (1, None),
    "early_stopping_threshold": (0, None),
    "anti_theater_steps": (1, None),
    "max_skipped_steps": (1, None),
    "max_length": (2, None),
    "num_thoughts_to_print": (1, None),
    "dataset_num_proc": (1, None),
    # of the Trainer, which lets them through and then divides by zero, trains on nothing or yields NaN
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "eval_accumulation_steps": (1, None),
    "max_steps": (-1, None),
    "num_train_epochs": (1e-6, None),
    "learning_rate": (0, None),
    "warmup_steps": (0, None),
    "weight_decay": (0, None),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_epsilon": (1e-30, None),
    "max_grad_norm": (0, None),
    "label_smoothing_factor": (0, 0),
    "neftune_noise_alpha": (0, None),
    "logging_steps": (1e-6, None),
    "eval_steps": (1e-6, None),
    "eval_delay": (0, None),
    "save_steps": (1e-6, None),
    "save_total_limit": (1, None),
    "torch_empty_cache_steps": (1, None),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, None),
    "dataloader_prefetch_factor": (1, None),
}

NO_METRICS = "it is for a `compute_metrics`, which the trainer does not take, since evaluation holds no logits"
# of the Trainer: the values that change nothing here, and why others are refused
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "use_liger_kernel": ((False,), "it replaces the forward that thoughts are sampled and scored in"),
    "liger_kernel_config": ((None,), "Liger's kernels replace the forward that thoughts are sampled and scored in"),
    "include_for_metrics": (([],), NO_METRICS),
    "batch_eval_metrics": ((False,), NO_METRICS),
    "label_names": ((None, ["labels"]), "labels are read from the column `labels`"),
    "length_column_name": (("length",), "lengths are those of the tokenized rows"),
}

TYPE_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a dictionary",
    list[float]: "a list of numbers",
}
# those that are read anew at every step, and that a curriculum may change
STAGE_FIELDS = (
    "thought_length",
    "talk_length",
    "num_thoughts",
    "thought_positions",
    "temperature",
    "policy_coefficient",
    "nll_coefficient",
    "reader_nll_coefficient",
    "base_nll_coefficient",
    "distillation_coefficient",
)


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class QuietStarConfig(BaseConfig):
    """
    Configuration of [`QuietStarREINFORCETrainer`].

    Holds the parameters of thinking and of its reinforcement; every field of [`~transformers.TrainingArguments`] works
    as well. An episode is an optimizer step: set `max_steps`, `warmup_steps`, `eval_steps`, `lr_scheduler_type` and
    `max_grad_norm` as for any Trainer. What each field does stands in its `help`.

    Differs from TRL's base in four defaults: `learning_rate` is 1e-6, `bf16` is on only where there is an accelerator
    for it, `gradient_checkpointing` is off, and `metric_for_best_model` is `eval_reward` where the best model is asked
    for.

    Raises:
        `TypeError`: if a value is of another type than its field, such as 2.5, "8" or `True` for a whole number.
        `ValueError`: if a value is outside its limits or contradicts another, naming the value, the limit and the fix.
    """

    _VALID_DICT_FIELDS = [*DICT_FIELDS, "model_init_kwargs", "curriculum"]

    # Model
    model_init_kwargs: dict | str | None = _option(
        None,
        "Keyword arguments for `from_pretrained` when the model is given as an id or path. `dtype` defaults to float32, and "
        "with `bf16` to bfloat16 for a base that stays frozen under LoRA.",
    )
    trust_remote_code: bool = _option(False, "Whether to run model code from the Hub. Off unless you say so.")
    disable_dropout: bool = _option(
        True, "Whether to disable dropout, so that scores are those of the policy that wrote the thoughts."
    )

    # Data
    dataset_text_field: str = _option("text", "Column that holds the text.")
    max_length: int | None = _option(
        256,
        "Texts are cut to this many tokens (Quiet-STaR trains on 256-token windows); "
        "the length of a row when packing. None: never cut.",
    )
    truncation_mode: str = _option("keep_start", "Which end of a long text is kept: `keep_start` or `keep_end`.")
    packing: bool = _option(
        False, "Whether to pack several training texts into one row. Thoughts and attention stay within a text."
    )
    completion_only_loss: bool | None = _option(
        None, "Whether thoughts and losses are confined to the completion. None: yes for prompt/completion data."
    )
    assistant_only_loss: bool = _option(
        False, "Whether thoughts and losses are confined to assistant turns; the chat template must mark them."
    )
    shuffle_dataset: bool = _option(False, "Whether to shuffle the dataset before training.")
    dataset_num_proc: int | None = _option(None, "Processes that tokenize.")

    # Thoughts
    thought_length: int = _option(8, "Tokens in a thought (L).")
    min_thought_length: int | None = _option(
        None,
        "If set, a thought may end early once it has this many tokens: after the EOS token or `thought_stop_string`.",
    )
    thought_stop_string: str | None = _option(None, "String that ends a thought early.")
    talk_length: str = _option(
        4,
        "True text tokens that a thought is read and rewarded for (M); or `completion`: all up to the last label, such as "
        "the whole answer.",
    )
    num_thoughts: int = _option(2, "Thoughts sampled at each position (G).")
    thought_positions: str = _option(
        "all",
        "Where to think: `all`, a number of random positions a sequence, a fraction of them, `difficulty`; `prompt_end`: "
        "once, before each completion; or `none`: plain training, a control. A dataset with `input_ids` may say so itself, by a column `thought_mask`.",
    )
    difficulty_threshold: float = _option(0.6, "Least no-thought entropy, divided by log V, of a difficult position.")
    min_thought_interval: int = _option(3, "Least distance between two difficult positions, in tokens.")
    thought_start_text: str = _option("—", "String whose embedding the start embedding begins as.")
    thought_end_text: str = _option("—", "String whose embedding the end embedding begins as.")
    temperature: float = _option(
        1.0, "Sampling temperature of thoughts; the policy's log-probabilities are taken at it."
    )
    policy_temperature: float | None = _option(
        None,
        "Temperature of the log-probabilities in the policy term, where it differs from that of sampling: 3 in Quiet-STaR's "
        "code. None: the same.",
    )
    top_p: float = _option(1.0, "Nucleus sampling of thoughts; 1.0 is off.")
    top_k: int = _option(0, "Top-k sampling of thoughts; 0 is off.")
    min_p: float | None = _option(None, "Min-p sampling of thoughts; None is off.")
    eval_do_sample: bool = _option(
        True, "Whether evaluation samples its thoughts, with a fixed seed; otherwise it takes the most likely tokens."
    )
    thought_path: str = _option(
        "auto",
        "`shared_prefix` (fast), `replay` (any architecture), or `auto`: the fast one "
        "where the start-up check finds it exact.",
    )

    # Memory
    gradient_checkpointing: bool | None = _option(  # type: ignore[assignment]  # None is its default in Transformers
        None,
        "Whether layers keep nothing but their inputs for the backward, which computes the rest again. Off, unlike in "
        "TRL: what branches keep is bounded by the two options below.",
    )
    single_pass: bool | None = _option(
        None,
        "Whether thoughts are sampled in the very forward that is trained, so that each token is processed once; "
        "otherwise they are sampled without gradient and scored in a second pass. None: where memory allows, by an "
        "estimate.",
    )
    branch_batch_size: int | None = _option(
        None,
        "Thoughts of a text that are scored at once, in two passes; gradients are the same, and memory holds the "
        "activations of these alone. None: as many as memory allows, by an estimate.",
    )

    # Reward and advantage
    reward_type: str = _option("probability", "`probability`, `log_likelihood`, `accuracy` or `binary`.")
    reward_prediction: str = _option(
        "mixed",
        "Prediction that is rewarded and trained after a thought: `mixed` by the "
        "mixing head, or the `thought`'s alone.",
    )
    no_thought_model: str = _option(
        "policy", "Whose no-thought prediction a thought must beat: the current `policy`'s or the `reference`'s."
    )
    reward_clip_range: list[float] | None = _option(None, "Least and greatest reward.")
    unfinished_thought_penalty: float = _option(
        0.0,
        "Taken from the reward of a thought that was cut at `thought_length`, where thoughts may end by themselves.",
    )
    advantage_baseline: str = _option(
        "value",
        "`value` head, `leave_one_out` mean of the other thoughts at the position, `both` of these, `mean` of all thoughts "
        "there, or `none`.",
    )
    use_gae: bool = _option(
        True, "With a value head: multi-step GAE over the thought's tokens; otherwise reward minus value."
    )
    gamma: float = _option(0.99, "Discount of GAE, per thought token.")
    gae_lambda: float = _option(0.95, "Trace decay of GAE.")
    normalize_advantages: bool = _option(
        False,
        "Whether to normalise the advantages over the batch of an optimizer step. With gradient accumulation all its "
        "thoughts are then sampled and judged first, which costs one more forward.",
    )
    positive_advantages_only: bool = _option(
        False, "Whether negative advantages are set to 0, as in Quiet-STaR's code."
    )

    # Schedule
    curriculum: dict | str | None = _option(
        None,
        "Stages: from the optimizer step at which each begins to the fields that it changes, which then hold until the next "
        'change, e.g. `{"0": {"thought_length": 16}, "500": {"thought_length": 8}}`. Heads and optimizer go on.',
    )

    # Objective
    policy_coefficient: float = _option(3.0, "Weight of the policy term.")
    num_iterations: int = _option(
        1,
        "Updates on each sampled batch; beyond the first, thoughts and advantages are reused (PPO's clipped surrogate).",
    )
    epsilon: float = _option(0.2, "How far the probability ratio of those updates may fall below 1.")
    epsilon_high: float | None = _option(None, "How far it may rise above 1. None: as `epsilon`.")
    value_loss_coefficient: float = _option(0.5, "Weight of the value head's squared error.")
    value_head_type: str = _option("mlp", "`linear`, `mlp` or `transformer`.")
    value_head_hidden_size: int = _option(256, "Width of the `mlp` and `transformer` value heads.")
    entropy_coefficient: float = _option(0.01, "Initial weight of the entropy bonus.")
    entropy_decay: float = _option(0.9995, "Factor on that weight at each optimizer step.")
    min_entropy_coefficient: float = _option(0.001, "Floor of that weight.")
    beta: float = _option(
        0.0,
        "Weight of the KL from the reference, on thought tokens (k3 estimate). Above 0 a "
        "reference is kept; under PEFT that is the model with its adapter disabled.",
    )
    nll_coefficient: float = _option(1.0, "Weight of the text's negative log-likelihood after a thought.")
    reader_nll_coefficient: float = _option(
        1.0,
        "Weight of that by the thought's prediction alone, which goes on teaching the model to read thoughts while the "
        "mixing head is nearly closed. With `reward_prediction='thought'` it adds to `nll_coefficient`.",
    )
    distillation_coefficient: float = _option(
        0.0,
        "Weight of a REINFORCE term on the prediction without thoughts, whose action is the true token and whose reward is "
        "how much likelier thinking made it, where it did: the thinking model teaches the plain one.",
    )
    base_nll_coefficient: float = _option(1.0, "Weight of the text's negative log-likelihood without thoughts.")
    router_aux_loss_coef: float | None = _option(
        None,
        "Weight of the load-balancing loss of a mixture of experts. None: the model's own; 0: off. An error for a model "
        "without one.",
    )
    sync_ref_model: bool = _option(False, "Whether the reference follows the policy as a moving average.")
    ref_model_mixup_alpha: float = _option(0.6, "Weight of the policy in that average, at each synchronisation.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between synchronisations.")

    # Optimisation
    learning_rate: float = _option(1e-6, "Peak learning rate of the model or adapter.")
    heads_learning_rate: float = _option(
        1e-4, "Peak learning rate of the mixing head, the value head and the start and end embeddings."
    )
    max_skipped_steps: int | None = _option(
        10,
        "Optimizer steps in a row that are skipped for a non-finite reward, loss or gradient until training saves a "
        "checkpoint and stops with a `FloatingPointError`. 1: at the first; None: never.",
    )
    muon_learning_rate: float | None = _option(
        None,
        "Peak learning rate of Muon, which then trains the hidden weight matrices, or an adapter's; AdamW trains the rest "
        "at the two rates above. An update is as large as AdamW's at the same rate. Needs PyTorch 2.9. None: AdamW alone.",
    )
    grokfast_lambda: float = _option(
        0.0,
        "Weight at which Grokfast adds the moving average of the gradient to it, after clipping. Needs "
        "pytorch-optimizer. 0: off.",
    )
    grokfast_alpha: float = _option(0.98, "Decay of that average, per optimizer step.")
    early_stopping_patience: int | None = _option(None, "Evaluations without improvement after which training stops.")
    early_stopping_threshold: float = _option(0.0, "Least improvement that counts.")

    # Validation of the thoughts
    anti_theater_steps: int | None = _option(
        None,
        "Optimizer steps between anti-theater validations on the evaluation data; one more follows at the end. None: off.",
    )
    anti_theater_action: str = _option(
        "warn",
        "What a failed one does: `warn`; `stop` training; or `rollback` to the last model that passed, if any did, and "
        "stop.",
    )

    # Logging
    log_thoughts: bool = _option(
        False, "Whether to print a few thoughts at each log and to send them to W&B or trackio as a table."
    )
    num_thoughts_to_print: int = _option(5, "How many.")
    report_thoughts: bool = _option(
        False,
        "Whether each evaluation writes `reports/step-N.html` in the output directory, with the thoughts on its first "
        "batch and plots of the run so far, and sends a few of them to W&B or trackio as a table.",
    )

    packing_strategy = "bfd"  # not an option: the strategy that keeps document boundaries

    def __post_init__(self):
        self._check_types({**QuietStarConfig.__annotations__, **LIMITS})
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and _has_bf16()
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # PyTorch takes no 0 for 0.0
        self.thought_positions = _parse_positions(self.thought_positions)
        self.talk_length = _parse_talk_length(self.talk_length)
        if self.thought_stop_string is not None and self.min_thought_length is None:
            self.min_thought_length = 1
        self._check_options()
        if self.neftune_noise_alpha:
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha}` is not supported: its noise would make a thought likelier or less "
                "likely than it was when it was drawn. Leave it out."
            )
        compiles = [
            name for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode") if getattr(self, name)
        ]
        if compiles:  # any of them switches compilation on
            raise ValueError(
                f"`{compiles[0]}={getattr(self, compiles[0])!r}` is not supported: thoughts are sampled and scored with shapes "
                "that change at every step. Leave it out; to compile the layers alone, call `layer.compile()` on each of your "
                "model's."
            )
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience):
            self.metric_for_best_model = "eval_reward"
        if self.greater_is_better is None and "nll" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # the Trainer knows this of names that end in "loss" only
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            logger.warning(
                "`fp16=True` does nothing on a CPU, where training is in float32; take `bf16=True`, or leave it out."
            )
        if not self.average_tokens_across_devices and self.world_size > 1:
            raise ValueError(
                "`average_tokens_across_devices=False` is not supported: a step's means are over the tokens of all "
                f"{self.world_size} processes, so that several add up to one. Leave it out."
            )
        self._read_curriculum()
        self._check_memory()  # once the names that checkpointing has had are one

    @property
    def uses_value_head(self) -> bool:
        """Whether advantages come from the value head."""
        return self.advantage_baseline in VALUE_BASELINES

    @property
    def logps_temperature(self) -> float:
        """Temperature that the policy's log-probabilities are taken at."""
        return self.temperature if self.policy_temperature is None else self.policy_temperature

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the probability ratio may go."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def uses_reference(self) -> bool:
        """Whether a reference model is needed."""
        return self.beta > 0 or self.no_thought_model == "reference"

    @property
    def combines_optimizers(self) -> bool:
        """Whether Muon or Grokfast act beside AdamW."""
        return self.muon_learning_rate is not None or self.grokfast_lambda > 0

    def settings(self) -> QuietStarSettings:
        """The part of the configuration that a saved model keeps."""
        return QuietStarSettings(
            thought_length=self.thought_length,
            talk_length=self.talk_length,
            prediction=self.reward_prediction,
            value_head_type=self.value_head_type,
            value_head_hidden_size=self.value_head_hidden_size,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            min_thought_length=self.min_thought_length,
            thought_stop_string=self.thought_stop_string,
            thought_positions=self.thought_positions,
            difficulty_threshold=self.difficulty_threshold,
            min_thought_interval=self.min_thought_interval,
        )

    def _check_types(self, names: Iterable[str]) -> None:
        hints = get_type_hints(type(self))
        for name in names:
            if name in hints and name not in ("thought_positions", "talk_length", "_VALID_DICT_FIELDS"):
                _check_type(name, getattr(self, name), hints[name])

    def _check_options(self):
        for name, limits in LIMITS.items():
            if name != "talk_length" or self.talk_length != "completion":
                _check_limits(name, getattr(self, name), *limits)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        for name, (values, reason) in UNSUPPORTED.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not supported: {reason}. Leave it out.")
        self._check_contradictions()

    def _check_contradictions(self):
        if self.max_steps == 0:
            raise ValueError("`max_steps` is 0; give a number of optimizer steps, or -1 to train `num_train_epochs`.")
        if self.thought_stop_string == "":
            raise ValueError("`thought_stop_string` is empty, and would end every thought; give a string, or None.")
        if self.min_entropy_coefficient > self.entropy_coefficient:
            raise ValueError(
                f"`min_entropy_coefficient` ({self.min_entropy_coefficient}) exceeds `entropy_coefficient` "
                f"({self.entropy_coefficient}), which would then have no effect; lower it."
            )
        if BASELINES[self.advantage_baseline].of_rewards is not None and self.num_thoughts < 2:
            raise ValueError(
                f"`advantage_baseline={self.advantage_baseline!r}` compares the thoughts at a position and needs "
                f"`num_thoughts` of at least 2, got {self.num_thoughts}; raise it or use `advantage_baseline='value'`."
            )
        if self.min_thought_length is not None and self.min_thought_length > self.thought_length:
            raise ValueError(
                f"`min_thought_length` ({self.min_thought_length}) exceeds `thought_length` ({self.thought_length}); "
                "lower it."
            )
        if self.unfinished_thought_penalty and self.min_thought_length is None:
            raise ValueError(
                f"`unfinished_thought_penalty={self.unfinished_thought_penalty}` is for thoughts that may end by themselves; "
                "set `min_thought_length` or `thought_stop_string`."
            )
        evaluates = str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and not evaluates:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` needs evaluations, but `eval_strategy` is 'no'; set "
                    "`eval_strategy='steps'`, `eval_steps` and an `eval_dataset`."
                )
        if self.reward_clip_range is not None and (
            len(self.reward_clip_range) != 2 or self.reward_clip_range[0] >= self.reward_clip_range[1]
        ):
            raise ValueError(
                f"`reward_clip_range` is {self.reward_clip_range}; give two numbers, the lower one first."
            )
        if self.sync_ref_model and not self.uses_reference:
            raise ValueError(
                "`sync_ref_model=True` has no reference to synchronise; set `beta` above 0 or "
                "`no_thought_model='reference'`."
            )
        if self.combines_optimizers and self.optim not in ADAMW:
            raise ValueError(
                f"`muon_learning_rate` ({self.muon_learning_rate}) and `grokfast_lambda` ({self.grokfast_lambda}) go with "
                f"AdamW; set `optim` to one of {', '.join(ADAMW)} (got {str(self.optim)!r}), or leave them out."
            )
        if self.optim_target_modules is not None and not any(name in str(self.optim).lower() for name in LAYERED):
            raise ValueError(
                f"`optim_target_modules={self.optim_target_modules!r}` would be ignored by `optim={str(self.optim)!r}`; it goes "
                f"with {', '.join(LAYERED)}. Leave it out."
            )
        if self.packing and self.max_length is None:
            raise ValueError("`packing=True` needs `max_length`, the length of a packed row; it is None.")

    def _read_curriculum(self) -> None:
        """Takes the stages apart and tries each."""
        stages = self.curriculum or {}
        if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
            raise ValueError(f"`curriculum` is {stages!r}; give a mapping from steps to mappings of fields to values.")
        try:
            self._stages = sorted(((int(step), dict(changes)) for step, changes in stages.items()), key=lambda x: x[0])
        except ValueError:
            raise ValueError(f"`curriculum` has the steps {list(stages)}; a stage begins at a whole number.") from None
        if self._stages and self._stages[0][0] < 0:
            raise ValueError(f"`curriculum` has a stage at step {self._stages[0][0]}; the first step is 0.")
        unknown = sorted({name for _, changes in self._stages for name in changes} - set(STAGE_FIELDS))
        if unknown:
            raise ValueError(
                f"`curriculum` changes {', '.join(unknown)}; a stage may change {', '.join(STAGE_FIELDS)} only."
            )
        for _, changes in self._stages:
            for name, parse in (("thought_positions", _parse_positions), ("talk_length", _parse_talk_length)):
                if name in changes:
                    changes[name] = parse(changes[name])
        self._before_stages = {name: getattr(self, name) for name in STAGE_FIELDS}
        for step, _ in self._stages:
            self.enter_stage(step)
            self._check_types(STAGE_FIELDS)
            self._check_options()
        steps = (0, *(step for step, _ in self._stages))
        self.longest_thought = max(self._at(step)["thought_length"] for step in steps)
        self.enter_stage(0)

    def _at(self, step: int) -> dict:
        """The fields of stages at an optimizer step."""
        values = dict(self._before_stages)
        for start, changes in self._stages:
            values.update(changes if start <= step else {})
        return values

    def enter_stage(self, step: int) -> bool:
        """Sets the fields of the curriculum to what they are at an optimizer step; whether any changed."""
        values = self._at(step)
        changed = any(getattr(self, name) != value for name, value in values.items())
        vars(self).update(values)
        return changed

    def _check_memory(self) -> None:
        two_passes = self.branch_batch_size or self.gradient_checkpointing or self.policy_temperature is not None
        if self.single_pass and (two_passes or not self.disable_dropout):
            raise ValueError(
                "`single_pass=True` keeps all activations of one forward without dropout, at the temperature of sampling; leave "
                f"out `branch_batch_size` ({self.branch_batch_size}), `gradient_checkpointing` "
                f"({self.gradient_checkpointing}) and `policy_temperature` ({self.policy_temperature}), and leave "
                f"`disable_dropout` on ({self.disable_dropout})."
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` would lose the gradient from thoughts to the text "
                "they read; leave it out."
            )


def _check_type(name: str, value, hint) -> None:
    """Refuses what is of another type than the field, a number that is not finite, and text that is not Unicode."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    if value is None and NoneType in kinds:
        return
    kinds = [kind for kind in kinds if kind is not NoneType]
    if not any(_is_of(kind, value) for kind in kinds):
        wanted = " or ".join(TYPE_WORDS.get(kind, str(kind)) for kind in kinds)
        raise TypeError(f"`{name}` is {value!r} (`{type(value).__name__}`); give {wanted}.")
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, Real) and not math.isfinite(number):
            raise ValueError(f"`{name}` is {value}; give a finite number.")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"`{name}` is {value!r}, which holds half of a surrogate pair; give text that is Unicode.")


def _is_of(kind, value) -> bool:
    if kind == list[float]:
        return isinstance(value, (list, tuple)) and all(_is_of(float, number) for number in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _check_limits(name: str, value, least: float | None, greatest: float | None) -> None:
    if value is None:
        return
    if least is not None and value < least:
        raise ValueError(f"`{name}` is {value}, below its limit of {least}; raise it.")
    if greatest is not None and value > greatest:
        raise ValueError(f"`{name}` is {value}, above its limit of {greatest}; lower it.")


def _parse_positions(value: str | int | float) -> str | int | float:
    """`"16"` from the command line is a number, `"0.25"` a fraction."""
    if isinstance(value, str) and value not in POSITIONS:
        try:
            value = float(value) if "." in value or "e" in value.lower() else int(value)
        except ValueError:
            raise ValueError(
                f"`thought_positions` is {value!r}; give one of {', '.join(map(repr, POSITIONS))}, a number of positions, or "
                "a fraction."
            ) from None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(
            f"`thought_positions` is {value!r} (`{type(value).__name__}`); give 'all', 'difficulty', a number of "
            "positions, or a fraction."
        )
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"`thought_positions` is {value}; a fraction lies above 0 and up to 1.")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"`thought_positions` is {value}; a number of positions is at least 1.")
    return value


def _parse_talk_length(value: int | str) -> int | str:
    """`"4"` from the command line is a number."""
    if value == "completion":
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(
            f"`talk_length` is {value!r} (`{type(value).__name__}`); give a number of tokens, or 'completion'."
        )
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"`talk_length` is {value!r}; give a number of tokens, or 'completion'.") from None


def _has_bf16() -> bool:
    """Whether an accelerator computes in bfloat16; MPS does so in software on some machines."""
    if not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type == "mps":
        return False
    return is_torch_bf16_gpu_available()
