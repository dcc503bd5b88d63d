"""Which precision a machine is fast in."""

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from ._compat import is_slow_in_bf16


logger = logging.get_logger(__name__)


def has_bf16() -> bool:
    """Whether an accelerator computes in bfloat16; MPS does so in software on some machines."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps" and is_torch_bf16_gpu_available()


def warn_of_precision(args: TrainingArguments) -> None:
    """Says which options do nothing on the device of a run, or slow it down."""
    if args.fp16 and args.device.type == "cpu":
        logger.warning(
            "`fp16=True` does nothing on a CPU, where training is in float32; take `bf16=True`, or leave it out."
        )
    slow = [name for name in ("bf16", "bf16_full_eval") if getattr(args, name)]
    if slow and is_slow_in_bf16(args.device):
        logger.warning(
            f"`{'=True` and `'.join(slow)}=True`: this processor has no instructions for bfloat16, and a step takes about ten "
            "times as long as in float32. Leave it out."
        )
