"""How a rank ends: in one line and with an exit code that says what the line is about.

All ranks read the same input and find the same fault, at slightly different moments; whichever ends first makes the
launcher end the rest. So the others give rank 0 time to say it, and say it themselves only if nobody did. Likewise a
rank that merely lost its neighbour waits: the neighbour's own account is the one that helps.
"""

import os
import re
import sys
import time
from typing import NoReturn

EXIT_REFUSED = 2
"""Something that the user can mend, said in one line."""
EXIT_TOLD = 3
"""A failure that the rank has said in one line itself."""
EXIT_STOPPED = 130
"""Ended from the keyboard (SIGINT), as shells have it."""
_PATIENCE_S = 10.0
_NEIGHBOUR_LOST = re.compile(
    r"gloo/transport|Connection (closed|reset)|Broken pipe|NCCL (communicator|error)|remote process exited"
    r"|is gone|stops at",
)


def refuse(error: Exception, *, patience_s: float = _PATIENCE_S) -> NoReturn:
    """Print `error` in one line from one rank and end this process with exit code 2.

    Args:
        patience_s: for which ranks but the first wait before they speak themselves.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(patience_s)  # ended here, if rank 0 has found the fault too
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_REFUSED)


def lost_neighbour(error: BaseException) -> bool:
    """Whether `error` only says that another rank is gone, as a collective or a pipeline's link does."""
    return isinstance(error, RuntimeError | ConnectionError) and says_neighbour_lost(str(error))


def says_neighbour_lost(words: str) -> bool:
    """Whether an error of these words only says that another rank is gone."""
    return bool(_NEIGHBOUR_LOST.search(words))


def tell_lost_neighbour(error: BaseException, activity: str) -> NoReturn:
    """Say in one line that this rank stopped because another did; that one, or the launcher, may speak first."""
    time.sleep(_PATIENCE_S)  # ended here, where a launcher ends the ranks that are left
    first = str(error).strip().splitlines()[0]
    rank = os.environ.get("RANK", "0")
    print(f"error: rank {rank} lost another rank in {activity}: {first}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_TOLD)


def tell_stopped() -> None:
    """Say on the first rank that the run was ended from the keyboard, and how it goes on."""
    if os.environ.get("RANK", "0") == "0":
        print("stopped: the last checkpoint is whole; go on with --resume auto", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process now: nothing of torch's is destroyed in whatever order the interpreter's end brings.

    Threads of process groups that are still there then end the process with SIGABRT, after a good training.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and code == 0:
        mpi.Finalize()  # what some launchers of MPI take a missing call of for a failure
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
