"""What a running training shows: a bar on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fourfold.launch.training.loop import StepRecord
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig


class Display:
    """Progress on the rank that reports: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, layout: Layout, model: ModelConfig, settings: TrainSettings, peak_flops_per_s: float) -> None:
        self._tokens = layout.global_batch * layout.seq_len
        self._flops = model.flops_per_token(layout.seq_len) * self._tokens
        self._peak_flops_per_s = peak_flops_per_s
        self._console = Console()
        self._last_line_s = 0.0
        self._num_steps = settings.steps
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._progress.add_task("", total=settings.steps)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, words: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(words, highlight=False)

    def show(self, step: StepRecord, gauge: MemoryGauge) -> None:
        words = f"loss {step.loss:.3f}  {self._tokens / step.step_s:,.0f} tokens/s"
        if self._peak_flops_per_s:
            words += f"  MFU {self._flops / step.step_s / self._peak_flops_per_s:.1%}"
        words += f"  {gauge.in_use()}"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step.step + 1, description=words)
        elif time.monotonic() - self._last_line_s > 5 or step.step + 1 == self._num_steps:
            self._last_line_s = time.monotonic()
            print(f"step {step.step + 1}/{self._num_steps}  {words}", flush=True)
