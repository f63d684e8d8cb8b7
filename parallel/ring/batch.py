"""What a rank passes to a model around the ring, from a batch that every rank of the group holds whole."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import agree, digest, place_in
from fourfold.parallel.sequence.documents import KEYS, ends_of_documents, real_tokens
from fourfold.parallel.sequence.sharding import Shard
from fourfold.parallel.sequence.tensors import (
    IGNORED_LABEL,
    Documents,
    Group,
    on_device,
    on_host,
    shard_labels,
    shard_sequence,
    take,
)

TAKEN = {"input_ids", "inputs_embeds", "labels", "attention_mask", *KEYS}


def shard_batch(
    batch: Mapping[str, Any],
    group: Group,
    *,
    sharding: str = "zigzag",
    cu_seqlens: Documents = None,
) -> dict[str, Any]:
    """What this rank passes to the model, from a batch that every rank of the group holds whole; every rank calls.

    Documents may be told by any of what transformers' collators and TRL send: `position_ids` that restart,
    `cu_seq_lens_q` and `cu_seq_lens_k`, `seq_idx`, or here by cu_seqlens. Zigzag shards then balance the work of each
    document over the ranks. Rows that hold documents or padding are laid one after the other in one row, padding last:

        row 0   a a a b b .          a a a b b c c c . . .
        row 1   . . c c c     ->     documents a, b and c; padding sees nothing and no token sees it

    Args:
        batch: "input_ids" [B, S], or "inputs_embeds" [B, S, d] (of images among the text, say; they are differentiated
            through); "labels" [B, S] (not shifted, -100 ignored) where a loss is wanted; "attention_mask"
            [B, S] of ones, and zeros at padding on either side; and what tells documents.
        group: as given to use_ring_attention, or (rank, size) where nobody communicates.
        sharding: as given to use_ring_attention.
        cu_seqlens: documents packed in the one row of the batch; see ring_attention.
    Returns:
        Keyword arguments for the model. The loss it returns is this rank's part of the mean over the global label
        count: sum losses, and gradients, over the group.
    Raises:
        ValueError: other keys in the batch, documents that are told in two ways which differ, labels at padding, or
            ranks of the group that hold different batches.
    Cost: 32 bytes a rank. The host reads a sum of each tensor, and all of what tells documents or padding; it waits for
        a batch on CUDA, and for none that is still on the host.
    """
    unknown = set(batch) - TAKEN
    if unknown:
        raise ValueError(
            f"{sorted(unknown)} in the batch: it takes {', '.join(sorted(TAKEN))}. What images and sounds add to the "
            "tokens' embeddings is added before they are cut: give inputs_embeds"
        )
    if ("input_ids" in batch) == ("inputs_embeds" in batch):
        raise ValueError("a batch has either input_ids or inputs_embeds")
    if not isinstance(group, tuple):
        _check_alike(batch, group, cu_seqlens)
    name = "input_ids" if "input_ids" in batch else "inputs_embeds"
    tokens: Tensor = batch[name]
    rows, seq_len = tokens.shape[:2]
    ends = ends_of_documents(batch, (rows, seq_len), cu_seqlens)
    mask = batch["attention_mask"].cpu() if batch.get("attention_mask") is not None else None
    held = [range(seq_len)] * rows if mask is None or bool((mask == 1).all()) else real_tokens(mask)
    positions = _positions(batch, ends, tokens)
    whole = {name: tokens, "position_ids": positions}
    if "labels" in batch:
        whole["shift_labels"] = _shifted(batch["labels"], held, None if cu_seqlens is None else ends[0])
    documents = None if cu_seqlens is None else ends[0]
    if any(row != (0, seq_len) for row in ends) or any(len(tokens) < seq_len for tokens in held):
        order, documents = _laid_out(ends, held, seq_len)
        whole = {name: take(value.flatten(0, 1)[None], order, 1) for name, value in whole.items()}
    arguments: dict[str, Any] = {
        name: shard_sequence(value, group, dim=1, sharding=sharding, cu_seqlens=documents)
        for name, value in whole.items()
    }
    arguments["ring_seq_len"] = whole["position_ids"].shape[1]
    if documents is not None:
        arguments["ring_cu_seqlens"] = documents
    if "shift_labels" in whole:
        # A rank may hold no label: the sum of nothing over the count is a zero with a gradient, as it should be.
        count = (whole["shift_labels"] != IGNORED_LABEL).sum()
        arguments |= {"labels": arguments["shift_labels"], "num_items_in_batch": count}
    return arguments


def _check_alike(batch: Mapping[str, Any], group: dist.ProcessGroup | None, cu_seqlens: Documents) -> None:
    """Refuse different batches on the ranks of a group: shards of them would be no sequence at all."""
    place = place_in(group)
    if place.size == 1:
        return
    name = "input_ids" if "input_ids" in batch else "inputs_embeds"
    ids: Tensor = batch[name]
    told = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    tensors = [(name, tuple(value.shape)) for name, value in batch.items() if isinstance(value, Tensor)]
    given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    others = [x for _, x in sorted(batch.items()) if isinstance(x, Tensor) and x is not ids]
    mine, *theirs = (int(number) for number in on_host(*map(_checksum, [ids, *others])))
    numbers = {
        "the shapes of their batches": digest((sorted(tensors), sorted(told.items()), given)),
        name: digest(mine),
        "the other tensors of their batches": digest(theirs),
    }
    agree(place, numbers, ids.device)


def _checksum(x: Tensor) -> Tensor:
    """A number that depends on the order of the numbers; of fractions on their leading digits."""
    values = (x.detach().flatten().double() * 1024 if x.is_floating_point() else x.flatten()).to(torch.int64)
    weights = torch.arange(1, values.numel() + 1, device=x.device) * 2654435761 % 1000003
    return ((values + 1) * weights).sum()


def _positions(batch: Mapping[str, Any], ends: list[tuple[int, ...]], x: Tensor) -> Tensor:
    """[B, S], as given, else counted from each document's start (and from the last end, for the padding there)."""
    given: Tensor | None = batch.get("position_ids")
    if given is not None:
        return given.expand(x.shape[:2])
    tokens = torch.arange(x.shape[1], device=x.device)
    starts = [on_device(torch.tensor(cuts), x.device) for cuts in ends]
    return torch.stack([tokens - cuts[torch.searchsorted(cuts, tokens, right=True) - 1] for cuts in starts])


