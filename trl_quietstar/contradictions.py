"""Which options of a run contradict each other.

Each function here raises an error that names the options, their values and the fix. Settings have the names of the options that
they remember, so that some functions check both.
"""

import re
from typing import TYPE_CHECKING, Any

from .learning.advantages import BASELINES
from .learning.rewards import GROUP_REWARDS
from .model.plain import check_writing


if TYPE_CHECKING:
    from .config import QuietStarConfig
    from .settings import QuietStarSettings


# Options of vLLM by the mode that reads them
VLLM_OPTIONS = {
    "server": ("vllm_mode", "vllm_server_base_url", "vllm_server_timeout", "vllm_group_port"),
    "colocate": ("vllm_gpu_memory_utilization", "vllm_max_model_length"),
}
# Options whose values decide whether a plain model, as vLLM runs it, can draw the thoughts: those it can, and why not the others
NEEDED_FOR_VLLM: dict[str, tuple[tuple, str]] = {
    "thought_format": (("text",), "a learned embedding is no token, and a plain model goes on from tokens"),
    "reward_prediction": (("thought",), "a plain model has no mixing head"),
    "single_pass": ((None, False), "thoughts are not sampled in the forward that is trained"),
}

ADAMW = ("adamw_torch", "adamw_torch_fused")  # the optimizers that Muon and Grokfast go with
LAYERED = ("galore", "apollo")  # the optimizers that have target modules


