"""What streaming keeps in memory, as a closed form without torch: for planners, and for "how long a sequence fits?".

Two moments bound a step. At the head, every layer's input is there, and the last hidden states with their gradient.
In the backward of the last layer, one gradient of hidden states, its keys, values and their gradients are there. Both
grow linearly with the tokens; the chunks' own work does not grow.

Rules of thumb count what the Llama family's modules make of a token in a chunk; they were set by measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Auto = int | Literal["auto"]
MIN_LOGITS_CHUNK = 32


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Sizes that "auto" chooses among on a kind of device.

    Attributes:
        pairs: (queries of attention, tokens of MLP) a chunk, smallest first.
        logits_bytes: of the fp32 logits of whole rows.
        tile: (bytes, tokens) of a tile of logits.
    """

    pairs: tuple[tuple[int, int], ...]
    logits_bytes: int
    tile: tuple[int, int]


# A CPU's kernels are at their best from some hundred rows on. A GPU is idle below some thousands.
CHUNK_SIZES = {
    "cpu": ChunkSizes(((256, 128), (512, 256), (1024, 128)), 16 << 20, (4 << 20, 1024)),
    "cuda": ChunkSizes(((1024, 1024), (2048, 2048), (4096, 4096)), 256 << 20, (256 << 20, 4096)),
}
# "auto" takes the largest chunks that cost at most this much of the memory that the smallest would take.
ROOM = 1.1
# Keys a kernel call takes at most: its own gradients of keys are that long, and are re-read while still in cache.
KEYS_A_CALL = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMemory:
    """Bytes of activations and passing gradients; weights, their gradients and optimizer states are not in it.

    Gradients of fp32 weights are summed where they stay. Those of bf16 weights are first summed in fp32: that is in it.

    Attributes:
        checkpoints_bytes: layer inputs but the first, and attention outputs where they are kept.
        head_bytes: at the head, beside the checkpoints.
        layer_bytes: in a layer's backward, beside the checkpoints.
        bytes_a_token: growth of the total with each further token.
    """

    checkpoints_bytes: int
    head_bytes: int
    layer_bytes: int
    bytes_a_token: float

    @property
    def total_bytes(self) -> int:
        """The step's peak."""
        return self.checkpoints_bytes + max(self.head_bytes, self.layer_bytes)


def head_groups(device_type: str) -> int:
    """Groups of key heads whose attention is done after one another; 0 is chunks of queries instead."""
    return 0 if device_type == "cpu" else 4


def kept_layers(keep_attention: bool | int, layers: int) -> int:
    """How many of so many layers, the last ones, keep attention's output: True is all of them."""
    return layers if keep_attention is True else min(int(keep_attention), layers)


