"""What streaming keeps in memory, as a closed form without torch: for planners, and for "how long a sequence fits?".

Two moments bound a step. At the head, every layer's input is there, and the last hidden states with their gradient.
In the backward of the last layer, one gradient of hidden states is there, and: by chunks of queries, the layer's keys,
values and their gradients; by groups of heads, the output of all heads and its gradient, and either a piece of what
follows attention or the queries, keys and values of a group with their gradients. All grow linearly with the tokens;
the chunks' own work does not grow.

Rules of thumb count what the Llama family's modules make of a token in a chunk; they were set by measurement, on a CPU:
what is said of "cuda" has not been held against a device yet.
"""

import math
from dataclasses import dataclass
from typing import Any

from fourfold.parallel.stream.work_space import Auto, PieceSizes, Shape, Work, check_sizes, chunk_sizes, kept_layers

# By heads, a GPU's pieces: of more tokens than these its matrix products take no less time a token.
MLP_PIECES = (8192, 4096, 2048)
PROJECTED_PIECES = (32768, 8192)
GROUPS = (1, 2, 4, 8)
# By heads, the largest pieces may cost so much more than the smallest: on a GPU pieces are time.
ROOM_BY_HEADS = 1.4
# Part of a device's free memory that "auto" counts on: the allocator loses some between blocks.
USABLE = 0.9
# "auto" takes the largest chunks that cost at most this much of the memory that the smallest would take.
ROOM = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamMemory:
    """Bytes of activations and passing gradients; weights, their gradients and optimizer states are not in it.

    Gradients of fp32 weights are summed where they stay. Those of bf16 weights are first summed in fp32: that is in it.

    Attributes:
        checkpoints_bytes: layer inputs but the first, and attention outputs where they are kept, as far as they are
            on the device.
        head_bytes: at the head, beside the checkpoints.
        layer_bytes: in a layer's backward, beside the checkpoints.
        bytes_a_token: growth of the total with each further token.
        host_bytes: pinned in host memory, where offloaded.
    """

    checkpoints_bytes: int
    head_bytes: int
    layer_bytes: int
    bytes_a_token: float
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The step's peak."""
        return self.checkpoints_bytes + max(self.head_bytes, self.layer_bytes)

    def copy_seconds(self, bytes_a_second: float) -> float:
        """Of a step, at this speed each way; hidden as far as a layer computes longer than its share.

        Args:
            bytes_a_second: between device and pinned host memory: 25e9 for PCIe 4, 50e9 for PCIe 5, of 16 lanes.
        Raises:
            ValueError: a speed that is not above 0.
        """
        if not bytes_a_second > 0:
            raise ValueError(f"bytes_a_second={bytes_a_second}: give a speed above 0, as 50e9 for PCIe 5")
        return 2 * self.host_bytes / bytes_a_second


