"""Whole training steps against the sum of their profiled parts, all timed in the same interleaved rounds.

Started by run.py as two gloo ranks. The step is the product's: parallelize, AdamW (fused), clipping, two micro-batches.
"parts" adds what `profile --model` writes: layers, ends, all-reduces by their fitted lines, optimizer and clipping.
"curves" adds only the matmul and attention samples instead of layers and ends.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.launch.profile_ranks import TrainingParallelism
from fourfold.parallel import init_mesh, parallelize
from fourfold.profiling.clock import Clock
from fourfold.profiling.compute import AttentionShape, OperandPool, attention_case, matmul_case
from fourfold.profiling.fitting import fit_latency_bandwidth
from fourfold.profiling.layer import layer_cases, optimizer_cases, tensor_parallel_cases, timed_model
from fourfold.profiling.links import find_tiers, link_cases
from fourfold.profiling.session import Case, Timings, measure
from fourfold.profiling.shapes import ModelShape, model_shape

CPU, FP32 = torch.device("cpu"), torch.float32
NUM_MICRO_BATCHES = 2
KIB = 1024


class ProcessClock(Clock):
    """CPU time of the rank, all threads: what a step costs, whoever else uses the cores meanwhile."""

    def mark(self) -> float:
        return time.process_time()


def config_of(hidden: int, layers: int, seq_len: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 256,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "num_hidden_layers": layers,
        "max_position_embeddings": seq_len, "tie_word_embeddings": False,
    }  # fmt: skip


def step_case(config: dict[str, Any], axis: str, seq_len: int) -> Case:
    """A whole step with micro-batch 1, the two ranks along `axis`."""
    torch.manual_seed(0)
    values = {name: value for name, value in config.items() if name != "model_type"}
    mesh = init_mesh(**{axis: 2}, device_type="cpu")
    model = parallelize(LlamaForCausalLM(LlamaConfig(**values)), mesh, micro_batch=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config["vocab_size"], (NUM_MICRO_BATCHES, seq_len))

    def step() -> None:
        model.forward_backward(ids)
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Case(
        table="step",
        fields={"axis": axis},
        run=lambda clock, iterations: (clock.repeat(step, iterations),),
        essential=True,
    )


def linear_counts(shape: ModelShape) -> dict[tuple[int, int], int]:
    """(out, in) of the linear layers of one decoder layer, and how often each occurs."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    counts: dict[tuple[int, int], int] = {}
    for pair, count in (((query, shape.hidden), 1), ((key, shape.hidden), 2), ((shape.hidden, query), 1),
                        ((shape.ffn, shape.hidden), 2), ((shape.hidden, shape.ffn), 1)):  # fmt: skip
        counts[pair] = counts.get(pair, 0) + count
    return counts


