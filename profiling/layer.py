"""One real decoder layer of a model, timed: what the planner corrects its formulas by.

Matmul and attention curves leave out the norms, the rotary embedding, the residuals, autograd and the allocator. So the
layers of transformers itself are timed, built from the model's own config. A tensor-parallel degree is emulated by the
layer of a rank: heads, MLP width and vocabulary divided by tp, and no communication (the links are measured apart).

Tables, each row a median over all ranks at work together:

    [[layer]]      dtype, tp, compiled, micro_batch, seq_len, forward_s, backward_s, operators, activation_bytes,
                   peak_bytes; on CUDA host_s
    [[ends]]       dtype, tp, micro_batch, seq_len, embedding_forward_s, embedding_backward_s, head_forward_s,
                   head_backward_s
    [[tp_layer]], [[tp_ends]]   the same times, and sequence_parallel; measured on groups of tp ranks by DTensor,
                   collectives inside; on CUDA [[tp_layer]] has host_s, too
    [[cp_layer]]   dtype, cp, micro_batch, seq_len, forward_s, backward_s, measured on groups of cp ranks
    [[optimizer]]  dtype, parameters, tensors, fused, step_s, clip_s

[[layer]] is one layer's share of a forward pass through DEPTH layers and the backward pass after it, without
checkpointing, gradients put into new memory as in a step's first micro-batch. activation_bytes are the distinct
storages that one layer's forward pass keeps for its backward pass, its input among them, weights not; peak_bytes is the
most that one layer's forward and backward pass hold at a time, its input, weights and their gradients included;
operators are those of both passes that make a tensor, each at least one launch on a GPU. Where training compiles layers
by itself (on CUDA), tp=1 has a row of compiled ones as well, without operators and bytes.
host_s is the time in which the host issues one layer's forward and backward pass; forward_s and backward_s are then the
device's alone, timed while it is held back until the host is ahead. On a CPU the host does the work itself.
[[ends]]: embedding with the rotary tables; final norm, head and the summed cross-entropy of fp32 logits.
[[tp_layer]] and [[tp_ends]], for tp > 1 within a host: the whole model's layer cut as training cuts it (see
parallelism.py), once with hidden states whole between its matrices and, where tp divides the sequence, once with them
cut along it (sequence_parallel). What they take beyond [[layer]] and their messages is DTensor's own work on the host.
[[cp_layer]], for cp > 1 within a host: a layer on seq_len / cp tokens a rank, attending by training's ring. What it
takes beyond [[layer]] on as many tokens is the ring: its messages, its smaller blocks, and the attention to the other
ranks' tokens.
[[optimizer]]: one AdamW step and one gradient-norm clipping on `parameters` weights in `tensors` tensors of the model's
shapes (at most MAX_PARAMETERS of them); fused is torch's option, false its default.
dtype is what matrix products run in: on CUDA bfloat16 by autocast over fp32 weights, as in training.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from fourfold.profiling.clock import Clock
from fourfold.profiling.decoder import local_model, loss_of_logits, run_layers
from fourfold.profiling.memory import AllocationPeak, OperatorCount
from fourfold.profiling.parallelism import Parallelism
from fourfold.profiling.session import Case
from fourfold.profiling.shapes import ModelShape

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

DEPTH = 2
MAX_PARAMETERS = 100_000_000
HELD, LEAST_HELD_S, MOST_HELD_S = 1.25, 2e-4, 0.1
"""A device is held back for HELD times what its host took at best so far, within bounds: first calls load code."""
_LAYER = ("forward_s", "backward_s")
_ENDS = ("embedding_forward_s", "embedding_backward_s", "head_forward_s", "head_backward_s")


def timed_model(config: dict[str, Any], device: torch.device, *, tp: int = 1) -> Any:
    """The layers and ends of one of `tp` ranks, on the device: DEPTH layers, which all cases of one kind share."""
    with device:
        return local_model(config, tp=tp, num_layers=DEPTH)


def _with_its_weights(whole: Any) -> Any:
    """A copy of a model whose parameters, with gradients of their own, lie in the same memory.

    The cases of a profile are there together, and of a model of 70B two layers and the ends alone take 15 GB.
    """
    shared: dict[int, Any] = {id(weight): nn.Parameter(weight.detach()) for weight in whole.parameters()}
    return deepcopy(whole, shared)


def layer_cases(
    model: Any, device: torch.device, *, tp: int, micro_batches: tuple[int, ...], seq_len: int
) -> list[Case]:
    """[[layer]] and [[ends]] of `timed_model` for one tensor-parallel degree; the model is shared by all cases."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    named = {"dtype": str(dtype).removeprefix("torch."), "tp": tp}
    cases = []
    for micro_batch in micro_batches:
        work = _Work(model, device, dtype, micro_batch, seq_len)
        sizes = {"micro_batch": micro_batch, "seq_len": seq_len}
        layers = Case(
            table="layer", fields={**named, "compiled": False, **sizes}, columns=work.layer_columns,
            run=work.time_layers, facts=work.layer_facts, essential=True,
        )  # fmt: skip
        ends = Case(table="ends", fields={**named, **sizes}, columns=_ENDS, run=work.time_ends, essential=True)
        cases += [layers, ends]
    return cases


