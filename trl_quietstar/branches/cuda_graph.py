"""A token of all branches in one launch: the forward over a new slot of each, recorded as a CUDA graph and replayed for every token.

A forward of one token asks a GPU for thousands of short kernels, and Python takes longer to launch them than the device to run
them. A graph launches all of them at once. It holds addresses and no Python: what changes from token to token (the input, and the
slot it goes to) is therefore read from the device's memory, and every branch has room for slots that are to come.
"""

import gc
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model.sharding import model_is_sharded
from ..text.batch import branch_position_ids
from ..text.transfer import to_device
from .attention import BranchReading


if TYPE_CHECKING:
    from .shared_prefix import SharedPrefixCache


logger = logging.getLogger(__name__)

LEAST_TOKENS = 6  # that are still to come: recording takes as long as two
FIRST_ROOM = 64  # slots that branches have room for at first; each token attends to all of them, there or not

_unfit: WeakSet[PreTrainedModel] = WeakSet()  # models whose forward cannot be recorded
_streams: dict[torch.device, torch.cuda.Stream] = {}  # on which is recorded
# the last of each device, which holds the memory of its recordings
_graphs: dict[torch.device, torch.cuda.CUDAGraph] = {}
_held: dict[torch.device, int] = {}  # bytes of that memory, which PyTorch has reserved and gives to nobody else


def records(cache: "SharedPrefixCache") -> bool:
    """Whether the next tokens of a cache's branches are worth a recording, and can have one."""
    if not can_record(cache.text_hidden.device) or torch.is_grad_enabled() or cache.room is None:
        return False
    # other threads would be refused their waits, and their graphs would share memory with this one's
    if threading.current_thread() is not threading.main_thread() or torch.is_inference_mode_enabled():
        return False
    if cache.length == 0 or cache.room - cache.length < LEAST_TOKENS:
        return False
    return cache.model not in _unfit and not model_is_sharded(cache.model)


def can_record(device: torch.device) -> bool:
    """Whether a device has CUDA graphs."""
    return device.type == "cuda"


class TokenGraph:
    """
    The forward over one new slot of every branch of a cache: first run as it is, which loads its kernels, then by a CUDA graph; until
    there is no room for more.

    Nothing here refers to the cache, or only a garbage collection would give back the memory of its branches.

    Args:
        cache ([`~branches.shared_prefix.SharedPrefixCache`]):
            Whose branches grow. They have at least one slot; their keys and values get room for as many again.
        anchors (`torch.Tensor` of shape `(B, N)`):
            The text index each branch hangs off, in the host's memory.
        embeds (`torch.Tensor` of shape `(B, N, E)`):
            As those that will be given.
    """

    def __init__(self, cache: "SharedPrefixCache", anchors: torch.Tensor, embeds: torch.Tensor):
        assert cache.room is not None
        device, room = embeds.device, min(cache.room, max(FIRST_ROOM, 2 * cache.length))
        self.room, self.embeds = room, torch.empty_like(embeds)
        self.slot = to_device(torch.tensor([cache.length]), device)  # where the next token goes
        self.places = torch.arange(room, device=device)
        self.seen = cache.seen_text(anchors, 1, room)
        everything = torch.ones(*anchors.shape, room, dtype=torch.bool, device=device)
        self.positions = branch_position_ids(cache.text, self.seen.last, everything)
        cache.own = {
            module: pair.map(lambda x: _with_room(x, cache.length, room)) for module, pair in cache.own.items()
        }
        self.has_run = self.has_failed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.weights: dict[nn.Module, torch.Tensor] = {}  # as autocast has them

    def extend(self, cache: "SharedPrefixCache", embeds: torch.Tensor) -> torch.Tensor:
        """Adds a slot with embeddings `(B, N, E)` to every branch of the cache. Returns its hidden states, `(B, N, H)`."""
        self.embeds.copy_(embeds)
        if not self.has_failed:
            try:
                self._run(cache)
            except torch.OutOfMemoryError:
                self.has_failed = True  # another batch may find enough
            except RuntimeError as error:
                self.has_failed = True
                _unfit.add(cache.model)
                logger.warning(
                    "A token of %s cannot be launched as one CUDA graph, so that its thoughts are sampled more slowly: %s",
                    *(type(cache.model).__name__, error),
                )
        if self.has_failed:
            self._forward(cache)
        self.slot.add_(1)
        return self.hidden.clone()  # the next token is written to the same place

    def _run(self, cache: "SharedPrefixCache") -> None:
        """The first time runs the forward, and makes sure that it never waits; from the second time on by a graph."""
        if self.graph is None and self.has_run:
            self.graph = record(lambda: self._forward(cache), cache.text_hidden.device)
        if self.graph is not None:
            self.graph.replay()
            return
        kind = self.embeds.device.type
        if torch.is_autocast_enabled(kind):
            self.weights = cast_weights(cache.model, torch.get_autocast_dtype(kind))
        with refused_waits():
            self._forward(cache)
        self.has_run = True

    def _forward(self, cache: "SharedPrefixCache") -> None:
        """Of the embeddings that are there, into the slot that is next. Run again, it does the same again."""
        shape = self.positions.shape
        reading = BranchReading(
            memory=cache.memory,
            own=cache.own,
            text=self.seen,
            slots=(self.places <= self.slot).expand(*shape[:2], 1, -1),
            positions=self.positions,
            now=self.positions[:, :, :1] + self.slot,
            keep=True,
            slot=self.slot,
        )
        kind = self.embeds.device.type
        low, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # autocast's copies of weights are the process's, and may be gone when a graph that has their addresses is replayed. To make them
        # anew for each token would read and write four times as many bytes as the token itself, so the graph has its own
        with torch.autocast(kind, dtype=dtype, enabled=low, cache_enabled=False), weights_of(self.weights):
            self.hidden = cache.run(self.embeds[:, :, None], reading)[:, :, 0]


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> dict[nn.Module, torch.Tensor]:
    """Copies of the float32 weights of a model's linear layers in the type that autocast multiplies in; none of the LM head's, nor of
    the heads of thoughts, which no token needs."""
    head = model.get_output_embeddings()
    layers = [
        module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and not name.startswith("quietstar.")
    ]
    return {layer: layer.weight.detach().to(dtype) for layer in layers if layer.weight.dtype == torch.float32}


