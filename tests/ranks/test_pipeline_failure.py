"""A stage that is killed in mid-stream ends the others soon, with a message that names it."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pipeline_models
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankFailure
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop

NUM_STAGES = 4


def train_until_killed(rank: int, victim: int, folder: str, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # Ten minutes: what ends the ranks in time must not be this.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=NUM_STAGES,
        timeout=timedelta(minutes=10),
    )
    trainer = PipelinedBackprop(
        pipeline_models.stages(NUM_STAGES),
        group=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        loss_fn=F.cross_entropy,
        mitigation="none",
    )

    def stream():
        for number in range(10**9):
            if number == 20 and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pipeline_models.batches(1)[0]

    try:
        trainer.run(stream())
    except RuntimeError as error:
        pipe.send((type(error).__name__, str(error)))
        pipe.close()


def wait_for_a_silent_stage() -> None:
    def never(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        time.sleep(600)
        return F.cross_entropy(output, target)

    PipelinedBackprop(
        pipeline_models.stages(2),
        group=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        loss_fn=never,
        mitigation="none",
        timeout_s=3.0 if dist.get_rank() == 0 else None,
    ).run(pipeline_models.batches(4))


def test_a_silent_stage_is_given_up_in_time(ranks):
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 0 of 2.*PipelineError: stage 1 \(rank 1\) sent nothing in time"):
        ranks(2)(wait_for_a_silent_stage)
    assert time.monotonic() - start < 60  # the group's own timeout is 120 s


@pytest.mark.parametrize("victim", [2])
def test_a_killed_stage_is_named_by_all_others(tmp_path: Path, victim):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.tensor"])
    processes, pipes = [], []
    for rank in range(NUM_STAGES):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=train_until_killed, args=(rank, victim, str(tmp_path), theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        start = time.monotonic()
        for rank, pipe in enumerate(pipes):
            if rank == victim:
                continue
            assert pipe.poll(max(0.0, start + 60 - time.monotonic())), f"stage {rank} hangs"
            kind, message = pipe.recv()
            assert kind == "PipelineError"
            assert f"stage {victim} (rank {victim})" in message, message
    finally:
        for process in processes:
            process.kill()
            process.join()
