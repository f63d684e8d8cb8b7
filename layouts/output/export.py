"""A layout as the files that other tools launch from: Megatron-LM, DeepSpeed, torchtitan, torchrun, Slurm, MPI.

Each function refuses what its tool has not, naming the option, rather than leave it out in silence.
"""

from shlex import quote
from typing import Any

from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig

TORCHTITAN = "0.2"
"""The release of torchtitan whose configuration this is."""
FLAVORS: dict[str, dict[str, tuple[int, ...]]] = {
    "llama3": {
        "8B": (32, 4096, 32, 8, 14336, 128256), "70B": (80, 8192, 64, 8, 28672, 128256),
        "405B": (126, 16384, 128, 8, 53248, 128256),
    },
    "qwen3": {
        "0.6B": (28, 1024, 16, 8, 3072, 151936), "1.7B": (28, 2048, 16, 8, 6144, 151936),
        "4B": (36, 2560, 32, 8, 9728, 151936), "8B": (36, 4096, 32, 8, 12288, 151936),
        "14B": (40, 5120, 40, 8, 17408, 151936), "32B": (64, 5120, 64, 8, 25600, 151936),
    },
}  # fmt: skip
"""Its models: layers, width, heads, heads of keys, feed-forward, vocabulary."""
ROTARY_BASE = {"llama3": 500000.0, "qwen3": 1000000.0}
TIED = {"qwen3": ("0.6B", "1.7B", "4B")}
"""Its flavors whose head is the embedding."""
TARGETS = ("megatron", "deepspeed", "torchtitan", "torchrun", "slurm", "mpi")


def _refuse(target: str, layout: Layout, **absent: bool) -> None:
    """Refuse what a target has not: those of `absent` that are true, and what no target's file says."""
    for name, present in (absent | unsaid(layout)).items():
        if present:
            raise ValueError(f"{target} has no {name.replace('_', ' ')}, which {layout} uses: fix it to its default")


def unsaid(layout: Layout) -> dict[str, bool]:
    """What no exported file says of a layout: they ask for bf16 over fp32 weights, and leave compiling to the tool."""
    return {
        f"word here for precision {layout.precision}": layout.precision != "auto",
        "word here for compiled or uncompiled layers": layout.compile is not None,
        "offloading without checkpointing": layout.offload and layout.checkpointing == "none",
    }


def _torchtitan_less(layout: Layout, model: ModelConfig) -> tuple[int, int]:
    """torchtitan's (first_stage_less_layers, last_stage_less_layers), 1 by default, that give this layout's stages.

    It adds them to the layers, gives each stage its share and the first stages one more of what is left, and takes
    them off the ends again (generate_llm_fqn_per_model_part). Ours gives middle stages one more: where not all stages
    but the last get one, the first counts for a layer more.
    """
    if layout.vp > 1:
        return 0, 0
    extra = (model.num_layers + layout.embedding_counts_as + layout.head_counts_as) % layout.pp
    return layout.embedding_counts_as + (0 < extra < layout.pp - 1), layout.head_counts_as


def deepspeed_config(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """DeepSpeed's JSON: batch sizes, precision, ZeRO stage, partitioned or offloaded activations.

    Gradient clipping is set, because DeepSpeed's own default of 1.0 would apply otherwise.

    Raises:
        ValueError: what DeepSpeed takes from the model's code and not from this file: tp, pp, cp or ep above 1, which
            layers are checkpointed and what of them; and StreamBP.
    """
    _refuse(
        "deepspeed's JSON", layout, tensor_parallelism=layout.tp > 1, pipeline=layout.pp > 1,
        context_parallelism=layout.cp > 1, expert_parallelism=layout.ep > 1,
        StreamBP=layout.checkpointing == "stream", selective_checkpointing=layout.checkpointing == "selective",
        checkpointing_every_few_layers=layout.checkpoint_every > 1, asynchronous_pipeline=layout.asynchronous,
        gradients_sharded_at_every_micro_batch=layout.sharded_accumulation,
    )  # fmt: skip
    zero: dict[str, Any] = {"stage": layout.zero_stage}
    if layout.zero_stage:
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True}
    config: dict[str, Any] = {
        "train_batch_size": layout.global_batch, "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.num_micro_batches, "bf16": {"enabled": True},
        "zero_optimization": zero, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    }  # fmt: skip
    if layout.checkpointing != "none":
        config["activation_checkpointing"] = {"cpu_checkpointing": layout.offload}
    return config