@contextmanager
def weights_of(weights: dict[nn.Module, torch.Tensor]) -> Iterator[None]:
    """Has linear layers multiply by other tensors than their parameters."""
    kept = {layer: layer._parameters["weight"] for layer in weights}
    try:
        for layer, weight in weights.items():
            layer._parameters["weight"] = cast(nn.Parameter, weight)
        yield
    finally:
        for layer, parameter in kept.items():
            layer._parameters["weight"] = parameter


def _with_room(kept: torch.Tensor, length: int, room: int) -> torch.Tensor:
    """Keys or values of `length` slots, `(B, heads, N, ..., D)`, with room for more. Those to come are 0: a weight of 0 times NaN would be
    NaN."""
    buffer = kept.new_zeros(*kept.shape[:3], room, kept.shape[4])
    buffer[:, :, :, :length] = kept[:, :, :, :length]
    return buffer


@contextmanager
def refused_waits() -> Iterator[None]:
    """Has PyTorch raise a `RuntimeError` where the host would wait for the device: a recording that is broken off by a wait leaves PyTorch
    unable to give memory back."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():  # that it does not see all waits: recording sees the others
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode(mode)


def record(function: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """
    Records what a function asks a device to do; nothing is run.

    `torch.cuda.graph` would first give back all memory that PyTorch holds. Here all recordings of a device share one pool of memory, which the
    graph before holds until the next is made: no two run at the same time.

    Raises:
        `RuntimeError`: if the function waits for the device.
        `torch.OutOfMemoryError`: if it does not find the memory that it needs.
    """
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    graph, before, reserved = torch.cuda.CUDAGraph(), _graphs.get(device), torch.cuda.memory_reserved(device)
    _streams[device].wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_streams[device]), without_collection():
        # other threads go on to allocate, such as one that pins batches
        graph.capture_begin(pool=None if before is None else before.pool(), capture_error_mode="thread_local")
        try:
            function()
        except BaseException:
            _graphs.pop(device, None)  # the next recording gets a pool of its own
            _held.pop(device, None)
            with suppress(RuntimeError):  # which only says that there was an error before
                graph.capture_end()
            raise
        graph.capture_end()
    _graphs[device] = graph
    _held[device] = _held.get(device, 0) + torch.cuda.memory_reserved(device) - reserved
    return graph


def held_bytes(device: torch.device) -> int:
    """Memory of a device that recordings keep for themselves."""
    return _held.get(device, 0)


@contextmanager
def without_collection() -> Iterator[None]:
    """Holds back Python's garbage collection: a tensor or graph of the device that it frees would break a recording off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
