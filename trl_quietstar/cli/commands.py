"""The commands: the module of each, what it does, and the options that it uses. Nothing here imports PyTorch, so that help is quick.

Options are fields of dataclasses. A source names the file that defines some; `options.py` reads them there.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Where options are defined: a title for those without a section of their own, a file from the folder of its package on, and
    a class in it, or all of its classes."""

    title: str
    file: str
    kind: str | None = None


class Command(NamedTuple):
    """A command: its module in this folder, its arguments in short, what it does, where its options are defined, which of those
    it uses (named by themselves or by their section; None: all) but for some, and defaults of its own."""

    module: str
    arguments: str
    summary: str
    sources: tuple[Source, ...] = ()
    used: frozenset[str] | None = None
    unused: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = MappingProxyType({})


OWN = "trl_quietstar/cli"
DATA = Source("Data", f"{OWN}/arguments.py", "DataArguments")
THINKER = Source("Model", f"{OWN}/arguments.py", "ThinkerArguments")
CONFIG = Source("Thinking", "trl_quietstar/config.py", "QuietStarConfig")
MODEL = Source("Model and adapter (of TRL)", "trl/trainer/model_config.py", "ModelConfig")
# the second says what TRL's trainers begin with
TRAINER = (
    Source("Trainer", "transformers/training_args.py", "TrainingArguments"),
    Source("Trainer", "trl/trainer/base_config.py"),
)

# fields of the Trainer that mean nothing to this one: it refuses them (`UNSUPPORTED` in rules.py), counts tokens in a way of its
# own, keeps no predictions, or leaves them to scripts
OF_OTHERS = frozenset(
    "average_tokens_across_devices batch_eval_metrics do_eval do_predict do_train eval_accumulation_steps include_for_metrics "
    "label_names label_smoothing_factor length_column_name liger_kernel_config local_rank neftune_noise_alpha "
    "prediction_loss_only torch_compile torch_compile_backend torch_compile_mode use_liger_kernel".split()
)
# what an evaluation reads (`eval_loss` is the whole objective): sections of the configuration, then fields by themselves
EVALUATION = frozenset(
    ["Model", "Data", "Thoughts", "Memory", "Reward and advantage", "Objective"]
    + "model_name_or_path model_revision dtype attn_implementation load_in_8bit load_in_4bit bnb_4bit_quant_type".split()
    + "use_bnb_nested_quant bnb_4bit_quant_storage num_thoughts_to_print useful_gain".split()
    + "per_device_eval_batch_size bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu seed full_determinism".split()
    + "accelerator_config deepspeed fsdp fsdp_config parallelism_config ddp_backend ddp_timeout".split()
    + "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor".split()
    + "dataloader_drop_last disable_tqdm log_level log_level_replica".split()
)
INSPECTION = frozenset(
    ["Thoughts", "Page", *"model_init_kwargs trust_remote_code max_length score_pattern thought_pattern".split()]
    + "reward_prediction use_cpu seed".split()
    + "mixing_head_type value_head_type value_head_hidden_size".split()
)

# what fields of others mean here
HELP = {
    "dtype": "Type of the weights: `auto` (as saved), `bfloat16`, `float16` or `float32`. By default float32; with `bf16`, a base "
    "that stays frozen under LoRA is bfloat16.",
    "push_to_hub": "Whether to push to the Hub what is saved.",
    "resume_from_checkpoint": "Folder of a checkpoint to go on from. Without a folder: the last checkpoint in `output_dir`.",
}

TRAINING = "[--config RECIPE.yaml] [--model_name_or_path MODEL] [--dataset_name DATA] [--FIELD VALUE ...]"
OF_TRAINING = {"dtype": None}  # the trainer's own default, which goes by what is trained

