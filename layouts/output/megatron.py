"""A model and its layout as Megatron-LM's arguments and as megatron.core's TransformerConfig, the same facts in both.

What Megatron has no word for (norms after a block, soft caps, parallel residuals, mixed windows) is refused by name: a
run that starts and computes another model is worse than none.
"""

from typing import Any

from fourfold.layouts.inputs.defaults import NORM_EPSILON, ROTARY_BASE, ROTARY_SHARE
from fourfold.layouts.inputs.families import SAME_AS
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.output.export import unsaid
from fourfold.parallel.grid import layer_ranges

VERSION = "core_v0.15.3"
"""The release of Megatron-LM whose arguments these are; their names are in data/megatron_core_v0.15.3.txt."""
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What --use-rope-scaling takes for granted (Llama 3.1)."""
_FOREIGN = {
    "gemma": "embeddings scaled by the width", "gemma2": "norms after each block and soft caps",
    "gemma3_text": "norms after each block", "olmo2": "norms after each block", "olmo3": "norms after each block",
    "granite": "multipliers of embedding, residual and logits", "smollm3": "layers without rotary embedding",
    "phi": "attention and feed-forward side by side", "gpt_oss": "sinks and clamped experts",
    "deepseek_v3": "counterpart here for latent attention with its own norms and rotary scaling",
    "qwen3_next": "linear attention and output gates", "llama4_text": "chunked attention without rotary embedding",
    "ministral3": "attention scaled by the position",
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_moe_text"),
        "rotary embedding of time, height and width",
    ),
}  # fmt: skip
"""Families with something that Megatron-LM's arguments have no word for."""
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Of a feed-forward without a gate; Megatron computes its fused approximation for each."""


def check_model(model: ModelConfig, target: str = "megatron") -> None:
    """Refuse a model that Megatron would not compute as it is.

    Raises:
        ValueError: names what has no counterpart.
    """
    named, kind = str(model.config.get("model_type", "")), _kind(model)
    foreign = _FOREIGN.get(named) or _FOREIGN.get(kind)
    reasons = [foreign] if foreign else []
    if kind == "gpt_neox" and model.config.get("use_parallel_residual", True):
        reasons.append("attention and feed-forward side by side (use_parallel_residual)")
    if model.shared_expert_ffn_size and model.shared_expert_gate:
        reasons.append("gate on the shared expert")
    if model.sliding_window and 0 < model.num_windowed_layers < model.num_layers:
        reasons.append(f"a window in {model.num_windowed_layers} of {model.num_layers} layers")
    if model.gated_mlp and _activation(model) not in ("silu", "swish"):
        reasons.append(f"a feed-forward gated by {_activation(model)!r}")
    if not model.gated_mlp and _activation(model) not in GELU:
        reasons.append(f"activation {_activation(model)!r}")
    if model.mlp_bias and not (model.qkv_bias and model.out_bias):
        reasons.append("biases in the feed-forward alone")
    if model.out_bias and not model.mlp_bias:
        reasons.append("biases in attention's output alone")
    if _sigmoid_router(model) and not model.config.get("norm_topk_prob", True):
        reasons.append("sigmoid routing whose weights do not add up to 1 (norm_topk_prob=false)")
    base = _rope(model)["rope_theta"]
    if model.rotary and base != int(base):
        reasons.append(f"rotary base {base} (a whole number)")
    scaling = _rope(model).get("rope_type", "default")
    if scaling not in ("default", "llama3") or (scaling == "llama3" and not _is_llama3(model)):
        reasons.append(f"rotary scaling {scaling!r} of other factors than Llama 3.1's")
    if reasons:
        raise ValueError(f"{target} has no {', no '.join(reasons)}, which {model.name} has")


def _kind(model: ModelConfig) -> str:
    named = str(model.config.get("model_type", ""))
    return SAME_AS.get(named, named)


def _sigmoid_router(model: ModelConfig) -> bool:
    """Whether experts are chosen by sigmoid scores and a bias that balances them (DeepSeek-V3's routing)."""
    return model.config.get("model_type") == "glm4_moe"


def _router_words(model: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """(options with a value, options without) of how tokens choose experts.

    Megatron's default, a softmax over the chosen experts alone, is that of Mixtral, and of Qwen with norm_topk_prob.
    """
    config = model.config
    if _sigmoid_router(model):
        words: dict[str, Any] = {"moe-router-score-function": "sigmoid"}
        words["moe-router-topk-scaling-factor"] = config.get("routed_scaling_factor", 1.0)
        groups = config.get("n_group") or 1
        if groups > 1:
            words |= {"moe-router-num-groups": groups, "moe-router-group-topk": config.get("topk_group", 1)}
        return words, ["moe-router-enable-expert-bias"]
    unscaled = config.get("model_type") == "qwen3_moe" and not config.get("norm_topk_prob", False)
    return {}, ["moe-router-pre-softmax"] * unscaled


def _activation(model: ModelConfig) -> str:
    default = "silu" if model.gated_mlp else "gelu"
    return str(model.config.get("hidden_act") or model.config.get("activation_function") or default)


def _rope(model: ModelConfig) -> dict[str, Any]:
    """Rotary parameters, wherever a config keeps them."""
    config = model.config
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for name, old, default in (
        ("rope_theta", "rotary_emb_base", ROTARY_BASE.get(_kind(model), 10000.0)),
        ("partial_rotary_factor", "rotary_pct", ROTARY_SHARE.get(_kind(model), 1.0)),
    ):
        stated = (rope.get(name), config.get(name), config.get(old))
        rope[name] = next((value for value in stated if value is not None), default)
    return rope


def _is_llama3(model: ModelConfig) -> bool:
    rope = _rope(model)
    return all(rope.get(name) == value for name, value in LLAMA3_SCALING.items())


def _norm_eps(model: ModelConfig) -> float:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    default = NORM_EPSILON.get(_kind(model), 1e-6) if model.config else 1e-5
    return float(next((model.config[name] for name in names if model.config.get(name)), default))


def _moe_layers(model: ModelConfig) -> list[int] | None:
    """For each layer 1 where it is a mixture; None where all are, or where the config's order is not known."""
    if model.num_moe_layers == model.num_layers:
        return None
    dense = model.config.get("first_k_dense_replace")
    if dense is None:
        skipped, step = model.config.get("mlp_only_layers") or [], model.config.get("decoder_sparse_step", 1)
        return [int(layer not in skipped and (layer + 1) % step == 0) for layer in range(model.num_layers)]
    return [int(layer >= dense) for layer in range(model.num_layers)]


def megatron_arguments(layout: Layout, model: ModelConfig) -> list[str]:
    """Arguments of Megatron-LM's pretrain_gpt.py, model and layout.

    Raises:
        ValueError: StreamBP, offloading, ZeRO 2 or 3, every-k checkpointing, heads exchanged in cp, stages between the
            first and the last that differ; tp and experts without sequence parallelism; a model with parts that
            Megatron has not.
    """
    check_model(model)
    _check_layout(layout, model)
    words, flags = _model_words(layout, model)
    words |= {
        "tensor-model-parallel-size": layout.tp, "pipeline-model-parallel-size": layout.pp,
        "context-parallel-size": layout.cp, "micro-batch-size": layout.micro_batch,
        "global-batch-size": layout.global_batch,
    }  # fmt: skip
    if layout.sequence_parallel:
        flags += ["sequence-parallel", "tp-comm-overlap"]  # as priced
    if layout.zero_stage == 1:
        flags += ["use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather"]
    ends = _uneven_ends(layout, model)
    if ends:
        words["decoder-first-pipeline-num-layers"], words["decoder-last-pipeline-num-layers"] = ends
    if layout.vp > 1:
        words["num-layers-per-virtual-pipeline-stage"] = model.num_layers // (layout.pp * layout.vp)
    if layout.checkpointing == "full":
        words |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    elif layout.checkpointing == "selective":
        words["recompute-granularity"] = "selective"
    if model.num_experts:
        words["expert-model-parallel-size"] = layout.ep
    arguments = [f"--{flag}" for flag in flags]
    for key, value in words.items():
        arguments += [f"--{key}", str(value)]
    return arguments


def _model_words(layout: Layout, model: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """(options with a value, options without) that make the model."""
    words: dict[str, Any] = {
        "num-layers": model.num_layers, "hidden-size": model.hidden_size, "ffn-hidden-size": model.ffn_size
        or model.expert_ffn_size, "num-attention-heads": model.num_heads, "kv-channels": model.head_dim,
        "seq-length": layout.seq_len, "max-position-embeddings": max(layout.seq_len, model.max_seq_len),
        "vocab-size": model.vocab_size, "make-vocab-size-divisible-by": 1,
        "normalization": "RMSNorm" if model.norm_params == 1 else "LayerNorm", "norm-epsilon": _norm_eps(model),
        "position-embedding-type": "rope" if model.rotary else "learned_absolute",
        "attention-dropout": 0.0, "hidden-dropout": 0.0,
    }  # fmt: skip
    flags = ["bf16", "use-flash-attn", "use-mcore-models"]
    if model.rotary:
        rope = _rope(model)
        words |= {"rotary-base": int(rope["rope_theta"]), "rotary-percent": float(rope["partial_rotary_factor"])}
        if rope["rope_type"] == "llama3":
            flags.append("use-rope-scaling")
            words["rope-scaling-factor"] = float(rope["factor"])
    flags += ["swiglu"] * model.gated_mlp
    flags += ["disable-bias-linear"] * (not model.mlp_bias)
    flags += ["add-qkv-bias"] * (model.qkv_bias and not model.mlp_bias)
    flags += ["qk-layernorm"] * model.qk_norm
    flags += ["untie-embeddings-and-output-weights"] * (not model.tied_embeddings)
    if model.num_kv_heads != model.num_heads:
        flags.append("group-query-attention")
        words["num-query-groups"] = model.num_kv_heads
    if model.sliding_window:
        words["window-size"] = f"{model.sliding_window - 1},0"
    if model.num_experts:
        words |= {
            "num-experts": model.num_experts, "moe-router-topk": model.experts_per_token,
            "moe-ffn-hidden-size": model.expert_ffn_size,
        }  # fmt: skip
        if model.shared_expert_ffn_size:
            words["moe-shared-expert-intermediate-size"] = model.shared_expert_ffn_size
        routing, routing_flags = _router_words(model)
        words |= routing
        flags += routing_flags
        pattern = _moe_layers(model)
        if pattern is not None:
            words["moe-layer-freq"] = str(pattern).replace(" ", "")
    return words, flags


def megatron_config(layout: Layout, model: ModelConfig) -> dict[str, Any]:
    """The same as fields of megatron.core's TransformerConfig. Raises ValueError as `megatron_arguments`."""
    megatron_arguments(layout, model)  # refuses what is not there
    fields: dict[str, Any] = {
        "num_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads, "kv_channels": model.head_dim, "ffn_hidden_size": model.ffn_size
        or model.expert_ffn_size, "gated_linear_unit": model.gated_mlp, "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.qkv_bias, "qk_layernorm": model.qk_norm, "layernorm_epsilon": _norm_eps(model),
        "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "normalization": "RMSNorm" if model.norm_params == 1 else "LayerNorm",
        "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp, "sequence_parallel": layout.sequence_parallel,
        "tp_comm_overlap": layout.sequence_parallel, "bf16": True,
    }  # fmt: skip
    if model.sliding_window:
        fields["window_size"] = (model.sliding_window - 1, 0)
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
            "moe_ffn_hidden_size": model.expert_ffn_size, "expert_model_parallel_size": layout.ep,
            "moe_layer_freq": _moe_layers(model) or 1,
        }  # fmt: skip
        routing, routing_flags = _router_words(model)
        fields |= {name.replace("-", "_"): value for name, value in routing.items()}
        fields |= {name.replace("-", "_"): True for name in routing_flags}
        if model.shared_expert_ffn_size:
            fields["moe_shared_expert_intermediate_size"] = model.shared_expert_ffn_size
    return fields


def _check_layout(layout: Layout, model: ModelConfig) -> None:
    absent = {
        "StreamBP": layout.checkpointing == "stream", "offloading": layout.offload,
        "ZeRO 2 or 3": layout.zero_stage >= 2, "asynchronous pipeline": layout.asynchronous,
        "zero-bubble schedule": layout.schedule == "zero-bubble",
        "checkpointing every few layers": layout.checkpoint_every > 1, "head exchange": layout.cp_heads > 1,
        **unsaid(layout),
    }  # fmt: skip
    for name, present in absent.items():
        if present:
            raise ValueError(f"megatron has no {name}, which {layout} uses: fix it to its default")
    if model.num_experts and layout.tp > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"megatron needs sequence parallelism where tp meets experts, and {layout} has none: add sp, or choose tp=1"
        )


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
    sizes = stage_sizes(layout, model)
    if len(set(sizes[1:-1])) > 1:
        raise ValueError(
            f"megatron cuts the layers between first and last stage evenly, and {layout} has stages of {sizes} layers: "
            "choose another pp, or embedding_counts_as and head_counts_as"
        )
    return (sizes[0], sizes[-1]) if len(set(sizes)) > 1 else None


def stage_sizes(layout: Layout, model: ModelConfig) -> list[int]:
    """Layers of each pipeline stage."""
    return [
        len(stage)
        for stage in layer_ranges(model.num_layers, layout.pp, layout.embedding_counts_as, layout.head_counts_as)
    ]
