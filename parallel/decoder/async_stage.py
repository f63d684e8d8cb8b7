"""A decoder's stage in a pipeline that never drains: micro-batches of any length, padded or packed.

decoder.stage.DecoderStage has one length and no mask, which its callers know beforehand. An asynchronous stream may
bring another length with every micro-batch, and what a later stage must know (positions, padding, documents) has to
travel with the activation. So the first stage also takes a dict, and stages hand a dict on. Around a ring of several
ranks (cp) each of them is given the whole rows; the first stage cuts its share out of them, the last one its targets.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.communication import place_in
from fourfold.parallel.decoder.async_shards import documents_of, shard_rows, share_of_attention
from fourfold.parallel.decoder.documents import document_positions, seen_tokens
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.ring.options import AgreedLength, RingSettings
from fourfold.parallel.sequence.tensors import on_device
from fourfold.parallel.stream.stage import RowsOfStage, stage_run, stream_loss

_KEYS = ("position_ids", "attention_mask", "document_ids")


class AsyncDecoderStage(DecoderStage):
    """Layers of a decoder, from what the stage before returned; the arguments are DecoderStage's.

    windowed: whether attention goes through the ring's implementation, which knows windows by its length.
    gives_hidden: whether the last stage returns hidden states, for `streamed_loss`, in place of logits.
    """

    windowed = False
    rows: dict[str, Any]
    """Around a ring of several ranks: what stages hand on beside hidden states, of the last forward."""

    @property
    def ring(self) -> RingSettings | None:
        """The ring by which several ranks share every sequence; None where a rank has whole ones."""
        found: RingSettings | None = getattr(next(iter(self.layers.values())).self_attn, "ring_settings", None)
        return found if found is not None and place_in(found.group).size > 1 else None

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """The ranks of that ring, for PipelineStage."""
        ring = self.ring
        return None if ring is None else ring.group or dist.group.WORLD

    def forward(self, x: Any, targets: Tensor | None = None, document_ids: Tensor | None = None) -> Any:
        """Run the stage.

        Args:
            x: [B, S] int64 token ids on the first stage, on any device, else [B, S, hidden] (under sequence parallelism
                this rank's [B, S / tp, hidden]); S may differ from call to call. Or a dict
                with "input_ids" on the first stage, "hidden" on the others, and any of
                    "attention_mask"  [B, S], 0 for padding, as a tokenizer gives it
                    "document_ids"    [B, S] int64; a token sees those of its own document only
                    "position_ids"    [B, S] int64; by default 0..S-1, in packed rows from each document's start
            document_ids: the same as in the dict; not handed on.
        Returns:
            [B, S, vocab] logits on the last stage (under tensor parallelism this rank's part of the vocabulary); else
            hidden states as x would be, in a dict with the rest where x is one. Around a ring of several ranks S is
            this rank's share from the first stage's output on ([1, S_local] of all rows together, where there are
            documents), and stages always hand a dict on.
        Raises:
            ValueError: ids that are no [B, S] integers, another key or shape, masks for layers that take none; an S
                that tp does not divide, under sequence parallelism; around a ring, rows too short for its ranks.
        Cost: a mask is built anew by each stage: B S^2 bytes.
        """
        batch = dict(x) if isinstance(x, dict) else {}
        name = "input_ids" if self.is_first else "hidden"
        value = batch.pop(name, None) if isinstance(x, dict) else x
        if document_ids is not None:
            batch["document_ids"] = document_ids
        ring = self.ring
        if ring is not None:
            return self._forward_share(ring, value, batch, name)
        self._check(value, batch, name)
        value, batch = self._on_device(value, batch)
        shape, device = self._tokens(value), value.device
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(shape[1], device=device)[None]
            if "document_ids" in batch:
                positions = document_positions(batch["document_ids"])
        self.position_ids = positions
        arguments = {key: each for key, each in self.attention_arguments.items() if key != "attention_mask"}
        if self.windowed:
            arguments["ring_seq_len"] = AgreedLength(shape[1])
        mask = seen_tokens(batch.get("attention_mask"), batch.get("document_ids"))
        self.attention_arguments = arguments if mask is None else {**arguments, "attention_mask": mask}
        output = super().forward(value, targets)
        return output if self.is_last or not isinstance(x, dict) else {"hidden": output, **batch}

    def _forward_share(self, ring: RingSettings, value: Any, batch: dict[str, Any], name: str) -> Any:
        if self.is_first:
            self._check(value, batch, name)
            value, batch = self._on_device(*shard_rows(ring, value, batch, self.vocab_size))
        self.rows = batch
        self.position_ids, arguments = share_of_attention(ring, batch, value.device)
        self.attention_arguments = {**self.attention_arguments, **arguments}
        output = super().forward(value, None, documents_of(batch))
        return output if self.is_last else {"hidden": output, **batch}

    def streamed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of what the last stage returns where it `gives_hidden`, without whole logits.

        Args:
            hidden: [B, S, hidden], after the last layer.
            targets: [B, S] int64, shifted, negative for none; without any the loss is 0. They may be on the host.
        """
        layer, norm = next(iter(self.layers.values())), cast(nn.Module, self.model.norm)
        targets = on_device(targets, hidden.device)
        with torch.autocast(hidden.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            shared = stage_run(self._stream, self.config, layer, hidden, RowsOfStage())
            total = stream_loss(self._stream, shared, norm, self.lm_head, hidden, targets)
        return total / (targets >= 0).sum().clamp(min=1)

    def _on_device(self, value: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What the first stage was given, where its weights are; the stages after get it there."""
        if not self.is_first:
            return value, batch
        device = cast(nn.Embedding, self.model.embed_tokens).weight.device
        moved = {key: on_device(each, device) if isinstance(each, Tensor) else each for key, each in batch.items()}
        return on_device(value, device), moved

    def _tokens(self, value: Tensor) -> tuple[int, int]:
        """[B, S] of a micro-batch, from token ids or from hidden states that may be cut along the sequence."""
        return int(value.shape[0]), int(value.shape[1]) * (1 if self.is_first else self.sequence_shards)

    def _check(self, value: Any, batch: dict[str, Any], name: str) -> None:
        if not isinstance(value, Tensor) or value.ndim != (2 if self.is_first else 3):
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} is {what}: give a tensor {'[B, S]' if self.is_first else '[B, S, hidden]'}")
        if self.is_first and (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"input_ids are {value.dtype}: give integers")
        tokens = self._tokens(value)
        if tokens[1] % self.sequence_shards:
            raise ValueError(
                f"a sequence of {tokens[1]} tokens cannot be cut evenly over tp={self.sequence_shards} with "
                f"sequence_parallel=True: give a multiple of {self.sequence_shards}, or sequence_parallel=False"
            )
        for key, each in batch.items():
            if key not in _KEYS:
                raise ValueError(f"a decoder stage knows no {key!r}: choose among {name}, {', '.join(_KEYS)}")
            if not isinstance(each, Tensor) or each.shape != tokens:
                what = f"shape {list(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
                raise ValueError(f"{key} is {what}: give a tensor [B, S] = {list(tokens)}")
        masked = "attention_mask" in batch or "document_ids" in batch
        if masked and self.ring is None and (self.windowed or self.checkpointing == "stream"):
            raise ValueError(
                "attention_mask and document_ids need layers without sliding windows and without "
                "checkpointing='stream': there attention takes no mask; use rows without padding, one document each"
            )
