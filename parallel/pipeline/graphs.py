"""What the autograd graph of a stage's first forward tells about weights that would not train as they should."""

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor

_CASTS = ("ToCopyBackward0",)


def check_graph(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], live: Sequence[Tensor], stage: int, *, casts: bool
) -> None:
    """Refuse weights in the graph that no optimizer of this stage owns, and weights that the graph keeps as casts.

    A weight of another stage (a head that reads the embedding without owning it) or of the loss would get gradients
    that nobody applies.

    Args:
        outputs: of the stage, or its loss.
        inputs, live: the leaves that are expected.
        casts: refuse weights that are cast to another precision, as under an autocast inside the module.
    Raises:
        ValueError: with the shape of the weight.
    Cost: a walk over the graph, once a run. What a reentrant checkpoint or sharded weights hide is not seen.
    """
    if any(isinstance(p, DTensor) for p in live):
        return
    known = {id(tensor) for tensor in (*inputs, *live)}
    trained = {id(tensor) for tensor in live}
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise ValueError(
                    f"stage {stage} computes with a trained weight of shape {list(leaf.shape)} that is not among its "
                    "module's parameters (another stage's, or the loss function's own?), so that no optimizer here "
                    "would update it: make it a parameter of the stage, or detach it"
                )
            if casts and leaf is not None and id(leaf) in trained and node.name() in _CASTS:
                raise ValueError(
                    f"stage {stage}: spectrain and pipemare-dc compute backwards with weights of their own, but the "
                    f"module casts a weight of shape {list(leaf.shape)} (an autocast inside it?), and the graph keeps "
                    "the forward's: choose stash or lwpv+sc, or leave the cast off"
                )
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def reached(outputs: Iterable[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Those of `leaves` that the graphs of `outputs` reach. Cost: a walk over the graphs."""
    nodes = nodes_below(output.grad_fn for output in outputs)
    found = {id(getattr(node, "variable", None)) for node in nodes}
    return [leaf for leaf in leaves if id(leaf) in found]


def nodes_below(nodes: Iterable[Node | None]) -> set[Node]:
    """The given nodes of an autograd graph and all that follow them in a backward. Cost: a walk over the graph."""
    waiting = [node for node in nodes if node is not None]
    seen = set(waiting)
    while waiting:
        following = {each for each, _ in waiting.pop().next_functions if each is not None} - seen
        seen |= following
        waiting.extend(following)
    return seen
