"""Micro-batches in flight as they are saved: not their graphs, but what it takes to compute these again, to the bit.

A graph cannot be written to a file. A forward is a function of its input, of the weights that it read, of its random
numbers and of the module's buffers; with these it is run again, and what comes out is compared with what had come out,
so that a module which depends on anything else is noticed.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.pipeline.local_parts import bit_sums
from fourfold.parallel.pipeline.stage import Flight, PipelineStage
from fourfold.parallel.pipeline.values import Structure, needs_gradient, put_together, take_apart
from fourfold.parallel.pipeline.versions import Weights


@dataclass(kw_only=True, slots=True)
class Recipe:
    """How a micro-batch in flight was computed.

    Attributes:
        tensors, wanted, structure: of the stage's input, and which tensors of it need a gradient.
        weights: that the forward read.
        seen, number: updates before it, and forwards of this stage.
        random: the state of the host's and of the device's generator, where the pipeline has no seed.
        buffers: of the module, before it.
        weight: of the micro-batch in its update.
        results: bit_sums of what came out; in a state, as numbers.
    """

    tensors: list[Tensor]
    wanted: list[bool]
    structure: Structure
    weights: list[Tensor]
    seen: int
    number: int
    random: tuple[Tensor, Tensor | None] | None
    buffers: list[Tensor]
    weight: float = 1.0
    results: list[Tensor] = field(default_factory=list)

    @classmethod
    def before(cls, stage: PipelineStage, value: Any, weights: Weights, seen: int) -> "Recipe":
        """Before the forward, which may write into its input and its buffers.

        Cost: copies of the input and the buffers, and of the weights where the forward reads the present ones.
        """
        tensors, structure = take_apart(value)
        device = _device_of(stage)
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(
            tensors=[each.detach().clone() for each in tensors],
            wanted=[needs_gradient(each) for each in tensors],
            structure=structure,
            weights=stage.weights.present() if weights is None else weights,
            seen=seen,
            number=stage.num_forwards,
            random=None if stage.settings.seed is not None else (torch.get_rng_state(), on_device),
            buffers=[buffer.detach().clone() for buffer in stage.module.buffers()],
        )

    def made(self, flight: Flight) -> None:
        """After it."""
        self.weight, self.results = flight.weight, [bit_sums(output.detach()) for output in flight.outputs]

    def state(self) -> dict[str, Any]:
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"results": [tuple(sums.tolist()) for sums in self.results]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Recipe":
        """The inverse of `state`."""
        return cls(**state | {"results": [torch.tensor(sums, device="cpu") for sums in state["results"]]})


def replayed(stage: PipelineStage, recipe: Recipe, micro_batch: int) -> Flight:
    """The micro-batch in flight again; the stage, its buffers and all random numbers are afterwards as they were.

    Raises:
        ValueError: something else came out than before.
    """
    kept = [buffer.detach().clone() for buffer in stage.module.buffers()], stage.num_forwards
    # Where the present weights are in the module's own storage, the forward's old ones take their place for a moment.
    present = None if stage.weights.separate else stage.weights.present()
    _set_buffers(stage, recipe.buffers)
    stage.num_forwards = recipe.number
    leaves = [
        tensor.detach().clone().requires_grad_(want) for tensor, want in zip(recipe.tensors, recipe.wanted, strict=True)
    ]
    device = _device_of(stage)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices) if recipe.random is not None else nullcontext():
        if recipe.random is not None:
            torch.set_rng_state(recipe.random[0])
            if recipe.random[1] is not None:
                torch.cuda.set_rng_state(recipe.random[1], device)
        flight = stage.forward(put_together(recipe.structure, leaves), None, recipe.weights, recipe.seen)
    stage.weights.load(present)
    _set_buffers(stage, kept[0])
    stage.num_forwards = kept[1]
    flight.weight = recipe.weight
    if [bit_sums(output.detach()).tolist() for output in flight.outputs] != [sums.tolist() for sums in recipe.results]:
        raise ValueError(
            f"stage {stage.index}: micro-batch {micro_batch}, in flight when the state was saved, comes out otherwise "
            "now: its module depends on more than its input, weights, buffers and random numbers, or its mode, dtype "
            "or device is another; save after a run with drain=True"
        )
    return flight


def _device_of(stage: PipelineStage) -> torch.device:
    """Where its weights are; the CPU where it has none."""
    return next((p.device for p in stage.weights.live), torch.device("cpu"))


@torch.no_grad()
def _set_buffers(stage: PipelineStage, values: list[Tensor]) -> None:
    for buffer, value in zip(stage.module.buffers(), values, strict=True):
        buffer.data.copy_(value)
