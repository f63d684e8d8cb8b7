"""Peak memory of a rank, stage by stage: what the allocator holds, and what lies outside it.

Weights, gradients and optimizer states are exact from the parameter counts; activations are counted operator by
operator (`layer.saved_bytes`) times the micro-batches in flight; on top come the logits of the loss, one layer's work
space, and communication buffers. The true peak scatters about this: a layout has a probability of fitting, no verdict.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.asynchronous import weight_copies
from fourfold.layouts.cost.candidates import STREAM, Column, kinds_of
from fourfold.layouts.cost.layer import active_ffn, output_gradient_bytes, saved_bytes
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.shares import owned_params, owns_a_share
from fourfold.layouts.cost.stages import Stages
from fourfold.layouts.cost.streamed import Pieces, pieces_of, shape_of
from fourfold.parallel.decoder.limits import may_stream_head
from fourfold.parallel.stream.work_space import PieceSizes, Work, loss_bytes, streams_loss

SCORES_SPREAD = 0.2
"""`memory_spread` where an attention kernel stores its scores: what it holds while it works is not counted."""


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
    waste: Column
    """What the allocator loses between tensors, as far as it is not in the parts."""

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
        """Capacity less reserve, peak and waste; below zero does not fit."""
        lost = np.take_along_axis(np.broadcast_to(self.waste, self.by_stage.shape), self.worst_stage[None], 0)[0]
        return self.capacity - self.reserve - self.peak - lost

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


def memory_of(pricing: Pricing) -> Memory:
    """Peak memory of the kinds of stage of every candidate."""
    software, constants = pricing.software, pricing.constants
    changing = _changing(pricing)
    gradients, buckets = _gradients(pricing, changing.total)
    # Work space besides one layer's: weights gathered, casts, copies in buckets and buffers, and allocator waste.
    workspace = changing.workspace + (_gathered(pricing) + buckets + _pipeline_buffers(pricing))
    workspace = workspace + _casts(pricing, changing)
    workspace = workspace + (_held(pricing) * software.bucket_bytes + software.extra_peak_bytes)
    waste = software.allocator_waste * constants.fragmentation * changing.total
    if not software.peak_of_tensors:
        workspace = workspace + waste
    weights = _weights(pricing)
    parts = {
        "weights": weights, "gradients": gradients, "optimizer": _states(pricing) * software.state_bytes,
        "activations": changing.activations, "logits": changing.logits, "workspace": workspace,
    }  # fmt: skip
    # Where the scatter of its own peaks is known, it counts whole; else what comes and goes has the constants' scatter.
    unchanging = constants.memory_spread_bytes if software.launched else 0.02 * weights
    share = SCORES_SPREAD if software.attention in ("eager", "fused") else constants.memory_spread
    scatter: Column = share * changing.total
    if software.memory_spread:
        scatter = software.memory_spread * sum(parts.values())
    return Memory(
        **parts,
        waste=waste if software.peak_of_tensors else np.zeros_like(waste),
        reserve=_reserve(pricing),
        capacity=pricing.cluster.device.memory_bytes,
        stages=pricing.stages,
        spread=np.hypot(scatter, unchanging),
    )


def _sharded(pricing: Pricing, from_stage: int) -> Column:
    """Parameters a rank holds of what ZeRO shards from this stage on."""
    layouts = pricing.layouts
    shared, experts = pricing.held_params
    expert_shards = np.maximum(layouts.shards // layouts.ep, 1)
    yes = layouts.zero_stage >= from_stage
    return shared / np.where(yes, layouts.shards, 1) + experts / np.where(yes, expert_shards, 1)


def _states(pricing: Pricing) -> Column:
    """Parameters whose optimizer states a rank holds."""
    even = _sharded(pricing, 1)
    whole_tensors = owns_a_share(pricing.layouts)
    return np.where(whole_tensors, owned_params(pricing), even) if whole_tensors.any() else even


def _held(pricing: Pricing) -> Column:
    shared, experts = pricing.held_params
    return shared + experts


def _weights(pricing: Pricing) -> Column:
    layouts, itemsize = pricing.layouts, pricing.software.weight_bytes
    weights = _sharded(pricing, 3) * itemsize
    if pricing.software.gathers_below_zero3:
        # Shards that are trained, and what a step gathers of them.
        below = ((layouts.zero_stage == 1) | (layouts.zero_stage == 2)) & layouts.drains
        gathered = _sharded(pricing, 1) * itemsize + _held(pricing) * pricing.software.gather_bytes
        weights = np.where(below, gathered, weights)
    if layouts.any_asynchronous:
        held = _held(pricing)
        share = np.where(owns_a_share(layouts), _states(pricing) / held, 1.0)
        weights = weights + held * weight_copies(layouts, pricing.stages.index, share) * itemsize
    return weights


@dataclass(frozen=True, slots=True)
class _Changing:
    """What comes and goes within a step: activations, the loss, one layer at work."""

    activations: Column
    logits: Column
    workspace: Column

    @property
    def total(self) -> Column:
        return self.activations + self.logits + self.workspace


def pieces_in(pricing: Pricing) -> Pieces:
    """What each layout's streamed layers are cut into, given what weights, gradients and states leave of a device."""
    capacity = pricing.cluster.device.memory_bytes - _reserve(pricing)
    if not (pricing.layouts.checkpointing == STREAM).any():
        return pieces_of(pricing, np.full(len(pricing.layouts), capacity))
    software, (_, layer_input) = pricing.software, saved_bytes(pricing)
    held = _weights(pricing) + _states(pricing) * software.state_bytes + _sharded(pricing, 2) * software.grad_bytes
    # Other micro-batches in flight hold their layers' inputs on the device, unless these wait in host memory.
    others = np.maximum(pricing.stages.in_flight - 1, 0) * pricing.stages.layers * layer_input
    held = held + np.where(pricing.layouts.offload, 0.0, others)
    return pieces_of(pricing, np.broadcast_to(capacity - held, (3, len(pricing.layouts))).min(axis=0))


