"""How much memory this rank's tensors took at most.

CUDA's allocator counts. On a CPU torch keeps no count, and the resident size of the process says more about the C
library's allocator than about tensors, so torch's profiler records every allocation instead.
"""

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
        else:
            torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]
            self._profile.stop()
            assert self._profile.profiler is not None
            events: Iterable[Any] = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
            changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
            self._peak_bytes = _highest_sum(size for _, size in sorted(changes, key=lambda change: change[0]))
            self._profile = None

    @property
    def peak_bytes(self) -> int:
        """Most bytes held by tensors at one time, between creation and `stop`, which must have been called."""
        assert self._peak_bytes is not None
        return self._peak_bytes

    def in_use_bytes(self) -> int:
        """What to show while running: the allocator's peak on CUDA, the process's resident size on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return int(psutil.Process().memory_info().rss)


def _highest_sum(changes: Iterable[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest
