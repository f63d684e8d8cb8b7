"""Peak memory of a rank, stage by stage: what the allocator holds, and what lies outside it.

Weights, gradients and optimizer states are exact from the parameter counts; activations are counted operator by
operator (`layer.saved_bytes`) times the micro-batches in flight; on top come the logits of the loss, one layer's work
space, and communication buffers. The true peak scatters about this: a layout has a probability of fitting, no verdict.
"""

import math
from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.asynchronous import weight_copies
from fourfold.layouts.cost.candidates import FLUSHED, FULL, STREAM, Candidates, Column
from fourfold.layouts.cost.layer import active_ffn, saved_bytes
from fourfold.layouts.cost.stages import Stages, stages_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Stack


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, columns [3 kinds of stage, candidates] except `reserve` (the same for all)."""

    weights: Column
    gradients: Column
    optimizer: Column
    activations: Column
    logits: Column
    workspace: Column
    """One layer at work: recomputed activations, gathered weights, casts, buckets."""
    reserve: float
    capacity: float
    stages: Stages
    spread: Column
    """Standard deviation of the peak."""

    @property
    def parts(self) -> dict[str, Column]:
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer,
            "activations": self.activations, "logits": self.logits, "workspace": self.workspace,
        }  # fmt: skip

    @property
    def by_stage(self) -> Column:
        total: Column = sum(self.parts.values())  # type: ignore[assignment]
        return total

    @property
    def worst_stage(self) -> Column:
        return np.argmax(self.by_stage, axis=0)

    @property
    def peak(self) -> Column:
        """Of the worst stage: what the allocator holds at most, without the reserve."""
        return self.by_stage.max(axis=0)

    @property
    def margin(self) -> Column:
        """Capacity less reserve and peak; below zero does not fit."""
        return self.capacity - self.reserve - self.peak

    @property
    def fit_probability(self) -> Column:
        """Of the worst stage not running out: the normal distribution's value at margin / spread."""
        at_worst = np.take_along_axis(self.spread, self.worst_stage[None], 0)[0]
        return _normal_cdf(self.margin / np.maximum(at_worst, 1.0))


def _normal_cdf(z: Column) -> Column:
    """Phi(z) over a column (numpy has no erf): Abramowitz and Stegun 26.2.17, error below 7.5e-8."""
    x = np.abs(np.clip(z, -37.0, 37.0))
    t = 1.0 / (1.0 + 0.2316419 * x)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * series
    return np.where(z >= 0, 1.0 - tail, tail)


def stage_params(model: ModelConfig, c: Candidates, stages: Stages) -> tuple[Column, Column]:
    """Parameters a rank holds of its stage: (all but routed experts, routed experts), before ZeRO."""
    moe = model.num_moe_layers / model.num_layers
    experts = moe * model.expert_params
    dense = model.layers_params / model.num_layers - experts
    norms = model.layer_norm_params
    layer = (dense - norms) / c.tp + norms
    tied = model.tied_embeddings & (c.pp == 1)
    ends = stages.has_embedding * (model.vocab_size / c.tp + model.learned_positions) * model.hidden_size
    ends = ends + stages.has_head * np.where(tied, 0.0, model.head_params / c.tp)
    ends = ends + stages.has_head * model.final_norm_params
    return stages.layers * layer + ends, stages.layers * experts / (c.tp * c.ep)


def _loss_bytes(model: ModelConfig, c: Candidates, stack: Stack) -> Column:
    """Logits, their softmax and gradient, and what the final norm keeps, of one micro-batch."""
    entries = c.tokens * (model.vocab_size / c.tp if stack.logits_sharded else model.vocab_size)
    # Gathering shards over tp holds the pieces and their concatenation for a moment.
    gather = 0.0 if stack.logits_sharded else np.where(c.tp > 1, 2.0 * stack.compute_bytes, 0.0)
    norm = (
        c.tokens * model.hidden_size * (2.0 * stack.compute_bytes + (0 if stack.fused_norm else stack.norm_kept_bytes))
    )
    return entries * (stack.logits_bytes + gather) + norm


