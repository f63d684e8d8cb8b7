"""Streamed layers are priced in the pieces that the runtime itself takes on a device."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.layouts.cost.candidates import STREAM, Candidates
from fourfold.layouts.cost.layer import attention_times
from fourfold.layouts.cost.memory import host_bytes, memory_of, pieces_in
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.streamed import launches, shape_of, stream_overhead_s
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import RUNTIME_CPU, RUNTIME_CUDA
from fourfold.parallel.stream.memory import auto_sizes

LLAMA, H100 = load_model("llama-3.2-1b"), load_cluster("H100-80GB")


def streaming(seq_len: int, *, kind: str = "cuda", memory_bytes: float = 8e10, **columns: int) -> Pricing:
    device = replace(H100.device, type=kind, memory_bytes=memory_bytes)
    values = {"checkpointing": np.array([STREAM])} | {name: np.array([value]) for name, value in columns.items()}
    return Pricing(
        layouts=Candidates.from_columns(values, global_batch=8, seq_len=seq_len), model=LLAMA,
        cluster=replace(H100, device=device), software=RUNTIME_CUDA if kind == "cuda" else RUNTIME_CPU,
        constants=load_constants(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("seq_len", [4096, 131072])
def test_pieces_are_those_of_auto(kind, seq_len):
    pieces = pieces_in(streaming(seq_len, kind=kind))
    sizes = auto_sizes(shape_of(LLAMA), seq_len, device_type=kind)
    assert pieces.groups[0] == sizes.groups
    assert pieces.chunks[0] == -(-seq_len // min(sizes.chunk, seq_len))
    if kind == "cuda":
        assert pieces.rest[0] == max(1, seq_len // sizes.mlp_chunk)
    assert (pieces.groups[0] > 0) == (kind == "cuda")


def test_a_fuller_device_cuts_finer():
    large, small = (pieces_in(streaming(65536, memory_bytes=size)) for size in (8e10, 2.4e10))
    assert launches(small)[0] > launches(large)[0]
    assert small.layer_bytes[0] < large.layer_bytes[0]


def test_other_layouts_are_in_one_piece_and_cost_nothing_more():
    plain = streaming(65536, checkpointing=0)
    pieces = pieces_in(plain)
    assert launches(pieces)[0] == pieces.summands[0] == 1
    assert stream_overhead_s(plain, pieces)[0] == pieces.layer_bytes[0] == 0


def test_heads_project_again_and_launch_once_a_group():
    pricing = streaming(65536)
    pieces = pieces_in(pricing)
    finer = replace(pieces, groups=4 * pieces.groups)
    assert launches(finer)[0] - launches(pieces)[0] == pytest.approx(0.6 * 3 * pieces.groups[0] * pieces.chunks[0])
    one, four = (stream_overhead_s(pricing, each)[0] for each in (pieces, finer))
    assert 0 < one <= four
    # By heads no key is read twice: beside attention's own seconds the pieces are little.
    assert four < 0.5 * (attention_times(pricing).forward + attention_times(pricing).backward)[0]


def test_the_memory_of_a_longer_sequence_grows_and_offloading_moves_it():
    lengths = [4096 << power for power in range(6)]
    on_device = [memory_of(streaming(length)).peak[0] for length in lengths]
    assert on_device == sorted(on_device)
    for length, held in zip(lengths, on_device, strict=True):
        moved = streaming(length, offload=1)
        # fp32 inputs of 16 layers
        assert host_bytes(moved)[0] == 16 * length * LLAMA.hidden_size * 4
        assert memory_of(moved).peak[0] < held
    assert host_bytes(streaming(4096))[0] == 0


def test_what_is_pinned_is_told():
    words = ["explain", "llama-3.2-1b", "--layout", "mb1 streamx1 offload", "--cluster", "H100-80GB", "--gpus", "1"]
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--global-batch", "8", "--seq-len", "32768"])
    assert "pinned in host memory, a rank: 4 GiB" in told.stdout
    assert "offloading off" in told.stdout
