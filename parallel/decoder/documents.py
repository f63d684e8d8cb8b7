"""Packed rows: what a stage's attention and rotary embeddings are told of the documents in them.

A packed row holds several documents, one after the other, so that no token is spent on padding. Trained as one process
trains it with a block-diagonal mask, a token sees its own document only, positions count from each document's start,
and no document's last token is asked for the next one's first. Each kind of attention is told this in its own words:

    plain       a mask                              row 0   a a a b b        a
    streaming   position ids that restart           row 1   c c d d d        a a            mask of row 0
    the ring    cu_seqlens of one row:                                       a a a
                a b c d, documents of all rows                                     b
                one after the other                                                b b
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.ring.options import AgreedLength, RingSettings
from fourfold.parallel.sequence.sharding import Shard, shard_length, shard_ranges
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, on_device, shard_positions


@dataclass(frozen=True, slots=True)
class PackedRows:
    """What a stage's layers are given for one micro-batch of packed rows.

    Attributes:
        position_ids: [B, S], or around a ring [1, S_local], counted from each document's start.
        arguments: of the attention function.
        read: position_ids where document_ids were given, for layers that stream: the host reads them.
    """

    position_ids: Tensor
    arguments: dict[str, Any]
    read: Tensor | None = None


def packed_rows(document_ids: Tensor, *, ring: RingSettings | None, streams: bool, device: torch.device) -> PackedRows:
    """The documents of a micro-batch, told to the attention that a stage has.

    Args:
        document_ids: [B, S] int64, whole rows on every rank.
        ring: the settings of the ring that attends, if one does.
        streams: whether the layers stream, so that position ids alone tell.
    Cost: plain attention a mask of B S^2 bytes; streaming and the ring need the documents on the host, so leave them
        there.
    """
    if ring is not None:
        ends = ends_of_rows(document_ids)
        tokens, sharding = document_ids.numel(), ring.options.sharding
        positions = shard_positions(tokens, ring.group, sharding, ends, device=device)
        # A tensor, so that a compiled layer does not depend on the numbers.
        return PackedRows(
            positions[None], {"ring_seq_len": AgreedLength(tokens), "ring_cu_seqlens": torch.tensor(ends)}
        )
    if streams:
        positions = document_positions(document_ids)
        return PackedRows(on_device(positions, device), {}, read=positions)
    document_ids = on_device(document_ids, device)
    return PackedRows(document_positions(document_ids), {"attention_mask": seen_tokens(None, document_ids)})


def first_tokens(document_ids: Tensor) -> Tensor:
    """[B, S], true at each document's first token; a row's first token begins one."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: Tensor) -> Tensor:
    """[B, S] int64, counted from the start of each document."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)[None]
    return places - torch.cummax(torch.where(first_tokens(document_ids), places, 0), dim=1).values


def ends_of_rows(document_ids: Tensor) -> tuple[int, ...]:
    """cu_seqlens of the documents of all rows, laid one after the other in one row."""
    starts = first_tokens(document_ids).flatten().nonzero().flatten().tolist()
    return (*starts, document_ids.numel())


def without_first_tokens(labels: Tensor, document_ids: Tensor) -> Tensor:
    """labels [B, S] in which no document's first token is a target."""
    return labels.masked_fill(first_tokens(document_ids).to(labels.device), IGNORED_LABEL)


def document_shards(document_ids: Tensor, size: int, sharding: str) -> tuple[Shard, ...]:
    """The tokens of each rank of a ring, counted through all rows of a micro-batch."""
    return shard_ranges(document_ids.numel(), size, sharding, ends_of_rows(document_ids))


def seen_tokens(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """[B, 1, S, S], true where a query (row) sees a key: before it or itself, no padding, of its own document.

    A query always sees itself, else padding would give the softmax nothing to sum over. None where nothing is told.
    """
    given = document_ids if document_ids is not None else attention_mask
    if given is None:
        return None
    length = given.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=given.device).tril()[None]
    if attention_mask is not None:
        seen = seen & (attention_mask != 0)[:, None, :]
    if document_ids is not None:
        seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
    itself = torch.eye(length, dtype=torch.bool, device=given.device)[None]
    return (seen | itself)[:, None]


def trouble_with_documents(document_ids: Tensor, input_ids: Tensor) -> str:
    """What is wrong with one rank's document_ids in themselves, with the mend; empty where nothing is."""
    if not isinstance(document_ids, Tensor):
        return f"document_ids are a {type(document_ids).__name__}: give a torch tensor, [batch, sequence]"
    if document_ids.is_floating_point() or document_ids.is_complex() or document_ids.dtype == torch.bool:
        return f"document_ids are {document_ids.dtype}: give whole numbers, torch.int64"
    if document_ids.shape != input_ids.shape:
        return (
            f"document_ids {tuple(document_ids.shape)} for input_ids {tuple(input_ids.shape)}: give one number a token"
        )
    for number, (row, starts) in enumerate(zip(document_ids, first_tokens(document_ids), strict=True)):
        begun = row[starts].tolist()
        if len(set(begun)) < len(begun):
            again = next(each for each in begun if begun.count(each) > 1)
            return (
                f"row {number} of document_ids comes back to document {again} after another one: give the tokens of a "
                "document in one piece, and each document of a row a number of its own"
            )
    return ""


def trouble_with_ring(document_ids: Tensor, *, size: int, sharding: str, micro_batch: int | None) -> str:
    """Whether some rank of a ring would be left without a token; the mend, or empty where none is."""
    for rows in torch.split(document_ids, micro_batch or max(1, len(document_ids))):
        lengths = [shard_length(shard) for shard in document_shards(rows, size, sharding)]
        if not all(lengths):
            return (
                f"document_ids: the ranks of cp={size} would hold {lengths} tokens of {rows.numel()}, and each needs "
                "one: give longer rows, or more of them a micro-batch"
            )
    return ""
