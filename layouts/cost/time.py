"""Seconds of one training step, split into what a person can act on.

A step is the bottleneck stage at work for every micro-batch, the pipeline's fill and drain, the gradient reduction that
backward could not hide, and the optimizer. Each term is a small function with its formula.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fourfold.layouts.cost.asynchronous import mitigation_seconds, updates_per_step
from fourfold.layouts.cost.candidates import FLUSHED, FULL, NONE, STREAM, Candidates, Column
from fourfold.layouts.cost.collectives import Network
from fourfold.layouts.cost.kernels import kernels_of
from fourfold.layouts.cost.layer import (
    Times,
    attention_times,
    embedding_times,
    head_times,
    layer_times,
    recomputed,
    saved_bytes,
    streaming,
)
from fourfold.layouts.cost.measured_layers import beyond, corrected, optimizer_rate, rows_for
from fourfold.layouts.cost.memory import stage_params
from fourfold.layouts.cost.stages import stages_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Stack

LAYER = ("forward_s", "backward_s")
EMBEDDING, HEAD = ("embedding_forward_s", "embedding_backward_s"), ("head_forward_s", "head_backward_s")
HOST_BYTES_PER_S = 20e9
"""Between a device and pinned host memory, one way: of the 31.5 GB/s of PCIe 4.0 x16, what copies commonly reach."""


ADAMW_PASSES = 7.0
"""Weights, gradients and two moments read; all but the gradients written."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds, a candidate: the terms of the step on the slowest stage. They add up to `total`."""

    compute: Column
    recompute: Column
    tp_communication: Column
    cp_communication: Column
    ep_communication: Column
    pp_communication: Column
    dp_communication: Column
    bubble: Column
    optimizer: Column
    overhead: Column

    @property
    def parts(self) -> dict[str, Column]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> Column:
        total: Column = sum(self.parts.values())  # type: ignore[assignment]
        return total

    @property
    def exposed_communication(self) -> Column:
        return (
            self.tp_communication + self.cp_communication + self.ep_communication + self.pp_communication
            + self.dp_communication
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Strides:
    """Distance in ranks between neighbours of an axis, a candidate."""

    tp: Column
    cp: Column
    pp: Column
    dp: Column

    @classmethod
    def of(cls, c: Candidates, stack: Stack) -> "Strides":
        one = np.ones_like(c.tp)
        inner = c.tp * c.cp
        pp, dp = (inner * c.dp, inner) if stack.pp_outermost else (inner, inner * c.pp)
        return cls(one, c.tp, pp, dp)


def time_of(model: ModelConfig, c: Candidates, cluster: Cluster, stack: Stack, k: Constants) -> StepTime:
    """The step time of every candidate."""
    kernels = kernels_of(cluster, k)
    network = _network(cluster, k, stack.link)
    reducing = _network(cluster, k, stack.reduce_link or stack.link)
    strides = Strides.of(c, stack)
    stages = stages_of(model, c)
    m = c.num_micro_batches
    attention = attention_times(model, c, kernels, stack, k)
    layers, ends = rows_for(model, cluster, "layer", stack), rows_for(model, cluster, "ends", stack)

    def layer_at(at: Candidates) -> Times:
        return corrected(layers, LAYER, lambda at: layer_times(model, at, kernels, stack, k), at)

    def embedding_at(at: Candidates) -> Times:
        return corrected(ends, EMBEDDING, lambda at: embedding_times(model, at, kernels, stack), at)

    def head_at(at: Candidates) -> Times:
        return corrected(ends, HEAD, lambda at: head_times(model, at, kernels, stack), at)

    layer, embedding, head = layer_at(c), embedding_at(c), head_at(c)
    again = recomputed(model, c, layer.forward, attention.forward) + streaming(model, c, kernels, stack, k)

    def tp_at(at: Candidates, behind: Times | None = None) -> Column:
        sync_s = 0.0 if cluster.measured else k.sync_s
        return _tp_seconds(model, at, network, Strides.of(at, stack), stack, sync_s, behind)

    tp_rows, cp_rows = rows_for(model, cluster, "tp_layer", stack), rows_for(model, cluster, "cp_layer", stack)
    tp_ends = rows_for(model, cluster, "tp_ends", stack)
    tp_layer = beyond(tp_rows, "tp", LAYER, layer_at, tp_at, c) if tp_rows else tp_at(c, layer)
    cp_layer = _exchange_seconds(model, c, network, strides, stack)
    if cp_rows:
        hops = partial(_ring_seconds, model, network=network, stack=stack)
        cp_layer = cp_layer + beyond(cp_rows, "cp", LAYER, layer_at, hops, c)
    else:
        cp_layer = cp_layer + _ring_seconds(model, c, network, stack, hidden=attention if stack.launched else None)
    ep_layer = _ep_seconds(model, c, network, strides, stack)

    work = stages.layers * (layer.forward + layer.backward)
    work = work + stages.has_embedding * (embedding.forward + embedding.backward)
    work = work + stages.has_head * (head.forward + head.backward)
    recompute = stages.layers * again
    tp_comm, cp_comm, ep_comm = stages.layers * tp_layer, stages.layers * cp_layer, stages.layers * ep_layer
    if tp_ends:
        once = replace(c, checkpointing=np.full_like(c.checkpointing, NONE))  # ends are not recomputed
        tp_comm = tp_comm + stages.has_embedding * beyond(tp_ends, "tp", EMBEDDING, embedding_at, tp_at, once)
        tp_comm = tp_comm + stages.has_head * beyond(tp_ends, "tp", HEAD, head_at, tp_at, once)
    pp_comm = np.broadcast_to(_pp_seconds(model, c, network, strides, stack), work.shape)
    accumulate = _accumulation_seconds(model, c, cluster, stack, k)
    overhead = accumulate + (k.step_overhead_s if stack.launched else 0.0)
    overhead = overhead + stages.layers * _offload_seconds(model, c, stack, layer)
    if stack.checkpoint_stall:
        stalls = (c.checkpointing == FULL) & (c.pp > 1) & (c.tp > 1)
        overhead = overhead + np.where(stalls, k.checkpoint_stall_s, 0.0)
    slot = work + recompute + tp_comm + cp_comm + ep_comm + pp_comm + overhead
    dp_comm = _dp_seconds(model, c, reducing, strides, stack, work / 3 * 2)
    optimizer = _optimizer_seconds(model, c, cluster, stack, k)
    longest = slot
    if c.any_asynchronous:
        # Every update reduces gradients and applies the mitigation, and nothing hides either.
        late, updates = c.schedule != FLUSHED, updates_per_step(c)
        reduce_s = _dp_seconds(model, c, reducing, strides, stack, np.zeros_like(work))
        dp_comm = np.where(late, updates * reduce_s, dp_comm)
        shared, experts = stage_params(model, c, stages)
        mitigate = mitigation_seconds(c, shared + experts, stages.index, _bandwidth(cluster, k))
        unclipped = _optimizer_seconds(model, c, cluster, stack, k, clipped=False)  # no rank sees all gradients
        optimizer = np.where(late, updates * (unclipped + mitigate), optimizer)
        longest = slot + np.where(late, (dp_comm + optimizer) / m, 0.0)
    worst = longest.argmax(axis=0)[None]

    def at_worst(column: Column) -> Column:
        return np.take_along_axis(np.broadcast_to(column, slot.shape), worst, 0)[0]

    every = _over_stages(slot, c)
    bottleneck = at_worst(slot)
    bubble = (every - bottleneck) / c.vp
    if c.any_asynchronous:
        bubble = np.where(c.schedule == FLUSHED, bubble, 0.0)
    return StepTime(
        compute=m * at_worst(work),
        recompute=m * at_worst(recompute),
        tp_communication=m * at_worst(tp_comm),
        cp_communication=m * at_worst(cp_comm),
        ep_communication=m * at_worst(ep_comm),
        pp_communication=m * at_worst(pp_comm),
        dp_communication=at_worst(dp_comm),
        bubble=bubble,
        optimizer=at_worst(optimizer),
        overhead=m * at_worst(overhead) + _straggling(c, cluster, k) * (m * bottleneck + bubble),
    )


def _network(cluster: Cluster, k: Constants, outer: str) -> Network:
    """The cluster's links, with the shares of a preset's bandwidths that constants tell."""
    return Network(cluster=cluster, efficiency=(1.0, 1.0) if cluster.measured else (k.inner_link, getattr(k, outer)))


def _over_stages(slot: Column, c: Candidates) -> Column:
    """Sum over all pp stages of one micro-batch's forward and backward: what fill and drain wait for."""
    return np.where(c.pp == 1, slot[0], slot[0] + slot[2] + np.maximum(c.pp - 2, 0) * slot[1])


def _straggling(c: Candidates, cluster: Cluster, k: Constants) -> Column:
    world = c.dp * c.pp * c.cp * c.tp
    nodes = np.maximum(world / cluster.devices_per_node, 1.0)
    return k.straggler * np.log2(nodes) if not cluster.measured else np.zeros(len(c))


def _tp_seconds(
    model: ModelConfig,
    c: Candidates,
    network: Network,
    strides: Strides,
    stack: Stack,
    sync_s: float,
    behind: Times | None,
) -> Column:
    """Two all-reduces of [tokens, hidden] forward and two backward a layer (Shoeybi et al. 2019).

    With sequence parallelism each is an all-gather and a reduce-scatter; the input that backward gathers once more, for
    the weight gradient, hides behind the gradient of the input. Full checkpointing repeats the forward's.
    """
    size = 1.0 * c.tokens * model.hidden_size * stack.compute_bytes
    reduce_s = network.collective_s("all_reduce", size, c.tp, strides.tp)
    gather_s = network.collective_s("all_gather", size, c.tp, strides.tp)
    scatter_s = network.collective_s("reduce_scatter", size, c.tp, strides.tp)
    again = np.where((c.checkpointing == FULL) | (c.checkpointing == STREAM), 1.0 / c.checkpoint_every, 0.0)
    wait = sync_s * np.log2(c.tp)
    each = np.where(c.sequence_parallel, gather_s + scatter_s, reduce_s) + wait
    whole = (4 + 2 * again) * each
    if not stack.tp_overlap or behind is None:
        return whole
    # Split into pieces, a collective hides behind the matmul that makes or takes its tensor.
    hidden = np.where(c.sequence_parallel, stack.tp_overlap, 0.0)
    return np.maximum(whole - hidden * (behind.forward * (1 + again) + behind.backward), (1 - 0.9 * hidden) * whole)


def _ring_seconds(
    model: ModelConfig, c: Candidates, network: Network, stack: Stack, hidden: Times | None = None
) -> Column:
    """Ring attention: cp-1 hops of k and v forward, of k, v, dk and dv backward; each hides behind one block.

    Args:
        hidden: seconds of the attention that hides the hops; None shows them whole.
    """
    kv = 2.0 * c.tokens * model.kv_size / c.tp * stack.compute_bytes
    ring = np.maximum(c.cp // c.cp_heads, 1)
    hop = network.send_s(kv, c.cp, Strides.of(c, stack).cp)
    forward = np.maximum(hop - (hidden.forward / ring if hidden else 0.0), 0.0)
    backward = np.maximum(2 * hop - (hidden.backward / ring if hidden else 0.0), 0.0)
    again = np.where((c.checkpointing == FULL) | (c.checkpointing == STREAM), 1.0 / c.checkpoint_every, 0.0)
    seconds: Column = (ring - 1) * ((1 + again) * forward + backward)
    return seconds


def _exchange_seconds(model: ModelConfig, c: Candidates, network: Network, strides: Strides, stack: Stack) -> Column:
    """Heads against sequence by all-to-all: q, k, v and the output once each way."""
    again = np.where((c.checkpointing == FULL) | (c.checkpointing == STREAM), 1.0 / c.checkpoint_every, 0.0)
    heads_bytes = c.tokens * (2.0 * model.q_size + 2.0 * model.kv_size) / c.tp * stack.compute_bytes
    exchange = network.collective_s("all_to_all", heads_bytes, c.cp_heads, strides.cp)
    seconds: Column = (2 + again) * exchange
    return seconds


def _ep_seconds(model: ModelConfig, c: Candidates, network: Network, strides: Strides, stack: Stack) -> Column:
    """Tokens to their experts and back: two all-to-alls forward, two backward, in mixture-of-experts layers."""
    if not model.num_moe_layers:
        return np.zeros(len(c))
    size = c.tokens * model.hidden_size * stack.compute_bytes * float(model.experts_per_token)
    again = np.where((c.checkpointing == FULL) | (c.checkpointing == STREAM), 1.0 / c.checkpoint_every, 0.0)
    share = model.num_moe_layers / model.num_layers
    return share * (4 + 2 * again) * network.collective_s("all_to_all", size, c.ep, strides.cp)


def _pp_seconds(model: ModelConfig, c: Candidates, network: Network, strides: Strides, stack: Stack) -> Column:
    """A stage sends its output on and its input's gradient back, for each of its vp chunks."""
    size = 1.0 * c.tokens * model.hidden_size * stack.compute_bytes
    cut = np.where(c.sequence_parallel | stack.pp_scatter, c.tp, 1)
    return np.where(c.pp > 1, 2.0 * c.vp * network.send_s(size / cut, c.pp, strides.pp), 0.0)


def _dp_seconds(
    model: ModelConfig, c: Candidates, network: Network, strides: Strides, stack: Stack, backward: Column
) -> Column:
    """Gradient reduction and weight gathering of a step that compute could not hide; [3, candidates].

    ZeRO 0: one all-reduce of the gradients. 1 and 2: reduce-scatter, then all-gather of the updated weights. 3: each
    layer's weights are gathered for every forward and again for every backward of a micro-batch.
    """
    stages = stages_of(model, c)
    shared, experts = stage_params(model, c, stages)
    # The dp x cp group: cp neighbours stand next to each other, dp replicas at dp's stride.
    inside = network.ranks_in_node(c.cp, strides.cp) * network.ranks_in_node(c.dp, strides.dp)
    stride = np.maximum(network.cluster.devices_per_node // inside, 1)
    stride = np.where(inside >= c.shards, 1, stride)

    def collective(operation: str, item: float) -> Column:
        return np.stack(
            [
                network.collective_s(operation, s * item, c.shards, stride)
                + network.collective_s(operation, e * item, np.maximum(c.shards // c.ep, 1), stride)
                for s, e in zip(shared, experts, strict=True)
            ]
        )

    reduce_s = collective("all_reduce", stack.reduce_bytes)
    scatter_s = collective("reduce_scatter", stack.reduce_bytes)
    gather_s = collective("all_gather", stack.gather_bytes)

    # The last micro-batch's backward runs while gradients are reduced; the first one's forward, while weights are
    # gathered. A tenth stays visible: the first bucket and the last.
    def visible(seconds: Column, behind: Column, overlap: float) -> Column:
        return np.maximum(seconds - overlap * behind, (1 - 0.9 * overlap) * seconds)

    forward = backward / 2
    zero0 = visible(reduce_s, backward, stack.dp_overlap)
    zero12 = visible(scatter_s, backward, stack.dp_overlap) + visible(gather_s, forward, stack.dp_overlap)
    per_micro = visible(2 * gather_s, forward + backward, stack.zero3_overlap)
    zero3 = c.num_micro_batches * per_micro + visible(scatter_s, backward, stack.dp_overlap)
    return np.select([c.zero_stage == 0, c.zero_stage == 3], [zero0, zero3], zero12)


def _accumulation_seconds(model: ModelConfig, c: Candidates, cluster: Cluster, stack: Stack, k: Constants) -> Column:
    """Adding a micro-batch's weight gradients to those before, by bytes; [3, candidates].

    The first micro-batch of an update has nothing to add to; StreamBP adds each chunk's.
    """
    shared, experts = stage_params(model, c, stages_of(model, c))
    first = 1.0 / c.num_micro_batches * updates_per_step(c)
    later = np.where(c.checkpointing == STREAM, c.stream_chunks, 1) - first
    return (shared + experts) * later * stack.accumulation_passes * stack.grad_bytes / _bandwidth(cluster, k)


def _offload_seconds(model: ModelConfig, c: Candidates, stack: Stack, layer: Times) -> Column:
    """A layer's input to host memory and back, where forward and backward do not hide it."""
    if not c.offload.any():
        return np.zeros(len(c))
    one = saved_bytes(model, c, stack)[1] / HOST_BYTES_PER_S
    visible = np.maximum(one - layer.forward, 0.0) + np.maximum(one - layer.forward - layer.backward, 0.0)
    return np.where(c.offload, visible, 0.0)


def _bandwidth(cluster: Cluster, k: Constants) -> float:
    return cluster.device.memory_bandwidth_bytes_per_s * (1.0 if cluster.measured else k.memory_efficiency)


def _optimizer_seconds(
    model: ModelConfig, c: Candidates, cluster: Cluster, stack: Stack, k: Constants, *, clipped: bool = True
) -> Column:
    """AdamW and gradient clipping over the states that a rank holds, by bytes; [3, candidates]."""
    shared, experts = stage_params(model, c, stages_of(model, c))
    local = (shared + experts) / np.where(c.zero_stage >= 1, c.shards, 1)
    measured = optimizer_rate(cluster, clipped=clipped)
    if measured is not None:
        return local * measured
    passes = stack.optimizer_passes if clipped else min(stack.optimizer_passes, ADAMW_PASSES)
    return local * 4.0 * passes / _bandwidth(cluster, k)
