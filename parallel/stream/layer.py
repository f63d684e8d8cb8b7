"""One decoder layer whose own code computes a chunk of the sequence: up to its attention module's output, and from it.

Nothing here knows of gradients (layer_run.py does). The layer's forward is called twice for a chunk and cut at its
attention module, whose new forward does as the layer's call says: a ChunkCall makes it attend and leave the layer
(Stop), an Attended makes it return at once what it gave before, and the layer runs on to its end.
The second call is made for smaller chunks, because what follows attention is wider than the layer's input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fourfold.parallel.stream.attention import ChunkCall, Project, ScoreOptions, Stop
from fourfold.parallel.stream.fused import Fused
from fourfold.parallel.stream.gradients import SummedLinears
from fourfold.parallel.stream.patching import (
    Patches,
    Rotary,
    fused_rotary,
    inside_backward,
    inside_checkpoint,
    without_checkpointing,
)
from fourfold.parallel.stream.router import Routing

# Keyword arguments of layers with one entry a token, and the dim of the token.
TOKEN_DIMS = {"position_ids": 1, "position_embeddings": 1, "cache_position": 0}


CHECKPOINTED = (
    "{}: its forward is inside torch.utils.checkpoint (selective or not), which streaming replaces: take that off, or "
    "stream_backprop_disable(model)"
)


class Run(Protocol):
    """One pass over a batch, as far as a layer asks: see layer_run.StreamRun."""

    @property
    def checkpointed(self) -> bool: ...

    def layer(self, stream: "LayerStream", x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The layer's output for x [B, T, d]; `arguments` are the layer's other keyword arguments."""


@dataclass(slots=True)
class Current:
    """The pass over a batch that is under way in a model; None is none, and its layers run as they are."""

    run: "Run | None" = None
    num_streamed: int = 0  # layers, of all passes so far

    @contextmanager
    def entered(self, run: "Run | None") -> Iterator[None]:
        """Meanwhile the model's layers belong to this pass."""
        before, self.run = self.run, run
        try:
            yield
        finally:
            self.run = before


@dataclass(frozen=True, slots=True)
class Attended:
    """Stands for the attention module's work when the rest of the layer runs: the output it gave for these tokens."""

    output: Tensor


@dataclass(frozen=True, slots=True)
class HeadsOutput:
    """Stands for the attention's work when the rest of the layer runs: each head's output for these tokens.

    The attention module's own code makes its output of it, as it does of a kernel's.

    Attributes:
        out: [B, H, chunk, D].
        unread: names of the module's projections, whose output is not read.
    """

    out: Tensor
    start: int
    unread: Sequence[str] = ("q_proj", "k_proj", "v_proj")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        return self.out


@dataclass(slots=True)
class TakeInput:
    """Takes what a layer hands its attention module for a chunk, and goes no further.

    Attributes:
        hidden: [B, chunk, d]; None until it is taken.
        others: the other tensors among the arguments.
    """

    hidden: Tensor | None = None
    others: list[Tensor] = field(default_factory=list)
    _forward: Callable[..., Any] | None = None
    _rotary: Rotary | None = None

    def take(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Rotary | None
    ) -> None:
        """Keep the module's forward with all its arguments but the hidden states."""
        self._rotary = rotary
        if "hidden_states" in kwargs:
            self.hidden = kwargs.pop("hidden_states")
            self._forward = lambda hidden, call: forward(*args, hidden_states=hidden, stream_call=call, **kwargs)
        else:
            self.hidden, *rest = args
            self._forward = lambda hidden, call: forward(hidden, *rest, stream_call=call, **kwargs)
            args = tuple(rest)
        self.others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    def project(self, hidden: Tensor, call: Project) -> None:
        """Let the attention module make q, k and v of `hidden` [B, chunk, d], of the same tokens."""
        assert self._forward is not None
        with suppress(Stop), fused_rotary(self._rotary):
            self._forward(hidden, call)


AttentionCall = ChunkCall | Attended | TakeInput | HeadsOutput


