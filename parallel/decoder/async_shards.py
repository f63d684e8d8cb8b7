"""A rank's share of a micro-batch whose rows several ranks of an asynchronous stage have together (cp, the ring).

decoder.parallel_model cuts a whole batch before its pipeline begins, and knows its length on every rank. Here the first
stage cuts a micro-batch as it comes, and tells the stages after it what they must know of the whole; the last one cuts
the targets. A share's loss counts by its targets, so that uneven shares make the mean over all targets of the rows.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import place_in
from fourfold.parallel.decoder.batch import trouble_with
from fourfold.parallel.decoder.documents import document_shards, ends_of_rows, trouble_with_ring
from fourfold.parallel.ring.options import AgreedLength, RingSettings
from fourfold.parallel.sequence.sharding import shard_length, shard_ranges
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, shard_positions, shard_sequence, take

if TYPE_CHECKING:
    from fourfold.parallel.decoder.async_stage import AsyncDecoderStage


def shard_rows(
    ring: RingSettings, ids: Tensor, batch: dict[str, Any], vocab_size: int
) -> tuple[Tensor, dict[str, Any]]:
    """This rank's tokens of whole rows, and what the stages are told of these.

    Args:
        ids: [B, S], best on the host, where they are judged.
        batch: what AsyncDecoderStage.forward takes besides, all [B, S].
    Returns:
        [B, S_local] with {"seq_len": S, "position_ids": [B, S_local] where given}; of packed rows [1, S_local], the
        rank's tokens of all rows, with {"seq_len": S, "document_ends": ends_of_rows'}, which no stage has to read
        from a device.
    Raises:
        ValueError: on every rank alike, ids that are no tokens, padding by a mask, documents in pieces or with
            positions of their own, rows too short to give every rank a token.
    """
    if "attention_mask" in batch:
        raise ValueError(
            "attention_mask where several ranks share every sequence (cp): around a ring attention takes no mask; give "
            "document_ids in which padding at a row's end is a document of its own, and targets of -100 for it"
        )
    size, sharding, seq_len = place_in(ring.group).size, ring.options.sharding, int(ids.shape[1])
    documents, positions = batch.get("document_ids"), batch.get("position_ids")
    # On one rank alone an error would leave the others waiting in the ring: whole rows are judged, not shares.
    trouble = trouble_with(ids, ids, documents, vocab_size=vocab_size, micro_batch=None)
    if documents is not None and not trouble:
        trouble = trouble_with_ring(documents, size=size, sharding=sharding, micro_batch=None)
    if trouble:
        raise ValueError(trouble)
    if documents is None:
        lengths = [shard_length(shard) for shard in shard_ranges(seq_len, size, sharding)]
        if not all(lengths):
            raise ValueError(
                f"rows of {seq_len} tokens give the ranks of cp={size} {lengths} of them, and each needs one: give "
                "longer rows, or choose a smaller cp"
            )
        told: dict[str, Any] = {"seq_len": seq_len}
        if positions is not None:
            told["position_ids"] = shard_sequence(positions, ring.group, dim=1, sharding=sharding)
        return shard_sequence(ids, ring.group, dim=1, sharding=sharding), told
    if positions is not None:
        raise ValueError(
            "position_ids beside document_ids where several ranks share every sequence (cp): positions count from each "
            "document's start there; leave position_ids out"
        )
    return _of_documents(ring, ids, documents), {"seq_len": seq_len, "document_ends": ends_of_rows(documents)}


def documents_of(told: dict[str, Any]) -> Tensor | None:
    """[B, S] int64 on the host: the documents of packed rows, numbered through; None where rows are not packed.

    Args:
        told: from `shard_rows`.
    """
    ends = told.get("document_ends")
    if ends is None:
        return None
    lengths = torch.tensor([end - start for start, end in pairwise(ends)], device="cpu")
    return torch.arange(len(lengths), device="cpu").repeat_interleave(lengths).view(-1, told["seq_len"])


def share_of_attention(
    ring: RingSettings, told: dict[str, Any], device: torch.device
) -> tuple[Tensor | None, dict[str, Any]]:
    """Position ids of a rank's tokens, and arguments of its attention; packed rows tell theirs by their documents.

    Args:
        told: from `shard_rows`.
    """
    if "document_ends" in told:
        return None, {}
    positions, seq_len = told.get("position_ids"), told["seq_len"]
    if positions is None:
        positions = shard_positions(seq_len, ring.group, ring.options.sharding, device=device)[None]
    return positions, {"ring_seq_len": AgreedLength(seq_len)}


class LossOfShare:
    """The loss of a last stage whose ranks have shares of every row: what each differentiates, and the whole's value.

    Args:
        stage: the last one.
        loss: (its output, targets of the same tokens) -> their mean over these targets.
    """

    def __init__(self, stage: "AsyncDecoderStage", loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._stage, self._loss = stage, loss

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean over the targets of the whole rows, the same on all ranks of the ring; each of them calls.

        Its gradient on a rank is that of the rank's targets, times the number of ranks: the mean over the ranks, which
        PipelineStage takes, is the whole's.

        Args:
            targets: [B, S], of the whole rows, shifted, -100 for none.
        Raises:
            ValueError: targets of other rows than the first stage had, or that are no tokens.
        Cost: one all-reduce of a scalar.
        """
        ring, told = self._stage.ring, self._stage.rows
        assert ring is not None
        documents, size = documents_of(told), place_in(ring.group).size
        rows = len(output) if documents is None else len(documents)
        if tuple(targets.shape) != (rows, told["seq_len"]):
            raise ValueError(
                f"targets {list(targets.shape)} for rows of {[rows, told['seq_len']]}: give one target a token, for "
                "the whole rows on each rank of cp, -100 where there is none"
            )
        trouble = trouble_with(torch.zeros_like(targets), targets, vocab_size=self._stage.vocab_size, micro_batch=None)
        if trouble:
            raise ValueError(trouble)
        if documents is None:
            own = shard_sequence(targets, ring.group, dim=1, sharding=ring.options.sharding)
        else:
            own = _of_documents(ring, targets, documents)
        share = (own != IGNORED_LABEL).sum().double() / (targets != IGNORED_LABEL).sum().clamp(min=1)
        mine = self._loss(output, own)
        mine = mine * (share * size).to(mine.dtype)
        whole = mine.detach().clone()
        dist.all_reduce(whole, group=ring.group)
        return _Shown.apply(mine, whole / size)  # type: ignore[no-any-return,no-untyped-call]


class _Shown(torch.autograd.Function):
    """The gradient of one scalar, under the value of another."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, whole: Tensor) -> Tensor:
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _of_documents(ring: RingSettings, x: Tensor, documents: Tensor) -> Tensor:
    """This rank's tokens of all rows of x [B, S], as [1, S_local]."""
    place = place_in(ring.group)
    return take(x.flatten()[None], document_shards(documents, place.size, ring.options.sharding)[place.rank], 1)
