"""A CUDA device that is not there: its tensors say that they are on cuda:0, and compute on the CPU.

What a device would refuse is refused, and what makes the host wait for it is noted: tensors of two devices in one
operator, reading a value, sizes that depend on values, copies from or to memory that is not pinned. Numbers are real,
so losses can be compared with the CPU's. torch's own CUDA sanitizer says where two streams touch the same memory
without an order between them.

Needs a process in which nothing has gone backward before: autograd makes a thread for each device at its first step.
What it cannot know: kernels' limits (support.emulated_kernels has those of attention's), memory, NCCL.
"""

import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # asks for CUDA's own functions when it is imported
from torch import Tensor
from torch.cuda import _sanitizer
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fourfold.parallel.attention import backends
from support.pretended_library import library

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]
# Operators whose result the host must know, or whose output's size depends on values.
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim",
    "bincount", "repeat_interleave",
}  # fmt: skip
INDEXING = ("index", "index_put", "_index_put_impl")
_outer = threading.local()


@dataclass
class Seen:
    """What happened on the device.

    Attributes:
        waits: (what made the host wait, the files of the repository that called it, the innermost first).
        faults: memory that two streams touch without an order between them.
    """

    waits: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def wait(self, what: str) -> None:
        self.waits.append((what, _places()))


def _places() -> tuple[str, ...]:
    frames = ((Path(frame.filename).resolve(), frame.lineno) for frame in reversed(traceback.extract_stack()))
    here = Path(__file__).resolve()
    return tuple([f"{p.relative_to(ROOT)}:{line}" for p, line in frames if ROOT in p.parents and p != here][:4])


