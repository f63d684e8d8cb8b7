"""`python -m MODULE WORDS`, or a script, in a process of its own, from the fork server: without a launcher's seconds.

The process has its own environment, folder, output and exit code, and can be stopped and killed. What is about the
launcher itself starts that for real.
"""

import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from support.fork_server import fork_server, keep_what_was_loaded

TRAIN = "fourfold.launch.train"


class Forked:
    """One process, started on creation; what it says is in the file `log`."""

    def __init__(
        self,
        log: Path,
        module: str,
        words: Sequence[object],
        *,
        before: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        """`module` may be a script's path; `before`, a function at module level, is called in the process first."""
        self.log = log
        self._process: BaseProcess = fork_server().Process(
            target=_run,
            args=(module, [str(word) for word in words], {**os.environ, **environment}, os.getcwd(), log, before),
        )
        self._process.start()
        assert self._process.pid is not None
        self.system = psutil.Process(self._process.pid)

    @property
    def pid(self) -> int:
        return self.system.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """The exit code of a process that ends within `seconds`."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running after {seconds} s\n{self.text()}"
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def text(self) -> str:
        """What it has said so far, on stdout and stderr."""
        return self.log.read_text() if self.log.exists() else ""

    def errors(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("error:")]


def forked_ranks(
    log: Path, num_ranks: int, words: Sequence[object], *, module: str = TRAIN, before: Callable[[], None] | None = None
) -> list[Forked]:
    """The ranks of one training, as a launcher on one host would start them, each with a log of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [
        Forked(
            log.with_name(f"{log.name}{rank}"),
            module,
            words,
            before=before,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
        )
        for rank in range(num_ranks)
    ]


def start_forked_ranks(module: str, arguments: Sequence[str], *, num_ranks: int, device_type: str) -> None:
    """launch.processes.start_ranks without its agent; what the ranks said is printed when all have ended well."""
    assert device_type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        started = forked_ranks(Path(folder) / "rank", num_ranks, arguments, module=module)
        for rank in started:
            assert rank.wait(240.0) == 0, rank.text()
        print(*(rank.text() for rank in started), sep="", end="")


def until_rows(path: Path, rows: int, run: Forked, seconds: float = 240.0) -> None:
    """Wait until metrics.csv has `rows` lines; `run` must not end before."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and len(path.read_text().splitlines()) >= rows):
        assert run.poll() is None, run.text()
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.05)


def _run(
    module: str,
    words: list[str],
    environment: Mapping[str, str],
    folder: str,
    log: Path,
    before: Callable[[], None] | None,
) -> None:
    keep_what_was_loaded()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [module, *words]
    if before is not None:
        before()
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
