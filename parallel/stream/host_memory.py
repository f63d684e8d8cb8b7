"""What a streamed step keeps, in pinned host memory between forward and backward, copied beside the computation.

At long sequences the layers' inputs, and attention's outputs where they are kept, are what is left of a streamed step's
memory (stream.memory). A layer's work on T tokens grows faster than the copy of them, so on CUDA the copies hide behind
it: what a layer keeps leaves on a stream of its own while the next layer computes, and comes back on another while the
layer above goes backward. torch's save_on_cpu copies on the computing stream, and waits; autograd's saved-tensor hooks
know no next tensor to fetch.

    forward    compute  layer 0   layer 1   layer 2              layer 2   layer 1   layer 0    backward
               leave              0 ------> 1 ------>
               fetch                                             1 ------> 0 ------>

The last two that left are still on the device when backward begins, and are not fetched. Host memory is pinned once, in
blocks that every step, layer and length uses again: pinning takes longer than copying, and torch's own cache of pinned
memory rounds every tensor up to a power of two.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fourfold.parallel.stream.patching import num_changes

Tensors = tuple[Tensor, ...]

# Copies to the host that may be under way: their sources stay on the device until then.
IN_FLIGHT = 2
BLOCK_BYTES = 32 << 20
# Tensors begin at multiples of it in the blocks, so that every dtype can be read there.
ALIGNMENT = 64


class Copied(Protocol):
    """Copies that were put in a lane."""

    def computation_waits(self) -> None:
        """Let what is computed from now on come after them; the host goes on."""

    def host_waits(self) -> None:
        """Return when they are done."""


class Lane(Protocol):
    """A queue of copies that go on beside the computation."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Copied:
        """Copy each (source, target), after all that was queued so far, here and in the computation."""


class CudaLane:
    """A CUDA stream.

    Args:
        device: whose current stream is the computation.
        after: another lane, whose copies come first too: it may still read what this one writes.
    """

    def __init__(self, device: torch.device, after: "CudaLane | None" = None) -> None:
        self._device, self._after = device, after
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Copied:
        # What the computation has yet to do writes the sources, or reads what was in the targets' memory before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._after is not None:
            self._stream.wait_stream(self._after._stream)
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return _CudaCopied(done, self._device)


