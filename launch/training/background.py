"""Work that goes on beside the training: one task at a time, on a thread and a process group of its own.

Collectives of two threads on one group would meet each other's messages; on a group of its own a task talks to the same
task on the other ranks, while the training uses the rest. What fails there is raised where the training asks for it.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist


class Background:
    """Runs tasks in turn; every rank makes one, and gives the same tasks in the same order.

    Args:
        timeout_s: of a task's collectives: a rank that does not answer ends the task with an error.
    Cost: a gloo group over all ranks.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        """Of the tasks' collectives."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], object]) -> None:
        """Begin a task; `wait` must have been called since the one before."""
        assert self._thread is None

        def run() -> None:
            try:
                task()
            except BaseException as error:
                self._error = error

        # A daemon: a rank that ends does not wait for what it writes, the file system has the last whole checkpoint.
        self._thread = threading.Thread(target=run, name="background", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the task has ended in an error; of this rank, at this moment."""
        return self._error is not None

    def wait(self) -> None:
        """Until the task, if there is one, has ended. Raises what it raised."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
