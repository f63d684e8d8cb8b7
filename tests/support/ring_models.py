"""Tiny models around the ring against the same model whole, on the ranks of a pool."""

from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from fourfold.parallel import shard_batch, stream_backprop, use_ring_attention
from fourfold.parallel.testing.compare import gradient_errors, gradients

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager", "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 256,
}  # fmt: skip
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": 24,
}  # fmt: skip


def tiny_model(family: str, **options: Any) -> nn.Module:
    """A model with weights that are the same everywhere, in fp32."""
    torch.manual_seed(1)
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**{**SIZES, **options})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def tiny_batch(rows: int = 2, seq_len: int = 45, seed: int = 3) -> dict[str, Tensor]:
    """Token ids and labels, of which the first five of a row are masked."""
    ids = torch.randint(1, 64, (rows, seq_len), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def ring_errors(
    model: tuple[str, dict[str, Any]],
    batch: dict[str, Any],
    truth: dict[str, Any],
    *,
    streams: bool = False,
    extra: dict[str, Any] | None = None,
    sharding: str = "zigzag",
) -> dict[str, float]:
    """Errors of the loss and of each gradient around the ring of all ranks, relative to one process.

    Args:
        model: what tiny_model takes.
        batch: what shard_batch is given. truth: what the whole model is given for the same loss.
        streams: call stream_backprop too.
        extra: arguments of both calls.
    """
    family, options = model
    whole = tiny_model(family, **options)
    expected_loss = whole(**truth, use_cache=False, **(extra or {})).loss
    expected = gradients(whole, expected_loss)
    ringed = tiny_model(family, **options)
    use_ring_attention(ringed, None, sharding=sharding)
    if streams:
        stream_backprop(ringed, chunk_size=6, mlp_chunk=4, logits_chunk=5)
    loss = ringed(**shard_batch(batch, None, sharding=sharding), **(extra or {})).loss
    found = {name: summed(gradient) for name, gradient in gradients(ringed, loss).items()}
    errors = {f"gradient of {name}": error for name, error in gradient_errors(found, expected).items()}
    return errors | {"loss": float(abs(summed(loss) - expected_loss.detach()) / expected_loss.detach())}


def summed(value: Tensor) -> Tensor:
    """Over all ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def complaint(action: Any, *args: Any, **kwargs: Any) -> str:
    """What a ValueError says, or "accepted"."""
    try:
        action(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "accepted"
