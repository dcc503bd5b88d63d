"""Several processes: what the engines (DDP, FSDP2, DeepSpeed ZeRO) need beyond an ordinary forward.

Where parameters are sharded, they exist only inside the forward of the module that was wrapped, and a process that runs a
layer waits for all others to run it too. So whatever reads weights is given to the model's forward as
`quietstar_request`, and what decides how often layers run is agreed on.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from trl.models.utils import prepare_deepspeed, prepare_fsdp


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the parameters only."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def check_engine(accelerator: Accelerator) -> None:
    """
    Refuses what is not supported.

    Raises:
        `ValueError`: under FSDP1.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError("FSDP1 is not supported; set `fsdp_version: 2`, as `recipes/accelerate/fsdp2.yaml` does.")


def greatest(value: int, accelerator: Accelerator) -> int:
    """The greatest of the processes' values."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A frozen model as the engine wants it: sharded where the policy is, and on the right device."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator).module
    if accelerator.is_fsdp2:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def module_is_sharded(module: nn.Module) -> bool:
    """Whether a module's own parameters are gathered by hooks on its forward."""
    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def load_full(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Loads whole tensors into a module, sharded or not."""
    set_model_state_dict(module, state_dict, options=StateDictOptions(full_state_dict=True))
