"""Reads a Hugging Face decoder config: one small reader a family, and clear words for what is not one."""

from collections.abc import Callable, Mapping
from typing import Any

from fourfold.layouts.inputs.model import ModelConfig

Config = Mapping[str, Any]


class _Reader:
    """Typed access to a config's fields; every complaint names the field and the model."""

    def __init__(self, config: Config, name: str) -> None:
        self.config = config
        self.name = name

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{self.name}: {key}={value!r}, but it is a whole number of at least {least}")
            return value
        if default is None:
            raise ValueError(f"{self.name}: the config has no {keys[0]!r}: add it (a whole number of at least {least})")
        return default

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.name}: {key}={value!r}, but it is true or false")
        return value

    def common(self) -> dict[str, Any]:
        """Fields that Llama-like families share."""
        hidden, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        if "head_dim" not in self.config and hidden % heads:
            raise ValueError(
                f"{self.name}: hidden_size={hidden} is no multiple of num_attention_heads={heads}: "
                "change one of them, or give head_dim"
            )
        return {
            "hidden_size": hidden,
            "num_layers": self.whole("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", default=heads),
            "head_dim": self.whole("head_dim", default=max(1, hidden // heads)),
            "vocab_size": self.whole("vocab_size"),
            "tied_embeddings": self.flag("tie_word_embeddings", default=False),
            "max_seq_len": self.whole("max_position_embeddings", default=0, least=0),
        }

    def window(self, num_layers: int, every: bool) -> dict[str, Any]:
        """The sliding window, and how many layers have it."""
        size = self.whole("sliding_window", default=0, least=0)
        types = self.config.get("layer_types")
        if types is not None:
            windowed = sum(kind == "sliding_attention" for kind in types)
        else:
            windowed = num_layers if every else 0
        return {"sliding_window": size, "num_windowed_layers": windowed} if size and windowed else {}


def _llama(read: _Reader) -> dict[str, Any]:
    bias = read.flag("attention_bias", default=False)
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "qkv_bias": bias, "out_bias": bias,
        "mlp_bias": read.flag("mlp_bias", default=False),
    }  # fmt: skip


def _mistral(read: _Reader) -> dict[str, Any]:
    common = read.common()
    return {**common, "ffn_size": read.whole("intermediate_size"), **read.window(common["num_layers"], True)}


def _qwen2(read: _Reader) -> dict[str, Any]:
    return {**read.common(), "ffn_size": read.whole("intermediate_size"), "qkv_bias": True}


def _qwen3(read: _Reader) -> dict[str, Any]:
    bias = read.flag("attention_bias", default=False)
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "qk_norm": True, "qkv_bias": bias,
        "out_bias": bias,
    }  # fmt: skip


def _gemma(read: _Reader) -> dict[str, Any]:
    fields = {**_llama(read), "tied_embeddings": read.flag("tie_word_embeddings", default=True)}
    return {**fields, "head_dim": read.whole("head_dim", default=256)}


def _gemma2(read: _Reader) -> dict[str, Any]:
    fields = {**_gemma(read), "norms_per_layer": 4}
    types = read.config.get("layer_types")
    size = read.whole("sliding_window", default=4096, least=0)
    layers = int(fields["num_layers"])
    windowed = (layers + 1) // 2 if types is None else sum(kind == "sliding_attention" for kind in types)
    return {**fields, "sliding_window": size, "num_windowed_layers": windowed if size else 0}


def _gemma3(read: _Reader) -> dict[str, Any]:
    fields = {**_gemma(read), "norms_per_layer": 4, "qk_norm": True}
    types = read.config.get("layer_types")
    size = read.whole("sliding_window", default=4096, least=0)
    every = read.whole("sliding_window_pattern", default=6)
    layers = int(fields["num_layers"])
    windowed = layers - layers // every if types is None else sum(kind == "sliding_attention" for kind in types)
    return {**fields, "sliding_window": size, "num_windowed_layers": windowed if size else 0}


