"""A decoder whose gradients, shards and updates are DeepSpeed's, behind the calls of a ParallelModel.

DeepSpeed averages gradients over ranks, clips them and updates in one call. Here it is handed each micro-batch's sum of
losses over the targets of the global batch, times the number of ranks: what it averages is then the gradient that every
other layout has.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, cast
from warnings import filterwarnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from fourfold.parallel.decoder.batch import LocalRows
from fourfold.parallel.decoder.limits import Choice
from fourfold.parallel.decoder.parallel_model import ParallelModel, StepOptions, device_of
from fourfold.parallel.decoder.precision import chosen_precision
from fourfold.parallel.decoder.stage import DecoderStage, check_decoder, has_sliding_window
from fourfold.parallel.decoder.taken_over import refuse_taken_over, take_over
from fourfold.parallel.decoder.weights import materialise
from fourfold.parallel.grid import AXES
from fourfold.parallel.ring.transformers import use_ring_attention


def skip_shared_memory_operator() -> None:
    """Keep an imported deepspeed from compiling, on a CPU, an operator for shared memory first, for minutes."""
    # By its module: as an attribute, deepspeed.comm.torch is torch itself.
    cast(Any, sys.modules["deepspeed.comm.torch"]).build_shm_op = lambda: None


class DeepSpeedModel(ParallelModel):
    """A decoder with fp32 weights over dp ranks; `initialize` must follow before it takes a step.

    Args:
        model: as `parallelize` takes it, on the meta device or with weights, of which the first rank's count.
        mesh: from `init_mesh`, with dp alone above 1.
        micro_batch: sequences a forward pass.
        checkpointing: "none" or "full".
        precision: "fp32", or "bf16-mixed": products in bf16, weights, gradients and optimizer states in fp32, as
            `parallelize` has it with zero_stage=0. None for the device's.
        seed: of the weights of a model on the meta device.
    Raises:
        ValueError: another axis than dp, or another precision; what `parallelize` refuses of a model.
    """

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, *, micro_batch: int, checkpointing: str = "none",
        precision: str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        for axis in AXES[1:]:
            if mesh[axis].size() > 1:
                raise ValueError(f"{axis}={mesh[axis].size()} with DeepSpeed, which shards over dp alone: use {axis}=1")
        if checkpointing not in ("none", "full"):
            raise ValueError(f"checkpointing={checkpointing!r} with DeepSpeed: choose 'none' or 'full'")
        refuse_taken_over(model)
        check_decoder(model, Choice(dp=mesh["dp"].size()))
        windows = mesh.get_group("cp") if has_sliding_window(model) else None  # the ring's blocks know windows
        if windows is not None:
            use_ring_attention(model, windows)
        else:
            cast(Any, model).set_attn_implementation("sdpa")
        stored = chosen_precision(precision, None, model, mesh.device_type)
        if stored.weights != torch.float32:
            raise ValueError(f"precision={stored.name!r} with DeepSpeed: choose 'fp32' or 'bf16-mixed'")
        config = cast(Any, model).config
        # DeepSpeed is left in fp32: its own bf16 would also add and reduce gradients in bf16.
        layers = range(config.num_hidden_layers)
        stage = DecoderStage(model, layers, checkpointing=checkpointing, autocast_dtype=stored.products)
        for name, part in stage.named_parts():
            materialise(part, name, model, seed=seed, device=device_of(mesh), dtype=torch.float32)
        if config.tie_word_embeddings:
            stage.lm_head.weight = cast(Any, stage.model).embed_tokens.weight
        take_over(model)
        options = StepOptions(
            micro_batch=micro_batch, zero_stage=0, sharded_accumulation=False, sequence_parallel=False, compiled=False,
            precision=stored, ring=windows,
        )  # fmt: skip
        super().__init__(stage, mesh, mesh["cp"], options, model)  # one replica: DeepSpeed averages over dp
        self._engine: Any = None
        self._zero_stage = 0

    def initialize(self, make_optimizer: Callable[[], Optimizer], config: Mapping[str, Any]) -> None:
        """Hand weights and optimizer to DeepSpeed; every rank calls, once.

        Args:
            make_optimizer: makes the optimizer of `parameters()`, which ZeRO 3 empties here.
            config: DeepSpeed's JSON, in fp32 and without an optimizer.
        """
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        getLogger("DeepSpeed").setLevel(ERROR)
        filterwarnings("ignore", ".*torch.distributed.* is deprecated", FutureWarning)  # of what DeepSpeed calls
        import deepspeed

        if self.device.type == "cpu":
            skip_shared_memory_operator()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        self._engine = deepspeed.initialize(model=self.stage, optimizer=make_optimizer(), config=dict(config))[0]
        self._zero_stage = config.get("zero_optimization", {}).get("stage", 0)
        self._module = self._engine

    @property
    def optimizer(self) -> Optimizer:
        """DeepSpeed's, after `initialize`; its groups' learning rates may be set, and `clip_grad_norm_` steps it."""
        return cast(Optimizer, self._engine.optimizer)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip and update, which DeepSpeed does in one call; returns the 2-norm before, a float64 scalar.

        A loss that is no finite number updates nothing, and its norm is given as NaN.

        Args:
            max_norm: the configuration's gradient_clipping.
        Raises:
            ValueError: another `max_norm`.
            FloatingPointError: the loss is a finite number, and the norm is none; on every rank.
        """
        clipping = self._engine.gradient_clipping()
        if max_norm != clipping:
            raise ValueError(f"max_norm={max_norm}, but DeepSpeed clips at gradient_clipping={clipping}: give that")
        if not math.isfinite(self._last_loss):
            return torch.tensor(math.nan, dtype=torch.float64)
        norm: Any = None
        if self._zero_stage == 0:  # whole gradients, already averaged
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if norm is None else norm)
        # Its ZeRO optimizers give -1 for a norm that is no number, or take no step.
        if not (self._engine.was_step_applied() and math.isfinite(norm) and norm >= 0):
            raise FloatingPointError(
                f"a gradient is no finite number, at loss {self._last_loss}: lower the learning rate"
            )
        return torch.tensor(norm, dtype=torch.float64)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """As ParallelModel's. Cost under ZeRO 3: the whole model on each rank for the time of writing."""
        gathered: Any = nullcontext()
        if self._zero_stage == 3:
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(self.parameters()))
        with gathered:
            super().save_pretrained(folder, dtype=dtype)

    def _accumulate(self, rows: LocalRows) -> Iterator[Tensor]:
        parts = self._cut(rows)
        num_ranks = self.mesh["dp"].size()
        for index, part in enumerate(parts):
            loss = self._loss(self._run(part), part.targets)
            self._engine.backward(loss * num_ranks, scale_wrt_gas=False)
            if index < len(parts) - 1:
                self._engine.step()  # counts the micro-batch; the last one's is the update
            yield loss.detach()

    def _mean_loss(self, losses: list[Tensor]) -> Tensor:
        total = super()._mean_loss(losses)
        dist.all_reduce(total, group=self.mesh.get_group("dp"))
        self._last_loss = total.item()
        return total
