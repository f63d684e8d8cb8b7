"""Seconds of one training step, split into what a person can act on.

A step is the bottleneck stage at work for every micro-batch, the pipeline's fill and drain, the gradient reduction that
backward could not hide, and the optimizer. Each term is a small function with its formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fourfold.layouts.cost.asynchronous import mitigation_seconds, rotation_seconds, updates_per_step
from fourfold.layouts.cost.candidates import FULL, NONE, Column
from fourfold.layouts.cost.communication import (
    asynchronous_update_seconds,
    expert_seconds,
    head_exchange_seconds,
    pipeline_seconds,
    reduction_seconds,
    ring_seconds,
    tensor_parallel_seconds,
    tied_ends_seconds,
)
from fourfold.layouts.cost.layer import Times, attention_times, recomputed, saved_bytes
from fourfold.layouts.cost.measured_layers import (
    EMBEDDING,
    HEAD,
    LAYER,
    Piece,
    Split,
    extra_seconds_of_splitting,
    measured_host_s,
    measured_rows,
    optimizer_rate,
    piece_times,
)
from fourfold.layouts.cost.memory import pieces_in
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.shares import owned_params, owns_a_share
from fourfold.layouts.cost.streamed import Pieces, launches, stream_overhead_s

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
    launch: Column
    """What the device waits for its host to issue operators."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Seconds of one micro-batch's forward and backward on the kinds of stage, [3, candidates]."""

    forward: Column
    """Of `compute`, the forward."""
    weights: Column
    """Of `compute`, the gradients of weights."""
    compute: Column
    recompute: Column
    tp_communication: Column
    cp_communication: Column
    ep_communication: Column
    pp_communication: Column
    launch: Column
    overhead: Column

    @property
    def total(self) -> Column:
        """The seconds that a stage is busy with one micro-batch: its slot in the pipeline's schedule."""
        return (
            self.compute + self.recompute + self.tp_communication + self.cp_communication + self.ep_communication
            + self.pp_communication + self.launch + self.overhead
        )  # fmt: skip

    @property
    def split_passing(self) -> Column:
        """What a stage adds to fill and drain where weight gradients are computed apart, and fill what they can.

        With F of a forward, I of an input's gradient and W of weight gradients, F + I + W being the slot: the larger of
        F, I and F + I - W. Zero-bubble H1 of Qi et al. 2024 (arXiv 2401.10241) has the last, which is the largest where
        W is no longer than F and I. All but compute is halved between F and I.
        """
        besides = (self.total - self.compute) / 2
        forward = self.forward + besides
        of_input = self.compute - self.forward - self.weights + besides
        longer: Column = np.maximum(forward, of_input)
        return np.maximum(longer, forward + of_input - self.weights)


@dataclass(frozen=True, slots=True)
class _Update:
    """Seconds a step of reducing gradients and of the optimizer, [3, candidates]."""

    reduction: Column
    optimizer: Column


def time_of(pricing: Pricing) -> StepTime:
    """The step time of every candidate."""
    layouts = pricing.layouts
    one = micro_batch_of(pricing)
    update = _update_of(pricing, one.compute)
    slot = one.total
    # The slowest kind of stage decides; an asynchronous one updates at every micro-batch as well.
    longest = slot
    if layouts.any_asynchronous:
        late = ~layouts.drains
        each = (update.reduction + update.optimizer) / layouts.num_micro_batches
        longest = slot + np.where(late, each, 0.0)
    slowest = longest.argmax(axis=0)[None]

    def on_slowest(column: Column) -> Column:
        return np.take_along_axis(np.broadcast_to(column, slot.shape), slowest, 0)[0]

    times = layouts.num_micro_batches
    bottleneck = on_slowest(slot)
    passing = np.where(layouts.zero_bubble, one.split_passing, slot)
    bubble = _bubble(pricing, one, passing, on_slowest(passing))
    return StepTime(
        compute=times * on_slowest(one.compute),
        recompute=times * on_slowest(one.recompute),
        tp_communication=times * on_slowest(one.tp_communication),
        cp_communication=times * on_slowest(one.cp_communication),
        ep_communication=times * on_slowest(one.ep_communication),
        pp_communication=times * on_slowest(one.pp_communication) + tied_ends_seconds(pricing),
        dp_communication=on_slowest(update.reduction),
        bubble=bubble,
        optimizer=on_slowest(update.optimizer),
        launch=times * on_slowest(one.launch),
        overhead=times * on_slowest(one.overhead)
        + _straggling(pricing) * (times * bottleneck + bubble)
        + pricing.software.step_s,
    )


