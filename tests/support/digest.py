"""A hash of everything a pipeline stage holds, to compare runs bit for bit."""

from hashlib import sha256
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def digest(losses: list[float], state: dict[str, Any]) -> str:
    """Every bit of a stage's weights, optimizer and losses; of a DTensor this rank's part."""
    summary = sha256(repr(losses).encode())

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.to_local() if isinstance(value, DTensor) else value
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
