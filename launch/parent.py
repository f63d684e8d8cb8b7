"""The process that started this one, looked up before anything slow is imported.

A rank imports torch for seconds. A launcher that is killed meanwhile leaves the rank to another parent (init), and who
looks only afterwards takes that one for the launcher. So an entry point imports this file first.
"""

import os

_STARTED_BY = (os.getpid(), os.getppid())


def parent_at_start() -> int:
    """The number of the parent as this process began; as it is now in a process that was forked since."""
    process, parent = _STARTED_BY
    return parent if process == os.getpid() else os.getppid()
