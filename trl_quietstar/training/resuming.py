"""Whether a checkpoint fits the run that is to go on from it, and how its weights are read.

A checkpoint is compared with the model, the options and the optimizer of the run, before anything of them is changed.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, logging

from ..config import QuietStarConfig
from ..contradictions import ADAMW
from ..derived import VALUE_BASELINES
from ..model.adapters import base_of
from ..model.saved import read_heads, saved_settings
from ..settings import OF_HEADS
from .faults import listed
from .folders import SHARDS, STATE_NAME


logger = logging.get_logger(__name__)

# An optimizer's state goes on under options of the same kind only. Each function says what kind a value is of.
KINDS: dict[str, Callable] = {
    "optim": lambda name: "adamw" if name in ADAMW else str(name),
    "optim_args": str,
    "muon_learning_rate": lambda rate: rate is not None,
    "grokfast_lambda": bool,
    "advantage_baseline": lambda name: name in VALUE_BASELINES,  # decides whether the value head is trained
    "reward_prediction": str,  # decides whether the mixing head is trained
    "thought_format": str,  # decides whether the start and end embeddings are trained
    "lr_scheduler_type": lambda name: str(name) if name in ("reduce_lr_on_plateau", "greedy") else "by step",
}
# Options that are part of an optimizer's state: the checkpoint's values count, not those of the run.
RESTORED = ("learning_rate", "heads_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SIGNS = {"betas", "momentum", "scale_parameter"}  # options that tell optimizers apart


def check_fits(folder: str | Path, model: PreTrainedModel) -> None:
    """
    Refuses a checkpoint of another model, by what can be told without loading it.

    Args:
        folder (`str`):
            A whole checkpoint.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to be trained.

    Raises:
        `ValueError`: if family, size, heads or adapter differ.
    """
    folder, base = Path(folder), base_of(model)
    has_adapter = (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file()
    if has_adapter != is_peft_model(model) and not any(any(folder.glob(shards)) for shards in SHARDS):
        ours, saved = ("an adapter", "none") if is_peft_model(model) else ("no adapter", "one")
        raise ValueError(
            f"The model to be trained has {ours}, the checkpoint {str(folder)!r} has {saved}; resume with the "
            "`peft_config` of the run that wrote it."
        )
    if (folder / CONFIG_NAME).is_file():
        saved = json.loads((folder / CONFIG_NAME).read_text())
        if saved.get("model_type") != base.config.model_type:
            raise _other_model(folder, "model_type", saved.get("model_type"), base.config.model_type)
        config = type(base.config).from_dict(saved).get_text_config()
        for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            was, now = getattr(config, name, None), getattr(base.config.get_text_config(), name, None)
            if was != now:
                raise _other_model(folder, name, was, now)
    settings = saved_settings(str(folder))
    for name in () if settings is None else OF_HEADS:
        was, now = getattr(settings, name), getattr(base.quietstar_settings, name)
        if was != now:
            raise ValueError(
                f"The heads in the checkpoint {str(folder)!r} have `{name}` {was!r}, not {now!r}; set `{name}={was!r}`."
            )
    read_heads(base.quietstar, folder)
    if has_adapter:
        _check_adapter(folder, model)


def _other_model(folder: Path, name: str, was, now) -> ValueError:
    return ValueError(
        f"The checkpoint {str(folder)!r} is of another model: its `{name}` is {was!r}, that of the model to be trained "
        f"{now!r}. Pass as `model` the one that the checkpoint's run started from."
    )


def _check_adapter(folder: Path, model) -> None:
    """Refuses an adapter of other modules, which PEFT would load in part, and silently."""
    from peft import get_peft_model_state_dict

    ours = {name: list(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}
    wrong = sorted(name for name in ours | saved if ours.get(name) != saved.get(name))
    if wrong:
        raise ValueError(
            f"The adapter in the checkpoint {str(folder)!r} is not that of the model to be trained: {listed(wrong)} differ in "
            "name or shape. Resume with the `peft_config` of the run that wrote it."
        )


def optimizer_fields(args: QuietStarConfig) -> dict:
    """Collects the options that an optimizer's state goes with, for a checkpoint."""
    return {name: getattr(args, name) for name in (*KINDS, *RESTORED)}


