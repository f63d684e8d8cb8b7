"""Exact self-attention over a sequence that is sharded across the ranks of a group.

Every rank keeps its queries and sees the keys and values of the others, hop by hop (ring.hops), while the next ones are
on their way; a fused kernel does each block and the log-sum-exps merge them, so no rank ever holds a row of scores.
What the mask empties is neither computed nor sent: attention.blocks cuts each hop into unmasked blocks, and only the
keys that some block reads travel, straight from the rank that holds them. torch's context_parallel does causal zigzag
on lengths that divide; ring-flash-attention, yunchang and MagiAttention need CUDA.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.attention.backends import select_backend
from fourfold.parallel.attention.blocks import plan_hops
from fourfold.parallel.attention.calls import takes_window
from fourfold.parallel.attention.kernels import SavedAttention
from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.heads import HeadExchange, check_heads
from fourfold.parallel.ring.hops import Ring
from fourfold.parallel.ring.options import AgreedLength, RingOptions, check_tensors, shared_sequence
from fourfold.parallel.sequence.sharding import mask_reach
from fourfold.parallel.sequence.tensors import document_ends


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    sharding: str = "zigzag",
    window: tuple[int, int] | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    heads_degree: int = 1,
    backend: str | None = None,
    seq_len: int | None = None,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Attend this rank's queries to every key of the sequence that the mask lets them see.

    Args:
        q: [B, H, S_local, D]: this rank's tokens, as `shard_sequence` gives them. fp32, bf16, fp16 or fp64.
        k: [B, H_kv, S_local, D]; H_kv divides H, consecutive query heads share a key head.
        v: [B, H_kv, S_local, D_v]; D_v is D in most models, DeepSeek's latent attention has another.
        group: the context-parallel group, N ranks, all of which must call with the same arguments. None: as in torch,
            the default group; one process alone where torch.distributed is not started.
        causal: keys after a query are masked.
        scale: of the scores before softmax; None is D**-0.5.
        sharding: "contiguous", "zigzag" or "striped": how the tokens were sharded.
        window: (left, right) keys seen on either side of a query, -1 for all; causal makes right 0.
        cu_seqlens: starts of the packed documents and the end of the last, global, from 0. B must be 1. A query sees
            its own document only; tokens past the last end see nothing and get zeros and zero gradients.
        heads_degree: h, a divisor of N. Groups of h consecutive ranks swap sequence for heads (Ulysses), and only
            N/h groups form the ring. h must divide H, and divide H_kv or be a multiple of it.
        backend: a name of attention.BACKENDS; None chooses by device, dtype and head size.
        seq_len: tokens of the whole sequence. None asks the ranks for their lengths. Either way a shard of the wrong
            length, and arguments that differ between ranks, are an error on every rank.
        sinks: [H], a score of each head that every query has beside those of its keys, with a value of zero (gpt-oss's
            attention sinks); whole on every rank, and its gradient is to be summed over the group like parameters'.
        soft_cap: the scores become soft_cap * tanh(scores / soft_cap), as Gemma 2's do.
    Returns:
        [B, H, S_local, D_v] in q.dtype. Gradients are the exact ones of the sum of all ranks' losses: parameters that
        q, k and v came from get their part on each rank, to be summed over the group.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, and anything not supported, with its mend.
    Cost: u = B*H_kv*D*L/N elements, L tokens in all. Without a mask every rank sends 2(N-1)u forward, and backward
        those again and 2(N-1)u in fp32. Masks send less: causal zigzag 3/4 of it in the mean, causal contiguous half,
        windows and documents only the keys that someone sees; attention.blocks.keys_sent counts them.
        heads_degree h: N/h - 1 hops of the same bytes instead of N - 1, each with h times the work to be hidden by, for
        one swap of (h-1)/h * (2H + 2H_kv) * B*D*L/N elements each way, among neighbours. So take the largest h that
        the key heads allow and one node holds; above H_kv, replicated keys give the gain back.
        Before them an all-reduce of 24 bytes, and where seq_len is None 8 bytes from each rank; with NCCL alone (no
        gloo beside it, which init_mesh starts) the host waits for them.
        Memory beside inputs and gradients: out in fp32, keys of two hops (4u at most), a block's results.
    Source: Li et al. 2021 (arXiv 2105.13120), Ring Self-Attention, with the online softmax of Liu et al. 2023
        (arXiv 2310.01889); heads x ring: Fang and Zhao 2024 (arXiv 2405.07719). Differs: keys go straight to the
        ranks that need them, so nothing masked is forwarded.
    """
    reach = None if window is None else cast(tuple[int, int], tuple(window))
    options = RingOptions(
        causal=causal, scale=scale, sharding=sharding, window=reach,
        cu_seqlens=document_ends(cu_seqlens), heads_degree=heads_degree, backend=backend, seq_len=seq_len,
        soft_cap=soft_cap,
    )  # fmt: skip
    out: Tensor = ring_attend(q, k, v, group, options, sinks)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None,
    options: RingOptions,
    sinks: Tensor | None = None,
) -> Tensor:
    """ring_attention, which see, with its options in one.

    Outside of compiled graphs: the ring's messages are no operators a compiler could reorder safely.
    """
    if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.device != q.device):
        raise ValueError(
            f"sinks {tuple(sinks.shape)} on {sinks.device}: one for each of {q.shape[1]} heads on {q.device}"
        )
    out: Tensor = _RingAttention.apply(q, k, v, sinks, plan_ring(q, k, v, group, options))  # type: ignore[no-untyped-call]
    return out


def plan_ring(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, options: RingOptions) -> Ring:
    """Check the arguments of ring_attention, which see, and plan its blocks and hops. Plans are remembered."""
    place = place_in(group)
    try:
        check_tensors(q, k, v)
        if options.cu_seqlens is not None and q.shape[0] != 1:
            raise ValueError(f"cu_seqlens with a batch of {q.shape[0]}: pack the documents into one row (B=1)")
        mask_reach(options.causal, options.window)
        check_heads(q.shape[1], k.shape[1], options.heads_degree, place.size)
        backend, problem = select_backend(options.backend, q, v, options.soft_cap), None
    except ValueError as error:
        if place.size == 1 or isinstance(options.seq_len, AgreedLength):
            raise
        problem = str(error)
    sequence = shared_sequence((q, k, v), place, options, problem)
    window = options.window[0] + 1 if options.causal and options.window and options.window[0] >= 0 else None
    windows = takes_window(backend, q, window)
    return Ring(
        place=place,
        hops=plan_hops(place.rank // options.heads_degree, sequence, backend.leaf, windows),
        heads=HeadExchange(place, options.heads_degree, sequence.shards, q.shape[1], k.shape[1]),
        backend=backend,
        scale=q.shape[-1] ** -0.5 if options.scale is None else options.scale,
    )


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: Ring) -> Tensor:
        saved = ring.forward(q, k, v, sinks)
        ctx.save_for_backward(*saved, sinks)
        ctx.ring = ring
        return ring.to_tokens(saved.out)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks = ctx.saved_tensors
        gradients, sink_gradient = ctx.ring.backward_with_sinks(grad_out, SavedAttention(*saved), sinks)
        return *gradients, sink_gradient, None
