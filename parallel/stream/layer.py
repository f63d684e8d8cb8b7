"""One decoder layer over a long sequence, forward and backward in chunks, from its input alone.

torch.utils.checkpoint recomputes a layer whole, so its peak is a layer's activations over all T tokens; chunking the
MLP inside it recomputes once more. Here the layer is one autograd.Function: its backward recomputes a chunk, goes back
through it and drops it, so only the layer's input is kept. The layer's parameters are inputs of the Function and
their summed gradients leave it once, whatever the number of chunks: hooks, and so communication, see one gradient.

The model's own code computes everything. A chunk runs the layer's forward twice, cut at its attention module: up to
the module's output (queries against all earlier keys), and from it, in smaller chunks, to the layer's end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.attention.kernels import AttentionBackend
from fourfold.parallel.attention.soft_cap import SoftCapAttention
from fourfold.parallel.stream.attention import ChunkAttention, LayerKeys, RowMask
from fourfold.parallel.stream.embedding import Lookup
from fourfold.parallel.stream.gradients import ParameterSums, find_unread, summed_linears
from fourfold.parallel.stream.offload import HostMemory
from fourfold.parallel.stream.passing import PassingGradient
from fourfold.parallel.stream.patching import aliased, attention_function, entered_autocast, replaced_forward
from fourfold.parallel.stream.random_numbers import RandomStates, random_numbers
from fourfold.parallel.stream.router import Routing

# Keyword arguments of layers with one entry a token, and the dim of the token.
TOKEN_DIMS = {"position_ids": 1, "position_embeddings": 1, "cache_position": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What all layers of one pass over a batch share.

    Attributes:
        masks: row_masks of the batch.
        chunk: queries a chunk.
        mlp_chunk: tokens a chunk of all that follows attention.
        backend: see LayerKeys.
        autocast: (device type, dtype) of an enabled autocast, which backward enters again.
        passing: the hidden states' gradient on its way down. It is overwritten layer by layer: a hook that keeps it
            must keep a clone.
        lookup: the token embedding's, None is not ours.
        host: where what backward needs waits for it, None is on the device.
        routing: what to gather of a mixture of experts' routers; None gathers nothing.
    """

    masks: Sequence[RowMask]
    chunk: int
    mlp_chunk: int
    backend: AttentionBackend | str | None
    autocast: tuple[str, torch.dtype] | None
    passing: PassingGradient = field(default_factory=PassingGradient)
    lookup: Lookup | None = None
    host: HostMemory | None = None
    routing: Routing | None = None


class AttentionTask(Protocol):
    """What a layer's attention function does with a chunk."""

    start: int  # the chunk's first token

    @property
    def unread(self) -> Sequence[str]:
        """Projections of the attention module whose output nobody asks for."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        """The output [B, H, chunk, D] for the chunk's q, k, v, or Stop."""


class Stop(Exception):
    """Leaves a layer's forward at its attention module."""


@dataclass(slots=True)
class Task:
    """Attention of the chunk that starts at token `start` against all keys before it."""

    keys: LayerKeys
    start: int
    keys_only: bool = False  # write the chunk's keys and go no further
    kept: tuple[Tensor, Tensor] | None = None  # the chunk's (out, lse), where they were kept
    recompute: bool = False
    result: tuple[Tensor, Tensor] | None = None

    @property
    def unread(self) -> Sequence[str]:
        return ("q_proj",) if self.keys_only else ()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        if soft_cap is not None:
            self.keys.use(SoftCapAttention(soft_cap))
        if not self.recompute or self.keys_only:
            self.keys.write(k.detach(), v.detach(), self.start)
        if self.keys_only:
            raise Stop
        if self.recompute:
            out: Tensor = ChunkAttention.apply(q, k, v, self.keys, self.start, scale, window, self.kept)  # type: ignore[no-untyped-call]
            return out
        self.result = self.keys.attend(q, self.start, scale, window)
        return self.result[0]


