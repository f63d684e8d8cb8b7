"""The matrix, attention and message shapes that a Llama-style decoder gives a rank.

A matmul sample holds for its shape and its operand layout only, so the shapes that will run are the ones to measure:
every linear layer's forward, input gradient and weight gradient, under each tensor-parallel degree, for the tokens of
each micro-batch under each context-parallel degree.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a decoder of the Llama family."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    num_layers: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r}: the model's sizes are whole numbers, at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads do not divide into {self.kv_heads} key/value heads")

    def tp_degrees(self, num_ranks: int) -> list[int]:
        """Divisors of `num_ranks` that also cut heads, key/value heads and the MLP evenly."""
        return [
            tp
            for tp in range(1, num_ranks + 1)
            if not any(size % tp for size in (num_ranks, self.heads, self.kv_heads, self.ffn))
        ]

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer, with its two norms."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden


_FIELDS = {"hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads", "vocab": "vocab_size",
           "num_layers": "num_hidden_layers"}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The config.json at `path` as a table.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except (OSError, ValueError, RecursionError) as error:  # of text that is none, of JSON, of brackets without end
        raise ValueError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a config.json holds an object, this holds a {type(config).__name__}")
    return config


def model_shape(config: dict[str, Any]) -> ModelShape:
    """The sizes in a Hugging Face config.

    Raises:
        ValueError: names the missing fields, or the sizes that do not fit.
    """
    missing = [field for field in _FIELDS.values() if field not in config]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}: profiling needs a decoder of the Llama family")
    sizes = {name: config[field] for name, field in _FIELDS.items()}
    heads, hidden = sizes["heads"], sizes["hidden"]
    derivable = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    head_dim = config.get("head_dim") or (hidden // heads if derivable else 1)  # if not, the check names the culprit
    return ModelShape(**sizes, kv_heads=config.get("num_key_value_heads") or heads, head_dim=head_dim)


def matmul_shapes(model: ModelShape, tokens: int, tp: int) -> list[tuple[int, int, int, str]]:
    """(m, n, k, operands) of every matmul of one step on `tokens` tokens of one rank, without repeats.

    operands: "nt" for the forward of a linear layer, x[m,k] @ weight[n,k]^T; "nn" for the gradient of its input;
    "tn" for the gradient of its weight, grad[k,m]^T @ x[k,n].
    """
    query, key = model.heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp
    ffn, vocab = model.ffn // tp, -(-model.vocab // tp)
    linears = [(query, model.hidden), (key, model.hidden), (model.hidden, query), (ffn, model.hidden),
               (model.hidden, ffn), (vocab, model.hidden)]  # fmt: skip
    shapes = []
    for out, into in linears:
        shapes += [(tokens, out, into, "nt"), (tokens, into, out, "nn"), (out, into, tokens, "tn")]
    return list(dict.fromkeys(shapes))