def _reserve(pricing: Pricing) -> float:
    measured = pricing.cluster.device.reserve_bytes
    reserve = pricing.constants.reserve_bytes if measured is None else measured
    return (reserve if pricing.software.launched else 0.0) + pricing.software.extra_reserve_bytes


def host_bytes(pricing: Pricing) -> Column:
    """What a rank of each layout pins in host memory: the inputs of its layers, where these are offloaded."""
    held = pricing.stages.in_flight * pricing.stages.layers * saved_bytes(pricing)[1]
    return np.where(pricing.layouts.offload, held.max(axis=0), 0.0)


def _changing(pricing: Pricing) -> _Changing:
    model, layouts, software, stages = pricing.model, pricing.layouts, pricing.software, pricing.stages
    kept, layer_input = saved_bytes(pricing)
    # Of the layers, a share is checkpointed and keeps its input; the others keep everything.
    share = layouts.recomputed_share
    checkpointed = share > 0
    per_layer = share * np.where(layouts.offload, 0.0, layer_input) + (1 - share) * kept
    activations = stages.in_flight * stages.layers * per_layer
    # Of offloaded ones two are on the device, one of them on its way.
    activations = activations + np.where(layouts.offload, np.minimum(stages.layers, 2) * layer_input, 0.0)
    if layouts.zero_bubble.any():
        # Weight gradients that are put off, of as many of a stage's vp runs as the rank's number, and the one at work.
        put_off = np.where(layouts.zero_bubble, (stages.index + 1) / layouts.vp, 0.0)
        activations = activations + put_off * stages.layers * output_gradient_bytes(pricing)
    pieces = pieces_in(pricing)
    chunks = np.where(pieces.groups > 0, layouts.stream_chunks, pieces.chunks)
    loss = _loss_bytes(pricing) / chunks
    streams = layouts.checkpointing == STREAM
    if streams.any():  # whose head holds some tiles of logits at most, however few chunks the layers have
        loss = np.where(streams, np.minimum(loss, _streamed_loss_bytes(pricing)), loss)
    if software.streams_head:
        # As DecoderStage.gives_loss chooses where the layers do not stream.
        head = may_stream_head(layouts.tp, layouts.schedule) & ~streams
        head &= streams_loss(layouts.tokens, model.hidden_size, model.vocab_size, pricing.cluster.device.type)
        loss = np.where(head, _head_loss_bytes(pricing), loss * stages.waiting)
    logits = stages.has_head * loss
    # One layer at work: what is recomputed, and the gradients of its activations as they replace these.
    width = model.hidden_size * pricing.hidden_bytes
    width = width + np.where(checkpointed, active_ffn(model) / layouts.tp, 0.0) * software.compute_bytes
    work = (np.where(checkpointed, kept, 0.0) + 2.0 * layouts.tokens * width) / chunks
    work = np.where(pieces.layer_bytes > 0, pieces.layer_bytes, work)
    # The loss and a layer's backward take turns: the larger of the two counts.
    return _Changing(activations, np.where(logits > work, logits, 0.0), np.where(logits > work, 0.0, work))


def _loss_bytes(pricing: Pricing) -> Column:
    """Logits, their softmax and gradient, and what the final norm keeps, of one micro-batch."""
    model, layouts, software = pricing.model, pricing.layouts, pricing.software
    entries = layouts.tokens * (model.vocab_size / layouts.tp if software.logits_sharded else model.vocab_size)
    # Gathering shards over tp holds the pieces and their concatenation for a moment.
    gather = 0.0 if software.logits_sharded else np.where(layouts.tp > 1, 2.0 * software.compute_bytes, 0.0)
    # The layers alone are compiled, and their norms fused with them.
    norm_kept = 0 if software.fused_norm and not software.compiled else software.norm_kept_bytes
    norm = layouts.tokens * model.hidden_size * (pricing.hidden_bytes + software.compute_bytes + norm_kept)
    return entries * (software.logits_bytes + gather) + norm


