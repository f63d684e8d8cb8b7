"""How many layers a call has streamed: equal losses do not tell, for a model that ignores streaming has them too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fourfold.parallel.stream import streaming
from fourfold.parallel.stream.layer_run import StreamRun


@contextmanager
def counted_layers() -> Iterator[list[str]]:
    """The class names of the layers that stream meanwhile, in order; recomputation and verification do not count."""
    names: list[str] = []
    plain, verify = StreamRun.layer, streaming.verify_gradients

    def layer(run: StreamRun, stream: Any, *args: Any) -> Any:
        names.append(type(stream.layer).__name__)
        return plain(run, stream, *args)

    def uncounted(*args: Any, **kwargs: Any) -> float:
        before = len(names)
        error = verify(*args, **kwargs)
        del names[before:]
        return error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamRun, "layer", layer)
        patch.setattr(streaming, "verify_gradients", uncounted)
        yield names
