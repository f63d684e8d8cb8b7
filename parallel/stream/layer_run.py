"""One decoder layer over a long sequence, forward and backward in chunks, from its input alone.

torch.utils.checkpoint recomputes a layer whole, so its peak is a layer's activations over all T tokens; chunking the
MLP inside it recomputes once more. Here the layer is one autograd.Function: its backward recomputes a chunk, goes back
through it and drops it, so only the layer's input is kept. The layer's parameters are inputs of the Function and
their summed gradients leave it once, whatever the number of chunks: hooks, and so communication, see one gradient.

The model's own code computes everything. A chunk runs the layer's forward twice, cut at its attention module: up to
the module's output (queries against all earlier keys), and from it, in smaller chunks, to the layer's end.

    forward, a chunk after the other          backward, the chunks in reverse

    tokens  0        8        16     21       first all keys and values again, then from the last chunk to the first
            |-- 0 ---|-- 1 ---|- 2 --|
    attend  ========> ========> =====>        finish  the chunk's pieces again, and back: gradient of its attention's
    finish  --> -> --> -> --> -> -->          attend  the chunk's attention again, and back: gradients of q, of its own
            (in pieces of mlp_chunk)                  keys, and of all keys before it
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.attention.kernels import AttentionBackend
from fourfold.parallel.stream.attention import Attend, AttendAgain, ChunkCall, LayerKeys, RowMask, WriteKeys
from fourfold.parallel.stream.gradients import ParameterSums, entered_autocast, find_unread
from fourfold.parallel.stream.host_memory import HostMemory
from fourfold.parallel.stream.kept_inputs import Lookup
from fourfold.parallel.stream.layer import LayerStream, chunks_of
from fourfold.parallel.stream.passing import PassingGradient, room_for
from fourfold.parallel.stream.patching import (
    attention_function,
    inside_checkpoint,
    swapped_parameters,
    without_checkpointing,
)
from fourfold.parallel.stream.random_numbers import RandomStates, random_numbers
from fourfold.parallel.stream.router import Routing
from fourfold.parallel.stream.switches import Switches
from fourfold.parallel.stream.work_space import FEW_PIECES, num_pieces

# (x [B, piece, d], what its attention gave, its first token) to the layer's output and router statistics for it.
Finish = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRun:
    """What all layers of one pass over a batch share.

    Attributes:
        masks: row_masks of the batch.
        chunk: queries a chunk.
        mlp_chunk: tokens a chunk of all that follows attention.
        backend: see LayerKeys.
        autocast: (device type, dtype) of an enabled autocast, which backward enters again.
        passing: the hidden states' gradient on its way down, overwritten layer by layer where nobody else holds it.
        lookup: the token embedding's; None where it cannot be looked up again.
        host: where what backward needs waits for it; None is on the device.
        routing: what to gather of a mixture of experts' routers; None gathers nothing.
        checkpointed: whether the whole pass is inside torch.utils.checkpoint.
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
    checkpointed: bool = field(default_factory=inside_checkpoint)

    def function(self, here: "LayerRun", x: Tensor) -> type[torch.autograd.Function]:
        """What computes this layer of x [B, T, d]."""
        return _Layer

    # Outside of compiled graphs: a compiled layer runs as it is while it streams.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def layer(self, stream: LayerStream, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The layer's output for x [B, T, d]; `arguments` are the layer's other keyword arguments."""
        parameters = [p for p in dict.fromkeys(stream.layer.parameters()) if p.requires_grad]
        routes = self.routing is not None and stream.has(self.routing.router)
        random = RandomStates(x.device) if torch.is_grad_enabled() else None
        here = LayerRun(
            stream=stream, run=self, arguments=arguments, parameters=parameters, random=random,
            routing=self.routing if routes else None, switches=Switches(stream.layer),
        )  # fmt: skip
        out: Tensor
        out, *statistics = self.function(here, x).apply(x, here, *parameters)  # type: ignore[no-untyped-call]
        if random is not None and not random.drawn():
            here.random = None
        if self.routing is not None and statistics:
            self.routing.layers.append(tuple(statistics))
        return out


