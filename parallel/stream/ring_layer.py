"""One decoder layer over a shard of a sequence, in chunks, its attention around the ring of the shards.

layer_run.py's chunks attend to all keys before them; here those lie on other ranks. So a layer is cut twice: q, k and v
of the whole shard are made chunk by chunk, the ring attends for the shard at once (it needs no more than output and lse
to go back), and all that follows goes in chunks again. Nothing of a chunk but q, k, v and the output lives as long as
the layer does, and the ring's messages do not count chunks.

    forward    project  = = = =        backward    finish and resume  = = = =  the gradient of attention's output
               ring     -------                    ring               -------  those of q, k and v
               resume   = = = =                    project            = = = =  the rest of the input's
               finish   ========
"""

from collections.abc import Sequence
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
from fourfold.parallel.stream.attention import Project, ScoreOptions
from fourfold.parallel.stream.layer_run import LayerGradients, LayerRun, StreamRun, finish_backward
from fourfold.parallel.stream.passing import room_for


@dataclass(frozen=True, kw_only=True, slots=True)
class RingRun(StreamRun):
    """What all layers of one pass over a shard share: `options` are the ring's, but for what a layer's module says."""

    group: dist.ProcessGroup | None
    options: RingOptions

    def function(self, here: LayerRun, x: Tensor) -> type[torch.autograd.Function]:
        """What computes this layer of x [B, S_local, d]. Every rank of the group must call."""
        return _RingLayer


def around_ring(run: StreamRun, ring: RingSettings, seq_len: int | None, cu_seqlens: Documents) -> RingRun:
    """The same pass over a shard.

    Args:
        ring: as use_ring_attention set it up.
        seq_len, cu_seqlens: of the whole sequence; None asks the ranks for its length, a layer at a time.
    Raises:
        ValueError: some rank would hold no token, which transformers' models cannot take; on every rank.
    """
    backend = run.backend if isinstance(run.backend, str) else ring.options.backend
    options = replace(ring.options, seq_len=seq_len, cu_seqlens=document_ends(cu_seqlens), backend=backend)
    if seq_len is not None:
        size = place_in(ring.group).size
        lengths = options.shared_by(size, seq_len).lengths
        if not all(lengths):
            raise ValueError(
                f"{seq_len} tokens in {options.sharding} shards are {lengths}, and a model needs at least one on every "
                f"rank: give longer sequences, or a smaller group than {size}"
            )
    same = {name: getattr(run, name) for name in StreamRun.__slots__}
    return RingRun(**same, group=ring.group, options=options)


@dataclass(slots=True)
class Resume:
    """Goes on with a chunk's attention output."""

    start: int
    out: Tensor
    unread: Sequence[str] = ("q_proj", "k_proj", "v_proj")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        return self.out


class _RingLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: LayerRun, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.here = here
        q, k, v, ring, sinks = _project(here, x, replay=False)
        attended_to = ring.forward(q, k, v, sinks)
        del q, k, v
        here.save(ctx, x, (attended_to.out, attended_to.lse) if here.stream.keep else ())
        attention, out, statistics = ring.to_tokens(attended_to.out), torch.empty_like(x), here.no_statistics(x)
        del attended_to
        for start, stop in here.chunks(x):
            call = Resume(start, attention[:, :, start:stop])
            attended = here.attend(x[:, start:stop], call, replay=False, piece="resume")
            assert attended is not None
            here.finish(x, attended, out, statistics, start)
        ctx.mark_non_differentiable(*statistics[1:])
        return out, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *router_grads: Tensor) -> tuple[Tensor | None, ...]:
        here: LayerRun = ctx.here
        ours = here.run.passing.may_overwrite(grad)
        x, kept = here.saved(ctx)
        with here.recomputing() as leaves:
            with torch.no_grad():
                q, k, v, ring, sinks = _project(here, x, replay=True)
                attended_to = ring.saved(q, k, v, *kept) if kept else ring.forward(q, k, v, sinks)
                del q, k, v
            passing, sums = here.run.passing, here.sums(x, leaves)
            grads = LayerGradients([grad, *router_grads], room_for(x, grad, ours), sums)
            assert here.stream.linears is not None
            with here.stream.linears.into(sums):
                attention = ring.to_tokens(attended_to.out)
                grad_out = _after_attention(here, x, attention, grads)
                del attention
                gradients, grad_sinks = ring.backward_with_sinks(grad_out, attended_to, sinks)
                if sinks is not None and grad_sinks is not None and sinks.requires_grad:
                    sums.backward([sinks], [], [grad_sinks])
                del attended_to, grad_out
                _before_attention(here, x, gradients, grads)
        passed = passing.hand_on(grads.x) if ctx.needs_input_grad[0] else None
        return passed, None, *sums.values(here.parameters)


def _project(here: LayerRun, x: Tensor, *, replay: bool) -> tuple[Tensor, Tensor, Tensor, Ring, Tensor | None]:
    """q, k, v of the whole shard, [B, heads, S_local, D], the ring for them, and the module's sinks."""
    assert isinstance(here.run, RingRun)
    whole: list[Tensor] = []
    for start, stop in here.chunks(x):
        call = Project(start)
        here.attend(x[:, start:stop], call, replay=replay, piece="project")
        assert call.taken is not None
        assert call.options is not None
        if not whole:  # tokens before heads in memory, as messages have them
            shapes = [(part.shape[0], x.shape[1], part.shape[1], part.shape[3]) for part in call.taken]
            whole = [part.new_empty(shape).transpose(1, 2) for part, shape in zip(call.taken, shapes, strict=True)]
        for total, part in zip(whole, call.taken, strict=True):
            total[:, :, start:stop] = part
    assert call.options is not None
    # transformers counts the query itself among the window's keys.
    window = None if call.options.window is None else (call.options.window - 1, -1)
    options = replace(here.run.options, scale=call.options.scale, window=window, soft_cap=call.options.soft_cap)
    ring = plan_ring(whole[0], whole[1], whole[2], here.run.group, options)
    return whole[0], whole[1], whole[2], ring, call.options.sinks


def _after_attention(here: LayerRun, x: Tensor, attention: Tensor, grads: LayerGradients) -> Tensor:
    """The gradient of attention's output [B, H, S_local, D]; fills grads.x."""
    grad_out = torch.empty_like(attention)
    for start, stop in here.chunks(x):
        chunk = x[:, start:stop].detach().requires_grad_()
        out = attention[:, :, start:stop].detach().requires_grad_()
        with torch.enable_grad():
            attended = here.attend(chunk, Resume(start, out), replay=True, piece="resume")
        assert attended is not None
        grad_attended = finish_backward(here, x, attended, grads, start)
        grad_chunk, grad_out[:, :, start:stop] = grads.sums.backward([attended], [chunk, out], [grad_attended])
        grads.x[:, start:stop] += grad_chunk
    return grad_out


def _before_attention(here: LayerRun, x: Tensor, gradients: Sequence[Tensor], grads: LayerGradients) -> None:
    """Add to grads.x and the parameters' gradients what comes through q, k and v."""
    for start, stop in here.chunks(x):
        chunk, call = x[:, start:stop].detach().requires_grad_(), Project(start)
        with torch.enable_grad():
            here.attend(chunk, call, replay=True, piece="project")
        assert call.taken is not None
        parts = [gradient[:, :, start:stop] for gradient in gradients]
        (grad_chunk,) = grads.sums.backward(call.taken, [chunk], parts)
        grads.x[:, start:stop] += grad_chunk
