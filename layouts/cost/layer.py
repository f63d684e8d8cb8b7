"""One decoder layer, the embedding, and the head, for one micro-batch on one rank: seconds and bytes.

Matmuls are priced shape by shape, attention by its scores, everything else by the bytes that it reads and writes.
Without sequence parallelism every tp rank repeats the norms and residuals; with it they are cut by tp.
"""

from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.candidates import FULL, SELECTIVE, STREAM, Column
from fourfold.layouts.cost.kernels import Kernels
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Software


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds (forward, backward), a candidate."""

    forward: Column
    backward: Column

    def scaled(self, factor: Column | float) -> "Times":
        return Times(factor * self.forward, factor * self.backward)


def _linear(kernels: Kernels, tokens: Column, k: Column, n: Column) -> Times:
    """A linear layer [tokens, k] @ [k, n]: one matmul forward, two backward (gradient of the input, of the weight)."""
    forward = kernels.matmul_s(tokens, n, k)
    return Times(forward, kernels.matmul_s(tokens, k, n) + kernels.matmul_s(k, n, tokens))


def _sum(parts: list[Times]) -> Times:
    return Times(sum(p.forward for p in parts), sum(p.backward for p in parts))  # type: ignore[arg-type]


def layer_times(pricing: Pricing) -> Times:
    """Compute of an average layer, without recomputation and communication."""
    return _sum([*_projections(pricing), _mlp_times(pricing), attention_times(pricing), _memory_bound(pricing)])


def _projections(pricing: Pricing) -> list[Times]:
    """The linear layers around attention: q, k and v in one matmul, then the output; or those of another kind."""
    model, layouts = pricing.model, pricing.layouts
    tokens, wide = layouts.tokens, np.full_like(layouts.tokens, model.hidden_size)
    q, kv = model.q_size // layouts.tp, model.kv_size // layouts.tp
    if model.latent is not None:
        own = [one_projection(pricing, sizes) for sizes in model.latent.projections(model.hidden_size, model.num_heads)]
    else:
        made = q * (2 if model.output_gate else 1) + 2 * kv
        own = [_linear(pricing.kernels, tokens, wide, made), _linear(pricing.kernels, tokens, q, wide)]
    if model.linear is None:
        return own
    share = model.num_linear_layers / model.num_layers
    others = [one_projection(pricing, sizes).scaled(share) for sizes in model.linear.projections(model.hidden_size)]
    return [*(times.scaled(1 - share) for times in own), *others]


def one_projection(pricing: Pricing, sizes: tuple[int, int]) -> Times:
    """A linear layer of (in, out); tp cuts its wider side."""
    inner, outer = sizes
    tp = pricing.layouts.tp
    cut_inner, cut_outer = (
        (inner // tp, np.full_like(tp, outer)) if inner > outer else (np.full_like(tp, inner), outer // tp)
    )
    return _linear(pricing.kernels, pricing.layouts.tokens, np.maximum(cut_inner, 1), np.maximum(cut_outer, 1))


def attention_times(pricing: Pricing, *, groups: Column | int = 1) -> Times:
    """The attention core. Of the causal triangle a cp rank computes its even share, block by block, hop by hop.

    Args:
        groups: of heads, which are done one after the other.
    """
    model, layouts, constants = pricing.model, pricing.layouts, pricing.constants
    keys = np.full(len(layouts), model.score_length(layouts.seq_len))
    if not keys.any():  # every layer is linear: no core
        return Times(np.zeros(len(layouts)), np.zeros(len(layouts)))
    block = keys / np.maximum(layouts.cp // layouts.cp_heads, 1)
    forward, backward = pricing.kernels.attention_s(
        layouts.micro_batch, np.maximum(model.num_heads // layouts.tp // groups, 1), layouts.seq_len / layouts.cp, keys,
        block, model.head_dim,
    )  # fmt: skip
    forward, backward = groups * forward, groups * backward
    # Kernels that store the scores compute the masked half too, as plain batched matmuls.
    rates = {"flash1": constants.flash1, "triton": constants.triton, "fused": 0.5, "eager": 0.5}
    rate = rates.get(pricing.software.attention, 1.0)
    return Times(forward / rate, backward / rate)


def _mlp_times(pricing: Pricing) -> Times:
    """The feed-forward of an average layer: dense layers and mixtures in the shares that the model has of them."""
    model, layouts = pricing.model, pricing.layouts
    moe = model.num_moe_layers / model.num_layers
    total = Times(np.zeros(len(layouts)), np.zeros(len(layouts)))
    if moe < 1:
        dense = _gated(pricing, layouts.tokens, model.ffn_size // layouts.tp)
        total = _sum([total, dense.scaled(1 - moe)])
    if moe:
        total = _sum([total, _moe_times(pricing).scaled(moe)])
    return total


def _gated(pricing: Pricing, tokens: Column, width: Column) -> Times:
    """A feed-forward of `width`: up (and gate) in one matmul, then down."""
    ups = 2 if pricing.model.gated_mlp else 1
    wide = np.full_like(pricing.layouts.tokens, pricing.model.hidden_size)
    return _sum([_linear(pricing.kernels, tokens, wide, ups * width), _linear(pricing.kernels, tokens, width, wide)])


def _moe_times(pricing: Pricing) -> Times:
    """Router, routed experts and the shared expert of one mixture-of-experts layer."""
    model, layouts, kernels = pricing.model, pricing.layouts, pricing.kernels
    tokens, tp = layouts.tokens, layouts.tp
    local = np.maximum(model.num_experts // layouts.ep, 1)
    # Tokens of all ep ranks spread over local experts, evenly at best.
    each = np.maximum(tokens * model.experts_per_token * layouts.ep // model.num_experts, 1)
    one = _gated(pricing, each, np.maximum(model.expert_ffn_size // tp, 1))
    wide = np.full_like(tokens, model.hidden_size)
    parts = [one.scaled(local), _linear(kernels, tokens, wide, np.full_like(tokens, model.num_experts))]
    if model.shared_expert_ffn_size:
        shared = np.maximum(model.shared_expert_ffn_size // tp, 1)
        ups = 2 if model.gated_mlp else 1
        parts += [_linear(kernels, tokens, wide, ups * shared), _linear(kernels, tokens, shared, wide)]
    return _sum(parts)


def active_ffn(model: ModelConfig) -> float:
    """Feed-forward width that a token meets in an average layer."""
    moe = model.num_moe_layers / model.num_layers
    return (1 - moe) * model.ffn_size + moe * (
        model.experts_per_token * model.expert_ffn_size + model.shared_expert_ffn_size
    )


@dataclass(frozen=True, slots=True)
class _Traffic:
    """What a kind of operator reads and writes an element, in bytes or elements, and how many operators it is."""

    forward: float
    backward: float
    forward_operators: float
    backward_operators: float


def _norm_traffic(pricing: Pricing) -> _Traffic:
    """Bytes an element of a norm."""
    itemsize = pricing.software.compute_bytes
    if pricing.software.fused_norm:
        return _Traffic(2.0 * itemsize, 4.0 * itemsize, 1.0, 2.0)
    if pricing.software.launched:
        whole = pricing.constants.norm_bytes
        return _Traffic(whole / 4, whole * 3 / 4, 6.0, 12.0)
    # fp32, one operator after the other: square, mean, add, rsqrt, scale, weight
    return _Traffic(7.0 * itemsize, 15.0 * itemsize, 6.0, 10.0)


def _rotary_traffic(model: ModelConfig, software: Software) -> _Traffic:
    """Elements read and written an element of q or k."""
    if not model.rotary:
        return _Traffic(0.0, 0.0, 0.0, 0.0)
    return _Traffic(2.0, 2.0, 1.0, 1.0) if software.fused_ops else _Traffic(9.0, 9.0, 7.0, 7.0)


def _activation_traffic(model: ModelConfig, software: Software) -> _Traffic:
    """Elements read and written an element of the feed-forward's width."""
    ups = 2 if model.gated_mlp else 1
    if software.fused_ops:
        return _Traffic(1.0 + ups, 1.0 + 2.0 * ups, 1.0, 1.0)
    return _Traffic(2.0 * ups + 1, 4.0 * ups, 1.0 * ups, 1.5 * ups)


