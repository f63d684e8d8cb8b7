"""What ranks decide together: each of them sees the same, and none waits in a collective for a long work of another."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fourfold.launch.training.agreement import on_rank_0
from fourfold.launch.training.places import check_shared


def long_work() -> tuple[str, float, float]:
    """The answer, when rank 0's work ended, and when this rank went into the collective."""
    ended, entered = [0.0], [0.0]
    plain = dist.broadcast_object_list

    def work() -> str:
        time.sleep(0.6)
        ended[0] = time.time()
        return "done"

    def broadcast(*arguments: object, **options: object) -> None:
        entered[0] = time.time()
        plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast_object_list", broadcast)
        answer = on_rank_0(work, long=True)
    return answer, ended[0], entered[0]


def test_a_long_work_is_not_waited_for_in_a_collective(ranks):
    for _ in range(2):  # each has an end of its own
        told = ranks(2)(long_work)
        assert [answer for answer, _, _ in told] == ["done", "done"]
        assert told[1][2] >= told[0][1]


def failing() -> str:
    def work() -> None:
        raise OSError("no such thing")

    with pytest.raises(ValueError, match="no such thing") as error:
        on_rank_0(work, long=True)
    return str(error.value)


def test_a_failure_of_it_is_everybody_s(ranks):
    assert ranks(2)(failing) == ["no such thing"] * 2


def on_disks_of_their_own(folder: str) -> str:
    """What each rank says where rank 1's folder is another one."""
    shared = Path(folder) / "shared"
    if dist.get_rank() == 0:
        shared.mkdir()
    dist.barrier()
    check_shared(shared)
    own = Path(folder) / f"of_rank_{dist.get_rank()}"
    own.mkdir()
    with pytest.raises(ValueError, match="do not see what rank 0 writes there") as error:
        check_shared(own)
    dist.barrier()
    return f"{str(error.value).split(': ', 1)[1]} {sorted(path.name for path in Path(folder).rglob('.*'))}"


def test_a_folder_that_is_not_shared_is_refused_before_it_is_used(ranks, tmp_path):
    first, second = ranks(2)(on_disks_of_their_own, str(tmp_path))
    assert first == second
    assert first.startswith(
        "ranks 1 do not see what rank 0 writes there: give a folder on a file system that all hosts"
    )
    assert first.endswith(" []")
