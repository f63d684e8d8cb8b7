"""Blocks as kernel calls: small blocks of one shape are one call, where a kernel takes packed sequences.

    blocks of a row of documents             calls of a GPU with such a kernel
    # (a) . . .                              a: one call of the fastest kernel, for it is large
    . # . . .                                b to e: one call of the packed kernel
    . . # . .  (b to e)
    . . . # .
    . . . . #

Where no kernel packs, as on a CPU, every block is a call. Blocks of a call share neither queries nor keys, so outputs
lie side by side and so do gradients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fourfold.parallel.attention.backends import attend_block, attend_block_backward, padded, unpadded
from fourfold.parallel.attention.blocks import Block, Shape, Span
from fourfold.parallel.attention.kernels import AttentionBackend, Gradients, PackedKernel, Packing, SavedAttention
from fourfold.parallel.sequence.tensors import on_device

# Operations, forward, below which a kernel mostly waits for its launch: 20 microseconds at 400 TFLOP/s, about what
# starting a kernel from Python takes. An estimate, not measured.
WORTH_A_CALL_FLOPS = 8e9
Tokens = Span | Tensor
"""Some tokens of a sequence: from one to another, or their indices [n]."""


@dataclass(frozen=True, slots=True)
class Call:
    """Blocks that one call of a kernel does.

    Attributes:
        blocks: of one shape, no two of which share a query or a key, in ascending order.
        packed: whether it is a call of the backend's packed kernel.
    """

    blocks: tuple[Block, ...]
    packed: bool = False

    @property
    def shape(self) -> Shape:
        return self.blocks[0].shape

    def queries(self, device: torch.device) -> Tokens:
        """The queries, in the order in which attend_call gives them."""
        return _tokens(tuple(block.q for block in self.blocks), self.shape == "anticausal" and self.packed, device)

    def keys(self, device: torch.device) -> Tokens:
        """The keys, in the order in which attend_call_backward gives their gradients."""
        return _tokens(tuple(block.k for block in self.blocks), self.shape == "anticausal" and self.packed, device)


def packed_kernel(backend: AttentionBackend) -> PackedKernel | None:
    """What packs sequences for the backend; None where nothing does, as for a backend of a caller's own."""
    return getattr(backend, "packed", None)


def flops(q: Tensor, pairs: int) -> int:
    """Of the forward of attention of so many (query, key) pairs, for q [B, H, S, D]."""
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs


def takes_window(backend: AttentionBackend, q: Tensor, window: int | None) -> bool:
    """Whether a causal window on the queries' own keys is left to a kernel, or cut into tiles.

    A kernel that is not the fastest is worth it only for tiles that are mostly launches.
    """
    packed = packed_kernel(backend)
    if packed is None or window is None:
        return False
    return packed.name == backend.name or flops(q, window * window) < WORTH_A_CALL_FLOPS


def calls(backend: AttentionBackend, q: Tensor, blocks: Sequence[Block]) -> tuple[Call, ...]:
    """The blocks as kernel calls, for q [B, H, S, D]."""
    packed = packed_kernel(backend)
    if packed is None or (len(blocks) == 1 and not blocks[0].window):
        return tuple(Call((block,)) for block in blocks)
    own = packed.name == backend.name
    return _grouped(tuple(blocks), None if own else WORTH_A_CALL_FLOPS / flops(q, 1))


def attend_call(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, D_v], lse [B, H, n]) of the call's n queries; q, k and v are given whole."""
    if not call.packed:
        return attend_block(backend, q, k, v, call.blocks[0], scale)
    packed = packed_kernel(backend)
    assert packed is not None
    queries, keys = call.queries(q.device), call.keys(k.device)
    here = padded(backend, take(q, queries), take(k, keys), take(v, keys))
    packing = _packing(call, q.shape[0], q.device)
    row_q, row_k, row_v = map(in_a_row, here)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = packed.forward(row_q, row_k, row_v, packing, scale)
    return by_batch(out, q.shape[0])[..., : v.shape[3]], lse.reshape(q.shape[1], q.shape[0], -1).transpose(0, 1)


