"""One outcome on all ranks: where one of them fails, every rank raises the same error, and none waits for it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")

_LOOK_S = 0.1


def gathered(value: Answer, group: dist.ProcessGroup | None = None) -> list[Answer]:
    """Every rank's `value`, in rank order, on every rank; every rank calls. It must pickle.

    Args:
        group: over all ranks; None for the default one.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_0(action: Callable[[], Answer], group: dist.ProcessGroup | None = None, *, long: bool = False) -> Answer:
    """What `action` returned on rank 0, on every rank; every rank calls.

    Args:
        group: as of `gathered`.
        long: it may take longer than a collective may: the others look for its end instead of waiting in one.
    Raises:
        ValueError: `action` raised a ValueError or an OSError; the same message on every rank.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if long:
        _meet_at_the_end()
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    answer: Answer = outcome[0]
    return answer


_num_ends = 0


def _meet_at_the_end() -> None:
    """Return on no rank before rank 0 is here, however long that takes."""
    # Private, but the only way to the store that all ranks already share.
    from torch.distributed.distributed_c10d import _get_default_store

    global _num_ends
    _num_ends += 1
    store, key = _get_default_store(), f"fourfold.agreement.end.{_num_ends}"
    if dist.get_rank() == 0:
        store.set(key, "")
    while not store.check([key]):
        time.sleep(_LOOK_S)
