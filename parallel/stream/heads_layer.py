"""One decoder layer over a long sequence: attention by groups of key heads, all that follows it by chunks of tokens.

layer_run.py cuts attention by queries: every chunk reads the keys of its prefix again and adds to their gradients. That
is right for a CPU, whose caches hold a chunk. A GPU wants few large kernels: here a group of key heads, with the query
heads that share them, attends over the whole sequence at once. Nothing is merged by lse where the mask is causal alone,
no prefix is read twice, and the gradients of a group's keys and values are final when its kernel returns.

    forward    input   ========           backward   finish  = = = =   gradients of the heads' outputs
               heads   |0||1||2||3|                  heads   |3| ...   a group's q, k, v again, and their gradients,
               finish  = = = =                                         and what comes of them through the projections
                                                     input   ========  back through what precedes attention

The attention module's own code makes q, k and v, given some rows of its projections (head_groups.py); where they cannot
be cut, all heads are one group. What precedes attention, a norm, runs once for all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import SavedAttention
from fourfold.parallel.stream.attention import ScoreOptions, sinks_gradient
from fourfold.parallel.stream.gradients import ParameterSums
from fourfold.parallel.stream.head_groups import TRIED_TOKENS, head_cut, is_whole, project
from fourfold.parallel.stream.layer import HeadsOutput, TakeInput
from fourfold.parallel.stream.layer_run import LayerGradients, LayerRun, StreamRun, finish_backward
from fourfold.parallel.stream.passing import room_for
from fourfold.parallel.stream.random_numbers import random_numbers
from fourfold.parallel.stream.whole_attention import attend_whole, attend_whole_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsRun(StreamRun):
    """What all layers of one pass over a batch share.

    Attributes:
        groups: of key heads, at most so many, whose attention is done after one another. `chunk` is then the tokens
            that are projected at a time, and `mlp_chunk` those of all that follows attention.
    """

    groups: int

    def function(self, here: LayerRun, x: Tensor) -> type[torch.autograd.Function]:
        """What computes this layer of x [B, T, d]; by chunks of queries where attention sees more than its input."""
        cut = head_cut(here.stream)
        first = x[:, :TRIED_TOKENS].detach().requires_grad_(torch.is_grad_enabled())
        with random_numbers(here.random, ("try", 0), replay=False):
            taken = here.stream.attention_input(first, here.arguments, 0)
        if any(tensor.requires_grad for tensor in taken.others):
            return StreamRun.function(self, here, x)
        here.groups, here.idle_rows = ({},), {}
        if cut is None:
            return _HeadsLayer
        groups = cut.groups(self.groups)
        with torch.no_grad():
            whole = len(groups) == 1 or is_whole(here.stream, groups, taken)
        if whole:
            here.groups, here.idle_rows = groups, cut.one_head()
        return _HeadsLayer


def by_heads(run: StreamRun, groups: int) -> HeadsRun:
    """The same pass with attention by groups of key heads."""
    same = {name: getattr(run, name) for name in StreamRun.__slots__}
    return HeadsRun(**same, groups=groups)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the layer's own code hands its attention module: hidden states [B, T, d], and a call for each chunk."""

    hidden: Tensor
    chunks: Sequence[tuple[int, int, TakeInput]]


class _HeadsLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: LayerRun, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.here = here
        heads_out, lse = _attend(here, _inputs(here, x, replay=False), replay=False)
        here.save(ctx, x, (heads_out, lse) if here.stream.keep else ())
        del lse
        out, statistics = torch.empty_like(x), here.no_statistics(x)
        here.finish(x, heads_out, out, statistics, piece=partial(_finish, here))
        ctx.mark_non_differentiable(*statistics[1:])
        return out, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *router_grads: Tensor) -> tuple[Tensor | None, ...]:
        here: LayerRun = ctx.here
        ours = here.run.passing.may_overwrite(grad)
        x, kept = here.saved(ctx)
        with here.recomputing() as leaves:
            inputs = None if kept else _inputs(here, x, replay=True)
            heads_out, lse = kept if inputs is None else _attend(here, inputs, replay=True)
            passing, sums = here.run.passing, here.sums(x, leaves)
            grads = LayerGradients([grad, *router_grads], room_for(x, grad, ours), sums)
            assert here.stream.linears is not None
            with here.stream.linears.into(sums):
                grad_out = finish_backward(here, x, heads_out, grads, piece=partial(_finish, here))
                inputs = inputs or _inputs(here, x, replay=True)
                grad_hidden = _attend_backward(here, inputs, (heads_out, lse, grad_out), sums)
                del heads_out, lse, grad_out, inputs, kept
                _inputs_backward(here, x, grad_hidden, grads)
        passed = passing.hand_on(grads.x) if ctx.needs_input_grad[0] else None
        return passed, None, *sums.values(here.parameters)