def check_rewards(args: "QuietStarConfig") -> None:
    """Refuses contradictions among the options of rewards and advantages."""
    bounds, baseline = args.reward_clip_range, BASELINES[args.advantage_baseline]
    if bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1]):
        raise ValueError(f"`reward_clip_range` is {bounds}; give two numbers, the lower one first.")
    within_group = {
        "reward_type": args.reward_type in GROUP_REWARDS,
        "advantage_baseline": baseline.of_rewards is not None,
        "normalize_advantages": args.normalize_advantages == "group",
        "reward_std_filter": args.reward_std_filter is not None,
    }
    for name, compares in within_group.items():
        if compares and args.num_thoughts < 2:
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` compares the thoughts at a position and needs `num_thoughts` of at least "
                f"2, got {args.num_thoughts}; raise it, or leave `{name}` out and use `advantage_baseline='value'`."
            )
    if args.reward_type in GROUP_REWARDS and baseline.of_rewards is not None:
        raise ValueError(
            f"`advantage_baseline={args.advantage_baseline!r}` would bias the gradient of `reward_type={args.reward_type!r}`, "
            "which every thought of a group has a part in, and which is measured from the others already; set "
            "`advantage_baseline='none'` or 'value'."
        )
    if args.normalize_advantages == "group" and (
        baseline.uses_value_head or baseline.of_rewards is None and args.reward_type not in GROUP_REWARDS
    ):
        raise ValueError(
            f"`normalize_advantages='group'` divides by the spread of a group's rewards, which says nothing of their distance "
            f"from `advantage_baseline={args.advantage_baseline!r}`; set `advantage_baseline='mean'` or 'leave_one_out', or "
            "`normalize_advantages='step'`."
        )
    check_drops(args)


def check_drops(args: "QuietStarConfig") -> None:
    """Refuses what needs every thought of a batch, where some are left out of the update."""
    given = [name for name in ("advantage_threshold", "reward_std_filter") if getattr(args, name) is not None]
    wrong = []
    if args.distillation_coefficient:
        wrong.append(f"`distillation_coefficient={args.distillation_coefficient}`")
    if BASELINES[args.advantage_baseline].uses_value_head:
        wrong.append(f"`advantage_baseline={args.advantage_baseline!r}`, whose value head learns from every thought")
    if given and wrong:
        raise ValueError(
            f"`{given[0]}={getattr(args, given[0])}` leaves thoughts out of the update, and does not go with "
            f"{' and '.join(wrong)}; set `advantage_baseline='leave_one_out'` and no distillation, or leave `{given[0]}` out."
        )


def check_thinking(args: "QuietStarConfig") -> None:
    """Refuses contradictions among the options of thoughts and of what is learned from them."""
    check_marks(args)
    check_vllm(args)
    if args.self_imitation_batch_size and (args.written_thought_coefficient == 0 or args.thought_positions == "none"):
        raise ValueError(
            f"`self_imitation_batch_size={args.self_imitation_batch_size}` imitates thoughts of the run's own, with the weight "
            "`written_thought_coefficient`; raise that above 0 and leave `thought_positions='none'`, or leave "
            "`self_imitation_batch_size` out."
        )
    check_lengths(args)
    if args.min_entropy_coefficient > args.entropy_coefficient:
        raise ValueError(
            f"`min_entropy_coefficient` ({args.min_entropy_coefficient}) exceeds `entropy_coefficient` "
            f"({args.entropy_coefficient}), which would then have no effect; lower it."
        )
    if args.unfinished_thought_penalty and args.min_thought_length is None:
        raise ValueError(
            f"`unfinished_thought_penalty={args.unfinished_thought_penalty}` is for thoughts that may end by themselves; "
            "set `min_thought_length` or `thought_stop_string`."
        )
    if any(token_id < 0 for token_id in args.thought_suppress_tokens or ()):
        raise ValueError(
            f"`thought_suppress_tokens` is {args.thought_suppress_tokens}; give ids of tokens, from 0 on."
        )
    if args.sync_ref_model and not args.uses_reference:
        raise ValueError(
            "`sync_ref_model=True` has no reference to synchronise; set `beta` above 0 or `no_thought_model='reference'`."
        )


def check_lengths(args: "QuietStarConfig | QuietStarSettings") -> None:
    """Refuses contradictions about where a thought ends."""
    if args.thought_stop_string == "":
        raise ValueError("`thought_stop_string` is empty, and would end every thought; give a string, or None.")
    if args.min_thought_length is not None and args.min_thought_length > args.thought_length:
        raise ValueError(
            f"`min_thought_length` ({args.min_thought_length}) exceeds `thought_length` ({args.thought_length}); lower it."
        )


def check_vllm(args: "QuietStarConfig") -> None:
    """Refuses thoughts that vLLM cannot draw as they are drawn here, and options of vLLM that nothing reads."""
    for mode, names in VLLM_OPTIONS.items():
        for name in names:
            if getattr(args, name) != getattr(type(args), name) and not (args.use_vllm and args.vllm_mode == mode):
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` is for thoughts that vLLM draws in the mode {mode!r}; set `use_vllm=True` and "
                    f"`vllm_mode={mode!r}`, or leave `{name}` out."
                )
    if not args.use_vllm:
        return
    for name, (values, reason) in NEEDED_FOR_VLLM.items():
        if getattr(args, name) not in values:
            raise ValueError(
                f"`use_vllm=True` has vLLM draw thoughts, and `{name}` is {getattr(args, name)!r}: {reason}. Set "
                f"`{name}={values[0]!r}`, or leave `use_vllm` out."
            )
    check_writing(args.settings(), "leave `use_vllm` out")
    if not 0.01 <= args.temperature <= 2:
        raise ValueError(
            f"`temperature` is {args.temperature}, and vLLM draws at 0.01 to 2; change it (`top_k=1` draws the most likely token "
            "at any temperature), or leave `use_vllm` out."
        )


def check_marks(args: "QuietStarConfig | QuietStarSettings") -> None:
    """Refuses contradictions among the strings around a thought."""
    is_text = args.thought_format == "text"
    for name in ("thought_prompt", *(("thought_start_text", "thought_end_text") if is_text else ())):
        if getattr(args, name) == "":
            raise ValueError(f"`{name}` is empty; give text{', or None' if name == 'thought_prompt' else ''}.")
    if args.thought_prompt_role is not None and (
        args.thought_prompt is None or args.thought_positions != "prompt_end"
    ):
        raise ValueError(
            f"`thought_prompt_role` is {args.thought_prompt_role!r}, the turn before an answer that holds `thought_prompt`; set "
            "`thought_prompt` and `thought_positions='prompt_end'`, or leave the role out."
        )
    if is_text and args.thought_stop_string != args.thought_end_text:
        raise ValueError(
            f"`thought_stop_string` is {args.thought_stop_string!r}, but with `thought_format='text'` a thought ends by "
            f"`thought_end_text` ({args.thought_end_text!r}); leave `thought_stop_string` out, or set both alike."
        )


