"""A hash of everything a pipeline stage holds, to compare runs bit for bit."""

from hashlib import sha256
from typing import Any

import torch


def digest(losses: list[float], state: dict[str, Any]) -> str:
    """Every bit of a stage's weights, optimizer and losses."""
    summary = sha256(repr(losses).encode())

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            summary.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                summary.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        else:
            summary.update(repr(value).encode())

    add(state)
    return summary.hexdigest()
