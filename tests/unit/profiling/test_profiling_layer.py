"""Timed layers: what a GPU's host is timed by, with a stand-in for the GPU; operators counted; compiled layers."""

from typing import Any

import pytest
import torch

from fourfold.launch.profile_ranks import TrainingParallelism
from fourfold.profiling.clock import Clock
from fourfold.profiling.hardware import held_outside_bytes
from fourfold.profiling.layer import MOST_HELD_S, _Work, compiled_layer_cases, layer_cases, local_model, timed_model
from fourfold.profiling.memory import OperatorCount

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
CPU = torch.device("cpu")
ONE = {"micro_batches": (1,), "seq_len": 8}


class HeldClock(Clock):
    """A CPU's clock that notes for how long a GPU would have been held back."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.held: list[float] = []

    def hold(self, seconds: float) -> None:
        self.held.append(seconds)


def test_the_host_is_timed_apart_while_the_device_is_held_back():
    work = _Work(local_model(CONFIG, num_layers=2), CPU, torch.float32, 1, 8)
    assert work.layer_columns == ("forward_s", "backward_s")
    work._held, work.layer_columns = True, ("forward_s", "backward_s", "host_s")
    clock = HeldClock()
    forward, backward, host = work.time_layers(clock, 1)
    assert clock.held == []  # nobody knows yet for how long
    assert host >= forward + backward > 0  # a CPU's forward and backward are the host's own
    work._least_host_s = 60.0  # as after a call that waited for the compiler
    work.time_layers(clock, 3)
    assert clock.held[0] == MOST_HELD_S
    assert all(seconds < MOST_HELD_S for seconds in clock.held[1:])
    assert len(clock.held) == 3
    Clock(CPU).hold(1e9)  # a CPU is held back by nothing


def test_a_device_of_a_fast_clock_is_held_back_for_as_long(monkeypatch):
    cycles = []
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    Clock(torch.device("cuda")).hold(0.1)
    assert cycles[0] / 2.8e9 >= 0.1  # the highest clocks of consumer cards


def test_operators_are_counted_in_both_passes_and_views_are_none():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    with OperatorCount() as forward:
        y = (x @ weight.t()).view(2, 8).tanh()
    assert forward.count == 2  # product and tanh; the transposed weight and the view are the same memory
    with OperatorCount() as backward:
        y.backward(torch.ones_like(y))
    assert backward.count >= 2
    (layer, _) = layer_cases(timed_model(CONFIG, CPU), CPU, tp=1, **ONE)
    few, many = (
        layer.facts()["operators"],
        layer_cases(timed_model(CONFIG, CPU), CPU, tp=1, micro_batches=(8,), seq_len=16)[0].facts(),
    )
    assert 50 < few == many["operators"] < 300  # a launch costs the same whatever it works on


def test_compiled_layers_are_compiled_before_they_are_timed():
    compiled: list[torch.nn.Module] = []

    class Told(TrainingParallelism):
        def compile_layer(self, layer: torch.nn.Module) -> None:
            compiled.append(layer)
            layer.compile(backend="eager")

    whole = timed_model(CONFIG, CPU)
    (case,) = compiled_layer_cases(whole, CPU, Told(), **ONE)
    assert case.fields["compiled"] is True
    assert case.fields["tp"] == 1
    assert len(compiled) == 2
    # Two models in the memory of one; of each its own gradients.
    mine, theirs = ([*layers.parameters()] for layers in (torch.nn.ModuleList(compiled), whole.model.layers))
    assert [weight.data_ptr() for weight in mine] == [weight.data_ptr() for weight in theirs]
    assert not {id(weight) for weight in mine} & {id(weight) for weight in theirs}
    case.prepare()
    assert {layer._compiled_call_impl for layer in whole.model.layers} == {None}
    counters: Any = torch._dynamo.utils.counters
    before = dict(counters["frames"])
    assert min(case.run(Clock(CPU), 2)) > 0
    assert dict(counters["frames"]) == before


def test_training_compiles_on_no_processor():
    assert TrainingParallelism().compiles_on("cpu") is False


@pytest.mark.parametrize(("free", "reserved", "outside"), [(60, 30, 10), (75, 30, 0)])
def test_what_lies_outside_the_allocator(monkeypatch, free, reserved, outside):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert held_outside_bytes(torch.device("cuda"), 100) == outside
    assert held_outside_bytes(CPU, 100) == 0
