"""Ends a rank that has nothing left to wait for: its launcher is gone, or no rank makes progress any more.

A launcher that is killed cannot end its ranks, and torch waits half an hour for a rank that was stopped, without a word
on which. Here a thread in every rank looks at two things. Whether the parent process still is the one that started it.
And whether any rank has gone on to another activity within the time allowed; where none has, one rank asks the others
(through the store at which they met) who still answers, and says so.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fourfold.launch.processes import LAUNCHER
from fourfold.launch.refusal import EXIT_REFUSED, EXIT_TOLD

_LOOK_S = 0.5
_BEAT_S = 2.0
_STOPPED_S = 10.0
"""A thread that sleeps half a second and wakes so much later was stopped itself, with its process."""


class Activity:
    """What this rank is doing now, in a user's words; every change of them is progress."""

    def __init__(self) -> None:
        self.words = "starting"
        self.since_s = time.monotonic()

    def now(self, words: str) -> None:
        """Another activity begins."""
        self.words, self.since_s = words, time.monotonic()


def watch_launcher(environment: MutableMapping[str, str], started_by: int | None = None) -> None:
    """End this process soon after the launcher that started it, if one did, is gone.

    Args:
        started_by: the parent as this process began; None for its parent now.
    """
    if "TORCHELASTIC_RUN_ID" not in environment and "RANK" not in environment:
        return  # started from a shell, which may go away
    # Importing torch takes seconds in which a launcher can go, too: then the parent is already another process.
    # The variable is this rank's alone: what the rank starts has another parent.
    parent = int(environment.pop(LAUNCHER, started_by or os.getppid()))

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        if environment.get("RANK", "0") == "0":
            _tell("the launcher of these ranks is gone: they end, too; go on with --resume auto")
        os._exit(EXIT_TOLD)

    threading.Thread(target=look, name="launcher watch", daemon=True).start()


@contextlib.contextmanager
def bounded_meeting(*, timeout_s: float) -> Iterator[None]:
    """End this process where the ranks do not meet in time; in a `with` around their meeting.

    torch's own limit does not hold where another program took the port and says nothing.
    """
    met = threading.Event()

    def look() -> None:
        if not met.wait(timeout_s):
            where, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            _tell(
                f"rank {os.environ.get('RANK', '0')} has met no others at {where}, port {port}, for {timeout_s:.0f} s: "
                "see that every rank was started, or give another MASTER_PORT"
            )
            os._exit(EXIT_REFUSED)

    threading.Thread(target=look, name="meeting watch", daemon=True).start()
    try:
        yield
    finally:
        met.set()


class HangWatch:
    """Ends this rank when no rank has gone on to another activity within the time allowed; names who does not answer.

    Made after torch.distributed was started, by every rank.

    Args:
        timeout_s: the longest that one activity may take.
    Cost: a thread, a connection to the store, and a message of some hundred bytes every two seconds.
    """

    def __init__(self, activity: Activity, *, timeout_s: float) -> None:
        self._activity, self._timeout_s = activity, timeout_s
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._beat_s = min(_BEAT_S, timeout_s / 4)
        self._beats = 0
        self._told_since_s, self._progress, self._last_progress_s = 0.0, -1, time.monotonic()
        self._process = (os.getpid(), socket.gethostname())
        self._store = self._connect()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="hang watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The training has ended; nothing more is watched."""
        self._ended.set()
        self._thread.join()

    def _connect(self) -> Store | None:
        """A connection of its own: the main thread may wait on torch's for a long time."""
        if self._world_size == 1:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=max(5.0, 2 * self._beat_s))
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"fourfold.hang_watch.{attempt}", store)

    def _look(self) -> None:
        woke = last_beat = time.monotonic()
        self._beat()
        while not self._ended.wait(min(_LOOK_S, self._beat_s)):
            now = time.monotonic()
            if now - woke > _STOPPED_S:  # the whole job was suspended, and goes on
                self._last_progress_s = now
            woke = now
            if now - last_beat >= self._beat_s:
                self._beat()
                last_beat = now
            self._last_progress_s = max(self._last_progress_s, self._activity.since_s)
            if now - self._last_progress_s > self._timeout_s:
                self._give_up()

    def _beat(self) -> None:
        if self._store is None:
            return
        self._beats += 1
        changed = self._activity.since_s != self._told_since_s
        self._told_since_s = self._activity.since_s
        try:
            self._store.set(str(self._rank), json.dumps([self._beats, self._activity.words, *self._process]))
            progress = self._store.add("progress", int(changed))  # of all ranks: this one may wait for another's work
        except RuntimeError:
            return  # the rank that holds the store is gone or stopped: told when the time is up
        if progress != self._progress:
            self._progress, self._last_progress_s = progress, time.monotonic()

    def _give_up(self) -> NoReturn:
        waited = time.monotonic() - self._last_progress_s
        words = f"no progress for {waited:.0f} s (--timeout-minutes {self._timeout_s / 60:g}): "
        try:
            if self._store is None:
                _tell(f"{words}{self._activity.words}")
            elif self._store.add("reporter", 1) == 1:
                _tell(words + self._account(self._store))
            else:
                time.sleep(6 * self._beat_s)  # the reporter is asking
        except RuntimeError:
            _tell(f"{words}rank {self._rank} is in {self._activity.words}, and rank 0's host no longer answers")
        os._exit(EXIT_TOLD)

    def _account(self, store: Store) -> str:
        """Who does not answer, and what every rank was last doing: ranks at the same activity in one phrase."""
        before = {rank: self._heard(store, rank) for rank in range(self._world_size)}
        time.sleep(3 * self._beat_s)
        self._beat()
        silent, at = [], dict[str, list[int]]()
        for rank, last in before.items():
            if rank != self._rank and self._heard(store, rank) == last:
                silent.append(f"rank {rank} does not answer, last in {last.words}")
                last.let_end(self._process[1])
            else:
                at.setdefault(last.words, []).append(rank)
        others = [f"{'ranks' if len(ranks) > 1 else 'rank'} {_some(ranks)} in {words}" for words, ranks in at.items()]
        return "; ".join(silent + others)

    @staticmethod
    def _heard(store: Store, rank: int) -> "_Beat":
        if not store.check([str(rank)]):
            return _Beat()
        return _Beat(*json.loads(store.get(str(rank))))


@dataclass(frozen=True, slots=True)
class _Beat:
    """What a rank has last told of itself."""

    number: int = 0
    words: str = "starting"
    process: int = 0
    host: str = ""

    def let_end(self, here: str) -> None:
        """A stopped process does not see the signal by which the launcher ends it, until it is let go on."""
        if self.host == here and self.process:
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGCONT)


def _some(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _tell(words: str) -> None:
    print(f"error: {words}", file=sys.stderr, flush=True)