def micro_batch_of(pricing: Pricing) -> MicroBatch:
    """What one micro-batch costs on each kind of stage."""
    stages, software, pieces = pricing.stages, pricing.software, pieces_in(pricing)
    # One layer, the embedding and the head alone; then what checkpointing and StreamBP run again.
    layer, embedding, head = (piece_times(pricing, piece) for piece in (LAYER, EMBEDDING, HEAD))
    attention = attention_times(pricing)
    again = recomputed(pricing, layer.forward, attention.forward) + stream_overhead_s(pricing, pieces)
    if software.compute_share != 1.0 and not pricing.cluster.measured:  # a profile timed what this software reaches
        slower = 1.0 / software.compute_share
        layer, embedding, head = (times.scaled(slower) for times in (layer, embedding, head))
        attention, again = attention.scaled(slower), slower * again
    compute = stages.layers * (layer.forward + layer.backward)
    compute = compute + stages.has_embedding * (embedding.forward + embedding.backward)
    compute = compute + stages.has_head * (head.forward + head.backward)
    forward = stages.layers * layer.forward + stages.has_embedding * embedding.forward + stages.has_head * head.forward
    # A matrix takes as long for its product as for either gradient; attention has no weights.
    matrices = layer.forward + layer.backward - attention.forward - attention.backward
    weights = stages.layers * np.maximum(matrices, 0.0) / 3 + stages.has_head * (head.forward + head.backward) / 3
    sends = np.broadcast_to(pipeline_seconds(pricing), compute.shape)
    tp_communication = _tp_of_stage(pricing, layer)
    launch = np.zeros_like(compute)
    if software.launched and (software.layer_host_s or pricing.cluster.measured):
        # The device waits where it has done a layer before the host has issued the next.
        host_s = stages.layers * _layer_host_s(pricing) * launches(pieces)
        device_s = stages.layers * (layer.forward + layer.backward + again) + tp_communication
        launch = np.maximum(host_s - device_s, 0.0)
    return MicroBatch(
        forward=forward,
        weights=np.minimum(weights, compute - forward),
        compute=compute,
        recompute=stages.layers * again,
        tp_communication=tp_communication,
        cp_communication=stages.layers * _cp_of_layer(pricing, attention if software.launched else None),
        ep_communication=stages.layers * expert_seconds(pricing),
        pp_communication=sends,
        launch=launch,
        overhead=_overhead(pricing, layer, pieces) + software.micro_batch_s,
    )


def _layer_host_s(pricing: Pricing) -> Column:
    """Seconds until the host has issued a layer's forward and backward, and what is recomputed.

    As a profile measured it of this model, else what is known of the software.
    """
    layouts, software, cluster = pricing.layouts, pricing.software, pricing.cluster
    seconds = measured_host_s(pricing)
    if seconds is None:
        seconds = software.layer_host_s + software.layer_host_tp_s * (layouts.tp > 1)
    pipelined_s = cluster.links[-1].pipelined_layer_s if cluster.links else 0.0
    if pipelined_s:
        world = layouts.dp * layouts.pp * layouts.cp * layouts.tp
        piped = (layouts.pp > 1) & (world > cluster.devices_per_node)
        seconds = seconds + np.where(piped, pipelined_s * np.log2(layouts.tp), 0.0)
    # What is recomputed is issued again, and checkpointing keeps and restores the random state besides.
    return seconds * (1 + layouts.recomputed_share)


