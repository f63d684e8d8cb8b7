"""How a rank leaves its traceback for torch's elastic agent: whole, or not at all.

The agent ends the ranks that are left when one has failed. Those have lost a neighbour and are writing that down just
then; torch's own handler leaves an empty file where it is ended between opening and writing, and the agent, which reads
JSON there, ends in an error of its own that hides the first rank's.
"""

import json
import os
import time
import traceback
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable in which the agent names a rank's file."""


class WholeErrorFile(ErrorHandler):
    """torch's handler, with a file that appears under its name only once it is complete."""

    def record_exception(self, e: BaseException) -> None:
        """Write `e`, with its traceback and the time, as the agent reads it; nothing where no agent asked for it."""
        file = os.environ.get(ERROR_FILE)
        if not file:
            return
        told = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
        begun = f"{file}.begun"
        with open(begun, "w", encoding="utf-8") as unfinished:
            json.dump({"message": {"message": f"{type(e).__name__}: {e}", "extraInfo": told}}, unfinished)
        os.replace(begun, file)


def recorded(main: Callable[[], None]) -> Callable[[], None]:
    """`main` of a rank; what it raises goes to the agent, and on. Source: torch's `record`, with a whole file."""
    return record(main, WholeErrorFile())