class OnDevice(Tensor):
    """A tensor that says it is on cuda:0; its storage is the CPU's."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _device is not None, "a tensor of a device that is gone"
        return _device.run(func, types, args, kwargs or {})

    def tolist(self) -> Any:
        assert _device is not None
        _device.seen.wait("Tensor.tolist")
        return plain(self).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self) -> int:
        return plain(self).data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        found: Tensor = memo[id(self)]
        return found

    def record_stream(self, stream: "Stream") -> None:
        """What it keeps alive is alive here anyway."""


def plain(x: Tensor) -> Tensor:
    """The CPU's view of the same memory."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class Device(TorchDispatchMode):
    """The mode under which the device is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.sanitizer = _sanitizer.EventHandler()
        self.pinned: dict[int, Tensor] = {}  # for good, so that no other memory gets their addresses
        self.random = torch.Generator().manual_seed(7).get_state()
        self.lock = threading.RLock()
        self.next_stream, self.next_event = 1, 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **(kwargs or {}))  # DTensor's own reckoning with shapes
        return self.run(func, types, args, kwargs or {})

    def run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        if any(not issubclass(t, OnDevice) and t not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in types):
            return NotImplemented
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, OnDevice)]
        there = [x for x in tensors if not isinstance(x, OnDevice)]
        if name == "_wrap_tensor_autograd":  # a collective of DTensor's
            return AsyncCollectiveTensor(args[0])
        device = kwargs.get("device")
        onto = torch.device(device).type == "cuda" if device is not None else bool(here)
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name in ("_pin_memory", "pin_memory"):
            return self._pinned(args[0].clone())
        if func is aten.copy_.default:
            onto = isinstance(args[0], OnDevice)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_transfer(func, args, kwargs, onto)
        elif here:
            self._refuse_mixture(name, func, args, here, there)
            if name in WAITING or _indexes_by_mask(name.rstrip("_"), args):
                self.seen.wait(func._schema.name)
        if here or onto:
            return self._launch(func, args, kwargs, onto, here)
        if kwargs.get("pin_memory"):
            return self._pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _launch(self, func: Any, args: Any, kwargs: Any, onto: bool, here: Sequence[Tensor]) -> Any:
        given: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the plain tensor, and whose it is

        def unwrap(x: Any) -> Any:
            if isinstance(x, OnDevice):
                found = plain(x)
                given[id(found)] = found, x
                return found
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

        arguments, named = tree_map(unwrap, (args, kwargs))
        named.pop("pin_memory", None)
        with self._own_random_numbers(func, (*args, *kwargs.values())):
            out = func(*arguments, **named)
        made: list[Tensor] = []

        def wrap(x: Any) -> Any:
            if type(x) is not Tensor or x.is_meta or not onto:
                return x
            if id(x) in given:
                return given[id(x)][1]
            made.append(
                Tensor._make_subclass(OnDevice, x.detach(), False, dispatch_device=True, device_for_backend_keys=CUDA)
            )
            return made[-1]

        result = tree_map(wrap, out)
        self._account(func, args, kwargs, here, made)
        return result

    @contextmanager
    def _own_random_numbers(self, func: Any, values: Sequence[Any]) -> Iterator[None]:
        """The device's generator is not the CPU's."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        assert not any(isinstance(value, torch.Generator) for value in values), "a CPU generator for a CUDA tensor"
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random)
        yield
        self.random = torch.get_rng_state()
        torch.set_rng_state(outside)

    def _pinned(self, x: Tensor) -> Tensor:
        self.pinned[x.untyped_storage().data_ptr()] = x
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return not isinstance(x, OnDevice) and x.untyped_storage().data_ptr() in self.pinned

    def _note_transfer(self, func: Any, args: Any, kwargs: Any, onto: bool) -> None:
        calm = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        target, source = args[:2] if func is aten.copy_.default else (None, args[0])
        if isinstance(source, OnDevice) == onto:
            return
        host = source if onto else target
        if not calm or host is None or not self._is_pinned(host):
            way = "to the device" if onto else "to the host"
            self.seen.wait(f"copy {way}, {'of' if calm else 'blocking, of'} {tuple(source.shape)}")

    def _refuse_mixture(self, name: str, func: Any, args: Any, here: Sequence[Tensor], there: Sequence[Tensor]) -> None:
        shapes = [tuple(x.shape) for x in there if x.dim() > 0]
        if not shapes or "c10d" in func._schema.name:
            return
        if name.rstrip("_") in INDEXING and isinstance(args[0], OnDevice):
            self.seen.wait(f"{name} by indices on the CPU")
            return
        raise RuntimeError(
            f"{func._schema.name}: expected all tensors to be on the same device, but found cuda:0 "
            f"{[tuple(x.shape) for x in here]} and cpu {shapes}"
        )

    def _account(self, func: Any, args: Any, kwargs: Any, here: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Tell the sanitizer what memory a kernel reads and writes; views read none."""
        known = {x.untyped_storage().data_ptr() for x in here}
        values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        writes: set[int] = set()
        reads: set[int] = set()
        is_view = False
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            is_view |= argument.alias_info is not None and not written
            for x in tree_flatten(values.get(argument.name))[0]:
                if isinstance(x, OnDevice):
                    (writes if written else reads).add(x.untyped_storage().data_ptr())
        new = {x.untyped_storage().data_ptr() for x in made} - known
        if is_view and not writes and not new:
            return
        with self.lock:
            for pointer in new:  # handed out again by the CPU's allocator
                self.sanitizer.tensors_accessed.accesses.pop(pointer, None)
            touched: dict[int, list[str]] = {pointer: [] for pointer in reads | writes | new}
            errors = self.sanitizer._handle_kernel_launch(
                current_stream().number, reads - writes, writes, new, func._schema.name, touched
            )
            self.seen.faults += [f"{error} {_places()}" for error in errors]


def _indexes_by_mask(name: str, args: Any) -> bool:
    masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool] if name in INDEXING else []
    if name != "index" and masks and args[2].numel() == 1 and len(masks) == len(args[1]):
        return False  # torch does it as a masked_fill
    return bool(masks)


_device: Device | None = None


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        assert _device is not None
        self.number = _device.next_stream if number is None else number
        self.device, self.stream_id = CUDA, self.number
        if number is None:
            _device.next_stream += 1
            _device.sanitizer._handle_stream_creation(self.number)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: "Event") -> None:
        assert _device is not None
        _device.sanitizer._handle_event_wait(event.number, self.number)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        assert _device is not None
        _device.seen.wait("Stream.synchronize")
        _device.sanitizer._handle_stream_synchronization(self.number)

    def __enter__(self) -> "Stream":
        _outer.streams = [*getattr(_outer, "streams", []), library().stream_id()]
        library().set_stream(self.number)
        return self

    def __exit__(self, *_: Any) -> None:
        library().set_stream(_outer.streams.pop())


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        assert _device is not None
        self.number, self.timing, self.time = _device.next_event, enable_timing, 0.0
        _device.next_event += 1

    def record(self, stream: Stream | None = None) -> None:
        assert _device is not None
        self.time = time.perf_counter()
        _device.sanitizer._handle_event_record(self.number, (stream or current_stream()).number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        assert _device is not None
        _device.seen.wait("Event.synchronize")
        _device.sanitizer._handle_event_synchronization(self.number)

    def elapsed_time(self, other: "Event") -> float:
        assert {self.timing, other.timing} == {True}, "an event without enable_timing"
        return 1e3 * (other.time - self.time)


def current_stream(device: Any = None) -> Stream:
    return Stream(number=library().stream_id())


def _functions(device: Device, devices: int, capability: tuple[int, int]) -> dict[str, Any]:
    """Of torch.cuda, for a node of H100."""
    total, name, current = 80 * 10**9, "NVIDIA H100 80GB HBM3", [0]
    major, minor = capability
    properties = SimpleNamespace(name=name, total_memory=total, multi_processor_count=132, major=major, minor=minor)

    def synchronize(where: Any = None) -> None:
        device.seen.wait("torch.cuda.synchronize")
        device.sanitizer._handle_device_synchronization()

    def set_device(where: Any) -> None:
        current[0] = where if isinstance(where, int) else torch.device(where).index

    def set_state(state: Tensor, where: Any = "cuda") -> None:
        device.random = state.clone()

    def seed(value: int) -> None:
        device.random = torch.Generator().manual_seed(value).get_state()

    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: devices, "current_device": lambda: current[0], "set_device": set_device,
        "device": lambda where: nullcontext(), "get_device_capability": lambda where=None: capability,
        "get_device_name": lambda where=None: name, "get_device_properties": lambda where=None: properties,
        "mem_get_info": lambda where=None: (total, total), "memory_allocated": lambda where=None: 0,
        "memory_reserved": lambda where=None: 0, "max_memory_allocated": lambda where=None: 0,
        "max_memory_reserved": lambda where=None: 0, "reset_peak_memory_stats": lambda where=None: None,
        "memory_stats": lambda where=None: {}, "empty_cache": lambda: None, "synchronize": synchronize,
        "Stream": Stream, "Event": Event, "stream": lambda stream: stream or nullcontext(),
        "current_stream": current_stream, "default_stream": lambda where=None: Stream(number=0),
        "_sleep": lambda cycles: None, "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False, "get_rng_state": lambda where="cuda": device.random.clone(),
        "set_rng_state": set_state, "manual_seed": seed, "manual_seed_all": seed,
    }  # fmt: skip


@contextmanager
def pretended(devices: int = 1, capability: tuple[int, int] = (9, 0)) -> Iterator[Seen]:
    """Meanwhile there are CUDA devices. NCCL is gloo."""
    global _device
    assert not torch.cuda.is_available(), "there is a device: use it"
    library().pretend(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes it on the CPU, and copies
    _device, start = Device(), torch.distributed.init_process_group
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in _functions(_device, devices, capability).items():
                patch.setattr(torch.cuda, name, value)

            def init_process_group(backend: str, *, device_id: Any = None, **arguments: Any) -> None:
                assert device_id in (None, torch.device("cuda", torch.cuda.current_device())), "set_device first"
                start(backend.replace("nccl", "gloo"), **arguments)

            patch.setattr(torch.distributed, "init_process_group", init_process_group)
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            # Module.to puts its device's tensors in the parameters' places, whose class is another.
            patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
            # DistributedDataParallel's statistics ask for a timer that only CUDA builds have.
            patch.setattr(torch._C._distributed_c10d.Logger, "set_runtime_stats_and_log", lambda self: None)
            patch.setattr(backends, "_fused_merge", lambda: backends._merge)
            # The sanitizer looks at the stack for every kernel, which takes longer than all else.
            no_stack = SimpleNamespace(StackSummary=SimpleNamespace(extract=lambda *_, **__: []), walk_stack=id)
            patch.setattr(_sanitizer, "traceback", no_stack)
            with _device:
                yield _device.seen
    finally:
        _device = None
        library().pretend(False)
        torch._C._set_only_lift_cpu_tensors(False)
