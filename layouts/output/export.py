"""A layout as the files that other tools launch from: Megatron-LM, DeepSpeed, torchtitan, torchrun, Slurm, MPI.

Each function refuses what its tool has not, naming the option, rather than leave it out in silence.
"""

from shlex import quote
from typing import Any

from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.parallel.grid import layer_ranges

TARGETS = ("megatron", "deepspeed", "torchtitan", "torchrun", "slurm", "mpi")


def _refuse(target: str, layout: Layout, **absent: bool) -> None:
    for name, present in absent.items():
        if present:
            raise ValueError(f"{target} has no {name.replace('_', ' ')}, which {layout} uses: fix it to its default")


def megatron_arguments(layout: Layout, model: ModelConfig) -> list[str]:
    """Arguments of Megatron-LM's pretrain_gpt.py, model and layout.

    Raises:
        ValueError: StreamBP, offloading, ZeRO 2 or 3, every-k checkpointing, heads exchanged in cp, stages between the
            first and the last that differ.
    """
    _refuse(
        "megatron", layout, StreamBP=layout.checkpointing == "stream", offloading=layout.offload,
        ZeRO_2_or_3=layout.zero_stage >= 2, asynchronous_pipeline=layout.asynchronous,
        checkpointing_every_few_layers=layout.checkpoint_every > 1, head_exchange=layout.cp_heads > 1,
    )  # fmt: skip
    ends = _uneven_ends(layout, model)
    words: dict[str, Any] = {
        "num-layers": model.num_layers, "hidden-size": model.hidden_size, "ffn-hidden-size": model.ffn_size
        or model.expert_ffn_size, "num-attention-heads": model.num_heads, "kv-channels": model.head_dim,
        "seq-length": layout.seq_len, "max-position-embeddings": max(layout.seq_len, model.max_seq_len),
        "vocab-size": model.vocab_size, "make-vocab-size-divisible-by": 1,
        "normalization": "RMSNorm" if model.norm_params == 1 else "LayerNorm",
        "position-embedding-type": "rope" if model.rotary else "learned_absolute",
        "tensor-model-parallel-size": layout.tp, "pipeline-model-parallel-size": layout.pp,
        "context-parallel-size": layout.cp, "micro-batch-size": layout.micro_batch,
        "global-batch-size": layout.global_batch,
    }  # fmt: skip
    flags = ["bf16", "use-flash-attn", "use-mcore-models"]
    if model.gated_mlp:
        flags.append("swiglu")
    if not model.mlp_bias:
        flags.append("disable-bias-linear")
    if not model.tied_embeddings:
        flags.append("untie-embeddings-and-output-weights")
    if model.num_kv_heads != model.num_heads:
        flags.append("group-query-attention")
        words["num-query-groups"] = model.num_kv_heads
    if layout.sequence_parallel:
        flags += ["sequence-parallel", "tp-comm-overlap"]  # as priced
    if layout.zero_stage == 1:
        flags += ["use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather"]
    if ends:
        words["decoder-first-pipeline-num-layers"], words["decoder-last-pipeline-num-layers"] = ends
    if layout.vp > 1:
        words["num-layers-per-virtual-pipeline-stage"] = model.num_layers // (layout.pp * layout.vp)
    if layout.checkpointing == "full":
        words |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    elif layout.checkpointing == "selective":
        words["recompute-granularity"] = "selective"
    if model.num_experts:
        words |= {
            "num-experts": model.num_experts, "moe-router-topk": model.experts_per_token,
            "expert-model-parallel-size": layout.ep,
        }  # fmt: skip
    arguments = [f"--{flag}" for flag in flags]
    for key, value in words.items():
        arguments += [f"--{key}", str(value)]
    return arguments