def logits_chunk_size(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens whose whole logits fit the device's logits_bytes in fp32, at least MIN_LOGITS_CHUNK."""
    return max(MIN_LOGITS_CHUNK, _sizes(device_type).logits_bytes // (4 * vocabulary))


def logits_tile(vocabulary: int, tokens: int | None = None, device_type: str = "cpu") -> tuple[int, int]:
    """(tokens, rows of the vocabulary) of a tile of logits of the device's size in fp32, with `tokens` if given."""
    size, chosen = _sizes(device_type).tile
    chosen = tokens or chosen
    return chosen, min(vocabulary, max(64, size // (4 * chosen)))


def auto_chunks(
    config: Any, seq_len: int, *, device_type: str = "cpu", chunk_size: Auto = "auto", **arguments: Any
) -> tuple[int, int]:
    """(chunk_size, mlp_chunk) that "auto" stands for: the largest that take little more memory than the smallest.

    Args:
        config, seq_len, arguments: as stream_memory's.
        device_type: "cpu" or "cuda".
        chunk_size: queries a chunk where they are given, and only the MLP's tokens are wanted.
    """
    pairs = _sizes(device_type).pairs
    if chunk_size != "auto":
        pairs = tuple((chunk_size, min(chunk_size, mlp)) for _, mlp in pairs)

    def total(pair: tuple[int, int]) -> int:
        found = stream_memory(
            config, seq_len, chunk_size=pair[0], mlp_chunk=pair[1], device_type=device_type, **arguments
        )
        return found.total_bytes

    most = ROOM * total(pairs[0])
    return next(pair for pair in reversed(pairs) if pair == pairs[0] or total(pair) <= most)


def stream_memory(
    config: Any,
    seq_len: int,
    *,
    batch: int = 1,
    chunk_size: Auto = "auto",
    mlp_chunk: Auto = "auto",
    logits_chunk: Auto = "auto",
    keep_attention: bool | int = False,
    offload: bool = False,
    itemsize: int = 4,
    device_type: str = "cpu",
) -> StreamMemory:
    """Live tensors' memory at the peak of one streamed forward and backward.

    A process holds more than its live tensors: on CPU 30 to 60 MiB more were seen (benchmarks/stream_backprop).

    Args:
        config: a Hugging Face config, or its fields as a mapping: dense decoders of the Llama family.
        seq_len, batch: tokens a row, and rows.
        chunk_size, mlp_chunk, logits_chunk, keep_attention: as stream_backprop's.
        offload: whether what layers keep is offloaded, as CUDA does. Counted from the code, not yet measured.
        itemsize: bytes of an activation: 4 for fp32, 2 for bf16.
        device_type: what "auto" chooses for, "cpu" or "cuda".
    Raises:
        ValueError: a length, batch or chunk below 1.
    Source: derived here; checked against measured peaks in tests/unit/stream/test_stream_memory.py.
    """
    if chunk_size == "auto" or mlp_chunk == "auto":
        found = auto_chunks(
            config, seq_len, batch=batch, chunk_size=chunk_size, logits_chunk=logits_chunk,
            keep_attention=keep_attention, offload=offload, itemsize=itemsize, device_type=device_type,
        )  # fmt: skip
        chunk_size, mlp_chunk = found[0], found[1] if mlp_chunk == "auto" else mlp_chunk
    given = {"seq_len": seq_len, "batch": batch, "chunk_size": chunk_size, "mlp_chunk": mlp_chunk}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    shape = _Shape.of(config)
    hidden, queries, keys, layers = (
        shape.hidden,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.layers,
    )
    kept = kept_layers(keep_attention, layers)
    # The first layer's input is looked up again. Of offloaded layers two are on the device, one on its way.
    on_device = min(2, layers - 1) / max(1, layers - 1) if offload else 1.0
    a_token = on_device * (layers - 1) * hidden * itemsize
    a_token += (min(2, kept) if offload else kept) * (queries * itemsize + 4 * shape.heads)
    rotary = 2 * shape.head_dim * itemsize / batch
    head_a_token = 2 * hidden * itemsize + rotary
    layer_a_token = hidden * itemsize + 2 * keys * (itemsize + 4) + rotary
    tokens, chunk = batch * seq_len, batch * min(chunk_size, seq_len)
    sums = 0 if itemsize >= 4 else 4  # bytes a parameter of which a gradient is being summed
    asked = None if logits_chunk == "auto" else logits_chunk
    rows = min(tokens, asked or logits_chunk_size(shape.vocabulary, device_type))
    tile_tokens, tile_rows = logits_tile(shape.vocabulary, asked, device_type)
    tile = min(tokens, tile_tokens) * 4 * (6 * hidden + 2 * tile_rows)
    head = sums * shape.vocabulary * hidden + max(rows * 4 * (6 * hidden + shape.vocabulary), tile)
    attention = chunk * itemsize * (2 * hidden + 4 * queries + 5 * keys) + 2 * batch * keys * itemsize * KEYS_A_CALL
    mlp = min(batch * mlp_chunk, chunk) * itemsize * (6 * hidden + 6 * shape.intermediate)
    layer = shape.layer_parameters * sums + attention + mlp
    return StreamMemory(
        checkpoints_bytes=int(tokens * a_token),
        head_bytes=int(tokens * head_a_token + head),
        layer_bytes=int(tokens * layer_a_token + layer),
        bytes_a_token=a_token + max(head_a_token, layer_a_token),
    )


def max_seq_len(
    config: Any, memory_bytes: float, *, state_bytes_a_parameter: float = 16.0, limit: int = 1 << 26, **arguments: Any
) -> int:
    """The longest sequence whose streamed step fits into a device's memory; 0 where not one token does.

    Args:
        config: as stream_memory's.
        memory_bytes: what the device has for this process.
        state_bytes_a_parameter: weights, gradients and optimizer states: 16 for AdamW in fp32, less where sharded.
        limit: give up above it.
        arguments: stream_memory's others.
    """
    left = memory_bytes - state_bytes_a_parameter * num_parameters(config)
    fits, over = 0, limit + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        if stream_memory(config, middle, **arguments).total_bytes <= left:
            fits = middle
        else:
            over = middle
    return fits


def num_parameters(config: Any) -> int:
    """Parameters of a dense decoder of the Llama family; biases and the norms of heads are left out."""
    shape = _Shape.of(config)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * shape.layer_parameters + embeddings + shape.hidden


def _sizes(device_type: str) -> ChunkSizes:
    return CHUNK_SIZES["cpu" if device_type == "cpu" else "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> "_Shape":
        def field(name: str, default: Any = None) -> Any:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            return default if value is None else value

        hidden, heads = field("hidden_size"), field("num_attention_heads")
        return cls(
            layers=field("num_hidden_layers"),
            hidden=hidden,
            intermediate=field("intermediate_size"),
            heads=heads,
            kv_heads=field("num_key_value_heads", heads),
            head_dim=field("head_dim", hidden // heads),
            vocabulary=field("vocab_size"),
            tied=bool(field("tie_word_embeddings", False)),
        )

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
