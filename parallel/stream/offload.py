"""Layer inputs kept in host memory between forward and backward, copied beside the computation.

At long sequences the layer inputs are what is left of a streamed step's memory (stream.memory). A layer's work on T
tokens grows faster than the copy of its input, so on CUDA the copies hide behind it: each layer's input leaves on a
stream of its own while the next layer computes, and comes back while the layer above goes backward. torch's save_on_cpu
copies on the computing stream, and waits. Own code, because autograd's saved-tensor hooks know no next tensor to fetch.
"""

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

# Copies to the host that may be under way: their sources stay on the device until then.
IN_FLIGHT = 2


class HostMemory:
    """Moves the tensors of one pass, put in order and fetched in reverse.

    On another device than CUDA tensors stay as they are: there is no other memory to move them to.

    Args:
        device: where the tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._count = 0
        self._leaving: list[tuple[torch.cuda.Event, Tensors]] = []
        self._waiting: dict[int, Tensors] = {}
        self._fetched: dict[int, tuple[Tensors, torch.cuda.Event | None]] = {}

    def put(self, *tensors: Tensor) -> tuple[int, Tensors]:
        """(place, tensors on the host), which `get` wants back. Waits for the copy before the last but one."""
        host = tensors
        if self._stream is not None:
            host = tuple(torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors)
            left = self._copy(tensors, host, self._stream)
            # The sources stay referenced until their copy is done, so that the allocator cannot give their memory away
            # before; and the host waits for it, because else it would run ahead and no source be freed in time.
            self._leaving.append((left, tensors))
            if len(self._leaving) > IN_FLIGHT:
                self._leaving.pop(0)[0].synchronize()
        place = self._count
        self._count += 1
        self._waiting[place] = host
        return place, host

    def get(self, place: int, host: Tensors) -> Tensors:
        """The tensors on the device, for the current stream; starts fetching those put before them."""
        if self._stream is not None and self._leaving:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._leaving.clear()
        tensors, ready = self._fetched.pop(place) if place in self._fetched else self._fetch(host)
        self._waiting.pop(place, None)
        if ready is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)
        below = self._waiting.pop(place - 1, None)
        if below is not None:
            self._fetched[place - 1] = self._fetch(below)
        return tensors

    def _fetch(self, host: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        if self._stream is None:
            return host, None
        # They are used and freed on the current stream, once it has waited for the event.
        tensors = tuple(torch.empty_like(x, device=self._device) for x in host)
        return tensors, self._copy(host, tensors, self._stream)

    def _copy(self, sources: Tensors, targets: Tensors, stream: torch.cuda.Stream) -> torch.cuda.Event:
        # What the current stream has yet to do writes the sources, or reads what was in the targets' memory before.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
        return done
