"""The engines of a run in several processes (DDP, FSDP2, DeepSpeed ZeRO): which are supported, what the processes agree on,
and how the reference and the optimizer's state follow the policy's sharding."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_torch_version
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging
from trl.models.utils import prepare_deepspeed, prepare_fsdp


logger = logging.get_logger(__name__)
RIGHT_NORMS = "2.13"  # the first PyTorch that was run whose gradient norms under FSDP2 are those of one process


def is_sharded(accelerator: Accelerator) -> bool:
    """Tells whether each process holds only a part of the parameters."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def check_engine(accelerator: Accelerator) -> None:
    """
    Refuses ways to split a run over processes that are not supported, and warns of a PyTorch that clips wrongly in one that is.

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
    if is_torch_version("<", RIGHT_NORMS):
        logger.warning(
            "Under FSDP2 gradient norms, by which `max_grad_norm` clips, came out wrong with PyTorch 2.7 and 2.9, and right from %s on; this is "
            "%s. Upgrade it, or use DDP.",
            RIGHT_NORMS,
            torch.__version__,
        )


def greatest(value: int, accelerator: Accelerator) -> int:
    """The greatest of the processes' values."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def summed(values: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The sum of the processes' tensors, of one shape."""
    return accelerator.reduce(values.to(accelerator.device), "sum")


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Hands a frozen model to the engine, which shards it where it shards the policy, and puts it on the right device."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator).module
    if accelerator.is_fsdp2:
        return prepare_fsdp(model, accelerator)  # type: ignore[return-value]  # a module all the same
    return accelerator.prepare_model(model, evaluation_mode=True)


def check_optimizer_file(checkpoint: str) -> None:
    """
    Refuses a checkpoint whose optimizer's state is in files of DeepSpeed, for a run under another engine.

    Raises:
        `ValueError`: if DeepSpeed wrote them.
    """
    if any(Path(checkpoint).glob("global_step*")):
        raise ValueError(
            f"The optimizer's state in {checkpoint!r} was written by DeepSpeed, and only DeepSpeed reads it; resume with the "
            f"engine it was written with, or start anew from its weights with `model={checkpoint!r}`."
        )


def save_optimizer(optimizer: torch.optim.Optimizer, file: str, writes: bool) -> None:
    """
    Writes the state of an optimizer whose tensors FSDP2 has sharded. All processes must call it.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            The optimizer.
        file (`str`):
            Written as a run of one process writes it.
        writes (`bool`):
            Whether this process writes the file.
    """

    def whole(state: Any) -> Any:
        if isinstance(state, DTensor):
            tensor = state.full_tensor()
            return tensor.cpu() if writes else None
        return {key: whole(value) for key, value in state.items()} if isinstance(state, dict) else state

    state = whole(optimizer.state_dict())
    if writes:
        torch.save(state, file)


def load_optimizer(optimizer: torch.optim.Optimizer, file: str) -> None:
    """Reads an optimizer's state of whole tensors, and shards each tensor as its parameter is."""
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
