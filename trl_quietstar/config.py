"""`QuietStarConfig`: every option of the trainer, its default, and its limits."""

from dataclasses import dataclass, field

import torch

from ._compat import _BaseConfig
from .heads import VALUE_HEAD_TYPES, QuietStarSettings
from .rewards import REWARD_TYPES


BASELINES = ("value", "leave_one_out", "both", "none")
ADAMW = ("adamw_torch", "adamw_torch_fused")  # what Muon and Grokfast go with
CHOICES = {
    "reward_type": REWARD_TYPES,
    "reward_prediction": ("mixed", "thought"),
    "no_thought_model": ("policy", "reference"),
    "advantage_baseline": BASELINES,
    "value_head_type": VALUE_HEAD_TYPES,
    "thought_path": ("auto", "shared_prefix", "replay"),
    "anti_theater_action": ("warn", "stop", "rollback"),
}
# name: (least, greatest); None is open
LIMITS = {
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
    "value_head_hidden_size": (1, None),
    "entropy_coefficient": (0, None),
    "entropy_decay": (0, 1),
    "min_entropy_coefficient": (0, None),
    "beta": (0, None),
    "nll_coefficient": (0, None),
    "reader_nll_coefficient": (0, None),
    "base_nll_coefficient": (0, None),
    "policy_coefficient": (0, None),
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
    "max_length": (2, None),
    "num_thoughts_to_print": (1, None),
}


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class QuietStarConfig(_BaseConfig):
    """
    Configuration of [`QuietStarREINFORCETrainer`].

    Holds the parameters of thinking and of its reinforcement; every field of [`~transformers.TrainingArguments`] works
    as well. An episode is an optimizer step: set `max_steps`, `warmup_steps`, `eval_steps`, `lr_scheduler_type` and
    `max_grad_norm` as for any Trainer. What each field does stands in its `help`.

    Differs from TRL's base in four defaults: `learning_rate` is 1e-6, `bf16` is on only where there is an accelerator
    for it, `gradient_checkpointing` is off, and `metric_for_best_model` is `eval_reward` where the best model is asked
    for.

    Raises:
        `ValueError`: if a value is outside its limits or contradicts another, naming the value, the limit and the fix.
    """

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Model
    model_init_kwargs: dict | str | None = _option(
        None,
        "Keyword arguments for `from_pretrained` when the model is given as an id or path. `dtype` defaults to "
        "float32.",
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
    talk_length: int = _option(4, "True text tokens that a thought is read and rewarded for (M).")
    num_thoughts: int = _option(2, "Thoughts sampled at each position (G).")
    thought_positions: str = _option(
        "all", "Where to think: `all`, a number of random positions a sequence, a fraction of them, or `difficulty`."
    )
    difficulty_threshold: float = _option(0.6, "Least no-thought entropy, divided by log V, of a difficult position.")
    min_thought_interval: int = _option(3, "Least distance between two difficult positions, in tokens.")
    thought_start_text: str = _option("—", "String whose embedding the start embedding begins as.")
    thought_end_text: str = _option("—", "String whose embedding the end embedding begins as.")
    temperature: float = _option(
        1.0, "Sampling temperature of thoughts; the policy's log-probabilities are taken at it."
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
    advantage_baseline: str = _option(
        "value", "`value` head, `leave_one_out` mean of the other thoughts, `both`, or `none`."
    )
    use_gae: bool = _option(
        True, "With a value head: multi-step GAE over the thought's tokens; otherwise reward minus value."
    )
    gamma: float = _option(0.99, "Discount of GAE, per thought token.")
    gae_lambda: float = _option(0.95, "Trace decay of GAE.")
    normalize_advantages: bool = _option(False, "Whether to normalise the advantages over the batch.")
    positive_advantages_only: bool = _option(
        False, "Whether negative advantages are set to 0, as in Quiet-STaR's code."
    )

    # Objective
    policy_coefficient: float = _option(3.0, "Weight of the policy term.")
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
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.thought_positions = _parse_positions(self.thought_positions)
        if self.thought_stop_string is not None and self.min_thought_length is None:
            self.min_thought_length = 1
        for name, limits in LIMITS.items():
            _check_limits(name, getattr(self, name), *limits)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        self._check_contradictions()
        if self.torch_compile:
            raise ValueError(
                "`torch_compile=True` is not supported: thoughts are sampled and scored with shapes that change at every "
                "step. Leave it out; to compile the layers alone, call `layer.compile()` on each of your model's."
            )
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience):
            self.metric_for_best_model = "eval_reward"
        if self.greater_is_better is None and "nll" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # the Trainer knows this of names that end in "loss" only
        super().__post_init__()
        self._check_memory()  # once the names that checkpointing has had are one

    @property
    def uses_value_head(self) -> bool:
        """Whether advantages come from the value head."""
        return self.advantage_baseline in ("value", "both")

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
        )

    def _check_contradictions(self):
        if self.advantage_baseline in ("leave_one_out", "both") and self.num_thoughts < 2:
            raise ValueError(
                f"`advantage_baseline={self.advantage_baseline!r}` compares the thoughts at a position and needs "
                f"`num_thoughts` of at least 2, got {self.num_thoughts}; raise it or use `advantage_baseline='value'`."
            )
        if self.min_thought_length is not None and self.min_thought_length > self.thought_length:
            raise ValueError(
                f"`min_thought_length` ({self.min_thought_length}) exceeds `thought_length` ({self.thought_length}); "
                "lower it."
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
        if self.packing and self.max_length is None:
            raise ValueError("`packing=True` needs `max_length`, the length of a packed row; it is None.")

    def _check_memory(self) -> None:
        if self.single_pass and (self.branch_batch_size or self.gradient_checkpointing or not self.disable_dropout):
            raise ValueError(
                "`single_pass=True` keeps all activations of one forward without dropout; leave out "
                f"`branch_batch_size` ({self.branch_batch_size}) and `gradient_checkpointing` "
                f"({self.gradient_checkpointing}), and leave `disable_dropout` on ({self.disable_dropout})."
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs={'use_reentrant': True}` would lose the gradient from thoughts to the text "
                "they read; leave it out."
            )


def _check_limits(name: str, value, least, greatest) -> None:
    if value is None:
        return
    if not value >= least:  # also catches NaN
        raise ValueError(f"`{name}` is {value}, below its limit of {least}; raise it.")
    if greatest is not None and value > greatest:
        raise ValueError(f"`{name}` is {value}, above its limit of {greatest}; lower it.")


def _parse_positions(value: str | int | float) -> str | int | float:
    """`"16"` from the command line is a number, `"0.25"` a fraction."""
    if isinstance(value, str) and value not in ("all", "difficulty"):
        try:
            value = float(value) if "." in value or "e" in value.lower() else int(value)
        except ValueError:
            raise ValueError(
                f"`thought_positions` is {value!r}; give 'all', 'difficulty', a number of positions, or a fraction."
            ) from None
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"`thought_positions` is {value}; a fraction lies above 0 and up to 1.")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"`thought_positions` is {value}; a number of positions is at least 1.")
    return value
