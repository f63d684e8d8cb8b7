"""How much memory this rank's tensors took at most.

CUDA's allocator counts. On a CPU torch keeps no count, and the resident size of the process says more about the C
library's allocator than about tensors, so torch's profiler records every allocation instead, with its address: it
does not see what gloo's threads free, and only an address handed out again tells.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile


class MemoryGauge:
    """Counts from its creation, which comes before the model's, to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak_bytes: int | None = None
        self.reserved_bytes = 0
        """After `stop`: most bytes that CUDA's allocator took from the device, for the tensors and between them."""
        self._profile = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
            # Allocations only, no operators: ten times less work, and a receive that is still open when counting stops
            # would otherwise report its end to a profiler that is gone, and crash.
            torch.autograd._enable_record_function(False)  # type: ignore[attr-defined]

    def __enter__(self) -> "MemoryGauge":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End counting; later calls change nothing."""
        if self._peak_bytes is not None:
            return
        if self._profile is None:
            self._peak_bytes = int(torch.cuda.max_memory_allocated(self._device))
            self.reserved_bytes = int(torch.cuda.max_memory_reserved(self._device))
        else:
            torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]
            self._profile.stop()
            assert self._profile.profiler is not None
            events = self._profile.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
            self._peak_bytes = _highest_sum(sorted(_allocations(events)))
            self._profile = None

    @property
    def peak_bytes(self) -> int:
        """Most bytes held by tensors at one time, between creation and `stop`, which must have been called."""
        assert self._peak_bytes is not None
        return self._peak_bytes

    def in_use(self) -> str:
        """What to show while running, and what it is: CUDA's allocator knows its tensors, a CPU only the process."""
        gib = self.in_use_bytes() / 2**30
        return f"tensors {gib:.2f} GiB at most" if self._device.type == "cuda" else f"process {gib:.2f} GiB"

    def in_use_bytes(self) -> int:
        """Of tensors at most so far on CUDA, of the process now on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return int(psutil.Process().memory_info().rss)


def _allocations(events: Iterable[Any]) -> Iterable[tuple[int, int, int]]:
    """(time, address, bytes) of what was allocated, and with negative bytes freed."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def _highest_sum(changes: Iterable[tuple[int, int, int]]) -> int:
    starts: list[int] = []  # of blocks that are held, in order
    sizes: dict[int, int] = {}
    total = highest = 0
    for _, start, size in changes:
        if size < 0 and start not in sizes:
            continue  # from before counting
        # A block goes where it is freed, or else where the next one on its addresses comes.
        first = bisect_left(starts, start)
        if first and starts[first - 1] + sizes[starts[first - 1]] > start:
            first -= 1
        last = bisect_left(starts, start + abs(size))
        total -= sum(sizes.pop(gone) for gone in starts[first:last])
        starts[first:last] = [start] if size > 0 else []
        if size > 0:
            sizes[start] = size
            total += size
            highest = max(highest, total)
    return highest
