"""How a layout that streams cuts a rank's sequence, as the runtime takes it."""

from typing import Literal

from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel.stream import StreamSettings


def chunks_of(layout: Layout) -> StreamSettings | None:
    """A layout that streams names its chunks of a rank's sequence; with one, they are chosen by their closed form."""
    offload: Literal["host"] | None = "host" if layout.offload else None
    if layout.stream_chunks == 1:
        return StreamSettings(offload=offload) if offload else None
    return StreamSettings(chunk_size=-(-layout.seq_len // (layout.cp * layout.stream_chunks)), offload=offload)
