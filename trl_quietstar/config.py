"""`QuietStarConfig`: every option of the trainer, with its type, default, limits, choices and help."""

from dataclasses import dataclass
from typing import Annotated

from ._compat import DICT_FIELDS, BaseConfig
from .contradictions import check_processes_and_memory
from .curriculum import Curriculum
from .derived import Derived
from .learning.advantages import BASELINES, NORMALIZATIONS
from .learning.rewards import REWARD_TYPES, WEIGHTINGS
from .model.heads import MIXING_HEADS, VALUE_HEADS
from .precision import has_bf16, warn_of_precision
from .readers import READERS
from .rules import (
    TRAINER_LIMITS,
    Choices,
    Limits,
    Staged,
    check_types,
    check_values,
    notes_of,
    option,
)
from .settings import QuietStarSettings


SAVED = QuietStarSettings()  # defaults of the options that a saved model remembers


@dataclass
class QuietStarConfig(Derived, BaseConfig):
    """
    Configuration of [`QuietStarREINFORCETrainer`].

    Holds the parameters of thinking and of its reinforcement; every field of [`~transformers.TrainingArguments`] works
    as well. An episode is an optimizer step: set `max_steps`, `warmup_steps`, `eval_steps`, `lr_scheduler_type` and
    `max_grad_norm` as for any Trainer. What each field does stands in its `help`.

    Five defaults differ from those of TRL's `SFTConfig`: `learning_rate` is 1e-6, `max_length` 256, `bf16` is on only where there is
    an accelerator for it, `gradient_checkpointing` is off, and `metric_for_best_model` is `eval_reward` where the best model is asked for.

    Raises:
        `TypeError`: if a value is of another type than its field, such as 2.5, "8" or `True` for a whole number.
        `ValueError`: if a value is outside its limits or contradicts another, naming the value, the limit and the fix.
    """

    _VALID_DICT_FIELDS = [*DICT_FIELDS, "model_init_kwargs", "curriculum"]

    # Model
    model_init_kwargs: dict | str | None = option(
        None,
        "Keyword arguments for `from_pretrained`, where the model is given as an id or a path. Without a `dtype` "
        "among them, weights are float32; with `bf16`, a base that stays frozen under LoRA is bfloat16.",
    )
    trust_remote_code: bool = option(False, "Whether to run code that comes with a model on the Hub.")
    disable_dropout: bool = option(
        True, "Whether to disable dropout, so that thoughts are scored by the very policy that wrote them."
    )

    # Data
    dataset_text_field: str = option("text", "Name of the column that holds the text.")
    max_length: Annotated[int | None, Limits(2)] = option(
        256,
        "Largest number of tokens in a text (T); longer texts are cut. With `packing`, the number of tokens in a row. "
        "Quiet-STaR trains on 256. None: no text is cut.",
    )
    truncation_mode: Annotated[str, Choices("keep_start", "keep_end")] = option(
        "keep_start", "Which end of a text longer than `max_length` is kept: `keep_start` or `keep_end`."
    )
    packing: bool = option(
        False, "Whether to pack several training texts into one row. Thoughts and attention stay within a text."
    )
    completion_only_loss: bool | None = option(
        None,
        "Whether thoughts and losses are confined to the completion. None: they are for data with prompts and completions.",
    )
    assistant_only_loss: bool = option(
        False, "Whether thoughts and losses are confined to the assistant's turns, which the chat template must mark."
    )
    shuffle_dataset: bool = option(False, "Whether to shuffle the dataset before training.")
    thought_pattern: str | None = option(
        None,
        "Regular expression of thoughts that texts, completions or an assistant's turns hold. Each match is taken out, and its "
        "group 1, or the whole match if there is no group, becomes a written thought at that place, e.g. "
        "`<think>(.*?)</think>`. `.` matches line breaks too. None: texts are left as they are.",
    )
    score_pattern: str | None = option(
        None,
        "Regular expression of the part of each completion, text or last turn of the assistant's that rewards look at: group 1, or "
        "the whole match if there is no group, of its last match, e.g. `#### (.*)` for a final answer. `.` matches no line break. "
        "None: what a column `score` names, or all of it.",
    )
    dataset_num_proc: Annotated[int | None, Limits(1)] = option(
        None, "Number of processes that tokenize the data. None: the main process does."
    )

    # Thoughts
    thought_length: Annotated[int, Limits(1), Staged()] = option(
        SAVED.thought_length, "Number of tokens in a thought (L); the largest number where thoughts may end early."
    )
    min_thought_length: Annotated[int | None, Limits(1)] = option(
        SAVED.min_thought_length,
        "Least number of tokens in a thought that may end early: at the EOS token, or once it has written "
        "`thought_stop_string`. None: thoughts do not end early, unless `thought_stop_string` is set, which makes "
        "this 1.",
    )
    thought_stop_string: str | None = option(
        SAVED.thought_stop_string, "String that ends a thought early. None: there is no such string."
    )
    talk_length: Annotated[str, Limits(1), Staged()] = option(  # also a whole number, which `__post_init__` reads
        SAVED.talk_length,
        "Number of true text tokens after a thought that are predicted with it, and that it is rewarded for (M); or "
        "`completion`: all tokens up to the last label, such as a whole answer.",
    )
    num_thoughts: Annotated[int, Limits(1), Staged()] = option(2, "Number of thoughts sampled at each position (G).")
    thought_positions: Annotated[str, Staged()] = option(  # also a number, which `__post_init__` reads
        SAVED.thought_positions,
        "Where to think: `all` positions; a number of random positions in each sequence, or a fraction of its "
        "positions; `difficulty`: positions whose next token is uncertain; `prompt_end`: once, before each "
        "completion; or `none`: plain training, as a control. Data with `input_ids` may rule out positions by a "
        "column `thought_mask`.",
    )
    difficulty_threshold: Annotated[float, Limits(0, 1)] = option(
        SAVED.difficulty_threshold,
        "Least entropy of the no-thought prediction, divided by log V, at which a position counts as difficult.",
    )
    min_thought_interval: Annotated[int, Limits(1)] = option(
        SAVED.min_thought_interval, "Least distance between two difficult positions, in tokens."
    )
    thought_format: Annotated[str, Choices("embeddings", "text")] = option(
        SAVED.thought_format,
        "What opens and closes a thought: `embeddings`, learned ones; or `text`: `thought_start_text` and `thought_end_text`, in "
        "ordinary tokens, so that any engine that serves the plain model can write the thought. It then ends once it has "
        "written the latter, and is closed by it where it is cut.",
    )
    thought_start_text: str = option(
        SAVED.thought_start_text,
        "Text that opens a thought; with `thought_format='embeddings'`, whose embedding is the initial value of the start "
        "embedding.",
    )
    thought_end_text: str = option(
        SAVED.thought_end_text,
        "Text that closes a thought; with `thought_format='embeddings'`, whose embedding is the initial value of the end "
        "embedding.",
    )
    thought_prompt: str | None = option(
        SAVED.thought_prompt,
        "Text that asks for a thought, before its start. The thought sees it; the text without thoughts does not. None: there is "
        "no such text.",
    )
    thought_prompt_role: Annotated[str | None, Choices("system", "user")] = option(
        SAVED.thought_prompt_role,
        "Whose turn `thought_prompt` is in a conversation: the model's chat template writes it as one more message of the `system` "
        "or the `user` before the answer. None: it is text as it stands.",
    )
    temperature: Annotated[float, Limits(1e-3), Staged()] = option(
        SAVED.temperature,
        "Temperature at which thoughts are sampled, and the policy's log-probabilities taken unless "
        "`policy_temperature` is set.",
    )
    policy_temperature: Annotated[float | None, Limits(1e-3)] = option(
        None,
        "Temperature of the log-probabilities in the policy term; 3 in Quiet-STaR's code. None: `temperature`.",
    )
    top_p: Annotated[float, Limits(1e-6, 1)] = option(
        SAVED.top_p, "Probability mass that nucleus sampling of thoughts keeps; 1.0 is off."
    )
    top_k: Annotated[int, Limits(0)] = option(
        SAVED.top_k, "Number of most likely tokens that top-k sampling of thoughts keeps; 0 is off."
    )
    min_p: Annotated[float | None, Limits(0, 1)] = option(
        SAVED.min_p,
        "Least probability of a thought token, as a share of the most likely token's probability (min-p sampling); "
        "None is off.",
    )
    thought_suppress_tokens: list[int] | None = option(
        SAVED.thought_suppress_tokens,
        "Ids of tokens that no thought holds. None: those that the model was saved with.",
    )
    eval_do_sample: bool = option(
        True, "Whether evaluation samples its thoughts, with a fixed seed. Otherwise it takes the most likely tokens."
    )
    thought_path: Annotated[str, Choices("auto", "shared_prefix", "replay")] = option(
        "auto",
        "How thoughts branch off the text: `shared_prefix` is fast, `replay` works for any architecture, and `auto` "
        "takes the fastest way that a check at the start finds exact.",
    )

    # Thoughts drawn by vLLM
    use_vllm: bool = option(
        False,
        "Whether vLLM draws the thoughts of training, by TRL's own client: thoughts of text at the end of prompts. They are scored "
        "here. Its options are named as in TRL's `GRPOConfig`.",
    )
    vllm_mode: Annotated[str, Choices("colocate", "server")] = option(
        "colocate", "Where vLLM runs: `colocate`, in this process; or `server`, which `vllm serve` starts."
    )
    vllm_server_base_url: str | None = option(
        None, "Address of the `server`, such as `http://localhost:8000`. None: port 8000 of this machine."
    )
    vllm_server_timeout: Annotated[float, Limits(0)] = option(240.0, "Seconds to wait for the `server` to be up.")
    vllm_group_port: Annotated[int, Limits(1, 65_535)] = option(51216, "Port by which weights go to the `server`.")
    vllm_gpu_memory_utilization: Annotated[float, Limits(0.01, 1)] = option(
        0.3, "Share of the GPU's memory that vLLM takes in `colocate`."
    )
    vllm_max_model_length: Annotated[int | None, Limits(2)] = option(
        None, "Most tokens of prompt and thought together in `colocate`. None: as many as the model can read."
    )

    # Memory
    gradient_checkpointing: bool | None = option(  # type: ignore[assignment]  # None is its default in Transformers
        None,
        "Whether layers keep only their inputs for the backward pass, which computes the rest again. Off by default, "
        "unlike in TRL: `single_pass` and `branch_batch_size` bound the memory of thoughts.",
    )
    single_pass: bool | None = option(
        None,
        "Whether thoughts are sampled in the forward pass that is trained, so that each token is processed once. "
        "Otherwise they are sampled without gradient, and scored in a second pass. None: one pass if an estimate says "
        "that memory allows it.",
    )
    branch_batch_size: Annotated[int | None, Limits(1)] = option(
        None,
        "Number of thoughts of a text that are scored at once, where sampling and scoring are two passes. Gradients "
        "do not depend on it; memory holds the activations of that many thoughts. None: as many as an estimate says "
        "that memory allows.",
    )

    # Reward and advantage
    reward_type: Annotated[str, Choices(*REWARD_TYPES)] = option(
        "probability",
        "Measure of what a thought adds to the prediction of the M true tokens after it: `probability` and `log_likelihood`, "
        "means over them; `sequence_probability` and `sequence_log_likelihood`, of all of them together: for answers; "
        "`marginal_log_likelihood`: what it adds to the log of the mean probability, over the group, of all of them; "
        "`accuracy`; or `binary`, which is 1 where accuracy rises and 0 elsewhere.",
    )
    reward_functions: list[str] | None = option(
        None,
        "Rewards in place of `reward_type`, whose weighted sum is the reward: names such as `probability` and the other reward "
        "types, or import paths of your own functions, `module:function`. None: `reward_type` is the reward.",
    )
    reward_weights: list[float] | None = option(
        None, "Weight of each of the `reward_functions`, in their order. None: all are 1."
    )
    reward_prediction: Annotated[str, Choices("mixed", "thought")] = option(
        SAVED.prediction,
        "Prediction that is rewarded and trained after a thought: `mixed` by the mixing head, or the `thought`'s alone.",
    )
    no_thought_model: Annotated[str, Choices("policy", "reference")] = option(
        "policy",
        "Model whose prediction without thoughts a thought must beat: the current `policy` or the `reference`.",
    )
    reward_clip_range: list[float] | None = option(
        None, "Least and greatest reward, to which rewards outside are clipped. None: no clipping."
    )
    unfinished_thought_penalty: Annotated[float, Limits(0)] = option(
        0.0,
        "Amount subtracted from the reward of a thought that was cut at `thought_length`, where thoughts may end "
        "early.",
    )
    advantage_baseline: Annotated[str, Choices(*BASELINES)] = option(
        "value",
        "What is subtracted from a thought's reward: the `value` head's prediction; `least_variance`: that of a head which learns "
        "the baseline with which the gradient varies least; `leave_one_out`: the mean reward of the position's other thoughts; "
        "`both`: that, then the value head's prediction of the rest; `mean`: that of all its thoughts; or `none`.",
    )
    use_gae: bool = option(
        True,
        "Whether advantages are computed by multi-step GAE over a thought's tokens, where the baseline is `value` or `both`. "
        "Otherwise they are reward minus baseline.",
    )
    gamma: Annotated[float, Limits(0, 1)] = option(0.99, "Discount of GAE, for each thought token.")
    gae_lambda: Annotated[float, Limits(0, 1)] = option(0.95, "Trace decay of GAE, for each thought token.")
    normalize_advantages: Annotated[str, Choices(*NORMALIZATIONS)] = option(
        "none",
        "What advantages are normalised by: `none`; `group`: they are divided by the standard deviation of the rewards at "
        "their position, as in GRPO; or `step`: over the batch of an optimizer step, to mean 0 and standard deviation 1. With "
        "gradient accumulation, `step` samples and judges all thoughts first, which costs one more forward pass.",
    )
    advantage_threshold: Annotated[float | None, Limits(0)] = option(
        None,
        "Least size of an advantage that is trained on. Once judged, thoughts below it are left out of every term of the "
        "update, as in groups that are solved or hopeless. None: all thoughts are trained on.",
    )
    reward_std_filter: Annotated[float | None, Limits(0)] = option(
        None,
        "Groups whose rewards have a standard deviation below this share of its moving average over the steps are left out of "
        "the update, as by `advantage_threshold`; 0.5 to 1 in RLPR. None: all groups are trained on.",
    )
    positive_advantages_only: bool = option(
        False, "Whether negative advantages are set to 0, as in Quiet-STaR's code."
    )

    # Schedule
    curriculum: dict | str | None = option(
        None,
        "Stages of training: from the optimizer step at which a stage begins to the options that it changes. A change"
        ' holds until the next one, e.g. `{"0": {"thought_length": 16}, "500": {"thought_length": 8}}`. Heads and '
        "optimizer carry over.",
    )

    # Objective
    policy_coefficient: Annotated[float, Limits(0), Staged()] = option(3.0, "Weight of the policy term in the loss.")
    num_iterations: Annotated[int, Limits(1)] = option(
        1,
        "Number of updates on each sampled batch. Updates after the first reuse its thoughts and advantages, with "
        "PPO's clipped surrogate.",
    )
    epsilon: Annotated[float, Limits(0, 1)] = option(
        0.2, "How far the probability ratio may fall below 1 before PPO's surrogate clips it."
    )
    epsilon_high: Annotated[float | None, Limits(0)] = option(
        None,
        "How far the probability ratio may rise above 1 before PPO's surrogate clips it. None: as far as `epsilon`.",
    )
    value_loss_coefficient: Annotated[float, Limits(0)] = option(
        0.5, "Weight of the value head's squared error in the loss."
    )
    mixing_head_type: Annotated[str, Choices(*MIXING_HEADS)] = option(
        SAVED.mixing_head_type,
        "Kind of the mixing head: `mlp`, whose weight lies between 0.01 and 1, or that of the `published` Quiet-STaR code, "
        "whose weight nothing bounds.",
    )
    value_head_type: Annotated[str, Choices(*VALUE_HEADS)] = option(
        SAVED.value_head_type, "Kind of the value head: `linear`, `mlp` or `transformer`."
    )
    value_head_hidden_size: Annotated[int, Limits(1, 65_536)] = option(
        SAVED.value_head_hidden_size, "Width of the `mlp` and `transformer` value heads."
    )
    entropy_coefficient: Annotated[float, Limits(0)] = option(0.01, "Initial weight of the entropy bonus in the loss.")
    entropy_decay: Annotated[float, Limits(0, 1)] = option(
        0.9995, "Factor by which the weight of the entropy bonus is multiplied at each optimizer step."
    )
    min_entropy_coefficient: Annotated[float, Limits(0)] = option(
        0.001, "Least weight of the entropy bonus, at which its decay ends."
    )
    beta: Annotated[float, Limits(0)] = option(
        0.0,
        "Weight of the KL divergence from the reference, on thought tokens (k3 estimate). Above 0, a reference is "
        "kept; under PEFT it is the model with its adapter disabled.",
    )
    nll_coefficient: Annotated[float, Limits(0), Staged()] = option(
        1.0, "Weight of the text's negative log-likelihood after a thought."
    )
    reader_nll_coefficient: Annotated[float, Limits(0), Staged()] = option(
        1.0,
        "Weight of the text's negative log-likelihood by the prediction after a thought alone, without mixing. It "
        "goes on teaching the model to read thoughts while the mixing head is nearly closed. With "
        "`reward_prediction='thought'` it adds to `nll_coefficient`.",
    )
    nll_weighting: Annotated[str, Choices(*WEIGHTINGS), Staged()] = option(
        "uniform",
        "Weight of each sampled thought in the two NLLs of the text after it: `uniform`: 1; `gain`: 1 where its reward is "
        "above 0, else 0; `probability`: that of all M tokens after it; or `share`: that probability's share among the "
        "thoughts of the position, times `num_thoughts`.",
    )
    distillation_coefficient: Annotated[float, Limits(0), Staged()] = option(
        0.0,
        "Weight of a REINFORCE term by which the thinking model teaches the plain one. Its action is the true token, "
        "predicted without thoughts; its reward is how much likelier thinking made that token, or 0 where it did not.",
    )
    written_thought_coefficient: Annotated[float, Limits(0), Staged()] = option(
        1.0,
        "Weight of the negative log-likelihood of written thoughts, which the data hold. Rows that hold any are trained by "
        "them, and not by sampled thoughts. 0: written thoughts are not read, and all rows are sampled. They are not read "
        "with `thought_positions='none'` either.",
    )
    self_imitation_batch_size: Annotated[int, Limits(0), Staged()] = option(
        0, "Number of the run's own useful thoughts that each step imitates again, as it does written ones."
    )
    self_imitation_memory: Annotated[int, Limits(1)] = option(1000, "How many of these are kept; the oldest go first.")
    base_nll_coefficient: Annotated[float, Limits(0), Staged()] = option(
        1.0, "Weight of the text's negative log-likelihood without thoughts."
    )
    router_aux_loss_coef: Annotated[float | None, Limits(0)] = option(
        None,
        "Weight of the load-balancing loss of a mixture of experts. None: the model's own weight; 0: off. Must stay "
        "None for a model without such a loss.",
    )
    sync_ref_model: bool = option(False, "Whether the reference is a moving average of the policy.")
    ref_model_mixup_alpha: Annotated[float, Limits(0, 1)] = option(
        0.6, "Weight of the policy in the moving average that is the reference, at each synchronisation."
    )
    ref_model_sync_steps: Annotated[int, Limits(1)] = option(
        512, "Number of optimizer steps between two synchronisations of the reference."
    )

    # Optimisation
    learning_rate: Annotated[float, Limits(0)] = option(1e-6, "Peak learning rate of the model or adapter.")
    heads_learning_rate: Annotated[float, Limits(0)] = option(
        1e-4, "Peak learning rate of the mixing head, the value head and the start and end embeddings."
    )
    max_skipped_steps: Annotated[int | None, Limits(1)] = option(
        10,
        "Number of optimizer steps in a row that may be skipped for a non-finite reward, loss or gradient. At that "
        "number, training saves a checkpoint and stops with a `FloatingPointError`. None: it never stops for them.",
    )
    muon_learning_rate: Annotated[float | None, Limits(0)] = option(
        None,
        "Peak learning rate of Muon. It trains the hidden weight matrices, or those of an adapter, and AdamW trains "
        "the rest at `learning_rate` and `heads_learning_rate`. An update of Muon is as large as AdamW's at an equal "
        "rate. None: AdamW trains everything.",
    )
    grokfast_lambda: Annotated[float, Limits(0)] = option(
        0.0,
        "Weight of the gradient's moving average that Grokfast adds to the gradient, after clipping. Needs "
        "pytorch-optimizer. 0: off.",
    )
    grokfast_alpha: Annotated[float, Limits(0, 1)] = option(
        0.98, "Decay of Grokfast's moving average of the gradient, at each optimizer step."
    )
    early_stopping_patience: Annotated[int | None, Limits(1)] = option(
        None, "Number of evaluations without improvement after which training stops. None: it does not stop early."
    )
    early_stopping_threshold: Annotated[float, Limits(0)] = option(
        0.0, "Least change of `metric_for_best_model` that early stopping counts as an improvement."
    )

    # Validation of the thoughts
    anti_theater_steps: Annotated[int | None, Limits(1)] = option(
        None,
        "Number of optimizer steps between two anti-theater validations on the evaluation data; one more follows at "
        "the end. None: off.",
    )
    anti_theater_action: Annotated[str, Choices("warn", "stop", "rollback")] = option(
        "warn",
        "What a failed anti-theater validation does: `warn`; `stop` training; or `rollback` to the last model that passed, if "
        "any did, and stop.",
    )

    preflight_thoughts: Annotated[int | None, Limits(1)] = option(
        64,
        "Number of thoughts, about, that are tried on the first training rows before the first step: how many are useful, "
        "and in how many groups some are and some are not. Hardly any: a warning says what to do. None: off.",
    )

    # Logging
    useful_gain: Annotated[float, Limits(0, 1)] = option(
        0.1,
        "By how much a thought must raise the probability of all M tokens after it to count as useful in "
        "`rl/useful_thoughts` and `rl/mixed_groups`, and to be imitated again by `self_imitation_batch_size`.",
    )
    log_thoughts: bool = option(
        False, "Whether to print a few thoughts at each log, and send them to W&B, trackio or TensorBoard as a table."
    )
    num_thoughts_to_print: Annotated[int, Limits(1)] = option(
        5, "Number of thoughts that are printed at a log, or sent as a table."
    )
    report_thoughts: bool = option(
        False,
        "Whether each evaluation writes a page `reports/step-N.html` in the output directory, with the thoughts on "
        "its first batch and plots of the run so far, sends it to W&B, and a few of the thoughts as `log_thoughts` does.",
    )

    packing_strategy = "bfd"  # not an option: the strategy that keeps document boundaries

    def __post_init__(self):
        check_types(self, {**QuietStarConfig.__annotations__, **LIMITS})
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and has_bf16()
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # PyTorch takes no 0 for 0.0
        for name, read in READERS.items():
            setattr(self, name, read(getattr(self, name)))
        if self.thought_format == "text" and self.thought_stop_string is None:
            self.thought_stop_string = self.thought_end_text
        if self.thought_stop_string is not None and self.min_thought_length is None:
            self.min_thought_length = 1
        check_values(self, LIMITS, CHOICES)
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience):
            self.metric_for_best_model = "eval_reward"
        metric = self.metric_for_best_model or ""
        if self.greater_is_better is None and any(word in metric for word in ("nll", "drift", "penalty")):
            self.greater_is_better = False  # the Trainer knows this of names that end in "loss" only
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to, as PyTorch would warn
        warn_of_precision(self)
        self._enter_each_stage()
        check_processes_and_memory(self)

    def _enter_each_stage(self) -> None:
        """Checks the options in every stage, then sets them to what they are at the first step."""
        self.stages = Curriculum(self.curriculum, {name: getattr(self, name) for name in STAGE_FIELDS}, READERS)
        for start in self.stages.starts[1:]:
            self.enter_stage(start)
            check_types(self, STAGE_FIELDS)
            check_values(self, LIMITS, CHOICES)
        self.enter_stage(0)


LIMITS: dict[str, Limits] = {**notes_of(QuietStarConfig, Limits), **TRAINER_LIMITS}
CHOICES: dict[str, Choices] = notes_of(QuietStarConfig, Choices)
STAGE_FIELDS = tuple(notes_of(QuietStarConfig, Staged))
