"""What a streamed layer, and the head, have in memory while they work: counted from the code, by a model's shape."""

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
        loss_bytes: of the fp32 logits of whole rows, where the layers do not stream: see streams_loss.
    """

    pairs: tuple[tuple[int, int], ...]
    logits_bytes: int
    tile: tuple[int, int]
    loss_bytes: int


# A CPU's kernels are at their best from some hundred rows on. A GPU is idle below some thousands.
CHUNK_SIZES = {
    "cpu": ChunkSizes(((256, 128), (512, 256), (1024, 128)), 16 << 20, (4 << 20, 1024), 32 << 20),
    "cuda": ChunkSizes(((1024, 1024), (2048, 2048), (4096, 4096)), 256 << 20, (256 << 20, 4096), 1 << 30),
}
# Keys a kernel call takes at most: its own gradients of keys are that long, and are re-read while still in cache.
KEYS_A_CALL = 1024
# Pieces of a layer whose gradients are summed in the weights' own dtype; more are summed in fp32.
FEW_PIECES = 4
# By heads, tensors of the size of q, k and v that norms and rotary embedding make of a chunk, in the model's own code.
PROJECTION_COPIES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceSizes:
    """How a layer is cut.

    Attributes:
        groups: of key heads, whose attention is done after one another; 0 is chunks of queries.
        chunk: queries a chunk, or by heads tokens that are projected at a time.
        mlp_chunk: tokens a chunk of all that follows attention.
    """

    groups: int
    chunk: int
    mlp_chunk: int


def check_sizes(given: Mapping[str, Any]) -> None:
    """Refuse sizes of stream_backprop's that are none.

    Args:
        given: chunk_size, mlp_chunk, logits_chunk, head_groups and keep_attention by name, or some of them.
    Raises:
        ValueError: names the value and what it may be.
    """
    for name, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name == "keep_attention":
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"keep_attention={value!r}: give True, or a number of layers")
        elif value == "auto":
            continue
        elif name == "head_groups":
            if not whole or value < 0:
                raise ValueError(f"head_groups={value!r}: give a number of groups, 0 for chunks of queries, or 'auto'")
        elif not whole or value < 1:
            raise ValueError(f"{name}={value!r}: give a number of tokens, at least 1, or 'auto'")


def _pieces(seq_len: int, sizes: PieceSizes) -> int:
    """Into how many pieces a layer's tokens are cut at most."""
    return num_pieces(seq_len, sizes.chunk, sizes.mlp_chunk)


