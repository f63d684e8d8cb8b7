"""Starts the ranks of a profile on this machine, by torch's elastic launch API."""

import os
import socket
import sys
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fourfold.profiling.hardware import default_num_ranks
from fourfold.profiling.settings import ProfileSettings
from fourfold.profiling.shapes import model_shape, read_config


class ProfileFailure(RuntimeError):
    """A rank failed; the message holds its traceback."""


def profile_here(settings: ProfileSettings, *, num_ranks: int | None = None) -> None:
    """Measure this machine with one rank a GPU, or one a physical core, and write `settings.out`.

    Args:
        num_ranks: another number of ranks; None takes all GPUs, or the physical cores and at most 4.
    Raises:
        ValueError: a number of ranks that this machine cannot run.
        ProfileFailure: a rank failed; the others have been ended.
    Cost: `settings.seconds`, and some seconds to start the ranks.
    """
    device_type = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = default_num_ranks(device_type)
    if num_ranks is None:
        num_ranks = available
    if num_ranks < 1 or (device_type == "cuda" and num_ranks > available):
        raise ValueError(f"--ranks {num_ranks}: this machine has {available} CUDA devices; start between 1 and that")
    if settings.model:
        model_shape(read_config(settings.model))  # a broken config is told here, not by a rank's traceback
    if device_type == "cpu" and any(name == "lo" for _, name in socket.if_nameindex()):
        # One machine: without this, gloo looks the host's own name up, which may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    start_ranks(["-m", "fourfold.profiling.run", *settings.arguments()], num_ranks)


def start_ranks(arguments: list[str], num_ranks: int) -> None:
    """Run `python *arguments` as `num_ranks` ranks of this host, and wait for them.

    Raises:
        ProfileFailure: with the traceback of the first rank that failed; the others have been ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="profile",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        message: Any = first.message  # a table where the rank recorded its exception, else words
        if isinstance(message, dict):
            message = message["extraInfo"]["py_callstack"]
        raise ProfileFailure(f"rank {rank} of {num_ranks} failed (exit code {first.exitcode})\n{message}") from None
