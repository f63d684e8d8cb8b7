"""What a replica of an asynchronous stage owns of its weights where optimizer states are sharded (ZeRO 1).

FSDP cuts every tensor into equal parts. There replicas own whole tensors, spread by size (pipeline.partition.owners),
so that every optimizer and every answer to delay works on them; who has the largest share sets memory and time. With
few layers a stage, or a large embedding, that is more than the replicas' part of the whole.
"""

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.parallel.pipeline.partition import owners


def owns_a_share(layouts: Candidates) -> Column:
    """Which layouts shard optimizer states by whole tensors."""
    shares: Column = ~layouts.drains & (layouts.zero_stage == 1) & (layouts.shards > 1)
    return shares


def owned_params(pricing: Pricing) -> Column:
    """Parameters of the largest share of each kind of stage, all of them where they are not shared; [3, candidates].

    A decoder whose layers are of another kind than attention and one feed-forward block (mixtures of experts, latent
    or linear attention) counts as spread evenly, but for its embedding and head.
    """
    layouts, stages = pricing.layouts, pricing.stages
    shared, experts = pricing.held_params
    held = shared + experts
    found = np.array(np.broadcast_to(held, (3, len(layouts))), dtype=float)
    rows = owns_a_share(layouts)
    if not rows.any():
        return found
    # Each stage of a kind, cut into as many shares, once.
    kinds = np.stack([np.broadcast_to(each, found.shape)[:, rows].ravel()
                      for each in (stages.layers, stages.has_embedding, stages.has_head, layouts.shards)])  # fmt: skip
    unique, places = np.unique(kinds.astype(int), axis=1, return_inverse=True)
    largest = [
        largest_share(pricing.model, layers, (bool(embedding), bool(head)), shards)
        for layers, embedding, head, shards in unique.T.tolist()
    ]
    found[:, rows] = np.array(largest, dtype=float)[places.ravel()].reshape(3, -1)
    return found


def largest_share(model: ModelConfig, num_layers: int, ends: tuple[bool, bool], num_replicas: int) -> int:
    """Parameters of the largest share of a stage.

    Args:
        ends: whether it has the embedding, and the last norm and the head.
    """
    has_embedding, has_head = ends
    sizes = [model.embedding_params] * has_embedding + [model.head_params, model.final_norm_params] * has_head
    if model.num_moe_layers or model.latent is not None or model.linear is not None:
        layers = num_layers * model.layers_params // model.num_layers
        return max([-(-(layers + sum(sizes)) // num_replicas), *sizes])
    sizes += num_layers * layer_tensors(model)
    loads = [0] * num_replicas
    for size, owner in zip(sizes, owners(sizes, num_replicas), strict=True):
        loads[owner] += size
    return max(loads)


def layer_tensors(model: ModelConfig) -> list[int]:
    """Parameters of each tensor of a layer of attention and one feed-forward block."""
    hidden, queries = model.hidden_size, model.q_size * (2 if model.output_gate else 1)
    sizes = [hidden * queries, hidden * model.kv_size, hidden * model.kv_size, model.q_size * hidden]
    sizes += [queries, model.kv_size, model.kv_size] * model.qkv_bias + [hidden] * model.out_bias
    sizes += [hidden * model.ffn_size] * (3 if model.gated_mlp else 2)
    sizes += ([model.ffn_size] * (2 if model.gated_mlp else 1) + [hidden]) * model.mlp_bias
    sizes += [hidden] * (model.norms_per_layer * model.norm_params) + [model.num_heads] * model.attention_sinks
    if model.qk_norm:
        widths = (model.q_size, model.kv_size) if model.qk_norm_over_heads else (model.head_dim, model.head_dim)
        sizes += [width for width in widths for _ in range(model.norm_params)]
    return sizes
