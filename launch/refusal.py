"""How a rank says that its user's input is no good: one line in all, exit code 2.

All ranks read the same input and find the same fault, at slightly different moments; whichever ends first makes the
launcher end the rest. So the others give rank 0 time to say it, and say it themselves only if nobody did.
"""

import os
import sys
import time
from typing import NoReturn

_PATIENCE_S = 10.0


def refuse(error: ValueError) -> NoReturn:
    """Print `error` in one line from one rank and end this process with exit code 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE_S)  # ended here, if rank 0 has found the fault too
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
