"""One training step under each kind of data parallelism: its gradients against one process, and its collectives."""

import copy
import os
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from fourfold.parallel import shard_batch, stream_backprop, token_logprobs, use_ring_attention
from fourfold.parallel.decoder.deepspeed_model import skip_shared_memory_operator
from fourfold.parallel.testing.compare import gradient_errors

KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "cp")
WHOLE = 64  # a chunk_size that holds the whole sequence
TOKENS = 33


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collectives that the step issues, by operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith("wait"):
            self.calls[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def make_model() -> nn.Module:
    """A Qwen3 of three layers, the same in every process."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None,
    )  # fmt: skip
    model: nn.Module = Qwen3ForCausalLM(config).train()
    return model


def step(kind: str, chunk_size: int, logprobs: bool = False) -> tuple[dict[str, float], dict[str, int]]:
    """Each gradient's relative L2 error against one plain process, and the collectives of the step by operator.

    Every rank of the world calls.

    Args:
        kind: of KINDS. For cp the ranks share one sequence, else each has its own.
        chunk_size: 0 for plain backpropagation.
        logprobs: the loss is a function of token_logprobs, not the model's own.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = 1 if kind == "cp" else world_size
    ids = torch.randint(0, 64, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    model = make_model()
    plain = copy.deepcopy(model)
    plain(input_ids=ids, labels=ids).loss.backward()
    if kind == "cp":
        use_ring_attention(model, None)
    if chunk_size:
        stream_backprop(model, chunk_size=chunk_size, mlp_chunk=3, logits_chunk=4)
    wrapped = wrap(model, kind)
    mine = shard_batch({"input_ids": ids, "labels": ids}, None) if kind == "cp" else _row(ids, rank)
    with CountCollectives() as count:
        loss = -token_logprobs(wrapped, **mine).sum() / (TOKENS - 1) if logprobs else wrapped(**mine).loss
        if kind.startswith("zero"):
            wrapped.backward(loss)
        else:
            loss.backward()
    return gradient_errors(whole_gradients(model, kind), gradients_of(plain)), dict(count.calls)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the parameters hold, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole_gradients(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The reduced gradient of each parameter by name, gathered where it is sharded; every rank of the world calls."""
    return {name: whole_gradient(p, kind) for name, p in model.named_parameters()}


def _row(ids: Tensor, rank: int) -> dict[str, Tensor]:
    return {"input_ids": ids[rank : rank + 1], "labels": ids[rank : rank + 1]}


def wrap(model: nn.Module, kind: str) -> Any:
    """The model as that library trains it; for cp the model as it is.

    Args:
        kind: of KINDS.
    """
    if kind == "cp":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        return fully_shard(model)
    return _deepspeed(model, stage=int(kind[-1]))


def _deepspeed(model: nn.Module, stage: int) -> Any:
    """DeepSpeed's engine, told to keep nothing gathered that it can gather again."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    skip_shared_memory_operator()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    zero = {
        "stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0,
    }  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def whole_gradient(parameter: nn.Parameter, kind: str) -> Tensor:
    """The reduced gradient of one parameter, gathered where it is sharded; every rank of the world calls."""
    if kind.startswith("zero"):
        from deepspeed.utils import safe_get_full_grad

        grad: Tensor = safe_get_full_grad(parameter)
        return grad
    assert parameter.grad is not None
    if kind == "cp":
        total = parameter.grad.clone()
        dist.all_reduce(total)
        return total
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
