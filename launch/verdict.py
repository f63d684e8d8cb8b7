"""What a training took against what its plan said, in a few lines: both peaks, and where a slow step lost its time.

A plan prices terms (compute, communication by axis, launches), a training times phases (data, forward and backward,
clipping, the update). A phase holds the terms that it is made of, so a step that is slower than planned is told by the
phases that took longer, each with the terms that the plan had in it.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from fourfold.launch.runs import typical_step_s
from fourfold.layouts.cost.price import GIB
from fourfold.layouts.inputs.reading import number
from fourfold.layouts.output.tables import seconds_text
from fourfold.layouts.search.explain import TERMS

SLOWER = 0.15
"""Relative difference from which on a step counts as slower than planned."""
TOLD_SHARE = 0.2
"""Of what a step took longer: a phase that makes less of it is not named."""
PHASES = {
    "data and its batch": ("data_s",), "forward and backward": ("forward_backward_s",),
    "clipping and update": ("clip_s", "update_s"),
}  # fmt: skip
"""A training's phases as they are told."""
_UPDATE = ("optimizer",)


def read_phases(folder: Path) -> dict[str, float]:
    """Seconds of a typical step by phase, from a run's log.jsonl; empty where it has none.

    The median of the steps without the first quarter, as for the step itself.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        return {}
    events: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # a run that was killed may leave half a line
            events.append(json.loads(line))
    starts = [index for index, event in enumerate(events) if event.get("event") == "start"]
    steps = [event for event in events[starts[-1] if starts else 0 :] if event.get("event") == "step"]
    typical = steps[len(steps) // 4 :]
    names = [name for phase in PHASES.values() for name in phase]
    if not typical or any(not isinstance(step.get(name), int | float) for step in typical for name in names):
        return {}
    return {words: sum(median(step[name] for step in typical) for name in phase) for words, phase in PHASES.items()}


def checked_prediction(prediction: Mapping[str, Any], where: str) -> dict[str, Any]:
    """[prediction] of layout.toml as `verdict` takes it: cluster, and step_s, peak_gib, terms_s where they are there.

    Raises:
        ValueError: a figure that is no finite number, or a term that no step has.
    """
    said: dict[str, Any] = {
        name: number(prediction[name], f"{where}: [prediction] {name}")
        for name in ("step_s", "peak_gib")
        if name in prediction
    }
    terms = prediction.get("terms_s", {})
    if not isinstance(terms, Mapping) or not set(terms) <= set(TERMS):
        raise ValueError(f"{where}: [prediction] terms_s: it is a table of {', '.join(TERMS)}")
    checked = {name: number(terms[name], f"{where}: [prediction.terms_s] {name}", zero=True) for name in terms}
    return {**said, **({"terms_s": checked} if checked else {}), "cluster": str(prediction.get("cluster", ""))}


def verdict(prediction: Mapping[str, Any], result: Mapping[str, Any], phases: Mapping[str, float]) -> list[str]:
    """Lines that tell a training's step and memory, beside what was planned.

    Args:
        prediction: as `checked_prediction` gives it; empty where nothing was planned.
        result: a run's result.json.
        phases: as `read_phases` gives them.
    """
    step_s = typical_step_s(result["steps_s"])
    planned_s, planned_gib = prediction.get("step_s"), prediction.get("peak_gib")
    took = f"a step took {seconds_text(step_s)}"
    if planned_s:
        took += f" (planned {seconds_text(planned_s)}, {step_s / planned_s - 1:+.0%})"
    held = f"tensors held {result['peak_bytes'] / GIB:.3g} GiB at most"
    if planned_gib:
        held += f" (planned {planned_gib:.3g}, {result['peak_bytes'] / GIB / planned_gib - 1:+.0%})"
    if result.get("reserved_bytes"):
        held += f", for which the allocator took {result['reserved_bytes'] / GIB:.3g} GiB from the device"
    lines = [f"{took}; {held}"]
    if planned_s and step_s > (1 + SLOWER) * planned_s:
        lines.append(_where_it_went(step_s, prediction, phases))
    return lines


def _where_it_went(step_s: float, prediction: Mapping[str, Any], phases: Mapping[str, float]) -> str:
    """Of a step that is slower than planned: the phases that took longer, and the terms that the plan had in them."""
    planned_s, terms = prediction["step_s"], prediction.get("terms_s", {})
    on = f" on {prediction['cluster']}" if prediction.get("cluster") else ""
    slower = f"{step_s / planned_s - 1:.0%} slower than planned{on}"
    if not phases or not terms:
        return f"{slower}; in which phase it is, this run cannot tell"
    inside = {
        "data and its batch": [], "forward and backward": [name for name in terms if name not in _UPDATE],
        "clipping and update": [name for name in terms if name in _UPDATE],
    }  # fmt: skip
    more = {phase: phases[phase] - sum(terms[name] for name in inside[phase]) for phase in phases}
    lost = sum(seconds for seconds in more.values() if seconds > 0)
    told = [
        f"{words} {seconds_text(phases[words])} instead of {_planned(inside[words], terms)}"
        for words, seconds in sorted(more.items(), key=lambda item: -item[1])
        if seconds > 0 and seconds >= TOLD_SHARE * lost
    ]
    return f"{slower}: {'; '.join(told)}" if told else slower


def _planned(names: Sequence[str], terms: Mapping[str, float]) -> str:
    """What a plan had in a phase, with its largest terms."""
    whole = sum(terms[name] for name in names)
    if not whole:
        return "next to nothing"
    largest = [name for name in sorted(names, key=lambda name: -terms[name]) if terms[name] >= 0.05 * whole]
    return f"{seconds_text(whole)} ({', '.join(f'{TERMS[name]} {seconds_text(terms[name])}' for name in largest)})"