def check_optimizer_fields(folder: str | Path, args: QuietStarConfig) -> None:
    """
    Refuses options under which the optimizer's state in a checkpoint means nothing, and warns of options that it overrides.

    Args:
        folder (`str`):
            A whole checkpoint. One of an earlier version may not say what it was written with.
        args ([`QuietStarConfig`]):
            Of the run that goes on from it.

    Raises:
        `ValueError`: if an option is of another kind; the message has its value then and now.
    """
    path = Path(folder, STATE_NAME)
    saved = json.loads(path.read_text()).get("optimizer") if path.is_file() else None
    if saved is None or not Path(folder, OPTIMIZER_NAME).is_file():
        return
    own = json.loads(json.dumps(optimizer_fields(args)))  # names in place of their enumerations
    for name, kind in KINDS.items():
        if kind(saved.get(name, own[name])) != kind(own[name]):  # an earlier version did not know all
            raise ValueError(
                f"`{name}` is {own[name]!r}, and was {saved[name]!r} when the checkpoint {str(folder)!r} was written, whose "
                f"optimizer goes with that. Set it back, or start anew from its weights with `model={str(folder)!r}`."
            )
    changed = [f"`{name}` {saved[name]} ({own[name]} here)" for name in RESTORED if saved[name] != own[name]]
    if changed:
        logger.warning(
            f"The optimizer of the checkpoint {str(folder)!r} goes on with what it was written with: {', '.join(changed)}. "
            f"For other values start anew from its weights with `model={str(folder)!r}`."
        )


def check_groups(folder: str | Path, optimizer: torch.optim.Optimizer) -> None:
    """
    Refuses the state of an optimizer that has other parameters or is another one, by what can be told without its tensors.

    Args:
        folder (`str`):
            A whole checkpoint.
        optimizer ([`~torch.optim.Optimizer`]):
            The one that is to go on.

    Raises:
        `ValueError`: if parameter groups differ.
    """
    path = Path(folder, OPTIMIZER_NAME)
    if not path.is_file():
        return
    with safe_globals():
        groups = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    was, now = ([len(group["params"]) for group in x] for x in (groups, optimizer.param_groups))
    options, own = ([sorted(SIGNS & group.keys()) for group in x] for x in (groups, optimizer.param_groups))
    if was != now or options != own:
        raise ValueError(
            f"The optimizer of the checkpoint {str(folder)!r} has groups of {was} parameters with {options[0]}, that of this "
            f"run {now} with {own[0]}. Resume with the same optimizer (`optim`, `optimizers`, `muon_learning_rate`) and the "
            "same trainable parameters (`advantage_baseline`, `reward_prediction`, what you froze), or start anew from its "
            f"weights with `model={str(folder)!r}`."
        )


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """
    Reads the weights of a checkpoint into a thinking model, in place, by the conversions that Transformers saved them with.

    The experts of a mixture, for instance, are one tensor in the model and stored one by one. The Trainer calls
    `load_state_dict`, which converts nothing, and would leave such weights as they were.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The thinking model, whose heads are left alone.
        folder (`str`):
            A whole checkpoint.

    Raises:
        `ValueError`: if weights are missing, too many, or of other shapes.
    """
    # the widest of the model's, so that no weight is rounded on the way
    dtype = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
    saved, found = model._plain_class.from_pretrained(  # type: ignore[operator,union-attr]  # an attribute of a module
        folder,
        config=copy.deepcopy(model.config),
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *mismatched})
    if wrong:
        raise ValueError(
            f"The weights in {folder!r} are of another model: {listed(wrong)} differ in name or shape. Pass as `model` the one "
            "that the checkpoint's run started from."
        )
    model.load_state_dict(saved.state_dict(), strict=False)  # the heads are a file of their own
