"""A layout with its price: step time in its terms, memory in its parts, and how surely it fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.doubt import TENTH, step_interval
from fourfold.layouts.cost.memory import host_bytes, memory_of
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants, load_constants
from fourfold.layouts.inputs.layout import PRECISIONS, Layout, check, facts_of
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import MEGATRON, RUNTIME_COMPILING, RUNTIME_CPU, Software, load_software
from fourfold.parallel.decoder.limits import FORMS, RUNTIME, Choice, DecoderFacts, broken

GIB = float(1 << 30)
FITS, SAFE = 0.5, 0.95
"""Least probability of fitting at which a layout counts as fitting, and as safe."""
LAUNCH_BOUND = 0.05
"""Share of a step from which on the wait for launches is worth a word."""
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
    software: Software
    """What was priced as running it."""
    host_bytes: float = 0.0
    """What a rank pins in host memory, where it offloads."""
    facts: DecoderFacts = field(default_factory=DecoderFacts, repr=False)
    """Of the model, for what the runtime takes."""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runnable(self) -> bool:
        """Whether fourfold's own runtime launches this layout of this model; the rest is for export to other tools."""
        return not any(broken(RUNTIME, self.facts, Choice.of(self.layout)))

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
        return sum(self.time_parts_s[name] for name in ("compute", "recompute", "launch", "overhead"))

    @property
    def launch_bound(self) -> bool:
        """Whether the device waits a good part of the step for its host to issue operators."""
        return self.time_parts_s["launch"] >= LAUNCH_BOUND * self.step_s

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
        if kind == "cpu" or precision not in (PRECISIONS[0], "bf16-mixed", "bf16"):
            raise ValueError(
                f"compile=true on {cluster.device.name} with precision={precision}: the speed of compiled layers is "
                "known on CUDA with bf16-mixed, from which bf16 follows; plan without it"
            )
        return load_software("fourfold-bf16-compiled" if precision == "bf16" else "fourfold-compiled")
    usual, software = ("fp32", RUNTIME_CPU) if kind == "cpu" else ("bf16-mixed", RUNTIME_COMPILING)
    if precision in (PRECISIONS[0], usual):
        return MEGATRON if space == "full" and kind != "cpu" else software
    if precision == "bf16" and kind != "cpu" and space != "full":
        return replace(load_software("fourfold-bf16"), compiled_as="fourfold-bf16-compiled")
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

    Args:
        software: what runs them; None for this runtime, which compiles layers on CUDA where it can.
    Raises:
        ValueError: a layout that cannot cut the model.
    """
    for layout in layouts:
        check(layout, model)
        cluster.check_links(layout.world_size)
    base = software or software_for(cluster, precision=layouts[0].precision, compiled=bool(layouts[0].compile))
    pricing = Pricing(
        layouts=Candidates.of(layouts),
        model=model,
        cluster=cluster,
        software=base,
        constants=constants or load_constants(),
    )
    return price_each(pricing)


def price_each(pricing: Pricing) -> list[PricedLayout]:
    """Every layout of a pricing as an object, priced as what runs it."""
    result: dict[int, PricedLayout] = {}
    for rows, each in by_software(pricing):
        result |= zip(rows.tolist(), price_candidates(each.of(pricing.layouts.take(rows))), strict=True)
    return [result[row] for row in range(len(pricing.layouts))]


def by_software(pricing: Pricing) -> list[tuple[Column, Pricing]]:
    """The rows that the pricing's software runs as it is, and those whose layers it compiles unasked, each priced so.

    The runtime asks the same limits when it starts.
    """
    layouts, software = pricing.layouts, pricing.software
    if not software.compiled_as or layouts.compile is not None:
        return [(np.arange(len(layouts)), pricing)]
    names = {entry.name for entry in fields(Choice)} - {"compile"}
    choice = Choice(**{name: getattr(layouts, name) for name in names}, compile=True)
    compiled = np.ones(len(layouts), dtype=bool)
    for limit in (*FORMS, *RUNTIME):
        if "compile" in limit.fields:
            compiled &= limit.allows(DecoderFacts(), choice)
    other = replace(pricing, software=load_software(software.compiled_as))
    parts = [(np.flatnonzero(~compiled), pricing), (np.flatnonzero(compiled), other)]
    return [(rows, each) for rows, each in parts if len(rows)]


def price_candidates(pricing: Pricing) -> list[PricedLayout]:
    """Every layout of a pricing as an object, by the pricing's software."""
    memory, time = memory_of(pricing), time_of(pricing)
    step, peak, worst = time.total, memory.peak, memory.worst_stage
    by_stage, probability = memory.by_stage, memory.fit_probability
    low, high = step_interval(pricing, time)
    doubt = TENTH * np.take_along_axis(np.broadcast_to(memory.spread, by_stage.shape), worst[None], 0)[0]
    facts, result, on_host = facts_of(pricing.model), list[PricedLayout](), host_bytes(pricing)
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
                software=pricing.software,
                host_bytes=float(on_host[row]),
                facts=facts,
            )
        )
    return result


def mfu_of(model: ModelConfig, layout: Layout, step_s: float, peak_flops_per_s: float) -> float:
    """Model FLOPs of a step (`ModelConfig.flops_per_token`) over what the devices could do in its time."""
    tokens = layout.global_batch * layout.seq_len
    return tokens * model.flops_per_token(layout.seq_len) / (step_s * peak_flops_per_s * layout.world_size)
