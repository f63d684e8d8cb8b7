"""The few physical constants of the model, fitted on published runs and shipped with their provenance."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Shares are of datasheet figures; each constant holds for every model, size and layout."""

    matmul_peaks: Mapping[str, float]
    """Share of the datasheet peak that large matmuls reach, by the start of the device's name; "" for any other."""
    matmul_half: float
    """Elements: a matmul dim of this size costs as much again as its arithmetic."""
    attention_forward: float
    """Share of a large matmul's rate that the attention kernel's forward reaches at head dim 128."""
    attention_backward: float
    flash1: float
    """FlashAttention 1, relative to FlashAttention 2."""
    triton: float
    """The Triton kernels of its time, likewise (llm-foundry)."""
    attention_half: float
    """Keys at which attention's rate is half of its best."""
    memory_efficiency: float
    """Share of the datasheet bandwidth that memory-bound operators reach."""
    kernel_gap_s: float
    """Between two kernels on a device, whoever launches them."""
    sync_s: float
    """What ranks wait for each other at a blocking collective inside a layer, for each doubling of their number."""
    norm_bytes: float
    """An unfused norm's traffic, forward and backward together, an element, in bytes (16-bit compute)."""
    inner_link: float
    """Share of the innermost links' bandwidth that collectives reach."""
    outer_link: float
    """Share of the outer links' bandwidth, one port a device, that collectives reach."""
    step_overhead_s: float
    """A micro-batch on a stage, besides all that is counted."""
    straggler: float
    """Relative growth of a step with each doubling of the number of nodes."""
    reserve_bytes: float
    """Device memory outside the allocator: the context, communicators, libraries' work spaces."""
    fragmentation: float
    """Allocator waste, as a share of what changes during a step (activations and work spaces)."""
    memory_spread: float
    """Standard deviation of the true peak about the predicted one, as a share of what changes during a step."""
    memory_spread_bytes: float
    """And in bytes, of what does not."""

    def matmul_peak(self, device_name: str) -> float:
        names = [name for name in self.matmul_peaks if name and device_name.startswith(name)]
        return self.matmul_peaks[max(names, key=len)] if names else self.matmul_peaks[""]


@cache
def load_constants() -> Constants:
    """The constants shipped in data/constants.toml: `prior` fitted to published runs."""
    return constants_from(shipped_table("constants")["constants"])


def shipped_table(name: str) -> dict[str, Any]:
    """The whole of data/`name`.toml."""
    return tomllib.loads(files("fourfold.layouts").joinpath(f"data/{name}.toml").read_text(encoding="utf-8"))


def constants_from(table: Mapping[str, Any]) -> Constants:
    return Constants(**{entry.name: table[entry.name] for entry in fields(Constants)})


def constants_to(constants: Constants) -> dict[str, Any]:
    return {entry.name: getattr(constants, entry.name) for entry in fields(Constants)}
