"""The figures of a run of the pipeline in TensorBoard."""

from functools import partial

import pytest
import torch
from support import pipeline_models
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import write_reports


def test_tensorboard_has_every_stage_and_every_run(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    pipeline = PipelinedBackpropEmulator(
        pipeline_models.stages(3), optimizer=partial(torch.optim.SGD, lr=0.05), loss_fn=F.cross_entropy, observe=True
    )
    reports = []
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(2):
            pipeline.run(pipeline_models.batches(10))
            reports.append(pipeline.reports)
            write_reports(writer, pipeline.reports, step)
    events = accumulators.EventAccumulator(str(tmp_path)).Reload()
    for name in ("delay_mean", "prediction_error", "gradient_norm", "bubble", "idle_s"):
        for stage in range(3):
            found = [(event.step, event.value) for event in events.Scalars(f"pipeline/{name}/stage {stage}")]
            assert found == [(step, pytest.approx(getattr(each[stage], name))) for step, each in enumerate(reports)]
    assert reports[0][0].delay_mean > reports[0][1].delay_mean > 0
    assert reports[0][0].gradient_norm > 0
