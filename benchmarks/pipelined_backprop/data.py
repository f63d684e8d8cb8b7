"""Data that needs no download when the benchmark runs."""

import gzip
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Images = tuple[Tensor, Tensor, Tensor, Tensor]  # training [N, 1, h, w] and labels [N], test images and labels


def digits() -> Images:
    """scikit-learn's 1797 digits of 8 x 8; every fifth is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    images = (images - images.mean()) / images.std()
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def fashion_mnist(folder: Path) -> Images:
    """Fashion-MNIST from its four .gz files (Debian: package dataset-fashion-mnist)."""

    def read(name: str, header: int) -> Tensor:
        raw = np.frombuffer(gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes()), dtype=np.uint8, offset=header)
        return torch.from_numpy(raw.copy())

    parts = []
    for split in ("train", "t10k"):
        images = read(f"{split}-images-idx3", 16).view(-1, 1, 28, 28).float()
        parts += [(images - 73.0) / 90.0, read(f"{split}-labels-idx1", 8).long()]
    return parts[0], parts[1], parts[2], parts[3]


def library_bytes(num_bytes: int = 4 << 20) -> Tensor:
    """The first `num_bytes` of the standard library's own sources, in the order of their names; uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            break
    return torch.frombuffer(text[:num_bytes], dtype=torch.uint8)


def shuffled(
    inputs: Tensor, targets: Tensor, *, size: int, steps: int, seeds: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` micro-batches [E, size, ...], epoch after epoch without replacement, each seed in its own order."""
    orders = [_order(len(inputs), size * steps, seed).view(steps, size) for seed in seeds]
    for step in range(steps):
        picked = torch.stack([order[step] for order in orders])
        yield inputs[picked], targets[picked]


def _order(num_samples: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    epochs = -(-length // num_samples)
    return torch.cat([torch.randperm(num_samples, generator=generator) for _ in range(epochs)])[:length]


def windows(
    text: Tensor, *, length: int, size: int, steps: int, seeds: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` micro-batches of random windows of `text`: bytes and the bytes that follow, [E, size, length]."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    for _ in range(steps):
        starts = [torch.randint(len(text) - length, (size, 1), generator=generator) for generator in generators]
        rows = text[torch.stack(starts) + torch.arange(length + 1)].long()
        yield rows[..., :-1], rows[..., 1:]
