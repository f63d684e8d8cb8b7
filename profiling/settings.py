"""What one profile measures: the options of `layout-advisor profile` and of `torchrun -m fourfold.profiling.run`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

MOST_SIZE = 1 << 31
"""Of a sequence in tokens, a micro-batch in sequences: products of two of them fit 64 bits."""
MOST_SECONDS = 86400
"""A day."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileSettings:
    """The options of one profile, the same on every rank.

    Attributes:
        out: the cluster.toml to write.
        seconds: time budget of the measurement, without starting the ranks.
        model: Hugging Face config.json whose shapes are measured besides the general ones; None for none.
        seq_len: tokens a sequence of that model.
        micro_batches: sequences a micro-batch, each measured.
        layers: also time whole decoder layers, embedding, head and optimizer of that model.
        resume: take over what an interrupted profile with the same options has measured.
        device: "cuda" or "cpu"; None takes CUDA where this host has a device.
    """

    out: Path = Path("cluster.toml")
    seconds: float = 30.0
    model: Path | None = None
    seq_len: int = 512
    micro_batches: tuple[int, ...] = (1, 2)
    layers: bool = True
    resume: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds}: the time budget must be above 0")
        if self.seconds > MOST_SECONDS:
            raise ValueError(f"seconds={self.seconds}: the time budget is at most {MOST_SECONDS}")
        if self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len}: a sequence has at least 1 token")
        if not self.micro_batches or min(self.micro_batches) < 1:
            raise ValueError(f"micro_batches={self.micro_batches}: give at least one, each at least 1")
        if max(self.seq_len, *self.micro_batches) > MOST_SIZE:
            raise ValueError(
                f"seq_len={self.seq_len}, micro_batches={self.micro_batches}: give sizes of at most {MOST_SIZE}"
            )
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: 'cpu' or 'cuda'")
        if self.model is not None and not self.model.is_file():
            raise ValueError(f"{self.model}: no such file; --model takes a Hugging Face config.json")
        if not self.out.parent.is_dir():
            raise ValueError(f"{self.out.parent}: no such folder to write {self.out.name} into; make it first")

    def arguments(self) -> list[str]:
        """These settings as the command line of `fourfold.profiling.run`."""
        words = ["--out", str(self.out), "--seconds", str(self.seconds), "--seq-len", str(self.seq_len)]
        for micro_batch in self.micro_batches:
            words += ["--micro-batch", str(micro_batch)]
        if self.model is not None:
            words += ["--model", str(self.model)]
        if self.device is not None:
            words += ["--device", self.device]
        if not self.layers:
            words.append("--no-layers")
        if self.resume:
            words.append("--resume")
        return words


def parse_settings(arguments: list[str] | None = None) -> ProfileSettings:
    """Read the command line of `fourfold.profiling.run`.

    Raises:
        ValueError: an option outside its range. SystemExit(2): an unknown option.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m fourfold.profiling.run",
        description="Measure compute, memory and links of the ranks that torchrun started; rank 0 writes a TOML file.",
    )
    parser.add_argument("--out", type=Path, help="the file to write (cluster.toml)")
    parser.add_argument("--seconds", type=float, help="time budget (30)")
    parser.add_argument("--model", type=Path, help="config.json whose shapes are measured too")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (512)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        action="append",
        dest="micro_batches",
        help="sequences a micro-batch; repeat for more",
    )
    parser.add_argument("--no-layers", action="store_false", dest="layers", help="shapes of --model, no whole layers")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted profile")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "micro_batches" in given:
        given["micro_batches"] = tuple(given["micro_batches"])
    return ProfileSettings(**given)