@dataclass(frozen=True, slots=True)
class _CudaCopied:
    done: torch.cuda.Event
    device: torch.device

    def computation_waits(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def host_waits(self) -> None:
        self.done.synchronize()


class HostStore:
    """A model's host memory and lanes, which its steps share. Made when first used."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lanes: dict[torch.device, tuple[Lane, Lane] | None] = {}

    def lanes(self, device: torch.device) -> tuple[Lane, Lane] | None:
        """(away from the device, back to it); None where there is no other memory to move to, as on a CPU."""
        if device not in self._lanes:
            self._lanes[device] = self.new_lanes(device)
        return self._lanes[device]

    def new_lanes(self, device: torch.device) -> tuple[Lane, Lane] | None:
        if device.type != "cuda":
            return None
        back = CudaLane(device)
        return CudaLane(device, after=back), back

    def new_block(self) -> Tensor:
        return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def take(self, num_bytes: int) -> list[Tensor]:
        """Blocks for so many bytes: free ones first."""
        count = -(-num_bytes // BLOCK_BYTES)
        return [self._free.pop() if self._free else self.new_block() for _ in range(count)]

    def give(self, blocks: Sequence[Tensor]) -> None:
        """Take blocks back, to be used again."""
        self._free.extend(blocks)


@dataclass(frozen=True, slots=True)
class _Put:
    """What was put in one place: its shapes and dtypes, the blocks it lies in, and what autograd saves for it."""

    like: tuple[tuple[torch.Size, torch.dtype], ...]
    blocks: Sequence[Tensor]
    handle: weakref.ref[Tensor]


@dataclass(frozen=True, slots=True)
class _Leaving:
    """Tensors on their way to the host, and how often each had been changed when they left."""

    copied: Copied
    tensors: Tensors
    versions: tuple[int, ...]


class HostMemory:
    """Moves the tensors of one pass, put in order and got in reverse.

    Where the store has no lanes they stay where they are.

    Args:
        device: where the tensors live.
        store: the model's.
    """

    def __init__(self, device: torch.device, store: HostStore) -> None:
        self._device, self._store, self._lanes = device, store, store.lanes(device)
        self._count = 0
        # By place.
        self._puts: dict[int, _Put] = {}
        self._leaving: dict[int, _Leaving] = {}
        self._fetched: dict[int, tuple[Copied, Tensors]] = {}

    def put(self, *tensors: Tensor) -> tuple[int, Tensors]:
        """(place, what autograd is to save), which `get` wants back. Waits for the copy before the last but one.

        Raises:
            RuntimeError: a tensor that left before was changed in place while it was copied.
        """
        place = self._count
        self._count += 1
        if self._lanes is None:
            return place, tensors
        tensors = tuple(tensor.detach().contiguous() for tensor in tensors)
        blocks, handle = self._store.take(_size(tensors)), torch.empty(0)
        # When autograd frees the handle, nobody will ask for this place again, and its blocks are free.
        weakref.finalize(handle, self._store.give, blocks)
        like = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        self._puts[place] = _Put(like, blocks, weakref.ref(handle))
        copied = self._lanes[0].copy(list(_pairs(tensors, blocks)))
        # The sources stay referenced until their copy is done, so that the allocator cannot give their memory away
        # before; and the host waits for it, because else it would run ahead and no source be freed in time.
        self._leaving[place] = _Leaving(copied, tensors, tuple(map(num_changes, tensors)))
        if len(self._leaving) > IN_FLIGHT:
            self._left(min(self._leaving)).copied.host_waits()
        return place, (handle,)

    def get(self, place: int, saved: Tensors) -> Tensors:
        """The tensors on the device, for the computation; starts fetching those put before them.

        Raises:
            RuntimeError: what autograd saved is not what `put` gave, or a tensor was changed while it was copied.
        """
        if self._lanes is None:
            return saved
        if self._puts[place].handle() is not saved[0]:
            raise RuntimeError(
                "offload='host' inside hooks on saved tensors (save_on_cpu, checkpoint): they let go what was "
                "offloaded; leave one of the two out"
            )
        if place in self._leaving:
            # Its memory may be used anew once the computation lets go of it, so the copy must be done by then.
            left = self._left(place)
            left.copied.computation_waits()
            tensors = left.tensors
        else:
            copied, tensors = self._fetched.pop(place) if place in self._fetched else self._fetch(place)
            copied.computation_waits()
        # One layer ahead, where it is not here already.
        ahead = place - 1
        asked_for = ahead in self._puts and self._puts[ahead].handle() is not None
        if asked_for and ahead not in self._leaving and ahead not in self._fetched:
            self._fetched[ahead] = self._fetch(ahead)
        return tensors

    def _left(self, place: int) -> _Leaving:
        found = self._leaving.pop(place)
        if tuple(map(num_changes, found.tensors)) != found.versions:
            raise RuntimeError(
                "a layer's input was changed in place while it was copied to the host: leave offload out, or let the "
                "hook or module that does it return a new tensor"
            )
        return found

    def _fetch(self, place: int) -> tuple[Copied, Tensors]:
        assert self._lanes is not None
        put = self._puts[place]
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in put.like)
        # They are used and freed by the computation, once it has waited for the copy.
        return self._lanes[1].copy([(block, part) for part, block in _pairs(tensors, put.blocks)]), tensors


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def _pairs(tensors: Sequence[Tensor], blocks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(bytes of a tensor, where they lie in a block), the tensors one after the other."""
    position = 0
    for tensor in tensors:
        data, done = tensor.view(-1).view(torch.uint8), 0
        while done < len(data):
            block, offset = divmod(position, BLOCK_BYTES)
            size = min(BLOCK_BYTES - offset, len(data) - done)
            yield data[done : done + size], blocks[block][offset : offset + size]
            done, position = done + size, position + size
        position = -(-position // ALIGNMENT) * ALIGNMENT
