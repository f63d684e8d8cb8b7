"""The parts of a price against counts by hand, and properties that every price must have."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.collectives import Network
from fourfold.layouts.cost.layer import Times, saved_bytes
from fourfold.layouts.cost.measured_layers import LAYER, Split, extra_seconds_of_splitting
from fourfold.layouts.cost.memory import _normal_cdf, memory_of
from fourfold.layouts.cost.price import price
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.stages import ends_in_cut, stage_params, stages_of
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.inputs.cluster import Link, LinkOperation, load_cluster
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.inputs.software import MEGATRON, RUNTIME_CPU, RUNTIME_CUDA, Software
from fourfold.layouts.search.explain import draw_schedule
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.parallel.grid import layer_ranges
from fourfold.parallel.stream.memory import stream_memory
from fourfold.parallel.stream.work_space import logits_tile

A100 = load_cluster("A100-80GB")
LLAMA = load_model("llama-3.1-8b")
BYTES = load_model("tiny-llama-bytes")


def pricing_of(layouts: Candidates, software: Software, model: ModelConfig = LLAMA) -> Pricing:
    return Pricing(layouts=layouts, model=model, cluster=A100, software=software, constants=load_constants())


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 24), st.integers(1, 40), st.integers(0, 2), st.integers(0, 3))
def test_stages_are_those_of_layer_ranges(
    num_layers, num_stages, num_micro_batches, embedding_counts_as, head_counts_as
):
    if num_stages == 1:
        embedding_counts_as = head_counts_as = 0
    model = replace(BYTES, num_layers=num_layers)
    less = {"embedding_counts_as": np.array([embedding_counts_as]), "head_counts_as": np.array([head_counts_as])}
    columns = {"pp": np.array([num_stages]), **less}
    stages = stages_of(model, Candidates.from_columns(columns, global_batch=num_micro_batches, seq_len=8))
    try:
        sizes = [len(stage) for stage in layer_ranges(num_layers, num_stages, embedding_counts_as, head_counts_as)]
    except ValueError:
        assert num_layers < num_stages or stages.layers.min() < 1
        return
    assert stages.layers[0, 0] == sizes[0]
    assert stages.layers[2, 0] == sizes[-1]
    if num_stages > 2:
        assert stages.layers[1, 0] == sizes[1] == max(sizes[1:-1])
    assert stages.in_flight[0, 0] == min(num_stages, num_micro_batches)
    assert stages.in_flight[2, 0] == 1


def test_stage_parameters_add_up():
    for pp, tp in ((1, 1), (2, 1), (4, 2)):
        c = Candidates.of([Layout(pp=pp, tp=tp, global_batch=8, seq_len=64)])
        shared, experts = stage_params(LLAMA, c, stages_of(LLAMA, c))
        middle = shared[1, 0] * (pp - 2) if pp > 2 else 0.0
        whole = (shared[0, 0] + middle + (shared[2, 0] if pp > 1 else 0.0)) * tp
        norms = (LLAMA.num_layers * LLAMA.layer_norm_params + LLAMA.final_norm_params) * (tp - 1)
        assert experts.max() == 0
        assert whole - norms == pytest.approx(LLAMA.num_params, rel=1e-12) or pp == 1
        if pp == 1:
            assert shared[0, 0] == LLAMA.num_params


def test_a_weight_of_two_stages_is_held_twice_and_its_gradients_exchanged_once_a_step():
    tied, batch = replace(LLAMA, tied_embeddings=True), {"global_batch": 8, "seq_len": 64}
    weight = LLAMA.vocab_size * LLAMA.hidden_size
    assert tied.num_params == LLAMA.num_params - weight
    for axes, part in (
        ({"pp": 2}, weight), ({"pp": 4, "tp": 2}, weight / 2), ({"pp": 2, "dp": 2, "zero_stage": 1}, weight / 2),
    ):  # fmt: skip
        layouts = Candidates.of([Layout(**axes, **batch)])
        pricing = pricing_of(layouts, RUNTIME_CUDA, tied)
        assert np.array_equal(pricing.held_params, pricing_of(layouts, RUNTIME_CUDA).held_params)
        exchange = time_of(pricing).pp_communication - time_of(pricing_of(layouts, RUNTIME_CUDA)).pp_communication
        link, share = A100.links[0].send, load_constants().inner_link
        assert exchange == pytest.approx(link.latency_s + 4 * part / (link.bandwidth_bytes_per_s * share), rel=1e-9)
    alone = pricing_of(Candidates.of([Layout(**batch)]), RUNTIME_CUDA, tied)
    assert alone.held_params[0][0, 0] == tied.num_params
    assert time_of(alone).pp_communication == 0
    layouts = Candidates.of([Layout(pp=2, **batch)])
    apart, included = (time_of(pricing_of(layouts, MEGATRON, model)) for model in (LLAMA, tied))
    assert apart.pp_communication == included.pp_communication


@pytest.mark.parametrize(
    ("num_layers", "pp", "sizes"),
    [
        (80, 4, [20, 21, 20, 19]),
        (40, 4, [10, 11, 10, 9]),
        (40, 2, [20, 20]),
        (30, 4, [7, 8, 8, 7]),
        (80, 8, [10, 11] + [10] * 5 + [9]),
        (8, 3, [3, 3, 2]),
    ],
)
def test_ends_in_the_cut(num_layers, pp, sizes):
    # embedding + layers + head in runs of equal length, longer ones first
    assert [len(stage) for stage in layer_ranges(num_layers, pp, *ends_in_cut(num_layers, pp))] == sizes


def test_what_a_layer_keeps_is_what_autograd_keeps():
    # Counted by torch's saved_tensors_hooks on transformers' LlamaDecoderLayer: 5146 fp32 values a token at these
    # widths (8 h + 2 kv + 4 f, the log-sum-exp, two values a norm); the count leaves out the last two.
    model = replace(BYTES, num_kv_heads=4)
    c = Candidates.of([Layout(global_batch=1, seq_len=512)])
    kept, layer_input = saved_bytes(pricing_of(c, RUNTIME_CPU, model))
    assert kept[0] / 4 / 512 == pytest.approx(5146, rel=0.005)
    assert layer_input[0] == 512 * 256 * 4


def test_ring_collectives_by_hand():
    link = Link(
        name="wire",
        num_ranks=8,
        operations=(LinkOperation(operation="send", group_size=2, latency_s=1e-5, bandwidth_bytes_per_s=1e9),),
    )
    network = Network(cluster=replace(A100, links=(link,)))
    four, one = np.array([4]), np.array([1])
    assert network.collective_s("all_gather", 1e9, four, one) == pytest.approx(0.75 + 3e-5)
    assert network.collective_s("all_reduce", 1e9, four, one) == pytest.approx(2 * (0.75 + 3e-5))
    assert network.collective_s("all_reduce", 1e9, one, one) == 0
    assert network.send_s(np.array([1e9]), four, one) == pytest.approx(1 + 1e-5)


def test_a_group_over_nodes_enters_each_by_its_own_ports():
    network = Network(cluster=A100)
    one = np.array([1])
    whole = network.collective_s("all_gather", 1e10, np.array([64]), one)[0]
    thin = network.collective_s("all_gather", 1e10, np.array([8]), np.array([8]))[0]
    assert whole == pytest.approx(1e10 * 63 / 64 / (8 * 25e9), rel=0.01)
    assert thin == pytest.approx(1e10 * 7 / 8 / 25e9, rel=0.01)


def test_splitting_costs_what_measured_layers_took_beyond_their_work():
    def work(at: Candidates) -> Times:
        return Times(at.tokens * 1e-6, at.tokens * 2e-6)

    def hops(at: Candidates) -> np.ndarray:
        return (at.cp - 1) * 1e-4

    rows = [
        {
            "cp": 2,
            "micro_batch": count,
            "seq_len": 512,
            "forward_s": count * 256e-6 + ring_s,
            "backward_s": count * 512e-6,
        }
        for count, ring_s in ((1, 0.001), (4, 0.003))
    ]
    columns = {"cp": np.array([1, 1, 1, 2, 2, 2, 4]), "micro_batch": np.array([1, 2, 4, 1, 2, 4, 2])}
    split = Split(piece=LAYER, axis="cp", alone=work, communication=hops)
    both = Candidates.from_columns(columns, global_batch=4, seq_len=512)
    price = extra_seconds_of_splitting(rows, split, both)
    assert price[:3].tolist() == [0, 0, 0]
    assert price[[3, 5]] == pytest.approx([0.001, 0.003])
    assert price[4] == pytest.approx(0.002)  # half way between them in log tokens
    assert price[6] == pytest.approx(3 * 0.001)  # three times the hops of cp 2, at as many tokens as its first row
    # noise: a row that was quicker than its work alone, and one that nothing was split for
    noisy = [{**rows[0], "forward_s": 0.0}, {**rows[0], "cp": 1}]
    for measured in (noisy, noisy[1:]):
        assert extra_seconds_of_splitting(measured, split, both).tolist() == hops(both).tolist()


def test_sequence_parallelism_has_rows_of_its_own_or_exchanges_the_messages_alone():
    def work(at: Candidates) -> Times:
        return Times(at.tokens * 1e-6, at.tokens * 2e-6)

    def messages(at: Candidates) -> np.ndarray:
        return (at.tp - 1) * np.where(at.sequence_parallel, 3e-4, 1e-4)

    def row(extra_s: float, **fields: object) -> dict[str, object]:
        return {
            "tp": 2,
            "micro_batch": 1,
            "seq_len": 512,
            "forward_s": 512e-6 + extra_s,
            "backward_s": 1024e-6,
            **fields,
        }

    columns = {"tp": np.array([1, 2, 2]), "sequence_parallel": np.array([False, False, True])}
    both = Candidates.from_columns(columns, global_batch=1, seq_len=512)
    split = Split(piece=LAYER, axis="tp", alone=work, communication=messages)
    # 2 ms of which 0.1 ms are messages: the host's 1.9 ms stay where other messages take 0.3 ms.
    assert extra_seconds_of_splitting([row(2e-3)], split, both) == pytest.approx([0, 2e-3, 2.2e-3])
    # Half of what the messages should take: nothing is the host's, and both kinds are as much quicker.
    assert extra_seconds_of_splitting([row(5e-5)], split, both) == pytest.approx([0, 5e-5, 1.5e-4])
    # Measured, both are what they are.
    measured = [row(2e-3, sequence_parallel=False), row(1e-3, sequence_parallel=True)]
    assert extra_seconds_of_splitting(measured, split, both) == pytest.approx([0, 2e-3, 1e-3])
    assert extra_seconds_of_splitting(measured[1:], split, both) == pytest.approx([0, 1e-4, 1e-3])


def test_measured_operations_come_before_formulas():
    send = A100.links[0].operations[0]
    measured = LinkOperation(operation="all_reduce", group_size=2, latency_s=1.0, bandwidth_bytes_per_s=1e12)
    cluster = replace(A100, links=(replace(A100.links[0], operations=(send, measured)),))
    seconds = Network(cluster=cluster).collective_s("all_reduce", 1e3, np.array([2, 4]), np.array([1, 1]))
    assert seconds[0] == pytest.approx(1.0)
    assert seconds[1] < 1e-3


def test_normal_distribution():
    assert _normal_cdf(np.array([-1.96, 0.0, 1.96])) == pytest.approx([0.0249979, 0.5, 0.9750021], abs=1e-6)


def test_the_schedule_drawn():
    assert draw_schedule(3, 4) == [
        "012....aa3bb.cc.dd",
        ".01..aa2bb3cc.dd..",
        "..0aa1bb2cc3dd....",
    ]
    assert draw_schedule(1, 3) == ["0aa1bb2cc"]


def test_interleaved_stages_drawn():
    # Both ranks take micro-batches 0 and 1 through their first layers, then through their second ones.
    assert draw_schedule(2, 4, vp=2) == [
        "01012.aa3bb2aa3bb.cc.ddccdd",
        ".010aa1bb2aa3bb2cc3ddccdd..",
    ]
    for line in draw_schedule(4, 8, vp=2, width=200):
        for micro in range(8):
            assert line.count(str(micro)) == 2
            assert line.count(chr(ord("a") + micro)) == 4
    assert len(draw_schedule(4, 64, vp=2)[0]) <= 72


def test_a_stage_has_a_buffer_for_each_micro_batch_that_it_receives():
    def peaks(**fields: object) -> np.ndarray:
        layouts = Candidates.of([Layout(micro_batch=1, checkpointing="full", global_batch=16, seq_len=512, **fields)])
        without = replace(RUNTIME_CPU, pipeline_buffers=False)
        with_buffers, none = (memory_of(pricing_of(layouts, software)) for software in (RUNTIME_CPU, without))
        return (with_buffers.by_stage - none.by_stage)[:, 0] / (16 * 512 * LLAMA.hidden_size * 4)

    # The first stage receives gradients, the last hidden states, those between both.
    assert peaks(pp=4).tolist() == [1, 2, 1]
    assert peaks(pp=1).tolist() == [0, 0, 0]
    # Two interleaved stages a rank: three or four receive, and what they sent stays until the step ends.
    assert peaks(pp=4, vp=2).tolist() == [6, 8, 6]


def test_parts_add_up():
    layout = Layout(dp=2, pp=2, tp=2, zero_stage=1, global_batch=32, seq_len=2048)
    priced = price(LLAMA, A100, [layout], software=MEGATRON)[0]
    assert sum(priced.time_parts_s.values()) == pytest.approx(priced.step_s)
    assert sum(priced.memory_parts_bytes.values()) == pytest.approx(priced.peak_bytes)
    assert max(priced.stage_peaks_bytes.values()) == pytest.approx(priced.peak_bytes)
    tokens = 32 * 2048
    assert priced.mfu == pytest.approx(tokens * LLAMA.flops_per_token(2048) / (312e12 * 8 * priced.step_s))


# 1 is no number of chunks, but whatever the runtime chooses; and by heads, on a GPU, chunks only cut projections.
@pytest.mark.parametrize("space_stack", [MEGATRON, RUNTIME_CPU])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_more_chunks_hold_less_and_take_longer(space_stack, kind):
    layouts = [
        Layout(dp=8, checkpointing="stream", stream_chunks=n, global_batch=8, seq_len=65536) for n in (4, 16, 64)
    ]
    cluster = replace(A100, device=replace(A100.device, type=kind))
    prices = price(LLAMA, cluster, layouts, software=space_stack)
    for few, many in itertools.pairwise(prices):
        assert many.peak_bytes <= few.peak_bytes
        assert many.step_s >= few.step_s
        if kind == "cpu":
            assert many.peak_bytes < few.peak_bytes
            assert many.step_s > few.step_s


@pytest.mark.parametrize("seq_len", [8192, 16384])
def test_a_streamed_head_holds_no_more_than_the_runtime_s_closed_form_says(seq_len):
    """Some tiles of logits, whose size the sequence does not change; not all those of a chunk of the layers."""
    # One thin layer, so that the peak is at the head.
    model = replace(LLAMA, num_layers=1, hidden_size=512, ffn_size=512, num_heads=4, num_kv_heads=1)
    streaming = Layout(checkpointing="stream", stream_chunks=16, global_batch=1, seq_len=seq_len)
    full = replace(streaming, checkpointing="full", stream_chunks=1)
    without = replace(RUNTIME_CUDA, streams_head=False)
    streamed, whole = (
        price(model, A100, [layout], software=software)[0].memory_parts_bytes["logits"]
        for layout, software in ((streaming, RUNTIME_CUDA), (full, without))
    )
    config = {"hidden_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": model.vocab_size}
    said = stream_memory(config, seq_len, itemsize=2, device_type="cuda").head_bytes
    sums = (seq_len * 2 + 4 * logits_tile(model.vocab_size, None, "cuda")[1]) * 512  # of bf16 weights; these are fp32
    assert streamed == pytest.approx(said - sums, rel=1e-3)
    assert whole > 10 * streamed


def test_offloading_hides_behind_a_layer_that_works_long_enough():
    # A layer input of 2 h bytes a token, 20 GB/s: 0.41 us a token; its forward at 13 h^2 FLOPs is longer on an A100.
    kept, away = (
        price(LLAMA, A100, [Layout(dp=8, checkpointing="full", offload=offload, global_batch=8, seq_len=8192)],
              software=MEGATRON)[0]
        for offload in (False, True)
    )  # fmt: skip
    assert away.step_s == kept.step_s
    assert kept.peak_bytes - away.peak_bytes == pytest.approx(32 * 8192 * 4096 * 2, rel=0.2)
    quick = replace(A100.device, peak_flops_per_s=1e18, memory_bandwidth_bytes_per_s=1e16)
    layout = Layout(dp=8, checkpointing="full", offload=True, global_batch=8, seq_len=8192)
    seconds = price(LLAMA, replace(A100, device=quick), [layout], software=MEGATRON)[0].time_parts_s["overhead"]
    assert seconds == pytest.approx(2 * 32 * 8192 * 4096 * 2 / 20e9, rel=0.1)


def test_overlapped_tensor_parallelism_leaves_a_share_in_sight():
    layout = Layout(dp=1, tp=8, sequence_parallel=True, global_batch=8, seq_len=8192)
    bare, hidden = (
        price(LLAMA, A100, [layout], software=replace(MEGATRON, tp_overlap=share))[0].time_parts_s["tp_communication"]
        for share in (0.0, 0.8)
    )
    assert hidden == pytest.approx(bare * (1 - 0.9 * 0.8))


LAYOUTS = [
    Layout(dp=4, pp=2, tp=4, cp=2, zero_stage=1, global_batch=64, seq_len=4096),
    Layout(dp=64, zero_stage=3, checkpointing="full", global_batch=64, seq_len=4096),
    Layout(dp=8, tp=8, sequence_parallel=True, global_batch=64, seq_len=4096),
    Layout(dp=2, pp=8, tp=4, vp=2, micro_batch=2, checkpointing="selective", global_batch=64, seq_len=4096),
]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(LAYOUTS), st.floats(1.0, 8.0), st.integers(0, 1))
def test_a_faster_link_never_makes_a_step_slower(layout, factor, tier):
    links = list(A100.links)
    send = links[tier].operations[0]
    faster = replace(send, bandwidth_bytes_per_s=send.bandwidth_bytes_per_s * factor, latency_s=send.latency_s / factor)
    links[tier] = replace(links[tier], operations=(faster,))
    before = price(LLAMA, A100, [layout], software=MEGATRON)[0].step_s
    after = price(LLAMA, replace(A100, links=tuple(links)), [layout], software=MEGATRON)[0].step_s
    assert after <= before * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(LAYOUTS), st.floats(1.0, 3.0))
def test_more_memory_never_makes_a_layout_unfit(layout, factor):
    device = replace(A100.device, memory_bytes=A100.device.memory_bytes * factor)
    c = Candidates.of([layout])
    before = memory_of(pricing_of(c, MEGATRON)).fit_probability[0]
    after = memory_of(replace(pricing_of(c, MEGATRON), cluster=replace(A100, device=device))).fit_probability[0]
    assert after >= before


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(LAYOUTS), st.floats(1.0, 4.0))
def test_units(layout, factor):
    """A device and links that are `factor` times as fast in every way make the step that much shorter."""
    device = A100.device
    fast = replace(
        device,
        peak_flops_per_s=device.peak_flops_per_s * factor,
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s * factor,
    )
    links = tuple(
        replace(
            link,
            operations=tuple(
                replace(op, bandwidth_bytes_per_s=op.bandwidth_bytes_per_s * factor, latency_s=op.latency_s / factor)
                for op in link.operations
            ),
        )
        for link in A100.links
    )
    constants = load_constants()
    pauses = {name: getattr(constants, name) / factor for name in ("kernel_gap_s", "sync_s", "step_overhead_s")}
    quicker = replace(constants, **pauses)
    before = price(LLAMA, A100, [layout], software=MEGATRON, constants=constants)[0].step_s
    cluster = replace(A100, device=fast, links=links)
    after = price(LLAMA, cluster, [layout], software=MEGATRON, constants=quicker)[0].step_s
    assert after * factor == pytest.approx(before, rel=1e-9)


def test_twice_the_gpus_are_never_slower_than_overheads_explain():
    steps = [
        rank_layouts(LLAMA, A100, SearchRequest(num_devices=n, global_batch=512, seq_len=4096, space="full"), top=1)
        .layouts[0]
        .step_s
        for n in (8, 16, 32, 64, 128, 256)
    ]
    for few, many in itertools.pairwise(steps):
        assert many < few * 1.05
