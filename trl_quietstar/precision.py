"""Which precision a machine is fast in, and which weights can be trained in theirs."""

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from ._compat import is_slow_in_bf16


logger = logging.get_logger(__name__)

SAMPLED = 4096  # weights of each parameter that a small update is tried on


def has_bf16() -> bool:
    """Whether an accelerator computes in bfloat16; older GPUs and some machines with MPS do so in software."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type == "mps" or not is_torch_bf16_gpu_available():
        return False
    return not is_slow_in_bf16(device)


def warn_of_precision(args: TrainingArguments) -> None:
    """Says which options do nothing on the device of a run, or slow it down."""
    if args.fp16 and args.device.type == "cpu":
        logger.warning(
            "`fp16=True` does nothing on a CPU, where training is in float32; take `bf16=True`, or leave it out."
        )
    slow = [name for name in ("bf16", "bf16_full_eval") if getattr(args, name)]
    if slow and is_slow_in_bf16(args.device):
        what, advice = "GPU", "Take `fp16=True`, or leave it out."
        if args.device.type == "cpu":
            what, advice = "processor", "A step takes about ten times as long as in float32. Leave it out."
        logger.warning(f"`{'=True` and `'.join(slow)}=True`: this {what} has no instructions for bfloat16. {advice}")


def check_weights(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """
    Warns of weights in 16 bits that small updates do not change. A model that `from_pretrained` has loaded often has such weights,
    since Transformers takes the precision that they were saved in.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            Holds what is trained, with the learning rates, which AdamW's updates are about as large as.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run. DeepSpeed keeps weights in float32 of its own, so that nothing is said of it.

    Raises:
        `ValueError`: for weights in float16 under `fp16=True`, whose gradients PyTorch refuses to unscale at the first step.
    """
    if accelerator.state.deepspeed_plugin is not None:
        return
    trained = [(p, group.get("initial_lr", group["lr"])) for group in optimizer.param_groups for p in group["params"]]
    halves = [(p, rate) for p, rate in trained if p.dtype in (torch.bfloat16, torch.float16) and rate]
    if accelerator.scaler is not None and any(parameter.dtype == torch.float16 for parameter, _ in halves):
        raise ValueError(
            "`fp16=True` scales gradients, which PyTorch cannot take back for weights that are float16 themselves. Load the model "
            "in float32 (`dtype=torch.float32`); it computes in float16 all the same."
        )
    if not halves or not accelerator.is_main_process:
        return
    changed = torch.stack([_share_changed(p, rate) * p.numel() for p, rate in halves]).sum()
    share = float(changed) / sum(parameter.numel() for parameter, _ in halves)
    if share < 0.5:
        dtype, rates = str(halves[0][0].dtype).removeprefix("torch."), sorted({rate for _, rate in halves})
        logger.warning(
            f"The weights that are trained are {dtype}, where updates as large as the learning rate "
            f"({', '.join(map(str, rates))}) change {share:.1%} of them: from the others they are rounded away. Load the model in "
            "float32 (`dtype=torch.float32`, or its id as `model`), with `bf16=True` to compute in bfloat16; or raise the "
            "learning rate."
        )


@torch.no_grad()
def _share_changed(parameter: torch.Tensor, update: float) -> torch.Tensor:
    """Share of a parameter's weights, of shape `()`, that a small number added to them changes; of a sample, if it is large."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    weights = own.flatten()[:: max(own.numel() // SAMPLED, 1)]
    return (weights + update != weights).float().mean()