class LayerStream:
    """A decoder layer that runs in chunks whenever a pass is under way.

    Args:
        layer: a transformers decoder layer, whose attention module is its `self_attn`.
        current: the model's pass.
        keep: keep attention's output and lse, so that backward does not recompute them.
        router: class of the layer's routers; None where there is none.
        fused: kernels that may take the place of the layer's norms, rotary embedding and activations; None is none.
    """

    def __init__(
        self, layer: nn.Module, current: Current, *, keep: bool = False, router: type[nn.Module] | None = None,
        fused: Fused | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.keep, self._current = layer, keep, current
        self.attention: nn.Module = layer.self_attn  # type: ignore[assignment]
        self._patches: Patches | None = None
        self._router, self._fused = router, fused
        self._rotary = None if fused is None else fused.rotary(self.attention)
        self._router_logits: list[Tensor] | None = None
        self._router_index = 0
        self._call: AttentionCall | None = None
        self._streamed = False
        self.linears: SummedLinears | None = None

    def patch(self, patches: Patches) -> None:
        """Put the layer's and its modules' new forwards in place, until patches.undo."""
        self._patches = patches
        self.linears = SummedLinears(self.layer, patches)
        for module in self.layer.modules():
            if self._router is not None and isinstance(module, self._router):
                patches.add(module, self._router_forward)
        if self._fused is not None:
            self._fused.replace_in(self.layer, patches)
        patches.add(self.attention, self._attention_forward)
        patches.add(self.layer, self._layer_forward)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """For the forward or backward of the one layer where nothing lasting was put in place, as in a stage."""
        if self._patches is not None and self._patches.active:
            yield
            return
        patches = Patches()
        try:
            self.patch(patches)
            yield
        finally:
            patches.undo()

    def has(self, kind: type[nn.Module]) -> bool:
        """Whether a module of this class is in the layer."""
        return any(isinstance(module, kind) for module in self.layer.modules())

    def attend(self, x: Tensor, arguments: Mapping[str, Any], call: ChunkCall) -> Tensor | None:
        """The attention module's output for the chunk x [B, chunk, d] that starts at call.start."""
        assert self.linears is not None
        narrowed = _narrowed(arguments, call.start, x.shape[1])
        try:
            with self.linears.without(self._projections(call.unread)):
                self._run(call, x, narrowed)
        except Stop as stop:
            return stop.output
        raise ValueError(f"{type(self.layer).__name__} does not call its self_attn: streaming cannot use it")

    def finish(
        self, x: Tensor, attended: Tensor, arguments: Mapping[str, Any], start: int, routing: Routing | None = None
    ) -> tuple[Tensor, ...]:
        """The layer's output for the chunk x [B, chunk, d] at token `start`, given its attention module's output.

        With `routing`, the chunk's router statistics follow it.
        """
        return self._to_the_end(x, Attended(attended), arguments, start, routing)

    def attention_input(self, x: Tensor, arguments: Mapping[str, Any], start: int) -> TakeInput:
        """What the layer hands its attention module for the chunk x [B, chunk, d] at token `start`."""
        taken = TakeInput()
        with suppress(Stop):
            self._run(taken, x, _narrowed(arguments, start, x.shape[1]))
        if taken.hidden is None:
            raise ValueError(f"{type(self.layer).__name__} does not call its self_attn: streaming cannot use it")
        return taken

    def finish_heads(
        self, x: Tensor, heads: HeadsOutput, arguments: Mapping[str, Any], rows: Mapping[nn.Module, slice],
        routing: Routing | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As finish, given what each head attended.

        Args:
            rows: of the projections' output, which is not read: the fewer, the less is done for nothing.
        """
        assert self.linears is not None
        with self.linears.rows(rows), self.linears.without(self._projections(heads.unread)):
            return self._to_the_end(x, heads, arguments, heads.start, routing)

    def _projections(self, names: Sequence[str]) -> list[nn.Module | None]:
        return [getattr(self.attention, name, None) for name in names]

    def _to_the_end(
        self, x: Tensor, call: Attended | HeadsOutput, arguments: Mapping[str, Any], start: int,
        routing: Routing | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logits: list[Tensor] = []
        if routing is not None:
            self._router_logits, self._router_index = logits, routing.index
        try:
            out = self._run(call, x, _narrowed(arguments, start, x.shape[1]))
        finally:
            self._router_logits = None
        result: Tensor = out[0] if isinstance(out, tuple) else out
        if routing is None:
            return (result,)
        return result, *routing.statistics(logits[0], start, x.shape[1])

    def _layer_forward(self, plain: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = self._current.run
        if run is None:
            checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.layer.modules())
            if inside_backward() and self._streamed and not checkpointing:
                raise ValueError(CHECKPOINTED.format(type(self.layer).__name__))
            return plain(hidden_states, *args, **kwargs)
        if inside_checkpoint() and not run.checkpointed:
            raise ValueError(CHECKPOINTED.format(type(self.layer).__name__))
        if args:
            raise ValueError(f"{type(self.layer).__name__} takes positional arguments: streaming cannot use it")
        self._streamed = True
        self._current.num_streamed += 1
        with self.patched(), without_checkpointing(self.layer):
            output = run.layer(self, hidden_states, kwargs)
        if torch.is_autocast_enabled(hidden_states.device.type):
            # Else autocast keeps its copies of all layers' weights until the forward ends. No graph holds them here.
            torch.clear_autocast_cache()
        return output

    def _run(self, call: AttentionCall, x: Tensor, arguments: Mapping[str, Any]) -> Any:
        """The layer's own forward, whose attention module does as `call` says."""
        before, self._call = self._call, call
        try:
            assert self._patches is not None
            return self._patches.plain(self.layer)(x, **arguments)
        finally:
            self._call = before

    def _attention_forward(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return plain(*args, **kwargs)
        # Recomputed under a checkpoint of its own. One around the whole pass runs a forward again, without gradients.
        if torch.is_grad_enabled() and not isinstance(call, TakeInput) and inside_checkpoint() and inside_backward():
            raise ValueError(CHECKPOINTED.format(type(self.layer).__name__))
        if isinstance(call, Attended):
            return call.output, None
        if isinstance(call, TakeInput):
            call.take(plain, args, kwargs, self._rotary)
            raise Stop
        if isinstance(call, HeadsOutput):
            return plain(*args, stream_call=call, **kwargs)
        with fused_rotary(self._rotary):
            out = plain(*args, stream_call=call, **kwargs)
        raise Stop(out[0])

    def _router_forward(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if self._router_logits is not None:
            self._router_logits.append(out[self._router_index])
        return out


def _narrowed(arguments: Mapping[str, Any], start: int, length: int) -> dict[str, Any]:
    """The layer's arguments for some of its tokens."""

    def narrow(value: Any, dim: int) -> Any:
        if isinstance(value, tuple):
            return tuple(narrow(part, dim) for part in value)
        return value.narrow(dim, start, length) if isinstance(value, Tensor) else value

    return {name: narrow(value, TOKEN_DIMS[name]) if name in TOKEN_DIMS else value for name, value in arguments.items()}


def chunks_of(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each chunk."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
