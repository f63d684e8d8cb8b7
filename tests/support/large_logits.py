"""Tiny models whose logits count as large, so that their head is streamed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from fourfold.parallel.decoder import stage
from fourfold.parallel.stream import work_space

CHUNK = 7


def with_large_logits(body: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """What `body` returns where CHUNK tokens' logits of a vocabulary of 64 are a chunk, and how often a loss was
    streamed. (A micro-batch must also have more tokens than its model is wide.)
    """
    small = {kind: replace(sizes, loss_bytes=4 * 64 * CHUNK) for kind, sizes in work_space.CHUNK_SIZES.items()}
    with (
        mock.patch.dict(work_space.CHUNK_SIZES, small),
        mock.patch.object(work_space, "MIN_LOGITS_CHUNK", 1),
        mock.patch.object(stage, "stream_loss", wraps=stage.stream_loss) as streamed,
    ):
        return body(*arguments), streamed.call_count
