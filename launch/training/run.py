"""One training from its options to its results, on every rank."""

import logging
import os
import warnings
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist

from fourfold.launch.train_layout import chosen_layout, model_folder
from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.async_loop import AsynchronousModel, train_asynchronously
from fourfold.launch.training.background import Background
from fourfold.launch.training.build import build, check_world, empty_model, exported_loss, meet
from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.corpus import Corpus, bounds_of, found_sources, read_corpus
from fourfold.launch.training.deepspeed_engine import check_engine
from fourfold.launch.training.folder_lock import FolderLock
from fourfold.launch.training.loop import TrainingRun, largest_memory, train
from fourfold.launch.training.mix import shares_of
from fourfold.launch.training.mpi import adopt_mpi_ranks, started_by_mpi
from fourfold.launch.training.optimizers import check_optimizer
from fourfold.launch.training.places import check_export, check_shared, check_writable
from fourfold.launch.training.pretrained import export_model
from fourfold.launch.training.rows import Order, PackedRows, Rows, WindowRows, check_packing
from fourfold.launch.training.settings import TrainSettings, comparable_settings
from fourfold.launch.training.slurm import adopt_slurm_ranks, started_by_slurm
from fourfold.launch.training.teller import Teller
from fourfold.launch.training.trackers import check_trackers
from fourfold.launch.training.undrained import check_in_flight
from fourfold.launch.training.watch import Activity, HangWatch, bounded_meeting, watch_launcher
from fourfold.layouts.inputs.layout import Layout

MOST_MINUTES = 7 * 24 * 60


def adopt_ranks(parent: int | None = None) -> None:
    """Learn this process's rank from whoever started it, and end with the launcher, should that be killed.

    Args:
        parent: the process that started this one; None for its parent now.
    Raises:
        ValueError: MPI started the ranks, and mpi4py is missing.
    """
    # torch's profiler, which counts memory on CPUs, tells of its start and stop below this level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # torch 2.11 tells every user of it what profiles of several cycles need.
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")
    watch_launcher(os.environ, parent)
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
    layout, model = chosen_layout(options)
    settings, resume = _settings(options), Resume(choice=options.resume, anyway=options.resume_anyway)
    check_world(layout, model)
    meta = empty_model(model.config)
    check_engine(layout, settings, resume=options.resume)
    check_optimizer(layout, settings)
    check_in_flight(layout, settings)
    check_trackers(options, layout)
    if layout.seq_len < 2:
        raise ValueError(f"seq_len={layout.seq_len}: a sequence of one token has nothing to predict; give 2 or more")
    if not 0 < options.timeout_minutes <= MOST_MINUTES:
        raise ValueError(
            f"timeout_minutes={options.timeout_minutes:g}: give minutes above 0, and at most {MOST_MINUTES}"
        )
    check_packing(options, layout, meta)
    sources, pretrained = found_sources(options), model_folder(options)
    out = Path(options.out) if options.out is not None else None
    if out is None and (options.checkpoint_every or resume):
        raise ValueError("checkpoints need a folder: give --out DIR")
    check_export(options)
    if options.trace is not None:
        check_writable(Path(options.trace).resolve().parent, f"trace={options.trace!r}")
    lock = _own_folder(out) if out is not None else None
    # The ranks meet, and from now on a hang is told and bounded.
    timeout_s = options.timeout_minutes * 60
    activity.now("meeting the other ranks")
    with bounded_meeting(timeout_s=2 * timeout_s + 90):  # after torch's own limit, which says more
        mesh = meet(layout, timeout_s=timeout_s)
    watch = HangWatch(activity, timeout_s=timeout_s)
    if out is not None:
        check_shared(out)
    activity.now("reading the data")
    corpus = read_corpus(sources, out, model.vocab_size, activity)
    batches = _rows(options, layout, settings, corpus)
    activity.now("building the model")
    parallel_model, gauge = build(layout, model, settings, mesh, pretrained)
    # Where the run is kept, and who is told of it.
    checkpoints = None
    if out is not None:
        compared = comparable_settings(parallel_model.stage.config.to_dict(), layout, settings)
        compared |= {"data": corpus.identity, "precision": parallel_model.precision}
        compared |= {"packing": options.packing, "data_weights": list(options.data_weights)}
        checkpoints = Checkpoints(
            folder=out / "checkpoints", settings=compared, keep=options.keep_checkpoints,
            background=Background(timeout_s=2 * timeout_s) if options.async_checkpoints else None,
        )  # fmt: skip
    activity.now("opening what the run leaves")
    teller = Teller(options, layout, model, settings, gauge)
    run = TrainingRun(
        gauge=gauge, checkpoints=checkpoints, resume=resume, activity=activity, on_start=teller.start,
        on_step=teller.step, on_evaluation=teller.evaluation, on_reports=teller.reports,
    )  # fmt: skip
    with teller, gauge:
        if isinstance(parallel_model, AsynchronousModel):
            result = train_asynchronously(parallel_model, batches, run)
        else:
            result = train(parallel_model, layout, batches, settings, run)
    result = largest_memory(result, parallel_model.device)
    # The model leaves, and what is reported of it is what can be read there.
    if options.export is not None:
        activity.now("exporting the model")
        export_model(parallel_model, Path(options.export), sources.tokenizer)
        del parallel_model, run
        if settings.held_out_batches:
            result.held_out_loss = exported_loss(Path(options.export), layout, settings, mesh, batches)
    # Results are on disk before any rank lets go of its groups, and no rank does before all are done.
    activity.now("writing the results")
    teller.end(result, corpus)
    dist.barrier()
    watch.stop()
    dist.destroy_process_group()
    del lock  # kept until here


def _rows(options: TrainOptions, layout: Layout, settings: TrainSettings, corpus: Corpus) -> Rows:
    """The rows of every step. Raises ValueError where the text has none, before a model is built for it."""
    order = Order(
        seq_len=layout.seq_len, global_batch=layout.global_batch, seed=settings.seed,
        shares=shares_of(options.data_weights or (1.0,)),
    )  # fmt: skip
    held_out = corpus.held_out_texts if settings.held_out_batches else None
    if not options.packing:
        return WindowRows(corpus.train_texts, held_out, order)
    if corpus.without_bounds is not None:
        raise ValueError(
            f"packing=true, but {corpus.without_bounds} does not say where its documents begin: give the place of each "
            f"one's first token in {bounds_of(Path(corpus.without_bounds)).name} beside it, or leave packing out"
        )
    return PackedRows(corpus.train_texts, held_out, order)


def _settings(options: TrainOptions) -> TrainSettings:
    names = {field.name for field in fields(TrainSettings)}
    values = {name: getattr(options, name) for name in names}
    return TrainSettings(**values | {"precision": None if options.precision == "auto" else options.precision})


def _own_folder(out: Path) -> FolderLock | None:
    """Make the folder, now and not after hours of training; rank 0 keeps other runs out of it.

    Raises:
        ValueError: results could not be written there, or another run is using it.
    """
    check_writable(out, f"--out {out}")
    return FolderLock(out) if os.environ.get("RANK", "0") == "0" else None