def compiled_layer_cases(
    whole: Any,
    device: torch.device,
    parallelism: Parallelism,
    *,
    micro_batches: tuple[int, ...],
    seq_len: int,
) -> list[Case]:
    """[[layer]] of compiled layers on one rank; the compiler works before anything is timed.

    Args:
        whole: timed_model's of tp=1, which stays as it is; its weights are used, and its sizes.
    """
    model = _with_its_weights(whole)
    for layer in model.model.layers:
        parallelism.compile_layer(layer)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = []
    for micro_batch in micro_batches:
        work = _Work(model, device, dtype, micro_batch, seq_len)
        fields = {
            "dtype": str(dtype).removeprefix("torch."), "tp": 1, "compiled": True, "micro_batch": micro_batch,
            "seq_len": seq_len,
        }  # fmt: skip
        cases.append(
            Case(
                table="layer", fields=fields, columns=work.layer_columns, run=work.time_layers, essential=True,
                prepare=partial(work.time_layers, Clock(device), 1),
            )
        )  # fmt: skip
    return cases


def tensor_parallel_cases(
    whole: Any,
    device: torch.device,
    parallelism: Parallelism,
    *,
    tp: int,
    micro_batches: tuple[int, ...],
    seq_len: int,
    sequence_parallel: bool = False,
) -> list[Case]:
    """[[tp_layer]] and [[tp_ends]] for groups of `tp` neighbouring ranks; every rank of the world must call.

    Args:
        whole: as of compiled_layer_cases.
        seq_len: tokens of a sequence, a multiple of tp where `sequence_parallel`: every rank then has seq_len / tp of
            them between its matrices.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size() // tp, tp), mesh_dim_names=("outer", "tp"))["tp"]
    model = _with_its_weights(whole)
    for layer in model.model.layers:
        parallelism.cut_layer(layer, mesh, sequence_parallel=sequence_parallel)
    parallelism.cut_ends(model, mesh, sequence_parallel=sequence_parallel)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = []
    for micro_batch in micro_batches:
        work = _Work(model, device, dtype, micro_batch, seq_len, _Cut(mesh, tp if sequence_parallel else 1))
        fields = {
            "dtype": str(dtype).removeprefix("torch."), "tp": tp, "sequence_parallel": sequence_parallel,
            "micro_batch": micro_batch, "seq_len": seq_len,
        }  # fmt: skip
        layers = Case(table="tp_layer", fields=fields, columns=work.layer_columns, run=work.time_layers, essential=True)
        cases += [layers, Case(table="tp_ends", fields=fields, columns=_ENDS, run=work.time_ends, essential=True)]
    return cases


def context_parallel_cases(
    whole: Any,
    device: torch.device,
    parallelism: Parallelism,
    *,
    cp: int,
    micro_batches: tuple[int, ...],
    seq_len: int,
) -> list[Case]:
    """[[cp_layer]] for groups of `cp` neighbouring ranks; every rank of the world must call.

    Args:
        whole: as of compiled_layer_cases.
        seq_len: tokens of the whole sequence, a multiple of 2 * cp: every rank holds seq_len / cp.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size() // cp, cp), mesh_dim_names=("outer", "cp"))["cp"]
    model = _with_its_weights(whole)
    parallelism.put_ring_around(model, mesh.get_group())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = []
    for micro_batch in micro_batches:
        work = _Work(model, device, dtype, micro_batch, seq_len // cp, held=False, ring_seq_len=seq_len)
        fields = {"dtype": str(dtype).removeprefix("torch."), "cp": cp, "micro_batch": micro_batch, "seq_len": seq_len}
        cases.append(Case(table="cp_layer", fields=fields, columns=_LAYER, run=work.time_layers, essential=True))
    return cases


@dataclass(frozen=True, slots=True)
class _Cut:
    """The tp mesh that a model is cut on, and into how many pieces its hidden states are between the matrices."""

    mesh: DeviceMesh
    sequence_shards: int


class _Work:
    """Timed passes through the layers and the ends of one model, on random input."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int,
        seq_len: int,
        cut: _Cut | None = None,
        held: bool = True,
        **attention_arguments: Any,
    ) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._mesh = cut.mesh if cut else None
        self._token_shape = (micro_batch, seq_len)
        self._shape = (micro_batch, seq_len // (cut.sequence_shards if cut else 1), model.config.hidden_size)
        self._positions = torch.arange(seq_len, device=device)[None]
        self._attention_arguments = attention_arguments
        # A ring has a hundred launches a layer besides, more than a GPU queues: its host would wait for the device.
        self._held = held and device.type == "cuda"
        self._least_host_s: float | None = None
        self.layer_columns = (*_LAYER, "host_s") if self._held else _LAYER

    def _autocast(self) -> AbstractContextManager[None]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _hidden(self) -> Tensor:
        return torch.randn(self._shape, device=self._device, requires_grad=True)

    def time_layers(self, clock: Clock, iterations: int) -> tuple[float, ...]:
        """Seconds of one layer's forward, its backward, and (on CUDA) of the host to issue both."""
        hidden, grad = self._hidden(), torch.randn(self._shape, device=self._device)
        rotary = self._model.model.rotary_emb(hidden, position_ids=self._positions)
        forward, backward, host = 0.0, 0.0, 0.0
        for _ in range(iterations):
            self._model.zero_grad(set_to_none=True)
            if self._held and self._least_host_s is not None:
                clock.hold(min(HELD * self._least_host_s + LEAST_HELD_S, MOST_HELD_S))
            issued = time.perf_counter()
            start = clock.mark()
            with self._autocast():
                out = run_layers(self._model, hidden, rotary, self._positions, **self._attention_arguments)
            middle = clock.mark()
            out.backward(grad)  # type: ignore[no-untyped-call]
            end = clock.mark()
            host_s = time.perf_counter() - issued
            clock.wait()
            forward += clock.seconds(start, middle)
            backward += clock.seconds(middle, end)
            host += host_s
            self._least_host_s = min(host_s, self._least_host_s or host_s)
        self._model.zero_grad(set_to_none=True)
        sums = (forward, backward, host)
        return tuple(seconds / iterations / DEPTH for seconds in sums[: len(self.layer_columns)])

    def time_ends(self, clock: Clock, iterations: int) -> tuple[float, float, float, float]:
        model, vocab = self._model, self._model.config.vocab_size
        tokens = torch.randint(vocab, self._token_shape, device=self._device)
        hidden, grad = self._hidden(), torch.randn(self._shape, device=self._device)
        totals = [0.0] * 4
        for _ in range(iterations):
            model.zero_grad(set_to_none=True)
            marks = [clock.mark()]
            with self._autocast():
                embedded = model.model.embed_tokens(tokens)
                model.model.rotary_emb(embedded, position_ids=self._positions)
            marks.append(clock.mark())
            embedded.backward(grad)
            marks.append(clock.mark())
            with self._autocast():
                logits = model.lm_head(model.model.norm(hidden))
            if self._mesh is None:
                loss = loss_of_logits(logits, tokens)
                marks.append(clock.mark())
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                with loss_parallel():
                    loss = loss_of_logits(DTensor.from_local(logits, self._mesh, [Shard(2)]), tokens)
                    marks.append(clock.mark())
                    loss.backward()  # type: ignore[no-untyped-call]
            marks.append(clock.mark())
            clock.wait()
            for index in range(4):
                totals[index] += clock.seconds(marks[index], marks[index + 1])
        model.zero_grad(set_to_none=True)
        return totals[0] / iterations, totals[1] / iterations, totals[2] / iterations, totals[3] / iterations

    def layer_facts(self) -> dict[str, int]:
        """operators, activation_bytes and peak_bytes of one layer."""
        hidden, grad = self._hidden(), torch.randn(self._shape, device=self._device)
        rotary = self._model.model.rotary_emb(hidden, position_ids=self._positions)
        with OperatorCount() as operators, AllocationPeak() as peak:
            with self._autocast():
                out = run_layers(self._model, hidden, rotary, self._positions, num_layers=1)
            out.backward(grad)  # type: ignore[no-untyped-call]
        self._model.zero_grad(set_to_none=True)
        # What two passes keep that are both there is no activation: weights, autocast's casts of them, rotary tables.
        with self._autocast():
            first, _out = self._kept(rotary)
            second, _other = self._kept(rotary)
        activations = sum(size for storage, size in second.items() if storage not in first)
        return {"operators": operators.count, "activation_bytes": activations, "peak_bytes": peak.bytes}

    def _kept(self, rotary: tuple[Tensor, Tensor]) -> tuple[dict[int, int], Tensor]:
        """Bytes of the storages that a forward of one layer keeps, by address, and its output, which holds them."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return kept, run_layers(self._model, self._hidden(), rotary, self._positions, num_layers=1)


def optimizer_cases(shape: ModelShape, device: torch.device) -> list[Case]:
    """[[optimizer]], torch's default AdamW and the fused one."""
    weights = [torch.zeros(size, device=device) for size in _parameter_shapes(shape)]
    parameters = [nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    fields = {"dtype": "float32", "parameters": sum(weight.numel() for weight in weights), "tensors": len(weights)}

    def run(optimizer: torch.optim.Optimizer) -> Callable[[Clock, int], tuple[float, float]]:
        return lambda clock, iterations: (
            clock.repeat(optimizer.step, iterations),
            clock.repeat(lambda: nn.utils.clip_grad_norm_(parameters, 1e9), iterations),
        )

    return [
        Case(
            table="optimizer",
            fields={**fields, "fused": fused},
            columns=("step_s", "clip_s"),
            run=run(torch.optim.AdamW(parameters, lr=1e-6, fused=fused or None)),
            essential=True,
        )
        for fused in (False, True)
    ]


def _parameter_shapes(shape: ModelShape) -> list[tuple[int, ...]]:
    """The model's weights, or as many of its layers as MAX_PARAMETERS holds, at least one."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, ffn = shape.hidden, shape.ffn
    layer: list[tuple[int, ...]] = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (ffn, hidden),
             (ffn, hidden), (hidden, ffn), (hidden,), (hidden,)]  # fmt: skip
    ends: list[tuple[int, ...]] = [(shape.vocab, hidden), (hidden,), (shape.vocab, hidden)]
    room = MAX_PARAMETERS - 2 * shape.vocab * hidden
    count = max(1, min(shape.num_layers, room // shape.layer_parameters))
    return layer * count + (ends if room > 0 else [])
