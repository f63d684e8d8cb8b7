"""Attention of one chunk of a sequence against all keys before it, without a mask.

A chunk of a causal layer is one triangle and the rectangle of its prefix; windows, packed documents and padding cut
these into more rectangles and triangles (attention.blocks). Each is a plain call of a kernel of attention.backends,
merged by lse. torch's scaled_dot_product_attention would need a [chunk, T] mask for the same, and gives no gradient of
a prefix that other chunks read too.

Keys and values live in a `LayerKeys`, whole, once a layer. Chunks go backward last to first, so when a chunk's turn
comes every later chunk has added its share to the gradient of its keys: one backward of the chunk is final.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.attention.backends import attend_block, attend_block_backward, merge, select_backend
from fourfold.parallel.attention.blocks import Block, Span, pair_blocks, tidy
from fourfold.parallel.attention.kernels import AttentionBackend, Gradients, SavedAttention, accumulation_dtype
from fourfold.parallel.stream.memory import KEYS_A_CALL


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


@lru_cache(maxsize=8192)
def chunk_blocks(
    keys: tuple[Span, ...], documents: tuple[Span, ...], start: int, stop: int, window: int | None, leaf: int
) -> tuple[Block, ...]:
    """The unmasked work of queries start:stop. A block's q counts from `start`, its k from the sequence's first token.

    Args:
        keys, documents: RowMask's.
        window: keys a query sees, itself included; None is all before it.
        leaf: the backend's: triangles down to this size are cut.
    """
    reach = (None if window is None else window - 1, 0)
    oldest = 0 if window is None else max(0, start - window + 1)
    ranges = [range(max(begin, oldest), min(end, stop)) for begin, end in documents if end > oldest and begin < stop]
    blocks: list[Block] = []
    for begin, end in keys:
        begin, end = max(begin, oldest), min(end, stop)
        if begin < end:
            pairs = pair_blocks((range(start, stop),), (range(begin, end),), ranges, reach)
            blocks += [Block(block.q, (block.k[0] + begin, block.k[1] + begin), block.shape) for block in pairs]
    return tuple(piece for block in tidy(blocks, leaf) for piece in _cut(block))


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

    def use(self, backend: AttentionBackend) -> None:
        """Attend by `backend` from the first chunk on."""
        self._chosen = backend

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Keep a chunk's keys and values, [B, H_kv, chunk, D]."""
        if self._k is None:
            self._k, self._v = (x.new_empty((x.shape[0], x.shape[1], self._shape[1], x.shape[3])) for x in (k, v))
            chosen = self._chosen
            self._backend = select_backend(chosen, k, k) if chosen is None or isinstance(chosen, str) else chosen
        self._k[:, :, start : start + k.shape[2]] = k
        self._v[:, :, start : start + k.shape[2]] = v

    def attend(self, q: Tensor, start: int, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        """(out [B, H, chunk, D] in q.dtype, lse [B, H, chunk]) of a chunk's queries; all its keys must be written."""
        parts = [self._attend_rows(q, mask, start, scale, window) for mask in self._masks]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, start: int, scale: float, window: int | None
    ) -> Gradients:
        """(dq, dk, dv) of a chunk, dk and dv final: every later chunk must have been here before."""
        assert self._k is not None
        if self._grads is None:
            dtype = accumulation_dtype(self._k.dtype)
            self._grads = torch.zeros_like(self._k, dtype=dtype), torch.zeros_like(self._v, dtype=dtype)
        dq = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype))
        for mask in self._masks:
            self._backward_rows(dq, grad_out, q, out, lse, mask, start, scale, window)
        chunk = slice(start, start + q.shape[2])
        dk, dv = (grad[:, :, chunk] for grad in self._grads)
        return dq.to(q.dtype), dk.to(self._k.dtype), dv.to(self._v.dtype)

    def _attend_rows(
        self, q: Tensor, mask: RowMask, start: int, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        rows = slice(*mask.rows)
        q = q[rows]
        blocks = chunk_blocks(mask.keys, mask.documents, start, start + q.shape[2], window, self._backend.leaf)
        # A block of all queries starts the sum by itself; else rows that see nothing stay zero.
        whole = next((block for block in blocks if block.q == (0, q.shape[2])), None)
        if whole:
            block_out, block_lse = self._block(q, rows, whole, scale)
            out, lse = block_out.to(accumulation_dtype(q.dtype)), block_lse.contiguous()
        else:
            out = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype))
            lse = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)
        for block in blocks:
            if block is not whole:
                span = slice(*block.q)
                merge(out[:, :, span], lse[:, :, span], *self._block(q, rows, block, scale))
        return out.to(q.dtype), lse

    def _block(self, q: Tensor, rows: slice, block: Block, scale: float) -> tuple[Tensor, Tensor]:
        assert self._k is not None
        return attend_block(self._backend, q, self._k[rows], self._v[rows], block, scale)

    def _backward_rows(
        self, dq: Tensor, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, mask: RowMask, start: int,
        scale: float, window: int | None,
    ) -> None:  # fmt: skip
        assert self._k is not None
        assert self._grads is not None
        rows = slice(*mask.rows)
        saved = SavedAttention(q[rows], self._k[rows], self._v[rows], out[rows], lse[rows])
        for block in chunk_blocks(mask.keys, mask.documents, start, start + q.shape[2], window, self._backend.leaf):
            queries, keys = (rows, slice(None), slice(*block.q)), (rows, slice(None), slice(*block.k))
            parts = attend_block_backward(self._backend, grad_out[rows], saved, block, scale)
            totals = (dq[queries], self._grads[0][keys], self._grads[1][keys])
            for total, part in zip(totals, parts, strict=True):
                total.add_(part)
            del parts, part  # before the next ones are made


class ChunkAttention(torch.autograd.Function):
    """A chunk's attention in autograd's graph; gradients of the prefix's keys go to `keys`, beside the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: LayerKeys,
        start: int,
        scale: float,
        window: int | None,
        kept: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        out, lse = keys.attend(q, start, scale, window) if kept is None else kept
        ctx.save_for_backward(q, out, lse)
        ctx.place = keys, start, scale, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse = ctx.saved_tensors
        keys, start, scale, window = ctx.place
        gradients = keys.attend_backward(grad_out, q, out, lse, start, scale, window)
        return *gradients, None, None, None, None, None


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


def _cut(block: Block) -> list[Block]:
    """A full block as blocks of at most KEYS_A_CALL keys."""
    first, last = block.k
    if block.shape != "full" or last - first <= KEYS_A_CALL:
        return [block]
    return [Block(block.q, (key, min(key + KEYS_A_CALL, last))) for key in range(first, last, KEYS_A_CALL)]
