"""A token of all branches in one launch: the forward over a new slot of each, recorded as a CUDA graph and replayed for every token.

A forward of one token asks a GPU for thousands of short kernels, and Python takes longer to launch them than the device to run
them. A graph launches all of them at once. It holds addresses and no Python: what changes from token to token (the input, and the
slot it goes to) is therefore read from the device's memory, and every branch has room for all its slots from the start.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from ..model.sharding import model_is_sharded
from ..text.batch import branch_position_ids
from ..text.transfer import to_device
from .attention import BranchReading


if TYPE_CHECKING:
    from .shared_prefix import SharedPrefixCache


logger = logging.getLogger(__name__)

LEAST_TOKENS = 6  # that are still to come: recording takes as long as two

_fit: WeakSet[PreTrainedModel] = WeakSet()  # models whose forward has run without waiting for the device
_unfit: WeakSet[PreTrainedModel] = WeakSet()  # those whose forward cannot be recorded
_own = threading.local()  # `streams`, `graphs`: of this thread's recordings, by device


def records(cache: "SharedPrefixCache") -> bool:
    """Whether the next tokens of a cache's branches are worth a recording, and can have one."""
    if not can_record(cache.text_hidden.device) or torch.is_grad_enabled() or cache.room is None:
        return False
    if cache.length == 0 or cache.room - cache.length < LEAST_TOKENS:
        return False
    return cache.model not in _unfit and not model_is_sharded(cache.model)


def can_record(device: torch.device) -> bool:
    """Whether a device has CUDA graphs."""
    return device.type == "cuda"


class TokenGraph:
    """
    The forward over one new slot of every branch of a cache.

    Args:
        cache ([`~branches.shared_prefix.SharedPrefixCache`]):
            Whose branches grow. They have at least one slot; their keys and values get room for `cache.room` of them.
        anchors (`torch.Tensor` of shape `(B, N)`):
            The text index each branch hangs off, in the host's memory.
        embeds (`torch.Tensor` of shape `(B, N, E)`):
            As those that will be given.
    """

    def __init__(self, cache: "SharedPrefixCache", anchors: torch.Tensor, embeds: torch.Tensor):
        device, room = embeds.device, cache.room
        assert room is not None
        self.cache, self.room, self.embeds = cache, room, torch.empty_like(embeds)
        self.slot = to_device(torch.tensor([cache.length]), device)  # where the next token goes
        self.places = torch.arange(room, device=device)
        self.seen = cache.seen_text(anchors, 1, room)
        everything = torch.ones(*anchors.shape, room, dtype=torch.bool, device=device)
        self.positions = branch_position_ids(cache.text, self.seen.last, everything)
        cache.own = {module: pair.map(self._with_room) for module, pair in cache.own.items()}
        self.run = Recorded(self._forward, cache.model)

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        """Adds a slot with embeddings `(B, N, E)` to every branch. Returns its hidden states, `(B, N, H)`."""
        self.embeds.copy_(embeds)
        self.run()
        return self.hidden.clone()  # the next token is written to the same place

    def _with_room(self, kept: torch.Tensor) -> torch.Tensor:
        """Keys or values with as many slots as there is room for. Those to come are 0: a weight of 0 times NaN would be NaN."""
        buffer = kept.new_zeros(*kept.shape[:3], len(self.places), kept.shape[4])
        length = self.cache.length
        buffer[:, :, :, :length] = kept[:, :, :, :length]
        return buffer

    def _forward(self) -> None:
        shape = self.positions.shape
        reading = BranchReading(
            memory=self.cache.memory,
            own=self.cache.own,
            text=self.seen,
            slots=(self.places <= self.slot).expand(*shape[:2], 1, -1),
            positions=self.positions,
            now=self.positions[:, :, :1] + self.slot,
            keep=True,
            slot=self.slot,
        )
        self.hidden = self.cache.run(self.embeds[:, :, None], reading)[:, :, 0]
        self.slot.add_(1)


class Recorded:
    """
    Runs a function of tensors that stay where they are: the first time as it is, which loads its kernels; then by a CUDA graph.

    Args:
        function (`Callable`):
            It may be run again if it was cut short.
        model ([`~transformers.PreTrainedModel`]):
            Which the function runs. If a forward of this model waits for the device, or cannot be recorded, none is from then on.
    """

    def __init__(self, function: Callable[[], None], model: PreTrainedModel):
        self.function, self.model = function, model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_run = False

    def __call__(self) -> None:
        if self.graph is None and self.model not in _unfit:
            try:
                self._try()
            except RuntimeError as error:
                _unfit.add(self.model)
                logger.warning(
                    "A token of %s cannot be launched as one CUDA graph, so that its thoughts are sampled more slowly: %s",
                    *(type(self.model).__name__, error),
                )
            else:
                if self.graph is None:
                    return
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _try(self) -> None:
        """The first time runs the function, and the second time records it."""
        if self.has_run:
            self.graph = record(self.function, self.model.device)
        elif self.model in _fit:
            self.function()
        else:
            with refused_waits(self.model.device):
                self.function()
            _fit.add(self.model)
        self.has_run = True


@contextmanager
def refused_waits(device: torch.device) -> Iterator[None]:
    """Has PyTorch raise a `RuntimeError` where the host would wait for the device. A recording that is broken off by a wait leaves PyTorch
    unable to give memory back."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def record(function: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """
    Records what a function asks a device to do; nothing is run.

    `torch.cuda.graph` would first give back all memory that PyTorch holds. Here a thread's recordings share one pool of memory, which the
    graph before holds until the next is made: they never run at the same time.

    Raises:
        `RuntimeError`: if the function waits for the device, or does not find the memory that it needs.
    """
    streams, graphs = (vars(_own).setdefault(name, {}) for name in ("streams", "graphs"))
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    graph, before = torch.cuda.CUDAGraph(), graphs.get(device)
    streams[device].wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(streams[device]):
        # other threads go on to allocate, such as one that pins batches
        graph.capture_begin(pool=None if before is None else before.pool(), capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    graphs[device] = graph
    return graph
