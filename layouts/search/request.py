"""What is asked of a search: how many devices, which batch, and which layouts may be among the answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fourfold.layouts.inputs.reading import MOST, MOST_DEVICES, shown

SPACES = ("runtime", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """One search.

    Raises:
        ValueError: zero devices, batch or length, or an unknown space; names the value.
    """

    num_devices: int
    global_batch: int
    """Sequences a step."""
    seq_len: int
    """Tokens a sequence."""
    space: str = "runtime"
    """runtime: what fourfold itself can launch; full: also what the export formats can."""
    fix: Mapping[str, Any] = field(default_factory=dict)
    """Layout fields held at a value, as {"tp": 8}."""
    asynchronous: bool = False
    """Price pipelines that never drain as well; `fix` of their schedule asks for one of them."""

    def __post_init__(self) -> None:
        for name, value, most in (
            ("gpus", self.num_devices, MOST_DEVICES), ("global_batch", self.global_batch, MOST),
            ("seq_len", self.seq_len, MOST),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}={shown(value)}: give a whole number of at least 1")
            if value > most:
                raise ValueError(f"{name}={shown(value)}: give at most {most}")
        if self.space not in SPACES:
            raise ValueError(f"space={self.space!r}: choose one of {', '.join(SPACES)}")
