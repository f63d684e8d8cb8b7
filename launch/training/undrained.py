"""Checkpoints of a pipeline that does not drain for them: what is in flight on each rank, as the bytes of one tensor.

Weights are readable under any layout; micro-batches in flight go on only where they were. So their name in a checkpoint
says of which layout, replica and stage they are, and every rank sees alike, from the names, whether it can go on.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.cost.asynchronous import schedule_of
from fourfold.layouts.inputs.layout import Layout

_PREFIX = "in_flight."


def check_in_flight(layout: Layout, settings: TrainSettings) -> None:
    """Refuse to keep micro-batches in flight over checkpoints where there are none, or before a stage has learned.

    Raises:
        ValueError: naming what to choose.
    """
    if not settings.checkpoints_in_flight:
        return
    if not layout.asynchronous:
        raise ValueError(
            f"checkpoints_in_flight with schedule={layout.schedule!r}, which drains at every step: leave it out"
        )
    if layout.tp > 1:
        raise ValueError(
            f"checkpoints_in_flight with tp={layout.tp}: that such a run goes on to the bit has not been shown; choose "
            "tp=1, or leave checkpoints_in_flight out"
        )
    every, schedule = settings.checkpoint_every, schedule_of(layout)
    if every == 0:
        raise ValueError(
            "checkpoints_in_flight with checkpoint_every=0: there are no checkpoints; give checkpoint_every, or leave "
            "it out"
        )
    # Before its first update a stage has no optimizer states, and torch would make some up to save them.
    needed = schedule.warm_up(0) + schedule.update_every
    if every < settings.steps and every * layout.num_micro_batches < needed:
        raise ValueError(
            f"checkpoints_in_flight with checkpoint_every={every}: the first stage makes its first update after "
            f"{needed} micro-batches, and a step has {layout.num_micro_batches}; give checkpoint_every of at least "
            f"{-(-needed // layout.num_micro_batches)}"
        )


def name_in_flight(layout: Layout, mesh: DeviceMesh) -> str:
    """What a checkpoint calls this rank's micro-batches in flight."""
    place = f"dp{mesh.get_local_rank('dp')}.pp{mesh.get_local_rank('pp')}"
    if layout.cp > 1:  # the ranks of a ring have each their share
        place += f"-cp{mesh.get_local_rank('cp')}"
    return f"{_PREFIX}{layout}, {layout.global_batch} rows of {layout.seq_len}.{place}"


def other_layout(saved: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The layout whose micro-batches in flight a checkpoint holds, where it is not the one that asks for them.

    Args:
        saved, wanted: names of tensors in the checkpoint, and of those that this rank asks for.
    """
    theirs, own = ({_layout_in(name) for name in names if name.startswith(_PREFIX)} for names in (saved, wanted))
    return next(iter(theirs - own), None)


def make_room(extra: dict[str, Tensor], sizes: Mapping[str, Any]) -> None:
    """Give the tensors of `extra` that are for micro-batches in flight the `sizes` that were written, by name."""
    for name in extra:
        if name.startswith(_PREFIX):
            extra[name] = torch.empty(sizes[name], dtype=torch.uint8)


def as_bytes(state: dict[str, Any]) -> Tensor:
    """A state of tensors and plain values as one tensor, [bytes] uint8 on the host."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def from_bytes(saved: Tensor, device: torch.device) -> dict[str, Any]:
    """The inverse of `as_bytes`; what was on a device is on `device`, the rest on the host."""

    def placed(storage: Any, place: str) -> Any:
        return storage if place == "cpu" else storage.to(device=device)

    state: dict[str, Any] = torch.load(io.BytesIO(saved.numpy().tobytes()), map_location=placed, weights_only=True)
    return state


def _layout_in(name: str) -> str:
    return name.removeprefix(_PREFIX).rsplit(".", 2)[0]
