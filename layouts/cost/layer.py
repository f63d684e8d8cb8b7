"""One decoder layer, the embedding, and the head, for one micro-batch on one rank: seconds and bytes.

Matmuls are priced shape by shape, attention by its scores, everything else by the bytes that it reads and writes.
Without sequence parallelism every tp rank repeats the norms and residuals; with it they are cut by tp.
"""

from dataclasses import dataclass, replace

import numpy as np

from fourfold.layouts.cost.candidates import FULL, SELECTIVE, STREAM, Candidates, Column
from fourfold.layouts.cost.kernels import Kernels
from fourfold.layouts.inputs.constants import Constants
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Stack


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds (forward, backward), a candidate."""

    forward: Column
    backward: Column


def _linear(kernels: Kernels, tokens: Column, k: Column, n: Column) -> Times:
    """A linear layer: one matmul forward, two backward (gradient of the input, of the weight)."""
    forward = kernels.matmul_s(tokens, n, k)
    return Times(forward, kernels.matmul_s(tokens, k, n) + kernels.matmul_s(k, n, tokens))


def _sum(parts: list[Times]) -> Times:
    return Times(sum(p.forward for p in parts), sum(p.backward for p in parts))  # type: ignore[arg-type]


def score_length(model: ModelConfig, seq_len: int) -> float:
    """Keys that a query meets on average over layers: half the sequence (causal), less with a sliding window."""
    causal = seq_len / 2
    if not model.sliding_window or model.sliding_window >= seq_len:
        return causal
    window = model.sliding_window
    windowed = window - window**2 / (2 * seq_len)
    share = model.num_windowed_layers / model.num_layers
    return share * windowed + (1 - share) * causal


def layer_times(model: ModelConfig, c: Candidates, kernels: Kernels, stack: Stack, k: Constants) -> Times:
    """Compute of an average layer, without recomputation and communication."""
    h, t, tp = model.hidden_size, c.tokens, c.tp
    q, kv = model.q_size // tp, model.kv_size // tp
    parts = [_linear(kernels, t, np.full_like(t, h), q + 2 * kv), _linear(kernels, t, q, np.full_like(t, h))]
    parts.append(_mlp_times(model, c, kernels))
    parts.append(attention_times(model, c, kernels, stack, k))
    parts.append(_memory_bound(model, c, kernels, stack, k))
    return _sum(parts)


def attention_times(model: ModelConfig, c: Candidates, kernels: Kernels, stack: Stack, k: Constants) -> Times:
    """The attention core. Of the causal triangle a cp rank computes its even share, block by block, hop by hop."""
    keys = np.full(len(c), score_length(model, c.seq_len))
    block = keys / np.maximum(c.cp // c.cp_heads, 1)
    forward, backward = kernels.attention_s(
        c.micro_batch, model.num_heads // c.tp, c.seq_len / c.cp, keys, block, model.head_dim
    )
    # Kernels that store the scores compute the masked half too, as plain batched matmuls.
    slower = {"flash1": k.flash1, "triton": k.triton, "fused": 0.5, "eager": 0.5}.get(stack.attention, 1.0)
    return Times(forward / slower, backward / slower)


def _mlp_times(model: ModelConfig, c: Candidates, kernels: Kernels) -> Times:
    h, t, tp = model.hidden_size, c.tokens, c.tp
    ups = 2 if model.gated_mlp else 1
    wide = np.full_like(t, h)
    moe = model.num_moe_layers / model.num_layers
    total = Times(np.zeros(len(t)), np.zeros(len(t)))
    if moe < 1:
        f = model.ffn_size // tp
        dense = _sum([_linear(kernels, t, wide, ups * f), _linear(kernels, t, f, wide)])
        total = Times(total.forward + (1 - moe) * dense.forward, total.backward + (1 - moe) * dense.backward)
    if moe:
        f = np.maximum(model.expert_ffn_size // tp, 1)
        local = np.maximum(model.num_experts // c.ep, 1)
        # Tokens of all ep ranks spread over local experts, evenly at best.
        each = np.maximum(t * model.experts_per_token * c.ep // model.num_experts, 1)
        one = _sum([_linear(kernels, each, wide, ups * f), _linear(kernels, each, f, wide)])
        parts = [
            Times(local * one.forward, local * one.backward),
            _linear(kernels, t, wide, np.full_like(t, model.num_experts)),
        ]
        if model.shared_expert_ffn_size:
            shared = np.maximum(model.shared_expert_ffn_size // tp, 1)
            parts += [_linear(kernels, t, wide, ups * shared), _linear(kernels, t, shared, wide)]
        experts = _sum(parts)
        total = Times(total.forward + moe * experts.forward, total.backward + moe * experts.backward)
    return total


def active_ffn(model: ModelConfig) -> float:
    """Feed-forward width that a token meets in an average layer."""
    moe = model.num_moe_layers / model.num_layers
    return (1 - moe) * model.ffn_size + moe * (
        model.experts_per_token * model.expert_ffn_size + model.shared_expert_ffn_size
    )


def _memory_bound(model: ModelConfig, c: Candidates, kernels: Kernels, stack: Stack, k: Constants) -> Times:
    """Norms, residuals, rotary embedding and the activation function, by elements read and written a token."""
    t, tp, b = c.tokens, c.tp, stack.compute_bytes
    wide = t / np.where(c.sequence_parallel, tp, 1) * model.hidden_size
    qk = t * (model.q_size + model.kv_size) / tp
    ffn = t * active_ffn(model) / tp
    norms = model.norms_per_layer + (0.25 if model.qk_norm else 0)
    up = 2 if model.gated_mlp else 1
    if stack.fused_norm:
        norm = (2.0 * b, 4.0 * b, 1.0, 2.0)
    elif stack.launched:
        norm = (k.norm_bytes / 4, k.norm_bytes * 3 / 4, 6.0, 12.0)
    else:  # fp32, one operator after the other: square, mean, add, rsqrt, scale, weight
        norm = (7.0 * b, 15.0 * b, 6.0, 10.0)
    rope = ((2.0, 2.0, 1.0, 1.0) if stack.fused_ops else (9.0, 9.0, 7.0, 7.0)) if model.rotary else (0.0,) * 4
    act = (1.0 + up, 1.0 + 2.0 * up, 1.0, 1.0) if stack.fused_ops else (2.0 * up + 1, 4.0 * up, 1.0 * up, 1.5 * up)
    forward = kernels.memory_s(norms * wide * norm[0], norms * norm[2])
    forward = forward + kernels.memory_s(2 * 3.0 * wide * b, 2) + kernels.memory_s(qk * rope[0] * b, 2 * rope[2])
    forward = forward + kernels.memory_s(ffn * act[0] * b, act[2])
    backward = kernels.memory_s(norms * wide * norm[1], norms * norm[3])
    backward = backward + kernels.memory_s(2 * 3.0 * wide * b, 2) + kernels.memory_s(qk * rope[1] * b, 2 * rope[3])
    backward = backward + kernels.memory_s(ffn * act[1] * b, act[3])
    if stack.attention in ("eager", "fused"):
        # Scores written, scaled, masked, softmaxed in fp32 and cast back, read; or one fused kernel for all between.
        reads = 14.0 if stack.attention == "eager" else 4.0
        scores = c.micro_batch * model.num_heads / tp * (c.seq_len / c.cp) * c.seq_len * b
        forward = forward + kernels.memory_s(scores * reads, 7 if stack.attention == "eager" else 2)
        backward = backward + kernels.memory_s(scores * reads, 7 if stack.attention == "eager" else 2)
    return Times(forward, backward)


def embedding_times(model: ModelConfig, c: Candidates, kernels: Kernels, stack: Stack) -> Times:
    """Look-up, and its scattered gradient (dense, as wide as the vocabulary)."""
    wide = c.tokens * model.hidden_size * stack.compute_bytes
    table = model.vocab_size / c.tp * model.hidden_size * stack.grad_bytes
    return Times(kernels.memory_s(2.0 * wide, 2), kernels.memory_s(2.0 * wide + 2.0 * table, 3))


def head_times(model: ModelConfig, c: Candidates, kernels: Kernels, stack: Stack) -> Times:
    """Final norm, projection to the vocabulary, softmax and loss."""
    t = c.tokens
    local = model.vocab_size // (c.tp if stack.head_sharded else 1) + 0 * c.tp
    projection = _linear(kernels, t, np.full_like(t, model.hidden_size), local)
    entries = t * (model.vocab_size / c.tp if stack.logits_sharded else model.vocab_size)
    loss = kernels.memory_s(entries * 4.0 * stack.logits_passes / 2, 4)
    return Times(projection.forward + loss, projection.backward + loss)


def recomputed(model: ModelConfig, c: Candidates, forward: Column, attention_forward: Column) -> Column:
    """Seconds of forward work done again in a layer's backward, by checkpointing."""
    again = np.select(
        [c.checkpointing == FULL, c.checkpointing == STREAM, c.checkpointing == SELECTIVE],
        [forward, forward, attention_forward],
        0.0,
    )
    return again / c.checkpoint_every


