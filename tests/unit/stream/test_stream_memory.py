"""The closed form of streaming's memory against the bytes of tensors alive at a step's peak."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from fourfold.parallel.attention.backends import BACKENDS
from fourfold.parallel.stream.memory import (
    Asked,
    auto_chunks,
    auto_sizes,
    max_seq_len,
    num_parameters,
    stream_memory,
)
from fourfold.parallel.stream.model import stream_backprop
from fourfold.parallel.stream.work_space import PieceSizes
from fourfold.parallel.testing.tiny_models import FAMILIES, MORE_FAMILIES, tiny

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
CHUNKS = {"chunk_size": 256, "mlp_chunk": 256, "logits_chunk": 256}


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, and the most alive at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.seen:
                    self._count(storage)
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed():
            self.now -= size
            self.seen.discard(key)

        weakref.finalize(storage, freed)


def peak(seq_len: int, **settings) -> int:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, sliding_window=None, max_position_embeddings=8192)).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stream_backprop(model, **{**CHUNKS, **settings})
    ids = torch.randint(0, 512, (1, seq_len))
    with LiveBytes() as live:
        model(input_ids=ids, labels=ids).loss.backward()
    return live.peak


@pytest.mark.parametrize("keep_attention", [False, 2, True])
def test_memory_is_linear_with_the_predicted_slope(keep_attention):
    # From where the prefix is longer than a kernel call's keys, so that only what grows with the sequence grows.
    peaks = [peak(length, keep_attention=keep_attention) for length in (1536, 2560)]
    expected = stream_memory(SHAPE, 2560, keep_attention=keep_attention, **CHUNKS)
    assert (peaks[1] - peaks[0]) / 1024 == pytest.approx(expected.bytes_a_token, rel=0.05)
    # The part that does not grow is a rule of thumb: it plans, and must not promise too little.
    assert 0.8 <= expected.total_bytes / peaks[-1] <= 1.5


def test_longest_sequence_is_where_memory_ends():
    state = 16 * num_parameters(SHAPE)
    budget = state + 100e6
    longest = max_seq_len(SHAPE, budget)
    assert stream_memory(SHAPE, longest).total_bytes + state <= budget
    assert stream_memory(SHAPE, longest + 1).total_bytes + state > budget
    assert max_seq_len(SHAPE, state) == 0
    assert max_seq_len(SHAPE, budget, keep_attention=True) < longest
    assert max_seq_len(SHAPE, budget, batch=2) < longest
    with pytest.raises(ValueError, match="seq_len=0"):
        stream_memory(SHAPE, 0)


def test_chunks_grow_with_the_room_there_is():
    wide = {**SHAPE, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64}
    assert auto_chunks(wide, 1 << 11, logits_chunk=32) == (256, 128)
    assert auto_chunks(SHAPE, 256) == (1024, 128)  # all 256 tokens
    assert auto_chunks(SHAPE, 1 << 16) == (1024, 128)
    assert auto_chunks(SHAPE, 1 << 20, device_type="cuda") == (4096, 4096)
    assert auto_chunks(SHAPE, 1 << 16, chunk_size=100) == (100, 100)
    short, long = (stream_memory(SHAPE, 1 << 16, chunk_size=size).total_bytes for size in (256, 1024))
    assert short <= long <= 1.1 * short
    assert stream_memory(SHAPE, 1 << 16, mlp_chunk=128).total_bytes == long
    # Of the three layer inputs that are kept, two are on the device.
    assert stream_memory(SHAPE, 1 << 16, offload=True).total_bytes == long - (1 << 16) * 64 * 4


def test_parameters_are_counted():
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    head_norms = 4 * 2 * 16
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters()) - head_norms


def test_the_closed_form_needs_no_torch():
    code = (
        "import sys; from fourfold.parallel.stream import stream_memory, max_seq_len; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}, check=False).returncode == 0


class OneCall:
    """A CPU's kernel as a GPU's is called: a causal block whole, unmasked keys all at once."""

    name, leaf = "one_call", 0

    def refusal(self, q, k):
        return None

    def forward(self, q, k, v, *, causal, scale):
        return BACKENDS["cpu_flash"].forward(q, k, v, causal=causal, scale=scale)

    def backward(self, grad_out, saved, *, causal, scale):
        return BACKENDS["cpu_flash"].backward(grad_out, saved, causal=causal, scale=scale)


HEADS = {"chunk_size": 128, "mlp_chunk": 128, "head_groups": 2}


@pytest.mark.parametrize("keep_attention", [False, True])
def test_memory_by_heads_is_linear_with_the_predicted_slope(keep_attention):
    peaks = [peak(length, keep_attention=keep_attention, backend=OneCall(), **HEADS) for length in (1536, 2560)]
    expected = stream_memory(SHAPE, 2560, keep_attention=keep_attention, **{**CHUNKS, **HEADS})
    assert (peaks[1] - peaks[0]) / 1024 == pytest.approx(expected.bytes_a_token, rel=0.02)
    assert 0.8 <= expected.total_bytes / peaks[-1] <= 1.5


H100 = {"device_type": "cuda", "itemsize": 2}
QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_gpu_cuts_by_heads_in_pieces_as_large_as_its_memory_allows():
    # A short sequence is one piece where there is room, and smaller pieces where there is not.
    assert auto_sizes(QWEN3_4B, 8192, **H100) == PieceSizes(groups=1, chunk=8192, mlp_chunk=8192)
    small = auto_sizes(QWEN3_4B, 8192, free_bytes=int(3e9), **H100)
    assert small.mlp_chunk < 8192
    assert stream_memory(
        QWEN3_4B, 8192, head_groups=small.groups, chunk_size=small.chunk, mlp_chunk=small.mlp_chunk, **H100
    ).total_bytes <= 0.9 * 3e9  # fmt: skip
    offloading = auto_sizes(QWEN3_4B, 8192, offload=True, **H100)
    assert offloading == PieceSizes(groups=1, chunk=8192, mlp_chunk=8192)
    # Where nothing fits, the smallest: the step may still.
    assert auto_sizes(QWEN3_4B, 8192, free_bytes=0, **H100) == PieceSizes(groups=8, chunk=8192, mlp_chunk=2048)
    long = auto_sizes(QWEN3_4B, 1 << 17, keep_attention=True, offload=True, **H100)
    assert long.mlp_chunk == 8192
    assert long.groups > 1
    # Rows share the tokens of a piece.
    assert auto_sizes(QWEN3_4B, 8192, batch=4, **H100).mlp_chunk <= 2048
    # What is asked for is not changed; a CPU cuts by queries.
    assert auto_sizes(QWEN3_4B, 8192, asked=Asked(head_groups=2, mlp_chunk=100), **H100).groups == 2
    assert auto_sizes(QWEN3_4B, 8192).groups == 0
    by_queries = auto_sizes(QWEN3_4B, 8192, asked=Asked(head_groups=0), **H100)
    assert (by_queries.chunk, by_queries.mlp_chunk) == auto_chunks(QWEN3_4B, 8192, **H100)


def test_offloading_ends_where_host_memory_does():
    arguments = {"offload": True, "keep_attention": True, **H100}
    longest = max_seq_len(QWEN3_4B, 80e9, state_bytes_a_parameter=4, **arguments)
    a_token = 35 * 2560 * 2 + 36 * (4096 * 2 + 4 * 32)
    assert stream_memory(QWEN3_4B, longest, **arguments).host_bytes == longest * a_token
    assert max_seq_len(QWEN3_4B, 80e9, state_bytes_a_parameter=4, host_bytes=100e9, **arguments) == int(
        100e9 // a_token
    )
    assert stream_memory(QWEN3_4B, 1000, **arguments).copy_seconds(25e9) == 2 * 1000 * a_token / 25e9


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_sizes_are_chosen_for_every_family(family, device_type):
    config = tiny(family).config
    sizes = auto_sizes(config, 4096, device_type=device_type, free_bytes=1 << 30)
    assert 1 <= sizes.mlp_chunk <= 4096
    assert sizes.groups <= config.num_attention_heads


def test_attention_that_cannot_be_cut_is_one_group_or_goes_by_queries():
    step = {"device_type": "cuda", "itemsize": 2, "offload": True}
    assert auto_sizes(QWEN3_8B, 1 << 17, **step).groups > 1
    assert auto_sizes(QWEN3_8B, 1 << 17, asked=Asked(can_cut=False), **step).groups == 1
    by_heads = stream_memory(QWEN3_8B, 1 << 17, head_groups=1, chunk_size=8192, mlp_chunk=2048, **step)
    tight = auto_sizes(
        QWEN3_8B, 1 << 17, asked=Asked(can_cut=False), free_bytes=int(0.9 * by_heads.total_bytes), **step
    )
    assert tight.groups == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"head_groups": -1}, "head_groups=-1"),
        ({"logits_chunk": 0}, "logits_chunk=0"),
        ({"chunk_size": 1.5}, "chunk_size=1.5"),
        ({"mlp_chunk": "all"}, "mlp_chunk='all'"),
        ({"keep_attention": -2}, "keep_attention=-2"),
        ({"itemsize": 0}, "itemsize=0"),
        ({"batch": "2"}, "batch='2'"),
        ({"device_type": "gpu"}, "device_type='gpu'"),
        ({"offload": "disk"}, "offload='disk'"),
        ({"seq_len": 1.5}, "seq_len=1.5"),
        ({"config": {"hidden_size": 64}}, "has no num_attention_heads"),
        ({"config": None}, "has no hidden_size"),
    ],
)
def test_what_makes_no_sense_is_refused_and_not_counted(arguments, told):
    with pytest.raises(ValueError, match=told):
        stream_memory(**{"config": SHAPE, "seq_len": 512, **arguments})


def test_amounts_of_memory_that_are_none_are_refused():
    for amounts in ({"memory_bytes": float("nan")}, {"host_bytes": -1.0}, {"state_bytes_a_parameter": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(amounts))):
            max_seq_len(SHAPE, **{"memory_bytes": 1e9, **amounts})
    with pytest.raises(ValueError, match="bytes_a_second=0"):
        stream_memory(SHAPE, 512).copy_seconds(0)


@pytest.mark.parametrize("step", [{}, {"offload": True}, {"keep_attention": True}])
def test_the_longest_sequence_is_cut_as_the_device_would_cut_it(step):
    """Where little is free "auto" takes smaller pieces: the longest sequence is one of those, and grows with memory."""
    left = 40e9
    memory = left + 4 * num_parameters(QWEN3_4B)
    longest = max_seq_len(QWEN3_4B, memory, state_bytes_a_parameter=4, **step, **H100)

    def least(seq_len: int) -> int:
        return min(
            stream_memory(
                QWEN3_4B, seq_len, head_groups=groups, chunk_size=chunk, mlp_chunk=mlp, **step, **H100
            ).total_bytes
            for groups in (1, 2, 4, 8) for chunk in (8192, 32768) for mlp in (2048, 4096, 8192)
        )  # fmt: skip

    assert least(longest) <= left < least(longest + 1)
    lengths = [max_seq_len(QWEN3_4B, memory + more, state_bytes_a_parameter=4, **step, **H100) for more in (1e8, 1e9)]
    assert longest < lengths[0] < lengths[1]


@pytest.mark.parametrize("head_groups", [0, 2])
def test_autocast_keeps_the_weights_of_one_layer_at_most(head_groups):
    """Of a short sequence they are most of a forward's memory."""
    peaks = []
    for layers in (2, 6):
        model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}, max_position_embeddings=64))
        stream_backprop(model, **{**CHUNKS, "logits_chunk": 8}, head_groups=head_groups, verify=False)
        ids = torch.randint(0, 512, (1, 8))
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        peaks.append(live.peak)
        loss.backward()
    a_layer = 2 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert peaks[1] - peaks[0] < a_layer
