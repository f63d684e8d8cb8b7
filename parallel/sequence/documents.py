"""Where the documents of a packed row begin and end, from whatever a batch says of it.

transformers' collators say it in four ways: position ids that restart, cu_seq_lens_q and cu_seq_lens_k, seq_idx, and
(as padding) an attention_mask. All of them become `cu_seqlens`, which ring_attention takes.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.sequence.sharding import document_ranges
from fourfold.parallel.sequence.tensors import Documents, document_ends

KEYS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def ends_of_documents(batch: Mapping[str, Any], shape: tuple[int, int], cu_seqlens: Documents) -> list[tuple[int, ...]]:
    """Each row's documents, as all the ways agree that the batch tells them.

    Args:
        batch: may hold any of KEYS, of the whole sequence; max_length_* follow from the others and are checked.
        shape: (B, S) of the batch.
        cu_seqlens: what the caller says of the one row, or None.
    Returns:
        For each row cu_seqlens: 0, and where each document ends. (0, S) is a row of one document.
    Raises:
        ValueError: cu_seq_lens_* with several rows, two ways that say different things, or a document that is longer
            than max_length_*.
    """
    rows, seq_len = shape
    told: dict[str, list[tuple[int, ...]]] = {}
    for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        ends = document_ends(cu_seqlens if name == "cu_seqlens" else batch.get(name))
        if ends is None:
            continue
        if rows != 1:
            raise ValueError(f"{name} with {rows} rows: it counts the tokens of one row, so pack them into one")
        document_ranges(seq_len, ends)  # raises where they are no running total within the row
        told[name] = [ends]
    if batch.get("seq_idx") is not None:
        told["seq_idx"] = _cuts(batch["seq_idx"].diff(dim=-1) != 0, shape)
    if batch.get("position_ids") is not None:
        if batch["position_ids"].dim() != 2:
            raise ValueError(f"position_ids of {batch['position_ids'].dim()} dims: give [B, S]")
        told["position_ids"] = _cuts(batch["position_ids"].diff(dim=-1) != 1, shape)
        # One run of positions says nothing of documents: collators send it beside cu_seq_lens too.
        if len(told) > 1 and all(ends == (0, seq_len) for ends in told["position_ids"]):
            del told["position_ids"]
    _check_agreement(told, seq_len)
    one_each: list[tuple[int, ...]] = [(0, seq_len)] * rows
    chosen = next(iter(told.values()), one_each)
    longest = max((stop - start for ends in chosen for start, stop in pairwise(ends)), default=0)
    for name in ("max_length_q", "max_length_k"):
        if batch.get(name) is not None and int(batch[name]) < longest:
            raise ValueError(f"{name}={int(batch[name])}, but the longest document has {longest} tokens")
    return chosen


def real_tokens(attention_mask: Tensor) -> list[range]:
    """For each row of an attention_mask [B, S] its tokens that are no padding.

    Raises:
        ValueError: not [B, S], other values than 0 and 1, or padding between the tokens of a row.
    """
    if attention_mask.dim() != 2 or not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)}: give [B, S] of ones, and zeros at padding; documents are "
            "told by position_ids, seq_idx or cu_seqlens"
        )
    rows = []
    for number, row in enumerate(attention_mask.bool().tolist()):
        count = sum(row)
        start = row.index(True) if count else 0
        if not all(row[start : start + count]):
            raise ValueError(
                f"row {number} of attention_mask has padding between its tokens: give padding on the left or the right"
            )
        rows.append(range(start, start + count))
    return rows


def _cuts(cut: Tensor, shape: tuple[int, int]) -> list[tuple[int, ...]]:
    """cu_seqlens of each row, from whether a document ends after each of its tokens but the last, [B or 1, S - 1]."""
    rows, seq_len = shape
    return [
        (0, *(index + 1 for index in torch.nonzero(row).flatten().tolist()), seq_len)
        for row in cut.expand(rows, -1).cpu()
    ]


def _check_agreement(told: Mapping[str, list[tuple[int, ...]]], seq_len: int) -> None:
    """Padding past the last end may be told as a document or not at all, and empty documents are none."""
    (first, expected), *others = list(told.items()) or [("", [])]
    for name, ends in others:
        for row, (mine, theirs) in enumerate(zip(ends, expected, strict=True)):
            inner = [tuple(sorted({0, seq_len, *cuts})) for cuts in (mine, theirs)]
            if inner[0] != inner[1]:
                raise ValueError(
                    f"{name} and {first} say different things of row {row}: documents end at {_few(mine)} and at "
                    f"{_few(theirs)}; give one of them"
                )


def _few(ends: tuple[int, ...]) -> str:
    return str(list(ends)) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:6]))}, ... {ends[-1]}]"
