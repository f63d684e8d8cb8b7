"""StreamBP: a Hugging Face decoder whose ordinary backward goes through long sequences in chunks, exactly.

After `stream_backprop(model)`, `model(input_ids, labels=labels).loss.backward()` gives plain backpropagation's
gradients while keeping, of all activations over the sequence, the layers' inputs alone: each layer (layer.py) and
the head with the loss (head.py) is recomputed, differentiated and dropped chunk by chunk. torch offers activation
checkpointing, whose peak is a whole layer and the whole logits; TRL, Liger-Kernel and DeepSpeed's ALST chunk logits
and MLP, not attention.

Method: Luo et al. 2025 (arXiv 2506.03077), StreamBP. Differs: no mask; keys and values once a layer instead of once a
chunk; chunks in reverse order, so each needs one backward; the model's own loss.backward() with its hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from types import MethodType
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils import ModelOutput

from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.options import RingSettings
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, Documents
from fourfold.parallel.stream.attention import row_masks
from fourfold.parallel.stream.checks import causal_lm as find_causal_lm
from fourfold.parallel.stream.checks import check_call, check_model, check_shard, final_norm
from fourfold.parallel.stream.embedding import Lookup, can_look_up_again
from fourfold.parallel.stream.layer import LayerStream, Pass, stream_attention_forward
from fourfold.parallel.stream.memory import Auto
from fourfold.parallel.stream.patching import NAME, attention_function, replaced_forward
from fourfold.parallel.stream.ring_layer import RingLayerStream, RingPass, around_ring
from fourfold.parallel.stream.router import Routing
from fourfold.parallel.stream.settings import StreamSettings, new_head, new_pass

ATTRIBUTE = "fourfold_stream"


@dataclass
class TokenStatistics(ModelOutput):  # type: ignore[misc]
    """What losses need of each token, [B, T] in fp32, differentiable. Place t is about label t+1.

    Attributes:
        logprobs: log-probability of the label; 0 where there is none.
        logsumexp: lse of the logits; 0 there.
        mean_logits: the logits' mean over the vocabulary; 0 there.
        mask: bool, where there is a label.
        aux_loss: a mixture of experts' load-balancing loss, where output_router_logits asked for it.
    """

    logprobs: Tensor | None = None
    logsumexp: Tensor | None = None
    mean_logits: Tensor | None = None
    mask: Tensor | None = None
    aux_loss: Tensor | None = None


def stream_backprop(
    model: nn.Module,
    chunk_size: Auto = "auto",
    logits_chunk: Auto = "auto",
    offload: Literal["host"] | None = None,
    *,
    mlp_chunk: Auto = "auto",
    keep_attention: bool | int = False,
    backend: str | None = None,
    verify: bool = False,
) -> nn.Module:
    """Make `model(input_ids, labels=labels).loss.backward()` stream; call it before DDP, FSDP2, DeepSpeed or Trainer.

    The model is changed in place: calls with labels, and token_logprobs, stream, and return no logits; calls without
    labels (generation) run as before. A loss's backward can run once. A mixture of experts called with
    output_router_logits=True adds its load-balancing loss over all tokens, and returns no router logits.

    With cp, call use_ring_attention(model, group) too: each rank then streams its shard against the ring, with
    shard_batch's arguments. Every rank of the group calls, and losses and gradients are summed over it.

    Args:
        model: a transformers causal language model, or peft's wrapper of one.
        chunk_size: queries of attention a chunk. "auto": by stream.memory.auto_chunks, 256 to 1024 on a CPU, 1024 to
            4096 elsewhere.
        logits_chunk: tokens whose logits exist at a time. "auto": by stream.memory, as many as fit some MiB.
        offload: "host" copies the layers' inputs, and with keep_attention attention's outputs, to pinned host memory
            and back, beside the computation. On CUDA; elsewhere they stay where they are.
        mlp_chunk: tokens a chunk of all that follows attention. "auto": with chunk_size, at most that.
        keep_attention: True keeps every layer's attention output and lse, B*T*(heads*head_dim + 2*heads) numbers a
            layer, and never computes attention's forward twice; a number keeps those of the last so many layers.
        backend: an attention backend's name, see attention.py; None chooses.
        verify: compare loss and gradients of one tiny batch with plain backpropagation now; costs two steps on it.
    Returns:
        The same model.
    Raises:
        ValueError: a model that is not understood, or settings out of range; with verify, gradients that differ.
    Cost: per layer beside checkpointing's, keys and values once more. With cp, q, k, v and attention's output of a
        layer's whole shard, with their gradients, are there at a time, and without keep_attention the ring's forward
        messages travel once more.
    Source: Luo et al. 2025 (arXiv 2506.03077); see the module.
    """
    settings = StreamSettings(
        chunk_size=chunk_size, logits_chunk=logits_chunk, mlp_chunk=mlp_chunk, offload=offload,
        keep_attention=keep_attention, backend=backend,
    )  # fmt: skip
    causal_lm = find_causal_lm(model)
    if ATTRIBUTE in causal_lm.__dict__:
        stream_backprop_disable(model)
    check_model(causal_lm)
    AttentionInterface.register(NAME, stream_attention_forward)
    streaming = _Streaming(causal_lm, settings)
    causal_lm.__dict__[ATTRIBUTE] = streaming
    streaming.enable()
    if verify:
        from fourfold.parallel.stream.verify import verify_gradients

        try:
            verify_gradients(causal_lm)
        except ValueError:
            stream_backprop_disable(model)
            raise
    return model


def stream_backprop_disable(model: nn.Module) -> nn.Module:
    """Undo stream_backprop; a model that does not stream is left as it is. Returns the same model."""
    causal_lm = find_causal_lm(model)
    streaming: _Streaming | None = causal_lm.__dict__.pop(ATTRIBUTE, None)
    if streaming is not None:
        streaming.disable()
    return model


def token_logprobs(model: nn.Module, input_ids: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
    """log p(label t+1 | tokens up to t) at place t, differentiable, logits never whole.

    Args:
        model: streaming (stream_backprop), also inside DDP, FSDP2 or peft.
        input_ids: [B, T]. labels: [B, T], not shifted, -100 where none is wanted: those cost no logits.
        arguments: the model's others: attention_mask, position_ids.
    Returns:
        [B, T], fp32; 0 where there is no label, and in the last place.
    Cost: the head's logits once more than the fused loss of `model(input_ids, labels=labels)`.
    """
    return cast(Tensor, token_statistics(model, input_ids, labels, **arguments).logprobs)


def token_statistics(model: nn.Module, input_ids: Tensor, labels: Tensor, **arguments: Any) -> TokenStatistics:
    """token_logprobs with lse and mean of the logits, which z-loss and label smoothing need. Args: as there."""
    if ATTRIBUTE not in find_causal_lm(model).__dict__:
        raise ValueError("the model does not stream: call stream_backprop(model) first")
    out = model(input_ids=input_ids, labels=labels, return_token_statistics=True, **arguments)
    assert isinstance(out, TokenStatistics)
    return out


class _Streaming:
    """What stream_backprop puts into a model: its layers' and its own forward, and their undoing."""

    def __init__(self, model: PreTrainedModel, settings: StreamSettings) -> None:
        self.model, self.settings = model, settings
        self.base: nn.Module = model.base_model
        self.layers = list(cast(nn.ModuleList, self.base.layers))
        self.norm = final_norm(self.base)
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self.current: Pass | None = None
        self._forward: Callable[..., Any] = model.forward
        self._normalise: Callable[[Tensor], Tensor] = self.norm.forward
        self._before: dict[nn.Module, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ValueError(
            "a copy of a streaming model would run the original's layers: call stream_backprop_disable before copying, "
            "and stream_backprop on both"
        )

    def enable(self) -> None:
        self._before = {module: module.__dict__.get("forward") for module in (self.model, *self.layers)}
        for index, layer in enumerate(self.layers):
            layer.forward = self._layer_forward(index, layer, layer.forward)  # type: ignore[method-assign]
            # DeepSpeed's ZeRO-3 then gathers the layer whole, once for all its chunks, and not each of its modules.
            layer._z3_leaf = True  # type: ignore[assignment]
        model_forward = self._forward

        @wraps(model_forward)  # Trainer reads the signature to know which columns of a data set the model takes
        def forward(_: nn.Module, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            if labels is None and kwargs.get("shift_labels") is None:
                return model_forward(*args, **kwargs)
            return self.forward(*args, labels=labels, **kwargs)

        self.model.forward = MethodType(forward, self.model)

    def disable(self) -> None:
        for module, forward in self._before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:  # somebody's own, from before
                module.__dict__["forward"] = forward
            module.__dict__.pop("_z3_leaf", None)

    def _check_unchanged(self) -> None:
        """Refuse modules put in place of those that were understood: their work would be left out."""
        head: Any = self.model.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and "weight" in head._parameters
        if final_norm(self.base) is not self.norm or not (plain or hasattr(head, "modules_to_save")):
            raise ValueError(
                f"the final norm or the head ({type(head).__name__}) is not the plain module that stream_backprop "
                "found: call stream_backprop after peft and whatever else replaces modules, and leave both whole"
            )

    @contextmanager
    def small_chunks(self) -> Iterator[None]:
        """Chunks of a few tokens, so that a tiny batch has several."""
        before = self.settings
        self.settings = replace(before, chunk_size=5, mlp_chunk=3, logits_chunk=7)
        try:
            yield
        finally:
            self.settings = before

    def _layer_forward(self, index: int, layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            shared = self.current
            if shared is None:
                return plain(hidden_states, *args, **kwargs)
            if args:
                raise ValueError(f"{type(layer).__name__} takes positional arguments: streaming cannot use it")
            kind = RingLayerStream if isinstance(shared, RingPass) else LayerStream
            keep = self.settings.keeps(index, len(self.layers))
            return kind(layer, plain, keep=keep)(hidden_states, kwargs, shared)

        return forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED_LABEL,
        return_token_statistics: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        ring_seq_len: int | None = None,
        ring_cu_seqlens: Documents = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward with labels: transformers' arguments, and its loss."""
        check_call(self.model, self.layers, {"attention_mask": attention_mask, **kwargs})
        self._check_unchanged()
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            raise ValueError("logits_to_keep with labels: mask labels with -100 instead")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        shape = (tokens.shape[0], tokens.shape[1])
        masks = row_masks(attention_mask, position_ids, shape)
        shared = new_pass(self.settings, self.model.config, masks, shape, tokens.device, self.model.dtype)
        shared = replace(
            shared,
            routing=self._routing(output_router_logits, attention_mask),
            lookup=Lookup(self.embedding) if can_look_up_again(self.embedding, self.model) else None,
        )
        ring = self._ring_pass(shared, ring_seq_len, ring_cu_seqlens)
        if ring is not None:
            check_shard(attention_mask, position_ids, shift_labels, num_items_in_batch, return_token_statistics)
            shared = ring
        hidden = self._hidden(shared, input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids)
        targets = _targets(labels, shift_labels, ignore_index).to(hidden.device)
        projection = cast(nn.Linear, self.model.get_output_embeddings())
        head = new_head(self.settings, shared, self.model.config, self.norm, self._normalise, projection)
        routing = shared.routing
        auxiliary = None if routing is None else routing.loss(None if ring is None else place_in(ring.group))
        if return_token_statistics:
            found = self._at_the_end(hidden, lambda x: head.statistics(x, targets))
            # FSDP2 hooks what a model returns, and warns of views.
            statistics = [part.clone() for part in found]
            return TokenStatistics(
                logprobs=statistics[0], logsumexp=statistics[1], mean_logits=statistics[2], mask=targets >= 0,
                aux_loss=auxiliary,
            )  # fmt: skip
        count = targets.ge(0).sum() if num_items_in_batch is None else num_items_in_batch
        weight = 1 / torch.as_tensor(count, device=hidden.device).to(torch.float64)
        loss = self._at_the_end(hidden, lambda x: head.loss(x, targets, weight))
        if routing is None or auxiliary is None:
            return (loss,) if return_dict is False else CausalLMOutputWithPast(loss=loss)
        loss = loss + routing.coefficient * auxiliary
        return (loss, auxiliary) if return_dict is False else MoeCausalLMOutputWithPast(loss=loss, aux_loss=auxiliary)

    def _at_the_end(self, hidden: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """function(hidden), run as the norm's and the projection's forward: with their hooks, and so their weights."""
        projection = cast(nn.Module, self.model.get_output_embeddings())
        with replaced_forward(projection, function), replaced_forward(self.norm, projection.__call__):
            return self.norm(hidden)

    def _hidden(self, shared: Pass, **inputs: Any) -> Tensor:
        """[B, T, d] of the last layer, before the final norm, which goes with the head."""
        config = self.model.config
        self.current = shared
        try:
            # The norm goes with the head, where it is done chunk by chunk.
            with ExitStack() as stack:
                stack.enter_context(attention_function(config))
                stack.enter_context(replaced_forward(self.norm, lambda x: x))
                if shared.lookup is not None:
                    stack.enter_context(replaced_forward(self.embedding, shared.lookup))
                if shared.routing is not None:  # whose config may ask for whole logits
                    inputs["output_router_logits"] = False
                return cast(Tensor, self.base(use_cache=False, **inputs).last_hidden_state)
        finally:
            self.current = None

    def _routing(self, wanted: bool | None, mask: Tensor | None) -> Routing | None:
        model: Any = self.model
        if not (getattr(model.config, "output_router_logits", False) if wanted is None else wanted):
            return None
        recorder = (model._can_record_outputs or {}).get("router_logits")
        if recorder is None or not hasattr(model, "router_aux_loss_coef"):
            raise ValueError(f"output_router_logits: {type(model).__name__} has no routers; leave it out")
        return Routing(
            router=recorder.target_class, index=recorder.index, num_experts=model.num_experts,
            top_k=model.num_experts_per_tok, coefficient=model.router_aux_loss_coef, mask=mask,
        )  # fmt: skip

    def _ring_pass(self, shared: Pass, seq_len: int | None, cu_seqlens: Documents) -> RingPass | None:
        """The same pass around the ring that use_ring_attention set up; None without one."""
        ring: RingSettings | None = getattr(cast(Any, self.layers[0]).self_attn, "ring_settings", None)
        if ring is not None:
            return around_ring(shared, ring, seq_len, cu_seqlens)
        if seq_len is not None or cu_seqlens is not None:
            raise ValueError("a shard of a sequence (ring_seq_len): call use_ring_attention(model, group) first")
        return None


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """[B, T] of the token to predict at each place, -1 for none."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.full_like(labels, ignore_index)
        shift_labels[:, :-1] = labels[:, 1:]
    return shift_labels.masked_fill(shift_labels == ignore_index, -1)
