"""What can be refused before a run: arguments before anything is loaded, and options once the engine is known."""

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import IntervalStrategy, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import BEMACallback, LogCompletionsCallback, SyncRefModelCallback, WeaveCallback
from trl.import_utils import is_vllm_available

from ..config import QuietStarConfig
from ..evaluation.anti_theater import check_texts
from ..learning.metrics import EVAL_METRICS, PENALIZED
from ..learning.reward_functions import RewardFunctions
from ..loading import check_adapter, check_kinds, check_model_kind, check_quantization
from ..model.adapters import base_of
from ..model.saved import check_apart
from .distributed import check_engine, is_sharded
from .folders import check_output_dir
from .optimizers import check_optimizers


GIVE = " (on the command line: `--eval_dataset_name`, or `--eval_size 0.1` for a tenth of the training rows)"
# loggers that Transformers imports, by the name of their package
IMPORTED_LOGGERS = (
    "wandb",
    "trackio",
    "tensorboard",
    "mlflow",
    "swanlab",
    "clearml",
    "comet_ml",
    "dvclive",
    "codecarbon",
)


def check_inputs(
    model,
    args: QuietStarConfig,
    train_dataset,
    eval_dataset,
    processing_class,
    quantization_config,
    peft_config,
    brings_metrics: bool,
) -> None:
    """
    Refuses arguments of the trainer that do not go together, before anything is loaded. Callbacks or reward functions of the
    user's own may bring metrics (`brings_metrics`).

    Raises:
        `OSError`: if nothing can be written to `args.output_dir`.
        `TypeError`: if `args` is no `QuietStarConfig`, or model or tokenizer are none.
        `ImportError`: if a logger, or vLLM, is not installed.
        `ValueError`: if data is missing or of a kind that an option cannot use, a logger is unknown, or the model cannot be
            quantized or adapted as asked.
    """
    if not isinstance(args, QuietStarConfig):
        raise TypeError(f"`args` is a `{type(args).__name__}`; give a `QuietStarConfig`.")
    check_model_kind(model)
    if train_dataset is None and not eval_dataset:
        raise ValueError("There is no data: give a `train_dataset`, or an `eval_dataset` to evaluate only.")
    _check_loggers(args)
    if args.use_vllm and train_dataset is not None and not is_vllm_available():
        raise ImportError(
            f"`use_vllm=True` needs vLLM here, also with `vllm_mode={args.vllm_mode!r}`, and it is not installed: `pip install "
            "trl[vllm]`, or leave `use_vllm` out."
        )
    if train_dataset is not None and args.should_save:
        check_output_dir(str(args.output_dir))
        if peft_config is not None:
            check_apart(str(args.output_dir), model if isinstance(model, str) else base_of(model).config.name_or_path)
    if args.num_iterations > 1:
        _check_repeats(args, train_dataset)
    if args.anti_theater_steps is not None:
        if not eval_dataset:
            raise ValueError(
                f"`anti_theater_steps={args.anti_theater_steps}` needs an `eval_dataset` to validate the thoughts on{GIVE}."
            )
        if isinstance(eval_dataset, Dataset):
            check_texts(len(eval_dataset))
    strategy = IntervalStrategy(args.eval_strategy)
    if strategy != IntervalStrategy.NO:
        if not eval_dataset:
            raise ValueError(f"`eval_strategy={strategy.value!r}` needs an `eval_dataset`{GIVE}.")
        check_best_metric(args, eval_dataset, brings_metrics or bool(args.reward_functions))
    if quantization_config is not None:
        check_quantization(model, args, peft_config, training=train_dataset is not None)
    if peft_config is not None:
        check_adapter(model, peft_config)
    check_kinds(model, args, processing_class)


