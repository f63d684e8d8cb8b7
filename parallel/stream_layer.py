"""One decoder layer over a long sequence, forward and backward in chunks, from its input alone.

torch.utils.checkpoint recomputes a layer whole, so its peak is a layer's activations over all T tokens; chunking the
MLP inside it recomputes once more. Here the layer is one autograd.Function: its backward recomputes a chunk, goes back
through it and drops it, so only the layer's input is kept. The layer's parameters are inputs of the Function and
their summed gradients leave it once, whatever the number of chunks: hooks, and so communication, see one gradient.

The model's own code computes everything. A chunk runs the layer's forward twice, cut at its attention module: up to
the module's output (queries against all earlier keys), and from it, in smaller chunks, to the layer's end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.attention import AttentionBackend
from fourfold.parallel.soft_cap_attention import SoftCapAttention
from fourfold.parallel.stream_attention import ChunkAttention, LayerKeys, RowMask
from fourfold.parallel.stream_embedding import Lookup
from fourfold.parallel.stream_gradients import ParameterSums, find_unread, summed_linears
from fourfold.parallel.stream_module import aliased, attention_function, entered_autocast, replaced_forward
from fourfold.parallel.stream_offload import HostMemory
from fourfold.parallel.stream_passing import PassingGradient

# Keyword arguments of layers with one entry a token, and the dim of the token.
TOKEN_DIMS = {"position_ids": 1, "position_embeddings": 1, "cache_position": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What all layers of one pass over a batch share.

    Attributes:
        masks: row_masks of the batch.
        chunk: queries a chunk.
        mlp_chunk: tokens a chunk of all that follows attention.
        keep_attention: keep attention's output and lse, so that backward does not recompute them.
        backend: see LayerKeys.
        autocast: (device type, dtype) of an enabled autocast, which backward enters again.
        passing: the hidden states' gradient on its way down. It is overwritten layer by layer: a hook that keeps it
            must keep a clone.
        lookup: the token embedding's, None is not ours.
        host: where what backward needs waits for it, None is on the device.
    """

    masks: Sequence[RowMask]
    chunk: int
    mlp_chunk: int
    keep_attention: bool
    backend: AttentionBackend | str | None
    autocast: tuple[str, torch.dtype] | None
    passing: PassingGradient = field(default_factory=PassingGradient)
    lookup: Lookup | None = None
    host: HostMemory | None = None


@dataclass(slots=True)
class Task:
    """What a layer's attention function is asked to do with the chunk that starts at token `start`."""

    keys: LayerKeys
    start: int
    keys_only: bool = False  # write the chunk's keys and go no further
    kept: tuple[Tensor, Tensor] | None = None  # the chunk's (out, lse), where they were kept
    recompute: bool = False
    result: tuple[Tensor, Tensor] | None = None


class _Stop(Exception):
    """Leaves a layer's forward at its attention module."""


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
    stream_task: Task | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: a chunk's [B, H, chunk, D] in, [B, chunk, H, D] out."""
    if stream_task is None or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} does not pass the arguments of its layer on: streaming cannot use it"
        )
    if dropout or s_aux is not None:
        raise ValueError(f"{type(module).__name__} asks for attention dropout or sinks: no kernel here has them")
    if softcap is not None:
        stream_task.keys.use(SoftCapAttention(softcap))
    task, scale = stream_task, query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(
        query.device.type
    ):  # as it does for scaled_dot_product_attention: fp32 norms leave fp32
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    if not task.recompute or task.keys_only:
        task.keys.write(key.detach(), value.detach(), task.start)
    if task.keys_only:
        raise _Stop
    if task.recompute:
        out: Tensor = ChunkAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, task.keys, task.start, scale, sliding_window, task.kept
        )
    else:
        task.result = task.keys.attend(query, task.start, scale, sliding_window)
        out = task.result[0]
    return out.transpose(1, 2).contiguous(), None


