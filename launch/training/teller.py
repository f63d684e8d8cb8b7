"""Tells of a running training, on the rank that knows how it goes: the display, metrics.csv, log.jsonl, result.json."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.corpus import Corpus
from fourfold.launch.training.data import byte_frequency_loss
from fourfold.launch.training.loop import StepRecord, TrainResult
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.progress import Display
from fourfold.launch.training.records import Log, Metrics, write_result
from fourfold.launch.training.settings import TrainSettings
from fourfold.launch.training.trackers import Trace, Tracker, made_trackers
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.parallel.pipeline.report import StageReport, write_reports

_FREQUENCIES_OF = 1 << 26
"""Bytes that byte frequencies are counted over; they change no more."""


class _Scalars:
    """What write_reports writes to, kept by name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        self.values[tag] = scalar_value


class Teller:
    """Does nothing on ranks that have nothing to tell. A context: the display is drawn inside it.

    Steps are told by rank 0, or where the pipeline never drains by the last stage's first rank, which alone knows how
    a step went while it runs; results by rank 0.
    """

    def __init__(
        self, options: TrainOptions, layout: Layout, model: ModelConfig, settings: TrainSettings, gauge: MemoryGauge
    ) -> None:
        self._options, self._layout, self._settings, self._gauge = options, layout, settings, gauge
        self._tokens = layout.global_batch * layout.seq_len
        self._out = Path(options.out) if options.out is not None else None
        first_of_last_stage = (layout.pp - 1) * layout.cp * layout.tp
        tells_steps = dist.get_rank() == (first_of_last_stage if layout.asynchronous else 0)
        self._display: Display | None = None
        self._metrics: Metrics | None = None
        self._log: Log | None = None
        self._trackers: list[Tracker] = made_trackers(options, asdict(settings)) if tells_steps else []
        self._trace = Trace(Path(options.trace)) if tells_steps and options.trace is not None else None
        self._flops = model.flops_per_token(layout.seq_len) * self._tokens
        if tells_steps and not options.quiet:
            self._display = Display(layout, model, settings, options.peak_flops_per_s)
        if tells_steps and self._out is not None:
            self._metrics = Metrics(self._out / "metrics.csv", resume=options.resume != "no")
            self._log = Log(self._out / "log.jsonl")
            self._log.add("start", layout=str(layout), model=model.name, ranks=dist.get_world_size())

    def __enter__(self) -> "Teller":
        (self._display or nullcontext()).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.__exit__(kind, error, traceback)
        if self._trace is not None:
            self._trace.stop()
        for tracker in self._trackers:
            tracker.close()

    def start(self, step: int) -> None:
        """A step begins."""
        if self._trace is not None:
            self._trace.step()

    def step(self, step: StepRecord) -> None:
        """A step has ended."""
        if self._metrics is not None:
            self._metrics.add(step)
        values = {
            "loss": step.loss, "gradient_norm": step.gradient_norm, "learning_rate": step.learning_rate,
            "step_s": step.step_s, "tokens_per_s": self._tokens / step.step_s,
            "memory_bytes": self._gauge.in_use_bytes(), **step.phases,
        }  # fmt: skip
        if self._options.peak_flops_per_s:
            values["mfu"] = self._flops / step.step_s / self._options.peak_flops_per_s
        if self._log is not None:
            self._log.add("step", step=step.step, **values)
        for tracker in self._trackers:
            tracker.add(step.step, values)
        if self._display is not None:
            self._display.show(step, self._gauge)

    def evaluation(self, step: int, loss: float) -> None:
        """A held-out loss was taken after `step` steps."""
        if self._log is not None:
            self._log.add("evaluation", step=step, heldout_loss=loss)
        for tracker in self._trackers:
            tracker.add(step, {"heldout_loss": loss})
        if self._display is not None:
            self._display.note(f"after {step} steps: held-out loss {loss:.4f}")

    def reports(self, step: int, reports: Sequence[StageReport]) -> None:
        """What the stages of a pipeline that never drains have seen of themselves up to `step`."""
        told = _Scalars()
        write_reports(told, reports, step)
        if self._log is not None:
            for report in reports:
                self._log.add("stage", step=step, **asdict(report))
        for tracker in self._trackers:
            tracker.add(step, told.values)
        if self._display is not None:
            for report in reports:
                self._display.note(f"after {step} steps: {report}")

    def end(self, result: TrainResult, corpus: Corpus) -> None:
        """The training has ended; a run that had no step left to take leaves its results as they are."""
        options = self._options
        if self._log is not None:
            self._log.add("end", heldout_loss=result.held_out_loss, peak_bytes=result.peak_bytes)
        if dist.get_rank() != 0:
            return
        if not result.records:
            print(f"nothing left to do: the run in {options.out} has taken its {self._settings.steps} steps")
        frequencies = None
        if corpus.unit == "byte" and self._settings.held_out_batches:
            train, held_out = (
                torch.cat([text.tokens[:_FREQUENCIES_OF] for text in texts])
                for texts in (corpus.train_texts, corpus.held_out_texts)
            )
            frequencies = byte_frequency_loss(train, held_out)
        if not options.quiet and result.held_out_loss is not None:
            where = f" of {options.export}" if options.export is not None else ""
            known = f"; byte frequencies alone {frequencies:.3f}" if frequencies is not None else ""
            print(f"held-out loss{where} {result.held_out_loss:.4f} nats a {corpus.unit}{known}")
        if self._out is not None and result.records:
            write_result(
                self._out, self._layout, result, byte_frequency_loss=frequencies, device=result.device,
                precision=result.precision, export=options.export,
            )  # fmt: skip