def _inputs(here: LayerRun, x: Tensor, *, replay: bool) -> _Inputs:
    """Run the layer up to its attention module."""
    hidden, chunks = None, []
    for start, stop in here.chunks(x):
        with torch.no_grad(), random_numbers(here.random, ("input", start), replay=replay):
            taken = here.stream.attention_input(x[:, start:stop], here.arguments, start)
        part, taken.hidden = taken.hidden, None
        assert part is not None
        if part.shape[1] == x.shape[1]:
            hidden = part
        elif hidden is None:
            hidden = part.new_empty((*x.shape[:2], part.shape[2]))
        if part is not hidden:
            hidden[:, start:stop] = part
        chunks.append((start, stop, taken))
    assert hidden is not None
    return _Inputs(hidden, chunks)


def _heads(here: LayerRun, inputs: _Inputs, group: int, *, replay: bool) -> tuple[Tensor, Tensor, Tensor, ScoreOptions]:
    """q, k and v [B, heads, T, D] of one group, and what the module says of its scores."""
    whole: list[Tensor] = []
    options = None
    for start, stop, taken in inputs.chunks:
        with torch.no_grad(), random_numbers(here.random, (f"project {group}", start), replay=replay):
            call = project(here.stream, here.groups[group], taken, inputs.hidden[:, start:stop], start)
        assert call.taken is not None
        options = call.options
        if len(inputs.chunks) == 1:
            whole = list(call.taken)
            break
        if not whole:  # tokens before heads in memory, as projections have them
            seq_len = inputs.hidden.shape[1]
            shapes = [(part.shape[0], seq_len, part.shape[1], part.shape[3]) for part in call.taken]
            whole = [part.new_empty(shape).transpose(1, 2) for part, shape in zip(call.taken, shapes, strict=True)]
        for total, part in zip(whole, call.taken, strict=True):
            total[:, :, start:stop] = part
    assert options is not None
    q, k, v = whole
    return q, k, v, options


def _attend(here: LayerRun, inputs: _Inputs, *, replay: bool) -> tuple[Tensor, Tensor]:
    """(what each head attends [B, T, H, D], lse [B, H, T]), group by group."""
    out = lse = None
    for group in range(len(here.groups)):
        q, k, v, options = _heads(here, inputs, group, replay=replay)
        options = _of_group(options, group, q.shape[1])
        part, part_lse = attend_whole(here.run, q, k, v, options)
        if out is None or lse is None:
            batch, heads, seq_len = part_lse.shape
            out = part.new_empty((batch, seq_len, heads * len(here.groups), part.shape[3]))
            lse = part_lse.new_empty((batch, heads * len(here.groups), seq_len))
        mine = slice(group * part.shape[1], (group + 1) * part.shape[1])
        out[:, :, mine], lse[:, mine] = part.transpose(1, 2), part_lse
        del q, k, v, part, part_lse  # before the next group's are made
    assert out is not None
    assert lse is not None
    return out, lse


def _finish(here: LayerRun, x: Tensor, heads_out: Tensor, start: int) -> tuple[Tensor, ...]:
    """The layer's output for the chunk x [B, chunk, d] at token `start`, given heads_out [B, chunk, H, D]."""
    call = HeadsOutput(heads_out.transpose(1, 2), start)
    return here.stream.finish_heads(x, call, here.arguments, here.idle_rows, here.routing)


