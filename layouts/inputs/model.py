"""A decoder as the planner sees it: widths, counts, and exact parameter numbers.

Any Hugging Face `config.json` of a decoder is a model. transformers could count its parameters by building it, but that
needs torch and minutes for 405 billion of them; here the numbers come from the config alone (a test compares them with
transformers' own models).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Widths in elements, lengths in tokens, counts of parameters in elements.

    `config` is the Hugging Face config that this was read from, kept whole: the launcher builds the model from it.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    norm_params: int = 1
    """Parameters of one norm, in units of its width: 1 for RMSNorm, 2 for LayerNorm."""
    norms_per_layer: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    learned_positions: int = 0
    rotary: bool = True
    sliding_window: int = 0
    """Keys a query of a windowed layer sees; 0 where every layer is full."""
    num_windowed_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_expert_ffn_size: int = 0
    num_moe_layers: int = 0
    max_seq_len: int = 0
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.name}: {name}={value!r}, but it is a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: {self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads: "
                "the first must be a multiple of the second"
            )
        if self.num_moe_layers < self.num_layers and self.ffn_size < 1:
            raise ValueError(f"{self.name}: ffn_size={self.ffn_size!r}, but it is a whole number of at least 1")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys, which is also that of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_params(self) -> int:
        """One layer's attention, with its biases and query/key norms."""
        qkv = self.q_size + 2 * self.kv_size
        matrices = self.hidden_size * qkv + self.q_size * self.hidden_size
        biases = (qkv if self.qkv_bias else 0) + (self.hidden_size if self.out_bias else 0)
        return matrices + biases + (2 * self.head_dim if self.qk_norm else 0)

    def mlp_params(self, ffn_size: int) -> int:
        """A feed-forward block of width `ffn_size`: up (and gate) and down."""
        up = 2 if self.gated_mlp else 1
        biases = (up * ffn_size + self.hidden_size) if self.mlp_bias else 0
        return (up + 1) * self.hidden_size * ffn_size + biases

    @property
    def layer_norm_params(self) -> int:
        return self.norms_per_layer * self.norm_params * self.hidden_size

    @property
    def dense_layer_params(self) -> int:
        return self.attention_params + self.mlp_params(self.ffn_size) + self.layer_norm_params

    @property
    def expert_params(self) -> int:
        """All routed experts of one mixture-of-experts layer."""
        return self.num_experts * self.mlp_params(self.expert_ffn_size)

    @property
    def moe_layer_params(self) -> int:
        router = self.hidden_size * self.num_experts
        shared = 0
        if self.shared_expert_ffn_size:
            shared = self.mlp_params(self.shared_expert_ffn_size) + self.hidden_size  # and its sigmoid gate
        return self.attention_params + self.layer_norm_params + router + shared + self.expert_params

    @property
    def embedding_params(self) -> int:
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def head_params(self) -> int:
        """The output projection, whether or not it is tied to the embedding."""
        return self.vocab_size * self.hidden_size + (self.vocab_size if self.head_bias else 0)

    @property
    def final_norm_params(self) -> int:
        return self.norm_params * self.hidden_size

    @property
    def layers_params(self) -> int:
        dense = self.num_layers - self.num_moe_layers
        return dense * self.dense_layer_params + self.num_moe_layers * self.moe_layer_params

    @cached_property
    def num_params(self) -> int:
        """Every trained parameter; a tied head is counted once."""
        head = (self.vocab_size if self.head_bias else 0) if self.tied_embeddings else self.head_params
        return self.layers_params + self.embedding_params + self.final_norm_params + head

    @cached_property
    def num_active_params(self) -> int:
        """Parameters that one token meets: all, less the experts it is not routed to."""
        if not self.num_moe_layers:
            return self.num_params
        idle = (self.num_experts - self.experts_per_token) * self.mlp_params(self.expert_ffn_size)
        return self.num_params - self.num_moe_layers * idle

    def score_length(self, seq_len: int) -> float:
        """Keys that a query meets on average over layers: half the sequence (causal), less with a sliding window."""
        causal = seq_len / 2
        if not self.sliding_window or self.sliding_window >= seq_len:
            return causal
        window = self.sliding_window
        windowed = window - window**2 / (2 * seq_len)
        share = self.num_windowed_layers / self.num_layers
        return share * windowed + (1 - share) * causal

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of training one token: 6 N + 12 L q S.

        The convention of PaLM (arXiv 2204.02311, appendix B) and of Hagemann et al. 2023: embeddings counted, attention
        counted as if not causal. Recomputation is not counted, so MFU falls with checkpointing.
        """
        return 6.0 * self.num_active_params + 12.0 * self.num_layers * self.q_size * seq_len


def load_model(path_or_preset: str | Path | Mapping[str, Any]) -> ModelConfig:
    """The model of a Hugging Face config.json, of a folder that holds one, or of a preset's name.

    Raises:
        ValueError: no such file or preset; not JSON; not a decoder that this knows; a field is missing.
    """
    from fourfold.layouts.inputs.huggingface import model_from_config

    if isinstance(path_or_preset, Mapping):
        return model_from_config(path_or_preset)
    name = str(path_or_preset)
    presets = model_presets()
    if name.lower() in presets:
        return model_from_config(presets[name.lower()]["config"], name=name.lower())
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        known = ", ".join(sorted(presets))
        raise ValueError(f"{name}: neither a config.json nor a preset; the presets are {known}")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}): give a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, but a Hugging Face config.json is an object")
    return model_from_config(config, name=str(path))


def model_presets() -> dict[str, dict[str, Any]]:
    """name -> {source, config}, as shipped in data/models.json."""
    presets: dict[str, dict[str, Any]] = json.loads(
        files("fourfold.layouts").joinpath("data/models.json").read_text(encoding="utf-8")
    )
    return presets


def human_count(count: float) -> str:
    """1.23B, 45.6M: three digits and a suffix."""
    if count < 1000:
        return f"{count:.0f}"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.3g}{('', 'k', 'M', 'B', 'T')[power]}"
