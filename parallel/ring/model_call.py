"""What is checked, and filled in, at every call of a model around a ring, on every rank of the group alike.

A call with a whole batch, or with half of what a shard needs, computes something: a loss of this rank's tokens at
wrong places. So a hook before the model's forward refuses it; and one after it makes a mixture of experts'
load-balancing loss, which is no sum over tokens, the ring's. Trainers also call the model inside the model, without its
head, so each model that holds ring attention has the hooks; those of an inner one see by the length that is passed on,
an AgreedLength, that the outer one's have done the work.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fourfold.parallel.communication import Place, agree, digest, gather_numbers, place_in
from fourfold.parallel.ring.options import AgreedLength, RingSettings
from fourfold.parallel.ring.router_loss import ring_router_loss
from fourfold.parallel.ring.unchanged import Snapshot, checksum
from fourfold.parallel.ring.whole_length import give_whole_length
from fourfold.parallel.sequence.sharding import shard_ranges
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, document_ends, indices, on_host

CACHED = (
    "a cache of keys (use_cache, past_key_values, generate) around a ring: each rank would cache its own shard's; call "
    "stop_ring_attention(model) before generating, and use_ring_attention again after it"
)
MADE_BY = "make the arguments with shard_batch"


@dataclass(slots=True)
class ModelCalls:
    """The calls of one model.

    Args:
        rotary: its rotary embeddings that depend on the sequence's length.
        tried: the model as it was tried.
    """

    settings: RingSettings
    rotary: list[nn.Module] = field(default_factory=list)
    tried: Snapshot | None = None
    _compared: bool = False  # whether the ranks' weights were
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _largest_position: int | None = None
    _called: nn.Module | None = None
    _wants_router_loss: bool = False
    _arguments: dict[str, Any] = field(default_factory=dict)

    def watch(self, models: Sequence[nn.Module]) -> None:
        """From now on, the calls of each of them: a model, and the models inside it."""
        self._hooks = []
        for model in models:
            self._hooks += [
                model.register_forward_pre_hook(_Hook(self, "before"), with_kwargs=True, prepend=True),
                model.register_forward_hook(_Hook(self, "after")),
            ]
        if place_in(self.settings.group).size > 1:
            for rotary in self.rotary:
                self._hooks += give_whole_length(rotary, self._largest)

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Check a call's arguments, and fill in what they leave out."""
        if isinstance(kwargs.get("ring_seq_len"), AgreedLength):
            return args, kwargs
        place = place_in(self.settings.group)
        kwargs = {"use_cache": False, **kwargs, **_by_name(model, args)}
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        cached = kwargs["use_cache"] or kwargs.get("past_key_values") is not None
        if place.size == 1:
            if cached:
                raise ValueError(CACHED)
            if isinstance(tokens, Tensor):  # else the model says what it misses
                _tell_documents(kwargs, tokens)
            return (), kwargs
        seen = _on_host(kwargs)
        # What this rank alone refuses is said by a message to all, for the others would wait in theirs.
        problem = CACHED if cached else _missing(kwargs, seen)
        if not isinstance(tokens, Tensor):
            problem, tokens = problem or f"a call without input_ids or inputs_embeds: {MADE_BY}", torch.zeros(0, 0)
        if problem is None and self.tried is not None:
            problem = self.tried.change(model) or _outside(model, kwargs, seen)
        positions = seen.get("position_ids")
        # Messages of other sizes than a rank expects would end the process.
        largest = -1 if positions is None or not positions.numel() else int(positions.max())
        everyone = gather_numbers(place, [tokens.shape[1], largest], tokens.device)
        lengths = [there[0] for there in everyone]
        self._largest_position = max(there[1] for there in everyone)
        seq_len = kwargs.get("ring_seq_len")
        seq_len = AgreedLength(sum(lengths) if seq_len is None else seq_len)
        kwargs["ring_seq_len"] = seq_len
        if problem is None and not all(lengths):
            problem = f"the ranks hold {lengths} tokens, and a model needs one on each: give longer sequences"
        ends, offset = document_ends(kwargs.get("ring_cu_seqlens")), 0
        if problem is None and positions is not None and positions.dim() == 2:
            problem, offset = self._misplaced(positions, seq_len, ends, place)
        weights, self._compared = 0 if self._compared else checksum(model), True
        alike = {
            "rows": tokens.shape[0],
            "ring_seq_len": seq_len,
            "ring_cu_seqlens": digest(ends),
            "the position of the sequence's first token, as their position_ids have it,": offset,
            "num_items_in_batch": int(seen.get("num_items_in_batch", kwargs.get("num_items_in_batch")) or 0),
            "the names of their arguments": digest(sorted(name for name in kwargs if kwargs[name] is not None)),
            "the weights of their models": weights,
            "their modes (training, gradients, autocast, dtype)": digest(_modes(model, tokens.device)),
        }
        agree(place, alike, tokens.device, problem)
        wanted = kwargs.get("output_router_logits")
        config = getattr(model, "config", None)
        self._called = model
        self._wants_router_loss = bool(getattr(config, "output_router_logits", False) if wanted is None else wanted)
        self._arguments = kwargs
        return (), kwargs

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """The output, with the ring's load-balancing loss in it."""
        if model is not self._called:
            return output
        wants, self._wants_router_loss = self._wants_router_loss, False
        arguments, self._arguments = self._arguments, {}
        return ring_router_loss(model, output, arguments, self.settings) if wants else output

    def _largest(self) -> int:
        if self._largest_position is None:
            raise ValueError(
                "this model's rotary embedding depends on the length of the whole sequence: call the model itself, "
                "not its layers"
            )
        return self._largest_position

    def _misplaced(
        self, positions: Tensor, seq_len: int, ends: tuple[int, ...] | None, place: Place
    ) -> tuple[str | None, int]:
        """What is wrong with position ids [B or 1, S_local], or None; and where they say that the sequence begins.

        They are on the CPU. Within a document a token's position is its place in the sequence, but for one number.
        """
        sharding = self.settings.options.sharding
        shard = shard_ranges(seq_len, place.size, sharding, ends)[place.rank]
        places = indices(shard, "cpu")
        if positions.shape[1] != len(places):
            return (
                f"rank {place.rank} holds {positions.shape[1]} tokens, but its {sharding} shard of "
                f"ring_seq_len={seq_len} has {len(places)}: {MADE_BY}"
            ), 0
        cuts = torch.tensor(ends or (0, seq_len))
        documents = torch.searchsorted(cuts, places, right=True)
        distance = positions - places
        steps = (distance.diff(dim=1) != 0) & (documents.diff() == 0) & (places[1:] < cuts[-1])
        if bool(steps.any()):
            return (
                f"the position_ids of rank {place.rank} are not those of its {sharding} shard: where they restart or "
                "jump within a document, tokens would attend across documents. Give the batch's position_ids or "
                f"cu_seqlens to shard_batch, with sharding={sharding!r}"
            ), 0
        return None, int(distance[0, 0]) if ends is None else 0


