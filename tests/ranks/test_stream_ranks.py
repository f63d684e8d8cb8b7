"""StreamBP under data parallelism: one process's gradients, and as many collectives for many chunks as for one."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from fourfold.parallel import stream_backprop, token_logprobs

# Sums over ranks in another order than one process's: fp32 roundings.
TOLERANCE = 2e-6


class CountCollectives(TorchDispatchMode):
    """Collectives that the step issues, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith("wait"):
            self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train()


def make_ids(world_size: int) -> Tensor:
    return torch.randint(0, 64, (world_size, 33), generator=torch.Generator().manual_seed(1))


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def full(grad: Tensor) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def stream_step(kind: str, chunk_size: int, logprobs: bool) -> tuple[float, dict[str, int]]:
    """(worst relative error of a gradient against one plain process, collectives of the step)."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, ids = make_model(), make_ids(world_size)
    plain = copy.deepcopy(model)
    plain(input_ids=ids, labels=ids).loss.backward()
    streaming = wrapped(stream_backprop(model, chunk_size=chunk_size, mlp_chunk=3, logits_chunk=4), kind)
    mine = ids[rank : rank + 1]
    with CountCollectives() as count:
        if logprobs:
            loss = -token_logprobs(streaming, mine, mine).sum() / (ids.shape[1] - 1)
        else:
            loss = streaming(input_ids=mine, labels=mine).loss
        loss.backward()
    worst = 0.0
    for (_, parameter), (_, exact) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        difference = full(parameter.grad) - exact.grad
        worst = max(worst, float(difference.norm() / exact.grad.norm()))
    return worst, dict(count.calls)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_one_processes_and_collectives_do_not_count_chunks(ranks, kind):
    counts = []
    for chunk_size, logprobs in ((64, False), (5, False), (5, True)):
        for worst, calls in ranks(2)(stream_step, kind, chunk_size, logprobs):
            assert worst <= TOLERANCE
            counts.append(calls)
    assert all(calls == counts[0] for calls in counts)
    assert counts[0]


def micro_batches(kind: str) -> float:
    """Worst relative error after two micro-batches, the first of them unreduced: the second adds to its gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, ids = make_model(), make_ids(world_size)
    plain = copy.deepcopy(model)
    plain(input_ids=ids, labels=ids).loss.backward()
    streaming = wrapped(stream_backprop(model, chunk_size=5, mlp_chunk=3, logits_chunk=4), kind)
    mine = ids[rank : rank + 1]
    for last in (False, True):
        if kind == "ddp":
            streaming.require_backward_grad_sync = last
        else:
            streaming.set_requires_gradient_sync(last)
        streaming(input_ids=mine, labels=mine).loss.backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max(float((full(p.grad) / 2 - exact.grad).norm() / exact.grad.norm()) for p, exact in pairs)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_micro_batches_accumulate_before_they_are_reduced(ranks, kind):
    assert max(ranks(2)(micro_batches, kind)) <= TOLERANCE
