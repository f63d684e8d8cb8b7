"""How many layers, and how much besides, the pipeline stages hold.

Three kinds of stage suffice for every worst case: the first (embedding, most micro-batches in flight), the second
(the largest share of layers among the middle ones, one micro-batch fewer), the last (head and loss). This is
`parallel.grid.layer_ranges` as closed forms over columns; a test compares the two.
"""

from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.asynchronous import asynchronous_in_flight
from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.inputs.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Stages:
    """Columns a kind of stage, [3, candidates]: first, second, last; absent kinds repeat the first."""

    index: Column
    layers: Column
    has_embedding: Column
    has_head: Column
    in_flight: Column
    """Layer inputs held at the peak, in micro-batches' worth of this stage's layers (a fraction with interleaving)."""
    waiting: Column
    """Micro-batches whose losses wait for their backward together on the last stage, [candidates]."""
    mean_between: Column
    """Layers of a stage between first and last, in the mean: what fill and drain pass through."""


def layers_of(
    num_layers: int, pp: Column, embedding_counts_as: Column, head_counts_as: Column
) -> tuple[Column, Column, Column]:
    """Layers of the first stage, of the largest between, and of the last."""
    base, extra = np.divmod(num_layers + embedding_counts_as + head_counts_as, pp)
    first = base + (extra > pp - 2) * (extra > 0) - embedding_counts_as
    return first, np.where(pp > 2, base + (extra > 0), first), np.where(pp > 1, base - head_counts_as, first)


def overshooting(model: ModelConfig, pp: Column) -> tuple[Column, Column, Column]:
    """`layers_of` where stages take layers until their share of all compute is passed, the head's share included."""
    head = model.head_params / (model.layers_params / model.num_layers)
    share = (model.num_layers + head) / pp
    first = np.minimum(np.floor(share + 1e-6) + 1, model.num_layers).astype(int)
    # The others share what is left; the last gives up what its head computes.
    second = np.ceil((model.num_layers + head - first) / np.maximum(pp - 1, 1) - 1e-6).astype(int)
    last = np.clip(model.num_layers - first - second * (pp - 2), 0, second)
    last = np.where(pp == 2, model.num_layers - first, last)
    whole = pp == 1
    return (
        np.where(whole, model.num_layers, first),
        np.where(pp > 2, second, np.where(whole, model.num_layers, first)),
        (np.where(whole, model.num_layers, last)),
    )


def ends_in_cut(num_layers: int, pp: int) -> tuple[int, int]:
    """(embedding_counts_as, head_counts_as) of a cut that leaves what is over to the first stages.

    Ours gives that to the middle stages; where the first gets one more as well, the embedding counts for nothing.
    """
    return int((num_layers + 2) % pp == 0), 1


def stages_of(model: ModelConfig, layouts: Candidates, *, overshoot: bool = False, few_at_once: bool = False) -> Stages:
    """The three kinds of stage of each candidate, under whichever schedule it has.

    Args:
        few_at_once: see Software.few_at_once.
    """
    pp, vp = layouts.pp, layouts.vp
    index = np.stack([np.zeros_like(pp), np.where(pp > 2, 1, 0), np.where(pp > 1, pp - 1, 0)])
    one_f_one_b = np.minimum(pp - index, layouts.num_micro_batches).astype(float)
    # Megatron's interleaved warm-up, plus the one in work, in chunks of 1/vp of the stage.
    chunks = (pp - index - 1) * 2 + (vp - 1) * pp + 1
    # Zero-bubble warms up half as long, and holds on to as much for weight gradients that it puts off: pp everywhere.
    chunks = np.where(layouts.zero_bubble, vp * pp, chunks)
    in_flight = np.where(vp > 1, np.minimum(chunks / vp, layouts.num_micro_batches), one_f_one_b)
    few = few_at_once & (vp == 1) & layouts.drains & (layouts.num_micro_batches < pp)
    waiting = np.where(few, layouts.num_micro_batches, 1)
    in_flight = np.maximum(in_flight, waiting)
    sizes = layers_of(model.num_layers, pp, layouts.embedding_counts_as, layouts.head_counts_as)
    first, between, last = overshooting(model, pp) if overshoot else sizes
    mean_between = np.where(pp > 2, (model.num_layers - first - last) / np.maximum(pp - 2, 1), between)
    return Stages(
        index=index,
        layers=np.stack([first, between, last]),
        has_embedding=index == 0,
        has_head=index == pp - 1,
        in_flight=asynchronous_in_flight(layouts, index, in_flight) if layouts.any_asynchronous else in_flight,
        waiting=waiting,
        mean_between=mean_between,
    )


def stage_params(model: ModelConfig, layouts: Candidates, stages: Stages) -> tuple[Column, Column]:
    """Parameters a rank holds of its stage: (all but routed experts, routed experts), before ZeRO."""
    moe = model.num_moe_layers / model.num_layers
    experts = moe * model.expert_params
    dense = model.layers_params / model.num_layers - experts
    # Norms are whole on every tp rank, matrices are cut.
    norms = model.layer_norm_params
    layer = (dense - norms) / layouts.tp + norms
    # A tied head is the embedding itself where both stand on one stage.
    tied = model.tied_embeddings & (layouts.pp == 1)
    ends = stages.has_embedding * (model.vocab_size / layouts.tp + model.learned_positions) * model.hidden_size
    ends = ends + stages.has_head * np.where(tied, 0.0, model.head_params / layouts.tp)
    ends = ends + stages.has_head * model.final_norm_params
    return stages.layers * layer + ends, stages.layers * experts / (layouts.tp * layouts.ep)
