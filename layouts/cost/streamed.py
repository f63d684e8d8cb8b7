"""How the runtime cuts the layers that stream: its own choice of pieces, asked for every layout.

A layout says in how many chunks at least (`stream_chunks`), or with 1 nothing. What the runtime then takes depends on
the device, on the length and on the memory that is free (parallel.stream.memory.auto_sizes): on a CPU chunks of
queries, on CUDA groups of key heads over the whole sequence, and large pieces of all that follows attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import STREAM, Column, kinds_of
from fourfold.layouts.cost.layer import Times, attention_times, layer_times, one_projection
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.parallel.stream.memory import Asked, auto_sizes, stream_memory
from fourfold.parallel.stream.work_space import PieceSizes, Shape, Work, num_pieces

ROUNDED = 1 << 28
"""Free memory is looked at in steps of so many bytes."""
BEFORE_MLP = 0.6
"""Of a layer's operators, those up to the attention kernel: in a Llama's 24 of 38."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Columns; of a layout that does not stream all are one piece, and no bytes.

    `groups` of key heads, 0 for chunks of queries; `chunks` of tokens that are projected (or attend) at a time; `rest`,
    pieces of what follows attention; `summands` of each weight's gradient; `layer_bytes`, what a layer's backward by
    heads holds beside the layers' inputs.
    """

    groups: Column
    chunks: Column
    rest: Column
    summands: Column
    layer_bytes: Column


def shape_of(model: ModelConfig) -> Shape:
    return Shape(
        layers=model.num_layers, hidden=model.hidden_size, intermediate=model.ffn_size, heads=model.num_heads,
        kv_heads=model.num_kv_heads, head_dim=model.head_dim, vocabulary=model.vocab_size, tied=model.tied_embeddings,
    )  # fmt: skip


def pieces_of(pricing: Pricing, free_bytes: Column) -> Pieces:
    """What each layout's layers are cut into.

    Args:
        free_bytes: of a rank, beside weights, gradients and states. A column.
    """
    layouts, shape = pricing.layouts, shape_of(pricing.model)
    whole = np.ones(len(layouts), dtype=int)
    columns = [whole.copy() for _ in range(4)] + [np.zeros(len(layouts))]
    rows = np.flatnonzero(layouts.checkpointing == STREAM)
    if len(rows):
        free = np.maximum(free_bytes[rows], 0) // ROUNDED
        firsts, places = kinds_of(
            layouts.cp[rows], layouts.micro_batch[rows], pricing.hidden_bytes[rows], layouts.offload[rows],
            layouts.stream_chunks[rows], free,
        )  # fmt: skip
        kinds = [_pieces(pricing, shape, rows[first], int(free[first]) * ROUNDED) for first in firsts]
        for column, found in zip(columns, zip(*kinds, strict=True), strict=True):
            column[rows] = np.array(found)[places]
    groups, chunks, rest, summands, layer_bytes = columns
    return Pieces(groups=groups, chunks=chunks, rest=rest, summands=summands, layer_bytes=layer_bytes)


def _pieces(pricing: Pricing, shape: Shape, row: int, free: int) -> tuple[int, int, int, int, float]:
    """The fields of Pieces for one layout, which has so many bytes free."""
    layouts, device = pricing.layouts, pricing.cluster.device.type
    tokens = max(1, round(layouts.seq_len / int(layouts.cp[row])))
    rows = max(1, round(float(layouts.micro_batch[row])))
    arguments: dict[str, Any] = {
        "batch": rows, "itemsize": int(pricing.hidden_bytes[row]), "device_type": device,
        "offload": bool(layouts.offload[row]) and device == "cuda",
    }  # fmt: skip
    chunks = int(layouts.stream_chunks[row])
    asked = Asked(chunk_size=-(-tokens // chunks)) if chunks > 1 else Asked()
    sizes = _sizes(shape, tokens, asked, free, tuple(arguments.items()))
    if layouts.cp[row] > 1 and sizes.groups:  # around a ring all heads are one group
        sizes = replace(sizes, groups=1)
    chunks = -(-tokens // min(sizes.chunk, tokens))
    if not sizes.groups:
        return 0, chunks, chunks, chunks, 0.0
    work = Work(
        shape=shape, sizes=sizes, batch=rows, itemsize=arguments["itemsize"], keeps=False,
        products=pricing.software.compute_bytes,
    )  # fmt: skip
    a_token, fixed = work.by_heads(tokens)
    rest = num_pieces(tokens, sizes.mlp_chunk, sizes.mlp_chunk)
    return sizes.groups, chunks, rest, num_pieces(tokens, sizes.chunk, sizes.mlp_chunk), rows * tokens * a_token + fixed


@lru_cache(maxsize=1 << 14)
def _sizes(shape: Shape, tokens: int, asked: Asked, free: int, arguments: tuple[tuple[str, Any], ...]) -> PieceSizes:
    """auto_sizes, with the memory that is free looked at only where the sizes taken with enough of it need more."""
    words: Mapping[str, Any] = dict(arguments)
    sizes, total = _with_room(shape, tokens, asked, arguments)
    return sizes if total <= 0.9 * free else auto_sizes(shape, tokens, asked=asked, free_bytes=free, **words)


@lru_cache(maxsize=1 << 12)
def _with_room(
    shape: Shape, tokens: int, asked: Asked, arguments: tuple[tuple[str, Any], ...]
) -> tuple[PieceSizes, int]:
    sizes = auto_sizes(shape, tokens, asked=asked, **dict(arguments))
    taken = stream_memory(
        shape, tokens, head_groups=sizes.groups, chunk_size=sizes.chunk, mlp_chunk=sizes.mlp_chunk, **dict(arguments)
    )
    return sizes, taken.total_bytes


def stream_overhead_s(pricing: Pricing, pieces: Pieces) -> Column:
    """Seconds that StreamBP's pieces cost a layer besides its forward, its recomputed forward and its backward.

    By groups of heads attention's kernels see fewer heads, all else goes in pieces of tokens, and backward projects
    each group's q, k and v once more, twice where not all tokens are projected at a time. By chunks of queries every
    operator goes in pieces.
    """
    layouts = pricing.layouts
    extra = np.zeros(len(layouts))
    rows = np.flatnonzero(layouts.checkpointing == STREAM)
    if not len(rows):
        return extra
    some = layouts.take(rows)
    groups, chunks, rest = pieces.groups[rows], pieces.chunks[rows], pieces.rest[rows]
    here, model = pricing.of(some), pricing.model
    attention, whole = attention_times(here), _total(layer_times(here))
    by_heads = groups > 0
    parts = np.where(by_heads, rest, chunks)
    piece = pricing.of(replace(some, micro_batch=some.micro_batch / parts))
    apart = _total(layer_times(piece)) - np.where(by_heads, _total(attention_times(piece)), 0.0)
    alone = whole - np.where(by_heads, _total(attention), 0.0)
    more = np.maximum(parts * apart - alone, 0.0)
    grouped = attention_times(here, groups=np.maximum(groups, 1))
    more = more + np.where(by_heads, np.maximum(_total(grouped) - _total(attention), 0.0), 0.0)
    again = one_projection(here, (model.hidden_size, model.q_size + 2 * model.kv_size)).forward
    extra[rows] = more + np.where(by_heads, np.where(chunks > 1, 2, 1) * again, 0.0)
    return extra


def _total(times: Times) -> Column:
    return times.forward + times.backward


def launches(pieces: Pieces) -> Column:
    """How many times as often a layer's operators are launched as in one piece."""
    by_heads = BEFORE_MLP * pieces.groups * pieces.chunks + (1 - BEFORE_MLP) * pieces.rest
    return np.where(pieces.groups > 0, by_heads, pieces.chunks)