@dataclass(slots=True, kw_only=True)
class LayerRun:
    """One layer in one pass over a batch: what its forward and its backward share.

    Attributes:
        arguments: the layer's keyword arguments, but for its input.
        parameters: the layer's that need a gradient.
        random: where its random numbers began, to draw them again; None where it draws none.
        routing: the pass's, where this layer has a router.
        switches: the forward's modes.
        looked_up: whether its input is looked up again in the embedding table.
        place: of what it keeps, in host memory; None is on the device.
        num_staying: tensors that are kept on the device in any case.
        unread_known: whether backward has found the linears whose output nobody reads.
        groups: where attention is done by groups of heads: the rows of each projection that make a group.
        idle_rows: there, the rows that are made of a projection which nobody reads.
    """

    stream: LayerStream
    run: StreamRun
    arguments: Mapping[str, Any]
    parameters: Sequence[Tensor]
    random: RandomStates | None
    routing: Routing | None
    switches: Switches
    looked_up: bool = False
    place: int | None = None
    num_staying: int = 0
    unread_known: bool = False
    groups: Sequence[Mapping[nn.Module, slice]] = ()
    idle_rows: Mapping[nn.Module, slice] = field(default_factory=dict)

    def chunks(self, x: Tensor) -> list[tuple[int, int]]:
        """(first token, token after the last) of each chunk of x [B, T, d]."""
        return list(chunks_of(0, x.shape[1], self.run.chunk))

    def sums(self, x: Tensor, leaves: Sequence[Tensor]) -> ParameterSums:
        """What the parameters' gradients are summed in, in the backward for x [B, T, d]."""
        pieces = num_pieces(x.shape[1], self.run.chunk, self.run.mlp_chunk)
        # Under autocast products are narrower than the weights, whose dtype asks for wide sums.
        few = pieces <= FEW_PIECES and self.run.autocast is None
        return ParameterSums(leaves, self.parameters, few=few)

    def keys(self, x: Tensor) -> LayerKeys:
        """Room for the layer's keys and values."""
        return LayerKeys(self.run.masks, (x.shape[0], x.shape[1]), self.run.backend)

    def attend(self, chunk: Tensor, call: ChunkCall, *, replay: bool, piece: str = "attend") -> Tensor | None:
        """LayerStream.attend, with random numbers of its own, drawn again with `replay`."""
        with random_numbers(self.random, (piece, call.start), replay=replay):
            return self.stream.attend(chunk, self.arguments, call)

    def no_statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """Router statistics of no tokens; none where the layer has no router."""
        return () if self.routing is None else self.routing.zeros(x)

    def finish_piece(self, x: Tensor, attended: Tensor, start: int) -> tuple[Tensor, ...]:
        """LayerStream.finish for the piece x [B, piece, d] at token `start`."""
        return self.stream.finish(x, attended, self.arguments, start, self.routing)

    def finish(
        self, x: Tensor, given: Tensor, out: Tensor, statistics: Sequence[Tensor], start: int = 0,
        piece: Finish | None = None,
    ) -> None:  # fmt: skip
        """Fill the chunk of `out` at token `start`, piece by piece.

        Args:
            given: [B, chunk, ...], what its attention gave, as `piece` takes it: None is the module's output.
        """
        piece = piece or self.finish_piece
        for first, last in chunks_of(start, start + given.shape[1], self.run.mlp_chunk):
            with random_numbers(self.random, ("finish", first), replay=False):
                part, *added = piece(x[:, first:last], given[:, first - start : last - start], first)
            out[:, first:last] = part
            if self.routing is not None:
                self.routing.add(statistics, added, first)
            del part  # before the next one is made

    def save(self, ctx: Any, x: Tensor, kept: Sequence[Tensor]) -> None:
        """Keep what backward needs, on the device or in host memory.

        Args:
            ctx: autograd's.
            kept: attention's output and lse, where they are kept. The parameters are saved with them, so that
                autograd notices a change of theirs.
        """
        looked_up = None if self.run.lookup is None else self.run.lookup.sources(x)
        self.looked_up = looked_up is not None
        staying, moving = (looked_up, tuple(kept)) if looked_up is not None else ((), (x, *kept))
        host = self.run.host
        if host is not None and moving and any(ctx.needs_input_grad):  # else nobody would fetch them
            self.place, moving = host.put(*moving)
        self.num_staying = len(staying)
        ctx.save_for_backward(*staying, *moving, *(self.parameters if kept else ()))

    def saved(self, ctx: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """(x, kept) as `save` was given them.

        Raises:
            ValueError: attention's output was kept, and weights have changed since, as far as autograd counts it:
                queries and keys would be of others. Or parameters were frozen since: torch would drop their gradients.
        """
        if not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError(
                f"parameters of a {type(self.stream.layer).__name__} were frozen between forward and backward, as peft "
                "does to an adapter that is disabled or exchanged: their gradients would be lost; run backward before"
            )
        try:
            tensors: tuple[Tensor, ...] = ctx.saved_tensors
        except RuntimeError as error:
            if not self.stream.keep or "inplace operation" not in str(error):
                raise
            raise ValueError(
                "keep_attention, and the weights changed between forward and backward: leave keep_attention out"
            ) from error
        if self.stream.keep:
            tensors = tensors[: len(tensors) - len(self.parameters)]
        staying, moved = tensors[: self.num_staying], tensors[self.num_staying :]
        if self.place is not None:
            assert self.run.host is not None
            moved = self.run.host.get(self.place, moved)
        if self.looked_up:
            return F.embedding(staying[0], staying[1]), moved
        return moved[0], moved[1:]

    @contextmanager
    def recomputing(self) -> Iterator[list[Tensor]]:
        """The layer as it was in the forward pass, with leaves for its parameters, which it gives."""
        stream, run = self.stream, self.run
        with (
            stream.patched(),
            self.switches.restored(),
            without_checkpointing(stream.layer),
            swapped_parameters(stream.layer, self.parameters) as leaves,
            entered_autocast(run.autocast),
            attention_function(stream.attention.config),
        ):
            yield leaves


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """The gradients of a layer's backward.

    Attributes:
        outs: of its output [B, T, d], and of its router statistics where it has some.
        x: of its input, filled chunk by chunk; it may be the same memory as outs[0].
        sums: of its parameters.
    """

    outs: Sequence[Tensor]
    x: Tensor
    sums: ParameterSums


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, here: LayerRun, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.here = here
        keys, kept, out, statistics = here.keys(x), None, torch.empty_like(x), here.no_statistics(x)
        for start, stop in here.chunks(x):
            call = Attend(keys, start)
            attended = here.attend(x[:, start:stop], call, replay=False)
            assert attended is not None
            if here.stream.keep:
                kept = _keep(kept, call, x.shape[1])
            here.finish(x, attended, out, statistics, start)
        here.save(ctx, x, kept or ())
        ctx.mark_non_differentiable(*statistics[1:])
        return out, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *router_grads: Tensor) -> tuple[Tensor | None, ...]:
        here: LayerRun = ctx.here
        ours = here.run.passing.may_overwrite(grad)
        x, kept = here.saved(ctx)
        with here.recomputing() as leaves:
            # All keys and values first: each chunk's queries need those before it.
            keys = here.keys(x)
            with torch.no_grad():
                for start, stop in here.chunks(x):
                    here.attend(x[:, start:stop], WriteKeys(keys, start), replay=True)
            passing, sums = here.run.passing, here.sums(x, leaves)
            grads = LayerGradients([grad, *router_grads], room_for(x, grad, ours), sums)
            assert here.stream.linears is not None
            with here.stream.linears.into(sums):
                # The last chunk first: then no later chunk has yet to add to the gradients of a chunk's keys.
                for start, stop in reversed(here.chunks(x)):
                    mine = (kept[0][:, :, start:stop], kept[1][:, :, start:stop]) if kept else None
                    _chunk_backward(here, x, grads, AttendAgain(keys, start, kept=mine), stop)
        passed = passing.hand_on(grads.x) if ctx.needs_input_grad[0] else None
        return passed, None, *sums.values(here.parameters)