def all_reduce_line(rows: list[dict[str, Any]]) -> Callable[[float], float]:
    curve = [row for row in rows if row["operation"] == "all_reduce"]
    latency, bandwidth = fit_latency_bandwidth([row["bytes"] for row in curve], [row["seconds"] for row in curve])
    return lambda size: latency + size / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--clock", choices=("wall", "cpu"))
    for name in ("hidden", "layers", "seq-len"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parts = parts_of(config_of(options.hidden, options.layers, options.seq_len), options.seq_len)
    unique = list({case.key: case for case in parts.cases()}.values())
    clock = ProcessClock(CPU) if options.clock == "cpu" else Clock(CPU)
    timings, _ = measure(unique, clock, seconds=options.seconds)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(compare(timings, parts)))
    dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The whole steps by axis, and the cases that they are put together from.

    Attributes:
        message_bytes: what one tensor-parallel all-reduce carries; gradient_bytes what the replicas' one does.
        layers: [[layer]] and [[ends]] by axis, the tensor-parallel ones with their collectives inside.
        matmuls: the three products of a linear layer by its (out, in).
    """

    shape: ModelShape
    message_bytes: int
    gradient_bytes: int
    steps: dict[str, Case]
    layers: dict[str, list[Case]]
    matmuls: dict[tuple[int, int], list[Case]]
    attention: Case
    links: list[Case]
    optimizer: Case

    def cases(self) -> list[Case]:
        products = [case for three in self.matmuls.values() for case in three]
        layers = [case for pair in self.layers.values() for case in pair]
        return [self.optimizer, *layers, *products, self.attention, *self.links, *self.steps.values()]


def parts_of(config: dict[str, Any], seq_len: int) -> Parts:
    shape = model_shape(config)
    message = 4 * seq_len * shape.hidden
    parameters = shape.num_layers * shape.layer_parameters + 2 * shape.vocab * shape.hidden + shape.hidden
    sizes: dict[str, Any] = {"micro_batches": (1,), "seq_len": seq_len}
    pool = OperandPool(16 * KIB * KIB, FP32, CPU)
    block = AttentionShape(
        batch=1, heads=shape.heads, kv_heads=shape.kv_heads, seq_len=seq_len, head_dim=shape.head_dim
    )
    (tier,) = find_tiers("cpu")
    whole = timed_model(config, CPU)
    messages = sorted({KIB, 64 * KIB, 256 * KIB, 1024 * KIB, message, 4 * parameters})
    return Parts(
        shape=shape,
        message_bytes=message,
        gradient_bytes=4 * parameters,
        steps={axis: step_case(config, axis, seq_len) for axis in ("dp", "tp")},
        layers={
            "dp": layer_cases(whole, CPU, tp=1, **sizes),
            "tp": tensor_parallel_cases(whole, CPU, TrainingParallelism(), tp=2, **sizes),
        },
        matmuls={
            (out, into): [
                matmul_case(pool, seq_len, out, into, "nt", essential=True),
                matmul_case(pool, seq_len, into, out, "nn", essential=True),
                matmul_case(pool, out, into, seq_len, "tn", essential=True),
            ]
            for out, into in linear_counts(shape)
        },
        attention=attention_case(CPU, FP32, block, essential=True),
        links=[case for case in link_cases(tier, CPU, messages, messages) if case.fields["operation"] == "all_reduce"],
        optimizer=optimizer_cases(shape, CPU)[1],
    )


def compare(timings: Timings, parts: Parts) -> list[dict[str, Any]]:
    """Seconds of each step and of the sums that predict it."""
    shape = parts.shape
    line = all_reduce_line([timings.row(case) for case in parts.links])
    state = timings.row(parts.optimizer)
    update = state["step_s"] + state["clip_s"]
    counts = linear_counts(shape)
    linears = sum(
        counts[pair] * timings.row(case)["seconds"] for pair, three in parts.matmuls.items() for case in three
    )
    attended = timings.row(parts.attention)
    curves = shape.num_layers * (linears + attended["forward_s"] + attended["backward_s"])
    answer = []
    for axis, tp in (("dp", 1), ("tp", 2)):
        layer, ends = (timings.row(case) for case in parts.layers[axis])
        compute = shape.num_layers * (layer["forward_s"] + layer["backward_s"])
        compute += sum(value for name, value in ends.items() if name.endswith("_s"))
        if axis == "dp":
            communication = exchange = line(parts.gradient_bytes)
            update_share = update
        else:
            communication = 0.0  # inside the layers
            exchange = NUM_MICRO_BATCHES * 4 * shape.num_layers * line(parts.message_bytes)
            update_share = update / 2
        measured = timings.row(parts.steps[axis])
        answer.append(
            {
                "axis": axis,
                "measured_s": measured["seconds"],
                "measured_rounds_s": [times[0] for times in timings.rounds[parts.steps[axis].key]],
                "parts_s": NUM_MICRO_BATCHES * compute + communication + update_share,
                "curves_s": NUM_MICRO_BATCHES * curves / tp + exchange + update_share,
            }
        )
    return answer


if __name__ == "__main__":
    main()
