"""How a training step runs on many ranks. Pure torch: knows nothing of layouts, files or the command line.

Names are re-exported lazily (PEP 562), because the planner imports this package's torch-free parts
(rank arithmetic, schedules, closed forms of memory) and must not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "fourfold.parallel":
    raise ImportError(f"import fourfold.parallel, not {__name__!r}: a second copy would make second classes")

if TYPE_CHECKING:
    from fourfold.parallel.decoder.async_pipeline import decoder_stages as decoder_stages
    from fourfold.parallel.decoder.async_pipeline import pipeline_decoder as pipeline_decoder
    from fourfold.parallel.decoder.balance import cut_decoder_into_stages as cut_decoder_into_stages
    from fourfold.parallel.decoder.balance import cut_into_stages as cut_into_stages
    from fourfold.parallel.decoder.parallelize import ParallelModel as ParallelModel
    from fourfold.parallel.decoder.parallelize import parallelize as parallelize
    from fourfold.parallel.mesh import init_mesh as init_mesh
    from fourfold.parallel.pipeline.emulator import PipelinedBackpropEmulator as PipelinedBackpropEmulator
    from fourfold.parallel.pipeline.links import PipelineError as PipelineError
    from fourfold.parallel.pipeline.mitigation import Mitigation as Mitigation
    from fourfold.parallel.pipeline.mitigation import equivalent_horizon as equivalent_horizon
    from fourfold.parallel.pipeline.mitigation import scale_adam_hyperparameters as scale_adam_hyperparameters
    from fourfold.parallel.pipeline.mitigation import scale_hyperparameters as scale_hyperparameters
    from fourfold.parallel.pipeline.mitigation import spike_compensation as spike_compensation
    from fourfold.parallel.pipeline.optimizer import DelayedOptimizer as DelayedOptimizer
    from fourfold.parallel.pipeline.partition import balanced_ranges as balanced_ranges
    from fourfold.parallel.pipeline.program import Program as Program
    from fourfold.parallel.pipeline.runtime import PipelinedBackprop as PipelinedBackprop
    from fourfold.parallel.pipeline.schedule import PipelineSchedule as PipelineSchedule
    from fourfold.parallel.ring.attention import ring_attention as ring_attention
    from fourfold.parallel.ring.linformer import linformer_attention as linformer_attention
    from fourfold.parallel.ring.transformers import shard_batch as shard_batch
    from fourfold.parallel.ring.transformers import use_ring_attention as use_ring_attention
    from fourfold.parallel.ring.two_pass import two_pass_ring_attention as two_pass_ring_attention
    from fourfold.parallel.sequence.sharding import attended_pairs as attended_pairs
    from fourfold.parallel.sequence.tensors import shard_labels as shard_labels
    from fourfold.parallel.sequence.tensors import shard_positions as shard_positions
    from fourfold.parallel.sequence.tensors import shard_sequence as shard_sequence
    from fourfold.parallel.sequence.tensors import unshard_sequence as unshard_sequence
    from fourfold.parallel.stream.losses import dpo_loss as dpo_loss
    from fourfold.parallel.stream.losses import grpo_loss as grpo_loss
    from fourfold.parallel.stream.losses import kto_loss as kto_loss
    from fourfold.parallel.stream.losses import sft_loss as sft_loss
    from fourfold.parallel.stream.memory import StreamMemory as StreamMemory
    from fourfold.parallel.stream.memory import max_seq_len as max_seq_len
    from fourfold.parallel.stream.memory import stream_memory as stream_memory
    from fourfold.parallel.stream.model import TokenStatistics as TokenStatistics
    from fourfold.parallel.stream.model import stream_backprop as stream_backprop
    from fourfold.parallel.stream.model import stream_backprop_disable as stream_backprop_disable
    from fourfold.parallel.stream.model import token_logprobs as token_logprobs
    from fourfold.parallel.stream.model import token_statistics as token_statistics
    from fourfold.parallel.stream.settings import StreamSettings as StreamSettings

_HOME = {
    "DelayedOptimizer": "pipeline.optimizer",
    "Mitigation": "pipeline.mitigation",
    "ParallelModel": "decoder.parallelize",
    "PipelineError": "pipeline.links",
    "PipelineSchedule": "pipeline.schedule",
    "PipelinedBackprop": "pipeline.runtime",
    "PipelinedBackpropEmulator": "pipeline.emulator",
    "Program": "pipeline.program",
    "StreamMemory": "stream.memory",
    "StreamSettings": "stream.settings",
    "TokenStatistics": "stream.model",
    "attended_pairs": "sequence.sharding",
    "balanced_ranges": "pipeline.partition",
    "cut_decoder_into_stages": "decoder.balance",
    "cut_into_stages": "decoder.balance",
    "decoder_stages": "decoder.async_pipeline",
    "dpo_loss": "stream.losses",
    "equivalent_horizon": "pipeline.mitigation",
    "grpo_loss": "stream.losses",
    "init_mesh": "mesh",
    "kto_loss": "stream.losses",
    "linformer_attention": "ring.linformer",
    "max_seq_len": "stream.memory",
    "parallelize": "decoder.parallelize",
    "pipeline_decoder": "decoder.async_pipeline",
    "ring_attention": "ring.attention",
    "scale_adam_hyperparameters": "pipeline.mitigation",
    "scale_hyperparameters": "pipeline.mitigation",
    "sft_loss": "stream.losses",
    "shard_batch": "ring.transformers",
    "shard_labels": "sequence.tensors",
    "shard_positions": "sequence.tensors",
    "shard_sequence": "sequence.tensors",
    "spike_compensation": "pipeline.mitigation",
    "stream_backprop": "stream.model",
    "stream_backprop_disable": "stream.model",
    "stream_memory": "stream.memory",
    "token_logprobs": "stream.model",
    "token_statistics": "stream.model",
    "two_pass_ring_attention": "ring.two_pass",
    "unshard_sequence": "sequence.tensors",
    "use_ring_attention": "ring.transformers",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"fourfold.parallel has no {name!r}")
    return getattr(import_module(f"fourfold.parallel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
