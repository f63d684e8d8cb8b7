"""What torch.cuda has for devices that are pretended (pretended_cuda): streams, events, statistics of memory."""

import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.cuda import _sanitizer

from support.pretended_library import library

ROOT = Path(__file__).resolve().parents[2]
_outer = threading.local()


def here_now() -> torch.device:
    """This thread's device."""
    return torch.device("cuda", library().device_index())


def device_of(x: Any) -> torch.device:
    """What is meant by "cuda", by an index or by None."""
    given = torch.device("cuda", x) if isinstance(x, int) else torch.device("cuda" if x is None else x)
    return here_now() if given == torch.device("cuda") else given


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
        self.waits.append((what, places()))


def places() -> tuple[str, ...]:
    """Files of the repository on the stack; an environment that lies in it is not of it."""
    frames = ((Path(frame.filename).resolve(), frame.lineno) for frame in reversed(traceback.extract_stack()))
    own = ("pretended_cuda.py", Path(__file__).name)
    ours = [(p, line) for p, line in frames if ROOT in p.parents and "site-packages" not in p.parts]
    return tuple([f"{p.relative_to(ROOT)}:{line}" for p, line in ours if p.name not in own][:4])


class Memory:
    """What the device's tensors hold: whole storages, without the rounding of CUDA's allocator, which keeps all it had.

    Of all devices that one process uses together, as a rank has one.
    """

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = 0
        self._lock, self._known = threading.RLock(), weakref.WeakSet[Any]()

    def made(self, x: Tensor) -> None:
        """A kernel's output; a view of what is known takes nothing."""
        storage = x.untyped_storage()
        with self._lock:
            if storage not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, count: int) -> None:
        with self._lock:
            self.allocated += count
            self.peak = max(self.peak, self.allocated)
            self.reserved = max(self.reserved, -(-self.allocated >> 21) << 21)

    def reset_peak(self, where: Any = None) -> None:
        self.peak = self.allocated


@dataclass
class State:
    """Of the devices that are pretended."""

    seen: Seen = field(default_factory=Seen)
    sanitizer: _sanitizer.EventHandler = field(default_factory=_sanitizer.EventHandler)
    memory: Memory = field(default_factory=Memory)
    random: Tensor = field(default_factory=lambda: torch.Generator().manual_seed(7).get_state())
    next_stream: int = 1
    next_event: int = 1


_state: State | None = None


def begin() -> State:
    """From now on there are devices, of a new state."""
    global _state
    _state = State()
    return _state


def end() -> None:
    """From now on there are none."""
    global _state
    _state = None


def now() -> State:
    assert _state is not None
    return _state


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        self.number = now().next_stream if number is None else number
        self.device, self.stream_id = device_of(device), self.number
        if number is None:
            now().next_stream += 1
            now().sanitizer._handle_stream_creation(self.number)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: "Event") -> None:
        now().sanitizer._handle_event_wait(event.number, self.number)

    def synchronize(self) -> None:
        now().seen.wait("Stream.synchronize")
        now().sanitizer._handle_stream_synchronization(self.number)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> "Stream":
        _outer.streams = [*getattr(_outer, "streams", []), library().stream_id()]
        library().set_stream(self.number)
        return self

    def __exit__(self, *_: Any) -> None:
        library().set_stream(_outer.streams.pop())


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.number, self.timing, self.time = now().next_event, enable_timing, 0.0
        now().next_event += 1

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()
        now().sanitizer._handle_event_record(self.number, (stream or current_stream()).number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        now().seen.wait("Event.synchronize")
        now().sanitizer._handle_event_synchronization(self.number)

    def elapsed_time(self, other: "Event") -> float:
        assert {self.timing, other.timing} == {True}, "an event without enable_timing"
        return 1e3 * (other.time - self.time)


def current_stream(device: Any = None) -> Stream:
    return Stream(number=library().stream_id())


def functions(devices: int, capability: tuple[int, int]) -> dict[str, Any]:
    """Those of torch.cuda by name, for a node of H100."""
    total, name, memory = 80 * 10**9, "NVIDIA H100 80GB HBM3", now().memory
    major, minor = capability
    properties = SimpleNamespace(name=name, total_memory=total, multi_processor_count=132, major=major, minor=minor)

    def synchronize(where: Any = None) -> None:
        now().seen.wait("torch.cuda.synchronize")
        now().sanitizer._handle_device_synchronization()

    def set_device(where: Any) -> None:
        library().set_device(device_of(where).index)

    @contextmanager
    def switched(where: Any) -> Iterator[None]:
        before = here_now()
        set_device(where)
        yield
        set_device(before)

    def set_state(state: Tensor, where: Any = "cuda") -> None:
        now().random = state.clone()

    def seed(value: int) -> None:
        now().random = torch.Generator().manual_seed(value).get_state()

    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: devices, "current_device": lambda: here_now().index, "set_device": set_device,
        "device": switched, "get_device_capability": lambda where=None: capability,
        "get_device_name": lambda where=None: name, "get_device_properties": lambda where=None: properties,
        "mem_get_info": lambda where=None: (total - memory.reserved, total),
        "memory_allocated": lambda where=None: memory.allocated,
        "max_memory_allocated": lambda where=None: memory.peak, "reset_peak_memory_stats": memory.reset_peak,
        "memory_reserved": lambda where=None: memory.reserved,
        "max_memory_reserved": lambda where=None: memory.reserved,
        "empty_cache": lambda: None, "synchronize": synchronize,
        "Stream": Stream, "Event": Event, "stream": lambda stream: stream or nullcontext(),
        "current_stream": current_stream, "default_stream": lambda where=None: Stream(number=0),
        "_sleep": lambda cycles: None, "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False, "get_rng_state": lambda where="cuda": now().random.clone(),
        "set_rng_state": set_state, "manual_seed": seed, "manual_seed_all": seed,
    }  # fmt: skip