def _tp_of_stage(pricing: Pricing, layer: Times) -> Column:
    """Tensor-parallel communication of a stage; measured beyond the work of layers and ends where a profile has it."""
    stages, layouts = pricing.stages, pricing.layouts
    rows, ends = measured_rows(pricing, LAYER.split_table), measured_rows(pricing, HEAD.split_table)
    of_layer = _tp_of_piece(pricing, LAYER, rows) if rows else tensor_parallel_seconds(pricing, layer)
    seconds = stages.layers * of_layer
    if ends:
        # Embedding and head are not recomputed.
        once = pricing.of(replace(layouts, checkpointing=np.full_like(layouts.checkpointing, NONE)))
        seconds = seconds + stages.has_embedding * _tp_of_piece(once, EMBEDDING, ends)
        seconds = seconds + stages.has_head * _tp_of_piece(once, HEAD, ends)
    return seconds


def _tp_of_piece(pricing: Pricing, piece: Piece, rows: list[Mapping[str, Any]]) -> Column:
    split = Split(
        piece=piece,
        axis="tp",
        alone=lambda layouts: piece_times(pricing.uncompiled.of(layouts), piece),  # beside which they were measured
        communication=lambda layouts: tensor_parallel_seconds(pricing.of(layouts)),
    )
    return extra_seconds_of_splitting(rows, split, pricing.layouts)


def _cp_of_layer(pricing: Pricing, hidden_by: Times | None) -> Column:
    """Exchanging heads, and the ring's hops: measured beyond the layer's work, else what attention does not hide."""
    exchange = head_exchange_seconds(pricing)
    # No compiler touches a ring: what it adds to a layer was measured beside layers as they are.
    uncompiled = pricing.uncompiled
    rows = measured_rows(uncompiled, "cp_layer")
    if not rows:
        return exchange + ring_seconds(pricing, hidden_by)
    split = Split(
        piece=LAYER,
        axis="cp",
        alone=lambda layouts: piece_times(uncompiled.of(layouts), LAYER),
        communication=lambda layouts: ring_seconds(pricing.of(layouts)),
    )
    return exchange + extra_seconds_of_splitting(rows, split, pricing.layouts)


def _overhead(pricing: Pricing, layer: Times, pieces: Pieces) -> Column:
    """Of a micro-batch on a stage: adding gradients up, launching, offloading, and a stall that was measured."""
    layouts, software = pricing.layouts, pricing.software
    overhead = _accumulation_seconds(pricing, pieces) + (
        pricing.constants.step_overhead_s if software.launched else 0.0
    )
    overhead = overhead + pricing.stages.layers * _offload_seconds(pricing, layer)
    if software.checkpoint_stall_s:
        stalls = (layouts.checkpointing == FULL) & (layouts.pp > 1) & (layouts.tp > 1)
        overhead = overhead + np.where(stalls, software.checkpoint_stall_s, 0.0)
    return overhead


def _update_of(pricing: Pricing, compute: Column) -> _Update:
    """Reducing gradients and the optimizer's step, once a step or, where a pipeline never drains, at every update."""
    layouts = pricing.layouts
    reduction = reduction_seconds(pricing, compute / 3 * 2)
    optimizer = _optimizer_seconds(pricing)
    if layouts.any_asynchronous:
        # Every update reduces gradients and applies the mitigation, and nothing hides either.
        late, updates = ~layouts.drains, updates_per_step(layouts)
        reduction = np.where(late, updates * asynchronous_update_seconds(pricing), reduction)
        shared, experts = pricing.held_params
        bandwidth = pricing.memory_bandwidth_bytes_per_s
        held, index = shared + experts, pricing.stages.index
        owned = owned_params(pricing)
        mitigate = mitigation_seconds(layouts, held, index, bandwidth, owned=owned)
        mitigate = mitigate + rotation_seconds(
            layouts, owned, index, pricing.model.hidden_size, pricing.kernels.matmul_s
        )
        unclipped = _optimizer_seconds(pricing, clipped=False)  # clipping, by a late norm, is not priced
        optimizer = np.where(late, updates * (unclipped + mitigate), optimizer)
    return _Update(reduction, optimizer)


