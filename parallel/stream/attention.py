"""Attention of one chunk of a sequence against all keys before it, without a mask.

A chunk of a causal layer is one triangle and the rectangle of its prefix; windows, packed documents and padding cut
these into more rectangles and triangles (attention.blocks). Each is a plain call of a kernel of attention.backends,
merged by lse. torch's scaled_dot_product_attention would need a [chunk, T] mask for the same, and gives no gradient of
a prefix that other chunks read too.

Keys and values live in a `LayerKeys`, whole, once a layer. Chunks go backward last to first, so when a chunk's turn
comes every later chunk has added its share to the gradient of its keys: one backward of the chunk is final.

                 keys of chunk
                  0   1   2   3
               0 \\                   forward: rows from the top, each written to LayerKeys, then attended.
    queries of 1 ##  \\              backward: row 3 first. It adds to the gradients of the keys of 0, 1, 2 and 3,
    chunk      2 ##  ##  \\          and is the only row that sees those of 3, which are therefore final; then row 2
               3 ##  ##  ##  \\      makes those of 2 final, and so on.     \\ triangle   ## rectangle

transformers' modules reach this file through `stream_attention_forward`, which hands each chunk's q, k and v to the
`ChunkCall` that came as an argument: what a chunk does with its attention is decided there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.attention.backends import CAPPING, select_backend
from fourfold.parallel.attention.blocks import Block, Span
from fourfold.parallel.attention.calls import add, attend_call_backward, calls
from fourfold.parallel.attention.kernels import (
    AttentionBackend,
    CpuFlash,
    Gradients,
    MathAttention,
    SavedAttention,
    accumulation_dtype,
)
from fourfold.parallel.stream.block_attention import attend_blocks, chunk_blocks
from fourfold.parallel.stream.work_space import KEYS_A_CALL


@dataclass(frozen=True, slots=True)
class RowMask:
    """What the rows `rows` of a batch may see, beside causality and the layer's window.

    Attributes:
        rows: first row and the one after the last.
        keys: runs of tokens that are not padding, as (start, stop).
        documents: (start, stop) of each packed document; they tile the sequence.
    """

    rows: Span
    keys: tuple[Span, ...]
    documents: tuple[Span, ...]


def row_masks(attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int]) -> list[RowMask]:
    """One RowMask for each run of rows with the same padding and documents.

    Args:
        attention_mask: [B, T], 0 at padding; None is none.
        position_ids: [B or 1, T]; a fall within a row starts a packed document, as transformers has it. Not read when
            there is an attention_mask (nor does transformers).
        shape: (B, T).
    """
    batch, seq_len = shape
    everything: tuple[Span, ...] = ((0, seq_len),)
    rows: list[tuple[tuple[Span, ...], tuple[Span, ...]]]
    if attention_mask is not None:
        rows = [(_runs(row), everything) for row in attention_mask.bool().tolist()]
    elif position_ids is not None:
        steps = position_ids.diff(dim=1).ne(1).expand(batch, -1).cpu()
        starts = [[0, *(row.nonzero().flatten() + 1).tolist()] for row in steps]
        rows = [(everything, tuple(zip(cuts, [*cuts[1:], seq_len], strict=True))) for cuts in starts]
    else:
        rows = [(everything, everything)] * batch
    masks: list[RowMask] = []
    for row, (keys, documents) in enumerate(rows):
        if masks and (masks[-1].keys, masks[-1].documents) == (keys, documents):
            masks[-1] = RowMask((masks[-1].rows[0], row + 1), keys, documents)
        else:
            masks.append(RowMask((row, row + 1), keys, documents))
    return masks


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """What an attention module says about its scores.

    Attributes:
        scale: they are multiplied by it.
        window: keys a query sees, itself included; None is all before it.
        soft_cap: then they become soft_cap * tanh(scores / soft_cap); None is no cap.
        sinks: [H], a score of each head that every query has beside those of its keys, with a value of zero.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None