def _of_group(options: ScoreOptions, group: int, heads: int) -> ScoreOptions:
    """What a module says of all its heads' scores, for a group of so many heads."""
    if options.sinks is None:
        return options
    return replace(options, sinks=options.sinks[group * heads : (group + 1) * heads])


@dataclass(frozen=True, slots=True)
class _Projected:
    """q, k and v [B, heads, chunk, D] in autograd's graph, from the leaf `hidden` [B, chunk, d]."""

    hidden: Tensor
    heads: tuple[Tensor, Tensor, Tensor]
    options: ScoreOptions

    def detached(self) -> tuple[Tensor, Tensor, Tensor, ScoreOptions]:
        """The same outside the graph."""
        q, k, v = self.heads
        return q.detach(), k.detach(), v.detach(), self.options


def _project_chunk(here: LayerRun, inputs: _Inputs, group: int, index: int) -> _Projected:
    """A chunk of a group again, in backward."""
    start, stop, taken = inputs.chunks[index]
    hidden = inputs.hidden[:, start:stop].detach().requires_grad_()
    with torch.enable_grad(), random_numbers(here.random, (f"project {group}", start), replay=True):
        call = project(here.stream, here.groups[group], taken, hidden, start)
    assert call.taken is not None
    assert call.options is not None
    return _Projected(hidden, call.taken, call.options)


def _attend_backward(
    here: LayerRun, inputs: _Inputs, attended: tuple[Tensor, Tensor, Tensor], sums: ParameterSums
) -> Tensor:
    """Gradient of what the attention module was handed, [B, T, d]; adds those of its projections.

    Args:
        attended: (what the heads attended [B, T, H, D], lse [B, H, T], the gradient of the first).
    """
    heads_out, lse, grad_out = attended
    grad_hidden = torch.empty_like(inputs.hidden)
    heads = heads_out.shape[2] // len(here.groups)
    for group in range(len(here.groups)):
        mine = slice(group * heads, (group + 1) * heads)
        # One chunk of all tokens is projected once, in autograd's graph; several again, one after the other.
        alone = _project_chunk(here, inputs, group, 0) if len(inputs.chunks) == 1 else None
        q, k, v, options = _heads(here, inputs, group, replay=True) if alone is None else alone.detached()
        saved = SavedAttention(q, k, v, heads_out[:, :, mine].transpose(1, 2), lse[:, mine])
        own, given = _of_group(options, group, heads), grad_out[:, :, mine].transpose(1, 2)
        gradients = attend_whole_backward(here.run, given, saved, own)
        if options.sinks is not None and own.sinks is not None and options.sinks.requires_grad:
            part = torch.zeros_like(options.sinks)
            part[mine] = sinks_gradient(given, (saved.out, saved.lse), own.sinks)
            sums.backward([options.sinks], [], [part])
        del q, k, v, saved
        for index, (start, stop, _) in enumerate(inputs.chunks):
            chunk = _project_chunk(here, inputs, group, index) if alone is None else alone
            parts = [gradient[:, :, start:stop] for gradient in gradients]
            (part,) = sums.backward(chunk.heads, [chunk.hidden], parts)
            if group == 0:
                grad_hidden[:, start:stop] = part
            else:
                grad_hidden[:, start:stop] += part
            alone = None
            del chunk, parts, part  # before the next one's are made
        del gradients
    return grad_hidden


def _inputs_backward(here: LayerRun, x: Tensor, grad_hidden: Tensor, grads: LayerGradients) -> None:
    """Add to grads.x and the parameters' gradients what comes through what precedes the attention module."""
    for start, stop in here.chunks(x):
        chunk = x[:, start:stop].detach().requires_grad_()
        with torch.enable_grad(), random_numbers(here.random, ("input", start), replay=True):
            taken = here.stream.attention_input(chunk, here.arguments, start)
        assert taken.hidden is not None
        (grad_chunk,) = grads.sums.backward([taken.hidden], [chunk], [grad_hidden[:, start:stop]])
        grads.x[:, start:stop] += grad_chunk