def stream_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    stream_task: AttentionTask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: a chunk's [B, H, chunk, D] in, [B, chunk, H, D] out."""
    if stream_task is None or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} does not pass the arguments of its layer on: streaming cannot use it"
        )
    if dropout or s_aux is not None:
        raise ValueError(f"{type(module).__name__} asks for attention dropout or sinks: no kernel here has them")
    if torch.is_autocast_enabled(
        query.device.type
    ):  # as it does for scaled_dot_product_attention: fp32 norms leave fp32
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = stream_task.attend(query, key, value, scale, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


class LayerStream:
    """Runs one decoder layer in chunks.

    Args:
        layer: a transformers decoder layer, whose attention module is its `self_attn`.
        forward: the layer's own forward.
        keep: keep attention's output and lse, so that backward does not recompute them.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], *, keep: bool = False) -> None:
        self.layer, self._forward, self.keep = layer, forward, keep
        self.attention: nn.Module = layer.self_attn  # type: ignore[assignment]

    def __call__(self, x: Tensor, arguments: Mapping[str, Any], shared: Pass) -> Tensor:
        """The layer's output for x [B, T, d]; `arguments` are the layer's other keyword arguments."""
        parameters = [p for p in dict.fromkeys(self.layer.parameters()) if p.requires_grad]
        out: Tensor
        lookup = None if shared.lookup is None else shared.lookup.sources(x)
        out, *statistics = self.function.apply(x, self, arguments, shared, lookup, *parameters)  # type: ignore[no-untyped-call]
        if shared.routing is not None and statistics:
            shared.routing.layers.append((statistics[0], statistics[1]))
        return out

    @property
    def function(self) -> type[torch.autograd.Function]:
        return _Layer

    def routing(self, shared: Pass) -> Routing | None:
        """The pass's, where this layer has a router."""
        routing = shared.routing
        if routing is None or not any(isinstance(module, routing.router) for module in self.layer.modules()):
            return None
        return routing

    def draws(self) -> bool:
        """Whether the layer uses random numbers: dropout, or noise on what a router sees."""
        return any(
            (isinstance(m, nn.Dropout) and m.p > 0 and m.training)
            or (m.training and bool(getattr(m, "jitter_noise", 0.0)))
            for m in self.layer.modules()
        )

    def attend(self, x: Tensor, arguments: Mapping[str, Any], task: AttentionTask) -> Tensor | None:
        """The attention module's output for the chunk x [B, chunk, d] that starts at task.start."""
        found: list[Tensor] = []
        module_forward = self.attention.forward

        def forward(*args: Any, **kwargs: Any) -> None:
            found.append(module_forward(*args, **kwargs)[0])
            raise Stop

        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.attention, forward))
            for name in task.unread:
                projection = getattr(self.attention, name, None)
                if type(projection) is nn.Linear:
                    stack.enter_context(replaced_forward(projection, partial(_no_output, projection)))
            try:
                self._forward(x, **_narrowed(arguments, task.start, x.shape[1]), stream_task=task)
            except Stop:
                return found[0] if found else None
        raise ValueError(f"{type(self.layer).__name__} does not call its self_attn: streaming cannot use it")

    def finish(
        self, x: Tensor, attended: Tensor, arguments: Mapping[str, Any], start: int, routing: Routing | None = None
    ) -> tuple[Tensor, ...]:
        """The layer's output for the chunk x [B, chunk, d] at token `start`, given its attention module's output.

        With `routing`, the chunk's router statistics follow it.
        """
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.attention, lambda *args, **kwargs: (attended, None)))
            logits = None if routing is None else stack.enter_context(routing.recorded(self.layer))
            out = self._forward(x, **_narrowed(arguments, start, x.shape[1]))
        result: Tensor = out[0] if isinstance(out, tuple) else out
        if routing is None or logits is None:
            return (result,)
        return result, *routing.statistics(logits[0], start, x.shape[1])


