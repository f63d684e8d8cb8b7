"""Seconds of communication of one micro-batch on one stage, an axis a function, and of one reduction of gradients."""

import numpy as np

from fourfold.layouts.cost.asynchronous import gathers
from fourfold.layouts.cost.candidates import Column
from fourfold.layouts.cost.layer import Times
from fourfold.layouts.cost.pricing import Pricing


def beyond_overlap(seconds: Column, hidden_by: Column, overlap: float) -> Column:
    """What stays visible of communication that up to `overlap` of the compute `hidden_by` can hide.

    A tenth of what may be hidden stays visible: the first bucket and the last.
    """
    return np.maximum(seconds - overlap * hidden_by, (1 - 0.9 * overlap) * seconds)


def tensor_parallel_seconds(pricing: Pricing, hidden_by: Times | None = None) -> Column:
    """Two all-reduces of [tokens, hidden] forward and two backward a layer (Shoeybi et al. 2019).

    With sequence parallelism each is an all-gather and a reduce-scatter; the input that backward gathers once more, for
    the weight gradient, hides behind the gradient of the input. Full checkpointing repeats the forward's.

    Args:
        hidden_by: the layer's compute, where collectives are cut into pieces and run beside the matmuls.
    """
    layouts, software, network = pricing.layouts, pricing.software, pricing.network
    size = 1.0 * layouts.tokens * pricing.model.hidden_size * software.compute_bytes
    tp, distance = layouts.tp, pricing.distance.tp
    reduce_s = network.collective_s("all_reduce", size, tp, distance)
    gather_s = network.collective_s("all_gather", size, tp, distance)
    scatter_s = network.collective_s("reduce_scatter", size, tp, distance)
    again = layouts.recomputed_share
    wait = (0.0 if pricing.cluster.measured else pricing.constants.sync_s) * np.log2(tp)
    each = np.where(layouts.sequence_parallel, gather_s + scatter_s, reduce_s) + wait
    whole = (4 + 2 * again) * each + _beside_pipeline_seconds(pricing, 4 * each)
    if not software.tp_overlap or hidden_by is None:
        return whole
    # Split into pieces, a collective hides behind the matmul that makes or takes its tensor.
    overlap = np.where(layouts.sequence_parallel, software.tp_overlap, 0.0)
    return np.maximum(
        whole - overlap * (hidden_by.forward * (1 + again) + hidden_by.backward), (1 - 0.9 * overlap) * whole
    )


def _beside_pipeline_seconds(pricing: Pricing, collectives: Column) -> Column:
    """What collectives over several nodes take longer in the stages of a pipeline, on some networks."""
    layouts, cluster = pricing.layouts, pricing.cluster
    outer = cluster.links[-1] if cluster.links else None
    if outer is None or outer.pipelined_share == 1.0:
        return np.zeros(len(layouts))
    crossing = (layouts.pp > 1) & (layouts.tp > cluster.devices_per_node)
    return np.where(crossing, (1.0 / outer.pipelined_share - 1.0) * collectives, 0.0)


