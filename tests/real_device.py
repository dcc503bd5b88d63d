"""The machine's own CUDA device under the names of the faked one (`fake_device`): where the host waits, and what is launched.

Waits are PyTorch's own warnings of synchronisations (`torch.cuda.set_sync_debug_mode`), which it raises at the line that caused
them; those of the backward come together where it was called. Launches are counted by PyTorch's profiler if `counts_kernels` is
set, since it makes a scenario slower.
"""

import functools
import warnings
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import LAUNCHES, calls

from .stack import innermost_line


DEVICE = torch.device("cuda", 0)
WARNING = "called a synchronizing CUDA operation"
line = functools.partial(innermost_line, __file__, warnings.__file__)


class Device:
    """
    While entered, what the device is asked is counted.

    Attributes:
        counts_kernels (`bool`): whether launches are counted, from a reset to the next [`Device.counted`].
        waits, kernels (`Counter`): by line and operation; all kernels are of one line.
        refuses_float64, hollow, mixed: as of the faked device, where they mean something.
    """

    counts_kernels = False
    refuses_float64 = False
    hollow = False
    mixed: list[str] = []
    waits: Counter = Counter()
    kernels: Counter = Counter()
    profiler: profile | None = None
    entered = False

    def __enter__(self):
        self.catching = warnings.catch_warnings()
        self.catching.__enter__()
        warnings.filterwarnings("always", message=WARNING)  # each time, not once a line
        warnings.showwarning = note
        set_sync_debug_mode("warn")
        type(self).entered = True
        return self

    def __exit__(self, *args):
        type(self).entered = False
        stop()
        set_sync_debug_mode("default")
        self.catching.__exit__(*args)

    @classmethod
    def reset(cls) -> None:
        stop()
        cls.waits.clear()
        cls.kernels.clear()
        if cls.entered and cls.counts_kernels:
            cls.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            with unwatched():
                cls.profiler.start()

    @classmethod
    def counted(cls) -> tuple[Counter, Counter]:
        """Waits and kernels since the last reset."""
        stop()
        return Counter(cls.waits), Counter(cls.kernels)


class unwatched:
    """Without warnings of synchronisations, such as the profiler's own."""

    def __enter__(self):
        set_sync_debug_mode("default")

    def __exit__(self, *args):
        set_sync_debug_mode("warn" if Device.entered else "default")


def set_sync_debug_mode(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def stop() -> None:
    """Ends the profile that runs, and takes the launches out of it."""
    running, Device.profiler = Device.profiler, None
    if running is None:
        return
    with unwatched():
        running.stop()
    Device.kernels["all lines"] += calls(running, LAUNCHES)


def note(message, category, filename, lineno, file=None, line=None) -> None:
    """Takes the place of `warnings.showwarning`: a synchronisation is counted, all else is not shown."""
    if WARNING in str(message):
        Device.waits[line(), "synchronisation"] += 1


def install() -> None:
    """Starts the device, so that no scenario pays for it."""
    torch.zeros(1, device=DEVICE).add_(1).item()
