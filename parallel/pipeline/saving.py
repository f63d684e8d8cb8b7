"""What a stage saves between two runs, whole or by the names of its parameters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourfold.parallel.gradients import local_part

if TYPE_CHECKING:
    from fourfold.parallel.pipeline.stage import PipelineStage


def state_of(stage: "PipelineStage") -> dict[str, Any]:
    """All that the next run of `stage` depends on."""
    stage.weights.take_changes()
    schedulers = [scheduler.state_dict() for scheduler in stage.schedulers]
    state = {
        "stage": stage.index,
        "module": stage.module.state_dict(),
        "optimizer": None if stage.optimizer is None else stage.optimizer.state_dict(),
        "scheduler": (schedulers[0] if len(schedulers) == 1 else schedulers) if schedulers else None,
        "num_forwards": stage.num_forwards,
        "num_updates": stage.num_updates,
        "norms": dict(stage.norms),
    }
    if stage.weights.narrower:
        state["masters"] = [master.detach().clone() for master in stage.weights.masters]
    if stage.weights.shards is not None:
        state["owned"] = _place(stage)
    return state


def _place(stage: "PipelineStage") -> dict[str, Any] | None:
    """Which part of the stage's optimizer this is; None for all of it."""
    shards = stage.weights.shards
    if shards is None:
        return None
    return {"replica": shards.replica, "of": shards.num_replicas, "names": list(stage.weights.own_names)}


def load(stage: "PipelineStage", state: dict[str, Any]) -> None:
    """Raises ValueError for the state of another stage, module, optimizer or scheduler; then nothing is loaded."""
    _check_state(stage, state)
    stage.module.load_state_dict(state["module"])
    stage.num_forwards, stage.num_updates = state["num_forwards"], state["num_updates"]
    stage.norms = dict(state["norms"])
    if stage.optimizer is not None:
        stage.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for master, saved in zip(stage.weights.masters, state.get("masters", stage.weights.own_live), strict=True):
                local_part(master).data.copy_(local_part(saved))
        stage.weights.take_others_from_module()
        stage.weights.note()
    states = state["scheduler"] if len(stage.schedulers) > 1 else [state["scheduler"]] * len(stage.schedulers)
    for scheduler, own in zip(stage.schedulers, states, strict=True):
        scheduler.load_state_dict(own)


def _told(place: dict[str, Any] | None) -> str:
    if place is None:
        return "a whole optimizer"
    names = ", ".join([*place["names"][:3], "..."][: len(place["names"])]) or "nothing"
    return f"replica {place['replica']} of {place['of']}, which owns {names}"


def _check_state(stage: "PipelineStage", state: dict[str, Any]) -> None:
    if not isinstance(state, dict) or "stage" not in state or "module" not in state:
        raise ValueError(f"stage {stage.index}: this is no state of a stage: give what state_dict returned")
    if state["stage"] != stage.index:
        raise ValueError(f"this is the state of stage {state['stage']}, not of stage {stage.index}")
    if state.get("owned") != _place(stage):
        raise ValueError(
            f"stage {stage.index}: this is the state of {_told(state.get('owned'))}, not of {_told(_place(stage))}: "
            "load on every replica what it saved itself, with the same shard_optimizer and as many replicas; for "
            "others save by the parameters' names (optimizer_parameters)"
        )
    saved, own = _shapes(state["module"]), _shapes(stage.module.state_dict())
    if unlike := [name for name in {**saved, **own} if saved.get(name) != own.get(name)]:
        name = unlike[0]
        raise ValueError(
            f"stage {stage.index}: the state is of another module: {name} is {saved.get(name, 'absent')} there, "
            f"{own.get(name, 'absent')} here"
        )
    theirs = None if state["optimizer"] is None else state["optimizer"].get("classes")
    ours = None if stage.optimizer is None else stage.optimizer.classes
    known = theirs is not None or state["optimizer"] is None  # states from before these were saved have none
    if known and theirs != ours:
        raise ValueError(
            f"stage {stage.index}: the state is of the optimizers {theirs}, this stage has {ours}: make the pipeline "
            "with the same, and the same weights frozen"
        )
    if (state["scheduler"] is None) != (not stage.schedulers):
        raise ValueError(
            f"stage {stage.index}: the state was saved {'without' if state['scheduler'] is None else 'with'} a "
            "learning-rate scheduler: make the pipeline in the same way"
        )


def _shapes(module: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value.shape) if isinstance(value, Tensor) else "no tensor" for name, value in module.items()}


def remembered(stage: "PipelineStage", *, blank: bool) -> dict[str, Tensor]:
    """What the answers to delay keep, as "kind.NAME of the parameter", and the norms to clip by.

    Args:
        blank: zeros for all that there may be.
    """
    kinds = {} if stage.optimizer is None else stage.optimizer.remembered(blank=blank)
    named = {
        f"{kind}.{name}": tensor
        for kind, tensors in kinds.items()
        for name, tensor in zip(stage.weights.own_names, tensors, strict=True)
    }
    if lag := _lag_of(stage):
        rows = list(stage.norms.items())
        # An update is never negative: such a row is none.
        rows += [(-1, 0.0)] * (lag - len(rows))
        named[f"norms{lag}"] = torch.tensor(rows[:lag], dtype=torch.float64, device="cpu")
    return named


def take_norms(stage: "PipelineStage", named: dict[str, Tensor]) -> None:
    """The norms to clip by from what `remembered` returned; none where they were kept for another lag."""
    stage.norms.clear()
    rows = named.get(f"norms{_lag_of(stage)}")
    stage.norms.update({int(update): norm for update, norm in ([] if rows is None else rows.tolist()) if update >= 0})


def _lag_of(stage: "PipelineStage") -> int:
    clipping = stage.settings.clipping
    return 0 if clipping is None else clipping.lag_updates


def by_kind(named: dict[str, Tensor], names: Sequence[str]) -> dict[str, list[Tensor]]:
    """The inverse of `remembered`, for the parameters `names`, without the kinds that lack some of them."""
    return {
        kind: [named[f"{kind}.{name}"] for name in names]
        for kind in {name.split(".", 1)[0] for name in named if "." in name}
        if all(f"{kind}.{name}" in named for name in names)
    }
