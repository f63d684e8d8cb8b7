"""One decoder layer over a shard of a sequence, in chunks, its attention around the ring of the shards.

layer.py's chunks attend to all keys before them; here those lie on other ranks. So a layer is cut twice: q, k and v
of the whole shard are made chunk by chunk, the ring attends for the shard at once (it needs no more than output and lse
to go back), and all that follows goes in chunks again. Nothing of a chunk but q, k, v and the output lives as long as
the layer does, and the ring's messages do not count chunks.

Backward: everything after attention, chunk by chunk, gives the gradient of attention's output; one ring backward turns
it into those of q, k and v; then each chunk's projections are recomputed and go back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.attention import plan_ring
from fourfold.parallel.ring.hops import Ring
from fourfold.parallel.ring.options import RingOptions, RingSettings
from fourfold.parallel.sequence.tensors import Documents, document_ends
from fourfold.parallel.stream.gradients import ParameterSums, summed_linears
from fourfold.parallel.stream.layer import (
    LayerStream,
    Pass,
    Stop,
    begin,
    chunks_of,
    finish_backward,
    finish_forward,
    save,
    saved,
)
from fourfold.parallel.stream.patching import aliased, attention_function, entered_autocast
from fourfold.parallel.stream.random_numbers import random_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class RingPass(Pass):
    """What all layers of one pass over a shard share: `options` are the ring's, but for what a layer's module says."""

    group: dist.ProcessGroup | None
    options: RingOptions


def around_ring(shared: Pass, ring: RingSettings, seq_len: int | None, cu_seqlens: Documents) -> RingPass:
    """The same pass over a shard.

    Args:
        ring: as use_ring_attention set it up.
        seq_len, cu_seqlens: of the whole sequence; None asks the ranks for its length, a layer at a time.
    Raises:
        ValueError: some rank would hold no token, which transformers' models cannot take; on every rank.
    """
    backend = shared.backend if isinstance(shared.backend, str) else ring.options.backend
    options = replace(ring.options, seq_len=seq_len, cu_seqlens=document_ends(cu_seqlens), backend=backend)
    if seq_len is not None:
        size = place_in(ring.group).size
        lengths = options.shared_by(size, seq_len).lengths
        if not all(lengths):
            raise ValueError(
                f"{seq_len} tokens in {options.sharding} shards are {lengths}, and a model needs at least one on every "
                f"rank: give longer sequences, or a smaller group than {size}"
            )
    same = {name: getattr(shared, name) for name in Pass.__slots__}
    return RingPass(**same, group=ring.group, options=options)


class RingLayerStream(LayerStream):
    """Runs one decoder layer in chunks of a shard; `shared` is a RingPass. Every rank of the group must call."""

    @property
    def function(self) -> type[torch.autograd.Function]:
        return _RingLayer


@dataclass(slots=True)
class _Project:
    """Takes a chunk's q, k and v, [B, heads, chunk, D]."""

    start: int
    taken: tuple[Tensor, Tensor, Tensor] | None = None
    scale: float = 1.0
    window: int | None = None
    unread: Sequence[str] = ()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        if soft_cap is not None:
            raise ValueError(f"a soft cap of {soft_cap} on the scores: the ring has none; stream without cp")
        self.taken, self.scale, self.window = (q, k, v), scale, window
        raise Stop


@dataclass(slots=True)
class _Resume:
    """Goes on with a chunk's attention output."""

    start: int
    out: Tensor
    unread: Sequence[str] = ("q_proj", "k_proj", "v_proj")

    def attend(self, *args: Any) -> Tensor:
        return self.out


