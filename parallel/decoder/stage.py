"""One pipeline stage of a Hugging Face decoder: a run of its layers, with the embedding or the head where due.

transformers' own forward pass runs the whole model and builds a causal mask; a pipeline needs a slice of it, a ring
needs positions that are not 0..S-1, and neither wants a mask. This file holds the slice and its forward pass, and says
which models it is exact for. The modules are the model's own and keep their names, so that a state dict of a stage has
the keys of the whole model, whatever the layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from fourfold.parallel.decoder.documents import PackedRows, packed_rows
from fourfold.parallel.decoder.limits import FAMILIES, Choice, decoder_facts, refuse_decoder
from fourfold.parallel.decoder.selective import run_selectively
from fourfold.parallel.decoder.taken_over import refuse_wrapped
from fourfold.parallel.ring.transformers import NAME as RING
from fourfold.parallel.stream.attention import stream_attention_forward
from fourfold.parallel.stream.checks import end_is_watched
from fourfold.parallel.stream.patching import NAME
from fourfold.parallel.stream.settings import StreamSettings
from fourfold.parallel.stream.stage import RowsOfStage, stage_run, stream_layers, stream_loss
from fourfold.parallel.stream.work_space import streams_loss


def check_decoder(model: nn.Module, layout: Choice | None = None, *, adapters: bool = False) -> None:
    """Refuse a model whose forward pass `DecoderStage` would not reproduce, or a layout that it cannot have.

    Args:
        adapters: whether the caller takes peft's (decoder.adapters).
    Raises:
        ValueError: what decoder.limits has: another model family, attention dropout, heads that tp does not divide.
    """
    refuse_wrapped(model, adapters=adapters)
    config = cast(Any, model).config if hasattr(model, "config") else None
    if config is None or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} is not a causal language model of transformers (no config and lm_head): "
            f"use one of {', '.join(FAMILIES)}"
        )
    facts = decoder_facts(config)
    if not facts.family:
        raise ValueError(f"{type(model).__name__}: its config has no model_type; use one of {', '.join(FAMILIES)}")
    refuse_decoder(replace(facts, adapters=adapters), layout or Choice())


def has_sliding_window(model: nn.Module) -> bool:
    """Whether some layer's queries see only the keys near them."""
    config = cast(Any, model).config
    layer_types = getattr(config, "layer_types", None)
    windowed = layer_types is None or "sliding_attention" in layer_types
    return windowed and getattr(config, "sliding_window", None) is not None


def check_windows(model: nn.Module) -> None:
    """Refuse a sliding window that the model's attention would not see: a stage passes no mask, only its width.

    Raises:
        ValueError: another attention implementation than the ring's.
    """
    config = cast(Any, model).config
    if has_sliding_window(model) and config._attn_implementation != RING:
        raise ValueError(
            f"sliding_window={config.sliding_window} with attention {config._attn_implementation!r}, which knows "
            "windows by a mask only: call use_ring_attention(model, group) first, with a group of one rank"
        )


