"""Copies between the host and the device that runs the model.

The host prepares kernels ahead of the device. It loses that lead each time it asks for a number, since it then waits until all
kernels before have run. So the host keeps what it knows (texts, positions, lengths, masks) in its own memory and sends it
without waiting; and what it must ask for comes back in one copy.
"""

import functools
from collections.abc import Sequence
from dataclasses import fields

import torch
from typing_extensions import Self

from .._compat import is_fault_of_device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sends a tensor of the host to the device, without waiting for the device. Float64 becomes the device's [`exact_dtype`]."""
    if tensor.dtype == torch.float64:
        tensor = tensor.to(exact_dtype(device))
    # MPS would read the host's memory later, when it may hold something else
    return tensor.to(device, non_blocking=device.type != "mps")


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns tensors of one device in the host's memory, detached, and waits for the device once: all bytes are one copy."""
    if all(x.device.type == "cpu" for x in tensors):
        return [x.detach() for x in tensors]
    parts = [x.detach().reshape(-1).contiguous().view(torch.uint8) for x in tensors]
    copies = torch.cat(parts).cpu().split([len(part) for part in parts])
    # clones, since a tensor's bytes must begin at a multiple of their size
    return [copy.clone().view(x.dtype).view(x.shape) for copy, x in zip(copies, tensors, strict=True)]


@functools.cache
def exact_dtype(device: torch.device) -> torch.dtype:
    """The most exact floating-point type of a device: float64, or float32 on Apple's MPS and some of Intel's GPUs."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError) as error:
        if is_fault_of_device(error):
            raise
        return torch.float32
    return torch.float64


class Placed:
    """A dataclass of tensors that may be on a device, while the host keeps a copy that it can read without waiting."""

    @functools.cached_property
    def host(self) -> Self:
        """The tensors in the host's memory. They are copied once, and not at all where they came from there."""
        tensors = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        return self if all(x.device.type == "cpu" for x in tensors) else type(self)(*to_host(tensors))

    def to(self, device: torch.device) -> Self:
        """The tensors on a device, sent without waiting. They must be on the host, or on that device already."""
        tensors = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        if all(x.device == device for x in tensors):
            return self
        moved = type(self)(*(to_device(x, device) for x in tensors))
        vars(moved)["host"] = self.host  # no field: `dataclasses.replace` must not carry it to other tensors
        return moved
