"""Where a number that is none came from: the first module whose output, or the first weight that, is not finite.

Run once, after a step has failed: the same batch goes forward again with a hook on every module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.launch.training.agreement import gathered
from fourfold.parallel import ParallelModel
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.gradients import local_part


def first_not_finite(
    model: ParallelModel, ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None
) -> str:
    """What made the NaN or infinity, in a few words, the same on every rank; every rank calls.

    Args:
        ids, labels, document_ids: this rank's rows of the step that failed, as its `forward_backward` had them;
            weights and gradients are still those of it.
    Returns:
        A weight that is not finite itself; else the first module with finite inputs and another output; else the
        gradient nearest to the loss that is not finite, where only the backward pass failed. Empty where all are.
    Cost: one forward pass.
    """
    weight = next((name for name, value in model.named_parameters() if not _finite(value)), "")
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_looking(name, found))
        for name, module in model.stage.named_modules()
        if name and not list(module.children())
    ]
    try:
        model.evaluate(ids, labels, document_ids)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = [name for name, value in model.named_parameters() if value.grad is not None and not _finite(value.grad)]
    place = model.mesh.get_local_rank("pp")
    everyone = sorted(gathered((place, weight, found[:1], gradients[-1:])), key=lambda told: told[0])
    for _, name, _, _ in everyone:
        if name:
            return f"the weights of {name} hold no numbers already"
    for _, _, names, _ in everyone:
        if names:
            return f"first in the output of {names[0]}"
    for _, _, _, names in reversed(everyone):  # the backward pass begins at the last stage
        if names:
            return f"first in the gradient of {names[0]}"
    return ""


def first_not_finite_of_stage(
    stage: DecoderStage, value: Any, of_all: Callable[[Any], list[Any]] = lambda told: [told]
) -> str:
    """The same for one stage of a pipeline that never drains, without the others: empty where nothing is found.

    Args:
        value: what the stage was last called with.
        of_all: what each rank tells that computes the stage together with this one (JointRanks.told); all of them call.
    Cost: one forward pass of the stage.
    """
    if wrong := _first(of_all([name for name, weight in stage.named_parameters() if not _finite(weight)])):
        return f"the weights of {wrong} hold no numbers already"
    parts = list(value.values()) if isinstance(value, dict) else [value]
    if not all(of_all(all(_finite(part) for part in parts if isinstance(part, Tensor)))):
        return "first in a stage before the last"
    found: list[str] = []
    modules = [(name, module) for name, module in stage.named_modules() if name and not list(module.children())]
    hooks = [module.register_forward_hook(_looking(name, found)) for name, module in modules]
    try:
        with torch.no_grad():
            stage(value)
    finally:
        for hook in hooks:
            hook.remove()
    output = _first(of_all(found))
    return f"first in the output of {output}" if output else ""


def _first(names: list[list[str]]) -> str:
    """The first of the names that ranks tell, each in its order; empty where there are none."""
    return next((name for told in names for name in told), "")


def _looking(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else (output,)
        if not found and not all(_finite(part) for part in parts if isinstance(part, Tensor)):
            found.append(name)

    return look


def _finite(value: Tensor) -> bool:
    local = local_part(value)
    return not local.is_floating_point() or bool(torch.isfinite(local).all())
