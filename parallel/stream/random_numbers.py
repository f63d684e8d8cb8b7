"""The same random numbers again: a chunk that is recomputed draws the dropout that it drew the first time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomStates:
    """The state of the random generators before each piece of work, by the piece's name and first token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: dict[tuple[str, int], list[Tensor]] = {}

    def drawn(self) -> bool:
        """Whether any of the work so far used random numbers, in a module or by a function."""
        now, first = self.get(), next(iter(self.states.values()), None)
        return first is not None and any(not torch.equal(a, b) for a, b in zip(now, first, strict=True))

    def get(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)


@contextmanager
def random_numbers(states: RandomStates | None, piece: tuple[str, int], *, replay: bool) -> Iterator[None]:
    """Draw, and remember from where; with `replay`, draw the same, and put the generators back after. None: as is."""
    if states is None:
        yield
    elif not replay:
        states.states[piece] = states.get()
        yield
    else:
        outside = states.get()
        states.set(states.states[piece])
        try:
            yield
        finally:
            states.set(outside)
