"""How a training step runs on many ranks. Knows torch, and transformers where a whole decoder is meant; knows nothing
of layouts, files or the command line.

These are the names most users need; each package offers the rest of its own (`fourfold.parallel.stream.dpo_loss`).
"""

from typing import TYPE_CHECKING

if __name__ != "fourfold.parallel":
    raise ImportError(f"import fourfold.parallel, not {__name__!r}: a second copy would make second classes")

from fourfold.parallel.lazy import exported

if TYPE_CHECKING:
    from fourfold.parallel.decoder.parallel_model import ParallelModel as ParallelModel
    from fourfold.parallel.decoder.parallelize import parallelize as parallelize
    from fourfold.parallel.mesh import init_mesh as init_mesh
    from fourfold.parallel.pipeline.emulator import PipelinedBackpropEmulator as PipelinedBackpropEmulator
    from fourfold.parallel.pipeline.mitigation import spike_compensation as spike_compensation
    from fourfold.parallel.pipeline.runtime import PipelinedBackprop as PipelinedBackprop
    from fourfold.parallel.ring.attention import ring_attention as ring_attention
    from fourfold.parallel.ring.batch import shard_batch as shard_batch
    from fourfold.parallel.ring.transformers import use_ring_attention as use_ring_attention
    from fourfold.parallel.sequence.tensors import shard_sequence as shard_sequence
    from fourfold.parallel.sequence.tensors import unshard_sequence as unshard_sequence
    from fourfold.parallel.stream.model import stream_backprop as stream_backprop
    from fourfold.parallel.stream.statistics import token_logprobs as token_logprobs

__getattr__, __dir__, __all__ = exported(
    __name__,
    {
        "ParallelModel": "decoder.parallel_model",
        "PipelinedBackprop": "pipeline.runtime",
        "PipelinedBackpropEmulator": "pipeline.emulator",
        "init_mesh": "mesh",
        "parallelize": "decoder.parallelize",
        "ring_attention": "ring.attention",
        "shard_batch": "ring.batch",
        "shard_sequence": "sequence.tensors",
        "spike_compensation": "pipeline.mitigation",
        "stream_backprop": "stream.model",
        "token_logprobs": "stream.statistics",
        "unshard_sequence": "sequence.tensors",
        "use_ring_attention": "ring.transformers",
    },
)
