"""Where else than in its folder a training is told of: TensorBoard, Weights & Biases, a trace for Chrome."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.loop import COUNTED_STEPS
from fourfold.layouts.inputs.layout import Layout

UNTRACED_STEPS, TRACED_STEPS = COUNTED_STEPS, 3


class Tracker(Protocol):
    """Somebody who keeps numbers by step."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def made_trackers(options: TrainOptions, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that `options` ask for.

    Raises:
        ValueError: one whose library is not installed.
    """
    made: list[Tracker] = []
    if options.tensorboard:
        made.append(_TensorBoard(Path(options.out or ".") / "tensorboard"))
    if options.wandb is not None:
        made.append(_Wandb(options.wandb, Path(options.out or "."), settings))
    return made


def check_trackers(options: TrainOptions, layout: Layout) -> None:
    """Raises ValueError, before anything is started, where a library is missing or there is no folder to write to."""
    if options.trace is not None and layout.asynchronous:
        raise ValueError(f"trace with schedule={layout.schedule!r}, whose steps overlap: leave it out")
    if options.observe and not layout.asynchronous:
        raise ValueError(f"observe with schedule={layout.schedule!r}, which drains at every step: leave it out")
    if options.trace is not None and options.steps <= UNTRACED_STEPS:
        raise ValueError(f"trace with steps={options.steps}: it starts after {UNTRACED_STEPS} steps; take more")
    for asked, library in ((options.tensorboard, "tensorboard"), (options.wandb is not None, "wandb")):
        if asked:
            if options.out is None:
                raise ValueError(f"{library} needs a folder: give --out DIR")
            try:
                _wandb() if library == "wandb" else _writer()
            except ImportError:
                raise ValueError(f"{library} is not installed: pip install {library}, or leave the key out") from None
    if options.trace is not None and Path(options.trace).is_dir():
        raise ValueError(f"trace={options.trace!r} is a folder: give a file")


def _writer() -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _wandb() -> Any:
    import wandb  # type: ignore[import-not-found, unused-ignore]

    return wandb


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._writer = _writer()(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            self._run: Any = _wandb().init(project=project, dir=str(folder), config=dict(settings))
        except Exception as error:  # of its own kinds; this rank alone finds them
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"wandb={project!r}: {reason}: log in (wandb login), or leave the key out") from None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trace:
    """A trace of a few steps of this rank, which chrome://tracing and Perfetto open.

    It starts after the first steps, whose memory is counted by the same profiler.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._num_steps = 0
        self._profile: profile | None = None

    def step(self) -> None:
        """Another step begins."""
        self._num_steps += 1
        if self._num_steps == UNTRACED_STEPS + 1:
            self._profile = profile(activities=[ProfilerActivity.CPU, *_cuda()])
            self._profile.start()
        elif self._num_steps == UNTRACED_STEPS + TRACED_STEPS + 1:
            self.stop()

    def stop(self) -> None:
        """Write what there is; later calls change nothing."""
        if self._profile is not None:
            self._profile.stop()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._file))
            self._profile = None


def _cuda() -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