def attend_call_backward(
    backend: AttentionBackend, grad_out: Tensor, saved: SavedAttention, call: Call, scale: float
) -> Gradients:
    """(dq, dk, dv) of the call's own queries and keys; grad_out and `saved` are given whole."""
    if not call.packed:
        return attend_block_backward(backend, grad_out, saved, call.blocks[0], scale)
    packed = packed_kernel(backend)
    assert packed is not None
    queries, keys = call.queries(saved.q.device), call.keys(saved.q.device)
    here = take(saved.q, queries), take(saved.k, keys), take(saved.v, keys)
    wide = padded(backend, *here, take(saved.out, queries), take(grad_out, queries))
    q, k, v, out, grad = map(in_a_row, wide)
    lse = take(saved.lse.unsqueeze(-1), queries).squeeze(-1).transpose(0, 1).flatten(1)
    packing = _packing(call, saved.q.shape[0], saved.q.device)
    with torch.autocast(grad_out.device.type, enabled=False):
        gradients = packed.backward(grad, SavedAttention(q, k, v, out, lse), packing, scale)
    dq, dk, dv = (by_batch(gradient, saved.q.shape[0]) for gradient in gradients)
    return unpadded((dq, dk, dv), here)


def take(x: Tensor, tokens: Tokens) -> Tensor:
    """[B, H, n, D] of x [B, H, S, D]."""
    return x[:, :, slice(*tokens)] if isinstance(tokens, tuple) else x.index_select(2, tokens)


def add(total: Tensor, tokens: Tokens, part: Tensor) -> None:
    """Add `part` [B, H, n, D] to these tokens of `total` [B, H, S, D], which are all different."""
    if isinstance(tokens, tuple):
        total[:, :, slice(*tokens)].add_(part)
    else:
        total.index_add_(2, tokens, part.to(total.dtype))


def in_a_row(x: Tensor) -> Tensor:
    """[B, H, n, D] -> [B*n, H, D], a row of B sequences."""
    return x.transpose(1, 2).flatten(0, 1)


def by_batch(x: Tensor, rows: int) -> Tensor:
    """[B*n, H, D] -> [B, H, n, D], the way back."""
    return x.reshape(rows, -1, *x.shape[1:]).transpose(1, 2)


@lru_cache(maxsize=1024)
def _grouped(blocks: tuple[Block, ...], large: float | None) -> tuple[Call, ...]:
    """Blocks of fewer pairs than `large` (None: all) joined as far as they are of one shape and lie side by side."""
    found: list[Call] = []
    groups: list[list[Block]] = []
    window = max((block.window for block in blocks), default=0)
    for block in sorted(_alike(block, window) for block in blocks):
        if not block.window and large is not None and block.pairs >= large:
            found.append(Call((block,)))
            continue
        home = next((group for group in groups if _follows(block, group[-1])), None)
        if home is None:
            groups.append([block])
        else:
            home.append(block)
    found += [Call(tuple(group), packed=len(group) > 1 or bool(group[0].window)) for group in groups]
    return tuple(sorted(found, key=lambda call: call.blocks))


def _alike(block: Block, window: int) -> Block:
    """The same block, in the shape that more of the others have: a single pair is causal, and any window holds it."""
    side = block.q[1] - block.q[0]
    if block.shape == "full" and side == block.k[1] - block.k[0] == 1:
        block = replace(block, shape="causal")
    return replace(block, window=window) if block.shape == "causal" and side <= window else block


def _follows(block: Block, last: Block) -> bool:
    alike = (block.shape, block.window) == (last.shape, last.window)
    return alike and last.q[1] <= block.q[0] and last.k[1] <= block.k[0]


@lru_cache(maxsize=256)
def _tokens(spans: tuple[Span, ...], reverse: bool, device: torch.device) -> Tokens:
    if not reverse and all(first[1] == second[0] for first, second in pairwise(spans)):
        return spans[0][0], spans[-1][1]
    indices = torch.cat([torch.arange(*span) for span in spans])
    return on_device(indices.flip(0) if reverse else indices, device)


@lru_cache(maxsize=256)
def _packing(call: Call, rows: int, device: torch.device) -> Packing:
    blocks: Iterable[Block] = reversed(call.blocks) if call.shape == "anticausal" else call.blocks
    lengths = [(block.q[1] - block.q[0], block.k[1] - block.k[0]) for block in blocks]
    queries, keys = ([*sizes] * rows for sizes in zip(*lengths, strict=True))
    starts = [on_device(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device) for sizes in (queries, keys)]
    return Packing(
        starts[0], starts[1], max(queries), max(keys), call.shape != "full", call.blocks[0].window or None
    )  # fmt: skip