COMMANDS = {
    "recipes": Command(
        "recipes",
        "[copy NAME [DEST]]",
        "lists the recipes that come with the package, or copies one, to change it and train by it",
    ),
    "check": Command(
        "check",
        TRAINING,
        "shows before a run what it would be, for the arguments of `train`: the fields that differ from the defaults, rows as the "
        "model sees them, time and memory of a step, and whether the model's thoughts help at all",
        (DATA, CONFIG, MODEL, *TRAINER),
        unused=OF_OTHERS,
        defaults=OF_TRAINING,
    ),
    "train": Command(
        "train",
        TRAINING,
        "trains a causal language model to think, evaluates it before and after where there is evaluation data, and saves it",
        (DATA, CONFIG, MODEL, *TRAINER),
        unused=OF_OTHERS,
        defaults=OF_TRAINING,
    ),
    "generate": Command(
        "generate",
        "--model MODEL --prompt TEXT [--FIELD VALUE ...]",
        "writes on from a prompt, thinking; with --show-thoughts, the thoughts too",
        (THINKER, Source("Text", f"{OWN}/generate.py", "GenerateArguments")),
    ),
    "eval": Command(
        "evaluate",
        "--model MODEL --dataset_name DATA [--anti-theater] [--FIELD VALUE ...]",
        "evaluates a model on held-out text; with --anti-theater, also whether its thoughts are used or decoration; with --tasks, "
        "on any tasks of lm-evaluation-harness instead, and with --compare there also without thoughts. "
        "`trl-quietstar eval --tasks TASKS --help` lists the options of tasks",
        (Source("Data", f"{OWN}/evaluate.py", "EvalArguments"), DATA, CONFIG, MODEL, *TRAINER),
        used=EVALUATION,
        unused=frozenset("disable_dropout gradient_checkpointing packing shuffle_dataset single_pass".split()),
    ),
    "inspect": Command(
        "inspect",
        "--model MODEL --text FILE [--prompt FILE] [--output PAGE.html] [--FIELD VALUE ...]",
        "writes a page of what a model thinks after each token of a text; with --prompt, between a prompt and the text",
        (Source("Page", f"{OWN}/inspect.py", "InspectArguments"), CONFIG, *TRAINER),
        used=INSPECTION,
        unused=frozenset(["eval_do_sample", "policy_temperature"]),
        defaults={"num_thoughts": 3, "seed": 0},
    ),
    "convert": Command(
        "convert",
        "PATH OUTPUT --n_ahead N [--n_ahead_talk N] [--tokenizer MODEL] [--FIELD VALUE ...]",
        "makes a thinking model of a checkpoint of the published Quiet-STaR code",
        (Source("Checkpoint", f"{OWN}/convert.py", "ConvertArguments"),),
    ),
    "merge": Command(
        "merge",
        "ADAPTER OUTPUT [--dtype DTYPE] [--FIELD VALUE ...]",
        "merges an adapter into its base, and saves the model with its heads",
        (Source("Merging", f"{OWN}/merge.py", "MergeArguments"),),
    ),
    "compare": Command(
        "compare",
        "RUN RUN ... [--output PLOT.svg]",
        "compares runs of several settings and seeds by what they left in their output directories: one table with intervals, and one "
        "plot",
        (Source("Comparison", f"{OWN}/compare.py", "CompareArguments"),),
    ),
    "export": Command(
        "export",
        "--model MODEL --output DIR [--format hf|gguf] [--dtype DTYPE] [--FIELD VALUE ...]",
        "writes a plain model that thinks by itself, for Transformers or llama.cpp",
        (Source("Export", f"{OWN}/export.py", "ExportArguments"),),
    ),
    "completion": Command(
        "completion", "SHELL", "prints what a shell (bash, zsh, fish, ...) needs to complete commands and flags"
    ),
}
# what `eval` is with a flag that names tasks
TASKS = Command(
    "evaluate",
    "--model MODEL --tasks TASKS [--compare] [--FIELD VALUE ...]",
    "runs tasks of lm-evaluation-harness with thoughts, and with --compare also without",
    (THINKER, Source("Tasks", f"{OWN}/evaluate.py", "TaskArguments")),
)