def _shifted(labels: Tensor, held: list[range], cu_seqlens: tuple[int, ...] | None) -> Tensor:
    """[B, S]: entry t is the label of token t+1.

    Collators that tell documents have set the label of each one's first token to -100 themselves; cu_seqlens, which
    is ours, does it here.

    Raises:
        ValueError: right padding is to predict something. It sees the tokens before it on one process; here it sees
            nothing.
    """
    shifted = shard_labels(labels, (0, 1), sharding="contiguous", cu_seqlens=cu_seqlens)
    if any(tokens.stop < labels.shape[1] for tokens in held):
        stops = on_device(torch.tensor([tokens.stop for tokens in held]), labels.device)
        padding = torch.arange(labels.shape[1], device=labels.device) >= stops[:, None]
        wrong = ((shifted != IGNORED_LABEL) & padding).any(1).tolist()
        if any(wrong):
            raise ValueError(f"row {wrong.index(True)} has labels at its padding: set them to {IGNORED_LABEL} there")
    return shifted


def _laid_out(ends: list[tuple[int, ...]], held: list[range], seq_len: int) -> tuple[Shard, tuple[int, ...]]:
    """(order, cu_seqlens) of one row: the documents of all rows one after the other, then what belongs to none.

    Args:
        ends: each row's documents. held: each row's tokens that are no padding.
    Returns:
        order as ranges of tokens, counted through all rows.
    """
    inside: list[range] = []
    outside: list[range] = []
    documents = [0]
    for number, (cuts, tokens) in enumerate(zip(ends, held, strict=True)):
        first = number * seq_len
        start = min(tokens.start, cuts[-1])
        stop = max(start, min(tokens.stop, cuts[-1]))
        inside.append(range(first + start, first + stop))
        outside += [range(first, first + start), range(first + stop, first + seq_len)]
        lengths = (min(end, stop) - max(begin, start) for begin, end in pairwise(cuts))
        documents += [length for length in lengths if length > 0]
    return tuple(tokens for tokens in inside + outside if tokens), tuple(accumulate(documents))
