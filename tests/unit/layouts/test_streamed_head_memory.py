"""The memory of a head that alone is streamed, as the runtime does it where logits are large."""

from dataclasses import replace

from fourfold.layouts.cost.price import price
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import RUNTIME_CUDA
from fourfold.parallel.stream.work_space import Shape, loss_bytes

A100 = load_cluster("A100-80GB")
LLAMA = load_model("llama-3.1-8b")
WITHOUT = replace(RUNTIME_CUDA, streams_head=False)


def test_the_head_alone_is_streamed_where_the_runtime_streams_it():
    """Of every layout of a kind that has large logits at all: by the runtime's rule and its closed form."""
    model = replace(LLAMA, num_layers=4, hidden_size=512, ffn_size=512, num_heads=4, num_kv_heads=4)
    plain = Layout(dp=8, global_batch=32, micro_batch=4, seq_len=8192)
    piped = replace(plain, dp=4, pp=2)
    shape = Shape(
        layers=4, hidden=512, intermediate=512, heads=4, kv_heads=4, head_dim=model.head_dim,
        vocabulary=model.vocab_size, tied=model.tied_embeddings,
    )  # fmt: skip
    plainly, sharded = (loss_bytes(4 * 8192, shape, 2, "cuda", hidden_itemsize=wide) for wide in (4, 2))
    streamed = [plain, replace(plain, checkpointing="full"), replace(plain, zero_stage=3), replace(piped, vp=2)]
    whole = [replace(plain, dp=4, tp=2), replace(piped, vp=2, schedule="zero-bubble"), replace(piped, schedule="2bw")]
    few = replace(plain, micro_batch=1, seq_len=256)
    found = [each.memory_parts_bytes["logits"] for each in price(model, A100, [*streamed, *whole])]
    assert found[: len(streamed)] == [plainly, plainly, sharded, plainly]
    assert min(found[len(streamed) :]) > 4 * plainly
    # So few logits are whole, in any software.
    ours, others = (price(model, A100, [few], software=each)[0] for each in (RUNTIME_CUDA, WITHOUT))
    assert ours.memory_parts_bytes == others.memory_parts_bytes
    ours, others = (price(model, A100, [plain], software=each)[0] for each in (RUNTIME_CUDA, WITHOUT))
    assert ours.memory_parts_bytes["logits"] < others.memory_parts_bytes["logits"] / 4


def test_fewer_micro_batches_than_stages_wait_together():
    """torch's 1F1B takes no fewer than stages: all go forward first, on the last stage too."""
    one, few, full = (Layout(pp=4, global_batch=count, micro_batch=1, seq_len=8192) for count in (1, 2, 4))
    alone, both, usual = (price(LLAMA, A100, [each])[0] for each in (one, few, full))
    assert both.stage_peaks_bytes["last"] > usual.stage_peaks_bytes["last"]
    kept = LLAMA.vocab_size * LLAMA.hidden_size * 4 + 2 * 8192 * LLAMA.hidden_size * 4
    assert both.memory_parts_bytes["logits"] - alone.memory_parts_bytes["logits"] == kept
    elsewhere = price(LLAMA, A100, [few], software=replace(RUNTIME_CUDA, few_at_once=False))[0]
    assert elsewhere.stage_peaks_bytes["last"] < both.stage_peaks_bytes["last"] - kept
