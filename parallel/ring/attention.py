"""Exact self-attention over a sequence that is sharded across the ranks of a group.

Every rank keeps its queries and sees the keys and values of the others, hop by hop, while the next ones are on their
way; a fused kernel does each block and the log-sum-exps merge them, so no rank ever holds a row of scores. What the
mask empties is neither computed nor sent: attention.blocks cuts each hop into unmasked blocks, and only the keys that
some block reads travel, straight from the rank that holds them. torch's context_parallel does causal zigzag on
lengths that divide; ring-flash-attention, yunchang and MagiAttention need CUDA.

Deterministic: blocks, hops and sums have one order, so a repeat gives the same bits (on CUDA if the kernel does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.attention.backends import AttentionBackend, Gradients, accumulation_dtype, merge, select_backend
from fourfold.parallel.attention.blocks import Block, Hop, Span, plan_hops
from fourfold.parallel.communication import Exchange, Place, exchange, place_in
from fourfold.parallel.ring.arguments import check_tensors, sequence_length
from fourfold.parallel.ring.heads import HeadExchange, check_heads
from fourfold.parallel.sequence.sharding import mask_reach, shard_ranges
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
) -> Tensor:
    """Attend this rank's queries to every key of the sequence that the mask lets them see.

    Args:
        q: [B, H, S_local, D]: this rank's tokens, as `shard_sequence` gives them. fp32, bf16, fp16 or fp64.
        k, v: [B, H_kv, S_local, D]; H_kv divides H, consecutive query heads share a key head.
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
        seq_len: tokens of the whole sequence. None asks the ranks (8 bytes a rank, and on CUDA one host wait a call),
            and makes a shard of the wrong length an error on every rank. A given one is checked by each rank alone.
    Returns:
        [B, H, S_local, D] in q.dtype. Gradients are the exact ones of the sum of all ranks' losses: parameters behind
        q, k and v get their part on each rank, to be summed over the group.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, and anything not supported, with its mend.
    Cost: u = B*H_kv*D*L/N elements, L tokens in all. Without a mask every rank sends 2(N-1)u forward, and backward
        those again and 2(N-1)u in fp32. Masks send less: causal zigzag 3/4 of it in the mean, causal contiguous half,
        windows and documents only the keys that someone sees; attention.blocks.keys_sent counts them.
        heads_degree h: N/h - 1 hops of the same bytes instead of N - 1, each with h times the work to hide behind, for
        one swap of (h-1)/h * (2H + 2H_kv) * B*D*L/N elements each way, among neighbours. So take the largest h that
        the key heads allow and one node holds; above H_kv, replicated keys give the gain back.
        Memory beside inputs and gradients: out in fp32, keys of two hops (4u at most), a block's results.
    Source: Li et al. 2021 (arXiv 2105.13120), Ring Self-Attention, with the online softmax of Liu et al. 2023
        (arXiv 2310.01889); heads x ring: Fang and Zhao 2024 (arXiv 2405.07719). Differs: keys go straight to the
        ranks that need them, so nothing masked is forwarded.
    """
    ring = plan_ring(
        q, k, v, group, causal=causal, scale=scale, sharding=sharding, window=window, cu_seqlens=cu_seqlens,
        heads_degree=heads_degree, backend=backend, seq_len=seq_len,
    )  # fmt: skip
    out: Tensor = _call(q, k, v, ring)
    return out


@dataclass(frozen=True, slots=True)
class Ring:
    """One call of ring_attention, planned; made by `plan_ring`.

    Its forward and backward are for callers that are an autograd.Function themselves (StreamBP) and decide what to
    keep in between. Every rank of the group must call each of them, in the same order.
    """

    place: Place
    hops: tuple[Hop, ...]
    heads: HeadExchange
    backend: AttentionBackend
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out in q.dtype, lse) to keep for `backward`: [B, H/h, h*S_local, D] and [B, H/h, h*S_local]."""
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = self.heads.to_heads(q, k, v)
            out, lse = _forward(q, k, v, self)
            return out.to(q.dtype), lse

    def to_tokens(self, out: Tensor) -> Tensor:
        """Attention's output for this rank's tokens, [B, H, S_local, D], from what `forward` gave."""
        return self.heads.to_tokens(out)

    def backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """(dq, dk, dv) in their tensors' dtypes, from the gradient [B, H, S_local, D] of `to_tokens(out)`."""
        dtypes = q.dtype, k.dtype, v.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = self.heads.to_heads(q, k, v)
            (grad_out,) = self.heads.to_heads(grad_out)
            gradients = self.heads.gradients_to_tokens(*_backward(grad_out, q, k, v, out, lse, self))
            dq, dk, dv = (gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True))
            return dq, dk, dv