def _streamed_loss_bytes(pricing: Pricing) -> Column:
    """What StreamBP's head holds beside the layers' inputs: the last hidden states, their gradient, some logits.

    By the closed form of the runtime's own streaming.
    """
    software, device = pricing.software, pricing.cluster.device.type
    whole = PieceSizes(groups=0, chunk=1, mlp_chunk=1)  # of layers, which are not asked for here
    work = Work(shape=shape_of(pricing.model), sizes=whole, batch=1, itemsize=software.compute_bytes, keeps=False)

    def held(tokens: int) -> float:
        a_token, fixed = work.head(tokens, "auto", device, wide_sums=software.weight_bytes < 4)
        return tokens * a_token + fixed

    return _of_each(held, pricing.layouts.tokens)


def _head_loss_bytes(pricing: Pricing) -> Column:
    """What a head holds that alone is streamed, by the runtime's closed form."""
    shape, itemsize, kind = shape_of(pricing.model), pricing.software.compute_bytes, pricing.cluster.device.type

    def held(tokens: int, wide: int, waiting: int) -> float:
        return loss_bytes(tokens, shape, itemsize, kind, hidden_itemsize=wide, waiting=waiting)

    return _of_each(held, pricing.layouts.tokens, pricing.hidden_bytes, pricing.stages.waiting)


def _of_each(held: Callable[..., float], *columns: Column) -> Column:
    """`held` of each candidate's values, whole numbers, asked once for every combination that occurs."""
    firsts, places = kinds_of(*columns)
    kinds = zip(*(column[firsts].astype(int).tolist() for column in columns), strict=True)
    column: Column = np.array([held(*kind) for kind in kinds])[places]
    return column


def _gradients(pricing: Pricing, changing: Column) -> tuple[Column, Column]:
    """Gradients at the peak, and the copy of them in the buckets of data parallelism."""
    layouts, software, held = pricing.layouts, pricing.software, _held(pricing)
    several = layouts.num_micro_batches > 1
    whole_between = (layouts.zero_stage == 3) & several & software.accumulates_whole & ~layouts.sharded_accumulation
    gradients = np.where(whole_between, held, _sharded(pricing, 2)) * software.grad_bytes
    if not software.fresh_gradients:
        return gradients, np.zeros_like(gradients)
    # With one micro-batch and no buckets, gradients grow as activations go. Buckets hold a copy besides the
    # gradients that earlier micro-batches made.
    buckets = (layouts.zero_stage == 0) & (layouts.shards > 1) & (layouts.tp == 1)
    whole = several | buckets
    if layouts.any_asynchronous:
        # Not bucketed; and other micro-batches stay in flight beside an update's gradients.
        late = ~layouts.drains
        buckets, whole = buckets & ~late, whole | late
    gradients = gradients - np.minimum(gradients, changing) * ~whole
    return gradients, np.where(buckets & several, held * software.grad_bytes, 0.0)


def _gathered(pricing: Pricing) -> Column:
    """ZeRO 3: weights and gradients of two layers, one in use and one on its way."""
    software = pricing.software
    layer_params = _held(pricing) / np.maximum(pricing.stages.layers, 1)
    each = 2.0 * layer_params * (software.gather_bytes + software.reduce_bytes)
    return np.where(pricing.layouts.zero_stage == 3, each, 0.0)


def _casts(pricing: Pricing, changing: _Changing) -> Column:
    """Low-precision copies of the weights that autocast makes, at the peak.

    It forgets them as each forward ends. The graph of a micro-batch in flight keeps its own, of checkpointed layers
    none: then the head's alone is there beside the loss, or one layer's beside its backward. All of them are there at
    the end of the forward, when of the loss there are no more than low-precision logits; not of layers that stream.
    """
    software, stages = pricing.software, pricing.stages
    if not software.cast_bytes:
        return np.zeros_like(changing.total)
    every = _held(pricing) * software.cast_bytes
    head = pricing.model.head_params / pricing.layouts.tp * software.cast_bytes
    one = np.where(changing.logits > 0, head, every / np.maximum(stages.layers, 1))
    streams = pricing.layouts.checkpointing == STREAM  # whose layers let go of them one by one
    late = changing.logits + changing.workspace - changing.logits * (software.compute_bytes / software.logits_bytes)
    checkpointed = np.maximum(np.minimum(one, every), np.where(streams, 0.0, every - late))
    share = pricing.layouts.recomputed_share
    casts = share * checkpointed + (1 - share) * every * stages.in_flight
    return np.where(pricing.sharded_weights, 0.0, casts)  # what is gathered is cast already


def _pipeline_buffers(pricing: Pricing) -> Column:
    """Receive buffers of a rank, where the runtime makes one for every micro-batch of the step and each of its stages.

    The model's first stage receives no hidden states, its last no gradients. Interleaved stages also hold on to all
    that they have sent, as much again, until the step ends.
    """
    layouts, stages = pricing.layouts, pricing.stages
    if not pricing.software.pipeline_buffers:
        return np.zeros(len(layouts))
    received = 2 * layouts.vp - stages.has_embedding - stages.has_head
    buffered = layouts.num_micro_batches * received * np.where(layouts.vp > 1, 2, 1)
    if layouts.any_asynchronous:
        buffered = np.where(layouts.drains, buffered, 2)
    return np.where(layouts.pp > 1, 1.0 * buffered * saved_bytes(pricing)[1], 0.0)
