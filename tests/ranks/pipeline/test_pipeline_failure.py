"""A stage that is killed in mid-stream ends the others soon, its replicas' pipelines too, and all messages name it."""

import os
import re
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import pipeline_models
from support.fork_server import fork_server
from support.rank_pool import STARTING_S, RankFailure
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, init_mesh
from fourfold.parallel.decoder import pipeline_decoder

NUM_RANKS = 4


def joint_decoder(axis: str) -> PipelinedBackprop:
    """2 stages of 2 ranks each, which are of one tp or cp group."""
    mesh = init_mesh(pp=2, device_type="cpu", **{axis: 2})
    return pipeline_decoder(pipeline_models.small_llama(), mesh, seq_len=3, optimizer=torch.optim.AdamW)


def train_until_killed(
    rank: int, victim: int, num_replicas: int, folder: str, pipe: Connection, in_update: bool, axis: str
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # Ten minutes: what ends the ranks in time must not be this.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(minutes=10),
    )
    pipe.send("started")
    num_stages = NUM_RANKS // num_replicas
    pipelines = [dist.new_group(list(range(start, start + num_stages))) for start in range(0, NUM_RANKS, num_stages)]
    peers = [dist.new_group(list(range(stage, NUM_RANKS, num_stages))) for stage in range(num_stages)]
    updates: list[int] = []

    def made(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.01)

        def killed(*_: object) -> None:
            updates.append(1)
            if in_update and len(updates) == 20 and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        optimizer.register_step_post_hook(killed)
        return optimizer

    trainer = (
        joint_decoder(axis)
        if axis
        else PipelinedBackprop(
            pipeline_models.stages(num_stages),
            group=pipelines[rank // num_stages],
            dp_group=peers[rank % num_stages] if num_replicas > 1 else None,
            shard_optimizer=in_update,  # the others then wait for the victim's weights
            optimizer=made,
            loss_fn=F.cross_entropy,
            mitigation="none",
        )
    )
    ids = torch.zeros(1, 3, dtype=torch.int64)

    def stream():
        for number in range(10**9):
            if number == 20 and rank == victim and not in_update:
                os.kill(os.getpid(), signal.SIGKILL)
            yield (ids, ids) if axis else pipeline_models.batches(1)[0]

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
    ranks(2)(dist.get_rank)  # started
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 0 of 2.*PipelineError: stage 1 \(rank 1\) sent nothing in time"):
        ranks(2)(wait_for_a_silent_stage)
    assert time.monotonic() - start < 60  # the group's own timeout is 120 s


@pytest.mark.parametrize(
    ("num_replicas", "victim", "named", "in_update", "axis"),
    [
        (1, 2, r"stage 2 \(rank 2\)", False, ""),
        # who only averages with it cannot know which of the replicas it was
        (2, 3, r"stage 1 (\(rank 3\) )?is gone( \(one of ranks 1, 3\))?", False, ""),
        (2, 3, r"stage 1 (\(rank 3\) )?is gone( \(one of ranks 1, 3\))?", True, ""),
        # a stage is two ranks, of which the other one may be the first to notice
        (1, 3, r"stage 1 (\(rank 3\) )?is gone( \(one of ranks 2, 3\))?", False, "tp"),
        (1, 3, r"stage 1 (\(rank 3\) )?is gone( \(one of ranks 2, 3\))?", False, "cp"),
    ],
)
def test_a_killed_stage_is_named_by_all_others(tmp_path: Path, num_replicas, victim, named, in_update, axis):
    context = fork_server()
    processes, pipes = [], []
    for rank in range(NUM_RANKS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=train_until_killed,
            args=(rank, victim, num_replicas, str(tmp_path), theirs, in_update, axis),
            daemon=True,
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        assert all(pipe.poll(STARTING_S) and pipe.recv() == "started" for pipe in pipes)
        start = time.monotonic()
        for rank, pipe in enumerate(pipes):
            if rank == victim:
                continue
            assert pipe.poll(max(0.0, start + 60 - time.monotonic())), f"rank {rank} hangs"
            kind, message = pipe.recv()
            assert kind == "PipelineError"
            assert re.search(named, message), message
    finally:
        for process in processes:
            process.kill()
            process.join()
