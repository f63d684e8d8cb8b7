"""A stage's weights and its optimizer put together: which weights there are, and which forwards and backwards read."""

from collections.abc import Sequence

from torch import Tensor

from fourfold.parallel.pipeline.local_parts import local_parts
from fourfold.parallel.pipeline.masters import MasterWeights
from fourfold.parallel.pipeline.optimizer import DelayedOptimizer, OptimizerFactory, check_turned

Weights = list[Tensor] | None  # None: the present ones


def attach(
    masters: MasterWeights, factory: OptimizerFactory, *, delayed: dict[str, object], separate: bool
) -> DelayedOptimizer:
    """The delayed optimizer over `masters`, and their storage shared where nothing asks for two places.

    Args:
        delayed: delay, mitigation and lag_updates for DelayedOptimizer.
        separate: keep the masters apart in any case.
    Raises:
        ValueError: as MasterWeights.own and DelayedOptimizer; on every replica, where the optimizer is sharded.
    """

    made: list[DelayedOptimizer] = []

    def make() -> list[str]:
        """Returns the parameters' names in the order of the optimizers."""
        made.append(DelayedOptimizer(masters.own(factory), part=masters.shards is not None, **delayed))  # type: ignore[arg-type]
        return masters.own_names

    if masters.shards is None:
        make()
    else:
        masters.shards.follow(masters.shards.do_together(make))
        masters.follow_owners()
        check_turned(masters.shards.told(made[0].kinds))
    optimizer = made[0]
    masters.separate = masters.separate or separate or optimizer.predicts or optimizer.corrects
    masters.share()
    return optimizer


def weights_to_read(masters: MasterWeights, optimizer: DelayedOptimizer, *, stashes: bool) -> tuple[Weights, Weights]:
    """What forwards, and where the optimizer is sharded backwards, should read from now to the next update.

    Every replica calls after an update or at the start of a run, when all are known to be at the same point; at a
    backward they are not. Elsewhere backwards ask the optimizer, which makes their weights when they are needed.

    Args:
        stashes: backwards read what is kept of their forwards.
    Cost: where the optimizer is sharded, the weights are gathered for each of the two that is not the present ones.
    """
    forward, shards = optimizer.forward_weights(), masters.shards
    if shards is None:
        return None if forward is None else local_parts(forward), None

    def gathered(own: Sequence[Tensor] | None) -> Weights:
        return None if own is None else shards.gathered(own, masters.live)

    backward = (optimizer.backward_weights() or masters.masters) if optimizer.corrects and not stashes else None
    return gathered(forward), gathered(backward)
