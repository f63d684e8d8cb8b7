"""One way to time a stretch of work on a CPU and on a GPU: marks, and the seconds between two of them.

A GPU works behind its host. Where the host needs longer to issue a stretch of work than the GPU to do it, two marks of
the GPU's tell the host's time. `hold` keeps the GPU busy until the host is ahead, so that each is timed by itself.
"""

import time
from collections.abc import Callable

import torch

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

CYCLES_PER_S = 3_000_000_000
"""Of a GPU's clock at most: `hold` lasts at least as long as asked for, on consumer cards beyond 2.5 GHz as well."""


class Clock:
    """`perf_counter` on a CPU, CUDA events on a GPU. Read seconds only after `wait()`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> "float | torch.cuda.Event":
        """This moment: of the host on a CPU, of the current stream on a GPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def hold(self, seconds: float) -> None:
        """Let the GPU's current stream wait so long before what is issued from now on; a CPU is its own host."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(seconds * CYCLES_PER_S))  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        """Seconds from `start` to `end`."""
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end)) / 1e3

    def repeat(self, call: Callable[[], object], iterations: int) -> float:
        """Seconds a call, averaged over `iterations` calls one after the other."""
        start = self.mark()
        for _ in range(iterations):
            call()
        end = self.mark()
        self.wait()
        return self.seconds(start, end) / iterations