def streaming(model: ModelConfig, c: Candidates, kernels: Kernels, stack: Stack, k: Constants) -> Column:
    """Seconds that StreamBP's pieces cost a layer besides: its recomputed forward and its backward, chunk by chunk.

    Each piece launches every operator again, on matmuls that are shorter by the number of chunks.
    """
    extra = np.zeros(len(c))
    rows = np.flatnonzero((c.checkpointing == STREAM) & (c.stream_chunks > 1))
    if len(rows):
        some = c.take(rows)
        whole = layer_times(model, some, kernels, stack, k)
        piece = layer_times(model, replace(some, micro_batch=some.micro_batch / some.stream_chunks), kernels, stack, k)
        pieces = some.stream_chunks * (piece.forward + piece.backward)
        extra[rows] = np.maximum(pieces - whole.forward - whole.backward, 0.0)
    return extra


def saved_bytes(model: ModelConfig, c: Candidates, stack: Stack) -> tuple[Column, Column]:
    """Bytes that autograd keeps for one micro-batch in an average layer: (with everything kept, layer input alone).

    Counted from the operators: what each needs for its backward, a token. h: hidden, q, kv: query and key widths,
    f: feed-forward. A norm keeps its input and hands its output on; unfused it keeps more, as the
    stack says (Korthikanti et al. 2022, arXiv 2205.05198, section 4, for the rest).
    """
    b, tp = stack.compute_bytes, c.tp
    split = np.where(c.sequence_parallel, tp, 1)
    h = model.hidden_size
    norm_kept = 0.0 if stack.fused_norm else stack.norm_kept_bytes
    wide = model.norms_per_layer * h * (2.0 * b + norm_kept)
    qk = (2.0 * model.q_size + 2.0 * model.kv_size) * b + model.num_heads * 4.0  # q, output; k, v; log-sum-exp
    acts = (4.0 if not stack.fused_ops else 3.0) if model.gated_mlp else 2.0
    ffn = active_ffn(model) * acts * b
    per_token = wide / split + (qk + ffn) / tp + np.where(tp > 1, stack.tp_kept * h * b, 0.0)
    kept = c.tokens * per_token
    if stack.attention in ("eager", "fused"):
        copies = 8.0 if stack.attention == "eager" else 2.0
        kept = kept + np.where(
            c.checkpointing == SELECTIVE,
            0.0,
            c.micro_batch * model.num_heads / tp * (c.seq_len / c.cp) * c.seq_len * copies,
        )
    return kept, c.tokens * h * b / split
