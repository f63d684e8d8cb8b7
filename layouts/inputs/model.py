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

from fourfold.layouts.inputs.reading import read_json_object, shortened, whole

MOST_WIDTH = 1 << 24
"""Of a width, a vocabulary or a count of layers: some hundred times the largest there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): q, k and v through narrow projections."""

    q_rank: int
    """0: q has no narrow projection."""
    kv_rank: int
    nope_dim: int
    """Of each head's q and k, the part without rotary embedding."""
    rope_dim: int
    value_dim: int

    def projections(self, hidden: int, heads: int) -> list[tuple[int, int]]:
        """(in, out) of its linear layers."""
        q_size = heads * (self.nope_dim + self.rope_dim)
        q = [(hidden, self.q_rank), (self.q_rank, q_size)] if self.q_rank else [(hidden, q_size)]
        kv = [(hidden, self.kv_rank + self.rope_dim), (self.kv_rank, heads * (self.nope_dim + self.value_dim))]
        return [*q, *kv, (heads * self.value_dim, hidden)]

    def params(self, hidden: int, heads: int, *, bias: bool) -> int:
        """Projections, the norms of both latents, and with `bias` those of what reads or writes the hidden state."""
        narrow = self.q_rank + self.kv_rank
        biases = (self.q_rank + self.kv_rank + self.rope_dim + hidden) if bias else 0
        return sum(inner * outer for inner, outer in self.projections(hidden, heads)) + narrow + biases


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """Gated DeltaNet (arXiv 2412.06464): a state of fixed size in place of keys and values."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that its short convolution sees."""

    def projections(self, hidden: int) -> list[tuple[int, int]]:
        """(in, out) of its linear layers: q, k, v and gate; decay and rate; output."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return [(hidden, 2 * keys + 2 * values), (hidden, 2 * self.value_heads), (values, hidden)]

    def params(self, hidden: int) -> int:
        """Projections, convolution, decay and rate of each head, and the norm of a head's output."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        matrices = sum(inner * outer for inner, outer in self.projections(hidden))
        return matrices + (2 * keys + values) * self.kernel + 2 * self.value_heads + self.value_dim


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
    qk_norm_over_heads: bool = False
    """Whether the norm of q and k is as wide as all heads together, not as one."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    output_gate: bool = False
    """Whether attention's output is weighed by a gate as wide, made beside q."""
    attention_sinks: bool = False
    """A learned logit a head that takes attention off every key."""
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None
    num_linear_layers: int = 0
    """Layers whose attention is `linear`."""
    learned_positions: int = 0
    rotary: bool = True
    sliding_window: int = 0
    """Keys a query of a windowed layer sees; 0 where every layer is full."""
    num_windowed_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_expert_ffn_size: int = 0
    shared_expert_gate: bool = True
    router_bias: bool = False
    num_moe_layers: int = 0
    max_seq_len: int = 0
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            whole(getattr(self, name), f"{self.name}: {name}", most=MOST_WIDTH)
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
        if self.latent is not None:
            return self.latent.params(self.hidden_size, self.num_heads, bias=self.qkv_bias)
        qkv = (2 if self.output_gate else 1) * self.q_size + 2 * self.kv_size
        matrices = self.hidden_size * qkv + self.q_size * self.hidden_size
        biases = (qkv if self.qkv_bias else 0) + (self.hidden_size if self.out_bias else 0)
        norm_width = self.q_size + self.kv_size if self.qk_norm_over_heads else 2 * self.head_dim
        norms = self.norm_params * norm_width if self.qk_norm else 0
        return matrices + biases + norms + (self.num_heads if self.attention_sinks else 0)

    def mlp_params(self, ffn_size: int) -> int:
        """A feed-forward block of width `ffn_size`: up (and gate) and down."""
        up = 2 if self.gated_mlp else 1
        biases = (up * ffn_size + self.hidden_size) if self.mlp_bias else 0
        return (up + 1) * self.hidden_size * ffn_size + biases

    @property
    def layer_norm_params(self) -> int:
        return self.norms_per_layer * self.norm_params * self.hidden_size

    @property
    def expert_params(self) -> int:
        """All routed experts of one mixture-of-experts layer."""
        return self.num_experts * self.mlp_params(self.expert_ffn_size)

    @property
    def moe_params(self) -> int:
        """Router, shared expert and routed experts of one mixture-of-experts layer."""
        router = self.hidden_size * self.num_experts + (self.num_experts if self.router_bias else 0)
        shared = 0
        if self.shared_expert_ffn_size:
            shared = self.mlp_params(self.shared_expert_ffn_size)
            shared += self.hidden_size if self.shared_expert_gate else 0
        return router + shared + self.expert_params

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
        """All layers, without the embedding, the last norm and the head."""
        dense = self.num_layers - self.num_moe_layers
        feed_forward = dense * self.mlp_params(self.ffn_size) + self.num_moe_layers * self.moe_params
        attention = (self.num_layers - self.num_linear_layers) * self.attention_params
        if self.linear is not None:
            attention += self.num_linear_layers * self.linear.params(self.hidden_size)
        return self.num_layers * self.layer_norm_params + attention + feed_forward

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

    def check_length(self, seq_len: int) -> None:
        """Refuse a sequence for which there are no positions. Raises ValueError with the mend."""
        if self.learned_positions and seq_len > self.learned_positions:
            raise ValueError(
                f"seq_len={seq_len} is beyond the {self.learned_positions} positions that {self.name} has learned: "
                f"choose at most {self.learned_positions}"
            )

    def score_length(self, seq_len: int) -> float:
        """Keys that a query meets on average over layers: half the sequence (causal), less with a sliding window."""
        causal = seq_len / 2
        if self.num_linear_layers:  # its state has no keys
            causal *= 1 - self.num_linear_layers / self.num_layers
        if not self.sliding_window or self.sliding_window >= seq_len:
            return causal
        window = self.sliding_window
        windowed = window - window**2 / (2 * seq_len)
        share = self.num_windowed_layers / self.num_layers
        return share * windowed + (1 - share) * causal

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of training one token: 6 N + 12 q times the keys of each layer, S or its window.

        The convention of PaLM (arXiv 2204.02311, appendix B) and of Hagemann et al. 2023: embeddings counted, attention
        counted as if not causal, and a windowed layer by its window. Recomputation is not counted, so MFU falls with
        checkpointing. Every MFU that is shown, written or read comes from here.
        """
        full = self.num_layers - self.num_windowed_layers - self.num_linear_layers
        keys = full * seq_len + self.num_windowed_layers * min(self.sliding_window, seq_len)
        return 6.0 * self.num_active_params + 12.0 * self.q_size * keys


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
        raise ValueError(f"{shortened(name)}: neither a config.json nor a preset; the presets are {known}")
    return model_from_config(read_json_object(path, "give a Hugging Face config.json"), name=str(path))


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
