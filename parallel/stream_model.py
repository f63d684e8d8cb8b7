"""StreamBP: a Hugging Face decoder whose ordinary backward goes through long sequences in chunks, exactly.

After `stream_backprop(model)`, `model(input_ids, labels=labels).loss.backward()` gives plain backpropagation's
gradients while keeping, of all activations over the sequence, the layers' inputs alone: each layer (stream_layer) and
the head with the loss (stream_head) is recomputed, differentiated and dropped chunk by chunk. torch offers activation
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
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from fourfold.parallel.sequence_tensors import IGNORED_LABEL
from fourfold.parallel.stream_attention import row_masks
from fourfold.parallel.stream_embedding import Lookup, can_look_up_again
from fourfold.parallel.stream_head import Head
from fourfold.parallel.stream_layer import LayerStream, Pass, stream_attention_forward
from fourfold.parallel.stream_module import NAME, attention_function, replaced_forward
from fourfold.parallel.stream_offload import HostMemory
from fourfold.parallel.stream_peak import Auto, auto_chunks, logits_chunk_size, logits_tile

ATTRIBUTE = "fourfold_stream"

# Model types that are tested against plain backpropagation; others are refused.
SUPPORTED = frozenset({
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2",
    "qwen3", "qwen3_moe",
})  # fmt: skip
# What a call may ask for that does not exist when logits and whole layers never do.
REFUSED_ARGUMENTS = {
    "output_attentions": "attention weights are never computed",
    "output_hidden_states": "keeping them is what streaming avoids",
    "output_router_logits": "the router's auxiliary loss is not streamed yet",
    "past_key_values": "a cache is for generation: call the model without labels",
    "cu_seq_lens_q": "give position_ids that restart with each document",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """How a model streams; the fields are stream_backprop's arguments."""

    chunk_size: Auto = "auto"
    mlp_chunk: Auto = "auto"
    logits_chunk: Auto = "auto"
    offload: Literal["host"] | None = None
    keep_attention: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.offload not in (None, "host"):
            raise ValueError(f"offload={self.offload!r}: give 'host', or None")
        for name in ("chunk_size", "mlp_chunk", "logits_chunk"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: give a number of tokens, at least 1, or 'auto'")


@dataclass
class TokenStatistics(ModelOutput):  # type: ignore[misc]
    """What losses need of each token, [B, T] in fp32, differentiable. Place t is about label t+1.

    Attributes:
        logprobs: log-probability of the label; 0 where there is none.
        logsumexp: lse of the logits; 0 there.
        mean_logits: the logits' mean over the vocabulary; 0 there.
        mask: bool, where there is a label.
    """

    logprobs: Tensor | None = None
    logsumexp: Tensor | None = None
    mean_logits: Tensor | None = None
    mask: Tensor | None = None


def stream_backprop(
    model: nn.Module,
    chunk_size: Auto = "auto",
    logits_chunk: Auto = "auto",
    offload: Literal["host"] | None = None,
    *,
    mlp_chunk: Auto = "auto",
    keep_attention: bool = False,
    backend: str | None = None,
    verify: bool = False,
) -> nn.Module:
    """Make `model(input_ids, labels=labels).loss.backward()` stream; call it before DDP, FSDP2, DeepSpeed or Trainer.

    The model is changed in place: calls with labels, and token_logprobs, stream, and return no logits; calls without
    labels (generation) run as before. A loss's backward can run once.

    Args:
        model: a transformers causal language model, or peft's wrapper of one.
        chunk_size: queries of attention a chunk. "auto": by stream_peak.auto_chunks, 256 or 512 on a CPU, 1024 to
            4096 elsewhere.
        logits_chunk: tokens whose logits exist at a time. "auto": by stream_peak, as many as fit some MiB.
        offload: "host" copies the layers' inputs, and with keep_attention attention's outputs, to pinned host memory
            and back, beside the computation. On CUDA; elsewhere they stay where they are.
        mlp_chunk: tokens a chunk of all that follows attention. "auto": with chunk_size, at most that.
        keep_attention: keep every layer's attention output and lse, B*T*(heads*head_dim + 2*heads) numbers a layer,
            and never compute attention's forward twice.
        backend: an attention backend's name, see attention.py; None chooses.
        verify: compare loss and gradients of one tiny batch with plain backpropagation now; costs two steps on it.
    Returns:
        The same model.
    Raises:
        ValueError: a model that is not understood, or settings out of range; with verify, gradients that differ.
    Cost: per layer beside checkpointing's, keys and values once more.
    Source: Luo et al. 2025 (arXiv 2506.03077); see the module.
    """
    settings = StreamSettings(
        chunk_size=chunk_size, logits_chunk=logits_chunk, mlp_chunk=mlp_chunk, offload=offload,
        keep_attention=keep_attention, backend=backend,
    )  # fmt: skip
    causal_lm = _causal_lm(model)
    if ATTRIBUTE in causal_lm.__dict__:
        stream_backprop_disable(model)
    _check_model(causal_lm)
    AttentionInterface.register(NAME, stream_attention_forward)
    streaming = _Streaming(causal_lm, settings)
    causal_lm.__dict__[ATTRIBUTE] = streaming
    streaming.enable()
    if verify:
        from fourfold.parallel.stream_verification import verify_gradients

        try:
            verify_gradients(causal_lm)
        except ValueError:
            stream_backprop_disable(model)
            raise
    return model


def stream_backprop_disable(model: nn.Module) -> nn.Module:
    """Undo stream_backprop; a model that does not stream is left as it is. Returns the same model."""
    causal_lm = _causal_lm(model)
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
    if ATTRIBUTE not in _causal_lm(model).__dict__:
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
        self.norm = _final_norm(self.base)
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self.current: Pass | None = None
        self._forward: Callable[..., Any] = model.forward

    def enable(self) -> None:
        for layer in self.layers:
            stream = LayerStream(layer, layer.forward)
            layer.forward = self._layer_forward(stream)  # type: ignore[method-assign]
        model_forward = self._forward

        @wraps(model_forward)  # Trainer reads the signature to know which columns of a data set the model takes
        def forward(_: nn.Module, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            if labels is None and kwargs.get("shift_labels") is None:
                return model_forward(*args, **kwargs)
            return self.forward(*args, labels=labels, **kwargs)

        self.model.forward = MethodType(forward, self.model)

    def disable(self) -> None:
        for module in (self.model, *self.layers):
            module.__dict__.pop("forward", None)

    @contextmanager
    def small_chunks(self) -> Iterator[None]:
        """Chunks of a few tokens, so that a tiny batch has several."""
        before = self.settings
        self.settings = replace(before, chunk_size=5, mlp_chunk=3, logits_chunk=7)
        try:
            yield
        finally:
            self.settings = before

    def _layer_forward(self, stream: LayerStream) -> Callable[..., Any]:
        plain = stream.layer.forward

        @wraps(plain)
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            shared = self.current
            if shared is None:
                return plain(hidden_states, *args, **kwargs)
            if args:
                raise ValueError(f"{type(stream.layer).__name__} takes positional arguments: streaming cannot use it")
            return stream(hidden_states, kwargs, shared)

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
        **kwargs: Any,
    ) -> Any:
        """The model's forward with labels: transformers' arguments, and its loss."""
        for name, why in REFUSED_ARGUMENTS.items():
            if kwargs.pop(name, None):
                raise ValueError(f"{name} while streaming: {why}")
        if kwargs:
            raise ValueError(f"streaming does not know the arguments {sorted(kwargs)}: leave them out")
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            raise ValueError("logits_to_keep with labels: mask labels with -100 instead")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        self._check_call(attention_mask)
        shape = (tokens.shape[0], tokens.shape[1])
        shared = self._pass(attention_mask, position_ids, shape, tokens.device)
        hidden = self._hidden(shared, input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids)
        targets = _targets(labels, shift_labels, ignore_index).to(hidden.device)
        head = self._head(shared)
        if return_token_statistics:
            # FSDP2 hooks what a model returns, and warns of views.
            statistics = [part.clone() for part in head.statistics(hidden, targets)]
            return TokenStatistics(
                logprobs=statistics[0], logsumexp=statistics[1], mean_logits=statistics[2], mask=targets >= 0
            )
        count = targets.ge(0).sum() if num_items_in_batch is None else num_items_in_batch
        weight = 1 / torch.as_tensor(count, device=hidden.device).to(torch.float64)
        loss = head.loss(hidden, targets, weight)
        return (loss,) if return_dict is False else CausalLMOutputWithPast(loss=loss)

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
                return cast(Tensor, self.base(use_cache=False, **inputs).last_hidden_state)
        finally:
            self.current = None

    def _pass(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Pass:
        settings = self.settings
        chunk, mlp_chunk = settings.chunk_size, settings.mlp_chunk
        if chunk == "auto" or mlp_chunk == "auto":
            found = auto_chunks(
                self.model.config, shape[1], batch=shape[0], device_type=device.type, chunk_size=chunk,
                keep_attention=settings.keep_attention, offload=settings.offload is not None and device.type == "cuda",
                itemsize=self.model.dtype.itemsize,
            )  # fmt: skip
            chunk, mlp_chunk = found[0], found[1] if mlp_chunk == "auto" else mlp_chunk
        kind = device.type
        return Pass(
            masks=row_masks(attention_mask, position_ids, shape),
            chunk=chunk,
            mlp_chunk=mlp_chunk,
            keep_attention=self.settings.keep_attention,
            backend=self.settings.backend,
            autocast=(kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
            lookup=Lookup(self.embedding) if can_look_up_again(self.embedding, self.model) else None,
            host=HostMemory(device) if settings.offload and torch.is_grad_enabled() else None,
        )

    def _head(self, shared: Pass) -> Head:
        config = self.model.config
        projection = cast(nn.Linear, self.model.get_output_embeddings())
        chunk, kind = self.settings.logits_chunk, projection.weight.device.type
        scaling = getattr(config, "logits_scaling", None)  # Granite's: logits are divided by it
        return Head(
            norm=self.norm,
            projection=projection,
            scale=1.0 if scaling is None else 1 / scaling,
            soft_cap=getattr(config, "final_logit_softcapping", None),
            chunk=logits_chunk_size(projection.out_features, kind) if chunk == "auto" else chunk,
            tile=logits_tile(projection.out_features, None if chunk == "auto" else chunk, kind),
            autocast=shared.autocast,
            passing=shared.passing,
        )

    def _check_call(self, attention_mask: Tensor | None) -> None:
        config = self.model.config
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"an attention_mask of {attention_mask.dim()} dims: give [B, T], 0 at padding")
        if config.output_attentions or config.output_hidden_states or getattr(config, "output_router_logits", False):
            raise ValueError(
                "output_attentions, output_hidden_states or output_router_logits is set in the config: unset it"
            )
        dropout = getattr(config, "attention_dropout", 0.0)
        if self.model.training and dropout:
            raise ValueError(f"attention dropout of {dropout}: set attention_dropout=0, no kernel repeats it exactly")
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            raise ValueError(
                "gradient checkpointing is on: streaming replaces it, call gradient_checkpointing_disable()"
            )


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """[B, T] of the token to predict at each place, -1 for none."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.full_like(labels, ignore_index)
        shift_labels[:, :-1] = labels[:, 1:]
    return shift_labels.masked_fill(shift_labels == ignore_index, -1)


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, peft or DeepSpeed wrappers."""
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = [module for module in found if module.get_output_embeddings() is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no transformers causal language model")
    return found[0]


def _final_norm(base: nn.Module) -> nn.Module:
    norm = getattr(base, "norm", None) or getattr(base, "final_layernorm", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(f"{type(base).__name__} has neither norm nor final_layernorm: streaming does not know its end")
    return norm


def _check_model(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{name}: model type {config.model_type!r} is not among the tested {', '.join(sorted(SUPPORTED))}"
        )
    if not name.endswith("ForCausalLM"):
        raise ValueError(f"{name} is not a causal language model: streaming knows ...ForCausalLM")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends both ways: streaming needs causal attention")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{name}: its head is a {type(head).__name__}, not a Linear")
    if any(hasattr(module, "ring_settings") for module in model.modules()):
        raise ValueError(f"{name} attends around a ring (use_ring_attention): streaming with cp is not supported yet")
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ValueError(f"{name} is sharded already: call stream_backprop before fully_shard; tp is not supported")
