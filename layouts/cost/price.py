"""A layout with its price: step time in its terms, memory in its parts, and how surely it fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.doubt import TENTH, step_interval
from fourfold.layouts.cost.memory import memory_of
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants, load_constants
from fourfold.layouts.inputs.layout import PRECISIONS, Layout, check
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import MEGATRON, RUNTIME_CPU, RUNTIME_CUDA, Software, load_software

GIB = float(1 << 30)
FITS, SAFE = 0.5, 0.95
"""Least probability of fitting at which a layout counts as fitting, and as safe."""
STAGE_NAMES = ("first", "second", "last")


@dataclass(frozen=True, kw_only=True, slots=True)
class PricedLayout:
    """Seconds, bytes and shares of one training step under `layout`."""

    layout: Layout
    step_s: float
    time_parts_s: Mapping[str, float]
    """The terms of the step on its slowest stage; they add up to `step_s`."""
    peak_bytes: float
    """What the framework's allocator holds at most on the worst rank."""
    memory_parts_bytes: Mapping[str, float]
    """The parts of `peak_bytes`."""
    stage_peaks_bytes: Mapping[str, float]
    """The peak of the first, second and last pipeline stage (one entry without a pipeline)."""
    reserve_bytes: float
    """Device memory outside the allocator."""
    capacity_bytes: float
    fit_probability: float
    step_low_s: float
    """The step is quicker than this in one case of ten."""
    step_high_s: float
    """And slower than this in one of ten."""
    peak_low_bytes: float
    peak_high_bytes: float
    """The same of the peak."""
    mfu: float
    """Model FLOPs (6 N + 12 L q S a token) over peak x devices x step."""
    tokens_per_s: float
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.fit_probability >= FITS

    @property
    def safe(self) -> bool:
        return self.fit_probability >= SAFE

    @property
    def expected_s(self) -> float:
        """Seconds a step, with what is lost where the run does not fit: a plan that fits once in n tries costs n."""
        return self.step_s / max(self.fit_probability, 1e-9)

    @property
    def margin_bytes(self) -> float:
        return self.capacity_bytes - self.reserve_bytes - self.peak_bytes

    @property
    def compute_s(self) -> float:
        return self.time_parts_s["compute"] + self.time_parts_s["recompute"] + self.time_parts_s["overhead"]

    @property
    def exposed_communication_s(self) -> float:
        return sum(seconds for name, seconds in self.time_parts_s.items() if name.endswith("_communication"))

    @property
    def bubble_s(self) -> float:
        return self.time_parts_s["bubble"]

    @property
    def optimizer_s(self) -> float:
        return self.time_parts_s["optimizer"]


def software_for(
    cluster: Cluster, space: str = "runtime", precision: str = PRECISIONS[0], *, compiled: bool = False
) -> Software:
    """The software that runs a layout of this space on this cluster, in this precision.

    Args:
        compiled: whether the layout asks for compiled layers.
    Raises:
        ValueError: a precision whose speed no measurement of this device tells, or that of compiled layers.
    """
    kind = cluster.device.type
    if compiled and space != "full":
        if kind == "cpu" or precision not in (PRECISIONS[0], "bf16-mixed"):
            raise ValueError(
                f"compile=true on {cluster.device.name} with precision={precision}: the speed of compiled layers is "
                "known on CUDA with bf16-mixed alone; plan without it"
            )
        return load_software("fourfold-compiled")
    usual, software = ("fp32", RUNTIME_CPU) if kind == "cpu" else ("bf16-mixed", RUNTIME_CUDA)
    if precision in (PRECISIONS[0], usual):
        return MEGATRON if space == "full" and kind != "cpu" else software
    if precision == "bf16" and kind != "cpu" and space != "full":
        return load_software("fourfold-bf16")
    raise ValueError(
        f"precision={precision} on {cluster.device.name}: only {usual} was measured there"
        f"{'' if kind == 'cpu' else ', and bf16 in the runtime space follows from it'}; plan with one of these"
    )


def price(
    model: ModelConfig,
    cluster: Cluster,
    layouts: Sequence[Layout],
    *,
    software: Software | None = None,
    constants: Constants | None = None,
) -> list[PricedLayout]:
    """Price some layouts of one batch and length.

    Raises:
        ValueError: a layout that cannot cut the model.
    """
    for layout in layouts:
        check(layout, model)
        cluster.check_links(layout.world_size)
    return price_candidates(
        Pricing(
            layouts=Candidates.of(layouts),
            model=model,
            cluster=cluster,
            software=software or _software_of(cluster, layouts[0]),
            constants=constants or load_constants(),
        )
    )


def _software_of(cluster: Cluster, layout: Layout) -> Software:
    return software_for(cluster, precision=layout.precision, compiled=bool(layout.compile))


def price_candidates(pricing: Pricing) -> list[PricedLayout]:
    """Every layout of a pricing as an object."""
    memory, time = memory_of(pricing), time_of(pricing)
    step, peak, worst = time.total, memory.peak, memory.worst_stage
    by_stage, probability = memory.by_stage, memory.fit_probability
    low, high = step_interval(pricing, time)
    doubt = TENTH * np.take_along_axis(np.broadcast_to(memory.spread, by_stage.shape), worst[None], 0)[0]
    result = []
    for row in range(len(pricing.layouts)):
        layout = pricing.layouts.layout(row)
        seconds = float(step[row])
        kinds = {1: (0,), 2: (0, 2)}.get(layout.pp, (0, 1, 2))
        held = {
            name: float(np.broadcast_to(part, by_stage.shape)[worst[row], row]) for name, part in memory.parts.items()
        }
        result.append(
            PricedLayout(
                layout=layout,
                step_s=seconds,
                time_parts_s={name: float(part[row]) for name, part in time.parts.items()},
                peak_bytes=float(peak[row]),
                memory_parts_bytes=held,
                stage_peaks_bytes={STAGE_NAMES[kind]: float(by_stage[kind, row]) for kind in kinds},
                reserve_bytes=memory.reserve,
                capacity_bytes=memory.capacity,
                fit_probability=float(probability[row]),
                step_low_s=float(low[row]),
                step_high_s=float(high[row]),
                peak_low_bytes=max(0.0, float(peak[row] - doubt[row])),
                peak_high_bytes=float(peak[row] + doubt[row]),
                mfu=mfu_of(pricing.model, layout, seconds, pricing.cluster.device.peak_flops_per_s),
                tokens_per_s=layout.global_batch * layout.seq_len / seconds,
            )
        )
    return result


def mfu_of(model: ModelConfig, layout: Layout, step_s: float, peak_flops_per_s: float) -> float:
    """Model FLOPs of a step (`ModelConfig.flops_per_token`) over what the devices could do in its time."""
    tokens = layout.global_batch * layout.seq_len
    return tokens * model.flops_per_token(layout.seq_len) / (step_s * peak_flops_per_s * layout.world_size)
