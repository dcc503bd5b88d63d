"""What options and arguments of other trainers are called here, for users who bring a script or a recipe for one.

TRL's `SFTConfig` and `GRPOConfig` come first. Some names are of earlier releases of TRL and Transformers, in which many scripts are written.
"""

import inspect
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches


OF_TOKENIZER = "set it on the tokenizer, and give that as `processing_class`"
OF_MODEL = "give it in `model_init_kwargs`"
OF_SAMPLING = "thoughts are sampled by `temperature`, `top_p`, `top_k` and `min_p`"
OF_TEMPLATE = "set `tokenizer.chat_template`, and give the tokenizer as `processing_class`"
OF_MIXTURES = (
    "on the command line a recipe lists them under `datasets`; in Python, `trl.get_dataset` makes one of them"
)
OF_LOADING = "give the trainer a `quantization_config`"
CLIPPED = "the ratio is clipped by `epsilon` and `epsilon_high`"
SAMPLED = "thoughts are sampled for each step; `num_iterations` uses them again"
WITHOUT_TOOLS = "thoughts are written by the model alone, without tools"
OF_VLLM_SERVER = "set `vllm_server_base_url`, such as 'http://localhost:8000'"
NO_LONGER = "Transformers 5 has no such option; leave it out"
NO_LOGITS = (
    "evaluation scores thoughts and holds no logits. `evaluate` returns reward, NLL and accuracy; for a number of your own "
    "call `model.log_likelihoods` or `model.generate` in a callback's `on_evaluate`"
)

# Options, and what to do here
OPTIONS_ELSEWHERE = {
    # of SFTConfig
    "activation_offloading": "`branch_batch_size` and `gradient_checkpointing` bound memory",
    "chat_template_path": OF_TEMPLATE,
    "dataset_kwargs": "data with `input_ids` are tokenized already, and need no option to say so; leave it out",
    "eos_token": OF_TOKENIZER,
    "eval_packing": "evaluation data are never packed; leave it out",
    "loss_type": "the loss is Quiet-STaR's, whose terms are weighed by `policy_coefficient`, `nll_coefficient` and the like",
    "max_seq_length": "it is `max_length`",
    "packing_strategy": "`packing=True` packs by 'bfd'; leave it out",
    "pad_token": OF_TOKENIZER,
    "padding_free": "`packing=True` leaves little padding; leave it out",
    # of GRPOConfig
    "chat_template_kwargs": "give them as a column `chat_template_kwargs` of the data",
    "delta": CLIPPED,
    "entropy_coef": "it is `entropy_coefficient`, which decays by `entropy_decay`",
    "entropy_coef_min": "it is `min_entropy_coefficient`",
    "generation_batch_size": SAMPLED,
    "generation_kwargs": OF_SAMPLING,
    "importance_sampling_level": "ratios are of tokens; leave it out",
    "log_completions": "it is `log_thoughts`",
    "mask_truncated_completions": "`unfinished_thought_penalty` lowers the reward of thoughts that are cut",
    "max_completion_length": "thoughts have up to `thought_length` tokens, and texts `max_length`",
    "max_prompt_length": "`max_length` is for prompt and completion together",
    "num_completions_to_print": "it is `num_thoughts_to_print`",
    "num_generations": "it is `num_thoughts`",
    "num_generations_eval": "it is `num_thoughts`, in training and evaluation",
    "off_policy_mask_threshold": CLIPPED,
    "repetition_penalty": OF_SAMPLING,
    "scale_rewards": "it is `normalize_advantages`: 'group', 'step' or 'none'",
    "steps_per_generation": SAMPLED,
    "use_adaptive_entropy": "the weight of the entropy bonus decays by `entropy_decay`",
    "vllm_server_host": OF_VLLM_SERVER,
    "vllm_server_port": OF_VLLM_SERVER,
    # of the model
    "attn_implementation": OF_MODEL,
    "device_map": OF_MODEL,
    "dtype": OF_MODEL,
    "load_in_4bit": OF_LOADING,
    "load_in_8bit": OF_LOADING,
    "torch_dtype": "it is `dtype`, in `model_init_kwargs` or on the command line",
    # of TRL's scripts
    "config_file": "it is for `accelerate launch --config_file FILE -m trl_quietstar.cli train`",
    "accelerate_config": "launch by `accelerate launch --config_file FILE -m trl_quietstar.cli train`",
    "datasets": OF_MIXTURES,
    "ignore_bias_buffers": "leave it out",
    "num_processes": "launch by `accelerate launch --num_processes N -m trl_quietstar.cli train`",
    "reward_model_name_or_path": "write a reward function that asks the model, and name it in `reward_functions`",
    "streaming": "on the command line it is `dataset_streaming`",
    "test_split_size": "on the command line it is `eval_size`",
    # of recipes of the Alignment Handbook and Open R1
    "chat_template": OF_TEMPLATE,
    "dataset_mixer": OF_MIXTURES,
    "dataset_mixture": OF_MIXTURES,
    "dataset_prompt_column": "on the command line columns are renamed by `column_mapping`",
    "dataset_splits": "on the command line they are `dataset_train_split` and `dataset_test_split`",
    "preprocessing_num_workers": "it is `dataset_num_proc`",
    "system_prompt": "put it into the data, as the first of the `messages` of each row",
    "wandb_project": "it is the environment's `WANDB_PROJECT`, which a recipe may set under `env`",
    # of earlier releases
    "bnb_4bit_compute_dtype": "it is `dtype`",
    "evaluation_strategy": "it is `eval_strategy`",
    "group_by_length": "it is `train_sampling_strategy='group_by_length'`",
    "half_precision_backend": NO_LONGER,
    "jit_mode_eval": NO_LONGER,
    "logging_dir": "it is the environment's `TENSORBOARD_LOGGING_DIR`",
    "no_cuda": "it is `use_cpu`",
    "overwrite_output_dir": NO_LONGER,
    "per_gpu_train_batch_size": "it is `per_device_train_batch_size`",
    "push_to_hub_token": "it is `hub_token`",
    "save_safetensors": NO_LONGER,
    "tp_size": NO_LONGER,
    "use_liger": "Liger's kernels replace the forward that thoughts are sampled and scored in; leave it out",
    "use_mps_device": NO_LONGER,
    "warmup_ratio": "it is `warmup_steps`, which below 1 is a share of the steps",
}
# Arguments of trainers, and what to do here
ARGUMENTS_ELSEWHERE = {
    "compute_loss_func": "the loss is Quiet-STaR's; weigh its terms by the coefficients of `QuietStarConfig`",
    "compute_metrics": NO_LOGITS,
    "config": "give it as `args`",
    "data_collator": "rows are padded with their thought positions by its own; bring `input_ids`, `labels` and `thought_mask`",
    "environment_factory": WITHOUT_TOOLS,
    "formatting_func": "map the dataset to a `text` column first",
    "model_init": "give the model as `model`; make a trainer for each trial of a search",
    "optimizer_cls_and_kwargs": "set `optim` and `optim_args`, or give an optimizer in `optimizers`",
    "preprocess_logits_for_metrics": NO_LOGITS,
    "ref_model": "the reference is a copy of the model at the start, kept where `beta` is above 0",
    "reward_function": "give it as `reward_functions`, which takes one or several",
    "reward_funcs": "give them as `reward_functions`",
    "reward_model": "write a reward function that asks the model, and give it as `reward_functions`",
    "reward_processing_classes": "a reward function that asks a model tokenizes for it; leave it out",
    "rollout_func": "thoughts are sampled by the trainer itself, or with `use_vllm`",
    "tokenizer": "give it as `processing_class`",
    "tools": WITHOUT_TOOLS,
    "training_args": "give them as `args`",
    "value_model": "values come from a head of the model, of `value_head_type`",
}