def _flavor(model: ModelConfig) -> dict[str, str]:
    """torchtitan's name of this very model: it builds what is on its list, not what a config says.

    Raises:
        ValueError: it has no such model.
    """
    sizes = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads, model.ffn_size, model.vocab_size)
    for name, flavors in FLAVORS.items():
        for flavor, dimensions in flavors.items():
            if sizes == dimensions and model.qk_norm == (name == "qwen3"):
                other = _not_of_flavor(model, name, flavor)
                if other:
                    raise ValueError(
                        f"torchtitan's {name} {flavor} has no {', no '.join(other)}, which {model.name} has"
                    )
                return {"name": name, "flavor": flavor}
    known = ", ".join(f"{name} {flavor}" for name, flavors in FLAVORS.items() for flavor in flavors)
    raise ValueError(f"torchtitan has no model of {model.name}'s dimensions; it has {known}")


def _not_of_flavor(model: ModelConfig, name: str, flavor: str) -> list[str]:
    """What tells a model from the flavor with its dimensions: it would start, and train another model."""
    config = model.config
    rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    family = {"llama3": "llama", "qwen3": "qwen3"}[name]
    kind, base, tied = config.get("model_type", family), rope.get("rope_theta"), flavor in TIED.get(name, ())
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    activation = config.get("hidden_act") or "silu"
    reasons = {
        f"parts of the family {kind}": kind != family,
        "biases": model.qkv_bias or model.out_bias or model.mlp_bias,
        f"heads of {model.head_dim}": model.head_dim != 128,
        "sliding window": bool(model.sliding_window),
        "head tied to the embedding" if model.tied_embeddings else "head of its own": model.tied_embeddings != tied,
        f"rotary base {base}": base is not None and base != ROTARY_BASE[name],
        f"rotary scaling {scaling!r}": scaling not in ("default", *(["llama3"] * (name == "llama3"))),
        f"activation {activation!r}": activation not in ("silu", "swish"),
    }
    return [reason for reason, true in reasons.items() if true]


def torchtitan_config(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """torchtitan's TOML: [training], [parallelism], [activation_checkpoint], of TORCHTITAN.

    Raises:
        ValueError: StreamBP, offloading, ZeRO 1 or 2, ZeRO 3 on one rank, tp without sequence parallelism (torchtitan
            always has it), and replicas without sharding beside tp, pp or cp (its replicas are DDP, which it has on
            one axis alone).
    """
    _refuse(
        "torchtitan", layout, StreamBP=layout.checkpointing == "stream", offloading=layout.offload,
        ZeRO_1_or_2=layout.zero_stage in (1, 2), asynchronous_pipeline=layout.asynchronous,
        head_exchange=layout.cp_heads > 1, gradients_sharded_at_every_micro_batch=layout.sharded_accumulation,
        tensor_parallelism_without_sequence_parallelism=layout.tp > 1 and not layout.sequence_parallel,
        replicas_without_sharding_beside_other_axes=layout.zero_stage == 0
        and (layout.cp > 1 or (layout.dp > 1 and layout.tp * layout.pp > 1)),
        sharding_over_one_rank=layout.zero_stage == 3 and layout.dp * layout.cp == 1,
    )  # fmt: skip
    sharded = layout.zero_stage == 3
    checkpoint: dict[str, Any] = {"mode": layout.checkpointing}
    if layout.checkpointing == "full" and layout.checkpoint_every > 1:
        checkpoint = {"mode": "selective", "selective_ac_option": str(layout.checkpoint_every)}
    elif layout.checkpointing == "selective":
        checkpoint["selective_ac_option"] = "op"
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": 1 if sharded else layout.dp,
        "data_parallel_shard_degree": layout.dp if sharded else 1,
        "tensor_parallel_degree": layout.tp, "pipeline_parallel_degree": layout.pp,
        "context_parallel_degree": layout.cp, "expert_parallel_degree": layout.ep,
    }  # fmt: skip
    if layout.pp > 1:
        interleaved = "InterleavedZeroBubble" if layout.schedule == "zero-bubble" else "Interleaved1F1B"
        parallelism["pipeline_parallel_schedule"] = interleaved if layout.vp > 1 else "1F1B"
        first, last = _torchtitan_less(layout, model)
        parallelism["pipeline_parallel_first_stage_less_layers"] = first
        parallelism["pipeline_parallel_last_stage_less_layers"] = last
        parallelism["pipeline_parallel_microbatch_size"] = layout.micro_batch
    if layout.vp > 1:
        if model.num_layers % (layout.pp * layout.vp):
            raise ValueError(
                f"torchtitan cuts chunks evenly: {model.num_layers} layers are no multiple of pp={layout.pp} x "
                f"vp={layout.vp}"
            )
        parallelism["pipeline_parallel_layers_per_stage"] = model.num_layers // (layout.pp * layout.vp)
    local = layout.micro_batch if layout.pp == 1 else layout.global_batch // layout.dp
    return {
        "model": _flavor(model),
        "training": {
            "local_batch_size": local, "global_batch_size": layout.global_batch, "seq_len": layout.seq_len,
            "mixed_precision_param": "bfloat16", "mixed_precision_reduce": "float32",
        },
        "parallelism": parallelism,
        "activation_checkpoint": checkpoint,
    }  # fmt: skip