def _check_loggers(args: QuietStarConfig) -> None:
    """What `report_to` names is known to Transformers, and installed."""
    available = get_available_reporting_integrations()
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to` names {name!r}; choose among {', '.join(INTEGRATION_TO_CALLBACK)}, or 'none'."
            )
        if name not in available and name in IMPORTED_LOGGERS:
            raise ImportError(
                f"`report_to` names {name!r}, which is not installed: `pip install {name}`, or give 'none'."
            )


def check_best_metric(args: QuietStarConfig, eval_dataset, brings_metrics: bool) -> None:
    """
    Refuses to look for the best model by a metric that some evaluation would lack, where the Trainer would fail.

    Args:
        args ([`QuietStarConfig`]):
            The options.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            What is evaluated on.
        brings_metrics (`bool`):
            Whether callbacks or reward functions may measure more.

    Raises:
        `ValueError`: if it is such a metric.
    """
    if args.metric_for_best_model is None:
        return
    thinks = all(args.stages.at(step)["thought_positions"] != "none" for step in args.stages.starts)
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    measured = (*EVAL_METRICS, "no_thought_drift") if thinks else ("nll_without", "accuracy_without")
    penalized = PENALIZED if thinks and args.unfinished_thought_penalty else ()
    names = [prefix + metric for prefix in prefixes for metric in ("loss", *measured, *penalized)]
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in names and not (brings_metrics and name not in EVAL_METRICS):
        raise ValueError(
            f"`metric_for_best_model` is 'eval_{name}', which evaluations{'' if thinks else ' without thoughts'} do not measure; "
            f"choose among {', '.join(f'eval_{name}' for name in names)}."
        )


def _check_repeats(args: QuietStarConfig, train_dataset) -> None:
    """Rows of a step come again for each further update, which takes a data set that is read in any order."""
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"`num_iterations={args.num_iterations}` reads rows again and needs a map-style dataset, not a stream; load it "
            "whole or leave it at 1."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            f"`num_iterations={args.num_iterations}` reads the rows of a step again, and `batch_rebalance` deals them out "
            "another way each time; set `train_sampling_strategy='group_by_length'`, or leave `num_iterations` at 1."
        )


def check_engine_options(args: QuietStarConfig, accelerator: Accelerator, optimizers: tuple) -> None:
    """
    Refuses options that the run's engine cannot do.

    Args:
        args ([`QuietStarConfig`]):
            The options.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        optimizers (`tuple`):
            Optimizer and scheduler that were given, or None.

    Raises:
        `ValueError`: if there are any.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"`nn.DataParallel` on {args.n_gpu} GPUs is not supported; launch with `accelerate launch`, or make a "
            "single GPU visible with `CUDA_VISIBLE_DEVICES`."
        )
    is_deepspeed, is_fsdp = (
        getattr(accelerator.state, f"{x}_plugin", None) is not None for x in ("deepspeed", "fsdp")
    )
    check_optimizers(args, optimizers, sharded=is_deepspeed or is_fsdp)
    check_engine(accelerator)
    if not is_sharded(accelerator):
        return
    if args.use_vllm and is_deepspeed:
        raise ValueError(
            "`use_vllm=True` was not tried with weights that ZeRO-3 has partitioned; take DDP or FSDP2, or leave `use_vllm` out."
        )
    if args.anti_theater_action == "rollback" and is_deepspeed:
        raise ValueError(
            "`anti_theater_action='rollback'` takes back weights that ZeRO-3 has partitioned; use 'stop', or FSDP2."
        )
    if args.fp16_full_eval or args.bf16_full_eval:
        raise ValueError(
            f"`fp16_full_eval` ({args.fp16_full_eval}) and `bf16_full_eval` ({args.bf16_full_eval}) cast the weights, "
            "which cannot be taken back where they are sharded; leave them out, and set `bf16=True`."
        )


def check_streams(
    args: QuietStarConfig, accelerator: Accelerator, train_dataset, eval_dataset, functions: RewardFunctions | None
) -> None:
    """
    Refuses columns of a stream that one process reads for all: it is dealt out as tensors, and columns are none.

    Args:
        args ([`QuietStarConfig`]), accelerator ([`~accelerate.Accelerator`]):
            Options and processes of the run.
        train_dataset, eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            All data of the run.
        functions ([`~learning.reward_functions.RewardFunctions`], *optional*):
            The reward functions of the run.

    Raises:
        `ValueError`: if reward functions take columns of such a stream.
    """
    evaluation = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    streams = [dataset for dataset in (train_dataset, *evaluation) if isinstance(dataset, IterableDataset)]
    if accelerator.num_processes == 1 or accelerator.dispatch_batches is False or not streams:
        return
    if functions is not None and functions.has_columns(args):
        raise ValueError(
            "`reward_functions` take columns of a stream, which one process reads for all; set "
            "`accelerator_config={'dispatch_batches': False}`, or load the data whole."
        )


def check_callbacks(callbacks: list[TrainerCallback], model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuses a callback that would fail in the middle of training.

    Args:
        callbacks (`list` of [`~transformers.TrainerCallback`]):
            All of a run.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to be trained.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trainer's.

    Raises:
        `ValueError`: for one of TRL's that does not fit the model or the data, or that an earlier run has used up.
    """
    for callback in callbacks:
        if isinstance(callback, BEMACallback):
            _check_bema(callback, model)
        elif isinstance(callback, SyncRefModelCallback):
            _check_reference(callback, model)
        elif isinstance(callback, (LogCompletionsCallback, WeaveCallback)):
            _check_prompts(callback, tokenizer)


def _check_bema(callback: BEMACallback, model: nn.Module) -> None:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"`BEMACallback` averages whole models, and {len(frozen)} parameters of this one are frozen (as {frozen[0]!r}). "
            "Leave it out, or train everything: without an adapter, with `advantage_baseline='value'` and "
            "`reward_prediction='mixed'`."
        )
    if callback.running_model is not None:
        raise ValueError(
            "`BEMACallback` holds the averages of an earlier run and cannot begin another. Before you train again, take it out "
            "by `trainer.remove_callback(BEMACallback)` and add a new one."
        )
    if getattr(callback, "update_ref_model", False):  # of the one in `trl.experimental`
        raise ValueError(
            "`BEMACallback(update_ref_model=True)` asks for a reference that only TRL's own DPO trainer hands to it. Leave that out, "
            "and set `sync_ref_model=True`."
        )


def _check_reference(callback: SyncRefModelCallback, model: nn.Module) -> None:
    reference = callback.ref_model
    own, copied = (len(list(one.parameters())) for one in (model, reference if reference is not None else model))
    if own != copied:
        raise ValueError(
            f"`SyncRefModelCallback` has a reference of {copied} parameters, and the model has {own} with its heads. Leave it out, "
            "and set `sync_ref_model=True` and `beta`."
        )


def _check_prompts(callback: LogCompletionsCallback | WeaveCallback, tokenizer: PreTrainedTokenizerBase) -> None:
    name, columns = type(callback).__name__, getattr(callback.eval_dataset, "column_names", None) or []
    if "prompt" not in columns:
        raise ValueError(
            f"`{name}` completes the column `prompt` of one evaluation dataset, which has {', '.join(columns) or 'no columns'}; give "
            "`eval_dataset` with `prompt` and `completion`, or leave the callback out."
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            f"`{name}` pads prompts, and the tokenizer has no padding token: set `tokenizer.pad_token = tokenizer.eos_token`."
        )
