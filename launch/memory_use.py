"""How much memory this rank's tensors took at most.

CUDA's allocator counts. On a CPU torch keeps no count, so the process's high-water mark of resident memory is
read, less what the process held before the model was built (interpreter, libraries).
"""

from pathlib import Path

import psutil
import torch


class MemoryGauge:
    """Counts from its creation: make it after start-up, before the model is built."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.runtime_bytes: int = psutil.Process().memory_info().rss
        """What the process held on the host before the model."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_high_water_mark()

    def peak_bytes(self) -> int:
        """Most bytes held by tensors at one time since creation."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, _high_water_mark() - self.runtime_bytes)


def _reset_high_water_mark() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the mark then counts from the process's start
        return


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