def refuse_options(kind: type, given: Iterable[str]) -> None:
    """
    Refuses options that a configuration does not have.

    Args:
        kind (`type`):
            The configuration, a dataclass.
        given (`Iterable[str]`):
            Names of options.

    Raises:
        `TypeError`: if one is none of its own, with what it is called here.
    """
    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]  # of a class
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return  # a user's own class, which looks after them itself
    for name in given:
        if name not in known:
            raise TypeError(f"`{kind.__name__}` has no option `{name}`{ended(meant_by(name, known))}")


def refuse_arguments(trainer: type, options: type, given: Iterable[str]) -> None:
    """
    Refuses arguments that the trainer does not have.

    Args:
        trainer (`type`):
            The trainer.
        options (`type`):
            Its configuration.
        given (`Iterable[str]`):
            Names of arguments that it does not have.

    Raises:
        `TypeError`: if there are any, with what to do instead of one that other trainers take.
    """
    for name in given:
        if name in ARGUMENTS_ELSEWHERE:
            words = ARGUMENTS_ELSEWHERE[name]
        elif name in {field.name for field in fields(options)}:
            words = f"set it in `args`, a `{options.__name__}`"
        elif name in OPTIONS_ELSEWHERE:
            words = OPTIONS_ELSEWHERE[name]
        else:
            words = _near(name, inspect.signature(trainer.__init__).parameters)  # type: ignore[misc]  # of a class
        raise TypeError(f"`{trainer.__name__}` takes no argument `{name}`{ended(words)}")


def meant_by(name: str, known: Iterable[str]) -> str:
    """What to do in place of an option that is not there, by its name and those that are; an empty string if that is not known."""
    words = OPTIONS_ELSEWHERE.get(name) or ARGUMENTS_ELSEWHERE.get(name)
    if words is None and (kind := _other_kind(name)) is not None:
        words = f"it is of TRL's `{kind}`, and nothing here is like it; leave it out"
    return words or _near(name, known)


def _other_kind(name: str) -> str | None:
    """Which of TRL's configurations has an option."""
    import trl  # which loads a module for each

    for kind in ("SFTConfig", "GRPOConfig", "RLOOConfig", "DPOConfig"):
        if name in {field.name for field in fields(getattr(trl, kind))}:
            return kind
    return None


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def ended(words: str, otherwise: str = ".") -> str:
    """The end of a sentence that says what is not there: what to do in its place; or something else where that is not known."""
    if not words:
        return otherwise
    return f"; {words}" if words.endswith("?") else f": {words}."
