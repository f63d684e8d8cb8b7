"""A pool of gloo ranks that outlives single tests.

Starting a rank costs seconds, so a world of each size starts once a session, from a fork server that has torch and
transformers loaded, and then runs one test body after another. A body is a function at module level; it is called as
`body(*args)` on every rank with `torch.distributed` initialised, and its returned values come back in rank order.

The first rank that raises ends the call: its own traceback is shown, the other ranks (which may be waiting for it) are
killed, and the next call starts a fresh world. So does one after a world has gathered too many threads.
"""

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from support.fork_server import fork_server, keep_what_was_loaded

# Of one rank. gloo keeps a group's threads for as long as the process lives, each wakes up many times a second, and
# every mesh that a body makes has several groups: after some hundred bodies the threads alone fill the machine. Fewer
# would start a world anew every few bodies, and a new rank makes all of DTensor's plans again.
MOST_THREADS = 128
STARTING_S = 240.0


class RankFailure(AssertionError):
    """One rank's exception, with that rank's traceback as the message."""


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    """Join the world, then run bodies until the pipe closes."""
    keep_what_was_loaded()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            path, body, args = pipe.recv()
            sys.path[:] = path
            torch.manual_seed(0)
            try:
                answer: tuple[bool, Any] = (True, body(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send((*answer, len(os.listdir("/proc/self/task"))))


class RankPool:
    """A world of `world_size` gloo ranks, started on first use."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __call__(self, body: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Run `body(*args)` on every rank and return the results in rank order.

        Args:
            timeout_s: for the body alone, not for starting the ranks, which takes as long as the machine is busy.
        Raises:
            RankFailure: with the traceback of the first rank that raised, died, or was late.
        """
        if not self._processes:
            self._start()
        results: dict[int, Any] = {}
        num_threads = 0
        deadline = time.monotonic() + timeout_s
        try:
            for pipe in self._pipes:
                # A Connection pickles with the reducer of its own module: plain functions go by reference.
                pipe.send((list(sys.path), body, args))
            while len(results) < self.world_size:
                waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RankFailure(f"ranks {sorted(waiting.values())} gave no answer within {timeout_s} s")
                for pipe in ready:
                    rank = waiting[pipe]  # type: ignore[index]
                    try:
                        succeeded, value, threads = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        raise RankFailure(f"rank {rank} of {self.world_size} died without an answer") from None
                    if not succeeded:
                        raise RankFailure(f"rank {rank} of {self.world_size} raised\n{value}")
                    results[rank] = value
                    num_threads = max(num_threads, threads)
        except BaseException:
            self.close()
            raise
        if num_threads > MOST_THREADS:
            self.close()
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        context = fork_server()
        rendezvous = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "rendezvous")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(STARTING_S):
                    raise RankFailure(f"rank {rank} of {self.world_size} has not started within {STARTING_S} s")
                pipe.recv()
        except BaseException as error:
            self.close()
            if isinstance(error, EOFError):
                raise RankFailure(f"rank {rank} of {self.world_size} died as it started") from None
            raise

    def close(self) -> None:
        """Kill the ranks; the next call starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


class RankPools:
    """A pool a world size, started when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}
        self._asked_for: set[int] = set()

    def __call__(self, world_size: int) -> RankPool:
        self._asked_for.add(world_size)
        return self._pools.setdefault(world_size, RankPool(world_size))

    def close_unused(self) -> None:
        """Close the worlds that nobody asked for since the last call: idle ranks' threads still wake up."""
        for world_size in self._pools.keys() - self._asked_for:
            self._pools[world_size].close()
        self._asked_for.clear()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
