"""Soft-caps, `cap · tanh(x / cap)`, of attention scores and of logits; None where a family has none."""

import torch


def cap_(values: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Caps values in place."""
    return values if softcap is None else values.div_(softcap).tanh_().mul_(softcap)


def slope(capped: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """Derivative of the cap, from capped values; 0 where they are -inf. None without one."""
    return None if softcap is None else 1 - (capped.clamp(min=-softcap) / softcap) ** 2


def times_(values: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
    """A gradient through the cap, in place."""
    return values if slope is None else values.mul_(slope)
