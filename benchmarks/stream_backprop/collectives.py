"""Collectives of one training step by kind of data parallelism: as many for many chunks as for one.

    PYTHONPATH=src python -m benchmarks.stream_backprop.collectives                   # two gloo ranks, a minute

Every row also compares the gradients, summed or averaged by that library, with plain backpropagation of one process.
"""

import argparse
import copy
import importlib
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.rows import measurement, write_rows
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from fourfold.parallel import shard_batch, stream_backprop, token_logprobs, use_ring_attention

KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "cp")
WHOLE = 64  # a chunk_size that holds the whole sequence
CHUNK_SIZES = (0, WHOLE, 5)  # 0: plain backpropagation
TOKENS = 33


class CountCollectives(TorchDispatchMode):
    """Collectives that the step issues, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith("wait"):
            self.calls[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None,
    )  # fmt: skip
    model: nn.Module = Qwen3ForCausalLM(config).train()
    return model


def step(kind: str, chunk_size: int, logprobs: bool = False) -> tuple[float, dict[str, int]]:
    """(worst relative L2 error of a gradient against one plain process, collectives of the step).

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
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    worst = max(float((whole_gradient(p, kind) - q.grad).norm() / q.grad.norm()) for p, q in pairs)
    return worst, dict(count.calls)


def _row(ids: Tensor, rank: int) -> dict[str, Tensor]:
    return {"input_ids": ids[rank : rank + 1], "labels": ids[rank : rank + 1]}


def wrap(model: nn.Module, kind: str) -> Any:
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

    # On CPU it would first compile a shared-memory operator, for minutes.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "collectives.csv")
    arguments = parser.parse_args()
    rendezvous = os.path.join(tempfile.mkdtemp(), "rendezvous")
    mp.spawn(_rank, (rendezvous, arguments.kinds, arguments.out), nprocs=2)  # type: ignore[no-untyped-call]


def _rank(rank: int, rendezvous: str, kinds: list[str], out: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    rows = []
    lines = ["| | chunks | collectives of a step | worst gradient error |", "|---|---|---|---|"]
    for kind in kinds:
        for chunk_size in CHUNK_SIZES:
            worst, calls = step(kind, chunk_size)
            case = f"kind={kind} chunks={_words(chunk_size)}"
            rows += [
                measurement(
                    benchmark="stream_collectives", provider="ours" if chunk_size else "plain", case=case,
                    metric=metric, unit="", samples=[value], kind="cpu", world_size=2,
                )
                for metric, value in [("gradient_error", worst), ("collectives", sum(calls.values()))]
            ]  # fmt: skip
            counts = ", ".join(f"{number} {name}" for name, number in sorted(calls.items()))
            lines.append(f"| {kind} | {_words(chunk_size)} | {counts} | {worst:.1e} |")
    if rank == 0:
        write_rows(out, rows)
        print("\n".join(lines))
    dist.destroy_process_group()


def _words(chunk_size: int) -> str:
    return f"{-(-TOKENS // chunk_size)}" if chunk_size else "plain"


if __name__ == "__main__":
    main()
