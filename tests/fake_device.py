"""A faked GPU: what would run on one, where the host would wait for it, and how many kernels it would launch.

A device "cuda" whose memory is the host's. Its tensors wrap ordinary ones and carry CUDA's dispatch keys, so autocast goes by
CUDA's lists and the backward runs in a thread of its own. An operation that mixes devices raises as CUDA does. Each one for
which the host waits for the device (a synchronisation) and each kernel is counted by the line that caused it.

PyTorch asks for the hooks of CUDA when it is imported, so this module comes before it, in a process of its own; it needs `g++`
(3 s, once).
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path

from .stack import innermost_line


HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>); }
namespace at {
struct FakeHooks final : CUDAHooksInterface {
  explicit FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
};
using CUDAHooks = FakeHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def load_hooks() -> None:
    """Guard and hooks of the device, compiled once."""
    assert "torch" not in sys.modules, "the hooks come before torch"
    home = Path(sysconfig.get_paths()["purelib"], "torch")
    if (home / "lib" / "libtorch_cuda.so").exists():
        raise SystemExit("The faked device needs PyTorch's build for the CPU, and this one is for CUDA: use --real.")
    key = hashlib.sha256((HOOKS + str(home) + (home / "version.py").read_text()).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"fake-cuda-{os.getuid()}-{key}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, built = Path(folder, "hooks.cpp"), Path(folder, "hooks.so")
            source.write_text(HOOKS)
            flags = [
                "-std=c++20",
                "-shared",
                "-fPIC",
                "-O0",
                f"-I{home}/include",
                f"-L{home}/lib",
                f"-Wl,-rpath,{home}/lib",
            ]
            subprocess.run(["g++", str(source), *flags, "-lc10", "-ltorch_cpu", "-o", str(built)], check=True)
            os.replace(built, library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_hooks()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
line = functools.partial(innermost_line, __file__)
COPIES = {aten.copy_, aten._copy_from, aten._to_copy, aten.set_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
TAKES_HOST_SCALARS = {aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_, aten.where}
WAITING = {  # their result, or its size, is needed on the host
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.argwhere, aten.masked_select),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
}
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}
NOT_DETERMINISTIC = {
    aten.cumsum,
    aten.cumsum_,
    aten.put_,
    aten.histc,
    aten.median,
    aten.nll_loss2d_forward,
}  # of floating-point numbers


class DeviceTensor(torch.Tensor):
    """A tensor on the device; `raw` is what it holds."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False):
        if Device.refuses_float64 and raw.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        options = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE)
        self = torch.Tensor._make_wrapper_subclass(cls, raw.shape, **options, requires_grad=requires_grad)
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict):
        new = memo[id(self)] = DeviceTensor(self.raw.detach().clone(), self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True
        return new

    def __reduce_ex__(self, protocol):
        return self.raw.__reduce_ex__(protocol)

    def __repr__(self, **kwargs) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def untyped_storage(self):
        return _Storage(self.raw.untyped_storage())

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy


class _Storage:
    """Address and size of a storage, of hollow tensors too, all of which PyTorch puts at 0."""

    def __init__(self, storage: torch.UntypedStorage):
        self.storage = storage

    def __getattr__(self, name: str):
        return getattr(self.storage, name)

    def data_ptr(self) -> int:
        return self.storage.data_ptr() or self.storage._cdata


class Device(TorchDispatchMode):
    """
    Inside, operations on the device run, are checked and counted.

    Attributes:
        refuses_float64 (`bool`): as Apple's MPS does.
        hollow (`bool`): floating-point numbers are not computed, only their shapes; on the host each is 1. So the kernels of
            large shapes are counted in seconds.
        random (`torch.Tensor`): the state of its random numbers.
        mixed (`list[str]`): what mixed devices.
        refuses_waits (`bool`): as PyTorch's mode for debugging synchronisations does.
        recording (`list`): operations of the [`Graph`] that is being recorded.
        waits (`Counter`): by line and operation.
        kernels (`Counter`): operations that are no views, by line.
    """

    refuses_float64 = False
    hollow = False
    random = torch.Generator().get_state()
    mixed: list[str] = []
    refuses_waits = False
    recording: list | None = None
    waits: collections.Counter = collections.Counter()
    kernels: collections.Counter = collections.Counter()

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` comes by too
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @classmethod
    def reset(cls) -> None:
        for counted in (cls.waits, cls.kernels, cls.mixed):
            counted.clear()

    @classmethod
    def counted(cls) -> tuple[collections.Counter, collections.Counter]:
        """Waits and kernels since the last reset."""
        return collections.Counter(cls.waits), collections.Counter(cls.kernels)


def on_host(x) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) and x.device.type == "cpu"


def check(func, args, kwargs, tensors: list) -> None:
    """Raises where CUDA would."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' at {line()}")
    host, packet = [x for x in tensors if on_host(x)], func.overloadpacket
    floating = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
    if packet in NOT_DETERMINISTIC and floating and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{packet} does not have a deterministic implementation on CUDA, at {line()}")
    if not host or packet in COPIES:
        return
    if packet in INDEXING and isinstance(args[0], DeviceTensor):  # which takes indices of the host
        host = [x for x in args[2:3] if on_host(x)]
    scalars = torch.Tag.pointwise in func.tags or packet in TAKES_HOST_SCALARS or packet in INDEXING
    if all(x.dim() == 0 for x in host) and scalars:
        return
    shapes = ", ".join(f"{'cpu' if on_host(x) else 'cuda'} {tuple(x.shape)}" for x in tensors)
    Device.mixed.append(f"{line()}: {func} of {shapes}")
    raise RuntimeError(f"Expected all tensors to be on the same device, but found two: {Device.mixed[-1]}")


def count(func, args, kwargs, moves: bool) -> None:
    """Notes what an operation launches and waits for, at the line of code that called it."""
    packet, name = func.overloadpacket, func._schema.name.removeprefix("aten::")
    waits = int(packet in WAITING or (moves != "" and not kwargs.get("non_blocking", False)))
    if packet in INDEXING:
        kinds = (torch.bool, torch.uint8)
        waits = sum(isinstance(x, torch.Tensor) and (x.dtype in kinds or on_host(x)) for x in args[1])
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        waits = 1
    if waits and (Device.refuses_waits or Device.recording is not None):
        raise RuntimeError(f"called a synchronizing CUDA operation, {name}, at {line()}")
    if waits:
        Device.waits[line(), name + (" to device" if moves == "in" else " to host" if moves else "")] += waits
    if (
        not func.is_view
        and packet not in (aten.detach, aten.alias, aten._local_scalar_dense)
        and Device.recording is None
    ):
        Device.kernels[line()] += 1


def mapped(function, x):
    """A function of each leaf of nested lists, tuples and dictionaries."""
    if isinstance(x, (list, tuple)) and not isinstance(x, torch.Size):
        return type(x)([mapped(function, part) for part in x])
    return {key: mapped(function, part) for key, part in x.items()} if isinstance(x, dict) else function(x)


def tensors_in(x) -> list[torch.Tensor]:
    """All tensors of nested arguments."""
    found: list[torch.Tensor] = []
    mapped(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, x)
    return found


def _on_host(x):
    """A tensor as what it holds, and the device as the host."""
    if isinstance(x, DeviceTensor):
        return x.raw
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def run(func, args, kwargs):
    """An operation, on what the tensors hold."""
    tensors = tensors_in((args, kwargs))
    has_device = any(isinstance(x, DeviceTensor) for x in tensors)
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    kwargs.pop("pin_memory", None)
    if not has_device and target != "cuda":
        return func(*args, **kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # in plain mathematics
    leaves_device = has_device and target == "cpu"
    if func.overloadpacket is aten.copy_:
        moves = "out" if on_host(args[0]) else "in" if on_host(args[1]) else ""
        moves = "" if moves == "in" and args[1].dim() == 0 else moves
    else:
        moves = "out" if leaves_device else "in" if not has_device and tensors else ""
    check(func, args, kwargs, tensors)
    count(func, args, kwargs, moves)
    wrapped = {id(x.raw): x for x in tensors if isinstance(x, DeviceTensor)}
    wrapped |= {id(x): x for x in tensors if on_host(x)}
    args, kwargs = mapped(_on_host, args), mapped(_on_host, kwargs)
    if func is aten.histc.default:  # of whole numbers on CUDA only
        args = (args[0].float(), *args[1:])
    if moves:
        kwargs.pop("non_blocking", None)
    compute = hollow if Device.hollow and moves != "in" else _with_own_random if _draws(func, kwargs) else _call
    if func.overloadpacket in PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
        compute = functools.partial(_in_tf32, compute)
    out = compute(func, args, kwargs)
    if Device.recording is not None:
        Device.recording.append((compute, func, args, kwargs, out))
    if leaves_device:
        return out
    if not has_device and tensors:  # a copy of its own, also where nothing needed to be converted
        out = out.clone() if isinstance(out, torch.Tensor) and any(out is x for x in tensors) else out
        wrapped = {}
    return mapped(lambda x: _wrapped(x, wrapped), out)


SMALL = 2**16  # elements up to which numbers are computed where all that goes in is real
TRUTHS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isnan, aten.isinf, aten.isfinite}
TRUTHS |= {aten.any, aten.all, aten.logical_not, aten.logical_and, aten.logical_or, aten.equal, aten.is_nonzero}
_known: dict = {}  # what an operation gave, by the shapes that it was given


def hollow(func, args: tuple, kwargs: dict):
    """An operation whose floating-point results are shapes alone (tensors on "meta"); whole numbers and truth values, on
    which shapes depend, are real."""
    args, kwargs = mapped(_bytes, args), mapped(_bytes, kwargs)
    tensors = tensors_in((args, kwargs))
    packet = func.overloadpacket
    if not any(x.is_meta or (x.is_floating_point() and x.numel() > SMALL) for x in tensors):
        if tensors or not _is_large(func, args, kwargs):
            return func(*args, **kwargs)
    if func is aten.view.dtype:  # the bytes of numbers that go to the host together
        args = (_ones(args[0]).contiguous(), *args[1:])
    if func.is_view or packet in (aten.detach, aten.alias, aten.lift_fresh):
        return func(*args, **kwargs)
    if packet is aten._local_scalar_dense:
        return 1.0
    if packet is aten._to_copy and kwargs.get("device") == torch.device("cpu"):
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    written = _written(func, args, kwargs)
    if packet in TRUTHS or any(not x.is_floating_point() for x in written):
        return func(*mapped(_ones, args), **mapped(_ones, kwargs))
    if written:
        if packet is aten.copy_ and not args[0].is_meta and args[0].numel() < SMALL:
            args[0].fill_(1)
        returned = func._schema.returns
        return written[0] if len(returned) == 1 else tuple(written) if returned else None
    if packet is aten.masked_select:
        chosen = args[1].expand(torch.broadcast_shapes(args[0].shape, args[1].shape))
        return torch.empty(int(chosen.sum()), dtype=args[0].dtype, device="meta")
    if packet in INDEXING:
        args = (args[0], _as_numbers(args[1]), *args[2:])
    return _shapes(func, args, kwargs)


def _shapes(func, args: tuple, kwargs: dict):
    """What an operation gives on "meta"; whole numbers are 0."""
    key = (func, str(mapped(_signature, (args, kwargs))))
    if key not in _known:
        _known[key] = func(*mapped(_on_meta, args), **mapped(_on_meta, kwargs))
    return mapped(_new, _known[key])


def _signature(x):
    """What an operation on shapes alone depends on."""
    return (*x.shape, *x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x


def _on_meta(x):
    """An argument as the meta device takes it."""
    if isinstance(x, (torch.device, torch.Generator)):
        return torch.device("meta") if isinstance(x, torch.device) else None
    return _meta(x) if isinstance(x, torch.Tensor) else x


def _new(x):
    """A fresh tensor of the same shape, with zeros where it holds whole numbers."""
    if not isinstance(x, torch.Tensor):
        return x
    return _meta(x, again=True) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)


def _meta(x: torch.Tensor, again: bool = False) -> torch.Tensor:
    return x if x.is_meta and not again else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _bytes(x):
    """Of a hollow tensor that is read as bytes, zeros."""
    is_hollow = isinstance(x, torch.Tensor) and x.is_meta and not x.is_floating_point()
    return torch.zeros(x.shape, dtype=x.dtype) if is_hollow else x


def _ones(x):
    return torch.ones((), dtype=x.dtype).expand(x.shape) if isinstance(x, torch.Tensor) and x.is_meta else x


def _is_large(func, args: tuple, kwargs: dict) -> bool:
    """Whether a function without tensors makes a large one of floating-point numbers."""
    kwargs = {key: None if key == "generator" else value for key, value in kwargs.items()}
    out = func(*args, **kwargs | {"device": torch.device("meta")})
    return isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() > SMALL


def _written(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that a function writes to."""
    found: list = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return tensors_in(found)


def _as_numbers(indices: list) -> list:
    """Truth values as the indices of those that are true."""
    found: list = []
    for index in indices:
        is_truth = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        found.extend(index.nonzero().unbind(1) if is_truth else [index])
    return found


def _call(func, args: tuple, kwargs: dict):
    return func(*args, **kwargs)


def _draws(func, kwargs: dict) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None


def _with_own_random(func, args: tuple, kwargs: dict):
    """An operation that draws random numbers, from the device's and not the host's."""
    host = torch.get_rng_state()
    torch.set_rng_state(Device.random)
    try:
        return func(*args, **kwargs)
    finally:
        Device.random = torch.get_rng_state()
        torch.set_rng_state(host)


def _in_tf32(compute, func, args: tuple, kwargs: dict):
    """A product, the last two of whose arguments are its factors."""
    return compute(func, (*args[:-2], *map(_rounded, args[-2:])), kwargs)


def _rounded(x):
    """A matrix in TF32, which has 10 bits after the point."""
    if x.dtype != torch.float32 or x.is_meta:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _wrapped(x, known: dict):
    """A result on the device, or the argument that it is."""
    if id(x) in known:
        return known[id(x)]
    return DeviceTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) else x


class Graph:
    """A CUDA graph: its operations, on the tensors that they had, with one launch. Here what is recorded runs as well."""

    def capture_begin(self, pool=None, capture_error_mode: str = "global") -> None:
        self.operations = Device.recording = []

    def capture_end(self) -> None:
        Device.recording = None

    def pool(self):
        return 0, 1

    def replay(self) -> None:
        Device.kernels[line()] += 1
        for compute, func, args, kwargs, before in self.operations:
            inputs = tensors_in((args, kwargs))
            for old, new in zip(tensors_in(before), tensors_in(compute(func, args, kwargs)), strict=True):
                if not func.is_view and not old.is_meta and all(old is not x for x in inputs):
                    old.copy_(new)


class _Stream:
    """A stream of the device, on which all runs in turn."""

    def __init__(self, *args):
        pass

    def wait_stream(self, other) -> None:
        pass


def _refuse_waits(mode) -> None:
    Device.refuses_waits = mode == "error"


@contextlib.contextmanager
def _fork_rng(devices=(), **kwargs):
    """As `torch.random.fork_rng`, for the host's random state and the faked device's."""
    host, device = torch.get_rng_state(), Device.random
    try:
        yield
    finally:
        torch.set_rng_state(host)
        Device.random = device if devices else Device.random


def _seed(seed: int) -> None:
    Device.random = torch.Generator().manual_seed(seed).get_state()


def _set_random(state, *args) -> None:
    Device.random = (state[0] if isinstance(state, (list, tuple)) else state).cpu().clone()


def install() -> None:
    """Makes `torch.cuda`, and whoever asks it, believe in the device; after libraries have been imported."""
    cuda = torch.cuda
    nothing = lambda *args, **kwargs: None  # noqa: E731
    values = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
        **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), 0),
        **{
            "device_count": 1,
            "get_device_capability": (9, 0),
            "get_device_name": "none",
            "mem_get_info": (2**36, 2**36),
        },
    }
    shape = dict(major=9, minor=0, name="none", total_memory=2**36, multi_processor_count=132)
    values["get_device_properties"] = types.SimpleNamespace(**shape)
    for name, value in values.items():
        setattr(cuda, name, lambda *args, _value=value, **kwargs: _value)
    for name in ("set_device", "_lazy_init", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(cuda, name, nothing)
    for module in (cuda, cuda.random):
        module.manual_seed = module.manual_seed_all = _seed
        module.set_rng_state = module.set_rng_state_all = _set_random
        module.get_rng_state = lambda *args: Device.random.clone()
        module.get_rng_state_all = lambda: [Device.random.clone()]
    cuda.CUDAGraph, cuda.Stream, cuda.current_stream, cuda.stream = Graph, _Stream, _Stream, contextlib.nullcontext
    cuda.get_sync_debug_mode, cuda.set_sync_debug_mode = (lambda: 0), _refuse_waits
    torch.random.fork_rng = _fork_rng
    cuda._initialized, torch.version.cuda = True, "12.8"
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied, as on a GPU