class DecoderStage(nn.Module):
    """Layers `layers` of `model`, with the embedding on the first stage and the norm and head on the last.

    Where the head is the embedding's weight, the last stage holds the embedding too, without running it: the weight has
    one name on both (see decoder.tied_ends).

    Args:
        model: a causal language model that passed `check_decoder`. Its modules are shared, not copied.
        layers: the decoder layers of this stage, ascending. With gaps between them, where a rank has several runs, the
            stage names and holds the parts, and a stage of each run computes with them.
        checkpointing: "none", "full" to keep only each layer's input and recompute the layer in the backward pass,
            "selective" to keep the outputs of matrix products and attention besides, or "stream" to recompute in chunks
            of the sequence (StreamBP).
        stream: the chunks' sizes; None is stream_backprop's defaults.
        autocast_dtype: the dtype matrix products run in, or None for the parameters' own.

    `position_ids` ([1, S_local] int64) must be set before a forward pass: the caller knows which tokens these are.
    `attention_arguments` go to the attention function with every call.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        *,
        checkpointing: str = "none",
        stream: StreamSettings | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if checkpointing == "stream":
            AttentionInterface.register(NAME, stream_attention_forward)
        self._stream = stream or StreamSettings()
        whole = cast(Any, model)
        self.config = whole.config
        self.num_layers = len(whole.model.layers)
        """Of the whole model."""
        self.is_first, self.is_last = layers[0] == 0, layers[-1] == self.num_layers - 1
        self.checkpointing = checkpointing
        self.autocast_dtype = autocast_dtype
        self.hidden_size: int = whole.config.hidden_size
        self.vocab_size: int = whole.config.vocab_size
        self.sequence_shards = 1
        """Over how many tp ranks hidden states are cut along the sequence, between the layers' matrices."""
        self.position_ids: Tensor | None = None
        self.attention_arguments: dict[str, Any] = {}
        self.model = nn.Module()
        self.model.rotary_emb = whole.model.rotary_emb
        self.model.layers = nn.ModuleDict({str(index): whole.model.layers[index] for index in layers})
        if self.is_first or (self.is_last and whole.config.tie_word_embeddings):
            self.model.embed_tokens = whole.model.embed_tokens
        if self.is_last:
            self.model.norm = whole.model.norm
            self.lm_head = whole.lm_head

    streams_head = False
    """Whether `gives_loss` may be, where the layers do not stream: see limits.may_stream_head."""

    gives_hidden = False
    """Whether a last stage that streams returns what its last layer gives, for a loss that streams by itself."""

    @property
    def kept_outputs(self) -> tuple[str, str] | None:
        """Where backward reads outputs of the forward and recomputes what is around them: how this is said, and what
        to choose instead."""
        if self.checkpointing == "selective":
            return "checkpointing='selective'", "checkpointing='none', 'full' or 'stream'"
        if self.checkpointing == "stream" and self._stream.keep_attention:
            return "keep_attention", "keep_attention=False"
        return None

    def gives_loss(self, tokens: int, device_type: str) -> bool:
        """Whether the last stage, given the targets of a micro-batch of so many tokens on this rank, returns their
        loss and makes no whole logits.

        It does where its layers stream, and else where logits are large (streams_loss), unless somebody has a say
        in the norm or the head, or the head is more than a matrix.
        """
        if self.checkpointing == "stream":
            return True
        if not (self.is_last and self.streams_head):
            return False
        if end_is_watched(cast(nn.Module, self.model.norm), self.lm_head) is not None:
            return False
        return bool(streams_loss(tokens, self.hidden_size, self.vocab_size, device_type))

    @property
    def layers(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.model.layers)

    def ends(self) -> Iterator[tuple[str, nn.Module]]:
        """What the stage has besides layers, by its name in the whole model."""
        for name in ("model.rotary_emb", "model.embed_tokens", "model.norm", "lm_head"):
            part: Any = self
            for step in name.split("."):
                part = getattr(part, step, None)
            if part is not None:
                yield name, part

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Layers and ends, by their names in the whole model."""
        for index, layer in self.layers.items():
            yield f"model.layers.{index}", layer
        yield from self.ends()

    def forward(self, x: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Run the stage.

        Args:
            x: [B, S_local] int64 token ids on the first stage, else [B, S_local / sequence_shards, hidden].
            targets: [B, S_local] int64, shifted, negative for none; read by the last stage, where it `gives_loss`.
            document_ids: [B, S] int64, whole rows, where they are packed: then `position_ids` is not read, and around a
                ring x holds this rank's tokens of all rows, [1, S_local] (see decoder.documents).
        Returns:
            [B, S_local, vocab] logits on the last stage (this rank's part of the vocabulary under tensor
            parallelism), or the sum of the targets' cross-entropies, a scalar, where it `gives_loss`; else hidden
            states as x would be.
        """
        told = self._documents(document_ids, x.device)
        positions = told.position_ids
        given = x.shape[:2]
        if "ring_cu_seqlens" in told.arguments:  # the ring takes one row
            x = x.flatten(0, 1)[None]
        assert positions.shape[-1] == x.shape[1] * (1 if self.is_first else self.sequence_shards)
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            hidden = self.model.embed_tokens(x) if self.is_first else x  # type: ignore[operator]
            if torch.is_grad_enabled() and not hidden.requires_grad:  # a frozen embedding, before layers that are not
                hidden.requires_grad_()
            rotary = self.model.rotary_emb(hidden, position_ids=positions)  # type: ignore[operator]
            arguments: dict[str, Any] = {
                "attention_mask": None,
                "position_ids": positions,
                "position_embeddings": rotary,
                "use_cache": False,
                **self.attention_arguments,
                **told.arguments,
            }
            if self.checkpointing == "stream":
                return self._streamed(hidden, arguments, targets, told.read)
            for layer in self.layers.values():
                hidden = self._run(layer, hidden, arguments)
            if targets is not None and self.gives_loss(targets.numel(), hidden.device.type):
                norm, head = cast(nn.Module, self.model.norm), self.lm_head
                return stream_loss(self._stream, None, norm, head, hidden, targets)
            if self.is_last:
                hidden = self.lm_head(self.model.norm(hidden))  # type: ignore[operator]
            return hidden if hidden.shape[0] == given[0] else hidden.unflatten(1, (given[0], -1))[0]

    def _documents(self, document_ids: Tensor | None, device: torch.device) -> PackedRows:
        """Positions, and what attention is told besides; without documents what the caller has set."""
        if document_ids is None:
            assert self.position_ids is not None
            return PackedRows(self.position_ids, {})
        ring = getattr(next(iter(self.layers.values())).self_attn, "ring_settings", None)
        return packed_rows(document_ids, ring=ring, streams=self.checkpointing == "stream", device=device)

    def _streamed(
        self, hidden: Tensor, arguments: dict[str, Any], targets: Tensor | None, read: Tensor | None
    ) -> Tensor:
        layers = list(self.layers.values())
        cu_seqlens = arguments.pop("ring_cu_seqlens", None)
        shared = stage_run(
            self._stream, self.config, layers[0], hidden,
            RowsOfStage(read, arguments.get("ring_seq_len"), cu_seqlens),
        )  # fmt: skip
        hidden = stream_layers(self._stream, layers, hidden, arguments, shared)
        if not self.is_last or self.gives_hidden:
            return hidden
        norm, head = cast(nn.Module, self.model.norm), self.lm_head
        if targets is None:
            return cast(Tensor, head(norm(hidden)))
        return stream_loss(self._stream, shared, norm, head, hidden, targets)

    def _run(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.checkpointing == "selective" and torch.is_grad_enabled():
            return run_selectively(layer, hidden, arguments)
        if self.checkpointing == "full" and torch.is_grad_enabled():
            # No randomness in a supported layer, so no generator state to keep.
            return cast(Tensor, checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False, **arguments))
        return cast(Tensor, layer(hidden, **arguments))
