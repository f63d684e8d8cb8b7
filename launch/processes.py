"""Starts the ranks of one machine and waits for them, through torch's elastic agent.

The agent is torchrun's own: it starts a process a rank, ends the others when one fails, and forwards signals. Here the
first failure becomes one exception with that rank's own traceback.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fourfold.launch.refusal import says_neighbour_lost

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


LAUNCHER = "FOURFOLD_LAUNCHER"
"""Environment variable with the number of the process that started a rank of this machine."""


class RankFailure(RuntimeError):
    """A rank failed and the others have been ended; the message holds the rank's traceback.

    Attributes:
        exit_code: the rank's; 2 where it refused its input and has said why.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start_ranks(module: str, arguments: Sequence[str], *, num_ranks: int, device_type: str) -> None:
    """Run `python -m module arguments` as `num_ranks` ranks of this machine and wait until all have ended.

    Args:
        device_type: "cpu" ranks compute with one thread each, so that they share the cores evenly.
    Raises:
        RankFailure: one failed; the rest have been ended.
    """
    # Not at the top: the command line imports this file, and does not wait for torch to print its help.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if device_type == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # One machine: without this, gloo, which GPUs' ranks have beside NCCL, looks up the host's own name, which may
        # not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ[LAUNCHER] = str(os.getpid())
    # torch's profiler, which counts memory on CPUs, logs its start and stop below this level, and DTensor's unused
    # results are warned of at exit below this one.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A rank that was stopped (SIGSTOP) does not see the signal that ends the others: it is killed this much later.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    # The agent's own account of a failure; RankFailure tells it once, with the traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=module,
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as failure:
        rank, first = min(failure.failures.items(), key=lambda failed: (_follows(failed[1]), failed[1].timestamp))
        raise RankFailure(f"rank {rank} of {num_ranks} failed: {_reason(first)}", first.exitcode) from None
    finally:
        os.environ.pop(LAUNCHER, None)


def _follows(failure: "ProcessFailure") -> bool:
    """Whether the rank ended because another had: it lost it, or the agent ended it.

    The time alone does not tell: it is in whole seconds, and that of a rank without a traceback (killed, or refused)
    is when the agent looked, by which the ranks that lost it may have left theirs.
    """
    told: Any = failure.message
    error = told.get("message") if isinstance(told, dict) else told  # without its traceback's lines of code
    return failure.exitcode == -signal.SIGTERM or says_neighbour_lost(str(error))


def _reason(failure: "ProcessFailure") -> str:
    """The rank's traceback where it left one, else how it ended."""
    told: Any = failure.message
    if isinstance(told, dict):
        return str(told.get("extraInfo", {}).get("py_callstack") or told.get("message"))
    return told if isinstance(told, str) else f"exit code {failure.exitcode}"
