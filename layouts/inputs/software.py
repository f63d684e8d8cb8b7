"""What the training software does: dtypes, fusion, what it shards and what it overlaps.

The same layout costs differently in different software. A `Software` states those conventions once, so that published
runs of other frameworks, and our own runtime on processors and on GPUs, go through the same formulas.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """Bytes are an element's; `*_overlap` is the share of the neighbouring compute that can hide communication."""

    name: str
    compute_bytes: int
    """Activations and matmuls."""
    weight_bytes: int
    """The copy that forward and backward read, held on every rank below ZeRO 3."""
    grad_bytes: int
    state_bytes: int
    """Optimizer states, with the fp32 master copy where weights are not fp32."""
    reduce_bytes: int
    """Gradients on the wire."""
    gather_bytes: int
    """Weights on the wire (ZeRO 1 to 3)."""
    cast_bytes: int = 0
    """A low-precision copy of each weight that autocast makes for a micro-batch, kept by its graph till backward."""
    accumulates_whole: bool = False
    """Whether ZeRO 3 keeps whole gradients between micro-batches, to reduce them once a step (FSDP2 without sync)."""
    fresh_gradients: bool = False
    """Gradients are made in the first backward of a step; DDP's buckets take a copy of them at the last."""
    pipeline_buffers: bool = False
    """Whether a stage has a receive buffer for every micro-batch of the step (torch.distributed.pipelining)."""
    tp_kept: float = 0.0
    """Hidden states that a layer keeps besides, where tp cuts it (DTensor; traced)."""
    allocator_waste: bool = True
    """Whether the device's allocator fragments; a host's memory is counted tensor by tensor."""
    fused_norm: bool = True
    norm_kept_bytes: float = 8.0
    """What an unfused norm keeps an element besides its input and output: both again in fp32."""
    fused_ops: bool = True
    """Rotary embedding, activation and residuals as fused kernels."""
    attention: str = "flash2"
    """flash2, flash1, triton, fused (softmax kernel, scores stored) or eager (several copies)."""
    logits_sharded: bool = True
    """Vocabulary-parallel loss; else each tp rank holds all logits."""
    logits_bytes: float = 10.0
    """At the peak of the loss, a token and a vocabulary entry."""
    head_sharded: bool = True
    """Whether tp cuts the output projection."""
    logits_passes: float = 4.0
    """fp32 values read or written a token and a vocabulary entry by the loss, forward and backward."""
    tp_overlap: float = 0.0
    dp_overlap: float = 1.0
    zero3_overlap: float = 1.0
    pp_outermost: bool = True
    """Megatron's order of ranks (tp, cp, dp, pp); else ours (tp, cp, pp, dp)."""
    ends_in_cut: bool = False
    """Whether stages are cut with the embedding and the head as a layer each (stages.ends_in_cut)."""
    pp_scatter: bool = False
    """Tensor-parallel ranks send a slice each between stages, and gather inside the node."""
    accumulation_passes: float = 3.0
    """Gradients read or written a later micro-batch to add its own: two reads, a write; fewer fused into the matmul."""
    optimizer_passes: float = 7.0
    """fp32 values read or written a parameter a step, gradient clipping included."""
    checkpoint_stall_s: float = 0.0
    """What a micro-batch waits on a stage of a pipeline whose tp ranks recompute every layer."""
    extra_reserve_bytes: float = 0.0
    """Device memory outside the allocator besides what any software needs."""
    launched: bool = True
    """Operators run behind the host (CUDA); else the host itself computes."""


RUNTIME_CPU = Software(
    name="fourfold on CPU (fp32)", compute_bytes=4, weight_bytes=4, grad_bytes=4, state_bytes=8, reduce_bytes=4,
    gather_bytes=4, accumulates_whole=True, fresh_gradients=True, pipeline_buffers=True, tp_kept=1.0,
    allocator_waste=False, fused_norm=False,
    norm_kept_bytes=4.0, fused_ops=False, logits_bytes=12.0, dp_overlap=0.0, zero3_overlap=0.0, pp_outermost=False,
    optimizer_passes=10.0, launched=False,
)  # fmt: skip

RUNTIME_CUDA = Software(
    name="fourfold on CUDA (bf16 autocast, fp32 master weights)", compute_bytes=2, weight_bytes=4, grad_bytes=4,
    state_bytes=8, reduce_bytes=4, gather_bytes=2, cast_bytes=2, accumulates_whole=True, fresh_gradients=True,
    pipeline_buffers=True, tp_kept=1.0, fused_norm=False, norm_kept_bytes=10.0, fused_ops=False, logits_bytes=16.0,
    dp_overlap=0.8, zero3_overlap=0.8, pp_outermost=False, optimizer_passes=10.0,
)  # fmt: skip

MEGATRON = Software(
    name="3D parallel (bf16 weights, fp32 gradients and states)", compute_bytes=2, weight_bytes=2, grad_bytes=4,
    state_bytes=12, reduce_bytes=4, gather_bytes=2, tp_overlap=0.8, dp_overlap=0.8, zero3_overlap=0.8, pp_scatter=True,
    accumulation_passes=1.5,
)  # fmt: skip

FSDP = Software(
    name="FSDP (bf16 compute, fp32 shards, fused cross-entropy)", compute_bytes=2, weight_bytes=4, grad_bytes=4,
    state_bytes=8, reduce_bytes=2, gather_bytes=2, fused_ops=False, logits_bytes=6.0, dp_overlap=0.8, zero3_overlap=0.8,
)  # fmt: skip