def check_training(args: "QuietStarConfig") -> None:
    """Refuses contradictions among the options of data, optimizers and evaluation."""
    if args.max_steps == 0:
        raise ValueError("`max_steps` is 0; give a number of optimizer steps, or -1 to train `num_train_epochs`.")
    check_patterns(args)
    if args.packing and args.max_length is None:
        raise ValueError("`packing=True` needs `max_length`, the length of a packed row; it is None.")
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(args, name) and not evaluates:
            raise ValueError(
                f"`{name}={getattr(args, name)}` needs evaluations, but `eval_strategy` is 'no'; set "
                "`eval_strategy='steps'`, `eval_steps` and an `eval_dataset`."
            )
    if args.combines_optimizers and args.optim not in ADAMW:
        raise ValueError(
            f"`muon_learning_rate` ({args.muon_learning_rate}) and `grokfast_lambda` ({args.grokfast_lambda}) go with "
            f"AdamW; set `optim` to one of {', '.join(ADAMW)} (got {str(args.optim)!r}), or leave them out."
        )
    if args.optim_target_modules is not None and not any(name in str(args.optim).lower() for name in LAYERED):
        raise ValueError(
            f"`optim_target_modules={args.optim_target_modules!r}` would be ignored by `optim={str(args.optim)!r}`; it goes "
            f"with {', '.join(LAYERED)}. Leave it out."
        )
    if args.optim_args and args.optim in (*ADAMW, "adafactor"):
        raise ValueError(
            f"`optim_args={args.optim_args!r}` would be ignored by `optim={str(args.optim)!r}`, which is made from `learning_rate` and "
            "`weight_decay`, and AdamW from `adam_beta1`, `adam_beta2` and `adam_epsilon` too. Leave it out, or give an optimizer "
            "of your own as `optimizers`."
        )


def check_patterns(args: "QuietStarConfig") -> None:
    """Refuses a pattern of thoughts or scores that is none, or whose thoughts the other options leave no place for."""
    examples = {
        "thought_pattern": r"a thought, such as '<think>(.*?)</think>' or '\[(.*?)\]'",
        "score_pattern": "a final answer, such as '#### (.*)'",
    }
    for name, example in examples.items():
        pattern = getattr(args, name)
        try:
            matches_nothing = pattern is not None and re.compile(pattern, re.DOTALL).match("") is not None
        except re.error as error:
            raise ValueError(
                f"`{name}` is {pattern!r}, which is no regular expression ({error}); put a backslash before "
                r"each character of ()[]{}.*+?|^$\ that stands for itself."
            ) from error
        if matches_nothing:
            raise ValueError(
                f"`{name}` is {pattern!r}, which matches the empty text, and so everywhere; give what stands around {example}."
            )
    if args.packing and args.thought_pattern is not None:
        raise ValueError(
            "`packing=True` joins texts, and `thought_pattern` finds thoughts at places of one; set `packing=False`."
        )


def check_processes_and_memory(args: "QuietStarConfig") -> None:
    """
    Refuses contradictions that only show once `TrainingArguments` has set up the devices, and given the options of gradient
    checkpointing the one name of several that Transformers has had for them.
    """
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise ValueError(
            "`average_tokens_across_devices=False` is not supported: a step's means are over the tokens of all "
            f"{args.world_size} processes, so that several add up to one. Leave it out."
        )
    two_passes = args.branch_batch_size or args.gradient_checkpointing or args.policy_temperature is not None
    if args.single_pass and (two_passes or not args.disable_dropout):
        raise ValueError(
            "`single_pass=True` keeps all activations of one forward without dropout, at the temperature of sampling; leave "
            f"out `branch_batch_size` ({args.branch_batch_size}), `gradient_checkpointing` "
            f"({args.gradient_checkpointing}) and `policy_temperature` ({args.policy_temperature}), and leave "
            f"`disable_dropout` on ({args.disable_dropout})."
        )
    kwargs: Any = args.gradient_checkpointing_kwargs or {}  # a dictionary, once the Trainer has parsed it
    if args.gradient_checkpointing and kwargs.get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}` would lose the gradient from thoughts to the text "
            "they read; leave it out."
        )
