"""What a rank raises and tells the others when a stage, or a replica of one, is gone."""

from typing import Any

import torch.distributed as dist


class PipelineError(RuntimeError):
    """A stage of the pipeline is gone; the message names it."""


def replica_lost(stage: int, group: dist.ProcessGroup, error: RuntimeError) -> PipelineError:
    """What to raise where the replicas of `stage` could not be reached over their `group`."""
    where = f"stage {stage} stops at averaging over its replicas"
    return member_lost(where, f"a replica of stage {stage}", group, error)


def member_lost(where: str, who: str, group: dist.ProcessGroup, error: RuntimeError) -> PipelineError:
    """What to raise where a collective of `group` failed: `where`, and that `who` is gone unless something else did."""
    ranks = dist.get_process_group_ranks(group)
    cause = read_note()
    if not cause:
        cause = f"{who} is gone (one of ranks {', '.join(map(str, ranks))})"
        if "timed out" not in str(error).lower():
            leave_note(f"{cause}, says rank {dist.get_rank()}")
    return PipelineError(f"{where}: {cause} ({error})")


def _store() -> Any:
    # Private, but the only way to the store that all ranks already share.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


# One note for all pipelines of a world: its replicas end together, and the first to notice saw the cause.
_NOTE = "fourfold/pipeline/failed"


def leave_note(text: str) -> None:
    """Tell all ranks what failed: others may notice only that a neighbour left. The first note stays."""
    try:
        _store().compare_set(_NOTE, "", text)
    except Exception:  # the store may have died with the rank that held it; the neighbours' own messages remain
        return


def read_note() -> str:
    """What failed first; empty where nothing is known to have."""
    try:
        store = _store()
        return store.get(_NOTE).decode() if store.check([_NOTE]) else ""
    except Exception:
        return ""
