"""CUDA devices that are not there: their tensors say that they are on cuda:0 (or 1, ...), and compute on the CPU.

What a device would refuse is refused, and what makes the host wait for it is noted: tensors of two devices in one
operator, reading a value, sizes that depend on values, copies from or to memory that is not pinned. Numbers are real,
so losses can be compared with the CPU's. torch's own CUDA sanitizer says where two streams touch the same memory
without an order between them.

Needs a torch that is built for CPUs alone, and a process in which nothing has gone backward before: autograd makes a
thread for each device at its first step.
What it cannot know: kernels' limits (support.emulated_kernels has those of attention's), what the allocator rounds up
and where it runs out, what NCCL would deadlock on.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # asks for CUDA's own functions when it is imported
from torch import Tensor
from torch.cuda import _sanitizer
from torch.distributed import Backend, ProcessGroupGloo
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fourfold.parallel.attention import backends
from support.emulated_kernels import Calls, torch_kernels
from support.pretended_functions import Seen, State, begin, current_stream, device_of, end, functions, places
from support.pretended_library import library

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
# Operators whose result the host must know, or whose output's size depends on values.
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim",
    "bincount", "repeat_interleave",
}  # fmt: skip
INDEXING = ("index", "index_put", "_index_put_impl")


class OnDevice(Tensor):
    """A tensor that says it is on a device; its storage is the CPU's."""

    place: torch.device

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
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    def data_ptr(self) -> int:
        return plain(self).data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnDevice":
        """torch's own sets the copy's storage, which is not the one that is read."""
        found = memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))
        if getattr(self, "_is_param", False):
            found._is_param = True
        return found

    def record_stream(self, stream: Any) -> None:
        """What it keeps alive is alive here anyway."""


