"""Offloading with copies that a test makes late, in memory that other steps use again: on CUDA both are as real."""

import gc

import pytest
import torch
from torch import Tensor

from fourfold.parallel.stream import host_memory
from fourfold.parallel.stream.host_memory import HostMemory, HostStore
from fourfold.parallel.stream.model import stream_backprop
from fourfold.parallel.stream.patching import ATTRIBUTE
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


class LateLane:
    """Copies when somebody waits, and not before; tells what happened in `log`."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.queued = name, log, []

    def copy(self, pairs):
        number = sum(f"{self.name} queued" in line for line in self.log)
        self.log.append(f"{self.name} queued {number}")
        self.queued.append((number, [(source.detach(), target.detach()) for source, target in pairs]))
        return LateCopies(self, number)

    def run_until(self, number: int) -> None:
        while self.queued and self.queued[0][0] <= number:
            for source, target in self.queued.pop(0)[1]:
                target.copy_(source)


class LateCopies:
    def __init__(self, lane: LateLane, number: int) -> None:
        self.lane, self.number = lane, number

    def computation_waits(self) -> None:
        self.lane.log.append(f"{self.lane.name} computation waits {self.number}")
        self.lane.run_until(self.number)

    def host_waits(self) -> None:
        self.lane.log.append(f"{self.lane.name} host waits {self.number}")
        self.lane.run_until(self.number)


class LateStore(HostStore):
    """A store on a CPU with lanes; blocks come, and come back, full of NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.made = 0

    def new_lanes(self, device):
        self.away, self.back = LateLane("away", self.log), LateLane("back", self.log)
        return self.away, self.back

    def new_block(self) -> Tensor:
        self.made += 1
        return torch.full((host_memory.BLOCK_BYTES,), 255, dtype=torch.uint8)

    def give(self, blocks):
        for block in blocks:
            block.fill_(255)
        super().give(blocks)

    @property
    def free(self) -> int:
        return len(self._free)


@pytest.fixture
def store(monkeypatch) -> LateStore:
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", 1000)
    return LateStore()


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("keep_attention", [False, True, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bit_for_bit(store, dtype, keep_attention, groups):
    model, ids = tiny("qwen3", num_hidden_layers=5).to(dtype), batch(2, 21)
    settings = {**CHUNKS, "keep_attention": keep_attention, "head_groups": groups}
    stream_backprop(model, **settings)
    expected = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **settings, offload="host")
    streaming = vars(model)[ATTRIBUTE]
    object.__setattr__(streaming.settings, "host", store)
    for _ in range(2):
        found = gradients(model, model(input_ids=ids, labels=ids).loss)
        assert_gradients(found, expected, 0.0)
    made = store.made
    assert store.free == made > 0  # all blocks are free again
    gradients(model, model(input_ids=batch(1, 9), labels=batch(1, 9)).loss)
    assert (store.made, store.free) == (made, made)  # and other lengths use them


def test_copies_leave_before_they_are_waited_for_and_come_one_ahead(store):
    memory = HostMemory(torch.device("cpu"), store)
    puts = [memory.put(torch.full((3, 7), float(n)), torch.full((5,), n, dtype=torch.int64)) for n in range(4)]
    # Two may be on their way: the third waits for the first.
    assert store.log == [
        "away queued 0", "away queued 1", "away queued 2", "away host waits 0", "away queued 3", "away host waits 1",
    ]  # fmt: skip
    store.log.clear()
    for place, saved in reversed(puts):
        floats, integers = memory.get(place, saved)
        assert floats.eq(place).all()
        assert integers.eq(place).all()
    # The last two are still here; of the others each is asked for while the one above is used.
    assert store.log == [
        "away computation waits 3",
        "away computation waits 2", "back queued 0",
        "back computation waits 0", "back queued 1",
        "back computation waits 1",
    ]  # fmt: skip


def test_blocks_are_free_when_autograd_frees_what_it_saved(store):
    memory = HostMemory(torch.device("cpu"), store)
    _, saved = memory.put(torch.zeros(480))
    assert (store.made, store.free) == (2, 0)
    del saved
    assert store.free == 2
    memory.put(torch.zeros(240))
    assert store.made == 2


def test_a_graph_that_is_kept_goes_back_again(store):
    model, ids = tiny("llama", num_hidden_layers=4), batch(2, 21)
    stream_backprop(model, **CHUNKS, offload="host")
    object.__setattr__(vars(model)[ATTRIBUTE].settings, "host", store)
    hidden = model.model(input_ids=ids).last_hidden_state.square().sum()
    first = torch.autograd.grad(hidden, list(model.model.parameters()), retain_graph=True)
    second = torch.autograd.grad(hidden, list(model.model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    gc.collect()
    assert store.free == store.made


def test_what_would_be_wrong_is_refused(store):
    memory, x = HostMemory(torch.device("cpu"), store), torch.zeros(4)
    place, saved = memory.put(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        memory.get(place, saved)
    place, saved = memory.put(torch.zeros(4))
    with pytest.raises(RuntimeError, match="hooks on saved tensors"):
        memory.get(place, (torch.empty(0),))


def test_a_cpu_has_no_other_memory():
    memory, x = HostMemory(torch.device("cpu"), HostStore()), torch.zeros(4)
    place, saved = memory.put(x)
    assert saved[0] is x
    assert memory.get(place, saved)[0] is x