def torchrun_script(layout: Layout, *, devices_per_node: int, file: str = "layout.toml") -> str:
    """A shell script for one node of the job; MASTER_ADDR, MASTER_PORT and NODE_RANK come from the environment."""
    nodes, local = _nodes(layout, devices_per_node)
    return (
        "#!/usr/bin/env bash\nset -euo pipefail\n"
        f"# {layout}: {layout.world_size} ranks on {nodes} node(s). On each node set NODE_RANK and MASTER_ADDR.\n"
        f'torchrun --nnodes {nodes} --nproc-per-node {local} --node-rank "${{NODE_RANK:-0}}" \\\n'
        '  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \\\n'
        f'  -m fourfold.launch.train --layout {quote(file)} "$@"\n'
    )


def slurm_script(layout: Layout, *, devices_per_node: int, file: str = "layout.toml") -> str:
    """An sbatch script: one torchrun a node; MASTER_PORT may be set."""
    nodes, local = _nodes(layout, devices_per_node)
    on_each_node = (
        f'torchrun --nnodes {nodes} --nproc-per-node {local} --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" '
        f'--master-port "$MASTER_PORT" -m fourfold.launch.train --layout {quote(file)} "$@"'
    )
    return (
        "#!/usr/bin/env bash\n"
        f"#SBATCH --job-name=fourfold\n#SBATCH --nodes={nodes}\n#SBATCH --ntasks-per-node=1\n"
        f"#SBATCH --gpus-per-node={local}\n#SBATCH --exclusive\nset -euo pipefail\n"
        f"# {layout}\n"
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"\n'
        'export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"\n'
        f'srun bash -c {quote(on_each_node)} train "$@"\n'
    )


def mpi_script(layout: Layout, *, devices_per_node: int, file: str = "layout.toml") -> str:
    """A shell script around mpiexec, one process a rank, in the words of the MPI that is found."""
    _, local = _nodes(layout, devices_per_node)
    return (
        "#!/usr/bin/env bash\nset -euo pipefail\n"
        f"# {layout}\n"
        "# Open MPI places ranks by its own option; MPICH, Intel MPI and their kin know -ppn.\n"
        f'if [[ "$(mpiexec --version 2>&1)" == *"Open MPI"* ]]; then PER_NODE=(--map-by ppr:{local}:node)\n'
        f"else PER_NODE=(-ppn {local}); fi\n"
        f'mpiexec -n {layout.world_size} "${{PER_NODE[@]}}" \\\n'
        f'  python -m fourfold.launch.train --layout {quote(file)} "$@"\n'
    )


def _nodes(layout: Layout, devices_per_node: int) -> tuple[int, int]:
    local = min(layout.world_size, devices_per_node)
    if layout.world_size % local:
        raise ValueError(
            f"{layout.world_size} ranks do not fill nodes of {devices_per_node} devices: choose a multiple, "
            "or --gpus-per-node"
        )
    return layout.world_size // local, local
