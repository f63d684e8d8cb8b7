"""Real text without a download: the sources of Python's own standard library, byte by byte.

A token is a byte. Every tenth file, by a hash of its name, is held out. A batch depends on seed, step and row alone, so
any layout, and a resumed run, sees the same rows in the same order.
"""

import math
import sysconfig
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

VOCAB_SIZE = 256
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_HELD_OUT_EVERY = 10


def read_standard_library() -> tuple[Tensor, Tensor]:
    """The text as (train, held_out), each a one-dimensional uint8 tensor, about 10 MB and 1 MB.

    Raises:
        ValueError: this Python has no sources of its standard library on disk.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in folder.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(folder).parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        name = path.relative_to(folder).as_posix()
        parts[crc32(name.encode()) % _HELD_OUT_EVERY == 0].append(path.read_bytes())
    if not all(parts):
        raise ValueError(f"{folder} holds no Python sources to train on: install Python with its standard library")
    train, held_out = (torch.from_numpy(np.frombuffer(b"".join(part), dtype=np.uint8).copy()) for part in parts)
    return train, held_out


def training_rows(text: Tensor, *, seq_len: int, global_batch: int, step: int, seed: int, rows: slice) -> Tensor:
    """Rows `rows` of the global batch of `step`: [rows, seq_len] int64, windows at random places.

    Raises:
        ValueError: the text is shorter than a window.
    """
    starts = np.random.default_rng((seed, step)).integers(_num_starts(text, seq_len), size=global_batch)[rows]
    return _windows(text, starts, seq_len)


def held_out_rows(text: Tensor, *, seq_len: int, num_rows: int, rows: slice) -> Tensor:
    """Rows `rows` of `num_rows` windows spread evenly over the held-out text: [rows, seq_len] int64."""
    starts = np.linspace(0, _num_starts(text, seq_len) - 1, num_rows).astype(np.int64)[rows]
    return _windows(text, starts, seq_len)


def byte_frequency_loss(train: Tensor, held_out: Tensor) -> float:
    """Nats a byte of `held_out` under the byte frequencies of `train`: what a model that knows no context reaches."""
    counts = torch.bincount(train.long(), minlength=VOCAB_SIZE).double() + 1.0
    seen = torch.bincount(held_out.long(), minlength=VOCAB_SIZE).double()
    loss = -(seen / seen.sum() * (counts / counts.sum()).log()).sum().item()
    assert math.isfinite(loss)
    return loss


def _num_starts(text: Tensor, seq_len: int) -> int:
    if len(text) < seq_len:
        raise ValueError(f"seq_len={seq_len} is longer than the text of {len(text)} bytes: use a shorter one")
    return len(text) - seq_len + 1


def _windows(text: Tensor, starts: np.ndarray, seq_len: int) -> Tensor:
    if not len(starts):
        return torch.empty(0, seq_len, dtype=torch.int64)
    return torch.stack([text[start : start + seq_len] for start in starts.tolist()]).long()