class _Hook:
    """One of ModelCalls' hooks. Outside of compiled graphs, for it talks to other ranks."""

    def __init__(self, calls: ModelCalls, name: str) -> None:
        self._calls, self._name = calls, name

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return getattr(self._calls, self._name)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook(copy.deepcopy(self._calls, memo), self._name)

    def __reduce__(self) -> Any:
        raise ValueError(
            "a model around a ring cannot be pickled (torch.save(model)), for its process group cannot: save "
            "model.state_dict(), or call stop_ring_attention(model) first"
        )


def _by_name(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """A call's arguments by position, by the names that the model's class gives them."""
    given = signature(type(model).forward).parameters.values()
    names = [parameter.name for parameter in given if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]
    if len(args) > len(names):
        raise ValueError(f"{type(model).__name__} takes {len(names)} arguments by position: give the others by name")
    return dict(zip(names, args, strict=False))


def _on_host(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What must be known of a call's tensors, by argument: numbers, whether a mask is all ones, ids' least and largest.

    All in one copy: on CUDA the host waits once.
    """
    found = {name: kwargs.get(name) for name in ("position_ids", "num_items_in_batch")}
    mask, ids, labels = (kwargs.get(name) for name in ("attention_mask", "input_ids", "shift_labels"))
    if isinstance(mask, Tensor):
        found["attention_mask"] = mask.all()
    if isinstance(labels, Tensor):
        labels = labels.masked_fill(labels == _ignored(kwargs), 0)
    for name, x in (("input_ids", ids), ("shift_labels", labels)):
        if isinstance(x, Tensor) and x.numel() and not x.is_floating_point():
            found[name] = torch.stack(x.aminmax())
    tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    return dict(zip(tensors, on_host(*tensors.values()), strict=True))


def _ignored(kwargs: Mapping[str, Any]) -> int:
    """The label that is to be left out."""
    label: int = kwargs.get("ignore_index", IGNORED_LABEL)
    return label


def _missing(kwargs: Mapping[str, Any], seen: Mapping[str, Tensor]) -> str | None:
    """What a call on several ranks has to say and does not, or None.

    Args:
        seen: what _on_host gave.
    """
    missing = [name for name in ("position_ids",) if kwargs.get(name) is None]
    if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
        missing += [name for name in ("shift_labels", "num_items_in_batch") if kwargs.get(name) is None]
    if missing:
        return (
            f"a call without {', '.join(missing)} around a ring: each rank would take its tokens for a sequence of "
            f"their own; {MADE_BY}, for evaluation too, or call stop_ring_attention(model)"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return (
            "an attention mask that is not [B, S] around a ring, which makes its own: causal, windows, documents as "
            f"shard_batch tells them; {MADE_BY}"
        )
    if mask is not None and not seen["attention_mask"]:
        return "an attention_mask with padding: pack the documents into one row and give ring_cu_seqlens"
    kept = kwargs.get("logits_to_keep", 0)
    if isinstance(kept, Tensor) or kept:
        return "logits_to_keep around a ring: the last tokens of a shard are not those of the sequence; leave it out"
    return None


def _outside(model: nn.Module, kwargs: Mapping[str, Any], seen: Mapping[str, Tensor]) -> str | None:
    """Why token ids or labels would be an error on this rank alone; None where they lie in the vocabulary."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    for name in ("input_ids", "shift_labels"):
        if name in seen and isinstance(size, int):
            low, high = seen[name].tolist()
            if low < 0 or high >= size:
                left_out = _ignored(kwargs)
                return f"{name} from {low} to {high}, of a vocabulary of {size}: labels to be left out are {left_out}"
    return None


def _modes(model: nn.Module, device: torch.device) -> tuple[object, ...]:
    """What decides which messages a rank sends, and of what size, beside its arguments."""
    casts = torch.is_autocast_enabled(device.type)
    return (
        model.training,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(device.type) if casts else None,
        str(next((parameter.dtype for parameter in model.parameters()), None)),
    )


def _tell_documents(kwargs: dict[str, Any], tokens: Tensor) -> None:
    """On one rank, which has the whole sequence: restarting position ids become documents, as in transformers."""
    positions = kwargs.get("position_ids")
    told = kwargs.get("ring_cu_seqlens") is not None or kwargs.get("attention_mask") is not None
    if told or not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    steps = on_host(positions)[0].diff(dim=1) != 1
    if not bool(steps.any()):
        return
    if tokens.shape[0] != 1:
        raise ValueError(f"position_ids that restart, in {tokens.shape[0]} rows: shard_batch lays them in one row")
    cuts = (torch.nonzero(steps[0]).flatten() + 1).tolist()
    kwargs["ring_cu_seqlens"] = (0, *cuts, tokens.shape[1])