def auto_sizes(
    config: Any,
    seq_len: int,
    *,
    asked: "Asked | None" = None,
    device_type: str = "cpu",
    free_bytes: float | None = None,
    **arguments: Any,
) -> PieceSizes:
    """What "auto" stands for: by chunks of queries on a CPU, by heads elsewhere.

    By heads, the largest pieces of MLP, then the most tokens to project, then the fewest groups, that fit, and take at
    most ROOM_BY_HEADS of the memory that the smallest would. Up to 8192 tokens are one piece wherever that fits: a
    device would only be slower with less.

    Args:
        config, seq_len, arguments: as stream_memory's.
        asked: sizes that are given and not "auto".
        device_type: "cpu" or "cuda".
        free_bytes: of the device, beside what is allocated; None is enough.
    """
    asked = asked or Asked()
    if asked.head_groups == 0 or (asked.head_groups == "auto" and device_type == "cpu"):
        return _by_chunks(config, seq_len, asked, device_type=device_type, **arguments)
    rows: int = arguments.get("batch", 1)
    shape = Shape.of(config)

    def a_row(tokens: int) -> int:
        return max(1, min(seq_len, tokens // rows))

    mlps = tuple(map(a_row, MLP_PIECES)) if asked.mlp_chunk == "auto" else (asked.mlp_chunk,)
    counts = tuple(n for n in GROUPS if n <= shape.kv_heads and (n == 1 or asked.can_cut))
    if asked.head_groups != "auto":
        counts = (asked.head_groups,)
    chunks = tuple(map(a_row, PROJECTED_PIECES)) if asked.chunk_size == "auto" else (asked.chunk_size,)

    def total(sizes: PieceSizes) -> int:
        return stream_memory(
            shape, seq_len, head_groups=sizes.groups, chunk_size=sizes.chunk, mlp_chunk=sizes.mlp_chunk,
            device_type=device_type, **arguments,
        ).total_bytes  # fmt: skip

    sizes = [PieceSizes(groups=n, chunk=chunk, mlp_chunk=mlp) for mlp in mlps for chunk in chunks for n in counts]
    totals = {each: total(each) for each in reversed(sizes)}
    # Not always of the smallest pieces: the gradients of many are summed in fp32.
    least = min(totals.values())
    usable = math.inf if free_bytes is None else USABLE * free_bytes
    if not asked.can_cut and asked.head_groups == "auto" and least > usable:
        # All heads at once do not fit; some queries at a time may.
        return _by_chunks(config, seq_len, asked, device_type=device_type, **arguments)
    short = rows * seq_len <= MLP_PIECES[0]
    limit = min(usable, math.inf if short else ROOM_BY_HEADS * least)
    return next((each for each in sizes if totals[each] <= limit), min(totals, key=totals.__getitem__))


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Sizes as stream_backprop is given them.

    Attributes:
        can_cut: whether the model's attention can be cut into groups of heads: not where its projections are one, have
            adapters, or a norm over all heads. By heads it is then one group.
    """

    head_groups: Auto = "auto"
    chunk_size: Auto = "auto"
    mlp_chunk: Auto = "auto"
    can_cut: bool = True


def _by_chunks(config: Any, seq_len: int, asked: Asked, *, device_type: str, **arguments: Any) -> PieceSizes:
    chunk, mlp = asked.chunk_size, asked.mlp_chunk
    if chunk == "auto" or mlp == "auto":
        found = auto_chunks(config, seq_len, device_type=device_type, chunk_size=chunk, **arguments)
        chunk, mlp = found[0], found[1] if mlp == "auto" else mlp
    return PieceSizes(groups=0, chunk=chunk, mlp_chunk=mlp)


def auto_chunks(
    config: Any, seq_len: int, *, device_type: str = "cpu", chunk_size: Auto = "auto", **arguments: Any
) -> tuple[int, int]:
    """(chunk_size, mlp_chunk) by chunks of queries: the largest that take little more memory than the smallest.

    Args:
        config, seq_len, arguments: as stream_memory's.
        device_type: "cpu" or "cuda".
        chunk_size: queries a chunk where they are given, and only the MLP's tokens are wanted.
    """
    pairs = chunk_sizes(device_type).pairs
    if chunk_size != "auto":
        pairs = tuple((chunk_size, min(chunk_size, mlp)) for _, mlp in pairs)

    def total(pair: tuple[int, int]) -> int:
        found = stream_memory(
            config, seq_len, head_groups=0, chunk_size=pair[0], mlp_chunk=pair[1], device_type=device_type, **arguments
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
    head_groups: Auto = "auto",
    free_bytes: float | None = None,
) -> StreamMemory:
    """Live tensors' memory at the peak of one streamed forward and backward.

    A process holds more than its live tensors: on CPU 30 to 60 MiB more were seen (benchmarks/stream_backprop).

    Args:
        config: a Hugging Face config, or its fields as a mapping: dense decoders of the Llama family.
        seq_len, batch: tokens a row, and rows.
        chunk_size, mlp_chunk, logits_chunk, keep_attention, head_groups: as stream_backprop's.
        offload: whether what layers keep is offloaded, as CUDA does. Counted from the code, not yet measured.
        itemsize: bytes of an activation: 4 for fp32, 2 for bf16.
        device_type: what "auto" chooses for, "cpu" or "cuda".
        free_bytes: of the device, beside weights, gradients and optimizer states, which "auto" looks at on a device;
            None is enough for any pieces. A longer sequence may be cut into smaller pieces, and then take less.
    Raises:
        ValueError: a length, batch or chunk below 1, another device, a config without the sizes of a decoder.
    Source: derived here; checked against measured peaks in tests/unit/stream/test_stream_memory.py.
    """
    for name, value in {"seq_len": seq_len, "batch": batch, "itemsize": itemsize}.items():
        if isinstance(value, float | str) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
    check_sizes({
        "chunk_size": chunk_size, "mlp_chunk": mlp_chunk, "logits_chunk": logits_chunk, "head_groups": head_groups,
        "keep_attention": keep_attention,
    })  # fmt: skip
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type={device_type!r}: give 'cpu' or 'cuda'")
    if offload not in (True, False, "host", None):
        raise ValueError(f"offload={offload!r}: give True, or False")
    kept_of = {"keep_attention": keep_attention, "offload": offload, "itemsize": itemsize, "batch": batch}
    if "auto" in (head_groups, chunk_size, mlp_chunk):
        asked = Asked(head_groups=head_groups, chunk_size=chunk_size, mlp_chunk=mlp_chunk)
        sizes = auto_sizes(
            config, seq_len, asked=asked, device_type=device_type, free_bytes=free_bytes, logits_chunk=logits_chunk,
            **kept_of,
        )  # fmt: skip
    else:
        sizes = PieceSizes(groups=int(head_groups), chunk=int(chunk_size), mlp_chunk=int(mlp_chunk))
    shape, tokens = Shape.of(config), batch * seq_len
    hidden, queries, layers = shape.hidden, shape.heads * shape.head_dim, shape.layers
    kept = kept_layers(keep_attention, layers)
    # The first layer's input is looked up again. Of offloaded layers two are on the device, one on its way.
    on_device = min(2, layers - 1) / max(1, layers - 1) if offload else 1.0
    an_input, an_output = hidden * itemsize, queries * itemsize + 4 * shape.heads
    a_token = on_device * (layers - 1) * an_input + (min(2, kept) if offload else kept) * an_output
    work = Work(shape=shape, sizes=sizes, batch=batch, itemsize=itemsize, keeps=kept > 0)
    head_a_token, head = work.head(tokens, logits_chunk, device_type)
    layer_a_token, layer = work.by_chunks(seq_len) if sizes.groups == 0 else work.by_heads(seq_len)
    return StreamMemory(
        checkpoints_bytes=int(tokens * a_token),
        head_bytes=int(tokens * head_a_token + head),
        layer_bytes=int(tokens * layer_a_token + layer),
        bytes_a_token=a_token + max(head_a_token, layer_a_token),
        host_bytes=tokens * ((layers - 1) * an_input + kept * an_output) if offload else 0,
    )


def max_seq_len(
    config: Any, memory_bytes: float, *, state_bytes_a_parameter: float = 16.0, host_bytes: float = math.inf,
    limit: int = 1 << 26, **arguments: Any,
) -> int:  # fmt: skip
    """The longest sequence whose streamed step fits into a device's memory; 0 where not one token does.

    Args:
        config: as stream_memory's.
        memory_bytes: what the device has for this process.
        state_bytes_a_parameter: weights, gradients and optimizer states: 16 for AdamW in fp32, less where sharded.
        host_bytes: host memory that may be pinned, where the step offloads.
        limit: give up above it.
        arguments: stream_memory's others.
    Raises:
        ValueError: an amount that is below 0 or no number, and as stream_memory.
    """
    amounts = {
        "memory_bytes": memory_bytes, "state_bytes_a_parameter": state_bytes_a_parameter, "host_bytes": host_bytes
    }  # fmt: skip
    for name, value in amounts.items():
        if isinstance(value, str) or not value >= 0:
            raise ValueError(f"{name}={value!r}: give a number of at least 0")
    left = memory_bytes - state_bytes_a_parameter * num_parameters(config)
    fits, over = 0, limit + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        # As on the device, where "auto" makes do with what is free.
        found = stream_memory(config, middle, **{"free_bytes": max(left, 0.0), **arguments})
        if found.total_bytes <= left and found.host_bytes <= host_bytes:
            fits = middle
        else:
            over = middle
    return fits


def num_parameters(config: Any) -> int:
    """Parameters of a dense decoder of the Llama family; biases and the norms of heads are left out."""
    shape = Shape.of(config)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * shape.layer_parameters + embeddings + shape.hidden