def _uneven_ends(layout: Layout, model: ModelConfig) -> tuple[int, int] | None:
    """Layers of the first and last stage where megatron must be told them; None where all stages have as many.

    Raises:
        ValueError: stages between them that differ, or chunks that do.
    """
    if layout.vp > 1:
        if model.num_layers % (layout.pp * layout.vp):
            raise ValueError(
                f"megatron cuts chunks evenly: {model.num_layers} layers are no multiple of pp={layout.pp} x "
                f"vp={layout.vp}"
            )
        return None
    sizes = _stage_sizes(layout, model)
    if len(set(sizes[1:-1])) > 1:
        raise ValueError(
            f"megatron cuts the layers between first and last stage evenly, and {layout} has stages of {sizes} layers: "
            "choose another pp, or embedding_counts_as and head_counts_as"
        )
    return (sizes[0], sizes[-1]) if len(set(sizes)) > 1 else None


def _stage_sizes(layout: Layout, model: ModelConfig) -> list[int]:
    return [
        len(s) for s in layer_ranges(model.num_layers, layout.pp, layout.embedding_counts_as, layout.head_counts_as)
    ]


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


def megatron_config(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """The same as fields of megatron.core's TransformerConfig."""
    megatron_arguments(layout, model)  # refuses what is not there
    fields: dict[str, Any] = {
        "num_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads, "kv_channels": model.head_dim, "ffn_hidden_size": model.ffn_size
        or model.expert_ffn_size, "gated_linear_unit": model.gated_mlp, "add_bias_linear": model.mlp_bias,
        "normalization": "RMSNorm" if model.norm_params == 1 else "LayerNorm",
        "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp, "sequence_parallel": layout.sequence_parallel,
        "tp_comm_overlap": layout.sequence_parallel, "bf16": True,
    }  # fmt: skip
    if layout.pp > 1:
        fields["pipeline_dtype"] = "bfloat16"
    ends = _uneven_ends(layout, model)
    if ends:
        fields["num_layers_in_first_pipeline_stage"], fields["num_layers_in_last_pipeline_stage"] = ends
    if layout.vp > 1:
        fields["virtual_pipeline_model_parallel_size"] = layout.vp
    if layout.checkpointing == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif layout.checkpointing == "selective":
        fields["recompute_granularity"] = "selective"
    if model.num_experts:
        fields |= {
            "num_moe_experts": model.num_experts, "moe_router_topk": model.experts_per_token,
            "expert_model_parallel_size": layout.ep,
        }  # fmt: skip
    return fields


def deepspeed_config(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """DeepSpeed's JSON: batch sizes, precision, ZeRO stage.

    Gradient clipping is set, because DeepSpeed's own default of 1.0 would apply otherwise.

    Raises:
        ValueError: tp, pp or cp above 1 (DeepSpeed takes them from the model's code, not from this file), StreamBP.
    """
    _refuse(
        "deepspeed's JSON", layout, tensor_parallelism=layout.tp > 1, pipeline=layout.pp > 1,
        context_parallelism=layout.cp > 1, StreamBP=layout.checkpointing == "stream",
        asynchronous_pipeline=layout.asynchronous,
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


def torchtitan_config(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """torchtitan's TOML: [training], [parallelism], [activation_checkpoint].

    Raises:
        ValueError: StreamBP, offloading, ZeRO 1 or 2, tp without sequence parallelism (torchtitan always has it).
    """
    _refuse(
        "torchtitan", layout, StreamBP=layout.checkpointing == "stream", offloading=layout.offload,
        ZeRO_1_or_2=layout.zero_stage in (1, 2), asynchronous_pipeline=layout.asynchronous,
        tensor_parallelism_without_sequence_parallelism=layout.tp > 1 and not layout.sequence_parallel,
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
        parallelism["pipeline_parallel_schedule"] = "Interleaved1F1B" if layout.vp > 1 else "1F1B"
        first, last = _torchtitan_less(layout, model)
        parallelism["pipeline_parallel_first_stage_less_layers"] = first
        parallelism["pipeline_parallel_last_stage_less_layers"] = last
        parallelism["pipeline_parallel_microbatch_size"] = layout.micro_batch
    local = layout.micro_batch if layout.pp == 1 else layout.global_batch // layout.dp
    return {
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