def plain(x: Tensor) -> Tensor:
    """The CPU's view of the same memory."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class Device(TorchDispatchMode):
    """The mode under which the device is there."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state, self.seen = state, state.seen
        self.pinned: dict[int, Tensor] = {}  # for good, so that no other memory gets their addresses
        self.lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **(kwargs or {}))  # DTensor's own reckoning with shapes
        return self.run(func, types, args, kwargs or {})

    def run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].place
        if any(not issubclass(t, OnDevice) and t not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in types):
            return NotImplemented
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, OnDevice)]
        there = [x for x in tensors if not isinstance(x, OnDevice)]
        if name == "_wrap_tensor_autograd":  # a collective of DTensor's
            return AsyncCollectiveTensor(args[0])
        device = kwargs.get("device")
        where = here[0].place if device is None and here else device_of(device)
        onto = where.type == "cuda" and bool(here or device is not None)
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name in ("_pin_memory", "pin_memory"):
            return self._pinned(args[0].clone())
        if func is aten.copy_.default:
            onto = isinstance(args[0], OnDevice)
            where = args[0].place if onto else where
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_transfer(func, args, kwargs, onto)
        elif here:
            self._refuse_mixture(name, func, args, here, there)
            if name in WAITING or _indexes_by_mask(name.rstrip("_"), args):
                self.seen.wait(func._schema.name)
        if here or onto:
            return self._launch(func, args, kwargs, where if onto else None, here)
        if kwargs.get("pin_memory"):
            return self._pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _launch(self, func: Any, args: Any, kwargs: Any, onto: torch.device | None, here: Sequence["OnDevice"]) -> Any:
        given: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the plain tensor, and whose it is

        def unwrap(x: Any) -> Any:
            if isinstance(x, OnDevice):
                found = plain(x)
                given[id(found)] = found, x
                return found
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

        arguments, named = tree_map(unwrap, (args, kwargs))
        named.pop("pin_memory", None)
        if func is aten.histc.default:  # which the CPU has for fractions alone
            arguments = (arguments[0].double(), *arguments[1:])
        with self._own_random_numbers(func, (*args, *kwargs.values())):
            out = func(*arguments, **named)
        made: list[Tensor] = []

        def wrap(x: Any) -> Any:
            if type(x) is not Tensor or x.is_meta or onto is None:
                return x
            if id(x) in given:
                return given[id(x)][1]
            new = Tensor._make_subclass(OnDevice, x.detach(), False, dispatch_device=True, device_for_backend_keys=onto)
            new.place = onto
            made.append(new)
            return new

        result = tree_map(wrap, out)
        self._account(func, args, kwargs, here, made)
        for x in made:
            self.state.memory.made(x)
        return result

    @contextmanager
    def _own_random_numbers(self, func: Any, values: Sequence[Any]) -> Iterator[None]:
        """The device's generator is not the CPU's."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        assert not any(isinstance(value, torch.Generator) for value in values), "a CPU generator for a CUDA tensor"
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state.random)
        yield
        self.state.random = torch.get_rng_state()
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

    def _refuse_mixture(
        self, name: str, func: Any, args: Any, here: Sequence["OnDevice"], there: Sequence[Tensor]
    ) -> None:
        shapes = [tuple(x.shape) for x in there if x.dim() > 0]
        indices = sorted({str(x.place) for x in here})
        if (len(indices) == 1 and not shapes) or "c10d" in func._schema.name:
            return
        if name.rstrip("_") in INDEXING and isinstance(args[0], OnDevice):
            self.seen.wait(f"{name} by indices on the CPU")
            return
        raise RuntimeError(
            f"{func._schema.name}: expected all tensors to be on the same device, but found {indices} "
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
                self.state.sanitizer.tensors_accessed.accesses.pop(pointer, None)
            touched: dict[int, list[str]] = {pointer: [] for pointer in reads | writes | new}
            errors = self.state.sanitizer._handle_kernel_launch(
                current_stream().number, reads - writes, writes, new, func._schema.name, touched
            )
            self.seen.faults += [f"{error} {places()}" for error in errors]


def _indexes_by_mask(name: str, args: Any) -> bool:
    masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool] if name in INDEXING else []
    if name != "index" and masks and args[2].numel() == 1 and len(masks) == len(args[1]):
        return False  # torch does it as a masked_fill
    return bool(masks)


_device: Device | None = None


def _gloo(store: Any, rank: int, size: int, timeout: Any) -> ProcessGroupGloo:
    return ProcessGroupGloo(store, rank, size, timeout=timeout)


def _nccl() -> str:
    """The name of a backend that is gloo, for groups that are then told from gloo's own."""
    name = "pretended_nccl"
    if name not in Backend.backend_list:
        Backend.register_backend(name, _gloo, devices=["cuda"])
    return name


@contextmanager
def pretended(devices: int = 1, capability: tuple[int, int] = (9, 0)) -> Iterator[Seen]:
    """Meanwhile there are CUDA devices. NCCL is gloo by another name."""
    global _device
    assert not torch.cuda.is_available(), "there is a device: use it"
    library().pretend(devices)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes it on the CPU, and copies
    _device, start = Device(begin()), torch.distributed.init_process_group
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in functions(devices, capability).items():
                patch.setattr(torch.cuda, name, value)

            def init_process_group(backend: str, *, device_id: Any = None, **arguments: Any) -> None:
                assert device_id in (None, torch.device("cuda", torch.cuda.current_device())), "set_device first"
                start(backend.replace("nccl", _nccl()), **arguments)

            patch.setattr(torch.distributed, "init_process_group", init_process_group)
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            # Module.to puts its device's tensors in the parameters' places, whose class is another.
            patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
            # DistributedDataParallel's statistics ask for a timer that only CUDA builds have.
            patch.setattr(torch._C._distributed_c10d.Logger, "set_runtime_stats_and_log", lambda self: None)
            patch.setattr(backends, "_fused_merge", lambda: backends._merge)
            # The sanitizer looks at the stack for every kernel, which takes longer than all else.
            no_frames = SimpleNamespace(extract=lambda *_, **__: StackSummary())
            no_stack = SimpleNamespace(StackSummary=no_frames, walk_stack=id)
            patch.setattr(_sanitizer, "traceback", no_stack)
            with _device, torch_kernels(Calls()):
                yield _device.seen
    finally:
        _device = None
        end()
        library().pretend(0)
        torch._C._set_only_lift_cpu_tensors(False)
