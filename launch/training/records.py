"""What a training leaves in its folder: metrics.csv, a row a step, and result.json at the end."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from fourfold.launch.training.loop import StepRecord, TrainResult
from fourfold.layouts.inputs.layout import Layout


class Metrics:
    """metrics.csv, a row as each step ends; a resumed run goes on below the rows of the steps before it."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._earlier: list[dict[str, str]] = []
        if resume and path.exists():
            with path.open(newline="") as file:
                self._earlier = list(csv.DictReader(file))
        self._file: TextIO | None = None

    def add(self, step: StepRecord) -> None:
        names = list(StepRecord.__dataclass_fields__)
        if self._file is None:
            self._file = self._path.open("w", newline="")
            writer = csv.DictWriter(self._file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in self._earlier if int(row["step"]) < step.step)
        csv.DictWriter(self._file, names, lineterminator="\n").writerow(asdict(step))
        self._file.flush()


def write_result(
    out: Path, layout: Layout, result: TrainResult, *, byte_frequency_loss: float | None, device: str
) -> None:
    """result.json, whole or not at all."""
    summary: dict[str, Any] = {
        "layout": layout.as_dict(),
        "device": device,
        "torch": torch.__version__,
        "steps_s": [step.step_s for step in result.records],
        "losses": [step.loss for step in result.records],
        "heldout_loss": result.held_out_loss,
        "byte_frequency_loss": byte_frequency_loss,
        "peak_bytes": result.peak_bytes,
    }
    partial = out / "result.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.rename(out / "result.json")
