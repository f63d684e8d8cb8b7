"""Attention of all queries of a batch to all keys, under its masks: large calls of a kernel, as few as there can be.

Rows with masks of their own (padding, documents) are attended to one after the other, or, where a kernel packs
sequences, as one row: their blocks are then packed like those of documents.

    row 0   a a a .                       a a a . b b b b     one call, of sequences of 3 and 4 tokens
    row 1   b b b b    in one row  ->
"""

from dataclasses import replace

import torch
from torch import Tensor

from fourfold.parallel.attention.blocks import Block
from fourfold.parallel.attention.calls import by_batch, in_a_row, packed_kernel, takes_window
from fourfold.parallel.attention.kernels import AttentionBackend, Gradients, MathAttention, SavedAttention
from fourfold.parallel.stream.attention import RowMask, ScoreOptions, backend_for, keys_a_call, with_sinks
from fourfold.parallel.stream.block_attention import attend_blocks, attend_blocks_backward, chunk_blocks
from fourfold.parallel.stream.layer import chunks_of
from fourfold.parallel.stream.layer_run import StreamRun


def attend_whole(run: StreamRun, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D] in q.dtype, lse [B, H, T]) of all queries to all keys, under the run's masks."""
    backend = backend_for(run.backend, k, options.soft_cap)
    if len(run.masks) == 1:
        blocks = whole_blocks(run.masks[0], q, options.window, backend, run.chunk)
        whole = attend_blocks(backend, q, k, v, blocks, options.scale)
    elif packed_kernel(backend) is not None:
        blocks = _blocks_in_a_row(run, q, options.window, backend)
        out, lse = attend_blocks(backend, _one_row(q), _one_row(k), _one_row(v), blocks, options.scale)
        whole = _rows(out, q.shape[0]), lse.reshape(q.shape[1], q.shape[0], -1).transpose(0, 1)
    else:
        parts = []
        for mask in run.masks:
            rows = slice(*mask.rows)
            blocks = whole_blocks(mask, q[rows], options.window, backend, run.chunk)
            parts.append(attend_blocks(backend, q[rows], k[rows], v[rows], blocks, options.scale))
        whole = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    return with_sinks(whole, options.sinks)


def attend_whole_backward(run: StreamRun, grad_out: Tensor, saved: SavedAttention, options: ScoreOptions) -> Gradients:
    """(dq, dk, dv), final, in the inputs' dtype; `saved` as attend_whole had and gave it."""
    backend, q = backend_for(run.backend, saved.k, options.soft_cap), saved.q
    if len(run.masks) == 1:
        blocks = whole_blocks(run.masks[0], q, options.window, backend, run.chunk)
        return attend_blocks_backward(backend, grad_out, saved, blocks, options.scale)
    if packed_kernel(backend) is not None:
        blocks = _blocks_in_a_row(run, q, options.window, backend)
        lse = saved.lse.transpose(0, 1).flatten(1)[None]
        row = SavedAttention(_one_row(q), _one_row(saved.k), _one_row(saved.v), _one_row(saved.out), lse)
        dq, dk, dv = attend_blocks_backward(backend, _one_row(grad_out), row, blocks, options.scale)
        return _rows(dq, len(q)), _rows(dk, len(q)), _rows(dv, len(q))
    parts = []
    for mask in run.masks:
        rows = slice(*mask.rows)
        blocks = whole_blocks(mask, q[rows], options.window, backend, run.chunk)
        mine = SavedAttention(*(tensor[rows] for tensor in saved))
        parts.append(attend_blocks_backward(backend, grad_out[rows], mine, blocks, options.scale))
    dq, dk, dv = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
    return dq, dk, dv


def whole_blocks(
    mask: RowMask, q: Tensor, window: int | None, backend: AttentionBackend, chunk: int
) -> tuple[Block, ...]:
    """The unmasked work of all queries: large blocks for a fused kernel, `chunk` queries where scores are held.

    Args:
        q: [B, H, T, D].
    """
    size = chunk if isinstance(backend, MathAttention) else q.shape[2]
    most, windows = keys_a_call(backend), takes_window(backend, q, window)
    blocks = []
    for start, stop in chunks_of(0, q.shape[2], size):
        for block in chunk_blocks(mask.keys, mask.documents, (start, stop), window, backend.leaf, most, windows):
            blocks.append(replace(block, q=(block.q[0] + start, block.q[1] + start)))
    return tuple(blocks)


def _blocks_in_a_row(run: StreamRun, q: Tensor, window: int | None, backend: AttentionBackend) -> tuple[Block, ...]:
    """The blocks of all rows of q [B, H, T, D], laid one after the other."""
    blocks = []
    for mask in run.masks:
        here = whole_blocks(mask, q[:1], window, backend, run.chunk)
        for first in range(mask.rows[0] * q.shape[2], mask.rows[1] * q.shape[2], q.shape[2]):
            for block in here:
                q_span, k_span = ((start + first, stop + first) for start, stop in (block.q, block.k))
                blocks.append(replace(block, q=q_span, k=k_span))
    return tuple(blocks)


def _one_row(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [1, H, B*T, D]."""
    return in_a_row(x)[None].transpose(1, 2)


def _rows(x: Tensor, count: int) -> Tensor:
    """[1, H, B*T, D] -> [B, H, T, D]."""
    return by_batch(x.transpose(1, 2)[0], count)
