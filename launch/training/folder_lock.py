"""One run at a time in a folder: two would destroy each other's checkpoints."""

import fcntl
import os
import socket
import time
from pathlib import Path

LOCK = ".lock"
_PATIENCE_S = 5.0


class FolderLock:
    """Held by rank 0 from its creation to the end of its process, however that ends: the system lets go of it.

    Ranks whose launcher was killed end within a second or two, so the next run waits a few before it gives up.

    Raises:
        ValueError: another run is using the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LOCK).open("a+")
        deadline = time.monotonic() + _PATIENCE_S
        while not self._take():
            if time.monotonic() > deadline:
                self._file.seek(0)
                owner = self._file.read(200).strip()
                raise ValueError(f"--out {folder} is in use by another run ({owner}): end it, or give another --out")
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True