def ring_seconds(pricing: Pricing, hidden_by: Times | None = None) -> Column:
    """Ring attention: cp-1 hops of k and v forward, of k, v, dk and dv backward; each hides behind one block.

    Args:
        hidden_by: seconds of the attention that hides the hops; None shows them whole.
    """
    layouts = pricing.layouts
    kv = 2.0 * layouts.tokens * pricing.model.kv_size / layouts.tp * pricing.software.compute_bytes
    ring = np.maximum(layouts.cp // layouts.cp_heads, 1)
    hop = pricing.network.send_s(kv, layouts.cp, pricing.distance.cp)
    forward = np.maximum(hop - (hidden_by.forward / ring if hidden_by else 0.0), 0.0)
    backward = np.maximum(2 * hop - (hidden_by.backward / ring if hidden_by else 0.0), 0.0)
    seconds: Column = (ring - 1) * ((1 + layouts.recomputed_share) * forward + backward)
    return seconds


def head_exchange_seconds(pricing: Pricing) -> Column:
    """Heads against sequence by all-to-all: q, k, v and the output once each way."""
    layouts, model = pricing.layouts, pricing.model
    heads_bytes = layouts.tokens * (2.0 * model.q_size + 2.0 * model.kv_size) / layouts.tp
    heads_bytes = heads_bytes * pricing.software.compute_bytes
    exchange = pricing.network.collective_s("all_to_all", heads_bytes, layouts.cp_heads, pricing.distance.cp)
    seconds: Column = (2 + layouts.recomputed_share) * exchange
    return seconds


def expert_seconds(pricing: Pricing) -> Column:
    """Tokens to their experts and back: two all-to-alls forward, two backward, in mixture-of-experts layers."""
    layouts, model = pricing.layouts, pricing.model
    if not model.num_moe_layers:
        return np.zeros(len(layouts))
    size = layouts.tokens * model.hidden_size * pricing.software.compute_bytes * float(model.experts_per_token)
    share = model.num_moe_layers / model.num_layers
    exchange = pricing.network.collective_s("all_to_all", size, layouts.ep, pricing.distance.cp)
    return share * (4 + 2 * layouts.recomputed_share) * exchange


def pipeline_seconds(pricing: Pricing) -> Column:
    """A stage sends its output on and its input's gradient back, for each of its vp chunks."""
    layouts, software = pricing.layouts, pricing.software
    size = 1.0 * layouts.tokens * pricing.model.hidden_size * pricing.hidden_bytes
    pieces = np.where(layouts.sequence_parallel | software.pp_scatter, layouts.tp, 1)
    send = pricing.network.send_s(size / pieces, layouts.pp, pricing.distance.pp)
    return np.where(layouts.pp > 1, 2.0 * layouts.vp * send, 0.0)


def tied_ends_seconds(pricing: Pricing) -> Column:
    """Once a step, the first and the last stage exchange gradients of an embedding that is the head's weight too.

    It comes after both have been reduced, with nothing to hide behind, and every stage waits for the two. Where ZeRO
    shards optimizer states, a shard each. Activations are gone by then: its buffer is not at the peak.
    """
    layouts, model = pricing.layouts, pricing.model
    if not model.tied_embeddings or not pricing.software.tied_ends:
        return np.zeros(len(layouts))
    size = model.vocab_size * model.hidden_size / layouts.tp * pricing.software.grad_bytes
    size = size / np.where(layouts.zero_stage >= 1, layouts.shards, 1)
    seconds = pricing.network.send_s(size, layouts.pp, pricing.distance.pp)  # over nodes where the pipeline is
    return np.where(layouts.drains, seconds, 0.0)


def reduction_seconds(pricing: Pricing, backward: Column) -> Column:
    """Gradient reduction and weight gathering of a step that compute could not hide; [3, candidates].

    ZeRO 0: one all-reduce of the gradients. 1 and 2: reduce-scatter, then all-gather of the updated weights. 3: each
    layer's weights are gathered for every forward and again for every backward of a micro-batch. The last
    micro-batch's backward runs while gradients are reduced; the first one's forward, while weights are gathered.

    Args:
        backward: seconds of one micro-batch's backward, which hide the reduction.
    """
    layouts, software = pricing.layouts, pricing.software
    forward, overlap = backward / 2, software.dp_overlap
    reduce_s = _over_replicas(pricing, "all_reduce", software.reduce_bytes)
    scatter_s = _over_replicas(pricing, "reduce_scatter", software.reduce_bytes)
    gather_s = _over_replicas(pricing, "all_gather", software.gather_bytes)
    zero0 = beyond_overlap(reduce_s, backward, overlap)
    sharded_overlap = overlap * software.sharded_overlap
    scattered = beyond_overlap(scatter_s, backward, sharded_overlap)
    pieces_s = software.piece_s * pricing.stages.layers * layouts.shards
    zero12 = (
        scattered + beyond_overlap(gather_s, forward, sharded_overlap) + np.where(layouts.shards > 1, pieces_s, 0.0)
    )
    each_micro_batch = beyond_overlap(2 * gather_s, forward + backward, software.zero3_overlap)
    # Reduced once a step, or after every micro-batch's backward.
    reductions = np.where(layouts.sharded_accumulation, layouts.num_micro_batches, 1)
    zero3 = layouts.num_micro_batches * each_micro_batch + reductions * scattered
    return np.select([layouts.zero_stage == 0, layouts.zero_stage == 3], [zero0, zero3], zero12)


def asynchronous_update_seconds(pricing: Pricing) -> Column:
    """Gradient reduction and weight gathering of one update of a pipeline that never drains; [3, candidates].

    An all-reduce of the gradients; where optimizer states are sharded, also each version of the weights that is not
    there is gathered, as wide as it is stored. Nothing hides either.
    """
    layouts = pricing.layouts
    reduce_s = _over_replicas(pricing, "all_reduce", pricing.software.reduce_bytes)
    if not (layouts.zero_stage == 1).any():
        return reduce_s
    gather_s = _over_replicas(pricing, "all_gather", pricing.software.weight_bytes)
    return reduce_s + np.where(layouts.zero_stage == 1, gathers(layouts, pricing.stages.index) * gather_s, 0.0)


def _over_replicas(pricing: Pricing, operation: str, itemsize: float) -> Column:
    """A collective over the ranks that hold the same weights: dp x cp, and for experts as many less as ep."""
    layouts, network, distance = pricing.layouts, pricing.reduction_network, pricing.distance
    # The dp x cp group: cp neighbours stand next to each other, dp replicas at dp's distance.
    inside = network.ranks_in_node(layouts.cp, distance.cp) * network.ranks_in_node(layouts.dp, distance.dp)
    apart = np.maximum(network.cluster.devices_per_node // inside, 1)
    apart = np.where(inside >= layouts.shards, 1, apart)
    expert_shards = np.maximum(layouts.shards // layouts.ep, 1)
    return np.stack(
        [
            network.collective_s(operation, shared * itemsize, layouts.shards, apart)
            + network.collective_s(operation, experts * itemsize, expert_shards, apart)
            for shared, experts in zip(*pricing.held_params, strict=True)
        ]
    )