def plan_ring(
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
) -> Ring:
    """Check the arguments of ring_attention, which see, and plan its blocks and hops. Plans are remembered."""
    place = place_in(group)
    check_tensors(q, k, v)
    ends = document_ends(cu_seqlens)
    if ends is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens with a batch of {q.shape[0]}: pack the documents into one row (B=1)")
    mask_reach(causal, window)
    check_heads(q.shape[1], k.shape[1], heads_degree, place.size)
    chosen = select_backend(backend, q, k)
    seq_len = sequence_length(q, place, sharding, ends, seq_len)
    return Ring(
        place=place,
        hops=plan_hops(
            place.rank // heads_degree,
            place.size,
            seq_len,
            sharding,
            causal,
            None if window is None else (window[0], window[1]),
            ends,
            heads_degree,
            chosen.leaf,
        ),
        heads=HeadExchange(
            place, heads_degree, shard_ranges(seq_len, place.size, sharding, ends), q.shape[1], k.shape[1]
        ),
        backend=chosen,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call(q: Tensor, k: Tensor, v: Tensor, task: Ring) -> Tensor:
    """Outside of compiled graphs: the ring's messages are no operators a compiler could reorder safely."""
    out: Tensor = _RingAttention.apply(q, k, v, task)  # type: ignore[no-untyped-call]
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: Ring) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = task.heads.to_heads(q, k, v)
            out, lse = _forward(q, k, v, task)
            out = out.to(q.dtype)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.task = task
            return task.heads.to_tokens(out)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        task: Ring = ctx.task
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            (grad_out,) = task.heads.to_heads(grad_out)
            gradients = _backward(grad_out, q, k, v, out, lse, task)
            dq, dk, dv = task.heads.gradients_to_tokens(*gradients)
            return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _forward(q: Tensor, k: Tensor, v: Tensor, task: Ring) -> tuple[Tensor, Tensor]:
    """Merged output and lse of this rank's queries, both in the accumulation dtype."""
    out = _zeros_like(q)
    lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf).transpose(1, 2)
    keys, values = k, v
    for step, hop in enumerate(task.hops):
        following = _Arrival(k, v, task, step + 1)
        for block in hop.blocks:
            rows = slice(*block.q)
            block_out, block_lse = _attend(q, keys, values, block, task)
            merge(out[:, :, rows], lse[:, :, rows], block_out, block_lse)
        keys, values = following.wait()
    return out, lse


def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: Ring) -> Gradients:
    """(dq, dk, dv) in the accumulation dtype. Gradients of keys go back to their rank while the next hop computes."""
    dq, dk, dv = _Sum(q), _Sum(k), _Sum(v)
    returning: _Return | None = None
    held = [k, v]
    for step, hop in enumerate(task.hops):
        following = _Arrival(k, v, task, step + 1)
        key_sum, value_sum = (dk, dv) if step == 0 else (_Sum(held[0]), _Sum(held[1]))
        for block in hop.blocks:
            gradients = _attend_backward(grad_out, q, held[0], held[1], out, lse, block, task)
            for total, span, part in zip((dq, key_sum, value_sum), (block.q, block.k, block.k), gradients, strict=True):
                total.add(span, part)
        held.clear()  # free the keys before the next buffers are made
        leaving = _Return(key_sum, value_sum, dk, dv, hop, task) if step else None
        held.extend(following.wait())
        if returning:
            returning.wait()
        returning = leaving
    if returning:
        returning.wait()
    return dq.value(), dk.value(), dv.value()


def _attend(q: Tensor, k: Tensor, v: Tensor, block: Block, task: Ring) -> tuple[Tensor, Tensor]:
    q, k, v = q[:, :, slice(*block.q)], k[:, :, slice(*block.k)], v[:, :, slice(*block.k)]
    if block.shape != "anticausal":
        return task.backend.forward(q, k, v, causal=block.shape == "causal", scale=task.scale)
    out, lse = task.backend.forward(q.flip(2), k.flip(2), v.flip(2), causal=True, scale=task.scale)
    return out.flip(2), lse.flip(2)


