"""Several processes: what the engines (DDP, FSDP2, DeepSpeed ZeRO) need beyond an ordinary forward.

Where parameters are sharded, they exist only inside the forward of the module that was wrapped, and a process that runs a
layer waits for all others to run it too. So whatever reads weights is given to the model's forward as
`quietstar_request`, and what decides how often layers run is agreed on.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME
from trl.models.utils import prepare_deepspeed, prepare_fsdp


if TYPE_CHECKING:
    from peft import PeftModel


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the parameters only."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


@contextmanager
def loaded_whole(args: TrainingArguments):
    """Keeps Transformers from partitioning a model as it loads it under ZeRO-3: heads are made, and paths checked, from
    whole weights, which the engine then partitions."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf if args.deepspeed is None else plugin.hf_ds_config)


def check_whole(model: nn.Module) -> None:
    """
    Refuses a model whose parameters are partitioned already.

    Raises:
        `ValueError`: if they are.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "The model was partitioned by `deepspeed.zero.Init` as it was loaded, and heads are made from whole weights; "
            "pass the trainer its id or path, or load it before the `QuietStarConfig` is made."
        )


def check_one_device(model: nn.Module) -> None:
    """
    Refuses a model whose layers are on several devices, or off them.

    Raises:
        `ValueError`: if `device_map` put them there.
    """
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"`device_map` spread the model over {', '.join(devices)}, and a thought needs all layers on one device; leave "
            "`device_map` out or set it to {'': 0}. A model that is too large for one device is sharded by FSDP2 or ZeRO-3."
        )


def check_engine(accelerator: Accelerator) -> None:
    """
    Refuses what is not supported.

    Raises:
        `ValueError`: under tensor, context or sequence parallelism, under FSDP1, or FSDP2 whose checkpoints are in shards.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    split = [name for name in ("tp_size", "cp_size", "sp_size") if getattr(parallelism, name, 1) > 1]
    if split:
        raise ValueError(
            f"`parallelism_config` has {' and '.join(split)} above 1, which splits texts or layers over processes; thoughts "
            "need both whole. Use DDP, FSDP2 or DeepSpeed."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version == 1:
        raise ValueError("FSDP1 is not supported; set `fsdp_version: 2`, as `recipes/accelerate/fsdp2.yaml` does.")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type.name}, whose checkpoints no other engine reads; set "
            "`fsdp_state_dict_type: FULL_STATE_DICT`."
        )


def greatest(value: int, accelerator: Accelerator) -> int:
    """The greatest of the processes' values."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A frozen model as the engine wants it: sharded where the policy is, and on the right device."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator).module
    if accelerator.is_fsdp2:
        return prepare_fsdp(model, accelerator)  # type: ignore[return-value]  # a module all the same
    return accelerator.prepare_model(model, evaluation_mode=True)


def module_is_sharded(module: nn.Module) -> bool:
    """Whether a module's own parameters are gathered by hooks on its forward."""
    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def model_is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only, so that all must run the layers equally often."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# Checkpoints hold whole tensors under the names that one process gives them, whichever engine wrote them


@contextmanager
def gathered(module: nn.Module):
    """The parameters of a module that ZeRO-3 has partitioned are whole inside, and what rank 0 makes of them stays."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The tensors of a module, whole if FSDP2 has sharded them; for all processes to call."""
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=sharded, cpu_offload=sharded))


def load_full(module: nn.Module, state_dict: dict, strict: bool = True) -> None:
    """Loads whole tensors into a module, sharded by FSDP2 or not."""
    set_model_state_dict(module, state_dict, options=StateDictOptions(full_state_dict=True, strict=strict))


def load_sharded(model: "PreTrainedModel | PeftModel", directory: str) -> None:
    """
    Loads what `save_model` wrote into a model that FSDP2 has sharded; the heads aside.

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
    if is_peft_model(model):  # which saves adapters without their name
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


def check_optimizer_file(checkpoint: str) -> None:
    """
    Refuses to resume without the optimizer's state that a checkpoint has in another engine's files.

    Raises:
        `ValueError`: if DeepSpeed wrote them.
    """
    if any(Path(checkpoint).glob("global_step*")):
        raise ValueError(
            f"The optimizer's state in {checkpoint!r} was written by DeepSpeed, and only DeepSpeed reads it; resume with the "
            f"engine it was written with, or start anew from its weights with `model={checkpoint!r}`."
        )


def save_optimizer(optimizer: torch.optim.Optimizer, file: str, writes: bool) -> None:
    """Writes the state of an optimizer whose tensors FSDP2 has sharded; for all processes to call, one of which `writes`."""

    def whole(state: Any) -> Any:
        if isinstance(state, DTensor):
            tensor = state.full_tensor()
            return tensor.cpu() if writes else None
        return {key: whole(value) for key, value in state.items()} if isinstance(state, dict) else state

    state = whole(optimizer.state_dict())
    if writes:
        torch.save(state, file)


def load_optimizer(optimizer: torch.optim.Optimizer, file: str) -> None:
    """Reads an optimizer's state of whole tensors, and shards it as its parameters are."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def shard(parameter: torch.Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            return value  # a count of steps, say
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    own = {
        index: {name: shard(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})