def _no_output(linear: nn.Linear, x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stream: LayerStream, arguments: Mapping[str, Any], shared: Pass,
        lookup: tuple[Tensor, Tensor] | None, *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        begin(ctx, x, stream, arguments, shared, parameters)
        kept = None
        keys = LayerKeys(shared.masks, (x.shape[0], x.shape[1]), shared.backend)
        out = torch.empty_like(x)
        for start, stop in chunks_of(0, x.shape[1], shared.chunk):
            task = Task(keys, start)
            with random_numbers(ctx.random, ("attend", start), replay=False):
                attended = stream.attend(x[:, start:stop], arguments, task)
            assert attended is not None
            if stream.keep:
                kept = _keep(kept, task, x.shape[1])
            finish_forward(ctx, x, attended, out, start, stop)
        save(ctx, x, lookup, kept or ())
        statistics, ctx.statistics = ctx.statistics, ()  # kept on ctx, its own outputs would never be freed
        return out, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *router_grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kept = saved(ctx)
        stream, arguments, shared = ctx.stream, ctx.arguments, ctx.shared
        chunks = list(chunks_of(0, x.shape[1], shared.chunk))
        config = stream.attention.config
        with (
            aliased(stream.layer, ctx.parameters) as aliases,
            entered_autocast(shared.autocast),
            attention_function(config),
        ):
            keys = LayerKeys(shared.masks, (x.shape[0], x.shape[1]), shared.backend)
            with torch.no_grad():
                for start, stop in chunks:
                    task = Task(keys, start, keys_only=True)
                    with random_numbers(ctx.random, ("attend", start), replay=True):
                        stream.attend(x[:, start:stop], arguments, task)
            sums = ParameterSums(aliases, ctx.parameters)
            grad_x = shared.passing.room_for(x, grad)
            with summed_linears(stream.layer, sums):
                for index in reversed(range(len(chunks))):
                    start, stop = chunks[index]
                    here = (kept[0][:, :, start:stop], kept[1][:, :, start:stop]) if kept else None
                    task = Task(keys, start, kept=here, recompute=True)
                    _chunk_backward(ctx, x, [grad, *router_grads], grad_x, task, stop, sums)
        passed = shared.passing.hand_on(grad_x) if ctx.needs_input_grad[0] else None
        return passed, None, None, None, None, *sums.values(ctx.parameters)


def _chunk_backward(
    ctx: Any, x: Tensor, grads: Sequence[Tensor], grad_x: Tensor, task: Task, stop: int, sums: ParameterSums
) -> None:
    """Recompute tokens task.start:stop, fill their part of grad_x and add to the parameters' gradients."""
    start = task.start
    chunk = x[:, start:stop].detach().requires_grad_()
    with torch.enable_grad(), random_numbers(ctx.random, ("attend", start), replay=True):
        attended = ctx.stream.attend(chunk, ctx.arguments, task)
    grad_attended = finish_backward(ctx, x, attended, grads, grad_x, start, stop, sums)
    (grad_chunk,) = sums.backward([attended], [chunk], [grad_attended])
    grad_x[:, start:stop] += grad_chunk


def begin(
    ctx: Any, x: Tensor, stream: LayerStream, arguments: Mapping[str, Any], shared: Pass, parameters: Sequence[Tensor]
) -> None:
    """Note on `ctx` what forward and backward of a streamed layer share."""
    ctx.stream, ctx.arguments, ctx.shared, ctx.parameters = stream, arguments, shared, parameters
    ctx.random = RandomStates(x.device) if stream.draws() else None
    ctx.routing = stream.routing(shared)
    ctx.statistics = () if ctx.routing is None else ctx.routing.zeros(x.device)
    ctx.mark_non_differentiable(*ctx.statistics[1:])
    ctx.found_unread = False
    ctx.versions = [parameter._version for parameter in parameters]


def save(ctx: Any, x: Tensor, lookup: tuple[Tensor, Tensor] | None, kept: Sequence[Tensor]) -> None:
    """Keep what backward needs, on the device or in host memory.

    Args:
        lookup: (tokens, table) where x was looked up and can be again.
        kept: attention's, where it is kept.
    """
    host: HostMemory | None = ctx.shared.host
    tensors = (*((x,) if lookup is None else lookup), *kept)
    ctx.looked_up, ctx.place = lookup is not None, None
    if host is not None and lookup is None and any(ctx.needs_input_grad):  # else nobody would fetch them
        ctx.place, tensors = host.put(*tensors)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Tensor, Sequence[Tensor]]:
    """(x, kept) as `save` was given them.

    Raises:
        ValueError: attention's output was kept, and weights have changed since, as far as autograd counts it:
            queries and keys would be of others.
    """
    if ctx.stream.keep and ctx.versions != [parameter._version for parameter in ctx.parameters]:
        raise ValueError(
            "keep_attention, and the weights changed between forward and backward: leave keep_attention out"
        )
    tensors: tuple[Tensor, ...] = ctx.saved_tensors
    if ctx.looked_up:
        return F.embedding(tensors[0], tensors[1]), tensors[2:]
    if ctx.place is not None:
        tensors = tuple(ctx.shared.host.get(ctx.place, tensors))
    return tensors[0], tensors[1:]