def with_sinks(attended: tuple[Tensor, Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention without sinks as those with them: one more term of each softmax, which adds nothing.

    Args:
        attended: out [B, H, S, D] and lse [B, H, S].
        sinks: [H]; None is none.
    """
    if sinks is None:
        return attended
    out, lse = attended
    whole = torch.logaddexp(lse, sinks.detach().to(lse.dtype)[None, :, None])
    return (out * (lse - whole).exp().unsqueeze(-1)).to(out.dtype), whole


def sinks_gradient(grad_out: Tensor, attended: tuple[Tensor, Tensor], sinks: Tensor) -> Tensor:
    """[H], of what with_sinks had: a sink's weight shrinks the output in proportion, so it is -weight * (out . grad).

    Args:
        attended: with_sinks' result.
    """
    out, lse = attended
    agreement = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    weights = (sinks.detach().to(lse.dtype)[None, :, None] - lse).exp()
    return -(weights * agreement).sum((0, 2)).to(sinks.dtype)


class LayerKeys:
    """Keys and values of one layer over the whole sequence, and in a backward pass their gradients.

    Args:
        masks: row_masks of the batch.
        shape: (B, T).
        backend: an attention backend or its name, or None to choose.
    """

    def __init__(
        self, masks: Sequence[RowMask], shape: tuple[int, int], backend: AttentionBackend | str | None = None
    ) -> None:
        self._masks, self._shape, self._chosen = masks, shape, backend
        self._k: Tensor | None = None

    _v: Tensor
    _grads: tuple[Tensor, Tensor] | None = None
    _backend: AttentionBackend

    def write(self, k: Tensor, v: Tensor, start: int, soft_cap: float | None) -> None:
        """Keep a chunk's keys and values, [B, H_kv, chunk, D]. The first chunk's choose the backend."""
        if self._k is None:
            self._k, self._v = (x.new_empty((x.shape[0], x.shape[1], self._shape[1], x.shape[3])) for x in (k, v))
            self._backend = backend_for(self._chosen, k, soft_cap)
        self._k[:, :, start : start + k.shape[2]] = k
        self._v[:, :, start : start + k.shape[2]] = v

    def attend(self, q: Tensor, start: int, options: ScoreOptions) -> tuple[Tensor, Tensor]:
        """(out [B, H, chunk, D] in q.dtype, lse [B, H, chunk]) of a chunk's queries; all its keys must be written."""
        parts = [self._attend_rows(q, mask, start, options) for mask in self._masks]
        if len(parts) == 1:
            return with_sinks(parts[0], options.sinks)
        outs, lses = zip(*parts, strict=True)
        return with_sinks((torch.cat(outs), torch.cat(lses)), options.sinks)

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, attended: tuple[Tensor, Tensor], start: int, options: ScoreOptions
    ) -> Gradients:
        """(dq, dk, dv) of a chunk, dk and dv final: every later chunk must have been here before.

        Args:
            attended: (out, lse) as `attend` gave them.
        """
        assert self._k is not None
        if self._grads is None:
            dtype = accumulation_dtype(self._k.dtype)
            self._grads = torch.zeros_like(self._k, dtype=dtype), torch.zeros_like(self._v, dtype=dtype)
        dq = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype))
        for mask in self._masks:
            rows = slice(*mask.rows)
            saved = SavedAttention(q[rows], self._k[rows], self._v[rows], attended[0][rows], attended[1][rows])
            totals = (dq[rows], self._grads[0][rows], self._grads[1][rows])
            for call in calls(self._backend, saved.q, self._blocks(mask, start, q.shape[2], options.window)):
                queries, keys = call.queries(q.device), call.keys(q.device)
                parts = attend_call_backward(self._backend, grad_out[rows], saved, call, options.scale)
                for total, tokens, part in zip(totals, (queries, keys, keys), parts, strict=True):
                    add(total, tokens, part)
        chunk = slice(start, start + q.shape[2])
        dk, dv = (grad[:, :, chunk] for grad in self._grads)
        return dq.to(q.dtype), dk.to(self._k.dtype), dv.to(self._v.dtype)

    def _blocks(self, mask: RowMask, start: int, length: int, window: int | None) -> tuple[Block, ...]:
        backend, span = self._backend, (start, start + length)
        return chunk_blocks(mask.keys, mask.documents, span, window, backend.leaf, keys_a_call(backend))

    def _attend_rows(self, q: Tensor, mask: RowMask, start: int, options: ScoreOptions) -> tuple[Tensor, Tensor]:
        assert self._k is not None
        rows = slice(*mask.rows)
        blocks = self._blocks(mask, start, q.shape[2], options.window)
        out, lse = attend_blocks(self._backend, q[rows], self._k[rows], self._v[rows], blocks, options.scale)
        return out, lse.contiguous()


def backend_for(chosen: AttentionBackend | str | None, k: Tensor, soft_cap: float | None) -> AttentionBackend:
    """The backend that attends to keys like k [B, H_kv, S, D].

    Args:
        chosen: an attention backend or its name, or None to choose.
    """
    if soft_cap is not None:
        return select_backend(chosen if chosen in CAPPING else None, k, k, soft_cap)
    return select_backend(chosen, k, k) if chosen is None or isinstance(chosen, str) else chosen


