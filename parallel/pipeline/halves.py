"""A backward in two halves, as torch.distributed.pipelining splits it: first the inputs' gradients, then the weights'.

Between the two wait groups of weights, each with the nodes of the graph ("intermediates") where the way to its weights
leaves the way to the inputs, and the gradients that have arrived there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fourfold.parallel.pipeline.graphs import nodes_below, reached

Roots = tuple[list[Tensor], list[Tensor] | None]
"""Where a backward starts, and the gradients there; None is 1, of a loss."""


def input_half(
    roots: Sequence[Tensor], seeds: Sequence[Tensor] | None, inputs: Sequence[Tensor], live: Sequence[Tensor],
    stage: int,
) -> tuple[list[dict[str, Any]], Roots]:  # fmt: skip
    """Add to the gradients of `inputs`; returns the groups of weights, and roots that no input reaches.

    Args:
        roots: of the stage's graph. seeds: their gradients; None is 1.
        inputs: leaves, at least one. live: the stage's weights.
        stage: its index, for messages.
    Raises:
        ValueError: weights whose gradients torch before 2.13 cannot compute apart.
    """
    from torch.distributed.pipelining._backward import stage_backward_input

    # Outputs that no input reaches are all weights' half; torch's would lose their gradients.
    apart = [len(roots) > 1 and not reached([root], inputs) for root in roots]
    kept = [at for at, alone in enumerate(apart) if not alone]
    own = [at for at, alone in enumerate(apart) if alone]
    rest = [roots[at] for at in own], None if seeds is None else [seeds[at] for at in own]
    # torch before 2.13 refuses inputs that no output needs.
    needed = reached([roots[at] for at in kept], inputs)
    if not needed:
        return [], rest
    # torch detaches the outputs in place, which autograd refuses for a view.
    halved = [roots[at].clone() if roots[at]._is_view() else roots[at] for at in kept]
    given = None if seeds is None else [seeds[at] for at in kept]
    _, groups = stage_backward_input(halved, given, needed, iter(live))  # type: ignore[arg-type]
    if torch.__version__ < "2.13":
        check_groups(groups, stage)
    return groups, rest


def weight_half(groups: list[dict[str, Any]], live: Sequence[Tensor]) -> None:
    """Add to the gradients of the weights, from where `input_half` left them."""
    from torch.distributed.pipelining._backward import stage_backward_weight

    stage_backward_weight(iter(live), groups)  # type: ignore[arg-type]


def check_groups(groups: Iterable[dict[str, Any]], stage: int) -> None:
    """Refuse weights whose gradients torch before 2.13 would sum wrongly, or not at all.

    It counts a gradient twice where a weight is used again further up, takes the gradients of a node's several outputs
    for those of its first, and cannot start at a node of an own autograd.Function.

    Raises:
        ValueError: with torch's version.
    Cost: a walk over the graph below each weight that is used more than once.
    """
    for group in groups:
        nodes = set(group["intermediates"])
        if any(isinstance(node, BackwardCFunction) for node in nodes):
            what = "has weights that go into an autograd.Function"
        elif any(grad is not None for grads in group["grads"] for grad in grads[1:]):
            what = "has weights that go into an operator of several outputs"
        elif len(nodes) > 1 and nodes & nodes_below(each for node in nodes for each, _ in node.next_functions):
            what = "uses a weight several times, one after the other"
        else:
            continue
        raise ValueError(
            f"stage {stage} {what}, and torch {torch.__version__} cannot compute their gradients apart from the "
            "input's: choose another schedule than zb-h1 and halves of backwards, or torch 2.13 or later"
        )
