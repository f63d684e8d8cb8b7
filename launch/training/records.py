"""What a training leaves in its folder: metrics.csv, a row a step; log.jsonl, a line an event; result.json."""

import csv
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from fourfold.launch.training.loop import StepRecord, TrainResult
from fourfold.layouts.inputs.layout import Layout


@contextmanager
def told_where(path: Path) -> Iterator[None]:
    """Around writing `path`: what the file system refuses is one line that names the file and the mend."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} could not be written: {error.strerror}: make room, and go on with --resume auto"
        ) from None


class Metrics:
    """metrics.csv, a row as each step ends; a resumed run goes on below the rows of the steps before it."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._earlier: list[dict[str, str]] = []
        if resume and path.exists():
            with path.open(newline="", errors="replace") as file:
                # A machine that went down may leave half a row, or zeros.
                self._earlier = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
        self._file: TextIO | None = None

    def add(self, step: StepRecord) -> None:
        """A row. Raises ValueError where it cannot be written."""
        with told_where(self._path):
            self._add(step)

    def _add(self, step: StepRecord) -> None:
        names = [name for name in StepRecord.__dataclass_fields__ if name != "phases"]
        if self._file is None:
            partial = self._path.with_name(self._path.name + ".partial")
            self._file = partial.open("w", newline="")
            writer = csv.DictWriter(self._file, names, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in self._earlier if int(row["step"]) < step.step)
            self._file.flush()
            partial.rename(self._path)  # the earlier rows are there at every moment
        row = {name: value for name, value in asdict(step).items() if name in names}
        csv.DictWriter(self._file, names, lineterminator="\n").writerow(row)
        self._file.flush()


class Log:
    """log.jsonl, an object a line as things happen; a resumed run goes on below."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b")
        if self._file.tell():  # a machine that went down may leave half a line
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def add(self, event: str, **fields: Any) -> None:
        """One line; what is no finite number is null, which JSON has and NaN it has not.

        Raises ValueError where it cannot be written.
        """
        told = {name: None if _is_no_number(value) else value for name, value in fields.items()}
        with told_where(self._path):
            line = json.dumps({"event": event, "time": time.time(), **told}) + "\n"
            self._file.write(line.encode())
            self._file.flush()


def _is_no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write_result(out: Path, layout: Layout, result: TrainResult, **facts: Any) -> None:
    """result.json, whole or not at all.

    Args:
        facts: further entries: device, byte_frequency_loss, precision.
    """
    summary: dict[str, Any] = {
        "layout": layout.as_dict(),
        "torch": torch.__version__,
        "steps_s": [step.step_s for step in result.records],
        "losses": [step.loss for step in result.records],
        "heldout_loss": result.held_out_loss,
        "peak_bytes": result.peak_bytes,
        "reserved_bytes": result.reserved_bytes,
        "compiled": result.compiled,
        **facts,
    }
    partial = out / "result.json.partial"
    with told_where(out / "result.json"):
        partial.write_text(json.dumps(summary, indent=1) + "\n")
        partial.rename(out / "result.json")
