"""torchao for the tests of fp8, from a folder of its own.

transformers imports it wherever it finds it, which takes seconds and prints warnings; so `make setup-test` does not put
it among the other packages.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PLACE = Path(sys.prefix) / "torchao"


@contextmanager
def torchao_found() -> Iterator[bool]:
    """Whether there is a torchao; inside, it can be imported, here and in the ranks of a pool."""
    before = list(sys.path)
    sys.path.append(str(PLACE))
    try:
        yield find_spec("torchao") is not None
    finally:
        sys.path[:] = before