def _gpt2(read: _Reader) -> dict[str, Any]:
    hidden, heads = read.whole("n_embd", "hidden_size"), read.whole("n_head", "num_attention_heads")
    if hidden % heads:
        raise ValueError(f"{read.name}: n_embd={hidden} is no multiple of n_head={heads}: change one of them")
    positions = read.whole("n_positions", "max_position_embeddings", "n_ctx")
    return {
        "hidden_size": hidden, "num_layers": read.whole("n_layer", "num_hidden_layers"), "num_heads": heads,
        "num_kv_heads": heads, "head_dim": hidden // heads, "vocab_size": read.whole("vocab_size"),
        "ffn_size": read.whole("n_inner", default=4 * hidden), "tied_embeddings": read.flag(
            "tie_word_embeddings", default=True),
        "gated_mlp": False, "norm_params": 2, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "learned_positions": positions, "rotary": False, "max_seq_len": positions,
    }  # fmt: skip


def _gpt_neox(read: _Reader) -> dict[str, Any]:
    bias = read.flag("attention_bias", default=True)
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "gated_mlp": False, "norm_params": 2,
        "qkv_bias": bias, "out_bias": bias, "mlp_bias": True,
    }  # fmt: skip


def _phi(read: _Reader) -> dict[str, Any]:
    # One norm a layer (attention and feed-forward run side by side), and a bias on the head.
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "gated_mlp": False, "norm_params": 2,
        "norms_per_layer": 1, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_bias": True,
    }  # fmt: skip


def _phi3(read: _Reader) -> dict[str, Any]:
    common = read.common()
    return {**common, "ffn_size": read.whole("intermediate_size"), **read.window(common["num_layers"], True)}


def _mixtral(read: _Reader) -> dict[str, Any]:
    common = read.common()
    return {
        **common, "ffn_size": 0, "num_experts": read.whole("num_local_experts", "num_experts"),
        "experts_per_token": read.whole("num_experts_per_tok"), "expert_ffn_size": read.whole("intermediate_size"),
        "num_moe_layers": common["num_layers"], **read.window(common["num_layers"], True),
    }  # fmt: skip


def _qwen_moe(read: _Reader) -> dict[str, Any]:
    """Qwen2-MoE and Qwen3-MoE: a dense feed-forward in `mlp_only_layers` and where the sparse step skips a layer."""
    common = read.common()
    dense = set(read.config.get("mlp_only_layers") or ())
    step = read.whole("decoder_sparse_step", default=1)
    layers = common["num_layers"]
    moe = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    qwen2 = read.config.get("model_type") == "qwen2_moe"
    bias = read.flag("attention_bias", default=False)
    return {
        **common, "ffn_size": read.whole("intermediate_size", default=0 if moe == layers else None),
        "num_experts": read.whole("num_experts", "num_local_experts"),
        "experts_per_token": read.whole("num_experts_per_tok"),
        "expert_ffn_size": read.whole("moe_intermediate_size"), "num_moe_layers": moe,
        "shared_expert_ffn_size": read.whole("shared_expert_intermediate_size") if qwen2 else 0,
        "qk_norm": not qwen2, "qkv_bias": (read.flag("qkv_bias", default=True) if qwen2 else bias),
        "out_bias": bias if not qwen2 else False,
    }  # fmt: skip


READERS: dict[str, Callable[[_Reader], dict[str, Any]]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "gemma": _gemma, "gemma2": _gemma2,
    "gemma3_text": _gemma3, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "phi": _phi, "phi3": _phi3, "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe, "qwen3_moe": _qwen_moe,
}  # fmt: skip

_ENCODERS = ("bert", "roberta", "distilbert", "albert", "electra", "deberta", "vit", "clip", "t5", "bart", "whisper")


def model_from_config(config: Config, *, name: str = "") -> ModelConfig:
    """Read a Hugging Face config.

    Raises:
        ValueError: an encoder, an unknown family, or a missing or senseless field; names it.
    """
    kind = config.get("model_type")
    title = name or str(config.get("_name_or_path") or kind or "model")
    if kind is None:
        raise ValueError(f"{title}: the config has no 'model_type': add it (one of {', '.join(sorted(READERS))})")
    if kind not in READERS:
        known = ", ".join(sorted(READERS))
        if any(str(kind).startswith(word) for word in _ENCODERS) or config.get("is_encoder_decoder"):
            raise ValueError(f"{title}: model_type={kind!r} is not a decoder-only language model; these are: {known}")
        raise ValueError(f"{title}: model_type={kind!r} is not known here; these are: {known}")
    fields = READERS[str(kind)](_Reader(config, title))
    return ModelConfig(name=title, config=dict(config), **fields)
