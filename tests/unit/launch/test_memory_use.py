"""The most that tensors held at one time, on a CPU."""

from queue import SimpleQueue
from threading import Thread

import torch

from fourfold.launch.training.memory_use import MemoryGauge

MIB = 1 << 20


def test_the_peak_is_what_was_held_together():
    before = torch.zeros(8 * MIB, dtype=torch.uint8)
    with MemoryGauge(torch.device("cpu")) as gauge:
        first = torch.zeros(4 * MIB, dtype=torch.uint8)
        second = torch.zeros(3 * MIB, dtype=torch.uint8)
        del first, before
        torch.zeros(2 * MIB, dtype=torch.uint8)
        del second
    assert 7 * MIB <= gauge.peak_bytes <= 7.1 * MIB


def test_what_another_thread_frees_is_not_held_for_ever():
    # As gloo's threads do with the tensors of a collective, which torch's profiler does not see. One thread from the
    # beginning to the end, as gloo's are: a new one's stack could take the addresses that are free again.
    size, count = 64 * MIB, 8  # a size of which the C library returns the addresses at once
    freed: SimpleQueue[list[torch.Tensor] | None] = SimpleQueue()
    done: SimpleQueue[None] = SimpleQueue()

    def free() -> None:
        while (held := freed.get()) is not None:
            held.clear()
            done.put(None)

    thread = Thread(target=free)
    thread.start()
    freed.put([torch.zeros(size, dtype=torch.uint8)])
    done.get()
    with MemoryGauge(torch.device("cpu")) as gauge:
        for _ in range(count):
            freed.put([torch.zeros(size, dtype=torch.uint8)])
            done.get()
    freed.put(None)
    thread.join()
    assert size <= gauge.peak_bytes <= count / 2 * size
