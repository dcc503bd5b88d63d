"""Parameters that an engine (FSDP2, DeepSpeed ZeRO-3) has sharded: each process holds a part of every tensor.

Sharded parameters exist only inside the forward of the module that was wrapped, and a process that runs a layer waits for
all others to run it too. So whatever reads weights is given to the model's forward as `quietstar_request`.

Checkpoints hold whole tensors under the names that one process gives them, whichever engine wrote them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME


if TYPE_CHECKING:
    from peft import PeftModel


def module_is_sharded(module: nn.Module) -> bool:
    """Tells whether a module's own parameters are whole only inside its forward."""
    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def model_is_sharded(model: nn.Module) -> bool:
    """Tells whether each process holds only a part of the parameters, so that all must run the layers equally often."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the part of a parameter that this process holds: all of it, unless FSDP2 has sharded it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def check_one_device(model: nn.Module) -> None:
    """
    Refuses a model whose layers are on several devices, or off them.

    Raises:
        `ValueError`: if `device_map` names more than one device.
    """
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"`device_map` spread the model over {', '.join(devices)}, and a thought needs all layers on one device; leave "
            "`device_map` out or set it to {'': 0}. A model that is too large for one device is sharded by FSDP2 or ZeRO-3."
        )


def check_unpartitioned(model: nn.Module) -> None:
    """
    Refuses a model that DeepSpeed partitioned as it was loaded.

    Raises:
        `ValueError`: if parameters are partitioned.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "The model was partitioned by `deepspeed.zero.Init` as it was loaded, and heads are made from whole weights; "
            "pass the trainer its id or path, or load it before the `QuietStarConfig` is made."
        )


@contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Keeps Transformers from partitioning a model that is loaded inside the block under ZeRO-3. Heads are made, and paths are
    checked, from whole weights, which the engine partitions afterwards."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf if args.deepspeed is None else plugin.hf_ds_config)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Makes the parameters of a module that ZeRO-3 has partitioned whole inside the block. What rank 0 changes in them stays."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """Returns the tensors of a module, made whole where FSDP2 has sharded them. All processes must call it."""
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=sharded, cpu_offload=sharded))


def load_full(module: nn.Module, state_dict: dict, strict: bool = True) -> None:
    """Loads whole tensors into a module, which FSDP2 may have sharded. All processes must call it."""
    set_model_state_dict(module, state_dict, options=StateDictOptions(full_state_dict=True, strict=strict))


def load_sharded(model: "PreTrainedModel | PeftModel", directory: str) -> None:
    """
    Loads the weights or the adapter that `save_model` wrote into a model that FSDP2 has sharded. The heads are not loaded.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        directory (`str`):
            A checkpoint.

    Raises:
        `FileNotFoundError`: if there are no weights.
        `ValueError`: if they are of another model, or stored in other pieces (experts of a mixture).
    """
    pattern = ADAPTER_SAFE_WEIGHTS_NAME if is_peft_model(model) else SAFE_WEIGHTS_NAME.replace(".", "*.")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(directory).glob(pattern)):
        tensors |= load_file(file)
    if not tensors:
        raise FileNotFoundError(f"There is no {pattern} in {directory!r}.")
    if is_peft_model(model):  # PEFT leaves the adapter's name out of its files
        names = {name.replace(f".{model.active_adapter}", ""): name for name, _ in model.named_parameters()}
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
    own = model.state_dict()
    wrong = sorted(name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape)
    if wrong:
        raise ValueError(
            f"The weights in {directory!r} do not fit a model sharded by FSDP2: {len(wrong)} differ in name or shape, as "
            f"{wrong[0]!r}. It is another model, or a mixture whose experts are stored one by one: resume that under DDP."
        )
    load_full(model, tensors, strict=False)