def _attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, task: Ring
) -> Gradients:
    grad_out, q, out, lse = (x[:, :, slice(*block.q)] for x in (grad_out, q, out, lse))
    k, v = k[:, :, slice(*block.k)], v[:, :, slice(*block.k)]
    if block.shape != "anticausal":
        return task.backend.backward(grad_out, q, k, v, out, lse, causal=block.shape == "causal", scale=task.scale)
    flipped = (x.flip(2) for x in (grad_out, q, k, v, out, lse))
    dq, dk, dv = task.backend.backward(*flipped, causal=True, scale=task.scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


class _Arrival:
    """The keys and values of a hop on their way here, and this rank's own on theirs."""

    def __init__(self, k: Tensor, v: Tensor, task: Ring, step: int) -> None:
        self._tensors, self._flight = (k, v), None
        if step >= len(task.hops):
            return
        hop = task.hops[step]
        degree, inner = task.heads.degree, task.heads.inner
        buffers = [_message(x, hop.num_received) for x in (k, v)]
        self._tensors = (buffers[0].transpose(1, 2), buffers[1].transpose(1, 2))
        self._flight = exchange(
            task.place,
            [(_pack(x, hop.send), hop.target * degree + inner) for x in (k, v)],
            [(buffer, hop.source * degree + inner) for buffer in buffers],
        )

    _flight: Exchange | None
    _tensors: tuple[Tensor, Tensor]

    def wait(self) -> tuple[Tensor, Tensor]:
        if self._flight:
            self._flight.wait()
        return self._tensors


class _Return:
    """Gradients of another rank's keys on their way home, and those of this rank's keys coming in."""

    def __init__(self, keys: "_Sum", values: "_Sum", dk: "_Sum", dv: "_Sum", hop: Hop, task: Ring) -> None:
        degree, inner = task.heads.degree, task.heads.inner
        num_expected = sum(stop - start for start, stop in hop.send)
        self._totals, self._spans = (dk, dv), hop.send
        self._buffers = [total.message(num_expected) for total in (dk, dv)]
        self._flight = exchange(
            task.place,
            [(total.value().transpose(1, 2).contiguous(), hop.source * degree + inner) for total in (keys, values)]
            if hop.receive
            else [],
            [(buffer, hop.target * degree + inner) for buffer in self._buffers],
        )

    def wait(self) -> None:
        self._flight.wait()
        for total, buffer in zip(self._totals, self._buffers, strict=True):
            start = 0
            for span in self._spans:
                stop = start + span[1] - span[0]
                total.add(span, buffer[:, start:stop].transpose(1, 2))
                start = stop


class _Sum:
    """A gradient summed from parts over spans of tokens, in the accumulation dtype."""

    def __init__(self, like: Tensor) -> None:
        # Of `like` only what a zero of its shape needs: the tensor itself may go.
        self._zero = like.new_zeros((), dtype=accumulation_dtype(like.dtype))
        self._batch, self._heads, self._tokens, self._size = like.shape
        self._total: Tensor | None = None

    def add(self, span: Span, part: Tensor) -> None:
        if self._total is None and span == (0, self._tokens) and part.dtype == self._zero.dtype:
            self._total = part
        else:
            self.value()[:, :, slice(*span)].add_(part)

    def value(self) -> Tensor:
        if self._total is None:
            self._total = self.message(self._tokens).zero_().transpose(1, 2)
        return self._total

    def message(self, num_tokens: int) -> Tensor:
        """An empty [B, n, H, D] of this sum's dtype."""
        return self._zero.new_empty((self._batch, num_tokens, self._heads, self._size))


def _zeros_like(x: Tensor) -> Tensor:
    """Zeros of x's shape in the accumulation dtype, tokens before heads in memory as kernels and models have them."""
    batch, heads, tokens, size = x.shape
    return x.new_zeros((batch, tokens, heads, size), dtype=accumulation_dtype(x.dtype)).transpose(1, 2)


def _message(x: Tensor, num_tokens: int) -> Tensor:
    return x.new_empty((x.shape[0], num_tokens, x.shape[1], x.shape[3]))


def _pack(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Spans of tokens as one contiguous [B, n, H, D]; no copy for one span of a tensor that is laid out so."""
    tokens = x.transpose(1, 2)
    if len(spans) == 1:
        return tokens[:, slice(*spans[0])].contiguous()
    if not spans:
        return tokens[:, :0]
    return torch.cat([tokens[:, slice(*span)] for span in spans], dim=1)
