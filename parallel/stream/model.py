"""StreamBP: a Hugging Face decoder whose ordinary backward goes through long sequences in chunks, exactly.

After `stream_backprop(model)`, `model(input_ids, labels=labels).loss.backward()` gives plain backpropagation's
gradients while keeping, of all activations over the sequence, the layers' inputs alone: each layer (layer_run.py) and
the head with the loss (head.py) is recomputed, differentiated and dropped chunk by chunk. torch offers activation
checkpointing, whose peak is a whole layer and the whole logits; TRL, Liger-Kernel and DeepSpeed's ALST chunk logits
and MLP, not attention.

Method: Luo et al. 2025 (arXiv 2506.03077), StreamBP. Differs: no mask; keys and values once a layer instead of once a
chunk; chunks in reverse order, so each needs one backward; the model's own loss.backward() with its hooks.
"""

from typing import Literal

from torch import nn

from fourfold.parallel.stream.attention import stream_attention_forward
from fourfold.parallel.stream.checks import causal_lm as find_causal_lm
from fourfold.parallel.stream.checks import check_model
from fourfold.parallel.stream.patching import ATTRIBUTE, register_attention
from fourfold.parallel.stream.settings import StreamSettings
from fourfold.parallel.stream.streaming import Streaming, Verify
from fourfold.parallel.stream.verify import Incomparable
from fourfold.parallel.stream.work_space import Auto


def stream_backprop(
    model: nn.Module,
    chunk_size: Auto = "auto",
    logits_chunk: Auto = "auto",
    offload: Literal["host"] | None = None,
    *,
    mlp_chunk: Auto = "auto",
    keep_attention: bool | int = False,
    backend: str | None = None,
    head_groups: Auto = "auto",
    fused: bool = True,
    verify: Verify = None,
) -> nn.Module:
    """Make `model(input_ids, labels=labels).loss.backward()` stream; call it before DDP, FSDP2, DeepSpeed or Trainer.

    The model is changed in place: calls with labels, and token_logprobs, stream, and return no logits; calls without
    labels (generation) run as before. In training mode a call without labels, of the model or of its base model,
    streams the layers and leaves the rest to the caller. A loss's backward can run once. A mixture of experts called
    with output_router_logits=True adds its load-balancing loss over all tokens, and returns no router logits.

    A model whose end is not transformers' own (a loss_function, a head, a forward or a hook of the user's) streams its
    layers, and its own code does the rest with whole logits; a warning says so once.

    With cp, call use_ring_attention(model, group) too: each rank then streams its shard against the ring, with
    shard_batch's arguments. Every rank of the group calls, and losses and gradients are summed over it.

    Args:
        model: a transformers causal language model, or peft's wrapper of one.
        chunk_size: queries of attention a chunk, or see head_groups. "auto": by stream.memory.auto_sizes, 256 to 1024
            queries on a CPU; elsewhere 8192 or 32768 tokens that are projected, or 1024 to 4096 queries.
        logits_chunk: tokens whose logits exist at a time. "auto": by stream.memory, as many as fit some MiB.
        offload: "host" copies the layers' inputs, and with keep_attention attention's outputs, to pinned host memory
            and back, beside the computation. On CUDA; elsewhere they stay where they are.
        mlp_chunk: tokens a chunk of all that follows attention. "auto": with chunk_size, on a CPU at most that;
            elsewhere 2048 to 8192, all rows together.
        keep_attention: True keeps every layer's attention output and lse, B*T*(heads*head_dim + 2*heads) numbers a
            layer, and never computes attention's forward twice; a number keeps those of the last so many layers.
        backend: an attention backend's name, see attention.py; None chooses.
        head_groups: groups of key heads whose attention is done after one another, each over the whole sequence
            (heads_layer.py); chunk_size is then the tokens that are projected at a time. 0: attention by chunks of
            queries. "auto": 0 on a CPU, by heads elsewhere, as few groups as memory allows.
        fused: use Liger-Kernel's norm, rotary embedding and gated activations where it is installed, on CUDA, and for
            modules of which they were found to compute the same (fused.py).
        verify: compare loss and gradients of one tiny batch with plain backpropagation; costs two steps on it. True:
            now. "first": before the first pass that asks for a gradient; it admits model types that are not tested.
            None: then too, where nothing could notice (whole weights, no hooks, no ring), and with wide bounds, which
            a right model keeps in any precision. False: never.
    Returns:
        The same model.
    Raises:
        ValueError: a model that is not understood, or settings out of range; with verify, gradients that differ (of the
            first call, where it is then).
    Cost: per layer beside checkpointing's, keys and values once more. With cp, q, k, v and attention's output of a
        layer's whole shard, with their gradients, are there at a time, and without keep_attention the ring's forward
        messages travel once more.
    Source: Luo et al. 2025 (arXiv 2506.03077); see the module.
    """
    settings = StreamSettings(
        chunk_size=chunk_size, logits_chunk=logits_chunk, mlp_chunk=mlp_chunk, offload=offload,
        keep_attention=keep_attention, backend=backend, head_groups=head_groups, fused=fused,
    )  # fmt: skip
    causal_lm = find_causal_lm(model)
    stream_backprop_disable(model)
    check_model(causal_lm, any_type=verify == "first")
    register_attention(stream_attention_forward)
    streaming = Streaming(causal_lm, settings, verify)
    causal_lm.__dict__[ATTRIBUTE] = streaming
    try:
        streaming.enable()
        if verify is True:
            try:
                streaming.verify()
            except Incomparable as why:
                raise ValueError(f"verify=True: {why}; give verify=False") from why
    except BaseException:
        stream_backprop_disable(model)
        raise
    return model


def stream_backprop_disable(model: nn.Module) -> nn.Module:
    """Undo stream_backprop; a model that does not stream is left as it is. Returns the same model."""
    streaming: Streaming | None = find_causal_lm(model).__dict__.pop(ATTRIBUTE, None)
    if streaming is not None:
        streaming.disable()
    return model


def streamed_layers(model: nn.Module) -> int:
    """How many layers of a model have gone forward streaming since stream_backprop; 0 where it does not stream.

    A step of a model of n layers adds n. The comparison with plain backpropagation, and backward's recomputation, do
    not count. For logs and tests: a trainer that goes around streaming has the same losses.
    """
    streaming: Streaming | None = find_causal_lm(model).__dict__.get(ATTRIBUTE)
    return 0 if streaming is None else streaming.current.num_streamed
