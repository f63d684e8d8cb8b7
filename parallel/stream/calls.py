"""What a call of a streaming model asks for, and why it cannot be had where it cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from fourfold.parallel.sequence.tensors import IGNORED_LABEL, Documents, on_device

# What a call may ask for that does not exist when logits and whole layers never do.
REFUSED_ARGUMENTS = {
    "output_attentions": "attention weights are never computed",
    "output_hidden_states": "keeping them is what streaming avoids",
    "past_key_values": "a cache is for generation: call the model without labels",
}
# Beyond any vocabulary.
NO_TOKEN = 1 << 30
# Of packed documents, as flash-attention's kernels and state-space layers want them: position_ids say the same.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What a vision-language model hands its language model for some of its layers; it is done between layers.
VISION_ARGUMENTS = ("visual_pos_masks", "deepstack_visual_embeds")
# Arguments of a loss, which transformers' models pass on to their base models, where nobody reads them.
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCall:
    """What a base model is called with: transformers' names. `others` are the arguments streaming does not know."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    use_cache: bool | None = None
    return_dict: bool | None = None
    output_router_logits: bool | None = None
    ring_seq_len: int | None = None
    ring_cu_seqlens: Documents = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """The call that was made with these arguments."""
        known = {each.name for each in fields(cls)} - {"others"}
        named = {name: value for name, value in arguments.items() if name in known}
        return cls(**named, others={name: value for name, value in arguments.items() if name not in known})

    @property
    def tokens(self) -> Tensor:
        """[B, T] or [B, T, d]: what the sequence is given as."""
        found = self.input_ids if self.input_ids is not None else self.inputs_embeds
        if found is None:
            raise ValueError("give input_ids or inputs_embeds")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def refusal(self, model: nn.Module) -> str | None:
        """Why streaming does not reproduce this call, or the model in its present state; None where it does."""
        others = dict(self.others)
        packing = {name: others.pop(name) for name in PACKING_ARGUMENTS if others.get(name) is not None}
        for name, why in REFUSED_ARGUMENTS.items():
            value = others.pop(name, None)
            if value is not None and value is not False:
                return f"{name} while streaming: {why}"
        known = (*LOSS_ARGUMENTS, *VISION_ARGUMENTS)
        unknown = sorted(name for name, value in others.items() if value is not None and name not in known)
        if unknown:
            return f"streaming does not know the arguments {unknown}: leave them out"
        config: Any = model.config
        if self.attention_mask is not None and not isinstance(self.attention_mask, Tensor):
            return f"an attention_mask that is a {type(self.attention_mask).__name__}: give [B, T], 0 at padding"
        if self.attention_mask is not None and self.attention_mask.dim() != 2:
            return f"an attention_mask of {self.attention_mask.dim()} dims: give [B, T], 0 at padding"
        if self.position_ids is not None and self.position_ids.dim() != 2 and not self._is_grid():
            return f"position_ids of {self.position_ids.dim()} dims: give [B, T] or [1, T]"
        if config.output_attentions or config.output_hidden_states:
            return "output_attentions or output_hidden_states is set in the config: unset it"
        dropout = getattr(config, "attention_dropout", 0.0)
        if model.training and dropout:
            return f"attention dropout of {dropout}: set attention_dropout=0, no kernel repeats it exactly"
        return _packing_refusal(packing, self.text_positions(), self.attention_mask)

    def text_positions(self) -> Tensor | None:
        """[B or 1, T], whose falls begin documents; None where nothing tells.

        Of images, positions are [3, B, T] of a grid, where a fall means nothing, or [4, B, T] with those of text first.
        """
        if self.position_ids is None or not self._is_grid():
            return self.position_ids
        return self.position_ids[0] if len(self.position_ids) == 4 else None

    def vision(self) -> dict[str, Any]:
        """What a vision-language model hands on beside the rest."""
        return {name: self.others[name] for name in VISION_ARGUMENTS if self.others.get(name) is not None}

    def _is_grid(self) -> bool:
        return self.position_ids is not None and self.position_ids.dim() == 3 and len(self.position_ids) in (3, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledCall(BaseCall):
    """What a causal language model is called with where it is given labels."""

    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    num_items_in_batch: Tensor | int | None = None
    ignore_index: int = IGNORED_LABEL
    return_token_statistics: bool = False
    return_logits: bool | None = None
    logits_to_keep: int | Tensor = 0

    def targets(self) -> Tensor:
        """[B, T] of the token that each entry predicts, -1 for none."""
        shifted = self.shift_labels
        if shifted is None:
            assert self.labels is not None
            shifted = torch.full_like(self.labels, self.ignore_index)
            shifted[:, :-1] = self.labels[:, 1:]
        # Another negative label is a mistake, as in cross_entropy: beyond any vocabulary, it fails as those do.
        ignored = shifted == self.ignore_index
        return shifted.masked_fill(shifted < 0, NO_TOKEN).masked_fill(ignored, -1)

    def weight(self, targets: Tensor) -> Tensor:
        """What the sum of the tokens' losses is multiplied by, a fp64 scalar on the targets' device."""
        count = targets.ge(0).sum() if self.num_items_in_batch is None else self.num_items_in_batch
        if isinstance(count, Tensor):
            items = on_device(count, targets.device).to(torch.float64)
        else:
            items = torch.full((), count, dtype=torch.float64, device=targets.device)
        if items.numel() != 1:
            raise ValueError(f"num_items_in_batch of shape {tuple(items.shape)}: give one number, of the whole batch")
        return 1 / items.reshape(())

    def check(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Raises ValueError for a call that streaming does not reproduce."""
        why = self.refusal(model)
        if why is not None:
            raise ValueError(why)
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError(
                "gradient checkpointing is on: streaming replaces it, call gradient_checkpointing_disable(), or "
                "leave gradient_checkpointing=True out of a trainer's arguments"
            )
        for name in ("labels", "shift_labels"):
            given = getattr(self, name)
            if given is not None and given.shape != self.shape:
                raise ValueError(f"{name} of shape {tuple(given.shape)}: give {self.shape}, one for each token")
        if not isinstance(self.logits_to_keep, int) or self.logits_to_keep:
            raise ValueError("logits_to_keep with labels: mask labels with -100 instead")

    def check_shard(self) -> None:
        """Raises ValueError for arguments that mean something else on a shard than on the whole sequence."""
        if self.attention_mask is not None and not self.attention_mask.all():
            raise ValueError(
                "an attention_mask with padding around a ring: pack the documents and give ring_cu_seqlens"
            )
        given = {"position_ids": self.position_ids, "shift_labels": self.shift_labels}
        missing = [name for name, value in given.items() if value is None]
        if self.num_items_in_batch is None and not self.return_token_statistics:
            missing.append("num_items_in_batch")
        if missing:
            raise ValueError(f"a shard without {', '.join(missing)}: make the arguments with shard_batch")


def _packing_refusal(packing: Mapping[str, Any], position_ids: Tensor | None, mask: Tensor | None) -> str | None:
    """Why these arguments of packed documents cannot be followed; None where position_ids say the same."""
    if not packing:
        return None
    names = ", ".join(packing)
    if position_ids is None:
        return f"{names} while streaming: give position_ids that restart with each document"
    if mask is not None:
        return f"{names} and an attention_mask: leave the mask out, position_ids say where documents begin"
    ends = packing.get("cu_seq_lens_q")
    if ends is None:
        return None
    starts = position_ids.flatten().eq(0).nonzero().flatten().tolist()
    told = torch.as_tensor(ends).tolist()[:-1]
    if starts != told:
        return f"cu_seq_lens_q begins documents at tokens {told}, but position_ids at {starts}: let them agree"
    return None