class LayerStream:
    """Runs one decoder layer in chunks.

    Args:
        layer: a transformers decoder layer, whose attention module is its `self_attn`.
        forward: the layer's own forward.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        self.layer, self._forward = layer, forward
        self.attention: nn.Module = layer.self_attn  # type: ignore[assignment]

    def __call__(self, x: Tensor, arguments: Mapping[str, Any], shared: Pass) -> Tensor:
        """The layer's output for x [B, T, d]; `arguments` are the layer's other keyword arguments."""
        parameters = [p for p in dict.fromkeys(self.layer.parameters()) if p.requires_grad]
        lookup = None if shared.lookup is None else shared.lookup.sources(x)
        out: Tensor = _Layer.apply(x, self, arguments, shared, lookup, *parameters)  # type: ignore[no-untyped-call]
        return out

    def has_dropout(self) -> bool:
        return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in self.layer.modules())

    def attend(self, x: Tensor, arguments: Mapping[str, Any], task: Task) -> Tensor | None:
        """The attention module's output for the chunk x [B, chunk, d] that starts at task.start."""
        found: list[Tensor] = []
        module_forward = self.attention.forward

        def forward(*args: Any, **kwargs: Any) -> None:
            found.append(module_forward(*args, **kwargs)[0])
            raise _Stop

        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.attention, forward))
            queries = getattr(self.attention, "q_proj", None)
            if task.keys_only and type(queries) is nn.Linear:  # nobody asks for the queries
                stack.enter_context(replaced_forward(queries, partial(_no_output, queries)))
            try:
                self._forward(x, **_narrowed(arguments, task.start, x.shape[1]), stream_task=task)
            except _Stop:
                return found[0] if found else None
        raise ValueError(f"{type(self.layer).__name__} does not call its self_attn: streaming cannot use it")

    def finish(self, x: Tensor, attended: Tensor, arguments: Mapping[str, Any], start: int) -> Tensor:
        """The layer's output for the chunk x [B, chunk, d] at token `start`, given its attention module's output."""
        with replaced_forward(self.attention, lambda *args, **kwargs: (attended, None)):
            out = self._forward(x, **_narrowed(arguments, start, x.shape[1]))
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def _no_output(linear: nn.Linear, x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], linear.out_features)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stream: LayerStream, arguments: Mapping[str, Any], shared: Pass,
        lookup: tuple[Tensor, Tensor] | None, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.stream, ctx.arguments, ctx.shared, ctx.parameters = stream, arguments, shared, parameters
        kept = None
        ctx.random = _RandomStates(x.device) if stream.has_dropout() else None
        keys = LayerKeys(shared.masks, (x.shape[0], x.shape[1]), shared.backend)
        out = torch.empty_like(x)
        for start, stop in _chunks(0, x.shape[1], shared.chunk):
            task = Task(keys, start)
            with _random(ctx.random, ("attend", start), replay=False):
                attended = stream.attend(x[:, start:stop], arguments, task)
            assert attended is not None
            if shared.keep_attention:
                kept = _keep(kept, task, x.shape[1])
            for first, last in _chunks(start, stop, shared.mlp_chunk):
                with _random(ctx.random, ("finish", first), replay=False):
                    part = stream.finish(x[:, first:last], attended[:, first - start : last - start], arguments, first)
                out[:, first:last] = part
        saved = (*((x,) if lookup is None else lookup), *(kept or ()))
        ctx.looked_up, ctx.place = lookup is not None, None
        if shared.host is not None and lookup is None:
            ctx.place, saved = shared.host.put(*saved)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, arguments, shared = ctx.stream, ctx.arguments, ctx.shared
        saved = ctx.saved_tensors
        if ctx.looked_up:
            x, kept = F.embedding(*saved[:2]), saved[2:]
        else:
            x, *kept = saved if ctx.place is None else shared.host.get(ctx.place, saved)
        del saved
        chunks = list(_chunks(0, x.shape[1], shared.chunk))
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
                    with _random(ctx.random, ("attend", start), replay=True):
                        stream.attend(x[:, start:stop], arguments, task)
            sums = ParameterSums(aliases, ctx.parameters)
            grad_x, ctx.found_unread = shared.passing.room_for(x, grad), False
            with summed_linears(stream.layer, sums):
                for index in reversed(range(len(chunks))):
                    start, stop = chunks[index]
                    here = (kept[0][:, :, start:stop], kept[1][:, :, start:stop]) if kept else None
                    task = Task(keys, start, kept=here, recompute=True)
                    _chunk_backward(ctx, x, grad, grad_x, task, stop, sums)
        passed = shared.passing.hand_on(grad_x) if ctx.needs_input_grad[0] else None
        return passed, None, None, None, None, *sums.values(ctx.parameters)


def _chunk_backward(
    ctx: Any, x: Tensor, grad: Tensor, grad_x: Tensor, task: Task, stop: int, sums: ParameterSums
) -> None:
    """Recompute tokens task.start:stop, fill their part of grad_x and add to the parameters' gradients.

    grad_x may be grad: its part is read first.
    """
    stream, arguments, shared, start = ctx.stream, ctx.arguments, ctx.shared, task.start
    chunk = x[:, start:stop].detach().requires_grad_()
    with torch.enable_grad(), _random(ctx.random, ("attend", start), replay=True):
        attended = stream.attend(chunk, arguments, task)
    grad_attended = torch.empty_like(attended)
    for first, last in _chunks(start, stop, shared.mlp_chunk):
        here = slice(first - start, last - start)
        piece = x[:, first:last].detach().requires_grad_()
        piece_attended = attended[:, here].detach().requires_grad_()
        with torch.enable_grad(), _random(ctx.random, ("finish", first), replay=True):
            out = stream.finish(piece, piece_attended, arguments, first)
        if not ctx.found_unread:
            sums.unread, ctx.found_unread = find_unread(out), True
        grad_piece, grad_attended_piece = sums.backward(out, [piece, piece_attended], grad[:, first:last])
        # This one first: where attention is only added to the rest it is a view of grad, which grad_x may overwrite.
        grad_attended[:, here] = grad_attended_piece
        grad_x[:, first:last] = grad_piece
        del out, grad_piece, grad_attended_piece
    (grad_chunk,) = sums.backward(attended, [chunk], grad_attended)
    grad_x[:, start:stop] += grad_chunk


class _RandomStates:
    """The state of the random generators before each piece of work, so that backward draws the same dropout."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: dict[tuple[str, int], list[Tensor]] = {}

    def get(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)


@contextmanager
def _random(states: _RandomStates | None, piece: tuple[str, int], *, replay: bool) -> Iterator[None]:
    if states is None:
        yield
    elif not replay:
        states.states[piece] = states.get()
        yield
    else:
        outside = states.get()
        states.set(states.states[piece])
        try:
            yield
        finally:
            states.set(outside)


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


def _chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
