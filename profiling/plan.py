"""Which cases a profile measures: general curves, and the shapes of the model at hand."""

import os
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from fourfold.profiling.compute import (
    AttentionShape,
    OperandPool,
    attention_case,
    copy_case,
    elementwise_case,
    matmul_case,
    overhead_case,
)
from fourfold.profiling.layer import (
    compiled_layer_cases,
    context_parallel_cases,
    layer_cases,
    optimizer_cases,
    tensor_parallel_cases,
    timed_model,
)
from fourfold.profiling.links import Tier, link_cases
from fourfold.profiling.parallelism import Parallelism
from fourfold.profiling.session import Case
from fourfold.profiling.settings import ProfileSettings
from fourfold.profiling.shapes import ModelShape, matmul_shapes, model_shape, read_config

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

KIB, MIB = 1024, 1024 * 1024


def profile_cases(
    settings: ProfileSettings, device: torch.device, tiers: list[Tier], parallelism: Parallelism | None = None
) -> list[Case]:
    """All cases of this profile, the same on every rank.

    Args:
        parallelism: how training spreads a layer over ranks; None leaves the layers that need it out.
    """
    config = read_config(settings.model) if settings.model else None
    model = model_shape(config) if config else None
    on_gpu = device.type == "cuda"
    world_size = dist.get_world_size()
    # Matrix products: squares and wide ones for any model, of which one is essential, and all of the model at hand.
    general = [256, 512, 1024, 2048] + ([4096, 8192] if on_gpu else [])
    wanted: dict[tuple[int, int, int, str], bool] = {(size, size, size, "nt"): False for size in general}
    wanted[1024, 1024, 1024, "nt"] = True
    wanted |= {(tokens, 4 * width, width, "nt"): False for tokens in (64, 1024) for width in general[:-1]}
    if model:
        for tokens, tp in product(_token_counts(settings, world_size), model.tp_degrees(world_size)):
            wanted |= dict.fromkeys(matmul_shapes(model, tokens, tp), True)
    # Training's dtype gets all of them and the streaming operators, the other one the squares alone.
    cases = [overhead_case(device)]
    training = torch.bfloat16 if on_gpu else torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        shapes = wanted if dtype == training else {(size, size, size, "nt"): False for size in general}
        largest = max(max(m * n, n * k, m * k) for m, n, k, _ in shapes)
        pool = OperandPool(max(largest, (256 if on_gpu else 16) * MIB), dtype, device)
        cases += [matmul_case(pool, m, n, k, operands, essential=must) for (m, n, k, operands), must in shapes.items()]
        if dtype == training:
            cases.append(copy_case(pool, (64 if on_gpu else 4) * MIB))
            cases += [elementwise_case(pool, 4**power * KIB) for power in range(1, 7 if not on_gpu else 9)]
    cases += _attention_cases(settings, model, device, training, world_size)
    # Whole layers, alone and spread over ranks, and the optimizer.
    if config and model and settings.layers:
        cases += _model_cases(settings, config, model, device, parallelism)
    # Messages of general sizes, and essential ones of the sizes that this model sends.
    messages = [KIB, 16 * KIB, 128 * KIB, MIB, 4 * MIB, 16 * MIB] + ([64 * MIB, 256 * MIB] if on_gpu else [])
    ours = [KIB, MIB]
    if model:
        ours += [4 * model.hidden * tokens for tokens in _token_counts(settings, world_size)]
        ours.append(min(25 * MIB, 4 * model.layer_parameters))
    for tier in tiers:
        cases += link_cases(tier, device, sorted({*messages, *ours}), ours)
    return list({case.key: case for case in cases}.values())


def _model_cases(
    settings: ProfileSettings,
    config: dict[str, Any],
    model: ModelShape,
    device: torch.device,
    parallelism: Parallelism | None,
) -> list[Case]:
    """The model's layers and ends on one rank, its layers cut over the ranks of a host, and its optimizer."""
    world_size = dist.get_world_size()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    sizes: dict[str, Any] = {"micro_batches": settings.micro_batches, "seq_len": settings.seq_len}
    cases = []
    whole = timed_model(config, device)
    for tp in model.tp_degrees(world_size):
        cases += layer_cases(whole if tp == 1 else timed_model(config, device, tp=tp), device, tp=tp, **sizes)
    if parallelism is not None:
        if _all_ranks(parallelism.compiles_on(device.type)):
            cases += compiled_layer_cases(whole, device, parallelism, **sizes)
        for cp in _ring_sizes(per_host, settings.seq_len):
            cases += context_parallel_cases(whole, device, parallelism, cp=cp, **sizes)
        for tp in model.tp_degrees(per_host)[1:]:
            if model.vocab % tp == 0:
                for cut in (False, True)[: 1 + (settings.seq_len % tp == 0)]:
                    cases += tensor_parallel_cases(whole, device, parallelism, tp=tp, sequence_parallel=cut, **sizes)
    return cases + optimizer_cases(model, device)


def _all_ranks(yes: bool) -> bool:
    """Whether every rank says so: a host without a compiler must not wait for others in another case."""
    answer = torch.tensor([int(yes)])
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer.item())


def _token_counts(settings: ProfileSettings, num_ranks: int) -> list[int]:
    """Tokens of a micro-batch on one rank, under every context-parallel degree."""
    cuts = [cp for cp in range(1, num_ranks + 1) if num_ranks % cp == 0 and settings.seq_len % cp == 0]
    return sorted({micro_batch * settings.seq_len // cp for micro_batch, cp in product(settings.micro_batches, cuts)})


def _ring_sizes(num_ranks: int, seq_len: int) -> list[int]:
    """Divisors of `num_ranks` above 1 that cut a sequence in zigzag evenly."""
    return [cp for cp in range(2, num_ranks + 1) if num_ranks % cp == 0 and seq_len % (2 * cp) == 0]


def _attention_cases(
    settings: ProfileSettings, model: ModelShape | None, device: torch.device, dtype: torch.dtype, num_ranks: int
) -> list[Case]:
    on_gpu = device.type == "cuda"
    heads, head_dim = (16, 128) if on_gpu else (4, 64)
    lengths = (1024, 2048, 4096, 8192, 16384) if on_gpu else (128, 256, 512, 1024, 2048)
    cases = [
        attention_case(
            device,
            dtype,
            AttentionShape(batch=1, heads=heads, kv_heads=heads, seq_len=length, head_dim=head_dim),
        )
        for length in lengths
    ]
    if not model:
        return cases
    for micro_batch, tp in product(settings.micro_batches, model.tp_degrees(num_ranks)):
        sizes = {"batch": micro_batch, "heads": model.heads // tp, "kv_heads": model.kv_heads // tp}
        # Context parallelism attends blocks: the diagonal ones causal, the others whole.
        for cp, causal in product((1, 2 * num_ranks), (True, False)):
            length = settings.seq_len // cp
            if length and (cp > 1 or causal):
                shape = AttentionShape(**sizes, seq_len=length, head_dim=model.head_dim, causal=causal)
                cases.append(attention_case(device, dtype, shape, essential=True))
    return cases
