"""Pipelined backpropagation with weight prediction (Kosson et al. 2021): the pipeline that never drains."""

from typing import TYPE_CHECKING

from fourfold.parallel.lazy import exported

if TYPE_CHECKING:
    from fourfold.parallel.pipeline.emulator import PipelinedBackpropEmulator as PipelinedBackpropEmulator
    from fourfold.parallel.pipeline.failure import PipelineError as PipelineError
    from fourfold.parallel.pipeline.mitigation import Mitigation as Mitigation
    from fourfold.parallel.pipeline.mitigation import equivalent_horizon as equivalent_horizon
    from fourfold.parallel.pipeline.mitigation import scale_adam_hyperparameters as scale_adam_hyperparameters
    from fourfold.parallel.pipeline.mitigation import scale_hyperparameters as scale_hyperparameters
    from fourfold.parallel.pipeline.mitigation import spike_compensation as spike_compensation
    from fourfold.parallel.pipeline.optimizer import DelayedOptimizer as DelayedOptimizer
    from fourfold.parallel.pipeline.optimizer import NamedParameters as NamedParameters
    from fourfold.parallel.pipeline.partition import balanced_ranges as balanced_ranges
    from fourfold.parallel.pipeline.program import Program as Program
    from fourfold.parallel.pipeline.report import StageReport as StageReport
    from fourfold.parallel.pipeline.report import write_reports as write_reports
    from fourfold.parallel.pipeline.runtime import PipelinedBackprop as PipelinedBackprop
    from fourfold.parallel.pipeline.schedule import PipelineSchedule as PipelineSchedule
    from fourfold.parallel.pipeline.settings import ClipNorm as ClipNorm

__getattr__, __dir__, __all__ = exported(
    __name__,
    {
        "ClipNorm": "settings",
        "DelayedOptimizer": "optimizer",
        "Mitigation": "mitigation",
        "NamedParameters": "optimizer",
        "PipelineError": "failure",
        "PipelineSchedule": "schedule",
        "PipelinedBackprop": "runtime",
        "PipelinedBackpropEmulator": "emulator",
        "Program": "program",
        "StageReport": "report",
        "balanced_ranges": "partition",
        "equivalent_horizon": "mitigation",
        "scale_adam_hyperparameters": "mitigation",
        "scale_hyperparameters": "mitigation",
        "spike_compensation": "mitigation",
        "write_reports": "report",
    },
)