def _memory_bound(pricing: Pricing) -> Times:
    """Norms, residuals, rotary embedding and the activation function, by elements read and written a token."""
    model, layouts, software, memory_s = pricing.model, pricing.layouts, pricing.software, pricing.kernels.memory_s
    itemsize = software.compute_bytes
    wide = layouts.tokens / np.where(layouts.sequence_parallel, layouts.tp, 1) * model.hidden_size
    qk = layouts.tokens * (model.q_size + model.kv_size) / layouts.tp
    ffn = layouts.tokens * active_ffn(model) / layouts.tp
    norms = model.norms_per_layer + (0.25 if model.qk_norm else 0)
    norm, rotary = _norm_traffic(pricing), _rotary_traffic(model, software)
    activation = _activation_traffic(model, software)
    residuals = memory_s(2 * 3.0 * wide * itemsize, 2)
    forward = memory_s(norms * wide * norm.forward, norms * norm.forward_operators)
    forward = forward + residuals + memory_s(qk * rotary.forward * itemsize, 2 * rotary.forward_operators)
    forward = forward + memory_s(ffn * activation.forward * itemsize, activation.forward_operators)
    backward = memory_s(norms * wide * norm.backward, norms * norm.backward_operators)
    backward = backward + residuals + memory_s(qk * rotary.backward * itemsize, 2 * rotary.backward_operators)
    backward = backward + memory_s(ffn * activation.backward * itemsize, activation.backward_operators)
    if software.attention in ("eager", "fused"):
        # Scores written, scaled, masked, softmaxed in fp32 and cast back, read; or one fused kernel for all between.
        reads, operators = (14.0, 7) if software.attention == "eager" else (4.0, 2)
        scores = _stored_scores(pricing) * itemsize
        forward = forward + memory_s(scores * reads, operators)
        backward = backward + memory_s(scores * reads, operators)
    return Times(forward, backward)


