"""One training from its options to its results, on every rank."""

import logging
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.async_loop import AsynchronousModel, train_asynchronously
from fourfold.launch.training.build import build, check_world, meet
from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.data import byte_frequency_loss, read_standard_library
from fourfold.launch.training.folder_lock import FolderLock
from fourfold.launch.training.loop import StepRecord, TrainingRun, largest_memory, train
from fourfold.launch.training.mpi import adopt_mpi_ranks, started_by_mpi
from fourfold.launch.training.progress import Display
from fourfold.launch.training.records import Metrics, write_result
from fourfold.launch.training.settings import TrainSettings, comparable_settings
from fourfold.launch.training.slurm import adopt_slurm_ranks, started_by_slurm
from fourfold.launch.training.watch import Activity, HangWatch, watch_launcher
from fourfold.layouts.inputs.layout import read_layout_file


def adopt_ranks() -> None:
    """Learn this process's rank from whoever started it, and end with the launcher, should that be killed.

    Raises:
        ValueError: MPI started the ranks, and mpi4py is missing.
    """
    # torch's profiler, which counts memory on CPUs, tells of its start and stop below this level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    watch_launcher(os.environ)
    if started_by_mpi(os.environ):
        adopt_mpi_ranks()
    elif started_by_slurm(os.environ):
        adopt_slurm_ranks(os.environ)


def run_training(options: TrainOptions, activity: Activity) -> None:
    """Train as `options` say and leave the results in `options.out`; every rank calls, after `adopt_ranks`.

    Raises:
        ValueError: something that the user can mend; on every rank, or on rank 0 before it waits for another.
        FloatingPointError: loss or gradient is no longer a finite number.
    """
    # A rank that waits for a dead one is ended by the launcher; torch's own complaints would hide the cause.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # What is asked for, refused before any rank waits for another.
    layout, model = read_layout_file(options.layout)
    settings, resume = _settings(options), Resume(choice=options.resume, anyway=options.resume_anyway)
    if model.vocab_size < 256:
        raise ValueError(f"vocab_size={model.vocab_size}: the text is bytes, so the model needs at least 256")
    check_world(layout, model)
    out = Path(options.out) if options.out is not None else None
    if out is None and (options.checkpoint_every or resume):
        raise ValueError("checkpoints need a folder: give --out DIR")
    lock = _own_folder(out) if out is not None else None
    text = read_standard_library()
    # The ranks meet, and from now on a hang is told and bounded.
    timeout_s = options.timeout_minutes * 60
    activity.now("meeting the other ranks")
    mesh = meet(layout, timeout_s=timeout_s)
    watch = HangWatch(activity, timeout_s=timeout_s)
    activity.now("building the model")
    parallel_model, gauge = build(layout, model, settings, mesh)
    # Of a pipeline that never drains, only the last stage knows how a step went while it runs.
    reports = dist.get_rank() == (layout.pp - 1 if layout.asynchronous else 0)
    display = Display(layout, model, settings, options.peak_flops_per_s) if reports and not options.quiet else None
    metrics = Metrics(out / "metrics.csv", resume=bool(resume)) if reports and out is not None else None

    def on_step(step: StepRecord) -> None:
        if metrics is not None:
            metrics.add(step)
        if display is not None:
            display.show(step, gauge)

    checkpoints = None
    if out is not None:
        compared = comparable_settings(parallel_model.stage.config.to_dict(), layout, settings)
        checkpoints = Checkpoints(folder=out / "checkpoints", settings=compared, keep=options.keep_checkpoints)
    run = TrainingRun(gauge=gauge, checkpoints=checkpoints, resume=resume, activity=activity, on_step=on_step)
    with display or nullcontext(), gauge:
        if isinstance(parallel_model, AsynchronousModel):
            result = train_asynchronously(parallel_model, text, run)
        else:
            result = train(parallel_model, layout, text, settings, run)
    # Results are on disk before any rank lets go of its groups, and no rank does before all are done.
    activity.now("writing the results")
    result = largest_memory(result, parallel_model.device)
    if dist.get_rank() == 0:
        frequencies = byte_frequency_loss(*text) if settings.held_out_batches else None
        if not options.quiet and result.held_out_loss is not None:
            print(f"held-out loss {result.held_out_loss:.3f} nats a byte; byte frequencies alone {frequencies:.3f}")
        if out is not None:
            write_result(out, layout, result, byte_frequency_loss=frequencies, device=parallel_model.device.type)
    dist.barrier()
    watch.stop()
    dist.destroy_process_group()
    del lock  # kept until here


def _settings(options: TrainOptions) -> TrainSettings:
    return TrainSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_norm=options.max_norm,
        seed=options.seed,
        checkpoint_every=options.checkpoint_every,
        held_out_batches=options.held_out_batches,
    )


def _own_folder(out: Path) -> FolderLock | None:
    """Make the folder, now and not after hours of training; rank 0 keeps other runs out of it.

    Raises:
        ValueError: results could not be written there, or another run is using it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}: give a folder that can be written") from None
    return FolderLock(out) if os.environ.get("RANK", "0") == "0" else None
