"""Small pipelines for the tests: uneven stages, a stage without parameters, dropout, checkpointing."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    """A block with a skip, so that an input has several users whose gradients add up."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Checkpointed(nn.Module):
    """Recomputes its inner module in the backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def stages(num_stages: int, *, dropout: float = 0.0, matrices_only: bool = False) -> list[nn.Module]:
    """`num_stages` uneven stages with the same weights in every process."""
    torch.manual_seed(11)
    if matrices_only:
        return [nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()) for _ in range(num_stages - 1)] + [
            nn.Linear(6, 3, bias=False)
        ]
    parts: list[nn.Module] = [
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), Residual(8, 12)),
        nn.Sequential(nn.ReLU(), nn.Dropout(dropout)),
        nn.Sequential(nn.Linear(8, 5), Checkpointed(Residual(5, 4)), Residual(5, 9)),
        nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)),
    ]
    if num_stages == 1:
        return [nn.Sequential(*parts)]
    merged = [nn.Sequential(*parts[: 5 - num_stages]), *parts[5 - num_stages :]]
    return merged if num_stages > 2 else [nn.Sequential(*parts[:3]), parts[3]]


def batches(count: int, *, size: int = 3, seed: int = 5, last: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """`count` micro-batches of `size` samples, the last one of `last`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [last or size]
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def small_llama() -> Any:
    """A Llama of four layers, the same one at each call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def replicas() -> tuple[dist.ProcessGroup, dist.ProcessGroup, int, int]:
    """2 replicas x 2 stages: this rank's pipeline, its stage's replicas, its replica and its stage."""
    pipelines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    peers = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    replica, stage = divmod(dist.get_rank(), 2)
    return pipelines[replica], peers[stage], replica, stage


def assert_unlike_replica_is_named(messages: Sequence[str]) -> None:
    """Of each rank of 2 stages in 2 replicas, whose second has other weights: it is refused, and by its rank."""
    for rank, message in enumerate(messages):
        assert f"of rank {2 + rank % 2} is not that of rank {rank % 2}" in message, f"rank {rank}"