def _stored_scores(pricing: Pricing) -> Column:
    """Attention scores that a kernel without online softmax writes, of one micro-batch on one rank."""
    layouts = pricing.layouts
    heads = layouts.micro_batch * pricing.model.num_heads / layouts.tp
    return heads * (layouts.seq_len / layouts.cp) * layouts.seq_len


def embedding_times(pricing: Pricing) -> Times:
    """Look-up, and its scattered gradient (dense, as wide as the vocabulary)."""
    model, layouts, software, memory_s = pricing.model, pricing.layouts, pricing.software, pricing.kernels.memory_s
    wide = layouts.tokens * model.hidden_size * software.compute_bytes
    table = model.vocab_size / layouts.tp * model.hidden_size * software.grad_bytes
    return Times(memory_s(2.0 * wide, 2), memory_s(2.0 * wide + 2.0 * table, 3))


def head_times(pricing: Pricing) -> Times:
    """Final norm, projection to the vocabulary, softmax and loss."""
    model, layouts, software = pricing.model, pricing.layouts, pricing.software
    tokens = layouts.tokens
    local = model.vocab_size // (layouts.tp if software.head_sharded else 1) + 0 * layouts.tp
    projection = _linear(pricing.kernels, tokens, np.full_like(tokens, model.hidden_size), local)
    entries = tokens * (model.vocab_size / layouts.tp if software.logits_sharded else model.vocab_size)
    loss = pricing.kernels.memory_s(entries * 4.0 * software.logits_passes / 2, 4)
    return Times(projection.forward + loss, projection.backward + loss)


def recomputed(pricing: Pricing, forward: Column, attention_forward: Column) -> Column:
    """Seconds of forward work done again in a layer's backward, by checkpointing."""
    kind = pricing.layouts.checkpointing
    elementwise = pricing.software.selective == "elementwise"
    # Estimated beside a forward that may be measured, of which it is a part.
    selected = np.minimum(_memory_bound(pricing).forward, forward) if elementwise else attention_forward
    again = np.select([kind == FULL, kind == STREAM, kind == SELECTIVE], [forward, forward, selected], 0.0)
    return again / pricing.layouts.checkpoint_every