def memory_of(model: ModelConfig, c: Candidates, cluster: Cluster, stack: Stack, k: Constants) -> Memory:
    """Peak memory of the kinds of stage of every candidate."""
    stages = stages_of(model, c)
    shared, experts = stage_params(model, c, stages)
    d, expert_d = c.shards, np.maximum(c.shards // c.ep, 1)

    def sharded(from_stage: int) -> Column:
        yes = c.zero_stage >= from_stage
        return shared / np.where(yes, d, 1) + experts / np.where(yes, expert_d, 1)

    full3 = c.zero_stage == 3
    held = shared + experts
    several = c.num_micro_batches > 1
    weights = sharded(3) * stack.weight_bytes
    if c.any_asynchronous:
        weights = weights + held * weight_copies(c, stages.index) * stack.weight_bytes
    gradients = np.where(full3 & several & stack.accumulates_whole, held, sharded(2)) * stack.grad_bytes
    optimizer = sharded(1) * stack.state_bytes
    kept, layer_input = saved_bytes(model, c, stack)
    checkpointed = (c.checkpointing == FULL) | (c.checkpointing == STREAM)
    share = np.where(checkpointed, 1.0 / c.checkpoint_every, 0.0)
    per_layer = share * np.where(c.offload, 0.0, layer_input) + (1 - share) * kept
    activations = stages.in_flight * stages.layers * per_layer
    chunks = np.where(c.checkpointing == STREAM, c.stream_chunks, 1)
    logits = stages.has_head * _loss_bytes(model, c, stack) / chunks
    # One layer at work: what is recomputed, and the gradients of its activations as they replace these.
    width = model.hidden_size + np.where(checkpointed, active_ffn(model) / c.tp, 0.0)
    work = (np.where(checkpointed, kept, 0.0) + 2.0 * c.tokens * width * stack.compute_bytes) / chunks
    layer_params = held / np.maximum(stages.layers, 1)
    gathered = np.where(full3, 2.0 * layer_params * (stack.gather_bytes + stack.reduce_bytes), 0.0)
    # Autocast forgets its casts as it ends, with each forward; the graph of a micro-batch in flight keeps its own.
    casts = np.where(full3, 0.0, held * stack.cast_bytes * np.where(checkpointed, 1.0, stages.in_flight))
    # The loss and a layer's backward take turns: the larger of the two counts.
    workspace = np.where(logits > work, 0.0, work)
    logits = np.where(logits > work, logits, 0.0)
    changing = activations + logits + workspace
    if stack.fresh_gradients:
        # With one micro-batch and no buckets, gradients grow as activations go. Buckets hold a copy besides the
        # gradients that earlier micro-batches made.
        buckets = (c.zero_stage == 0) & (d > 1) & (c.tp == 1)
        whole = several | buckets
        if c.any_asynchronous:
            # Not bucketed; and other micro-batches stay in flight beside an update's gradients.
            late = c.schedule != FLUSHED
            buckets, whole = buckets & ~late, whole | late
        gradients = gradients - np.minimum(gradients, changing) * ~whole
        gathered = gathered + np.where(buckets & several, held * stack.grad_bytes, 0.0)
    if stack.pipeline_buffers:
        buffered = (
            np.where(c.schedule == FLUSHED, c.num_micro_batches, 2) if c.any_asynchronous else c.num_micro_batches
        )
        gathered = gathered + np.where(c.pp > 1, 1.0 * buffered * layer_input, 0.0)
    workspace = workspace + gathered + casts + stack.allocator_waste * k.fragmentation * changing
    spread = np.hypot(k.memory_spread * changing, k.memory_spread_bytes if stack.launched else 0.02 * weights)
    reserve = k.reserve_bytes if stack.launched else 0.0
    if stack.attention == "flash1":
        reserve += k.flash1_bytes
    return Memory(
        weights,
        gradients,
        optimizer,
        activations,
        logits,
        workspace,
        reserve,
        cluster.device.memory_bytes,
        stages,
        spread,
    )