def _bubble(pricing: Pricing, one: MicroBatch, slot: Column, bottleneck: Column) -> Column:
    """What fill and drain wait for: one micro-batch through all pp stages, less the one that is counted as work.

    Args:
        slot: what each kind of stage adds to fill and drain, [3, candidates].
        bottleneck: that of the slowest.
    """
    layouts, stages = pricing.layouts, pricing.stages
    # The largest stage between first and last may hold a layer more than most: the mean of them is passed through.
    fixed = one.pp_communication[1] + one.launch[1] + one.overhead[1]
    between = fixed + (slot[1] - fixed) * stages.mean_between / np.maximum(stages.layers[1], 1)
    through = np.where(layouts.pp == 1, slot[0], slot[0] + slot[2] + np.maximum(layouts.pp - 2, 0) * between)
    bubble = (through - bottleneck) / layouts.vp
    return np.where(layouts.drains, bubble, 0.0) if layouts.any_asynchronous else bubble


def _straggling(pricing: Pricing) -> Column:
    """Relative growth of a step with each doubling of the number of nodes; a profile has measured what there is."""
    layouts = pricing.layouts
    if pricing.cluster.measured:
        return np.zeros(len(layouts))
    world = layouts.dp * layouts.pp * layouts.cp * layouts.tp
    nodes = np.maximum(world / pricing.cluster.devices_per_node, 1.0)
    return pricing.constants.straggler * np.log2(nodes)


def _accumulation_seconds(pricing: Pricing, pieces: Pieces) -> Column:
    """Adding a micro-batch's weight gradients to those before, by bytes; [3, candidates].

    The first micro-batch of an update has nothing to add to; StreamBP adds each piece's.
    """
    layouts, software = pricing.layouts, pricing.software
    shared, experts = pricing.held_params
    first = 1.0 / layouts.num_micro_batches * updates_per_step(layouts)
    later = pieces.summands - first
    added = (shared + experts) * later * software.accumulation_passes * software.grad_bytes
    return added / pricing.memory_bandwidth_bytes_per_s


def _offload_seconds(pricing: Pricing, layer: Times) -> Column:
    """A layer's input to host memory and back, where forward and backward do not hide it."""
    layouts = pricing.layouts
    if not layouts.offload.any():
        return np.zeros(len(layouts))
    one_way = saved_bytes(pricing)[1] / pricing.cluster.device.host_bytes_per_s
    visible = np.maximum(one_way - layer.forward, 0.0) + np.maximum(one_way - layer.forward - layer.backward, 0.0)
    return np.where(layouts.offload, visible, 0.0)


def _optimizer_seconds(pricing: Pricing, *, clipped: bool = True) -> Column:
    """AdamW and gradient clipping over the states that a rank holds, by bytes; [3, candidates]."""
    layouts, software = pricing.layouts, pricing.software
    shared, experts = pricing.held_params
    local = (shared + experts) / np.where(layouts.zero_stage >= 1, layouts.shards, 1)
    if owns_a_share(layouts).any():
        local = np.where(owns_a_share(layouts), owned_params(pricing), local)
    measured = optimizer_rate(pricing.cluster, clipped=clipped)
    if measured is not None:
        return local * measured
    passes = software.optimizer_passes if clipped else min(software.optimizer_passes, ADAMW_PASSES)
    return local * 4.0 * passes / pricing.memory_bandwidth_bytes_per_s