def saved_bytes(pricing: Pricing) -> tuple[Column, Column]:
    """Bytes that autograd keeps for one micro-batch in an average layer: (with everything kept, layer input alone).

    Counted from the operators: what each needs for its backward, a token (Korthikanti et al. 2022, arXiv 2205.05198,
    section 4).
    """
    model, layouts, software = pricing.model, pricing.layouts, pricing.software
    itemsize, tp = software.compute_bytes, layouts.tp
    split = np.where(layouts.sequence_parallel, tp, 1)
    hidden = model.hidden_size
    wide = _kept_by_norms(pricing)
    # q, output; k, v; log-sum-exp
    qk = (2.0 * model.q_size + 2.0 * model.kv_size) * itemsize + model.num_heads * 4.0
    if model.qk_norm:
        qk += (model.q_size + model.kv_size) * (itemsize + (0.0 if software.fused_norm else software.norm_kept_bytes))
    gates = (4.0 if not software.fused_ops else 3.0) if model.gated_mlp else 2.0
    ffn = active_ffn(model) * gates * itemsize
    per_token = wide / split + (qk + ffn) / tp + np.where(tp > 1, software.tp_kept * hidden * itemsize, 0.0)
    kept = layouts.tokens * per_token
    if software.attention in ("eager", "fused"):
        copies = 8.0 if software.attention == "eager" else 2.0
        scores = np.where(layouts.checkpointing == SELECTIVE, 0.0, _stored_scores(pricing) * copies)
        kept = kept + scores
    layer_input = layouts.tokens * hidden * pricing.hidden_bytes / split
    kept = software.kept_share * kept
    if software.selective == "elementwise":
        kept = np.where(layouts.checkpointing == SELECTIVE, np.minimum(kept, _kept_selectively(pricing)), kept)
    return kept, layer_input


def _kept_by_norms(pricing: Pricing) -> Column:
    """Bytes a token that the norms of a layer keep, before they are cut along the sequence.

    A fused one its input, and its output for what comes after. Unfused ones keep what they compute in fp32, too. Beside
    hidden states wider than activations, every matrix after a norm has a copy of its own of that one's output: autocast
    remembers casts of weights alone.
    """
    model, software, hidden_bytes = pricing.model, pricing.software, pricing.hidden_bytes
    itemsize, norms = software.compute_bytes, model.norms_per_layer
    if software.fused_norm:
        return norms * model.hidden_size * (hidden_bytes + 1.0 * itemsize)
    # q, k and v; up, and gate; a norm whose output is added to the hidden states hands it on once.
    copies = 3 + (2 if model.gated_mlp else 1) + max(norms - 2, 0)
    outputs = itemsize * np.where(hidden_bytes > itemsize, copies, norms)
    kept: Column = model.hidden_size * (norms * (hidden_bytes + software.norm_kept_bytes) + outputs)
    return kept


def output_gradient_bytes(pricing: Pricing) -> Column:
    """Bytes that one micro-batch's weight gradients of an average layer need besides what autograd keeps.

    The gradients of the outputs of every matrix and norm: q, k, v and their norms; the output projection; up and gate;
    down. They wait where weight gradients are computed later than those of inputs.
    """
    model, layouts = pricing.model, pricing.layouts
    split = np.where(layouts.sequence_parallel, layouts.tp, 1)
    normed = model.q_size + model.kv_size if model.qk_norm else 0
    cut = model.q_size + 2.0 * model.kv_size + normed + (2.0 if model.gated_mlp else 1.0) * active_ffn(model)
    wide = (2.0 + model.norms_per_layer) * model.hidden_size
    waiting: Column = layouts.tokens * (cut / layouts.tp + wide / split) * pricing.software.compute_bytes
    return waiting


def _kept_selectively(pricing: Pricing) -> Column:
    """Bytes of one micro-batch that stay where only matrix products and attention keep their outputs in a layer.

    The layer's input; q, k, v before their rotary embedding; attention's output with its log-sum-exp; the outputs of
    the output projection, of gate and up, and of down.
    """
    model, layouts, software = pricing.model, pricing.layouts, pricing.software
    itemsize, tp = software.compute_bytes, layouts.tp
    split = np.where(layouts.sequence_parallel, tp, 1)
    ups = 2.0 if model.gated_mlp else 1.0
    cut = (2.0 * model.q_size + 2.0 * model.kv_size + ups * active_ffn(model)) * itemsize + model.num_heads * 4.0
    kept: Column = layouts.tokens * (cut / tp + 3.0 * model.hidden_size * itemsize / split)
    return kept