def num_pieces(seq_len: int, chunk: int, mlp_chunk: int) -> int:
    """Summands of a weight's gradient: pieces of all that follows attention begin anew with each chunk of queries."""
    return -(-seq_len // min(chunk, mlp_chunk))


def kept_layers(keep_attention: bool | int, layers: int) -> int:
    """How many of so many layers, the last ones, keep attention's output: True is all of them."""
    return layers if keep_attention is True else min(int(keep_attention), layers)


def logits_chunk_size(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens whose whole logits fit the device's logits_bytes in fp32, at least MIN_LOGITS_CHUNK."""
    return max(MIN_LOGITS_CHUNK, chunk_sizes(device_type).logits_bytes // (4 * vocabulary))


def loss_chunk_size(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens whose whole logits fit the device's loss_bytes in fp32, at least MIN_LOGITS_CHUNK."""
    return max(MIN_LOGITS_CHUNK, chunk_sizes(device_type).loss_bytes // (4 * vocabulary))


def streams_loss(tokens: Any, hidden: int, vocabulary: int, device_type: str) -> Any:
    """Whether the head is streamed for so many tokens of a micro-batch, where the layers are not; elementwise.

    It is where their logits are more than a chunk, and more than the head's gradient, which streaming sums in fp32
    beside the one that earlier micro-batches made.
    """
    return tokens > max(loss_chunk_size(vocabulary, device_type), hidden)


def loss_bytes(
    tokens: int, shape: "Shape", itemsize: int, device_type: str, *, hidden_itemsize: int, waiting: int = 1
) -> int:
    """What such a head holds for so many tokens of a micro-batch, at most.

    The last hidden states with their gradient, and the head's gradient in fp32, from the forward to the backward. Of a
    chunk its logits in fp32, in the products' dtype where that is narrower, and what the norm makes of its tokens. The
    weight in the products' dtype, where autocast casts it; products of rows of the vocabulary before they are added.

    Args:
        itemsize: of what matrix products give.
        hidden_itemsize: of hidden states: as `itemsize`, and wider under autocast.
        waiting: micro-batches whose losses wait for their backward together.
    """
    hidden, vocabulary = shape.hidden, shape.vocabulary
    chunk = min(tokens, loss_chunk_size(vocabulary, device_type))
    narrow = itemsize if itemsize < 4 else 0
    logits = chunk * (vocabulary * (4 + narrow) + 6 * 4 * hidden)
    rows = min(vocabulary, logits_tile(vocabulary, None, device_type)[1])
    weight = hidden * narrow * (rows + (vocabulary if hidden_itemsize > itemsize else 0))
    return waiting * (2 * tokens * hidden * hidden_itemsize + vocabulary * hidden * 4) + logits + weight


def logits_tile(vocabulary: int, tokens: int | None = None, device_type: str = "cpu") -> tuple[int, int]:
    """(tokens, rows of the vocabulary) of a tile of logits of the device's size in fp32, with `tokens` if given."""
    size, chosen = chunk_sizes(device_type).tile
    chosen = tokens or chosen
    return chosen, min(vocabulary, max(64, size // (4 * chosen)))


def chunk_sizes(device_type: str) -> ChunkSizes:
    return CHUNK_SIZES["cpu" if device_type == "cpu" else "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step holds beside the checkpoints: (bytes a token, bytes that do not grow), by the moment."""

    shape: "Shape"
    sizes: PieceSizes
    batch: int
    itemsize: int
    keeps: bool
    products: int | None = None
    """Bytes of what matrix products give, where autocast keeps the hidden states wider; None: as of these."""

    @property
    def _narrow(self) -> int:
        return self.products or self.itemsize

    @property
    def _rotary(self) -> float:
        return 2 * self.shape.head_dim * self.itemsize / self.batch

    def _sums(self, pieces: int) -> int:
        """Bytes a parameter of which a gradient is being summed: those of few pieces are not widened."""
        return 0 if self.itemsize >= 4 else 4 if pieces > FEW_PIECES else self.itemsize

    def head(
        self, tokens: int, logits_chunk: Auto, device_type: str, *, wide_sums: bool | None = None
    ) -> tuple[float, float]:
        """At the end of the model, for so many tokens in all rows.

        Args:
            wide_sums: whether weights are narrower than fp32, and gradients summed in it; None: as activations are.
        """
        hidden, vocabulary = self.shape.hidden, self.shape.vocabulary
        asked = None if logits_chunk == "auto" else logits_chunk
        rows = min(tokens, asked or logits_chunk_size(vocabulary, device_type))
        tile_tokens, tile_rows = logits_tile(vocabulary, asked, device_type)
        tile = min(tokens, tile_tokens) * 4 * (6 * hidden + 2 * tile_rows)
        # As Head.by_tiles chooses: the sums of a tile of the vocabulary, and what the projection reads of all tokens.
        whole, tiled = 4 * vocabulary * hidden, (tokens * self.itemsize + 4 * tile_rows) * hidden
        sums = min(whole, tiled) if (self.itemsize < 4 if wide_sums is None else wide_sums) else 0
        a_token = 2 * hidden * self.itemsize + self._rotary
        return a_token, sums + max(rows * 4 * (6 * hidden + vocabulary), tile)

    def by_chunks(self, seq_len: int) -> tuple[float, float]:
        """In a layer's backward by chunks of queries."""
        shape, itemsize = self.shape, self.itemsize
        hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        a_token = hidden * itemsize + 2 * keys * (itemsize + 4) + self._rotary
        chunk = self.batch * min(self.sizes.chunk, seq_len)
        attention = chunk * itemsize * (2 * hidden + 4 * queries + 5 * keys)
        attention += 2 * self.batch * keys * itemsize * KEYS_A_CALL
        return a_token, shape.layer_parameters * self._sums(_pieces(seq_len, self.sizes)) + attention + self._piece(
            chunk
        )

    def by_heads(self, seq_len: int) -> tuple[float, float]:
        """In a layer's backward by groups of heads: after attention, or in the attention of a group."""
        shape, sizes, itemsize, narrow = self.shape, self.sizes, self.itemsize, self._narrow
        hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        groups = max(n for n in range(1, min(sizes.groups, shape.kv_heads) + 1) if shape.kv_heads % n == 0)
        tokens, chunk = self.batch * seq_len, self.batch * min(sizes.chunk, seq_len)
        # One gradient of hidden states; what the heads attended, unless a checkpoint is it, and its gradient.
        both = hidden * itemsize + queries * narrow * (1 if self.keeps else 2) + self._rotary
        both += 0 if self.keeps else 4 * shape.heads
        after = (both + (0 if self.keeps else hidden * itemsize), self._piece(tokens))
        # The attention's input and its gradient; q, k, v of a group and their gradients; a chunk being projected.
        projected = (queries + 2 * keys) / groups
        during = (
            both + 2 * hidden * itemsize + 2 * projected * narrow,
            chunk * (PROJECTION_COPIES * projected + hidden) * itemsize,
        )
        a_token, work = max(after, during, key=lambda moment: tokens * moment[0] + moment[1])
        return a_token, work + shape.layer_parameters * self._sums(_pieces(seq_len, sizes))

    def _piece(self, most: int) -> float:
        """What follows attention, for a piece of at most so many tokens in all rows."""
        tokens = min(self.batch * self.sizes.mlp_chunk, most)
        return tokens * (6 * self.shape.hidden * self.itemsize + 6 * self.shape.intermediate * self._narrow)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of a Hugging Face config, a mapping of its fields, or a shape that was read before."""
        if isinstance(config, Shape):
            return config

        def field(name: str, default: Any = None) -> Any:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            found = default if value is None else value
            if found is None:
                raise ValueError(
                    f"the config has no {name}: give that of a decoder of the Llama family, of a model of images its "
                    "text_config"
                )
            return found

        hidden, heads = field("hidden_size"), field("num_attention_heads")
        # Latent attention: keys have a rotated part, and every head has its own.
        latent = field("qk_nope_head_dim", 0)
        return cls(
            layers=field("num_hidden_layers"),
            hidden=hidden,
            intermediate=field("intermediate_size", 4 * hidden),
            heads=heads,
            kv_heads=heads if latent else field("num_key_value_heads", heads),
            head_dim=latent + field("qk_rope_head_dim") if latent else field("head_dim", hidden // heads),
            vocabulary=field("vocab_size"),
            tied=bool(field("tie_word_embeddings", False)),
        )

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
