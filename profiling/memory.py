"""The peak memory of a training step, found without the hardware.

torch's MemTracker watches every tensor that a step allocates; under FakeTensorMode the tensors have sizes and no
contents, so the step of a 70B model runs on a laptop, and FSDP2 runs on torch's fake process group as one rank of many.
This is the truth that the planner's closed form is compared with. What it cannot see: the allocator's rounding and
fragmentation, library workspaces, and communication buffers outside torch.

    python -m fourfold.profiling.memory config.json --micro-batch 1 --seq-len 4096 --checkpointing full
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold.profiling.decoder import CHECKPOINTING, local_model, summed_loss
from fourfold.profiling.shapes import read_config

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


class AllocationPeak:
    """Context: the most bytes of tensors alive at a time, in `bytes` afterwards.

    Counted are tensors made inside it, and the weights and positional inputs of modules called inside it.
    """

    bytes = 0

    def __enter__(self) -> "AllocationPeak":
        self._tracker = MemTracker()
        self._tracker.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bytes = sum(snapshot["Total"] for snapshot in self._tracker.get_tracker_snapshot("peak").values())
        self._tracker.__exit__(kind, error, traceback)


class OperatorCount(TorchDispatchMode):
    """Context: how many operators made a tensor, forward or backward, in `count`; views are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not (func.is_view or torch.Tag.inplace_view in func.tags)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """Bytes on one rank in the steady state of training (optimizer states exist).

    Attributes:
        weights_bytes, optimizer_bytes: held through the whole step; rotary frequencies count as weights.
        gradients_bytes: of all weights, held from the backward pass to the optimizer's step.
        peak_bytes: the most that is held at a time.
        peak_gradients_bytes, peak_activations_bytes: what of the peak is gradients, and what is the rest besides
            weights and optimizer: activations, logits, gathered weights, temporaries.
    """

    weights_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    peak_bytes: int
    peak_gradients_bytes: int
    peak_activations_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedStep:
    """The step whose memory is traced, as one rank takes it.

    Attributes:
        micro_batch, seq_len: sequences of a micro-batch, tokens of a sequence.
        num_micro_batches: 1, or 2 for any larger number: from the second on, all gradients are held. DDP's buckets
            hold them always, so 2 also stands for DDP.
        checkpointing: "none" or "full".
        tp: the rank's share of heads, MLP and vocabulary; the collectives' buffers are not part of it.
        num_layers: layers of the rank; None for the model's.
        zero_stage: 0, or 3 for FSDP2 over `dp` ranks.
        dtype: of matrix products; bfloat16 by autocast over fp32 weights (zero 0) or FSDP2's policy (zero 3).
    """

    micro_batch: int
    seq_len: int
    num_micro_batches: int = 1
    checkpointing: str = "none"
    tp: int = 1
    num_layers: int | None = None
    zero_stage: int = 0
    dp: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing={self.checkpointing!r}: choose one of {', '.join(CHECKPOINTING)}")
        if self.zero_stage not in (0, 3):
            raise ValueError(f"zero_stage={self.zero_stage}: 0 or 3")
        for name in ("micro_batch", "seq_len", "num_micro_batches", "dp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")


def step_memory(config: dict[str, Any], step: TracedStep) -> StepMemory:
    """Trace one AdamW step of a decoder with fake tensors, in the way that training runs it.

    Args:
        config: Hugging Face config of the Llama family.
    Raises:
        ValueError: a config of another family, or ZeRO 3 while torch.distributed is initialised.
    Cost: no tensor's memory; seconds for a small model, minutes for 32 layers.
    """
    num_layers = int(config.get("num_hidden_layers", 1)) if step.num_layers is None else step.num_layers
    sharded, mixed = step.zero_stage == 3, step.dtype != torch.float32
    with _fake_mesh(step.dp) if sharded else nullcontext() as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        model = _LossModel(local_model(config, tp=step.tp, num_layers=num_layers), step.checkpointing)
        if mesh is not None:
            _shard(model, mesh, step.dtype)
        # The steady state: optimizer states exist from the first step on, gradients from the second micro-batch on.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if step.num_micro_batches == 1:
            optimizer.zero_grad()
        # One micro-batch and the update, watched.
        tokens = torch.zeros(step.micro_batch, step.seq_len, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:  # type: ignore[no-untyped-call]
            with torch.autocast("cpu", step.dtype, enabled=mixed and not sharded):
                loss = model(tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            gradients = sum(_nbytes(parameter.grad) for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        weights = sum(_nbytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
        states = sum(_nbytes(value) for state in optimizer.state.values() for value in state.values())
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return StepMemory(
        weights_bytes=weights,
        optimizer_bytes=states,
        gradients_bytes=gradients,
        peak_bytes=peak["Total"],
        peak_gradients_bytes=peak[_MemRefType.GRAD],
        peak_activations_bytes=peak["Total"] - weights - states - peak[_MemRefType.GRAD],
    )


def _nbytes(tensor: Any) -> int:
    """Bytes of a tensor on this rank."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.nbytes)


class _LossModel(nn.Module):
    """The decoder with its loss in one forward pass: FSDP2 gathers what the root calls, and only there."""

    def __init__(self, decoder: Any, checkpointing: str) -> None:
        super().__init__()
        self.decoder, self.checkpointing = decoder, checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        return summed_loss(self.decoder, tokens, checkpointing=self.checkpointing)


def _shard(model: _LossModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 as training has it: one gather a layer, the rest with the root."""
    mixed = dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype if mixed else None, reduce_dtype=torch.float32 if mixed else None)
    for layer in model.decoder.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def _fake_mesh(world_size: int) -> Iterator[DeviceMesh]:
    """This process as rank 0 of `world_size` ranks whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("zero_stage=3 traces on a fake process group: call it where torch.distributed is not running")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fourfold.profiling.memory", description="Peak memory of one step.")
    parser.add_argument("config", type=Path, help="a Hugging Face config.json")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--num-micro-batches", type=int, default=1)
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--zero-stage", type=int, choices=(0, 3), default=0)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = vars(parser.parse_args())
    options["dtype"] = getattr(torch, options["dtype"])
    try:
        answer = step_memory(read_config(options.pop("config")), TracedStep(**options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(asdict(answer), indent=1))


if __name__ == "__main__":
    main()
