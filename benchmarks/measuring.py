"""Time by stage, peak memory, and the machine that they were measured on."""

import ctypes
import gc
import os
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import profile


# what the calls of a runtime that launch a kernel, or wait for the device, begin with
LAUNCHES = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "hipLaunchKernel",
    "hipExtModuleLaunchKernel",
    "zeCommandListAppendLaunch",
)
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "hipStreamSynchronize",
    "hipMemcpyWithStream",
)


class Stopwatch:
    """Seconds spent in each stage; a stage within another counts as its own alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._within = 0.0

    @contextmanager
    def stage(self, name: str):
        around, self._within = self._within, 0.0
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        elapsed = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._within
        self._within = around + elapsed

    def timed(self, name: str, function):
        """The function, as a stage."""

        def run(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return run


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def calls(profiled: profile, kinds: tuple[str, ...]) -> int:
    """How many calls that begin with some of these names a finished profile holds."""
    assert profiled.profiler is not None
    # as the profiler noted them: `key_averages` would first make an object of each
    return sum(event.name().startswith(kinds) for event in profiled.profiler.kineto_results.events())


def in_fresh_process(function, *args, **environment: str):
    """What a function, found by its name in its module, returns there, with some environment variables set."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_above(function) -> int:
    """
    Bytes that a call takes at its peak, above those in use before it: resident memory of the process on the CPU (Linux),
    allocated memory on an accelerator. For a process that did little else: see [`in_fresh_process`].
    """
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory would hide what is taken anew
        _reset_resident_peak()
    before, _ = memory_in_use()
    function()
    return memory_in_use()[1] - before


def memory_in_use() -> tuple[int, int]:
    """Bytes now, and at their peak."""
    if torch.accelerator.is_available():
        return torch.accelerator.memory_allocated(), torch.accelerator.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    now, peak = (1024 * int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) for name in ("VmRSS", "VmHWM"))
    return now, peak


def _reset_resident_peak() -> None:
    """Where that is not permitted, the peak of the whole process stands in."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def machine() -> dict[str, str | int]:
    """Processor, threads, PyTorch and device."""
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else []
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": _device_name(),
    }


def _device_name() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device)
    return module.get_device_name() if hasattr(module, "get_device_name") else device.type