def _chunk_backward(here: LayerRun, x: Tensor, grads: LayerGradients, call: AttendAgain, stop: int) -> None:
    """Recompute tokens call.start:stop, fill their part of grads.x and add to the parameters' gradients."""
    chunk = x[:, call.start : stop].detach().requires_grad_()
    with torch.enable_grad():
        attended = here.attend(chunk, call, replay=True)
    assert attended is not None
    grad_attended = finish_backward(here, x, attended, grads, call.start)
    (grad_chunk,) = grads.sums.backward([attended], [chunk], [grad_attended])
    grads.x[:, call.start : stop] += grad_chunk


def finish_backward(
    here: LayerRun, x: Tensor, given: Tensor, grads: LayerGradients, start: int = 0, piece: Finish | None = None
) -> Tensor:
    """Gradient of `given` [B, chunk, ...] at token `start`; fills its part of grads.x, less what comes by it.

    Args:
        given, piece: see LayerRun.finish.
    """
    piece = piece or here.finish_piece
    grad_given = torch.empty_like(given)
    for first, last in chunks_of(start, start + given.shape[1], here.run.mlp_chunk):
        # Recompute a piece from its input and what its attention gave.
        inside = slice(first - start, last - start)
        leaf, given_leaf = (part.detach().requires_grad_() for part in (x[:, first:last], given[:, inside]))
        with torch.enable_grad(), random_numbers(here.random, ("finish", first), replay=True):
            out, *statistics = piece(leaf, given_leaf, first)
        if not here.unread_known:
            grads.sums.unread, here.unread_known = find_unread(out), True
        # Go back.
        outs, grad_outs = with_gradients(here, out, statistics, grads, first)
        grad_piece, grad_given_piece = grads.sums.backward(outs, [leaf, given_leaf], grad_outs)
        # This one first: where attention is only added to the rest it is a view of outs[0], which grads.x may be.
        grad_given[:, inside] = grad_given_piece
        grads.x[:, first:last] = grad_piece
        del out, outs, grad_outs, grad_piece, grad_given_piece  # before the next piece's are made
    return grad_given


def with_gradients(
    here: LayerRun, out: Tensor, statistics: Sequence[Tensor], grads: LayerGradients, start: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(what of the chunk at token `start` has a gradient, these gradients): its output, and of its router's part."""
    outs, grad_outs = [out], [grads.outs[0][:, start : start + out.shape[1]]]
    if here.routing is not None:
        value, grad = here.routing.gradient(grads.outs[1:], statistics, start)
        outs.append(value)
        grad_outs.append(grad)
    return outs, grad_outs


def _keep(kept: tuple[Tensor, Tensor] | None, call: Attend, seq_len: int) -> tuple[Tensor, Tensor]:
    """Put the call's (out, lse) into tensors of the whole sequence: many small ones would pin what lies between."""
    assert call.attended is not None
    out, lse = call.attended
    batch, heads, length, size = out.shape
    if kept is None:
        kept = out.new_empty((batch, heads, seq_len, size)), lse.new_empty((batch, heads, seq_len))
    here = slice(call.start, call.start + length)
    kept[0][:, :, here] = out
    kept[1][:, :, here] = lse
    return kept