class _RingLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stream: LayerStream, arguments: Mapping[str, Any], shared: RingPass,
        lookup: tuple[Tensor, Tensor] | None, *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        begin(ctx, x, stream, arguments, shared, parameters)
        q, k, v, ring = _project(ctx, x, replay=False)
        attended_to = ring.forward(q, k, v)
        del q, k, v
        save(ctx, x, lookup, (attended_to.out, attended_to.lse) if stream.keep else ())
        attention, out = ring.to_tokens(attended_to.out), torch.empty_like(x)
        del attended_to
        for start, stop in chunks_of(0, x.shape[1], shared.chunk):
            with random_numbers(ctx.random, ("resume", start), replay=False):
                attended = stream.attend(x[:, start:stop], arguments, _Resume(start, attention[:, :, start:stop]))
            assert attended is not None
            finish_forward(ctx, x, attended, out, start, stop)
        statistics, ctx.statistics = ctx.statistics, ()  # kept on ctx, its own outputs would never be freed
        return out, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *router_grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kept = saved(ctx)
        stream, shared = ctx.stream, ctx.shared
        with (
            aliased(stream.layer, ctx.parameters) as aliases,
            entered_autocast(shared.autocast),
            attention_function(stream.attention.config),
        ):
            with torch.no_grad():
                q, k, v, ring = _project(ctx, x, replay=True)
                attended_to = ring.saved(q, k, v, *kept) if kept else ring.forward(q, k, v)
                del q, k, v
            sums, grad_x = ParameterSums(aliases, ctx.parameters), shared.passing.room_for(x, grad)
            with summed_linears(stream.layer, sums):
                attention = ring.to_tokens(attended_to.out)
                grad_out = _after_attention(ctx, x, attention, [grad, *router_grads], grad_x, sums)
                del attention
                gradients = ring.backward(grad_out, attended_to)
                del attended_to, grad_out
                _before_attention(ctx, x, gradients, grad_x, sums)
        passed = shared.passing.hand_on(grad_x) if ctx.needs_input_grad[0] else None
        return passed, None, None, None, None, *sums.values(ctx.parameters)


def _project(ctx: Any, x: Tensor, *, replay: bool) -> tuple[Tensor, Tensor, Tensor, Ring]:
    """q, k, v of the whole shard, [B, heads, S_local, D], and the ring for them."""
    shared: RingPass = ctx.shared
    whole: list[Tensor] = []
    for start, stop in chunks_of(0, x.shape[1], shared.chunk):
        task = _Project(start)
        with random_numbers(ctx.random, ("project", start), replay=replay):
            ctx.stream.attend(x[:, start:stop], ctx.arguments, task)
        assert task.taken is not None
        if not whole:  # tokens before heads in memory, as messages have them
            shapes = [(part.shape[0], x.shape[1], part.shape[1], part.shape[3]) for part in task.taken]
            whole = [part.new_empty(shape).transpose(1, 2) for part, shape in zip(task.taken, shapes, strict=True)]
        for total, part in zip(whole, task.taken, strict=True):
            total[:, :, start:stop] = part
    # transformers counts the query itself among the window's keys.
    window = None if task.window is None else (task.window - 1, -1)
    options = replace(shared.options, scale=task.scale, window=window)
    ring = plan_ring(whole[0], whole[1], whole[2], shared.group, options)
    return whole[0], whole[1], whole[2], ring


def _after_attention(
    ctx: Any, x: Tensor, attention: Tensor, grads: Sequence[Tensor], grad_x: Tensor, sums: ParameterSums
) -> Tensor:
    """The gradient of attention's output [B, H, S_local, D]; fills grad_x."""
    grad_out = torch.empty_like(attention)
    for start, stop in chunks_of(0, x.shape[1], ctx.shared.chunk):
        chunk = x[:, start:stop].detach().requires_grad_()
        out = attention[:, :, start:stop].detach().requires_grad_()
        with torch.enable_grad(), random_numbers(ctx.random, ("resume", start), replay=True):
            attended = ctx.stream.attend(chunk, ctx.arguments, _Resume(start, out))
        grad_attended = finish_backward(ctx, x, attended, grads, grad_x, start, stop, sums)
        grad_chunk, grad_out[:, :, start:stop] = sums.backward([attended], [chunk, out], [grad_attended])
        grad_x[:, start:stop] += grad_chunk
    return grad_out


def _before_attention(ctx: Any, x: Tensor, gradients: Sequence[Tensor], grad_x: Tensor, sums: ParameterSums) -> None:
    """Add to grad_x and the parameters' gradients what comes through q, k and v."""
    for start, stop in chunks_of(0, x.shape[1], ctx.shared.chunk):
        chunk, task = x[:, start:stop].detach().requires_grad_(), _Project(start)
        with torch.enable_grad(), random_numbers(ctx.random, ("project", start), replay=True):
            ctx.stream.attend(chunk, ctx.arguments, task)
        assert task.taken is not None
        parts = [gradient[:, :, start:stop] for gradient in gradients]
        (grad_chunk,) = sums.backward(task.taken, [chunk], parts)
        grad_x[:, start:stop] += grad_chunk
