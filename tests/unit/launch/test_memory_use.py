"""The most that tensors held at one time, on a CPU."""

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
    # As gloo's threads do with the tensors of a collective, which torch's profiler does not see.
    size = 64 * MIB  # of which the C library returns the addresses at once
    with MemoryGauge(torch.device("cpu")) as gauge:
        for _ in range(8):
            held = [torch.zeros(size, dtype=torch.uint8)]
            thread = Thread(target=held.clear)
            thread.start()
            thread.join()
    assert size <= gauge.peak_bytes <= 2.1 * size
