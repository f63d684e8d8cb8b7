"""Random numbers that depend on a seed alone, not on what ran before."""

from contextlib import AbstractContextManager
from typing import Any

import torch


class seeded(AbstractContextManager[None]):
    """Random numbers from `seed`, on the host and on `device`, and the outer generators' state put back."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)