def keys_a_call(backend: AttentionBackend) -> int | None:
    """Keys that an unmasked call of this backend takes at most; None is no limit.

    A CPU's cache holds the gradients of so many keys while they are read again, and MathAttention holds a score for
    each pair. A GPU's fused kernel does neither, and wants large calls.
    """
    return KEYS_A_CALL if isinstance(backend, CpuFlash | MathAttention) else None


class ChunkCall(Protocol):
    """What one chunk does when its layer's attention module attends.

    Attributes:
        start: the chunk's first token.
        unread: names of the attention module's projections whose output nobody reads in this call.
    """

    @property
    def start(self) -> int: ...

    @property
    def unread(self) -> Sequence[str]: ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        """The output [B, H, chunk, D] for the chunk's q, k, v, or Stop."""


class Stop(Exception):
    """Leaves a layer's forward at its attention module, with the module's output where there is one."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.output = output


@dataclass(slots=True)
class WriteKeys:
    """Writes the chunk's keys and values and goes no further."""

    keys: LayerKeys
    start: int
    unread: Sequence[str] = ("q_proj",)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        self.keys.write(k, v, self.start, options.soft_cap)
        raise Stop


@dataclass(slots=True)
class Attend:
    """Writes the chunk's keys and values and attends to all so far, outside autograd's graph."""

    keys: LayerKeys
    start: int
    unread: Sequence[str] = ()
    attended: tuple[Tensor, Tensor] | None = None
    """(out, lse), once it has."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        self.keys.write(k.detach(), v.detach(), self.start, options.soft_cap)
        self.attended = self.keys.attend(q, self.start, options)
        return self.attended[0]


@dataclass(slots=True)
class Project:
    """Takes a chunk's q, k and v, [B, heads, chunk, D], and goes no further."""

    start: int
    taken: tuple[Tensor, Tensor, Tensor] | None = None
    options: ScoreOptions | None = None
    unread: Sequence[str] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        self.taken, self.options = (q, k, v), options
        raise Stop


@dataclass(slots=True)
class AttendAgain:
    """Attends inside autograd's graph, in backward, when all keys are written."""

    keys: LayerKeys
    start: int
    unread: Sequence[str] = ()
    kept: tuple[Tensor, Tensor] | None = None
    """(out, lse) of the forward pass, where they were kept."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
        out: Tensor = ChunkAttention.apply(q, k, v, options.sinks, self, options)  # type: ignore[no-untyped-call]
        return out


class ChunkAttention(torch.autograd.Function):
    """A chunk's attention in autograd's graph; gradients of the prefix's keys go to `keys`, beside the graph."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttendAgain, options: ScoreOptions
    ) -> Tensor:
        out, lse = call.keys.attend(q, call.start, options) if call.kept is None else call.kept
        ctx.save_for_backward(q, out, lse)
        ctx.keys, ctx.start, ctx.options = call.keys, call.start, options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, *attended = ctx.saved_tensors
        gradients = ctx.keys.attend_backward(grad_out, q, tuple(attended), ctx.start, ctx.options)
        sinks = ctx.options.sinks
        return *gradients, None if sinks is None else sinks_gradient(grad_out, tuple(attended), sinks), None, None


def stream_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stream_call: ChunkCall | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: a chunk's [B, H, chunk, D] in, [B, chunk, H, D] out.

    Args:
        stream_call: what the layer of this module is doing.
        arguments: transformers' other ones: scaling, dropout, sliding_window, softcap, s_aux.
    """
    if stream_call is None or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} does not pass the arguments of its layer on: streaming cannot use it"
        )
    if arguments.get("dropout"):
        raise ValueError(f"{type(module).__name__} asks for attention dropout: no kernel repeats it exactly")
    # As autocast does for scaled_dot_product_attention: norms in fp32 have left q and k in fp32.
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    scale = arguments.get("scaling")
    options = ScoreOptions(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=arguments.get("sliding_window"),
        soft_cap=arguments.get("softcap"),
        sinks=arguments.get("s_aux"),
    )
    # Kernels want heads of one size. Zeros at the end of a key add nothing to a score, those of a value are left out.
    size, value_size = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    out = stream_call.attend(query, key, value, options)[..., :value_size]
    return out.transpose(1, 2).contiguous(), None


def _runs(row: Sequence[bool]) -> tuple[Span, ...]:
    runs: list[Span] = []
    for token, seen in enumerate(row):
        if not seen:
            continue
        if runs and runs[-1][1] == token:
            runs[-1] = (runs[-1][0], token + 1)
        else:
            runs.append((token, token + 1))
    return tuple(runs)