def finish_forward(ctx: Any, x: Tensor, attended: Tensor, out: Tensor, start: int, stop: int) -> None:
    """Fill tokens start:stop of the layer's output, given their attention module's output [B, stop-start, d]."""
    for first, last in chunks_of(start, stop, ctx.shared.mlp_chunk):
        with random_numbers(ctx.random, ("finish", first), replay=False):
            part, *statistics = ctx.stream.finish(
                x[:, first:last], attended[:, first - start : last - start], ctx.arguments, first, ctx.routing
            )
        out[:, first:last] = part
        for total, added in zip(ctx.statistics, statistics, strict=True):
            total += added


def finish_backward(
    ctx: Any, x: Tensor, attended: Tensor, grads: Sequence[Tensor], grad_x: Tensor, start: int, stop: int,
    sums: ParameterSums,
) -> Tensor:  # fmt: skip
    """Gradient of `attended`; fills grad_x of tokens start:stop without what comes through attention.

    Args:
        grads: of the layer's output [B, T, d], which grad_x may be, and of the router statistics where there are any.
    """
    grad_attended = torch.empty_like(attended)
    for first, last in chunks_of(start, stop, ctx.shared.mlp_chunk):
        here = slice(first - start, last - start)
        piece = x[:, first:last].detach().requires_grad_()
        piece_attended = attended[:, here].detach().requires_grad_()
        with torch.enable_grad(), random_numbers(ctx.random, ("finish", first), replay=True):
            out, *statistics = ctx.stream.finish(piece, piece_attended, ctx.arguments, first, ctx.routing)
        if not ctx.found_unread:
            sums.unread, ctx.found_unread = find_unread(out), True
        # Of the statistics only the first, the probabilities, has a gradient.
        outs, grad_outs = [out, *statistics[:1]], [grads[0][:, first:last], *grads[1:2]]
        grad_piece, grad_attended_piece = sums.backward(outs, [piece, piece_attended], grad_outs)
        # This one first: where attention is only added to the rest it is a view of grads[0], which grad_x may be.
        grad_attended[:, here] = grad_attended_piece
        grad_x[:, first:last] = grad_piece
        del out, outs, grad_outs, grad_piece, grad_attended_piece
    return grad_attended


def _narrowed(arguments: Mapping[str, Any], start: int, length: int) -> dict[str, Any]:
    """The layer's arguments for some of its tokens."""

    def narrow(value: Any, dim: int) -> Any:
        if isinstance(value, tuple):
            return tuple(narrow(part, dim) for part in value)
        return value.narrow(dim, start, length) if isinstance(value, Tensor) else value

    return {name: narrow(value, TOKEN_DIMS[name]) if name in TOKEN_DIMS else value for name, value in arguments.items()}


def _keep(kept: tuple[Tensor, Tensor] | None, task: Task, seq_len: int) -> tuple[Tensor, Tensor]:
    """Put the task's (out, lse) into tensors of the whole sequence: many small ones would pin what lies between."""
    assert task.result is not None
    out, lse = task.result
    batch, heads, length, size = out.shape
    if kept is None:
        kept = out.new_empty((batch, heads, seq_len, size)), lse.new_empty((batch, heads, seq_len))
    here = slice(task.start, task.start + length)
    kept[0][:, :, here] = out
    kept[1][:, :, here] = lse
    return kept


def chunks_of(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each chunk."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
