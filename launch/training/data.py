"""Real text without a download: the sources of Python's own standard library, byte by byte.

A token is a byte. Every tenth file, by a hash of its name, is held out. A batch depends on seed, step and row alone, so
any layout, and a resumed run, sees the same rows in the same order.
"""

import math
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VOCAB_SIZE = 256
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_HELD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens of one source.

    Attributes:
        tokens: one-dimensional, of any integer dtype.
        documents: [num_documents] int64, the place of each document's first token, ascending from 0; None where the
            source does not say.
    """

    tokens: Tensor
    documents: NDArray[np.int64] | None = None


def read_standard_library() -> tuple[Tensor, Tensor]:
    """The text as (train, held_out), each a one-dimensional uint8 tensor, about 10 MB and 1 MB.

    Raises:
        ValueError: this Python has no sources of its standard library on disk.
    """
    train, held_out = standard_library()
    return train.tokens, held_out.tokens


def standard_library() -> tuple[Text, Text]:
    """The same as `read_standard_library`, with a document a file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in _sources(folder):
        name = path.relative_to(folder).as_posix()
        parts[crc32(name.encode()) % _HELD_OUT_EVERY == 0].append(path.read_bytes())
    if not all(parts):
        raise ValueError(f"{folder} holds no Python sources to train on: install Python with its standard library")
    train, held_out = (
        Text(
            torch.from_numpy(np.frombuffer(b"".join(part), dtype=np.uint8).copy()),
            np.cumsum([0, *(len(file) for file in part if file)])[:-1],
        )
        for part in parts
    )
    return train, held_out


def _sources(folder: Path) -> list[Path]:
    """The Python files below `folder`, sorted. What is skipped is not looked through: installed packages are many."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    return sorted(found)


def training_rows(text: Tensor, *, seq_len: int, global_batch: int, step: int, seed: int, rows: slice) -> Tensor:
    """Rows `rows` of the global batch of `step`: [rows, seq_len] int64, windows at random places.

    Raises:
        ValueError: the text is shorter than a window.
    """
    starts = training_starts(text, seq_len=seq_len, global_batch=global_batch, step=step, seed=seed)[rows]
    return windows(text, starts, seq_len)


def training_starts(text: Tensor, *, seq_len: int, global_batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """Where the windows of a step begin: [global_batch]. Raises ValueError as `num_starts`."""
    return np.random.default_rng((seed, step)).integers(num_starts(text, seq_len), size=global_batch)


def held_out_rows(text: Tensor, *, seq_len: int, num_rows: int, rows: slice) -> Tensor:
    """Rows `rows` of `num_rows` windows spread evenly over the held-out text: [rows, seq_len] int64."""
    return windows(text, held_out_starts([text], seq_len=seq_len, num_rows=num_rows)[rows], seq_len)


def held_out_starts(texts: Sequence[Tensor], *, seq_len: int, num_rows: int) -> NDArray[np.int64]:
    """Where windows that are spread evenly begin, counted through the places of all texts: [num_rows]."""
    places = sum(num_starts(text, seq_len) for text in texts)
    return np.linspace(0, places - 1, num_rows).astype(np.int64)


def byte_frequency_loss(train: Tensor, held_out: Tensor) -> float:
    """Nats a byte of `held_out` under the byte frequencies of `train`: what a model that knows no context reaches."""
    counts = torch.bincount(train.long(), minlength=VOCAB_SIZE).double() + 1.0
    seen = torch.bincount(held_out.long(), minlength=VOCAB_SIZE).double()
    loss = -(seen / seen.sum() * (counts / counts.sum()).log()).sum().item()
    assert math.isfinite(loss)
    return loss


def num_starts(text: Tensor, seq_len: int) -> int:
    """At how many places a window may begin. Raises ValueError where the text is shorter than one."""
    if len(text) < seq_len:
        raise ValueError(f"seq_len={seq_len} is longer than the text of {len(text)} bytes: use a shorter one")
    return len(text) - seq_len + 1


def windows(text: Tensor, starts: NDArray[np.int64], seq_len: int) -> Tensor:
    """The windows of `text` that begin at `starts`: [len(starts), seq_len] int64."""
    if not len(starts):
        return torch.empty(0, seq_len, dtype=torch.int64)
    return torch.stack([text[start : start + seq_len] for start in starts.tolist()]).long()
